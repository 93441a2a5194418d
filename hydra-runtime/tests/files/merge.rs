//! Merged models: the same logits as the unmerged one's with the gate fixed, from both containers, in every type.

use crate::builder::{Gguf, config_json, model_tensors, write_folder};
use crate::checkpoint::write_shared;
use half::bf16;
use hydra_runtime::Error;
use hydra_runtime::adapter::{Adapter, AdapterConfig, GateKind, Method};
use hydra_runtime::atomic::NewFolder;
use hydra_runtime::backend::Format;
use hydra_runtime::backend::cpu::{Cpu, CpuOptions};
use hydra_runtime::batch::Sequence;
use hydra_runtime::checkpoint::{Checkpoint, TensorId};
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::merge::{self, MergeGate, MergeOptions};
use hydra_runtime::model::Model;
use hydra_runtime::projection::Projection;
use std::path::{Path, PathBuf};

const AS_STORED: MergeOptions = MergeOptions { format: None, max_shard_bytes: u64::MAX };

fn golden(case: &str) -> (Checkpoint, Adapter) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(case);
    let checkpoint = Checkpoint::open(dir.join("model")).unwrap();
    let adapter = Adapter::load(dir.join("adapter"), checkpoint.config()).unwrap();
    (checkpoint, adapter)
}

fn logits(checkpoint: &Checkpoint, adapter: Option<&Adapter>, head: Option<u32>) -> Vec<f32> {
    let cpu = Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap();
    let model = Model::load(cpu, checkpoint).unwrap();
    let vocab = checkpoint.config().vocab as u32;
    let tokens: Vec<u32> = (0..40).map(|i: u32| (i * 131 + i * i * 7) % vocab).collect();
    Evaluator::new(&model, adapter, 40)
        .unwrap()
        .logits(&Sequence { lora_head: head, ..Sequence::prompt(&tokens) })
        .unwrap()
}

/// The largest difference over the largest value.
fn apart(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0f32, |max, x| max.max(x.abs()));
    got.iter().zip(want).fold(0f32, |max, (a, b)| max.max((a - b).abs())) / largest
}

/// Every head trained apart: B isn't zero.
fn random_adapter(checkpoint: &Checkpoint) -> Adapter {
    let config =
        AdapterConfig { method: Method::Split, gate: GateKind::Label, lora_heads: 3, rank: 2, ..Default::default() };
    let config = AdapterConfig { targets: Projection::ALL.to_vec(), ..config };
    let mut adapter = Adapter::init(checkpoint.config(), config, 3).unwrap();
    for pair in adapter.layers.iter_mut().flatten().flatten() {
        pair.b.iter_mut().enumerate().for_each(|(i, b)| *b = ((i * 37 % 64) as f32 - 31.5) / 512.0);
    }
    adapter
}

#[test]
fn merged_logits_are_the_unmerged_ones() {
    for (case, folds) in [
        ("lora", vec![MergeGate::One, MergeGate::Uniform, MergeGate::Head(0)]),
        ("hydra", vec![MergeGate::Uniform, MergeGate::Head(0), MergeGate::Head(1)]),
        ("split", vec![MergeGate::Uniform, MergeGate::Head(0), MergeGate::Head(5)]),
    ] {
        let (checkpoint, adapter) = golden(case);
        let mut seen: Vec<Vec<f32>> = Vec::new();
        for fold in folds {
            let dir = tempfile::tempdir().unwrap();
            merge::write(&checkpoint, &adapter, fold, dir.path(), AS_STORED).unwrap();
            let merged = Checkpoint::open(dir.path()).unwrap();
            assert_eq!(merged.config(), checkpoint.config());
            let got = logits(&merged, None, None);
            let (fixed, head) = adapter.with_fixed_gate(fold).unwrap();
            assert!(apart(&got, &logits(&checkpoint, Some(&fixed), head)) < 1e-5, "{case} {fold:?}");
            // What the label gate does with a record of this head, or of an unknown label.
            if case == "split" {
                assert!(apart(&got, &logits(&checkpoint, Some(&adapter), head)) < 1e-5, "{case} {fold:?}");
            }
            assert!(case == "lora" || seen.iter().all(|other| apart(&got, other) > 1e-3), "{case} {fold:?}");
            seen.push(got);
        }
    }
}

