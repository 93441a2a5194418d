//! `report.html`: one self-contained page, light and dark, readable on a phone.

mod svg;

use crate::data::encode::Encoded;
use crate::output::printable;
use crate::router::{self, Sample};
use crate::run::train::Trained;
use anyhow::{Context, Result};
use hydra_runtime::Error;
use hydra_runtime::adapter::{Adapter, GateKind};
use hydra_runtime::atomic::write_atomically;
use hydra_runtime::backend::Backend;
use hydra_runtime::model::Model;
use std::collections::BTreeMap;
use std::path::Path;
pub use svg::{Curve, Dot, Group, curves, curves_with_errors, dots, heat_maps, scatter};

/// The page's name in a run's folder.
pub const FILE: &str = "report.html";

/// Records that a run's router is watched on: a pass over more takes longer than a short run.
const WATCHED: usize = 200;
/// Of their choice; one for all runs, so that routers are watched on the same records.
const WATCHED_SEED: u64 = 0;

/// The router's mean weights: category → layer → head, over tokens and adapted projections.
pub type Routing = BTreeMap<String, Vec<Vec<f64>>>;

/// What a run's router does.
pub struct Router {
    routing: Routing,
    /// On which records.
    caption: String,
}

impl Router {
    /// Watches the router of an adapter of so many steps on some of `data`, which are called `what`; `None` if it has none.
    pub fn watch<B: Backend>(
        model: &Model<'_, B>,
        adapter: &Adapter,
        data: &Encoded,
        what: &str,
        step: usize,
    ) -> Result<Option<Self>> {
        if adapter.config.gate != GateKind::Router {
            return Ok(None);
        }
        let sample = Sample::spread(data, WATCHED, WATCHED_SEED);
        let (layers, heads, targets) = (model.config().layers, adapter.config.lora_heads, adapter.config.targets.len());
        let mut routing = Routing::new();
        let watched = router::watch(model, adapter, &sample)?;
        if !router::finite(&watched) {
            return Err(Error::NotFinite { what: "router's weight", value: f64::NAN, step: step as u64 }.into());
        }
        for (category, watched) in watched {
            let mut weights = vec![vec![0.0; heads]; layers];
            for mean in watched.means {
                for (sum, weight) in weights[mean.layer].iter_mut().zip(&mean.lora_heads) {
                    *sum += weight / targets as f64;
                }
            }
            routing.insert(category, weights);
        }
        Ok(Some(Self { routing, caption: sample.describe(what) }))
    }

    /// Heat maps, and what they are over.
    pub fn html(&self) -> String {
        format!("<p>{}</p>\n{}", escape(&self.caption), heat_maps(&self.routing))
    }
}

/// Writes the report of one run.
pub fn write_run(
    out: &Path,
    options: &serde_json::Map<String, serde_json::Value>,
    facts: &serde_json::Map<String, serde_json::Value>,
    trained: &Trained,
    router: &Option<Router>,
) -> Result<()> {
    let mut body = String::new();
    let points = trained.steps.iter().map(|line| (line.step as f64, line.loss)).collect();
    let mut lines = vec![Curve { name: "training".into(), points }];
    if !trained.evals.is_empty() {
        let points = trained.evals.iter().map(|line| (line.step as f64, line.loss.all.loss)).collect();
        lines.push(Curve { name: "held out".into(), points });
    }
    body += &section("Loss by step", &curves(&lines));
    if let [first, .., last] = trained.evals.as_slice() {
        let row =
            |name: &str, before: f64, after: f64| vec![name.to_string(), format!("{before:.4}"), format!("{after:.4}")];
        let after = |name: &String| last.loss.categories.get(name).map_or(f64::NAN, |loss| loss.loss);
        let mut rows: Vec<_> =
            first.loss.categories.iter().map(|(name, loss)| row(name, loss.loss, after(name))).collect();
        rows.push(row("all", first.loss.all.loss, last.loss.all.loss));
        body += &section("Held-out loss", &table(&["category", "before", "after"], &rows));
    }
    if let Some(router) = router {
        body += &section("Router", &router.html());
    }
    let rows: Vec<_> = options.iter().chain(facts).map(|(key, value)| vec![key.clone(), value.to_string()]).collect();
    body += &section("Choices and facts", &table(&["name", "value"], &rows));
    write(out, "Hydra fine-tune", &body)
}

