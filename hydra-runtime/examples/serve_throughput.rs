//! Tokens a second of the engine, for 1, 4 and 16 requests at once.
//!
//!     cargo run --release -p hydra-runtime --example serve_throughput -- MODEL [key=value ...]
//!
//! Keys and their defaults: requests=1,4,16; adapters=0 (or 4: each request has one of so many random HydraLoRA
//! adapters of 4 heads of rank 8 on all projections), prompt=128, generated=64, precision=f32 (or bf16, q8), threads=all,
//! prefix=0 (tokens of prompts that are kept; prompts share none), device=cpu (or cuda:0, with `--features cuda`).
//! Prompts are random tokens. All requests are submitted at once; time to first token counts from there. Each row is
//! the median of three runs by tokens a second, after one that isn't counted.

mod settings;

use hydra_runtime::adapter::{Adapter, AdapterConfig};
use hydra_runtime::backend::Device;
use hydra_runtime::backend::cpu::CpuOptions;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::generate::Sampler;
use hydra_runtime::model::{AttachedAdapter, Model};
use hydra_runtime::projection::Projection;
use hydra_runtime::serve::{Engine, EngineOptions, Event, Request};
use settings::Settings;
use std::collections::HashMap;
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// What may be set.
const KEYS: [&str; 8] = ["requests", "adapters", "prompt", "generated", "precision", "threads", "prefix", "device"];

fn device(settings: &Settings) -> Result<Device> {
    match settings.gpu()? {
        #[cfg(feature = "cuda")]
        Some(ordinal) => Ok(Device::cuda(ordinal.parse()?)?),
        _ => Ok(Device::cpu(CpuOptions {
            threads: settings.threads()?,
            precision: settings.precision("f32")?,
            ..CpuOptions::default()
        })?),
    }
}

/// One run's figures.
struct Run {
    /// From the first request's submission to the last token.
    total: Duration,
    /// To the first token, for each request, ascending.
    first: Vec<Duration>,
    tokens: usize,
}

impl Run {
    fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.total.as_secs_f64()
    }
}

/// An adapter that does something: a new one's B is zero.
fn random_adapter(model: &Model, seed: u64) -> Result<AttachedAdapter> {
    let mut adapter = Adapter::init(
        model.config(),
        AdapterConfig { rank: 8, targets: Projection::ALL.to_vec(), ..AdapterConfig::default() },
        seed,
    )?;
    for pair in adapter.layers.iter_mut().flatten().flatten() {
        pair.b.iter_mut().enumerate().for_each(|(i, b)| *b = ((i as u64 * 31 + seed * 7) % 13) as f32 * 1e-4);
    }
    Ok(model.attach(&adapter)?)
}

fn run(model: &Model, adapters: &[AttachedAdapter], count: usize, settings: &Settings) -> Result<Run> {
    let (prompt, generated) = (settings.number("prompt", 128)?, settings.number("generated", 64)?);
    let options = EngineOptions {
        slots: count,
        context: Some(prompt + generated),
        prefix_tokens: settings.number("prefix", 0)?,
        ..EngineOptions::default()
    };
    let mut engine = Engine::new(model, options)?;
    let vocab = model.config().vocab as u64;
    let start = Instant::now();
    let mut first = HashMap::new();
    for i in 0..count as u64 {
        let tokens = (0..prompt as u64).map(|t| ((t * t * 7 + t * 131 + i * 977) % vocab) as u32).collect();
        let mut request = Request::new(tokens, Sampler::new(0.0, 1.0, 0)?);
        request.max_tokens = generated;
        request.adapter = (!adapters.is_empty()).then(|| adapters[i as usize % adapters.len()].clone());
        engine.submit(request)?;
    }
    while !engine.is_idle() {
        for event in engine.step()? {
            match event {
                Event::Token { id, .. } => drop(first.entry(id).or_insert_with(|| start.elapsed())),
                Event::Failed { error, .. } => return Err(error.into()),
                Event::Prompt { .. } | Event::Finished { .. } => {}
            }
        }
    }
    let total = start.elapsed();
    let mut first: Vec<Duration> = first.into_values().collect();
    first.sort();
    Ok(Run { total, first, tokens: engine.stats().generated_tokens as usize })
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, rest @ ..] = arguments.as_slice() else {
        return Err("usage: serve_throughput MODEL [key=value ...]".into());
    };
    let settings = Settings::new(rest, &KEYS)?;
    let model = Model::load(device(&settings)?, &Checkpoint::open(model)?)?;
    let count = settings.number("adapters", 0)? as u64;
    let adapters = (0..count).map(|seed| random_adapter(&model, seed)).collect::<Result<Vec<_>>>()?;
    println!("requests  tokens/s  first token: median     95 %");
    for count in settings.get("requests", "1,4,16").split(',') {
        let count = count.parse().map_err(|_| format!("requests: {count}: expected a number"))?;
        run(&model, &adapters, count, &settings)?;
        let mut runs = (0..3).map(|_| run(&model, &adapters, count, &settings)).collect::<Result<Vec<_>>>()?;
        runs.sort_by(|a, b| a.tokens_per_second().total_cmp(&b.tokens_per_second()));
        let median = &runs[1];
        let at = |share: f64| {
            let index = (share * (median.first.len() - 1) as f64).round() as usize;
            median.first.get(index).map_or(0.0, |first| first.as_secs_f64() * 1e3)
        };
        println!("{count:8}  {:8.1}  {:16.0} ms  {:5.0} ms", median.tokens_per_second(), at(0.5), at(0.95));
    }
    Ok(())
}
