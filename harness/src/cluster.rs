//! How many kinds of records a corpus has, and which record is of which kind: the paper's way to the number of heads.
//!
//! TF-IDF of instruction and context (`cluster/tfidf.rs`) → its 64 strongest directions, rows scaled to length 1
//! (`cluster/project.rs`) → Lloyd's k-means, Euclidean, for every k (`cluster/kmeans.rs`) → a number (`cluster/choose.rs`).
//! Everything is seeded, and the same for any number of threads. Clusters are numbered by size, the largest first.

mod choose;
mod kmeans;
mod project;
mod tfidf;

use crate::data::records::Record;
use anyhow::{Result, bail};
use kmeans::{Fit, Points, squared_distance};
use serde::Serialize;
use std::collections::BTreeMap;
use tfidf::Corpus;

/// Directions that are kept of the TF-IDF vectors.
const DIMENSIONS: usize = 64;
/// Records that the mean silhouette is taken over: it goes by all pairs.
const SILHOUETTE_SAMPLE: usize = 2000;
/// Terms and records that describe a cluster.
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

    /// "K" or "FROM..TO", both included.
    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse().ok().filter(|&k| (1..=256).contains(&k));
        let (from, to) = text.split_once("..").map_or((number(text), number(text)), |(a, b)| (number(a), number(b)));
        match (from, to) {
            (Some(from), Some(to)) if from <= to => Ok(Self { from, to }),
            _ => Err("wanted a number from 1 to 256, or two with .. between them, as in 2..16".into()),
        }
    }
}

/// What was found for one number of clusters.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Tried {
    /// The number.
    pub k: usize,
    /// Sum over the records of the squared distance to their cluster's centroid.
    pub inertia: f64,
    /// Mean silhouette (Rousseeuw 1987) of a sample; `None` where there is one cluster.
    pub silhouette: Option<f64>,
    /// Error of two lines that meet at k: root mean square, over the first inertia. `None` at the ends of what they fit.
    pub misfit: Option<f64>,
}

/// A record that lies near its cluster's centroid.
#[derive(Clone, Debug, Serialize)]
pub struct Near {
    /// Its place among all records, from 0.
    pub record: usize,
    /// Its distance from the centroid.
    pub distance: f64,
    /// The beginning of its instruction.
    pub instruction: String,
}

/// A corpus in clusters.
#[derive(Clone, Debug, Default)]
pub struct Clustering {
    /// The number of clusters.
    pub k: usize,
    /// Why this one.
    pub reason: String,
    /// All that were tried, ascending; the first is 1 unless one number was asked for.
    pub tried: Vec<Tried>,
    /// The last k that the elbow's two lines were fitted to.
    pub upto: Option<usize>,
    /// Each record's cluster.
    pub clusters: Vec<usize>,
    /// Records of each.
    pub sizes: Vec<usize>,
    /// What its terms weigh more than the corpus's.
    pub terms: Vec<Vec<String>>,
    /// Its records nearest to the centroid.
    pub nearest: Vec<Vec<Near>>,
    /// Different terms.
    pub vocabulary: usize,
    /// Directions kept.
    pub dimensions: usize,
    /// Records without any of the terms.
    pub without_terms: usize,
    /// Records in the silhouette's sample.
    pub sample: usize,
}

/// Clusters `records`, into a number of clusters from `range`.
pub fn find(records: &[Record], range: Range, seed: u64) -> Result<Clustering> {
    let texts: Vec<String> = records.iter().map(|record| format!("{}\n{}", record.instruction, record.input)).collect();
    let corpus = Corpus::new(&texts);
    let without_terms = (0..corpus.len()).filter(|&r| corpus.row(r).next().is_none()).count();
    if corpus.terms.is_empty() {
        bail!("nothing to cluster by: no word is in two of the {} records and in at most half of them", records.len());
    }
    let points = project::project(&corpus, DIMENSIONS, seed);
    let distinct = points.distinct();
    if range.from > distinct {
        bail!("{} clusters of records with {distinct} different vectors", range.from);
    }
    let asked = range.from == range.to;
    let last = range.to.min(distinct);
    // Each fit has a start at the one before, so the curve has few accidental dents.
    let first = if asked { last } else { 1 };
    let sample = kmeans::Sample::new(&points, SILHOUETTE_SAMPLE, seed);
    let (mut fits, mut tried) = (Vec::<Fit>::new(), Vec::new());
    for k in first..=last {
        let fit = kmeans::fit(&points, k, fits.last(), seed);
        tried.push(Tried { k, inertia: fit.inertia, silhouette: sample.silhouette(&fit.clusters, k), misfit: None });
        fits.push(fit);
    }
    let (k, reason, upto) = match asked {
        true => (last, "asked for".into(), None),
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

/// Numbers the clusters by size, and says what is in them.
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
        terms.push(corpus.telling(own, TERMS));
        let distance = |&record: &usize| squared_distance(points.row(record), fit.centroid(cluster, points.dims));
        let mut near: Vec<(f64, usize)> = own.iter().map(|record| (f64::from(distance(record)), *record)).collect();
        near.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let near = near.into_iter().take(NEAREST).map(|(square, record)| Near {
            record,
            distance: square.sqrt(),
            instruction: snippet(&records[record].instruction),
        });
        nearest.push(near.collect());
    }
    let (vocabulary, dimensions) = (corpus.terms.len(), points.dims);
    Clustering { k, clusters, sizes, terms, nearest, vocabulary, dimensions, ..Clustering::default() }
}

/// The beginning of a text, on one line.
fn snippet(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let short: String = line.chars().take(120).collect();
    if short.len() < line.len() { short + "…" } else { short }
}

impl Clustering {
    /// The lines to and from the chosen k, as points; none if it was asked for.
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

/// How often each category (rows) and cluster (columns) meet.
pub fn contingency(records: &[Record], clustering: &Clustering) -> BTreeMap<String, Vec<usize>> {
    let mut table = BTreeMap::new();
    for (record, &cluster) in records.iter().zip(&clustering.clusters) {
        if let Some(category) = &record.category {
            table.entry(category.clone()).or_insert_with(|| vec![0; clustering.k])[cluster] += 1;
        }
    }
    table
}

/// The adjusted Rand index of two partitions (Hubert and Arabie 1985), from how often their parts meet: 1 if they are the
/// same, 0 on average if they have nothing to do with each other. `None` if there is nothing to compare.
pub fn adjusted_rand(table: &[Vec<usize>]) -> Option<f64> {
    let pairs = |n: usize| n as f64 * n.saturating_sub(1) as f64 / 2.0;
    let columns = table.iter().map(Vec::len).max().unwrap_or(0);
    let rows: f64 = table.iter().map(|row| pairs(row.iter().sum())).sum();
    let columns: f64 = (0..columns).map(|c| pairs(table.iter().map(|row| row[c]).sum())).sum();
    let both: f64 = table.iter().flatten().map(|&n| pairs(n)).sum();
    let all = pairs(table.iter().flatten().sum());
    let expected = if all > 0.0 { rows * columns / all } else { return None };
    let most = (rows + columns) / 2.0;
    // Both have one part, or only parts of one: the same.
    Some(if most == expected { 1.0 } else { (both - expected) / (most - expected) })
}
