//! Adapter files: `adapter_model.safetensors` beside `adapter_config.json`, in the names of the reference implementation.
//!
//! ```text
//! base_model.model.model.layers.{L}.{self_attn|mlp}.{projection}.
//!     hydra  lora_A.weight [rank, d_in]     lora_B{e}.weight [d_out, rank]     lora_route.weight [lora_heads, d_in]
//!     split  lora_A{e}.weight               lora_B{e}.weight
//!     lora   lora_A.weight                  lora_B.weight                      (HF PEFT's names)
//! ```
//! A file may have `lora_A.NAME.weight`, as PEFT calls the adapter NAME in memory. Where pairs have ranks or scales of their own, or
//! some layers have none (`adapter/modules.rs`), they are made one adapter's as in `adapter/pad.rs`, and written so.

use super::{Adapter, AdapterConfig, AdapterPair, Method};
use crate::atomic::write_all_atomically;
use crate::config::Config;
use crate::error::{MOST_MISSING, not_safetensors, not_written, printable};
use crate::projection::{ByProjection, Projection};
use crate::{Error, Result};
use half::{bf16, f16};
use hydra_kernels::shape::HydraShape;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, View};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

const TENSORS: &str = "adapter_model.safetensors";
pub(super) const CONFIG: &str = "adapter_config.json";

/// What others write instead of [`TENSORS`], and what to do about it.
const UNREAD: [(&str, &str); 3] = [
    (
        "adapter_model.bin",
        "is a pickle, which isn't read: save it again with save_pretrained(.., safe_serialization=True)",
    ),
    (
        "adapter_model.safetensors.index.json",
        "lists several files, which aren't read: save it in one, with a larger max_shard_size",
    ),
    (
        "adapter_model.bin.index.json",
        "lists pickles, which aren't read: save it again with save_pretrained(.., safe_serialization=True)",
    ),
];

/// More layers than any model has; some of them may be without an adapter.
const MOST_LAYERS: usize = 256;

/// What the names of all layers' tensors begin with.
const LAYERS: &str = "base_model.model.model.layers.";

/// A file's tensors by name.
type Found<'a> = BTreeMap<String, TensorView<'a>>;

/// Which part of a pair one tensor of the file is.
enum Part {
    /// These rows of the stacked `[A; R]`.
    Rows(Range<usize>),
    /// These columns of B.
    Columns(Range<usize>),
}

/// The tensors that make up one pair: the last part of the name, and the place.
fn parts(method: Method, shape: &HydraShape) -> Vec<(String, Part)> {
    let (rank, a_rows) = (shape.rank, shape.a_rows());
    let of_head = |head: usize| head * rank..(head + 1) * rank;
    let mut parts = Vec::new();
    if method == Method::Split {
        parts.extend((0..shape.lora_heads).map(|head| (format!("lora_A{head}"), Part::Rows(of_head(head)))));
    } else {
        parts.push(("lora_A".into(), Part::Rows(0..a_rows)));
    }
    if method == Method::Lora {
        parts.push(("lora_B".into(), Part::Columns(of_head(0))));
    } else {
        parts.extend((0..shape.lora_heads).map(|head| (format!("lora_B{head}"), Part::Columns(of_head(head)))));
    }
    if shape.router {
        parts.push(("lora_route".into(), Part::Rows(a_rows..a_rows + shape.lora_heads)));
    }
    parts
}

/// What the names of one projection's tensors begin with.
fn prefix(layer: usize, projection: Projection) -> String {
    format!("{LAYERS}{layer}.{}.", projection.hf_path())
}

fn name(layer: usize, projection: Projection, part: &str) -> String {
    format!("{}{part}.weight", prefix(layer, projection))
}

