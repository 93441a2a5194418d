//! `hydra compare`: runs of a TOML file on the same records in the same order, each with several seeds, in one table.

mod page;
mod summary;

use super::experiment::kept::{self, Finished, Task};
use super::experiment::plan::{Plan, Run, Settings};
use super::experiment::tune::{self, Tuned};
use super::experiment::{Corpus, Questions, Stage, check_folder, digest, open_folder, raw_records};
use super::finetune::Source;
use super::write_json;
use crate::device::{ModelArgs, on_device};
use crate::mmlu::questions::{self, Selection};
use crate::{interrupt, output};
use anyhow::{Context, Result};
use clap::Args;
use hydra_runtime::backend::Backend;
use hydra_runtime::model::Model;
use std::path::{Path, PathBuf};

/// The result's name in the folder.
pub const RESULT: &str = "compare.json";
/// Says that a folder is this command's.
const MARK: &str = "compare.toml";

/// Options of `compare`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    /// Records to train on, as for finetune
    #[arg(long, value_name = "FILE.jsonl", num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// Records to measure the loss on, by category and overall
    #[arg(long, value_name = "FILE.jsonl")]
    eval_data: PathBuf,
    /// MMLU's questions, as for eval mmlu [default: none are asked]
    #[arg(long, value_name = "DIR")]
    mmlu: Option<PathBuf>,
    /// The runs: seeds = [..]; [defaults] and [[run]] (name and any option of finetune); [tune] lr = [..], fraction = 0.25,
    /// validation = 0.1, seed = 0; [mmlu] shots = 0, scoring = "letter", limit, subjects; [bootstrap] samples = 2000, seed = 0,
    /// level = 0.95
    #[arg(long, value_name = "FILE.toml")]
    config: PathBuf,
    /// The folder to work in: new, empty, or that of the same comparison, which goes on where it stopped
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Runs it.
pub fn run(arguments: Arguments) -> Result<()> {
    let plan = Plan::read(&arguments.config)?;
    let begun = check_folder(&arguments.out, MARK)?;
    on_device!(arguments.model.device, device => run_on(device, arguments, plan, begun))
}

fn run_on<B: Backend>(device: B, arguments: Arguments, plan: Plan, begun: bool) -> Result<()> {
    let out = &arguments.out;
    let checkpoint = arguments.model.checkpoint()?;
    let tokenizer = checkpoint.tokenizer()?;
    let questions = arguments.mmlu.as_deref().map(|dir| ask(dir, &plan)).transpose()?;
    let data = Corpus::new(&arguments.data)?;
    let eval_data = Corpus::new(std::slice::from_ref(&arguments.eval_data))?;
    // What can fail in any run fails now.
    for run in &plan.runs {
        let task = task(run, run.settings.clone(), plan.seeds[0], &data, &eval_data, out);
        let options = run.arguments(&task.words(&arguments.model.model))?;
        let check = Source::read(&options, checkpoint.config()).and_then(|source| source.check(&source.records));
        check.with_context(|| run.title())?;
    }
    // All records as tokens: seconds, which an experiment that goes on has spent before.
    if !begun {
        let first = task(&plan.runs[0], plan.runs[0].settings.clone(), plan.seeds[0], &data, &eval_data, out);
        first.check(&arguments.model, &checkpoint, &tokenizer, &device)?;
        if let Some(tune) = &plan.tune {
            tune::apart(tune, raw_records(&data.paths)?.len())?;
        }
    }
    let model = Model::load(device, &checkpoint)?;
    let stage = Stage { options: &arguments.model, checkpoint: &checkpoint, tokenizer, model, questions };
    let _lock = open_folder(out, MARK, &arguments.config)?;
    interrupt::listen()?;
    let results = results(&stage, &plan, &data, &eval_data, out);
    let Some(results) = interrupt::unless_stopped(results)? else {
        output::print(format_args!("{}: stopped, the same command goes on\n", out.display()))?;
        return Ok(());
    };
    let about = summary::About {
        model: &arguments.model.model,
        precision: serde_json::to_value(arguments.model.device.precision())?,
        data: &data.described,
        eval_data: &eval_data.described[0],
        mmlu: stage.questions.is_some().then_some(&plan.mmlu),
        tune: plan.tune.as_ref(),
    };
    let summary = summary::Summary::new(about, &plan, &results)?;
    write_json(&out.join(RESULT), &summary)?;
    page::write(out, &summary, &results)?;
    output::print(summary.text())?;
    output::print(format_args!("{}\n", out.display()))?;
    Ok(())
}

