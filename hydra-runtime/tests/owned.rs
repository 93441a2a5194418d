//! Models, trainers, evaluators and generators own what they need; generation ends where it should; long work can be watched and
//! cancelled.

use hydra_runtime::Error;
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::cpu::{Cpu, CpuOptions};
use hydra_runtime::backend::{Backend, Device};
use hydra_runtime::batch::{NO_TARGET, Sequence};
use hydra_runtime::chat::Message;
use hydra_runtime::checkpoint::{Bytes, Checkpoint};
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::generate::{Finish, Generated, Generator, Prompt, Sampler, Sampling};
use hydra_runtime::model::{AttachedAdapter, Model};
use hydra_runtime::tokenizer::{TextStream, Tokenizer};
use hydra_runtime::train::{Progress, TrainOptions, Trainer};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

fn case() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/hydra")
}

fn options() -> CpuOptions {
    CpuOptions { threads: Some(2), ..CpuOptions::default() }
}

fn model() -> Model<Cpu> {
    Model::load(Cpu::new(options()).unwrap(), &Checkpoint::open(case().join("model")).unwrap()).unwrap()
}

/// Predicts every next token.
fn sequence(len: usize, seed: u32) -> Sequence {
    let tokens: Vec<u32> = (0..len as u32).map(|i| (i * 131 + seed * 977 + i * i * 7) % 512).collect();
    let targets = tokens[1..].iter().copied().chain([NO_TARGET]).collect();
    Sequence { tokens, targets, lora_head: None }
}

/// The model's files as they would come over a network: at an address that is aligned to nothing.
fn files(chat_template: Option<&str>) -> Vec<(String, Bytes)> {
    let mut files: Vec<(String, Bytes)> = Vec::new();
    for entry in std::fs::read_dir(case().join("model")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = [b"x", std::fs::read(&path).unwrap().as_slice()].concat();
        files.push((path.file_name().unwrap().to_str().unwrap().into(), Bytes::from(bytes).slice(1..)));
    }
    if let Some(template) = chat_template {
        let options = serde_json::json!({ "chat_template": template }).to_string();
        files.push(("tokenizer_config.json".into(), options.into()));
    }
    files
}

#[test]
fn everything_can_be_moved_and_shared() {
    fn moves<T: Send + 'static>() {}
    fn shares<T: Clone + Send + Sync + 'static>() {}
    shares::<Model>();
    shares::<AttachedAdapter>();
    shares::<Checkpoint>();
    shares::<Tokenizer>();
    moves::<Trainer>();
    moves::<Evaluator>();
    moves::<Generator>();
    moves::<Generated>();
    moves::<TextStream>();
    moves::<Sampler>();
    moves::<Adapter>();
}

/// A program's state in one struct, made in a function that ends before it is used.
struct State {
    trainer: Trainer,
    evaluator: Evaluator,
    generator: Generator,
}

#[test]
fn one_struct_holds_all_and_moves_to_a_thread() {
    let state = || {
        let checkpoint = Checkpoint::open(case().join("model")).unwrap();
        let model = Model::load(Device::cpu(options()).unwrap(), &checkpoint).unwrap();
        let adapter = Adapter::load(case().join("adapter"), model.config()).unwrap();
        State {
            trainer: Trainer::new(&model, &adapter, TrainOptions { max_tokens: 64, ..TrainOptions::default() })
                .unwrap(),
            evaluator: Evaluator::new(&model, Some(&adapter), 64).unwrap(),
            generator: Generator::new(&model, Some(&adapter), 64).unwrap(),
        }
    };
    let mut state = state();
    let work = std::thread::spawn(move || {
        let loss = state.evaluator.losses(&[sequence(30, 1)]).unwrap()[0];
        let step = state.trainer.step(&[sequence(30, 1)], 1e-3).unwrap();
        let logits = state.generator.feed(&sequence(30, 1).tokens).unwrap().to_vec();
        (loss.nll / loss.targets as f64, step.loss, logits, state)
    });
    let (loss, step, logits, state) = work.join().unwrap();
    assert!((loss - step).abs() < 1e-6, "{loss}, {step}");
    // The same bits as on the CPU itself.
    let model = model();
    let adapter = Adapter::load(case().join("adapter"), model.config()).unwrap();
    let mut generator = Generator::new(&model, Some(&adapter), 64).unwrap();
    assert_eq!(generator.feed(&sequence(30, 1).tokens).unwrap(), logits);
    assert_eq!(state.trainer.steps(), 1);
    assert_eq!(state.trainer.model().backend().describe(), model.backend().describe());
}

