//! The GGUF container, versions 2 and 3, little-endian.
//!
//! ```text
//! "GGUF"  version u32  tensors u64  pairs u64
//! pairs   × { key string, type u32, value }              string: length u64, UTF-8 bytes
//! tensors × { name string, dims u32, dim u64 × dims (fastest first), type u32, offset u64 }
//! padding to general.alignment (32 unless said), then the data; offsets count from there
//! ```
//! Nothing is believed: a length is compared with what is left of the file before anything is read or allocated, and
//! tensors must lie inside the file, aligned, apart from each other.

use super::types;
use crate::error::printable;
use crate::{Error, Result};
use hydra_kernels::quant::Format;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;

/// A metadata value; narrow numbers are widened.
#[derive(Debug)]
pub(crate) enum Value<'a> {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(&'a str),
    Strings(Vec<&'a str>),
    Integers(Vec<i64>),
    Floats(Vec<f32>),
    /// An array of arrays or booleans: nothing here asks for one.
    Other,
}

/// A tensor's description.
#[derive(Debug)]
pub(crate) struct Tensor {
    pub format: Format,
    /// Fastest first, as in the file.
    pub dims: Vec<usize>,
    /// Which of the container's files.
    pub file: usize,
    /// In the file.
    pub bytes: Range<usize>,
}

/// A parsed header over the file's bytes.
pub(crate) struct Container<'a> {
    pub path: &'a Path,
    /// The file, and the other parts of a split model.
    pub files: Vec<&'a [u8]>,
    pub metadata: HashMap<&'a str, Value<'a>>,
    /// The same pairs as they lie in the file, in its order: key, then type and value.
    pub pairs: Vec<(&'a str, &'a [u8])>,
    pub tensors: BTreeMap<&'a str, Tensor>,
}

/// What a file begins with.
pub(crate) const MAGIC: [u8; 4] = *b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
/// GGUF's own limit.
const MAX_DIMS: u32 = 4;
/// Arrays in arrays beyond this are hostile.
const MAX_DEPTH: usize = 4;

impl<'a> Container<'a> {
    /// Reads the header and checks where every tensor lies.
    pub fn parse(path: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        let mut reader = Reader { path, bytes, at: 0 };
        if reader.take(4).is_ok_and(|magic| magic != MAGIC) || bytes.len() < 4 {
            reader.at = 0;
            return Err(reader.error("not a GGUF file (nor a folder with config.json)"));
        }
        let version = reader.u32()?;
        if !matches!(version, 2 | 3) {
            reader.at -= 4;
            let endian = if version.swap_bytes() < 16 { " (big-endian)" } else { "" };
            return Err(reader.error(format!("GGUF version {version}{endian}, wanted 2 or 3, little-endian")));
        }
        // A tensor takes at least 24 bytes of header (no name, no dims), a pair at least 13.
        let tensor_count = reader.count(24, "tensors")?;
        let pair_count = reader.count(13, "metadata pairs")?;
        let (mut metadata, mut pairs) = (HashMap::new(), Vec::new());
        for _ in 0..pair_count {
            let key = reader.string()?;
            let start = reader.at;
            let kind = reader.u32()?;
            let value = reader.value(kind, 0)?;
            if metadata.insert(key, value).is_some() {
                return Err(reader.error(format!("metadata key {} a second time", printable(key))));
            }
            pairs.push((key, &bytes[start..reader.at]));
        }
        let alignment = alignment(&reader, &metadata)?;
        let tensors = tensors(&mut reader, tensor_count, alignment)?;
        Ok(Self { path, files: vec![bytes], metadata, pairs, tensors })
    }

    /// Adds the tensors of another part of the same model.
    pub fn join(&mut self, part: Self) -> Result<()> {
        let file = self.files.len();
        for (name, tensor) in part.tensors {
            if self.tensors.insert(name, Tensor { file, ..tensor }).is_some() {
                let message = format!("tensor {} is in an earlier part, too", printable(name));
                return Err(Error::Format { path: part.path.into(), offset: None, message });
            }
        }
        self.files.extend(part.files);
        Ok(())
    }
}

fn alignment(reader: &Reader, metadata: &HashMap<&str, Value>) -> Result<u64> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(&Value::Unsigned(n)) if n.is_power_of_two() && n <= 1 << 30 => Ok(n),
        Some(_) => Err(reader.error("general.alignment isn't a power of two")),
    }
}

fn tensors<'a>(reader: &mut Reader<'a>, count: u64, alignment: u64) -> Result<BTreeMap<&'a str, Tensor>> {
    let mut infos = Vec::new();
    for _ in 0..count {
        infos.push(info(reader, alignment)?);
    }
    let file = reader.bytes.len() as u64;
    let data = (reader.at as u64).next_multiple_of(alignment);
    let mut tensors = BTreeMap::new();
    for (name, format, dims, offset, length) in infos {
        let place = data.checked_add(offset).and_then(|start| Some((start, start.checked_add(length)?)));
        let Some((start, end)) = place.filter(|&(_, end)| end <= file) else {
            return Err(
                reader.error(format!("tensor {} extends past the end of the file; is it truncated?", printable(name)))
            );
        };
        // Both are at most the file's length, which is a usize.
        let tensor = Tensor { format, dims, file: 0, bytes: start as usize..end as usize };
        if tensors.insert(name, tensor).is_some() {
            return Err(reader.error(format!("tensor {} a second time", printable(name))));
        }
    }
    let mut by_place: Vec<_> = tensors.iter().map(|(name, tensor)| (tensor.bytes.clone(), name)).collect();
    by_place.sort_by_key(|(bytes, _)| (bytes.start, bytes.end));
    for pair in by_place.windows(2) {
        if pair[0].0.end > pair[1].0.start {
            let (one, other) = (printable(pair[0].1), printable(pair[1].1));
            return Err(reader.error(format!("tensors {one} and {other} overlap")));
        }
    }
    Ok(tensors)
}