impl Adapter {
    /// Reads an adapter's folder, or a LoRA in a GGUF file (llama.cpp's), for a model. An adapter of another model is an error that
    /// says so; otherwise every tensor that is missing, surplus, misshapen or not finite is named.
    ///
    /// PEFT's `rank_pattern`, `alpha_pattern` and `layers_to_transform`, `target_modules` that name some layers alone, and tensors
    /// of different ranks in a GGUF file are read as one adapter of the largest rank that does the same: smaller pairs are filled
    /// up with zeros, which stay zero in training, layers without a pair get zeros, and B takes up what differs in scale. It is
    /// saved like that. [`Adapter::ranks`] tells what was there.
    pub fn load(path: impl AsRef<Path>, model: &Config) -> Result<Self> {
        let dir = path.as_ref();
        if dir.is_file() {
            if dir.file_name().is_some_and(|name| [TENSORS, CONFIG].iter().any(|own| name == *own)) {
                let message = "a file of an adapter: expected its folder".into();
                return Err(Error::Format { path: dir.into(), offset: None, message });
            }
            return super::gguf::load(dir, model);
        }
        let read = Self::read(dir, |_| model.layers, |_, projection, _, _| projection.dims(model));
        match read {
            Err(Error::Tensors { .. }) => match Self::open(dir).map(|adapter| adapter.fits(model)) {
                Ok(Err(other)) => Err(Error::Format { path: dir.into(), offset: None, message: other.to_string() }),
                _ => read,
            },
            read => read,
        }
    }

