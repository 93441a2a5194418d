//! Tokens a second and peak memory of one configuration, one process: what a whole-process comparison runs.
//!
//!     cargo run --release -p hydra-runtime --example throughput -- MODEL train|forward|decode [key=value ...]
//!
//! Keys and their defaults: adapter=hydra (or lora, none), rank=8, heads=4, precision=bf16 (or f32, q8), isa=best (or a name such
//! as avx512bf16), device=cpu (or cuda:0, with `--features cuda`), threads=all, batch=4, seq=512, pass=0 (tokens in one pass over the model; 0: the whole batch), keep=all (or
//! inputs), steps=5, profile=0 (1: each operation's share of the time). Random tokens, all seven projections, no dropout; every position has a target. The first step is not
//! counted; the median of the others is. `decode` feeds 128 tokens and then times 64, one at a time. On a GPU there are
//! neither precision, isa, threads nor profile (operations are queued there, not done), and the memory is the host's.

#[path = "../settings/mod.rs"]
mod settings;
mod timed;

use hydra_kernels::{Bf16Isa, Isa, Q8Isa};
use hydra_runtime::adapter::{Adapter, AdapterConfig, GateKind, Method};
use hydra_runtime::backend::AdamW;
use hydra_runtime::backend::Backend;
use hydra_runtime::backend::cpu::{Cpu, CpuOptions};
use hydra_runtime::batch::{NO_TARGET, Sequence};
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::generate::Generator;
use hydra_runtime::model::Model;
use hydra_runtime::projection::Projection;
use hydra_runtime::train::{ActivationCheckpointing, TrainOptions, Trainer};
use settings::Settings;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use timed::{Timed, Times};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// What may be set.
const KEYS: [&str; 13] = [
    "adapter",
    "rank",
    "heads",
    "precision",
    "isa",
    "device",
    "threads",
    "batch",
    "seq",
    "pass",
    "keep",
    "steps",
    "profile",
];

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, mode, rest @ ..] = arguments.as_slice() else {
        return Err("usage: throughput MODEL train|forward|decode [key=value ...]".into());
    };
    let settings = &Settings::new(rest, &KEYS)?;
    let isa = settings.get("isa", "best");
    let known = Isa::by_name(isa).is_some() || Bf16Isa::by_name(isa).is_some() || Q8Isa::by_name(isa).is_some();
    if isa != "best" && !known {
        return Err(format!("isa={isa}: this machine has no such instruction set").into());
    }
    #[cfg(feature = "cuda")]
    if let Some(ordinal) = settings.gpu()? {
        use hydra_runtime::backend::cuda::{Cuda, Gpu};
        if let Some(key) =
            ["precision", "isa", "threads", "profile"].into_iter().find(|key| settings.0.contains_key(*key))
        {
            return Err(format!("{key}: not with a GPU").into());
        }
        return run(Cuda::new(Gpu::open(ordinal.parse()?)?), model, mode, settings);
    }
    #[cfg(not(feature = "cuda"))]
    settings.gpu()?;
    let options = CpuOptions {
        threads: settings.threads()?,
        precision: settings.precision("bf16")?,
        isa: Isa::by_name(isa),
        bf16_isa: Bf16Isa::by_name(isa),
        q8_isa: Q8Isa::by_name(isa),
        ..CpuOptions::default()
    };
    run(Cpu::new(options)?, model, mode, settings)
}

