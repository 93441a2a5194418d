//! `hydra compare`: options to a comparison.

mod page;

use crate::compare::results::Inputs;
use crate::compare::summary::{About, Summary};
use crate::device::{ModelArgs, on_device};
use crate::eval::mmlu::questions::{self, Selection};
use crate::experiment::plan::{Mmlu, Plan};
use crate::experiment::share::ShareArgs;
use crate::experiment::stage::{Asked, Corpus, Questions, Stage, check_folder, open_folder};
use crate::experiment::tune::Parts;
use crate::hub::{locate_data, locate_file};
use crate::options::Count;
use crate::run::start::Start;
use crate::{interrupt, output, sha256};
use anyhow::{Context, Result, bail};
use clap::Args;
use hydra_runtime::backend::Backend;
use hydra_runtime::model::Model;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The result's name in the folder.
const RESULT: &str = "compare.json";
/// The copy of the configuration, which marks a folder as this command's.
const CONFIG: &str = "compare.toml";

/// Options of `compare`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    /// Training records, as for finetune
    #[arg(long, value_name = "FILE", num_args = 1.., required = true, help_heading = "Data")]
    data: Vec<PathBuf>,
    /// The runs to compare: seeds, [defaults], [[run]], and optionally confidence, [tune], [mmlu] and [accuracy]
    ///
    /// seeds = [..]; confidence = 0.95 is that of the intervals; [defaults] and [[run]] take any option of finetune, and a [[run]] has a
    /// name; [tune] has lr = [..], fraction = 0.25, validation = 0.1, seed = 0; [mmlu] is for --mmlu and has shots = 0,
    /// scoring = "letter", limit, subjects;
    /// [accuracy] has data and the options of eval accuracy: metric, after, limit, max-tokens, stop, batch.
    #[arg(long, value_name = "FILE.toml", help_heading = "Training")]
    config: PathBuf,
    /// Eval set: records to measure the loss on, overall and by category
    #[arg(long, value_name = "FILE", help_heading = "Evaluation")]
    eval_data: PathBuf,
    /// MMLU's questions, as for eval mmlu [default: no MMLU]
    #[arg(long, value_name = "DIR", help_heading = "Evaluation")]
    mmlu: Option<PathBuf>,
    /// Folder for runs, tables and the report: new, empty, or that of the same comparison, which is continued
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    out: PathBuf,
    #[command(flatten)]
    share: ShareArgs,
}

/// Trains, measures, and writes the tables.
pub fn run(mut arguments: Arguments) -> Result<()> {
    let plan = Plan::read(&arguments.config)?;
    if plan.mmlu.is_some() && arguments.mmlu.is_none() {
        bail!("{}: [mmlu] needs --mmlu DIR, which has the questions", arguments.config.display());
    }
    let started = check_folder(&arguments.out, CONFIG)?;
    arguments.data = locate_data(&arguments.data)?;
    arguments.eval_data = locate_file(&arguments.eval_data)?;
    on_device!(arguments.model.device, device => run_on(device, arguments, plan, started))
}

fn run_on<B: Backend>(device: B, arguments: Arguments, plan: Plan, started: bool) -> Result<()> {
    let out = &arguments.out;
    let checkpoint = arguments.model.checkpoint()?;
    let tokenizer = checkpoint.tokenizer()?;
    let mmlu = plan.mmlu.clone().unwrap_or_default();
    let questions = arguments.mmlu.as_deref().map(|dir| ask(dir, &mmlu)).transpose()?;
    let data = Corpus::new(&arguments.data)?;
    let eval_data = Corpus::new(std::slice::from_ref(&arguments.eval_data))?;
    let inputs = Inputs { plan: &plan, data: &data, eval_data: &eval_data, out };
    // What can fail in any run fails now.
    let mut fields = BTreeSet::new();
    for run in &plan.runs {
        let spec = inputs.task(run, run.spec.clone(), plan.seeds[0]).finetune(&arguments.model);
        let start = Start::read(&spec, checkpoint.config()).with_context(|| run.title())?;
        start.check(&start.records).with_context(|| run.title())?;
        fields.insert(start.field);
    }
    let encoding = &plan.runs[0].spec.data.encoding;
    let asked = plan.accuracy.as_ref().map(|options| Asked::read(options, encoding, &fields)).transpose()?;
    if let Some(asked) = &asked {
        asked.check(&tokenizer, checkpoint.config().context)?;
    }
    // All records as tokens: this takes seconds, and a comparison that continues has done it before.
    if !started {
        let first = inputs.task(&plan.runs[0], plan.runs[0].spec.clone(), plan.seeds[0]);
        first.check(&arguments.model, &checkpoint, &tokenizer, &device)?;
    }
    let parts = inputs.parts()?;
    let parts = parts.as_ref();
    let model = Model::load(device, &checkpoint)?;
    let stage = Stage { options: &arguments.model, checkpoint: &checkpoint, tokenizer, model, questions, asked };
    let share = arguments.share;
    inputs.check_kept(&stage, parts)?;
    let _lock = open_folder(out, CONFIG, &arguments.config, share.is_part())?;
    parts.map_or(Ok(()), Parts::write)?;
    interrupt::listen()?;
    let work = |share| inputs.work(&stage, parts, share);
    let (all_done, all) = (|| inputs.require_all(&stage, parts), || inputs.results(&stage, parts));
    let Some(results) = share.results(out, work, all_done, all)? else { return Ok(()) };
    let about = About {
        model: &arguments.model.model,
        precision: serde_json::to_value(arguments.model.device.precision())?,
        data: &data.described,
        eval_data: &eval_data.described[0],
        mmlu: stage.questions.is_some().then_some(&mmlu),
        accuracy: plan.accuracy.as_ref(),
        tune: plan.tune.as_ref(),
    };
    let summary = Summary::new(about, &plan, &results)?;
    output::write_json(&out.join(RESULT), &summary)?;
    page::write(out, &summary, &results)?;
    output::print(summary.text())?;
    output::print(format_args!("{}\n", out.display()))?;
    Ok(())
}

fn ask(dir: &Path, mmlu: &Mmlu) -> Result<Questions> {
    let (limit, subjects) = (mmlu.limit.map(Count::get), mmlu.subjects.clone());
    let selection = Selection { shots: mmlu.shots, limit, subjects, style: None };
    let subjects = questions::read(dir, &selection)?;
    let digest = sha256::of_text(&format!("{subjects:?} {:?}", mmlu.scoring));
    Ok(Questions { subjects, scoring: mmlu.scoring, digest })
}
