//! Files of records: JSON objects, one per line or in one array, or the rows of a table, in one of the formats of `format.rs`, each
//! with a "category" and a label if the file says so; an empty one is none. All records of a file are of one format.

use super::file::{JsonFile, bad_json};
use super::format::{Content, Format, kind, optional};
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
    /// How it was written.
    pub format: Format,
    /// What it says.
    pub content: Content,
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

/// How a file is read.
#[derive(Clone, Copy, Debug)]
pub struct Reading<'a> {
    /// The field that holds a record's label: a string or a whole number.
    pub label_field: &'a str,
    /// The format of all records, or `None` for the one that their keys tell.
    pub format: Option<Format>,
}

impl Reading<'_> {
    /// With the category as the label.
    pub fn new(format: Option<Format>) -> Self {
        Self { label_field: CATEGORY, format }
    }

    /// Reads a file, and warns about what is unusual. Fails with file and line if a value is no record, and if there is none.
    pub fn read(self, path: &Path) -> Result<Vec<Record>> {
        let (records, remarks) = self.read_with_remarks(path)?;
        remarks.iter().for_each(|remark| warn(remark));
        Ok(records)
    }

    /// Reads several files, one after the other.
    pub fn read_all(self, paths: &[PathBuf]) -> Result<Vec<Record>> {
        let mut all = Vec::new();
        for path in paths {
            all.extend(self.read(path)?);
        }
        Ok(all)
    }

    /// A file's records, and what is unusual about them.
    pub fn read_with_remarks(self, path: &Path) -> Result<(Vec<Record>, Vec<String>)> {
        let name = path.display();
        let file = JsonFile::read(path)?;
        let mut progress = (file.bytes() > LARGE).then(|| Progress::new("bytes", file.bytes() as u64, 0));
        let (mut records, mut twice, mut empty) = (Vec::new(), Unusual::default(), Unusual::default());
        let mut first: Option<(Format, usize)> = None;
        for (number, value) in file.items() {
            let place = format!("{name}:{number}");
            let Object { fields, twice: key } = object(value).with_context(|| place.clone())?;
            let record = self.record(&fields).with_context(|| place.clone())?;
            let (expected, line) = *first.get_or_insert((record.format, number));
            if record.format != expected {
                let found = record.format;
                bail!("{place}: mixed formats in one file: expected {expected}, as in line {line}, found {found}");
            }
            if let Some(key) = key {
                twice.add(format!("first {} in line {number}", printable(&key)));
            }
            if record.content.is_empty() {
                empty.add(format!("first in line {number}"));
            }
            records.push(Record { place, ..record });
            if let Some(progress) = progress.as_mut().filter(|_| records.len() % 1000 == 0) {
                progress.update(file.offset(value) as u64, &format!("reading {name}"));
            }
        }
        if records.is_empty() {
            bail!("{name}: no records");
        }
        let all = records.len();
        let remarks = [
            twice.remark(|n, first| {
                format!("{name}: {n} of {all} records have a key twice ({first}); the last one counts")
            }),
            empty.remark(|n, first| format!("{name}: {n} of {all} records have an empty response ({first})")),
        ];
        Ok((records, remarks.into_iter().flatten().collect()))
    }

    /// The label of an object, if it has one.
    pub fn label(self, object: &Map<String, Value>) -> Result<Option<String>> {
        if self.label_field == CATEGORY { category(object) } else { label(object, self.label_field) }
    }

    /// A record, without its place.
    pub fn record(self, object: &Map<String, Value>) -> Result<Record> {
        let (category, label) = (category(object)?, self.label(object)?);
        let (format, content) = Content::parse(object, self.format)?;
        Ok(Record { format, content, category, label, place: String::new() })
    }
}

/// The files' paths, for errors.
pub fn names(paths: &[PathBuf]) -> String {
    let names: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
    names.join(", ")
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

/// A record's category. Tables have an empty text where there is none.
pub fn category(object: &Map<String, Value>) -> Result<Option<String>> {
    Ok(optional(object, CATEGORY)?.filter(|category| !category.is_empty()))
}

/// What a record says in a field of the user's: a string, or a whole number as one; nothing if the string is empty.
pub fn label(object: &Map<String, Value>, field: &str) -> Result<Option<String>> {
    match object.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone()).filter(|text| !text.is_empty())),
        Some(Value::Number(number)) if !number.is_f64() => Ok(Some(number.to_string())),
        Some(other) => bail!("\"{field}\": expected a string or a whole number, found {}", kind(other)),
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

    fn line(text: &str, label_field: &str) -> Result<Record> {
        let reading = Reading { label_field, format: None };
        reading.record(&object(text.as_bytes())?.fields)
    }

    #[test]
    fn labels_come_from_any_field() {
        let label = |value: &str| {
            let text = format!(r#"{{"instruction":"i","response":"r","category":"k","cluster":{value}}}"#);
            line(&text, "cluster").map(|record| record.label)
        };
        assert_eq!(label("3").unwrap().as_deref(), Some("3"));
        assert_eq!(label(r#""three""#).unwrap().as_deref(), Some("three"));
        assert_eq!([label("null").unwrap(), label("\"\"").unwrap()], [None, None]);
        assert!(label("3.5").unwrap_err().to_string().ends_with("whole number, found a number"));
        assert!(label("[3]").is_err());
        let pair = line(r#"{"prompt":"p","completion":"c","category":"k"}"#, CATEGORY).unwrap();
        assert_eq!((pair.label.as_deref(), pair.category.as_deref()), (Some("k"), Some("k")));
        let record = |label: &str| Record { label: Some(label.into()), ..Record::default() };
        let records = ["10", "b", "2", "a", "2"].map(record);
        assert_eq!(labels(&records), ["2", "10", "a", "b"]);
    }

    #[test]
    fn what_is_no_object() {
        let wrong = |text: &str| line(text, CATEGORY).unwrap_err().to_string();
        assert_eq!(wrong("[1]"), "expected a JSON object, found a list");
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
        let content = Content::parse(&found.fields, None).unwrap().1;
        assert!(matches!(content, Content::Instruction { response, .. } if response == "b"));
        assert!(object(br#"{"prompt":"p","completion":"a"}"#).unwrap().twice.is_none());
    }

    #[test]
    fn one_format_in_a_file() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("f.json");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Reading::new(None).read_with_remarks(&path).map_err(|error| format!("{error:#}"))
        };
        let [pair, dolly] = [r#"{"prompt":"p","completion":"c"}"#, r#"{"instruction":"i","response":"r"}"#];
        assert_eq!(read(&format!("{pair}\n{dolly}")).unwrap().0.len(), 2);
        let (records, _) = read(&format!("[{pair},\n{pair}]")).unwrap();
        assert!(records[1].place.ends_with("f.json:2"));
        let error = read(&format!("{pair}\n{{\"text\":\"t\"}}")).unwrap_err();
        let wanted = "f.json:2: mixed formats in one file: expected instruction, as in line 1, found text";
        assert!(error.ends_with(wanted), "{error}");
    }
}
