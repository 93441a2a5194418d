//! `config.json` of a Hugging Face folder.

use super::architecture::{Traits, WindowRule, supported};
use super::{Architecture, Biases, Config, Llama3Scaling, Rope, RopeScaling, Window, Yarn};
use crate::Result;
use crate::files::Files;
use crate::json::{Object, shortest};
use serde_json::{Value, json};
use std::num::NonZeroUsize;
use std::path::Path;

/// Its name in a Hugging Face folder.
pub(crate) const FILE: &str = "config.json";
const GENERATION: &str = "generation_config.json";
/// transformers' `sliding_window` where config.json has none.
const DEFAULT_WINDOW: usize = 4096;
/// transformers' `max_window_layers` where config.json has none.
const DEFAULT_WINDOW_LAYERS: usize = 28;
const LAYER_TYPES: &str = "layer_types";

impl Config {
    /// Reads `config.json` in `folder`. The end tokens are those of `generation_config.json` where it names some.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        Self::read(&Files::folder(folder.as_ref()))
    }

    pub(crate) fn read(files: &Files) -> Result<Self> {
        let mut config = parse(&files.object(FILE)?)?;
        if files.has(GENERATION) {
            let eos = files.object(GENERATION)?.token_ids("eos_token_id")?;
            if !eos.is_empty() {
                config.eos = eos;
            }
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
                RopeScaling::Yarn(scaling) => yarn(scaling),
                RopeScaling::Dynamic(factor) => json!({"rope_type": "dynamic", "factor": shortest(*factor)}),
                RopeScaling::LongRope { .. } => {
                    return Err("its rope scaling is LongRoPE, of which only a part is kept".into());
                }
                RopeScaling::Factors(_) => llama3(&self.rope.as_llama3(self.head_dim).ok_or(
                    "its rotary factors (rope_freqs) are not LLaMA 3.1's, and config.json has no key for others",
                )?),
            };
        let eos = match self.eos.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        };
        let traits = self.architecture.family.traits();
        let [attention_bias, mlp_bias] = self.bias_flags()?;
        let mut config = json!({
            "architectures": [traits.class], "model_type": traits.model_type, "vocab_size": self.vocab,
            "hidden_size": self.d_model, "intermediate_size": self.d_ffn, "num_hidden_layers": self.layers,
            "num_attention_heads": self.n_heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "max_position_embeddings": self.context, "rms_norm_eps": shortest(self.norm_eps),
            "rope_theta": shortest(self.rope.theta), "rope_scaling": scaling, "hidden_act": "silu",
            "attention_bias": attention_bias, "mlp_bias": mlp_bias, "tie_word_embeddings": self.tied,
            "bos_token_id": self.bos, "eos_token_id": eos, "torch_dtype": dtype,
        });
        let window = self.architecture.window.as_ref();
        if traits.window != WindowRule::Never {
            config["sliding_window"] = json!(window.map(|window| window.size));
        }
        if traits.window == WindowRule::Optional {
            config["use_sliding_window"] = json!(window.is_some());
            config["max_window_layers"] = json!(window.map_or(self.layers, |window| window.from_layer().unwrap_or(0)));
        }
        if let Some(window) = window.filter(|window| !window.everywhere()) {
            let name = |&slides: &bool| if slides { "sliding_attention" } else { "full_attention" };
            config[LAYER_TYPES] = window.layers.iter().map(name).collect();
        }
        Ok(config)
    }

    /// `attention_bias` and `mlp_bias`. Fails where the model has biases that its family has no key for.
    fn bias_flags(&self) -> Result<[bool; 2], String> {
        let (traits, biases) = (self.architecture.family.traits(), self.architecture.biases);
        let flags = [biases.o, biases.mlp];
        if biases_of(traits, flags) == biases {
            Ok(flags)
        } else {
            Err(format!("its biases are others than config.json can state for model_type \"{}\"", traits.model_type))
        }
    }
}

/// The biases of a family's model with these values of `attention_bias` and `mlp_bias`.
fn biases_of(traits: &Traits, [attention_bias, mlp_bias]: [bool; 2]) -> Biases {
    let attention = attention_bias && traits.attention_bias;
    Biases {
        qkv: traits.biases.qkv || attention,
        o: traits.biases.o || attention,
        mlp: traits.biases.mlp || mlp_bias && traits.mlp_bias,
    }
}

fn llama3(scaling: &Llama3Scaling) -> Value {
    json!({
        "rope_type": "llama3", "factor": shortest(scaling.factor), "low_freq_factor": shortest(scaling.low_freq_factor),
        "high_freq_factor": shortest(scaling.high_freq_factor), "original_max_position_embeddings": scaling.original_context,
    })
}

