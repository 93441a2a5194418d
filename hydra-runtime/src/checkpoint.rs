//! A model's frozen weights: mapped into memory, checked once, left in their own format.
//!
//! Two containers hold the same model under different names: a Hugging Face folder (`checkpoint/safetensors.rs`) and a
//! GGUF file (`checkpoint/gguf.rs`). Each hands over a `Listing` of raw tensors; this file asks it for the tensors that
//! the [`Config`] calls for and names every one that is missing, misshapen, or would change the result if it were ignored.

mod gguf;
pub(crate) mod safetensors;
mod stored;

pub use stored::StoredWeight;

use crate::config::Config;
use crate::error::printable;
use crate::projection::Projection;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};
use bytes::Bytes;
use half::{bf16, f16};
use hydra_kernels::quant::{Format, RowOrder, Weight};
use memmap2::Mmap;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

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
}

impl TensorId {
    /// All tensors that a model of this shape has of its own.
    pub(crate) fn all(config: &Config) -> impl Iterator<Item = Self> {
        let ends = [Some(Self::Embedding), Some(Self::FinalNorm), (!config.tied).then_some(Self::Head)];
        let layer = |l| {
            let norms = [Self::AttentionNorm(l), Self::FfnNorm(l)];
            norms.into_iter().chain(Projection::ALL.map(move |p| Self::Projection(l, p)))
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
            Self::Projection(_, projection) => {
                let (d_out, d_in) = projection.dims(config);
                (Some(d_out), d_in)
            }
        }
    }
}

/// A tensor as its container describes it.
struct RawTensor {
    /// Which of the mapped files.
    file: usize,
    bytes: Range<usize>,
    /// The format, or the name of one that isn't supported.
    format: Result<Format, String>,
    /// Slowest dimension first.
    shape: Vec<usize>,
}

/// What a container holds.
struct Listing {
    path: PathBuf,
    config: Config,
    files: Vec<Bytes>,
    tensors: BTreeMap<String, RawTensor>,
    /// A tensor's name in this container.
    name: fn(TensorId) -> String,
    /// Whether a tensor that nobody asked for would change the result.
    relevant: fn(&str) -> bool,
    /// How the rows of q and k lie.
    attention_rows: RowOrder,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    HuggingFace,
    Gguf,
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

/// A model's frozen weights and their description.
pub struct Checkpoint {
    path: PathBuf,
    config: Config,
    files: Vec<Bytes>,
    entries: HashMap<TensorId, Entry>,
    kind: Kind,
}

impl Checkpoint {
    /// Opens a Hugging Face folder (config.json with model.safetensors or its sharded index), a GGUF file, or a folder
    /// with exactly one GGUF file.
    ///
    /// The files are mapped: they must not be changed while the checkpoint lives.
    pub fn open(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(|source| Error::Io { path: path.into(), source })?;
        if !metadata.is_dir() {
            return Self::check(gguf::open(path)?);
        }
        if path.join("config.json").is_file() {
            return Self::check(safetensors::open(path)?);
        }
        let entries = std::fs::read_dir(path).map_err(|source| Error::Io { path: path.into(), source })?;
        let files = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let ggufs: Vec<_> =
            files.filter(|file| file.extension().is_some_and(|extension| extension == "gguf")).collect();
        match ggufs.as_slice() {
            [one] => Self::check(gguf::open(one)?),
            _ => {
                let found = ggufs.len();
                let message = format!("no config.json and {found} .gguf files, wanted config.json or one .gguf file");
                Err(Error::Format { path: path.into(), offset: None, message })
            }
        }
    }

