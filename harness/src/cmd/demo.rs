//! `hydra demo`: LoRA, LoRA-Split and HydraLoRA with about equal parameter counts, on a tiny model and a corpus of four domains
//! that the binary carries (`assets/`).

mod assets;
mod page;

use crate::device::{DeviceArgs, on_device};
use crate::eval::mmlu::Scoring;
use crate::eval::mmlu::questions::{self, Selection, Subject};
use crate::eval::mmlu::score::score;
use crate::eval::mmlu::table::Report;
use crate::options::{Count, Finite, NonNegative, Seed};
use crate::ranks::Ranks;
use crate::report;
use crate::run::choices::{Heads, MethodName, Targets};
use crate::run::log::EvalLine;
use crate::run::prepare::finetune;
use crate::run::spec::{AdapterSpec, RunSpec, TrainingSpec};
use crate::{interrupt, output};
use anyhow::{Result, bail};
use clap::Args;
use hydra_runtime::adapter::Adapter;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::model::Model;
use hydra_runtime::projection::Projection;
use page::{Outcome, Row, Run};
use std::path::PathBuf;
use std::time::Instant;

/// Options of `demo`.
#[derive(Args)]
pub struct Arguments {
    /// Number of steps of each fine-tune
    #[arg(long, value_name = "N", default_value_t = Count::new(400), help_heading = "Training")]
    steps: Count,
    /// Folder for the demo; an earlier demo there is replaced
    #[arg(long, value_name = "DIR", default_value = "hydra-demo", help_heading = "Output")]
    out: PathBuf,
    #[command(flatten, next_help_heading = "Device")]
    device: DeviceArgs,
}

/// A method, and the rank at which it has about as many parameters as the others.
struct Method {
    title: &'static str,
    name: MethodName,
    folder: &'static str,
    rank: usize,
    heads: usize,
}

const METHODS: [Method; 3] = [
    Method { title: "LoRA", name: MethodName::Lora, folder: "lora", rank: 12, heads: 1 },
    Method { title: "LoRA-Split", name: MethodName::Split, folder: "split", rank: 3, heads: 4 },
    Method { title: "HydraLoRA", name: MethodName::Hydra, folder: "hydra", rank: 4, heads: 4 },
];

/// The tiny model can't name letters; it can tell which text fits.
const SCORING: Scoring = Scoring::Cloze;

/// Fine-tunes with each method, and compares them.
pub fn run(arguments: Arguments) -> Result<()> {
    let started = Instant::now();
    let out = &arguments.out;
    let _lock = assets::write(out, &METHODS.map(|method| method.folder))?;
    let subjects = questions::read(&out.join("mmlu"), &Selection::default())?;
    let questions = subjects.iter().map(|subject| subject.test.len()).sum();
    let mut outcome = Outcome { steps: arguments.steps.get(), questions, ..Outcome::default() };
    for method in &METHODS {
        add(&mut outcome, method, &arguments, &subjects)?;
        if interrupt::requested() {
            return Ok(());
        }
    }
    let (head, cells) = outcome.table(|n| n.to_string());
    output::print(format_args!("\n{}\n", output::text_table(&head, &cells)))?;
    outcome.seconds = started.elapsed().as_secs_f64();
    outcome.write(out)?;
    let (seconds, page) = (outcome.seconds, out.join(report::FILE));
    output::print(format_args!("{seconds:.0} s; curves and the router's heat map are in {}\n", page.display()))?;
    Ok(())
}

/// Fine-tunes with one method; without an adapter, the model is measured once.
fn add(outcome: &mut Outcome, method: &Method, arguments: &Arguments, subjects: &[Subject]) -> Result<()> {
    let spec = spec(method, arguments);
    let command = output::command_line(&spec.command_line());
    output::say(format_args!("\n{command}"));
    let done = finetune(spec, false, &Ranks::alone())?;
    if interrupt::requested() {
        return Ok(());
    }
    let [first, .., last] = done.trained.evals.as_slice() else { bail!("the demo measured no eval loss") };
    let losses = |line: &EvalLine| {
        let all = line.loss.all.loss;
        line.loss.categories.values().map(|loss| loss.loss).chain([all]).collect::<Vec<_>>()
    };
    if outcome.rows.is_empty() {
        outcome.domains = first.loss.categories.keys().cloned().collect();
        let (accuracy, stderr) = accuracy(arguments, None, subjects)?;
        outcome.rows.push(Row { title: "before", parameters: 0, losses: losses(first), accuracy, stderr });
    }
    let (accuracy, stderr) = accuracy(arguments, Some(&done.trained.adapter), subjects)?;
    let (title, parameters) = (method.title, done.trainable);
    outcome.rows.push(Row { title, parameters, losses: losses(last), accuracy, stderr });
    let training = done.trained.steps.iter().map(|line| (line.step as f64, line.loss)).collect();
    outcome.runs.push(Run { title, folder: method.folder, training });
    outcome.commands.push(command);
    outcome.router = done.router.or(outcome.router.take());
    Ok(())
}

/// A method's fine-tune; what all three share was chosen on the tiny model.
fn spec(method: &Method, arguments: &Arguments) -> RunSpec {
    let dir = &arguments.out;
    let mut spec = RunSpec {
        adapter: AdapterSpec {
            method: Some(method.name),
            rank: Some(Count::new(method.rank)),
            heads: Some(Heads::Number(Count::new(method.heads))),
            targets: Some(Targets(Projection::ALL.to_vec())),
            alpha: Some(Finite::new(32.0)),
            dropout: Some(NonNegative::new(0.0)),
            ..AdapterSpec::default()
        },
        training: TrainingSpec {
            batch: Some(Count::new(16)),
            grad_accum: Some(Count::new(1)),
            steps: Some(arguments.steps),
            lr: Some(NonNegative::new(3e-3)),
            warmup: Some(NonNegative::new(10.0)),
            clip: Some(NonNegative::new(1.0)),
            seed: Some(Seed::new(0)),
            ..TrainingSpec::default()
        },
        device: arguments.device.clone(),
        ..RunSpec::default()
    };
    spec.model.model = Some(dir.join("model").display().to_string());
    spec.data.data = vec![dir.join("corpus/train.jsonl")];
    spec.evaluation.eval_data = Some(dir.join("corpus/test.jsonl"));
    spec.output.out = Some(dir.join(method.folder));
    spec
}

fn accuracy(arguments: &Arguments, adapter: Option<&Adapter>, subjects: &[Subject]) -> Result<(f64, f64)> {
    let checkpoint = Checkpoint::open(arguments.out.join("model"))?;
    let tokenizer = checkpoint.tokenizer()?;
    let outcome = on_device!(arguments.device, device => {
        let model = Model::load(device, &checkpoint)?;
        score(&model, adapter, &tokenizer, subjects, SCORING.into(), &Ranks::alone())?
    });
    let report = Report::new(&outcome, 0, SCORING.into());
    // The demo asks a hundred questions.
    Ok((report.accuracy_micro, report.stderr.unwrap_or(f64::NAN)))
}
