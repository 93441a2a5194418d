//! `hydra heterogeneity`: the paper's Figure 2. The same number of records is drawn from 1, 2, 4, .. categories, each run of a
//! TOML file is trained on each draw, and all are measured on the same held-out records.
//!
//! A seed puts the categories in an order of its own and draws from the first k of them, as evenly as can be; the first is in
//! every draw. So there are two curves over k: the loss on all held-out records, which has the gain of having seen more
//! categories in it, and the loss on those of the first category, whose records become fewer while others join them.

mod draw;
mod page;

use super::experiment::kept::{self, Finished, Task};
use super::experiment::plan::{Plan, Run};
use super::experiment::scores::{difference, scores};
use super::experiment::{Corpus, Stage, check_folder, open_folder, raw_records, write_records};
use super::finetune::Source;
use super::{positive, write_json};
use crate::data::records;
use crate::device::{ModelArgs, on_device};
use crate::statistics::{Bootstrap, Estimate, Interval};
use crate::{interrupt, output};
use anyhow::{Context, Result, bail};
use clap::Args;
use draw::Draws;
use hydra_runtime::backend::Backend;
use hydra_runtime::model::Model;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The result's name in the folder.
const RESULT: &str = "heterogeneity.json";
/// Says that a folder is this command's.
const MARK: &str = "heterogeneity.toml";

/// Options of `heterogeneity`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    /// Records to draw from, with categories
    #[arg(long, value_name = "FILE.jsonl", num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// Records to measure the loss on
    #[arg(long, value_name = "FILE.jsonl")]
    eval_data: PathBuf,
    /// The runs, as for compare: seeds = [..], [defaults], [[run]], [bootstrap]; without [tune]
    #[arg(long, value_name = "FILE.toml")]
    config: PathBuf,
    /// The folder to work in: new, empty, or that of the same experiment, which goes on where it stopped
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Records of each draw [default: as many as the smallest category has]
    #[arg(long, allow_negative_numbers = true, value_name = "N", value_parser = positive)]
    records: Option<usize>,
    /// Numbers of categories, with commas between them [default: 1, 2, 4, .. and all]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = positive)]
    counts: Option<Vec<usize>>,
    /// Draw from these categories, with commas between them [default: those with --records records or more]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    among: Option<Vec<String>>,
}

/// `heterogeneity.json`
#[derive(Serialize)]
struct Outcome<'a> {
    model: &'a str,
    precision: Value,
    data: &'a [Value],
    eval_data: &'a Value,
    /// Of each draw.
    records: usize,
    /// Numbers of categories.
    counts: &'a [usize],
    seeds: &'a [u64],
    bootstrap: Bootstrap,
    /// Each seed's order of the categories.
    orders: BTreeMap<u64, Vec<&'a str>>,
    /// The model without an adapter, on all held-out records.
    base: f64,
    rows: Vec<Row<'a>>,
}

/// A run.
#[derive(Serialize)]
struct Row<'a> {
    name: &'a str,
    points: Vec<Point>,
}

/// A run on draws from so many categories.
#[derive(Serialize)]
struct Point {
    categories: usize,
    /// Of the first seed.
    trainable: u64,
    trainable_by_seed: Vec<u64>,
    /// On all held-out records; `None` if a seed diverged.
    loss: Option<Estimate>,
    /// On those of the first category of each seed; `None` also where the held-out records have none of it.
    first_category: Option<Estimate>,
    /// Of `loss`, to the first run on the same draws.
    difference: Option<Interval>,
}

/// Runs it.
pub fn run(arguments: Arguments) -> Result<()> {
    let plan = Plan::read(&arguments.config)?;
    if plan.tune.is_some() {
        bail!("{}: [tune] is for compare; give each run the lr that it chose there", arguments.config.display());
    }
    let begun = check_folder(&arguments.out, MARK)?;
    on_device!(arguments.model.device, device => run_on(device, arguments, plan, begun))
}

fn run_on<B: Backend>(device: B, arguments: Arguments, plan: Plan, begun: bool) -> Result<()> {
    let out = &arguments.out;
    let checkpoint = arguments.model.checkpoint()?;
    let tokenizer = checkpoint.tokenizer()?;
    let all = records::read_all(&arguments.data, records::CATEGORY)?;
    let draws = Draws::new(&all, arguments.records, arguments.among.as_deref(), arguments.counts.as_deref())?;
    let (data, eval_data) = (Corpus::new(&arguments.data)?, Corpus::new(std::slice::from_ref(&arguments.eval_data))?);
    // What can fail in any run fails now.
    for run in &plan.runs {
        let task = task(run, draws.counts[0], plan.seeds[0], &data, &eval_data, out);
        let options = run.arguments(&task.words(&arguments.model.model))?;
        let source = Source::read(&options, checkpoint.config()).with_context(|| run.title())?;
        for (&seed, &count) in plan.seeds.iter().flat_map(|seed| draws.counts.iter().map(move |count| (seed, count))) {
            let drawn: Vec<_> = draws.draw(seed, count).into_iter().map(|i| source.records[i].clone()).collect();
            source.check(&drawn).with_context(|| run.title()).with_context(|| format!("{count} categories"))?;
        }
    }
    // All records as tokens: seconds, which an experiment that goes on has spent before.
    if !begun {
        let first = task(&plan.runs[0], draws.counts[0], plan.seeds[0], &data, &eval_data, out);
        first.check(&arguments.model, &checkpoint, &tokenizer, &device)?;
    }
    let model = Model::load(device, &checkpoint)?;
    let stage = Stage { options: &arguments.model, checkpoint: &checkpoint, tokenizer, model, questions: None };
    let _lock = open_folder(out, MARK, &arguments.config)?;
    let files = files(&draws, &plan, &arguments.data, out)?;
    interrupt::listen()?;
    let results = results(&stage, &plan, &draws, &files, &eval_data, out);
    let Some((base, found)) = interrupt::unless_stopped(results)? else {
        output::print(format_args!("{}: stopped, the same command goes on\n", out.display()))?;
        return Ok(());
    };
    let outcome = Outcome {
        model: &arguments.model.model,
        precision: serde_json::to_value(arguments.model.device.precision())?,
        data: &data.described,
        eval_data: &eval_data.described[0],
        records: draws.records,
        counts: &draws.counts,
        seeds: &plan.seeds,
        bootstrap: plan.bootstrap,
        orders: plan.seeds.iter().map(|&seed| (seed, draws.order(seed))).collect(),
        base: base.found.held_out.as_ref().map_or(f64::NAN, |held_out| held_out.all.loss),
        rows: rows(&plan, &draws, &found)?,
    };
    write_json(&out.join(RESULT), &outcome)?;
    page::write(out, &outcome)?;
    output::print(page::text(&outcome))?;
    output::print(format_args!("{}\n", out.display()))?;
    Ok(())
}