#[test]
fn every_weight_is_rounded_once() {
    let (checkpoint, adapter) = golden("hydra");
    let dir = tempfile::tempdir().unwrap();
    let options = MergeOptions { format: Some(Format::Bf16), ..AS_STORED };
    let written = merge::write(&checkpoint, &adapter, MergeGate::Head(1), dir.path(), options).unwrap();
    assert_eq!((written.formats.as_slice(), written.shards), (&[Format::Bf16][..], 1));
    let merged = Checkpoint::open(dir.path()).unwrap();
    let id = TensorId::Projection(1, Projection::Down);
    let (before, after) = (checkpoint.weight(id), merged.weight(id));
    let pair = adapter.layers[1][Projection::Down].as_ref().unwrap();
    let AdapterConfig { rank, lora_heads, alpha, .. } = adapter.config;
    let (mut w, mut got) = (vec![0f32; pair.d_in], vec![0f32; pair.d_in]);
    for o in 0..pair.d_out {
        before.decode_row(hydra_kernels::Isa::Portable, o, 0, &mut w);
        after.decode_row(hydra_kernels::Isa::Portable, o, 0, &mut got);
        for c in 0..pair.d_in {
            let low =
                |j: usize| f64::from(pair.b[(o * lora_heads + 1) * rank + j]) * f64::from(pair.a[j * pair.d_in + c]);
            let want = f64::from(w[c]) + f64::from(alpha) / rank as f64 * (0..rank).map(low).sum::<f64>();
            let nearest = f64::from(bf16::from_f64(want).to_f32());
            // The f32 sum may fall on the other side of a tie.
            assert!((f64::from(got[c]) - want).abs() <= (nearest - want).abs() + 1e-6, "{o} {c}: {} {want}", got[c]);
            assert_eq!(got[c], bf16::from_f32(got[c]).to_f32());
        }
    }
}

/// Its file has one tensor for both, and a note.
#[test]
fn a_model_that_is_tied_by_its_tensors_stays_so() {
    let (dir, merged) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (embedding, head) = ("model.embed_tokens.weight", "lm_head.weight");
    write_shared(dir.path(), false, &[head], &[(head, embedding)]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let adapter = random_adapter(&checkpoint);
    merge::write(&checkpoint, &adapter, MergeGate::Head(0), merged.path(), AS_STORED).unwrap();
    let there = Checkpoint::open(merged.path()).unwrap();
    assert!(apart(&logits(&there, None, None), &logits(&checkpoint, Some(&adapter), Some(0))) < 1e-5);
}

#[test]
fn shards_hold_the_same_tensors() {
    let (checkpoint, adapter) = golden("split");
    let (whole, cut) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    merge::write(&checkpoint, &adapter, MergeGate::Uniform, whole.path(), AS_STORED).unwrap();
    let options = MergeOptions { max_shard_bytes: 40_000, ..AS_STORED };
    let written = merge::write(&checkpoint, &adapter, MergeGate::Uniform, cut.path(), options).unwrap();
    assert!(written.shards > 2 && !cut.path().join("model.safetensors").exists());
    assert!(cut.path().join(format!("model-00001-of-{:05}.safetensors", written.shards)).is_file());
    let (whole, cut) = (Checkpoint::open(whole.path()).unwrap(), Checkpoint::open(cut.path()).unwrap());
    assert_eq!((whole.bytes(), written.bytes), (cut.bytes(), cut.bytes()));
    assert_eq!(logits(&whole, None, None), logits(&cut, None, None));
}

fn gguf(dir: &Path, change: impl FnOnce(&mut Gguf)) -> PathBuf {
    let mut gguf = Gguf::model();
    change(&mut gguf);
    let path = dir.join("m.gguf");
    std::fs::write(&path, gguf.bytes()).unwrap();
    path
}

#[test]
fn a_gguf_becomes_the_folder_that_it_was_made_from() {
    let (dir, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let from_gguf = Checkpoint::open(gguf(dir.path(), |_| {})).unwrap();
    write_folder(folder.path(), &config_json(), &model_tensors());
    let from_folder = Checkpoint::open(folder.path()).unwrap();
    let adapter = random_adapter(&from_gguf);
    for fold in [MergeGate::Uniform, MergeGate::Head(2)] {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        merge::write(&from_gguf, &adapter, fold, a.path(), AS_STORED).unwrap();
        merge::write(&from_folder, &adapter, fold, b.path(), AS_STORED).unwrap();
        let read = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
        assert!(read(a.path()) == read(b.path()), "the rows of q and k are in Hugging Face's order");
        assert_eq!(Checkpoint::open(a.path()).unwrap().config(), from_gguf.config());
    }
}

#[test]
fn a_gguf_s_tokenizer_goes_along() {
    for bos in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = gguf(dir.path(), |gguf| {
            gguf.bool("tokenizer.ggml.add_bos_token", bos);
            gguf.string("tokenizer.chat_template", "{{ messages[0].content }}");
        });
        let checkpoint = Checkpoint::open(&path).unwrap();
        let out = tempfile::tempdir().unwrap();
        merge::write(&checkpoint, &random_adapter(&checkpoint), MergeGate::Uniform, out.path(), AS_STORED).unwrap();
        let (want, got) = (checkpoint.tokenizer().unwrap(), Checkpoint::open(out.path()).unwrap().tokenizer().unwrap());
        for text in ["ab a", "", " b</s>", "zß"] {
            assert_eq!(got.encode(text).unwrap(), want.encode(text).unwrap(), "{text:?}");
        }
        assert_eq!((got.bos_to_add(), want.bos_to_add()), (bos.then_some(0), bos.then_some(0)));
        assert_eq!((got.eos(), got.chat_template()), (want.eos(), want.chat_template()));
    }
}

#[test]
fn types_of_a_gguf() {
    let written = |change: fn(&mut Gguf)| {
        let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let checkpoint = Checkpoint::open(gguf(dir.path(), change)).unwrap();
        let adapter = random_adapter(&checkpoint);
        let formats = merge::write(&checkpoint, &adapter, MergeGate::Uniform, out.path(), AS_STORED).unwrap().formats;
        assert!(Checkpoint::open(out.path()).unwrap().formats().iter().all(|(format, ..)| formats == [*format]));
        formats
    };
    fn narrow(gguf: &mut Gguf, name: &str, kind: u32, encode: fn(f32) -> [u8; 2]) {
        let tensor = gguf.tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap();
        tensor.2 = kind;
        let values: Vec<f32> = bytemuck::pod_collect_to_vec(&tensor.4);
        tensor.4 = values.into_iter().flat_map(encode).collect();
    }
    assert_eq!(written(|_| {}), [Format::F32]);
    assert_eq!(written(|g| narrow(g, "token_embd.weight", 1, |x| half::f16::from_f32(x).to_le_bytes())), [Format::F16]);
    assert_eq!(written(|g| narrow(g, "output.weight", 30, |x| bf16::from_f32(x).to_le_bytes())), [Format::Bf16]);
}

#[test]
fn what_cannot_be_merged_is_refused() {
    let (checkpoint, adapter) = golden("hydra");
    let dir = tempfile::tempdir().unwrap();
    let refused = |fold, format| {
        let options = MergeOptions { format, ..AS_STORED };
        merge::write(&checkpoint, &adapter, fold, dir.path(), options).unwrap_err().to_string()
    };
    assert!(refused(MergeGate::Head(2), None).contains("head 2 of an adapter of 2 heads"));
    assert!(refused(MergeGate::One, None).contains("one head, found 2"));
    assert!(refused(MergeGate::Uniform, Some(Format::Q4_1)).contains("expected F32, F16 or BF16, found Q4_1"));
    let broken = |value: f32| {
        let mut adapter = adapter.clone();
        adapter.config.alpha = 1e9;
        let pair = adapter.layers.iter_mut().flatten().flatten().next().unwrap();
        pair.b.fill(value);
        merge::write(&checkpoint, &adapter, MergeGate::Uniform, dir.path(), AS_STORED).unwrap_err().to_string()
    };
    assert!(broken(f32::NAN).contains("layer 0"));
    assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none(), "nothing is written");
    let (too_large, dir) = (broken(f32::MAX), tempfile::tempdir().unwrap());
    assert!(too_large.contains("model.layers.0.") && too_large.contains("finite"), "{too_large}");
    let missing = dir.path().join("missing");
    let error = merge::write(&checkpoint, &adapter, MergeGate::Uniform, &missing, AS_STORED).unwrap_err();
    assert!(matches!(&error, Error::Io { path, .. } if *path == missing), "{error}");
    let taken = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/hydra/model");
    assert!(merge::write(&checkpoint, &adapter, MergeGate::Uniform, &taken, AS_STORED).is_err(), "a folder with files");
    let other = golden("split").0;
    assert!(merge::write(&other, &adapter, MergeGate::Uniform, dir.path(), AS_STORED).is_err());
    let path = gguf(dir.path(), |gguf| gguf.tensor("rope_freqs.weight", &[2], &[1.0, 3.0]));
    let stretched = Checkpoint::open(&path).unwrap();
    let out = tempfile::tempdir().unwrap();
    let error =
        merge::write(&stretched, &random_adapter(&stretched), MergeGate::Uniform, out.path(), AS_STORED).unwrap_err();
    assert!(error.to_string().contains("rope_freqs"), "{error}");
}

