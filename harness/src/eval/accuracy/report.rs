//! Scores overall and by category, with standard errors: the standard deviation of the questions' scores over √n; for the mean
//! over categories, √(Σ σ²) / categories. One question has none, nor has a mean over categories of which one has one question.

use super::answer::{Outcome, Prediction};
use super::metric::Metric;
use crate::output::{printable, text_table};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The mean of some questions' scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Number of questions.
    pub questions: usize,
    /// Mean score.
    pub accuracy: f64,
    /// Its standard error; `None` for one question.
    pub stderr: Option<f64>,
    /// The same by log-likelihood per character.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy_norm: Option<f64>,
    /// Its standard error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stderr_norm: Option<f64>,
}

/// What `--json` writes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// What counts.
    pub metric: Metric,
    /// Over all questions.
    #[serde(flatten)]
    pub all: Score,
    /// Mean of the categories' accuracies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy_macro: Option<f64>,
    /// Its standard error; `None` also where a category has one question.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stderr_macro: Option<f64>,
    /// By category; questions without one count in all alone.
    pub categories: BTreeMap<String, Score>,
    /// Wall-clock time of answering.
    pub seconds: f64,
    /// Tokens of the prompts and answers.
    pub tokens: usize,
}

impl Report {
    /// Adds up an outcome.
    pub fn new(outcome: &Outcome, metric: Metric) -> Self {
        let mut groups: BTreeMap<&String, Vec<&Prediction>> = BTreeMap::new();
        for prediction in &outcome.predictions {
            if let Some(category) = &prediction.category {
                groups.entry(category).or_default().push(prediction);
            }
        }
        let categories: BTreeMap<String, Score> =
            groups.into_iter().map(|(name, own)| (name.clone(), Score::of(own))).collect();
        let count = categories.len() as f64;
        let over = |of: &dyn Fn(&Score) -> f64| categories.values().map(of).sum::<f64>();
        let several = categories.len() > 1;
        let variance: Option<f64> = categories.values().map(|score| Some(score.stderr?.powi(2))).sum();
        Self {
            metric,
            all: Score::of(outcome.predictions.iter().collect()),
            accuracy_macro: several.then(|| over(&|score| score.accuracy) / count),
            stderr_macro: variance.filter(|_| several).map(|variance| variance.sqrt() / count),
            seconds: outcome.seconds,
            tokens: outcome.tokens,
            categories,
        }
    }

    /// Accuracy before and after, a line per category; `after` is of the same questions.
    pub fn table_beside(&self, after: &Self) -> String {
        let rows =
            self.categories.iter().filter_map(|(name, b)| Some((printable(name), b, after.categories.get(name)?)));
        let row = |(name, before, after): (String, &Score, &Score)| {
            let [before_, after] = [before, after].map(|score| value(score.accuracy, score.stderr));
            vec![name, before.questions.to_string(), before_, after]
        };
        let rows: Vec<Vec<String>> = rows.chain([("all".to_string(), &self.all, &after.all)]).map(row).collect();
        text_table(&[self.heading(), "questions", "before", "after"].map(str::to_owned), &rows)
    }

    /// The head of a column of its values.
    pub fn heading(&self) -> &'static str {
        if self.metric == Metric::F1 { "F1 %" } else { "accuracy %" }
    }

    /// What its values are called.
    pub fn name(&self) -> &'static str {
        if self.metric == Metric::F1 { "F1" } else { "Accuracy" }
    }

    /// A line per category, the mean over them and all questions.
    pub fn table(&self) -> String {
        let norm = self.all.accuracy_norm.is_some();
        let mut head = ["category", "questions", self.heading()].map(str::to_owned).to_vec();
        head.extend(norm.then(|| "per character %".to_string()));
        let row = |name: String, score: &Score| {
            let mut cells = vec![name, score.questions.to_string(), value(score.accuracy, score.stderr)];
            let own = score.accuracy_norm.map(|mean| value(mean, score.stderr_norm));
            cells.extend(norm.then(|| own.unwrap_or_else(|| "-".into())));
            cells
        };
        let mut rows: Vec<Vec<String>> =
            self.categories.iter().map(|(name, score)| row(printable(name), score)).collect();
        if let Some(accuracy) = self.accuracy_macro {
            let questions = self.categories.values().map(|score| score.questions).sum();
            let mean = Score { questions, accuracy, stderr: self.stderr_macro, ..Score::default() };
            rows.push(row("macro (mean of categories)".into(), &mean));
        }
        rows.push(row("all".into(), &self.all));
        text_table(&head, &rows)
    }
}

