//! Means over seeds with their standard errors, and paired differences with Student intervals.
//!
//! The standard error of the mean of n values is √(Σ (x − x̄)² / (n − 1) / n); one value has none.
//!
//! A difference of two sides is known for each seed s and item q (a record, a question), both of which are samples. The mean R of
//! the seeds' means R_s varies with the seeds and with the items:
//!
//! ```text
//! seeds  Σ_s (R_s − R)² / (S (S − 1))               the square of the standard error over seeds; none for one seed
//! items  Σ_q mean of e_sq e_tq over seeds s ≠ t     e_sq: how q's difference moves R_s; what is not due to the seed
//! ```
//! The interval is R ± t √(seeds + items), where t is the mean of Student's quantiles for the degrees of freedom of both, weighted
//! by the two variances: Cochran and Cox's approximation (Experimental Designs, 1957, 4.14). The tests have its coverage; with
//! Satterthwaite's degrees of freedom that of two seeds falls to 87 % where seeds differ more than items.

mod student;

use serde::Serialize;
use student::two_sided;

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

/// A mean difference with its interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// Mean.
    pub mean: f64,
    /// The interval's ends; `None` over a single item, which says nothing about others.
    #[serde(flatten)]
    pub ends: Option<Ends>,
}

/// The ends of an interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ends {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Interval {
    /// Whether the true difference may be `value`.
    pub fn holds(&self, value: f64) -> bool {
        self.ends.is_none_or(|Ends { low, high }| (low..=high).contains(&value))
    }
}

/// Differences of two sides, `values[seed][item]`. Their mean is that over seeds and groups of Σ values / Σ weights over the
/// items of a group.
pub struct Differences<'a> {
    /// Differences by seed and item.
    pub values: &'a [Vec<f64>],
    /// Weight of each item.
    pub weights: &'a [f64],
    /// Items of each group. Groups are given, their items are samples.
    pub groups: &'a [Vec<usize>],
    /// What a single answer can change: 1 for answers, 0 for losses. Where few answers differ, their scatter says too little: the
    /// variance over items counts as that of one answer per seed more.
    pub step: f64,
}

impl Differences<'_> {
    /// The mean and its interval, which holds the true difference with probability `level`; `None` if there is nothing to average.
    pub fn interval(&self, level: f64) -> Option<Interval> {
        if self.values.is_empty() || self.groups.is_empty() || self.groups.iter().any(Vec::is_empty) {
            return None;
        }
        let factors = self.factors();
        let means: Vec<f64> = self.values.iter().map(|values| dot(values, &factors)).collect();
        let Estimate { mean, stderr, seeds } = Estimate::of(means);
        let ends = self.items(&factors).map(|(of_items, freedom)| {
            let of_seeds = stderr.map_or(0.0, |stderr| stderr.powi(2));
            let by_seeds = if of_seeds > 0.0 { of_seeds * two_sided(level, seeds.len() as f64 - 1.0) } else { 0.0 };
            let by_items = of_items * two_sided(level, freedom);
            let root = (of_seeds + of_items).sqrt();
            let half = if root > 0.0 { (by_seeds + by_items) / root } else { 0.0 };
            Ends { low: mean - half, high: mean + half }
        });
        Some(Interval { mean, ends })
    }

    /// What each item's difference is multiplied by in a seed's mean.
    fn factors(&self) -> Vec<f64> {
        let mut factors = vec![0.0; self.weights.len()];
        for group in self.groups {
            let weight: f64 = group.iter().map(|&item| self.weights[item]).sum();
            group.iter().for_each(|&item| factors[item] = 1.0 / (self.groups.len() as f64 * weight));
        }
        factors
    }

    /// The variance that items add to the mean, and its degrees of freedom; `None` for a single item.
    fn items(&self, factors: &[f64]) -> Option<(f64, f64)> {
        let seeds = self.values.len() as f64;
        let (mut variance, mut whole, mut squares) = (0.0, 0.0, 0.0);
        for group in strata(self.groups)? {
            let weights: Vec<f64> = group.iter().map(|&item| factors[item] * self.weights[item]).collect();
            let total: f64 = weights.iter().sum();
            // By item: how far it moves each seed's mean, summed over seeds, and the sum of the squares.
            let (mut moves, mut own) = (vec![0.0; group.len()], vec![0.0; group.len()]);
            for values in self.values {
                let values: Vec<f64> = group.iter().map(|&item| factors[item] * values[item]).collect();
                let mean = values.iter().sum::<f64>() / total;
                for (i, (value, weight)) in values.iter().zip(&weights).enumerate() {
                    let moved = value - weight * mean;
                    moves[i] += moved;
                    own[i] += moved.powi(2);
                }
            }
            let of_item = |(i, weight): (usize, &f64)| {
                let product = if seeds > 1.0 { (moves[i].powi(2) - own[i]) / (seeds * (seeds - 1.0)) } else { own[i] };
                // The mean follows a heavy item, the more the larger its share: for n equal items this is n / (n − 1).
                product / (1.0 - weight / total)
            };
            variance += weights.iter().enumerate().map(of_item).sum::<f64>();
            // One less than the number of equal items that would do as well (Kish).
            let share = dot(&weights, &weights);
            let freedom = (total.powi(2) / share - 1.0).max(1.0);
            whole += share;
            squares += share.powi(2) / freedom;
        }
        let items: usize = self.groups.iter().map(Vec::len).sum();
        // Satterthwaite's degrees of freedom over the groups, if items are alike in all of them.
        Some((variance.max(0.0) + (self.step / items as f64).powi(2) / seeds, whole.powi(2) / squares))
    }
}

/// Groups of at least two items: those of one are taken together, a single one with the smallest other group.
fn strata(groups: &[Vec<usize>]) -> Option<Vec<Vec<usize>>> {
    let (mut strata, single): (Vec<_>, Vec<_>) = groups.iter().cloned().partition(|group| group.len() > 1);
    match single.concat() {
        none if none.is_empty() => {}
        one if one.len() == 1 => strata.iter_mut().min_by_key(|group| group.len())?.extend(one),
        many => strata.push(many),
    }
    Some(strata)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests;
