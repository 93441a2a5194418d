//! Threads with 256 KiB of stack are enough for a training step, an evaluation, a generation, the engine, a tokenizer and a
//! chat template: the caller's threads as well as the backend's.

use hydra_runtime::adapter::{Adapter, AdapterConfig, GateKind, Method};
use hydra_runtime::backend::Format;
use hydra_runtime::backend::cpu::{Bf16Isa, Cpu, CpuOptions, Isa, Precision, Q8Isa};
use hydra_runtime::batch::Sequence;
use hydra_runtime::chat::{ChatTemplate, Message};
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::generate::Sampler;
use hydra_runtime::merge::{self, GgufOptions, MergeGate};
use hydra_runtime::model::Model;
use hydra_runtime::serve::{Engine, EngineOptions, Event, Request};
use hydra_runtime::train::Trainer;
use std::path::Path;
use std::process::Command;

/// The standard library reads the size of stacks once in a process, so the tests below get a process of their own.
#[test]
fn threads_need_256_kib_of_stack() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--test-threads", "1"])
        .env("RUST_MIN_STACK", (256 * 1024).to_string())
        .output()
        .unwrap();
    let [out, error] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(output.status.success() && out.contains("3 passed"), "{out}\n{error}");
}

/// The golden model and its adapter.
fn golden() -> (Checkpoint, Adapter) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/hydra");
    let checkpoint = Checkpoint::open(dir.join("model")).unwrap();
    let adapter = Adapter::load(dir.join("adapter"), checkpoint.config()).unwrap();
    (checkpoint, adapter)
}

/// A prompt of 90 tokens, and sequences with it.
fn tokens() -> (Vec<u32>, [Sequence; 2]) {
    let answer: Vec<u32> = (0..90).map(|i| i * 131 % 512).collect();
    let sequences = [Sequence::answer(&[1, 2, 3], &answer), Sequence::answer(&[4], &answer[20..])];
    (answer, sequences)
}

#[test]
#[ignore = "threads_need_256_kib_of_stack starts it with small stacks"]
fn a_model_is_trained_evaluated_and_asked() {
    let (checkpoint, adapter) = golden();
    let in_f32 = Isa::available().map(|isa| (Precision::F32, Some(isa), None));
    let in_bf16 = Bf16Isa::available().map(|isa| (Precision::Bf16, None, Some(isa)));
    for (precision, isa, bf16_isa) in in_f32.chain(in_bf16) {
        let options = CpuOptions { threads: Some(3), precision, isa, bf16_isa, ..CpuOptions::default() };
        let model = Model::load(Cpu::new(options).unwrap(), &checkpoint).unwrap();
        let mut trainer = Trainer::new(&model, &adapter, Default::default()).unwrap();
        assert!(trainer.step(&tokens().1, 1e-3).unwrap().loss.is_finite());
        evaluate_and_ask(&model, &trainer.adapter().unwrap());
    }
}

#[test]
#[ignore = "threads_need_256_kib_of_stack starts it with small stacks"]
fn a_quantized_model_is_evaluated_and_asked_in_eight_bits() {
    let (checkpoint, adapter) = golden();
    let method = AdapterConfig { method: Method::Lora, gate: GateKind::One, lora_heads: 1, ..Default::default() };
    let nothing = Adapter::init(checkpoint.config(), method, 0).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q4.gguf");
    let options = GgufOptions { format: Format::Q4_0, description: None };
    merge::write_gguf(&checkpoint, &nothing, MergeGate::One, &path, options).unwrap();
    let quantized = Checkpoint::open(path).unwrap();
    for isa in Q8Isa::available() {
        let options =
            CpuOptions { threads: Some(3), precision: Precision::Q8, q8_isa: Some(isa), ..CpuOptions::default() };
        evaluate_and_ask(&Model::load(Cpu::new(options).unwrap(), &quantized).unwrap(), &adapter);
    }
}

/// Losses, a generation, and some requests to the engine.
fn evaluate_and_ask(model: &Model<Cpu>, adapter: &Adapter) {
    let (answer, sequences) = tokens();
    let losses = Evaluator::new(model, Some(adapter), 128).unwrap().losses(&sequences).unwrap();
    assert!(losses.iter().all(|loss| loss.nll.is_finite()));
    let attached = model.attach(adapter).unwrap();
    let generated = model.generate(answer.clone()).adapter(&attached).max_tokens(5).text();
    assert!(generated.is_ok(), "{:?}", generated.err());
    let mut engine = Engine::new(model, EngineOptions { prefix_tokens: 64, ..Default::default() }).unwrap();
    for len in [90, 70, 3] {
        let mut request = Request::new(answer[..len].to_vec(), Sampler::new(0.0, 1.0, 0).unwrap());
        (request.adapter, request.max_tokens, request.top_logprobs) = (Some(attached.clone()), 5, Some(3));
        engine.submit(request).unwrap();
    }
    while !engine.is_idle() {
        assert!(engine.step().unwrap().iter().all(|event| !matches!(event, Event::Failed { .. })));
    }
}

#[test]
#[ignore = "threads_need_256_kib_of_stack starts it with small stacks"]
fn a_conversation_becomes_tokens() {
    let tokenizer = golden().0.tokenizer().unwrap();
    let template = "{%- macro turn(role, text) %}{{ '[' ~ role ~ '] ' ~ text | trim ~ eos_token }}\n{% endmacro -%}
        {%- set state = namespace(first = true) %}{% for message in messages %}
        {%- if message['role'] == 'system' %}{% if loop.first %}{{ turn('system', message.content.upper()) }}{% endif %}
        {%- else %}{{ turn(message.role, message.content) }}{% set state.first = false %}{% endif %}
        {%- endfor %}{% if add_generation_prompt and not state.first %}{{ '[assistant] ' }}{% endif %}
        {{- {'tools': [{'name': 'add', 'of': ['a', 'b']}]} | tojson }}";
    let template = ChatTemplate::new(template, &tokenizer).unwrap();
    let turns = [Message::system("Add."), Message::user("1 and 2? ".repeat(200)), Message::assistant("3")];
    for text in [template.prompt(&turns[..2]).unwrap(), template.conversation(&turns).unwrap().text] {
        assert!(text.starts_with("[system] ADD.") && text.contains("and 2?</s>"), "{text}");
        let ids = tokenizer.encode(&text).unwrap();
        assert!(tokenizer.decode(&ids).unwrap().contains("1 and 2?"));
    }
}
