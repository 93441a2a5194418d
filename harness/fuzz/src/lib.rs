//! What is fuzzed: each function reads bytes as a stranger's file or request, and then uses what came of it as the commands do. An error
//! is fine; a panic, a hang and gigabytes of memory are not.
//!
//! cargo-fuzz calls these from `fuzz_targets/`, on nightly Rust; `harness/tests/fuzz.rs` calls them on stable Rust.

use hydra_harness::fuzz as harness;
use hydra_runtime::Result;
use hydra_runtime::adapter::{Adapter, AdapterConfig, GateKind};
use hydra_runtime::backend::cpu::{Cpu, CpuOptions};
use hydra_runtime::chat::{ChatTemplate, InstructionTemplate, Message};
use hydra_runtime::checkpoint::{Bytes, Checkpoint};
use hydra_runtime::model::Model;
use hydra_runtime::projection::Projection;
use hydra_runtime::tokenizer::Tokenizer;
use hydra_runtime::train::{TrainOptions, Trainer};
use std::cell::RefCell;
use std::path::Path;
use tempfile::TempDir;

/// A target's name and function.
pub type Target = (&'static str, fn(&[u8]));

/// All targets; the corpus of each is the folder of its name.
pub const TARGETS: [Target; 14] = [
    ("safetensors", safetensors),
    ("gguf", gguf),
    ("tokenizer", tokenizer),
    ("adapter", adapter),
    ("gguf_lora", gguf_lora),
    ("trainer_state", trainer_state),
    ("jsonl", jsonl),
    ("compressed", compressed),
    ("parquet", parquet),
    ("csv", csv),
    ("mmlu", mmlu),
    ("toml", toml),
    ("template", template),
    ("request", request),
];

/// A model of two layers of width 8, and a tokenizer of six tokens.
const MODEL: &[u8] = include_bytes!("../corpus/safetensors/tiny");
const TOKENIZER: &[u8] = include_bytes!("../corpus/tokenizer/bpe");

/// What is tokenized: words, digits, spaces, characters of two to four bytes, and a special token.
const TEXT: &str = "Ab ab  12\n\té漢🐉 <s>ab";

/// Two files: JSON has no zero byte, so the first one is where it ends.
fn halves(bytes: &[u8]) -> (&[u8], &[u8]) {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    (&bytes[..end], bytes.get(end + 1..).unwrap_or_default())
}

/// The tiny model's files with these changed.
fn files(changed: &[(&str, &[u8])]) -> Vec<(String, Bytes)> {
    let (config, weights) = halves(MODEL);
    let own = [("config.json", config), ("model.safetensors", weights), ("tokenizer.json", TOKENIZER)];
    let other = own.iter().filter(|(name, _)| changed.iter().all(|(changed, _)| changed != name));
    other.chain(changed).map(|&(name, bytes)| (name.to_string(), Bytes::copy_from_slice(bytes))).collect()
}

fn tiny() -> Checkpoint {
    Checkpoint::from_files(files(&[])).expect("the corpus has a model")
}

fn use_tokenizer(tokenizer: &Tokenizer) -> Result<()> {
    let ids = tokenizer.encode_prompt(TEXT)?;
    tokenizer.decode(&ids)?;
    tokenizer.decode(&[0, 5, 3, 2, 1, 4, 99])?;
    if let Some(template) = tokenizer.chat_template() {
        chat(template, tokenizer)?;
    }
    Ok(())
}

fn chat(template: &str, tokenizer: &Tokenizer) -> Result<()> {
    let chat = ChatTemplate::new(template, tokenizer)?;
    chat.prompt(&[Message::system("Be brief."), Message::user(TEXT), Message::assistant("ab"), Message::user("b")])?;
    let turns = [Message::user(TEXT), Message::assistant("ab"), Message::user("b"), Message::assistant(TEXT)];
    let _ = chat.conversation(&turns).and_then(|conversation| conversation.tokens(tokenizer));
    chat.exchange("a", "b").map(drop)
}

/// config.json and model.safetensors.
pub fn safetensors(bytes: &[u8]) {
    let (config, weights) = halves(bytes);
    if let Ok(checkpoint) = Checkpoint::from_files(files(&[("config.json", config), ("model.safetensors", weights)])) {
        checkpoint.fingerprint();
        let _ = checkpoint.tokenizer();
    }
}

/// A GGUF file.
pub fn gguf(bytes: &[u8]) {
    if let Ok(checkpoint) = Checkpoint::from_gguf(Bytes::copy_from_slice(bytes)) {
        checkpoint.fingerprint();
        let _ = checkpoint.tokenizer().and_then(|tokenizer| use_tokenizer(&tokenizer));
    }
}

/// tokenizer.json.
pub fn tokenizer(bytes: &[u8]) {
    let checkpoint = Checkpoint::from_files(files(&[("tokenizer.json", bytes)])).expect("the corpus has a model");
    let _ = checkpoint.tokenizer().and_then(|tokenizer| use_tokenizer(&tokenizer));
}

/// A chat template, or a template of `--template`.
pub fn template(bytes: &[u8]) {
    thread_local! {
        static TOKENIZER: Tokenizer = tiny().tokenizer().expect("the corpus has a tokenizer");
    }
    let text = String::from_utf8_lossy(bytes);
    let _ = TOKENIZER.with(|tokenizer| chat(&text, tokenizer));
    let _ = InstructionTemplate::jinja(text).and_then(|template| template.render("a", TEXT, "b", Some("c")));
}

/// A folder of this thread.
fn in_folder(use_it: impl FnOnce(&Path)) {
    thread_local! {
        static FOLDER: TempDir = tempfile::tempdir().expect("a temporary folder");
    }
    FOLDER.with(|folder| use_it(folder.path()));
}

fn write(folder: &Path, name: &str, bytes: &[u8]) {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().expect("a file's folder")).expect("a temporary folder");
    std::fs::write(path, bytes).expect("a temporary file");
}

