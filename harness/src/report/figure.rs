//! A chart on a page: stretchable marks in SVG, axes and legend in HTML, so that text has one size at every width.
//!
//! `page.js` adds values under the pointer, a switch for each series and the download of the data.

use super::chart::{Area, COLOURS, Chart};
use super::scale::{Kind, Scale};
use super::series::{Look, Series};
use super::text::escape;
use serde_json::Value;

/// The side of the square that marks are drawn in before they are stretched.
const SIDE: f64 = 1000.0;

/// A chart. Those with one `group` show their values together.
pub fn figure(chart: &Chart, class: &str, group: &str) -> String {
    let title = escape(&chart.title);
    if chart.is_empty() {
        return format!("<figure class=\"chart\"><figcaption>{title}</figcaption><p>No values.</p></figure>\n");
    }
    let (x, y) = chart.scales();
    let square = if chart.y.kind == Kind::Bare { " square" } else { "" };
    let described = escape(&chart.description());
    let area = Area { left: 0.0, right: SIDE, top: 0.0, bottom: SIDE };
    format!(
        "<figure class=\"chart {class}{square}\" data-group=\"{}\">\n<figcaption>{title}</figcaption>\n{}\
         <div class=\"y-title\">{}</div>\n<div class=\"frame\">{}\
         <div class=\"plot\" tabindex=\"0\" role=\"group\" \
         aria-label=\"Values of: {title}. Left and right arrow keys move.\" data-scale=\"{}\">\n\
         <svg viewBox=\"0 0 {SIDE} {SIDE}\" preserveAspectRatio=\"none\" role=\"img\" \
         aria-label=\"{described}\">\n{}</svg>{}</div>\
         {}<div class=\"x-title\">{}</div></div>\n{}</figure>\n",
        escape(group),
        legend(chart),
        escape(&chart.y.title),
        y_ticks(&y),
        scale(&x, &y),
        chart.marks(&area),
        rule(chart, &x),
        x_ticks(&x),
        escape(&chart.x.title),
        data(&chart.json()),
    )
}

/// Figures side by side where there is room.
pub fn row(figures: &[String]) -> String {
    let three = if figures.len() == 3 { " of-three" } else { "" };
    format!("<div class=\"row{three}\">\n{}</div>\n", figures.concat())
}

/// JSON as part of a page.
pub fn data(value: &Value) -> String {
    let text = value.to_string().replace('<', "\\u003c");
    format!("<script type=\"application/json\">{text}</script>\n")
}

fn legend(chart: &Chart) -> String {
    if chart.series.len() < 2 {
        return String::new();
    }
    let entry = |(i, series): (usize, &Series)| {
        let look = match series.look {
            Look::Noisy | Look::Line => "is-line",
            Look::Marks => "is-line is-marked",
            Look::Fit => "is-dashed",
            Look::Cloud => "is-dot",
        };
        let look = if i >= COLOURS && series.look != Look::Cloud { "is-dashed" } else { look };
        format!(
            "<button type=\"button\" aria-pressed=\"true\" data-series=\"{i}\" \
             title=\"Show or hide; double-click: show this one only\">\
             <i class=\"s{} {look}\"></i>{}</button>\n",
            i % COLOURS,
            escape(&series.name)
        )
    };
    let entries: String = chart.series.iter().enumerate().map(entry).collect();
    format!("<div class=\"legend\" role=\"group\" aria-label=\"Series shown\">\n{entries}</div>\n")
}

/// What `page.js` places the pointer's values by.
fn scale(x: &Scale, y: &Scale) -> String {
    let kind = |scale: &Scale| if scale.logarithmic { "log" } else { "linear" };
    format!("{} {} {} {} {} {}", x.low, x.high, kind(x), y.low, y.high, kind(y))
}

fn rule(chart: &Chart, x: &Scale) -> String {
    let Some((value, says)) = &chart.rule else { return String::new() };
    let place = x.place(*value);
    let side = if place > 0.6 { " before" } else { "" };
    format!("<div class=\"rule-label{side}\" style=\"left:{:.2}%\">{}</div>", 100.0 * place, escape(says))
}

fn x_ticks(scale: &Scale) -> String {
    let tick = |(value, text): &(f64, String)| {
        format!("<span style=\"left:{:.2}%\">{}</span>", 100.0 * scale.place(*value), escape(text))
    };
    format!("<div class=\"x-ticks\" aria-hidden=\"true\">{}</div>", scale.ticks.iter().map(tick).collect::<String>())
}

fn y_ticks(scale: &Scale) -> String {
    let widest = scale.ticks.iter().map(|tick| tick.1.chars().count()).max().unwrap_or(0);
    let tick = |(value, text): &(f64, String)| {
        format!("<span style=\"bottom:{:.2}%\">{}</span>", 100.0 * scale.place(*value), escape(text))
    };
    format!(
        "<div class=\"y-ticks\" aria-hidden=\"true\" style=\"width:{widest}ch\">{}</div>",
        scale.ticks.iter().map(tick).collect::<String>()
    )
}
