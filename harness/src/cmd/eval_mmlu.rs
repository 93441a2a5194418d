//! `hydra eval mmlu`: accuracy on multiple choice questions.

use super::{adapter as load_adapter, positive, write_json};
use crate::device::{ModelArgs, on_device};
use crate::mmlu::Scoring;
use crate::mmlu::questions::{self, Selection};
use crate::mmlu::score::score;
use crate::mmlu::table::Report;
use crate::output::{self, writable};
use anyhow::{Result, bail};
use clap::Args;
use hydra_runtime::backend::Backend;
use hydra_runtime::model::Model;
use std::path::PathBuf;

/// Options of `eval mmlu`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    /// An adapter's folder
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// The head of this label, of an adapter with the label gate [default: a subject's, if it is called like a label, else the
    /// mean of the heads]
    #[arg(long, value_name = "LABEL", requires = "adapter")]
    label: Option<String>,
    /// The original distribution (dev/, test/) or what `hydra fetch mmlu` wrote
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Exemplars a subject
    #[arg(long, allow_negative_numbers = true, value_name = "K", default_value_t = 0)]
    shots: usize,
    /// What counts as the answer
    #[arg(long, value_enum, default_value_t)]
    scoring: Scoring,
    /// Only these subjects, with commas between them
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    subjects: Option<Vec<String>>,
    /// The most questions a subject
    #[arg(long, allow_negative_numbers = true, value_name = "PER_SUBJECT", value_parser = positive)]
    limit: Option<usize>,
    /// Write the result there
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a line per question there
    #[arg(long, value_name = "FILE.jsonl")]
    predictions: Option<PathBuf>,
}

/// Runs it.
pub fn run(arguments: Arguments) -> Result<()> {
    if let (Some(json), Some(predictions)) = (&arguments.json, &arguments.predictions)
        && output::same_place(json, predictions)
    {
        bail!("--json and --predictions are both {}", json.display());
    }
    writable(arguments.json.as_ref())?;
    writable(arguments.predictions.as_ref())?;
    on_device!(arguments.model.device, device => run_on(device, arguments))
}

fn run_on<B: Backend>(device: B, arguments: Arguments) -> Result<()> {
    let Arguments { model, adapter, label, data, shots, scoring, subjects, limit, json, predictions } = arguments;
    let subjects = questions::read(&data, &Selection { shots, limit, subjects })?;
    let checkpoint = model.checkpoint()?;
    let adapter = load_adapter(adapter.as_deref(), label.as_deref(), checkpoint.config())?;
    let tokenizer = checkpoint.tokenizer()?;
    let model = Model::load(device, &checkpoint)?;
    let outcome = score(&model, adapter.as_ref(), &tokenizer, &subjects, scoring)?;
    let report = Report::new(&outcome, shots, scoring);
    let lines: Vec<String> = outcome.predictions.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
    let text: String = lines.into_iter().map(|line| line + "\n").collect();
    // Each is tried, whatever becomes of the others: it took long to find.
    let predictions = predictions.map_or(Ok(()), |path| output::write(&path, &text));
    let json = json.map_or(Ok(()), |path| write_json(&path, &report));
    output::print(report.table())?;
    predictions.and(json)
}
