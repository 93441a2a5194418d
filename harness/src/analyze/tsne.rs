//! t-SNE (van der Maaten & Hinton, 2008) in two dimensions; the same seed gives the same picture on any number of cores.

use super::matrices::Matrix;
use anyhow::{Context, Result, bail};
use bhtsne::Neighbor;
use hydra_runtime::hydra_kernels::random::SplitMix64;
use rayon::prelude::*;

/// With more points than this, forces are approximated (Barnes-Hut, θ = ½).
const EXACT: usize = 1200;
/// Steps of gradient descent.
const EPOCHS: usize = 1000;

/// Settings.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Settings {
    /// Seed of the points' first places.
    pub seed: u64,
    /// Perplexity: roughly the number of neighbours that count.
    pub perplexity: f64,
}

/// The perplexity for `points` points: bhtsne needs at least three times as many as neighbours.
pub fn perplexity(settings: &Settings, points: usize) -> f64 {
    settings.perplexity.min(points.saturating_sub(1) as f64 / 3.0).max(1.0)
}

/// A place for each matrix; `None` if there are too few. Distances are Euclidean between the entries of the matrices; smaller
/// matrices are padded with zeros.
pub fn places(matrices: &[Matrix], settings: &Settings) -> Result<Option<Vec<(f64, f64)>>> {
    embed(matrices, settings, matrices.len() <= EXACT)
}

fn embed(matrices: &[Matrix], settings: &Settings, exact: bool) -> Result<Option<Vec<(f64, f64)>>> {
    let n = matrices.len();
    if n < 5 {
        return Ok(None);
    }
    let perplexity = perplexity(settings, n);
    let mut random = SplitMix64::new(settings.seed);
    let mut start = Vec::with_capacity(2 * n);
    for _ in 0..n {
        // Normal numbers (Box and Muller) with the usual standard deviation of 1e-4.
        let radius = (-2.0 * (1.0 - random.uniform()).ln()).sqrt();
        let angle = std::f64::consts::TAU * random.uniform();
        start.extend([1e-4 * radius * angle.cos(), 1e-4 * radius * angle.sin()]);
    }
    let entries: Vec<&[f32]> = matrices.iter().map(|matrix| matrix.values.as_slice()).collect();
    // The crate's own search begins at random; ours is exact, and has ties in the order of the points.
    let neighbors = if exact { Vec::new() } else { neighbors(&entries, (3.0 * perplexity) as usize) };
    // Sums over several threads depend on how these share the work; one thread adds in one order.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().context("can't start a thread")?;
    let embedding = pool.install(|| {
        let mut tsne: bhtsne::tSNE<f64, &[f32]> = bhtsne::tSNE::new(&entries);
        tsne.perplexity(perplexity).epochs(EPOCHS).initial_embedding(start);
        if exact {
            tsne.exact(|a, b| distance(a, b)).embedding()
        } else {
            tsne.barnes_hut_with_neighbors(0.5, &neighbors).embedding()
        }
    });
    if embedding.iter().any(|x| !x.is_finite()) {
        bail!("t-SNE came to values that are not finite");
    }
    Ok(Some(embedding.chunks_exact(2).map(|xy| (xy[0], xy[1])).collect()))
}

/// The `k` nearest neighbours of each point.
fn neighbors(entries: &[&[f32]], k: usize) -> Vec<Vec<Neighbor<f64>>> {
    let of = |i: usize| {
        let others = (0..entries.len()).filter(|&j| j != i);
        let mut others: Vec<_> =
            others.map(|j| Neighbor { index: j, distance: distance(entries[i], entries[j]) }).collect();
        others.sort_by(|a, b| a.distance.total_cmp(&b.distance).then(a.index.cmp(&b.index)));
        others.truncate(k);
        others
    };
    (0..entries.len()).into_par_iter().map(of).collect()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let (short, long) = if a.len() < b.len() { (a, b) } else { (b, a) };
    let (both, rest) = long.split_at(short.len());
    let square = |x: f32| x * x;
    // Sums of a few hundred in f32, which the processor adds in parallel; those in f64.
    let differences = short.chunks(256).zip(both.chunks(256));
    let differences: f64 =
        differences.map(|(a, b)| f64::from(a.iter().zip(b).map(|(a, b)| square(a - b)).sum::<f32>())).sum();
    let rest: f64 = rest.chunks(256).map(|part| f64::from(part.iter().map(|&x| square(x)).sum::<f32>())).sum();
    (differences + rest).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use hydra_runtime::projection::Projection;

    #[test]
    fn two_clouds_part_and_a_seed_repeats() {
        let mut random = SplitMix64::new(1);
        let matrices: Vec<Matrix> = (0..60)
            .map(|i| {
                let centre = if i % 2 == 0 { 0.0 } else { 5.0 };
                let values = (0..8).map(|_| centre + random.uniform() as f32).collect();
                Matrix { adapter: 0, layer: i, projection: Projection::Q, head: None, width: 4, values }
            })
            .collect();
        let settings = Settings { seed: 3, perplexity: 10.0 };
        for exact in [true, false] {
            let embed = |settings: &Settings| embed(&matrices, settings, exact).unwrap().unwrap();
            let places = embed(&settings);
            let nearest = |i: usize| {
                let distance = |j: &usize| (places[*j].0 - places[i].0).hypot(places[*j].1 - places[i].1);
                (0..60).filter(|&j| j != i).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap()
            };
            assert!((0..60).all(|i| nearest(i) % 2 == i % 2), "exact: {exact}");
            assert_eq!(places, embed(&settings));
            assert_ne!(places, embed(&Settings { seed: 4, ..settings }));
        }
        assert!(places(&matrices[..3], &settings).unwrap().is_none());
    }

    #[test]
    fn distances_count_what_one_side_lacks() {
        assert_eq!(distance(&[1.0, 2.0], &[1.0, 5.0, 4.0]), 5.0);
    }
}
