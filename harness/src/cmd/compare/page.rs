//! `compare.md`, the plots, and `report.html`.

use crate::compare::results::Results;
use crate::compare::summary::{Row, Summary};
use crate::output::{self, markdown_table};
use crate::report::{self, Curve, Dot, curves, dots, escape, section, table};
use crate::statistics::{Estimate, Interval};
use anyhow::Result;
use std::path::Path;

/// Writes all of them.
pub fn write(out: &Path, summary: &Summary<'_>, results: &Results) -> Result<()> {
    output::write(&out.join("compare.md"), &markdown(summary))?;
    let mut body = String::new();
    let (head, lines) = summary.main_table();
    body += &section("The runs", &(html_table(&head, &lines) + &paragraphs(&summary.notes())));
    for (file, title, svg) in pictures(summary, results) {
        report::write_svg(&out.join(file), &svg)?;
        body += &section(title, &svg);
    }
    let (head, lines) = summary.category_table();
    if !lines.is_empty() {
        body += &section("Held-out loss by category", &html_table(&head, &lines));
    }
    let tried: Vec<Vec<String>> = tried(summary);
    if !tried.is_empty() {
        body += &section("Learning rates tried", &table(&["run", "lr", "loss on the part kept apart"], &tried));
    }
    let commands = summary.rows.iter().map(|row| format!("<p><code>{}</code></p>", escape(&row.command)));
    body += &section("The first seed of each by hand, with another --out", &commands.collect::<String>());
    report::write(out, "Hydra compare", &body)
}

fn html_table(head: &[String], lines: &[Vec<String>]) -> String {
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    table(&head, lines)
}

fn paragraphs(notes: &[String]) -> String {
    notes.iter().map(|note| format!("<p>{}</p>\n", escape(note))).collect()
}

fn tried(summary: &Summary<'_>) -> Vec<Vec<String>> {
    let tuned = summary.rows.iter().filter_map(|row| row.tuned);
    let trials = tuned.flat_map(|tuned| tuned.trials.iter().map(move |trial| (tuned, trial)));
    let line = |(tuned, trial): (&crate::experiment::tune::Tuned, &crate::experiment::tune::Trial)| {
        let chosen = if trial.lr == tuned.lr { " (chosen)" } else { "" };
        let loss = trial.loss.map_or("diverged".to_string(), |loss| format!("{loss:.4}"));
        vec![tuned.run.clone(), format!("{:e}{chosen}", trial.lr), loss]
    };
    trials.map(line).collect()
}

/// File, title, picture.
fn pictures(summary: &Summary<'_>, results: &Results) -> Vec<(&'static str, &'static str, String)> {
    let rows = || summary.rows.iter();
    let of = |pick: &dyn Fn(&Row<'_>) -> Option<Estimate>, factor: f64| -> Vec<Dot> {
        let dot = |row: &Row<'_>| {
            let estimate = pick(row)?;
            let ends = estimate.stderr.map(|e| (factor * (estimate.mean - e), factor * (estimate.mean + e)));
            Some(Dot { name: row.name.to_string(), mean: factor * estimate.mean, ends })
        };
        rows().filter_map(dot).collect()
    };
    let between = |pick: &dyn Fn(&Row<'_>) -> Option<Interval>, factor: f64| -> Vec<Dot> {
        let dot = |row: &Row<'_>| {
            let Interval { mean, low, high } = pick(row)?;
            Some(Dot { name: row.name.to_string(), mean: factor * mean, ends: Some((factor * low, factor * high)) })
        };
        rows().filter_map(dot).collect()
    };
    let mut pictures = vec![(
        "loss.svg",
        "Held-out loss, mean ± standard error",
        dots(&of(&|row| Some(row.scores.as_ref()?.loss.clone()), 1.0), None),
    )];
    let difference = between(&|row| Some(row.difference.as_ref()?.loss), 1.0);
    if !difference.is_empty() {
        pictures.push((
            "loss-difference.svg",
            "Held-out loss less that of the first run, with the interval",
            dots(&difference, Some(0.0)),
        ));
    }
    if summary.base.mmlu.is_some() {
        let micro = of(&|row| row.scores.as_ref()?.mmlu_micro.clone(), 100.0);
        pictures.push(("mmlu.svg", "MMLU micro %, mean ± standard error", dots(&micro, None)));
        let difference = between(&|row| row.difference.as_ref()?.mmlu_micro, 100.0);
        if !difference.is_empty() {
            pictures.push((
                "mmlu-difference.svg",
                "MMLU micro % less that of the first run, with the interval",
                dots(&difference, Some(0.0)),
            ));
        }
    }
    let training: Vec<Curve> = rows()
        .zip(&results.runs)
        .map(|(row, seeds)| {
            let steps = seeds.iter().map(|f| f.details.training.len()).min().unwrap_or(0);
            let mean = |step: usize| seeds.iter().map(|f| f.details.training[step]).sum::<f64>() / seeds.len() as f64;
            Curve {
                name: row.name.to_string(),
                points: (0..steps).map(|step| (step as f64 + 1.0, mean(step))).collect(),
            }
        })
        .collect();
    pictures.push(("training.svg", "Training loss by step, mean over seeds", curves(&training)));
    pictures
}

fn markdown(summary: &Summary<'_>) -> String {
    let (head, lines) = summary.main_table();
    let mut text = format!("# Comparison\n\n{}\n", markdown_table(&head, &lines));
    for note in summary.notes() {
        text += &format!("{note}\n\n");
    }
    let (head, lines) = summary.category_table();
    if !lines.is_empty() {
        text += &format!("## Held-out loss by category\n\n{}\n", markdown_table(&head, &lines));
    }
    let tried = tried(summary);
    if !tried.is_empty() {
        let head = ["run", "lr", "loss on the part kept apart"].map(str::to_owned);
        text += &format!("## Learning rates tried\n\n{}\n", markdown_table(&head, &tried));
    }
    text += "## The first seed of each by hand, with another --out\n\n";
    for row in &summary.rows {
        text += &format!("    {}\n", output::printable(&row.command));
    }
    let tokens = summary.rows.iter().map(|row| format!("{}: {} steps, {} tokens", row.name, row.steps, row.tokens));
    text + &format!("\n{}\n", tokens.collect::<Vec<_>>().join("; "))
}