/// adapter_config.json and adapter_model.safetensors.
pub fn adapter(bytes: &[u8]) {
    thread_local! {
        static CHECKPOINT: Checkpoint = tiny();
    }
    let (config, tensors) = halves(bytes);
    in_folder(|folder| {
        write(folder, "adapter_config.json", config);
        write(folder, "adapter_model.safetensors", tensors);
        let _ = Adapter::open(folder).map(|adapter| adapter.parameters());
        let _ = CHECKPOINT.with(|checkpoint| Adapter::load(folder, checkpoint.config()));
    });
}

/// A LoRA in a GGUF file.
pub fn gguf_lora(bytes: &[u8]) {
    thread_local! {
        static CHECKPOINT: Checkpoint = tiny();
    }
    in_folder(|folder| {
        write(folder, "lora.gguf", bytes);
        let _ = CHECKPOINT.with(|checkpoint| Adapter::load(folder.join("lora.gguf"), checkpoint.config()));
    });
}

/// trainer_state.safetensors.
pub fn trainer_state(bytes: &[u8]) {
    thread_local! {
        static TRAINER: RefCell<Trainer<Cpu>> = RefCell::new(trainer().expect("a trainer of the corpus's model"));
    }
    in_folder(|folder| {
        write(folder, "trainer_state.safetensors", bytes);
        let _ = TRAINER.with_borrow_mut(|trainer| trainer.load_state(folder));
    });
}

fn trainer() -> Result<Trainer<Cpu>> {
    let backend = Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() })?;
    let model = Model::load(backend, &tiny())?;
    let settings = AdapterConfig {
        gate: GateKind::Router,
        rank: 1,
        lora_heads: 2,
        targets: vec![Projection::Q],
        ..AdapterConfig::default()
    };
    let adapter = Adapter::init(model.config(), settings, 0)?;
    Trainer::new(&model, &adapter, TrainOptions { max_tokens: 4, ..TrainOptions::default() })
}

/// Records.
pub fn jsonl(bytes: &[u8]) {
    in_folder(|folder| {
        write(folder, "data.jsonl", bytes);
        let _ = harness::records(&folder.join("data.jsonl"));
    });
}

/// Records in a file that is compressed with gzip or Zstandard.
pub fn compressed(bytes: &[u8]) {
    jsonl(bytes);
}

/// A Parquet file of records, or of MMLU's questions.
pub fn parquet(bytes: &[u8]) {
    jsonl(bytes);
}

/// A table of records, with commas or with tabs.
pub fn csv(bytes: &[u8]) {
    in_folder(|folder| {
        for name in ["data.csv", "data.tsv"] {
            write(folder, name, bytes);
            let _ = harness::records(&folder.join(name));
        }
    });
}

/// A file of MMLU's questions: CSV, or JSON lines.
pub fn mmlu(bytes: &[u8]) {
    in_folder(|folder| {
        write(folder, "mmlu.jsonl", bytes);
        write(folder, "test/physics_test.csv", bytes);
        write(folder, "dev/physics_dev.csv", bytes);
        let _ = harness::questions(folder);
        let _ = harness::questions(&folder.join("mmlu.jsonl"));
    });
}

/// The options of a run, or an experiment.
pub fn toml(bytes: &[u8]) {
    in_folder(|folder| {
        write(folder, "experiment.toml", bytes);
        let _ = harness::experiment(&folder.join("experiment.toml"));
        let _ = harness::options(&folder.join("experiment.toml"));
    });
}

/// The body of a request to `hydra serve`.
pub fn request(bytes: &[u8]) {
    harness::request(bytes);
}