    /// Reads an adapter's folder without its model: layers and sizes are those of the file's tensors, up to the last layer that has
    /// one. A GGUF file can't be read so, as the order of its rows is the model's; [`Contents`](super::Contents) lists it.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        if dir.as_ref().is_file() {
            let message =
                "an adapter in one file: expected a folder; a GGUF adapter is read with its model alone".to_string();
            return Err(Error::Format { path: dir.as_ref().into(), offset: None, message });
        }
        let layers = |found: &Found<'_>| {
            let layer = |name: &String| name.strip_prefix(LAYERS)?.split_once('.')?.0.parse::<usize>().ok();
            // A number far beyond the number of tensors is no layer's: what is missing is named.
            let most = found.len().max(MOST_LAYERS);
            let last = found.keys().filter_map(layer).filter(|&layer| layer < most).max();
            // Likewise of the first layer's, if there is none.
            last.map_or(1, |last| last + 1)
        };
        let sizes = |layer, projection, found: &Found<'_>, config: &AdapterConfig| {
            let [a, b] = match config.method {
                Method::Lora => ["lora_A", "lora_B"],
                Method::Hydra => ["lora_A", "lora_B0"],
                Method::Split => ["lora_A0", "lora_B0"],
            };
            let size = |part, dim: usize| {
                found.get(&name(layer, projection, part)).and_then(|view| view.shape().get(dim)).copied().unwrap_or(0)
            };
            (size(b, 0), size(a, 1))
        };
        Self::read(dir.as_ref(), layers, sizes)
    }

    /// The files of an adapter's folder: its configuration and its tensors. No folder, or one that lacks a file, is an error.
    pub fn files(dir: impl AsRef<Path>) -> Result<[PathBuf; 2]> {
        let dir = dir.as_ref();
        std::fs::metadata(dir).map_err(|source| Error::Io { path: dir.into(), source })?;
        let (config, tensors) = (dir.join(CONFIG), dir.join(TENSORS));
        if let Some((name, how)) = UNREAD.iter().find(|(name, _)| !tensors.is_file() && dir.join(name).is_file()) {
            return Err(Error::Format { path: tensors, offset: None, message: format!("not there; {name} {how}") });
        }
        if !config.is_file() || !tensors.is_file() {
            let message = format!("not an adapter folder: expected {CONFIG} and {TENSORS}");
            return Err(Error::Format { path: dir.into(), offset: None, message });
        }
        Ok([config, tensors])
    }

    /// `layers` and `sizes` (d_out and d_in of a projection of a layer) may go by the tensors.
    fn read(
        dir: &Path,
        layers: impl Fn(&Found<'_>) -> usize,
        sizes: impl Fn(usize, Projection, &Found<'_>, &AdapterConfig) -> (usize, usize),
    ) -> Result<Self> {
        let [config, path] = Self::files(dir)?;
        let invalid = |message: String| Error::Format { path: path.clone(), offset: None, message };
        let bytes = std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let file = SafeTensors::deserialize(&bytes);
        let file = file.map_err(|e| invalid(not_safetensors(&e)))?;
        let mut found = by_plain_name(&file).map_err(invalid)?;
        let count = layers(&found);
        let (config, placed) = AdapterConfig::read(&config, &file.names(), count)?;
        let (mut missing, mut wrong) = (Vec::new(), Vec::new());
        let mut layers = Vec::new();
        for (layer, owns) in placed.iter().enumerate() {
            let mut pairs = ByProjection::default();
            for projection in Projection::ALL {
                let Some(own) = owns[projection] else { continue };
                // A small file may call for any number: of those that have nothing at all, some are named.
                let begin = prefix(layer, projection);
                let any = found.range(begin.clone()..).next().is_some_and(|(name, _)| name.starts_with(&begin));
                if missing.len() >= MOST_MISSING && !any {
                    continue;
                }
                let (d_out, d_in) = sizes(layer, projection, &found, &config);
                let shape = config.of_one(own).shape_of(d_in, d_out);
                let mut tensors = Vec::new();
                for (part, place) in parts(config.method, &shape) {
                    let name = name(layer, projection, &part);
                    match found.remove(&name).map(|view| values(&view, dims(&shape, &place))) {
                        None if missing.len() >= MOST_MISSING => {}
                        None => missing.push(name),
                        Some(Err(why)) => wrong.push(format!("{name} {why}")),
                        Some(Ok(values)) => tensors.push((place, values)),
                    }
                }
                // Nothing is allocated by the configuration's word alone: the file has had all of it.
                if missing.is_empty() && wrong.is_empty() {
                    pairs[projection] = Some(assemble(&shape, tensors));
                }
            }
            layers.push(pairs);
        }
        // Where so much is missing, what is left over is no news.
        let left = found.into_keys().filter(|_| missing.len() < MOST_MISSING);
        let surplus: Vec<_> = left.map(|name| printable(&name)).collect();
        if !(missing.is_empty() && surplus.is_empty() && wrong.is_empty()) {
            return Err(Error::Tensors { path, missing, surplus, wrong });
        }
        Self::of_pairs(config, &placed, layers)
    }

    /// Writes both files into `dir`, which is made if need be; both or neither are replaced. What couldn't be read again, values
    /// that aren't finite among it, is not written.
    ///
    /// With [`Method::Lora`] the folder is one of HF PEFT's, whose `PeftModel.from_pretrained` takes it; [`Adapter::head`] makes a
    /// LoRA of one head. With the other methods it is the reference implementation's.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        self.check()?;
        self.check_finite()?;
        std::fs::create_dir_all(dir).map_err(|source| Error::Io { path: dir.into(), source })?;
        let path = dir.join(TENSORS);
        let invalid = |e| not_written(&path, e);
        let tensors: Vec<_> = self.stored().collect();
        let views = tensors.iter().map(|tensor| (&tensor.name, tensor));
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        let bytes = safetensors::serialize(views, Some(metadata)).map_err(invalid)?;
        let config = format!("{:#}\n", self.config.to_json());
        let config_path = dir.join(CONFIG);
        write_all_atomically(&[(path.clone(), &bytes), (config_path, config.as_bytes())])
    }

    /// The file's tensors: name, shape, values; layer by layer.
    ///
    /// # Panics
    /// If a pair's sizes aren't those that its configuration says: [`Adapter::check`].
    pub fn tensors(&self) -> impl Iterator<Item = (String, [usize; 2], Vec<f32>)> {
        self.stored().map(|tensor| {
            let values = tensor.values();
            (tensor.name, tensor.dims, values)
        })
    }

    /// The same, without the values.
    fn stored(&self) -> impl Iterator<Item = Stored<'_>> {
        self.pairs().flat_map(move |(layer, projection, pair)| {
            let shape = self.config.shape_of(pair.d_in, pair.d_out);
            let tensor = move |(part, place): (String, Part)| {
                let (name, dims) = (name(layer, projection, &part), dims(&shape, &place));
                Stored { name, dims, place, pair, mixed_width: shape.mixed_width() }
            };
            parts(self.config.method, &shape).into_iter().map(tensor)
        })
    }
}

