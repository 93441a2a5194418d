//! Whole models: PyTorch's losses and trajectories (`tests/golden`), and generation against the CPU's.

use crate::emulated;
use crate::support::golden_case;
use crate::support::{assert_close, cpu};
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::cuda::{Cuda, Driver};
use hydra_runtime::backend::{AdamW, Backend};
use hydra_runtime::batch::{NO_TARGET, Sequence, groups};
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::generate::{Generator, Sampler};
use hydra_runtime::model::{AttachedAdapter, Model};
use hydra_runtime::serve::{Engine, EngineOptions, Event, Request};
use hydra_runtime::train::{ActivationCheckpointing, TrainOptions, Trainer};
use safetensors::SafeTensors;
use std::path::Path;
use std::sync::atomic::Ordering;

/// A case's sequences. A record's category decides its head.
fn sequences(golden: &SafeTensors<'_>, dir: &Path, adapter: &Adapter) -> Vec<Sequence> {
    let integers = |name: String| bytemuck::pod_collect_to_vec::<u8, i64>(golden.tensor(&name).unwrap().data());
    let records = std::fs::read_to_string(dir.join("data.jsonl")).unwrap();
    let read = |(n, record): (usize, &str)| {
        let target = |id: &i64| if *id < 0 { NO_TARGET } else { *id as u32 };
        let named = |label: &String| record.contains(&format!("\"category\": \"{label}\""));
        Sequence {
            tokens: integers(format!("ids.{n}")).iter().map(|&id| id as u32).collect(),
            targets: integers(format!("targets.{n}")).iter().map(target).collect(),
            lora_head: adapter.config.labels.iter().position(named).map(|i| i as u32),
        }
    };
    records.lines().enumerate().map(read).collect()
}

/// Some steps of each kind of adapter, three of each architecture: the losses agree with PyTorch's f32 ones to 1e-2, and two
/// runs have the same bits.
pub fn golden<D: Driver>(open: impl Fn() -> Cuda<D>, steps: usize) {
    let adapters = ["hydra", "lora", "split"].map(|name| (name, steps));
    let architectures = ["qwen2", "qwen3", "mistral", "yarn"].map(|name| (name, 3));
    for (name, steps) in adapters.into_iter().chain(architectures) {
        let dir = golden_case(name);
        let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
        let golden = SafeTensors::deserialize(&bytes).unwrap();
        let checkpoint = Checkpoint::open(dir.join("model")).unwrap();
        let adapter = Adapter::load(dir.join("adapter"), checkpoint.config()).unwrap();
        let sequences = sequences(&golden, &dir, &adapter);
        assert!(name != "split" || sequences.iter().all(|s| s.lora_head.is_some()), "{name}: labels");
        let run = |checkpointing, steps: usize| {
            let model = Model::load(open(), &checkpoint).unwrap();
            let options = TrainOptions { checkpointing, max_tokens: 512, clip: None, adam: AdamW::default(), seed: 0 };
            let mut trainer = Trainer::new(&model, &adapter, options).unwrap();
            (0..steps).map(|_| trainer.step(&sequences, 1e-3).unwrap().loss as f32).collect::<Vec<_>>()
        };
        let losses = run(ActivationCheckpointing::Off, steps);
        let want: Vec<f32> = bytemuck::pod_collect_to_vec(golden.tensor("trajectory").unwrap().data());
        assert_close(&format!("{name}: trajectory"), &losses, &want[..steps], 1e-2);
        let (fell, should) = (losses[0] - losses[steps - 1], want[0] - want[steps - 1]);
        assert!((fell - should).abs() <= 0.05 * should, "{name}: the loss fell by {fell}, PyTorch's by {should}");
        assert_eq!(run(ActivationCheckpointing::EveryLayer, 2), losses[..2], "{name}: recomputed");
    }
}

/// A step waits only for the loss of each pass, once all of the pass is queued, for the gradient's norm and for the
/// adapter's. After the first step nothing is allocated.
pub fn a_step_waits_for_what_it_reads() {
    let dir = golden_case("hydra");
    let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(dir.join("model")).unwrap();
    let adapter = Adapter::load(dir.join("adapter"), checkpoint.config()).unwrap();
    let sequences = sequences(&SafeTensors::deserialize(&bytes).unwrap(), &dir, &adapter);
    let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.tokens.len()).collect();
    let max_tokens = *lengths.iter().max().unwrap();
    let passes = groups(&lengths, max_tokens).unwrap().len();
    assert!(passes > 1);
    // Sums that end with the last pass: see `train/sum.rs`.
    let (mut additions, mut last) = (0, passes);
    while last > 1 {
        last -= last.next_power_of_two() / 2;
        additions += 1;
    }
    let (cuda, waits) = emulated::counted();
    let model = Model::load(cuda, &checkpoint).unwrap();
    let options = TrainOptions {
        checkpointing: ActivationCheckpointing::Off,
        max_tokens,
        clip: Some(1.0),
        adam: AdamW::default(),
        seed: 0,
    };
    let mut trainer = Trainer::new(&model, &adapter, options).unwrap();
    trainer.step(&sequences, 1e-3).unwrap();
    for _ in 0..2 {
        let allocations = waits.allocations.load(Ordering::Relaxed);
        waits.downloads.lock().unwrap().clear();
        trainer.step(&sequences, 1e-3).unwrap();
        assert_eq!(waits.allocations.load(Ordering::Relaxed), allocations);
        let downloads = waits.downloads.lock().unwrap();
        assert_eq!(downloads.len(), passes + 2);
        let after = downloads[passes] - downloads[passes - 1];
        assert_eq!(after, additions + 2, "the last pass's additions and the norm come after its loss");
    }
}

