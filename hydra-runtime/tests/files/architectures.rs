//! The architectures' configurations and tensors in both containers, and what is said about those that can't run.

use crate::builder::{Gguf, config_json, model_tensors, write_folder};
use hydra_runtime::Result;
use hydra_runtime::adapter::{Adapter, AdapterConfig};
use hydra_runtime::backend::cpu::{Cpu, CpuOptions};
use hydra_runtime::batch::Sequence;
use hydra_runtime::checkpoint::{Checkpoint, TensorId};
use hydra_runtime::config::{Architecture, Biases, Config, Family, Window};
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::merge::{self, MergeGate, MergeOptions};
use hydra_runtime::model::Model;
use hydra_runtime::projection::Projection;
use serde_json::{Value, json};
use std::num::NonZeroUsize;
use std::path::Path;
use tempfile::tempdir;

type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

/// The tiny model's configuration with other values for some keys.
fn config_with(changes: Value) -> Value {
    let mut config = config_json();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

fn read(changes: Value) -> Result<Config> {
    let dir = tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config_with(changes).to_string()).unwrap();
    Config::open(dir.path())
}

fn architecture(changes: Value) -> Architecture {
    read(changes).unwrap().architecture
}

/// A window in the layers from `first` on.
fn window(size: usize, first: usize) -> Option<Window> {
    Some(Window { size: NonZeroUsize::new(size).unwrap(), layers: (0..2).map(|layer| layer >= first).collect() })
}

/// The tiny model's tensors, with a bias on each of `biased` and, if asked for, head norms.
fn tensors(biased: &[Projection], head_norms: bool) -> Tensors {
    let mut tensors = model_tensors();
    for layer in 0..2 {
        let mut vector = |name: String, len: usize| {
            let values = (0..len).map(|i| (i + layer + name.len()) as f32 / 16.0).collect();
            tensors.push((format!("model.layers.{layer}.{name}"), vec![len], values));
        };
        for projection in biased {
            let rows = match projection {
                Projection::K | Projection::V => 4,
                Projection::Gate | Projection::Up => 12,
                _ => 8,
            };
            vector(format!("{}.bias", projection.hf_path()), rows);
        }
        for name in ["q_norm", "k_norm"].iter().filter(|_| head_norms) {
            vector(format!("self_attn.{name}.weight"), 4);
        }
    }
    tensors
}

/// The tiny model as a folder, with these changes to its configuration.
fn folder(dir: &Path, changes: Value, tensors: &Tensors) -> Result<Checkpoint> {
    write_folder(dir, &config_with(changes), tensors);
    Checkpoint::open(dir)
}

const QKV: [Projection; 3] = [Projection::Q, Projection::K, Projection::V];
const QKVO: [Projection; 4] = [Projection::Q, Projection::K, Projection::V, Projection::O];

#[test]
fn a_family_says_what_its_models_have() {
    let plain = Architecture::default();
    assert_eq!(architecture(json!({})), plain);
    // transformers' LLaMA knows no window.
    let window = json!({"sliding_window": 3, "use_sliding_window": true, "max_window_layers": 0});
    assert_eq!(architecture(window), plain);
    assert_eq!(
        architecture(json!({"sliding_window": 3, "layer_types": ["sliding_attention", "sliding_attention"]})),
        plain
    );
    let qkv = Biases { qkv: true, ..Biases::default() };
    assert_eq!(
        architecture(json!({"model_type": "qwen2"})),
        Architecture { family: Family::Qwen2, biases: qkv, ..plain.clone() }
    );
    let qwen3 = Architecture { family: Family::Qwen3, head_norms: true, ..plain.clone() };
    assert_eq!(architecture(json!({"model_type": "qwen3"})), qwen3);
    let qkvo = Biases { qkv: true, o: true, mlp: false };
    assert_eq!(
        architecture(json!({"model_type": "qwen3", "attention_bias": true})),
        Architecture { biases: qkvo, ..qwen3 }
    );
    assert_eq!(architecture(json!({"attention_bias": true})), Architecture { biases: qkvo, ..plain.clone() });
    let mlp = Biases { mlp: true, ..Biases::default() };
    assert_eq!(architecture(json!({"mlp_bias": true})), Architecture { biases: mlp, ..plain.clone() });
    assert_eq!(read(json!({"model_type": "qwen3"})).unwrap().head_dim, 128, "Qwen3's default");
    assert_eq!(read(json!({"model_type": "qwen2"})).unwrap().head_dim, 4);
}

