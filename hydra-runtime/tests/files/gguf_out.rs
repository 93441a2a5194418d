//! What is written as GGUF is read back as it was: models of every architecture and of both containers, tokenizers, LoRAs.

use crate::builder::{Gguf, config_json, model_tensors, write_folder};
use crate::tokenizer::{byte_level, sentencepiece};
use hydra_runtime::adapter::{Adapter, AdapterConfig, Contents, GateKind, Method};
use hydra_runtime::backend::Format;
use hydra_runtime::backend::cpu::{Cpu, CpuOptions};
use hydra_runtime::batch::Sequence;
use hydra_runtime::checkpoint::{Checkpoint, TensorId};
use hydra_runtime::config::Config;
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::merge::{self, GgufOptions, MergeGate, MergeOptions};
use hydra_runtime::model::Model;
use hydra_runtime::projection::Projection;
use std::path::{Path, PathBuf};
use tempfile::tempdir;

const F32: GgufOptions = GgufOptions { format: Format::F32, description: None };

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

fn golden(name: &str) -> (Checkpoint, Adapter) {
    let checkpoint = Checkpoint::open(case(name).join("model")).unwrap();
    let adapter = Adapter::load(case(name).join("adapter"), checkpoint.config()).unwrap();
    (checkpoint, adapter)
}

/// A gate that any of the cases' adapters can be written with.
fn gates(adapter: &Adapter) -> Vec<MergeGate> {
    let last = MergeGate::Head(adapter.config.lora_heads - 1);
    if adapter.config.lora_heads == 1 { vec![MergeGate::One] } else { vec![MergeGate::Uniform, last] }
}

fn logits(checkpoint: &Checkpoint, adapter: Option<&Adapter>, head: Option<u32>) -> Vec<f32> {
    let cpu = Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap();
    let model = Model::load(cpu, checkpoint).unwrap();
    let vocab = checkpoint.config().vocab as u32;
    let tokens: Vec<u32> = (0..20).map(|i: u32| (i * 131 + i * i * 7) % vocab).collect();
    let sequence = Sequence { lora_head: head, ..Sequence::prompt(&tokens) };
    Evaluator::new(&model, adapter, 20).unwrap().logits(&sequence).unwrap()
}

#[track_caller]
fn assert_close(got: &[f32], want: &[f32], what: &str) {
    let largest = want.iter().fold(0f32, |max, x| max.max(x.abs()));
    let apart = got.iter().zip(want).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
    assert!(got.len() == want.len() && apart < 1e-5 * largest, "{what}: {apart} of {largest}");
}

/// An adapter that changes nothing.
fn none(checkpoint: &Checkpoint) -> Adapter {
    let config = AdapterConfig { method: Method::Lora, gate: GateKind::One, lora_heads: 1, ..AdapterConfig::default() };
    Adapter::init(checkpoint.config(), config, 0).unwrap()
}