/// A prompt, then token by token; a shared prefix with tails.
pub fn generation<D: Driver>(open: impl Fn() -> Cuda<D>) {
    for name in ["hydra", "qwen2", "qwen3", "mistral"] {
        generated(&open, name);
    }
}

fn generated<D: Driver>(open: &impl Fn() -> Cuda<D>, name: &str) {
    let dir = golden_case(name);
    let checkpoint = Checkpoint::open(dir.join("model")).unwrap();
    let adapter = Adapter::load(dir.join("adapter"), checkpoint.config()).unwrap();
    let prompt: Vec<u32> = (0..70).map(|i| (i * 37 + 11) % 512).collect();
    let tails: Vec<_> = [3, 66].map(|len| Sequence::prompt(&prompt[..len])).into();
    fn run<B: Backend>(
        b: B,
        checkpoint: &Checkpoint,
        adapter: &Adapter,
        prompt: &[u32],
        tails: &[Sequence],
    ) -> Vec<f32> {
        let model = Model::load(b, checkpoint).unwrap();
        let mut generator = Generator::new(&model, Some(adapter), 80).unwrap();
        let mut logits = generator.feed(prompt).unwrap().to_vec();
        for token in [5, 6] {
            logits.extend(generator.feed(&[token]).unwrap());
        }
        let mut evaluator = Evaluator::new(&model, Some(adapter), 100).unwrap();
        evaluator.set_prefix(prompt).unwrap();
        logits.extend(evaluator.last_logits(tails, &[1, 2, 511]).unwrap().concat());
        logits
    }
    let got = run(open(), &checkpoint, &adapter, &prompt, &tails);
    assert_close(&format!("{name}: logits"), &got, &run(cpu(), &checkpoint, &adapter, &prompt, &tails), 2e-2);
}

/// Requests one by one, and together with prompts that begin in the same way: the same tokens and log-probabilities,
/// and the CPU's but for rounding.
pub fn served<D: Driver>(open: impl Fn() -> Cuda<D>) {
    let dir = golden_case("qwen2");
    let checkpoint = Checkpoint::open(dir.join("model")).unwrap();
    let adapter = Adapter::load(dir.join("adapter"), checkpoint.config()).unwrap();
    let prompt: Vec<u32> = (0..66).map(|i| i * i * 7 % 512).collect();
    fn requests<B: Backend>(adapter: AttachedAdapter<B>, prompt: &[u32]) -> [Request<B>; 3] {
        let request = |len: usize, adapter: Option<&AttachedAdapter<B>>| {
            let mut request = Request::new(prompt[..len].to_vec(), Sampler::new(0.0, 1.0, 0).unwrap());
            (request.adapter, request.max_tokens, request.top_logprobs) = (adapter.cloned(), 2, Some(512));
            request
        };
        [request(66, Some(&adapter)), request(3, None), request(65, Some(&adapter))]
    }
    fn run<B: Backend>(engine: &mut Engine<B>, requests: Vec<Request<B>>) -> Vec<Vec<f32>> {
        let ids: Vec<_> = requests.into_iter().map(|request| engine.submit(request).unwrap()).collect();
        let mut results = vec![Vec::new(); ids.len()];
        while !engine.is_idle() {
            for event in engine.step().unwrap() {
                let at = ids.iter().position(|id| *id == event.id()).unwrap();
                if let Event::Token { logprob, .. } = event {
                    let mut top = logprob.unwrap().top;
                    top.sort_by_key(|(id, _)| *id);
                    results[at].extend(top.iter().map(|(_, logprob)| logprob));
                }
            }
        }
        results
    }
    let options = EngineOptions { slots: 3, prefix_tokens: 64, ..EngineOptions::default() };
    let model = Model::load(open(), &checkpoint).unwrap();
    let mut engine = Engine::new(&model, options).unwrap();
    let attached = model.attach(&adapter).unwrap();
    let together = run(&mut engine, requests(attached.clone(), &prompt).into());
    assert_eq!(engine.stats().prefix_hit_tokens, 64);
    let alone = requests(attached, &prompt).map(|request| {
        run(&mut Engine::new(&model, EngineOptions { prefix_tokens: 0, ..options }).unwrap(), vec![request]).concat()
    });
    assert_eq!(together, alone);
    let model = Model::load(cpu(), &checkpoint).unwrap();
    let attached = model.attach(&adapter).unwrap();
    let on_cpu = run(&mut Engine::new(&model, options).unwrap(), requests(attached, &prompt).into());
    assert_close("log-probabilities", &together.concat(), &on_cpu.concat(), 2e-2);
}
