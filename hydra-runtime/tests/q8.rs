//! [`Precision::Q8`]: close to f32, with the same bits on any number of threads and every instruction set; without
//! effect on plain weights, and without training.

use hydra_runtime::adapter::{Adapter, AdapterConfig, GateKind, Method};
use hydra_runtime::backend::Format;
use hydra_runtime::backend::cpu::{Cpu, CpuOptions, Precision, Q8Isa};
use hydra_runtime::batch::Sequence;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::generate::Generator;
use hydra_runtime::merge::{self, GgufOptions, MergeGate};
use hydra_runtime::model::Model;
use hydra_runtime::train::Trainer;
use std::path::Path;

/// Eight bits on two threads.
fn q8() -> CpuOptions {
    CpuOptions { threads: Some(2), precision: Precision::Q8, ..CpuOptions::default() }
}

/// The golden model as it is, an adapter for it, and the model in block formats.
fn open(dir: &Path) -> (Checkpoint, Adapter, Vec<Checkpoint>) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/hydra");
    let plain = Checkpoint::open(golden.join("model")).unwrap();
    let adapter = Adapter::load(golden.join("adapter"), plain.config()).unwrap();
    let method = AdapterConfig { method: Method::Lora, gate: GateKind::One, lora_heads: 1, ..Default::default() };
    let nothing = Adapter::init(plain.config(), method, 0).unwrap();
    let quantized = [Format::Q8_0, Format::Q5_0, Format::Q4_0].map(|format| {
        let path = dir.join(format!("{}.gguf", format.name()));
        let options = GgufOptions { format, description: None };
        merge::write_gguf(&plain, &nothing, MergeGate::One, &path, options).unwrap();
        Checkpoint::open(path).unwrap()
    });
    (plain, adapter, quantized.into())
}

/// Sequences for one pass and for several, with rows that are not whole tiles.
fn sequences() -> Vec<Sequence> {
    let tokens = |len: u32, seed: u32| (0..len).map(|i| (i * 131 + seed * 71) % 512).collect::<Vec<_>>();
    vec![
        Sequence::answer(&tokens(70, 1), &tokens(20, 2)),
        Sequence::answer(&tokens(3, 3), &tokens(2, 4)),
        Sequence::answer(&tokens(1, 5), &tokens(55, 6)),
    ]
}

/// The losses, the logits of some tokens at the end of each sequence, all logits of the first, and those of a
/// generation behind it.
fn run(options: CpuOptions, checkpoint: &Checkpoint, adapter: &Adapter) -> Vec<f32> {
    let model = Model::load(Cpu::new(options).unwrap(), checkpoint).unwrap();
    let mut evaluator = Evaluator::new(&model, Some(adapter), 128).unwrap();
    let mut out: Vec<f32> = evaluator.losses(&sequences()).unwrap().iter().map(|loss| loss.nll as f32).collect();
    let first = &sequences()[0];
    let logits = evaluator.logits(first).unwrap();
    for ids in [vec![1, 2, 3, 4], vec![511]] {
        out.extend(evaluator.last_logits(&sequences(), &ids).unwrap().concat());
    }
    out.extend(logits);
    let mut generator = Generator::new(&model, Some(adapter), 200).unwrap();
    for part in [&first.tokens[..], &[7], &[8, 9, 10], &[11]] {
        out.extend(generator.feed(part).unwrap());
    }
    out
}

#[test]
fn q8_is_close_to_f32_and_has_the_same_bits_everywhere() {
    let dir = tempfile::tempdir().unwrap();
    let (_, adapter, quantized) = open(dir.path());
    for checkpoint in &quantized {
        let f32 = run(CpuOptions { precision: Precision::F32, ..q8() }, checkpoint, &adapter);
        let want = run(q8(), checkpoint, &adapter);
        let largest = f32.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        for (i, (got, f32)) in want.iter().zip(&f32).enumerate() {
            assert!((got - f32).abs() < 0.03 * largest, "{i}: {got} in q8, {f32} in f32; {:?}", checkpoint.path());
        }
        assert!(want != f32);
        for threads in [1, 3] {
            assert!(
                run(CpuOptions { threads: Some(threads), ..q8() }, checkpoint, &adapter) == want,
                "{threads} threads"
            );
        }
        for isa in Q8Isa::available() {
            let options = CpuOptions { q8_isa: Some(isa), ..q8() };
            assert!(run(options, checkpoint, &adapter) == want, "{}", isa.name());
        }
    }
}

#[test]
fn plain_weights_are_multiplied_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, adapter, _) = open(dir.path());
    let f32 = CpuOptions { precision: Precision::F32, ..q8() };
    assert!(run(q8(), &plain, &adapter) == run(f32, &plain, &adapter));
}

#[test]
fn nothing_is_trained_in_q8() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, adapter, _) = open(dir.path());
    let model = Model::load(Cpu::new(q8()).unwrap(), &plain).unwrap();
    let options = Default::default();
    let planned = Trainer::plan_bytes(model.backend(), model.config(), &adapter.config, &options).err();
    for error in [Trainer::new(&model, &adapter, options).err(), planned] {
        let error = error.unwrap().to_string();
        assert!(error.contains("q8") && error.contains("train in f32 or bf16"), "{error}");
    }
}
