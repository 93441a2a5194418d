//! Writes tiny models in both containers.

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use std::path::Path;

/// A tiny model: 2 layers, d 8, ffn 12, 2 heads of 4, 1 key/value head, vocabulary 6.
pub fn config_json() -> Value {
    json!({"model_type": "llama", "vocab_size": 6, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false, "bos_token_id": 0, "eos_token_id": 1})
}

/// The tensors of [`config_json`]'s model: Hugging Face name, shape. All distinct values follow from the position.
pub fn tensors() -> Vec<(String, Vec<usize>)> {
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_string(), vec![6, 8]),
        ("model.norm.weight".to_string(), vec![8]),
        ("lm_head.weight".to_string(), vec![6, 8]),
    ];
    for layer in 0..2 {
        let shapes: [(&str, &[usize]); 9] = [
            ("input_layernorm", &[8]),
            ("post_attention_layernorm", &[8]),
            ("self_attn.q_proj", &[8, 8]),
            ("self_attn.k_proj", &[4, 8]),
            ("self_attn.v_proj", &[4, 8]),
            ("self_attn.o_proj", &[8, 8]),
            ("mlp.gate_proj", &[12, 8]),
            ("mlp.up_proj", &[12, 8]),
            ("mlp.down_proj", &[8, 12]),
        ];
        tensors.extend(shapes.map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape.to_vec())));
    }
    tensors
}

/// The i-th value of the t-th tensor.
pub fn value(t: usize, i: usize) -> f32 {
    (t * 1000 + i) as f32 / 1024.0
}

pub fn values(t: usize, shape: &[usize]) -> Vec<f32> {
    (0..shape.iter().product()).map(|i| value(t, i)).collect()
}

/// Serialises f32 tensors.
pub fn safetensors(tensors: &[(String, Vec<usize>, Vec<f32>)]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, shape, values)| {
        (name, TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(values)).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

pub fn model_tensors() -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let all = tensors().into_iter().enumerate();
    all.map(|(t, (name, shape))| (name, shape.clone(), values(t, &shape))).collect()
}

/// Writes the model as a Hugging Face folder in one file.
pub fn write_folder(dir: &Path, config: &Value, tensors: &[(String, Vec<usize>, Vec<f32>)]) {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.join("model.safetensors"), safetensors(tensors)).unwrap();
}

/// Name, dims (fastest first), type, offset (in order if `None`), bytes.
pub type RawTensor = (String, Vec<u64>, u32, Option<u64>, Vec<u8>);

/// A GGUF file under construction.
#[derive(Clone)]
pub struct Gguf {
    pub version: u32,
    pub pairs: Vec<(String, Vec<u8>)>,
    pub tensors: Vec<RawTensor>,
}

pub fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

impl Gguf {
    pub fn new() -> Self {
        Self { version: 3, pairs: Vec::new(), tensors: Vec::new() }
    }

    fn pair(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.pairs.retain(|(old, _)| old != key);
        self.pairs.push((key.into(), [&kind.to_le_bytes(), value].concat()));
    }

    pub fn u32(&mut self, key: &str, value: u32) {
        self.pair(key, 4, &value.to_le_bytes());
    }

    pub fn f32(&mut self, key: &str, value: f32) {
        self.pair(key, 6, &value.to_le_bytes());
    }

    pub fn bool(&mut self, key: &str, value: bool) {
        self.pair(key, 7, &[value.into()]);
    }

    pub fn string(&mut self, key: &str, value: &str) {
        self.pair(key, 8, &string(value));
    }

