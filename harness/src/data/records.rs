//! JSON-lines files of records, one object a line, in one of three schemas:
//!
//! ```text
//! {"instruction", "context"?, "response", "category"?}       databricks-dolly-15k
//! {"instruction", "input"?, "output", "category"?}           Alpaca
//! {"prompt", "completion", "category"?}
//! ```
//! Absent and null optional fields are empty; other fields are ignored, but for one that may be asked for as the label;
//! blank lines are skipped.

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// One example.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// What is asked.
    pub instruction: String,
    /// What it is asked about; may be empty.
    pub input: String,
    /// The answer wanted.
    pub response: String,
    /// Its kind, where the file says.
    pub category: Option<String>,
    /// What names its head under the label gate: the category, or another field.
    pub label: Option<String>,
    /// Its file and line, for errors.
    pub place: String,
}

/// The field that is the label unless another is asked for.
pub const CATEGORY: &str = "category";

/// Reads a file. Fails with the file and line if a line is not a record, and if there is none.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    read_labelled(path, CATEGORY)
}

/// Several files, one after the other, with the label from the field `field`.
pub fn read_all(paths: &[PathBuf], field: &str) -> Result<Vec<Record>> {
    let mut all = Vec::new();
    for path in paths {
        all.extend(read_labelled(path, field)?);
    }
    Ok(all)
}

/// Their paths, for errors.
pub fn names(paths: &[PathBuf]) -> String {
    let names: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
    names.join(", ")
}

/// One, with the label from the field `field`: a string or a whole number.
pub fn read_labelled(path: &Path, field: &str) -> Result<Vec<Record>> {
    let name = path.display();
    let bytes = std::fs::read(path).with_context(|| name.to_string())?;
    let mut records = Vec::new();
    for (number, line) in lines(&bytes) {
        let at = || format!("{name}:{number}");
        let value: Value = serde_json::from_slice(line).map_err(|e| bad_json(&e)).with_context(at)?;
        records.push(Record { place: at(), ..parse(&value, field).with_context(at)? });
    }
    if records.is_empty() {
        bail!("{name}: no records");
    }
    Ok(records)
}

/// Fails if what is there gives its contents only once: a pipe.
pub fn readable_twice(path: &Path) -> Result<()> {
    if std::fs::metadata(path).is_ok_and(|there| !there.is_file()) {
        bail!("{}: not a file; wanted one, as it is read more than once", path.display());
    }
    Ok(())
}

/// A file's lines that aren't blank, numbered from 1, without a byte order mark.
pub fn lines(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    let lines = (1..).zip(bytes.split(|&b| b == b'\n'));
    lines.filter(|(_, line)| !line.iter().all(u8::is_ascii_whitespace))
}

/// serde_json's reason; its line number, always 1, would mislead.
pub fn bad_json(error: &serde_json::Error) -> anyhow::Error {
    let reason = error.to_string();
    let reason = reason.split(" at line ").next().unwrap_or(&reason).to_string();
    let what = if error.is_data() { "not as wanted" } else { "not JSON, an object a line," };
    anyhow::anyhow!("{what} at column {}: {reason}", error.column())
}

fn parse(value: &Value, field: &str) -> Result<Record> {
    let Some(object) = value.as_object() else { bail!("{}, wanted a JSON object", kind(value)) };
    let category = optional(object, CATEGORY)?;
    let label = if field == CATEGORY { category.clone() } else { label(object, field)? };
    let record = if object.contains_key("instruction") {
        let response = ["response", "output"].into_iter().find(|key| object.contains_key(*key));
        let Some(response) = response else { bail!("no \"response\" (or \"output\") beside \"instruction\"") };
        let input = ["context", "input"].into_iter().find(|key| object.contains_key(*key));
        Record {
            instruction: required(object, "instruction")?,
            input: input.map(|key| optional(object, key)).transpose()?.flatten().unwrap_or_default(),
            response: required(object, response)?,
            category,
            label,
            ..Record::default()
        }
    } else if object.contains_key("prompt") {
        let (instruction, response) = (required(object, "prompt")?, required(object, "completion")?);
        Record { instruction, response, category, label, ..Record::default() }
    } else {
        bail!("neither \"instruction\" and \"response\" nor \"prompt\" and \"completion\"");
    };
    Ok(record)
}

