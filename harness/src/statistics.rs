//! Means over seeds with their standard errors, and paired differences with bootstrap intervals.
//!
//! The standard error of the mean of n values is √(Σ (x − x̄)² / (n − 1) / n); one value has none. An interval is Efron's
//! percentile bootstrap: seeds and items (records, questions) are drawn with replacement, independently of each other. Both sides
//! of a difference use the same draws, so that what they have in common cancels. Over few seeds it is too narrow: see
//! `experiment/scores.rs`.

use hydra_runtime::hydra_kernels::random::SplitMix64;
use serde::{Deserialize, Serialize};

/// A mean over seeds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Mean.
    pub mean: f64,
    /// Its standard error; `None` for one seed.
    pub stderr: Option<f64>,
    /// The value of each seed.
    pub seeds: Vec<f64>,
}

impl Estimate {
    /// The mean of at least one value.
    pub fn of(seeds: Vec<f64>) -> Self {
        let n = seeds.len() as f64;
        let mean = seeds.iter().sum::<f64>() / n;
        let squares: f64 = seeds.iter().map(|x| (x - mean).powi(2)).sum();
        let stderr = (seeds.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt());
        Self { mean, stderr, seeds }
    }
}

/// A mean with its bootstrap interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// Mean.
    pub mean: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Interval {
    /// Whether a value lies in it.
    pub fn holds(&self, value: f64) -> bool {
        (self.low..=self.high).contains(&value)
    }
}

/// How intervals are computed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Bootstrap {
    /// Number of draws.
    pub samples: usize,
    /// Seed of the draws.
    pub seed: u64,
    /// Share of the draws inside the interval.
    pub level: f64,
}

impl Default for Bootstrap {
    fn default() -> Self {
        Self { samples: 2000, seed: 0, level: 0.95 }
    }
}

/// Differences of two sides, `values[seed][item]`. Their mean is that over seeds and groups of Σ values / Σ weights over the
/// items of a group.
pub struct Differences<'a> {
    /// Differences by seed and item.
    pub values: &'a [Vec<f64>],
    /// Weight of each item.
    pub weights: &'a [f64],
    /// Items of each group; draws stay within a group.
    pub groups: &'a [Vec<usize>],
}

impl Differences<'_> {
    /// The mean and its interval; `None` if there is nothing to average.
    pub fn interval(&self, how: &Bootstrap) -> Option<Interval> {
        if self.values.is_empty() || self.groups.is_empty() || self.groups.iter().any(Vec::is_empty) {
            return None;
        }
        let seeds: Vec<usize> = (0..self.values.len()).collect();
        let mean = self.mean(&seeds, self.groups);
        let mut random = SplitMix64::new(how.seed);
        let mut draw = |from: &[usize]| -> Vec<usize> { from.iter().map(|_| from[random.below(from.len())]).collect() };
        let mut means: Vec<f64> = (0..how.samples)
            .map(|_| {
                let seeds = draw(&seeds);
                let groups: Vec<_> = self.groups.iter().map(|group| draw(group)).collect();
                self.mean(&seeds, &groups)
            })
            .collect();
        means.sort_by(f64::total_cmp);
        let tail = (1.0 - how.level) / 2.0;
        let (low, high) = (quantile(&means, tail), quantile(&means, 1.0 - tail));
        Some(Interval { mean, low, high })
    }

    fn mean(&self, seeds: &[usize], groups: &[Vec<usize>]) -> f64 {
        let ratio = |group: &Vec<usize>| {
            let weight: f64 = group.iter().map(|&item| self.weights[item]).sum();
            let of_seed = |&seed: &usize| group.iter().map(|&item| self.values[seed][item]).sum::<f64>();
            seeds.iter().map(of_seed).sum::<f64>() / weight / seeds.len() as f64
        };
        groups.iter().map(ratio).sum::<f64>() / groups.len() as f64
    }
}

/// A quantile of ascending values, interpolated linearly.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let place = q * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_has_no_standard_error() {
        assert_eq!(Estimate::of(vec![2.0]), Estimate { mean: 2.0, stderr: None, seeds: vec![2.0] });
        let three = Estimate::of(vec![1.0, 2.0, 6.0]);
        // Deviations -2, -1, 3: 14 / 2 / 3.
        assert_eq!(three.mean, 3.0);
        assert!((three.stderr.unwrap() - (14.0f64 / 6.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn what_both_sides_share_has_no_width() {
        let values = vec![vec![0.5; 40]; 3];
        let all = [(0..40).collect::<Vec<_>>()];
        let differences = Differences { values: &values, weights: &[1.0; 40], groups: &all };
        let got = differences.interval(&Bootstrap::default()).unwrap();
        assert!((got.mean - 0.5).abs() < 1e-12 && (got.high - got.low).abs() < 1e-12);
    }

    #[test]
    fn the_interval_is_that_of_the_normal_distribution_for_many_items() {
        // ±1, half of each: the mean of 400 has a standard error of 1/20.
        let values = vec![(0..400).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect::<Vec<_>>()];
        let all = [(0..400).collect::<Vec<_>>()];
        let differences = Differences { values: &values, weights: &[1.0; 400], groups: &all };
        let how = Bootstrap { samples: 4000, ..Bootstrap::default() };
        let got = differences.interval(&how).unwrap();
        assert!((got.low + 1.96 / 20.0).abs() < 0.01 && (got.high - 1.96 / 20.0).abs() < 0.01, "{got:?}");
        assert_eq!(got, differences.interval(&how).unwrap());
        assert_ne!(got, differences.interval(&Bootstrap { seed: 1, ..how }).unwrap());
    }

    #[test]
    fn groups_weigh_alike_and_items_by_their_weights() {
        let values = vec![vec![3.0, 3.0, 8.0]];
        let groups = [vec![0, 1], vec![2]];
        let differences = Differences { values: &values, weights: &[1.0, 2.0, 2.0], groups: &groups };
        assert_eq!(differences.interval(&Bootstrap::default()).unwrap().mean, (2.0 + 4.0) / 2.0);
        assert!(Differences { groups: &[vec![]], ..differences }.interval(&Bootstrap::default()).is_none());
    }
}