impl Score {
    fn of(predictions: Vec<&Prediction>) -> Self {
        let (accuracy, stderr) = mean(predictions.iter().map(|prediction| prediction.score).collect());
        let norm: Option<Vec<f64>> = predictions.iter().map(|prediction| prediction.score_norm).collect();
        let norm = norm.filter(|norm| !norm.is_empty()).map(mean);
        Self {
            questions: predictions.len(),
            accuracy,
            stderr,
            accuracy_norm: norm.map(|(mean, _)| mean),
            stderr_norm: norm.and_then(|(_, stderr)| stderr),
        }
    }
}

/// "12.34 ± 0.56", in per cent.
fn value(mean: f64, stderr: Option<f64>) -> String {
    // Without an error, its room stays free: columns end with their decimals.
    let error = stderr.map_or(" ".repeat(7), |stderr| format!("± {:.2}", 100.0 * stderr));
    format!("{:.2} {error}", 100.0 * mean)
}

/// A mean and its standard error.
fn mean(scores: Vec<f64>) -> (f64, Option<f64>) {
    let count = scores.len().max(1) as f64;
    let mean = scores.iter().sum::<f64>() / count;
    let squares: f64 = scores.iter().map(|score| (score - mean).powi(2)).sum();
    (mean, (scores.len() > 1).then(|| (squares / (count - 1.0) / count).sqrt()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_and_errors() {
        let one = |category: &str, score: f64| Prediction {
            at: "f:1".into(),
            category: Some(category.into()),
            answer: String::new(),
            prediction: String::new(),
            score,
            score_norm: None,
            log_likelihoods: None,
        };
        let predictions = vec![one("a", 1.0), one("a", 0.0), one("a", 1.0), one("b", 0.0), one("b", 0.0)];
        let report = Report::new(&Outcome { predictions, tokens: 9, seconds: 1.0 }, Metric::Exact);
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        close(report.all.accuracy, 0.4);
        // √(p (1 − p) / (n − 1)), as for a proportion.
        close(report.all.stderr.unwrap(), (0.4 * 0.6 / 4.0f64).sqrt());
        close(report.accuracy_macro.unwrap(), 1.0 / 3.0);
        let third = report.categories["a"].stderr.unwrap();
        close(third, (2.0 / 9.0 / 2.0f64).sqrt());
        close(report.stderr_macro.unwrap(), third / 2.0);
        let table = report.table();
        assert!(table.contains("macro") && table.ends_with("± 24.49\n"), "{table}");
        // A long name widens its column, for all rows.
        let long = one(&"bbh_".repeat(20), 1.0);
        let report = Report::new(&Outcome { predictions: vec![long], tokens: 9, seconds: 1.0 }, Metric::Exact);
        for table in [report.table(), report.table_beside(&report)] {
            let widths: Vec<usize> = table.lines().map(|line| line.chars().count()).collect();
            assert!(widths.iter().all(|&width| width == widths[0]), "{table}");
        }
        let one_each = vec![one("a", 1.0), one("b", 0.0)];
        let report = Report::new(&Outcome { predictions: one_each, tokens: 9, seconds: 1.0 }, Metric::Exact);
        assert_eq!((report.categories["a"].stderr, report.stderr_macro), (None, None));
        let lines: Vec<String> = report.table().lines().map(|line| line.replace("  ", "")).collect();
        assert!(
            lines[1].ends_with("100.00") && lines[3].ends_with("50.00") && lines[4].ends_with("± 50.00"),
            "{lines:?}"
        );
    }
}
