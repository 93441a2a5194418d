//! Means over seeds, and paired differences between two runs.

use super::kept::Finished;
use super::measure::{Accuracy, Details};
use crate::eval::accuracy::report::Report;
use crate::eval::loss::EvalLoss;
use crate::output::printable;
use crate::statistics::{Bootstrap, Differences, Estimate, Interval};
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

/// Differences of a run to the first one, seed by seed; `None` if a seed of either diverged.
pub fn difference(own: &[Finished], first: &[Finished], how: &Bootstrap) -> Result<Option<Scores<Interval>>> {
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
    let of = |values: &[Vec<f64>], weights: &[f64], groups: &[Vec<usize>]| {
        Differences { values, weights, groups }.interval(how)
    };
    let all: Vec<usize> = (0..weights.len()).collect();
    let Some(loss) = of(&losses, &weights, &[all]) else { return Ok(None) };
    let categories = by_name(&reference.categories)
        .into_iter()
        .filter_map(|(name, items)| Some((name.clone(), of(&losses, &weights, &[items])?)));
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
    let scores: Vec<Vec<f64>> =
        pairs().map(|(a, b)| a.answers.iter().zip(&b.answers).map(|(a, b)| a - b).collect()).collect();
    let ones = vec![1.0; reference.answers.len()];
    let accuracy = of(&scores, &ones, &[(0..ones.len()).collect()]);
    let accuracy_categories = by_name(&reference.answer_categories)
        .into_iter()
        .filter_map(|(name, items)| Some((name.clone(), of(&scores, &ones, &[items])?)));
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

/// "-0.012 [-0.020, -0.004]"
pub fn interval(interval: Option<Interval>, factor: f64, decimals: usize) -> String {
    let text = |i: Interval| {
        let [mean, low, high] = [i.mean, i.low, i.high].map(|x| format!("{:+.decimals$}", factor * x));
        format!("{mean} [{low}, {high}]")
    };
    interval.map_or("–".to_string(), text)
}

/// With fewer seeds than this, an interval is told to be too narrow.
const FEW: usize = 10;

/// A note on intervals over few seeds. One of n values lies within their range, which has the median of what they are drawn from
/// in it with probability 1 − 2¹⁻ⁿ.
pub fn few(seeds: usize, bootstrap: &Bootstrap) -> Option<String> {
    let most = 1.0 - 0.5f64.powi(seeds as i32 - 1);
    let at_most = match most < bootstrap.level {
        true => format!(", with {seeds} seeds at most in {} %", 100.0 * most),
        false => String::new(),
    };
    (2..FEW).contains(&seeds).then(|| {
        format!(
            "{seeds} seeds are few for a bootstrap: where seeds differ more than records, an interval is too narrow, and holds the \
             true difference in less than {} % of cases{at_most}.",
            100.0 * bootstrap.level
        )
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_seeds_are_said_to_be() {
        let said = |seeds: usize| few(seeds, &Bootstrap::default());
        assert!(said(2).unwrap().ends_with("in less than 95 % of cases, with 2 seeds at most in 50 %."));
        assert!(said(3).unwrap().ends_with("with 3 seeds at most in 75 %."));
        assert!(said(6).unwrap().ends_with("in less than 95 % of cases."));
        assert_eq!((said(1), said(10)), (None, None));
    }

    /// Two values: the interval is their range, which holds the mean of a symmetric distribution in half of all cases.
    #[test]
    fn intervals_over_two_seeds_hold_the_truth_in_half_of_all_cases() {
        let mut random = hydra_runtime::hydra_kernels::random::SplitMix64::new(5);
        let mut holds = || {
            let values: Vec<Vec<f64>> = (0..2).map(|_| vec![random.uniform() - 0.5; 4]).collect();
            let groups = [(0..4).collect::<Vec<_>>()];
            let how = Bootstrap { samples: 200, ..Bootstrap::default() };
            let found = Differences { values: &values, weights: &[1.0; 4], groups: &groups }.interval(&how).unwrap();
            found.low <= 0.0 && found.high >= 0.0
        };
        let hits = (0..400).filter(|_| holds()).count();
        assert!((160..240).contains(&hits), "{hits} of 400");
    }
}
