//! The report of one run.

use super::chart::Chart;
use super::figure::{figure, row};
use super::heat::{Routing, heat_maps};
use super::page::{Page, paragraph};
use super::scale::{Axis, Kind};
use super::series::{Look, Series};
use super::table::{pairs, table_with_total};
use super::text::{count, duration, integer, memory, number};
use crate::eval::accuracy::metric::Metric;
use crate::eval::accuracy::report::{Report as Accuracy, Score};
use crate::run::log::{EvalLine, StepLine};
use crate::run::train::Trained;
use anyhow::Result;
use serde_json::{Map, Value};
use std::path::Path;

/// What a run's router does, for its report.
pub struct Router {
    /// Mean weights.
    pub routing: Routing,
    /// The records they are means over, in words.
    pub caption: String,
    /// What it does on the whole, as names and values.
    pub health: Vec<(String, String)>,
    /// What is wrong with it, if something is.
    pub warning: Option<String>,
}

impl Router {
    /// A panel of heat maps, and what they show.
    pub fn html(&self) -> String {
        let title = "Mean router weight by category, layer and head";
        let warning = self.warning.as_ref().map_or(String::new(), |warning| paragraph(&format!("Warning: {warning}.")));
        paragraph(&format!("{} Means over tokens and adapted projections.", self.caption))
            + &warning
            + &pairs(&self.health)
            + &heat_maps(title, &self.routing)
    }

    /// Lines for the terminal.
    pub fn text(&self) -> String {
        let row = |(name, value): &(String, String)| format!("  {name:<26} {value}\n");
        format!("router\n{}", self.health.iter().map(row).collect::<String>())
    }
}

/// What a report says about a run.
pub struct Run<'a> {
    /// What was chosen, by the options' names on the command line.
    pub options: &'a Map<String, Value>,
    /// What the choices led to.
    pub facts: &'a Map<String, Value>,
    /// Steps and measurements.
    pub trained: &'a Trained,
    /// What the router does, where there is one.
    pub router: Option<&'a Router>,
    /// Accuracy on the records of `--accuracy-data`, before and after training.
    pub accuracy: Option<&'a [Accuracy; 2]>,
}

