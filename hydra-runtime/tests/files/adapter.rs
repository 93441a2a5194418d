//! Adapters: files of all three methods load and save unchanged, bad ones are complained about by name.

use crate::builder::{config_json, safetensors};
use hydra_runtime::adapter::{Adapter, AdapterConfig, GateKind, HeadInit, Method};
use hydra_runtime::config::Config;
use hydra_runtime::projection::Projection;
use serde_json::{Value, json};
use std::path::Path;
use tempfile::tempdir;

pub fn model() -> Config {
    let dir = tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config_json().to_string()).unwrap();
    Config::open(dir.path()).unwrap()
}

/// An adapter in which every value differs.
pub fn adapter(method: Method, gate: GateKind, lora_heads: usize) -> Adapter {
    let targets = vec![Projection::K, Projection::Down];
    let config = AdapterConfig { method, gate, rank: 2, lora_heads, targets, ..AdapterConfig::default() };
    let mut adapter = Adapter::init(&model(), config, 7).unwrap();
    let mut count = 0;
    for pair in adapter.layers.iter_mut().flatten().flatten() {
        for x in &mut pair.b {
            count += 1;
            *x = count as f32 / 64.0;
        }
    }
    adapter
}

pub const KINDS: [(Method, GateKind, usize); 5] = [
    (Method::Hydra, GateKind::Router, 3),
    (Method::Hydra, GateKind::Uniform, 3),
    (Method::Lora, GateKind::One, 1),
    (Method::Split, GateKind::Label, 3),
    (Method::Split, GateKind::Router, 2),
];

#[test]
fn what_was_saved_is_loaded() {
    for (method, gate, lora_heads) in KINDS {
        let (dir, again) = (tempdir().unwrap(), tempdir().unwrap());
        let mut adapter = adapter(method, gate, lora_heads);
        adapter.config.base_model = Some("a/b".into());
        adapter.save(dir.path()).unwrap();
        let loaded = Adapter::load(dir.path(), &model()).unwrap();
        assert_eq!(loaded, adapter);
        loaded.fits(&model()).unwrap();
        assert_eq!(Adapter::open(dir.path()).unwrap(), loaded, "the file alone says as much");
        assert_eq!(loaded.parameters(), adapter.config.parameters(&model()));
        loaded.save(again.path()).unwrap();
        for file in ["adapter_model.safetensors", "adapter_config.json"] {
            let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap();
            assert!(read(dir.path()) == read(again.path()), "{method:?} {gate:?} {file}");
        }
        let left = std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(left, 2, "temporary files are gone");
    }
}

#[test]
fn heads_are_columns_of_b_and_rows_of_a() {
    let adapter = adapter(Method::Split, GateKind::Router, 2);
    let pair = adapter.layers[0][Projection::K].as_ref().unwrap();
    let tensors: Vec<_> = adapter.tensors().take(5).collect();
    let prefix = "base_model.model.model.layers.0.self_attn.k_proj";
    let names: Vec<_> = tensors.iter().map(|(name, shape, _)| (name.clone(), *shape)).collect();
    let want =
        [("lora_A0", [2, 8]), ("lora_A1", [2, 8]), ("lora_B0", [4, 2]), ("lora_B1", [4, 2]), ("lora_route", [2, 8])];
    assert_eq!(names, want.map(|(part, shape)| (format!("{prefix}.{part}.weight"), shape)));
    assert_eq!(tensors[1].2, pair.a[16..32]);
    assert_eq!(tensors[4].2, pair.a[32..48]);
    assert_eq!(tensors[3].2, [2, 3, 6, 7, 10, 11, 14, 15].map(|i| pair.b[i]));
}