#[test]
fn a_folder_appears_whole_or_not_at_all() {
    #[cfg(unix)]
    {
        // A link's folder is filled.
        let dir = tempfile::tempdir().unwrap();
        let (there, link) = (dir.path().join("there"), dir.path().join("link"));
        std::fs::create_dir(&there).unwrap();
        std::os::unix::fs::symlink(&there, &link).unwrap();
        let folder = NewFolder::begin(&link).unwrap();
        std::fs::write(folder.path().join("file"), "x").unwrap();
        folder.keep().unwrap();
        assert_eq!(std::fs::read(link.join("file")).unwrap(), b"x");
        std::fs::remove_dir_all(&there).unwrap();
        assert!(NewFolder::begin(&link).is_err(), "it leads nowhere");
    }
    let dir = tempfile::tempdir().unwrap();
    let (made, kept) = (dir.path().join("a/made"), dir.path().join("kept"));
    let folder = NewFolder::begin(&made).unwrap();
    std::fs::write(folder.path().join("x"), "1").unwrap();
    assert!(!made.exists());
    folder.keep().unwrap();
    assert_eq!(std::fs::read_to_string(made.join("x")).unwrap(), "1");
    assert!(NewFolder::begin(&made).is_err(), "not empty");
    assert!(NewFolder::begin(&made.join("x")).is_err(), "a file");
    std::fs::create_dir(&kept).unwrap();
    drop(NewFolder::begin(&kept).unwrap());
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
    NewFolder::begin(&kept).unwrap().keep().unwrap();
    assert!(kept.is_dir());
}