#[test]
fn files_in_memory_make_the_same_model() {
    let in_memory = Checkpoint::from_files(files(None)).unwrap();
    let on_disk = Checkpoint::open(case().join("model")).unwrap();
    assert_eq!((in_memory.config(), in_memory.fingerprint()), (on_disk.config(), on_disk.fingerprint()));
    let text = "What has nine heads?";
    let ids = on_disk.tokenizer().unwrap().encode(text).unwrap();
    assert_eq!(in_memory.tokenizer().unwrap().encode(text).unwrap(), ids);
    let logits = |checkpoint: &Checkpoint| {
        let model = Model::load(Cpu::new(options()).unwrap(), checkpoint).unwrap();
        Evaluator::new(&model, None, 40).unwrap().logits(&sequence(40, 1)).unwrap()
    };
    assert_eq!(logits(&in_memory), logits(&on_disk));
    drop(on_disk);
    // What is missing is said, with its name.
    let without = |name: &str| Checkpoint::from_files(files(None).into_iter().filter(|(own, _)| own != name));
    assert!(without("config.json").err().unwrap().to_string().contains("config.json"));
    assert!(without("model.safetensors").err().unwrap().to_string().contains("model.safetensors"));
    let said = without("tokenizer.json").unwrap().tokenizer().err().unwrap().to_string();
    assert!(said.contains("tokenizer.json"), "{said}");
    assert!(Checkpoint::from_gguf(&b"not one"[..]).is_err());
}

#[test]
fn several_adapters_serve_several_threads() {
    let model = model();
    let own = Adapter::load(case().join("adapter"), model.config()).unwrap();
    let mut other = own.clone();
    other.layers.iter_mut().flatten().flatten().for_each(|pair| pair.b.iter_mut().for_each(|b| *b = 1.5 - *b));
    let adapters = [model.attach(&own).unwrap(), model.attach(&other).unwrap()];
    let write = |adapter: &AttachedAdapter<Cpu>, seed| {
        model.generate("One two").adapter(adapter).temperature(1.0).seed(seed).max_tokens(20).text().unwrap()
    };
    let wanted: Vec<String> = (0..4).map(|i| write(&adapters[i % 2], i as u64)).collect();
    assert_ne!(write(&adapters[0], 7), write(&adapters[1], 7), "adapters that do the same");
    std::thread::scope(|scope| {
        for (i, wanted) in wanted.iter().enumerate() {
            let (write, adapter) = (&write, &adapters[i % 2]);
            scope.spawn(move || (0..3).for_each(|_| assert_eq!(&write(adapter, i as u64), wanted)));
        }
    });
    // It is the model's own that an adapter is for.
    let stranger = self::model().attach(&own).unwrap();
    let refused = model.generate("One two").adapter(&stranger).text();
    assert!(matches!(refused, Err(Error::WrongAdapter(_))));
    assert!(matches!(Evaluator::attached(&model, Some(&stranger), 8), Err(Error::WrongAdapter(_))));
}

/// Every setting other than its default.
const SAMPLING: Sampling = Sampling {
    temperature: 1.0,
    top_k: 100,
    top_p: 0.9,
    min_p: 0.01,
    repetition_penalty: 1.1,
    presence_penalty: 0.1,
    frequency_penalty: 0.1,
    seed: 3,
};

