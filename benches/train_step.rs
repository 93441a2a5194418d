//! One training step of HydraLoRA (r = 8, N = 4, all seven projections) with SmolLM2-135M's shapes, 4 of its 30 layers
//! and random bf16 weights: forward, backward and AdamW, in f32 and in bf16, with all activations kept and with
//! gradient checkpointing; and the forward pass alone.
//!
//! Before anything is timed, the gradient is checked against the slope of the loss.

mod common;

use common::{fastest, peaks};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hydra_runtime::adapter::{Adapter, AdapterConfig, GateKind, Method};
use hydra_runtime::backend::AdamW;
use hydra_runtime::backend::cpu::{Cpu, CpuOptions, Precision};
use hydra_runtime::batch::{NO_TARGET, Sequence};
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::model::Model;
use hydra_runtime::projection::Projection;
use hydra_runtime::train::{ActivationCheckpointing, TrainOptions, Trainer};
use safetensors::tensor::{Dtype, TensorView};
use std::hint::black_box;
use std::path::Path;

const LAYERS: usize = 4;
const D: usize = 576;
const FFN: usize = 1536;
const KV: usize = 192;
const VOCAB: usize = 49_152;

/// Uniform values of standard deviation 0.02, the usual initialisation, as bf16.
fn random(len: usize, state: &mut u64) -> Vec<u8> {
    let mut values = Vec::with_capacity(2 * len);
    for _ in 0..len {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let uniform = (*state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
        values.extend(half::bf16::from_f32(uniform * 0.069).to_le_bytes());
    }
    values
}

fn write_checkpoint(dir: &Path) {
    let mut state = 1;
    let mut tensors = vec![("model.embed_tokens.weight".to_string(), vec![VOCAB, D], random(VOCAB * D, &mut state))];
    let ones = || half::bf16::ONE.to_le_bytes().repeat(D);
    tensors.push(("model.norm.weight".into(), vec![D], ones()));
    for layer in 0..LAYERS {
        let shapes = [
            ("self_attn.q_proj", D, D),
            ("self_attn.k_proj", KV, D),
            ("self_attn.v_proj", KV, D),
            ("self_attn.o_proj", D, D),
            ("mlp.gate_proj", FFN, D),
            ("mlp.up_proj", FFN, D),
            ("mlp.down_proj", D, FFN),
        ];
        for (name, rows, cols) in shapes {
            let weight = random(rows * cols, &mut state);
            tensors.push((format!("model.layers.{layer}.{name}.weight"), vec![rows, cols], weight));
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push((format!("model.layers.{layer}.{norm}.weight"), vec![D], ones()));
        }
    }
    let view = |shape: &Vec<usize>, data| TensorView::new(Dtype::BF16, shape.clone(), data).unwrap();
    let views: Vec<_> = tensors.iter().map(|(name, shape, data)| (name.as_str(), view(shape, data))).collect();
    std::fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    let config = format!(
        r#"{{"model_type": "llama", "vocab_size": {VOCAB}, "hidden_size": {D}, "intermediate_size": {FFN},
        "num_hidden_layers": {LAYERS}, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0, "max_position_embeddings": 8192, "hidden_act": "silu", "tie_word_embeddings": true,
        "bos_token_id": 1, "eos_token_id": 2}}"#
    );
    std::fs::write(dir.join("config.json"), config).unwrap();
}

/// Floating-point operations of a step's frozen products: with each weight once forward and once for dx, the output
/// head's at every position.
fn operations(tokens: usize) -> f64 {
    let block = 2 * D * D + 2 * KV * D + 3 * FFN * D;
    (tokens * 4 * (LAYERS * block + VOCAB * D)) as f64
}

fn sequences(count: usize, len: usize) -> Vec<Sequence> {
    let sequence = |n: usize| {
        let tokens: Vec<u32> = (0..len).map(|i| ((n * 7919 + i * 104_729) % VOCAB) as u32).collect();
        let targets = tokens[1..].iter().copied().chain([NO_TARGET]).collect();
        Sequence { tokens, targets, lora_head: None }
    };
    (0..count).map(sequence).collect()
}