#[test]
fn a_new_adapter_is_seeded_and_does_nothing() {
    let config = AdapterConfig::default();
    let one = Adapter::init(&model(), config.clone(), 1).unwrap();
    assert_eq!(one, Adapter::init(&model(), config.clone(), 1).unwrap());
    let two = Adapter::init(&model(), config.clone(), 2).unwrap();
    assert_ne!(one, two);
    assert_eq!(two.start(1).unwrap(), one);
    let huge = AdapterConfig { rank: 1 << 16, lora_heads: 1 << 12, ..config.clone() };
    let far = Config { d_model: 1 << 28, ..model() };
    assert!(Adapter::init(&far, huge, 1).unwrap_err().to_string().contains("out of memory"));
    let fewer = AdapterConfig { targets: vec![Projection::Up], ..config };
    let fewer = Adapter::init(&model(), fewer, 1).unwrap();
    assert_eq!(fewer.layers[1][Projection::Up], one.layers[1][Projection::Up]);
    let pair = one.layers[1][Projection::Up].as_ref().unwrap();
    let bound = 1.0 / 8f32.sqrt();
    assert!(pair.a.iter().all(|x| x.abs() <= bound) && pair.a.iter().any(|x| x.abs() > bound / 2.0));
    assert!(pair.b.iter().all(|&x| x == 0.0));
}

#[test]
fn heads_that_start_apart_cancel() {
    let config = AdapterConfig { head_init: HeadInit::Random, ..AdapterConfig::default() };
    let one = Adapter::init(&model(), config.clone(), 1).unwrap();
    assert_eq!(one, Adapter::init(&model(), config.clone(), 1).unwrap());
    assert_ne!(one, Adapter::init(&model(), config.clone(), 2).unwrap());
    assert_eq!(Adapter::init(&model(), config.clone(), 2).unwrap().start(1).unwrap(), one);
    let plain = Adapter::init(&model(), AdapterConfig::default(), 1).unwrap();
    let (mut values, mut squares) = (0.0, 0.0);
    for layer in 0..one.layers.len() {
        let [pair, plain] = [&one, &plain].map(|adapter| adapter.layers[layer][Projection::Up].as_ref().unwrap());
        let (rank, d_in, d_out) = (4, pair.d_in, pair.d_out);
        assert_eq!(pair.a[..rank * d_in], plain.a[..rank * d_in], "A starts where it would");
        assert!(pair.a[rank * d_in..].iter().all(|&x| x == 0.0), "the router starts at the uniform gate");
        for row in pair.b.chunks(4 * rank) {
            for j in 0..rank {
                let lora_heads = [0, 1, 2, 3].map(|e| f64::from(row[e * rank + j]));
                assert!(
                    lora_heads.iter().sum::<f64>().abs() < 1e-7 && lora_heads[0] != lora_heads[1],
                    "{lora_heads:?}"
                );
            }
        }
        // Centred on four heads: three quarters of the variance are left.
        let variance = 0.75 / (64.0 * (d_out as f64).sqrt());
        values += pair.b.len() as f64;
        squares += pair.b.iter().map(|&b| f64::from(b).powi(2)).sum::<f64>() / variance;
    }
    let error = (2.0 / (0.75 * values)).sqrt();
    assert!((squares / values - 1.0).abs() < 4.0 * error, "{} ± {error}", squares / values);
}

