//! What must hold of any model: the cache, prefixes and packing change nothing. Its gradients are in
//! `engine/gradients.rs`.

#[path = "../../tests/close.rs"]
mod close;
#[path = "engine/gradients.rs"]
mod gradients;

use approx::{abs_diff_eq, assert_relative_eq};
use hydra_runtime::Error;
use hydra_runtime::adapter::{Adapter, AdapterConfig, GateKind, Method};
use hydra_runtime::backend::cpu::{Cpu, CpuOptions, Precision};
use hydra_runtime::backend::{AdamW, Backend};
use hydra_runtime::batch::{NO_TARGET, Sequence};
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::config::Config;
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::generate::Generator;
use hydra_runtime::model::Model;
use hydra_runtime::projection::Projection;
use hydra_runtime::train::{ActivationCheckpointing, Rates, STATE_FILE, TrainOptions, Trainer};
use std::path::Path;

/// An adapter of each architecture.
const ARCHITECTURES: [&str; 4] = ["hydra", "qwen2", "qwen3", "mistral"];

fn case() -> std::path::PathBuf {
    case_of("hydra")
}

fn case_of(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

fn open(case: &Path) -> (Checkpoint, Adapter) {
    let checkpoint = Checkpoint::open(case.join("model")).unwrap();
    let adapter = Adapter::load(case.join("adapter"), checkpoint.config()).unwrap();
    (checkpoint, adapter)
}

fn cpu(precision: Precision) -> Cpu {
    Cpu::new(CpuOptions { threads: Some(2), precision, ..CpuOptions::default() }).unwrap()
}

/// `len` tokens of no meaning.
fn tokens(len: usize, seed: u32) -> Vec<u32> {
    (0..len as u32).map(|i| (i * 131 + seed * 977 + i * i * 7) % 512).collect()
}

/// Predicts every next token.
fn sequence(len: usize, seed: u32) -> Sequence {
    let tokens = tokens(len, seed);
    let targets = tokens[1..].iter().copied().chain([NO_TARGET]).collect();
    Sequence { tokens, targets, lora_head: Some(seed % 3) }
}

#[track_caller]
fn assert_close(got: &[f32], want: &[f32], tolerance: f32) {
    close::assert_close("", got, want, tolerance.into(), 0.0);
}

#[test]
fn the_cache_changes_nothing() {
    for name in ARCHITECTURES {
        let (checkpoint, adapter) = open(&case_of(name));
        // bf16 rounds a prompt's operands and not a single token's: only its own rounding apart.
        for (precision, tolerance) in [(Precision::F32, 1e-4), (Precision::Bf16, 3e-2)] {
            let model = Model::load(cpu(precision), &checkpoint).unwrap();
            let tokens = tokens(600, 1);
            let mut evaluator = Evaluator::new(&model, Some(&adapter), 600).unwrap();
            let all = evaluator.logits(&Sequence::prompt(&tokens)).unwrap();
            let mut generator = Generator::new(&model, Some(&adapter), 600).unwrap();
            // A prompt in two chunks, two tokens at once, then one by one.
            let mut fed = 0;
            for len in [590, 2].into_iter().chain([1; 8]) {
                let logits = generator.feed(&tokens[fed..fed + len]).unwrap();
                fed += len;
                assert_close(logits, &all[(fed - 1) * 512..fed * 512], tolerance);
            }
            assert!(generator.feed(&[1]).is_err(), "the cache is full");
            generator.truncate(595);
            let logits = generator.feed(&tokens[595..596]).unwrap();
            assert_close(logits, &all[595 * 512..596 * 512], tolerance);
        }
    }
}

#[test]
fn a_prefix_is_as_good_as_the_whole_prompt() {
    ARCHITECTURES.into_iter().for_each(prefixed);
}

fn prefixed(name: &str) {
    let (checkpoint, adapter) = open(&case_of(name));
    let model = Model::load(cpu(Precision::F32), &checkpoint).unwrap();
    let prefix = tokens(300, 9);
    let tails: Vec<_> = [1, 7, 64, 65, 130].iter().map(|&len| sequence(len, len as u32)).collect();
    let whole: Vec<_> = tails
        .iter()
        .map(|tail| Sequence {
            tokens: [&prefix[..], &tail.tokens].concat(),
            targets: [&vec![NO_TARGET; 300][..], &tail.targets].concat(),
            lora_head: tail.lora_head,
        })
        .collect();
    let ids = [3, 500, 42];
    let mut plain = Evaluator::new(&model, Some(&adapter), 500).unwrap();
    let (want, want_losses) = (plain.last_logits(&whole, &ids).unwrap(), plain.losses(&whole).unwrap());
    // 140 tokens a pass: the prefix goes in by three parts, the tails take several passes.
    let mut shared = Evaluator::new(&model, Some(&adapter), 140).unwrap();
    shared.set_prefix(&prefix).unwrap();
    for (got, want) in shared.last_logits(&tails, &ids).unwrap().iter().zip(&want) {
        assert_close(got, want, 1e-4);
    }
    for (got, want) in shared.losses(&tails).unwrap().iter().zip(&want_losses) {
        assert_eq!(got.targets, want.targets);
        assert_relative_eq!(got.nll, want.nll, max_relative = 1e-4, epsilon = 1e-4);
    }
    // One that can't be computed leaves the earlier one.
    shared.set_prefix(&[u32::MAX]).unwrap_err();
    assert_eq!(shared.losses(&tails[..1]).unwrap()[0].targets, want_losses[0].targets);
    assert_close(&shared.last_logits(&tails[..1], &ids).unwrap()[0], &want[0], 1e-4);
    shared.set_prefix(&[]).unwrap();
    assert_eq!(shared.losses(&tails[1..3]).unwrap(), plain.losses(&tails[1..3]).unwrap());
}

/// Which is no head's.
#[test]
fn a_head_can_not_continue_a_prefix() {
    let checkpoint = Checkpoint::open(case().join("model")).unwrap();
    let config = AdapterConfig { method: Method::Split, gate: GateKind::Label, lora_heads: 2, ..Default::default() };
    let adapter = Adapter::init(checkpoint.config(), config, 0).unwrap();
    let model = Model::load(cpu(Precision::F32), &checkpoint).unwrap();
    let mut evaluator = Evaluator::new(&model, Some(&adapter), 100).unwrap();
    let (of_none, of_a_head) =
        (Sequence { lora_head: None, ..sequence(9, 1) }, Sequence { lora_head: Some(0), ..sequence(9, 1) });
    evaluator.losses(std::slice::from_ref(&of_a_head)).unwrap();
    evaluator.set_prefix(&tokens(20, 3)).unwrap();
    evaluator.losses(&[of_none]).unwrap();
    let error = evaluator.losses(&[of_a_head]).unwrap_err().to_string();
    assert!(error.contains("can't continue a prefix"), "{error}");
}

/// More at once than there are threads: each has the results that it has alone, and all come to an end.
#[test]
fn threads_share_a_model() {
    let checkpoint = Checkpoint::open(case().join("model")).unwrap();
    let adapter = Adapter::load(case().join("adapter"), checkpoint.config()).unwrap();
    for threads in [1, 2, 3] {
        let cpu = Cpu::new(CpuOptions { threads: Some(threads), ..CpuOptions::default() }).unwrap();
        let model = Model::load(cpu, &checkpoint).unwrap();
        let results = |seed: u32| {
            let (mut evaluator, example) = (Evaluator::new(&model, Some(&adapter), 200).unwrap(), sequence(200, seed));
            let mut trainer = Trainer::new(&model, &adapter, options(200)).unwrap();
            let rounds = (0..4).map(|_| {
                let nll = evaluator.losses(std::slice::from_ref(&example)).unwrap()[0].nll;
                (nll, evaluator.logits(&example).unwrap(), trainer.step(std::slice::from_ref(&example), 1e-3).unwrap())
            });
            rounds.collect::<Vec<_>>()
        };
        let alone: Vec<_> = (0..4).map(results).collect();
        std::thread::scope(|scope| {
            for (seed, alone) in alone.iter().enumerate() {
                let results = &results;
                scope.spawn(move || assert!(results(seed as u32) == *alone, "{seed}, {threads} threads"));
            }
        });
    }
}

/// Gradient descent outside the trainer: it goes on from what it is given.
#[test]
fn an_optimiser_of_ones_own() {
    let checkpoint = Checkpoint::open(case().join("model")).unwrap();
    let mut adapter = Adapter::load(case().join("adapter"), checkpoint.config()).unwrap();
    let model = Model::load(cpu(Precision::F32), &checkpoint).unwrap();
    let mut trainer = Trainer::new(&model, &adapter, options(64)).unwrap();
    let example = [sequence(50, 1)];
    let mut losses = Vec::new();
    for _ in 0..4 {
        let (report, gradient) = trainer.gradients(&example).unwrap();
        losses.push(report.loss);
        let pairs = adapter.layers.iter_mut().flatten().flatten().zip(gradient.layers.iter().flatten().flatten());
        for (pair, gradient) in pairs {
            let descend = |(x, dx): (&mut f32, &f32)| *x -= 1e-2 / report.grad_norm as f32 * dx;
            pair.a.iter_mut().zip(&gradient.a).for_each(descend);
            pair.b.iter_mut().zip(&gradient.b).for_each(descend);
        }
        trainer.set_adapter(&adapter).unwrap();
        assert!(trainer.adapter().unwrap() == adapter);
    }
    assert!(losses.is_sorted_by(|before, after| before > after), "{losses:?}");
    let mut other = adapter.clone();
    other.config.alpha += 1.0;
    assert!(trainer.set_adapter(&other).is_err(), "of another configuration");
    adapter.layers.pop();
    assert!(trainer.set_adapter(&adapter).is_err(), "of too few layers");
}

#[test]
fn packing_keeps_sequences_apart() {
    for name in ARCHITECTURES {
        let checkpoint = Checkpoint::open(case_of(name).join("model")).unwrap();
        let model = Model::load(cpu(Precision::F32), &checkpoint).unwrap();
        let sequences: Vec<_> = [5, 70, 1, 33, 128].iter().map(|&len| sequence(len, len as u32)).collect();
        let mut evaluator = Evaluator::new(&model, None, 512).unwrap();
        let packed = evaluator.losses(&sequences).unwrap();
        for (sequence, packed) in sequences.iter().zip(packed) {
            let alone = evaluator.losses(std::slice::from_ref(sequence)).unwrap()[0];
            assert_relative_eq!(alone.nll, packed.nll, max_relative = 1e-4, epsilon = 1e-4);
        }
    }
}

/// The last layer is computed for the positions that are read: they are what they are among all.
#[test]
fn what_nobody_reads_changes_nothing() {
    for name in ARCHITECTURES.into_iter().chain(["split"]) {
        let (checkpoint, adapter) = open(&case_of(name));
        let model = Model::load(cpu(Precision::F32), &checkpoint).unwrap();
        let mut evaluator = Evaluator::new(&model, Some(&adapter), 200).unwrap();
        let sequences = [(70, 1, 3), (30, 2, 7), (80, 3, 50)].map(|(len, seed, every)| {
            let mut sequence = sequence(len, seed);
            let targets = sequence.targets.iter_mut().enumerate();
            targets.filter(|(i, _)| i % every != 1).for_each(|(_, target)| *target = NO_TARGET);
            sequence
        });
        let losses = evaluator.losses(&sequences).unwrap();
        for (sequence, loss) in sequences.iter().zip(losses) {
            let logits = evaluator.logits(sequence).unwrap();
            let rows = logits.chunks_exact(checkpoint.config().vocab).zip(&sequence.targets);
            let nll = |(row, &target): (&[f32], &u32)| {
                let total: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
                total.ln() - f64::from(row[target as usize])
            };
            let want: Vec<f64> = rows.filter(|(_, target)| **target != NO_TARGET).map(nll).collect();
            assert_eq!(loss.targets, want.len());
            assert_relative_eq!(loss.nll, want.iter().sum(), max_relative = 1e-5);
        }
    }
}

#[test]
fn gate_means_are_distributions() {
    let checkpoint = Checkpoint::open(case().join("model")).unwrap();
    let adapter = Adapter::load(case().join("adapter"), checkpoint.config()).unwrap();
    let model = Model::load(cpu(Precision::F32), &checkpoint).unwrap();
    let means =
        Evaluator::new(&model, Some(&adapter), 64).unwrap().gate_means(&[sequence(40, 1), sequence(60, 2)]).unwrap();
    assert_eq!(means.len(), 7 * model.config().layers);
    assert!(means.iter().all(|mean| abs_diff_eq!(mean.lora_heads.iter().sum::<f64>(), 1.0, epsilon = 1e-5)));
    assert!(
        means.iter().any(|mean| (mean.lora_heads[0] - mean.lora_heads[1]).abs() > 1e-3),
        "a router that does not route"
    );
}

#[test]
fn what_does_not_fit_is_refused() {
    let checkpoint = Checkpoint::open(case().join("model")).unwrap();
    let adapter = Adapter::load(case().join("adapter"), checkpoint.config()).unwrap();
    let model = Model::load(cpu(Precision::F32), &checkpoint).unwrap();
    let options = TrainOptions {
        checkpointing: ActivationCheckpointing::Off,
        max_tokens: 16,
        clip: None,
        adam: AdamW::default(),
        seed: 0,
    };
    let mut trainer = Trainer::new(&model, &adapter, options).unwrap();
    let mut refused = |sequences: &[Sequence], rate: f32| trainer.step(sequences, rate).unwrap_err();
    assert!(matches!(refused(&[sequence(17, 1)], 1e-3), Error::SequenceTooLong { tokens: 17, limit: 16 }));
    assert!(matches!(refused(&[], 1e-3), Error::NoTarget));
    assert!(matches!(refused(&[Sequence::prompt(&[1, 2])], 1e-3), Error::NoTarget));
    assert!(matches!(refused(&[Sequence::prompt(&[512])], 1e-3), Error::TokenOutOfRange { token: 512, vocab: 512 }));
    for rate in [f32::NAN, f32::INFINITY, -1e-3] {
        assert!(matches!(refused(&[sequence(4, 1)], rate), Error::LearningRate(_)), "{rate}");
    }
    let rates = Rates { lr: 1e-3, router: f32::NAN };
    assert!(matches!(trainer.step(&[sequence(4, 1)], rates), Err(Error::LearningRate(_))));
    assert_eq!(trainer.steps(), 0);
    let mut evaluator = Evaluator::new(&model, Some(&adapter), 16).unwrap();
    assert_eq!(evaluator.last_logits(&[sequence(4, 1)], &[]).unwrap(), [[0f32; 0]], "none asked for");
    // Sizes that can't be meant.
    assert!(Evaluator::new(&model, None, 0).is_err());
    assert!(Evaluator::new(&model, None, usize::MAX).is_err());
    assert!(Generator::new(&model, None, usize::MAX).is_err());
    let (backend, config) = (model.backend(), model.config());
    // More than an address space.
    assert!(matches!(backend.buffer(usize::MAX / 8).err(), Some(Error::OutOfMemory { .. })));
    let huge = TrainOptions { max_tokens: usize::MAX, ..options };
    assert!(Trainer::plan_bytes(backend, config, &adapter.config, &huge).is_err());
    let huge = AdapterConfig { rank: usize::MAX, ..adapter.config.clone() };
    assert!(Trainer::plan_bytes(backend, config, &huge, &options).is_err());
    let (wide, many) = (1 << 28, 1 << 12);
    let far = Config {
        d_model: wide,
        d_ffn: wide,
        layers: many,
        n_heads: many,
        kv_heads: many,
        head_dim: many,
        ..config.clone()
    };
    let huge = AdapterConfig {
        rank: 1 << 16,
        lora_heads: 1 << 12,
        targets: Projection::ALL.to_vec(),
        ..adapter.config.clone()
    };
    let options_far = TrainOptions { max_tokens: wide, ..options };
    assert_eq!(Trainer::plan_bytes(backend, &far, &huge, &options_far).unwrap(), u64::MAX);
    // A prompt with a token that there isn't is refused before any of it is remembered; so is one too many.
    let mut generator = Generator::new(&model, None, 600).unwrap();
    let mut prompt = tokens(600, 1);
    prompt[599] = 512;
    assert!(generator.feed(&prompt).is_err() && generator.is_empty());
    generator.feed(&prompt[..599]).unwrap();
    let full = generator.feed(&prompt[..2]).unwrap_err();
    assert!(matches!(full, Error::CacheFull { len: 599, more: 2, capacity: 600 }), "{full}");
    let other = Adapter { layers: Vec::new(), ..adapter.clone() };
    assert!(matches!(Evaluator::new(&model, Some(&other), 16), Err(Error::WrongAdapter(_))));
    // A state that isn't one.
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(STATE_FILE), "no").unwrap();
    assert!(matches!(trainer.load_state(dir.path()), Err(Error::Format { .. })));
    // One of an adapter of as many parameters that mean something else; and of more steps than there can be.
    let config = AdapterConfig { alpha: adapter.config.alpha + 1.0, ..adapter.config.clone() };
    let other = Adapter { config, ..adapter.clone() };
    Trainer::new(&model, &other, options).unwrap().save_state(dir.path()).unwrap();
    let said = trainer.load_state(dir.path()).unwrap_err().to_string();
    assert!(said.contains("the state of another adapter") && said.contains("alpha"), "{said}");
    trainer.save_state(dir.path()).unwrap();
    trainer.load_state(dir.path()).unwrap();
    let mut bytes = std::fs::read(dir.path().join(STATE_FILE)).unwrap();
    for _ in 0..8 {
        trainer.save_state(dir.path()).unwrap();
        assert_eq!(std::fs::read(dir.path().join(STATE_FILE)).unwrap(), bytes, "the same state has the same bytes");
    }
    let at = bytes.windows(11).position(|window| window == b"\"steps\":\"0\"").unwrap();
    // In place of the header's padding, if there is as much.
    bytes.splice(at..at + 11, *b"\"steps\":\"99999999999999999999\"");
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) + 19;
    bytes[..8].copy_from_slice(&header.to_le_bytes());
    std::fs::write(dir.path().join(STATE_FILE), bytes).unwrap();
    assert!(trainer.load_state(dir.path()).unwrap_err().to_string().contains("steps"));
    // A label's head is one that there is.
    let config =
        AdapterConfig { method: Method::Split, gate: GateKind::Label, lora_heads: 2, ..AdapterConfig::default() };
    let by_label = Adapter::init(model.config(), config, 1).unwrap();
    let mut evaluator = Evaluator::new(&model, Some(&by_label), 16).unwrap();
    assert!(evaluator.losses(&[sequence(4, 1)]).is_ok());
    let said = evaluator.losses(&[sequence(4, 2)]).unwrap_err().to_string();
    assert!(said.contains("lora head 2") && said.contains("2 heads"), "{said}");
    let mut trainer = Trainer::new(&model, &by_label, options).unwrap();
    assert!(trainer.step(&[sequence(4, 2)], 1e-3).is_err());
    for clip in [0.0, -1.0, f32::NAN] {
        assert!(Trainer::new(&model, &adapter, TrainOptions { clip: Some(clip), ..options }).is_err(), "clip {clip}");
    }
    // A gradient that is not finite leaves the adapter alone.
    let mut wild = adapter.clone();
    wild.layers[0][Projection::Q].as_mut().unwrap().b.fill(3e38);
    let mut trainer = Trainer::new(&model, &wild, options).unwrap();
    assert!(trainer.step(&[sequence(10, 1)], 1e-3).unwrap_err().to_string().contains("step 1"));
    assert!(trainer.adapter().unwrap() == wild);
}

