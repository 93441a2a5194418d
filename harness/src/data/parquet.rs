//! Parquet files as JSON lines: a row becomes an object, with lists and groups in it.
//!
//! Read are files without compression, with Snappy or Zstandard (which Hugging Face's data sets have) and with gzip. Dates, times
//! and decimals become strings; bytes that are no UTF-8 become null.

mod pages;
mod zstd;

use crate::data::compressed::Budget;
use crate::data::limit::Limit;
use crate::output::printable;
use anyhow::{Context, Result, anyhow, bail};
use hydra_runtime::door::guarded;
use parquet::basic::Compression;
use parquet::file::metadata::ParquetMetaData;
use parquet::file::reader::{FileReader, RowGroupReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::{Map, Number, Value};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use zstd::Group;

/// What a file begins and ends with.
const MAGIC: &[u8] = b"PAR1";

/// The rows as lines of JSON, one for each row. Errors don't name the file.
pub fn json_lines(path: &Path, limit: Limit) -> Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let bytes = check_end(&mut file)?;
    let rows = || {
        let reader = SerializedFileReader::new(file.try_clone()?)?;
        check_compression(reader.metadata())?;
        pages::check(reader.metadata(), &file, bytes, limit)?;
        let mut lines = Vec::new();
        let (shared, budget, mut number) = (Arc::new(file.try_clone()?), Budget::of(limit), 0u64);
        for i in 0..reader.num_row_groups() {
            let group = Group { inner: reader.get_row_group(i)?, file: shared.clone(), budget: budget.clone() };
            for row in group.get_row_iter(None)? {
                number += 1;
                let row = row.with_context(|| format!("row {number}"))?;
                serde_json::to_writer(&mut lines, &object(&row))?;
                lines.push(b'\n');
                limit.check(lines.len() as u64)?;
            }
        }
        Ok(lines)
    };
    guarded(rows, |said| anyhow!("the library failed: {said}")).context("unreadable or truncated parquet file")
}

/// Fails if the file does not end as it should; returns its size.
fn check_end(file: &mut File) -> Result<u64> {
    let bytes = file.seek(SeekFrom::End(0))?;
    let mut end = Vec::new();
    file.seek(SeekFrom::Start(bytes.saturating_sub(MAGIC.len() as u64)))?;
    file.read_to_end(&mut end)?;
    if end != MAGIC || bytes < 12 {
        bail!("truncated parquet file: expected PAR1 at its end, found other bytes after {bytes}");
    }
    Ok(bytes)
}

fn check_compression(metadata: &ParquetMetaData) -> Result<()> {
    for column in metadata.row_groups().iter().flat_map(|group| group.columns()) {
        match column.compression() {
            Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::GZIP(_) | Compression::ZSTD(_) => {}
            other => bail!(
                "column {} is compressed with {other}: expected none, snappy, gzip or zstd",
                printable(&column.column_path().string())
            ),
        }
    }
    Ok(())
}

fn object(row: &Row) -> Map<String, Value> {
    row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect()
}

fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => (*value).into(),
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::UByte(value) => (*value).into(),
        Field::UShort(value) => (*value).into(),
        Field::UInt(value) => (*value).into(),
        Field::ULong(value) => (*value).into(),
        Field::Float16(value) => number(value.to_f64()),
        Field::Float(value) => number((*value).into()),
        Field::Double(value) => number(*value),
        Field::Str(text) => text.as_str().into(),
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map_or(Value::Null, Value::from),
        Field::Group(row) => Value::Object(object(row)),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::MapInternal(map) => {
            map.entries().iter().map(|(key, own)| Value::from(vec![value(key), value(own)])).collect()
        }
        other => other.to_string().into(),
    }
}

/// JSON has no infinity.
fn number(value: f64) -> Value {
    Number::from_f64(value).map_or(Value::Null, Value::Number)
}
