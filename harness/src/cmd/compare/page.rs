//! `compare.md`, the charts, and `report.html`.

use crate::compare::results::Results;
use crate::compare::summary::{DIFFERENCE, Row, Summary};
use crate::eval::accuracy::report::Report;
use crate::experiment::scores::{Scores, estimate, interval, percent};
use crate::experiment::tune::{Trial, Tuned};
use crate::output::{self, markdown_table};
use crate::report::{
    self, Axis, Chart, Look, Mean, Means, Page, Series, commands, count, figure, integer, paragraph, row, table,
};
use crate::statistics::{Estimate, Interval};
use anyhow::Result;
use serde_json::Value;
use std::path::Path;

/// Writes all of them.
pub fn write(out: &Path, summary: &Summary<'_>, results: &Results) -> Result<()> {
    output::write(&out.join("compare.md"), &markdown(summary))?;
    let model = report::model_name(summary.about.model);
    let mut page = Page::new(&format!("{} on {model}", count(summary.rows.len(), "run", "runs")), &lead(summary));
    tiles(&mut page, summary);
    let notes: String = summary.notes().iter().map(|note| paragraph(note)).collect();
    page.section("Results", &(main_tables(summary) + &notes));
    let mut figures = Vec::new();
    for (file, means) in means(summary) {
        report::write_means(&out.join(file), &means)?;
        figures.push(means.figure());
    }
    page.section("Means and differences", &row(&figures));
    let training = training(summary, results);
    report::write_chart(&out.join("training.svg"), &training)?;
    page.section("Training", &figure(&training, "", ""));
    if !summary.categories().is_empty() {
        page.section("Held-out loss by category", &category_tables(summary, summary.category_table(), "below", ""));
    }
    if let Some(accuracy) = summary.accuracy_table() {
        page.section(&by_category(summary), &category_tables(summary, accuracy, "above", ", in percentage points"));
    }
    let tried: Vec<Vec<String>> = tried(summary);
    if !tried.is_empty() {
        page.section("Learning rates tried", &table(&TRIED, &tried));
    }
    let repeat = commands(summary.rows.iter().map(|row| row.command.as_str()));
    page.section("Commands that repeat the first seed of each run, with another --out", &repeat);
    page.write(out)
}

/// Heading of the answers' table.
fn by_category(summary: &Summary<'_>) -> String {
    format!("{} by category, %", summary.base.accuracy.map_or("Accuracy", Report::name))
}

const TRIED: [&str; 3] = ["run", "learning rate", "loss on the validation part"];

/// What was run and what came of it.
fn lead(summary: &Summary<'_>) -> String {
    let names: Vec<&str> = summary.rows.iter().map(|row| row.name).collect();
    let loss = |row: &Row<'_>| row.scores.as_ref().map(|scores| scores.loss.mean);
    let finished = summary.rows.iter().filter_map(|row| Some((row, loss(row)?)));
    let best = finished.min_by(|a, b| a.1.total_cmp(&b.1));
    let unclear = |row: &&Row<'_>| row.difference.as_ref().is_some_and(|found| found.loss.holds(0.0));
    let found = best.map_or(String::new(), |(row, loss)| {
        let doubt = match summary.rows.iter().filter(unclear).count() {
            _ if unclear(&row) => "; the interval of its difference from the first run includes 0".to_string(),
            n if n > 0 && row.difference.is_none() => {
                format!("; the intervals of {} include 0", count(n, "other run", "other runs"))
            }
            _ => String::new(),
        };
        format!(" The lowest mean loss on the held-out records is {loss:.4}, of “{}”{doubt}.", row.name)
    });
    format!(
        "Trained on the same records in the same order, and measured on the same held-out records: {}.{found}",
        names.join("; ")
    )
}

fn tiles(page: &mut Page, summary: &Summary<'_>) {
    let file = |value: &Value| report::file_name(value["path"].as_str().unwrap_or_default());
    let about = &summary.about;
    page.tile("Model", &report::model_name(about.model), about.precision.as_str().unwrap_or_default());
    let data: Vec<String> = about.data.iter().map(file).collect();
    page.tile("Training data", &data.join(", "), &format!("measured on {}", file(about.eval_data)));
    page.tile("Runs", &summary.rows.len().to_string(), &count(summary.seeds.len(), "seed each", "seeds each"));
    if let Some(row) = summary.rows.first() {
        page.tile("Steps", &integer(row.steps as u64), &format!("of each run, {} tokens", integer(row.tokens as u64)));
    }
    if let Some(base) = summary.base.loss {
        page.tile("Loss without adapter", &format!("{:.4}", base.all.loss), "held out, nats per token");
    }
    if let Some(accuracy) = summary.base.accuracy {
        let asked = format!("{} questions", integer(accuracy.all.questions as u64));
        page.tile(
            &format!("{} without adapter", accuracy.name()),
            &format!("{:.1} %", 100.0 * accuracy.all.accuracy),
            &asked,
        );
    }
    if let Some(mmlu) = &summary.base.mmlu {
        let asked = format!("{} questions", integer(mmlu.questions as u64));
        page.tile("MMLU without adapter", &format!("{:.1} %", 100.0 * mmlu.micro), &asked);
    }
}

