//! Clusters of records, whose number the paper takes as the number of heads.
//!
//! TF-IDF of instruction and context (`cluster/tfidf.rs`) → its 64 strongest directions, rows scaled to unit length
//! (`cluster/project.rs`) → Lloyd's k-means for every k (`cluster/kmeans.rs`) → the elbow (`cluster/choose.rs`). Everything is
//! seeded, and the same for any number of threads. Clusters are numbered by size, the largest first.

mod choose;
mod kmeans;
mod project;
mod tfidf;

use crate::data::records::Record;
use anyhow::{Result, bail};
pub use choose::Tried;
use kmeans::{Fit, Points, squared_distance};
use serde::Serialize;
use std::collections::BTreeMap;
use tfidf::Corpus;

/// Directions that are kept of the TF-IDF vectors.
const DIMENSIONS: usize = 64;
/// Records in the sample for the mean silhouette, which takes all pairs.
const SILHOUETTE_SAMPLE: usize = 2000;
/// Terms that describe a cluster, and records nearest to its centroid.
const TERMS: usize = 10;
const NEAREST: usize = 3;

/// The numbers of clusters to try: `from ..= to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// At least 1.
    pub from: usize,
    /// At least `from`.
    pub to: usize,
}

impl Default for Range {
    fn default() -> Self {
        Self { from: 2, to: 16 }
    }
}

impl std::str::FromStr for Range {
    type Err = String;

    /// Reads "K" or "FROM..TO", both ends included.
    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse().ok().filter(|&k| (1..=256).contains(&k));
        let (from, to) = text.split_once("..").map_or((number(text), number(text)), |(a, b)| (number(a), number(b)));
        match (from, to) {
            (Some(from), Some(to)) if from <= to => Ok(Self { from, to }),
            _ => Err("expected a number from 1 to 256, or a range such as 2..16".into()),
        }
    }
}

/// A record near its cluster's centroid.
#[derive(Clone, Debug, Serialize)]
pub struct Near {
    /// Its index among all records.
    pub record: usize,
    /// Its distance from the centroid.
    pub distance: f64,
    /// The beginning of its instruction.
    pub instruction: String,
}

/// A clustering of records.
#[derive(Clone, Debug, Default)]
pub struct Clustering {
    /// The number of clusters.
    pub k: usize,
    /// Why this number.
    pub reason: String,
    /// All numbers that were tried, ascending from 1; or only the number that was asked for.
    pub tried: Vec<Tried>,
    /// The last k that the elbow's two lines were fitted to.
    pub upto: Option<usize>,
    /// Each record's cluster.
    pub clusters: Vec<usize>,
    /// Number of records in each cluster.
    pub sizes: Vec<usize>,
    /// For each cluster, the terms with more weight there than in the whole corpus.
    pub terms: Vec<Vec<String>>,
    /// For each cluster, the records nearest to its centroid.
    pub nearest: Vec<Vec<Near>>,
    /// Number of different terms.
    pub vocabulary: usize,
    /// Number of directions kept.
    pub dimensions: usize,
    /// Records without any of the terms.
    pub without_terms: usize,
    /// Records in the silhouette's sample.
    pub sample: usize,
}

/// Clusters `records`; the number of clusters is chosen from `range`.
pub fn find(records: &[Record], range: Range, seed: u64) -> Result<Clustering> {
    let texts: Vec<String> = records.iter().map(|record| record.content.question()).collect();
    let corpus = Corpus::new(&texts);
    let without_terms = (0..corpus.len()).filter(|&r| corpus.row(r).next().is_none()).count();
    if corpus.terms.is_empty() {
        bail!(
            "nothing to cluster by: of {} records, no word is in at least two and in at most half of them",
            records.len()
        );
    }
    let points = project::project(&corpus, DIMENSIONS, seed);
    let distinct = points.distinct();
    if range.from > distinct {
        bail!(
            "--k {}: expected at most {distinct} clusters, as many as the records have different vectors",
            range.from
        );
    }
    let asked = range.from == range.to;
    let last = range.to.min(distinct);
    // Every other start of a fit comes from the fit before, so that the curve has few accidental dents.
    let first = if asked { last } else { 1 };
    let sample = kmeans::Sample::new(&points, SILHOUETTE_SAMPLE, seed);
    let (mut fits, mut tried) = (Vec::<Fit>::new(), Vec::new());
    for k in first..=last {
        let fit = kmeans::fit(&points, k, fits.last(), seed);
        tried.push(Tried { k, inertia: fit.inertia, silhouette: sample.silhouette(&fit.clusters, k), misfit: None });
        fits.push(fit);
    }
    let (k, reason, upto) = match asked {
        true => (last, "as asked for".into(), None),
        false => choose::choose(&mut tried, range.from),
    };
    let fit = fits.swap_remove(k - first);
    Ok(Clustering {
        reason,
        tried,
        upto,
        sample: sample.len(),
        without_terms,
        ..describe(records, &corpus, &points, fit, k)
    })
}

