//! Files too large to be kept here, named by environment variables; without them these tests do nothing.
//!
//! - `HYDRA_SHARED`: has `data/llama2-tokenizer/tokenizer.model`, LLaMA-2's SentencePiece model; what the sentencepiece
//!   library makes of some texts is in `llama2_ids.json`. `HYDRA_LLAMA2_IDS`: a file of more such lines, `[text, ids]`.
//! - `HYDRA_GGUF`, `HYDRA_HF`: one model as a GGUF file and as a Hugging Face folder of the same weights, dequantised.
//! - `HYDRA_TEXTS`: a file whose lines are texts.
//! - `HYDRA_LOGITS`: what another engine makes of `HYDRA_GGUF` in f32: a list of `{"text", "ids", "last"}`, where `last` is
//!   the logits `[vocab]` after the last token.

use crate::builder::Gguf;
use hydra_kernels::isa::Isa;
use hydra_runtime::backend::cpu::{Cpu, CpuOptions};
use hydra_runtime::checkpoint::{Checkpoint, TensorId};
use hydra_runtime::generate::Generator;
use hydra_runtime::model::Model;
use hydra_runtime::projection::Projection;
use serde_json::Value;
use std::path::PathBuf;

fn named(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).map(PathBuf::from)
}

#[test]
fn a_gguf_is_the_folder_it_was_converted_to() {
    let (Some(gguf), Some(folder)) = (named("HYDRA_GGUF"), named("HYDRA_HF")) else { return };
    let (gguf, folder) = (Checkpoint::open(&gguf).unwrap(), Checkpoint::open(&folder).unwrap());
    assert_eq!(gguf.config(), folder.config());
    assert_eq!(gguf.parameters(), folder.parameters());
    let config = gguf.config();
    let (mut one, mut other) = (Vec::new(), Vec::new());
    let mut compare = |id, rows: usize| {
        let (a, b) = (gguf.weight(id), folder.weight(id));
        assert_eq!((a.rows(), a.cols()), (b.rows(), b.cols()));
        one.resize(a.cols(), 0.0);
        other.resize(a.cols(), 0.0);
        for row in (0..a.rows()).step_by(a.rows().div_ceil(rows)) {
            a.decode_row(Isa::Portable, row, 0, &mut one);
            b.decode_row(Isa::Portable, row, 0, &mut other);
            assert_eq!(one, other, "{id:?} row {row}");
        }
    };
    compare(TensorId::Embedding, 300);
    compare(TensorId::Head, 300);
    for layer in 0..config.layers {
        Projection::ALL.into_iter().for_each(|p| compare(TensorId::Projection(layer, p), usize::MAX));
        assert_eq!(gguf.vector(TensorId::AttentionNorm(layer)), folder.vector(TensorId::AttentionNorm(layer)));
        assert_eq!(gguf.vector(TensorId::FfnNorm(layer)), folder.vector(TensorId::FfnNorm(layer)));
    }
    let Some(texts) = named("HYDRA_TEXTS") else { return };
    let (one, other) = (gguf.tokenizer().unwrap(), folder.tokenizer().unwrap());
    assert_eq!((one.bos_to_add(), one.eos()), (other.bos_to_add(), other.eos()));
    assert_eq!(one.chat_template(), other.chat_template());
    for text in std::fs::read_to_string(texts).unwrap().lines() {
        let ids = one.encode(text).unwrap();
        assert_eq!(ids, other.encode(text).unwrap(), "{text}");
        assert_eq!(one.decode(&ids).unwrap(), other.decode(&ids).unwrap());
    }
}

