//! JSON-lines files of records, one object per line, in one of three schemas:
//!
//! ```text
//! {"instruction", "context"?, "response", "category"?}       databricks-dolly-15k
//! {"instruction", "input"?, "output", "category"?}           Alpaca
//! {"prompt", "completion", "category"?}
//! ```
//! Absent and null optional fields are empty; blank lines are skipped; other fields are ignored, except the one that holds the
//! label.

use crate::output::{printable, warn};
use crate::progress::Progress;
use anyhow::{Context, Result, bail};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value};
use std::fmt;
use std::path::{Path, PathBuf};

/// One example.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// What is asked.
    pub instruction: String,
    /// What it is asked about; may be empty.
    pub input: String,
    /// The answer to learn.
    pub response: String,
    /// Its category, if the file says.
    pub category: Option<String>,
    /// What selects its head under the label gate: the category, or another field.
    pub label: Option<String>,
    /// Its file and line, for errors.
    pub place: String,
}

/// The field that holds the label, unless another is asked for.
pub const CATEGORY: &str = "category";

/// Files larger than this many bytes are read with a progress bar.
const LARGE: usize = 8 << 20;

/// Reads a file. Fails with file and line if a line is not a record, and if there is none.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    read_labelled(path, CATEGORY)
}

/// Reads several files, one after the other, with the label from the field `field`.
pub fn read_all(paths: &[PathBuf], field: &str) -> Result<Vec<Record>> {
    let mut all = Vec::new();
    for path in paths {
        all.extend(read_labelled(path, field)?);
    }
    Ok(all)
}

/// The files' paths, for errors.
pub fn names(paths: &[PathBuf]) -> String {
    let names: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
    names.join(", ")
}

/// Reads a file, with the label from the field `field`: a string or a whole number. Warns about what is unusual.
pub fn read_labelled(path: &Path, field: &str) -> Result<Vec<Record>> {
    let (records, remarks) = read_with_remarks(path, field)?;
    remarks.iter().for_each(|remark| warn(remark));
    Ok(records)
}

/// The same, with what is unusual.
pub fn read_with_remarks(path: &Path, field: &str) -> Result<(Vec<Record>, Vec<String>)> {
    let name = path.display();
    let bytes = std::fs::read(path).with_context(|| name.to_string())?;
    let mut progress = (bytes.len() > LARGE).then(|| Progress::new("bytes", bytes.len() as u64, 0));
    let (mut records, mut twice, mut empty) = (Vec::new(), Unusual::default(), Unusual::default());
    for (number, line) in lines(&bytes) {
        let place = format!("{name}:{number}");
        let Object { fields, twice: key } = object(line).with_context(|| place.clone())?;
        let record = Record { place, ..parse(&fields, field).with_context(|| format!("{name}:{number}"))? };
        if let Some(key) = key {
            twice.add(format!("first {} in line {number}", printable(&key)));
        }
        if record.response.is_empty() {
            empty.add(format!("first in line {number}"));
        }
        records.push(record);
        if let Some(progress) = progress.as_mut().filter(|_| records.len() % 1000 == 0) {
            let read = line.as_ptr().addr() - bytes.as_ptr().addr();
            progress.update(read as u64, &format!("reading {name}"));
        }
    }
    if records.is_empty() {
        bail!("{name}: no records");
    }
    let all = records.len();
    let remarks = [
        twice
            .remark(|n, first| format!("{name}: {n} of {all} records have a key twice ({first}); the last one counts")),
        empty.remark(|n, first| format!("{name}: {n} of {all} records have an empty response ({first})")),
    ];
    Ok((records, remarks.into_iter().flatten().collect()))
}

/// What is unusual about some of the records.
#[derive(Default)]
struct Unusual {
    records: usize,
    first: String,
}

impl Unusual {
    fn add(&mut self, what: String) {
        if self.records == 0 {
            self.first = what;
        }
        self.records += 1;
    }

    fn remark(self, text: impl Fn(usize, &str) -> String) -> Option<String> {
        (self.records > 0).then(|| text(self.records, &self.first))
    }
}

