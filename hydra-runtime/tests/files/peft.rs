//! Adapters that PEFT wrote, with settings by which pairs differ: logits are PEFT's, and stay so in every form that is written.
//!
//! `peft/make_cases.py` wrote them. A folder with more of them can be named in HYDRA_PEFT.

use crate::builder::Gguf;
use hydra_runtime::adapter::{Adapter, Contents};
use hydra_runtime::backend::AdamW;
use hydra_runtime::backend::Format;
use hydra_runtime::backend::cpu::{Cpu, CpuOptions, Precision};
use hydra_runtime::batch::Sequence;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::merge::{self, GgufOptions, MergeGate};
use hydra_runtime::model::Model;
use hydra_runtime::projection::Projection;
use hydra_runtime::train::{ActivationCheckpointing, TrainOptions, Trainer};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tempfile::tempdir;

struct Case {
    dir: PathBuf,
    ids: Vec<u32>,
    logits: Vec<f32>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/files/peft")
}

fn cases() -> Vec<Case> {
    let more = std::env::var_os("HYDRA_PEFT").map(PathBuf::from);
    let entries = [folder()].into_iter().chain(more).flat_map(|folder| std::fs::read_dir(folder).unwrap());
    let cases: Vec<_> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|dir| dir.is_dir())
        .map(|dir| {
            let golden = std::fs::read(dir.join("golden.safetensors")).unwrap();
            let golden = SafeTensors::deserialize(&golden).unwrap();
            let data = |name| golden.tensor(name).unwrap().data().to_vec();
            let ids: Vec<i64> = bytemuck::pod_collect_to_vec(&data("ids"));
            Case {
                dir,
                ids: ids.into_iter().map(|id| id as u32).collect(),
                logits: bytemuck::pod_collect_to_vec(&data("logits")),
            }
        })
        .collect();
    assert!(cases.len() >= 7, "{} cases", cases.len());
    cases
}

fn base() -> Checkpoint {
    Checkpoint::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/hydra/model")).unwrap()
}

fn model(checkpoint: &Checkpoint) -> Model<Cpu> {
    let cpu = Cpu::new(CpuOptions { threads: Some(1), precision: Precision::F32, ..CpuOptions::default() }).unwrap();
    Model::load(cpu, checkpoint).unwrap()
}

impl Case {
    fn load(&self, checkpoint: &Checkpoint) -> Adapter {
        Adapter::load(&self.dir, checkpoint.config()).unwrap()
    }

    #[track_caller]
    fn assert_logits(&self, model: &Model<Cpu>, adapter: Option<&Adapter>, how: &str) {
        let mut evaluator = Evaluator::new(model, adapter, self.ids.len()).unwrap();
        let got = evaluator.logits(&Sequence::prompt(&self.ids)).unwrap();
        let largest = self.logits.iter().fold(0f32, |most, x| most.max(x.abs()));
        let apart = got.iter().zip(&self.logits).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(
            got.len() == self.logits.len() && apart < 1e-5 * largest,
            "{} {how}: {apart} of {largest}",
            self.dir.display()
        );
    }
}

#[test]
fn logits_are_those_of_peft() {
    let checkpoint = base();
    let model = model(&checkpoint);
    for case in cases() {
        let adapter = case.load(&checkpoint);
        case.assert_logits(&model, Some(&adapter), "read");
        // Saved at one rank, it says nothing of several.
        let (dir, gguf) = (tempdir().unwrap(), tempdir().unwrap());
        adapter.save(dir.path()).unwrap();
        assert_eq!(Adapter::load(dir.path(), checkpoint.config()).unwrap(), adapter);
        assert_eq!(Adapter::open(dir.path()).unwrap(), adapter);
        let file = gguf.path().join("lora.gguf");
        adapter.save_gguf(&file, checkpoint.config(), None).unwrap();
        case.assert_logits(&model, Some(&Adapter::load(&file, checkpoint.config()).unwrap()), "as GGUF");
        let contents = Contents::read(&file).unwrap().unwrap();
        let values: usize = contents.tensors.iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum();
        assert_eq!(values as u64, adapter.parameters());
    }
}

#[test]
fn merged_they_have_the_same_logits() {
    let checkpoint = base();
    for case in cases() {
        let adapter = case.load(&checkpoint);
        let dir = tempdir().unwrap();
        let path = dir.path().join("merged.gguf");
        let options = GgufOptions { format: Format::F32, description: None };
        merge::write_gguf(&checkpoint, &adapter, MergeGate::One, &path, options).unwrap();
        case.assert_logits(&model(&Checkpoint::open(&path).unwrap()), None, "merged");
    }
}