#[test]
fn a_window_is_read_as_its_family_means_it() {
    let mistral = |size: Value| architecture(json!({"model_type": "mistral", "sliding_window": size})).window;
    assert_eq!((mistral(json!(1)), mistral(json!(12)), mistral(Value::Null)), (window(1, 0), window(12, 0), None));
    assert_eq!(architecture(json!({"model_type": "mistral"})).window, window(4096, 0), "transformers' default");
    for family in ["qwen2", "qwen3"] {
        let read = |changes: Value| {
            let mut all = json!({"model_type": family, "sliding_window": 7});
            all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            architecture(all).window
        };
        assert_eq!(read(json!({})), None);
        assert_eq!(read(json!({"use_sliding_window": false, "max_window_layers": 0})), None);
        assert_eq!(read(json!({"use_sliding_window": true, "max_window_layers": 0})), window(7, 0));
        assert_eq!(read(json!({"use_sliding_window": true, "max_window_layers": 1})), window(7, 1));
        assert_eq!(read(json!({"use_sliding_window": true, "max_window_layers": 2})), None, "no layer is left");
        assert_eq!(read(json!({"use_sliding_window": true})), None, "from layer 28 on");
        let types = |types: Value| read(json!({"use_sliding_window": true, "layer_types": types}));
        assert_eq!(types(json!(["full_attention", "sliding_attention"])), window(7, 1));
        assert_eq!(types(json!(["full_attention", "attention"])), None);
        assert_eq!(read(json!({"layer_types": ["full_attention", "full_attention"]})), None);
    }
    // transformers takes a Mistral with layer types for a Ministral.
    for family in ["mistral", "ministral"] {
        let types = |types: Value| {
            let read = architecture(json!({"model_type": family, "sliding_window": 7, "layer_types": types}));
            (read.family, read.window)
        };
        let first = Some(Window { size: NonZeroUsize::new(7).unwrap(), layers: vec![true, false] });
        assert_eq!(types(json!(["sliding_attention", "full_attention"])), (Family::Mistral, first));
        assert_eq!(types(json!(["full_attention", "full_attention"])), (Family::Mistral, None));
        assert_eq!(types(Value::Null), (Family::Mistral, window(7, 0)));
    }
}

