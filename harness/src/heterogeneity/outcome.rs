//! The result: points of two curves for each run.

use super::draw::Draws;
use crate::experiment::kept::Finished;
use crate::experiment::plan::Plan;
use crate::experiment::scores::{difference, scores};
use crate::statistics::{Estimate, Interval};
use anyhow::Result;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// `heterogeneity.json`
#[derive(Serialize)]
pub struct Outcome<'a> {
    /// The model, as it was named.
    pub model: &'a str,
    /// Precision of the matrix products.
    pub precision: Value,
    /// The training files.
    pub data: &'a [Value],
    /// The eval set's file.
    pub eval_data: &'a Value,
    /// Number of records in each draw.
    pub records: usize,
    /// Numbers of categories.
    pub counts: &'a [usize],
    /// Seeds of each run.
    pub seeds: &'a [u64],
    /// How often an interval holds the true difference.
    pub confidence: f64,
    /// The order in which each seed takes the categories.
    pub orders: BTreeMap<u64, Vec<&'a str>>,
    /// The loss of the model without an adapter on the eval set.
    pub base: f64,
    /// A row per run.
    pub rows: Vec<Row<'a>>,
}

/// A run.
#[derive(Serialize)]
pub struct Row<'a> {
    /// Its name.
    pub name: &'a str,
    /// A point per number of categories.
    pub points: Vec<Point>,
}

/// A run on draws from one number of categories.
#[derive(Serialize)]
pub struct Point {
    /// Number of categories.
    pub categories: usize,
    /// Trainable parameters of the first seed.
    pub trainable: u64,
    /// Trainable parameters of each seed.
    pub trainable_by_seed: Vec<u64>,
    /// Loss on the eval set; `None` if a seed diverged.
    pub loss: Option<Estimate>,
    /// Loss on the eval records of each seed's first category; `None` also if there are none.
    pub first_category: Option<Estimate>,
    /// Difference of `loss` to the first run on the same draws.
    pub difference: Option<Interval>,
}

/// Adds up what was found by run, number of categories and seed.
pub fn rows<'a>(plan: &'a Plan, draws: &Draws<'_>, found: &[Vec<Vec<Finished>>]) -> Result<Vec<Row<'a>>> {
    let mut rows = Vec::new();
    for (run, of_run) in plan.runs.iter().zip(found) {
        let mut points = Vec::new();
        for (i, (&categories, seeds)) in draws.counts.iter().zip(of_run).enumerate() {
            let own = scores(seeds).map(|scores| scores.loss);
            let first = |(seed, finished): (&u64, &Finished)| {
                Some(finished.found.eval_loss.as_ref()?.categories.get(draws.order(*seed)[0])?.loss)
            };
            let first: Option<Vec<f64>> = plan.seeds.iter().zip(seeds).map(first).collect();
            let difference = if rows.is_empty() { None } else { difference(seeds, &found[0][i], plan.confidence)? };
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
