//! Which number of clusters: the elbow of the inertia, where two straight lines fit it best.
//!
//! For each k one line is fitted to the inertias of first ..= k and another to those of k ..= last, by least squares; the elbow
//! is the k of the smallest sum of squared errors of both. Then again with 2 · elbow in place of last, until the elbow stays
//! where it is or moves up: a long flat end would draw it to the right. (The L method and its refinement: Salvador and Chan,
//! ICTAI 2004.) All points have a say, so one uneven fit moves this elbow less than the point farthest below the chord.
//! Equal errors: the smaller k. A line needs two points, so the elbow is neither the first nor the last k. The mean
//! silhouette is told, not used: over texts it goes on rising with k.

use super::Tried;

/// Fewer points than these have one candidate between their ends at most.
const FEWEST: usize = 4;

/// The number of clusters, from `from` on, why it is that, and the last k that the lines were fitted to. Fills in the errors.
pub fn choose(tried: &mut [Tried], from: usize) -> (usize, String, Option<usize>) {
    let mut end = tried.len();
    let mut chosen = elbow(tried, from, end);
    while let Some(before) = chosen {
        // Where that k is, the first being 0: twice as many points as there are to the elbow.
        let place = tried.iter().take_while(|one| one.k < before).count() + 1;
        let shorter = (2 * place).max(FEWEST);
        match elbow(tried, from, shorter.min(end)) {
            Some(k) if shorter < end && k < before => (end, chosen) = (shorter, Some(k)),
            _ => break,
        }
    }
    let (first, last) = (tried.first().map_or(from, |one| one.k), tried.last().map_or(from, |one| one.k));
    let Some(k) = chosen else {
        return (from, format!("no curve to have an elbow: only {first} to {last} could be tried"), None);
    };
    for i in 0..tried.len() {
        tried[i].misfit = misfit(&tried[..end], i);
    }
    let upto = tried[end - 1].k;
    (
        k,
        format!("the elbow of the inertia: of all k, two lines that meet at {k} fit {first} to {upto} best"),
        Some(upto),
    )
}

/// The best k of the first `end` that were tried.
fn elbow(tried: &[Tried], from: usize, end: usize) -> Option<usize> {
    let errors = (0..end).filter_map(|i| Some((tried[i].k, misfit(&tried[..end], i)?)));
    let best = errors.filter(|(k, _)| *k >= from).reduce(|best, one| if one.1 < best.1 { one } else { best });
    best.map(|(k, _)| k)
}

/// Error of two lines that meet at `tried[at]`; `None` at the ends and beyond, or if all inertias are 0.
fn misfit(tried: &[Tried], at: usize) -> Option<f64> {
    let curve: Vec<(f64, f64)> = tried.iter().map(|one| (one.k as f64, one.inertia)).collect();
    let scale = curve.first()?.1 * (curve.len() as f64).sqrt();
    let inside = at > 0 && at + 1 < curve.len() && scale > 0.0;
    inside.then(|| (line(&curve[..=at]).squares + line(&curve[at..]).squares).sqrt() / scale)
}

/// A line through points.
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

/// The least squares line; `points` has different x, or one.
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
        // A long end that flattens slowly doesn't draw it away.
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
