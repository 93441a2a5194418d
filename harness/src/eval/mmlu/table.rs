//! Accuracy by subject and group, with standard errors: σ = √(p (1 − p) / (n − 1)) for a proportion, √(Σ σ²) / subjects for a
//! mean over subjects. One question has none, nor has a mean over subjects of which one has one question. In the micro average
//! every question weighs the same, in the macro average every subject. Groups are micro averages, as in the original
//! evaluation.

use super::score::{Outcome, Prediction};
use super::{Asking, Scoring, Style};
use crate::output::printable;
use clap::ValueEnum;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;

const STEM: &str = "abstract_algebra astronomy college_biology college_chemistry college_computer_science \
    college_mathematics college_physics computer_security conceptual_physics electrical_engineering \
    elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science \
    high_school_mathematics high_school_physics high_school_statistics machine_learning";
const HUMANITIES: &str = "formal_logic high_school_european_history high_school_us_history high_school_world_history \
    international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory \
    professional_law world_religions";
const SOCIAL_SCIENCES: &str = "econometrics high_school_geography high_school_government_and_politics \
    high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality \
    professional_psychology public_relations security_studies sociology us_foreign_policy";

/// The four groups of the original evaluation; a subject in none of the first three is in the last.
pub const GROUPS: [(&str, &str); 4] =
    [("STEM", STEM), ("humanities", HUMANITIES), ("social sciences", SOCIAL_SCIENCES), ("other", "")];

/// A number of correct answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Score {
    /// Number of questions.
    pub questions: usize,
    /// Correct answers.
    pub correct: usize,
    /// Share of correct answers.
    pub accuracy: f64,
    /// Its standard error; `None` for one question.
    pub stderr: Option<f64>,
}

impl Score {
    fn add(&mut self, questions: usize, correct: usize) {
        self.questions += questions;
        self.correct += correct;
        self.accuracy = self.correct as f64 / self.questions.max(1) as f64;
        let variance = || self.accuracy * (1.0 - self.accuracy) / (self.questions - 1) as f64;
        self.stderr = (self.questions > 1).then(|| variance().sqrt());
    }
}

/// What `--json` writes.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Accuracy over all questions.
    pub accuracy_micro: f64,
    /// Mean of the subjects' accuracies.
    pub accuracy_macro: f64,
    /// Standard error of `accuracy_micro`; `None` for one question.
    pub stderr: Option<f64>,
    /// Standard error of `accuracy_macro`; `None` if a subject has one question.
    pub stderr_macro: Option<f64>,
    /// Number of questions.
    pub questions: usize,
    /// Exemplars in each prompt.
    pub shots: usize,
    /// letter or cloze.
    pub scoring: Scoring,
    /// Whose prompts, if a style was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub style: Option<Style>,
    /// Which of the two averages the style reports.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weighting: Option<&'static str>,
    /// By group of subjects.
    pub groups: BTreeMap<&'static str, Score>,
    /// By subject.
    pub subjects: BTreeMap<String, Score>,
    /// Wall-clock time of scoring.
    pub seconds: f64,
    /// Number of tokens of the prompts, prefixes counted each time.
    pub tokens: usize,
}

impl Report {
    /// Adds up an outcome.
    pub fn new(outcome: &Outcome, shots: usize, asking: Asking) -> Self {
        let Asking { scoring, style } = asking;
        let mut subjects: BTreeMap<String, Score> = BTreeMap::new();
        let mut micro = Score::default();
        for Prediction { subject, answer, prediction, .. } in &outcome.predictions {
            let correct = usize::from(answer == prediction);
            subjects.entry(subject.clone()).or_default().add(1, correct);
            micro.add(1, correct);
        }
        let mut groups: BTreeMap<&'static str, Score> = BTreeMap::new();
        for (name, score) in &subjects {
            groups.entry(GROUPS[group(name)].0).or_default().add(score.questions, score.correct);
        }
        let count = subjects.len().max(1) as f64;
        let variance: Option<f64> = subjects.values().map(|score| Some(score.stderr?.powi(2))).sum();
        Self {
            accuracy_micro: micro.accuracy,
            accuracy_macro: subjects.values().map(|s| s.accuracy).sum::<f64>() / count,
            stderr: micro.stderr,
            stderr_macro: variance.map(|variance| variance.sqrt() / count),
            questions: micro.questions,
            shots,
            scoring,
            style,
            weighting: style.map(|style| if style.weighs_subjects() { "macro" } else { "micro" }),
            groups,
            subjects,
            seconds: outcome.seconds,
            tokens: outcome.tokens,
        }
    }

