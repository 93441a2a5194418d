//! From runs to a table: means over seeds, and paired differences to the first row.

use super::results::Results;
use crate::eval::accuracy::AccuracyArgs;
use crate::eval::accuracy::report::{Report, Score};
use crate::eval::loss::EvalLoss;
use crate::experiment::measure::Accuracy;
use crate::experiment::plan::{Mmlu, Plan, Tune};
use crate::experiment::scores::{Scores, difference, estimate, interval, reading, scores, unlike};
use crate::experiment::tune::Tuned;
use crate::memory::mib;
use crate::output::{command_line, printable, text_table};
use crate::statistics::{Estimate, Interval};
use anyhow::Result;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// Heading of the columns with differences.
pub const DIFFERENCE: &str = "vs first run";

/// What the table is about.
#[derive(Clone, Serialize)]
pub struct About<'a> {
    /// The model, as it was named.
    pub model: &'a str,
    /// Precision of the matrix products.
    pub precision: Value,
    /// The training files.
    pub data: &'a [Value],
    /// The eval set's file.
    pub eval_data: &'a Value,
    /// How MMLU's questions are asked.
    pub mmlu: Option<&'a Mmlu>,
    /// Which records are answered, and what counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<&'a AccuracyArgs>,
    /// How learning rates were chosen.
    pub tune: Option<&'a Tune>,
}

/// `compare.json`
#[derive(Serialize)]
pub struct Summary<'a> {
    /// Model, data, settings.
    #[serde(flatten)]
    pub about: About<'a>,
    /// Seeds of each run.
    pub seeds: &'a [u64],
    /// How often an interval holds the true difference.
    pub confidence: f64,
    /// The model without an adapter.
    pub base: Base<'a>,
    /// A row per run.
    pub rows: Vec<Row<'a>>,
}

/// The model without an adapter.
#[derive(Serialize)]
pub struct Base<'a> {
    /// Loss on the eval set.
    pub loss: &'a Option<EvalLoss>,
    /// Accuracy on MMLU.
    pub mmlu: Option<Accuracy>,
    /// Accuracy on the records of `[accuracy]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<&'a Report>,
}

/// A run.
#[derive(Serialize)]
pub struct Row<'a> {
    /// Its name.
    pub name: &'a str,
    /// The first seed's command line.
    pub command: String,
    /// Trainable parameters of the first seed, including the router's.
    pub trainable: u64,
    /// Trainable parameters of each seed; with `heads = "auto"` they may differ.
    pub trainable_by_seed: Vec<u64>,
    /// Their share of all parameters.
    pub share: f64,
    /// Peak learning rate.
    pub lr: Option<f64>,
    /// How it was chosen, if it was.
    pub tuned: Option<&'a Tuned>,
    /// Steps of one seed.
    pub steps: usize,
    /// Tokens of one seed.
    pub tokens: usize,
    /// Means over seeds; `None` if a seed diverged.
    pub scores: Option<Scores<Estimate>>,
    /// Difference to the first row; `None` there, and if one of both diverged.
    pub difference: Option<Scores<Interval>>,
    /// Seeds that diverged, and how.
    pub diverged: BTreeMap<u64, &'a str>,
    /// Tokens per second, mean over seeds.
    pub tokens_per_second: Option<Estimate>,
    /// Peak memory, largest over seeds.
    pub peak_bytes: Option<u64>,
}