/// All that was found.
struct Results {
    /// Without an adapter.
    base: Finished,
    /// By run.
    tuned: Vec<Option<Tuned>>,
    /// By run and seed.
    runs: Vec<Vec<Finished>>,
}

fn ask(dir: &Path, plan: &Plan) -> Result<Questions> {
    let mmlu = &plan.mmlu;
    let selection = Selection { shots: mmlu.shots, limit: mmlu.limit, subjects: mmlu.subjects.clone() };
    let subjects = questions::read(dir, &selection)?;
    let digest = digest(&format!("{subjects:?} {:?}", mmlu.scoring));
    Ok(Questions { subjects, scoring: mmlu.scoring, digest })
}

fn task<'a>(
    run: &'a Run,
    settings: Settings,
    seed: u64,
    data: &'a Corpus,
    eval_data: &'a Corpus,
    out: &Path,
) -> Task<'a> {
    let dir = out.join("runs").join(&run.folder).join(format!("seed-{seed}"));
    Task { run, settings, seed, data, eval_data, ask: true, dir }
}

/// Does what is not there yet, or ends with [`interrupt::Stopped`].
fn results<B: Backend>(
    stage: &Stage<'_, '_, B>,
    plan: &Plan,
    data: &Corpus,
    eval_data: &Corpus,
    out: &Path,
) -> Result<Results> {
    let parts = match &plan.tune {
        Some(tune) => Some(tune::split(tune, &data.paths, &out.join("tune"))?),
        None => None,
    };
    let tunes = |run: &Run| !run.settings.contains_key("lr");
    let mut trials: Vec<_> = Vec::new();
    for run in &plan.runs {
        trials.push(match (&plan.tune, &parts) {
            (Some(tune), Some(parts)) if tunes(run) => tune::trials(tune, run, parts, &out.join("tune")),
            _ => Vec::new(),
        });
    }
    // A result of another configuration is refused before anything is added to those that are there.
    for (run, trials) in plan.runs.iter().zip(&trials) {
        for (_, trial) in trials {
            trial.kept(stage)?;
        }
        for &seed in plan.seeds.iter().filter(|_| trials.is_empty()) {
            task(run, run.settings.clone(), seed, data, eval_data, out).kept(stage)?;
        }
    }
    let base = kept::base(stage, eval_data, &plan.runs[0].settings, &out.join("base"))?;
    interrupt::check()?;
    let mut tuned = Vec::new();
    for (run, trials) in plan.runs.iter().zip(&trials) {
        tuned.push(if trials.is_empty() {
            None
        } else {
            let chosen = tune::choose(stage, run, trials, |text| output::say(format_args!("\n{text}")))?;
            output::say(format_args!("{}: lr {:e} it is", run.name, chosen.lr));
            Some(chosen)
        });
    }
    let total = plan.runs.len() * plan.seeds.len();
    let mut runs = Vec::new();
    for (run, tuned) in plan.runs.iter().zip(&tuned) {
        let mut settings = run.settings.clone();
        if let Some(tuned) = tuned {
            settings.insert("lr".into(), tuned.lr.into());
        }
        let mut seeds = Vec::new();
        for &seed in &plan.seeds {
            let place = runs.len() * plan.seeds.len() + seeds.len() + 1;
            output::say(format_args!("\n{}, seed {seed} ({place} of {total})", run.name));
            let task = task(run, settings.clone(), seed, data, eval_data, out);
            seeds.push(task.finish(stage)?);
        }
        runs.push(seeds);
    }
    Ok(Results { base, tuned, runs })
}
