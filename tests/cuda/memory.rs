//! The device's memory that is announced is what training takes. The device only counts bytes, so that models have
//! the sizes of real ones.

use hydra_kernels::quant::{Format, RowOrder};
use hydra_kernels::shape::HydraShape;
use hydra_ptx::launch::{Instructions, Launch, is_large};
use hydra_runtime::Result;
use hydra_runtime::adapter::{Adapter, AdapterConfig, GateKind, Method};
use hydra_runtime::backend::cuda::{Cuda, Driver};
use hydra_runtime::backend::{AdamW, AdapterArgs, AdapterSlot, Backend, Linear, LinearOutput, Routing, StoredWeight};
use hydra_runtime::batch::{NO_TARGET, Sequence};
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::merge::{GgufOptions, MergeGate, write_gguf};
use hydra_runtime::model::Model;
use hydra_runtime::projection::Projection;
use hydra_runtime::train::{ActivationCheckpointing, TrainOptions, Trainer};
use safetensors::tensor::{Dtype, TensorView};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Bytes that are allocated, and the most that were at once.
#[derive(Clone, Copy, Default)]
struct Bytes {
    now: u64,
    most: u64,
}

/// A device that computes nothing.
#[derive(Default)]
struct Counting {
    bytes: Arc<Mutex<Bytes>>,
    end: AtomicU64,
    /// Whether large matrices have room for an adapter, as with cuBLASLt.
    has_room: bool,
}

struct Piece {
    at: u64,
    len: u64,
    bytes: Arc<Mutex<Bytes>>,
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.bytes.lock().unwrap().now -= self.len;
    }
}

impl Driver for Counting {
    type Memory = Piece;
    type Entered = ();

    fn enter(&self) {}

    fn allocate(&self, bytes: usize) -> Result<Piece> {
        let len = (bytes as u64).next_multiple_of(256);
        let mut all = self.bytes.lock().unwrap();
        all.now += len;
        all.most = all.most.max(all.now);
        Ok(Piece { at: 256 + self.end.fetch_add(len, Ordering::Relaxed), len, bytes: self.bytes.clone() })
    }

    fn address(&self, memory: &Piece) -> u64 {
        memory.at
    }

    fn upload(&self, _: &mut Piece, _: usize, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn download(&self, to: &mut [u8], _: &Piece) -> Result<()> {
        to.fill(0);
        Ok(())
    }

    fn copy(&self, _: &mut Piece, _: usize, _: &Piece, _: Range<usize>) -> Result<()> {
        Ok(())
    }

    fn zero(&self, _: &mut Piece, _: usize) -> Result<()> {
        Ok(())
    }

    unsafe fn launch(&self, _: &Launch) -> Result<()> {
        Ok(())
    }

    fn room(&self, rows: usize, columns: usize) -> Result<usize> {
        Ok(if self.has_room && is_large(rows, columns) { 64 } else { 0 })
    }

    fn instructions(&self) -> Instructions {
        Instructions::Mma
    }

    fn free_bytes(&self) -> Result<u64> {
        Ok(1 << 40)
    }

    fn describe(&self) -> String {
        "counting".into()
    }
}

/// Columns of the residual stream and of the feed-forward, heads, key heads.
const SIZES: [[usize; 4]; 2] = [[512, 1376, 8, 4], [36, 90, 3, 1]];
const VOCAB: usize = 9000;

/// A model of zeros with two layers.
fn write_model(dir: &Path, [d, ffn, heads, kv_heads]: [usize; 4]) {
    let kv = d / heads * kv_heads;
    let mut tensors = vec![("model.embed_tokens.weight".to_string(), vec![VOCAB, d])];
    tensors.push(("model.norm.weight".into(), vec![d]));
    for layer in 0..2 {
        let (q, k, v, o) = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj");
        let attention = [(q, d, d), (k, kv, d), (v, kv, d), (o, d, d)];
        let ffn = [("mlp.gate_proj", ffn, d), ("mlp.up_proj", ffn, d), ("mlp.down_proj", d, ffn)];
        for (name, rows, columns) in attention.into_iter().chain(ffn) {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), vec![rows, columns]));
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push((format!("model.layers.{layer}.{norm}.weight"), vec![d]));
        }
    }
    let zeros = vec![0; 2 * VOCAB * d];
    let view = |shape: &Vec<usize>| {
        TensorView::new(Dtype::BF16, shape.clone(), &zeros[..2 * shape.iter().product::<usize>()]).unwrap()
    };
    let views: Vec<_> = tensors.iter().map(|(name, shape)| (name.as_str(), view(shape))).collect();
    std::fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    let config = format!(
        r#"{{"model_type": "llama", "vocab_size": {VOCAB}, "hidden_size": {d}, "intermediate_size": {ffn},
        "num_hidden_layers": 2, "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads}, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 8192, "hidden_act": "silu", "tie_word_embeddings": true,
        "bos_token_id": 1, "eos_token_id": 2}}"#
    );
    std::fs::write(dir.join("config.json"), config).unwrap();
    // A GGUF file has the tokenizer in it.
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("harness/assets/model/tokenizer.json");
    std::fs::copy(tokenizer, dir.join("tokenizer.json")).unwrap();
}