/// Writes a page into a folder.
pub fn write(out: &Path, title: &str, body: &str) -> Result<()> {
    let path = out.join(FILE);
    let title = escape(title);
    let page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{title}</title><style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n{body}</body></html>\n"
    );
    write_atomically(&path, page.as_bytes()).context("can't write")
}

/// A heading and what is under it, in HTML.
pub fn section(title: &str, html: &str) -> String {
    format!("<section><h2>{}</h2>\n{html}</section>\n", escape(title))
}

/// A table of plain texts.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let cells = |tag: &str, cells: Vec<&str>| -> String {
        // Long texts have several lines.
        let class = |cell: &str| if cell.chars().count() > 48 { " class=\"long\"" } else { "" };
        cells.into_iter().map(|cell| format!("<{tag}{}>{}</{tag}>", class(cell), escape(cell))).collect()
    };
    let mut html = format!("<div class=\"wide\"><table><tr>{}</tr>\n", cells("th", head.to_vec()));
    for row in rows {
        html += &format!("<tr>{}</tr>\n", cells("td", row.iter().map(String::as_str).collect()));
    }
    html + "</table></div>\n"
}

/// Text as it may stand in HTML and SVG; XML has no control characters.
pub fn escape(text: &str) -> String {
    printable(text).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Writes a picture of a page as a file of its own.
pub fn write_svg(path: &Path, svg: &str) -> Result<()> {
    let styled = svg.replacen(">\n", &format!("><style>{STYLE}</style>\n"), 1);
    let styled = styled.replacen("<svg ", "<svg xmlns=\"http://www.w3.org/2000/svg\" ", 1);
    write_atomically(path, styled.as_bytes()).context("can't write")
}

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--faint:#d5dae0;--c0:#0b62c4;--c1:#c2410c;--c2:#15803d;--c3:#7e22ce;\
--c4:#a16207;--c5:#be185d;--c6:#0f766e;--c7:#57606a}\
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ed;--paper:#14171b;--faint:#3a414a;--c0:#6cb0ff;--c1:#ff9d66;--c2:#6ee79a;--c3:#d3a4ff;\
--c4:#f2cc60;--c5:#ff8ac4;--c6:#5eead4;--c7:#aab4bf}}\
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:60rem;margin:0 auto;padding:1rem}\
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}h3{font-size:1rem}svg{width:100%;max-width:46rem;height:auto;display:block}\
svg text{fill:var(--ink);font:11px system-ui,sans-serif}.axis{stroke:var(--faint)}.origin{stroke:var(--ink)}.line{fill:none;stroke-width:1.8}\
.field{fill:none;stroke:var(--faint)}.cloud{opacity:.75}\
.thin{stroke-width:.6;opacity:.45}.cell{fill:var(--c0)}.maps{display:flex;flex-wrap:wrap;gap:1rem}.maps>figure{flex:1 1 18rem;margin:0;overflow-x:auto}\
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}\
th,td{padding:.25rem .7rem;border-bottom:1px solid var(--faint);text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}\
td.long{white-space:normal;overflow-wrap:anywhere;min-width:9rem;text-align:left}\
code{background:var(--faint);padding:.1rem .3rem;border-radius:.2rem;overflow-wrap:anywhere}\
@media (max-width:40rem){svg text{font-size:17px}.maps svg text{font-size:11px}}";

#[cfg(test)]
mod tests {
    use super::escape;

    #[test]
    fn no_markup_and_no_control_characters() {
        assert_eq!(escape("a<b> & \"c\"\u{1b}[31m\n"), "a&lt;b&gt; &amp; &quot;c&quot;\\u{1b}[31m\\n");
    }
}