fn yarn(scaling: &Yarn) -> Value {
    json!({
        "rope_type": "yarn", "factor": shortest(scaling.factor),
        "original_max_position_embeddings": scaling.original_context, "beta_fast": shortest(scaling.beta_fast),
        "beta_slow": shortest(scaling.beta_slow), "attention_factor": shortest(scaling.attention_factor),
        "truncate": scaling.truncate,
    })
}

fn parse(file: &Object) -> Result<Config> {
    let model_type = file.string("model_type")?.unwrap_or("llama");
    let Some(traits) = Traits::of_model_type(model_type) else {
        return Err(file.refuse("model_type", &supported(|traits| Some(traits.model_type))));
    };
    refuse_other_architectures(file)?;
    let context = file.size("max_position_embeddings")?.unwrap_or(2048);
    let need = |key: &str| file.size(key)?.ok_or_else(|| file.refuse(key, "a positive whole number"));
    let (d_model, n_heads, layers) = (need("hidden_size")?, need("num_attention_heads")?, need("num_hidden_layers")?);
    let head_dim = match file.size("head_dim")?.or(traits.head_dim) {
        Some(head_dim) => head_dim,
        None if n_heads > 0 && d_model.is_multiple_of(n_heads) => d_model / n_heads,
        None => return Err(file.error(format!("hidden_size {d_model}, wanted a multiple of the {n_heads} heads"))),
    };
    let flag = |key: &str| Ok::<_, crate::Error>(file.boolean(key)?.unwrap_or(false));
    let (rope, within) = rope(file, context)?;
    let architecture = Architecture {
        family: traits.family,
        biases: biases_of(traits, [flag("attention_bias")?, flag("mlp_bias")?]),
        head_norms: traits.head_norms,
        window: window(file, traits, layers)?,
    };
    // Null means none; without the key there is transformers' default.
    let ends = |key: &str, default: Option<u32>| match file.map.contains_key(key) {
        true => file.token_ids(key),
        false => Ok(default.into_iter().collect()),
    };
    let config = Config {
        vocab: need("vocab_size")?,
        d_model,
        d_ffn: need("intermediate_size")?,
        layers,
        n_heads,
        kv_heads: match file.size("num_key_value_heads")? {
            None if !file.map.contains_key("num_key_value_heads") => traits.kv_heads.unwrap_or(n_heads),
            kv_heads => kv_heads.unwrap_or(n_heads),
        },
        head_dim,
        norm_eps: file.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        rope,
        context: within,
        tied: file.boolean("tie_word_embeddings")?.unwrap_or(false),
        bos: ends("bos_token_id", traits.bos)?.first().copied(),
        eos: ends("eos_token_id", traits.eos)?,
        architecture,
    };
    config.check().map_err(|message| file.error(message))?;
    Ok(config)
}

/// The sliding window, as the family reads its keys.
fn window(file: &Object, traits: &Traits, layers: usize) -> Result<Option<Window>> {
    const KEY: &str = "sliding_window";
    let size = file.size(KEY)?;
    // Null means none; without the key there is transformers' default.
    let default = size.or((!file.map.contains_key(KEY)).then_some(DEFAULT_WINDOW));
    let (size, first_layer) = match traits.window {
        WindowRule::Never => return Ok(None),
        WindowRule::Always => (default, 0),
        WindowRule::Optional if file.boolean("use_sliding_window")?.unwrap_or(false) => {
            (default, file.count("max_window_layers")?.unwrap_or(DEFAULT_WINDOW_LAYERS))
        }
        WindowRule::Optional => (None, 0),
    };
    let types = layer_types(file, layers)?;
    let slides = |layer: usize| types.as_ref().map_or(layer >= first_layer, |slides| slides[layer]);
    match size.and_then(NonZeroUsize::new) {
        Some(size) => Ok(Window::new(size, layers, slides)),
        None if types.iter().flatten().any(|&slides| slides) => {
            let wanted = format!("\"full_attention\" for each of the {layers} layers: the model has no sliding window");
            Err(file.refuse(LAYER_TYPES, &wanted))
        }
        None => Ok(None),
    }
}

/// Which layers have a sliding window, if the file says it of each.
fn layer_types(file: &Object, layers: usize) -> Result<Option<Vec<bool>>> {
    let Some(types) = file.strings(LAYER_TYPES)? else { return Ok(None) };
    let slides = |name: &String| match name.as_str() {
        "sliding_attention" => Some(true),
        // The second is an old name.
        "full_attention" | "attention" => Some(false),
        _ => None,
    };
    let types: Option<Vec<bool>> = types.iter().map(slides).collect();
    let types = types.filter(|types| types.len() == layers).ok_or_else(|| {
        file.refuse(
            LAYER_TYPES,
            &format!("\"full_attention\" or \"sliding_attention\" for each of the {layers} layers"),
        )
    })?;
    Ok(Some(types))
}

