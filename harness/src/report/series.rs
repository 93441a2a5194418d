//! Named points, as many as a drawing needs.

use serde_json::{Value, json};

/// More points of a series than these are thinned before they are drawn.
const MOST_POINTS: usize = 2000;
/// Series with more points than this get a running mean.
const FEW: usize = 40;

/// How a series is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// A line; thin, with its running mean over it, where it has many points.
    Noisy,
    /// A line.
    Line,
    /// A line with a mark at each point.
    Marks,
    /// A dashed line: a fit or another reading aid, no measurement.
    Fit,
    /// Marks alone.
    Cloud,
}

/// Named points.
pub struct Series {
    /// In the legend.
    pub name: String,
    /// How it is drawn.
    pub look: Look,
    /// Finite, x ascending unless it is a cloud.
    pub points: Vec<(f64, f64)>,
    /// The running mean at each point; empty where there is none.
    pub trend: Vec<f64>,
    /// Half an error bar's length at each point; empty where there are none.
    errors: Vec<Option<f64>>,
    /// What each point is; empty where its place says it.
    notes: Vec<String>,
}

impl Series {
    /// A series of the points that are finite.
    pub fn new(name: &str, look: Look, points: Vec<(f64, f64)>) -> Self {
        let finite = points.into_iter().filter(|(x, y)| x.is_finite() && y.is_finite());
        let points: Vec<_> = finite.collect();
        let trend = if look == Look::Noisy && points.len() > FEW { running_mean(&points) } else { Vec::new() };
        let kept = if look == Look::Cloud { (0..points.len()).collect() } else { thinned(&points) };
        let pick = |values: &[f64]| kept.iter().filter_map(|&i| values.get(i).copied()).collect();
        let (trend, points) = (pick(&trend), kept.iter().map(|&i| points[i]).collect());
        Self { name: name.to_string(), look, points, trend, errors: Vec::new(), notes: Vec::new() }
    }

    /// A line with marks and error bars over (x, y, half a bar's length).
    pub fn with_errors(name: &str, points: &[(f64, f64, Option<f64>)]) -> Self {
        let finite: Vec<_> = points.iter().filter(|(x, y, _)| x.is_finite() && y.is_finite()).collect();
        let places = finite.iter().map(|(x, y, _)| (*x, *y)).collect();
        Self { errors: finite.iter().map(|point| point.2).collect(), ..Self::new(name, Look::Marks, places) }
    }

    /// Marks alone, each with what it is.
    pub fn cloud(name: &str, points: Vec<(f64, f64)>, notes: Vec<String>) -> Self {
        Self { notes, ..Self::new(name, Look::Cloud, points) }
    }

    /// Half the length of a point's error bar; 0 where it has none.
    pub fn error(&self, i: usize) -> f64 {
        self.errors.get(i).copied().flatten().unwrap_or(0.0)
    }

    /// Name and values.
    pub fn json(&self) -> Value {
        let column = |values: Vec<f64>| values.into_iter().map(rounded).collect::<Vec<_>>();
        let mut series = json!({
            "name": self.name,
            "x": column(self.points.iter().map(|p| p.0).collect()),
            "y": column(self.points.iter().map(|p| p.1).collect()),
        });
        for (key, value) in [
            ("mean", (!self.trend.is_empty()).then(|| json!(column(self.trend.clone())))),
            ("error", (!self.errors.is_empty()).then(|| json!(self.errors))),
            ("note", (!self.notes.is_empty()).then(|| json!(self.notes))),
        ] {
            if let Some(value) = value {
                series[key] = value;
            }
        }
        series
    }
}

/// The mean of a twentieth of the points around each, and of fewer near the ends, so that it begins and ends with the data.
fn running_mean(points: &[(f64, f64)]) -> Vec<f64> {
    let half = points.len().div_ceil(40);
    let mean = |i: usize| {
        let half = half.min(i).min(points.len() - 1 - i);
        let part = &points[i - half..=i + half];
        part.iter().map(|p| p.1).sum::<f64>() / part.len() as f64
    };
    (0..points.len()).map(mean).collect()
}

/// Places of all points, or of the least and the largest of each of equal parts, and of both ends.
fn thinned(points: &[(f64, f64)]) -> Vec<usize> {
    if points.len() <= MOST_POINTS {
        return (0..points.len()).collect();
    }
    let parts = MOST_POINTS / 2;
    let by_value = |a: &usize, b: &usize| points[*a].1.total_cmp(&points[*b].1);
    let mut kept = vec![0, points.len() - 1];
    for part in 0..parts {
        let range = part * points.len() / parts..(part + 1) * points.len() / parts;
        kept.extend(range.clone().min_by(by_value));
        kept.extend(range.max_by(by_value));
    }
    kept.sort_unstable();
    kept.dedup();
    kept
}

/// To six significant digits.
fn rounded(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_series_keep_their_extremes_and_ends() {
        let mut points: Vec<(f64, f64)> = (0..50_000).map(|i| (f64::from(i), 1.0)).collect();
        (points[31_415].1, points[27_182].1) = (9.0, -9.0);
        let series = Series::new("x", Look::Noisy, points);
        assert!(series.points.len() <= MOST_POINTS + 2);
        for wanted in [(0.0, 1.0), (27_182.0, -9.0), (31_415.0, 9.0), (49_999.0, 1.0)] {
            assert!(series.points.contains(&wanted), "{wanted:?}");
        }
        assert_eq!(series.trend.len(), series.points.len());
        assert!((series.trend[5] - 1.0).abs() < 1e-12);
    }
}
