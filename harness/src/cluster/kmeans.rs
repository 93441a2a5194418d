//! Lloyd's k-means with k-means++ starts (Arthur and Vassilvitskii 2007), and the mean silhouette.
//!
//! Of several starts, the one with the smallest inertia is kept. If the best clustering into k − 1 is known, every other start
//! is its centroids and one more, so that the inertia has few accidental dents. Ties go to the lower index and sums are f64 in
//! the points' order, so results are the same for any number of threads.

use crate::data::order::Order;
use hydra_runtime::hydra_kernels::random::SplitMix64;
use rayon::prelude::*;

/// Rows of `dims` values.
pub struct Points {
    pub dims: usize,
    pub values: Vec<f32>,
}

impl Points {
    pub fn len(&self) -> usize {
        self.values.len() / self.dims
    }

    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.dims..][..self.dims]
    }

    fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.values.chunks_exact(self.dims)
    }

    /// The number of different rows.
    pub fn distinct(&self) -> usize {
        let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        self.rows().map(bits).collect::<std::collections::HashSet<_>>().len()
    }
}

/// A clustering.
pub struct Fit {
    /// [k, dims].
    centroids: Vec<f32>,
    /// Each point's.
    pub clusters: Vec<u32>,
    /// Sum of the squared distances.
    pub inertia: f64,
}

impl Fit {
    pub fn centroid(&self, cluster: usize, dims: usize) -> &[f32] {
        &self.centroids[cluster * dims..][..dims]
    }
}

/// Starts for each k; every other one continues from the clustering into k − 1.
const STARTS: u64 = 16;
/// The most rounds of Lloyd's iteration, which ends when no point changes its cluster.
const ROUNDS: usize = 200;

/// The best clustering into `k`; `before` is that into k − 1.
pub fn fit(points: &Points, k: usize, before: Option<&Fit>, seed: u64) -> Fit {
    let run = |start: u64| {
        let mut random = SplitMix64::new(seed ^ ((k as u64) << 32) ^ start);
        let given = before.filter(|_| start % 2 == 1).map_or(Vec::new(), |before| before.centroids.clone());
        lloyd(points, plus_plus(points, given, k, &mut random))
    };
    let fits: Vec<Fit> = (0..STARTS).into_par_iter().map(run).collect();
    let best = fits.into_iter().reduce(|best, fit| if fit.inertia < best.inertia { fit } else { best });
    best.expect("at least one start")
}

/// Adds centroids until there are `k`: points, drawn with probability proportional to their squared distance from the nearest
/// centroid so far.
fn plus_plus(points: &Points, mut centroids: Vec<f32>, k: usize, random: &mut SplitMix64) -> Vec<f32> {
    let (dims, n) = (points.dims, points.len());
    let mut nearest = vec![f32::INFINITY; n];
    let mut known = 0;
    loop {
        for centroid in centroids[known * dims..].chunks_exact(dims) {
            let rows = points.rows().zip(&mut nearest);
            rows.for_each(|(row, nearest)| *nearest = nearest.min(squared_distance(row, centroid)));
        }
        known = centroids.len() / dims;
        if known == k {
            return centroids;
        }
        let weight = |&distance: &f32| if known == 0 { 1.0 } else { f64::from(distance) };
        let mut left = random.uniform() * nearest.iter().map(weight).sum::<f64>();
        let chosen = nearest.iter().position(|distance| {
            left -= weight(distance);
            left < 0.0
        });
        centroids.extend_from_slice(points.row(chosen.unwrap_or(n - 1)));
    }
}

fn lloyd(points: &Points, mut centroids: Vec<f32>) -> Fit {
    let (dims, n) = (points.dims, points.len());
    let k = centroids.len() / dims;
    let (mut clusters, mut distances) = (vec![u32::MAX; n], vec![0f32; n]);
    for _ in 0..ROUNDS {
        let mut changed = false;
        for (i, row) in points.rows().enumerate() {
            let mut best = (0, f32::INFINITY);
            for (cluster, centroid) in centroids.chunks_exact(dims).enumerate() {
                let distance = squared_distance(row, centroid);
                if distance < best.1 {
                    best = (cluster as u32, distance);
                }
            }
            changed |= clusters[i] != best.0;
            (clusters[i], distances[i]) = best;
        }
        if !changed {
            break;
        }
        let (mut sums, mut counts) = (vec![0f64; k * dims], vec![0usize; k]);
        for (row, &cluster) in points.rows().zip(&clusters) {
            counts[cluster as usize] += 1;
            let sum = &mut sums[cluster as usize * dims..][..dims];
            sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
        }
        for (cluster, &count) in counts.iter().enumerate() {
            let centroid = &mut centroids[cluster * dims..][..dims];
            if count > 0 {
                let sum = &sums[cluster * dims..][..dims];
                centroid.iter_mut().zip(sum).for_each(|(x, sum)| *x = (sum / count as f64) as f32);
            } else {
                // An empty cluster restarts at the point with the largest distance.
                let worst = (0..n).fold(0, |worst, i| if distances[i] > distances[worst] { i } else { worst });
                centroid.copy_from_slice(points.row(worst));
                distances[worst] = 0.0;
            }
        }
    }
    let inertia = distances.iter().map(|&d| f64::from(d)).sum();
    Fit { centroids, clusters, inertia }
}