type Info<'a> = (&'a str, Format, Vec<usize>, u64, u64);

/// One tensor's description: name, format, dims, offset in the data, length in bytes.
fn info<'a>(reader: &mut Reader<'a>, alignment: u64) -> Result<Info<'a>> {
    let name = reader.string()?;
    let refuse = |reader: &Reader, what: String| Err(reader.error(format!("tensor {}: {what}", printable(name))));
    let dim_count = reader.u32()?;
    if !(1..=MAX_DIMS).contains(&dim_count) {
        return refuse(reader, format!("{dim_count} dimensions, wanted 1 to {MAX_DIMS}"));
    }
    let mut dims = Vec::new();
    for _ in 0..dim_count {
        let dim = reader.u64()?;
        // As a signed number it may be negative: that is beyond any file, too.
        match usize::try_from(dim) {
            Ok(dim) if dim > 0 && dim < 1 << 40 => dims.push(dim),
            _ => return refuse(reader, format!("a dimension of {}", dim as i64)),
        }
    }
    let format = match types::format(reader.u32()?) {
        Ok(format) => format,
        Err(other) => return refuse(reader, format!("type {other}, wanted {}", super::super::supported())),
    };
    let offset = reader.u64()?;
    if !offset.is_multiple_of(alignment) {
        return refuse(reader, format!("offset {offset} isn't aligned to {alignment}"));
    }
    let Some(row) = format.row_bytes(dims[0]) else {
        let (columns, block) = (dims[0], format.block_len());
        return refuse(reader, format!("rows of {columns}, wanted a multiple of {}'s block of {block}", format.name()));
    };
    let rows = dims[1..].iter().try_fold(1u64, |product, &dim| product.checked_mul(dim as u64));
    let Some(length) = rows.and_then(|rows| rows.checked_mul(row as u64)) else {
        return refuse(reader, format!("{dims:?} overflows"));
    };
    Ok((name, format, dims, offset, length))
}

/// A place in the file. Every read is checked; errors carry the place.
struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn error(&self, message: impl Into<String>) -> Error {
        Error::Format { path: self.path.into(), offset: Some(self.at as u64), message: message.into() }
    }

    fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8]> {
        if length > self.left() {
            return Err(
                self.error(format!("{length} bytes wanted, {} left: the file is cut short or damaged", self.left()))
            );
        }
        let start = self.at;
        self.at += length as usize;
        Ok(&self.bytes[start..self.at])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let bytes = self.take(N as u64)?;
        Ok(bytes.try_into().expect("as many bytes as were taken"))
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A number of things that take at least `each` bytes.
    fn count(&mut self, each: u64, what: &str) -> Result<u64> {
        let count = self.u64()?;
        if count > self.left() / each {
            return Err(self.error(format!(
                "{count} {what} don't fit into the {} bytes that are left; is the file truncated?",
                self.left()
            )));
        }
        Ok(count)
    }

    fn string(&mut self) -> Result<&'a str> {
        let length = self.u64()?;
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes).map_err(|_| self.error("a string isn't UTF-8"))
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value<'a>> {
        Ok(match kind {
            4 => Value::Unsigned(self.u32()?.into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            8 => Value::String(self.string()?),
            9 => self.array_value(depth)?,
            10 => Value::Unsigned(self.u64()?),
            0 => Value::Unsigned(self.array::<1>()?[0].into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            5 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            7 => match self.array()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(self.error(format!("{other} as true or false"))),
            },
            other => return Err(self.error(format!("metadata of type {other}"))),
        })
    }

    fn array_value(&mut self, depth: usize) -> Result<Value<'a>> {
        if depth == MAX_DEPTH {
            return Err(self.error(format!("arrays nested deeper than {MAX_DEPTH}")));
        }
        let kind = self.u32()?;
        let least = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            9 => 12,
            _ => 8,
        };
        let count = self.count(least, "array elements")?;
        let (mut strings, mut integers, mut floats) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..count {
            match self.value(kind, depth + 1)? {
                Value::String(s) => strings.push(s),
                Value::Unsigned(n) => integers.push(n as i64),
                Value::Signed(n) => integers.push(n),
                Value::Float(x) => floats.push(x as f32),
                _ => {}
            }
        }
        Ok(match kind {
            8 => Value::Strings(strings),
            6 | 12 => Value::Floats(floats),
            7 | 9 => Value::Other,
            _ => Value::Integers(integers),
        })
    }
}
