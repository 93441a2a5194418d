//! Reports and pictures: `report.html`, one self-contained page, and SVG files of the same charts.

mod chart;
mod figure;
mod file;
mod heat;
mod means;
mod page;
mod run;
mod scale;
mod series;
mod table;
mod text;

use anyhow::{Context, Result};
pub use chart::Chart;
pub use figure::{figure, row};
pub use heat::{Routing, heat_maps};
use hydra_runtime::atomic::write_atomically;
pub use means::{Mean, Means};
pub use page::{FILE, Page, commands, details, links, paragraph};
pub use run::{Router, Run, file_name, model_name};
pub use scale::{Axis, Kind};
pub use series::{Look, Series};
use std::path::Path;
pub use table::table;
pub use text::{count, duration, integer, number};

/// Writes a chart as an SVG file.
pub fn write_chart(path: &Path, chart: &Chart) -> Result<()> {
    write_svg(path, &[file::chart(chart, file::WIDTH)])
}

/// Writes means as an SVG file.
pub fn write_means(path: &Path, means: &Means) -> Result<()> {
    write_svg(path, &[file::means(means)])
}

/// Writes a chart and a router's heat maps, side by side, as an SVG file.
pub fn write_chart_and_router(path: &Path, chart: &Chart, title: &str, routing: &Routing) -> Result<()> {
    write_svg(path, &[file::chart(chart, 0.6 * file::WIDTH), file::heat(title, routing)])
}

fn write_svg(path: &Path, panels: &[file::Panel]) -> Result<()> {
    write_atomically(path, file::file(panels).as_bytes()).context("can't write")
}