#[test]
fn what_cannot_run_is_refused_by_name() {
    let cases = [
        (json!({"model_type": "gemma2"}), r#"model_type is "gemma2", "#),
        (json!({"model_type": "qwen2_moe"}), r#""llama", "mistral", "qwen2" or "qwen3""#),
        (json!({"model_type": "mixtral"}), r#"model_type is "mixtral""#),
        (json!({"model_type": "phi3"}), r#"model_type is "phi3""#),
        (json!({"model_type": "mistral", "sliding_window": 0}), "sliding_window is 0"),
        (json!({"model_type": "qwen3", "head_dim": 5}), "head size 5"),
        (json!({"model_type": "qwen2", "use_sliding_window": "no"}), "use_sliding_window is"),
        (
            json!({"model_type": "qwen2", "use_sliding_window": true, "max_window_layers": -1}),
            "max_window_layers is -1",
        ),
        (json!({"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}), "layer_types is"),
        (json!({"model_type": "qwen2", "layer_types": ["full_attention"]}), "for each of the 2 layers"),
        (json!({"model_type": "qwen3", "layer_types": ["full_attention", "linear_attention"]}), "layer_types is"),
        (
            json!({"model_type": "mistral", "sliding_window": null, "layer_types": ["sliding_attention", "full_attention"]}),
            "the model has no sliding window",
        ),
    ];
    for (changes, wanted) in cases {
        let said = read(changes.clone()).unwrap_err().to_string();
        assert!(said.contains("config.json: ") && said.contains(wanted), "{changes}: {said}");
    }
    for name in ["gemma2", "phi3", "qwen2moe", "mistral3"] {
        let mut gguf = Gguf::model();
        gguf.string("general.architecture", name);
        let said = Checkpoint::from_gguf(gguf.bytes()).err().unwrap().to_string();
        assert!(said.contains(name) && said.contains(r#""llama", "qwen2" or "qwen3""#), "{said}");
    }
    let mut gguf = Gguf::model();
    gguf.u32("llama.attention.sliding_window", 0);
    let said = Checkpoint::from_gguf(gguf.bytes()).err().unwrap().to_string();
    assert!(said.contains("llama.attention.sliding_window is 0"), "{said}");
}

#[test]
fn tensors_of_an_architecture_are_wanted_and_checked() {
    let dir = tempdir().unwrap();
    let complaint =
        |changes: Value, tensors: &Tensors| folder(dir.path(), changes, tensors).map(|_| ()).unwrap_err().to_string();
    let (qwen2, qwen3) = (json!({"model_type": "qwen2"}), json!({"model_type": "qwen3", "head_dim": 4}));
    let mut short = tensors(&QKV, false);
    let bias = short.iter_mut().find(|(name, ..)| name == "model.layers.1.self_attn.k_proj.bias").unwrap();
    (bias.1, bias.2) = (vec![3], vec![0.0; 3]);
    let said = complaint(qwen2.clone(), &short);
    assert!(said.contains("1 wrong: model.layers.1.self_attn.k_proj.bias is [3], "), "{said}");
    let said = complaint(qwen2, &model_tensors());
    assert!(said.contains("6 missing: model.layers.0.self_attn.q_proj.bias, "), "{said}");
    let mut without = tensors(&[], true);
    without.retain(|(name, ..)| name != "model.layers.0.self_attn.q_norm.weight");
    let said = complaint(qwen3.clone(), &without);
    assert!(said.contains("1 missing: model.layers.0.self_attn.q_norm.weight"), "{said}");
    let said = complaint(json!({}), &tensors(&[], true));
    assert!(said.contains("4 surplus: model.layers.0.self_attn.k_norm.weight, "), "{said}");
    assert!(folder(dir.path(), qwen3, &tensors(&[], true)).is_ok());
    assert!(folder(dir.path(), json!({"attention_bias": true}), &tensors(&QKVO, false)).is_ok());
    assert!(
        folder(dir.path(), json!({"mlp_bias": true, "attention_bias": true}), &tensors(&Projection::ALL, false))
            .is_ok()
    );
}

fn logits(checkpoint: &Checkpoint, adapter: Option<&Adapter>) -> Vec<f32> {
    let cpu = Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap();
    let model = Model::load(cpu, checkpoint).unwrap();
    let tokens: Vec<u32> = (0..40).map(|i: u32| (i * 131 + i * i * 7) % checkpoint.config().vocab as u32).collect();
    Evaluator::new(&model, adapter, 40).unwrap().logits(&Sequence::prompt(&tokens)).unwrap()
}

/// A GGUF of the folder's weights is the same model; merged, both become the same folder.
#[test]
fn both_containers_hold_every_architecture() {
    let qwen3 = json!({"model_type": "qwen3", "head_dim": 4});
    let cases = [
        (json!({"model_type": "qwen2"}), tensors(&QKV, false)),
        (qwen3.clone(), tensors(&[], true)),
        (json!({"model_type": "mistral", "sliding_window": 3}), model_tensors()),
        (json!({"attention_bias": true}), tensors(&QKVO, false)),
        (json!({"attention_bias": true, "mlp_bias": true}), tensors(&Projection::ALL, false)),
    ];
    for (changes, tensors) in cases {
        let (dir, merged) = (tempdir().unwrap(), [tempdir().unwrap(), tempdir().unwrap()]);
        // Weights small enough that no softmax is one-hot.
        let small = |(name, shape, values): &(String, Vec<usize>, Vec<f32>)| {
            (name.clone(), shape.clone(), values.iter().map(|x| (x * 12.0).sin() / 4.0).collect::<Vec<_>>())
        };
        let hf = folder(dir.path(), changes.clone(), &tensors.iter().map(small).collect()).unwrap();
        let mut gguf = Gguf::of_folder(dir.path());
        let tokenizer = Gguf::model().pairs.into_iter().filter(|(key, _)| key.starts_with("tokenizer."));
        gguf.pairs.retain(|(key, _)| !key.starts_with("tokenizer."));
        gguf.pairs.extend(tokenizer);
        let gguf = Checkpoint::from_gguf(gguf.bytes()).unwrap();
        assert_eq!(gguf.config(), hf.config(), "{changes}");
        assert_eq!(gguf.parameters(), hf.parameters(), "{changes}");
        assert_eq!(logits(&gguf, None), logits(&hf, None), "{changes}");
        let config = AdapterConfig { targets: Projection::ALL.to_vec(), lora_heads: 2, rank: 2, ..Default::default() };
        let mut adapter = Adapter::init(hf.config(), config, 3).unwrap();
        let pairs = adapter.layers.iter_mut().flatten().flatten();
        pairs.for_each(|pair| pair.b.iter_mut().enumerate().for_each(|(i, b)| *b = (i as f32).sin() / 8.0));
        let options = MergeOptions { format: None, max_shard_bytes: u64::MAX };
        for (checkpoint, to) in [&hf, &gguf].into_iter().zip(&merged) {
            merge::write(checkpoint, &adapter, MergeGate::Uniform, to.path(), options).unwrap();
        }
        let bytes = merged.each_ref().map(|dir| std::fs::read(dir.path().join("model.safetensors")).unwrap());
        assert!(bytes[0] == bytes[1], "{changes}");
        for dir in &merged {
            let again = Checkpoint::open(dir.path()).unwrap();
            assert_eq!(again.config(), hf.config(), "{changes}");
            for id in [TensorId::QueryNorm(1), TensorId::KeyNorm(0)].into_iter().filter(|_| changes == qwen3) {
                assert_eq!(again.vector(id), hf.vector(id));
            }
            for projection in Projection::ALL.into_iter().filter(|p| p.has_bias(hf.config())) {
                let id = TensorId::Bias(1, projection);
                assert_eq!(again.vector(id), hf.vector(id));
                assert_eq!(gguf.vector(id), hf.vector(id));
            }
        }
        let (fixed, _) = adapter.with_fixed_gate(MergeGate::Uniform).unwrap();
        let (got, want) = (logits(&Checkpoint::open(merged[1].path()).unwrap(), None), logits(&gguf, Some(&fixed)));
        let largest = want.iter().fold(0f32, |max, x| max.max(x.abs()));
        let apart = got.iter().zip(&want).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
        assert!(apart < 1e-5 * largest, "{changes}: {apart} of {largest}");
    }
}

/// A GGUF may have biases that no configuration of its family can state.
#[test]
fn biases_without_a_key_are_not_merged_into_a_folder() {
    let dir = tempdir().unwrap();
    folder(dir.path(), json!({"attention_bias": true}), &tensors(&QKVO, false)).unwrap();
    let mut gguf = Gguf::of_folder(dir.path());
    gguf.tensors.retain(|(name, ..)| !name.ends_with("attn_output.bias"));
    let tokenizer = Gguf::model().pairs.into_iter().filter(|(key, _)| key.starts_with("tokenizer."));
    gguf.pairs.retain(|(key, _)| !key.starts_with("tokenizer."));
    gguf.pairs.extend(tokenizer);
    let checkpoint = Checkpoint::from_gguf(gguf.bytes()).unwrap();
    assert_eq!(checkpoint.config().architecture.biases, Biases { qkv: true, ..Biases::default() });
    let (adapter, to) = (Adapter::init(checkpoint.config(), Default::default(), 1).unwrap(), tempdir().unwrap());
    let options = MergeOptions { format: None, max_shard_bytes: u64::MAX };
    let said = merge::write(&checkpoint, &adapter, MergeGate::Uniform, to.path(), options).unwrap_err().to_string();
    assert!(said.contains("its biases") && said.contains(r#"model_type "llama""#), "{said}");
}
