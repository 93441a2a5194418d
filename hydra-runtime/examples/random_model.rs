//! Writes a LLaMA with random weights in bf16, to time shapes for which no checkpoint is at hand.
//!
//!     cargo run --release -p hydra-runtime --example random_model -- DIR [key=value ...]
//!
//! Keys and their defaults, LLaMA-2-7B's: d_model=4096, d_ffn=11008, layers=32, heads=32, kv_heads=32, vocab=32000, context=4096.
//! 13 GB then. There is no tokenizer: what reads text can't use it, `throughput` can.

use safetensors::Dtype;
use safetensors::tensor::View;
use std::borrow::Cow;
use std::path::Path;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A tensor that is made when it is written.
struct Random {
    shape: Vec<usize>,
    seed: u64,
}

impl View for Random {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let len: usize = self.shape.iter().product();
        // A norm's weights are ones.
        if self.shape.len() == 1 {
            return half::bf16::ONE.to_le_bytes().repeat(len).into();
        }
        let columns = self.shape[1];
        let mut bytes = vec![0; 2 * len];
        // Some rows for each processor.
        let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
        let part = self.shape[0].div_ceil(threads);
        std::thread::scope(|scope| {
            for (first, bytes) in (0..).step_by(part).zip(bytes.chunks_mut(2 * part * columns)) {
                scope.spawn(move || {
                    (first..).zip(bytes.chunks_exact_mut(2 * columns)).for_each(|(row, bytes)| self.fill(row, bytes));
                });
            }
        });
        bytes.into()
    }

    fn data_len(&self) -> usize {
        2 * self.shape.iter().product::<usize>()
    }
}

impl Random {
    /// A row's values: evenly in ±√3/√columns, so that a product keeps its input's variance.
    fn fill(&self, row: u64, bytes: &mut [u8]) {
        let size = (3.0 / self.shape[1] as f32).sqrt();
        let mut state = ((self.seed << 32) + row).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for bytes in bytes.chunks_exact_mut(2) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let value = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
            bytes.copy_from_slice(&half::bf16::from_f32(size * value).to_le_bytes());
        }
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, rest @ ..] = arguments.as_slice() else { return Err("usage: random_model DIR [key=value ...]".into()) };
    let mut sizes = [
        ("d_model", 4096),
        ("d_ffn", 11008),
        ("layers", 32),
        ("heads", 32),
        ("kv_heads", 32),
        ("vocab", 32000),
        ("context", 4096),
    ];
    for setting in rest {
        let (key, value) = setting.split_once('=').ok_or(format!("{setting}: wanted key=value"))?;
        let size = sizes.iter_mut().find(|(name, _)| *name == key).ok_or(format!("{key}: no such key"))?;
        size.1 = value.parse().map_err(|_| format!("{setting}: wanted a number"))?;
    }
    let [d_model, d_ffn, layers, n_heads, kv_heads, vocab, context] = sizes.map(|(_, size)| size);
    if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
        return Err(format!("{name}=0: wanted a positive number").into());
    }
    if d_model % n_heads != 0 || n_heads % kv_heads != 0 {
        return Err(format!("d_model {d_model}, heads {n_heads}, kv_heads {kv_heads}: wanted d_model a multiple of heads, heads of kv_heads").into());
    }
    let kv = d_model / n_heads * kv_heads;
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_string(), vec![vocab, d_model]),
        ("model.norm.weight".into(), vec![d_model]),
        ("lm_head.weight".into(), vec![vocab, d_model]),
    ];
    for layer in 0..layers {
        let of = |name: &str, shape: Vec<usize>| (format!("model.layers.{layer}.{name}.weight"), shape);
        shapes.extend([
            of("input_layernorm", vec![d_model]),
            of("post_attention_layernorm", vec![d_model]),
            of("self_attn.q_proj", vec![d_model, d_model]),
            of("self_attn.k_proj", vec![kv, d_model]),
            of("self_attn.v_proj", vec![kv, d_model]),
            of("self_attn.o_proj", vec![d_model, d_model]),
            of("mlp.gate_proj", vec![d_ffn, d_model]),
            of("mlp.up_proj", vec![d_ffn, d_model]),
            of("mlp.down_proj", vec![d_model, d_ffn]),
        ]);
    }
    let tensors = shapes.into_iter().zip(1..).map(|((name, shape), seed)| (name, Random { shape, seed }));
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": d_model,
        "intermediate_size": d_ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
    });
    let dir = Path::new(dir);
    std::fs::create_dir_all(dir)?;
    std::fs::write(dir.join("config.json"), serde_json::to_string_pretty(&config)?)?;
    safetensors::serialize_to_file(tensors, None, &dir.join("model.safetensors"))?;
    Ok(())
}
