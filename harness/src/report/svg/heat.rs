//! Heat maps.

use super::{open, put};
use crate::report::{Routing, escape};

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
    // Cells keep about one size, however many layers there are: what is wider than the screen can be moved.
    let style = format!("<svg style=\"min-width:{:.0}px;max-width:{:.0}px\" ", 0.75 * width, 1.3 * width);
    let mut svg = open(width, height).replacen("<svg ", &style, 1);
    for (row, (category, weights)) in routing.iter().enumerate() {
        let y = row as f64 * CELL;
        let name: String = category.chars().take(16).collect();
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
