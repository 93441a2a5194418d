//! The runtime against PyTorch: logits, losses, gradients and ten steps of AdamW, for each kind of adapter and each
//! architecture, from a Hugging Face folder and from a GGUF file with the same weights.
//!
//! The cases in `golden/` were computed by PyTorch in f32 from tiny random models (see `golden/README.md`). A folder with
//! more of them can be named in `HYDRA_GOLDEN`.

#[path = "files/builder.rs"]
#[allow(dead_code, reason = "tests/files.rs uses the rest")]
mod builder;
#[path = "../../tests/close.rs"]
mod close;

use builder::Gguf;
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::AdamW;
use hydra_runtime::backend::cpu::{Cpu, CpuOptions, Precision};
use hydra_runtime::batch::{NO_TARGET, Sequence};
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::config::Config;
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::model::Model;
use hydra_runtime::train::{ActivationCheckpointing, TrainOptions, Trainer};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Rounding of two f32 implementations that sum in different orders, relative to the largest value of a tensor.
const RELATIVE: f32 = 1e-4;

struct Case {
    dir: PathBuf,
    golden: Vec<u8>,
}

impl Case {
    fn all() -> Vec<Self> {
        let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden")];
        folders.extend(std::env::var_os("HYDRA_GOLDEN").map(PathBuf::from));
        let dirs =
            folders.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap()).map(|entry| entry.unwrap().path());
        let cases: Vec<_> = dirs
            .filter(|dir| dir.is_dir())
            .map(|dir| Self { golden: std::fs::read(dir.join("golden.safetensors")).unwrap(), dir })
            .collect();
        assert!(cases.len() >= 8, "found {} cases", cases.len());
        cases
    }

    fn folder(&self) -> Checkpoint {
        Checkpoint::open(self.dir.join("model")).unwrap()
    }

    /// The model from both containers; GGUF has no key for layers without a window before those with one.
    fn checkpoints(&self) -> Vec<Checkpoint> {
        let folder = self.folder();
        let config = folder.config();
        if config.architecture.window.as_ref().is_some_and(|window| !window.everywhere()) {
            return vec![folder];
        }
        let gguf = Checkpoint::from_gguf(Gguf::of_folder(&self.dir.join("model")).bytes()).unwrap();
        assert_eq!(Config { rope: config.rope.clone(), ..gguf.config().clone() }, *config);
        let [got, want] = [&gguf, &folder].map(|from| from.config().rope.inverse_frequencies(config.head_dim));
        assert_close("rotary frequencies", &got, &want);
        vec![folder, gguf]
    }

    fn tensor(&self, name: &str) -> Option<Vec<f32>> {
        let file = SafeTensors::deserialize(&self.golden).unwrap();
        Some(bytemuck::pod_collect_to_vec(file.tensor(name).ok()?.data()))
    }

    fn integers(&self, name: &str) -> Option<Vec<i64>> {
        let file = SafeTensors::deserialize(&self.golden).unwrap();
        Some(bytemuck::pod_collect_to_vec(file.tensor(name).ok()?.data()))
    }

    fn adapter(&self, checkpoint: &Checkpoint) -> Adapter {
        Adapter::load(self.dir.join("adapter"), checkpoint.config()).unwrap()
    }

    fn sequences(&self, adapter: &Adapter) -> Vec<Sequence> {
        let records = std::fs::read_to_string(self.dir.join("data.jsonl")).unwrap();
        let records = records.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        records
            .enumerate()
            .map(|(n, record)| {
                let target = |id: &i64| if *id < 0 { NO_TARGET } else { *id as u32 };
                let category = record["category"].as_str().unwrap();
                Sequence {
                    tokens: self.integers(&format!("ids.{n}")).unwrap().iter().map(|&id| id as u32).collect(),
                    targets: self.integers(&format!("targets.{n}")).unwrap().iter().map(target).collect(),
                    lora_head: adapter.config.labels.iter().position(|label| label == category).map(|i| i as u32),
                }
            })
            .collect()
    }
}

/// Every case with its model from both containers.
fn cases_and_checkpoints() -> Vec<(Rc<Case>, Checkpoint)> {
    let both = |case: Case| {
        let (checkpoints, case) = (case.checkpoints(), Rc::new(case));
        checkpoints.into_iter().map(move |checkpoint| (case.clone(), checkpoint))
    };
    Case::all().into_iter().flat_map(both).collect()
}

fn cpu(threads: usize) -> Cpu {
    Cpu::new(CpuOptions { threads: Some(threads), precision: Precision::F32, ..CpuOptions::default() }).unwrap()
}

fn options(checkpointing: ActivationCheckpointing, max_tokens: usize) -> TrainOptions {
    TrainOptions { checkpointing, max_tokens, clip: None, adam: AdamW::default(), seed: 0 }
}

#[track_caller]
fn assert_close(what: &str, got: &[f32], want: &[f32]) {
    close::assert_close(what, got, want, RELATIVE.into(), 1e-6);
}

