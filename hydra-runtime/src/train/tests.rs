//! What concerns training alone, seen from inside: gates of a step's pass, and the gradient that AdamW gets.

use super::*;
use crate::adapter::{GateKind, HeadInit, Method};
use crate::backend::cpu::{Cpu, CpuOptions, Precision};
use crate::batch::NO_TARGET;
use crate::checkpoint::Checkpoint;
use crate::projection::Projection;
use std::path::Path;
use std::slice::from_ref;

fn checkpoint() -> Checkpoint {
    Checkpoint::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/hydra/model")).unwrap()
}

fn cpu(threads: usize, precision: Precision) -> Cpu {
    Cpu::new(CpuOptions { threads: Some(threads), precision, ..CpuOptions::default() }).unwrap()
}

fn options(max_tokens: usize) -> TrainOptions {
    TrainOptions {
        checkpointing: ActivationCheckpointing::Off,
        max_tokens,
        clip: None,
        adam: AdamW::default(),
        seed: 8,
    }
}

/// Every option at once.
fn everything(head_init: HeadInit) -> AdapterConfig {
    AdapterConfig {
        method: Method::Hydra,
        gate: GateKind::Router,
        rank: 3,
        lora_heads: 4,
        alpha: 6.0,
        dropout: 0.2,
        head_dropout: 0.3,
        head_init,
        temperature: 0.7,
        top_k: (head_init == HeadInit::Zero).then_some(3),
        load_balance: 0.5,
        targets: Projection::ALL.to_vec(),
        ..AdapterConfig::default()
    }
}

fn sequence(len: usize, seed: u32) -> Sequence {
    let tokens: Vec<u32> = (0..len as u32).map(|i| (i * 131 + seed * 977 + i * i * 7) % 512).collect();
    let targets = tokens[1..].iter().copied().chain([NO_TARGET]).collect();
    Sequence { tokens, targets, lora_head: None }
}

/// Each router's gates of the last pass, [tokens, lora_heads].
fn gates(trainer: &Trainer<Cpu>, tokens: usize) -> Vec<Vec<f64>> {
    let mut all = Vec::new();
    for (layer, acts) in trainer.activations.layers.iter().enumerate() {
        for projection in Projection::ALL {
            let Some(slot) = trainer.adapter.slots.get(layer, projection) else { continue };
            let (shape, adapter_state) = (slot.shape, acts.adapter_state[projection].as_ref().unwrap());
            let mut rows = vec![0.0; tokens * shape.state_width()];
            trainer.model.backend().download(&mut rows, adapter_state).unwrap();
            let gate =
                rows.chunks(shape.state_width()).flat_map(|row| row[shape.a_rows()..].iter().map(|&x| f64::from(x)));
            all.push(gate.collect());
        }
    }
    all
}

/// C · N · Σ f_e P_e of each router, f from the gates in `at`.
fn balance(weight: f64, lora_heads: usize, gates: &[Vec<f64>], at: &[Vec<f64>]) -> f64 {
    let mut sum = 0.0;
    for (gates, at) in gates.iter().zip(at) {
        let tokens = (gates.len() / lora_heads) as f64;
        for e in 0..lora_heads {
            let wins = |row: &&[f64]| (0..lora_heads).all(|o| row[o] < row[e] || (row[o] == row[e] && o >= e));
            let share = at.chunks(lora_heads).filter(wins).count() as f64 / tokens;
            let mean = gates.chunks(lora_heads).map(|row| row[e]).sum::<f64>() / tokens;
            sum += weight * lora_heads as f64 * share * mean;
        }
    }
    sum
}

/// A trainer some steps into a run, where every gradient is exercised.
fn warm(model: &Model<Cpu>, config: AdapterConfig, sequences: &[Sequence]) -> Trainer<Cpu> {
    let tokens = sequences.iter().map(|s| s.tokens.len()).sum();
    let adapter = Adapter::init(model.config(), config, 5).unwrap();
    let mut trainer = Trainer::new(model, &adapter, options(tokens)).unwrap();
    for _ in 0..5 {
        trainer.step(sequences, 0.02).unwrap();
    }
    trainer
}

