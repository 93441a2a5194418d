//! From runs to a table: means over seeds, and paired differences to the first row.

use super::Results;
use crate::cmd::experiment::kept::Accuracy;
use crate::cmd::experiment::kept::{Details, Finished};
use crate::cmd::experiment::plan::{Mmlu, Plan, Tune};
use crate::cmd::experiment::tune::Tuned;
use crate::heldout::HeldOut;
use crate::output::{printable, text_table};
use crate::session::mib;
use crate::statistics::{Bootstrap, Differences, Estimate, Interval};
use anyhow::{Result, bail};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// What the table is about.
#[derive(Clone, Serialize)]
pub struct About<'a> {
    /// The model.
    pub model: &'a str,
    /// Of the large products.
    pub precision: Value,
    /// Training files.
    pub data: &'a [Value],
    /// The held-out file.
    pub eval_data: &'a Value,
    /// How questions are put.
    pub mmlu: Option<&'a Mmlu>,
    /// How learning rates are chosen.
    pub tune: Option<&'a Tune>,
}

/// `compare.json`
#[derive(Serialize)]
pub struct Summary<'a> {
    /// Model, data, settings.
    #[serde(flatten)]
    pub about: About<'a>,
    /// Of each run.
    pub seeds: &'a [u64],
    /// Of the intervals.
    pub bootstrap: Bootstrap,
    /// The model without an adapter.
    pub base: Base<'a>,
    /// A line per run.
    pub rows: Vec<Row<'a>>,
}

/// The model without an adapter.
#[derive(Serialize)]
pub struct Base<'a> {
    /// Held out.
    pub loss: &'a Option<HeldOut>,
    /// Accuracy.
    pub mmlu: Option<Accuracy>,
}

/// A quantity of a run.
pub type Values = Scores<Estimate>;

/// Held-out loss and accuracy, in one shape for means and differences.
#[derive(Clone, Debug, Serialize)]
pub struct Scores<T> {
    /// Overall.
    pub loss: T,
    /// By category.
    pub categories: BTreeMap<String, T>,
    /// Accuracy, questions weighed alike.
    pub mmlu_micro: Option<T>,
    /// Accuracy, subjects weighed alike.
    pub mmlu_macro: Option<T>,
}

/// A run.
#[derive(Serialize)]
pub struct Row<'a> {
    /// Its name.
    pub name: &'a str,
    /// The first seed's command line.
    pub command: String,
    /// Trainable parameters, the router's among them.
    pub trainable: u64,
    /// Their share of all.
    pub share: f64,
    /// Highest learning rate.
    pub lr: Option<f64>,
    /// Where that is from.
    pub tuned: Option<&'a Tuned>,
    /// Steps of one seed.
    pub steps: usize,
    /// Tokens of one seed.
    pub tokens: usize,
    /// Means over seeds; `None` if a seed diverged.
    pub scores: Option<Values>,
    /// To the first row; `None` there, and where one of both diverged.
    pub difference: Option<Scores<Interval>>,
    /// Seeds whose training came to values that are not finite, and why.
    pub diverged: BTreeMap<u64, &'a str>,
    /// Mean over seeds.
    pub tokens_per_second: Option<Estimate>,
    /// Largest over seeds.
    pub peak_bytes: Option<u64>,
}

impl<'a> Summary<'a> {
    /// Adds up.
    pub fn new(about: About<'a>, plan: &'a Plan, results: &'a Results) -> Result<Self> {
        let first = &results.runs[0];
        let mut rows = Vec::new();
        for (i, run) in plan.runs.iter().enumerate() {
            let seeds = &results.runs[i];
            let found = &seeds[0].found;
            let diverged =
                plan.seeds.iter().zip(seeds).filter_map(|(&seed, f)| Some((seed, f.found.diverged.as_deref()?)));
            let diverged: BTreeMap<_, _> = diverged.collect();
            let speeds: Option<Vec<f64>> = seeds.iter().map(|f| f.found.tokens_per_second).collect();
            let difference = if i > 0 { difference(seeds, first, &plan.bootstrap)? } else { None };
            rows.push(Row {
                name: &run.name,
                command: format!("hydra {}", found.command.join(" ")),
                trainable: found.trainable,
                share: found.share,
                lr: found.lr,
                tuned: results.tuned[i].as_ref(),
                steps: found.steps,
                tokens: found.tokens,
                scores: scores(seeds),
                difference,
                diverged,
                tokens_per_second: speeds.map(Estimate::of),
                peak_bytes: seeds.iter().filter_map(|f| f.found.peak_bytes).max(),
            });
        }
        let base = Base { loss: &results.base.found.held_out, mmlu: results.base.found.mmlu };
        Ok(Self { about, seeds: &plan.seeds, bootstrap: plan.bootstrap, base, rows })
    }

