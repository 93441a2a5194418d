//! The number of clusters: the elbow of the inertia, where two straight lines fit it best (the L method of Salvador and Chan,
//! ICTAI 2004, with its refinement).
//!
//! For each k, one line is fitted to the inertias of first ..= k and another to those of k ..= last, by least squares; the elbow
//! is the k with the smallest sum of squared errors. This is repeated with 2 · elbow in place of last until the elbow no longer
//! moves down, because a long flat tail would pull it to the right. All points count, so an uneven fit moves this elbow less
//! than it would move the point farthest below the chord. If errors are equal, the smaller k is taken. A line needs two points,
//! so the elbow is neither the first nor the last k. The mean silhouette is not used: for texts it keeps rising with k.

use serde::Serialize;

/// The clustering with one number of clusters.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Tried {
    /// Number of clusters.
    pub k: usize,
    /// Sum over the records of the squared distance to their cluster's centroid.
    pub inertia: f64,
    /// Mean silhouette (Rousseeuw 1987) of a sample; `None` for one cluster.
    pub silhouette: Option<f64>,
    /// Root mean square error of two lines that meet at k, relative to the first inertia. `None` at both ends of the fitted range.
    pub misfit: Option<f64>,
}

/// With fewer points than this there is at most one candidate between the ends.
const FEWEST: usize = 4;

/// The number of clusters, at least `from`; the reason for it; and the last k that the lines were fitted to. Fills in the errors.
pub fn choose(tried: &mut [Tried], from: usize) -> (usize, String, Option<usize>) {
    let mut end = tried.len();
    let mut chosen = elbow(tried, from, end);
    while let Some(before) = chosen {
        // Twice as many points as there are up to the elbow.
        let place = tried.iter().take_while(|one| one.k < before).count() + 1;
        let shorter = (2 * place).max(FEWEST);
        match elbow(tried, from, shorter.min(end)) {
            Some(k) if shorter < end && k < before => (end, chosen) = (shorter, Some(k)),
            _ => break,
        }
    }
    let (first, last) = (tried.first().map_or(from, |one| one.k), tried.last().map_or(from, |one| one.k));
    let Some(k) = chosen else {
        return (
            from,
            format!("too few numbers of clusters for an elbow: only {first} to {last} could be tried"),
            None,
        );
    };
    for i in 0..tried.len() {
        tried[i].misfit = misfit(&tried[..end], i);
    }
    let upto = tried[end - 1].k;
    (k, format!("the elbow of the inertia from {first} to {upto}, where two straight lines fit it best"), Some(upto))
}

/// The best k among the first `end` that were tried.
fn elbow(tried: &[Tried], from: usize, end: usize) -> Option<usize> {
    let errors = (0..end).filter_map(|i| Some((tried[i].k, misfit(&tried[..end], i)?)));
    let best = errors.filter(|(k, _)| *k >= from).reduce(|best, one| if one.1 < best.1 { one } else { best });
    best.map(|(k, _)| k)
}

/// Error of two lines that meet at `tried[at]`; `None` at both ends, or if all inertias are 0.
fn misfit(tried: &[Tried], at: usize) -> Option<f64> {
    let curve: Vec<(f64, f64)> = tried.iter().map(|one| (one.k as f64, one.inertia)).collect();
    let scale = curve.first()?.1 * (curve.len() as f64).sqrt();
    let inside = at > 0 && at + 1 < curve.len() && scale > 0.0;
    inside.then(|| (line(&curve[..=at]).squares + line(&curve[at..]).squares).sqrt() / scale)
}

/// A straight line.
pub struct Line {
    slope: f64,
    offset: f64,
    /// Sum of the squared errors.
    squares: f64,
}

impl Line {
    /// Its height.
    pub fn at(&self, x: f64) -> f64 {
        self.offset + self.slope * x
    }
}

/// The least-squares line through `points`: one point, or several with different x.
pub fn line(points: &[(f64, f64)]) -> Line {
    let n = points.len() as f64;
    let mean = |pick: fn(&(f64, f64)) -> f64| points.iter().map(pick).sum::<f64>() / n;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let sum = |f: &dyn Fn(&(f64, f64)) -> f64| points.iter().map(f).sum::<f64>();
    let (xx, xy) = (sum(&|p| (p.0 - x) * (p.0 - x)), sum(&|p| (p.0 - x) * (p.1 - y)));
    let slope = if xx > 0.0 { xy / xx } else { 0.0 };
    let offset = y - slope * x;
    let squares = sum(&|p| (p.1 - offset - slope * p.0).powi(2));
    Line { slope, offset, squares }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elbow(inertias: &[f64], from: usize) -> usize {
        let one = |(i, &inertia): (usize, &f64)| Tried { k: i + 1, inertia, silhouette: None, misfit: None };
        let mut tried: Vec<Tried> = inertias.iter().enumerate().map(one).collect();
        choose(&mut tried, from).0
    }

    #[test]
    fn the_elbow_is_where_the_lines_meet() {
        assert_eq!(elbow(&[100.0, 80.0, 60.0, 40.0, 38.0, 36.0, 34.0], 2), 4);
        assert_eq!(elbow(&[100.0, 50.0, 48.0, 46.5, 45.0], 2), 2);
        assert_eq!(elbow(&[100.0, 80.0, 60.5, 39.0, 38.0, 36.5, 34.0], 5), 5);
        // A long tail that flattens slowly doesn't pull it away.
        let long: Vec<f64> =
            (0..16).map(|i| if i < 3 { 100.0 - 20.0 * i as f64 } else { 30.0 + 30.0 / i as f64 }).collect();
        assert_eq!(elbow(&long, 2), 4);
        assert_eq!(elbow(&long[..8], 2), 4);
        // Nothing to choose from.
        assert_eq!(elbow(&[100.0, 80.0], 2), 2);
        assert_eq!(elbow(&[0.0, 0.0, 0.0, 0.0], 2), 2);
    }

    #[test]
    fn a_line_is_that_of_least_squares() {
        let line = line(&[(0.0, 1.0), (1.0, 2.0), (2.0, 6.0)]);
        assert_eq!((line.slope, line.offset, line.at(2.0)), (2.5, 0.5, 5.5));
        assert!((line.squares - 1.5).abs() < 1e-12);
    }
}
