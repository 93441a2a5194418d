//! A model's frozen weights: mapped into memory, checked once, left in their own format.
//!
//! Two containers hold the same model under different names: a Hugging Face folder (`checkpoint/safetensors.rs`) and a
//! GGUF file (`checkpoint/gguf.rs`). Each gives a `Listing` of raw tensors. This file takes from it the tensors that the
//! [`Config`] calls for, and names every one that is missing, has the wrong shape, or would change the result if it were ignored.

pub(crate) mod gguf;
pub(crate) mod safetensors;
mod stored;

pub use bytes::Bytes;
pub use stored::StoredWeight;

use crate::config::Config;
use crate::error::printable;
use crate::files::{Files, map};
use crate::projection::Projection;
use crate::tokenizer::{Tokenizer, guarded};
use crate::{Error, Result};
use half::{bf16, f16};
use hydra_kernels::quant::{Format, RowOrder, Weight};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A tensor of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorId {
    /// Token embeddings, [vocab, d_model].
    Embedding,
    /// The last norm, `[d_model]`.
    FinalNorm,
    /// The output head, [vocab, d_model]; the embedding, if tied.
    Head,
    /// A layer's norm before attention, `[d_model]`.
    AttentionNorm(usize),
    /// A layer's norm before the feed-forward, `[d_model]`.
    FfnNorm(usize),
    /// A layer's projection, [d_out, d_in].
    Projection(usize, Projection),
    /// The bias of a layer's projection, `[d_out]`.
    Bias(usize, Projection),
    /// The norm of each head of a layer's queries, `[head_dim]`.
    QueryNorm(usize),
    /// The norm of each head of a layer's keys, `[head_dim]`.
    KeyNorm(usize),
}

impl TensorId {
    /// All tensors that a model of this shape has of its own.
    pub(crate) fn all(config: &Config) -> impl Iterator<Item = Self> {
        let ends = [Some(Self::Embedding), Some(Self::FinalNorm), (!config.tied).then_some(Self::Head)];
        let layer = move |l| {
            let norms = [Self::AttentionNorm(l), Self::FfnNorm(l)];
            let head_norms = config.architecture.head_norms.then_some([Self::QueryNorm(l), Self::KeyNorm(l)]);
            let biases = Projection::ALL.into_iter().filter(move |p| p.has_bias(config));
            let projections = Projection::ALL.map(move |p| Self::Projection(l, p));
            let biases = biases.map(move |p| Self::Bias(l, p));
            norms.into_iter().chain(projections).chain(biases).chain(head_norms.into_iter().flatten())
        };
        ends.into_iter().flatten().chain((0..config.layers).flat_map(layer))
    }

    /// Its name in a Hugging Face folder.
    pub(crate) fn hf_name(self) -> String {
        safetensors::name(self)
    }

    /// Rows and columns; `None` rows for a vector.
    pub(crate) fn dims(self, config: &Config) -> (Option<usize>, usize) {
        match self {
            Self::Embedding | Self::Head => (Some(config.vocab), config.d_model),
            Self::FinalNorm | Self::AttentionNorm(_) | Self::FfnNorm(_) => (None, config.d_model),
            Self::QueryNorm(_) | Self::KeyNorm(_) => (None, config.head_dim),
            Self::Bias(_, projection) => (None, projection.dims(config).0),
            Self::Projection(_, projection) => {
                let (d_out, d_in) = projection.dims(config);
                (Some(d_out), d_in)
            }
        }
    }
}

/// A tensor as its container describes it.
#[derive(Clone)]
struct RawTensor {
    /// Which of the files.
    file: usize,
    bytes: Range<usize>,
    /// The format, or the name of one that isn't supported.
    format: Result<Format, String>,
    /// Slowest dimension first.
    shape: Vec<usize>,
}

