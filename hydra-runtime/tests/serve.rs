//! The engine of many generations: a request's tokens and logits are the same bits in any company, and it ends where it
//! should.

use hydra_runtime::Error;
use hydra_runtime::adapter::{Adapter, AdapterConfig, GateKind, Method};
use hydra_runtime::backend::cpu::{Cpu, CpuOptions, Precision};
use hydra_runtime::backend::{Backend, Device, Format};
use hydra_runtime::batch::Sequence;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::generate::{Finish, Generator, Sampler, Sampling};
use hydra_runtime::merge::{self, GgufOptions, MergeGate};
use hydra_runtime::model::{AttachedAdapter, Model};
use hydra_runtime::serve::{Engine, EngineOptions, Event, Request, RequestId, Stats, TokenLogprob};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Ids of the golden models.
const VOCAB: usize = 512;

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

fn cpu(precision: Precision, threads: usize) -> Cpu {
    Cpu::new(CpuOptions { threads: Some(threads), precision, ..CpuOptions::default() }).unwrap()
}

fn open(name: &str, precision: Precision) -> (Model<Cpu>, Adapter) {
    let checkpoint = Checkpoint::open(case(name).join("model")).unwrap();
    let adapter = Adapter::load(case(name).join("adapter"), checkpoint.config()).unwrap();
    (Model::load(cpu(precision, 2), &checkpoint).unwrap(), adapter)
}

/// An adapter of the same shape that does something else.
fn changed(adapter: &Adapter, by: f32) -> Adapter {
    let mut other = adapter.clone();
    other.layers.iter_mut().flatten().flatten().for_each(|pair| pair.b.iter_mut().for_each(|b| *b = by - *b));
    other
}

/// `len` tokens of no meaning.
fn tokens(len: usize, seed: u32) -> Vec<u32> {
    (0..len as u32).map(|i| (i * 131 + seed * 977 + i * i * 7) % VOCAB as u32).collect()
}

/// Draws with every filter and penalty that there is.
fn drawn(seed: u64) -> Sampler {
    let penalties =
        Sampling { repetition_penalty: 1.3, presence_penalty: 0.2, frequency_penalty: 0.1, ..Sampling::default() };
    Sampling { temperature: 1.0, top_k: 100, top_p: 0.9, min_p: 0.02, seed, ..penalties }.sampler().unwrap()
}

fn greedy() -> Sampler {
    Sampler::new(0.0, 1.0, 0).unwrap()
}

fn options(slots: usize, prompt_tokens: usize) -> EngineOptions {
    EngineOptions { slots, prompt_tokens, ..EngineOptions::default() }
}

/// What has become of a request.
#[derive(Debug, Default, PartialEq)]
struct Result {
    tokens: Vec<u32>,
    /// Bits of the log-probabilities of the whole vocabulary, for each token.
    logprobs: Vec<Vec<u32>>,
    prompt: Vec<Vec<u32>>,
    gates: Vec<Vec<u32>>,
    finish: Option<Finish>,
    failed: bool,
}

fn bits(logprob: &TokenLogprob) -> Vec<u32> {
    let mut top = logprob.top.clone();
    top.sort_by_key(|(id, _)| *id);
    top.iter().map(|(_, logprob)| logprob.to_bits()).collect()
}

fn take(results: &mut HashMap<RequestId, Result>, event: Event) {
    let result = results.entry(event.id()).or_default();
    assert!(result.finish.is_none() && !result.failed, "an event after the end");
    match event {
        Event::Prompt { logprobs, .. } => {
            assert!(logprobs[0].is_none());
            result.prompt = logprobs[1..].iter().map(|logprob| bits(logprob.as_ref().unwrap())).collect();
        }
        Event::Token { token, logprob, gates, .. } => {
            result.tokens.push(token);
            result.logprobs.extend(logprob.as_ref().map(bits));
            result.gates.extend(gates.map(|gates| gates.gates.iter().map(|gate| gate.to_bits()).collect()));
        }
        Event::Finished { finish, .. } => result.finish = Some(finish),
        Event::Failed { .. } => result.failed = true,
    }
}

