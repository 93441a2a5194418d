//! Adapters that other programs wrote: PEFT's settings, and what is said about those that mean something else.

use crate::adapter::{KINDS, adapter, complaint, model, rewrite};
use crate::builder::safetensors;
use hydra_runtime::adapter::{Adapter, GateKind, Method};
use hydra_runtime::config::Config;
use hydra_runtime::projection::Projection;
use serde_json::{Value, json};
use tempfile::tempdir;

#[test]
fn files_of_others() {
    for (method, gate, lora_heads) in [KINDS[0], KINDS[2], KINDS[3]] {
        let (dir, again) = (tempdir().unwrap(), tempdir().unwrap());
        let adapter = adapter(method, gate, lora_heads);
        adapter.save(dir.path()).unwrap();
        rewrite(dir.path(), |config| {
            let config = config.as_object_mut().unwrap();
            if method == Method::Lora {
                let keys: Vec<_> = config.keys().map(String::as_str).collect();
                let peft = [
                    "base_model_name_or_path",
                    "bias",
                    "lora_alpha",
                    "lora_dropout",
                    "peft_type",
                    "r",
                    "target_modules",
                    "task_type",
                ];
                assert_eq!(keys, peft);
            }
            for key in ["method", "gate", "base_model_name_or_path"] {
                config.remove(key);
            }
            if method != Method::Split {
                config.remove("labels");
            }
            config.insert("inference_mode".into(), json!(true));
            // The others as PEFT names what "all-linear" found.
            let paths = ["down_proj", "model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj"];
            config.insert("target_modules".into(), json!(paths));
            config.insert("lora_alpha".into(), json!(32.0));
        });
        let named = adapter
            .tensors()
            .map(|(name, shape, values)| (name.replace(".weight", ".mine.weight"), shape.to_vec(), values));
        std::fs::write(dir.path().join("adapter_model.safetensors"), safetensors(&named.collect::<Vec<_>>())).unwrap();
        let loaded = Adapter::load(dir.path(), &model()).unwrap();
        assert_eq!(loaded.layers, adapter.layers);
        assert_eq!((loaded.config.method, loaded.config.gate), (method, gate));
        loaded.save(again.path()).unwrap();
        rewrite(again.path(), |config| assert_eq!(config["inference_mode"], json!(true)));
    }
}

/// rsLoRA scales by alpha / √rank, and stays rsLoRA when it is saved.
#[test]
fn rank_stabilised_lora() {
    let (dir, again) = (tempdir().unwrap(), tempdir().unwrap());
    let plain = adapter(Method::Lora, GateKind::One, 1);
    plain.save(dir.path()).unwrap();
    rewrite(dir.path(), |config| config["use_rslora"] = json!(true));
    let loaded = Adapter::load(dir.path(), &model()).unwrap();
    let (alpha, rank) = (plain.config.alpha, plain.config.rank as f32);
    assert_eq!((plain.config.scale(), loaded.config.scale()), (alpha / rank, alpha / rank.sqrt()));
    assert!(rank > 1.0 && loaded.layers == plain.layers);
    loaded.save(again.path()).unwrap();
    assert_eq!(Adapter::load(again.path(), &model()).unwrap(), loaded);
}

/// Settings of PEFT's that leave the same tensors with the same effect.
#[test]
fn settings_that_change_nothing() {
    let dir = tempdir().unwrap();
    let plain = adapter(Method::Lora, GateKind::One, 1);
    plain.save(dir.path()).unwrap();
    rewrite(dir.path(), |config| {
        config["exclude_modules"] = json!(["lm_head"]);
        // For PEFT's linear layers it means nothing.
        config["fan_in_fan_out"] = json!(true);
        config["init_lora_weights"] = json!("gaussian");
        config["layers_to_transform"] = json!([0, 1]);
        config["rank_pattern"] = json!({"k_proj": plain.config.rank});
        config["alpha_pattern"] = json!({"k_proj": plain.config.alpha});
        config["target_modules"] = json!(["down_proj", "k_proj", "W_pack"]);
    });
    assert_eq!(Adapter::load(dir.path(), &model()).unwrap().layers, plain.layers);
    // What is left out has no tensors.
    let tensors = plain.tensors().filter(|(name, ..)| name.contains(".layers.0."));
    let tensors: Vec<_> = tensors.map(|(name, shape, values)| (name, shape.to_vec(), values)).collect();
    std::fs::write(dir.path().join("adapter_model.safetensors"), safetensors(&tensors)).unwrap();
    let said = complaint(dir.path());
    assert!(
        said.contains("the adapter is for 1 layers, the model has 2; one for some of them says so in layers_to"),
        "{said}"
    );
    let said = complaint(&dir.path().join("adapter_model.safetensors"));
    assert!(said.contains("adapter_model.safetensors: a file of an adapter: expected its folder"), "{said}");
}