/// What a container holds.
struct Listing {
    source: Source,
    config: Config,
    /// The files' bytes.
    data: Vec<Bytes>,
    tensors: BTreeMap<String, RawTensor>,
    /// A tensor's name in this container.
    name: fn(TensorId) -> String,
    /// Whether a tensor that was not asked for would change the result.
    relevant: fn(&str) -> bool,
    /// The order of the rows of q and k, and of their biases.
    attention_rows: RowOrder,
}

/// Where a model comes from.
enum Source {
    /// A Hugging Face folder's files.
    Files(Files),
    /// A GGUF file; its path, or what messages call it.
    Gguf(PathBuf),
}

/// A checked tensor.
struct Entry {
    file: usize,
    bytes: Range<usize>,
    format: Format,
    rows: usize,
    cols: usize,
    order: RowOrder,
}

/// A model's frozen weights and their description. Clones share the files' memory.
#[derive(Clone)]
pub struct Checkpoint(Arc<Opened>);

struct Opened {
    source: Source,
    config: Config,
    data: Vec<Bytes>,
    entries: HashMap<TensorId, Entry>,
}

impl Checkpoint {
    /// Opens a Hugging Face folder (config.json with model.safetensors or its sharded index), a GGUF file (of a split one the
    /// first part, with the others beside it), or a folder with exactly one GGUF file.
    ///
    /// The files are mapped: they must not be changed while the checkpoint, or a model made of it, lives.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let metadata = std::fs::metadata(path).map_err(|source| Error::Io { path: path.into(), source })?;
        let open = |path: &Path| Self::check(gguf::list(path, map(path)?)?);
        if !metadata.is_dir() {
            return open(path);
        }
        let files = Files::folder(path);
        let entries = std::fs::read_dir(path).map_err(|source| Error::Io { path: path.into(), source })?;
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let is_gguf = |file: &PathBuf| file.extension().is_some_and(|extension| extension == "gguf");
        let ggufs: Vec<_> = paths.filter(|file| is_gguf(file) && !gguf::split::is_later_part(file)).collect();
        match ggufs.as_slice() {
            // A GGUF may have its model's config.json beside it.
            [one] if !safetensors::has_weights(&files) => open(one),
            _ if files.has(crate::config::json::FILE) => Self::check(safetensors::list(files)?),
            [one] => open(one),
            _ => {
                let found = ggufs.len();
                let message = format!("no config.json and {found} .gguf files, wanted config.json or one .gguf file");
                Err(Error::Format { path: path.into(), offset: None, message })
            }
        }
    }

    /// A GGUF file in memory.
    pub fn from_gguf(bytes: impl Into<Bytes>) -> Result<Self> {
        Self::check(gguf::list(Path::new("<memory>"), bytes.into())?)
    }

    /// A Hugging Face folder's files in memory, by their names there: `config.json`, `model.safetensors` (or its index and shards),
    /// and, for a tokenizer, `tokenizer.json` and what belongs to it.
    pub fn from_files<N: Into<String>, F: Into<Bytes>>(files: impl IntoIterator<Item = (N, F)>) -> Result<Self> {
        let files = files.into_iter().map(|(name, bytes)| (name.into(), bytes.into())).collect();
        Self::check(safetensors::list(Files::memory(files))?)
    }

    fn check(listing: Listing) -> Result<Self> {
        let Listing { source, config, data, mut tensors, name, relevant, attention_rows } = listing;
        let (mut missing, mut wrong) = (Vec::new(), Vec::new());
        let mut entries = HashMap::new();
        for id in TensorId::all(&config) {
            let name = name(id);
            let Some(raw) = tensors.remove(&name) else {
                missing.push(name);
                continue;
            };
            let order = match id {
                TensorId::Projection(_, Projection::Q | Projection::K) => attention_rows,
                TensorId::Bias(_, Projection::Q | Projection::K) => attention_rows,
                _ => RowOrder::Natural,
            };
            match entry(id, &config, raw, &data, order) {
                Ok(entry) => drop(entries.insert(id, entry)),
                Err(why) => wrong.push(format!("{name} {why}")),
            }
        }
        let surplus: Vec<_> = tensors.into_keys().filter(|name| relevant(name)).map(|name| printable(&name)).collect();
        if !(missing.is_empty() && wrong.is_empty() && surplus.is_empty()) {
            return Err(Error::Tensors { path: source.path().into(), missing, surplus, wrong });
        }
        Ok(Self(Arc::new(Opened { source, config, data, entries })))
    }

    /// What was opened: the folder, or the GGUF file; `<memory>` for files in memory.
    pub fn path(&self) -> &Path {
        self.0.source.path()
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    fn entry(&self, id: TensorId) -> &Entry {
        let id = if id == TensorId::Head && self.config().tied { TensorId::Embedding } else { id };
        self.0.entries.get(&id).unwrap_or_else(|| panic!("{id:?} in a model of {} layers", self.config().layers))
    }

    fn bytes_of(&self, entry: &Entry) -> &[u8] {
        &self.0.data[entry.file][entry.bytes.clone()]
    }

    /// A matrix where it lies. The head of a tied model is the embedding.
    ///
    /// # Panics
    /// If `id` is beyond the model's layers.
    pub fn weight(&self, id: TensorId) -> Weight<'_> {
        let entry = self.entry(id);
        let weight = Weight::new(entry.format, entry.rows, entry.cols, self.bytes_of(entry), entry.order);
        weight.expect("checked when it was opened")
    }

    /// A matrix as a device takes it: it shares the checkpoint's memory and keeps it alive.
    ///
    /// # Panics
    /// If `id` is beyond the model's layers.
    pub fn stored(&self, id: TensorId) -> StoredWeight {
        let entry = self.entry(id);
        let data = self.0.data[entry.file].slice(entry.bytes.clone());
        let weight = StoredWeight::new(entry.format, entry.rows, entry.cols, data, entry.order);
        weight.expect("checked when it was opened")
    }

    /// A norm's weights or a bias.
    ///
    /// # Panics
    /// If `id` is a matrix, beyond the model's layers, or a tensor that its architecture doesn't have.
    pub fn vector(&self, id: TensorId) -> Vec<f32> {
        assert!(id.dims(self.config()).0.is_none(), "{id:?} is a matrix");
        let entry = self.entry(id);
        let stored = floats(entry.format, self.bytes_of(entry)).expect("checked when it was opened");
        match entry.order {
            RowOrder::Natural => stored,
            order => (0..stored.len()).map(|row| stored[order.stored_row(row)]).collect(),
        }
    }

    /// The model's tokenizer. It may have tokens beyond the embedding's rows: to encode one of them is an error.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let (tokenizer, path) = match &self.0.source {
            Source::Files(files) => {
                (guarded(|| Tokenizer::read(files, self.config())), files.name(crate::tokenizer::FILE))
            }
            Source::Gguf(path) => (guarded(|| gguf::tokenizer(path, &self.0.data[0])), path.clone()),
        };
        let fitting = tokenizer.and_then(|tokenizer| tokenizer.with_rows(self.config().vocab));
        fitting.map_err(|error| match error {
            Error::Tokenizer(message) => Error::Format { path, offset: None, message: format!("tokenizer: {message}") },
            other => other,
        })
    }

    /// The format in which a tensor is stored.
    pub(crate) fn format(&self, id: TensorId) -> Format {
        self.entry(id).format
    }

    /// The files of a Hugging Face folder; `None` for a GGUF file.
    pub(crate) fn files(&self) -> Option<&Files> {
        match &self.0.source {
            Source::Files(files) => Some(files),
            Source::Gguf(_) => None,
        }
    }

    /// The bytes of a GGUF file; `None` for a Hugging Face folder.
    pub(crate) fn gguf(&self) -> Option<&[u8]> {
        match &self.0.source {
            Source::Files(_) => None,
            Source::Gguf(_) => Some(&self.0.data[0]),
        }
    }

    /// A tensor's bytes as the file has them.
    pub(crate) fn raw(&self, id: TensorId) -> &[u8] {
        self.bytes_of(self.entry(id))
    }

    /// Number of weights; a tied head counts once.
    pub fn parameters(&self) -> u64 {
        self.0.entries.values().map(|entry| entry.rows as u64 * entry.cols as u64).sum()
    }

    /// Bytes of the weights as they are stored.
    pub fn bytes(&self) -> u64 {
        self.0.entries.values().map(|entry| entry.bytes.len() as u64).sum()
    }

    /// Tells a model from another of its shape, though not by every weight, which would take as long as reading them all: FNV-1a
    /// over the shape, each tensor's format, and 64 bytes from each of four places in it.
    pub fn fingerprint(&self) -> u64 {
        let mut hash = 0xCBF2_9CE4_8422_2325;
        let mut add = |bytes: &[u8]| {
            bytes.iter().for_each(|&byte| hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3));
        };
        add(self.config().shape_name().as_bytes());
        for id in TensorId::all(self.config()) {
            let entry = self.entry(id);
            add(entry.format.name().as_bytes());
            let bytes = self.bytes_of(entry);
            let last = bytes.len().saturating_sub(64);
            (0..4).for_each(|place| add(&bytes[last / 3 * place..][..bytes.len().min(64)]));
        }
        hash
    }

    /// The storage formats in use: format, tensors, bytes; the largest first.
    pub fn formats(&self) -> Vec<(Format, usize, u64)> {
        let count = |format| {
            let of_it = self.0.entries.values().filter(|entry| entry.format == format);
            let (tensors, bytes) = of_it.fold((0, 0), |(n, bytes), entry| (n + 1, bytes + entry.bytes.len() as u64));
            (format, tensors, bytes)
        };
        let mut formats: Vec<_> = Format::ALL.map(count).into_iter().filter(|&(_, tensors, _)| tensors > 0).collect();
        formats.sort_by_key(|&(_, _, bytes)| std::cmp::Reverse(bytes));
        formats
    }
}