/// The step that leads to a loss that is not finite, or makes the adapter overflow, is undone, moments and all.
#[test]
fn a_step_too_far_is_undone() {
    let checkpoint = Checkpoint::open(case().join("model")).unwrap();
    let adapter = Adapter::load(case().join("adapter"), checkpoint.config()).unwrap();
    let model = Model::load(cpu(Precision::F32), &checkpoint).unwrap();
    let step = [sequence(10, 1)];
    for rate in [1e18, 1e38] {
        let mut trainer = Trainer::new(&model, &adapter, options(16)).unwrap();
        let mut careful = Trainer::new(&model, &adapter, options(16)).unwrap();
        trainer.step(&step, 1e-3).unwrap();
        careful.step(&step, 1e-3).unwrap();
        let error = trainer.step(&step, rate).and_then(|_| trainer.step(&step, 1e-3)).unwrap_err();
        assert!(matches!(error, Error::NotFinite { .. }), "{error}");
        assert_eq!(trainer.steps(), 1);
        assert!(trainer.adapter().unwrap() == careful.adapter().unwrap());
        assert_eq!(trainer.step(&step, 1e-3).unwrap(), careful.step(&step, 1e-3).unwrap());
        assert!(trainer.adapter().unwrap() == careful.adapter().unwrap());
    }
}

fn options(max_tokens: usize) -> TrainOptions {
    TrainOptions {
        checkpointing: ActivationCheckpointing::Off,
        max_tokens,
        clip: None,
        adam: AdamW::default(),
        seed: 5,
    }
}