impl Run<'_> {
    /// Writes its page into its folder.
    pub fn write(&self, out: &Path) -> Result<()> {
        let [method, model] = ["method", "model"].map(|key| text(self.options, key));
        let title = format!("{} on {}", method_name(&method), model_name(&model));
        let mut page = Page::new(&title, &self.lead());
        self.tiles(&mut page);
        page.section("Training", &self.curves());
        if let [first, .., last] = self.trained.evals.as_slice() {
            page.section("Held-out loss by category", &categories(first, last));
        }
        if let Some([before, after]) = self.accuracy {
            page.section(&format!("{} by category", before.name()), &answers(before, after));
        }
        if let Some(router) = self.router {
            page.section("Router", &router.html());
        }
        page.section("Settings", &pairs(&settings(self.options)));
        page.section("Details", &pairs(&settings(self.facts)));
        page.write(out)
    }

    /// What was run and what came of it.
    fn lead(&self) -> String {
        let Self { options, facts, trained, .. } = self;
        let (done, wanted) = (trained.steps.len(), facts.get("steps").and_then(Value::as_u64).unwrap_or(0));
        let stopped = if (done as u64) < wanted { format!(" of {}; stopped", integer(wanted)) } else { String::new() };
        let data: Vec<String> = options
            .get("data")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .map(|file| described(file, true))
            .collect();
        let mut lead = format!(
            "{} was trained on {} of {} for {}{stopped}.",
            adapter(options),
            count(facts.get("records").and_then(Value::as_u64).unwrap_or(0) as usize, "record", "records"),
            data.join(", "),
            count(done, "step", "steps"),
        );
        if let [first, .., last] = trained.evals.as_slice() {
            let (before, after) = (first.loss.all, last.loss.all);
            let records = count(before.records, "held-out record", "held-out records");
            let texts = [before.loss, after.loss].map(|loss| format!("{loss:.4}"));
            lead += &format!(" The loss on {records} {}.", went(after.loss < before.loss, &texts));
        }
        if let Some([before, after]) = self.accuracy {
            let texts = [before, after].map(|report| percent(report.all.accuracy, report.all.stderr));
            let went = went(after.all.accuracy < before.all.accuracy, &texts) + " %";
            let questions = count(before.all.questions, "question", "questions");
            lead += &format!(" {} on {questions} {went} (± standard error).", before.name());
        }
        lead
    }

    fn tiles(&self, page: &mut Page) {
        let Self { facts, trained, .. } = self;
        let steps = &trained.steps;
        if let [first, .., last] = trained.evals.as_slice() {
            let (before, after) = (first.loss.all.loss, last.loss.all.loss);
            let change = match before > 0.0 {
                true => format!("{:+.1} %, nats per token", 100.0 * (after / before - 1.0)),
                false => "nats per token".to_string(),
            };
            page.tile("Held-out loss", &format!("{before:.3} → {after:.3}"), &change);
        } else if let [first, .., last] = steps.as_slice() {
            let change = format!("{:.3} → {:.3}", first.loss, last.loss);
            page.tile("Training loss", &change, "first and last step, nats per token");
        }
        if let Some([before, after]) = self.accuracy {
            let [from, to] = [before, after].map(|report| 100.0 * report.all.accuracy);
            let error = after.all.stderr.map_or(String::new(), |stderr| format!("± {:.1} %, ", 100.0 * stderr));
            let remark = error + described_metric(after);
            page.tile(after.name(), &format!("{from:.1} → {to:.1} %"), &remark);
        }
        let fact = |name: &str| facts.get(name).and_then(Value::as_f64);
        if let (Some(trainable), Some(share)) = (fact("trainable_parameters"), fact("trainable_share")) {
            let remark = format!("{:.3} % of all", 100.0 * share);
            page.tile("Trainable parameters", &integer(trainable as u64), &remark);
        }
        let tokens: usize = steps.iter().map(|step| step.tokens).sum();
        let seconds: f64 = steps.iter().map(|step| step.tokens as f64 / step.tokens_per_second).sum();
        page.tile("Steps", &integer(steps.len() as u64), &count(tokens, "token", "tokens"));
        page.tile("Training time", &duration(seconds), "without evaluation and saving");
        if seconds > 0.0 {
            page.tile("Tokens per second", &number(tokens as f64 / seconds), "mean over the steps");
        }
        if let Some(peak) = crate::memory::peak() {
            page.tile("Memory", &memory(peak), "most that was resident, weights included");
        }
    }

    fn curves(&self) -> String {
        let Trained { steps, evals, .. } = self.trained;
        let of = |pick: fn(&StepLine) -> f64| steps.iter().map(|line| (line.step as f64, pick(line))).collect();
        let mut series = vec![Series::new("training", Look::Noisy, of(|line| line.loss))];
        if !evals.is_empty() {
            let points = evals.iter().map(|line| (line.step as f64, line.loss.all.loss)).collect();
            series.push(Series::new("held out", Look::Marks, points));
        }
        let loss = Chart { title: "Loss".into(), x: Axis::steps(), y: Axis::loss(), series, rule: None };
        let small = |title: &str, unit: &str, look: Look, pick: fn(&StepLine) -> f64| {
            let (series, y) = (vec![Series::new(title, look, of(pick))], Axis::new(unit, Kind::Linear));
            figure(&Chart { title: title.into(), x: Axis::steps(), y, series, rule: None }, "small", "steps")
        };
        figure(&loss, "", "steps")
            + &row(&[
                small("Learning rate", "after warm-up and schedule", Look::Line, |line| line.lr),
                small("Gradient norm", "global norm before clipping", Look::Noisy, |line| line.grad_norm),
                small("Throughput", "tokens per second", Look::Noisy, |line| line.tokens_per_second),
            ])
    }
}

fn categories(first: &EvalLine, last: &EvalLine) -> String {
    let row = |name: &str, records: usize, before: f64, after: f64| {
        let change = format!("{:+.4}", after - before);
        vec![name.to_string(), integer(records as u64), format!("{before:.4}"), format!("{after:.4}"), change]
    };
    let (before, after) = (&first.loss, &last.loss);
    let rows = before.categories.iter().filter_map(|(name, loss)| {
        let after = after.categories.get(name)?;
        Some(row(name, loss.records, loss.loss, after.loss))
    });
    let total = row("all", before.all.records, before.all.loss, after.all.loss);
    let head = ["category", "records", "before", "after", "change"];
    table_with_total(&head, &rows.collect::<Vec<_>>(), Some(&total))
}

/// Accuracy before and after, by category.
fn answers(before: &Accuracy, after: &Accuracy) -> String {
    let row = |name: &str, before: &Score, after: &Score| {
        let [from, to] = [before, after].map(|score| percent(score.accuracy, score.stderr));
        let change = format!("{:+.1}", 100.0 * (after.accuracy - before.accuracy));
        vec![name.to_string(), integer(before.questions as u64), from, to, change]
    };
    let rows = before.categories.iter().filter_map(|(name, own)| Some(row(name, own, after.categories.get(name)?)));
    let head = ["category", "questions", "before, %", "after, %", "change"];
    let total = row("all", &before.all, &after.all);
    paragraph(&format!("Means ± standard errors over questions, {}.", described_metric(before)))
        + &table_with_total(&head, &rows.collect::<Vec<_>>(), Some(&total))
}

