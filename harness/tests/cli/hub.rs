//! Data sets and models by name, from a server on this machine that answers as the Hugging Face hub does.

mod hub_server;

use super::support::{Scratch, command, golden};
use hub_server::Hub;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

/// `hydra` beside a hub, with the cache in the scratch folder and nothing else of the environment's.
fn client(hub: &Hub, scratch: &Scratch, line: &str) -> Command {
    let mut command = command(line);
    for name in [
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    ] {
        command.env_remove(name);
    }
    command.env("HF_ENDPOINT", &hub.endpoint).env("HF_HOME", scratch.path("cache")).current_dir(scratch.path(""));
    command
}

#[track_caller]
fn says(output: Output) -> String {
    let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert!(output.status.success(), "{err}");
    out + &err
}

#[track_caller]
fn fails(output: Output, wanted: &[&str]) {
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && said.lines().count() == 1, "{said}");
    wanted.iter().for_each(|word| assert!(said.contains(word), "{word:?} in {said}"));
}

/// So many records.
fn records(count: usize) -> String {
    (0..count).map(|i| format!("{{\"prompt\": \"What is {i}?\", \"completion\": \"{i}\"}}\n")).collect()
}

/// What `data` counts in `name`.
fn count(hub: &Hub, scratch: &Scratch, name: &str) -> Command {
    client(hub, scratch, &format!("data {name} --model {}", golden("hydra").join("model").display()))
}

#[test]
fn a_data_set_and_a_model_by_name() {
    let scratch = Scratch::new("hub");
    let lines = fs::read_to_string(golden("hydra").join("data.jsonl")).unwrap();
    let parts: Vec<String> = lines.lines().map(|line| line.to_string() + "\n").collect();
    let hub = Hub::new();
    let put = |repository: &str, name: &str, bytes: &[u8]| hub.put(repository, name, bytes);
    put("datasets/o/split", "README.md", b"# Records");
    put("datasets/o/split", "data/train-00001-of-00002.jsonl", parts[3..].concat().as_bytes());
    put("datasets/o/split", "data/train-00000-of-00002.jsonl", parts[..3].concat().as_bytes());
    put("datasets/o/split", "data/test-00000-of-00001.jsonl", parts[0].as_bytes());
    let mmlu = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/parquet/mmlu");
    put("datasets/cais/mmlu", "all/test-00000-of-00001.parquet", &fs::read(mmlu).unwrap());
    for config in ["x", "y"] {
        put("datasets/o/configs", &format!("{config}/train.jsonl"), parts[0].as_bytes());
    }
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        put("o/model", name, &fs::read(golden("hydra").join("model").join(name)).unwrap());
    }
    let run = |line: &str| client(&hub, &scratch, line).output().unwrap();
    let fails = |line: &str, wanted: &[&str]| fails(run(line), wanted);
    let model = golden("hydra").join("model").display().to_string();
    let adapter = |model: &str, data: &str, out: &str| {
        let output = run(&format!("finetune --model {model} --data {data} --steps 2 --batch 2 --out {out}"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        fs::read(scratch.path(&format!("{out}/adapter_model.safetensors"))).unwrap()
    };
    let local = scratch.write("data.jsonl", &lines);
    let expected = adapter(&model, &local, "local");
    assert!(adapter("o/model", "o/split", "hub") == expected);
    // run.json names the files in the cache, by the revision that they are of.
    let manifest = super::support::json(&scratch.path("hub/run.json"));
    assert!(manifest["options"]["data"][1]["path"].as_str().unwrap().contains(&hub.state().commit));
    let again = run("finetune --config hub/run.json --out again");
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    assert!(fs::read(scratch.path("again/adapter_model.safetensors")).unwrap() == expected);
    let shown = run(&format!("data o/split:test o/configs:y/train --model {model}"));
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("test-00000-of-00001.jsonl") && shown.contains("y/train.jsonl"), "{shown}");

    let mmlu = run(&format!("eval mmlu --model {model} --data cais/mmlu"));
    assert!(String::from_utf8(mmlu.stdout).unwrap().contains("anatomy"));
    fails(
        &format!("eval mmlu --model {model} --data cais/mmlu --shots 1"),
        &["expected one of the splits test, found dev"],
    );

    let eval = |data: &str| format!("eval loss --model {model} --data {data}");
    assert!(run(&eval("o/split:test")).status.success());
    fails(&eval("o/split:other"), &["o/split: expected one of the splits test, train, found other"]);
    fails(&eval("o/split"), &["o/split: expected a split of one file, found 2"]);
    fails(&eval("o/configs"), &["o/configs: several configurations: give one as o/configs:CONFIG/SPLIT", "x, y"]);
    fails(
        &eval("o/model"),
        &["o/model: no such file here, and the Hugging Face hub doesn't give one", "404, Repository not found"],
    );
    fails(&eval("o/train.jsonl"), &["o/train.jsonl: No such file"]);
}