#[test]
fn options_are_in_the_file_only_where_they_are_asked_for() {
    let dir = tempdir().unwrap();
    let keys = ["router_temperature", "router_top_k", "head_dropout", "head_init", "load_balance"];
    let mut adapter = adapter(Method::Hydra, GateKind::Router, 3);
    adapter.save(dir.path()).unwrap();
    rewrite(dir.path(), |config| assert!(keys.iter().all(|key| config.get(key).is_none()), "{config}"));
    adapter.config =
        AdapterConfig { temperature: 0.7, top_k: Some(2), head_dropout: 0.25, load_balance: 0.01, ..adapter.config };
    adapter.save(dir.path()).unwrap();
    rewrite(dir.path(), |config| {
        assert_eq!(keys.map(|key| config[key].clone()), [json!(0.7), json!(2), json!(0.25), Value::Null, json!(0.01)])
    });
    assert_eq!(Adapter::load(dir.path(), &model()).unwrap().config.temperature, 0.7);
    assert_eq!(Adapter::load(dir.path(), &model()).unwrap(), Adapter::open(dir.path()).unwrap());
    let again = Adapter::load(dir.path(), &model()).unwrap();
    assert_eq!((again.config.top_k, again.config.head_dropout, again.config.load_balance), (Some(2), 0.25, 0.01));
    assert_eq!(again.config.extra.get("router_top_k"), None, "kept twice");
    adapter.config = AdapterConfig { head_init: HeadInit::Random, top_k: None, ..adapter.config };
    adapter.save(dir.path()).unwrap();
    assert_eq!(Adapter::load(dir.path(), &model()).unwrap().config.head_init, HeadInit::Random);
    // A head alone, or all under a fixed gate, has no router to have options, and is an adapter like any other.
    let head = adapter.head(1).unwrap();
    head.save(dir.path()).unwrap();
    rewrite(dir.path(), |config| {
        assert!(config.get("router_temperature").is_none() && config.get("head_init").is_none())
    });
    let (fixed, _) = adapter.with_fixed_gate(hydra_runtime::merge::MergeGate::Uniform).unwrap();
    fixed.save(dir.path()).unwrap();
    assert_eq!(Adapter::load(dir.path(), &model()).unwrap().config.temperature, 1.0);
}

#[test]
fn options_that_mean_nothing_are_refused() {
    let router = AdapterConfig { head_init: HeadInit::Random, ..AdapterConfig::default() };
    let refused = |config: AdapterConfig, wanted: &[&str]| {
        let message = Adapter::init(&model(), config, 1).unwrap_err().to_string();
        assert!(wanted.iter().all(|part| message.contains(part)) && !message.contains('\n'), "{message}");
    };
    let uniform = AdapterConfig { gate: GateKind::Uniform, ..router.clone() };
    assert!(Adapter::init(&model(), uniform.clone(), 1).is_ok());
    refused(AdapterConfig { lora_heads: 1, ..router.clone() }, &["head init random", "one head"]);
    refused(AdapterConfig { gate: GateKind::Label, ..router.clone() }, &["head init random", "gate label"]);
    refused(AdapterConfig { method: Method::Split, ..router.clone() }, &["head init random", "an A per head"]);
    refused(AdapterConfig { top_k: Some(2), ..router.clone() }, &["head init random", "top-k"]);
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        refused(AdapterConfig { temperature: bad, ..router.clone() }, &["router temperature", "above 0"]);
    }
    for bad in [0, 5] {
        refused(AdapterConfig { top_k: Some(bad), ..router.clone() }, &["top-k", "1 to 4"]);
    }
    for bad in [1.0, -0.1, f32::NAN] {
        refused(AdapterConfig { head_dropout: bad, ..router.clone() }, &["head dropout", "less than 1"]);
    }
    for bad in [-1.0, f32::NAN] {
        refused(AdapterConfig { load_balance: bad, ..router.clone() }, &["load balance", "from 0"]);
    }
    refused(AdapterConfig { temperature: 2.0, ..uniform.clone() }, &["router temperature", "gate is uniform"]);
    refused(AdapterConfig { top_k: Some(2), ..uniform.clone() }, &["top-k", "gate is uniform"]);
    refused(AdapterConfig { load_balance: 2.0, ..uniform }, &["load balance", "gate is uniform"]);
}

/// The reference implementation's files, as PyTorch wrote them (`tests/golden`).
#[test]
fn files_of_the_reference_load_and_save_unchanged() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let mut cases = 0;
    for case in std::fs::read_dir(golden).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
        cases += 1;
        let again = tempdir().unwrap();
        let model = Config::open(case.join("model")).unwrap();
        Adapter::load(case.join("adapter"), &model).unwrap().save(again.path()).unwrap();
        let read = |dir: &Path, file: &str| std::fs::read(dir.join(file)).unwrap();
        let tensors = "adapter_model.safetensors";
        assert!(read(&case.join("adapter"), tensors) == read(again.path(), tensors), "{}", case.display());
        let json = |dir: &Path| serde_json::from_slice::<Value>(&read(dir, "adapter_config.json")).unwrap();
        let (before, after) = (json(&case.join("adapter")), json(again.path()));
        for (key, value) in before.as_object().unwrap() {
            // A LoRA is saved with PEFT's keys alone.
            if before["method"] == "lora" && ["method", "labels"].contains(&key.as_str()) {
                assert!(after.get(key).is_none());
                continue;
            }
            let same = after[key] == *value || after[key].as_f64().is_some_and(|x| value.as_f64() == Some(x));
            assert!(same, "{}: {key} was {value}, is {}", case.display(), after[key]);
        }
    }
    assert!(cases >= 3, "{cases} cases");
}