/// A router without a word of it, for one A for each head.
#[test]
fn a_router_in_the_tensors_is_the_gate() {
    let dir = tempdir().unwrap();
    let routed = adapter(Method::Split, GateKind::Router, 3);
    routed.save(dir.path()).unwrap();
    rewrite(dir.path(), |config| drop(config.as_object_mut().unwrap().remove("gate")));
    assert_eq!(Adapter::load(dir.path(), &model()).unwrap(), routed);
}

/// Several heads and no word of what weighs them: neither in the configuration nor in the tensors.
#[test]
fn a_gate_that_nothing_says_is_asked_for() {
    let dir = tempdir().unwrap();
    for (method, gate, lora_heads) in [KINDS[1], KINDS[3]] {
        adapter(method, gate, lora_heads).save(dir.path()).unwrap();
        rewrite(dir.path(), |config| {
            for key in ["method", "gate", "labels"] {
                config.as_object_mut().unwrap().remove(key);
            }
        });
        let said = complaint(dir.path());
        assert!(said.contains("gate missing, wanted \"router\"") && said.contains("no lora_route"), "{said}");
        rewrite(dir.path(), |config| config["gate"] = json!("uniform"));
        assert_eq!(Adapter::load(dir.path(), &model()).unwrap().config.gate, GateKind::Uniform);
    }
}

/// A pair that is missing where the configuration has one is no pair of zeros, and one of a rank that it doesn't say is wrong.
#[test]
fn ranks_and_layers_are_those_of_the_configuration() {
    let dir = tempdir().unwrap();
    let plain = adapter(Method::Lora, GateKind::One, 1);
    plain.save(dir.path()).unwrap();
    rewrite(dir.path(), |config| config["rank_pattern"] = json!({"1.self_attn.k_proj": 8}));
    let said = complaint(dir.path());
    assert!(
        said.contains("2 wrong: base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight is [2, 8]"),
        "{said}"
    );
    rewrite(dir.path(), |config| {
        config.as_object_mut().unwrap().remove("rank_pattern");
        config["layers_to_transform"] = json!(1);
    });
    let said = complaint(dir.path());
    assert!(said.contains("4 surplus: base_model.model.model.layers.0."), "{said}");
    let tensors = plain.tensors().filter(|(name, ..)| name.contains(".layers.1."));
    let tensors: Vec<_> = tensors.map(|(name, shape, values)| (name, shape.to_vec(), values)).collect();
    std::fs::write(dir.path().join("adapter_model.safetensors"), safetensors(&tensors)).unwrap();
    let loaded = Adapter::load(dir.path(), &model()).unwrap();
    assert_eq!(loaded.layers[1], plain.layers[1]);
    assert!(loaded.layers[0][Projection::K].as_ref().unwrap().b.iter().all(|&x| x == 0.0));
    // Nor does one of a late layer alone need a model.
    let late: Vec<_> =
        tensors.iter().map(|(n, s, v)| (n.replace("layers.1", "layers.40"), s.clone(), v.clone())).collect();
    let other = tempdir().unwrap();
    plain.save(other.path()).unwrap();
    rewrite(other.path(), |config| config["layers_to_transform"] = json!([40]));
    std::fs::write(other.path().join("adapter_model.safetensors"), safetensors(&late)).unwrap();
    let opened = Adapter::open(other.path()).unwrap();
    assert_eq!((opened.layers.len(), &opened.layers[40]), (41, &plain.layers[1]));
    // Of another model, it says so.
    let wider = Config { d_model: 16, ..model() };
    let said = Adapter::load(dir.path(), &wider).unwrap_err().to_string();
    assert!(said.contains("the adapter is for width 8, the model has 16"), "{said}");
}

/// An alpha of zero is no adapter, wherever it stands.
#[test]
fn alphas_of_zero() {
    let dir = tempdir().unwrap();
    let plain = adapter(Method::Lora, GateKind::One, 1);
    plain.save(dir.path()).unwrap();
    let product = |adapter: &Adapter, p| adapter.config.scale() * adapter.layers[1][p].as_ref().unwrap().b[0];
    rewrite(dir.path(), |config| config["alpha_pattern"] = json!({"k_proj": 0, "down_proj": 3}));
    let one = Adapter::load(dir.path(), &model()).unwrap();
    assert_eq!((one.config.alpha, product(&one, Projection::K)), (3.0, 0.0));
    assert_eq!(one.layers[1][Projection::Down], plain.layers[1][Projection::Down]);
    rewrite(dir.path(), |config| config["alpha_pattern"] = json!({".*": 0}));
    assert_eq!(Adapter::load(dir.path(), &model()).unwrap().config.alpha, 0.0);
}

