//! Tables of text as RFC 4180 has them: CSV, and TSV with a tab in the comma's place. Which of them a file is, its name tells.
//!
//! A field that begins with a quote ends with one, may have line breaks and separators in it, and has its own quotes doubled;
//! in other fields quotes are text. Lines end in LF or CRLF, and blank ones are none.

use super::file::Places;
use super::limit::Limit;
use crate::output::printable;
use anyhow::{Context, Result, bail};
use csv::{ReaderBuilder, StringRecord};
use serde::Serializer as _;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A file's name without what says that it is compressed.
pub fn unpacked_name(name: &Path) -> PathBuf {
    if has_extension(name, &["gz", "zst"]) { name.with_extension("") } else { name.into() }
}

/// Whether a name ends in one of these, in small or large letters.
pub fn has_extension(name: &Path, any: &[&str]) -> bool {
    let extension = name.extension().unwrap_or_default();
    any.iter().any(|one| extension.eq_ignore_ascii_case(one))
}

/// What is between the fields of a file of this name, compressed or not; `None` if it is no table.
pub fn separator(name: &Path) -> Option<char> {
    let name = unpacked_name(name);
    [("csv", ','), ("tsv", '\t')].into_iter().find_map(|(own, between)| has_extension(&name, &[own]).then_some(between))
}

/// The rows of a table, each with the number of the line that it begins in, from 1. `name` is the file's, for errors.
pub fn rows<'t>(
    bytes: &'t [u8],
    separator: char,
    name: &'t str,
) -> Result<impl Iterator<Item = Result<(usize, StringRecord)>> + 't> {
    let text = text(bytes, name)?;
    check_quotes(text, separator, name)?;
    let mut reader = ReaderBuilder::new();
    reader.has_headers(false).flexible(true).delimiter(separator as u8);
    let (mut line, mut counted) = (1, 0);
    Ok(reader.from_reader(text.as_bytes()).into_records().map(move |row| {
        let row = row.with_context(|| name.to_string())?;
        // Line breaks before it belong to the place that the reader gives.
        let from = row.position().map_or(0, csv::Position::byte) as usize;
        let at = text.len() - text[from..].trim_start_matches(['\r', '\n']).len();
        line += text[counted..at].matches('\n').count();
        counted = at;
        Ok((line, row))
    }))
}

/// The rows below the first one, which names the columns, as lines of JSON: objects of texts. Also where they are, and the lines
/// that they begin in. Columns without a name are left out.
pub fn json_lines(bytes: &[u8], separator: char, limit: Limit, name: &str) -> Result<(Vec<u8>, Places)> {
    let mut rows = rows(bytes, separator, name)?;
    let Some(header) = rows.next() else {
        bail!("{name}: expected a first row with the columns' names, found an empty file")
    };
    let (first, header) = header?;
    let columns: Vec<&str> = header.iter().map(str::trim).collect();
    let mut known = BTreeSet::new();
    if let Some(twice) = columns.iter().find(|column| !column.is_empty() && !known.insert(**column)) {
        bail!("{name}:{first}: expected a name of its own for each column, found \"{}\" twice", printable(twice));
    }
    let (mut lines, mut places) = (Vec::new(), Vec::new());
    for row in rows {
        let (line, row) = row?;
        if row.len() != columns.len() {
            let (expected, found) = (columns.len(), row.len());
            bail!("{name}:{line}: expected {expected} fields, as in line {first}, found {found}");
        }
        let (start, fields) = (lines.len(), columns.iter().zip(&row).filter(|(column, _)| !column.is_empty()));
        serde_json::Serializer::new(&mut lines).collect_map(fields)?;
        places.push((line, start..lines.len()));
        lines.push(b'\n');
        limit.check(lines.len() as u64).with_context(|| format!("{name}:{line}"))?;
    }
    Ok((lines, places))
}

/// The text without a byte-order mark.
fn text<'t>(bytes: &'t [u8], name: &str) -> Result<&'t str> {
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(error) => {
            let (before, after) = bytes.split_at(error.valid_up_to());
            let line = 1 + before.iter().filter(|&&byte| byte == b'\n').count();
            bail!("{name}:{line}: expected UTF-8, found byte {:#04X}", after[0])
        }
    }
}