/// What counts as right, in words.
fn described_metric(report: &Accuracy) -> &'static str {
    match report.metric {
        Metric::Exact => "exact answers",
        Metric::Contains => "answers that contain the right one",
        Metric::F1 => "words in common",
        Metric::Choice => "the likeliest choice",
    }
}

/// "fell from 2.1 to 1.9"; what looks the same has not changed.
fn went(fell: bool, [from, to]: &[String; 2]) -> String {
    match from == to {
        true => format!("stayed at {to}"),
        false => format!("{} from {from} to {to}", if fell { "fell" } else { "rose" }),
    }
}

/// "12.3 ± 0.6"; one question has no standard error.
fn percent(mean: f64, stderr: Option<f64>) -> String {
    let error = stderr.map_or(String::new(), |stderr| format!(" ± {:.1}", 100.0 * stderr));
    format!("{:.1}{error}", 100.0 * mean)
}

/// The method and its size in words: "HydraLoRA (one A and 4 B of rank 4, mixed by a router)".
fn adapter(options: &Map<String, Value>) -> String {
    let [method, gate, rank, heads] = ["method", "gate", "rank", "heads"].map(|key| text(options, key));
    let mixed = match gate.as_str() {
        "router" => "mixed by a learned router for each token",
        "label" => "chosen by each record's label",
        "uniform" => "with equal weights",
        _ => "",
    };
    let size = match method.as_str() {
        "hydra" => format!("one A and {heads} B of rank {rank}, {mixed}"),
        "split" => format!("{heads} pairs of A and B of rank {rank}, {mixed}"),
        _ => format!("rank {rank}"),
    };
    format!("{} ({})", method_name(&method), size.trim_end_matches(", "))
}

/// The name that papers use.
fn method_name(method: &str) -> &str {
    match method {
        "hydra" => "HydraLoRA",
        "lora" => "LoRA",
        "split" => "LoRA-Split",
        other => other,
    }
}

/// Names and values; what is not set is left out.
fn settings(values: &Map<String, Value>) -> Vec<(String, String)> {
    let mut rows = Vec::new();
    for (name, value) in values.iter().filter(|(_, value)| !value.is_null()) {
        match value {
            Value::Object(map) if !map.contains_key("sha256") => {
                let inner = settings(map).into_iter();
                rows.extend(inner.map(|(key, value)| (format!("{name}: {key}"), value)));
            }
            other => rows.push((name.clone(), described(other, false))),
        }
    }
    rows
}

/// A value in words; a file as its name, or with size and digest.
fn described(value: &Value, short: bool) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(all) if all.iter().any(|one| one.is_object() && one.get("sha256").is_none()) => {
            format!("{} entries, in run.json", all.len())
        }
        Value::Array(all) => all.iter().map(|one| described(one, short)).collect::<Vec<_>>().join(", "),
        Value::Object(file) => {
            let path = text(file, "path");
            if short {
                return file_name(&path);
            }
            let bytes = file.get("bytes").and_then(Value::as_u64).unwrap_or(0);
            format!("{path} ({} bytes, SHA-256 {})", integer(bytes), text(file, "sha256"))
        }
        // An f32 that JSON holds as f64 has digits that nobody chose.
        Value::Number(number) if number.is_f64() => {
            number.as_f64().map_or(String::new(), |value| (value as f32).to_string())
        }
        other => other.to_string(),
    }
}

fn text(values: &Map<String, Value>, key: &str) -> String {
    values.get(key).map_or(String::new(), |value| value.as_str().map_or(value.to_string(), str::to_owned))
}

/// The last part of a model's path, and the one before it where it is called "model".
pub fn model_name(path: &str) -> String {
    let (name, parent) = (file_name(path), Path::new(path).parent());
    match parent.and_then(Path::file_name) {
        Some(parent) if name == "model" => format!("{}/{name}", parent.to_string_lossy()),
        _ => name,
    }
}

/// The last part of a path.
pub fn file_name(path: &str) -> String {
    Path::new(path).file_name().map_or(path.to_string(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_not_changed_neither_fell_nor_rose() {
        let said = |before: f64, after: f64| went(after < before, &[before, after].map(|x| format!("{x:.1}")));
        assert_eq!(said(2.0, 1.9), "fell from 2.0 to 1.9");
        assert_eq!(said(1.9, 2.0), "rose from 1.9 to 2.0");
        assert_eq!((said(2.0, 2.0), said(2.01, 2.0)), ("stayed at 2.0".into(), "stayed at 2.0".into()));
        assert_eq!((percent(0.5, Some(0.05)), percent(1.0, None)), ("50.0 ± 5.0".into(), "100.0".into()));
    }
}