impl<'a> Summary<'a> {
    /// Adds up the results.
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
            let difference = if i > 0 { difference(seeds, first, plan.confidence)? } else { None };
            rows.push(Row {
                name: &run.name,
                command: command_line(&found.command),
                trainable: found.trainable,
                trainable_by_seed: seeds.iter().map(|f| f.found.trainable).collect(),
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
        let base = &results.base.found;
        let base = Base { loss: &base.eval_loss, mmlu: base.mmlu, accuracy: base.accuracy.as_ref() };
        Ok(Self { about, seeds: &plan.seeds, confidence: plan.confidence, base, rows })
    }

    /// The categories of the held-out records.
    pub fn categories(&self) -> Vec<&String> {
        self.base.loss.iter().flat_map(|eval_loss| eval_loss.categories.keys()).collect()
    }

    /// The main table: head and lines.
    pub fn main_table(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let asked = self.base.mmlu.is_some();
        let answered = self.base.accuracy.is_some();
        let mut head = vec!["run", "trainable", "share %", "lr", "loss", DIFFERENCE];
        if let Some(accuracy) = self.base.accuracy {
            head.extend([accuracy.heading(), DIFFERENCE]);
        }
        if asked {
            head.extend(["MMLU micro %", DIFFERENCE, "MMLU macro %", DIFFERENCE]);
        }
        head.extend(["tokens/s", "peak MiB"]);
        let dash = || "–".to_string();
        let base = self.base.loss.as_ref().map_or(f64::NAN, |eval_loss| eval_loss.all.loss);
        let mut cells = vec!["no adapter".to_string(), "0".into(), "0".into(), dash(), format!("{base:.4}"), dash()];
        if let Some(accuracy) = self.base.accuracy {
            cells.extend([percent(accuracy.all.accuracy), dash()]);
        }
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
                None => {
                    let columns = 2 + if answered { 2 } else { 0 } + if asked { 4 } else { 0 };
                    cells.extend(std::iter::repeat_n("diverged".to_string(), columns));
                }
                Some(scores) => {
                    let of = |pick: fn(&Scores<Interval>) -> Option<Interval>| row.difference.as_ref().and_then(pick);
                    cells.push(estimate(&scores.loss, 1.0, 4));
                    cells.push(interval(of(|d| Some(d.loss)), 1.0, 4));
                    let text =
                        |estimate_: &Option<Estimate>| estimate_.as_ref().map_or(dash(), |e| estimate(e, 100.0, 2));
                    if answered {
                        cells.push(text(&scores.accuracy));
                        cells.push(interval(of(|d| d.accuracy), 100.0, 2));
                    }
                    if asked {
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

    /// Heading of a table by category: two columns per run but the first.
    fn category_head(&self) -> Vec<String> {
        let mut head = vec!["category".to_string(), "no adapter".to_string()];
        for (i, row) in self.rows.iter().enumerate() {
            head.push(row.name.to_string());
            head.extend((i > 0).then(|| DIFFERENCE.to_string()));
        }
        head
    }

    /// Accuracy by category, where records are answered: a line per category, as in [`Summary::category_table`].
    pub fn accuracy_table(&self) -> Option<(Vec<String>, Vec<Vec<String>>)> {
        let base = self.base.accuracy.filter(|base| !base.categories.is_empty())?;
        let line = |(name, score): (&String, &Score)| {
            let mut cells = vec![name.clone(), percent(score.accuracy)];
            for (i, row) in self.rows.iter().enumerate() {
                let own = row.scores.as_ref().and_then(|scores| scores.accuracy_categories.get(name));
                cells.push(own.map_or("diverged".into(), |e| estimate(e, 100.0, 2)));
                let difference = row.difference.as_ref().and_then(|d| d.accuracy_categories.get(name)).copied();
                cells.extend((i > 0).then(|| interval(difference, 100.0, 2)));
            }
            cells
        };
        Some((self.category_head(), base.categories.iter().map(line).collect()))
    }

    /// Loss by category: a line per category, two columns per run but the first.
    pub fn category_table(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let head = self.category_head();
        let line = |name: &String| {
            let base = self.base.loss.as_ref().and_then(|eval_loss| eval_loss.categories.get(name));
            let mut cells = vec![name.clone(), base.map_or("–".into(), |loss| format!("{:.4}", loss.loss))];
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
            1 => "One seed: there is no standard error.".to_string(),
            _ => format!("Mean ± standard error over {n} seeds."),
        }];
        notes.push(reading(n, self.confidence, "records (or questions)"));
        let answers = match self.base.accuracy.is_some() || self.base.mmlu.is_some() {
            true => " Differences of accuracies are in percentage points.",
            false => "",
        };
        notes.push(format!("The loss is that of the held-out records, in nats per token; lower is better.{answers}"));
        if self.rows.iter().filter_map(|row| row.difference.as_ref()).any(Scores::has_single) {
            notes.push("A difference on a single record or question has no interval.".into());
        }
        notes.push("All runs of a seed take the same records in the same order. Peak memory is the resident memory of the process while training, weights included.".into());
        if let Some(tune) = self.about.tune {
            let rates: Vec<String> = tune.lr.iter().map(|lr| format!("{:e}", lr.get())).collect();
            notes.push(format!(
                "Learning rates: each run has the one of {} with the lowest loss on {} % of the training records, set aside, after {} % \
                 of the steps on the rest (seed {}). (!) marks the first or last of the list: a better one may lie beyond it. A run \
                 with its own lr keeps that.",
                rates.join(", "), 100.0 * tune.validation, 100.0 * tune.fraction, tune.seed
            ));
        }
        for row in &self.rows {
            notes.extend(unlike(row.name, &row.trainable_by_seed));
            notes.extend(
                row.diverged.iter().map(|(seed, why)| format!("Run “{}”, seed {seed}: {why}", printable(row.name))),
            );
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

fn percent(x: f64) -> String {
    format!("{:.2}", 100.0 * x)
}