    /// The categories of the held-out records.
    pub fn categories(&self) -> Vec<&String> {
        self.base.loss.iter().flat_map(|held_out| held_out.categories.keys()).collect()
    }

    /// The main table: head and lines.
    pub fn main_table(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let asked = self.base.mmlu.is_some();
        let mut head = vec!["run", "trainable", "share %", "lr", "loss", "to the first"];
        if asked {
            head.extend(["MMLU micro %", "to the first", "MMLU macro %", "to the first"]);
        }
        head.extend(["tokens/s", "peak MiB"]);
        let dash = || "–".to_string();
        let base = self.base.loss.as_ref().map_or(f64::NAN, |held_out| held_out.all.loss);
        let mut cells = vec!["no adapter".to_string(), "0".into(), "0".into(), dash(), format!("{base:.4}"), dash()];
        if let Some(mmlu) = &self.base.mmlu {
            cells.extend([percent(mmlu.micro), dash(), percent(mmlu.r#macro), dash()]);
        }
        cells.extend([dash(), dash()]);
        let mut lines = vec![cells];
        for row in &self.rows {
            let mut cells = vec![
                row.name.to_string(),
                row.trainable.to_string(),
                format!("{:.3}", 100.0 * row.share),
                row.lr.map_or(dash(), |lr| {
                    format!("{lr:e}{}", if row.tuned.is_some_and(|t| t.at_the_end) { " (!)" } else { "" })
                }),
            ];
            match &row.scores {
                None => cells.extend(std::iter::repeat_n("diverged".to_string(), if asked { 6 } else { 2 })),
                Some(scores) => {
                    let of = |pick: fn(&Scores<Interval>) -> Option<Interval>| row.difference.as_ref().and_then(pick);
                    cells.push(estimate(&scores.loss, 1.0, 4));
                    cells.push(interval(of(|d| Some(d.loss)), 1.0, 4));
                    if asked {
                        let text =
                            |estimate_: &Option<Estimate>| estimate_.as_ref().map_or(dash(), |e| estimate(e, 100.0, 2));
                        cells.push(text(&scores.mmlu_micro));
                        cells.push(interval(of(|d| d.mmlu_micro), 100.0, 2));
                        cells.push(text(&scores.mmlu_macro));
                        cells.push(interval(of(|d| d.mmlu_macro), 100.0, 2));
                    }
                }
            }
            cells.push(row.tokens_per_second.as_ref().map_or(dash(), |speed| estimate(speed, 1.0, 0)));
            cells.push(row.peak_bytes.map_or(dash(), |bytes| format!("{:.0}", mib(bytes))));
            lines.push(cells);
        }
        (head.into_iter().map(str::to_owned).collect(), lines)
    }

    /// Loss by category: a line per category, two columns per run but the first.
    pub fn category_table(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let mut head = vec!["category".to_string(), "no adapter".to_string()];
        for (i, row) in self.rows.iter().enumerate() {
            head.push(row.name.to_string());
            head.extend((i > 0).then(|| "to the first".to_string()));
        }
        let line = |name: &String| {
            let base = self.base.loss.as_ref().and_then(|held_out| held_out.categories.get(name));
            let mut cells = vec![printable(name), base.map_or("–".into(), |loss| format!("{:.4}", loss.loss))];
            for (i, row) in self.rows.iter().enumerate() {
                let own = row.scores.as_ref().and_then(|scores| scores.categories.get(name));
                cells.push(own.map_or("diverged".into(), |e| estimate(e, 1.0, 4)));
                let difference = row.difference.as_ref().and_then(|d| d.categories.get(name)).copied();
                cells.extend((i > 0).then(|| interval(difference, 1.0, 4)));
            }
            cells
        };
        (head, self.categories().into_iter().map(line).collect())
    }

    /// What the figures mean, in sentences.
    pub fn notes(&self) -> Vec<String> {
        let n = self.seeds.len();
        let mut notes = vec![match n {
            1 => "One seed: there is no standard error, and intervals are over records or questions alone.".to_string(),
            _ => format!("Mean ± standard error over {n} seeds."),
        }];
        let Bootstrap { samples, seed, level } = self.bootstrap;
        let over = if n > 1 { "seeds and records (or questions)" } else { "records (or questions)" };
        notes.push(format!(
            "“To the first” is the paired difference to the first run, with the {} % interval of {samples} bootstrap draws over {over} \
             (seed {seed}); a lower loss is better.",
            100.0 * level
        ));
        notes.push("All runs of a seed take the same records in the same order. Peak memory is what the process held while training, the weights' touched pages among it.".into());
        if let Some(tune) = self.about.tune {
            notes.push(format!(
                "Learning rates: for each run the one of {:?} with the least loss on {} % of the training records kept apart, after {} % \
                 of the budget on the rest, seed {}; (!) where it is an end of the list. A run with an lr of its own has that.",
                tune.lr, 100.0 * tune.validation, 100.0 * tune.fraction, tune.seed
            ));
        }
        for row in &self.rows {
            notes.extend(row.diverged.iter().map(|(seed, why)| format!("{}, seed {seed}: {why}", row.name)));
        }
        notes
    }

    /// For a terminal.
    pub fn text(&self) -> String {
        let (head, lines) = self.main_table();
        let mut text = format!("\n{}", text_table(&head, &lines));
        for note in self.notes() {
            text += &format!("{note}\n");
        }
        text
    }
}

/// `None` if a seed diverged.
fn scores(seeds: &[Finished]) -> Option<Values> {
    let held: Vec<&HeldOut> = seeds.iter().map(|f| f.found.held_out.as_ref()).collect::<Option<_>>()?;
    let of = |name: &String| {
        Estimate::of(held.iter().map(|h| h.categories.get(name).map_or(f64::NAN, |loss| loss.loss)).collect())
    };
    let mmlu: Option<Vec<Accuracy>> = seeds.iter().map(|f| f.found.mmlu).collect();
    let accuracy = |pick: fn(&Accuracy) -> f64| mmlu.as_ref().map(|all| Estimate::of(all.iter().map(pick).collect()));
    Some(Scores {
        loss: Estimate::of(held.iter().map(|h| h.all.loss).collect()),
        categories: held[0].categories.keys().map(|name| (name.clone(), of(name))).collect(),
        mmlu_micro: accuracy(|a| a.micro),
        mmlu_macro: accuracy(|a| a.r#macro),
    })
}

/// Of a run's seeds to the first run's.
fn difference(own: &[Finished], first: &[Finished], how: &Bootstrap) -> Result<Option<Scores<Interval>>> {
    if own.iter().chain(first).any(|f| f.found.held_out.is_none()) {
        return Ok(None);
    }
    let reference = &first[0].details;
    let alike = |d: &Details| {
        (&d.targets, &d.categories, &d.subjects) == (&reference.targets, &reference.categories, &reference.subjects)
    };
    if !own.iter().chain(first).all(|f| alike(&f.details)) {
        bail!("the runs were measured on different records or questions, so they can't be paired");
    }
    let pairs = || own.iter().zip(first).map(|(own, first)| (&own.details, &first.details));
    let losses: Vec<Vec<f64>> = pairs().map(|(a, b)| a.nll.iter().zip(&b.nll).map(|(a, b)| a - b).collect()).collect();
    let weights: Vec<f64> = reference.targets.iter().map(|&n| n as f64).collect();
    let of = |values: &[Vec<f64>], weights: &[f64], groups: &[Vec<usize>]| {
        Differences { values, weights, groups }.interval(how)
    };
    let all: Vec<usize> = (0..weights.len()).collect();
    let Some(loss) = of(&losses, &weights, &[all]) else { return Ok(None) };
    let mut by_category: BTreeMap<&String, Vec<usize>> = BTreeMap::new();
    for (i, category) in reference.categories.iter().enumerate() {
        if let Some(category) = category {
            by_category.entry(category).or_default().push(i);
        }
    }
    let categories =
        by_category.into_iter().filter_map(|(name, items)| Some((name.clone(), of(&losses, &weights, &[items])?)));
    let categories = categories.collect();
    let answers: Vec<Vec<f64>> = pairs()
        .map(|(a, b)| a.correct.iter().zip(&b.correct).map(|(&a, &b)| f64::from(a) - f64::from(b)).collect())
        .collect();
    let ones = vec![1.0; reference.correct.len()];
    let mut by_subject: BTreeMap<&String, Vec<usize>> = BTreeMap::new();
    for (i, subject) in reference.subjects.iter().enumerate() {
        by_subject.entry(subject).or_default().push(i);
    }
    let subjects: Vec<Vec<usize>> = by_subject.into_values().collect();
    let questions: Vec<usize> = (0..ones.len()).collect();
    let (mmlu_micro, mmlu_macro) = (of(&answers, &ones, &[questions]), of(&answers, &ones, &subjects));
    Ok(Some(Scores { loss, categories, mmlu_micro, mmlu_macro }))
}

fn percent(x: f64) -> String {
    format!("{:.2}", 100.0 * x)
}

/// "1.234 ± 0.005", or the mean alone.
pub fn estimate(estimate: &Estimate, factor: f64, decimals: usize) -> String {
    let mean = format!("{:.decimals$}", factor * estimate.mean);
    estimate.stderr.map_or(mean.clone(), |stderr| format!("{mean} ± {:.decimals$}", factor * stderr))
}

/// "-0.012 [-0.020, -0.004]"
pub fn interval(interval: Option<Interval>, factor: f64, decimals: usize) -> String {
    let text = |i: Interval| {
        let [mean, low, high] = [i.mean, i.low, i.high].map(|x| format!("{:+.decimals$}", factor * x));
        format!("{mean} [{low}, {high}]")
    };
    interval.map_or("–".to_string(), text)
}