#[test]
fn all_files_are_of_one_commit() {
    let (hub, scratch) = (Hub::new(), Scratch::new("hub-commit"));
    let put = |train: usize| {
        hub.put("datasets/o/n", "train.jsonl", records(train));
        hub.put("datasets/o/n", "test.jsonl", records(train));
    };
    put(2);
    let first = hub.state().commit.clone();
    says(count(&hub, &scratch, "o/n").output().unwrap());
    put(3);
    hub.state().commit = "f".repeat(40);
    let said = says(count(&hub, &scratch, "o/n o/n:test").output().unwrap());
    assert!(!said.contains(&first) && said.contains(&format!("{}/train.jsonl", "f".repeat(40))), "{said}");
    assert_eq!(hub.asked().iter().filter(|asked| asked.contains("api/")).count(), 2, "once in a process");
    // The first commit is still in the cache, and so are its files.
    says(count(&hub, &scratch, &format!("o/n@{first}")).env("HF_HUB_OFFLINE", "1").output().unwrap());
    let pinned = count(&hub, &scratch, "o/n@v1").output().unwrap();
    assert!(says(pinned).contains("train.jsonl") && hub.asked()[0].ends_with("datasets/o/n/revision/v1"));
}

#[test]
fn without_a_network_the_cache_is_used() {
    let (hub, scratch) = (Hub::new(), Scratch::new("hub-offline"));
    for name in ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test.jsonl"] {
        hub.put("datasets/o/n", name, records(2));
    }
    let offline = |name: &str| count(&hub, &scratch, name).env("HF_HUB_OFFLINE", "1").output().unwrap();
    fails(
        offline("o/n"),
        &["o/n: no such file here or in the hub's cache, and HF_HUB_OFFLINE is set", "copy the data set's files"],
    );
    says(count(&hub, &scratch, "o/n:test").output().unwrap());
    hub.asked();
    let said = says(offline("o/n:test"));
    assert!(
        said.contains("warning: o/n: HF_HUB_OFFLINE is set; using commit 0123456789ab in the hub's cache"),
        "{said}"
    );
    // What is not here is not silently left out.
    fails(offline("o/n"), &["o/n: data/train-00000-of-00002.jsonl: not in the hub's cache, and HF_HUB_OFFLINE is set"]);
    assert!(hub.asked().is_empty());
    // As another program leaves it: without the list of a commit's files.
    let shelf = scratch.path("cache/hub/datasets--o--n");
    fs::remove_dir_all(format!("{shelf}/.hydra")).unwrap();
    says(offline("o/n:test"));
    says(count(&hub, &scratch, "o/n").output().unwrap());
    fs::remove_dir_all(format!("{shelf}/.hydra")).unwrap();
    let part = format!("{shelf}/snapshots/{}/data/train-00001-of-00002.jsonl", hub.state().commit);
    fs::remove_file(&part).unwrap();
    fails(offline("o/n"), &["o/n: data/train: expected 2 files, found 1"]);
    for status in ["503 Service Unavailable", "429 Too Many Requests"] {
        hub.state().status = Some(status);
        let said = says(count(&hub, &scratch, "o/n:test").output().unwrap());
        assert!(
            said.contains(&format!("the Hugging Face hub doesn't answer: {}", status.replacen(' ', ", ", 1))),
            "{said}"
        );
    }
    let mut nobody = count(&hub, &scratch, "o/n:test");
    assert!(says(nobody.env("HF_ENDPOINT", "http://127.0.0.1:9").output().unwrap()).contains("doesn't answer"));
}

