//! Means over seeds, and paired differences between two runs.

use super::kept::Finished;
use super::measure::{Accuracy, Details};
use crate::eval::accuracy::report::Report;
use crate::eval::loss::EvalLoss;
use crate::output::printable;
use crate::statistics::{Differences, Ends, Estimate, Interval};
use anyhow::{Result, bail};
use serde::Serialize;
use std::collections::BTreeMap;

/// Eval loss and accuracy: means or differences.
#[derive(Clone, Debug, Serialize)]
pub struct Scores<T> {
    /// Loss on the eval set.
    pub loss: T,
    /// Loss by category.
    pub categories: BTreeMap<String, T>,
    /// Accuracy on MMLU over all questions.
    pub mmlu_micro: Option<T>,
    /// Mean of the accuracies on MMLU's subjects.
    pub mmlu_macro: Option<T>,
    /// Accuracy on the records of `[accuracy]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<T>,
    /// The same by category.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub accuracy_categories: BTreeMap<String, T>,
}

impl Scores<Interval> {
    /// Whether something was measured on a single record or question, so that it has no interval.
    pub fn has_single(&self) -> bool {
        let overall = [Some(&self.loss), self.mmlu_micro.as_ref(), self.mmlu_macro.as_ref(), self.accuracy.as_ref()];
        let by_category = self.categories.values().chain(self.accuracy_categories.values());
        overall.into_iter().flatten().chain(by_category).any(|interval| interval.ends.is_none())
    }
}

