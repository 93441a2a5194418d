//! A chart as data, and its marks as SVG in whatever rectangle they are wanted.
//!
//! `figure.rs` puts the marks on a page, where HTML has the axes; `file.rs` puts them into an SVG file.

use super::scale::{Axis, Kind, Scale};
use super::series::{Look, Series};
use super::text::number;
use serde_json::{Value, json};
use std::fmt::Write;

/// Colours there are; series beyond them begin again, dashed.
pub const COLOURS: usize = 8;
/// Named series over two axes.
pub struct Chart {
    /// Its heading.
    pub title: String,
    /// Across.
    pub x: Axis,
    /// Upwards.
    pub y: Axis,
    /// What is drawn.
    pub series: Vec<Series>,
    /// A vertical line at x, and what it says.
    pub rule: Option<(f64, String)>,
}

impl Chart {
    /// Whether there is nothing to draw.
    pub fn is_empty(&self) -> bool {
        self.series.iter().all(|series| series.points.is_empty())
    }

    /// Both axes' scales over all series.
    pub fn scales(&self) -> (Scale, Scale) {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let ends = self.series.iter().flat_map(|series| {
            let ends = |(i, p): (usize, &(f64, f64))| [p.1 - series.error(i), p.1 + series.error(i)];
            series.points.iter().enumerate().flat_map(ends)
        });
        if self.y.kind == Kind::Bare {
            // One unit of length for both, so that distances can be seen.
            let all = || points().flat_map(|p| [p.0, p.1]);
            return (Scale::new(self.x.kind, all()), Scale::new(self.y.kind, all()));
        }
        let x = points().map(|p| p.0).chain(self.rule.iter().map(|rule| rule.0));
        (Scale::new(self.x.kind, x), Scale::new(self.y.kind, ends))
    }

    /// Grid, rule and series, a group each with its number.
    pub fn marks(&self, area: &Area) -> String {
        let (x, y) = self.scales();
        let mut svg = String::new();
        for (value, _) in &y.ticks {
            let at = area.down(&y, *value);
            put(&mut svg, format_args!("<path class=\"grid\" {STILL} d=\"M{} {at}H{}\"/>", area.left, area.right));
        }
        if let Some((value, _)) = &self.rule {
            let at = area.across(&x, *value);
            put(&mut svg, format_args!("<path class=\"rule\" {STILL} d=\"M{at} {}V{}\"/>", area.top, area.bottom));
        }
        for (i, series) in self.series.iter().enumerate() {
            let (colour, again) = (i % COLOURS, if i >= COLOURS { " again" } else { "" });
            let cloud = if series.look == Look::Cloud { " cloud" } else { "" };
            // Error bars of several series at one x would hide each other.
            let aside = match self.x.kind {
                Kind::Doubling => 0.012 * (i as f64 - 0.5 * (self.series.len() - 1) as f64) * (area.right - area.left),
                _ => 0.0,
            };
            let place = |&(px, py): &(f64, f64)| (area.across(&x, px) + aside, area.down(&y, py));
            put(&mut svg, format_args!("<g class=\"s{colour}{again}{cloud}\" data-series=\"{i}\">"));
            svg += &series_marks(series, place);
            svg += "</g>\n";
        }
        svg
    }

    /// The chart in words, for those who can't see it.
    pub fn description(&self) -> String {
        let mut text = format!("{}. {} against {}.", self.title, self.y.title, self.x.title);
        if self.y.kind == Kind::Bare {
            let groups = self.series.iter().map(|series| format!("{} ({} points)", series.name, series.points.len()));
            return format!("{text} Groups: {}.", groups.collect::<Vec<_>>().join(", "));
        }
        for series in self.series.iter().filter(|series| series.look != Look::Fit) {
            let (Some(first), Some(last)) = (series.points.first(), series.points.last()) else { continue };
            let least = series.points.iter().map(|p| p.1).fold(f64::INFINITY, f64::min);
            let most = series.points.iter().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
            let (from, to) = (number(first.1), number(last.1));
            let (at, end) = (number(first.0), number(last.0));
            let range = format!("between {} and {}", number(least), number(most));
            let _ = write!(text, " {}: {from} at {at}, {to} at {end}, {range}.", series.name);
        }
        if let Some((_, says)) = &self.rule {
            let _ = write!(text, " Marked: {says}.");
        }
        text
    }