/// The gradient of a step from `params`, read off the first moment; and that step's loss. Masks are those of the first step.
fn step_at(trainer: &mut Trainer<Cpu>, params: &[f32], sequences: &[Sequence]) -> (f64, Vec<f64>) {
    let zeros = vec![0.0; params.len()];
    let backend = trainer.model.backend();
    backend.upload(&mut trainer.adapter.params, params).unwrap();
    backend.upload(&mut trainer.exp_avg, &zeros).unwrap();
    trainer.steps = 0;
    let loss = trainer.step(sequences, 0.0).unwrap().loss;
    let mut moment = zeros;
    trainer.model.backend().download(&mut moment, &trainer.exp_avg).unwrap();
    (loss, moment.iter().map(|&m| f64::from(m) * 10.0).collect())
}

fn params(trainer: &Trainer<Cpu>) -> Vec<f32> {
    let mut params = vec![0.0; trainer.adapter.slots.len];
    trainer.model.backend().download(&mut params, &trainer.adapter.params).unwrap();
    params
}

#[test]
fn gradients_with_every_option_are_the_slope_of_the_loss_and_the_balance_term() {
    let checkpoint = checkpoint();
    let model = Model::load(cpu(2, Precision::F32), &checkpoint).unwrap();
    let sequences: Vec<_> = [9, 40, 70].iter().map(|&len| sequence(len, len as u32)).collect();
    let tokens = 9 + 40 + 70;
    // A term as large as the loss's own slope; top-k jumps where logits cross, so its slope is taken without.
    let smooth = |load_balance, top_k| AdapterConfig { load_balance, top_k, ..everything(HeadInit::Zero) };
    for config in [smooth(0.0, Some(4)), smooth(0.5, None), smooth(20.0, None), everything(HeadInit::Random)] {
        let (lora_heads, weight) = (config.lora_heads, f64::from(config.load_balance));
        let mut trainer = warm(&model, config.clone(), &sequences);
        let start = params(&trainer);
        let gradient = step_at(&mut trainer, &start, &sequences).1;
        let at = gates(&trainer, tokens);
        let square: f64 = gradient.iter().map(|g| g * g).sum();
        let step = 2e-3 / square;
        let mut loss_at = |sign: f64| {
            let moved: Vec<f32> =
                start.iter().zip(&gradient).map(|(&p, g)| (f64::from(p) + sign * step * g) as f32).collect();
            let loss = step_at(&mut trainer, &moved, &sequences).0;
            loss + balance(weight, lora_heads, &gates(&trainer, tokens), &at)
        };
        let slope = (loss_at(1.0) - loss_at(-1.0)) / (2.0 * step);
        assert!((slope / square - 1.0).abs() < 0.01, "{config:?}: slope {slope}, |gradient|² {square}");
    }
}

/// A pass's term counts by its share of the step's tokens, whatever its share of the targets.
#[test]
fn the_balance_term_weighs_passes_by_their_tokens() {
    let checkpoint = checkpoint();
    let model = Model::load(cpu(2, Precision::F32), &checkpoint).unwrap();
    let (long, mut short) = (sequence(90, 1), sequence(30, 2));
    short.targets[3..].fill(NO_TARGET);
    let pair = [long, short];
    let plain = AdapterConfig { dropout: 0.0, head_dropout: 0.0, ..everything(HeadInit::Random) };
    let start = params(&warm(&model, plain.clone(), &pair));
    let term = |sequences: &[Sequence], max_tokens: usize| -> Vec<f64> {
        let gradient = |load_balance: f32| {
            let adapter = Adapter::init(model.config(), AdapterConfig { load_balance, ..plain.clone() }, 5).unwrap();
            let mut trainer = Trainer::new(&model, &adapter, options(max_tokens)).unwrap();
            step_at(&mut trainer, &start, sequences).1
        };
        gradient(10.0).iter().zip(gradient(0.0)).map(|(with, without)| with - without).collect()
    };
    let alone = [term(from_ref(&pair[0]), 90), term(from_ref(&pair[1]), 90)];
    let both = term(&pair, 90);
    let largest = both.iter().fold(0f64, |max, x| max.max(x.abs()));
    assert!(largest > 1e-3, "a term that does nothing");
    for (i, got) in both.iter().enumerate() {
        let want = 0.75 * alone[0][i] + 0.25 * alone[1][i];
        assert!((got - want).abs() < 1e-4 * largest, "{i}: {got}, wanted {want}");
    }
}