/// Fails for what gives its contents only once, such as a pipe.
pub fn readable_twice(path: &Path) -> Result<()> {
    if std::fs::metadata(path).is_ok_and(|there| !there.is_file()) {
        bail!("{}: expected a regular file, as it is read more than once", path.display());
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
    let reason = printable(reason.split(" at line ").next().unwrap_or(&reason));
    match error.is_data() {
        true => anyhow::anyhow!("unexpected JSON at column {}: {reason}", error.column()),
        false => {
            anyhow::anyhow!("invalid JSON at column {}: {reason}; each line must be one JSON object", error.column())
        }
    }
}

/// A line's object, and a key that it has twice.
struct Object {
    fields: Map<String, Value>,
    twice: Option<String>,
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut object = Object { fields: Map::new(), twice: None };
                while let Some((key, value)) = map.next_entry::<String, Value>()? {
                    if object.fields.insert(key.clone(), value).is_some() {
                        object.twice.get_or_insert(key);
                    }
                }
                Ok(object)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

fn object(line: &[u8]) -> Result<Object> {
    serde_json::from_slice(line).map_err(|error| match serde_json::from_slice::<Value>(line) {
        Ok(value) => anyhow::anyhow!("expected a JSON object, found {}", kind(&value)),
        Err(_) => bad_json(&error),
    })
}

fn parse(object: &Map<String, Value>, field: &str) -> Result<Record> {
    let category = optional(object, CATEGORY)?;
    let label = if field == CATEGORY { category.clone() } else { label(object, field)? };
    let record = if object.contains_key("instruction") {
        let response = ["response", "output"].into_iter().find(|key| object.contains_key(*key));
        let Some(response) = response else { bail!("expected \"response\" or \"output\" beside \"instruction\"") };
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
        bail!("expected \"instruction\" and \"response\", or \"prompt\" and \"completion\"");
    };
    Ok(record)
}

fn required(object: &Map<String, Value>, key: &str) -> Result<String> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => bail!("\"{key}\": expected a string, found {}", kind(other)),
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
        Some(other) => bail!("\"{field}\": expected a string or a whole number, found {}", kind(other)),
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

/// All labels, sorted, numbers by their value and before words. Under the label gate, the label at position e has head e.
pub fn labels(records: &[Record]) -> Vec<String> {
    let mut all: Vec<String> = records.iter().filter_map(|record| record.label.clone()).collect();
    all.sort_by(|a, b| {
        let number = |text: &str| text.parse::<i64>().ok();
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
        parse(&object(text.as_bytes())?.fields, CATEGORY)
    }

    #[test]
    fn labels_come_from_any_field() {
        let label = |value: &str| {
            let text = format!(r#"{{"instruction":"i","response":"r","category":"k","cluster":{value}}}"#);
            parse(&object(text.as_bytes()).unwrap().fields, "cluster").map(|record| record.label)
        };
        assert_eq!(label("3").unwrap().as_deref(), Some("3"));
        assert_eq!(label(r#""three""#).unwrap().as_deref(), Some("three"));
        assert_eq!(label("null").unwrap(), None);
        assert!(label("3.5").unwrap_err().to_string().ends_with("whole number, found a number"));
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
    fn errors_name_what_is_expected() {
        let wrong = |text| format!("{:#}", line(text).unwrap_err());
        assert_eq!(wrong("[]"), "expected a JSON object, found a list");
        assert_eq!(wrong(r#"{"instruction":"i"}"#), r#"expected "response" or "output" beside "instruction""#);
        assert_eq!(wrong(r#"{"prompt":"i"}"#), r#"no "completion""#);
        assert_eq!(wrong(r#"{"instruction":"i","response":3}"#), r#""response": expected a string, found a number"#);
        assert!(wrong(r#"{"text":"i"}"#).starts_with(r#"expected "instruction" and "response""#));
        let cut = wrong(r#"{"instruction": "x""#);
        assert!(
            cut.starts_with("invalid JSON at column 19: ") && cut.ends_with("each line must be one JSON object"),
            "{cut}"
        );
    }

    #[test]
    fn the_last_of_two_equal_keys_counts() {
        let found = object(br#"{"prompt":"p","completion":"a","completion":"b"}"#).unwrap();
        assert_eq!(found.twice.as_deref(), Some("completion"));
        assert_eq!(parse(&found.fields, CATEGORY).unwrap().response, "b");
        assert!(object(br#"{"prompt":"p","completion":"a"}"#).unwrap().twice.is_none());
    }
}