#[test]
fn a_token_goes_to_the_hub_alone() {
    let (hub, files, scratch) = (Hub::new(), Hub::new(), Scratch::new("hub-token"));
    for server in [&hub, &files] {
        server.put("datasets/o/n", "train.jsonl", records(99));
    }
    hub.state().token = Some("hf_secret");
    hub.state().elsewhere = Some(files.endpoint.clone());
    let run = || count(&hub, &scratch, "o/n");
    fails(run().output().unwrap(), &["401, Unauthorized; if it is private or gated, set HF_TOKEN"]);
    fails(run().env("HF_TOKEN", "hf_other").output().unwrap(), &["401", "the token (HF_TOKEN"]);
    says(run().env("HF_TOKEN", "hf_secret").output().unwrap());
    let asked = files.asked();
    assert!(!asked.is_empty() && asked.iter().all(|asked| !asked.contains("token")), "{asked:?}");
    scratch.write("cache/token", "hf_secret\n");
    says(run().output().unwrap());
}

#[test]
fn downloads_go_on_where_they_were_cut_off() {
    let (hub, scratch) = (Hub::new(), Scratch::new("hub-cut"));
    let text = records(300);
    hub.put("datasets/o/n", "train.jsonl", &text);
    let run = || count(&hub, &scratch, "o/n").output().unwrap();
    // Nothing comes any more.
    hub.state().cut = Some(0);
    fails(run(), &["train.jsonl", "the download ends after 0 bytes", "the next try goes on from there"]);
    hub.state().cut = Some(text.len() / 3);
    says(run());
    let blobs = scratch.path("cache/hub/datasets--o--n/blobs");
    let whole = |left: usize| {
        let names = scratch.names("cache/hub/datasets--o--n/blobs");
        assert_eq!(names.len(), left, "{names:?}");
        assert!(fs::read_to_string(format!("{blobs}/{}", names[0])).unwrap() == text);
        format!("{blobs}/{}", names[0])
    };
    let blob = whole(1);
    hub.state().cut = None;
    // A part of another length or of other bytes, and all of it.
    for (part, damaged) in
        [(text.clone() + "x", false), (text[..9].into(), false), (text.clone(), false), ("x".repeat(9), true)]
    {
        fs::rename(&blob, format!("{blob}.incomplete")).unwrap();
        fs::write(format!("{blob}.incomplete"), &part).unwrap();
        if damaged {
            fails(run(), &["train.jsonl: damaged on its way: expected SHA-256", "try again"]);
        }
        says(run());
        whole(1);
    }
    // A server without ranges.
    hub.state().whole = true;
    fs::remove_file(&blob).unwrap();
    fs::write(format!("{blob}.incomplete"), &text[..9]).unwrap();
    says(run());
    whole(1);
    fs::remove_dir_all(scratch.path("cache")).unwrap();
    hub.state().damaged = true;
    fails(run(), &["damaged on its way"]);
    assert!(scratch.names("cache/hub/datasets--o--n/blobs").is_empty());
}

#[test]
fn processes_share_a_download() {
    let (hub, scratch) = (Hub::new(), Scratch::new("hub-share"));
    hub.put("datasets/o/n", "train.jsonl", records(300));
    hub.state().delay = Duration::from_millis(700);
    let run = || {
        count(&hub, &scratch, "o/n").stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn()
    };
    let both = [run().unwrap(), run().unwrap()].map(|child| says(child.wait_with_output().unwrap()));
    let downloads = hub.asked().iter().filter(|asked| asked.starts_with("GET datasets/")).count();
    assert_eq!(downloads, 1, "{both:?}");
}

