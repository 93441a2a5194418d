//! Data sets and models by name, from a server on this machine that answers as the Hugging Face hub does.

use super::support::{Scratch, command, golden};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Output;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Files by repository ("datasets/o/n") and name.
type Files = BTreeMap<(String, String), Vec<u8>>;

/// Serves until the test's process ends; returns the endpoint.
fn serve(files: Files) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            answer(&stream.unwrap(), &files);
        }
    });
    format!("http://{address}")
}

fn answer(mut stream: &TcpStream, files: &Files) {
    let mut lines = BufReader::new(stream).lines().map(|line| line.unwrap());
    let request = lines.next().unwrap();
    let headers: Vec<String> =
        lines.take_while(|line| !line.is_empty()).map(|line| line.to_ascii_lowercase()).collect();
    let path = request.split(' ').nth(1).unwrap().trim_start_matches('/').to_string();
    let (status, more, body) = match path.strip_prefix("api/") {
        Some(asked) => listing(asked, files),
        None => file(&path, headers.iter().find_map(|line| line.strip_prefix("range: bytes=")), files),
    };
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{more}\r\n");
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body)).unwrap();
}

type Answer = (&'static str, String, Vec<u8>);

fn listing(asked: &str, files: &Files) -> Answer {
    let asked = asked.strip_suffix("/revision/main").unwrap();
    // Models have no prefix where their files are.
    let repository = asked.strip_prefix("models/").unwrap_or(asked);
    let names: Vec<_> = files.keys().filter(|(own, _)| own == repository).map(|(_, name)| name).collect();
    if names.is_empty() {
        return ("404 Not Found", String::new(), Vec::new());
    }
    let siblings: Vec<_> = names.into_iter().map(|name| serde_json::json!({"rfilename": name})).collect();
    let info = serde_json::json!({"sha": COMMIT, "siblings": siblings});
    ("200 OK", "Content-Type: application/json\r\n".into(), info.to_string().into_bytes())
}

fn file(path: &str, range: Option<&str>, files: &Files) -> Answer {
    let found = path.split_once("/resolve/main/").and_then(|(own, name)| files.get(&(own.into(), name.into())));
    let Some(bytes) = found else { return ("404 Not Found", String::new(), Vec::new()) };
    let (first, last) = range.and_then(|range| range.split_once('-')).unwrap_or(("0", ""));
    let first: usize = first.parse().unwrap();
    let end = last.parse().map_or(bytes.len(), |last: usize| last + 1);
    let more = format!(
        "ETag: \"{:x}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {first}-{}/{}\r\n",
        path.bytes().fold(7u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into())),
        end - 1,
        bytes.len()
    );
    ("206 Partial Content", more, bytes[first..end].to_vec())
}

#[test]
fn a_data_set_and_a_model_by_name() {
    let scratch = Scratch::new("hub");
    let lines = fs::read_to_string(golden("hydra").join("data.jsonl")).unwrap();
    let parts: Vec<String> = lines.lines().map(|line| line.to_string() + "\n").collect();
    let mut files = Files::new();
    let mut put = |repository: &str, name: &str, bytes: &[u8]| {
        files.insert((repository.into(), name.into()), bytes.to_vec());
    };
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
    let endpoint = serve(files);
    let run = |line: &str| -> Output {
        let mut command = command(line);
        command.env("HF_ENDPOINT", &endpoint).env("HF_HOME", scratch.path("cache")).current_dir(scratch.path(""));
        command.output().unwrap()
    };
    let fails = |line: &str, wanted: &[&str]| {
        let output = run(line);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && said.lines().count() == 1, "{said}");
        wanted.iter().for_each(|word| assert!(said.contains(word), "{word:?} in {said}"));
    };
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
    assert!(manifest["options"]["data"][1]["path"].as_str().unwrap().contains(COMMIT));
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
    fails(&eval("o/model"), &["o/model: no such file here, and the Hugging Face hub doesn't answer", "404"]);
    fails(&eval("o/train.jsonl"), &["o/train.jsonl: No such file"]);
}
