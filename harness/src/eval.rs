//! Evaluation: the loss on an eval set, MMLU, and what routers do.

pub mod health;
pub mod loss;
pub mod mmlu;
pub mod router;