fn required(object: &Map<String, Value>, key: &str) -> Result<String> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => bail!("\"{key}\" is {}, wanted a string", kind(other)),
        None => bail!("no \"{key}\""),
    }
}

fn optional(object: &Map<String, Value>, key: &str) -> Result<Option<String>> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(_) => required(object, key).map(Some),
    }
}

fn label(object: &Map<String, Value>, field: &str) -> Result<Option<String>> {
    match object.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(Value::Number(number)) if !number.is_f64() => Ok(Some(number.to_string())),
        Some(other) => bail!("\"{field}\" is {}, wanted a string or a whole number", kind(other)),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The labels that occur, sorted, numbers by their value: position is head under the label gate.
pub fn labels(records: &[Record]) -> Vec<String> {
    let mut all: Vec<String> = records.iter().filter_map(|record| record.label.clone()).collect();
    all.sort_by(|a, b| {
        let number = |text: &str| text.parse::<i64>().ok();
        // Numbers come before words.
        let by_value = number(a).is_none().cmp(&number(b).is_none()).then(number(a).cmp(&number(b)));
        by_value.then_with(|| a.cmp(b))
    });
    all.dedup();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Result<Record> {
        parse(&serde_json::from_str(text).unwrap(), CATEGORY)
    }

    #[test]
    fn labels_come_from_any_field() {
        let label = |value: &str| {
            let text = format!(r#"{{"instruction":"i","response":"r","category":"k","cluster":{value}}}"#);
            parse(&serde_json::from_str(&text).unwrap(), "cluster").map(|record| record.label)
        };
        assert_eq!(label("3").unwrap().as_deref(), Some("3"));
        assert_eq!(label(r#""three""#).unwrap().as_deref(), Some("three"));
        assert_eq!(label("null").unwrap(), None);
        assert!(label("3.5").unwrap_err().to_string().contains("\"cluster\" is a number"));
        assert!(label("[3]").is_err());
        assert_eq!(line(r#"{"prompt":"p","completion":"c","category":"k"}"#).unwrap().label.as_deref(), Some("k"));
        let record = |label: &str| Record { label: Some(label.into()), ..Record::default() };
        let records = ["10", "b", "2", "a", "2"].map(record);
        assert_eq!(labels(&records), ["2", "10", "a", "b"]);
    }

    #[test]
    fn three_schemas() {
        let dolly = line(r#"{"instruction":"i","context":"c","response":"r","category":"k"}"#).unwrap();
        assert_eq!((dolly.input.as_str(), dolly.category.as_deref()), ("c", Some("k")));
        let alpaca = line(r#"{"instruction":"i","input":null,"output":"o"}"#).unwrap();
        assert_eq!((alpaca.input.as_str(), alpaca.response.as_str()), ("", "o"));
        let pair = line(r#"{"prompt":"p","completion":"c","else":3}"#).unwrap();
        assert_eq!((pair.instruction.as_str(), pair.response.as_str()), ("p", "c"));
    }

    #[test]
    fn what_is_missing_is_named() {
        let wrong = |text| format!("{:#}", line(text).unwrap_err());
        assert_eq!(wrong("[]"), "a list, wanted a JSON object");
        assert!(wrong(r#"{"instruction":"i"}"#).contains("\"response\""));
        assert!(wrong(r#"{"prompt":"i"}"#).contains("\"completion\""));
        assert_eq!(wrong(r#"{"instruction":"i","response":3}"#), "\"response\" is a number, wanted a string");
        assert!(wrong(r#"{"text":"i"}"#).contains("neither"));
    }
}