pub fn rewrite(dir: &Path, change: impl FnOnce(&mut Value)) {
    let path = dir.join("adapter_config.json");
    let mut config = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(&path, config.to_string()).unwrap();
}

pub fn complaint(dir: &Path) -> String {
    let message = Adapter::load(dir, &model()).map(|_| ()).unwrap_err().to_string();
    assert!(!message.contains('\n') && message.len() < 2000, "{message}");
    message
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let dir = tempdir().unwrap();
    let adapter = adapter(Method::Hydra, GateKind::Router, 3);
    adapter.save(dir.path()).unwrap();
    let mut tensors: Vec<_> = adapter.tensors().map(|(name, shape, values)| (name, shape.to_vec(), values)).collect();
    let missing = tensors.remove(0).0;
    tensors[0].2[3] = f32::NAN;
    tensors[1].1 = vec![2, 4];
    tensors.push(("base_model.model.lm_head.lora_A.weight".into(), vec![1], vec![0.0]));
    std::fs::write(dir.path().join("adapter_model.safetensors"), safetensors(&tensors)).unwrap();
    let message = complaint(dir.path());
    for part in [
        format!("1 missing: {missing};"),
        "1 surplus: base_model.model.lm_head.lora_A.weight;".into(),
        format!("2 wrong: {} holds NaN, {} is [2, 4], wanted [4, 2]", tensors[0].0, tensors[1].0),
    ] {
        assert!(message.contains(&part), "{message}\n{part}");
    }
}

#[test]
fn a_failed_save_leaves_what_was_there() {
    let dir = tempdir().unwrap();
    let first = adapter(Method::Lora, GateKind::One, 1);
    first.save(dir.path()).unwrap();
    // The second file can't take a folder's place: neither is renamed.
    let config = dir.path().join("adapter_config.json");
    let first_config = std::fs::read(&config).unwrap();
    std::fs::remove_file(&config).unwrap();
    std::fs::create_dir(&config).unwrap();
    assert!(adapter(Method::Hydra, GateKind::Router, 3).save(dir.path()).is_err());
    std::fs::remove_dir(&config).unwrap();
    std::fs::write(&config, first_config).unwrap();
    assert_eq!(Adapter::load(dir.path(), &model()).unwrap().layers, first.layers);
    assert!(Adapter::save(&first, Path::new("/dev/null/adapter")).is_err());
}

/// The names of a LoRA's tensors, and whether they are of B.
fn plain_names() -> impl Iterator<Item = (String, bool)> {
    let names: Vec<_> = adapter(Method::Lora, GateKind::One, 1).tensors().map(|(name, ..)| name).collect();
    names.into_iter().map(|name| (name.clone(), name.contains("lora_B")))
}

