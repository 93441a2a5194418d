//! Curves, dots and heat maps as inline SVG. Colours are the page's own, so that they follow light and dark.

mod heat;
mod marks;

use super::escape;
pub use heat::heat_maps;
pub use marks::{Dot, Group, dots, scatter};
use std::fmt::Write;

/// A named line; of points that are not finite nothing is drawn.
pub struct Curve {
    /// In the legend.
    pub name: String,
    /// x ascending.
    pub points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 280.0;
/// Left, right, top, bottom of the plot.
const PLOT: (f64, f64, f64, f64) = (58.0, 536.0, 12.0, 248.0);
/// Colours that the page's style has.
const COLOURS: usize = 8;
/// A legend's line.
const LINE: f64 = 20.0;

/// Several lines in one plot; long ones thin, with their running mean over them.
pub fn curves(curves: &[Curve]) -> String {
    plot(curves, None)
}

/// Several lines in one plot, with a mark at each point and an error bar where `errors` (by curve and point) has one; x, above 0,
/// is on a logarithmic axis, and the curves' marks stand a little apart.
pub fn curves_with_errors(curves: &[Curve], errors: &[Vec<Option<f64>>]) -> String {
    plot(curves, Some(errors))
}

fn plot(curves: &[Curve], errors: Option<&[Vec<Option<f64>>]>) -> String {
    let finite = |curve: &Curve| -> Vec<(f64, f64)> {
        curve.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect()
    };
    let lines: Vec<_> = curves.iter().map(finite).collect();
    if lines.iter().all(Vec::is_empty) {
        return "<p>No steps.</p>".into();
    }
    let error = |curve: usize, i: usize| errors.and_then(|errors| errors[curve].get(i).copied().flatten());
    let points = || {
        curves.iter().enumerate().flat_map(|(c, curve)| curve.points.iter().enumerate().map(move |(i, p)| (c, i, p)))
    };
    let ends = points().flat_map(|(c, i, &(_, y))| [y - error(c, i).unwrap_or(0.0), y + error(c, i).unwrap_or(0.0)]);
    let y = range(ends.filter(|y| y.is_finite()));
    let frame = match errors {
        None => Frame::new(range(lines.iter().flatten().map(|p| p.0)), y),
        Some(_) => Frame::logarithmic(lines.iter().flatten().map(|p| p.0).collect(), y),
    };
    // Error bars of several curves at one x would hide each other.
    let aside =
        |curve: usize| if errors.is_some() { 5.0 * (curve as f64 - 0.5 * (curves.len() - 1) as f64) } else { 0.0 };
    let names: Vec<&str> = curves.iter().map(|curve| curve.name.as_str()).collect();
    let mut svg = frame.open(legend_height(&names));
    for (i, line) in lines.iter().enumerate() {
        let colour = format!("stroke=\"var(--c{})\"", i % COLOURS);
        let thin = running_mean(line).filter(|_| errors.is_none());
        let class = if thin.is_some() { "line thin" } else { "line" };
        put(
            &mut svg,
            format_args!("<polyline class=\"{class}\" {colour} points=\"{}\"/>", path(line, &frame, aside(i))),
        );
        if let Some(smooth) = &thin {
            put(&mut svg, format_args!("<polyline class=\"line\" {colour} points=\"{}\"/>", path(smooth, &frame, 0.0)));
        }
    }
    for (c, i, &(x, y)) in points().filter(|(_, _, p)| errors.is_some() && p.1.is_finite()) {
        let (colour, name) = (c % COLOURS, escape(&curves[c].name));
        let (cx, cy) = frame.place((x, y));
        let cx = cx + aside(c);
        let mut text = format!("{name}, {}: {y:.4}", number(x));
        if let Some(error) = error(c, i) {
            let (top, bottom) = (frame.place((x, y + error)).1, frame.place((x, y - error)).1);
            put(
                &mut svg,
                format_args!("<path class=\"line\" stroke=\"var(--c{colour})\" d=\"M{cx:.1} {top:.1}V{bottom:.1}\"/>"),
            );
            text += &format!(" ± {error:.4}");
        }
        put(
            &mut svg,
            format_args!(
                "<circle fill=\"var(--c{colour})\" cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"3.5\"><title>{text}</title></circle>"
            ),
        );
    }
    legend(&mut svg, &names, HEIGHT);
    svg + "</svg>\n"
}

/// The plot's axes.
struct Frame {
    x_ticks: Vec<f64>,
    y_ticks: Vec<f64>,
    /// What x goes through before it is placed.
    x_scale: fn(f64) -> f64,
    /// Room to the left and right of the points.
    inset: f64,
}

impl Frame {
    fn new(x: (f64, f64), y: (f64, f64)) -> Self {
        Self { x_ticks: ticks(x), y_ticks: ticks(y), x_scale: |x| x, inset: 0.0 }
    }

    /// A tick at each x that occurs.
    fn logarithmic(mut x: Vec<f64>, y: (f64, f64)) -> Self {
        x.sort_by(f64::total_cmp);
        x.dedup();
        Self { x_ticks: x, y_ticks: ticks(y), x_scale: f64::log2, inset: 24.0 }
    }