fn run<B: Backend>(backend: B, model: &str, mode: &str, settings: &Settings) -> Result<()> {
    let checkpoint = Checkpoint::open(Path::new(model))?;
    let measured = Arc::new(Times::default());
    let profile = settings.number("profile", 0)? > 0;
    let backend = Timed { inner: backend, times: profile.then(|| Arc::clone(&measured)) };
    let model = Model::load(backend, &checkpoint)?;
    let adapter = match settings.get("adapter", "hydra") {
        "none" => None,
        kind => Some(Adapter::init(model.config(), config(settings, kind == "lora")?, 0)?),
    };
    let (batch, seq) = (settings.number("batch", 4)?, settings.number("seq", 512)?);
    let tokens = batch * seq;
    let pass = match settings.number("pass", 0)? {
        0 => tokens,
        pass => pass,
    };
    let sequences: Vec<Sequence> = (0..batch).map(|n| sequence(n, seq, model.config().vocab)).collect();
    let steps = settings.number("steps", 5)?;
    let (counted, times) = match mode {
        "train" => {
            let checkpointing = if settings.get("keep", "all") == "inputs" {
                ActivationCheckpointing::EveryLayer
            } else {
                ActivationCheckpointing::Off
            };
            let options = TrainOptions { checkpointing, max_tokens: pass, clip: None, adam: AdamW::default(), seed: 0 };
            let adapter = adapter.ok_or("adapter=none can't be trained")?;
            let planned = Trainer::plan_bytes(model.backend(), model.config(), &adapter.config, &options)?;
            println!("planned: {} MiB beside the weights", planned >> 20);
            let mut trainer = Trainer::new(&model, &adapter, options)?;
            let mut step = || trainer.step(&sequences, 2e-4).map(|report| println!("loss {:.4}", report.loss));
            (tokens, time(steps, &measured, &mut step)?)
        }
        "forward" => {
            let mut evaluator = Evaluator::new(&model, adapter.as_ref(), pass)?;
            let prompts: Vec<Sequence> = sequences.iter().map(|s| Sequence::prompt(&s.tokens)).collect();
            (tokens, time(steps, &measured, &mut || evaluator.last_logits(&prompts, &[0, 1, 2, 3]).map(drop))?)
        }
        "decode" => {
            let tokens = sequence(0, 192, model.config().vocab).tokens;
            let mut generator = Generator::new(&model, adapter.as_ref(), tokens.len())?;
            let run = &mut || {
                generator.truncate(0);
                generator.feed(&tokens[..128])?;
                measured.reset();
                let start = Instant::now();
                for token in &tokens[128..] {
                    generator.feed(&[*token])?;
                }
                Ok(start.elapsed().as_secs_f64())
            };
            let times = (0..=steps).map(|_| run()).collect::<hydra_runtime::Result<Vec<f64>>>()?;
            (64, times)
        }
        other => return Err(format!("{other}: wanted train, forward or decode").into()),
    };
    let mut times = times[1..].to_vec();
    let last = Duration::from_secs_f64(times[times.len() - 1]);
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    println!(
        "{}, {mode}: {:.1} tokens/s (median of {}; {:.1} to {:.1}), peak memory {} MiB",
        model.backend().describe(),
        counted as f64 / median,
        times.len(),
        counted as f64 / times[times.len() - 1],
        counted as f64 / times[0],
        peak_memory_mib()
    );
    if profile {
        measured.print(last);
    }
    Ok(())
}

/// Seconds of each step, the first of which isn't counted; `measured` is left with the last one's.
fn time<R>(steps: usize, measured: &Times, op: &mut impl FnMut() -> hydra_runtime::Result<R>) -> Result<Vec<f64>> {
    let mut times = Vec::new();
    for _ in 0..=steps.max(1) {
        measured.reset();
        let start = Instant::now();
        op()?;
        times.push(start.elapsed().as_secs_f64());
    }
    Ok(times)
}

fn sequence(n: usize, len: usize, vocab: usize) -> Sequence {
    let tokens: Vec<u32> = (0..len).map(|i| (20 + (n * 7919 + i * 104_729) % (vocab - 20)) as u32).collect();
    let targets = tokens[1..].iter().copied().chain([NO_TARGET]).collect();
    Sequence { tokens, targets, lora_head: None }
}

fn config(settings: &Settings, lora: bool) -> Result<AdapterConfig> {
    Ok(AdapterConfig {
        method: if lora { Method::Lora } else { Method::Hydra },
        gate: if lora { GateKind::One } else { GateKind::Router },
        rank: settings.number("rank", 8)?,
        lora_heads: if lora { 1 } else { settings.number("heads", 4)? },
        alpha: 32.0,
        dropout: 0.0,
        targets: Projection::ALL.to_vec(),
        ..AdapterConfig::default()
    })
}

/// The kernel's count of this process; 0 where there is none.
fn peak_memory_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).unwrap_or(0) / 1024
}