#[test]
fn variants_that_compute_something_else_are_refused() {
    let dir = tempdir().unwrap();
    let cases = [
        ("use_rslora", json!("yes")),
        ("use_dora", json!(true)),
        ("lora_bias", json!(true)),
        ("use_qalora", json!(true)),
        ("trainable_token_indices", json!({"embed_tokens": [1]})),
        ("target_parameters", json!(["experts"])),
        ("bias", json!("lora_only")),
        ("bias", json!("all")),
        ("modules_to_save", json!(["lm_head"])),
        ("peft_type", json!("ADALORA")),
        ("target_modules", json!(["lm_head"])),
        ("target_modules", json!([])),
        ("rank_pattern", json!({"k_proj": 0})),
        ("rank_pattern", json!({"k_proj": "8"})),
        ("rank_pattern", json!({"(k_proj": 2})),
        ("rank_pattern", json!(["k_proj"])),
        ("alpha_pattern", json!({"k_proj": null})),
        ("layers_to_transform", json!([-1])),
        ("layers_to_transform", json!([2])),
        ("layers_pattern", json!(1)),
        ("exclude_modules", json!(".*")),
        ("exclude_modules", json!("*")),
        ("target_modules", json!("k_proj")),
        ("target_modules", json!("(?P<k_proj")),
        ("init_lora_weights", json!("pissa")),
        ("init_lora_weights", json!("OLoRA")),
        ("alora_invocation_tokens", json!([10, 11])),
        ("target_modules", json!(["vision.self_attn.other_k_proj"])),
        ("method", json!("other")),
        ("gate", json!("other")),
        ("gate", json!("one")),
        ("r", json!(0)),
        ("r", json!("2")),
        ("lora_alpha", Value::Null),
        ("lora_nums", json!(-1)),
        ("lora_nums", json!(1u64 << 62)),
        ("lora_dropout", json!(1.5)),
        ("labels", json!([1])),
        ("router_temperature", json!(0)),
        ("router_temperature", json!("hot")),
        ("router_top_k", json!(4)),
        ("router_top_k", json!(1.5)),
        ("head_dropout", json!(1)),
        ("head_init", json!("other")),
        ("load_balance", json!(-1)),
    ];
    for (key, bad) in cases {
        adapter(Method::Hydra, GateKind::Router, 3).save(dir.path()).unwrap();
        rewrite(dir.path(), |config| config[key] = bad.clone());
        let message = complaint(dir.path());
        assert!(message.contains("adapter_config.json"), "{key} {bad}: {message}");
    }
    // A rank that the tensors don't have.
    rewrite(dir.path(), |config| {
        *config = json!({"r": 65536, "lora_alpha": 1, "lora_nums": 4096, "target_modules": "all-linear"})
    });
    assert!(complaint(dir.path()).contains("wrong"));
}

#[test]
fn pickles_and_nothing() {
    let dir = tempdir().unwrap();
    assert!(complaint(dir.path()).contains("adapter_model.safetensors"));
    std::fs::write(dir.path().join("adapter_model.bin"), "x").unwrap();
    assert!(complaint(dir.path()).contains("safe_serialization"));
    std::fs::rename(dir.path().join("adapter_model.bin"), dir.path().join("adapter_model.safetensors.index.json"))
        .unwrap();
    assert!(complaint(dir.path()).contains("max_shard_size"));
}

#[test]
fn tensors_of_two_adapters() {
    let dir = tempdir().unwrap();
    let plain = adapter(Method::Lora, GateKind::One, 1);
    plain.save(dir.path()).unwrap();
    let named = plain.tensors().enumerate().map(|(i, (name, shape, values))| {
        (name.replace(".weight", if i == 3 { ".b.weight" } else { ".a.weight" }), shape.to_vec(), values)
    });
    std::fs::write(dir.path().join("adapter_model.safetensors"), safetensors(&named.collect::<Vec<_>>())).unwrap();
    let said = complaint(dir.path());
    assert!(said.contains("tensors of two adapters, a and b: expected those of one"), "{said}");
}
