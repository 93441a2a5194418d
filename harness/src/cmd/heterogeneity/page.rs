//! The result for people: a table on the terminal and in Markdown, charts, and `report.html`.

use crate::experiment::scores::{estimate, interval, reading, unlike};
use crate::heterogeneity::outcome::{Outcome, Point, Row};
use crate::output::{self, markdown_table, text_table};
use crate::report::{self, Axis, Chart, Kind, Page, Series, figure, paragraph, row, table};
use crate::statistics::Estimate;
use anyhow::Result;
use serde_json::Value;
use std::path::Path;

/// For a terminal.
pub fn text(outcome: &Outcome<'_>) -> String {
    let (head, lines) = lines(outcome);
    notes(outcome).into_iter().fold(format!("\n{}", text_table(&head, &lines)), |text, note| text + &note + "\n")
}

/// Writes `heterogeneity.md`, the charts and the page.
pub fn write(out: &Path, outcome: &Outcome<'_>) -> Result<()> {
    let (head, lines) = lines(outcome);
    let notes = notes(outcome);
    let said: Vec<String> = notes.iter().map(|note| output::markdown(note)).collect();
    let markdown = format!("# Heterogeneity\n\n{}\n{}\n", markdown_table(&head, &lines), said.join("\n\n"));
    output::write(&out.join("heterogeneity.md"), &markdown)?;
    let model = report::model_name(outcome.model);
    let mut page = Page::new(&format!("Loss and number of categories: {model}"), &lead(outcome));
    tiles(&mut page, outcome);
    let mut figures = Vec::new();
    for (file, title, pick) in CHARTS {
        let chart = chart(outcome, title, pick);
        report::write_chart(&out.join(file), &chart)?;
        figures.push(figure(&chart, "", "categories"));
    }
    page.section("Loss by number of categories", &(row(&figures) + &paragraph(READING)));
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    let notes: String = notes.iter().map(|note| paragraph(note)).collect();
    page.section("Numbers", &(table(&head, &lines) + &notes));
    page.section("Order of the categories", &orders(outcome));
    page.write(out)
}

type Pick = fn(&Point) -> &Option<Estimate>;

const CHARTS: [(&str, &str, Pick); 2] = [
    ("loss.svg", "Loss on all held-out records", |point| &point.loss),
    ("first-category.svg", "Loss on the first category", |point| &point.first_category),
];

const READING: &str = "The loss on all held-out records also falls because more of their categories were seen. The first \
                       category is in every draw, so its loss shows what it costs to share the records with other \
                       categories.";

fn lead(outcome: &Outcome<'_>) -> String {
    format!(
        "{} trained on {} records drawn from {} categories, and measured on the same held-out records each time \
         (Figure 2 of the HydraLoRA paper).",
        listed(&outcome.rows.iter().map(|row| row.name.to_string()).collect::<Vec<_>>()),
        outcome.records,
        listed(&outcome.counts.iter().map(usize::to_string).collect::<Vec<_>>()),
    )
}

/// "1, 2 and 4"
fn listed(all: &[String]) -> String {
    match all {
        [first @ .., last] if !first.is_empty() => format!("{} and {last}", first.join(", ")),
        _ => all.concat(),
    }
}

fn tiles(page: &mut Page, outcome: &Outcome<'_>) {
    let file = |value: &Value| report::file_name(value["path"].as_str().unwrap_or_default());
    page.tile("Model", &report::model_name(outcome.model), outcome.precision.as_str().unwrap_or_default());
    let data: Vec<String> = outcome.data.iter().map(file).collect();
    page.tile("Training records", &outcome.records.to_string(), &format!("in each draw, from {}", data.join(", ")));
    page.tile("Seeds", &outcome.seeds.len().to_string(), "each with its own order of the categories");
    let measured = format!("on {}, nats per token", file(outcome.eval_data));
    page.tile("Loss without adapter", &format!("{:.4}", outcome.base), &measured);
}

fn orders(outcome: &Outcome<'_>) -> String {
    let line = |(seed, order): (&u64, &Vec<&str>)| vec![seed.to_string(), order.join(", ")];
    table(
        &["seed", "categories, in the order in which they join"],
        &outcome.orders.iter().map(line).collect::<Vec<_>>(),
    )
}

fn chart(outcome: &Outcome<'_>, title: &str, pick: Pick) -> Chart {
    let points = |row: &Row<'_>| -> Vec<(f64, f64, Option<f64>)> {
        let there = |point: &Point| {
            let estimate = pick(point).as_ref()?;
            Some((point.categories as f64, estimate.mean, estimate.stderr))
        };
        row.points.iter().filter_map(there).collect()
    };
    let series = outcome.rows.iter().map(|row| Series::with_errors(row.name, &points(row))).collect();
    let x = Axis::new("categories trained on", Kind::Doubling);
    let error = if outcome.seeds.len() == 1 { "" } else { ", mean ± standard error" };
    let y = Axis::new(&format!("cross-entropy, nats per token{error}"), Kind::Linear);
    Chart { title: title.into(), x, y, series, rule: None }
}

fn lines(outcome: &Outcome<'_>) -> (Vec<String>, Vec<Vec<String>>) {
    let head =
        ["run", "categories", "trainable", "loss", "vs first run", "loss on the first category"].map(str::to_owned);
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
    let Outcome { records, base, confidence, .. } = outcome;
    let seeds = match outcome.seeds.len() {
        1 => "one seed: there is no standard error".to_string(),
        n => format!("mean ± standard error over {n} seeds"),
    };
    let mut notes =
        vec![
        format!("{records} training records for each number of categories; {seeds}. Loss without an adapter: \
                 {base:.4} nats per token."),
        "Each seed puts the categories in its own order and draws from the first of them, so the first category is \
         in every draw. The loss on all held-out records also falls because more of their categories were seen; the \
         loss on the first category shows what it costs to share the records with other categories. Standard errors \
         include that seeds begin with different categories."
            .to_string(),
        reading(outcome.seeds.len(), *confidence, "held-out records") + " Both are on the same draws.",
    ];
    for (row, point) in outcome.rows.iter().flat_map(|row| row.points.iter().map(move |point| (row, point))) {
        notes.extend(unlike(&format!("{}, {} categories", row.name, point.categories), &point.trainable_by_seed));
    }
    notes
}
