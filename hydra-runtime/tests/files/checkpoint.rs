//! Good checkpoints in every packaging, and named complaints about bad ones.

use crate::builder::{Gguf, config_json, model_tensors, safetensors, tensors, value, write_folder};
use hydra_kernels::isa::Isa;
use hydra_runtime::backend::cpu::{Cpu, CpuOptions};
use hydra_runtime::batch::Sequence;
use hydra_runtime::checkpoint::{Checkpoint, TensorId};
use hydra_runtime::config::{Config, Llama3Scaling, Rope, RopeScaling, Yarn};
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::generate::Generator;
use hydra_runtime::model::Model;
use hydra_runtime::projection::Projection;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;
use std::collections::HashMap;
use std::fs;
use std::path::Path;
use tempfile::tempdir;

/// Every weight of the tiny model, read through the checkpoint, in the order of `tensors()`.
fn assert_tiny(checkpoint: &Checkpoint) {
    let sizes = tensors().into_iter().map(|(_, shape)| shape.iter().product::<usize>() as u64);
    assert_eq!(checkpoint.parameters(), sizes.sum::<u64>());
    let matrix = |t: usize, id| {
        let weight = checkpoint.weight(id);
        let mut row = vec![0.0; weight.cols()];
        for r in 0..weight.rows() {
            weight.decode_row(Isa::Portable, r, 0, &mut row);
            let want: Vec<f32> = (0..weight.cols()).map(|c| value(t, r * weight.cols() + c)).collect();
            assert_eq!(row, want, "{id:?} row {r}");
        }
    };
    let vector = |t: usize, id| {
        assert_eq!(checkpoint.vector(id), (0..8).map(|i| value(t, i)).collect::<Vec<_>>(), "{id:?}");
    };
    matrix(0, TensorId::Embedding);
    vector(1, TensorId::FinalNorm);
    matrix(2, TensorId::Head);
    for layer in 0..2 {
        let t = 3 + 9 * layer;
        vector(t, TensorId::AttentionNorm(layer));
        vector(t + 1, TensorId::FfnNorm(layer));
        for (i, projection) in Projection::ALL.into_iter().enumerate() {
            matrix(t + 2 + i, TensorId::Projection(layer, projection));
        }
    }
}

fn complaint(path: &Path) -> String {
    let message = Checkpoint::open(path).map(|_| ()).unwrap_err().to_string();
    assert!(!message.contains('\n') && message.len() < 2000, "{message}");
    message
}

#[test]
fn one_file() {
    let dir = tempdir().unwrap();
    write_folder(dir.path(), &config_json(), &model_tensors());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_tiny(&checkpoint);
    let config = checkpoint.config();
    assert_eq!((config.head_dim, config.kv_heads, config.bos, config.eos.as_slice()), (4, 1, Some(0), &[1][..]));
}

#[test]
fn shards() {
    let dir = tempdir().unwrap();
    let all = model_tensors();
    std::fs::write(dir.path().join("config.json"), config_json().to_string()).unwrap();
    let mut placed = serde_json::Map::new();
    for (n, half) in all.chunks(10).enumerate() {
        let shard = format!("model-0000{n}.safetensors");
        std::fs::write(dir.path().join(&shard), safetensors(half)).unwrap();
        placed.extend(half.iter().map(|(name, ..)| (name.clone(), json!(shard))));
    }
    let index = dir.path().join("model.safetensors.index.json");
    let write = |placed: &serde_json::Map<_, _>| {
        std::fs::write(&index, json!({"weight_map": placed}).to_string()).unwrap();
    };
    write(&placed);
    assert_tiny(&Checkpoint::open(dir.path()).unwrap());

    placed.insert("model.norm.weight".into(), json!("../secret.safetensors"));
    write(&placed);
    assert!(complaint(dir.path()).contains("../secret.safetensors"));
    placed.insert("model.norm.weight".into(), json!("model-00000.safetensors"));
    write(&placed);
    std::fs::remove_file(dir.path().join("model-00001.safetensors")).unwrap();
    assert!(complaint(dir.path()).contains("model-00001.safetensors"));
}

