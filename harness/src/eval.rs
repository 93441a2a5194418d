//! Evaluation: the loss on an eval set, accuracy on records, MMLU, and what routers do.

pub mod accuracy;
pub mod health;
pub mod loss;
pub mod mmlu;
pub mod router;