/// The loop that `generate` is, written out.
fn by_hand(model: &Model<Cpu>, prompt: &str, tokens: usize) -> (Vec<u32>, String) {
    let tokenizer = model.tokenizer().unwrap();
    let mut generator = Generator::new(model, None, 400).unwrap();
    let (mut sampler, mut text) = (SAMPLING.sampler().unwrap(), String::new());
    let (mut stream, mut ids) = (tokenizer.stream(), Vec::new());
    let prompt = tokenizer.encode_prompt(prompt).unwrap();
    sampler.read(&prompt);
    let mut next = sampler.sample(generator.feed(&prompt).unwrap()).unwrap();
    let ends = model.end_tokens().unwrap();
    while ids.len() < tokens && !ends.contains(&next) {
        ids.push(next);
        text += &stream.push(next).unwrap();
        next = sampler.sample(generator.feed(&[next]).unwrap()).unwrap();
    }
    (ids, text + &stream.finish().unwrap())
}

#[test]
fn generation_is_the_loop_and_ends_where_it_should() {
    let model = model();
    let (ids, text) = by_hand(&model, "Nine heads", 40);
    assert!(ids.len() > 10, "a text that ends early tests nothing");
    let generate = || model.generate("Nine heads").sampling(SAMPLING).max_tokens(40);
    let mut stream = generate().stream().unwrap();
    let pieces: Vec<String> = stream.by_ref().collect::<Result<_, _>>().unwrap();
    assert!(pieces.iter().all(|piece| !piece.is_empty()) && pieces.len() > 1);
    assert_eq!((stream.tokens(), pieces.concat()), (ids.as_slice(), text.clone()));
    let ended = if ids.len() == 40 { Finish::MaxTokens } else { Finish::EndOfText };
    assert_eq!(stream.finish(), Some(ended));
    assert!(stream.next().is_none());
    // Any part of the text stops it before its first appearance, however it is cut into tokens.
    let characters: Vec<char> = text.chars().collect();
    for len in [1, 2, 5] {
        for start in (0..characters.len() - len).step_by(3) {
            let stop: String = characters[start..start + len].iter().collect();
            let mut stopped = generate().stop("not in it at all").stop(&stop).stream().unwrap();
            let got: String = stopped.by_ref().collect::<Result<_, _>>().unwrap();
            assert_eq!(Some(got.as_str()), text.split(&stop).next(), "stop {stop:?}");
            assert_eq!(stopped.finish(), Some(Finish::Stop));
        }
    }
    // A stop string that only begins is text after all.
    let almost: String =
        text.chars().rev().take(3).collect::<Vec<_>>().into_iter().rev().chain("\u{0}".chars()).collect();
    assert_eq!(generate().stop(almost).text().unwrap(), text);
    // The model's own end.
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(case().join("model/config.json")).unwrap()).unwrap();
    config["eos_token_id"] = serde_json::json!([ids[5], ids[5], 1]);
    let changed = files(None).into_iter().map(|(name, bytes)| {
        let bytes = if name == "config.json" { Bytes::from(config.to_string()) } else { bytes };
        (name, bytes)
    });
    let ends = Model::load(Cpu::new(options()).unwrap(), &Checkpoint::from_files(changed).unwrap()).unwrap();
    // Ascending, each once.
    assert_eq!(ends.end_tokens().unwrap(), [1, ids[5]]);
    let mut stream = ends.generate("Nine heads").sampling(SAMPLING).stream().unwrap();
    stream.by_ref().for_each(|piece| drop(piece.unwrap()));
    let first = ids.iter().position(|id| *id == ids[5]).unwrap();
    assert_eq!((stream.tokens(), stream.finish()), (&ids[..first], Some(Finish::EndOfText)));
    // None asked for, and the context's end.
    let mut none = model.generate("Nine heads").max_tokens(0).stream().unwrap();
    assert!(none.next().is_none() && none.finish() == Some(Finish::MaxTokens));
    let context = model.config().context;
    let mut full = model.generate(sequence(context - 3, 1).tokens).temperature(2.0).max_tokens(50).stream().unwrap();
    full.by_ref().for_each(|piece| drop(piece.unwrap()));
    assert_eq!((full.tokens().len(), full.finish()), (3, Some(Finish::Context)));
    let long = model.generate(sequence(context, 1).tokens).text();
    assert!(matches!(long, Err(Error::SequenceTooLong { .. })));
    assert!(model.generate("x").stop("").text().is_err());
    assert!(model.generate("x").temperature(f32::NAN).text().is_err());
    assert!(model.generate(Vec::new()).text().is_err());
}

