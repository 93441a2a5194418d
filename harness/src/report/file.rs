//! Charts as SVG files of their own: fixed in size, with titles, axes and their styles, for READMEs and papers.

use super::chart::{Area, COLOURS, Chart};
use super::heat::{Colours, Routing, labelled};
use super::means::Means;
use super::scale::Kind;
use super::series::Look;
use super::text::escape;
use std::fmt::Write;

const STYLE: &str = concat!(include_str!("chart.css"), include_str!("svg.css"));
/// Around everything.
const MARGIN: f64 = 16.0;
/// Width of a panel that stands alone.
pub const WIDTH: f64 = 640.0;
/// Height of a line of text.
const LINE: f64 = 18.0;

/// A picture of a size, at (0, 0).
pub struct Panel {
    width: f64,
    height: f64,
    title: String,
    description: String,
    svg: String,
}

/// A file of panels side by side.
pub fn file(panels: &[Panel]) -> String {
    let width = panels.iter().map(|panel| panel.width + MARGIN).sum::<f64>() + MARGIN;
    let height = panels.iter().map(|panel| panel.height).fold(0.0, f64::max) + 2.0 * MARGIN;
    let titles = panels.iter().map(|panel| panel.title.as_str()).collect::<Vec<_>>().join("; ");
    let descriptions = panels.iter().map(|panel| panel.description.as_str()).collect::<Vec<_>>().join(" ");
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" role=\"img\" aria-labelledby=\"title about\"><title id=\"title\">{}</title>\
         <desc id=\"about\">{}</desc>\n<style>{STYLE}</style>\n\
         <rect class=\"paper\" width=\"{width}\" height=\"{height}\" rx=\"8\"/>\n",
        escape(&titles),
        escape(&descriptions)
    );
    let mut left = MARGIN;
    for panel in panels {
        let _ = writeln!(svg, "<g transform=\"translate({left} {MARGIN})\">\n{}</g>", panel.svg);
        left += panel.width + MARGIN;
    }
    svg + "</svg>\n"
}

/// A chart with axes and, for several series, a legend.
pub fn chart(chart: &Chart, whole: f64) -> Panel {
    let widest = |texts: &mut dyn Iterator<Item = &String>| texts.map(|text| width(text)).fold(0.0, f64::max);
    let mut svg = heading(&chart.title, &chart.y.title);
    if chart.is_empty() {
        text(&mut svg, (0.0, 64.0), "", "No values.");
        return panel(svg, (whole, 72.0), &chart.title, String::new());
    }
    let (x, y) = chart.scales();
    let left = 8.0 + widest(&mut y.ticks.iter().map(|tick| &tick.1));
    let right = whole - 16.0;
    let height = if chart.y.kind == Kind::Bare { right - left } else { 280.0 };
    let area = Area { left, right, top: 50.0, bottom: 50.0 + height };
    if chart.y.kind == Kind::Bare {
        let _ = writeln!(
            svg,
            "<rect class=\"field\" x=\"{left}\" y=\"{}\" width=\"{}\" height=\"{height}\"/>",
            area.top,
            right - left
        );
    }
    svg += &chart.marks(&area);
    for (value, label) in &y.ticks {
        text(&mut svg, (left - 8.0, area.down(&y, *value) + 4.0), "end", label);
    }
    for (value, label) in &x.ticks {
        text(&mut svg, (area.across(&x, *value), area.bottom + LINE), "middle", label);
    }
    if let Some((value, says)) = &chart.rule {
        text(&mut svg, (area.across(&x, *value) + 6.0, area.top + 12.0), "", says);
    }
    let _ = writeln!(svg, "<path class=\"axis\" d=\"M{left} {0}H{right}\"/>", area.bottom);
    let below = if x.ticks.is_empty() { area.bottom } else { area.bottom + LINE };
    text(&mut svg, (0.5 * (left + right), below + LINE), "middle", &chart.x.title);
    let bottom = legend(&mut svg, chart, (left, below + LINE + 8.0), whole);
    panel(svg, (whole, bottom), &chart.title, chart.description())
}

/// Means, the name of each above its bar.
pub fn means(means: &Means) -> Panel {
    const ROW: f64 = 40.0;
    let scale = means.scale();
    let bottom = 52.0 + ROW * means.rows.len() as f64;
    let area = |top: f64, bottom: f64| Area { left: 24.0, right: WIDTH - 24.0, top, bottom };
    let mut svg = heading(&means.title, "");
    svg += &means.grid(&scale, &area(32.0, bottom));
    let mut description = format!("{}. {}.", means.title, means.axis);
    for (i, row) in means.rows.iter().enumerate() {
        let top = 36.0 + ROW * i as f64;
        text(&mut svg, (0.0, top + 12.0), "", &row.name);
        text(&mut svg, (WIDTH, top + 12.0), "end", &row.text);
        svg += &means.row_marks(row, &scale, &area(top + 16.0, top + ROW - 4.0));
        let _ = write!(description, " {}: {}.", row.name, row.text);
    }
    for (value, label) in &scale.ticks {
        text(&mut svg, (area(0.0, 0.0).across(&scale, *value), bottom + LINE), "middle", label);
    }
    text(&mut svg, (0.5 * WIDTH, bottom + 2.0 * LINE), "middle", &means.axis);
    panel(svg, (WIDTH, bottom + 2.0 * LINE + 4.0), &means.title, description)
}

