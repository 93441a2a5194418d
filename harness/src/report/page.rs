//! `report.html`: one page without a network, light and dark, for phones, screens and paper.

use super::text::escape;
use anyhow::{Context, Result};
use hydra_runtime::atomic::write_atomically;
use std::path::Path;

/// The page's name in its folder.
pub const FILE: &str = "report.html";

const STYLE: &str = concat!(include_str!("chart.css"), include_str!("figures.css"), include_str!("page.css"));
/// Our own 11 KB instead of a charting library. Such a library draws on a canvas, which is blank without scripts and to
/// screen readers; these charts are there without the script, print sharply, and share their code with the SVG files.
const SCRIPT: &str = concat!(include_str!("chart.js"), include_str!("page.js"));
/// With fewer sections a list of them is no help.
const FEW_SECTIONS: usize = 3;

/// A report: what was run and what came of it, then sections.
pub struct Page {
    title: String,
    lead: String,
    tiles: String,
    sections: Vec<(String, String)>,
}

impl Page {
    /// A page with its heading, and what was run and what came of it in a sentence or two.
    pub fn new(title: &str, lead: &str) -> Self {
        let lead = format!("<p class=\"lead\">{}</p>\n", escape(lead));
        Self { title: escape(title), lead, tiles: String::new(), sections: Vec::new() }
    }

    /// Adds a key figure: what it is, its value, and a remark.
    pub fn tile(&mut self, name: &str, value: &str, remark: &str) {
        let (name, value, remark) = (escape(name), escape(value), escape(remark));
        self.tiles += &format!("<div><dt>{name}</dt><dd>{value}<small>{remark}</small></dd></div>\n");
    }

    /// Adds a heading and what is under it, in HTML.
    pub fn section(&mut self, title: &str, html: &str) {
        self.sections.push((escape(title), html.to_string()));
    }

    /// Writes the page into a folder.
    pub fn write(&self, out: &Path) -> Result<()> {
        let Self { title, lead, tiles, sections } = self;
        let entry = |(i, (title, _)): (usize, &(String, String))| format!("<a href=\"#s{i}\">{title}</a>\n");
        let entries: String = sections.iter().enumerate().map(entry).collect();
        let contents = match sections.len() > FEW_SECTIONS {
            true => format!("<nav aria-label=\"Sections\">{entries}</nav>\n"),
            false => String::new(),
        };
        let section = |(i, (title, html)): (usize, &(String, String))| {
            format!("<section id=\"s{i}\"><h2>{title}</h2>\n{html}</section>\n")
        };
        let body: String = sections.iter().enumerate().map(section).collect();
        let page = format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
             <title>{title}</title><style>{STYLE}</style></head>\n<body><header><h1>{title}</h1>\n{lead}\
             <dl class=\"tiles\">{tiles}</dl>\n{contents}</header>\n<main>\n{body}</main>\n\
             <footer>hydra {}</footer>\n<script>{SCRIPT}</script></body></html>\n",
            env!("CARGO_PKG_VERSION")
        );
        write_atomically(&out.join(FILE), page.as_bytes()).context("can't write")
    }
}

/// A paragraph of plain text.
pub fn paragraph(text: &str) -> String {
    format!("<p>{}</p>\n", escape(text))
}

/// Command lines, as they can be copied. Short words don't break at their hyphens.
pub fn commands<'c>(lines: impl IntoIterator<Item = &'c str>) -> String {
    const SHORT: usize = 24;
    let part = |part: &str| match part.chars().count() {
        0..=SHORT => format!("<span>{}</span>", escape(part)),
        _ => escape(part),
    };
    let word = |word: &str| word.split_inclusive('=').map(part).collect::<String>();
    let line = |line: &str| {
        let words: Vec<String> = line.split(' ').map(word).collect();
        format!("<pre><code>{}</code></pre>\n", words.join(" "))
    };
    lines.into_iter().map(line).collect()
}

/// Links to pages in folders below this one's, each with its name.
pub fn links(pages: &[(String, String)]) -> String {
    let link =
        |(path, name): &(String, String)| format!("<li><a href=\"{}\">{}</a></li>\n", escape(path), escape(name));
    format!("<ul>\n{}</ul>\n", pages.iter().map(link).collect::<String>())
}

/// Something that is shown on request.
pub fn details(summary: &str, html: &str) -> String {
    format!("<details><summary>{}</summary>\n{html}</details>\n", escape(summary))
}
