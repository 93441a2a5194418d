//! A clustering with what it is compared to: as JSON, and as text for a terminal.

use crate::cluster::Clustering;
use crate::data::records::Record;
use crate::output::escaped;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A clustering, and how it agrees with the records' categories.
pub struct Found<'a> {
    /// Files of records.
    pub data: &'a [PathBuf],
    /// Seed of the starts and samples.
    pub seed: u64,
    /// All records.
    pub records: &'a [Record],
    /// Their clusters.
    pub clustering: &'a Clustering,
    /// Records of each category in each cluster.
    pub meeting: BTreeMap<String, Vec<usize>>,
    /// Adjusted Rand index with the categories, where records have some.
    pub agreement: Option<f64>,
}

impl Found<'_> {
    /// `clusters.json`
    pub fn json(&self) -> Value {
        let Clustering { k, reason, tried, sizes, terms, nearest, .. } = self.clustering;
        let chosen = tried.iter().find(|one| one.k == *k);
        json!({
            "k": k, "reason": reason, "sizes": sizes, "terms": terms, "nearest": nearest,
            "silhouette": chosen.and_then(|one| one.silhouette), "inertia": chosen.map(|one| one.inertia), "tried": tried,
            "adjusted_rand_index": self.agreement, "categories": self.meeting,
            "records": self.records.len(), "records_without_terms": self.clustering.without_terms,
            "vocabulary": self.clustering.vocabulary, "dimensions": self.clustering.dimensions,
            "silhouette_sample": self.clustering.sample, "seed": self.seed, "data": self.data,
        })
    }

    /// A row for each number that was tried, and for each cluster.
    pub fn text(&self) -> String {
        let Clustering { k, reason, tried, sizes, terms, without_terms, .. } = self.clustering;
        let mut text = format!("{:>4} {:>12} {:>11}\n", "k", "inertia", "silhouette");
        for one in tried {
            let silhouette = one.silhouette.map_or("-".into(), |s| format!("{s:.4}"));
            let mark = if one.k == *k { "  <" } else { "" };
            text += &format!("{:>4} {:>12.2} {silhouette:>11}{mark}\n", one.k, one.inertia);
        }
        text += &format!("{k} clusters: {reason}\n");
        for (cluster, (size, terms)) in sizes.iter().zip(terms).enumerate() {
            text += &format!("{cluster:>4} {size:>8}  {}\n", escaped(&terms.join(" ")));
        }
        if *without_terms > 0 {
            text += &format!("{without_terms} records have none of the terms that are counted\n");
        }
        if let Some(agreement) = self.agreement {
            text += &format!("agreement with the categories (adjusted Rand index): {agreement:.3}\n");
        }
        text
    }
}