/// |a − b|².
pub fn squared_distance(a: &[f32], b: &[f32]) -> f32 {
    // Eight partial sums, which the compiler vectorizes.
    let (mut sums, a_parts, b_parts) = ([0f32; 8], a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a_parts.remainder().iter().zip(b_parts.remainder()).map(|(a, b)| (a - b) * (a - b)).sum();
    for (a, b) in a_parts.zip(b_parts) {
        for i in 0..8 {
            sums[i] += (a[i] - b[i]) * (a[i] - b[i]);
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// A sample of points, and all distances between them.
pub struct Sample {
    points: Vec<usize>,
    distances: Vec<f32>,
}

impl Sample {
    /// At most `most` points, drawn without replacement.
    pub fn new(points: &Points, most: usize, seed: u64) -> Self {
        let all = Order::new(points.len(), Some(seed)).take(0, most.min(points.len()));
        let row = |&i: &usize| all.iter().map(move |&j| squared_distance(points.row(i), points.row(j)).sqrt());
        let distances = all.par_iter().flat_map_iter(row).collect();
        Self { points: all, distances }
    }

    pub fn len(&self) -> usize {
        self.points.len()
    }

    /// The mean over the sample of (b − a) / max(a, b), where a is the mean distance to the other points of the same cluster and b
    /// that to the points of the nearest other cluster; 0 for a point that is alone in its cluster.
    pub fn silhouette(&self, clusters: &[u32], k: usize) -> Option<f64> {
        let own: Vec<usize> = self.points.iter().map(|&point| clusters[point] as usize).collect();
        let mut counts = vec![0usize; k];
        own.iter().for_each(|&cluster| counts[cluster] += 1);
        if counts.iter().filter(|&&count| count > 0).count() < 2 {
            return None;
        }
        let of = |(i, row): (usize, &[f32])| {
            let mut sums = vec![0f64; k];
            row.iter().zip(&own).for_each(|(&distance, &cluster)| sums[cluster] += f64::from(distance));
            if counts[own[i]] == 1 {
                return 0.0;
            }
            let a = sums[own[i]] / (counts[own[i]] - 1) as f64;
            let others = (0..k).filter(|&c| c != own[i] && counts[c] > 0).map(|c| sums[c] / counts[c] as f64);
            let b = others.fold(f64::INFINITY, f64::min);
            if a.max(b) > 0.0 { (b - a) / a.max(b) } else { 0.0 }
        };
        let rows: Vec<f64> = self.distances.par_chunks_exact(self.len()).enumerate().map(of).collect();
        Some(rows.iter().sum::<f64>() / self.len() as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three heaps on a line.
    fn heaps() -> Points {
        let value = |i: usize| [0.0, 10.0, 14.0][i % 3] + (i / 3) as f32 * 0.1;
        Points { dims: 1, values: (0..30).map(value).collect() }
    }

    #[test]
    fn heaps_are_found_and_the_inertia_is_theirs() {
        let points = heaps();
        let fit = fit(&points, 3, None, 7);
        for i in 3..30 {
            assert_eq!(fit.clusters[i], fit.clusters[i % 3]);
        }
        // Each heap: 0.01 · Σ (i − 4.5)² = 0.825.
        assert!((fit.inertia - 3.0 * 0.825).abs() < 1e-4, "{}", fit.inertia);
        let one = super::fit(&points, 1, None, 7);
        let mean = points.values.iter().sum::<f32>() / 30.0;
        let want: f32 = points.values.iter().map(|x| (x - mean) * (x - mean)).sum();
        assert!((one.inertia - f64::from(want)).abs() < 1e-2);
    }

    #[test]
    fn more_clusters_never_cost_more() {
        let points = heaps();
        let mut before: Option<Fit> = None;
        for k in 1..=30 {
            let now = fit(&points, k, before.as_ref(), 1);
            assert!(before.is_none_or(|before| now.inertia <= before.inertia + 1e-6), "{k}");
            before = Some(now);
        }
        assert!(before.unwrap().inertia < 1e-9);
    }

    #[test]
    fn silhouettes_are_those_of_the_definition() {
        let points = Points { dims: 1, values: vec![0.0, 1.0, 5.0, 9.0] };
        let sample = Sample::new(&points, 9, 1);
        assert_eq!(sample.silhouette(&[0; 4], 1), None);
        // 0: a 1, b 7; 1: a 1, b 6; 5: a 4, b 4.5; 9: a 4, b 8.5.
        let want = (6.0 / 7.0 + 5.0 / 6.0 + 0.5 / 4.5 + 4.5 / 8.5) / 4.0;
        assert!((sample.silhouette(&[0, 0, 1, 1], 2).unwrap() - want).abs() < 1e-6);
        assert!((sample.silhouette(&[0, 0, 0, 2], 3).unwrap() - ((3.0 / 9.0) * 0.0 + alone())).abs() < 1e-6);
    }

    /// 0 1 5 | 9: a 3, b 9; a 2.5, b 8; a 4.5, b 4; alone 0.
    fn alone() -> f64 {
        (6.0 / 9.0 + 5.5 / 8.0 - 0.5 / 4.5) / 4.0
    }
}
