//! `hydra eval accuracy`: generated answers, or choices, against those of records.

use super::adapter::AdapterArgs;
use crate::data::format::Format;
use crate::data::options::EncodingArgs;
use crate::data::records::CATEGORY;
use crate::device::{ModelArgs, on_device};
use crate::eval::accuracy::report::Report;
use crate::eval::accuracy::{AccuracyArgs, Answers};
use crate::output::{self, writable};
use crate::ranks::{self, Ranks, digest_of, fact};
use crate::run::manifest::{inputs, weights};
use anyhow::Result;
use clap::Args;
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::Backend;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::tokenizer::Tokenizer;
use std::path::{Path, PathBuf};

/// Options of `eval accuracy`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten, next_help_heading = "Adapter")]
    adapter: AdapterArgs,
    #[command(flatten)]
    questions: AccuracyArgs,
    /// Prompt template for instructions: plain, official, alpaca, chat, or a Jinja file [default: plain]
    ///
    /// Questions with choices have prompts of their own, as in lm-evaluation-harness, unless this is given.
    #[arg(long, value_name = "NAME|FILE", help_heading = "Data")]
    template: Option<String>,
    /// Jinja file to render conversations with [default: the model's own chat template]
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    chat_template: Option<PathBuf>,
    /// Format of the records, where their keys fit several [default: the one that the keys tell]
    #[arg(long, value_enum, value_name = "FORMAT", help_heading = "Data")]
    data_format: Option<Format>,
    /// Write the result to a JSON file as well
    #[arg(long, value_name = "FILE.json", help_heading = "Output")]
    json: Option<PathBuf>,
    /// Write a line of JSON per question
    #[arg(long, value_name = "FILE.jsonl", help_heading = "Output")]
    predictions: Option<PathBuf>,
}

/// Asks the questions and shows the accuracy; on rank 0, with the work of all.
pub fn run(arguments: Arguments) -> Result<()> {
    ranks::share(|ranks| {
        let results = [("--json", arguments.json.as_ref()), ("--predictions", arguments.predictions.as_ref())];
        let inputs =
            [Some(Path::new(&arguments.model.model)), Some(&*arguments.questions.data), arguments.adapter.folder()];
        ranks.on_first(|| writable(&results, &inputs))?;
        on_device!(arguments.model.device, ranks, device => run_on(device, arguments, ranks))
    })
}

/// What is asked, and of whom.
struct Ready {
    checkpoint: Checkpoint,
    adapter: Option<Adapter>,
    tokenizer: Tokenizer,
    answers: Answers,
}

impl Ready {
    fn read(arguments: &Arguments) -> Result<Self> {
        let checkpoint = arguments.model.checkpoint()?;
        let adapter = arguments.adapter.load(checkpoint.config())?;
        let field = adapter.as_ref().and_then(|adapter| adapter.config.label_field.as_deref());
        let encoding = EncodingArgs {
            template: arguments.template.clone(),
            chat_template: arguments.chat_template.clone(),
            data_format: arguments.data_format,
            ..EncodingArgs::default()
        };
        let answers = Answers::read(&arguments.questions, &encoding, field.unwrap_or(CATEGORY))?;
        let tokenizer = checkpoint.tokenizer()?;
        answers.check(&tokenizer, checkpoint.config().context)?;
        Ok(Self { checkpoint, adapter, tokenizer, answers })
    }
}

fn run_on<B: Backend>(device: B, arguments: Arguments, ranks: &Ranks) -> Result<()> {
    let Ready { checkpoint, adapter, tokenizer, answers } = ranks.agree(Ready::read(&arguments))?;
    let model = ranks.load(device, &checkpoint, || {
        let Arguments { questions, template, chat_template, data_format, .. } = &arguments;
        Ok(vec![
            fact("--model", weights(&checkpoint)),
            fact("--adapter", digest_of(adapter.as_ref())),
            fact("question or option", inputs(questions)?),
            fact("form of prompts", format!("{template:?} {chat_template:?} {data_format:?}")),
        ])
    })?;
    let outcome = answers.of(&model, adapter.as_ref(), &tokenizer, ranks)?;
    if !ranks.is_first() {
        return Ok(());
    }
    let report = Report::new(&outcome, answers.metric);
    let lines: Vec<String> = outcome.predictions.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
    let text: String = lines.into_iter().map(|line| line + "\n").collect();
    // Each is written even if another fails: it took long to compute.
    let predictions = arguments.predictions.map_or(Ok(()), |path| output::write(&path, &text));
    let json = arguments.json.map_or(Ok(()), |path| output::write_json(&path, &report));
    output::print(report.table())?;
    predictions.and(json)
}
