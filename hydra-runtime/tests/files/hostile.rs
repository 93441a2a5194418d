//! Files made to break the reader: every cut, every huge or overlapping thing ends in one line, never in a panic.

use crate::builder::{Gguf, config_json, model_tensors, safetensors, string};
use hydra_runtime::checkpoint::Checkpoint;
use proptest::prelude::*;
use std::path::Path;
use tempfile::tempdir;

fn complaint(path: &Path) -> Option<String> {
    let opened = Checkpoint::open(path).and_then(|checkpoint| checkpoint.tokenizer().map(|_| ()));
    let message = opened.err()?.to_string();
    assert!(!message.contains('\n') && message.len() < 2000, "{message}");
    assert!(message.contains(&path.display().to_string()), "{message} names no file");
    Some(message)
}

fn gguf_complaint(bytes: &[u8]) -> Option<String> {
    let dir = tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    std::fs::write(&file, bytes).unwrap();
    complaint(&file)
}

type Change<'a> = &'a dyn Fn(&mut Gguf);

#[test]
fn gguf_cut_anywhere() {
    let whole = Gguf::model().bytes();
    assert_eq!(gguf_complaint(&whole), None);
    let dir = tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    for length in (0..whole.len()).filter(|length| *length < 4096 || length % 7 == 0 || length + 8 > whole.len()) {
        std::fs::write(&file, &whole[..length]).unwrap();
        assert!(complaint(&file).is_some(), "cut at {length}");
    }
}

#[test]
fn gguf_counts_and_lengths_beyond_the_file() {
    let whole = Gguf::model().bytes();
    for huge in [u64::MAX, 1 << 63, 1 << 40] {
        // Tensors, pairs, the first key's length, the first value's length.
        for at in [8, 16, 24, 24 + 8 + 20 + 4] {
            let mut bytes = whole.clone();
            bytes[at..at + 8].copy_from_slice(&u64::to_le_bytes(huge));
            let message = gguf_complaint(&bytes).unwrap();
            assert!(message.contains("byte "), "{message}");
        }
    }
}

#[test]
fn gguf_tensors_that_cannot_be() {
    let with = |change: Change| {
        let mut gguf = Gguf::model();
        change(&mut gguf);
        gguf_complaint(&gguf.bytes()).expect("refused")
    };
    let cases: [(&str, Change); 17] = [
        ("0 dimensions", &|g| g.tensors[0].1 = vec![]),
        ("5 dimensions", &|g| g.tensors[0].1 = vec![1; 5]),
        ("dimension of 0", &|g| g.tensors[0].1 = vec![0, 6]),
        ("dimension of -8", &|g| g.tensors[0].1 = vec![-8i64 as u64, 6]),
        ("overflows", &|g| g.tensors[0].1 = vec![1 << 39, 1 << 39, 4]),
        ("past the end of the file; is it truncated?", &|g| g.tensors[0].1 = vec![8, 1 << 30]),
        ("past the end of the file; is it truncated?", &|g| g.tensors[0].3 = Some(u64::MAX - 31)),
        ("aligned", &|g| g.tensors[0].3 = Some(4)),
        ("overlap", &|g| g.tensors[1].3 = Some(0)),
        ("second time", &|g| g.tensors[1] = g.tensors[0].clone()),
        ("IQ3_S", &|g| g.tensors[0].2 = 21),
        ("number 4000", &|g| g.tensors[0].2 = 4000),
        ("block of 32", &|g| g.tensors[0].2 = 2),
        ("Q2_K's block of 256", &|g| g.tensors[0].2 = 10),
        ("power of two", &|g| g.u32("general.alignment", 24)),
        ("power of two", &|g| g.u32("general.alignment", 0)),
        ("wanted [6, 8]", &|g| g.tensors[2].1 = vec![6, 8]),
    ];
    for (wanted, change) in cases {
        let message = with(change);
        assert!(message.contains(wanted), "{wanted}: {message}");
    }
}