fn run<B: Backend>(engine: &mut Engine<B>, results: &mut HashMap<RequestId, Result>) {
    while !engine.is_idle() {
        engine.step().unwrap().into_iter().for_each(|event| take(results, event));
    }
}

/// Requests of all kinds for one model: short and long prompts, greedy and drawn, with three adapters and without.
fn requests<B: Backend>(adapters: &[Option<AttachedAdapter<B>>]) -> Vec<Request<B>> {
    let lengths = [1, 3, 64, 65, 67, 128, 150, 200];
    let request = |(i, &len): (usize, &usize)| {
        let sampler = if i % 3 == 2 { drawn(i as u64) } else { greedy() };
        let mut request = Request::new(tokens(len, i as u32), sampler);
        request.adapter = adapters[i % adapters.len()].clone();
        request.max_tokens = 5 + i;
        request.top_logprobs = Some(VOCAB);
        request.prompt_logprobs = i % 4 == 3;
        request.gates = i % 2 == 0;
        request
    };
    lengths.iter().enumerate().map(request).collect()
}

/// The invariant of `hydra_runtime::serve`, on any number of threads.
fn same_bits_in_any_company(checkpoint: &Checkpoint, adapter: &Adapter, precision: Precision) {
    let name = checkpoint.path().display();
    let models = [1, 2, 3].map(|threads| Model::load(cpu(precision, threads), checkpoint).unwrap());
    let requests = |model: &Model<Cpu>| {
        let attach = |adapter: &Adapter| Some(model.attach(adapter).unwrap());
        requests(&[None, attach(adapter), attach(&changed(adapter, 1.5))])
    };
    let alone: Vec<Result> = requests(&models[1])
        .into_iter()
        .map(|request| {
            let mut engine = Engine::new(&models[1], options(1, 64)).unwrap();
            let (id, mut results) = (engine.submit(request).unwrap(), HashMap::new());
            run(&mut engine, &mut results);
            results.remove(&id).unwrap()
        })
        .collect();
    assert!(alone.iter().all(|result| result.finish == Some(Finish::MaxTokens)));
    for (model, slots, prompt_tokens) in
        [(&models[1], 8, 0), (&models[2], 8, 100), (&models[1], 8, 1000), (&models[0], 3, 130)]
    {
        let mut engine = Engine::new(model, options(slots, prompt_tokens)).unwrap();
        let (mut results, mut ids) = (HashMap::new(), Vec::new());
        for (i, request) in requests(model).into_iter().enumerate() {
            // Some join while others run.
            if i % 3 == 2 {
                engine.step().unwrap().into_iter().for_each(|event| take(&mut results, event));
            }
            ids.push(engine.submit(request).unwrap());
        }
        run(&mut engine, &mut results);
        for (i, (id, want)) in ids.iter().zip(&alone).enumerate() {
            let got = &results[id];
            assert_eq!(got.tokens, want.tokens, "{name}: request {i} of {slots} slots, {prompt_tokens}");
            assert!(got == want, "{name}, {precision:?}: request {i} of {slots} slots, {prompt_tokens}");
        }
        let drawn: usize = alone.iter().map(|result| result.tokens.len()).sum();
        let Stats { prompt_tokens, generated_tokens, .. } = engine.stats();
        assert_eq!((prompt_tokens, generated_tokens), (678, drawn as u64));
    }
}

#[test]
fn a_request_has_the_same_bits_in_any_company() {
    let f32 = ["hydra", "split", "qwen2", "qwen3", "mistral"].map(|name| (name, Precision::F32));
    for (name, precision) in f32.into_iter().chain(["hydra", "window"].map(|name| (name, Precision::Bf16))) {
        let (model, adapter) = open(name, precision);
        same_bits_in_any_company(model.checkpoint(), &adapter, precision);
    }
}