/// A file's tensors by their names without that of the adapter, `NAME` in `lora_A.NAME.weight`.
fn by_plain_name<'a>(file: &'a SafeTensors<'a>) -> Result<Found<'a>, String> {
    let (mut found, mut adapter) = (Found::new(), None);
    // Sorted, so that it is always the same one that is named.
    for (name, view) in file.iter().collect::<BTreeMap<_, _>>() {
        let parts: Vec<&str> = name.rsplit('.').take(3).collect();
        let (plain, own) = match parts[..] {
            ["weight", own, part] if part.starts_with("lora_") => {
                (name.replace(&format!(".{own}.weight"), ".weight"), Some(own))
            }
            _ => (name.to_string(), None),
        };
        if let (Some(own), Some(other)) = (own, adapter.filter(|&other| Some(other) != own)) {
            let [own, other] = [own, other].map(printable);
            return Err(format!("tensors of two adapters, {other} and {own}: expected those of one"));
        }
        adapter = adapter.or(own);
        if found.insert(plain, view).is_some() {
            return Err(format!("{} twice, with and without an adapter's name", printable(name)));
        }
    }
    Ok(found)
}

/// A tensor of a file, whose values are gathered when they are written.
struct Stored<'a> {
    name: String,
    dims: [usize; 2],
    place: Part,
    pair: &'a AdapterPair,
    /// The width of the pair's B.
    mixed_width: usize,
}

impl Stored<'_> {
    fn values(&self) -> Vec<f32> {
        let AdapterPair { d_in, a, b, .. } = self.pair;
        match &self.place {
            Part::Rows(rows) => a[rows.start * d_in..rows.end * d_in].to_vec(),
            Part::Columns(columns) => {
                b.chunks_exact(self.mixed_width).flat_map(|row| &row[columns.clone()]).copied().collect()
            }
        }
    }
}

impl View for &Stored<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.dims
    }

    fn data(&self) -> Cow<'_, [u8]> {
        bytemuck::cast_slice(&self.values()).to_vec().into()
    }

    fn data_len(&self) -> usize {
        self.dims.iter().product::<usize>() * size_of::<f32>()
    }
}

fn dims(shape: &HydraShape, place: &Part) -> [usize; 2] {
    match place {
        Part::Rows(rows) => [rows.len(), shape.d_in],
        Part::Columns(columns) => [shape.d_out, columns.len()],
    }
}

/// A tensor's values as f32; the text says what is wrong with it.
fn values(view: &TensorView, want: [usize; 2]) -> Result<Vec<f32>, String> {
    if view.shape() != want {
        return Err(format!("is {:?}, wanted {want:?}", view.shape()));
    }
    let pairs = || view.data().chunks_exact(2).map(|b| [b[0], b[1]]);
    let values: Vec<f32> = match view.dtype() {
        Dtype::F32 => bytemuck::pod_collect_to_vec(view.data()),
        Dtype::F16 => pairs().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::BF16 => pairs().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
        Dtype::F64 => {
            let doubles: Vec<f64> = bytemuck::pod_collect_to_vec(view.data());
            doubles.into_iter().map(|x| x as f32).collect()
        }
        other => return Err(format!("has type {other}, wanted F64, F32, F16 or BF16")),
    };
    match values.iter().find(|x| !x.is_finite()) {
        Some(x) => Err(format!("holds {x}")),
        None => Ok(values),
    }
}

fn assemble(shape: &HydraShape, tensors: Vec<(Part, Vec<f32>)>) -> AdapterPair {
    let mut a = vec![0.0; shape.stacked_rows() * shape.d_in];
    let mut b = vec![0.0; shape.d_out * shape.mixed_width()];
    for (place, values) in tensors {
        match place {
            Part::Rows(rows) => a[rows.start * shape.d_in..rows.end * shape.d_in].copy_from_slice(&values),
            Part::Columns(columns) => {
                for (row, values) in b.chunks_exact_mut(shape.mixed_width()).zip(values.chunks_exact(columns.len())) {
                    row[columns.clone()].copy_from_slice(values);
                }
            }
        }
    }
    AdapterPair { d_in: shape.d_in, d_out: shape.d_out, a, b }
}