    /// Titles, units and values.
    pub fn json(&self) -> Value {
        json!({
            "title": self.title, "x": self.x.title, "y": self.y.title,
            "series": self.series.iter().map(Series::json).collect::<Vec<_>>(),
        })
    }
}

/// Lines keep their width when a page stretches the drawing.
pub const STILL: &str = "vector-effect=\"non-scaling-stroke\"";

/// The rectangle that the axes span, in an SVG's units.
pub struct Area {
    /// x of its left side.
    pub left: f64,
    /// x of its right side.
    pub right: f64,
    /// y of its upper side.
    pub top: f64,
    /// y of its lower side.
    pub bottom: f64,
}

impl Area {
    /// Where a value of the horizontal scale is.
    pub fn across(&self, scale: &Scale, value: f64) -> f64 {
        tenths(self.left + scale.place(value) * (self.right - self.left))
    }

    /// Where a value of the vertical scale is.
    pub fn down(&self, scale: &Scale, value: f64) -> f64 {
        tenths(self.bottom - scale.place(value) * (self.bottom - self.top))
    }
}

fn series_marks(series: &Series, place: impl Fn(&(f64, f64)) -> (f64, f64)) -> String {
    let mut svg = String::new();
    let mut line = |class: &str, points: &mut dyn Iterator<Item = (f64, f64)>| {
        let points: Vec<String> = points.map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        put(&mut svg, format_args!("<polyline class=\"{class}\" {STILL} points=\"{}\"/>", points.join(" ")));
    };
    let places = || series.points.iter().map(&place);
    match series.look {
        Look::Cloud => {}
        Look::Fit => line("line dash", &mut places()),
        Look::Noisy if !series.trend.is_empty() => {
            line("line raw", &mut places());
            line("line", &mut series.points.iter().zip(&series.trend).map(|(p, &mean)| place(&(p.0, mean))));
        }
        Look::Noisy | Look::Line | Look::Marks => line("line", &mut places()),
    }
    if matches!(series.look, Look::Marks | Look::Cloud) {
        // A line of no length with round ends is a circle, however the drawing is stretched.
        let dots: String = places().map(|(x, y)| format!("M{x:.1} {y:.1}h.01")).collect();
        put(&mut svg, format_args!("<path class=\"dot\" {STILL} d=\"{dots}\"/>"));
    }
    let bar = |(i, &(x, y)): (usize, &(f64, f64))| {
        let error = series.error(i);
        let ((x, top), (_, bottom)) = (place(&(x, y + error)), place(&(x, y - error)));
        (error > 0.0).then(|| format!("M{x:.1} {top:.1}V{bottom:.1}"))
    };
    let bars: String = series.points.iter().enumerate().filter_map(bar).collect();
    if !bars.is_empty() {
        put(&mut svg, format_args!("<path class=\"bar\" {STILL} d=\"{bars}\"/>"));
    }
    svg
}

fn tenths(value: f64) -> f64 {
    (10.0 * value).round() / 10.0
}

fn put(svg: &mut String, element: std::fmt::Arguments<'_>) {
    let _ = writeln!(svg, "{element}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_finite_is_not_drawn() {
        let series = Series::with_errors("x", &[(1.0, f64::NAN, None), (2.0, 5.0, Some(0.5))]);
        assert_eq!((series.points.len(), series.error(0)), (1, 0.5));
        let axis = || Axis::new("n", Kind::Linear);
        let chart = Chart { title: "t".into(), x: axis(), y: axis(), series: vec![series], rule: None };
        let (_, y) = chart.scales();
        assert!(y.low <= 4.5 && y.high >= 5.5);
        assert!(chart.description().contains("x: 5 at 2, 5 at 2"));
    }
}