#[test]
fn gguf() {
    let dir = tempdir().unwrap();
    let file = dir.path().join("tiny.gguf");
    for version in [2, 3] {
        let gguf = Gguf { version, ..Gguf::model() };
        std::fs::write(&file, gguf.bytes()).unwrap();
        assert_tiny(&Checkpoint::open(&file).unwrap());
        assert_tiny(&Checkpoint::open(dir.path()).unwrap());
    }
    std::fs::copy(&file, dir.path().join("other.gguf")).unwrap();
    assert!(complaint(dir.path()).contains("2 .gguf files"));
}

/// The model as `gguf-split` cuts it, `tensors` to a file.
fn split(dir: &Path, tensors: usize) -> Vec<std::path::PathBuf> {
    let whole = Gguf::model();
    let parts: Vec<_> = whole.tensors.chunks(tensors).collect();
    let part = |(number, own): (usize, &&[_])| {
        let mut gguf = if number == 0 { whole.clone() } else { Gguf::new() };
        gguf.tensors = own.to_vec();
        gguf.u32("split.no", number as u32);
        gguf.u32("split.count", parts.len() as u32);
        gguf.u32("split.tensors.count", whole.tensors.len() as u32);
        let path = dir.join(format!("m-{:05}-of-{:05}.gguf", number + 1, parts.len()));
        fs::write(&path, gguf.bytes()).unwrap();
        path
    };
    parts.iter().enumerate().map(part).collect()
}

#[test]
fn a_split_gguf() {
    let dir = tempdir().unwrap();
    let paths = split(dir.path(), 8);
    assert_eq!(paths.len(), 3);
    assert_tiny(&Checkpoint::open(&paths[0]).unwrap());
    assert!(Checkpoint::open(&paths[0]).unwrap().tokenizer().is_ok());
    // A folder with its parts alone is that model, also with its config.json in it.
    assert_tiny(&Checkpoint::open(dir.path()).unwrap());
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    assert_tiny(&Checkpoint::open(dir.path()).unwrap());
    assert!(complaint(&paths[1]).contains("split.count is 3, wanted the first part, named NAME-00001-of-00003.gguf"));
    let bytes = fs::read(&paths[0]).unwrap();
    assert!(Checkpoint::from_gguf(bytes).err().unwrap().to_string().contains("wanted the first part"));
    let other = fs::read(&paths[1]).unwrap();
    fs::write(&paths[1], fs::read(&paths[2]).unwrap()).unwrap();
    assert!(complaint(&paths[0]).ends_with("m-00002-of-00003.gguf: split.no is 2, wanted 1"));
    fs::write(&paths[1], &other).unwrap();
    fs::remove_file(&paths[2]).unwrap();
    assert!(complaint(&paths[0]).contains("m-00003-of-00003.gguf: No such file"));
}

#[test]
fn a_tied_head_is_the_embedding() {
    let dir = tempdir().unwrap();
    let mut config = config_json();
    config["tie_word_embeddings"] = json!(true);
    let tensors: Vec<_> = model_tensors().into_iter().filter(|(name, ..)| name != "lm_head.weight").collect();
    write_folder(dir.path(), &config, &tensors);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let mut row = [0.0; 8];
    checkpoint.weight(TensorId::Head).decode_row(Isa::Portable, 3, 0, &mut row);
    assert_eq!(row[2], value(0, 26));
}

