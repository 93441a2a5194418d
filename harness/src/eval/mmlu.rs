//! MMLU (Hendrycks et al., arXiv 2009.03300): questions, prompts, scores, accuracy.

pub mod prompts;
pub mod questions;
pub mod score;
pub mod table;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// How a question is put, and what of the model's answer counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scoring {
    /// Choices in the prompt; the logits of " A" to " D" after "Answer:"
    #[default]
    Letter,
    /// No choices in the prompt; the mean log-probability per token of each choice's text
    Cloze,
}

/// The letters of the choices.
pub const LETTERS: [char; 4] = ['A', 'B', 'C', 'D'];
