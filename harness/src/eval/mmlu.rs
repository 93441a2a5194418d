//! MMLU (Hendrycks et al., arXiv 2009.03300): questions, prompts, scores, accuracy.

pub mod helm;
pub mod lm_eval;
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

/// Whose prompts and weighting to repeat; the letter is the answer.
///
/// | style | about the subject | a question | exemplars | weighting |
/// |---|---|---|---|---|
/// | `lm-eval` | "about anatomy." | without space around it | in their order | micro |
/// | `hendrycks` | "about  anatomy." | as it is | in their order | micro |
/// | `opencompass` | "about  anatomy." | lines end with "\n" alone | in their order | macro |
/// | `helm` | "about anatomy." | the same, behind "Question: " | drawn: [`helm`] | macro |
///
/// HELM's answer is the likeliest of all tokens, and any choice with the right one's text is right. Without a style, prompts
/// are those of `lm-eval`, with questions as they are.
///
/// Compared with lm-eval 0.4.13 (which `.ci/lm-eval` runs) and with the sources of crfm-helm 0.5.16, opencompass 0.5.4
/// (`mmlu_ppl_ac766d.py`) and the original `evaluate.py`. Two things are not repeated. They leave out exemplars where a prompt
/// is too long; that is an error here. And the original reads its files with pandas, which from 2.0 on takes the choice "None",
/// in ten questions, for a missing value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Style {
    /// EleutherAI's lm-evaluation-harness, task mmlu
    LmEval,
    /// The original evaluation of Hendrycks et al.
    Hendrycks,
    /// OpenCompass, mmlu_ppl
    Opencompass,
    /// Stanford's HELM, multiple_choice_joint
    Helm,
}

impl Style {
    /// Whether every subject weighs the same, and not every question.
    pub fn weighs_subjects(self) -> bool {
        matches!(self, Self::Opencompass | Self::Helm)
    }
}

/// How questions are asked.
#[derive(Clone, Copy, Debug, Default)]
pub struct Asking {
    /// What counts as the answer.
    pub scoring: Scoring,
    /// Whose prompts they are; with [`Scoring::Letter`] alone.
    pub style: Option<Style>,
}

impl From<Scoring> for Asking {
    fn from(scoring: Scoring) -> Self {
        Self { scoring, style: None }
    }
}

/// The letters of the choices.
pub const LETTERS: [char; 4] = ['A', 'B', 'C', 'D'];