/// The maps of a router with few categories and layers, heads in two columns.
pub fn heat(title: &str, routing: &Routing) -> Panel {
    const CELL: (f64, f64) = (36.0, 26.0);
    let colours = Colours::of(routing);
    let layers = routing.values().map(Vec::len).max().unwrap_or(0);
    let names = 8.0 + routing.keys().map(|name| width(name)).fold(0.0, f64::max);
    let (across, down) = (names + CELL.0 * layers as f64 + 20.0, LINE + CELL.1 * routing.len() as f64 + 34.0);
    let mut svg = heading(title, "mean weight by category (down) and layer (across)");
    for head in 0..colours.heads {
        let (left, top) = (across * (head % 2) as f64, 54.0 + down * (head / 2) as f64);
        text(&mut svg, (left + names, top + 10.0), "", &format!("head {head}"));
        for (row, (category, weights)) in routing.iter().enumerate() {
            let y = top + LINE + CELL.1 * row as f64;
            text(&mut svg, (left + names - 8.0, y + 17.0), "end", category);
            for (layer, heads) in weights.iter().enumerate() {
                let (x, level) = (left + names + CELL.0 * layer as f64, colours.level(heads[head]));
                let (cell, middle) = ((CELL.0 - 2.0, CELL.1 - 2.0), x + 0.5 * CELL.0 - 1.0);
                let _ = writeln!(
                    svg,
                    "<rect class=\"q{level}\" x=\"{x:.1}\" y=\"{y}\" width=\"{}\" height=\"{}\" rx=\"3\"/>\
                     <text class=\"t{level}\" x=\"{middle:.1}\" y=\"{}\" text-anchor=\"middle\">{:.2}</text>",
                    cell.0,
                    cell.1,
                    y + 16.0,
                    heads[head]
                );
            }
        }
        let bottom = top + LINE + CELL.1 * routing.len() as f64 + 14.0;
        for layer in (0..layers).filter(|&layer| labelled(layer, layers)) {
            text(&mut svg, (left + names + CELL.0 * (layer as f64 + 0.5), bottom), "middle", &layer.to_string());
        }
    }
    let columns = if colours.heads > 1 { 2.0 } else { 1.0 };
    let bottom = 54.0 + down * colours.heads.div_ceil(2) as f64;
    key(&mut svg, &colours, names, bottom);
    let description = format!("{title}: a map for each head, coloured by the deviation of the weight from 1/N.");
    panel(svg, (columns * across - 20.0, bottom + LINE), title, description)
}

/// The colour scale.
fn key(svg: &mut String, colours: &Colours, left: f64, top: f64) {
    const SWATCH: f64 = 10.0;
    let [low, even, high] = colours.labels();
    text(svg, (left - 8.0, top + 10.0), "end", &low);
    for level in Colours::levels() {
        let x = left + SWATCH * level as f64;
        let _ = writeln!(svg, "<rect class=\"q{level}\" x=\"{x}\" y=\"{top}\" width=\"{SWATCH}\" height=\"12\"/>");
    }
    let right = left + SWATCH * Colours::levels().count() as f64;
    text(svg, (right + 8.0, top + 10.0), "", &format!("{high}; middle: {even}"));
}

fn heading(title: &str, y_title: &str) -> String {
    let mut svg = format!("<text class=\"head\" x=\"0\" y=\"14\">{}</text>\n", escape(title));
    let _ = writeln!(svg, "<text class=\"soft\" x=\"0\" y=\"36\">{}</text>", escape(y_title));
    svg
}

/// Names with their colours, as many in a line as have room; gives where it ends.
fn legend(svg: &mut String, chart: &Chart, (left, top): (f64, f64), right: f64) -> f64 {
    if chart.series.len() < 2 {
        return top;
    }
    let (mut x, mut y) = (left, top + 12.0);
    for (i, series) in chart.series.iter().enumerate() {
        let wide = 34.0 + width(&series.name);
        if x + wide > right && x > left {
            (x, y) = (left, y + LINE);
        }
        let (class, middle) = (format!("s{}", i % COLOURS), y - 4.0);
        let dash = if series.look == Look::Fit || i >= COLOURS { " dash" } else { "" };
        let mark = match series.look {
            Look::Cloud => format!("<path class=\"dot\" d=\"M{} {middle}h.01\"/>", x + 8.0),
            _ => format!("<path class=\"line{dash}\" d=\"M{x} {middle}h16\"/>"),
        };
        let _ = writeln!(svg, "<g class=\"{class}\">{mark}</g>");
        text(svg, (x + 22.0, y), "", &series.name);
        x += wide;
    }
    y + 8.0
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, text: &str) {
    let anchor = if anchor.is_empty() { String::new() } else { format!(" text-anchor=\"{anchor}\"") };
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\"{anchor}>{}</text>", escape(text));
}

/// A text's width at 12 units a line, for fonts that are rather wide.
fn width(text: &str) -> f64 {
    text.chars().map(|c| if c.is_ascii() { 7.2 } else { 12.0 }).sum()
}

fn panel(svg: String, (width, height): (f64, f64), title: &str, description: String) -> Panel {
    Panel { width, height, title: title.to_string(), description, svg }
}