/// Fails for a quoted field that isn't closed, or goes on behind its end: the crate csv takes both, and guesses.
fn check_quotes(text: &str, separator: char, name: &str) -> Result<()> {
    let (mut line, mut begins, mut rest) = (1, true, text.chars().peekable());
    while let Some(c) = rest.next() {
        if c == '"' && begins {
            let opened = line;
            loop {
                match rest.next() {
                    Some('"') if rest.next_if_eq(&'"').is_none() => break,
                    Some(c) => line += usize::from(c == '\n'),
                    None => bail!("{name}:{opened}: expected a quote that closes the field, found the file's end"),
                }
            }
            if let Some(c) = rest.peek().filter(|&&c| c != separator && c != '\r' && c != '\n') {
                bail!("{name}:{line}: expected {separator:?} or the line's end behind a closing quote, found {c:?}");
            }
        }
        line += usize::from(c == '\n');
        begins = [separator, '\r', '\n'].contains(&c);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY: Limit = Limit { bytes: 1 << 20, why: "" };

    /// The lines of JSON, each behind its number.
    fn lines(text: &str, separator: char) -> Result<Vec<String>, String> {
        let (json, places) = json_lines(text.as_bytes(), separator, ANY, "f").map_err(|error| format!("{error:#}"))?;
        let json = String::from_utf8(json).unwrap();
        Ok(places.into_iter().map(|(line, place)| format!("{line} {}", &json[place])).collect())
    }

    #[test]
    fn names_tell() {
        for (name, wanted) in [
            ("a.csv", Some(',')),
            ("b/a.TSV", Some('\t')),
            ("a.csv.gz", Some(',')),
            ("a.tsv.zst", Some('\t')),
            ("a.jsonl", None),
            ("a.csv.jsonl", None),
            ("csv", None),
            ("a.gz", None),
        ] {
            assert_eq!(separator(Path::new(name)), wanted, "{name}");
        }
    }

    #[test]
    fn rows_are_objects_of_texts() {
        let quoted = "\u{feff}a, b ,\r\n\"x, \"\"y\"\"\r\nz\",1,0\r\n\r\n\"\",5\" pipe,\r\n";
        let wanted = [r#"2 {"a":"x, \"y\"\r\nz","b":"1"}"#, r#"5 {"a":"","b":"5\" pipe"}"#];
        assert_eq!(lines(quoted, ',').unwrap(), wanted);
        assert_eq!(lines("a\tb\n\n\n1,\t\"2\t\"", '\t').unwrap(), [r#"4 {"a":"1,","b":"2\t"}"#]);
        assert_eq!(lines("a\n漢\n", ',').unwrap(), [r#"2 {"a":"漢"}"#]);
        assert!(lines("a,b\n", ',').unwrap().is_empty());
    }

    #[test]
    fn what_is_no_table() {
        let wrong = |text: &str| lines(text, ',').unwrap_err();
        assert_eq!(wrong("\n"), "f: expected a first row with the columns' names, found an empty file");
        assert_eq!(wrong("a,b,a "), "f:1: expected a name of its own for each column, found \"a\" twice");
        assert_eq!(wrong("\r\na,b\r\n1,2\r\n1\r\n"), "f:4: expected 2 fields, as in line 2, found 1");
        assert_eq!(wrong("a,b\n1,2\n\n1,2,3"), "f:4: expected 2 fields, as in line 1, found 3");
        let open = "f:3: expected a quote that closes the field, found the file's end";
        assert_eq!(wrong("a\n\"\n\",\"1\n2\n"), open);
        assert_eq!(wrong("a\n1\n\"\"\"\n2\n"), open);
        let behind = wrong("a\n\"1\n2\" 3\n");
        assert_eq!(behind, "f:3: expected ',' or the line's end behind a closing quote, found ' '");
        let bytes = json_lines(b"a\nb\n\xE9\n", ',', ANY, "f").unwrap_err().to_string();
        assert_eq!(bytes, "f:3: expected UTF-8, found byte 0xE9");
        let few = Limit { bytes: 20, why: "of text" };
        let more = json_lines(b"name\n1\n2\n", ',', few, "f").unwrap_err();
        assert_eq!(format!("{more:#}"), "f:3: expected at most 0 MiB of text");
    }
}
