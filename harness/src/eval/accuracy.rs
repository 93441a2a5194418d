//! Accuracy on records: a generated answer is compared with the record's, or the likeliest of a question's choices is taken.

pub mod answer;
pub mod choices;
pub mod metric;
pub mod questions;
pub mod report;

use crate::data::options::EncodingArgs;
use crate::data::records::Reading;
use crate::data::template::Template;
use crate::hub::locate_file;
use crate::options::{Count, one_or_many};
use crate::ranks::Ranks;
use answer::{Asking, Generation, Outcome, Setting};
use anyhow::Result;
use clap::Args;
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::Backend;
use hydra_runtime::model::Model;
use hydra_runtime::tokenizer::Tokenizer;
use metric::Metric;
use questions::{Question, Selection};
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
    #[serde(default, deserialize_with = "one_or_many")]
    pub stop: Vec<String>,
    /// Answers generated at once [default: 8]
    #[arg(long, value_name = "N", help_heading = "Generation")]
    pub batch: Option<Count>,
}

/// Records that a model answers with several adapters.
pub struct Answers {
    questions: Vec<Question>,
    /// What counts.
    pub metric: Metric,
    generation: Generation,
    encoding: EncodingArgs,
}

impl Answers {
    /// Reads the records; `encoding` is that of the training records, and `label_field` holds the label of a record's head.
    pub fn read(options: &AccuracyArgs, encoding: &EncodingArgs, label_field: &str) -> Result<Self> {
        let reading = Reading { label_field, format: encoding.data_format };
        let selection = Selection { reading, metric: options.metric, limit: options.limit.map(Count::get) };
        let (questions, metric) = questions::read(&locate_file(&options.data)?, &selection)?;
        Ok(Self { questions, metric, generation: options.generation(), encoding: encoding.clone() })
    }

    /// Fails if a record can't be asked: call it before the work.
    pub fn check(&self, tokenizer: &Tokenizer, context: usize) -> Result<()> {
        let template = Template::new(&self.encoding, tokenizer)?;
        let asking = Asking { template: &template, templated: self.encoding.template.is_some(), context };
        self.questions.iter().try_for_each(|question| asking.check(question, self.metric))
    }

    /// All answers, with the work of all ranks; an interrupt is the error [`crate::interrupt::Stopped`].
    pub fn of<B: Backend>(
        &self,
        model: &Model<B>,
        adapter: Option<&Adapter>,
        tokenizer: &Tokenizer,
        ranks: &Ranks,
    ) -> Result<Outcome> {
        let template = Template::new(&self.encoding, tokenizer)?;
        let (templated, context) = (self.encoding.template.is_some(), model.config().context);
        let asking = Asking { template: &template, templated, context };
        let (metric, generation) = (self.metric, &self.generation);
        Setting { model, adapter, asking, metric, generation, ranks }.answer(&self.questions)
    }
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