/// The main table in two, losses and answers, so that each fits a screen.
fn main_tables(summary: &Summary<'_>) -> String {
    let (head, lines) = summary.main_table();
    // A difference belongs to the column before it.
    let accuracy = summary.base.accuracy.map(Report::heading);
    let is_answers = |column: usize| {
        let of = if head[column] == DIFFERENCE { column - 1 } else { column };
        head[of].starts_with("MMLU") || accuracy == Some(head[of].as_str())
    };
    let all = || head.iter().enumerate().map(|(column, name)| (name.as_str(), column));
    let losses: Vec<_> = all().filter(|(_, column)| !is_answers(*column)).collect();
    let answers: Vec<_> = all().filter(|(_, column)| *column == 0 || is_answers(*column)).collect();
    let answers = if answers.len() > 1 { columns(&answers, &lines) } else { String::new() };
    columns(&losses, &lines) + &answers
}

/// Losses or accuracies, and differences from the first run in a `unit`; `better` is "above" or "below".
fn category_tables(
    summary: &Summary<'_>,
    (head, lines): (Vec<String>, Vec<Vec<String>>),
    better: &str,
    unit: &str,
) -> String {
    let all = || head.iter().enumerate().map(|(column, name)| (name.as_str(), column));
    let losses: Vec<_> = all().filter(|(name, _)| *name != DIFFERENCE).collect();
    // Each difference under the name of its run, which stands before it.
    let differences = all().filter(|(name, _)| *name == DIFFERENCE);
    let differences: Vec<_> = differences.map(|(_, column)| (head[column - 1].as_str(), column)).collect();
    if differences.is_empty() {
        return columns(&losses, &lines);
    }
    let (first, level) = (summary.rows.first().map_or("", |row| row.name), percent(summary.confidence));
    let differences: Vec<_> = all().take(1).chain(differences).collect();
    columns(&losses, &lines)
        + &paragraph(&format!("Differences from “{first}”{unit}, with {level} % intervals; {better} 0 is better:"))
        + &columns(&differences, &lines)
}

/// A table of some columns, each with its heading.
fn columns(wanted: &[(&str, usize)], lines: &[Vec<String>]) -> String {
    let head: Vec<&str> = wanted.iter().map(|(name, _)| *name).collect();
    let line = |line: &Vec<String>| wanted.iter().map(|(_, column)| line[*column].clone()).collect();
    table(&head, &lines.iter().map(line).collect::<Vec<_>>())
}

fn tried(summary: &Summary<'_>) -> Vec<Vec<String>> {
    let tuned = summary.rows.iter().filter_map(|row| row.tuned);
    let trials = tuned.flat_map(|tuned| tuned.trials.iter().map(move |trial| (tuned, trial)));
    let line = |(tuned, trial): (&Tuned, &Trial)| {
        let chosen = if trial.lr == tuned.lr { " (chosen)" } else { "" };
        let loss = trial.loss.map_or("diverged".to_string(), |loss| format!("{loss:.4}"));
        vec![tuned.run.clone(), format!("{:e}{chosen}", trial.lr), loss]
    };
    trials.map(line).collect()
}

