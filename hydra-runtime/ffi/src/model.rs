//! Models and their tokenizers.

use crate::arguments::{Out, c_text, copy_out, optional, slice, text};
use crate::error::{Result, door, hydra_status, invalid};
use crate::handle::{self, Object, Table};
use hydra_runtime::backend::Device;
use hydra_runtime::backend::cpu::{CpuOptions, Precision};
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::model::Model;
use std::ffi::c_char;

/// A model: frozen weights and a tokenizer. 0 is no model.
pub type hydra_model = u64;

impl Object for Model {
    const KIND: usize = 1;
    fn table() -> &'static Table<Self> {
        static TABLE: Table<Model> = Table::new();
        &TABLE
    }
}

/// What matrices are multiplied in; sums are f32.
#[repr(i32)]
#[derive(Clone, Copy)]
pub enum hydra_precision {
    /// f32 throughout.
    F32 = 0,
    /// The operands of large products are rounded to bf16.
    Bf16 = 1,
    /// Activations in eight bits beside weights in GGUF's block formats, other products in f32; without training.
    Q8 = 2,
}

/// The CPU, as `hydra_model_options.device`.
pub const HYDRA_CPU: i32 = -1;

/// How to run a model.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hydra_model_options {
    /// HYDRA_CPU, or the number of an NVIDIA GPU from 0 on if the library was built for CUDA.
    pub device: i32,
    /// Threads of the CPU; 0 for one a core.
    pub threads: u32,
    /// A hydra_precision; a GPU ignores it.
    pub precision: i32,
}

/// The CPU with all cores, in f32. Any thread may call it.
#[unsafe(no_mangle)]
pub extern "C" fn hydra_model_options_default() -> hydra_model_options {
    hydra_model_options { device: HYDRA_CPU, threads: 0, precision: hydra_precision::F32 as i32 }
}

impl hydra_model_options {
    fn start(&self) -> Result<Device> {
        let precision = match self.precision {
            p if p == hydra_precision::F32 as i32 => Precision::F32,
            p if p == hydra_precision::Bf16 as i32 => Precision::Bf16,
            p if p == hydra_precision::Q8 as i32 => Precision::Q8,
            p => return Err(invalid(format!("precision: expected a hydra_precision, found {p}"))),
        };
        if self.device == HYDRA_CPU {
            let threads = (self.threads > 0).then_some(self.threads as usize);
            return Ok(Device::cpu(CpuOptions { threads, precision, ..CpuOptions::default() })?);
        }
        let Ok(ordinal) = u32::try_from(self.device) else {
            return Err(invalid(format!("device: expected HYDRA_CPU or a GPU's number, found {}", self.device)));
        };
        gpu(ordinal)
    }
}

#[cfg(feature = "cuda")]
fn gpu(ordinal: u32) -> Result<Device> {
    Ok(Device::cuda(ordinal)?)
}

#[cfg(not(feature = "cuda"))]
fn gpu(ordinal: u32) -> Result<Device> {
    let text = format!("GPU {ordinal}: this library was built without CUDA; build it with --features cuda");
    Err(crate::error::Failure { status: hydra_status::Device, text })
}

/// Puts the model into the table.
unsafe fn load(
    checkpoint: impl FnOnce() -> Result<Checkpoint>,
    options: *const hydra_model_options,
    model: *mut hydra_model,
) -> Result<()> {
    // SAFETY: the caller's word, for both.
    let (options, out) = unsafe { (optional("options", options)?, Out::new("model", model)?) };
    let options = options.copied().unwrap_or_else(|| hydra_model_options_default());
    let checkpoint = checkpoint()?;
    out.set(handle::insert(Model::load(options.start()?, &checkpoint)?)?);
    Ok(())
}

/// Opens a Hugging Face folder or a GGUF file. `options` may be null, for the defaults. The files are mapped, and must not
/// change while the model lives. Any thread may call it. The caller owns `model` and frees it with `hydra_model_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_model_open(
    path: *const c_char,
    options: *const hydra_model_options,
    model: *mut hydra_model,
) -> hydra_status {
    // SAFETY: the caller's word, for all.
    door(|| unsafe {
        let path = c_text("path", path)?;
        load(|| Ok(Checkpoint::open(path)?), options, model)
    })
}

/// Opens a GGUF file that lies in memory; its bytes are copied. Otherwise as `hydra_model_open`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_model_open_gguf(
    bytes: *const u8,
    len: usize,
    options: *const hydra_model_options,
    model: *mut hydra_model,
) -> hydra_status {
    // SAFETY: the caller's word, for all.
    door(|| unsafe {
        let bytes = slice("bytes", bytes, len)?;
        load(|| Ok(Checkpoint::from_gguf(bytes.to_vec())?), options, model)
    })
}

/// A file in memory.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hydra_file {
    /// Its name in the folder, "config.json" say.
    pub name: *const c_char,
    /// Its content.
    pub bytes: *const u8,
    /// Bytes of its content.
    pub len: usize,
}