/// Numbers the clusters by size, and describes them.
fn describe(records: &[Record], corpus: &Corpus, points: &Points, fit: Fit, k: usize) -> Clustering {
    let mut members = vec![Vec::new(); k];
    fit.clusters.iter().enumerate().for_each(|(record, &cluster)| members[cluster as usize].push(record));
    let mut order: Vec<usize> = (0..k).collect();
    order.sort_by_key(|&c| (std::cmp::Reverse(members[c].len()), members[c].first().copied()));
    let mut clusters = vec![0; records.len()];
    let (mut sizes, mut terms, mut nearest) = (Vec::new(), Vec::new(), Vec::new());
    for (number, &cluster) in order.iter().enumerate() {
        let own = &members[cluster];
        own.iter().for_each(|&record| clusters[record] = number);
        sizes.push(own.len());
        terms.push(corpus.distinctive(own, TERMS));
        let distance = |&record: &usize| squared_distance(points.row(record), fit.centroid(cluster, points.dims));
        let mut near: Vec<(f64, usize)> = own.iter().map(|record| (f64::from(distance(record)), *record)).collect();
        near.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let near = near.into_iter().take(NEAREST).map(|(square, record)| Near {
            record,
            distance: square.sqrt(),
            instruction: snippet(records[record].content.opening()),
        });
        nearest.push(near.collect());
    }
    let (vocabulary, dimensions) = (corpus.terms.len(), points.dims);
    Clustering { k, clusters, sizes, terms, nearest, vocabulary, dimensions, ..Clustering::default() }
}

/// The start of a text, on one line.
fn snippet(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let short: String = line.chars().take(120).collect();
    if short.len() < line.len() { short + "…" } else { short }
}

impl Clustering {
    /// The two lines that meet at the chosen k, as points; `None` if k was asked for.
    pub fn lines(&self) -> Option<[Vec<(f64, f64)>; 2]> {
        let fitted = self.tried.iter().filter(|one| self.upto.is_some_and(|upto| one.k <= upto));
        let curve: Vec<(f64, f64)> = fitted.map(|one| (one.k as f64, one.inertia)).collect();
        let at = curve.iter().position(|point| point.0 == self.k as f64)?;
        let drawn = |points: &[(f64, f64)]| {
            let line = choose::line(points);
            points.iter().map(|&(x, _)| (x, line.at(x))).collect()
        };
        Some([drawn(&curve[..=at]), drawn(&curve[at..])])
    }
}

/// The number of records of each category (rows) in each cluster (columns).
pub fn contingency(records: &[Record], clustering: &Clustering) -> BTreeMap<String, Vec<usize>> {
    let mut table = BTreeMap::new();
    for (record, &cluster) in records.iter().zip(&clustering.clusters) {
        if let Some(category) = &record.category {
            table.entry(category.clone()).or_insert_with(|| vec![0; clustering.k])[cluster] += 1;
        }
    }
    table
}

/// The adjusted Rand index of two partitions (Hubert and Arabie 1985), from their contingency table: 1 if they are the same, 0 on
/// average if they are independent. `None` if there is nothing to compare.
pub fn adjusted_rand(table: &[Vec<usize>]) -> Option<f64> {
    let pairs = |n: usize| n as f64 * n.saturating_sub(1) as f64 / 2.0;
    let columns = table.iter().map(Vec::len).max().unwrap_or(0);
    let rows: f64 = table.iter().map(|row| pairs(row.iter().sum())).sum();
    let columns: f64 = (0..columns).map(|c| pairs(table.iter().map(|row| row[c]).sum())).sum();
    let both: f64 = table.iter().flatten().map(|&n| pairs(n)).sum();
    let all = pairs(table.iter().flatten().sum());
    let expected = if all > 0.0 { rows * columns / all } else { return None };
    let most = (rows + columns) / 2.0;
    // Both partitions have one part, or only parts with one member: they are the same.
    Some(if most == expected { 1.0 } else { (both - expected) / (most - expected) })
}
