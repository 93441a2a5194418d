//! `hydra heterogeneity`: options to an experiment.

mod page;

use crate::data::records::Reading;
use crate::device::{ModelArgs, on_device};
use crate::experiment::plan::Plan;
use crate::experiment::share::ShareArgs;
use crate::experiment::stage::{Corpus, Stage, check_folder, open_folder};
use crate::heterogeneity::draw::Draws;
use crate::heterogeneity::outcome::{Outcome, rows};
use crate::heterogeneity::results::{Drawn, Inputs};
use crate::hub::{locate_data, locate_file};
use crate::options::Count;
use crate::run::start::Start;
use crate::{interrupt, output};
use anyhow::{Context, Result, bail};
use clap::Args;
use hydra_runtime::backend::Backend;
use hydra_runtime::model::Model;
use std::path::PathBuf;

/// The result's name in the folder.
const RESULT: &str = "heterogeneity.json";
/// The copy of the configuration, which marks a folder as this command's.
const CONFIG: &str = "heterogeneity.toml";

/// Options of `heterogeneity`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    /// Records to draw from; they need categories
    #[arg(long, value_name = "FILE", num_args = 1.., required = true, help_heading = "Data")]
    data: Vec<PathBuf>,
    /// Number of records in each draw [default: the size of the smallest category]
    #[arg(long, value_name = "N", help_heading = "Data")]
    records: Option<Count>,
    /// Numbers of categories to draw from, comma-separated [default: 1,2,4,.. and all]
    #[arg(long, value_name = "LIST", value_delimiter = ',', help_heading = "Data")]
    counts: Option<Vec<Count>>,
    /// Draw from these categories only, comma-separated [default: those with at least --records records]
    #[arg(long, value_name = "LIST", value_delimiter = ',', help_heading = "Data")]
    among: Option<Vec<String>>,
    /// The runs, as for compare: seeds, confidence, [defaults], [[run]]; no [tune], [mmlu] or [accuracy]
    #[arg(long, value_name = "FILE.toml", help_heading = "Training")]
    config: PathBuf,
    /// Eval set: records to measure the loss on
    #[arg(long, value_name = "FILE", help_heading = "Evaluation")]
    eval_data: PathBuf,
    /// Folder for runs, curves and the report: new, empty, or that of the same experiment, which is continued
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    out: PathBuf,
    #[command(flatten)]
    share: ShareArgs,
}

/// Draws, trains, measures, and writes the curves.
pub fn run(mut arguments: Arguments) -> Result<()> {
    let plan = Plan::read(&arguments.config)?;
    if plan.tune.is_some() {
        bail!("{}: [tune] is for compare: give each run the lr that compare chose", arguments.config.display());
    }
    for (table, given) in [("[accuracy]", plan.accuracy.is_some()), ("[mmlu]", plan.mmlu.is_some())] {
        if given {
            bail!("{}: {table} is for compare: leave it out", arguments.config.display());
        }
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
    let all = Reading::new(plan.runs[0].spec.data.encoding.data_format).read_all(&arguments.data)?;
    let counts = arguments.counts.as_ref().map(|counts| counts.iter().map(|count| count.get()).collect());
    let draws = Draws::new(&all, arguments.records.map(Count::get), arguments.among.as_deref(), counts)?;
    let (data, eval_data) = (Corpus::new(&arguments.data)?, Corpus::new(std::slice::from_ref(&arguments.eval_data))?);
    let inputs = Inputs { plan: &plan, eval_data: &eval_data, out };
    // What can fail in any run fails now.
    for run in &plan.runs {
        let spec = inputs.task(run, draws.counts[0], plan.seeds[0], &data).finetune(&arguments.model);
        let start = Start::read(&spec, checkpoint.config()).with_context(|| run.title())?;
        for (&seed, &count) in plan.seeds.iter().flat_map(|seed| draws.counts.iter().map(move |count| (seed, count))) {
            let drawn: Vec<_> = draws.draw(seed, count).into_iter().map(|i| start.records[i].clone()).collect();
            start.check(&drawn).with_context(|| format!("{} on {count} categories", run.title()))?;
        }
    }
    // All records as tokens: this takes seconds, and an experiment that continues has done it before.
    if !started {
        let first = inputs.task(&plan.runs[0], draws.counts[0], plan.seeds[0], &data);
        first.check(&arguments.model, &checkpoint, &tokenizer, &device)?;
    }
    let model = Model::load(device, &checkpoint)?;
    let stage =
        Stage { options: &arguments.model, checkpoint: &checkpoint, tokenizer, model, questions: None, asked: None };
    let share = arguments.share;
    let drawn = Drawn::new(&draws, &plan.seeds, &arguments.data, out)?;
    let (counts, files) = (&draws.counts, &drawn.files);
    inputs.check_kept(&stage, counts, files)?;
    let _lock = open_folder(out, CONFIG, &arguments.config, share.is_part())?;
    drawn.write()?;
    interrupt::listen()?;
    let work = |share| inputs.work(&stage, counts, files, share);
    let all_done = || inputs.require_all(&stage, counts, files);
    let Some(results) = share.results(out, work, all_done, || inputs.results(&stage, counts, files))? else {
        return Ok(());
    };
    let outcome = Outcome {
        model: &arguments.model.model,
        precision: serde_json::to_value(arguments.model.device.precision())?,
        data: &data.described,
        eval_data: &eval_data.described[0],
        records: draws.records,
        counts,
        seeds: &plan.seeds,
        confidence: plan.confidence,
        orders: plan.seeds.iter().map(|&seed| (seed, draws.order(seed))).collect(),
        base: results.base.found.eval_loss.as_ref().map_or(f64::NAN, |loss| loss.all.loss),
        rows: rows(&plan, &draws, &results.runs)?,
    };
    output::write_json(&out.join(RESULT), &outcome)?;
    page::write(out, &outcome)?;
    output::print(page::text(&outcome))?;
    output::print(format_args!("{}\n", out.display()))?;
    Ok(())
}
