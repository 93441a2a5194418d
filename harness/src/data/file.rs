//! A file's JSON values: one in each line, or the elements of one array. The file may be compressed, or a table (CSV, TSV, Parquet),
//! whose rows are its lines.

use super::compressed::Container;
use super::limit::Limit;
use super::{parquet, table};
use crate::output::printable;
use anyhow::{Context, Result, anyhow, bail};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::Path;

/// What stands in for a large file where Git LFS was not run.
const POINTER: &[u8] = b"version https://git-lfs";

/// Where a file's values are, and the lines that they begin in.
pub type Places = Vec<(usize, Range<usize>)>;

/// A file in memory, and where its values are.
pub struct JsonFile {
    bytes: Vec<u8>,
    items: Places,
}

impl JsonFile {
    /// Reads a file. Fails with file and line if it is an array or a table that can't be parsed; lines are not parsed yet.
    pub fn read(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let Unpacked { container, bytes, limit } = unpacked(path).with_context(|| name.clone())?;
        match table::separator(path) {
            Some(separator) if container != Container::Parquet => {
                let limit = limit.or(Limit::of_compressed(bytes.len() as u64));
                let (bytes, items) = table::json_lines(&bytes, separator, limit, &name)?;
                Ok(Self { bytes, items })
            }
            _ => Self::new(bytes, &name),
        }
    }

    fn new(bytes: Vec<u8>, name: &str) -> Result<Self> {
        let start = if bytes.starts_with(b"\xEF\xBB\xBF") { 3 } else { 0 };
        let first = bytes[start..].iter().find(|byte| !byte.is_ascii_whitespace());
        let items = if first == Some(&b'[') { elements(&bytes, start, name)? } else { lines(&bytes, start) };
        Ok(Self { bytes, items })
    }

    /// The values as text, each with the number of the line that it starts in, from 1.
    pub fn items(&self) -> impl Iterator<Item = (usize, &[u8])> {
        self.items.iter().map(|(line, place)| (*line, &self.bytes[place.clone()]))
    }

    /// The values as lines of a file of JSON lines.
    pub fn json_lines(&self) -> impl Iterator<Item = (usize, Cow<'_, [u8]>)> {
        self.items().map(|(line, value)| {
            let value = value.trim_ascii();
            // In an array, a value may span lines. JSON has no line breaks inside strings.
            match value.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
                true => (line, value.iter().map(|&b| if matches!(b, b'\n' | b'\r') { b' ' } else { b }).collect()),
                false => (line, Cow::Borrowed(value)),
            }
        })
    }

    /// Number of bytes of the whole text.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Where a value of [`JsonFile::items`] starts in the text.
    pub fn offset(&self, value: &[u8]) -> usize {
        value.as_ptr().addr() - self.bytes.as_ptr().addr()
    }
}

/// A file's contents.
pub struct Unpacked {
    container: Container,
    /// Of a Parquet file, its rows as lines of JSON.
    pub bytes: Vec<u8>,
    /// Of what the file may hold.
    limit: Limit,
}

/// What is in a file, unpacked.
pub fn unpacked(path: &Path) -> Result<Unpacked> {
    let file = File::open(path)?;
    let (metadata, mut reader) = (file.metadata()?, BufReader::new(file));
    let (size, limit) = (metadata.len(), Limit::of(&metadata));
    let container = Container::of(reader.fill_buf()?);
    if reader.buffer().starts_with(POINTER) {
        bail!("expected records, found a Git LFS pointer; `git lfs pull` gets the file");
    }
    let bytes = match container {
        Container::Parquet if !metadata.is_file() => {
            bail!("expected a regular file, as a parquet file is read from its end")
        }
        Container::Parquet => parquet::json_lines(path, limit.or(Limit::of_compressed(size)))?,
        Container::Plain => {
            limit.check(size)?;
            container.read(reader, limit)?
        }
        // Of a pipe, the size isn't known.
        _ if !metadata.is_file() => container.read(reader, limit)?,
        _ => container.read(reader, limit.or(Limit::of_compressed(size)))?,
    };
    Ok(Unpacked { container, bytes, limit })
}

/// The lines that aren't blank.
fn lines(bytes: &[u8], start: usize) -> Places {
    let (mut found, mut from) = (Vec::new(), start);
    for (number, line) in (1..).zip(bytes[start..].split(|&b| b == b'\n')) {
        if !line.iter().all(u8::is_ascii_whitespace) {
            found.push((number, from..from + line.len()));
        }
        from += line.len() + 1;
    }
    found
}

/// The elements of an array.
fn elements(bytes: &[u8], start: usize, name: &str) -> Result<Places> {
    let values: Vec<&RawValue> = serde_json::from_slice(&bytes[start..]).map_err(|error| {
        let (line, column, reason) = (error.line(), error.column(), reason(&error));
        anyhow!(
            "{name}:{line}: invalid JSON at column {column}: {reason}; the file starts with [, so it must be one array"
        )
    })?;
    let (mut found, mut line, mut counted) = (Vec::with_capacity(values.len()), 1, start);
    for value in values {
        let value = value.get();
        let at = value.as_ptr().addr() - bytes.as_ptr().addr();
        line += bytes[counted..at].iter().filter(|&&byte| byte == b'\n').count();
        counted = at;
        found.push((line, at..at + value.len()));
    }
    Ok(found)
}

/// serde_json's reason why a line can't be parsed; its line number, always 1, would mislead.
pub fn bad_json(error: &serde_json::Error) -> anyhow::Error {
    let reason = reason(error);
    match error.is_data() {
        true => anyhow!("unexpected JSON at column {}: {reason}", error.column()),
        false => anyhow!("invalid JSON at column {}: {reason}; each line must be one JSON object", error.column()),
    }
}

fn reason(error: &serde_json::Error) -> String {
    let reason = error.to_string();
    printable(reason.split(" at line ").next().unwrap_or(&reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(text: &str) -> Vec<(usize, String)> {
        let file = JsonFile::new(text.as_bytes().to_vec(), "f").unwrap();
        file.items().map(|(line, value)| (line, String::from_utf8(value.to_vec()).unwrap())).collect()
    }

    #[test]
    fn lines_and_arrays() {
        let found = |line: usize, text: &str| (line, text.to_string());
        assert_eq!(items("\u{feff}{}\n\n {\"a\": 1}"), [found(1, "{}"), found(3, " {\"a\": 1}")]);
        assert_eq!(
            items("\u{feff}\n[{},\n {\"a\":\n1}, 2]\n"),
            [found(2, "{}"), found(3, "{\"a\":\n1}"), found(4, "2")]
        );
        assert!(items("[]").is_empty() && items(" \n").is_empty());
        let file = JsonFile::new(b"[{\"a\":\r\n[1]}]".to_vec(), "f").unwrap();
        assert_eq!(file.json_lines().next().unwrap().1.as_ref(), b"{\"a\":  [1]}");
        let error = JsonFile::new(b"[{},\n{]".to_vec(), "f").err().unwrap().to_string();
        assert!(error.starts_with("f:2: invalid JSON at column 2: "), "{error}");
    }
}
