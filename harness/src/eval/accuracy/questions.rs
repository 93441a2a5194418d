//! Questions out of files: multiple-choice questions in their own forms, and records in any format that has an answer.

use super::choices::Choices;
use super::metric::Metric;
use crate::data::file::{JsonFile, bad_json};
use crate::data::records::{Reading, Record, category, label};
use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// A question and its answer.
pub struct Question {
    /// File and line.
    pub at: String,
    /// Its category or subject.
    pub category: Option<String>,
    /// The label of its head under the label gate.
    pub label: Option<String>,
    /// What is asked.
    pub ask: Ask,
}

/// What is asked.
pub enum Ask {
    /// A question with choices.
    Choices(Choices),
    /// A record whose answer is compared with a text.
    Record(Record),
}

/// Which questions to take, and what they must have.
pub struct Selection<'a> {
    /// The records' format and label.
    pub reading: Reading<'a>,
    /// The metric that was asked for.
    pub metric: Option<Metric>,
    /// The most questions of each category.
    pub limit: Option<usize>,
}

/// Reads a file, and says which metric it is for: `choice` if its questions have choices, else `exact`, unless one was asked for.
pub fn read(path: &Path, selection: &Selection<'_>) -> Result<(Vec<Question>, Metric)> {
    let name = path.display();
    let file = JsonFile::read(path)?;
    let (mut questions, mut counts) = (Vec::new(), BTreeMap::<Option<String>, usize>::new());
    let mut metric = selection.metric;
    for (number, value) in file.items() {
        let at = format!("{name}:{number}");
        let object: Map<String, Value> =
            serde_json::from_slice(value).map_err(|e| bad_json(&e)).with_context(|| at.clone())?;
        let question = question(&object, selection, metric, &at).with_context(|| at.clone())?;
        metric.get_or_insert(match question.ask {
            Ask::Choices(_) => Metric::Choice,
            Ask::Record(_) => Metric::Exact,
        });
        let count = counts.entry(question.category.clone()).or_default();
        *count += 1;
        if selection.limit.is_none_or(|limit| *count <= limit) {
            questions.push(question);
        }
    }
    match metric {
        Some(metric) if !questions.is_empty() => Ok((questions, metric)),
        _ => bail!("{name}: no questions"),
    }
}

fn question(
    object: &Map<String, Value>,
    selection: &Selection<'_>,
    metric: Option<Metric>,
    at: &str,
) -> Result<Question> {
    let category = match category(object)? {
        None => label(object, "subject")?,
        category => category,
    };
    let choices = Choices::parse(object)?;
    match (choices, metric) {
        (Some(choices), _) => {
            let label = selection.reading.label(object)?;
            Ok(Question { at: at.into(), category, label, ask: Ask::Choices(choices) })
        }
        (None, Some(Metric::Choice)) => {
            bail!("expected a question with choices (as ARC, HellaSwag, PIQA, BoolQ or MMLU have them), found none")
        }
        (None, _) => {
            let record = Record { place: at.into(), ..selection.reading.record(object)? };
            let label = record.label.clone();
            Ok(Question { at: at.into(), category, label, ask: Ask::Record(record) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str, metric: Option<Metric>, limit: Option<usize>) -> Result<(Vec<Question>, Metric), String> {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("q.jsonl");
        std::fs::write(&path, text).unwrap();
        let selection = Selection { reading: Reading::new(None), metric, limit };
        read(&path, &selection).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn the_metric_is_that_of_the_questions() {
        let choices = r#"{"question":"q","choices":["a","b"],"answer":1,"subject":"s"}"#;
        let record = r#"{"prompt":"p","completion":"c","category":"k"}"#;
        let (questions, metric) = lines(choices, None, None).unwrap();
        assert_eq!((metric, questions[0].category.as_deref()), (Metric::Choice, Some("s")));
        assert!(matches!(&questions[0].ask, Ask::Choices(choices) if choices.answer == 1));
        assert_eq!(lines(record, None, None).unwrap().1, Metric::Exact);
        let numbered = choices.replace(r#""s"}"#, "3}");
        assert_eq!(lines(&numbered, None, None).unwrap().0[0].category.as_deref(), Some("3"));
        assert_eq!(lines(choices, Some(Metric::Contains), None).unwrap().1, Metric::Contains);
        let error = lines(&format!("{choices}\n{record}"), None, None).err().unwrap();
        assert!(error.contains("q.jsonl:2: expected a question with choices"), "{error}");
        let many = [record, record, &record.replace("\"k\"", "\"l\"")].join("\n");
        assert_eq!(lines(&many, None, Some(1)).unwrap().0.len(), 2);
        assert!(lines("", None, None).err().unwrap().ends_with("no questions"));
    }
}