/// Opens a Hugging Face folder whose files lie in memory: config.json, model.safetensors or its index and shards, and
/// tokenizer.json with what belongs to it. Their bytes are copied. Otherwise as `hydra_model_open`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_model_open_files(
    files: *const hydra_file,
    count: usize,
    options: *const hydra_model_options,
    model: *mut hydra_model,
) -> hydra_status {
    // SAFETY: the caller's word, for all.
    door(|| unsafe {
        let files = slice("files", files, count)?;
        let read = |file: &hydra_file| -> Result<_> {
            let name = c_text("a file's name", file.name)?;
            Ok((name, slice(name, file.bytes, file.len)?.to_vec()))
        };
        let files = files.iter().map(read).collect::<Result<Vec<_>>>()?;
        load(|| Ok(Checkpoint::from_files(files)?), options, model)
    })
}

/// Frees a model. Adapters, generators and trainers that were made of it stay usable; its memory is given back after the
/// last of them. 0 is allowed. Any thread may call it, even while others use the model.
#[unsafe(no_mangle)]
pub extern "C" fn hydra_model_free(model: hydra_model) -> hydra_status {
    door(|| handle::remove::<Model>(model))
}

/// A model's sizes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hydra_model_info {
    /// Entries of the vocabulary, and the number of logits.
    pub vocab: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the feed-forward.
    pub d_ffn: usize,
    /// Blocks.
    pub layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Positions that the model was made for.
    pub context: usize,
}

/// Writes the model's sizes to `info`. Any thread may call it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_model_describe(model: hydra_model, info: *mut hydra_model_info) -> hydra_status {
    // SAFETY: the caller's word.
    door(|| unsafe {
        let (model, out) = (handle::get::<Model>(model)?, Out::new("info", info)?);
        let config = model.config();
        out.set(hydra_model_info {
            vocab: config.vocab,
            d_model: config.d_model,
            d_ffn: config.d_ffn,
            layers: config.layers,
            n_heads: config.n_heads,
            kv_heads: config.kv_heads,
            context: config.context,
        });
        Ok(())
    })
}

/// The token ids of a text of `len` bytes, UTF-8. With `begins` not 0 the text begins a sequence: the model's
/// beginning-of-text token comes before it, if there is one.
///
/// Writes up to `capacity` ids to `tokens` and their number to `count`. If there are more, it writes only the number and
/// returns HYDRA_STATUS_BUFFER_TOO_SMALL: call it with capacity 0 to learn the number. Any thread may call it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_tokenize(
    model: hydra_model,
    text: *const c_char,
    len: usize,
    begins: i32,
    tokens: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> hydra_status {
    // SAFETY: the caller's word, for all.
    door(|| unsafe {
        let (model, text) = (handle::get::<Model>(model)?, self::text("text", text, len)?);
        let count = Out::new("count", count)?;
        let tokenizer = model.tokenizer()?;
        let ids = if begins == 0 { tokenizer.encode(text)? } else { tokenizer.encode_prompt(text)? };
        copy_out("tokens", &ids, (tokens, capacity), &count)
    })
}

/// The text of `count` token ids, UTF-8, without special tokens and ids that the tokenizer doesn't have.
///
/// Writes up to `capacity` bytes to `text`, a zero byte at their end among them, and the number of bytes with the zero byte
/// to `len`. If there are more, it writes only the number and returns HYDRA_STATUS_BUFFER_TOO_SMALL. Any thread may call it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_detokenize(
    model: hydra_model,
    tokens: *const u32,
    count: usize,
    text: *mut c_char,
    capacity: usize,
    len: *mut usize,
) -> hydra_status {
    // SAFETY: the caller's word, for all.
    door(|| unsafe {
        let (model, ids) = (handle::get::<Model>(model)?, slice("tokens", tokens, count)?);
        let len = Out::new("len", len)?;
        let mut bytes = model.tokenizer()?.decode(ids)?.into_bytes();
        bytes.push(0);
        copy_out("text", &bytes, (text.cast::<u8>(), capacity), &len)
    })
}

/// All tokens that end a text, ascending, for loops over a generator: a chat model may have several.
///
/// Writes up to `capacity` ids to `tokens` and their number to `count`. If there are more, it writes only the number and
/// returns HYDRA_STATUS_BUFFER_TOO_SMALL. Any thread may call it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_model_end_tokens(
    model: hydra_model,
    tokens: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> hydra_status {
    // SAFETY: the caller's word, for all.
    door(|| unsafe {
        let (model, count) = (handle::get::<Model>(model)?, Out::new("count", count)?);
        copy_out("tokens", &model.end_tokens()?, (tokens, capacity), &count)
    })
}

/// Writes the token to end a text with, as one to train on, to `token`; HYDRA_STATUS_OTHER if the model has none. Any
/// thread may call it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_model_eos(model: hydra_model, token: *mut u32) -> hydra_status {
    // SAFETY: the caller's word.
    door(|| unsafe {
        let (model, out) = (handle::get::<Model>(model)?, Out::new("token", token)?);
        let eos = model.tokenizer()?.eos().or(model.config().eos.first().copied());
        let none = || crate::error::Failure { status: hydra_status::Other, text: "the model has no end token".into() };
        out.set(eos.ok_or_else(none)?);
        Ok(())
    })
}