    fn check(listing: Listing) -> Result<Self> {
        let Listing { path, config, files, mut tensors, name, relevant, attention_rows, kind } = listing;
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
                _ => RowOrder::Natural,
            };
            match entry(id, &config, raw, &files, order) {
                Ok(entry) => drop(entries.insert(id, entry)),
                Err(why) => wrong.push(format!("{name} {why}")),
            }
        }
        let surplus: Vec<_> = tensors.into_keys().filter(|name| relevant(name)).map(|name| printable(&name)).collect();
        if !(missing.is_empty() && wrong.is_empty() && surplus.is_empty()) {
            return Err(Error::Tensors { path, missing, surplus, wrong });
        }
        Ok(Self { path, config, files, entries, kind })
    }

    /// What was opened: the folder, or the GGUF file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    fn entry(&self, id: TensorId) -> &Entry {
        let id = if id == TensorId::Head && self.config.tied { TensorId::Embedding } else { id };
        self.entries.get(&id).unwrap_or_else(|| panic!("{id:?} in a model of {} layers", self.config.layers))
    }

    fn bytes_of(&self, entry: &Entry) -> &[u8] {
        &self.files[entry.file][entry.bytes.clone()]
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
        let data = self.files[entry.file].slice(entry.bytes.clone());
        let weight = StoredWeight::new(entry.format, entry.rows, entry.cols, data, entry.order);
        weight.expect("checked when it was opened")
    }

    /// A norm's weights, `[d_model]`.
    ///
    /// # Panics
    /// If `id` is a matrix, or beyond the model's layers.
    pub fn vector(&self, id: TensorId) -> Vec<f32> {
        assert!(id.dims(&self.config).0.is_none(), "{id:?} is a matrix");
        let entry = self.entry(id);
        floats(entry.format, self.bytes_of(entry)).expect("checked when it was opened")
    }

    /// The model's tokenizer, checked to fit its embedding.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let (tokenizer, path) = match self.kind {
            Kind::HuggingFace => {
                (Tokenizer::from_folder(&self.path, &self.config), self.path.join(crate::tokenizer::FILE))
            }
            Kind::Gguf => (gguf::tokenizer(&self.path, &self.files[0]), self.path.clone()),
        };
        let fitting = tokenizer.and_then(|tokenizer| tokenizer.fits(self.config.vocab).map(|()| tokenizer));
        fitting.map_err(|error| match error {
            Error::Tokenizer(message) => Error::Format { path, offset: None, message: format!("tokenizer: {message}") },
            other => other,
        })
    }

    /// The format in which a tensor is stored.
    pub(crate) fn format(&self, id: TensorId) -> Format {
        self.entry(id).format
    }

    /// Whether it is a Hugging Face folder.
    pub(crate) fn is_folder(&self) -> bool {
        self.kind == Kind::HuggingFace
    }

    /// Number of weights; a tied head counts once.
    pub fn parameters(&self) -> u64 {
        self.entries.values().map(|entry| entry.rows as u64 * entry.cols as u64).sum()
    }

    /// Bytes of the weights as they are stored.
    pub fn bytes(&self) -> u64 {
        self.entries.values().map(|entry| entry.bytes.len() as u64).sum()
    }

    /// Tells a model from another of its shape, though not by every weight, which would take as long as reading them all: FNV-1a
    /// over the shape, each tensor's format, and 64 bytes from each of four places in it.
    pub fn fingerprint(&self) -> u64 {
        let mut hash = 0xCBF2_9CE4_8422_2325;
        let mut add = |bytes: &[u8]| {
            bytes.iter().for_each(|&byte| hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3));
        };
        add(format!("{:?}", self.config).as_bytes());
        for id in TensorId::all(&self.config) {
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
            let of_it = self.entries.values().filter(|entry| entry.format == format);
            let (tensors, bytes) = of_it.fold((0, 0), |(n, bytes), entry| (n + 1, bytes + entry.bytes.len() as u64));
            (format, tensors, bytes)
        };
        let mut formats: Vec<_> = Format::ALL.map(count).into_iter().filter(|&(_, tensors, _)| tensors > 0).collect();
        formats.sort_by_key(|&(_, _, bytes)| std::cmp::Reverse(bytes));
        formats
    }
}

/// Checks a raw tensor against what the model wants; the text says what is wrong with it.
fn entry(id: TensorId, config: &Config, raw: RawTensor, files: &[Bytes], order: RowOrder) -> Result<Entry, String> {
    let (rows, cols) = id.dims(config);
    let want: Vec<usize> = rows.into_iter().chain([cols]).collect();
    if raw.shape != want {
        return Err(format!("is {:?}, wanted {want:?}", raw.shape));
    }
    let format = raw.format.map_err(|name| format!("has type {name}, wanted {}", supported()))?;
    let bytes = &files[raw.file][raw.bytes.clone()];
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

/// Maps a file into memory.
fn map(path: &Path) -> Result<Bytes> {
    let io = |source| Error::Io { path: path.into(), source };
    let file = File::open(path).map_err(io)?;
    // A folder, a pipe or a device can't be a checkpoint, and mapping one may do anything.
    if !file.metadata().map_err(io)?.is_file() {
        return Err(Error::Format { path: path.into(), offset: None, message: "not a regular file".into() });
    }
    // SAFETY: the mapping is private and read-only; that nobody truncates the file under it is `Checkpoint::open`'s
    // documented contract, as it is of every engine that maps its weights.
    let mapped = unsafe { Mmap::map(&file) }.map_err(io)?;
    Ok(Bytes::from_owner(mapped))
}
