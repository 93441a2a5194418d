//! `config.json` of a Hugging Face folder.

use super::{Config, Llama3Scaling, Rope, RopeScaling};
use crate::Result;
use crate::files::Files;
use crate::json::{Object, shortest};
use serde_json::{Value, json};
use std::path::Path;

/// Its name in a Hugging Face folder.
pub(crate) const FILE: &str = "config.json";
const GENERATION: &str = "generation_config.json";

impl Config {
    /// Reads `config.json` (and the end tokens of `generation_config.json`, if that is there) in `folder`.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        Self::read(&Files::folder(folder.as_ref()))
    }

    pub(crate) fn read(files: &Files) -> Result<Self> {
        let mut config = parse(&files.object(FILE)?)?;
        if files.has(GENERATION) {
            config.eos.extend(files.object(GENERATION)?.token_ids("eos_token_id")?);
        }
        let mut seen = std::collections::HashSet::new();
        config.eos.retain(|&id| seen.insert(id));
        Ok(config)
    }

    /// What [`Config::open`] reads, for weights of type `dtype` ("bfloat16"), in the keys that all of Hugging Face's versions
    /// take. The text says what can't be expressed in them.
    pub(crate) fn to_json(&self, dtype: &str) -> Result<Value, String> {
        let scaling =
            match &self.rope.scaling {
                RopeScaling::None => Value::Null,
                RopeScaling::Linear(factor) => json!({"rope_type": "linear", "factor": shortest(*factor)}),
                RopeScaling::Llama3(scaling) => llama3(scaling),
                RopeScaling::Factors(_) => llama3(&self.rope.as_llama3(self.head_dim).ok_or(
                    "its rotary factors (rope_freqs) are not LLaMA 3.1's, and config.json has no key for others",
                )?),
            };
        let eos = match self.eos.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        };
        Ok(json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": self.vocab,
            "hidden_size": self.d_model, "intermediate_size": self.d_ffn, "num_hidden_layers": self.layers,
            "num_attention_heads": self.n_heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "max_position_embeddings": self.context, "rms_norm_eps": shortest(self.norm_eps),
            "rope_theta": shortest(self.rope.theta), "rope_scaling": scaling, "hidden_act": "silu",
            "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": self.tied, "bos_token_id": self.bos,
            "eos_token_id": eos, "torch_dtype": dtype,
        }))
    }
}

fn llama3(scaling: &Llama3Scaling) -> Value {
    json!({
        "rope_type": "llama3", "factor": shortest(scaling.factor), "low_freq_factor": shortest(scaling.low_freq_factor),
        "high_freq_factor": shortest(scaling.high_freq_factor), "original_max_position_embeddings": scaling.original_context,
    })
}

fn parse(file: &Object) -> Result<Config> {
    let model_type = file.string("model_type")?.unwrap_or("llama");
    if !matches!(model_type, "llama" | "mistral") {
        return Err(file.refuse("model_type", "\"llama\" or \"mistral\""));
    }
    refuse_other_architectures(file)?;
    let context = file.size("max_position_embeddings")?.unwrap_or(2048);
    // A window that no text can outgrow is none.
    if file.size("sliding_window")?.is_some_and(|window| window < context) {
        return Err(file.refuse("sliding_window", &format!("null, or at least the {context} positions")));
    }
    let need = |key: &str| file.size(key)?.ok_or_else(|| file.refuse(key, "a positive whole number"));
    let (d_model, n_heads) = (need("hidden_size")?, need("num_attention_heads")?);
    let head_dim = match file.size("head_dim")? {
        Some(head_dim) => head_dim,
        None if n_heads > 0 && d_model.is_multiple_of(n_heads) => d_model / n_heads,
        None => return Err(file.error(format!("hidden_size {d_model}, wanted a multiple of the {n_heads} heads"))),
    };
    let config = Config {
        vocab: need("vocab_size")?,
        d_model,
        d_ffn: need("intermediate_size")?,
        layers: need("num_hidden_layers")?,
        n_heads,
        kv_heads: file.size("num_key_value_heads")?.unwrap_or(n_heads),
        head_dim,
        norm_eps: file.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        rope: rope(file, context)?,
        context,
        tied: file.boolean("tie_word_embeddings")?.unwrap_or(false),
        bos: file.token_ids("bos_token_id")?.first().copied(),
        eos: file.token_ids("eos_token_id")?,
    };
    config.check().map_err(|message| file.error(message))?;
    Ok(config)
}

/// Options that change the arithmetic into one that isn't implemented.
fn refuse_other_architectures(file: &Object) -> Result<()> {
    for key in ["attention_bias", "mlp_bias"] {
        if file.boolean(key)?.unwrap_or(false) {
            return Err(file.refuse(key, "false"));
        }
    }
    if !matches!(file.string("hidden_act")?, None | Some("silu" | "swish")) {
        return Err(file.refuse("hidden_act", "\"silu\""));
    }
    if file.get("quantization_config").is_some() {
        return Err(file.refuse("quantization_config", "null"));
    }
    if file.number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        return Err(file.refuse("partial_rotary_factor", "1"));
    }
    Ok(())
}

/// `rope_theta` and `rope_scaling`, or both in one `rope_parameters`.
fn rope(file: &Object, context: usize) -> Result<Rope> {
    let parameters = file.object("rope_parameters")?;
    let nested_theta = parameters.as_ref().map(|p| p.number("rope_theta")).transpose()?.flatten();
    let theta = file.number("rope_theta")?.or(nested_theta).unwrap_or(10_000.0) as f32;
    let Some(scaling) = file.object("rope_scaling")?.or(parameters) else {
        return Ok(Rope { theta, scaling: RopeScaling::None });
    };
    let key = if scaling.get("rope_type").is_some() { "rope_type" } else { "type" };
    let need = |key: &str| scaling.number(key)?.map(|x| x as f32).ok_or_else(|| scaling.refuse(key, "a number"));
    let scaling = match scaling.string(key)? {
        None | Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear(need("factor")?),
        Some("llama3") => RopeScaling::Llama3(Llama3Scaling {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_context: scaling.size("original_max_position_embeddings")?.unwrap_or(context),
        }),
        Some(_) => return Err(scaling.refuse(key, "\"default\", \"linear\" or \"llama3\"")),
    };
    Ok(Rope { theta, scaling })
}