#[test]
fn last_logits_are_the_other_engine_s() {
    let (Some(gguf), Some(cases)) = (named("HYDRA_GGUF"), named("HYDRA_LOGITS")) else { return };
    let checkpoint = Checkpoint::open(gguf).unwrap();
    let model = Model::load(Cpu::new(CpuOptions::default()).unwrap(), &checkpoint).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(cases).unwrap()).unwrap();
    for case in &cases {
        let ids: Vec<u32> = case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        let text = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode_prompt(text).unwrap(), ids, "{text}");
        let want: Vec<f32> = case["last"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
        let mut generator = Generator::new(&model, None, ids.len()).unwrap();
        let got = generator.feed(&ids).unwrap();
        assert_eq!(got.len(), want.len());
        let apart = got.iter().zip(&want).fold(0f32, |most, (got, want)| most.max((got - want).abs()));
        println!("{text:?}: {apart:.1e} apart");
        assert!(apart <= 2e-3, "{text}: {apart}");
    }
}

/// The pieces of a SentencePiece model: text, score, type. (Protocol buffers: field 1, length-delimited, of a string 1, a
/// float 2 and an enumeration 3.)
fn pieces(mut bytes: &[u8]) -> Vec<(String, f32, i32)> {
    fn varint(bytes: &mut &[u8]) -> usize {
        let length = bytes.iter().position(|byte| byte & 0x80 == 0).unwrap() + 1;
        let value = bytes[..length].iter().rev().fold(0, |value, byte| value << 7 | usize::from(byte & 0x7F));
        *bytes = &bytes[length..];
        value
    }
    let mut pieces = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes);
        let length = varint(&mut bytes);
        let (mut message, rest) = bytes.split_at(length);
        bytes = rest;
        if tag != 0x0A {
            continue;
        }
        let mut piece = (String::new(), 0.0, 1);
        while !message.is_empty() {
            match varint(&mut message) {
                0x0A => {
                    let (text, rest) = {
                        let length = varint(&mut message);
                        message.split_at(length)
                    };
                    piece.0 = String::from_utf8(text.to_vec()).unwrap();
                    message = rest;
                }
                0x15 => {
                    piece.1 = f32::from_le_bytes(message[..4].try_into().unwrap());
                    message = &message[4..];
                }
                0x18 => piece.2 = varint(&mut message) as i32,
                other => panic!("field {other}"),
            }
        }
        pieces.push(piece);
    }
    pieces
}

#[test]
fn the_tokenizer_of_llama_2() {
    let Some(shared) = named("HYDRA_SHARED") else { return };
    let pieces = pieces(&std::fs::read(shared.join("data/llama2-tokenizer/tokenizer.model")).unwrap());
    assert_eq!(pieces.len(), 32_000);
    let mut gguf = Gguf::model();
    gguf.tensors.retain(|(name, ..)| name != "token_embd.weight" && name != "output.weight");
    let values = vec![0.5; pieces.len() * 8];
    gguf.tensor("token_embd.weight", &[pieces.len(), 8], &values);
    gguf.strings("tokenizer.ggml.tokens", &pieces.iter().map(|piece| piece.0.as_str()).collect::<Vec<_>>());
    gguf.f32s("tokenizer.ggml.scores", &pieces.iter().map(|piece| piece.1).collect::<Vec<_>>());
    gguf.i32s("tokenizer.ggml.token_type", &pieces.iter().map(|piece| piece.2).collect::<Vec<_>>());
    gguf.u32("tokenizer.ggml.bos_token_id", 1);
    gguf.u32("tokenizer.ggml.eos_token_id", 2);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    std::fs::write(&file, gguf.bytes()).unwrap();
    let tokenizer = Checkpoint::open(&file).unwrap().tokenizer().unwrap();
    let mut cases: Vec<(String, Vec<u32>)> = serde_json::from_str(include_str!("llama2_ids.json")).unwrap();
    if let Some(more) = named("HYDRA_LLAMA2_IDS") {
        cases.extend(std::fs::read_to_string(more).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()));
    }
    let wrong: Vec<_> = cases.iter().filter(|(text, ids)| tokenizer.encode(text).unwrap() != *ids).collect();
    assert!(wrong.is_empty(), "{} of {}: {:?}", wrong.len(), cases.len(), &wrong[..wrong.len().min(5)]);
}