/// Each with the name of its file.
fn means(summary: &Summary<'_>) -> Vec<(&'static str, Means)> {
    let estimated = |pick: &dyn Fn(&Scores<Estimate>) -> Option<Estimate>, factor: f64, decimals: usize| -> Vec<Mean> {
        let mean = |row: &Row<'_>| {
            let found = pick(row.scores.as_ref()?)?;
            let ends = found.stderr.map(|e| (factor * (found.mean - e), factor * (found.mean + e)));
            let text = estimate(&found, factor, decimals);
            Some(Mean { name: row.name.to_string(), mean: factor * found.mean, ends, text })
        };
        summary.rows.iter().filter_map(mean).collect()
    };
    let differing = |pick: &dyn Fn(&Scores<Interval>) -> Option<Interval>, factor: f64, decimals: usize| -> Vec<Mean> {
        let mean = |row: &Row<'_>| {
            let found = pick(row.difference.as_ref()?)?;
            let ends = found.ends.map(|ends| (factor * ends.low, factor * ends.high));
            let text = interval(Some(found), factor, decimals);
            Some(Mean { name: row.name.to_string(), mean: factor * found.mean, ends, text })
        };
        summary.rows.iter().filter_map(mean).collect()
    };
    let means = |title: String, axis: String, rows: Vec<Mean>, origin: Option<f64>| Means { title, axis, rows, origin };
    let first = summary.rows.first().map_or("", |row| row.name);
    let (level, one) = (percent(summary.confidence), summary.seeds.len() == 1);
    let mean = if one { "" } else { ", mean ± standard error" };
    let alone = |items: &str| if one { format!(" over {items} alone") } else { String::new() };
    let losses = estimated(&|scores| Some(scores.loss.clone()), 1.0, 4);
    let mut all = vec![("loss.svg", means("Held-out loss".into(), format!("nats per token{mean}"), losses, None))];
    let difference = differing(&|scores| Some(scores.loss), 1.0, 4);
    if !difference.is_empty() {
        let axis = format!("nats per token, {level} % interval{}; below 0 is better", alone("records"));
        let title = format!("Held-out loss: difference from “{first}”");
        all.push(("loss-difference.svg", means(title, axis, difference, Some(0.0))));
    }
    let mut answers = |what: &str, unit: &str, files: [&'static str; 2], own: Vec<Mean>, difference: Vec<Mean>| {
        all.push((files[0], means(what.to_string(), format!("{unit}{mean}"), own, None)));
        if !difference.is_empty() {
            let axis = format!("percentage points, {level} % interval{}; above 0 is better", alone("questions"));
            all.push((files[1], means(format!("{what}: difference from “{first}”"), axis, difference, Some(0.0))));
        }
    };
    if let Some(accuracy) = summary.base.accuracy {
        let own = estimated(&|scores| scores.accuracy.clone(), 100.0, 2);
        let difference = differing(&|scores| scores.accuracy, 100.0, 2);
        answers(accuracy.name(), accuracy.heading(), ["accuracy.svg", "accuracy-difference.svg"], own, difference);
    }
    if summary.base.mmlu.is_some() {
        let own = estimated(&|scores| scores.mmlu_micro.clone(), 100.0, 2);
        let difference = differing(&|scores| scores.mmlu_micro, 100.0, 2);
        answers("MMLU micro", "right answers, %", ["mmlu.svg", "mmlu-difference.svg"], own, difference);
    }
    all
}

fn training(summary: &Summary<'_>, results: &Results) -> Chart {
    let series = summary.rows.iter().zip(&results.runs).map(|(row, seeds)| {
        let steps = seeds.iter().map(|f| f.details.training.len()).min().unwrap_or(0);
        let mean = |step: usize| seeds.iter().map(|f| f.details.training[step]).sum::<f64>() / seeds.len() as f64;
        Series::new(row.name, Look::Noisy, (0..steps).map(|step| (step as f64 + 1.0, mean(step))).collect())
    });
    let series = series.collect();
    let title = if summary.seeds.len() == 1 { "Training loss" } else { "Training loss, mean over seeds" };
    Chart { title: title.into(), x: Axis::steps(), y: Axis::loss(), series, rule: None }
}

fn markdown(summary: &Summary<'_>) -> String {
    let (head, lines) = summary.main_table();
    let mut text = format!("# Comparison\n\n{}\n", markdown_table(&head, &lines));
    for note in summary.notes() {
        text += &format!("{}\n\n", output::markdown(&note));
    }
    let (head, lines) = summary.category_table();
    if !lines.is_empty() {
        text += &format!("## Held-out loss by category\n\n{}\n", markdown_table(&head, &lines));
    }
    if let Some((head, lines)) = summary.accuracy_table() {
        text += &format!("## {}\n\n{}\n", by_category(summary), markdown_table(&head, &lines));
    }
    let tried = tried(summary);
    if !tried.is_empty() {
        let head = TRIED.map(str::to_owned);
        text += &format!("## Learning rates tried\n\n{}\n", markdown_table(&head, &tried));
    }
    text += "## Commands that repeat the first seed of each run, with another --out\n\n";
    for row in &summary.rows {
        text += &format!("    {}\n", output::escaped(&row.command));
    }
    let of = |row: &Row<'_>| format!("“{}”: {}, {} tokens", row.name, count(row.steps, "step", "steps"), row.tokens);
    let budgets: Vec<String> = summary.rows.iter().map(of).collect();
    text + &format!("\nOf one seed: {}\n", output::markdown(&budgets.join("; ")))
}
