//! A router's mean weights: a map for each head, categories down, layers across, coloured by the deviation from 1/N.

use super::figure::data;
use super::text::{breakable, escape};
use serde_json::json;
use std::collections::BTreeMap;

/// The router's mean weights: category → layer → head, over tokens and adapted projections.
pub type Routing = BTreeMap<String, Vec<Vec<f64>>>;

/// Steps of the colour scale on either side of 1/N; `chart.css` has twice as many colours and one between.
const STEPS: f64 = 8.0;
/// Maps of at most this many layers have the weights in their cells.
const FEW_LAYERS: usize = 8;
/// Names longer than this get a fixed share of a map's width, and lines.
const LONG_NAME: usize = 20;
/// The least deviation that gets the strongest colour: below it, routers are as good as uniform, and look it.
const LEAST: f64 = 0.01;

/// The colours' meaning, common to all maps of a routing.
pub struct Colours {
    /// Number of heads.
    pub heads: usize,
    /// The deviation of the strongest colour.
    pub most: f64,
}

impl Colours {
    /// Colours that reach from the largest deviation below 1/N to the largest above, alike on both sides.
    pub fn of(routing: &Routing) -> Self {
        let heads = routing.values().flatten().map(Vec::len).next().unwrap_or(1).max(1);
        let even = 1.0 / heads as f64;
        let most = routing.values().flatten().flatten().map(|w| (w - even).abs()).fold(LEAST, f64::max);
        let power = 10f64.powf(most.log10().floor());
        let round = [1.0, 1.5, 2.0, 3.0, 5.0, 10.0].into_iter().find(|m| m * power >= most * 0.999_999);
        Self { heads, most: round.unwrap_or(10.0) * power }
    }

    /// The weight of a head where all weigh the same.
    pub fn even(&self) -> f64 {
        1.0 / self.heads as f64
    }

    /// The number of a weight's colour.
    pub fn level(&self, weight: f64) -> usize {
        let share = ((weight - self.even()) / self.most).clamp(-1.0, 1.0);
        (STEPS + (STEPS * share).round()) as usize
    }

    /// All numbers of colours.
    pub fn levels() -> std::ops::RangeInclusive<usize> {
        0..=2 * STEPS as usize
    }

    /// What the two ends and the middle of the scale mean.
    pub fn labels(&self) -> [String; 3] {
        let decimals = if self.most < 0.095 { 3 } else { 2 };
        let end = format!("{:.decimals$}", self.most);
        let even = format!("1/{} = {:.3}", self.heads, self.even());
        [format!("−{end}"), even, format!("+{end}")]
    }
}

/// Layers that have their number under a map.
pub fn labelled(layer: usize, layers: usize) -> bool {
    layers <= 12 || layer.is_multiple_of(5)
}

/// One panel of maps with a legend.
pub fn heat_maps(title: &str, routing: &Routing) -> String {
    let colours = Colours::of(routing);
    let layers = routing.values().map(Vec::len).max().unwrap_or(0);
    let maps: String = (0..colours.heads).map(|head| map(routing, &colours, head, layers)).collect();
    let json = json!({"title": title, "category, layer, head": rounded(routing)});
    format!(
        "<figure class=\"heat\">\n<figcaption>{}</figcaption>\n{}<div class=\"maps\">\n{maps}</div>\n{}</figure>\n",
        escape(title),
        legend(&colours),
        data(&json)
    )
}

fn legend(colours: &Colours) -> String {
    let [low, even, high] = colours.labels();
    let swatches: String = Colours::levels().map(|level| format!("<i class=\"q{level}\"></i>")).collect();
    format!(
        "<div class=\"key\" role=\"img\" aria-label=\"Colours: {low} below {even} to {high} above it\">\
         <span>less: {low}</span><span class=\"swatches\">{swatches}</span><span>more: {high}</span>\
         <span class=\"soft\">middle: {even}, all heads alike</span></div>\n"
    )
}

fn map(routing: &Routing, colours: &Colours, head: usize, layers: usize) -> String {
    let dense = if layers > FEW_LAYERS { " class=\"dense\"" } else { "" };
    let number = |layer: usize| if labelled(layer, layers) { layer.to_string() } else { String::new() };
    let numbers: String = (0..layers).map(|layer| format!("<th scope=\"col\">{}</th>", number(layer))).collect();
    let row = |(category, weights): (&String, &Vec<Vec<f64>>)| {
        let cell = |heads: &Vec<f64>| {
            let level = colours.level(heads[head]);
            format!("<td class=\"q{level} t{level}\">{:.3}</td>", heads[head])
        };
        let cells: String = weights.iter().map(cell).collect();
        format!("<tr><th scope=\"row\">{}</th>{cells}</tr>\n", breakable(category))
    };
    let rows: String = routing.iter().map(row).collect();
    let longest = routing.keys().map(|name| name.chars().count()).max().unwrap_or(0);
    let names = if longest > LONG_NAME { "40%".to_string() } else { format!("{}ch", longest + 2) };
    format!(
        "<table{dense} tabindex=\"0\" data-head=\"{head}\" data-even=\"{}\"><caption>Head {head}</caption>\
         <thead><tr><th scope=\"col\" class=\"corner\" style=\"width:{names}\">layer</th>{numbers}</tr></thead>\n\
         <tbody>\n{rows}</tbody></table>\n",
        colours.even()
    )
}

fn rounded(routing: &Routing) -> BTreeMap<&String, Vec<Vec<f64>>> {
    let round = |w: &f64| (1e4 * w).round() / 1e4;
    let heads = |heads: &Vec<f64>| heads.iter().map(round).collect();
    routing.iter().map(|(name, layers)| (name, layers.iter().map(heads).collect())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routing(weights: &[f64]) -> Routing {
        Routing::from([("a_category_of_a_long_name".to_string(), vec![weights.to_vec()])])
    }

    #[test]
    fn colours_are_symmetric_about_the_even_weight() {
        let colours = Colours::of(&routing(&[0.13, 0.25, 0.37, 0.25]));
        assert!(colours.heads == 4 && (colours.most - 0.15).abs() < 1e-12);
        assert_eq!([0.25, 0.4, 0.1, 0.9, 0.0].map(|w| colours.level(w)), [8, 16, 0, 16, 0]);
        assert_eq!(colours.labels(), ["−0.15", "1/4 = 0.250", "+0.15"]);
        // A router that hardly prefers anything must not look as if it did.
        let uniform = Colours::of(&routing(&[0.501, 0.499]));
        assert_eq!((uniform.most, uniform.level(0.501)), (LEAST, 9));
    }

    #[test]
    fn names_are_whole() {
        let html = heat_maps("Router", &routing(&[0.5, 0.5]));
        assert!(html.replace("<wbr>", "").contains(">a_category_of_a_long_name<"));
        assert_eq!(html.matches("<caption>").count(), 2);
    }
}
