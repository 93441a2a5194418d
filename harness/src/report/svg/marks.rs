//! Means with their error bars, one below the other; and clouds of points.

use super::{Frame, PLOT, WIDTH, legend, legend_height, mark_fill, number, open, put, range, ticks};
use crate::report::escape;

/// A mean and what is around it.
pub struct Dot {
    /// What it is of.
    pub name: String,
    /// The mean; nothing is drawn of one that is not finite.
    pub mean: f64,
    /// The bar's ends.
    pub ends: Option<(f64, f64)>,
}

const ROW: f64 = 40.0;

/// A row a mean: its name, and below it the mark and the bar. `origin` is drawn as a line.
pub fn dots(dots: &[Dot], origin: Option<f64>) -> String {
    let values =
        dots.iter().flat_map(|dot| [dot.mean, dot.ends.map_or(dot.mean, |e| e.0), dot.ends.map_or(dot.mean, |e| e.1)]);
    let ticks = ticks(range(values.chain(origin).filter(|v| v.is_finite())));
    let (first, last) = (ticks[0], ticks[ticks.len() - 1]);
    let (left, right) = (24.0, WIDTH - 24.0);
    let place = |v: f64| left + (v - first) / (last - first) * (right - left);
    let bottom = dots.len() as f64 * ROW + 8.0;
    let mut svg = open(WIDTH, bottom + 22.0);
    for tick in &ticks {
        let (x, y) = (place(*tick), bottom + 16.0);
        put(&mut svg, format_args!("<line class=\"axis\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"4\" y2=\"{bottom}\"/>"));
        put(&mut svg, format_args!("<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{}</text>", number(*tick)));
    }
    if let Some(origin) = origin {
        let x = place(origin);
        put(&mut svg, format_args!("<line class=\"origin\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"4\" y2=\"{bottom}\"/>"));
    }
    for (i, dot) in dots.iter().enumerate() {
        let (top, name) = (4.0 + i as f64 * ROW, escape(&dot.name));
        put(&mut svg, format_args!("<text x=\"2\" y=\"{}\">{name}</text>", top + 14.0));
        if !dot.mean.is_finite() {
            continue;
        }
        let (x, y) = (place(dot.mean), top + 27.0);
        let mut text = format!("{name}: {:.4}", dot.mean);
        if let Some((low, high)) = dot.ends {
            let (a, b) = (place(low), place(high));
            put(&mut svg, format_args!("<path class=\"line\" stroke=\"var(--c0)\" d=\"M{a:.1} {y}H{b:.1}\"/>"));
            text += &format!(" [{low:.4}, {high:.4}]");
        }
        put(
            &mut svg,
            format_args!("<circle fill=\"var(--c0)\" cx=\"{x:.1}\" cy=\"{y}\" r=\"4\"><title>{text}</title></circle>"),
        );
    }
    svg + "</svg>\n"
}

/// Points of one kind.
pub struct Group {
    /// In the legend.
    pub name: String,
    /// x and y.
    pub points: Vec<(f64, f64)>,
}

/// All points in one square field, a colour a group.
pub fn scatter(groups: &[Group]) -> String {
    let all = || groups.iter().flat_map(|group| group.points.iter());
    let frame = Frame::new(range(all().map(|p| p.0)), range(all().map(|p| p.1)));
    let names: Vec<&str> = groups.iter().map(|group| group.name.as_str()).collect();
    let (left, right, top, bottom) = PLOT;
    let mut svg = open(WIDTH, bottom + 8.0 + legend_height(&names));
    let (width, height) = (right - left, bottom - top);
    put(
        &mut svg,
        format_args!("<rect class=\"field\" x=\"{left}\" y=\"{top}\" width=\"{width}\" height=\"{height}\"/>"),
    );
    for (i, group) in groups.iter().enumerate() {
        put(&mut svg, format_args!("<g class=\"cloud\" {}>", mark_fill(i)));
        for &point in &group.points {
            let (x, y) = frame.place(point);
            put(&mut svg, format_args!("<circle cx=\"{x:.2}\" cy=\"{y:.2}\" r=\"2.5\"/>"));
        }
        put(&mut svg, format_args!("</g>"));
    }
    legend(&mut svg, &names, bottom + 8.0);
    svg + "</svg>\n"
}
