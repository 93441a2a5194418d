//! MMLU (Hendrycks et al., arXiv 2009.03300): questions, prompts, scores, accuracy.

pub mod prompts;
pub mod questions;
pub mod score;
pub mod table;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// How a question is asked, and what counts as the answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scoring {
    /// The prompt lists the choices; compares the logits of " A" to " D" after "Answer:"
    #[default]
    Letter,
    /// The prompt lists no choices; compares the mean log-probability per token of each choice's text
    Cloze,
}

/// The letters of the choices.
pub const LETTERS: [char; 4] = ['A', 'B', 'C', 'D'];
