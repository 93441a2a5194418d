//! Whatever is wrong: one line on stderr, exit code 1 or 2, nothing written over.

use super::support::{Scratch, assets, command, fails, finetune, golden, hydra, json, succeeds};
use std::fs;

#[test]
fn usage() {
    fails(2, "finetune --model m --out o", &["--data"]);
    fails(2, "finetune --model m --data d --out o --batch 0", &["--batch", "from 1"]);
    fails(2, "finetune --model m --data d --out o --lr nan", &["--lr"]);
    fails(2, "finetune --model m --data d --out o --steps 1 --epochs 2", &["--epochs"]);
    fails(2, "eval mmlu --model m --data d --scoring guess", &["letter", "cloze"]);
    fails(2, "finetune --model m --data d --out o --lr -1", &["--lr", "from 0"]);
    fails(2, "finetune --model m --data d --out o --lr 1e39", &["--lr", "f32"]);
    fails(2, "finetune --model m --data d --out o --rank -1", &["--rank", "from 1"]);
    fails(2, "eval mmlu --model m --data d --shots -1", &["--shots", "a whole number from 0"]);
    fails(1, "generate --model m --prompt p --temperature -1", &["temperature -1"]);
    fails(2, "finetune --model m --data d --out o --top-k 0", &["--top-k", "from 1"]);
    fails(2, "finetune --model m --data d --out o --router-lr nan", &["--router-lr"]);
    fails(2, "finetune --model m --data d --out o --head-init zeros", &["zero, random"]);
    fails(2, "analyze a --out o --seed -1", &["--seed <SEED>", "from 0 to"]);
    for (wrong, expected) in [
        ("--targets q,z", "expected all, or some of q, k, v, o, gate, up, down, found \"z\""),
        ("--head-dropout nan", "a number from 0"),
        ("--router-temperature inf", "a number from 0"),
        ("--load-balance -1", "a number from 0"),
        ("--threads 2000", "--threads 2000: expected a whole number from 1 to 1024"),
        ("--eval-every 1", "--eval-every needs --eval-data"),
        ("--learning-rate 1", "unexpected argument '--learning-rate' found; tip: a similar argument exists: '--lr'"),
    ] {
        fails(2, &finetune("hydra", "o", wrong), &[wrong.split(' ').next().unwrap(), expected]);
    }
    let output = command("info").arg("").output().unwrap();
    assert_eq!(output.status.code(), Some(2), "an empty name: {}", String::from_utf8_lossy(&output.stderr));
    fails(2, "train", &["train"]);
}

/// Names go into files of JSON, which can't hold them.
#[cfg(unix)]
#[test]
fn names_that_are_not_text() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let output =
        command(&finetune("hydra", "o", "--eval-data")).arg(OsStr::from_bytes(b"d\xff.jsonl")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), said.lines().count()), (Some(2), 1), "{said}");
    assert!(said.contains(r"d\xFF.jsonl") && said.contains("UTF-8"), "{said}");
}