#[test]
fn a_request_has_the_same_bits_in_any_company_on_quantised_weights() {
    let (model, adapter) = open("hydra", Precision::F32);
    let method = AdapterConfig { method: Method::Lora, gate: GateKind::One, lora_heads: 1, ..Default::default() };
    let nothing = Adapter::init(model.config(), method, 0).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for format in [Format::Q8_0, Format::Q4_0] {
        let path = dir.path().join(format!("{}.gguf", format.name()));
        let options = GgufOptions { format, description: None };
        merge::write_gguf(model.checkpoint(), &nothing, MergeGate::One, &path, options).unwrap();
        for precision in [Precision::F32, Precision::Q8] {
            same_bits_in_any_company(&Checkpoint::open(&path).unwrap(), &adapter, precision);
        }
    }
}

/// Prompts that begin in the same way, each twice with each adapter.
fn alike(adapters: &[Option<AttachedAdapter<Cpu>>]) -> Vec<Request<Cpu>> {
    let shared = tokens(140, 3);
    let mut prompts: Vec<Vec<u32>> =
        [1, 10, 60, 70].iter().map(|&len| [&shared[..], &tokens(len, len as u32)].concat()).collect();
    prompts.extend([shared[..128].to_vec(), [&shared[..64], &tokens(50, 8)].concat(), tokens(90, 9)]);
    let request = |(prompt, adapter): (&Vec<u32>, &Option<AttachedAdapter<Cpu>>)| {
        let mut request = Request::new(prompt.clone(), greedy());
        request.adapter = adapter.clone();
        (request.max_tokens, request.top_logprobs, request.gates) = (6, Some(VOCAB), true);
        request
    };
    let twice = prompts.iter().chain(&prompts);
    twice.flat_map(|prompt| adapters.iter().map(move |adapter| (prompt, adapter))).map(request).collect()
}

/// Tokens of blocks that an earlier request with the same adapter has computed.
fn shared_tokens(requests: &[Request<Cpu>], adapters: usize) -> u64 {
    let (mut seen, mut hits) = (std::collections::HashSet::new(), 0);
    for (i, Request { prompt, .. }) in requests.iter().enumerate() {
        for end in (64..=prompt.len()).step_by(64) {
            let new = seen.insert((i % adapters, &prompt[..end]));
            hits += u64::from(!new && end < prompt.len()) * 64;
        }
    }
    hits
}

fn prefixes_change_no_bit(name: &str, precision: Precision) {
    let (model, adapter) = open(name, precision);
    let attach = |adapter: &Adapter| Some(model.attach(adapter).unwrap());
    let adapters = [None, attach(&adapter), attach(&changed(&adapter, 1.5))];
    let run = |options: EngineOptions| {
        let mut engine = Engine::new(&model, options).unwrap();
        let mut results = HashMap::new();
        let ids: Vec<_> = alike(&adapters).into_iter().map(|request| engine.submit(request).unwrap()).collect();
        run(&mut engine, &mut results);
        (ids.iter().map(|id| results.remove(id).unwrap()).collect::<Vec<_>>(), engine.stats())
    };
    let (want, stats) = run(options(1, 64));
    let total: u64 = alike(&adapters).iter().map(|request| request.prompt.len() as u64).sum();
    assert_eq!((stats.prompt_tokens, stats.prefix_hit_tokens), (total, 0));
    for (slots, prompt_tokens, prefix_tokens) in [(8, 200, 4096), (1, 64, 4096), (4, 64, 300), (3, 1000, 64)] {
        let (got, stats) = run(EngineOptions { prefix_tokens, ..options(slots, prompt_tokens) });
        assert!(got == want, "{name}, {precision:?}: {slots} slots, {prefix_tokens} tokens of prefixes");
        assert_eq!(stats.prompt_tokens + stats.prefix_hit_tokens, total);
        if prefix_tokens == 4096 {
            let hits = shared_tokens(&alike(&adapters), adapters.len());
            assert_eq!(stats.prefix_hit_tokens, hits, "each block is computed once");
        }
    }
}

