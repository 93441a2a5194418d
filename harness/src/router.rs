//! What an adapter's router does on records of different categories.

use crate::data::encode::Encoded;
use anyhow::Result;
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::Backend;
use hydra_runtime::evaluate::{Evaluator, GateMean};
use hydra_runtime::model::Model;
use std::collections::BTreeMap;

/// Categories watched.
const MOST_CATEGORIES: usize = 40;
/// What records without a category go under.
const NONE: &str = "(no category)";

/// One category's.
pub struct Watched {
    /// Records and tokens that the means are over.
    pub records: usize,
    /// See `records`.
    pub tokens: usize,
    /// By layer and adapted projection.
    pub means: Vec<GateMean>,
}

/// Watches the gates on the first `most` records of each category.
pub fn watch<B: Backend>(
    model: &Model<'_, B>,
    adapter: &Adapter,
    data: &Encoded,
    most: usize,
) -> Result<BTreeMap<String, Watched>> {
    let mut chosen: BTreeMap<String, Vec<_>> = BTreeMap::new();
    for (sequence, category) in data.sequences.iter().zip(&data.categories) {
        let own = chosen.entry(category.clone().unwrap_or_else(|| NONE.into())).or_default();
        if own.len() < most {
            own.push(sequence.clone());
        }
    }
    let chosen: Vec<_> = chosen.into_iter().take(MOST_CATEGORIES).collect();
    let longest = chosen.iter().flat_map(|(_, own)| own).map(|s| s.tokens.len()).max().unwrap_or(1);
    let mut evaluator = Evaluator::new(model, Some(adapter), longest.max(1024))?;
    let watched = chosen.into_iter().map(|(category, sequences)| {
        let tokens = sequences.iter().map(|s| s.tokens.len()).sum();
        Ok((category, Watched { records: sequences.len(), tokens, means: evaluator.gate_means(&sequences)? }))
    });
    watched.collect()
}