#[test]
fn records() {
    let scratch = Scratch::new("records");
    let model = golden("hydra").join("model");
    let out = scratch.path("run");
    let try_data = |text: &str, wanted: &[&str]| {
        let data = scratch.write("d.jsonl", text);
        fails(1, &format!("finetune --model {} --data {data} --out {out}", model.display()), wanted);
        assert!(!fs::exists(&out).unwrap(), "nothing is written for bad data");
    };
    let good = r#"{"instruction":"i","response":"r","category":"k"}"#;
    try_data("", &["d.jsonl", "no records"]);
    try_data("\n \n", &["no records"]);
    try_data(
        &format!("{good}\n{{\"instruction\": \"x\"\n"),
        &["d.jsonl:2: invalid JSON at column 19", "each line must be one JSON object"],
    );
    try_data(&format!("{good}\n\n[1]\n"), &["d.jsonl:3: expected a JSON object, found a list"]);
    try_data(r#"{"instruction":"i"}"#, &["d.jsonl:1", "response"]);
    try_data(r#"{"instruction":1,"response":"r"}"#, &["d.jsonl:1: \"instruction\": expected a string, found a number"]);
    try_data("\u{0}\u{1}", &["d.jsonl:1"]);
    let data = scratch.write("d.jsonl", good);
    let long = format!("finetune --model {} --data {data} --out {out}", model.display());
    fails(1, &format!("{long} --seq-len 1"), &["d.jsonl: --seq-len 1 cuts off every answer; raise it"]);
    fails(1, &format!("{long} --seq-len 100000"), &["--seq-len", "256"]);
    fails(1, &format!("{long} --data {}", scratch.path("absent.jsonl")), &["absent.jsonl"]);
}

#[test]
fn options_that_do_not_go_together() {
    let scratch = Scratch::new("options");
    let out = scratch.path("run");
    let try_options = |options: &str, wanted: &[&str]| {
        fails(1, &finetune("hydra", &out, options), wanted);
        assert!(!fs::exists(&out).unwrap());
    };
    try_options("--rank 18446744073709551615", &["rank 18446744073709551615: expected 1 to"]);
    try_options("--heads 18446744073709551615", &["18446744073709551615 heads: expected 1 to"]);
    try_options("--method lora --heads 2", &["--method lora has one head: leave --heads 2 out"]);
    try_options("--method lora --gate router", &["--method lora takes no --gate"]);
    try_options("--method split --heads 2", &["expected 6 heads, found 2"]);
    try_options("--dropout 1.5", &["dropout"]);
    try_options("--head-dropout 1", &["head dropout 1", "less than 1"]);
    try_options("--router-temperature 0", &["router temperature 0: expected a number above 0"]);
    try_options("--router-temperature 2 --gate uniform", &["router temperature", "gate is uniform"]);
    try_options("--top-k 5", &["top-k 5: expected 1 to 4"]);
    try_options("--top-k 1 --method lora", &["top-k", "gate is one"]);
    try_options("--load-balance 0.1 --method split", &["load balance", "gate is label"]);
    try_options("--router-lr 1e-3 --method lora", &["--router-lr", "gate is one"]);
    try_options("--head-init random --method lora", &["head init random", "one head"]);
    try_options("--head-init random --gate label", &["head init random", "gate label"]);
    try_options("--head-init random --top-k 2", &["head init random", "top-k"]);
    let given = golden("hydra").join("adapter");
    try_options(&format!("--init-adapter {} --router-temperature 2", given.display()), &["--router-temperature"]);
    try_options(&format!("--init-adapter {} --top-k 1", given.display()), &["--top-k"]);
    try_options(&format!("--init-adapter {} --head-init random", given.display()), &["--head-init"]);
    try_options(&format!("--init-adapter {} --head-dropout 2", given.display()), &["head dropout 2"]);
    try_options("--device gpu", &["--device: expected cpu, cuda:N or cuda:auto, found \"gpu\""]);
    try_options("--device cuda:0 --precision f32", &["--device cuda:0", "bf16"]);
    try_options("--device cuda:0 --threads 2", &["--device cuda:0", "--threads"]);
    try_options("--template chat", &["no chat template"]);
    try_options("--template absent.jinja", &["absent.jinja"]);
    try_options("--epochs 0", &["--epochs"]);
    try_options("--resume", &["no run"]);
    try_options(&format!("--init-adapter {} --rank 7", golden("hydra").join("adapter").display()), &["--rank"]);
    try_options(&format!("--init-adapter {}", scratch.path("none")), &["none"]);
    let template = scratch.write("t.jinja", "{{ question }}");
    try_options(&format!("--template {template}"), &["t.jinja"]);
    let template = scratch.write("u.jinja", "{% if instruction %}{{ answer }}{% endif %}");
    try_options(&format!("--template {template}"), &["the template in line 1", "data.jsonl:1"]);
}

#[test]
fn models_and_adapters() {
    let scratch = Scratch::new("models");
    let data = golden("hydra").join("data.jsonl");
    let data = data.display();
    fails(
        1,
        &format!("eval loss --model {} --data {data}", scratch.path("absent")),
        &["absent: no such model: expected"],
    );
    let empty = scratch.path("empty");
    fs::create_dir(&empty).unwrap();
    fails(1, &format!("eval loss --model {empty} --data {data}"), &["config.json"]);
    let gguf = scratch.write("bad.gguf", b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff");
    fails(1, &format!("info {gguf}"), &["bad.gguf"]);

    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let bytes = fs::read(golden("hydra").join("model").join(name)).unwrap();
        scratch.write(
            &format!("cut/{name}"),
            if name == "model.safetensors" { &bytes[..bytes.len() / 2] } else { &bytes },
        );
    }
    let cut = scratch.path("cut");
    fails(1, &format!("generate --model {cut} --prompt x"), &["model.safetensors"]);
    let tokenizer = fs::read_to_string(golden("hydra").join("model/tokenizer.json")).unwrap();
    let more = r#""added_tokens": [{"id": 9999, "content": "more", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": false},"#;
    let tokenizer =
        tokenizer.replace("\"vocab\": {", "\"vocab\": {\"more\": 9999,").replace("\"added_tokens\": [", more);
    let tokenizer = scratch.write("cut/tokenizer.json", tokenizer);
    fs::copy(golden("hydra").join("model/model.safetensors"), format!("{cut}/model.safetensors")).unwrap();
    succeeds(&format!("generate --model {cut} --prompt x --max-tokens 1"));
    fails(1, &format!("generate --model {cut} --prompt more"), &["token 9999, \"more\"", "512 rows"]);
    fs::copy(golden("hydra").join("model/tokenizer.json"), &tokenizer).unwrap();
    scratch.write("cut/chat_template.jinja", "{{ raise_exception('no') }}");
    fails(1, &format!("generate --model {cut} --prompt x --template chat"), &["the chat template", "no"]);
    let adapter = scratch.path("adapter");
    fs::create_dir(&adapter).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(golden("lora").join("adapter").join(name), format!("{adapter}/{name}")).unwrap();
    }
    let config = fs::read_to_string(format!("{adapter}/adapter_config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["r"] = 99.into();
    scratch.write("adapter/adapter_config.json", config.to_string());
    let model = golden("lora").join("model");
    fails(
        1,
        &format!("eval loss --model {} --adapter {adapter} --data {data}", model.display()),
        &["lora_A", "wanted"],
    );
}

#[test]
fn places_that_cannot_be_written() {
    let scratch = Scratch::new("places");
    let kept = scratch.write("kept/file.txt", "mine");
    fails(1, &finetune("hydra", &scratch.path("kept"), ""), &["kept holds files but no run: give another folder"]);
    fails(1, &finetune("hydra", &kept, ""), &["file.txt"]);
    assert_eq!(fs::read_to_string(&kept).unwrap(), "mine");
    fails(1, &format!("demo --out {}", scratch.path("kept")), &["files that no demo wrote"]);
    assert_eq!(fs::read_dir(scratch.path("kept")).unwrap().count(), 1);
    let case = golden("hydra");
    let (model, data) = (case.join("model"), case.join("data.jsonl"));
    let loss = format!("eval loss --model {} --data {}", model.display(), data.display());
    fails(1, &format!("{loss} --json {kept}/x.json"), &["x.json"]);
    // Before the work: there is no such model.
    let mmlu = format!("eval mmlu --model absent --data {}", assets("mmlu"));
    fails(1, &format!("{mmlu} --json {kept} --predictions {kept}"), &["--json and --predictions are both", "file.txt"]);
    if cfg!(target_os = "linux") {
        fails(1, &format!("{mmlu} --predictions /proc/x.jsonl"), &["can't write: /proc/x.jsonl"]);
    }
    // What is read is not written over.
    let (own, records) = (scratch.path("own"), scratch.write("d.jsonl", fs::read(&data).unwrap()));
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        scratch.write(&format!("own/{file}"), fs::read(model.join(file)).unwrap());
    }
    let loss = format!("eval loss --model {own} --data {records}");
    for file in ["d.jsonl", "own/config.json", "own/model.safetensors"] {
        let (path, before) = (scratch.path(file), fs::read(scratch.path(file)).unwrap());
        fails(1, &format!("{loss} --json {path}"), &["--json", file, "this file is read"]);
        assert!(fs::read(path).unwrap() == before, "{file}");
    }
    let show = format!("data {records} --model {own} --json {records}");
    fails(1, &show, &["--json", "d.jsonl", "this file is read"]);
    let result = scratch.path("own/loss.json");
    succeeds(&format!("{loss} --json {result}"));
    succeeds(&format!("{loss} --json {result}"));
    scratch.write("part/adapter_config.json", "{}");
    fails(1, &format!("info {}", scratch.path("part")), &["part: not an adapter folder: expected adapter_config.json"]);
    let adapter = case.join("adapter");
    fails(1, &format!("info {} --adapter {kept}", adapter.display()), &["file.txt needs a model"]);
    assert_eq!(fs::read_to_string(&kept).unwrap(), "mine");
    assert_eq!(fs::read_dir(scratch.path("kept")).unwrap().count(), 1);
}

#[test]
fn questions() {
    let scratch = Scratch::new("questions");
    let model = golden("hydra").join("model");
    let mmlu = |data: &str, more: &str| format!("eval mmlu --model {} --data {data} {more}", model.display());
    fails(1, &mmlu(&scratch.path("absent"), ""), &["absent", "hydra fetch mmlu"]);
    scratch.write("data/test/x_test.csv", "q,a,b,c,d,A\nq,a,b,c,A\n");
    let data = scratch.path("data");
    fails(1, &mmlu(&data, ""), &["x_test.csv:2: expected 6 fields", "found 5"]);
    scratch.write("data/test/x_test.csv", "q,a,b,c,d,E\n");
    fails(1, &mmlu(&data, ""), &["x_test.csv:1: answer: expected A, B, C or D, found \"E\""]);
    scratch.write("data/test/x_test.csv", "q,a,b,c,d,A\n");
    fails(1, &mmlu(&data, "--shots 1"), &["x_dev.csv"]);
    fails(1, &mmlu(&data, "--subjects y"), &["--subjects: ", "no subject \"y\""]);
    let (one, same) = (scratch.path("o.json"), scratch.path("data/../o.json"));
    fails(1, &mmlu(&data, &format!("--json {one} --predictions {same}")), &["--json and --predictions are both"]);
    scratch.write("data/test/x_test.csv", format!("{},a,b,c,d,A\n", "long ".repeat(300)));
    fails(1, &mmlu(&data, ""), &["x 0: expected at most 256 tokens"]);
}

#[test]
fn a_model_of_values_that_are_not_finite() {
    let scratch = Scratch::new("nan-model");
    let case = golden("hydra");
    for file in ["config.json", "tokenizer.json"] {
        scratch.write(&format!("m/{file}"), fs::read(case.join("model").join(file)).unwrap());
    }
    let mut bytes = fs::read(case.join("model/model.safetensors")).unwrap();
    // The last tensor of the file, a norm or a projection: all of it is used.
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    let model = scratch.write("m/model.safetensors", bytes).replace("/model.safetensors", "");
    let data = case.join("data.jsonl");
    let row = "q,a,b,c,d,A\n";
    scratch.write("mmlu/test/x_test.csv", row);
    fails(1, &format!("generate --model {model} --prompt x"), &[&model, "NaN"]);
    fails(1, &format!("eval loss --model {model} --data {}", data.display()), &["data.jsonl", "NaN"]);
    fails(1, &format!("eval mmlu --model {model} --data {}", scratch.path("mmlu")), &["x 0", "NaN"]);
}

#[test]
fn what_is_refused_makes_no_folder() {
    let scratch = Scratch::new("no-folder");
    let case = golden("hydra");
    let (model, data, out) = (case.join("model"), case.join("data.jsonl"), scratch.path("out"));
    let (model, data) = (model.display().to_string(), data.display().to_string());
    let long = scratch.write("long.jsonl", format!(r#"{{"prompt":"{}","completion":"c"}}"#, "long ".repeat(300)));
    let try_with = |toml: &str, [model, data, held_out]: [&str; 3], more: &str, wanted: &[&str]| {
        let config = scratch.write("c.toml", toml.to_string() + "[[run]]\nname = 'a'\n");
        for command in
            ["compare", "heterogeneity --records 1"].iter().filter(|name| more.is_empty() || !name.contains(' '))
        {
            let files = format!("--data {data} --eval-data {held_out} --config {config} --out {out}");
            fails(1, &format!("{command} --model {model} {files} {more}"), wanted);
            assert!(!fs::exists(&out).unwrap(), "{command}");
        }
    };
    let seeds = "seeds = [1]\n";
    try_with(seeds, ["absent", &data, &data], "", &["absent"]);
    try_with(seeds, [&model, "absent", &data], "", &["absent"]);
    try_with(seeds, [&model, &data, "absent"], "", &["absent"]);
    try_with(
        seeds,
        [&model, &data, &long],
        "",
        &["--eval-data", "long.jsonl: --seq-len 256 cuts off every answer; raise it"],
    );
    try_with(seeds, [&model, &long, &data], "--mmlu absent", &["absent"]);
    try_with(seeds, [&model, &data, &data], "--device gpu", &["--device: expected"]);
    let tune = format!("{seeds}[tune]\nlr = [1e-3]\nvalidation = 0.01\n");
    try_with(&tune, [&model, &data, &data], "--threads 1", &["[tune]: validation 0.01 of 6 records"]);
    let (one, other) = (case.join("adapter"), golden("lora").join("model"));
    let analyze = format!("analyze {} --out {out} --model {} --data {data}", one.display(), other.display());
    assert_eq!(hydra(&analyze).status.code(), Some(1));
    assert!(!fs::exists(&out).unwrap());
}

#[test]
fn an_adapter_beyond_memory() {
    let scratch = Scratch::new("memory");
    let out = scratch.path("run");
    fails(1, &finetune("hydra", &out, "--rank 65536 --heads 4096"), &["rank 65536", "MiB"]);
    fails(1, &finetune("hydra", &out, "--batch 10000000 --steps 1"), &["training needs", "MiB"]);
    assert!(!fs::exists(&out).unwrap());
}

#[test]
fn lines_of_questions() {
    let scratch = Scratch::new("lines");
    let model = golden("hydra").join("model");
    let good = r#"{"split":"test","subject":"s","question":"q","choices":["a","b","c","d"],"answer":"D"}"#;
    let coloured = scratch.write("c.jsonl", good.replace("\"s\"", r#""\u001b[31ms""#));
    fails(1, &format!("eval mmlu --model {} --data {coloured} --shots 1", model.display()), &["for \\u{1b}[31ms"]);
    let data = scratch.write("q.jsonl", format!("\u{feff}{good}\n\n{}\n", good.replace(",\"d\"", "")));
    let eval = format!("eval mmlu --model {} --data ", model.display());
    fails(1, &(eval.clone() + &data), &["q.jsonl:3", "length 3"]);
    scratch.write("c/test/x_test.csv", b"q,a,b,c,d,A\nq,\xff,b,c,d,A\n");
    fails(1, &(eval + &scratch.path("c")), &["x_test.csv:2: expected UTF-8, found byte 0xFF"]);
}

#[cfg(target_os = "linux")]
#[test]
fn stdout_and_stderr_that_are_closed_or_full() {
    use std::fs::File;
    use std::process::Stdio;
    let info = format!("info {}", golden("hydra").join("model").display());
    let full = File::options().write(true).open("/dev/full").unwrap();
    let output = command(&info).stdout(full).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.starts_with("error: can't write to stdout: No space left"), "{said}");
    // What was computed is in its file all the same.
    let scratch = Scratch::new("full");
    let (result, lines) = (scratch.path("result.json"), scratch.path("lines.jsonl"));
    let (model, data) = (golden("hydra").join("model"), golden("hydra").join("data.jsonl"));
    let loss = format!("eval loss --model {} --data {} --json {result}", model.display(), data.display());
    let question = scratch.write("data/test/x_test.csv", "q,a,b,c,d,A\n").replace("/test/x_test.csv", "");
    let mmlu = format!("eval mmlu --model {} --data {question} --json {result} --predictions {lines}", model.display());
    for line in [&loss, &mmlu] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(command(line).stdout(full).status().unwrap().code(), Some(1));
        assert!(fs::read_to_string(&result).unwrap().ends_with("}\n"), "{line}");
        fs::remove_file(&result).unwrap();
    }
    assert_eq!(fs::read_to_string(&lines).unwrap().lines().count(), 1);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = command(&info).stdout(writer).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty());
    // A run outlives whoever reads its log.
    for (n, full) in [false, true].into_iter().enumerate() {
        let gone = || match full {
            true => Stdio::from(File::options().write(true).open("/dev/full").unwrap()),
            false => Stdio::from(std::io::pipe().unwrap().1),
        };
        let out = scratch.path(&format!("run-{n}"));
        let status = command(&finetune("hydra", &out, "--steps 1")).stdout(gone()).stderr(gone()).status().unwrap();
        assert_eq!(status.code(), Some(i32::from(full)));
        assert!(fs::exists(format!("{out}/report.html")).unwrap());
        assert_eq!(command("train").stderr(gone()).status().unwrap().code(), Some(2));
    }
}

#[test]
fn an_adapter_of_another_model() {
    let width = |case: &str| json(&golden(case).join("model/config.json").display().to_string())["hidden_size"].clone();
    let (model, adapter) = (golden("mistral").join("model"), golden("hydra").join("adapter"));
    let data = golden("hydra").join("data.jsonl").display().to_string();
    let line = format!("eval loss --model {} --adapter {} --data {data}", model.display(), adapter.display());
    let wanted = format!("the adapter is for width {}, the model has {}", width("hydra"), width("mistral"));
    fails(1, &line, &[&adapter.display().to_string(), &wanted]);
}

/// The tokenizer of this model puts no BOS token before a text.
#[test]
fn a_prompt_without_tokens() {
    let line = format!("generate --model {} --prompt=", golden("hydra").join("model").display());
    fails(1, &line, &["empty --prompt, and this model has no BOS token to start from"]);
}

/// In a build with the feature `cuda`, on any machine, with a driver or without.
#[test]
fn a_device_that_is_not_there() {
    let model = golden("hydra").join("model");
    let wanted = if cfg!(feature = "cuda") { "cuda:99: " } else { "--features cuda" };
    fails(1, &format!("info {} --device cuda:99", model.display()), &["--device cuda:99: ", wanted]);
}

/// What is allowed, and unlikely to be meant, is said once.
#[test]
fn warnings() {
    let scratch = Scratch::new("warnings");
    let warned = |data: &str, options: &str| -> Vec<String> {
        let model = golden("hydra").join("model");
        let out = tempfile::tempdir_in(scratch.path("")).unwrap();
        let out = out.path().join("run");
        let line =
            format!("finetune --model {} --data {data} --out {} --steps 2 {options}", model.display(), out.display());
        let output = hydra(&line);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        said.lines().filter_map(|line| line.strip_prefix("warning: ")).map(str::to_owned).collect()
    };
    let good = golden("hydra").join("data.jsonl").display().to_string();
    assert!(warned(&good, "").is_empty());
    assert_eq!(warned(&good, "--alpha 0"), ["--alpha 0: the adapter has no effect"]);
    assert_eq!(warned(&good, "--lr 0"), ["--lr 0: nothing is trained"]);
    assert_eq!(warned(&good, "--lr 0 --router-lr 1e-3"), ["--lr 0: only the routers are trained"]);
    let long = "--warmup 3 is longer than the run of 2 steps: the learning rate never reaches --lr";
    assert_eq!(warned(&good, "--warmup 3"), [long]);
    assert!(warned(&good, "--warmup 2").is_empty());
    let record = r#"{"prompt":"a b","completion":"c d"}"#;
    let twice = record.replace("\"completion\"", "\"completion\":\"\",\"completion\"");
    let control = record.replace("\"prompt\"", "\"k\\u001b\":1,\"k\\u001b\":2,\"prompt\"");
    let empty = record.replace("c d", "");
    let data = scratch.write("d.jsonl", [record, &control, &twice, &empty, &empty, record].join("\n"));
    let expected = [
        format!("{data}: 2 of 6 records have a key twice (first k\\u{{1b}} in line 2); the last one counts"),
        format!("{data}: 2 of 6 records have an empty response (first in line 4)"),
    ];
    assert_eq!(warned(&data, ""), expected);
    // Read once for each run and seed, said once.
    let config =
        scratch.write("c.toml", "seeds = [1, 2]\n[defaults]\nsteps = 1\ntargets = 'q'\nlr = 0\n[[run]]\nname = 'a'\n");
    let (model, out) = (golden("hydra").join("model"), scratch.path("c"));
    let files = format!("--data {data} --eval-data {data} --config {config} --out {out}");
    let output = hydra(&format!("compare --model {} {files}", model.display()));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert_eq!(said.matches("warning: ").count(), 3, "{said}");
}

/// Values from files are quoted at a length that fits a line, whatever is in them.
#[test]
fn quoted_values_are_short_and_without_control_characters() {
    let scratch = Scratch::new("quoted");
    let long = format!("\\u001b[31m{}", "x".repeat(5000));
    let model = golden("hydra").join("model").display().to_string();
    let data = golden("hydra").join("data.jsonl").display().to_string();
    let short = |line: &str, named: &str| {
        let said = String::from_utf8(hydra(line).stderr).unwrap();
        assert!(said.contains(named) && !said.contains('\u{1b}') && said.contains('…'), "{said}");
        assert!(said.len() < 500 + 2 * scratch.path("").len() + data.len(), "{said}");
    };
    let question =
        format!(r#"{{"split":"{long}","subject":"s","question":"q","choices":["a","b","c","d"],"answer":"D"}}"#);
    short(&format!("eval mmlu --model {model} --data {}", scratch.write("q.jsonl", &question)), "q.jsonl:1: split: ");
    let question = question.replacen(&long, "test", 1).replace("\"D\"", &format!("\"{long}\""));
    short(&format!("eval mmlu --model {model} --data {}", scratch.write("q.jsonl", question)), "q.jsonl:1: answer: ");
    scratch.write("q/test/x_test.csv", format!("q,a,b,c,d,{}\n", "y".repeat(5000)));
    short(&format!("eval mmlu --model {model} --data {}", scratch.path("q")), "x_test.csv:1: answer: ");
    for toml in [format!("rank = \"{long}\""), format!("\"{long}\" = 1"), format!("targets = [\"{long}\"]")] {
        let config = scratch.write("c.toml", format!("seeds = [1]\n[[run]]\nname = 'a'\n{toml}\n"));
        let files = format!("--data {data} --eval-data {data} --config {config} --out {}", scratch.path("o"));
        short(&format!("compare --model {model} {files}"), "c.toml:4: run \"a\": ");
    }
    let config = scratch.write("c.toml", format!("seeds = [1]\n[[run]]\nname = \"{long}\"\nrank = 0\n"));
    let files = format!("--data {data} --eval-data {data} --config {config} --out {}", scratch.path("o"));
    short(&format!("compare --model {model} {files}"), "rank: expected");
    let adapter = scratch.path("adapter");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        scratch.write(&format!("adapter/{file}"), fs::read(golden("lora").join("adapter").join(file)).unwrap());
    }
    let config = fs::read_to_string(format!("{adapter}/adapter_config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["method"] = format!("\u{1b}[31m{}", "x".repeat(5000)).into();
    scratch.write("adapter/adapter_config.json", config.to_string());
    short(&format!("eval loss --model {model} --adapter {adapter} --data {data}"), "adapter_config.json: ");
}