    /// From values to the picture's units.
    fn place(&self, (x, y): (f64, f64)) -> (f64, f64) {
        let share = |v: f64, scale: fn(f64) -> f64, ticks: &[f64]| {
            let (first, last) = (scale(ticks[0]), scale(ticks[ticks.len() - 1]));
            if first < last { (scale(v) - first) / (last - first) } else { 0.5 }
        };
        let (left, right, top, bottom) = PLOT;
        let (left, right) = (left + self.inset, right - self.inset);
        let x = left + share(x, self.x_scale, &self.x_ticks) * (right - left);
        (x, bottom - share(y, |y| y, &self.y_ticks) * (bottom - top))
    }

    /// The picture's beginning: axes with numbers, and room of a height below for more.
    fn open(&self, below: f64) -> String {
        let (left, right, _, bottom) = PLOT;
        let mut svg = open(WIDTH, HEIGHT + below);
        for value in &self.y_ticks {
            let y = self.place((self.x_ticks[0], *value)).1;
            put(
                &mut svg,
                format_args!("<line class=\"axis\" x1=\"{left}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>"),
            );
            let (x, y) = (left - 6.0, y + 4.0);
            put(&mut svg, format_args!("<text x=\"{x}\" y=\"{y:.1}\" text-anchor=\"end\">{}</text>", number(*value)));
        }
        for value in &self.x_ticks {
            let (x, y) = (self.place((*value, self.y_ticks[0])).0, bottom + 18.0);
            put(
                &mut svg,
                format_args!("<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{}</text>", number(*value)),
            );
        }
        svg
    }
}

fn open(width: f64, height: f64) -> String {
    format!("<svg viewBox=\"0 0 {width} {height}\" role=\"img\">\n")
}

/// Smallest and largest, moved apart where they are one.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)));
    if low < high { (low, high) } else { (low.min(0.0), high.max(1.0)) }
}

/// Names with their colours, as many in a line as have room.
fn legend(svg: &mut String, names: &[&str], top: f64) {
    for (i, (name, (line, x))) in names.iter().zip(legend_places(names)).enumerate() {
        let y = top + line as f64 * LINE + 12.0;
        let (cx, fill) = (x + 6.0, mark_fill(i));
        put(svg, format_args!("<circle {fill} cx=\"{cx}\" cy=\"{}\" r=\"5\"/>", y - 4.0));
        put(svg, format_args!("<text x=\"{}\" y=\"{y}\">{}</text>", x + 16.0, escape(name)));
    }
}

fn legend_height(names: &[&str]) -> f64 {
    legend_places(names).last().map_or(0.0, |(line, _)| (line + 1) as f64 * LINE)
}

fn legend_places(names: &[&str]) -> Vec<(usize, f64)> {
    let (mut line, mut x) = (0, PLOT.0);
    let place = |name: &&str| {
        // 9 units a letter: wide enough where a phone enlarges the text.
        let width = 34.0 + 9.0 * name.chars().count() as f64;
        if x + width > WIDTH && x > PLOT.0 {
            (line, x) = (line + 1, PLOT.0);
        }
        x += width;
        (line, x - width)
    };
    names.iter().map(place).collect()
}

/// A mark's colour; hollow where the colours come round again.
fn mark_fill(i: usize) -> String {
    let colour = i % COLOURS;
    match i / COLOURS % 2 {
        0 => format!("fill=\"var(--c{colour})\""),
        _ => format!("fill=\"none\" stroke-width=\"1.5\" stroke=\"var(--c{colour})\""),
    }
}

/// Some round numbers, from at or below the range's start to at or above its end.
fn ticks((low, high): (f64, f64)) -> Vec<f64> {
    let rough = (high - low) / 4.0;
    let power = 10f64.powf(rough.log10().floor());
    let mut step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|m| m * power).filter(|&step| step <= rough * 1.001);
    let step = step.next_back().unwrap_or(power);
    let (first, last) = ((low / step).floor() as i64, (high / step).ceil() as i64);
    (first..=last).map(|i| i as f64 * step).collect()
}

/// To four decimals, without the zeros at the end.
fn number(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

/// Lines of a length at which single steps hide the trend get one that shows it.
fn running_mean(line: &[(f64, f64)]) -> Option<Vec<(f64, f64)>> {
    let window = line.len() / 20;
    (window > 1).then(|| {
        let mean = |i: usize| {
            let part = &line[i.saturating_sub(window)..=i];
            part.iter().map(|p| p.1).sum::<f64>() / part.len() as f64
        };
        (0..line.len()).map(|i| (line[i].0, mean(i))).collect()
    })
}

fn path(line: &[(f64, f64)], frame: &Frame, aside: f64) -> String {
    let points: Vec<_> =
        line.iter().map(|&p| frame.place(p)).map(|(x, y)| format!("{:.1},{y:.1}", x + aside)).collect();
    points.join(" ")
}

fn put(svg: &mut String, element: std::fmt::Arguments<'_>) {
    writeln!(svg, "{element}").expect("writing to a string");
}

#[cfg(test)]
mod tests {
    use super::{number, ticks};

    #[test]
    fn ticks_are_round_and_cover_the_range() {
        for (range, want) in [
            ((1.0, 400.0), "0 50 100 150 200 250 300 350 400"),
            ((0.01, 5.08), "0 1 2 3 4 5 6"),
            ((2.31, 2.35), "2.31 2.32 2.33 2.34 2.35"),
            ((-1.0, 1.0), "-1 -0.5 0 0.5 1"),
        ] {
            let got: Vec<_> = ticks(range).into_iter().map(number).collect();
            assert_eq!(got.join(" "), want);
        }
    }
}