fn written(checkpoint: &Checkpoint, adapter: &Adapter, gate: MergeGate, options: GgufOptions<'_>) -> Checkpoint {
    let dir = tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    merge::write_gguf(checkpoint, adapter, gate, &path, options).unwrap();
    Checkpoint::from_gguf(std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn models_of_every_architecture() {
    for name in ["hydra", "lora", "split", "mistral", "qwen2", "qwen3", "llama3", "yarn"] {
        let (checkpoint, adapter) = golden(name);
        for gate in gates(&adapter) {
            let got = written(&checkpoint, &adapter, gate, F32);
            let (want, head_dim) = (checkpoint.config(), checkpoint.config().head_dim);
            assert_eq!(Config { rope: want.rope.clone(), ..got.config().clone() }, *want, "{name}");
            let frequencies = |config: &Config| config.rope.inverse_frequencies(head_dim);
            assert_close(&frequencies(got.config()), &frequencies(want), name);
            let text = "Nine heads? 1 + 22 = 23.\n\ndef f(x): return x</s>";
            let ids = |checkpoint: &Checkpoint| checkpoint.tokenizer().unwrap().encode_prompt(text).unwrap();
            assert_eq!(ids(&got), ids(&checkpoint), "{name}");
            let (fixed, head) = adapter.with_fixed_gate(gate).unwrap();
            assert_close(&logits(&got, None, None), &logits(&checkpoint, Some(&fixed), head), name);
            // From GGUF to GGUF the metadata and what isn't changed are kept.
            let again = written(&got, &none(&got), MergeGate::One, F32);
            assert_eq!(again.config(), got.config());
            assert_eq!((logits(&again, None, None), ids(&again)), (logits(&got, None, None), ids(&got)), "{name}");
        }
    }
}

#[test]
fn matrices_in_the_format_that_was_asked_for() {
    let (checkpoint, adapter) = golden("qwen2"); // rows of 32 and 40
    let exact = written(&checkpoint, &adapter, MergeGate::Uniform, F32);
    for (format, embedding, down) in [
        (Format::Bf16, Format::Bf16, Format::Bf16),
        (Format::F16, Format::F16, Format::F16),
        (Format::Q8_0, Format::Q8_0, Format::F16),
        (Format::Q4_0, Format::Q4_0, Format::F16),
        (Format::Q4K, Format::Q5_0, Format::F16),
    ] {
        let got = written(&checkpoint, &adapter, MergeGate::Uniform, GgufOptions { format, ..F32 });
        assert_eq!(got.weight(TensorId::Embedding).format(), embedding);
        assert_eq!(got.weight(TensorId::Projection(1, Projection::Down)).format(), down);
        let mut rows = [vec![0.0; 32], vec![0.0; 32]];
        for (checkpoint, row) in [&got, &exact].into_iter().zip(&mut rows) {
            let q = checkpoint.weight(TensorId::Projection(0, Projection::Q));
            q.decode_row(hydra_kernels::Isa::Portable, 5, 0, row);
        }
        let step = rows[1].iter().fold(0f32, |max, x| max.max(x.abs())) / 7.0;
        assert!(rows[0].iter().zip(&rows[1]).all(|(a, b)| (a - b).abs() < step), "{}", format.name());
        // What is in this format already is not rounded again.
        let again = written(&got, &none(&got), MergeGate::One, GgufOptions { format, ..F32 });
        let embeddings = [&got, &again].map(|checkpoint| {
            let mut row = vec![0.0; 32];
            checkpoint.weight(TensorId::Embedding).decode_row(hydra_kernels::Isa::Portable, 3, 0, &mut row);
            row
        });
        assert_eq!(embeddings[0], embeddings[1]);
    }
    let q6 = GgufOptions { format: Format::Q6K, ..F32 };
    let error = merge::write_gguf(&checkpoint, &adapter, MergeGate::Uniform, Path::new("/nowhere"), q6).unwrap_err();
    assert!(error.to_string().contains("expected one of F32"), "{error}");
}

/// The model of a GGUF as a Hugging Face folder, and that as a GGUF again.
#[test]
fn tokenizers() {
    let text = "the  hen é abc ab12 in</s><|end|>a\n";
    for (what, gguf) in [("sentencepiece", sentencepiece())]
        .into_iter()
        .chain(["smollm", "gpt-2", "llama-bpe", "qwen2", "tekken", "default"].map(|pre| (pre, byte_level(pre))))
    {
        let checkpoint = Checkpoint::from_gguf(gguf.bytes()).unwrap();
        let folder = tempdir().unwrap();
        let options = MergeOptions { format: None, max_shard_bytes: u64::MAX };
        merge::write(&checkpoint, &none(&checkpoint), MergeGate::One, folder.path(), options).unwrap();
        let folder = Checkpoint::open(folder.path()).unwrap();
        let got = written(&folder, &none(&folder), MergeGate::One, F32);
        let (got, want) = (got.tokenizer().unwrap(), checkpoint.tokenizer().unwrap());
        assert_eq!(got.encode(text).unwrap(), want.encode(text).unwrap(), "{what}");
        assert_eq!((got.bos_to_add(), got.eos()), (want.bos_to_add(), want.eos()), "{what}");
        assert_eq!(
            got.decode(&got.encode("the é").unwrap()).unwrap(),
            want.decode(&want.encode("the é").unwrap()).unwrap()
        );
    }
}

#[test]
fn tokenizers_that_gguf_cant_say() {
    let dir = tempdir().unwrap();
    write_folder(dir.path(), &config_json(), &model_tensors());
    let word_level = serde_json::json!({"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
        "post_processor": null, "decoder": null, "truncation": null, "padding": null,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}});
    std::fs::write(dir.path().join("tokenizer.json"), word_level.to_string()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let path = dir.path().join("m.gguf");
    let error = merge::write_gguf(&checkpoint, &none(&checkpoint), MergeGate::One, &path, F32).unwrap_err().to_string();
    assert!(error.contains("WordLevel") && error.contains("BPE"), "{error}");
    let (window, adapter) = golden("window");
    let error = merge::write_gguf(&window, &adapter, gates(&adapter)[0], &path, F32).unwrap_err().to_string();
    assert!(error.contains("some of its layers have a sliding window"), "{error}");
}

#[test]
fn an_adapter_under_a_fixed_gate_is_one_lora() {
    for name in ["hydra", "lora", "split", "qwen3", "mistral"] {
        let (checkpoint, adapter) = golden(name);
        for gate in gates(&adapter) {
            let lora = adapter.as_lora(gate).unwrap();
            lora.fits(checkpoint.config()).unwrap();
            assert_eq!((lora.config.method, lora.config.lora_heads), (Method::Lora, 1));
            let (fixed, head) = adapter.with_fixed_gate(gate).unwrap();
            let want = logits(&checkpoint, Some(&fixed), head);
            assert_close(&logits(&checkpoint, Some(&lora), None), &want, name);
            // As a file, the same to the bit.
            let dir = tempdir().unwrap();
            let path = dir.path().join("lora.gguf");
            lora.save_gguf(&path, checkpoint.config(), Some("a test's")).unwrap();
            let read = Adapter::load(&path, checkpoint.config()).unwrap();
            assert!(read.layers == lora.layers, "{name}");
            assert_eq!((read.config.scale(), &read.config.targets), (lora.config.scale(), &lora.config.targets));
        }
    }
    let (checkpoint, adapter) = golden("hydra");
    let error = adapter.save_gguf("/nowhere", checkpoint.config(), None).unwrap_err().to_string();
    assert!(error.contains("expected method lora, found hydra"), "{error}");
    // llama.cpp would give it full strength.
    let mut silent = adapter.as_lora(MergeGate::Head(0)).unwrap();
    silent.config.alpha = 0.0;
    let error = silent.save_gguf("/nowhere", checkpoint.config(), None).unwrap_err().to_string();
    assert!(error.contains("alpha 0"), "{error}");
}

/// Without the digits that widening an f32 adds.
#[test]
fn numbers_of_a_file_are_shown_as_they_were_written() {
    let mut file = Gguf::new();
    file.string("general.type", "adapter");
    file.f32("adapter.lora.alpha", 0.7);
    let dir = tempdir().unwrap();
    let path = dir.path().join("lora.gguf");
    std::fs::write(&path, file.bytes()).unwrap();
    let contents = Contents::read(&path).unwrap().unwrap();
    assert!(contents.settings.contains(&("adapter.lora.alpha".into(), 0.7.into())), "{:?}", contents.settings);
}

/// The tiny model's LoRA on q as llama.cpp's converter would write it: rows of B in pairs.
#[test]
fn rows_of_b_lie_as_the_models_rows() {
    let checkpoint = Checkpoint::from_gguf(Gguf::model().bytes()).unwrap();
    let mut file = Gguf::new();
    file.string("general.architecture", "llama");
    file.string("general.type", "adapter");
    file.string("adapter.type", "lora");
    file.f32("adapter.lora.alpha", 6.0);
    // Heads of 4: logical rows 0 1 2 3 lie as 0 2 1 3.
    let stored: Vec<f32> = [0, 2, 1, 3, 4, 6, 5, 7].map(|row| row as f32).to_vec();
    for layer in 0..2 {
        file.tensor(&format!("blk.{layer}.attn_q.weight.lora_a"), &[1, 8], &[1.0; 8]);
        file.tensor(&format!("blk.{layer}.attn_q.weight.lora_b"), &[8, 1], &stored);
    }
    let load = |file: &Gguf| {
        let dir = tempdir().unwrap();
        let path = dir.path().join("lora.gguf");
        std::fs::write(&path, file.bytes()).unwrap();
        Adapter::load(&path, checkpoint.config()).map_err(|error| error.to_string())
    };
    let adapter = load(&file).unwrap();
    let pair = adapter.layers[1][Projection::Q].as_ref().unwrap();
    assert_eq!(pair.b, (0..8).map(|row| row as f32).collect::<Vec<_>>());
    assert_eq!((adapter.config.rank, adapter.config.scale()), (1, 6.0));

    let refused = |change: &dyn Fn(&mut Gguf), wanted: &[&str]| {
        let mut changed = file.clone();
        change(&mut changed);
        let error = load(&changed).unwrap_err();
        assert!(wanted.iter().all(|wanted| error.contains(wanted)) && error.contains("lora.gguf"), "{error}");
    };
    refused(&|file| file.string("general.architecture", "qwen2"), &["qwen2", "the model's, \"llama\""]);
    refused(&|file| file.string("general.type", "model"), &["general.type", "adapter"]);
    refused(&|file| file.f32s("adapter.alora.invocation_tokens", &[3.0]), &["adapter.alora.invocation_tokens", "none"]);
    refused(&|file| file.string("adapter.type", "ia3"), &["adapter.type", "\"lora\""]);
    refused(&|file| drop(file.tensors.pop()), &["missing", "blk.1.attn_q.weight.lora_b"]);
    refused(&|file| file.tensor("token_embd.weight.lora_a", &[1, 8], &[0.0; 8]), &["token_embd.weight.lora_a"]);
    refused(&|file| file.tensors[1].4[0..4].copy_from_slice(&f32::NAN.to_le_bytes()), &["holds NaN"]);
    refused(&|file| file.tensors.clear(), &["no target projections"]);
    // An adapter is no model.
    let error = Checkpoint::from_gguf(file.bytes()).map(drop).unwrap_err().to_string();
    assert!(error.contains("an adapter is given beside its model"), "{error}");
}