fn sequences(count: usize, len: usize) -> Vec<Sequence> {
    let sequence = |n: usize| {
        let tokens: Vec<u32> = (0..len).map(|i| ((n * 7919 + i * 104_729) % VOCAB) as u32).collect();
        let targets = tokens[1..].iter().copied().chain([NO_TARGET]).collect();
        Sequence { tokens, targets, lora_head: Some(0) }
    };
    (0..count).map(sequence).collect()
}

/// The bytes that evaluation, training, and both with passes of a third more tokens in evaluation take and those that were announced,
/// each beside the weights.
fn taken_and_announced(checkpoint: &Checkpoint, config: AdapterConfig, tokens: usize, has_room: bool) -> [[u64; 2]; 3] {
    let driver = Counting { has_room, ..Counting::default() };
    let bytes = driver.bytes.clone();
    let model = Model::load(Cuda::new(driver), checkpoint).unwrap();
    let options = TrainOptions {
        checkpointing: ActivationCheckpointing::Off,
        max_tokens: tokens,
        clip: Some(1.0),
        adam: AdamW::default(),
        seed: 0,
    };
    let adapter = Adapter::init(model.config(), config, 0).unwrap();
    let before = bytes.lock().unwrap().now;
    let since = || bytes.lock().unwrap().most - before;
    let passes = [sequences(1, tokens), sequences(tokens / 3, 3), sequences(1, tokens - 1)];
    let announced = Evaluator::plan_bytes(model.backend(), model.config(), Some(&adapter.config), tokens).unwrap();
    let mut evaluator = Evaluator::new(&model, Some(&adapter), tokens).unwrap();
    for pass in &passes {
        evaluator.losses(pass).unwrap();
    }
    let evaluated = [since(), announced];
    drop(evaluator);
    let announced = Trainer::plan_bytes(model.backend(), model.config(), &adapter.config, &options).unwrap();
    let mut trainer = Trainer::new(&model, &adapter, options).unwrap();
    for pass in &passes {
        trainer.step(pass, 1e-3).unwrap();
    }
    let trained = [since(), announced];
    let (backend, more) = (model.backend(), tokens + tokens / 3);
    let beside = Trainer::evaluator_bytes(backend, model.config(), &adapter.config, &options, more).unwrap();
    let mut evaluator = Evaluator::new(&model, Some(&adapter), more).unwrap();
    for pass in [sequences(1, more), sequences(more / 3, 3)] {
        evaluator.losses(&pass).unwrap();
    }
    drop(trainer);
    [evaluated, trained, [since(), announced + beside]]
}

