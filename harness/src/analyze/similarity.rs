//! Measures of similarity of two matrices, and of the number of directions in one. For M and N with rows in the same space:
//!
//! ```text
//! cosine          ⟨M, N⟩ / (‖M‖ ‖N‖), entry by entry, for matrices of the same shape
//! CKA             ‖M' N'ᵀ‖² / (‖M' M'ᵀ‖ ‖N' N'ᵀ‖), M' and N' without the mean of each row (linear, Kornblith et al., 2019)
//! subspace        ‖Q_M Q_Nᵀ‖² / min(rank): the mean cos² of the principal angles of the row spaces (Hu et al., 2021, φ)
//! angle           the mean principal angle, in degrees
//! chance          the mean of `subspace` for random subspaces: max(rank) / width
//! effective rank  exp(−Σ p ln p), p the singular values over their sum (Roy & Vetterli, 2007)
//! ```
//! Only the cosine depends on the basis of the low-rank space; the others compare the subspaces that the matrices read or write.

use super::matrices::Matrix;
use nalgebra::{DMatrix, SymmetricEigen};
use serde::Serialize;
use std::collections::BTreeMap;

/// Singular values below this share of the largest are rounding errors of f32.
const ROUNDING: f64 = 1e-6;

/// A matrix, and what comparisons need of it.
pub struct Prepared<'a> {
    matrix: &'a Matrix,
    /// The matrix without the mean of each row.
    centred: DMatrix<f64>,
    /// An orthonormal basis of the row space, as rows.
    basis: DMatrix<f64>,
    /// The effective rank; 0 for a matrix of zeros.
    pub effective_rank: f64,
}

/// Means over pairs.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Similarity {
    /// Number of pairs, without those with a matrix of zeros.
    pub pairs: usize,
    /// Mean cosine; `None` if no pair has the same shape.
    pub cosine: Option<f64>,
    /// Mean CKA.
    pub cka: f64,
    /// Mean similarity of the subspaces.
    pub subspace: f64,
    /// Mean principal angle in degrees.
    pub angle_degrees: f64,
    /// Mean of what `subspace` is for random subspaces.
    pub chance: f64,
}

impl<'a> Prepared<'a> {
    /// Prepares a matrix.
    pub fn new(matrix: &'a Matrix) -> Self {
        let values = matrix.values.iter().map(|&x| f64::from(x));
        let m = DMatrix::from_row_iterator(matrix.values.len() / matrix.width, matrix.width, values);
        let eigen = SymmetricEigen::new(&m * m.transpose());
        let singular: Vec<f64> = eigen.eigenvalues.iter().map(|&value| value.max(0.0).sqrt()).collect();
        let largest = singular.iter().fold(0.0, |a: f64, &b| a.max(b));
        let kept: Vec<usize> = (0..singular.len()).filter(|&i| singular[i] > ROUNDING * largest).collect();
        let sum: f64 = kept.iter().map(|&i| singular[i]).sum();
        let entropy: f64 = kept.iter().map(|&i| singular[i] / sum).map(|p| -p * p.ln()).sum();
        let rows: Vec<_> = kept.iter().map(|&i| eigen.eigenvectors.column(i).transpose() * &m / singular[i]).collect();
        let basis = if rows.is_empty() { DMatrix::zeros(0, matrix.width) } else { DMatrix::from_rows(&rows) };
        let mut centred = m;
        for mut row in centred.row_iter_mut() {
            let mean = row.mean();
            row.add_scalar_mut(-mean);
        }
        let effective_rank = if kept.is_empty() { 0.0 } else { entropy.exp() };
        Self { matrix, centred, basis, effective_rank }
    }
}

/// The cosine of two matrices of the same shape, neither of them zero.
pub fn cosine(a: &Matrix, b: &Matrix) -> f64 {
    let product = |a: &Matrix, b: &Matrix| -> f64 {
        a.values.iter().zip(&b.values).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
    };
    product(a, b) / (product(a, a) * product(b, b)).sqrt()
}

/// Sums over pairs, until [`Sums::mean`].
#[derive(Clone, Debug, Default)]
pub struct Sums {
    pairs: usize,
    of_one_shape: usize,
    cosine: f64,
    cka: f64,
    subspace: f64,
    angle: f64,
    chance: f64,
}

impl Sums {
    /// Adds a pair of matrices of the same width.
    pub fn add(&mut self, a: &Prepared<'_>, b: &Prepared<'_>) {
        if a.basis.nrows() == 0 || b.basis.nrows() == 0 {
            return;
        }
        self.pairs += 1;
        if a.matrix.values.len() == b.matrix.values.len() {
            self.of_one_shape += 1;
            self.cosine += cosine(a.matrix, b.matrix);
        }
        let squares = |m: &DMatrix<f64>| m.norm_squared();
        let own = |m: &DMatrix<f64>| (m * m.transpose()).norm();
        self.cka +=
            squares(&(&a.centred * b.centred.transpose())) / (own(&a.centred) * own(&b.centred)).max(f64::MIN_POSITIVE);
        let cosines = (&a.basis * b.basis.transpose()).singular_values();
        let angles = cosines.len() as f64;
        self.subspace += cosines.iter().map(|c| c * c).sum::<f64>() / angles;
        self.angle += cosines.iter().map(|c| c.clamp(-1.0, 1.0).acos().to_degrees()).sum::<f64>() / angles;
        self.chance += a.basis.nrows().max(b.basis.nrows()) as f64 / a.matrix.width as f64;
    }

