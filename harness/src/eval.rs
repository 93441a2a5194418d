//! Evaluation: the loss on an eval set, and MMLU.

pub mod loss;
pub mod mmlu;
