//! The curves for people: a table on the terminal and in Markdown, plots, `report.html`.

use crate::experiment::scores::{estimate, interval, unlike};
use crate::heterogeneity::outcome::{Outcome, Point, Row};
use crate::output::{self, markdown_table, text_table};
use crate::report::{self, Curve, curves_with_errors, escape, section, table};
use crate::statistics::Estimate;
use anyhow::Result;
use std::path::Path;

/// For a terminal.
pub fn text(outcome: &Outcome<'_>) -> String {
    let (head, lines) = lines(outcome);
    notes(outcome).into_iter().fold(format!("\n{}", text_table(&head, &lines)), |text, note| text + &note + "\n")
}

/// All files.
pub fn write(out: &Path, outcome: &Outcome<'_>) -> Result<()> {
    let (head, lines) = lines(outcome);
    let notes = notes(outcome);
    let markdown = format!("# Heterogeneity\n\n{}\n{}\n", markdown_table(&head, &lines), notes.join("\n\n"));
    output::write(&out.join("heterogeneity.md"), &markdown)?;
    let mut body = String::new();
    for (file, title, pick) in PICTURES {
        let svg = picture(outcome, pick);
        report::write_svg(&out.join(file), &svg)?;
        body += &section(title, &svg);
    }
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    let notes: String = notes.iter().map(|note| format!("<p>{}</p>\n", escape(note))).collect();
    body += &section("The figures", &(table(&head, &lines) + &notes));
    report::write(out, "Hydra heterogeneity", &body)
}

type Pick = fn(&Point) -> &Option<Estimate>;

const PICTURES: [(&str, &str, Pick); 2] = [
    ("loss.svg", "Loss on all held-out records by number of categories trained on", |point| &point.loss),
    ("first-category.svg", "Loss on the first category by number of categories trained on", |point| {
        &point.first_category
    }),
];

fn picture(outcome: &Outcome<'_>, pick: Pick) -> String {
    let there = |row: &Row<'_>| -> Vec<(f64, Estimate)> {
        row.points.iter().filter_map(|point| Some((point.categories as f64, pick(point).clone()?))).collect()
    };
    let rows: Vec<(&str, Vec<(f64, Estimate)>)> = outcome.rows.iter().map(|row| (row.name, there(row))).collect();
    let curves: Vec<Curve> = rows
        .iter()
        .map(|(name, points)| Curve {
            name: name.to_string(),
            points: points.iter().map(|(x, e)| (*x, e.mean)).collect(),
        })
        .collect();
    let errors: Vec<Vec<Option<f64>>> =
        rows.iter().map(|(_, points)| points.iter().map(|(_, e)| e.stderr).collect()).collect();
    curves_with_errors(&curves, &errors)
}

fn lines(outcome: &Outcome<'_>) -> (Vec<String>, Vec<Vec<String>>) {
    let head =
        ["run", "categories", "trainable", "loss", "to the first run", "loss on the first category"].map(str::to_owned);
    let mut lines = Vec::new();
    for (i, row) in outcome.rows.iter().enumerate() {
        for point in &row.points {
            let text = |e: &Option<Estimate>, none: &str| e.as_ref().map_or(none.to_string(), |e| estimate(e, 1.0, 4));
            let difference = if i == 0 { "–".to_string() } else { interval(point.difference, 1.0, 4) };
            let (loss, first) = (text(&point.loss, "diverged"), text(&point.first_category, "–"));
            let (count, trainable) = (point.categories.to_string(), point.trainable.to_string());
            lines.push(vec![row.name.to_string(), count, trainable, loss, difference, first]);
        }
    }
    (head.to_vec(), lines)
}

fn notes(outcome: &Outcome<'_>) -> Vec<String> {
    let Outcome { records, base, bootstrap, .. } = outcome;
    let seeds = match outcome.seeds.len() {
        1 => "one seed: there is no standard error".to_string(),
        n => format!("mean ± standard error over {n} seeds"),
    };
    let mut notes = vec![
        format!("{records} records of each number of categories; {seeds}. Without an adapter the loss is {base:.4}."),
        "Each seed has its own order of the categories and draws from the first of them; the first category is in every draw. The loss \
         on all held-out records has the gain of having seen more of their categories in it; that on the first category shows what it \
         is to share the records with others."
            .to_string(),
        format!(
            "“To the first run” is the paired difference on the same draws, with the {} % interval of {} bootstrap draws.",
            100.0 * bootstrap.level,
            bootstrap.samples
        ),
    ];
    for (row, point) in outcome.rows.iter().flat_map(|row| row.points.iter().map(move |point| (row, point))) {
        notes.extend(unlike(&format!("{}, {} categories", row.name, point.categories), &point.trainable_by_seed));
    }
    notes
}
