//! What an adapter's router does: its mean weights on records of each category.

use crate::data::encode::Encoded;
use crate::data::order::Order;
use crate::interrupt;
use anyhow::Result;
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::Backend;
use hydra_runtime::batch::Sequence;
use hydra_runtime::evaluate::{Evaluator, GateMean};
use hydra_runtime::model::Model;
use std::collections::BTreeMap;

/// Categories observed at most, in alphabetical order.
const MOST_CATEGORIES: usize = 40;
/// The category of records that have none.
const NONE: &str = "(no category)";
/// The records that a router is observed on.
pub struct Sample<'d> {
    data: &'d Encoded,
    /// Indices of the chosen records, by category.
    chosen: BTreeMap<String, Vec<usize>>,
    /// Number of categories in `data`.
    categories: usize,
}

impl<'d> Sample<'d> {
    /// The first `most` records of each category.
    pub fn first(data: &'d Encoded, most: usize) -> Self {
        let mut sample = Self::all(data);
        sample.chosen.values_mut().for_each(|own| own.truncate(most));
        sample
    }

    /// At most `total` records, drawn at random, as evenly over the categories as their sizes allow.
    pub fn spread(data: &'d Encoded, total: usize, seed: u64) -> Self {
        let mut sample = Self::all(data);
        // The largest equal share that fits; what is left goes to the first categories that have more records.
        let of_each = |most: usize| sample.chosen.values().map(|own| own.len().min(most)).sum::<usize>();
        let most = (0..total).take_while(|&most| of_each(most + 1) <= total).count();
        let mut left = total - of_each(most);
        for own in sample.chosen.values_mut() {
            let more = usize::from(own.len() > most && left > 0);
            left -= more;
            let count = own.len().min(most + more);
            *own = Order::new(own.len(), Some(seed)).take(0, count).into_iter().map(|i| own[i]).collect();
        }
        sample
    }

    fn all(data: &'d Encoded) -> Self {
        let mut chosen: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (place, category) in data.categories.iter().enumerate() {
            chosen.entry(category.clone().unwrap_or_else(|| NONE.into())).or_default().push(place);
        }
        let categories = chosen.len();
        Self { data, chosen: chosen.into_iter().take(MOST_CATEGORIES).collect(), categories }
    }

    /// The chosen records, by category.
    pub fn sequences(&self) -> Vec<Sequence> {
        self.chosen.values().flatten().map(|&i| self.data.sequences[i].clone()).collect()
    }

    /// The sample in words; `what` names the records, as in "held-out records".
    pub fn describe(&self, what: &str) -> String {
        let (watched, all) = (self.chosen.values().map(Vec::len).sum::<usize>(), self.data.sequences.len());
        if watched == all {
            return format!("All {all} {what}.");
        }
        let first = match self.categories > MOST_CATEGORIES {
            true => format!("; the first {MOST_CATEGORIES} of {} categories", self.categories),
            false => String::new(),
        };
        format!("{watched} of {all} {what}, drawn at random, spread evenly over the categories{first}.")
    }
}

/// The router on one category.
pub struct Watched {
    /// Records that the means are over.
    pub records: usize,
    /// Tokens that the means are over.
    pub tokens: usize,
    /// Mean gate of each layer and adapted projection.
    pub means: Vec<GateMean>,
}

/// The mean gates on the sample, by category. Ends with [`interrupt::Stopped`] on Ctrl-C.
pub fn watch<B: Backend>(
    model: &Model<B>,
    adapter: &Adapter,
    sample: &Sample<'_>,
) -> Result<BTreeMap<String, Watched>> {
    let sequences = &sample.data.sequences;
    let longest = sample.chosen.values().flatten().map(|&i| sequences[i].tokens.len()).max().unwrap_or(1);
    let mut evaluator = Evaluator::new(model, Some(adapter), longest.max(1024))?;
    let watched = sample.chosen.iter().map(|(category, own)| {
        interrupt::check()?;
        let own: Vec<_> = own.iter().map(|&i| sequences[i].clone()).collect();
        let tokens = own.iter().map(|s| s.tokens.len()).sum();
        Ok((category.clone(), Watched { records: own.len(), tokens, means: evaluator.gate_means(&own)? }))
    });
    watched.collect()
}

/// Whether the gates of each token add up to 1, which they don't where values are not finite.
pub fn finite(watched: &BTreeMap<String, Watched>) -> bool {
    let sums = watched.values().flat_map(|watched| &watched.means).map(|mean| mean.lora_heads.iter().sum::<f64>());
    sums.into_iter().all(|sum| (sum - 1.0).abs() < 1e-3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(counts: &[usize]) -> Encoded {
        let category = |(c, &n): (usize, &usize)| vec![Some(format!("{c:02}")); n];
        let categories: Vec<_> = counts.iter().enumerate().flat_map(category).collect();
        let sequences = categories.iter().map(|_| Sequence::prompt(&[1])).collect();
        Encoded { sequences, categories, ..Encoded::default() }
    }

    #[test]
    fn samples_are_spread_and_seeded() {
        let counts = |sample: &Sample<'_>| sample.chosen.values().map(Vec::len).collect::<Vec<_>>();
        let mixed = data(&[500, 30, 3, 400]);
        let sample = Sample::spread(&mixed, 200, 1);
        assert_eq!(counts(&sample), [84, 30, 3, 83]);
        assert!(sample.chosen["03"].iter().all(|&i| (533..933).contains(&i)));
        let mut own = sample.chosen["00"].clone();
        own.sort_unstable();
        own.dedup();
        assert_eq!(own.len(), 84, "no record twice");
        assert_eq!(sample.chosen, Sample::spread(&mixed, 200, 1).chosen);
        assert_ne!(sample.chosen, Sample::spread(&mixed, 200, 2).chosen);
        assert_eq!(
            sample.describe("records"),
            "200 of 933 records, drawn at random, spread evenly over the categories."
        );
        assert_eq!(counts(&Sample::first(&mixed, 32)), [32, 30, 3, 32]);

        let few = data(&[5, 4]);
        assert_eq!(counts(&Sample::spread(&few, 200, 1)), [5, 4]);
        assert_eq!(Sample::spread(&few, 200, 1).describe("records"), "All 9 records.");
        let many = data(&[10; 57]);
        let sample = Sample::spread(&many, 200, 1);
        assert_eq!(counts(&sample), [5; 40]);
        assert!(sample.describe("records").ends_with("; the first 40 of 57 categories."));
        assert_eq!(counts(&Sample::spread(&data(&[9, 9, 9]), 2, 1)), [1, 1, 0]);
    }
}
