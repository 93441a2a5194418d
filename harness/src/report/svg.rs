//! Curves and heat maps as inline SVG. Colours are the page's own, so that they follow light and dark.

use super::{Routing, escape};
use std::fmt::Write;

/// A named line; of points that are not finite nothing is drawn.
pub struct Curve {
    /// In the legend.
    pub name: String,
    /// x ascending.
    pub points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 300.0;
/// Left, right, top, bottom of the plot.
const PLOT: (f64, f64, f64, f64) = (48.0, 708.0, 12.0, 264.0);
/// Colours that the page's style has.
const COLOURS: usize = 4;

/// Several lines in one plot; long ones thin, with their running mean over them.
pub fn curves(curves: &[Curve]) -> String {
    let finite = |curve: &Curve| -> Vec<(f64, f64)> {
        curve.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect()
    };
    let lines: Vec<_> = curves.iter().map(finite).collect();
    let all = || lines.iter().flatten();
    let range = |pick: fn(&(f64, f64)) -> f64| {
        let (low, high) = all().map(pick).fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)));
        if low < high { (low, high) } else { (low.min(0.0), high.max(1.0)) }
    };
    if all().next().is_none() {
        return "<p>No steps.</p>".into();
    }
    let (x_ticks, y_ticks) = (ticks(range(|p| p.0)), ticks(range(|p| p.1)));
    let ends = |ticks: &[f64]| (ticks[0], ticks[ticks.len() - 1]);
    let ((x0, x1), (y0, y1)) = (ends(&x_ticks), ends(&y_ticks));
    let (left, right, top, bottom) = PLOT;
    let place = |&(x, y): &(f64, f64)| {
        (left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top))
    };
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">\n");
    for value in &y_ticks {
        let y = place(&(x0, *value)).1;
        put(&mut svg, format_args!("<line class=\"axis\" x1=\"{left}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>"));
        let (x, y) = (left - 6.0, y + 4.0);
        put(&mut svg, format_args!("<text x=\"{x}\" y=\"{y:.1}\" text-anchor=\"end\">{}</text>", number(*value)));
    }
    for step in &x_ticks {
        let (x, y) = (place(&(*step, y0)).0, bottom + 16.0);
        put(&mut svg, format_args!("<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{}</text>", number(*step)));
    }
    for (i, (line, curve)) in lines.iter().zip(curves).enumerate() {
        let colour = format!("stroke=\"var(--c{})\"", i % COLOURS);
        let smooth = running_mean(line);
        if let Some(smooth) = &smooth {
            put(&mut svg, format_args!("<polyline class=\"line thin\" {colour} points=\"{}\"/>", path(line, place)));
            put(&mut svg, format_args!("<polyline class=\"line\" {colour} points=\"{}\"/>", path(smooth, place)));
        } else {
            put(&mut svg, format_args!("<polyline class=\"line\" {colour} points=\"{}\"/>", path(line, place)));
        }
        let x = left + 8.0 + i as f64 * 150.0;
        let (y, middle) = (HEIGHT - 8.0, HEIGHT - 12.0);
        put(
            &mut svg,
            format_args!(
                "<line class=\"line\" {colour} x1=\"{x}\" x2=\"{}\" y1=\"{middle}\" y2=\"{middle}\"/>",
                x + 18.0
            ),
        );
        put(&mut svg, format_args!("<text x=\"{}\" y=\"{y}\">{}</text>", x + 24.0, escape(&curve.name)));
    }
    svg + "</svg>\n"
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

fn path(line: &[(f64, f64)], place: impl Fn(&(f64, f64)) -> (f64, f64)) -> String {
    let points: Vec<_> = line.iter().map(place).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    points.join(" ")
}

/// A map per head: categories down, layers across; the stronger the colour, the more weight the router gives the head.
pub fn heat_maps(routing: &Routing) -> String {
    let heads = routing.values().flatten().map(Vec::len).next().unwrap_or(0);
    let values = || routing.values().flatten().flatten().copied();
    let (low, high) = values().fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)));
    let note =
        format!("<p>Mean weight by domain (down) and layer (across), from {low:.3} (clear) to {high:.3} (full).</p>\n");
    let maps: String = (0..heads).map(|head| heat_map(routing, head, low, (high - low).max(1e-9))).collect();
    format!("{note}<div class=\"maps\">{maps}</div>\n")
}

fn heat_map(routing: &Routing, head: usize, low: f64, range: f64) -> String {
    const CELL: f64 = 22.0;
    const NAMES: f64 = 130.0;
    let layers = routing.values().map(Vec::len).max().unwrap_or(0);
    let (width, height) = (NAMES + layers as f64 * CELL, routing.len() as f64 * CELL + 18.0);
    let mut svg = format!("<svg viewBox=\"0 0 {width} {height}\" role=\"img\">\n");
    for (row, (category, weights)) in routing.iter().enumerate() {
        let y = row as f64 * CELL;
        let name: String = category.chars().take(18).collect();
        let name = escape(&name);
        put(&mut svg, format_args!("<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{name}</text>", NAMES - 6.0, y + 15.0));
        for (layer, heads) in weights.iter().enumerate() {
            let (x, weight) = (NAMES + layer as f64 * CELL, heads[head]);
            let opacity = (weight - low) / range;
            let side = CELL - 2.0;
            put(
                &mut svg,
                format_args!(
                    "<rect class=\"cell\" x=\"{x}\" y=\"{y}\" width=\"{side}\" height=\"{side}\" fill-opacity=\"{opacity:.3}\">\
                     <title>{name}, layer {layer}: {weight:.3}</title></rect>"
                ),
            );
        }
    }
    for layer in (0..layers).step_by(if layers <= 12 { 1 } else { 5 }) {
        let x = NAMES + layer as f64 * CELL + CELL / 2.0;
        put(&mut svg, format_args!("<text x=\"{x}\" y=\"{}\" text-anchor=\"middle\">{layer}</text>", height - 4.0));
    }
    format!("<figure><figcaption>head {head}</figcaption>{svg}</svg></figure>\n")
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