    pub fn strings(&mut self, key: &str, values: &[&str]) {
        let head = [&8u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        self.pair(key, 9, &values.iter().fold(head, |bytes, value| [bytes, string(value)].concat()));
    }

    pub fn i32s(&mut self, key: &str, values: &[i32]) {
        let head = [&5u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        self.pair(key, 9, &[&head, bytemuck::cast_slice(values)].concat());
    }

    pub fn f32s(&mut self, key: &str, values: &[f32]) {
        let head = [&6u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        self.pair(key, 9, &[&head, bytemuck::cast_slice(values)].concat());
    }

    /// An f32 tensor; `shape` slowest first.
    pub fn tensor(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        let dims = shape.iter().rev().map(|&n| n as u64).collect();
        self.tensors.push((name.into(), dims, 0, None, bytemuck::cast_slice(values).to_vec()));
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.pairs.len() as u64).to_le_bytes());
        for (key, value) in &self.pairs {
            file.extend(string(key));
            file.extend(value);
        }
        let mut data = Vec::new();
        for (name, dims, kind, offset, bytes) in &self.tensors {
            data.resize(data.len().next_multiple_of(32), 0);
            file.extend(string(name));
            file.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| file.extend(dim.to_le_bytes()));
            file.extend(kind.to_le_bytes());
            file.extend(offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(bytes);
        }
        file.resize(file.len().next_multiple_of(32), 0);
        [file, data].concat()
    }

    /// The tiny model, with llama.cpp's names and row order, and a SentencePiece-like vocabulary of six.
    pub fn model() -> Self {
        let mut gguf = Self::new();
        gguf.string("general.architecture", "llama");
        for (key, value) in [
            ("block_count", 2),
            ("context_length", 64),
            ("embedding_length", 8),
            ("feed_forward_length", 12),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
            ("rope.dimension_count", 4),
        ] {
            gguf.u32(&format!("llama.{key}"), value);
        }
        gguf.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
        gguf.string("tokenizer.ggml.model", "llama");
        gguf.strings("tokenizer.ggml.tokens", &["<unk>", "</s>", "▁", "a", "b", "▁a"]);
        gguf.f32s("tokenizer.ggml.scores", &[0.0, 0.0, -1.0, -2.0, -3.0, -0.5]);
        gguf.i32s("tokenizer.ggml.token_type", &[2, 3, 1, 1, 1, 1]);
        gguf.u32("tokenizer.ggml.bos_token_id", 0);
        gguf.u32("tokenizer.ggml.eos_token_id", 1);
        for (name, shape, values) in model_tensors() {
            let values = match name.rsplit('.').nth(1) {
                Some("q_proj" | "k_proj") => interleave(&values, 4, shape[1]),
                _ => values,
            };
            gguf.tensor(&gguf_name(&name), &shape, &values);
        }
        gguf
    }

    /// The model of a Hugging Face folder with one file of f32, as llama.cpp's converter writes it, without a tokenizer.
    pub fn of_folder(folder: &Path) -> Self {
        let config: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        let size = |key: &str| config[key].as_u64().map(|n| n as u32);
        // llama.cpp knows Mistral as LLaMA.
        let architecture = match config["model_type"].as_str().unwrap() {
            "mistral" => "llama",
            other => other,
        };
        let head_dim = size("head_dim").unwrap_or(size("hidden_size").unwrap() / size("num_attention_heads").unwrap());
        let mut gguf = Self::new();
        gguf.string("general.architecture", architecture);
        for (name, value) in [
            ("block_count", size("num_hidden_layers")),
            ("context_length", size("max_position_embeddings")),
            ("embedding_length", size("hidden_size")),
            ("feed_forward_length", size("intermediate_size")),
            ("attention.head_count", size("num_attention_heads")),
            ("attention.head_count_kv", size("num_key_value_heads")),
            ("attention.key_length", Some(head_dim)),
            ("attention.value_length", Some(head_dim)),
            ("attention.sliding_window", size("sliding_window")),
        ] {
            value.into_iter().for_each(|value| gguf.u32(&format!("{architecture}.{name}"), value));
        }
        let float = |key: &str| config[key].as_f64().unwrap() as f32;
        gguf.f32(&format!("{architecture}.attention.layer_norm_rms_epsilon"), float("rms_norm_eps"));
        gguf.f32(&format!("{architecture}.rope.freq_base"), float("rope_theta"));
        if config["rope_scaling"]["rope_type"] == "llama3" {
            let theta = f64::from(float("rope_theta"));
            let factors = rope_factors(&config["rope_scaling"], theta, head_dim as usize);
            gguf.tensor("rope_freqs.weight", &[factors.len()], &factors);
        }
        let scaling = &config["rope_scaling"];
        if scaling["rope_type"] == "yarn" {
            gguf.string(&format!("{architecture}.rope.scaling.type"), "yarn");
            gguf.f32(&format!("{architecture}.rope.scaling.factor"), scaling["factor"].as_f64().unwrap() as f32);
            let original = scaling["original_max_position_embeddings"].as_u64().unwrap();
            gguf.u32(&format!("{architecture}.rope.scaling.original_context_length"), original as u32);
        }
        for (name, id) in [("bos", "bos_token_id"), ("eos", "eos_token_id")] {
            size(id).into_iter().for_each(|id| gguf.u32(&format!("tokenizer.ggml.{name}_token_id"), id));
        }
        let file = std::fs::read(folder.join("model.safetensors")).unwrap();
        for (name, view) in SafeTensors::deserialize(&file).unwrap().iter() {
            let values: Vec<f32> = bytemuck::pod_collect_to_vec(view.data());
            let (shape, rotated) = (view.shape(), name.contains("q_proj") || name.contains("k_proj"));
            let values = match shape {
                [_, cols] if rotated && architecture == "llama" => interleave(&values, head_dim as usize, *cols),
                [_] if rotated && architecture == "llama" => interleave(&values, head_dim as usize, 1),
                _ => values,
            };
            gguf.tensor(&gguf_name(name), shape, &values);
        }
        gguf
    }
}

/// The divisors of the rotary frequencies of LLaMA 3.1's scaling, as llama.cpp's converter computes them.
fn rope_factors(scaling: &Value, theta: f64, head_dim: usize) -> Vec<f32> {
    let number = |key: &str| scaling[key].as_f64().unwrap();
    let (factor, context) = (number("factor"), number("original_max_position_embeddings"));
    let (low, high) = (number("low_freq_factor"), number("high_freq_factor"));
    let factor_of = |pair: usize| {
        let wavelength = 2.0 * std::f64::consts::PI * theta.powf(2.0 * pair as f64 / head_dim as f64);
        let smooth = ((context / wavelength - low) / (high - low)).clamp(0.0, 1.0);
        (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
    };
    (0..head_dim / 2).map(factor_of).collect()
}

/// llama.cpp's order of q's and k's rows: those of both halves of a head in turn.
fn interleave(values: &[f32], head_dim: usize, cols: usize) -> Vec<f32> {
    let row = |stored: usize| stored / 2 + stored % 2 * (head_dim / 2);
    let heads = values.chunks(head_dim * cols);
    heads.flat_map(|head| (0..head_dim).flat_map(move |stored| &head[row(stored) * cols..][..cols])).copied().collect()
}

pub fn gguf_name(name: &str) -> String {
    let pairs = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    pairs.iter().fold(name.to_string(), |name, (hf, gguf)| name.replace(hf, gguf))
}
