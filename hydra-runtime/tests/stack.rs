//! Threads with 256 KiB of stack are enough for a training step, an evaluation, a generation and the engine: the caller's
//! threads as well as the backend's.

use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::cpu::{Bf16Isa, Cpu, CpuOptions, Isa, Precision};
use hydra_runtime::batch::Sequence;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::generate::Sampler;
use hydra_runtime::model::Model;
use hydra_runtime::serve::{Engine, EngineOptions, Event, Request};
use hydra_runtime::train::Trainer;
use std::path::Path;
use std::process::Command;

/// The standard library reads the size of stacks once in a process, so the test below gets a process of its own.
#[test]
fn threads_need_256_kib_of_stack() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "a_model_is_trained_evaluated_and_asked"])
        .env("RUST_MIN_STACK", (256 * 1024).to_string())
        .output()
        .unwrap();
    let [out, error] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(output.status.success() && out.contains("1 passed"), "{out}\n{error}");
}

#[test]
#[ignore = "threads_need_256_kib_of_stack starts it with small stacks"]
fn a_model_is_trained_evaluated_and_asked() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/hydra");
    let checkpoint = Checkpoint::open(dir.join("model")).unwrap();
    let adapter = Adapter::load(dir.join("adapter"), checkpoint.config()).unwrap();
    let in_f32 = Isa::available().map(|isa| (Precision::F32, Some(isa), None));
    let in_bf16 = Bf16Isa::available().map(|isa| (Precision::Bf16, None, Some(isa)));
    for (precision, isa, bf16_isa) in in_f32.chain(in_bf16) {
        let options = CpuOptions { threads: Some(3), precision, isa, bf16_isa, ..CpuOptions::default() };
        let model = Model::load(Cpu::new(options).unwrap(), &checkpoint).unwrap();
        let answer: Vec<u32> = (0..90).map(|i| i * 131 % 512).collect();
        let sequences = [Sequence::answer(&[1, 2, 3], &answer), Sequence::answer(&[4], &answer[20..])];
        let mut trainer = Trainer::new(&model, &adapter, Default::default()).unwrap();
        assert!(trainer.step(&sequences, 1e-3).unwrap().loss.is_finite());
        let trained = trainer.adapter().unwrap();
        let losses = Evaluator::new(&model, Some(&trained), 128).unwrap().losses(&sequences).unwrap();
        assert!(losses.iter().all(|loss| loss.nll.is_finite()));
        let attached = model.attach(&trained).unwrap();
        let generated = model.generate(answer.clone()).adapter(&attached).max_tokens(5).text();
        assert!(generated.is_ok(), "{:?}", generated.err());
        let mut engine = Engine::new(&model, EngineOptions { prefix_tokens: 64, ..Default::default() }).unwrap();
        for len in [90, 70, 3] {
            let mut request = Request::new(answer[..len].to_vec(), Sampler::new(0.0, 1.0, 0).unwrap());
            (request.adapter, request.max_tokens, request.top_logprobs) = (Some(attached.clone()), 5, Some(3));
            engine.submit(request).unwrap();
        }
        while !engine.is_idle() {
            assert!(engine.step().unwrap().iter().all(|event| !matches!(event, Event::Failed { .. })));
        }
    }
}