    /// A table of subjects, groups and both averages.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, questions: usize, accuracy: f64, stderr: Option<f64>| {
            let (accuracy, stderr) = (100.0 * accuracy, stderr.map(|stderr| format!(" ± {:.2}", 100.0 * stderr)));
            let stderr = stderr.unwrap_or_default();
            writeln!(text, "{name:<38} {questions:>9} {accuracy:>8.2}{stderr}").expect("writing to a string");
        };
        for (name, score) in &self.subjects {
            line(&printable(name), score.questions, score.accuracy, score.stderr);
        }
        for (name, score) in GROUPS.iter().filter_map(|(name, _)| self.groups.get_key_value(name)) {
            line(name, score.questions, score.accuracy, score.stderr);
        }
        line("macro (mean of subjects)", self.questions, self.accuracy_macro, self.stderr_macro);
        line("micro (all questions)", self.questions, self.accuracy_micro, self.stderr);
        if let (Some(style), Some(weighting)) = (self.style, self.weighting) {
            let name = style.to_possible_value().map_or(String::new(), |value| value.get_name().to_string());
            text += &format!("{name} reports the {weighting} average; {} shots\n", self.shots);
        }
        format!("{:<38} {:>9} {:>8} %\n{text}", "subject", "questions", "accuracy")
    }
}

pub fn group(subject: &str) -> usize {
    let has = |(_, names): &(&str, &str)| names.split_whitespace().any(|name| name == subject);
    GROUPS.iter().position(has).unwrap_or(GROUPS.len() - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prediction(subject: &str, answer: char, prediction: char) -> Prediction {
        Prediction { subject: subject.into(), index: 0, answer, prediction, scores: [0.0; 4], greedy: [false; 4] }
    }

    #[test]
    fn groups_have_18_13_12_and_the_other_14_subjects() {
        let sizes = GROUPS.map(|(_, names)| names.split_whitespace().count());
        assert_eq!(sizes, [18, 13, 12, 0]);
        assert_eq!((group("astronomy"), group("anatomy")), (0, 3));
    }

    #[test]
    fn micro_and_macro() {
        let right = prediction("astronomy", 'A', 'A');
        let mut predictions = vec![right.clone(), right.clone(), right, prediction("astronomy", 'A', 'B')];
        predictions.push(prediction("virology", 'C', 'B'));
        let report = Report::new(&Outcome { predictions, tokens: 9, seconds: 1.0 }, 0, Scoring::Letter.into());
        assert_eq!((report.accuracy_micro, report.accuracy_macro), (0.6, 0.375));
        assert!((report.stderr.unwrap() - (0.6f64 * 0.4 / 4.0).sqrt()).abs() < 1e-12);
        let table = report.table();
        assert!(table.contains("STEM") && table.contains("other") && !table.contains("humanities"));
        // One question has no standard error, and the mean of both subjects has none either.
        assert_eq!((report.subjects["virology"].stderr, report.stderr_macro), (None, None));
        assert!(table.contains("75.00 ± 25.00\n") && table.contains(" 0.00\n") && table.contains("37.50\n"), "{table}");
        let mut predictions = vec![prediction("astronomy", 'A', 'A'); 3];
        predictions.extend([prediction("astronomy", 'A', 'B'), prediction("virology", 'C', 'C')]);
        predictions.push(prediction("virology", 'C', 'A'));
        let report = Report::new(&Outcome { predictions, tokens: 9, seconds: 1.0 }, 0, Scoring::Letter.into());
        let want = (0.75f64 * 0.25 / 3.0 + 0.25).sqrt() / 2.0;
        assert!((report.stderr_macro.unwrap() - want).abs() < 1e-12);
        assert_eq!((report.groups["STEM"].correct, report.groups["other"].questions), (3, 2));
    }
}
