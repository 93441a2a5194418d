//! Tokens a second and peak memory of one configuration, one process: what a whole-process comparison runs.
//!
//!     cargo run --release -p hydra-runtime --example throughput -- MODEL train|forward|decode [key=value ...]
//!
//! Keys and their defaults: adapter=hydra (or lora, none), rank=8, heads=4, precision=bf16 (or f32, q8), isa=best (or a
//! name such as avx512bf16), device=cpu (or cuda:0, with `--features cuda`), threads=all, batch=4, seq=512, pass=0 (tokens
//! in one pass over the model; 0: the whole batch), keep=all (or inputs), steps=5, profile=0 (1: each operation's share of
//! the time). Random tokens, all seven projections, no dropout; every position has a target. The first step is not
//! counted; the median of the others is. `decode` feeds 128 tokens and then times 64, one at a time.
//!
//! At the end the machine's own rates are measured (products in registers, reading and writing memory, on all threads at
//! once), and the speed is printed as a share of what they allow. Elementwise operations on values that stay in a cache can
//! be above that floor. On a GPU there are neither precision, isa, threads, floor nor profile (operations are queued there,
//! not done), and the memory is the host's.

mod floor;
mod peak;
#[path = "../settings/mod.rs"]
mod settings;
mod timed;

use floor::Machine;
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

/// Tokens before those that `decode` times.
const PROMPT: usize = 128;

/// Tokens that `decode` times.
const DECODED: usize = 64;

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
        return run(Cuda::new(Gpu::open(ordinal.parse()?)?), model, mode, settings, None);
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
    let cpu = Cpu::new(options)?;
    let threads = cpu.threads();
    run(cpu, model, mode, settings, Some(&|| Machine::measure(options, threads)))
}

/// `machine` measures the machine, where that is possible.
fn run<B: Backend>(
    backend: B,
    model: &str,
    mode: &str,
    settings: &Settings,
    machine: Option<&dyn Fn() -> Machine>,
) -> Result<()> {
    let checkpoint = Checkpoint::open(Path::new(model))?;
    let measured = Arc::new(Times::default());
    let backend = Timed { inner: backend, times: Arc::clone(&measured), hidden: checkpoint.config().d_model };
    let model = Model::load(backend, &checkpoint)?;
    let adapter = match settings.get("adapter", "hydra") {
        "none" => None,
        kind => Some(Adapter::init(model.config(), config(settings, kind == "lora")?, 0)?),
    };
    let (batch, seq) = (settings.number("batch", 4)?, settings.number("seq", 512)?);
    let job = Job {
        model: &model,
        adapter: adapter.as_ref(),
        sequences: (0..batch).map(|n| sequence(n, seq, model.config().vocab)).collect(),
        pass: Some(settings.number("pass", 0)?).filter(|&pass| pass > 0).unwrap_or(batch * seq),
        checkpointing: match settings.get("keep", "all") {
            "inputs" => ActivationCheckpointing::EveryLayer,
            _ => ActivationCheckpointing::Off,
        },
        steps: settings.number("steps", 5)?.max(1),
        profile: settings.number("profile", 0)? > 0,
    };
    let (tokens, mut times) = match mode {
        "train" => (batch * seq, job.train()?),
        "forward" => (batch * seq, job.forward()?),
        "decode" => (DECODED, job.decode()?),
        other => return Err(format!("{other}: expected train, forward or decode").into()),
    };
    let last = Duration::from_secs_f64(times[times.len() - 1]);
    times.sort_by(f64::total_cmp);
    let [rate, slowest, fastest] = [times.len() / 2, times.len() - 1, 0].map(|i| tokens as f64 / times[i]);
    let (device, count, memory) = (model.backend().describe(), times.len(), peak_memory_mib());
    println!(
        "{device}, {mode}: {rate:.1} tokens/s (median of {count}; {slowest:.1} to {fastest:.1}), peak memory {memory} MiB"
    );
    let Some(machine) = machine.map(|measure| measure()) else { return Ok(()) };
    println!("{}", machine.describe());
    if let Some(floor) = measured.floor(&machine) {
        let (share, most) = (100.0 * floor * rate / tokens as f64, tokens as f64 / floor);
        println!("{share:.0} % of this machine's floor, {most:.0} tokens/s");
    }
    if job.profile {
        measured.print(&machine, last);
    }
    Ok(())
}

/// What is measured, and on what.
struct Job<'a, B: Backend> {
    model: &'a Model<Timed<B>>,
    adapter: Option<&'a Adapter>,
    sequences: Vec<Sequence>,
    /// Tokens in one pass over the model.
    pass: usize,
    checkpointing: ActivationCheckpointing,
    /// Those that are counted.
    steps: usize,
    profile: bool,
}

impl<B: Backend> Job<'_, B> {
    /// Seconds of each step of training.
    fn train(&self) -> Result<Vec<f64>> {
        let (model, checkpointing) = (self.model, self.checkpointing);
        let options =
            TrainOptions { checkpointing, max_tokens: self.pass, clip: None, adam: AdamW::default(), seed: 0 };
        let adapter = self.adapter.ok_or("adapter=none can't be trained")?;
        let planned = Trainer::plan_bytes(model.backend(), model.config(), &adapter.config, &options)?;
        println!("planned: {} MiB beside the weights", planned >> 20);
        let mut trainer = Trainer::new(model, adapter, options)?;
        self.time(|| {
            let start = self.start();
            let report = trainer.step(&self.sequences, 2e-4)?;
            let seconds = start.elapsed().as_secs_f64();
            println!("loss {:.4}", report.loss);
            Ok(seconds)
        })
    }

    /// Seconds of each pass over all sequences.
    fn forward(&self) -> Result<Vec<f64>> {
        let mut evaluator = Evaluator::new(self.model, self.adapter, self.pass)?;
        let prompts: Vec<Sequence> = self.sequences.iter().map(|s| Sequence::prompt(&s.tokens)).collect();
        self.time(|| {
            let start = self.start();
            evaluator.last_logits(&prompts, &[0, 1, 2, 3])?;
            Ok(start.elapsed().as_secs_f64())
        })
    }

    /// Seconds of each [`DECODED`] tokens, one at a time.
    fn decode(&self) -> Result<Vec<f64>> {
        let tokens = sequence(0, PROMPT + DECODED, self.model.config().vocab).tokens;
        let (prompt, decoded) = tokens.split_at(PROMPT);
        let mut generator = Generator::new(self.model, self.adapter, tokens.len())?;
        self.time(|| {
            generator.truncate(0);
            generator.feed(prompt)?;
            let start = self.start();
            for token in decoded {
                generator.feed(&[*token])?;
            }
            Ok(start.elapsed().as_secs_f64())
        })
    }

    /// The time from which a step counts; what was measured before is forgotten.
    fn start(&self) -> Instant {
        self.model.backend().times.reset();
        Instant::now()
    }

    /// Seconds of each step but the first, in which work is counted. With a profile, the last step's times are left.
    fn time(&self, mut step: impl FnMut() -> hydra_runtime::Result<f64>) -> Result<Vec<f64>> {
        let times = &self.model.backend().times;
        times.switch(true);
        step()?;
        times.switch(self.profile);
        Ok((0..self.steps).map(|_| step()).collect::<hydra_runtime::Result<_>>()?)
    }
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