#[test]
fn what_prompts_share_is_computed_once_and_changes_no_bit() {
    for name in ["hydra", "mistral"] {
        prefixes_change_no_bit(name, Precision::F32);
    }
    prefixes_change_no_bit("qwen3", Precision::Bf16);
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|logit| (logit - max).exp()).sum();
    logits.iter().map(|logit| logit - max - sum.ln()).collect()
}

#[track_caller]
fn assert_close(got: &[u32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        let got = f32::from_bits(*got);
        assert!((got - want).abs() < 1e-4 * want.abs().max(1.0), "{got}, wanted {want}");
    }
}

/// A generator takes the same tokens in pieces of other sizes: the same but for rounding.
#[test]
fn tokens_and_log_probabilities_are_those_of_a_generator_and_an_evaluator() {
    for name in ["hydra", "lora", "llama3", "qwen2", "qwen3", "mistral", "window"] {
        let (model, adapter) = open(name, Precision::F32);
        let prompt = tokens(150, 3);
        let mut request = Request::new(prompt.clone(), greedy());
        request.adapter = Some(model.attach(&adapter).unwrap());
        (request.max_tokens, request.top_logprobs, request.prompt_logprobs) = (20, Some(VOCAB), true);
        let mut engine = Engine::new(&model, options(2, 64)).unwrap();
        let (id, mut results) = (engine.submit(request).unwrap(), HashMap::new());
        run(&mut engine, &mut results);
        let got = &results[&id];

        let mut generator = Generator::new(&model, Some(&adapter), 256).unwrap();
        let (mut logits, mut sampler) = (generator.feed(&prompt).unwrap().to_vec(), greedy());
        for (&token, logprobs) in got.tokens.iter().zip(&got.logprobs) {
            assert_close(logprobs, &log_softmax(&logits));
            assert_eq!(token, sampler.sample(&logits).unwrap(), "{name}");
            logits = generator.feed(&[token]).unwrap().to_vec();
        }
        let mut evaluator = Evaluator::new(&model, Some(&adapter), 256).unwrap();
        let all = evaluator.logits(&Sequence::prompt(&prompt)).unwrap();
        assert_eq!(got.prompt.len(), 149);
        for (logprobs, logits) in got.prompt.iter().zip(all.chunks(VOCAB)) {
            assert_close(logprobs, &log_softmax(logits));
        }
    }
}

#[test]
fn gates_are_those_of_the_position_that_a_token_is_drawn_after() {
    let (model, adapter) = open("hydra", Precision::F32);
    let mut engine = Engine::new(&model, options(1, 64)).unwrap();
    let mut request = Request::new(tokens(70, 5), greedy());
    (request.adapter, request.gates, request.max_tokens) = (Some(model.attach(&adapter).unwrap()), true, 2);
    engine.submit(request).unwrap();
    let mut gates = Vec::new();
    let mut drawn = Vec::new();
    while !engine.is_idle() {
        for event in engine.step().unwrap() {
            if let Event::Token { token, gates: of, .. } = event {
                drawn.push(token);
                gates.push(of.unwrap());
            }
        }
    }
    // The sum over a text's positions, once with and once without the last of them.
    let sums = |text: &[u32]| {
        let mut evaluator = Evaluator::new(&model, Some(&adapter), 128).unwrap();
        let means = evaluator.gate_means(&[Sequence::prompt(text)]).unwrap();
        let sums = means.iter().flat_map(|mean| mean.lora_heads.iter().map(|gate| gate * text.len() as f64));
        (means.iter().map(|mean| (mean.layer, mean.projection)).collect::<Vec<_>>(), sums.collect::<Vec<_>>())
    };
    let text = [tokens(70, 5), vec![drawn[0]]].concat();
    for (gates, end) in gates.iter().zip([70, 71]) {
        let ((slots, with), (_, without)) = (sums(&text[..end]), sums(&text[..end - 1]));
        assert_eq!((&gates.slots, gates.lora_heads), (&slots, 2));
        assert_eq!(gates.gates.len(), with.len());
        for ((gate, with), without) in gates.gates.iter().zip(with).zip(without) {
            assert!((f64::from(*gate) - (with - without)).abs() < 1e-4, "{gate}, wanted {}", with - without);
        }
    }
}