#[test]
fn ranks_are_those_of_the_file() {
    let checkpoint = base();
    let ranks = |name: &str| {
        let adapter = Adapter::load(folder().join(name), checkpoint.config()).unwrap();
        (adapter.config.rank, adapter.ranks())
    };
    // q 7 and 3, v 4 and 3, o 4 and 4, down 2 and 2.
    assert_eq!(ranks("patterns"), (7, BTreeMap::from([(2, 2), (3, 2), (4, 3), (7, 1)])));
    assert_eq!(ranks("layers"), (3, BTreeMap::from([(0, 2), (3, 2)])));
    // q and o of layer 0, gate and down of layer 1, each in a model of two layers.
    assert_eq!(ranks("expression"), (5, BTreeMap::from([(0, 4), (2, 3), (5, 1)])));
    // down by its path, v and k of layer 1; gate is left out.
    assert_eq!(ranks("paths"), (2, BTreeMap::from([(0, 3), (2, 3)])));
}

/// The other matrix's zeros are a factor of each gradient.
#[test]
fn what_is_filled_up_stays_zero_in_training() {
    let checkpoint = base();
    let model = model(&checkpoint);
    for case in cases() {
        let adapter = case.load(&checkpoint);
        let adam = AdamW { weight_decay: 0.1, ..AdamW::default() };
        let options =
            TrainOptions { checkpointing: ActivationCheckpointing::Off, max_tokens: 8, clip: Some(1.0), adam, seed: 3 };
        let mut started = adapter.clone();
        (started.config.dropout, started.config.head_dropout) = (0.3, 0.2);
        let mut trainer = Trainer::new(&model, &started, options).unwrap();
        let sequence = Sequence::answer(&case.ids[..2], &case.ids[2..]);
        for _ in 0..5 {
            trainer.step(std::slice::from_ref(&sequence), 1e-2).unwrap();
        }
        let trained = trainer.adapter().unwrap();
        assert!(trained.layers != adapter.layers);
        assert_eq!(trained.ranks(), adapter.ranks(), "{}", case.dir.display());
    }
}

/// llama.cpp divides alpha by each tensor's own rank, as PEFT does with `rank_pattern`.
#[test]
fn ranks_differ_in_a_gguf_file_too() {
    let checkpoint = Checkpoint::from_gguf(Gguf::model().bytes()).unwrap();
    let write = |alpha: Option<f32>| {
        let mut file = Gguf::new();
        file.string("general.architecture", "llama");
        file.string("general.type", "adapter");
        file.string("adapter.type", "lora");
        if let Some(alpha) = alpha {
            file.f32("adapter.lora.alpha", alpha);
        }
        file.tensor("blk.0.ffn_up.weight.lora_a", &[1, 8], &[1.0; 8]);
        file.tensor("blk.0.ffn_up.weight.lora_b", &[12, 1], &[2.0; 12]);
        file.tensor("blk.1.attn_output.weight.lora_a", &[4, 8], &[3.0; 32]);
        file.tensor("blk.1.attn_output.weight.lora_b", &[8, 4], &[5.0; 32]);
        let dir = tempdir().unwrap();
        std::fs::write(dir.path().join("lora.gguf"), file.bytes()).unwrap();
        Adapter::load(dir.path().join("lora.gguf"), checkpoint.config()).unwrap()
    };
    for (alpha, scales) in [(Some(6.0), [6.0, 1.5]), (Some(0.0), [1.0; 2]), (None, [1.0; 2])] {
        let adapter = write(alpha);
        assert_eq!((adapter.config.rank, &adapter.config.targets[..]), (4, &[Projection::O, Projection::Up][..]));
        assert_eq!(adapter.ranks(), BTreeMap::from([(0, 2), (1, 1), (4, 1)]));
        let of_b = |layer: usize, projection| {
            adapter.config.scale() * adapter.layers[layer][projection].as_ref().unwrap().b[0]
        };
        assert_eq!([of_b(0, Projection::Up), of_b(1, Projection::O)], [2.0 * scales[0], 5.0 * scales[1]]);
        assert_eq!([of_b(1, Projection::Up), of_b(0, Projection::O)], [0.0; 2]);
    }
}