/// Writes the tiny model's tensors but `left_out`, with the metadata of `safetensors.torch.save_model`.
pub fn write_shared(dir: &Path, tied: bool, left_out: &[&str], aliases: &[(&str, &str)]) {
    let mut config = config_json();
    config["tie_word_embeddings"] = json!(tied);
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let stored =
        model_tensors().into_iter().filter(|(name, ..)| !left_out.contains(&name.as_str())).collect::<Vec<_>>();
    let views = stored.iter().map(|(name, shape, values)| {
        (name, TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(values)).unwrap())
    });
    let aliases = aliases.iter().map(|&(name, stored)| (name.into(), stored.into()));
    let metadata: HashMap<String, String> = aliases.chain([("format".into(), "pt".into())]).collect();
    std::fs::write(dir.join("model.safetensors"), safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

#[test]
fn tensors_stored_under_another_name() {
    let (embedding, head) = ("model.embed_tokens.weight", "lm_head.weight");
    let dir = tempdir().unwrap();
    let row = |id| {
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let mut row = [0.0; 8];
        checkpoint.weight(id).decode_row(Isa::Portable, 3, 0, &mut row);
        (row[2], checkpoint.config().tied)
    };
    // The two names of a tied model: either is stored, with a note or without, and `save_model` keeps the alphabet's first.
    for (tied, left_out, aliases, tensor) in [
        (true, embedding, &[(embedding, head)][..], 2),
        (true, embedding, &[], 2),
        (true, head, &[(head, embedding)], 0),
        (false, head, &[(head, embedding)], 0),
        (false, embedding, &[(embedding, head)], 2),
    ] {
        write_shared(dir.path(), tied, &[left_out], aliases);
        for id in [TensorId::Embedding, TensorId::Head] {
            assert_eq!(row(id), (value(tensor, 26), true), "{id:?} without {left_out}");
        }
    }
    // A tied model with a head of its own has that; one with a copy is tied.
    write_shared(dir.path(), true, &[], &[]);
    assert_eq!(row(TensorId::Head), (value(2, 26), false));
    write_shared(dir.path(), false, &[embedding], &[]);
    assert!(complaint(dir.path()).contains("1 missing: model.embed_tokens.weight"));
    // Of two names that are both stored, each has its own tensor.
    write_shared(dir.path(), false, &[], &[(embedding, head)]);
    assert_eq!(row(TensorId::Embedding), (value(0, 26), false));
    // Layers that share a norm; a note about a tensor that is not there.
    let (first, second) = ("model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight");
    write_shared(dir.path(), false, &[second], &[(second, first), ("model.layers.1.mlp.up_proj.bias", "nowhere")]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let norm = checkpoint.vector(TensorId::AttentionNorm(1));
    assert_eq!(norm[1], value(3, 1));
    assert_eq!(norm, checkpoint.vector(TensorId::AttentionNorm(0)));
}

#[test]
fn a_shared_tensor_in_shards() {
    let dir = tempdir().unwrap();
    write_shared(dir.path(), true, &["model.embed_tokens.weight"], &[("model.embed_tokens.weight", "lm_head.weight")]);
    std::fs::rename(dir.path().join("model.safetensors"), dir.path().join("a.safetensors")).unwrap();
    // An index may list both names.
    let placed: serde_json::Map<_, _> = tensors().into_iter().map(|(name, _)| (name, json!("a.safetensors"))).collect();
    let index = json!({"weight_map": placed}).to_string();
    std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.parameters() as usize + 48, model_tensors().iter().map(|t| t.2.len()).sum::<usize>());
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let dir = tempdir().unwrap();
    let mut tensors = model_tensors();
    tensors.retain(|(name, ..)| !name.contains("layers.1.mlp.up_proj"));
    tensors[1] = ("model.norm.weight".into(), vec![7], vec![1.0; 7]);
    tensors.push(("model.layers.0.self_attn.q_proj.bias".into(), vec![8], vec![0.0; 8]));
    tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq".into(), vec![2], vec![0.0; 2]));
    tensors.push(("unrelated".into(), vec![2], vec![0.0; 2]));
    write_folder(dir.path(), &config_json(), &tensors);
    let message = complaint(dir.path());
    assert!(message.contains("1 missing: model.layers.1.mlp.up_proj.weight;"), "{message}");
    assert!(message.contains("1 surplus: model.layers.0.self_attn.q_proj.bias;"), "{message}");
    assert!(message.contains("1 wrong: model.norm.weight is [7], wanted [8]"), "{message}");
}

#[test]
fn configurations_that_cannot_run_are_refused_by_key() {
    let dir = tempdir().unwrap();
    let cases = [
        ("model_type", json!("gemma")),
        ("hidden_act", json!("gelu")),
        ("attention_bias", json!("yes")),
        ("hidden_size", json!(-8)),
        ("hidden_size", json!("8")),
        ("num_attention_heads", json!(0)),
        ("num_attention_heads", json!(3)),
        ("num_key_value_heads", json!(3)),
        ("head_dim", json!(3)),
        ("num_hidden_layers", json!(1u64 << 60)),
        ("rms_norm_eps", json!("small")),
        ("rope_theta", json!(0.0)),
        ("rope_scaling", json!({"rope_type": "su", "factor": 2.0})),
        ("rope_scaling", json!({"rope_type": "yarn", "factor": 0.0})),
        ("rope_scaling", json!({"rope_type": "longrope", "short_factor": [1.0]})),
        ("rope_scaling", json!({"rope_type": "llama3", "factor": 2.0})),
        ("partial_rotary_factor", json!(0.5)),
        ("rope_parameters", json!({"rope_type": "default", "partial_rotary_factor": 0.5})),
        ("eos_token_id", json!("</s>")),
    ];
    for (key, bad) in cases {
        let mut config = config_json();
        config[key] = bad.clone();
        write_folder(dir.path(), &config, &model_tensors());
        let message = complaint(dir.path());
        assert!(message.contains("config.json") && message.contains("wanted"), "{key} {bad}: {message}");
    }
}

#[test]
fn rope_of_llama_3() {
    let scaling = Llama3Scaling { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
    let rope = Rope { theta: 500_000.0, scaling: RopeScaling::Llama3(scaling) };
    let frequencies = rope.inverse_frequencies(128);
    // transformers 5.23, LLaMA-3.1-8B's configuration: pairs 0, 16, 28, 29, 30, 32, 34, 35, 40, 63.
    let want: [(usize, f64); 10] = [
        (0, 1.0),
        (16, 0.03760603070259094),
        (28, 0.0032114461064338684),
        (29, 0.0021665706299245358),
        (30, 0.0013718936825171113),
        (32, 0.0005248460220173001),
        (34, 0.0001785077911335975),
        (35, 9.556212171446532e-05),
        (40, 3.428102354519069e-05),
        (63, 3.068925877869333e-07),
    ];
    for (pair, want) in want {
        let got = f64::from(frequencies[pair]);
        assert!((got - want).abs() <= 1e-6 * want, "pair {pair}: {got}, wanted {want}");
    }
}

#[test]
fn rope_scalings_are_read() {
    let dir = tempdir().unwrap();
    let read = |changes: serde_json::Value| {
        let mut config = config_json();
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        Config::open(dir.path()).unwrap().rope
    };
    let linear = read(json!({"rope_scaling": {"type": "linear", "factor": 4.0}}));
    assert_eq!(linear.inverse_frequencies(4), [0.25, 0.0025]);
    let new_style = read(json!({"rope_theta": null, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}));
    assert_eq!(new_style.inverse_frequencies(4), [1.0, 0.1]);
    // Of two, the one that transformers takes.
    let theta = |changes| read(changes).theta;
    assert_eq!(
        theta(json!({"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}})),
        100.0
    );
    assert_eq!(
        theta(json!({"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 9.0}})),
        9.0
    );
    let linear = json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0});
    let both = read(json!({"rope_theta": 7.0, "rope_scaling": {}, "rope_parameters": linear.clone()}));
    assert_eq!(both.inverse_frequencies(4), [0.5, 0.05]);
    let both = read(json!({"rope_theta": 7.0, "rope_scaling": {"type": "default"}, "rope_parameters": linear}));
    assert_eq!((both.theta, both.scaling), (7.0, RopeScaling::None));
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    let RopeScaling::Llama3(scaling) =
        read(json!({"original_max_position_embeddings": 32, "rope_scaling": llama3})).scaling
    else {
        panic!()
    };
    assert_eq!(scaling.original_context, 32);
    let yarn = |changes: serde_json::Value| {
        let mut scaling = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32});
        scaling.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let rope = read(json!({"rope_scaling": scaling}));
        let RopeScaling::Yarn(yarn) = rope.scaling else { panic!() };
        yarn
    };
    let usual = Yarn {
        factor: 4.0,
        original_context: 32,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
        attention_factor: 1.138_629_4,
    };
    assert_eq!(yarn(json!({})), usual);
    assert_eq!(yarn(json!({"beta_slow": 0, "mscale": 0, "mscale_all_dim": 2})), usual, "0 is not given");
    assert_eq!(yarn(json!({"attention_factor": 0.5, "mscale": 1, "mscale_all_dim": 2})).attention_factor, 0.5);
    let weighed = yarn(json!({"mscale": 1, "mscale_all_dim": 2})).attention_factor;
    assert!((weighed - 1.138_629_4 / 1.277_258_9).abs() < 1e-6, "{weighed}");
    // The model's context, 64, over the original one.
    assert_eq!(yarn(json!({"factor": null})).factor, 2.0);
    let mut gguf = Gguf::model();
    gguf.tensor("rope_freqs.weight", &[2], &[1.0, 8.0]);
    let file = dir.path().join("m.gguf");
    std::fs::write(&file, gguf.bytes()).unwrap();
    let factors = Checkpoint::open(&file).unwrap().config().rope.inverse_frequencies(4);
    assert_eq!(factors, [1.0, 0.01 / 8.0]);
    // As llama.cpp reads YaRN.
    let mut gguf = Gguf::model();
    gguf.string("llama.rope.scaling.type", "yarn");
    gguf.f32("llama.rope.scaling.factor", 4.0);
    gguf.u32("llama.rope.scaling.original_context_length", 32);
    let read = |gguf: &Gguf| Checkpoint::from_gguf(gguf.bytes()).unwrap().config().rope.scaling.clone();
    assert_eq!(read(&gguf), RopeScaling::Yarn(usual));
    gguf.f32("llama.rope.scaling.attn_factor", 0.5);
    assert_eq!(read(&gguf), RopeScaling::Yarn(Yarn { attention_factor: usual.attention_factor / 2.0, ..usual }));
    gguf.string("llama.rope.scaling.type", "linear");
    gguf.f32("llama.rope.scaling.attn_factor", 0.7);
    let said = Checkpoint::from_gguf(gguf.bytes()).err().unwrap().to_string();
    assert!(said.contains("llama.rope.scaling.attn_factor is 0.7, wanted 1 without YaRN"), "{said}");
}

/// Beyond the context these scalings turn all tokens in another way, as far as the sequence is long: that isn't computed.
#[test]
fn scalings_that_depend_on_the_length_end_with_the_context() {
    let dir = tempdir().unwrap();
    let model = |scaling: serde_json::Value| {
        let mut config = config_json();
        config["rope_scaling"] = scaling;
        write_folder(dir.path(), &config, &model_tensors());
        let cpu = Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap();
        Model::load(cpu, &Checkpoint::open(dir.path()).unwrap()).unwrap()
    };
    let dynamic = model(json!({"type": "dynamic", "factor": 2.0}));
    let (factors, original) = ([2.0, 4.0], "original_max_position_embeddings");
    let long = model(json!({"type": "longrope", "short_factor": factors, "long_factor": [9, 9], original: 16}));
    // The square root of 1 + ln 4 / ln 16, of a context of 64.
    assert_eq!(long.config().rope.attention_factor(), 1.5f32.sqrt());
    assert_eq!(long.config().rope.inverse_frequencies(4), [0.5, 0.0025]);
    for (model, context, name) in [(dynamic, 64, "dynamic"), (long, 16, "longrope")] {
        assert_eq!(model.config().context, context);
        let mut evaluator = Evaluator::new(&model, None, 80).unwrap();
        assert!(evaluator.logits(&Sequence::prompt(&vec![1; context])).is_ok());
        let error = evaluator.logits(&Sequence::prompt(&vec![1; context + 1])).unwrap_err().to_string();
        let wanted = format!("a sequence of {} tokens: expected at most {context} ", context + 1);
        assert!(error.starts_with(&wanted) && error.contains(name), "{error}");
        let mut generator = Generator::new(&model, None, 80).unwrap();
        generator.feed(&vec![1; context]).unwrap();
        assert!(generator.feed(&[1]).unwrap_err().to_string().starts_with(&wanted));
    }
}

#[test]
fn fingerprints_tell_weights_and_shapes_apart() {
    let dir = tempdir().unwrap();
    let print = |config: &serde_json::Value, tensors: &[_]| {
        write_folder(dir.path(), config, tensors);
        Checkpoint::open(dir.path()).unwrap().fingerprint()
    };
    let (config, tensors) = (config_json(), model_tensors());
    let own = print(&config, &tensors);
    assert_eq!(own, print(&config, &tensors));
    for t in 0..tensors.len() {
        let mut other = tensors.clone();
        other[t].2.iter_mut().for_each(|x| *x += 0.5);
        assert_ne!(own, print(&config, &other), "{}", tensors[t].0);
    }
    let mut other = config.clone();
    other["rope_theta"] = 10001.0.into();
    assert_ne!(own, print(&other, &tensors));
}

#[test]
fn end_tokens_are_those_for_generation_where_it_names_some() {
    let dir = tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config_json().to_string()).unwrap();
    let eos = || Config::open(dir.path()).unwrap().eos;
    assert_eq!(eos(), [1]);
    for (text, wanted) in [
        (r#"{"eos_token_id": [5, 4, 5]}"#, &[5, 4][..]),
        (r#"{"eos_token_id": 3}"#, &[3]),
        (r#"{"eos_token_id": null}"#, &[1]),
        (r#"{"temperature": 0.6}"#, &[1]),
    ] {
        std::fs::write(dir.path().join("generation_config.json"), text).unwrap();
        assert_eq!(eos(), wanted, "{text}");
    }
}

/// transformers' defaults, which are LLaMA's and Mistral's; null is no token.
#[test]
fn tokens_that_config_json_leaves_out_are_those_of_transformers() {
    let dir = tempdir().unwrap();
    let ends = |family: &str, keys: &[(&str, serde_json::Value)]| {
        let mut config = config_json();
        config["model_type"] = family.into();
        config.as_object_mut().unwrap().retain(|key, _| key != "bos_token_id" && key != "eos_token_id");
        keys.iter().for_each(|(key, value)| config[*key] = value.clone());
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let config = Config::open(dir.path()).unwrap();
        (config.bos, config.eos)
    };
    for family in ["llama", "mistral", "ministral"] {
        assert_eq!(ends(family, &[]), (Some(1), vec![2]));
        let null = serde_json::Value::Null;
        assert_eq!(ends(family, &[("bos_token_id", null.clone()), ("eos_token_id", null)]), (None, vec![]));
        assert_eq!(ends(family, &[("bos_token_id", 5.into())]), (Some(5), vec![2]));
        assert_eq!(ends(family, &[("eos_token_id", json!([6, 7]))]), (Some(1), vec![6, 7]));
    }
    for family in ["qwen2", "qwen3"] {
        assert_eq!(ends(family, &[]), (None, vec![]));
    }
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": 4}"#).unwrap();
    assert_eq!(ends("llama", &[]), (Some(1), vec![4]));
}