pub fn announced_is_taken() {
    let hydra = AdapterConfig { targets: Projection::ALL.to_vec(), ..AdapterConfig::default() };
    let adapters = [
        hydra.clone(),
        AdapterConfig { dropout: 0.1, head_dropout: 0.1, load_balance: 0.5, ..hydra.clone() },
        AdapterConfig { rank: 256, lora_heads: 16, ..hydra.clone() },
        AdapterConfig { rank: 200, lora_heads: 7, targets: vec![Projection::Down], ..hydra.clone() },
        AdapterConfig { rank: 129, lora_heads: 3, method: Method::Split, gate: GateKind::Label, ..hydra.clone() },
    ];
    for sizes in SIZES {
        let dir = tempfile::tempdir().unwrap();
        write_model(dir.path(), sizes);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        // Quantised, so that matrices are decoded.
        let quantised = dir.path().join("model.gguf");
        let lora = AdapterConfig { method: Method::Lora, gate: GateKind::One, lora_heads: 1, ..hydra.clone() };
        let lora = Adapter::init(checkpoint.config(), lora, 0).unwrap();
        let format = Format::Q8_0;
        write_gguf(&checkpoint, &lora, MergeGate::One, &quantised, GgufOptions { format, description: None }).unwrap();
        let quantised = Checkpoint::open(&quantised).unwrap();
        for (name, checkpoint) in [("bf16", &checkpoint), ("q8_0", &quantised)] {
            for (config, tokens) in adapters.iter().flat_map(|config| [(config, 200), (config, 700), (config, 4200)]) {
                for has_room in [false, true] {
                    let both = taken_and_announced(checkpoint, config.clone(), tokens, has_room);
                    for ([taken, announced], what) in both.into_iter().zip(["evaluation", "training", "both"]) {
                        // What is announced for quantised weights, and for a library that finds work.
                        let more = if name == "q8_0" && !has_room { taken / 33 } else { 64 << 20 };
                        let (rank, heads) = (config.rank, config.lora_heads);
                        let case = format!("{sizes:?} {name}, rank {rank} x {heads}, {tokens} tokens, {what}");
                        assert!(
                            (taken..=taken + more).contains(&announced),
                            "{case}: {announced} bytes announced, {taken} taken"
                        );
                    }
                }
            }
        }
    }
}

/// Sizes beyond what kernels count in 32 bits are refused.
pub fn more_values_than_32_bits_count() {
    let cuda = Cuda::new(Counting::default());
    for (d_in, d_out, rank, tokens) in [(8, 1 << 16, 1 << 16, 8), (1 << 20, 8, 1 << 12, 8), (8, 8, 1 << 12, 1 << 20)] {
        let shape = HydraShape { d_in, d_out, rank, lora_heads: 1, per_head_a: false, router: false };
        let (a, b) = (rank * d_in, d_out * rank);
        let (gate, routing) = (GateKind::One, Routing::default());
        let slot = &AdapterSlot { shape, gate, routing, scale: 1.0, a: 0..a, b: a..a + b };
        let params = &cuda.buffer(a + b).unwrap();
        let args = &AdapterArgs { slot, params, labels: &[], dropout: None, head_dropout: None, balance: 0.0 };
        let [x, mut y] = [d_in, d_out].map(|width| cuda.activations(tokens * width).unwrap());
        let weight = vec![0; 2 * d_in * d_out.min(8)];
        let weight = StoredWeight::new(Format::Bf16, d_out.min(8), d_in, weight, RowOrder::Natural).unwrap();
        let weight = &cuda.matrix(weight).unwrap();
        let mut state = cuda.buffer(tokens * shape.state_width()).unwrap();
        let output = LinearOutput::Activations { y: &mut y, residual: None };
        let adapter = Some((args, &mut state));
        let refused = cuda.linear(Linear { output, tokens, x: &x, weight, bias: None, adapter }).unwrap_err();
        assert!(refused.to_string().contains("less than 2^32"), "{refused}");
    }
}
