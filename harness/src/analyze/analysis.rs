//! The analysis: similarity, effective ranks and t-SNE of all A and all B.

use super::gates::Gates;
use super::matrices::{self, Kind, Matrix, head_name};
use super::similarity::{self, Compared, Prepared, compare};
use super::tsne;
use crate::output;
use crate::run::manifest;
use anyhow::Result;
use hydra_runtime::adapter::{Adapter, Method};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// `analysis.json`
#[derive(Serialize)]
pub struct Analysis {
    /// The adapters.
    pub adapters: Vec<About>,
    /// Whether all started from the same seed; `None` if a folder doesn't say.
    pub same_seed: Option<bool>,
    /// How t-SNE was asked for.
    pub tsne: tsne::Settings,
    /// All A.
    pub a: Side,
    /// All B.
    pub b: Side,
    /// One for each adapter with a router, if there are records to watch it on.
    pub router: Vec<Gates>,
}

/// An adapter.
#[derive(Serialize)]
pub struct About {
    /// Its name in tables and pictures.
    pub name: String,
    /// Its folder.
    pub path: PathBuf,
    /// hydra, lora or split.
    pub method: &'static str,
    /// How its heads are mixed.
    pub gate: &'static str,
    /// Rank of each head.
    pub rank: usize,
    /// Number of heads.
    pub heads: usize,
    /// The seed that it started from, if its folder says.
    pub seed: Option<u64>,
    /// Mean effective rank of its A.
    pub effective_rank_a: f64,
    /// Mean effective rank of its B.
    pub effective_rank_b: f64,
    /// Mean cosine of an A to itself before training, if the folder says the seed. Where it is near 1, adapters of one seed are
    /// similar because they started alike.
    pub cosine_of_a_to_its_start: Option<f64>,
}

/// All A, or all B.
#[derive(Serialize)]
pub struct Side {
    /// Between different adapters.
    pub across_adapters: Compared,
    /// Between the heads of one adapter.
    pub across_heads: Compared,
    /// The perplexity of the t-SNE picture: what was asked for, or as much as so many points allow; `None` without a picture.
    pub perplexity: Option<f64>,
    /// A point for each matrix.
    pub points: Vec<Point>,
}

/// A matrix.
#[derive(Serialize)]
pub struct Point {
    /// Index of the adapter.
    pub adapter: usize,
    /// Index of the layer.
    pub layer: usize,
    /// The adapted projection.
    pub projection: &'static str,
    /// The head; `None` if the matrix is shared by all.
    pub head: Option<usize>,
    /// The head's name.
    pub name: String,
    /// Its effective rank.
    pub effective_rank: f64,
    /// Its place in the t-SNE picture; `None` if there are too few matrices for one.
    pub place: Option<(f64, f64)>,
}

impl Analysis {
    /// Compares the adapters from the folders `paths`; `router` is what their routers do.
    pub fn new(
        adapters: &[Adapter],
        names: &[String],
        paths: &[PathBuf],
        settings: tsne::Settings,
        router: Vec<Gates>,
    ) -> Result<Self> {
        let layers = adapters[0].layers.len();
        let side_of = |kind: Kind| {
            let matrices = matrices::all(adapters, kind);
            output::say(format_args!("{kind:?}: {} matrices", matrices.len()));
            side(adapters, &matrices, layers, &settings)
        };
        let (a, b) = (side_of(Kind::A)?, side_of(Kind::B)?);
        let seeds: Vec<Option<u64>> = paths.iter().map(|path| seed_of(path)).collect();
        let mut about = Vec::new();
        for (i, adapter) in adapters.iter().enumerate() {
            about.push(About {
                name: names[i].clone(),
                path: paths[i].clone(),
                method: adapter.config.method.name(),
                gate: adapter.config.gate.name(),
                rank: adapter.config.rank,
                heads: adapter.config.lora_heads,
                seed: seeds[i],
                effective_rank_a: a.effective_rank(i),
                effective_rank_b: b.effective_rank(i),
                cosine_of_a_to_its_start: seeds[i].map(|seed| cosine_to_start(adapter, seed)).transpose()?.flatten(),
            });
        }
        let all: Option<Vec<u64>> = seeds.into_iter().collect();
        let same_seed = all.map(|all| all.windows(2).all(|pair| pair[0] == pair[1]));
        Ok(Self { adapters: about, same_seed, tsne: settings, a, b, router })
    }

    /// Seeds that several adapters started from, and the names of these.
    pub fn shared_seeds(&self) -> BTreeMap<u64, Vec<&str>> {
        let mut seeds: BTreeMap<u64, Vec<&str>> = BTreeMap::new();
        for about in &self.adapters {
            if let Some(seed) = about.seed {
                seeds.entry(seed).or_default().push(&about.name);
            }
        }
        seeds.retain(|_, names| names.len() > 1);
        seeds
    }
}

impl Side {
    /// Mean over an adapter's matrices.
    fn effective_rank(&self, adapter: usize) -> f64 {
        let own: Vec<f64> = self.points.iter().filter(|p| p.adapter == adapter).map(|p| p.effective_rank).collect();
        own.iter().sum::<f64>() / own.len() as f64
    }
}

fn side(adapters: &[Adapter], matrices: &[Matrix], layers: usize, settings: &tsne::Settings) -> Result<Side> {
    let prepared: Vec<Prepared<'_>> = matrices.iter().map(Prepared::new).collect();
    let across_adapters = compare(&prepared, layers, |a, b| a.adapter != b.adapter);
    let across_heads = compare(&prepared, layers, |a, b| a.adapter == b.adapter);
    let places = tsne::places(matrices, settings)?;
    let point = |(i, matrix): (usize, &Matrix)| Point {
        adapter: matrix.adapter,
        layer: matrix.layer,
        projection: matrix.projection.name(),
        head: matrix.head,
        name: matrix.head.map_or("shared".to_string(), |head| head_name(&adapters[matrix.adapter], head)),
        effective_rank: prepared[i].effective_rank,
        place: places.as_ref().map(|places| places[i]),
    };
    let perplexity = places.as_ref().map(|_| tsne::perplexity(settings, matrices.len()));
    Ok(Side { across_adapters, across_heads, perplexity, points: matrices.iter().enumerate().map(point).collect() })
}

/// The seed of a run, as the `run.json` beside the adapter has it.
fn seed_of(path: &Path) -> Option<u64> {
    let file = Some(path.join(manifest::FILE)).filter(|file| file.is_file())?;
    let text = std::fs::read_to_string(file).ok()?;
    let run: serde_json::Value = serde_json::from_str(&text).ok()?;
    // An adapter that started from another has no seed of its own.
    run["options"]["init-adapter"].is_null().then(|| run["options"]["seed"].as_u64())?
}

/// The mean over the matrices that are not zero.
fn cosine_to_start(adapter: &Adapter, seed: u64) -> Result<Option<f64>> {
    let [now, start] = [adapter.clone(), adapter.start(seed)?].map(|adapter| matrices::all(&[adapter], Kind::A));
    let cosines = now.iter().zip(&start).map(|(now, start)| similarity::cosine(now, start));
    let cosines: Vec<f64> = cosines.filter(|cosine| cosine.is_finite()).collect();
    Ok((!cosines.is_empty()).then(|| cosines.iter().sum::<f64>() / cosines.len() as f64))
}

/// Whether each head has its own A.
pub fn split(method: &str) -> bool {
    method == Method::Split.name()
}