fn adapter(model: &Model<Cpu>) -> Adapter {
    let config = AdapterConfig {
        method: Method::Hydra,
        gate: GateKind::Router,
        rank: 8,
        lora_heads: 4,
        alpha: 32.0,
        dropout: 0.0,
        targets: Projection::ALL.to_vec(),
        ..AdapterConfig::default()
    };
    let mut adapter = Adapter::init(model.config(), config, 0).unwrap();
    let mut sign = 1e-3;
    for b in adapter.layers.iter_mut().flatten().flatten().flat_map(|pair| &mut pair.b) {
        sign = -sign;
        *b = sign;
    }
    adapter
}

fn options(checkpointing: ActivationCheckpointing, max_tokens: usize) -> TrainOptions {
    TrainOptions { checkpointing, max_tokens, clip: None, adam: AdamW::default(), seed: 0 }
}

/// The loss along the gradient, by central differences, against the gradient's square.
fn check(model: &Model<Cpu>, tolerance: f64) {
    let (adapter, sequences) = (adapter(model), sequences(1, 64));
    let mut trainer = Trainer::new(model, &adapter, options(ActivationCheckpointing::Off, 64)).unwrap();
    let (report, gradient) = trainer.gradients(&sequences).unwrap();
    let square = report.grad_norm * report.grad_norm;
    let step = 0.02 / square;
    let loss = |sign: f64| {
        let mut moved = adapter.clone();
        for (pairs, gradients) in moved.layers.iter_mut().flatten().zip(gradient.layers.iter().flatten()) {
            let (Some(pair), Some(gradient)) = (pairs, gradients) else { continue };
            let values = pair.a.iter_mut().chain(&mut pair.b).zip(gradient.a.iter().chain(&gradient.b));
            values.for_each(|(x, g)| *x += (sign * step * f64::from(*g)) as f32);
        }
        let loss = Evaluator::new(model, Some(&moved), 64).unwrap().losses(&sequences).unwrap()[0];
        loss.nll / loss.targets as f64
    };
    let slope = (loss(1.0) - loss(-1.0)) / (2.0 * step);
    assert!((slope / square - 1.0).abs() < tolerance, "slope {slope}, squared gradient {square}");
}

fn train_step(c: &mut Criterion) {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let mut group = c.benchmark_group("train_step");
    group.sample_size(10);
    let batch = sequences(4, 512);
    let tokens = 4 * 512;
    group.throughput(Throughput::Elements(tokens as u64));
    let (f32_peak, bf16_peak) = peaks();
    let kinds = [("f32", Precision::F32, 0.02, f32_peak), ("bf16", Precision::Bf16, 0.2, bf16_peak)];
    for (name, precision, tolerance, peak) in kinds {
        let options_cpu = CpuOptions { precision, ..CpuOptions::default() };
        let model = Model::load(Cpu::new(options_cpu).unwrap(), &checkpoint).unwrap();
        check(&model, tolerance);
        let adapter = adapter(&model);
        let mut evaluator = Evaluator::new(&model, Some(&adapter), tokens).unwrap();
        group.bench_function(BenchmarkId::new("forward", name), |b| {
            b.iter(|| black_box(evaluator.losses(&batch).unwrap()));
        });
        for (label, checkpointing) in
            [("no checkpointing", ActivationCheckpointing::Off), ("checkpointing", ActivationCheckpointing::EveryLayer)]
        {
            let mut trainer = Trainer::new(&model, &adapter, options(checkpointing, tokens)).unwrap();
            let rate = operations(tokens) / fastest(3, || trainer.step(&batch, 1e-4).unwrap());
            let share = 100.0 * rate / (peak * model.backend().threads() as f64);
            println!("step, {label}, {name}: {:.1} GFLOP/s, {share:.0} % of the cores' peak", rate * 1e-9);
            group.bench_function(BenchmarkId::new(format!("step, {label}"), name), |b| {
                b.iter(|| black_box(trainer.step(&batch, 1e-4).unwrap()));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, train_step);
criterion_main!(benches);