#[test]
fn a_list_of_files_without_an_end() {
    let (hub, scratch) = (Hub::new(), Scratch::new("hub-list"));
    for i in 0..65 {
        hub.put("datasets/o/n", &format!("{i}{}", "x".repeat(1 << 20)), "");
    }
    let said = "the Hugging Face hub doesn't answer: expected at most 64 MiB for its list of files, found more";
    fails(count(&hub, &scratch, "o/n").output().unwrap(), &[said]);
}

#[test]
fn names_that_addresses_must_encode() {
    let (hub, scratch) = (Hub::new(), Scratch::new("hub-names"));
    hub.put("datasets/o/n", "ü b/train #1 100%?.jsonl", records(5));
    let said = says(count(&hub, &scratch, "o/n").output().unwrap());
    assert!(said.contains("train #1 100%?.jsonl"), "{said}");
    hub.put("datasets/o/bad", "train\u{7}/../x.jsonl", records(5));
    fails(count(&hub, &scratch, "o/bad").output().unwrap(), &["o/bad: expected Parquet, JSON or CSV files"]);
}

#[test]
fn of_a_model_what_is_read_and_no_more() {
    let (hub, scratch) = (Hub::new(), Scratch::new("hub-model"));
    let model = golden("hydra").join("model");
    let file = |name: &str| fs::read(model.join(name)).unwrap();
    for name in ["config.json", "tokenizer.json"] {
        hub.put("o/m", name, file(name));
    }
    let info = |name: &str| client(&hub, &scratch, &format!("info {name}")).output().unwrap();
    hub.put("o/m", "pytorch_model.bin", "x");
    let bin = &[
        "o/m: expected model.safetensors, model.safetensors.index.json or a GGUF file in it, found",
        "pytorch_model.bin",
    ];
    fails(info("o/m"), bin);
    let weights = file("model.safetensors");
    let (header, _) = weights[8..].split_at(u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize);
    let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(header).unwrap();
    let names =
        header.keys().filter(|name| *name != "__metadata__").map(|name| (name.clone(), "part.safetensors".into()));
    let index = serde_json::json!({"weight_map": serde_json::Map::from_iter(names)});
    hub.put("o/m", "model.safetensors.index.json", index.to_string());
    hub.put("o/m", "part.safetensors", &weights);
    hub.put("o/m", "consolidated.safetensors", &weights);
    hub.put("o/m", "generation_config.json", "{\"eos_token_id\": [1, 2]}");
    let folder = |commit: &str| scratch.names(&format!("cache/hub/models--o--m/snapshots/{commit}"));
    says(info("o/m"));
    let commit = hub.state().commit.clone();
    let read =
        ["config.json", "generation_config.json", "model.safetensors.index.json", "part.safetensors", "tokenizer.json"];
    assert_eq!(folder(&commit), read);

    let gguf = scratch.path("m.gguf");
    let adapter = golden("hydra").join("adapter");
    let export = format!(
        "export --model {} --adapter {} --gate uniform --format gguf --out {gguf}",
        model.display(),
        adapter.display()
    );
    says(client(&hub, &scratch, &export).output().unwrap());
    for name in ["a.gguf", "b/c.gguf"] {
        hub.put("o/g", name, fs::read(&gguf).unwrap());
    }
    fails(info("o/g"), &["o/g: several GGUF files: give one as o/g:FILE: expected one of a.gguf, b/c.gguf"]);
    fails(info("o/g:x.gguf"), &["o/g: expected one of its GGUF files a.gguf, b/c.gguf, found x.gguf"]);
    says(info("o/g:b/c.gguf"));
    // A part of a split file is downloaded with the others; this one says that it is whole.
    for name in ["s-00001-of-00002.gguf", "s-00002-of-00002.gguf"] {
        hub.put("o/s", name, fs::read(&gguf).unwrap());
    }
    says(info("o/s"));
    assert_eq!(scratch.names(&format!("cache/hub/models--o--s/snapshots/{commit}")).len(), 2);
    hub.state().files.retain(|(_, name), _| name != "a.gguf");
    hub.state().commit = "e".repeat(40);
    says(info("o/g"));
}