#[test]
fn requests_that_end_early_leave_the_others_as_they_are() {
    let (model, adapter) = open("hydra", Precision::F32);
    let request = |seed: u32, len: usize, max_tokens: usize| {
        let mut request = Request::new(tokens(len, seed), greedy());
        (request.max_tokens, request.top_logprobs) = (max_tokens, Some(VOCAB));
        request
    };
    let mut results = HashMap::new();
    let mut engine = Engine::new(&model, options(2, 64)).unwrap();
    let want: Vec<RequestId> = (0..3).map(|i| engine.submit(request(i, 100, 10)).unwrap()).collect();
    run(&mut engine, &mut results);

    let mut engine = Engine::new(&model, options(2, 64)).unwrap();
    let mut got = HashMap::new();
    let mut step =
        |engine: &mut Engine<Cpu>| engine.step().unwrap().into_iter().for_each(|event| take(&mut got, event));
    // In the queue, in its prompt, and while it generates.
    let kept = engine.submit(request(0, 100, 10)).unwrap();
    let in_prompt = engine.submit(request(7, 200, 10)).unwrap();
    let queued = engine.submit(request(8, 20, 10)).unwrap();
    let second = engine.submit(request(1, 100, 10)).unwrap();
    engine.cancel(queued);
    assert_eq!((engine.running(), engine.queued()), (0, 3));
    (0..3).for_each(|_| step(&mut engine));
    engine.cancel(in_prompt);
    engine.cancel(in_prompt);
    assert_eq!((engine.running(), engine.queued()), (1, 1));
    step(&mut engine);
    assert_eq!((engine.running(), engine.queued()), (2, 0), "a slot is free for the next step");
    engine.cancel(kept);
    // One whose adapter overflows.
    let mut broken = request(9, 80, 10);
    broken.adapter = Some(model.attach(&changed(&adapter, 1e38)).unwrap());
    let broken = engine.submit(broken).unwrap();
    let third = engine.submit(request(2, 100, 10)).unwrap();
    (0..30).for_each(|_| step(&mut engine));
    assert!(engine.is_idle());
    assert!(got[&broken].failed && got[&broken].tokens.is_empty());
    assert!(!got.contains_key(&queued) && !got.contains_key(&in_prompt));
    assert!(got[&kept].finish.is_none());
    assert_eq!(got[&kept].tokens, results[&want[0]].tokens[..got[&kept].tokens.len()]);
    assert!(got[&second] == results[&want[1]] && got[&third] == results[&want[2]]);
}