#[test]
fn gguf_metadata_that_cannot_be() {
    let with = |change: Change| {
        let mut gguf = Gguf::model();
        change(&mut gguf);
        gguf_complaint(&gguf.bytes()).expect("refused")
    };
    let nested = |depth: usize| {
        let level = [9u32.to_le_bytes().as_slice(), &1u64.to_le_bytes()].concat();
        level.repeat(depth)
    };
    let cases: [(&str, Change); 13] = [
        ("tokens 0 and 1 are both", &|g| g.strings("tokenizer.ggml.tokens", &["a", "a", "b", "c", "d", "e"])),
        ("version 1", &|g| g.version = 1),
        ("big-endian", &|g| g.version = 3u32.swap_bytes()),
        ("general.architecture", &|g| g.string("general.architecture", "mamba")),
        ("general.architecture", &|g| g.u32("general.architecture", 1)),
        ("type 99", &|g| g.pairs.push(("x".into(), 99u32.to_le_bytes().to_vec()))),
        ("true or false", &|g| g.pairs.push(("x".into(), [&7u32.to_le_bytes()[..], &[2]].concat()))),
        ("nested", &|g| g.pairs.push(("x".into(), [&9u32.to_le_bytes()[..], &nested(9)].concat()))),
        ("second time", &|g| g.pairs.push(g.pairs[0].clone())),
        ("UTF-8", &|g| g.pairs.push(("x".into(), [&8u32.to_le_bytes()[..], &1u64.to_le_bytes(), &[0xFF]].concat()))),
        ("head_count", &|g| g.f32("llama.attention.head_count", 2.0)),
        ("wanted 1 to", &|g| g.u32("llama.block_count", u32::MAX)),
        ("rope.dimension_count", &|g| g.u32("llama.rope.dimension_count", 2)),
    ];
    for (wanted, change) in cases {
        let message = with(change);
        assert!(message.contains(wanted), "{wanted}: {message}");
    }
    assert_eq!(string("a").len(), 9);
}

#[test]
fn safetensors_cut_or_damaged() {
    let dir = tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config_json().to_string()).unwrap();
    let file = dir.path().join("model.safetensors");
    let whole = safetensors(&model_tensors());
    for length in (0..whole.len()).step_by(5) {
        std::fs::write(&file, &whole[..length]).unwrap();
        assert!(complaint(dir.path()).unwrap().contains("model.safetensors"), "cut at {length}");
    }
    let header = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &[0; 64]].concat();
    for (what, bytes) in [
        ("huge header", [&u64::MAX.to_le_bytes()[..], &[0; 64]].concat()),
        (
            "overlap",
            header(
                r#"{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},"b":{"dtype":"F32","shape":[8],"data_offsets":[16,48]}}"#,
            ),
        ),
        ("overflow", header(r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,64]}}"#)),
        ("negative", header(r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,64]}}"#)),
        ("backwards", header(r#"{"a":{"dtype":"F32","shape":[16],"data_offsets":[64,0]}}"#)),
        ("type", header(r#"{"a":{"dtype":"X32","shape":[16],"data_offsets":[0,64]}}"#)),
        ("not JSON", header("{{{\n")),
    ] {
        std::fs::write(&file, bytes).unwrap();
        assert!(complaint(dir.path()).unwrap().contains("model.safetensors"), "{what}");
    }
    // Sound, but integers where weights should be.
    let all = model_tensors();
    let views = all.iter().map(|(name, shape, values)| {
        let dtype = if name.ends_with("norm.weight") { safetensors::Dtype::I32 } else { safetensors::Dtype::F32 };
        (name, safetensors::tensor::TensorView::new(dtype, shape.clone(), bytemuck::cast_slice(values)).unwrap())
    });
    std::fs::write(&file, safetensors::serialize(views, None).unwrap()).unwrap();
    assert!(complaint(dir.path()).unwrap().contains("model.norm.weight has type I32, wanted"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn gguf_with_any_bytes_changed(changes in prop::collection::vec((0usize..2048, any::<u8>()), 1..6)) {
        let mut bytes = Gguf::model().bytes();
        for (at, byte) in changes {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        gguf_complaint(&bytes);
    }

    #[test]
    fn gguf_of_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        let head = b"GGUF\x03\0\0\0".to_vec();
        prop_assert!(gguf_complaint(&[head, bytes].concat()).is_some());
    }
}
