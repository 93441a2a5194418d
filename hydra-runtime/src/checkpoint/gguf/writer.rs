//! Writes GGUF, version 3: see `container.rs` for the layout.

use super::container::MAGIC;
use super::types;
use crate::{Error, Result};
use hydra_kernels::quant::Format;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

const ALIGNMENT: u64 = 32;

/// The header of a file to be written. Pairs and tensors keep the order in which they were added.
#[derive(Default)]
pub(crate) struct Header {
    /// Key, then type and value as the file has them.
    pairs: Vec<(String, Vec<u8>)>,
    tensors: Vec<TensorInfo>,
}

struct TensorInfo {
    name: String,
    /// Fastest first.
    dims: Vec<usize>,
    format: Format,
    bytes: u64,
}

impl Header {
    fn pair(&mut self, key: impl Into<String>, kind: u32, value: &[u8]) {
        self.raw(key, &[&kind.to_le_bytes(), value].concat());
    }

    /// A pair as another file has it: its type and its value.
    pub fn raw(&mut self, key: impl Into<String>, kind_and_value: &[u8]) {
        let key = key.into();
        self.pairs.retain(|(other, _)| *other != key);
        self.pairs.push((key, kind_and_value.to_vec()));
    }

    pub fn u32(&mut self, key: impl Into<String>, value: usize) {
        self.pair(key, 4, &(value as u32).to_le_bytes());
    }

    pub fn f32(&mut self, key: impl Into<String>, value: f32) {
        self.pair(key, 6, &value.to_le_bytes());
    }

    pub fn bool(&mut self, key: impl Into<String>, value: bool) {
        self.pair(key, 7, &[value.into()]);
    }

    pub fn string(&mut self, key: impl Into<String>, value: &str) {
        self.pair(key, 8, &string(value));
    }

    pub fn strings<S: AsRef<str>>(&mut self, key: impl Into<String>, values: &[S]) {
        self.array(key, 8, values.len(), values.iter().flat_map(|value| string(value.as_ref())));
    }

    pub fn i32s(&mut self, key: impl Into<String>, values: &[i32]) {
        self.array(key, 5, values.len(), values.iter().flat_map(|value| value.to_le_bytes()));
    }

    pub fn f32s(&mut self, key: impl Into<String>, values: &[f32]) {
        self.array(key, 6, values.len(), values.iter().flat_map(|value| value.to_le_bytes()));
    }

    fn array(&mut self, key: impl Into<String>, kind: u32, len: usize, values: impl Iterator<Item = u8>) {
        let head = kind.to_le_bytes().into_iter().chain((len as u64).to_le_bytes());
        self.pair(key, 9, &head.chain(values).collect::<Vec<u8>>());
    }

    /// A tensor; `shape` slowest first, in whole blocks of `format`.
    pub fn tensor(&mut self, name: String, shape: &[usize], format: Format) {
        let (cols, rows) = shape.split_last().expect("a tensor has a dimension");
        let row = format.row_bytes(*cols).expect("rows of whole blocks");
        let bytes = rows.iter().product::<usize>() as u64 * row as u64;
        self.tensors.push(TensorInfo { name, dims: shape.iter().rev().copied().collect(), format, bytes });
    }

    /// Bytes of the tensors, without padding.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    /// The header's bytes, padded to where the first tensor begins.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.pairs.len() as u64).to_le_bytes());
        for (key, value) in &self.pairs {
            bytes.extend(string(key));
            bytes.extend(value);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            bytes.extend(string(&tensor.name));
            bytes.extend((tensor.dims.len() as u32).to_le_bytes());
            bytes.extend(tensor.dims.iter().flat_map(|&dim| (dim as u64).to_le_bytes()));
            bytes.extend(types::number(tensor.format).to_le_bytes());
            bytes.extend(offset.to_le_bytes());
            offset = (offset + tensor.bytes).next_multiple_of(ALIGNMENT);
        }
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT as usize), 0);
        bytes
    }

    /// Writes the file at `path`: the header, then the tensors, each by `data(i, out)`, which appends exactly its bytes. Memory holds
    /// one tensor at a time.
    pub fn write(&self, path: &Path, mut data: impl FnMut(usize, &mut Vec<u8>) -> Result<()>) -> Result<()> {
        let at = |source| Error::Io { path: path.into(), source };
        let mut file = BufWriter::new(File::create(path).map_err(at)?);
        file.write_all(&self.bytes()).map_err(at)?;
        let mut bytes = Vec::new();
        for (i, tensor) in self.tensors.iter().enumerate() {
            bytes.clear();
            data(i, &mut bytes)?;
            assert_eq!(bytes.len() as u64, tensor.bytes, "the bytes of {}", tensor.name);
            bytes.resize(bytes.len().next_multiple_of(ALIGNMENT as usize), 0);
            file.write_all(&bytes).map_err(at)?;
        }
        file.into_inner().map_err(|error| at(error.into_error()))?;
        Ok(())
    }
}

/// Length and text.
fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}