#[test]
fn requests_end_where_they_should() {
    let (model, adapter) = open("hydra", Precision::F32);
    let mut engine = Engine::new(&model, EngineOptions { context: Some(80), ..options(4, 64) }).unwrap();
    let prompt = tokens(70, 1);
    let submit = |engine: &mut Engine<Cpu>, change: &dyn Fn(&mut Request<Cpu>)| {
        let mut request = Request::new(prompt.clone(), greedy());
        change(&mut request);
        let (id, mut results) = (engine.submit(request).unwrap(), HashMap::new());
        run(engine, &mut results);
        results.remove(&id).unwrap()
    };
    let full = submit(&mut engine, &|_| {});
    assert_eq!((full.tokens.len(), full.finish), (10, Some(Finish::Context)));
    let five = submit(&mut engine, &|request| request.max_tokens = 5);
    assert_eq!((&five.tokens[..], five.finish), (&full.tokens[..5], Some(Finish::MaxTokens)));
    let end = full.tokens[6];
    let first = full.tokens.iter().position(|token| *token == end).unwrap();
    let ended = submit(&mut engine, &|request| request.end_tokens = vec![VOCAB as u32 - 1, end]);
    assert_eq!((&ended.tokens[..], ended.finish), (&full.tokens[..first], Some(Finish::EndOfText)));
    // The prompt alone, which may fill the context.
    let echo = submit(&mut engine, &|request| {
        request.prompt = tokens(80, 1);
        (request.max_tokens, request.prompt_logprobs, request.top_logprobs) = (0, true, Some(3));
    });
    assert_eq!((echo.tokens.len(), echo.prompt.len(), echo.finish), (0, 79, Some(Finish::MaxTokens)));
    assert!(echo.prompt.iter().all(|top| top.len() == 3));
    let nothing = submit(&mut engine, &|request| request.max_tokens = 0);
    assert_eq!(nothing, Result { finish: Some(Finish::MaxTokens), ..Result::default() });

    let refused = |engine: &mut Engine<Cpu>, prompt| engine.submit(Request::new(prompt, greedy())).unwrap_err();
    assert!(matches!(refused(&mut engine, vec![]), Error::Invalid(_)));
    assert!(matches!(refused(&mut engine, tokens(80, 1)), Error::SequenceTooLong { tokens: 80, limit: 79 }));
    assert!(matches!(refused(&mut engine, vec![512]), Error::TokenOutOfRange { token: 512, .. }));
    let mut stranger = Request::new(tokens(3, 1), greedy());
    stranger.adapter = Some(open("hydra", Precision::F32).0.attach(&adapter).unwrap());
    assert!(matches!(engine.submit(stranger), Err(Error::WrongAdapter(_))));
    assert!(engine.is_idle());
    for wrong in [options(0, 64), EngineOptions { context: Some(257), ..options(1, 64) }] {
        assert!(
            Engine::new(&model, wrong).is_err() && Engine::plan_bytes(model.backend(), model.config(), &wrong).is_err()
        );
    }
    let planned = |slots| Engine::plan_bytes(model.backend(), model.config(), &options(slots, 64)).unwrap();
    // Two layers of 2 key heads of 8, f32, for a context of 256 tokens.
    assert_eq!(planned(5) - planned(4), 2 * 2 * 16 * 4 * 256);
}

#[test]
fn an_engine_moves_to_a_thread_and_a_device_may_be_chosen_at_run_time() {
    fn moves<T: Send + 'static>() {}
    moves::<Request>();
    moves::<Event>();
    let (model, adapter) = open("hydra", Precision::F32);
    let on_cpu = {
        let attached = model.attach(&adapter).unwrap();
        let (mut engine, mut results) = (Engine::new(&model, options(3, 64)).unwrap(), HashMap::new());
        let ids: Vec<_> = requests(&[Some(attached), None]).into_iter().map(|r| engine.submit(r).unwrap()).collect();
        run(&mut engine, &mut results);
        ids.iter().map(|id| results.remove(id).unwrap().tokens).collect::<Vec<_>>()
    };
    let model = Model::load(Device::Cpu(cpu(Precision::F32, 2)), model.checkpoint()).unwrap();
    let attached = model.attach(&adapter).unwrap();
    let mut engine = Engine::new(&model, options(3, 64)).unwrap();
    let requests = requests(&[Some(attached), None]);
    let on_a_thread = std::thread::spawn(move || {
        let mut results = HashMap::new();
        let ids: Vec<_> = requests.into_iter().map(|request| engine.submit(request).unwrap()).collect();
        run(&mut engine, &mut results);
        ids.iter().map(|id| results.remove(id).unwrap().tokens).collect::<Vec<_>>()
    });
    assert_eq!(on_a_thread.join().unwrap(), on_cpu);
}
