//! Accuracy on records: a generated answer is compared with the record's, or the likeliest of a question's choices is taken.

pub mod answer;
pub mod choices;
pub mod metric;
pub mod questions;
pub mod report;