impl Source {
    fn path(&self) -> &Path {
        match self {
            Self::Files(files) => files.path(),
            Self::Gguf(path) => path,
        }
    }
}

/// Checks a raw tensor against what the model wants; the text says what is wrong with it.
fn entry(id: TensorId, config: &Config, raw: RawTensor, data: &[Bytes], order: RowOrder) -> Result<Entry, String> {
    let (rows, cols) = id.dims(config);
    let want: Vec<usize> = rows.into_iter().chain([cols]).collect();
    if raw.shape != want {
        return Err(format!("is {:?}, wanted {want:?}", raw.shape));
    }
    let format = raw.format.map_err(|name| format!("has type {name}, wanted {}", supported()))?;
    let bytes = &data[raw.file][raw.bytes.clone()];
    let entry = Entry { file: raw.file, bytes: raw.bytes.clone(), format, rows: rows.unwrap_or(1), cols, order };
    if rows.is_some() {
        Weight::new(format, entry.rows, cols, bytes, order).map_err(|error| error.to_string())?;
    } else if floats(format, bytes).is_none_or(|values| values.len() != cols) {
        return Err(format!("has type {}, wanted F32, F16 or BF16", format.name()));
    }
    Ok(entry)
}

/// The formats' names, for messages.
fn supported() -> String {
    Format::ALL.map(Format::name).join(", ")
}

/// Floats of any plain format; `None` for block formats.
fn floats(format: Format, bytes: &[u8]) -> Option<Vec<f32>> {
    let pairs = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match format {
        Format::F32 => Some(bytemuck::pod_collect_to_vec(&bytes[..bytes.len() / 4 * 4])),
        Format::F16 => Some(pairs().map(|b| f16::from_le_bytes(b).to_f32()).collect()),
        Format::Bf16 => Some(pairs().map(|b| bf16::from_le_bytes(b).to_f32()).collect()),
        _ => None,
    }
}
