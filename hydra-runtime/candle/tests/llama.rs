//! A LLaMA in candle with an adapter gives the logits of Hydra's own runtime and of the PyTorch reference.

#[path = "../examples/llama/model.rs"]
mod model;

use candle_core::Device;
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::cpu::{Cpu, CpuOptions};
use hydra_runtime::batch::Sequence;
use hydra_runtime::{evaluate::Evaluator, model::Model};
use std::{path::Path, sync::Arc};

#[test]
fn logits_are_those_of_hydra_and_of_pytorch() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/hydra");
    let model = Model::open(golden.join("model")).unwrap();
    let adapter = Adapter::load(golden.join("adapter"), model.config()).unwrap();
    let cpu = Arc::new(Cpu::new(CpuOptions::default()).unwrap());
    let llama = model::Llama::open(&golden.join("model"), Some((cpu, &adapter))).unwrap();
    let reference = candle_core::safetensors::load(golden.join("golden.safetensors"), &Device::Cpu).unwrap();
    let mut compared = 0;
    for n in 0..3 {
        let ids = reference[&format!("ids.{n}")].to_vec1::<i64>().unwrap();
        let ids: Vec<_> = ids.into_iter().map(|id| id as u32).collect();
        let mut evaluator = Evaluator::new(&model, Some(&adapter), ids.len()).unwrap();
        let hydra = evaluator.logits(&Sequence::prompt(&ids)).unwrap();
        let pytorch = reference.get(&format!("logits.{n}")); // the file has some sequences' alone
        let pytorch = pytorch.map(|logits| logits.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        let candle = llama.logits(&ids).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        compared += usize::from(pytorch.is_some());
        for want in [Some(&hydra), pytorch.as_ref()].into_iter().flatten() {
            assert_eq!(candle.len(), want.len());
            let worst = candle.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-3, "{worst} apart");
        }
    }
    assert!(compared > 0, "no logits of PyTorch's");
}

#[test]
fn what_is_not_there_or_of_another_model_is_said() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/hydra");
    let message = Adapter::open(golden.join("nowhere")).unwrap_err().to_string();
    assert!(message.contains("nowhere"), "{message}");
    let message = model::Llama::open(&golden.join("nowhere"), None).map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("nowhere"), "{message}");

    let cpu = Arc::new(Cpu::new(CpuOptions::default()).unwrap());
    let mut adapter = Adapter::open(golden.join("adapter")).unwrap();
    adapter.layers.pop();
    let short = model::Llama::open(&golden.join("model"), Some((cpu, &adapter)));
    let message = short.map(|_| ()).unwrap_err().to_string();
    assert_eq!(message, "the adapter is for 1 layers, the model has 2");
}
