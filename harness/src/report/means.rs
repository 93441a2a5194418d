//! Means with their error bars, a row each: the name, the mark on a common axis, and the numbers.

use super::chart::{Area, STILL};
use super::figure::data;
use super::scale::{Kind, Scale};
use super::text::escape;
use serde_json::json;

/// A mean and what is around it.
pub struct Mean {
    /// What it is of.
    pub name: String,
    /// The mean; nothing is drawn of one that is not finite.
    pub mean: f64,
    /// The bar's ends.
    pub ends: Option<(f64, f64)>,
    /// The same in numbers.
    pub text: String,
}

/// Means of one quantity.
pub struct Means {
    /// Heading.
    pub title: String,
    /// What is measured, and in which unit.
    pub axis: String,
    /// Rows.
    pub rows: Vec<Mean>,
    /// Where a vertical line stands: the value that means "no difference".
    pub origin: Option<f64>,
}

impl Means {
    /// The common axis.
    pub fn scale(&self) -> Scale {
        let ends = |row: &Mean| {
            let (low, high) = row.ends.unwrap_or((row.mean, row.mean));
            [row.mean, low, high]
        };
        let values = self.rows.iter().flat_map(ends).chain(self.origin).filter(|v| v.is_finite());
        Scale::new(Kind::Linear, values)
    }

    /// A row's bar and mark, half way up the area.
    pub fn row_marks(&self, row: &Mean, scale: &Scale, area: &Area) -> String {
        let y = 0.5 * (area.top + area.bottom);
        let mut svg = String::new();
        if row.mean.is_finite() {
            if let Some((low, high)) = row.ends {
                let (low, high) = (area.across(scale, low), area.across(scale, high));
                svg += &format!("<path class=\"bar\" {STILL} d=\"M{low} {y}H{high}\"/>");
            }
            svg += &format!("<path class=\"dot\" {STILL} d=\"M{} {y}h.01\"/>", area.across(scale, row.mean));
        }
        format!("<g class=\"s0\">{svg}</g>")
    }

    /// Vertical lines at the ticks, and at the origin.
    pub fn grid(&self, scale: &Scale, area: &Area) -> String {
        let line = |class: &str, value: f64| {
            let x = area.across(scale, value);
            format!("<path class=\"{class}\" {STILL} d=\"M{x} {}V{}\"/>", area.top, area.bottom)
        };
        let lines: String = scale.ticks.iter().map(|tick| line("grid", tick.0)).collect();
        lines + &self.origin.map_or(String::new(), |origin| line("rule", origin))
    }

    /// On a page.
    pub fn figure(&self) -> String {
        let (scale, area) = (self.scale(), Area { left: 0.0, right: 1000.0, top: 0.0, bottom: 100.0 });
        let grid = self.grid(&scale, &area);
        let row = |row: &Mean| {
            format!(
                "<li><span>{}</span><span class=\"value\">{}</span>\
                 <svg viewBox=\"0 0 1000 100\" preserveAspectRatio=\"none\" aria-hidden=\"true\">{grid}{}</svg></li>\n",
                escape(&row.name),
                escape(&row.text),
                self.row_marks(row, &scale, &area),
            )
        };
        let tick = |(value, text): &(f64, String)| {
            format!("<span style=\"left:{:.2}%\">{}</span>", 100.0 * scale.place(*value), escape(text))
        };
        let values = self.rows.iter().map(|row| json!({"name": row.name, "mean": row.mean, "ends": row.ends}));
        let json = json!({"title": self.title, "x": self.axis, "rows": values.collect::<Vec<_>>()});
        format!(
            "<figure class=\"means\">\n<figcaption>{}</figcaption>\n<ul>\n{}</ul>\n\
             <div class=\"x-ticks\" aria-hidden=\"true\">{}</div><div class=\"x-title\">{}</div>\n{}</figure>\n",
            escape(&self.title),
            self.rows.iter().map(row).collect::<String>(),
            scale.ticks.iter().map(tick).collect::<String>(),
            escape(&self.axis),
            data(&json),
        )
    }
}
