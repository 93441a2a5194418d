//! Sparse rows projected onto their strongest directions: latent semantic analysis by orthogonal iteration.
//!
//! Q [terms, d] starts random and is replaced several times by an orthonormal basis of Aᵀ A Q. Then the distances of A Q are
//! those of the best approximation of A of rank d. (Distances don't depend on which basis of that space Q is, so no singular
//! vectors are needed.) Rows of A Q are scaled to unit length.

use super::kmeans::Points;
use super::tfidf::Corpus;
use hydra_runtime::hydra_kernels::random::SplitMix64;

/// Rounds of the iteration; each shrinks the remains of weaker directions by (σ_{d+1} / σ_d)².
const ROUNDS: usize = 10;

/// Projects `corpus` onto at most `most` directions.
pub fn project(corpus: &Corpus, most: usize, seed: u64) -> Points {
    let terms = corpus.terms.len();
    let d = most.min(terms).min(corpus.len());
    let mut random = SplitMix64::new(seed);
    let mut q: Vec<f64> = (0..terms * d).map(|_| 2.0 * random.uniform() - 1.0).collect();
    orthonormalise(&mut q, d);
    for _ in 0..ROUNDS {
        let y = times(corpus, &q, d);
        q.fill(0.0);
        for (row, y) in y.chunks_exact(d).enumerate() {
            for (column, weight) in corpus.row(row) {
                q[column * d..][..d].iter_mut().zip(y).for_each(|(q, y)| *q += weight * y);
            }
        }
        orthonormalise(&mut q, d);
    }
    let mut rows = times(corpus, &q, d);
    for row in rows.chunks_exact_mut(d) {
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        // A row without a term has no direction and stays zero.
        if norm > 1e-9 {
            row.iter_mut().for_each(|x| *x /= norm);
        }
    }
    Points { dims: d, values: rows.into_iter().map(|x| x as f32).collect() }
}

/// A Q, [rows, d].
fn times(corpus: &Corpus, q: &[f64], d: usize) -> Vec<f64> {
    let mut y = vec![0.0; corpus.len() * d];
    for (row, y) in y.chunks_exact_mut(d).enumerate() {
        for (column, weight) in corpus.row(row) {
            y.iter_mut().zip(&q[column * d..][..d]).for_each(|(y, q)| *y += weight * q);
        }
    }
    y
}

/// Replaces Q by Q L⁻ᵀ, where L Lᵀ = Qᵀ Q; twice, as the first time leaves rounding errors. Columns that depend on others
/// become zero.
fn orthonormalise(q: &mut [f64], d: usize) {
    for _ in 0..2 {
        let mut l = vec![0.0; d * d];
        for row in q.chunks_exact(d) {
            for i in 0..d {
                l[i * d..][..=i].iter_mut().zip(row).for_each(|(l, x)| *l += row[i] * x);
            }
        }
        let largest = (0..d).map(|i| l[i * d + i]).fold(0.0, f64::max);
        for i in 0..d {
            for j in 0..=i {
                let sum: f64 = (0..j).map(|k| l[i * d + k] * l[j * d + k]).sum();
                let rest = l[i * d + j] - sum;
                l[i * d + j] = match (i == j, l[j * d + j]) {
                    (true, _) => {
                        if rest > 1e-12 * largest {
                            rest.sqrt()
                        } else {
                            0.0
                        }
                    }
                    (false, 0.0) => 0.0,
                    (false, pivot) => rest / pivot,
                };
            }
        }
        for row in q.chunks_exact_mut(d) {
            for i in 0..d {
                let sum: f64 = (0..i).map(|k| l[i * d + k] * row[k]).sum();
                row[i] = if l[i * d + i] > 0.0 { (row[i] - sum) / l[i * d + i] } else { 0.0 };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_become_orthonormal_and_dependent_ones_zero() {
        let mut q = vec![0.0; 50 * 4];
        for (row, q) in q.chunks_exact_mut(4).enumerate() {
            let x = row as f64;
            q.copy_from_slice(&[x, 1e-3 * x * x, 2.0 * x, (x / 3.0).sin()]);
        }
        orthonormalise(&mut q, 4);
        for i in 0..4 {
            for j in 0..4 {
                let dot: f64 = q.chunks_exact(4).map(|row| row[i] * row[j]).sum();
                let want = f64::from(i == j && i != 2);
                assert!((dot - want).abs() < 1e-9, "{i} {j} {dot}");
            }
        }
    }

    #[test]
    fn as_many_dimensions_as_terms_keep_all_distances() {
        let words = ["aa", "bb", "cc", "dd", "ee"];
        let text = |i: usize| (0..5).filter(|w| (i >> w) & 1 == 1).map(|w| words[w]).collect::<Vec<_>>().join(" ");
        let texts: Vec<String> = (1..32).map(text).chain((0..9).map(|_| String::new())).collect();
        let corpus = Corpus::new(&texts);
        assert_eq!(corpus.terms.len(), 5);
        let points = project(&corpus, 64, 3);
        for (a, b) in [(0, 1), (3, 17), (9, 30), (2, 28)] {
            let dense = |row| {
                corpus.row(row).fold([0.0; 5], |mut x, (c, w)| {
                    x[c] = w;
                    x
                })
            };
            let want: f64 = dense(a).iter().zip(dense(b)).map(|(a, b)| (a - b) * (a - b)).sum();
            let got = super::super::kmeans::squared_distance(points.row(a), points.row(b));
            assert!((f64::from(got) - want).abs() < 1e-5, "{got} {want}");
        }
    }
}