    /// The means; `None` without pairs.
    pub fn mean(&self) -> Option<Similarity> {
        let n = self.pairs as f64;
        (self.pairs > 0).then(|| Similarity {
            pairs: self.pairs,
            cosine: (self.of_one_shape > 0).then(|| self.cosine / self.of_one_shape as f64),
            cka: self.cka / n,
            subspace: self.subspace / n,
            angle_degrees: self.angle / n,
            chance: self.chance / n,
        })
    }
}

/// Comparisons at the same layer and projection.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Compared {
    /// Over all pairs.
    pub all: Option<Similarity>,
    /// By layer; `None` for a layer without pairs.
    pub by_layer: Vec<Option<Similarity>>,
    /// By projection.
    pub by_projection: BTreeMap<String, Similarity>,
}

/// Compares all pairs at the same layer and projection that `include` accepts.
pub fn compare(matrices: &[Prepared<'_>], layers: usize, include: impl Fn(&Matrix, &Matrix) -> bool) -> Compared {
    let mut places: BTreeMap<_, Vec<&Prepared<'_>>> = BTreeMap::new();
    for prepared in matrices {
        places.entry((prepared.matrix.layer, prepared.matrix.projection)).or_default().push(prepared);
    }
    let (mut all, mut by_layer) = (Sums::default(), vec![Sums::default(); layers]);
    let mut by_projection: BTreeMap<&str, Sums> = BTreeMap::new();
    for ((layer, projection), here) in places {
        for (i, a) in here.iter().enumerate() {
            for b in here[i + 1..].iter().filter(|b| include(a.matrix, b.matrix)) {
                for sums in [&mut all, &mut by_layer[layer], by_projection.entry(projection.name()).or_default()] {
                    sums.add(a, b);
                }
            }
        }
    }
    let by_projection = by_projection.into_iter().filter_map(|(name, sums)| Some((name.to_string(), sums.mean()?)));
    Compared {
        all: all.mean(),
        by_layer: by_layer.iter().map(Sums::mean).collect(),
        by_projection: by_projection.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hydra_runtime::projection::Projection;

    fn matrix(width: usize, values: &[f32]) -> Matrix {
        Matrix { adapter: 0, layer: 0, projection: Projection::Q, head: None, width, values: values.to_vec() }
    }

    fn similarity(a: &[f32], b: &[f32], width: usize) -> Option<Similarity> {
        let (a, b) = (matrix(width, a), matrix(width, b));
        let mut sums = Sums::default();
        sums.add(&Prepared::new(&a), &Prepared::new(&b));
        sums.mean()
    }

    fn near(got: f64, want: f64) {
        assert!((got - want).abs() < 1e-6, "{got}, wanted {want}");
    }

    #[test]
    fn the_same_space_in_another_basis() {
        // Rows (1, 2, 0, 0), (0, 0, 3, -1), and the same two mixed.
        let same = similarity(&[1., 2., 0., 0., 0., 0., 3., -1.], &[1., 2., 3., -1., 1., 2., -3., 1.], 4).unwrap();
        near(same.subspace, 1.0);
        near(same.angle_degrees, 0.0);
        // 5 + 0 over both rows: ⟨M, N⟩ = 5 - 10; norms √15 and √30.
        near(same.cosine.unwrap(), -5.0 / (15f64.sqrt() * 30f64.sqrt()));
        near(same.chance, 0.5);
    }

    #[test]
    fn spaces_that_share_one_of_two_directions() {
        let half = similarity(&[1., 0., 0., 0., 0., 1., 0., 0.], &[1., 0., 0., 0., 0., 0., 1., 0.], 4).unwrap();
        near(half.subspace, 0.5);
        near(half.angle_degrees, 45.0);
        near(half.cosine.unwrap(), 0.5);
        // Another rank: no cosine, and the smaller space lies in the larger.
        let within = similarity(&[1., 0., 0., 0.], &[1., 0., 0., 0., 0., 0., 1., 0.], 4).unwrap();
        near(within.subspace, 1.0);
        assert_eq!(within.cosine, None);
    }

    #[test]
    fn cka_ignores_rotations_scales_and_row_means() {
        let rows = [1f32, 2., 0., -1., 0.5, 1., 3., -1.];
        let (sin, cos) = (0.6f32, 0.8f32);
        let turned: Vec<f32> = (0..4)
            .map(|i| 3.0 * (cos * rows[i] - sin * rows[4 + i]) + 7.0)
            .chain((0..4).map(|i| 3.0 * (sin * rows[i] + cos * rows[4 + i]) - 2.0))
            .collect();
        near(similarity(&rows, &turned, 4).unwrap().cka, 1.0);
        near(similarity(&[1., -1., 0., 0.], &[0., 0., 1., -1.], 4).unwrap().cka, 0.0);
    }

    #[test]
    fn effective_ranks() {
        let rank = |width, values: &[f32]| Prepared::new(&matrix(width, values)).effective_rank;
        near(rank(3, &[1., 0., 0., 0., 2., 0.]), (2f64 / 3.0 * 1.5f64.ln() + 3f64.ln() / 3.0).exp());
        near(rank(3, &[5., 0., 0., 0., 5., 0.]), 2.0);
        near(rank(3, &[1., 2., 3., 2., 4., 6.]), 1.0);
        near(rank(2, &[0.; 4]), 0.0);
        assert_eq!(similarity(&[0.; 4], &[1.; 4], 2), None);
    }
}