#[test]
fn conversations_go_through_the_models_template() {
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    let checkpoint = Checkpoint::from_files(files(Some(template))).unwrap();
    let model = Model::load(Cpu::new(options()).unwrap(), &checkpoint).unwrap();
    let messages = [Message::system("Be brief."), Message::user("Nine heads?")];
    let text = "<system>Be brief.\n<user>Nine heads?\n<assistant>";
    let tokenizer = model.tokenizer().unwrap();
    assert_eq!(Prompt::Chat(messages.to_vec()).tokens(tokenizer).unwrap(), tokenizer.encode_prompt(text).unwrap());
    let chat = model.chat(messages.clone()).max_tokens(10).text().unwrap();
    assert_eq!(chat, model.generate(text).max_tokens(10).text().unwrap());
    let without = self::model().chat(messages).text();
    assert!(matches!(without, Err(Error::Template(_))));
}

#[test]
fn work_is_watched_and_cancelled() {
    let model = model();
    let adapter = Adapter::load(case().join("adapter"), model.config()).unwrap();
    let (flag, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
    let sequences: Vec<_> = (1..6).map(|seed| sequence(30, seed)).collect();
    let reports = |seen: &Arc<Mutex<Vec<Progress>>>| {
        let seen = Arc::clone(seen);
        move |progress| seen.lock().unwrap().push(progress)
    };
    let options = TrainOptions { max_tokens: 64, ..TrainOptions::default() };
    let trainer = Trainer::new(&model, &adapter, options).unwrap();
    let mut trainer = trainer.with_cancel(Arc::clone(&flag)).with_progress(reports(&seen));
    trainer.step(&sequences, 1e-3).unwrap();
    let passes = [60, 120, 150].map(|done| Progress { done, total: 150 });
    assert_eq!(*seen.lock().unwrap(), passes);
    let before = trainer.adapter().unwrap();
    flag.store(true, Ordering::Relaxed);
    assert!(matches!(trainer.step(&sequences, 1e-3), Err(Error::Cancelled)));
    assert!(trainer.adapter().unwrap() == before && trainer.steps() == 1);
    flag.store(false, Ordering::Relaxed);
    trainer.step(&sequences, 1e-3).unwrap();

    // From inside a report: after the first pass.
    let (stop, calls) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (own, count) = (Arc::clone(&stop), Arc::clone(&calls));
    let evaluator = Evaluator::new(&model, Some(&adapter), 64).unwrap().with_cancel(Arc::clone(&stop));
    let mut evaluator = evaluator.with_progress(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        own.store(true, Ordering::Relaxed);
    });
    assert!(matches!(evaluator.losses(&sequences), Err(Error::Cancelled)));
    assert_eq!(calls.load(Ordering::Relaxed), 1);

    let flag = Arc::new(AtomicBool::new(true));
    let mut generator = Generator::new(&model, None, 100).unwrap().with_cancel(Arc::clone(&flag));
    assert!(matches!(generator.feed(&sequence(90, 1).tokens), Err(Error::Cancelled)) && generator.is_empty());
    flag.store(false, Ordering::Relaxed);
    let mut text = model.generate("Nine heads").cancel(Arc::clone(&flag)).temperature(1.0).stream().unwrap();
    assert!(text.next().unwrap().is_ok());
    flag.store(true, Ordering::Relaxed);
    assert!(text.any(|piece| matches!(piece, Err(Error::Cancelled))) && text.next().is_none());
}
