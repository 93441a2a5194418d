//! A model's metadata for a GGUF file: copied from the GGUF that it came from, or made of its configuration and tokenizer.

use super::container::Container;
use super::writer::Header;
use super::{ATTENTION_FACTOR, ROPE_FACTORS, describe_tokenizer, types};
use crate::checkpoint::Checkpoint;
use crate::config::{Config, RopeScaling, Yarn};
use crate::{Error, Result};
use hydra_kernels::quant::Format;

/// Keys that are about the tensors of one file, or about how it was cut.
const OF_ONE_FILE: [&str; 3] = ["general.file_type", "general.quantization_version", "general.alignment"];
/// `general.quantization_version` of today's block formats.
const QUANTIZATION_VERSION: usize = 2;

/// The metadata of a file whose matrices are mostly in `format`. Fails where the model has something that GGUF has no key for.
pub(crate) fn model(checkpoint: &Checkpoint, format: Format) -> Result<Header> {
    let mut header = Header::default();
    match checkpoint.gguf() {
        Some(bytes) => {
            let file = Container::parse(checkpoint.path(), bytes)?;
            let kept = |key: &str| !OF_ONE_FILE.contains(&key) && !key.starts_with("split.");
            file.pairs.iter().filter(|(key, _)| kept(key)).for_each(|(key, pair)| header.raw(*key, pair));
        }
        None => {
            let refuse = |message| Error::Config { path: checkpoint.path().into(), message };
            config(&mut header, checkpoint.config()).map_err(refuse)?;
            describe_tokenizer::write(&mut header, &checkpoint.tokenizer()?, checkpoint.config())?;
        }
    }
    header.u32("general.file_type", types::file_type(format));
    header.u32("general.quantization_version", QUANTIZATION_VERSION);
    Ok(header)
}

/// What an adapter's file says, beside its tensors.
pub(crate) fn lora(config: &Config, alpha: f32) -> Header {
    let mut header = Header::default();
    header.string("general.architecture", architecture(config));
    header.string("general.type", "adapter");
    header.string("adapter.type", "lora");
    header.f32("adapter.lora.alpha", alpha);
    header
}

/// The name of the model's architecture: Mistral is "llama".
pub(crate) fn architecture(config: &Config) -> &'static str {
    config.architecture.family.traits().gguf.unwrap_or("llama")
}

/// The keys that `config` of `gguf.rs` reads.
fn config(header: &mut Header, config: &Config) -> Result<(), String> {
    let name = architecture(config);
    let key = |rest: &str| format!("{name}.{rest}");
    header.string("general.architecture", name);
    header.string("general.type", "model");
    for (rest, value) in [
        ("context_length", config.context),
        ("embedding_length", config.d_model),
        ("block_count", config.layers),
        ("feed_forward_length", config.d_ffn),
        ("attention.head_count", config.n_heads),
        ("attention.head_count_kv", config.kv_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", config.head_dim),
        ("vocab_size", config.vocab),
    ] {
        header.u32(key(rest), value);
    }
    header.f32(key("attention.layer_norm_rms_epsilon"), config.norm_eps);
    header.f32(key("rope.freq_base"), config.rope.theta);
    let mut scaling = |kind, factor| {
        header.string(key("rope.scaling.type"), kind);
        header.f32(key("rope.scaling.factor"), factor);
    };
    match &config.rope.scaling {
        // The factors of the last two are a tensor.
        RopeScaling::None | RopeScaling::Llama3(_) | RopeScaling::Factors(_) => {}
        RopeScaling::Linear(factor) => scaling("linear", *factor),
        RopeScaling::Yarn(yarn) => {
            scaling("yarn", yarn.factor);
            self::yarn(header, key, yarn)?;
        }
        RopeScaling::Dynamic(_) => return Err("its rope scaling is \"dynamic\", which GGUF has no name for".into()),
        RopeScaling::LongRope { .. } => return Err("its rope scaling is LongRoPE, which isn't written to GGUF".into()),
    }
    if let Some(window) = &config.architecture.window {
        if !window.everywhere() {
            return Err("some of its layers have a sliding window and some have none, which GGUF has no key for".into());
        }
        header.u32(key("attention.sliding_window"), window.size.get());
    }
    Ok(())
}

/// YaRN's numbers, but for the factor.
fn yarn(header: &mut Header, key: impl Fn(&str) -> String, yarn: &Yarn) -> Result<(), String> {
    if !yarn.truncate || [yarn.beta_fast, yarn.beta_slow] != Yarn::BETAS {
        return Err("its rope scaling, YaRN, has another ramp than the usual one, which llama.cpp doesn't read".into());
    }
    header.u32(key("rope.scaling.original_context_length"), yarn.original_context);
    // llama.cpp computes the usual attention factor itself.
    let usual = Yarn::mscale(yarn.factor.into(), 1.0) as f32;
    if yarn.attention_factor != usual {
        header.f32(key(ATTENTION_FACTOR), yarn.attention_factor / usual);
    }
    Ok(())
}

/// The tensor that says what the rotary frequencies are divided by, if the model has one: name and values.
pub(crate) fn rope_factors(config: &Config) -> Option<(String, Vec<f32>)> {
    Some((ROPE_FACTORS.into(), config.rope.factors(config.head_dim)?))
}