/// Options that change the arithmetic into one that isn't implemented.
fn refuse_other_architectures(file: &Object) -> Result<()> {
    if !matches!(file.string("hidden_act")?, None | Some("silu" | "swish")) {
        return Err(file.refuse("hidden_act", "\"silu\""));
    }
    if file.get("quantization_config").is_some() {
        return Err(file.refuse("quantization_config", "null"));
    }
    whole_heads_turn(file)
}

/// Fails if a part of each head's columns alone is to be rotated. For these families transformers leaves the key out of account, or
/// fails if positions are scaled, while vLLM rotates the part.
fn whole_heads_turn(object: &Object) -> Result<()> {
    const KEY: &str = "partial_rotary_factor";
    if object.number(KEY)?.is_some_and(|factor| factor != 1.0) {
        return Err(object.refuse(KEY, "1"));
    }
    Ok(())
}

/// `rope_theta` and `rope_scaling`, or both in one `rope_parameters`; which counts is as in transformers. In addition the
/// context in which the scaling is known.
fn rope(file: &Object, context: usize) -> Result<(Rope, usize)> {
    let scaling = match file.object("rope_scaling")?.filter(|scaling| !scaling.map.is_empty()) {
        None => file.object("rope_parameters")?,
        scaling => scaling,
    };
    let nested_theta = scaling.as_ref().map(|scaling| scaling.number("rope_theta")).transpose()?.flatten();
    let theta = nested_theta.or(file.number("rope_theta")?).unwrap_or(10_000.0) as f32;
    let Some(scaling) = scaling else {
        return Ok((Rope { theta, scaling: RopeScaling::None }, context));
    };
    whole_heads_turn(&scaling)?;
    let key = if scaling.get("rope_type").is_some() { "rope_type" } else { "type" };
    let need = |key: &str| scaling.number(key)?.map(|x| x as f32).ok_or_else(|| scaling.refuse(key, "a number"));
    let original = "original_max_position_embeddings";
    let original = file.size(original)?.or(scaling.size(original)?).unwrap_or(context);
    let stretch = scaling.number("factor")?.unwrap_or(context as f64 / original as f64);
    let (scaling, context) = match scaling.string(key)? {
        None | Some("default") => (RopeScaling::None, context),
        Some("linear") => (RopeScaling::Linear(need("factor")?), context),
        Some("dynamic") => (RopeScaling::Dynamic(need("factor")?), context),
        Some("llama3") => {
            let scaling = Llama3Scaling {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_context: original,
            };
            (RopeScaling::Llama3(scaling), context)
        }
        Some("yarn") => (RopeScaling::Yarn(read_yarn(&scaling, stretch, original)?), context),
        Some("longrope") => {
            let attention_factor = match scaling.number("attention_factor")? {
                None if stretch <= 1.0 => 1.0,
                None => (1.0 + stretch.ln() / (original as f64).ln()).sqrt(),
                Some(factor) => factor,
            };
            let factors = scaling.numbers("short_factor")?;
            let factors = factors.ok_or_else(|| scaling.refuse("short_factor", "a list of numbers"))?;
            let factors = factors.into_iter().map(|factor| factor as f32).collect();
            let attention_factor = attention_factor as f32;
            (RopeScaling::LongRope { factors, attention_factor }, context.min(original))
        }
        Some(_) => {
            let wanted = r#""default", "linear", "dynamic", "yarn", "longrope" or "llama3""#;
            return Err(scaling.refuse(key, wanted));
        }
    };
    Ok((Rope { theta, scaling }, context))
}

/// A context that is `stretch` times as long as the original one.
fn read_yarn(scaling: &Object, stretch: f64, original_context: usize) -> Result<Yarn> {
    // transformers takes 0 for not given, here and below.
    let number = |key: &str| Ok::<_, crate::Error>(scaling.number(key)?.filter(|&x| x != 0.0));
    let weighed = number("mscale")?.zip(number("mscale_all_dim")?);
    let attention_factor = match (scaling.number("attention_factor")?, weighed) {
        (Some(factor), _) => factor,
        (None, Some((mscale, all))) => Yarn::mscale(stretch, mscale) / Yarn::mscale(stretch, all),
        (None, None) => Yarn::mscale(stretch, 1.0),
    };
    let beta = |key: &str, default: f32| Ok::<_, crate::Error>(number(key)?.map_or(default, |x| x as f32));
    let [beta_fast, beta_slow] = Yarn::BETAS;
    Ok(Yarn {
        factor: stretch as f32,
        original_context,
        beta_fast: beta("beta_fast", beta_fast)?,
        beta_slow: beta("beta_slow", beta_slow)?,
        truncate: scaling.boolean("truncate")?.unwrap_or(true),
        attention_factor: attention_factor as f32,
    })
}