/// Means over seeds; `None` if a seed diverged.
pub fn scores(seeds: &[Finished]) -> Option<Scores<Estimate>> {
    let losses: Vec<&EvalLoss> = seeds.iter().map(|f| f.found.eval_loss.as_ref()).collect::<Option<_>>()?;
    let of = |name: &String| {
        Estimate::of(losses.iter().map(|loss| loss.categories.get(name).map_or(f64::NAN, |loss| loss.loss)).collect())
    };
    let mmlu: Option<Vec<Accuracy>> = seeds.iter().map(|f| f.found.mmlu).collect();
    let accuracy = |pick: fn(&Accuracy) -> f64| mmlu.as_ref().map(|all| Estimate::of(all.iter().map(pick).collect()));
    let answered: Option<Vec<&Report>> = seeds.iter().map(|f| f.found.accuracy.as_ref()).collect();
    let answered_in = |name: &String| {
        let own = |report: &&Report| report.categories.get(name).map_or(f64::NAN, |score| score.accuracy);
        Estimate::of(answered.iter().flatten().map(own).collect())
    };
    let answer_categories = answered.iter().flatten().take(1).flat_map(|report| report.categories.keys());
    Some(Scores {
        accuracy: answered.as_ref().map(|all| Estimate::of(all.iter().map(|report| report.all.accuracy).collect())),
        accuracy_categories: answer_categories.map(|name| (name.clone(), answered_in(name))).collect(),
        loss: Estimate::of(losses.iter().map(|loss| loss.all.loss).collect()),
        categories: losses[0].categories.keys().map(|name| (name.clone(), of(name))).collect(),
        mmlu_micro: accuracy(|a| a.micro),
        mmlu_macro: accuracy(|a| a.r#macro),
    })
}

/// Differences of a run to the first one, seed by seed, with intervals of that confidence; `None` if a seed of either diverged.
pub fn difference(own: &[Finished], first: &[Finished], confidence: f64) -> Result<Option<Scores<Interval>>> {
    if own.iter().chain(first).any(|f| f.found.eval_loss.is_none()) {
        return Ok(None);
    }
    let reference = &first[0].details;
    let alike = |d: &Details| {
        (&d.targets, &d.categories, &d.subjects, &d.answer_categories)
            == (&reference.targets, &reference.categories, &reference.subjects, &reference.answer_categories)
    };
    if !own.iter().chain(first).all(|f| alike(&f.details)) {
        bail!("the runs were measured on different records or questions, so they can't be paired");
    }
    let pairs = || own.iter().zip(first).map(|(own, first)| (&own.details, &first.details));
    let losses: Vec<Vec<f64>> = pairs().map(|(a, b)| a.nll.iter().zip(&b.nll).map(|(a, b)| a - b).collect()).collect();
    let weights: Vec<f64> = reference.targets.iter().map(|&n| n as f64).collect();
    let of_losses = |groups: &[Vec<usize>]| {
        Differences { values: &losses, weights: &weights, groups, step: 0.0 }.interval(confidence)
    };
    let of_answers = |values: &[Vec<f64>], groups: &[Vec<usize>]| {
        let weights = vec![1.0; values[0].len()];
        Differences { values, weights: &weights, groups, step: 1.0 }.interval(confidence)
    };
    let Some(loss) = of_losses(&[(0..weights.len()).collect()]) else { return Ok(None) };
    let categories = by_name(&reference.categories)
        .into_iter()
        .filter_map(|(name, items)| Some((name.clone(), of_losses(&[items])?)));
    let categories = categories.collect();
    let right: Vec<Vec<f64>> = pairs()
        .map(|(a, b)| a.correct.iter().zip(&b.correct).map(|(&a, &b)| f64::from(a) - f64::from(b)).collect())
        .collect();
    let mut by_subject: BTreeMap<&String, Vec<usize>> = BTreeMap::new();
    for (i, subject) in reference.subjects.iter().enumerate() {
        by_subject.entry(subject).or_default().push(i);
    }
    let subjects: Vec<Vec<usize>> = by_subject.into_values().collect();
    let mmlu_micro = of_answers(&right, &[(0..reference.correct.len()).collect()]);
    let mmlu_macro = of_answers(&right, &subjects);
    let scores: Vec<Vec<f64>> =
        pairs().map(|(a, b)| a.answers.iter().zip(&b.answers).map(|(a, b)| a - b).collect()).collect();
    let accuracy = of_answers(&scores, &[(0..reference.answers.len()).collect()]);
    let accuracy_categories = by_name(&reference.answer_categories)
        .into_iter()
        .filter_map(|(name, items)| Some((name.clone(), of_answers(&scores, &[items])?)));
    let accuracy_categories = accuracy_categories.collect();
    Ok(Some(Scores { loss, categories, mmlu_micro, mmlu_macro, accuracy, accuracy_categories }))
}

/// The places of each category.
fn by_name(categories: &[Option<String>]) -> BTreeMap<&String, Vec<usize>> {
    let mut by_name: BTreeMap<&String, Vec<usize>> = BTreeMap::new();
    for (i, category) in categories.iter().enumerate() {
        if let Some(category) = category {
            by_name.entry(category).or_default().push(i);
        }
    }
    by_name
}

/// "1.234 ± 0.005", or the mean alone.
pub fn estimate(estimate: &Estimate, factor: f64, decimals: usize) -> String {
    let mean = format!("{:.decimals$}", factor * estimate.mean);
    estimate.stderr.map_or(mean.clone(), |stderr| format!("{mean} ± {:.decimals$}", factor * stderr))
}

/// "-0.012 [-0.020, -0.004]", or the mean alone.
pub fn interval(interval: Option<Interval>, factor: f64, decimals: usize) -> String {
    let number = |x: f64| format!("{:+.decimals$}", factor * x);
    interval.map_or("–".to_string(), |Interval { mean, ends }| match ends {
        Some(Ends { low, high }) => format!("{} [{}, {}]", number(mean), number(low), number(high)),
        None => number(mean),
    })
}

/// What the differences and their intervals are; `items` is what they are means over besides seeds.
pub fn reading(seeds: usize, confidence: f64, items: &str) -> String {
    let over = match seeds {
        1 => format!("over {items} alone: how much seeds differ is not in it"),
        _ => format!("over seeds and {items}: both count as samples"),
    };
    let level = percent(confidence);
    format!("“vs first run” is the paired difference from the first run, with its {level} % interval {over}.")
}

/// A share as a percentage, in as many digits as it takes.
pub fn percent(share: f64) -> String {
    format!("{:.8}", 100.0 * share).trim_end_matches('0').trim_end_matches('.').to_string()
}

/// A note, if the seeds of a run have different numbers of trainable parameters.
pub fn unlike(name: &str, trainable: &[u64]) -> Option<String> {
    let (least, most) = (trainable.iter().min()?, trainable.iter().max()?);
    (least < most).then(|| {
        format!(
            "Run “{}”: {least} to {most} trainable parameters, depending on the seed; the table shows the first seed's.",
            printable(name)
        )
    })
}
