//! `hydra eval mmlu`: accuracy on MMLU's multiple-choice questions.

use super::adapter::AdapterArgs;
use crate::device::{ModelArgs, on_device};
use crate::eval::mmlu::lm_eval::Results;
use crate::eval::mmlu::questions::{self, Selection, Subject};
use crate::eval::mmlu::score::score;
use crate::eval::mmlu::table::Report;
use crate::eval::mmlu::{Asking, Scoring, Style};
use crate::interrupt;
use crate::options::{Count, whole};
use crate::output::{self, writable};
use crate::ranks::{self, Ranks, digest_of, fact};
use crate::run::manifest::weights;
use crate::sha256;
use anyhow::{Context, Result, bail};
use clap::Args;
use hydra_runtime::adapter::Adapter;
use hydra_runtime::atomic::NewFolder;
use hydra_runtime::backend::Backend;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::tokenizer::Tokenizer;
use std::path::{Path, PathBuf};

/// Options of `eval mmlu`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten, next_help_heading = "Adapter")]
    adapter: AdapterArgs,
    /// MMLU's folder: the original distribution (dev/, test/), what `hydra fetch mmlu` wrote, or cais/mmlu's Parquet files or name
    #[arg(long, value_name = "DIR", help_heading = "Data")]
    data: PathBuf,
    /// Number of exemplars in each prompt, from dev/
    #[arg(long, value_name = "K", default_value_t = 0, value_parser = whole, help_heading = "Evaluation")]
    shots: usize,
    /// What counts as the model's answer
    #[arg(long, value_enum, default_value_t, help_heading = "Evaluation")]
    scoring: Scoring,
    /// Whose prompts and weighting to repeat [default: lm-eval's prompts, with questions as they are]
    #[arg(long, value_enum, help_heading = "Evaluation")]
    style: Option<Style>,
    /// Only these subjects, comma-separated
    #[arg(long, value_name = "LIST", value_delimiter = ',', help_heading = "Evaluation")]
    subjects: Option<Vec<String>>,
    /// The most questions per subject
    #[arg(long, value_name = "N", help_heading = "Evaluation")]
    limit: Option<Count>,
    /// Write the result to a JSON file as well
    #[arg(long, value_name = "FILE.json", help_heading = "Output")]
    json: Option<PathBuf>,
    /// Write a line of JSON per question
    #[arg(long, value_name = "FILE.jsonl", help_heading = "Output")]
    predictions: Option<PathBuf>,
    /// Write results and samples in lm-evaluation-harness's form, with --style lm-eval, to a new folder
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    lm_eval: Option<PathBuf>,
}

/// Asks the questions and shows the accuracy; on rank 0, with the work of all.
pub fn run(arguments: Arguments) -> Result<()> {
    ranks::share(|ranks| {
        ranks.on_first(|| check(&arguments))?;
        on_device!(arguments.model.device, ranks, device => run_on(device, arguments, ranks))
    })
}

/// Fails if options exclude each other, or results can't be written.
fn check(arguments: &Arguments) -> Result<()> {
    if arguments.style.is_some() && arguments.scoring == Scoring::Cloze {
        bail!("--style: expected --scoring letter, found cloze");
    }
    if arguments.lm_eval.is_some() && arguments.style != Some(Style::LmEval) {
        bail!("--lm-eval: expected --style lm-eval");
    }
    let results = [("--json", arguments.json.as_ref()), ("--predictions", arguments.predictions.as_ref())];
    let inputs = [Some(Path::new(&arguments.model.model)), Some(&*arguments.data), arguments.adapter.folder()];
    writable(&results, &inputs)
}

/// What is asked, and of whom.
struct Ready {
    subjects: Vec<Subject>,
    checkpoint: Checkpoint,
    adapter: Option<Adapter>,
    tokenizer: Tokenizer,
}

impl Ready {
    fn read(arguments: &Arguments) -> Result<Self> {
        let &Arguments { shots, limit, ref subjects, style, .. } = arguments;
        let selection = Selection { shots, limit: limit.map(Count::get), subjects: subjects.clone(), style };
        let subjects = questions::read(&arguments.data, &selection)?;
        let checkpoint = arguments.model.checkpoint()?;
        let adapter = arguments.adapter.load(checkpoint.config())?;
        let tokenizer = checkpoint.tokenizer()?;
        Ok(Self { subjects, checkpoint, adapter, tokenizer })
    }
}

fn run_on<B: Backend>(device: B, arguments: Arguments, ranks: &Ranks) -> Result<()> {
    let mut folder = None;
    ranks.on_first(|| {
        folder = arguments.lm_eval.as_deref().map(NewFolder::begin).transpose().context("--lm-eval")?;
        folder.as_ref().map_or(Ok(()), |folder| interrupt::discard(folder.path()))
    })?;
    let Ready { subjects, checkpoint, adapter, tokenizer } = ranks.agree(Ready::read(&arguments))?;
    let Arguments { model: ModelArgs { model: name, .. }, shots, scoring, style, json, predictions, .. } = arguments;
    let limit = arguments.limit.map(Count::get);
    let asking = Asking { scoring, style };
    let model = ranks.load(device, &checkpoint, || {
        let (model, adapter) = (weights(&checkpoint), digest_of(adapter.as_ref()));
        let questions = sha256::of_text(&format!("{subjects:?} {asking:?}"));
        Ok(vec![fact("--model", model), fact("--adapter", adapter), fact("question or option", questions)])
    })?;
    let outcome = score(&model, adapter.as_ref(), &tokenizer, &subjects, asking, ranks)?;
    if !ranks.is_first() {
        return Ok(());
    }
    let report = Report::new(&outcome, shots, asking);
    let lines: Vec<String> = outcome.predictions.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
    let text: String = lines.into_iter().map(|line| line + "\n").collect();
    // Each is written even if another fails: it took long to compute.
    let predictions = predictions.map_or(Ok(()), |path| output::write(&path, &text));
    let json = json.map_or(Ok(()), |path| output::write_json(&path, &report));
    let lm_eval = folder.map_or(Ok(()), |folder| {
        let results = Results { model: &name, subjects: &subjects, asking, limit, outcome: &outcome, report: &report };
        for (file, text) in results.files() {
            let written = output::write(&folder.path().join(file), &text);
            output::named(written, folder.path(), folder.destination())?;
        }
        Ok(folder.keep()?)
    });
    output::print(report.table())?;
    predictions.and(json).and(lm_eval)
}