#[test]
fn without_a_model_what_is_missing_is_named_and_no_number_is_taken_on_trust() {
    let dir = tempdir().unwrap();
    adapter(Method::Lora, GateKind::One, 1).save(dir.path()).unwrap();
    let path = dir.path().join("adapter_model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let renamed = |from: &[u8], to: &[u8]| {
        assert_eq!(from.len(), to.len());
        let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
        let mut changed = bytes.clone();
        changed[at..at + to.len()].copy_from_slice(to);
        std::fs::write(&path, changed).unwrap();
        Adapter::open(dir.path()).unwrap_err().to_string()
    };
    let said = renamed(b"layers.0.self_attn.k_proj.lora_A", b"layers.0.self_attn.k_proj.lora_X");
    assert!(said.contains("lora_A.weight") && said.contains("lora_X"), "{said}");
    let said = renamed(b"layers.0.self_attn.k", b"layers.77777777777.k");
    assert!(said.contains("layers.0.self_attn.k_proj.lora_A.weight"), "{said}");
    // A small file that calls for millions of tensors: some of them are named.
    let names = (0..1000).map(|layer| (format!("base_model.model.model.layers.{layer}.x"), vec![0], vec![]));
    std::fs::write(&path, safetensors(&names.collect::<Vec<_>>())).unwrap();
    let config = dir.path().join("adapter_config.json");
    let before = std::fs::read(&config).unwrap();
    rewrite(dir.path(), |config| {
        let all = Projection::ALL.map(Projection::name);
        *config = json!({"method": "split", "gate": "uniform", "lora_nums": 4096, "r": 1, "lora_alpha": 1, "target_modules": all});
    });
    let said = Adapter::open(dir.path()).unwrap_err().to_string();
    assert!(said.contains("at least") && said.contains("layers.0.self_attn.q_proj.lora_A0.weight"), "{said}");
    assert!(said.len() < 2000 && !said.contains("surplus"), "{said}");
    std::fs::write(&config, &before).unwrap();
    // Neither are matrices without columns an adapter.
    let empty = plain_names().map(|(name, b)| (name, if b { vec![0, 2] } else { vec![2, 0] }, vec![]));
    std::fs::write(&path, safetensors(&empty.collect::<Vec<_>>())).unwrap();
    rewrite(dir.path(), |config| config["rank_pattern"] = json!({"1.self_attn.k_proj": 2}));
    let said = Adapter::open(dir.path()).unwrap_err().to_string();
    assert!(said.contains("layer 0 k_proj doesn't fit"), "{said}");
    std::fs::write(&config, &before).unwrap();
    // No tensors at all aren't an adapter of no layers.
    std::fs::write(&path, b"\x02\0\0\0\0\0\0\0{}").unwrap();
    let said = Adapter::open(dir.path()).unwrap_err().to_string();
    assert!(said.contains("missing: base_model.model.model.layers.0."), "{said}");
}

#[test]
fn an_adapter_that_could_not_be_read_again_is_not_written() {
    let dir = tempdir().unwrap();
    let good = adapter(Method::Split, GateKind::Label, 3);
    good.save(dir.path()).unwrap();
    let refused = |change: &dyn Fn(&mut Adapter)| {
        let mut broken = good.clone();
        change(&mut broken);
        let said = broken.save(dir.path()).unwrap_err().to_string();
        assert_eq!(Adapter::load(dir.path(), &model()).unwrap().layers, good.layers, "what was there is there");
        (said, broken.head(1).is_err())
    };
    let pair = |adapter: &mut Adapter| adapter.layers[0][Projection::K].clone().unwrap();
    let fit = "layer 0 k_proj doesn't fit";
    let broken: [&dyn Fn(&mut Adapter); 5] = [
        &|adapter| adapter.layers[0][Projection::K] = None,
        &|adapter| adapter.layers[0][Projection::K].as_mut().unwrap().a.truncate(1),
        &|adapter| adapter.layers[0][Projection::K].as_mut().unwrap().b.clear(),
        &|adapter| adapter.config.rank = 9,
        &|adapter| adapter.config.lora_heads = 4,
    ];
    for change in broken {
        let (said, head_refused) = refused(change);
        assert!(said.contains(fit) && head_refused, "{said}");
    }
    let surplus = |adapter: &mut Adapter| adapter.layers[0][Projection::V] = Some(pair(adapter));
    assert!(refused(&surplus).0.contains("layer 0 v_proj"));
    let spoilt = |adapter: &mut Adapter| adapter.layers[0][Projection::K].as_mut().unwrap().b[1] = f32::NAN;
    assert!(refused(&spoilt).0.contains("not finite"));
}