fn assert_adapters_close(case: &Case, kind: &str, adapter: &Adapter) {
    for (name, _, values) in adapter.tensors() {
        let name = format!("{kind}.{name}");
        assert_close(&name, &values, &case.tensor(&name).unwrap_or_else(|| panic!("no {name} in the golden file")));
    }
}

#[test]
fn logits_and_losses() {
    for (case, checkpoint) in cases_and_checkpoints() {
        let model = Model::load(cpu(2), &checkpoint).unwrap();
        let adapter = case.adapter(&checkpoint);
        let sequences = case.sequences(&adapter);
        // 70 tokens: the examples take several passes.
        let mut evaluator = Evaluator::new(&model, Some(&adapter), 70).unwrap();
        let losses = evaluator.losses(&sequences).unwrap();
        for (n, (sequence, loss)) in sequences.iter().zip(&losses).enumerate() {
            let name = format!("{} {n}, {}", case.dir.display(), checkpoint.path().display());
            assert_close(&name, &[(loss.nll / loss.targets as f64) as f32], &case.tensor(&format!("nll.{n}")).unwrap());
            if let Some(want) = case.tensor(&format!("logits.{n}")) {
                assert_close(&format!("logits of {name}"), &evaluator.logits(sequence).unwrap(), &want);
            }
        }
        let nll: f64 = losses.iter().map(|loss| loss.nll).sum();
        let targets: usize = losses.iter().map(|loss| loss.targets).sum();
        assert_close("loss", &[(nll / targets as f64) as f32], &case.tensor("loss").unwrap());
    }
}

#[test]
fn gradients() {
    for (case, checkpoint) in cases_and_checkpoints() {
        let model = Model::load(cpu(2), &checkpoint).unwrap();
        let adapter = case.adapter(&checkpoint);
        let sequences = case.sequences(&adapter);
        for (checkpointing, max_tokens) in [
            (ActivationCheckpointing::Off, 512),
            (ActivationCheckpointing::EveryLayer, 512),
            (ActivationCheckpointing::Off, 70),
        ] {
            let mut trainer = Trainer::new(&model, &adapter, options(checkpointing, max_tokens)).unwrap();
            let (report, gradients) = trainer.gradients(&sequences).unwrap();
            assert_close("loss", &[report.loss as f32], &case.tensor("loss").unwrap());
            assert_adapters_close(&case, "grad", &gradients);
        }
    }
}

#[test]
fn ten_steps() {
    for (case, checkpoint) in cases_and_checkpoints() {
        let model = Model::load(cpu(1), &checkpoint).unwrap();
        let adapter = case.adapter(&checkpoint);
        let sequences = case.sequences(&adapter);
        let mut trainer = Trainer::new(&model, &adapter, options(ActivationCheckpointing::Off, 512)).unwrap();
        let losses: Vec<f32> = (0..10).map(|_| trainer.step(&sequences, 1e-3).unwrap().loss as f32).collect();
        assert_close("trajectory", &losses, &case.tensor("trajectory").unwrap());
        assert_adapters_close(&case, "final", &trainer.adapter().unwrap());
    }
}

#[test]
fn bits_do_not_depend_on_threads_and_a_run_resumes() {
    for case in Case::all() {
        let checkpoint = case.folder();
        let mut adapter = case.adapter(&checkpoint);
        adapter.config.dropout = 0.1;
        let sequences = case.sequences(&adapter);
        for precision in [Precision::F32, Precision::Bf16] {
            let run = |threads, checkpointing, interrupted: bool| {
                let options_cpu = CpuOptions { threads: Some(threads), precision, ..CpuOptions::default() };
                let model = Model::load(Cpu::new(options_cpu).unwrap(), &checkpoint).unwrap();
                let mut trainer = Trainer::new(&model, &adapter, options(checkpointing, 96)).unwrap();
                let mut losses = Vec::new();
                for step in 0..4 {
                    if interrupted && step == 2 {
                        let dir = tempfile::tempdir().unwrap();
                        trainer.save_state(dir.path()).unwrap();
                        trainer = Trainer::new(&model, &adapter, options(checkpointing, 96)).unwrap();
                        trainer.load_state(dir.path()).unwrap();
                    }
                    losses.push(trainer.step(&sequences, 1e-3).unwrap().loss.to_bits());
                }
                let adapter = trainer.adapter().unwrap();
                let bits: Vec<u32> = adapter.tensors().flat_map(|(_, _, x)| x.into_iter().map(f32::to_bits)).collect();
                (losses, bits)
            };
            let one = run(1, ActivationCheckpointing::Off, false);
            assert!(one == run(2, ActivationCheckpointing::Off, false), "2 threads");
            assert!(one == run(3, ActivationCheckpointing::EveryLayer, false), "3 threads, recomputed");
            assert!(one == run(2, ActivationCheckpointing::Off, true), "resumed");
        }
    }
}