#[test]
fn every_option_at_once_has_the_same_bits_on_any_number_of_threads() {
    let checkpoint = checkpoint();
    let sequences = [sequence(150, 1), sequence(7, 2), sequence(290, 3), sequence(3, 4)];
    for (precision, init) in [(Precision::F32, HeadInit::Zero), (Precision::Bf16, HeadInit::Random)] {
        let trained = |threads: usize, checkpointing: ActivationCheckpointing| {
            let model = Model::load(cpu(threads, precision), &checkpoint).unwrap();
            let adapter = Adapter::init(model.config(), everything(init), 5).unwrap();
            let mut trainer = Trainer::new(&model, &adapter, TrainOptions { checkpointing, ..options(290) }).unwrap();
            for _ in 0..3 {
                trainer.step(&sequences, Rates { lr: 1e-3, router: 1e-2 }).unwrap();
            }
            params(&trainer).iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        };
        let one = trained(1, ActivationCheckpointing::Off);
        assert!(
            trained(2, ActivationCheckpointing::Off) == one && trained(3, ActivationCheckpointing::Off) == one,
            "{precision:?}"
        );
        assert!(trained(2, ActivationCheckpointing::EveryLayer) == one, "{precision:?}, recomputed activations");
    }
}

#[test]
fn routers_take_their_own_learning_rate() {
    let checkpoint = checkpoint();
    let model = Model::load(cpu(1, Precision::F32), &checkpoint).unwrap();
    let sequences = [sequence(40, 1)];
    let after = |rates: Rates| {
        let mut trainer = warm(&model, everything(HeadInit::Zero), &sequences);
        trainer.step(&sequences, rates).unwrap();
        trainer.adapter().unwrap()
    };
    let slow = after(Rates { lr: 1e-3, router: 1e-3 });
    let fast = after(Rates { lr: 1e-3, router: 1e-2 });
    let frozen = after(Rates { lr: 1e-3, router: 0.0 });
    let before = warm(&model, everything(HeadInit::Zero), &sequences).adapter().unwrap();
    let pairs = |adapter: &Adapter| adapter.layers.iter().flatten().flatten().cloned().collect::<Vec<_>>();
    for ((slow, fast), (frozen, before)) in
        pairs(&slow).iter().zip(&pairs(&fast)).zip(pairs(&frozen).iter().zip(&pairs(&before)))
    {
        let a = 3 * slow.d_in;
        assert!(
            slow.b == fast.b && slow.b == frozen.b && slow.a[..a] == fast.a[..a],
            "B and A have the adapter's rate"
        );
        assert!(frozen.a[a..] == before.a[a..] && frozen.a[..a] != before.a[..a]);
        for (i, before) in before.a.iter().enumerate().skip(a) {
            let (slow, fast) = (slow.a[i] - before, fast.a[i] - before);
            // Differences of values up to 1, rounded to f32.
            assert!((fast - 10.0 * slow).abs() <= 2e-6, "{fast}, {slow}");
        }
    }
}

#[test]
fn heads_that_start_apart_change_nothing_and_part() {
    let checkpoint = checkpoint();
    let model = Model::load(cpu(2, Precision::F32), &checkpoint).unwrap();
    let sequences = [sequence(60, 1)];
    let config = AdapterConfig { dropout: 0.0, head_dropout: 0.0, load_balance: 0.0, ..everything(HeadInit::Random) };
    let loss = |head_init| {
        let adapter = Adapter::init(model.config(), AdapterConfig { head_init, ..config.clone() }, 5).unwrap();
        Trainer::new(&model, &adapter, options(60)).unwrap().gradients(&sequences).unwrap().0.loss
    };
    assert!((loss(HeadInit::Random) - loss(HeadInit::Zero)).abs() < 1e-5);
    // From equal B under a uniform gate, heads would stay equal; these don't.
    let trained = warm(&model, config, &sequences).adapter().unwrap();
    let pair = trained.layers[0][Projection::Q].as_ref().unwrap();
    assert!(pair.b.chunks(3).zip(pair.b.chunks(3).skip(1)).all(|(one, other)| one != other));
}
