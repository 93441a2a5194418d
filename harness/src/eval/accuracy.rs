//! Accuracy on records: a generated answer is compared with the record's, or the likeliest of a question's choices is taken.

pub mod answer;
pub mod choices;
pub mod metric;
pub mod questions;
pub mod report;

use crate::options::Count;
use answer::Generation;
use clap::Args;
use metric::Metric;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Which questions to ask, and what counts: options of `eval accuracy`, and the table `[accuracy]` of an experiment.
#[derive(Args, Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct AccuracyArgs {
    /// Records as for finetune, or questions with choices as ARC, HellaSwag, PIQA, BoolQ and MMLU have them
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    pub data: PathBuf,
    /// What counts [default: choice for questions with choices, else exact]
    #[arg(long, value_enum, help_heading = "Evaluation")]
    pub metric: Option<Metric>,
    /// Compare only what follows the last TEXT in an answer, as "####" in GSM8K's
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = "Evaluation")]
    pub after: Option<String>,
    /// The most questions per category
    #[arg(long, value_name = "N", help_heading = "Evaluation")]
    pub limit: Option<Count>,
    /// Maximum number of tokens of an answer [default: 256]
    #[arg(long, value_name = "N", help_heading = "Generation")]
    pub max_tokens: Option<Count>,
    /// End an answer before this text; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = "Generation")]
    #[serde(default)]
    pub stop: Vec<String>,
    /// Answers generated at once [default: 8]
    #[arg(long, value_name = "N", help_heading = "Generation")]
    pub batch: Option<Count>,
}

impl AccuracyArgs {
    /// How to generate.
    pub fn generation(&self) -> Generation {
        Generation {
            max_tokens: self.max_tokens.map_or(256, Count::get),
            stop: self.stop.clone(),
            after: self.after.clone(),
            batch: self.batch.map_or(8, Count::get),
        }
    }
}