/// A file of each draw, by seed and count.
type Files = BTreeMap<(u64, usize), Corpus>;

fn files(draws: &Draws<'_>, plan: &Plan, data: &[PathBuf], out: &Path) -> Result<Files> {
    let raw = raw_records(data)?;
    let mut files = Files::new();
    for &seed in &plan.seeds {
        let dir = out.join("data").join(format!("seed-{seed}"));
        std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        for &count in &draws.counts {
            let path = dir.join(format!("categories-{count}.jsonl"));
            let drawn: Vec<&[u8]> = draws.draw(seed, count).into_iter().map(|i| raw[i].as_slice()).collect();
            write_records(&path, &drawn)?;
            files.insert((seed, count), Corpus::new(&[path])?);
        }
    }
    Ok(files)
}

fn task<'a>(run: &'a Run, count: usize, seed: u64, data: &'a Corpus, eval_data: &'a Corpus, out: &Path) -> Task<'a> {
    let dir = out.join("runs").join(&run.folder).join(format!("categories-{count}")).join(format!("seed-{seed}"));
    Task { run, settings: run.settings.clone(), seed, data, eval_data, ask: false, dir }
}

/// By run, count and seed; and the model without an adapter.
type Everything = (Finished, Vec<Vec<Vec<Finished>>>);

/// Does what is not there yet, or ends with [`interrupt::Stopped`].
fn results<B: Backend>(
    stage: &Stage<'_, '_, B>,
    plan: &Plan,
    draws: &Draws<'_>,
    files: &Files,
    eval_data: &Corpus,
    out: &Path,
) -> Result<Everything> {
    let tasks: Vec<Vec<Vec<Task<'_>>>> = plan
        .runs
        .iter()
        .map(|run| {
            let of_count = |&count: &usize| {
                let of_seed = |&seed: &u64| task(run, count, seed, &files[&(seed, count)], eval_data, out);
                plan.seeds.iter().map(of_seed).collect()
            };
            draws.counts.iter().map(of_count).collect()
        })
        .collect();
    // What belongs to another configuration is refused before anything is added.
    for task in tasks.iter().flatten().flatten() {
        task.kept(stage)?;
    }
    let base = kept::base(stage, eval_data, &plan.runs[0].settings, &out.join("base"))?;
    let total = plan.runs.len() * draws.counts.len() * plan.seeds.len();
    let (mut place, mut found) = (0, Vec::new());
    for (run, tasks) in plan.runs.iter().zip(&tasks) {
        let mut of_run = Vec::new();
        for (count, tasks) in draws.counts.iter().zip(tasks) {
            let mut of_count = Vec::new();
            for task in tasks {
                interrupt::check()?;
                place += 1;
                output::say(format_args!(
                    "\n{}, {count} categories, seed {} ({place} of {total})",
                    run.name, task.seed
                ));
                of_count.push(task.finish(stage)?);
            }
            of_run.push(of_count);
        }
        found.push(of_run);
    }
    Ok((base, found))
}

fn rows<'a>(plan: &'a Plan, draws: &Draws<'_>, found: &[Vec<Vec<Finished>>]) -> Result<Vec<Row<'a>>> {
    let mut rows = Vec::new();
    for (run, of_run) in plan.runs.iter().zip(found) {
        let mut points = Vec::new();
        for (i, (&categories, seeds)) in draws.counts.iter().zip(of_run).enumerate() {
            let own = scores(seeds).map(|scores| scores.loss);
            let first = |(seed, finished): (&u64, &Finished)| {
                Some(finished.found.held_out.as_ref()?.categories.get(draws.order(*seed)[0])?.loss)
            };
            let first: Option<Vec<f64>> = plan.seeds.iter().zip(seeds).map(first).collect();
            let difference = if rows.is_empty() { None } else { difference(seeds, &found[0][i], &plan.bootstrap)? };
            points.push(Point {
                categories,
                trainable: seeds[0].found.trainable,
                trainable_by_seed: seeds.iter().map(|f| f.found.trainable).collect(),
                loss: own,
                first_category: first.map(Estimate::of),
                difference: difference.map(|difference| difference.loss),
            });
        }
        rows.push(Row { name: &run.name, points });
    }
    Ok(rows)
}
