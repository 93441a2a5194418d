//! Fine-tunes: PyTorch's losses, repeated runs, full disks.

use super::support::{Scratch, assets, column, command, fails, finetune, golden, hydra, json, succeeds};
use safetensors::SafeTensors;
use std::fs;
use std::path::Path;

const AS_PYTORCH: &str = "--batch 6 --grad-accum 1 --steps 10 --lr 1e-3 --schedule constant --warmup 0 --clip 0 --dropout 0 \
                          --no-shuffle --precision f32 --template plain";
pub const SHORT: &str = "--targets all --batch 2 --grad-accum 2 --steps 8 --lr 1e-3 --dropout 0.1 --seed 5";

fn golden_tensor(method: &str, name: &str) -> Vec<f32> {
    let bytes = fs::read(golden(method).join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor(name).unwrap();
    tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

#[test]
fn ten_steps_are_those_of_pytorch() {
    for method in ["hydra", "lora", "split"] {
        let scratch = Scratch::new(&format!("golden-{method}"));
        let out = scratch.path("run");
        let adapter = golden(method).join("adapter");
        succeeds(&finetune(method, &out, &format!("--init-adapter {} {AS_PYTORCH}", adapter.display())));
        let losses = column(&format!("{out}/metrics.jsonl"), "loss");
        let want = golden_tensor(method, "trajectory");
        assert_eq!(losses.len(), 10);
        for (got, want) in losses.iter().zip(want) {
            assert!((got - f64::from(want)).abs() < 1e-4, "{method}: {losses:?}");
        }
        let saved = fs::read(format!("{out}/adapter_model.safetensors")).unwrap();
        for (name, view) in SafeTensors::deserialize(&saved).unwrap().iter() {
            let want = golden_tensor(method, &format!("final.{name}"));
            let scale = want.iter().fold(1e-6f32, |max, x| max.max(x.abs()));
            for (b, want) in view.data().chunks_exact(4).zip(want) {
                let got = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                assert!((got - want).abs() <= 1e-4 * scale, "{method} {name}: {got}, wanted {want}");
            }
        }
    }
}

pub fn adapter_bytes(out: &str) -> Vec<u8> {
    fs::read(format!("{out}/adapter_model.safetensors")).unwrap()
}

#[test]
fn threads_do_not_change_a_bit() {
    let scratch = Scratch::new("threads");
    let (one, two) = (scratch.path("one"), scratch.path("two"));
    succeeds(&finetune("hydra", &one, &format!("{SHORT} --threads 1")));
    succeeds(&finetune("hydra", &two, &format!("{SHORT} --threads 2")));
    assert_eq!(adapter_bytes(&one), adapter_bytes(&two));
    assert_eq!(column(&format!("{one}/metrics.jsonl"), "loss"), column(&format!("{two}/metrics.jsonl"), "loss"));
}

#[test]
fn a_run_is_repeated_from_its_file() {
    let scratch = Scratch::new("config");
    let (whole, again) = (scratch.path("whole"), scratch.path("again"));
    let data = golden("hydra").join("data.jsonl").display().to_string();
    let options = format!("{SHORT} --heads auto --eval-data {data} --save-every 3");
    succeeds(&finetune("hydra", &whole, &options));
    let file = format!("{whole}/run.json");
    succeeds(&format!("finetune --config {file} --out {again}"));
    assert_eq!(adapter_bytes(&whole), adapter_bytes(&again));
    let [one, two] = [&whole, &again].map(|out| json(&format!("{out}/run.json")));
    assert_eq!((&one["options"], &one["facts"]), (&two["options"], &two["facts"]));
    assert_eq!((&one["spec"]["heads"], &one["spec"]["schedule"]), (&"auto".into(), &"cosine".into()));
    succeeds(&format!("finetune --config {file} --resume"));
    let other = hydra(&format!("finetune --config {file} --seed 6 --resume"));
    let said = String::from_utf8_lossy(&other.stderr);
    assert!(other.status.code() == Some(1) && said.contains("run.json: --resume needs"), "{said}");
    assert!(said.contains("expected --seed 5, found 6"), "{said}");

    // The same from TOML; the command line takes precedence.
    let model = golden("hydra").join("model").display().to_string();
    let toml = format!(
        "model = '{model}'\ndata = '{data}'\nout = '{}'\ntargets = 'all'\nbatch = 2\ngrad-accum = 2\nsteps = 99\nlr = 1e-3\n\
         dropout = 0.1\nseed = 5\nheads = 'auto'\neval-data = '{data}'\n",
        scratch.path("toml")
    );
    let config = scratch.write("c.toml", &toml);
    succeeds(&format!("finetune --config {config} --steps 8"));
    assert_eq!(adapter_bytes(&whole), adapter_bytes(&scratch.path("toml")));
    scratch.write("c.toml", toml + "rnak = 3\n");
    fails(
        1,
        &format!("finetune --config {config} --steps 8"),
        &["c.toml:13: unknown option rnak: expected one of accuracy-after"],
    );
    let part = scratch.write("part.toml", "rank = 2\n");
    fails(2, &format!("finetune --config {part} --out {again}"), &["--model is missing"]);

    // A file of an earlier version can be resumed with the same options, but not repeated.
    let mut earlier = json(&file);
    assert!(earlier.as_object_mut().unwrap().remove("spec").is_some());
    fs::write(&file, earlier.to_string()).unwrap();
    fails(1, &format!("finetune --config {file} --resume"), &["run.json: no \"spec\""]);
    succeeds(&finetune("hydra", &whole, &format!("{options} --resume")));
}

#[test]
fn options_beside_a_runs_file_are_not_hindered_by_its_defaults() {
    let scratch = Scratch::new("config-defaults");
    let (first, file) = (scratch.path("first"), scratch.path("first/run.json"));
    succeeds(&finetune("hydra", &first, "--steps 2"));
    let with = |name: &str, more: &str| {
        let out = scratch.path(name);
        succeeds(&format!("finetune --config {file} --out {out} {more}"));
        (json(&format!("{out}/run.json"))["options"].clone(), out)
    };
    let (options, again) = with("again", "");
    assert_eq!((options, adapter_bytes(&again)), (json(&file)["options"].clone(), adapter_bytes(&first)));
    let (options, _) = with("batch", "--batch 8");
    assert_eq!((&options["batch"], &options["grad-accum"]), (&8.into(), &1.into()));
    let (options, lora) = with("lora", "--method lora --rank 3");
    assert_eq!((&options["method"], &options["gate"], &options["heads"]), (&"lora".into(), &"one".into(), &1.into()));

    // On from an adapter, which may be a GGUF file.
    let (model, file) = (golden("hydra").join("model").display().to_string(), scratch.path("lora.gguf"));
    succeeds(&format!("export --model {model} --adapter {lora} --format gguf-lora --out {file}"));
    let (folder, from_folder) = with("folder", &format!("--init-adapter {lora} --dropout 0"));
    let (options, from_file) = with("file", &format!("--init-adapter {file} --dropout 0"));
    assert_eq!((&options["rank"], &folder["rank"]), (&3.into(), &3.into()));
    assert_eq!(options["init-adapter"]["bytes"].as_u64(), Some(fs::metadata(&file).unwrap().len()));
    assert_eq!(adapter_bytes(&from_folder), adapter_bytes(&from_file));
    succeeds(&format!("finetune --config {from_file}/run.json --resume"));
    let shown = succeeds(&format!("info {model} --adapter {file}"));
    assert!(shown.contains("method                 lora"), "{shown}");
    let listed = succeeds(&format!("info {file}"));
    for part in
        ["general.type           \"adapter\"", "adapter.lora.alpha     ", "blk.0.ffn_up.weight.lora_a F32 [3, 32]"]
    {
        assert!(listed.contains(part), "{part}\n{listed}");
    }
    fails(1, &format!("info {file} --adapter {file}"), &["needs a model", "lora.gguf is an adapter"]);
}

/// What others have added to multi-head adapters, all that go together at once.
const OPTIONS: &str = "--head-dropout 0.2 --router-temperature 0.5 --top-k 2 --load-balance 0.1 --router-lr 1e-2";

#[test]
fn options_of_others_resume_and_are_obeyed() {
    let scratch = Scratch::new("options-of-others");
    let (whole, broken, plain) = (scratch.path("whole"), scratch.path("broken"), scratch.path("plain"));
    succeeds(&finetune("hydra", &plain, SHORT));
    succeeds(&finetune("hydra", &whole, &format!("{SHORT} {OPTIONS} --threads 1")));
    assert_ne!(adapter_bytes(&plain), adapter_bytes(&whole));
    let saving = finetune("hydra", &broken, &format!("{SHORT} {OPTIONS} --save-every 3 --threads 2"));
    succeeds(&saving);
    assert_eq!(adapter_bytes(&whole), adapter_bytes(&broken), "threads");
    for (option, other) in [
        ("--head-dropout 0.2", "--head-dropout 0.1"),
        ("--router-temperature 0.5", ""),
        ("--top-k 2", "--top-k 3"),
        ("--load-balance 0.1", ""),
        ("--router-lr 1e-2", ""),
    ] {
        let changed = format!("{SHORT} {} --resume", OPTIONS.replace(option, other));
        fails(1, &finetune("hydra", &broken, &changed), &[option.split(' ').next().unwrap()]);
    }
    let run: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(format!("{whole}/run.json")).unwrap()).unwrap();
    let kept = ["head-dropout", "router-temperature", "top-k", "load-balance", "router-lr", "head-init"];
    let wanted = serde_json::json!([0.2, 0.5, 2, 0.1, 0.01, null]);
    for (name, wanted) in kept.iter().zip(wanted.as_array().unwrap()) {
        assert!(run["options"][name].as_f64().map(|x| x as f32) == wanted.as_f64().map(|x| x as f32), "{name}");
    }
    // Top-k and temperature are what the adapter is: without them in its file it is another.
    let data = golden("hydra").join("data.jsonl");
    let line = format!(
        "eval loss --model {} --data {} --adapter {whole}",
        golden("hydra").join("model").display(),
        data.display()
    );
    let with = succeeds(&line);
    let path = format!("{whole}/adapter_config.json");
    let mut config: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    for key in ["router_temperature", "router_top_k"] {
        assert!(config.as_object_mut().unwrap().remove(key).is_some());
    }
    fs::write(&path, config.to_string()).unwrap();
    assert_ne!(with, succeeds(&line));
}

/// After the last step, so that no step's loss tells.
#[test]
fn a_run_that_diverges_at_its_end_fails() {
    let scratch = Scratch::new("diverges");
    let (out, blind) = (scratch.path("run"), scratch.path("blind"));
    let (model, data) = (golden("hydra").join("model"), golden("hydra").join("data.jsonl"));
    let with_model = format!("--model {} --data {}", model.display(), data.display());
    let explode = "--steps 1 --batch 6 --lr 1e30 --schedule constant --warmup 0";
    let last_line = |line: &str| {
        let output = command(line).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{said}");
        said.lines().last().unwrap().to_string()
    };
    let said = last_line(&finetune("hydra", &out, &format!("{explode} --eval-data {}", data.display())));
    assert!(
        said.starts_with("error: stopped at step 1; ") && said.contains("run has the adapter after 0 steps"),
        "{said}"
    );
    assert!(said.contains("step 1: the eval loss is NaN"), "{said}");
    assert_eq!(column(&format!("{out}/evals.jsonl"), "step"), [0.0]);
    succeeds(&format!("eval loss {with_model} --adapter {out}"));
    // Where nothing is held out, the router tells.
    let said = last_line(&finetune("hydra", &blind, explode));
    assert!(said.contains("the router's weight is NaN"), "{said}");
    let analyze = last_line(&format!("analyze {blind} {with_model} --out {}", scratch.path("inside")));
    assert!(analyze.contains("blind: the router's weights are not finite"), "{analyze}");
}

#[test]
fn what_was_chosen_is_written_down() {
    let scratch = Scratch::new("manifest");
    let out = scratch.path("run");
    let data = golden("hydra").join("data.jsonl");
    let eval = format!("{SHORT} --eval-data {} --eval-every 3 --method split --targets q,down", data.display());
    let table = succeeds(&finetune("hydra", &out, &eval.replace("--targets all ", "")));
    assert!(table.contains("math") && table.contains("before"));
    let text = fs::read_to_string(format!("{out}/run.json")).unwrap();
    let run: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(run["options"]["method"], "split");
    assert_eq!(run["options"]["heads"], 6);
    assert_eq!(run["options"]["targets"], serde_json::json!(["q_proj", "down_proj"]));
    assert_eq!(run["options"]["data"][0]["sha256"].as_str().unwrap().len(), 64);
    assert_eq!(column(&format!("{out}/evals.jsonl"), "step"), [0.0, 3.0, 6.0, 8.0]);
    assert!(fs::read_to_string(format!("{out}/report.html")).unwrap().contains("<svg"));
    let listed = succeeds(&format!("info {out}"));
    assert!(listed.contains("lora_A0") && listed.contains("parameters"));
}

#[test]
fn the_report_says_which_records_the_router_was_watched_on() {
    let scratch = Scratch::new("watched");
    let (model, train, out) = (assets("model"), assets("corpus/train.jsonl"), scratch.path("run"));
    let text: String = fs::read_to_string(&train).unwrap().lines().take(30).map(|line| format!("{line}\n")).collect();
    let few = scratch.write("few.jsonl", text);
    let line = format!("finetune --model {model} --data {train} --out {out} --targets down --steps 1 --batch 1");
    let said = |line: &str| {
        let _ = fs::remove_dir_all(&out);
        succeeds(line);
        fs::read_to_string(format!("{out}/report.html")).unwrap()
    };
    assert!(said(&line).contains("<p>200 of 1188 training records, drawn at random, spread evenly"));
    assert!(said(&format!("{line} --eval-data {few}")).contains("<p>All 30 held-out records."));
    assert!(!said(&format!("{line} --method lora")).contains("training records, drawn"));
}

#[test]
fn the_demo_compares_three_methods_and_replaces_an_earlier_one() {
    let scratch = Scratch::new("demo");
    let out = scratch.path("a demo");
    for _ in 0..2 {
        let output = command("demo --steps 2 --out").arg(&out).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let table = String::from_utf8(output.stdout).unwrap();
        for method in ["before", "LoRA ", "LoRA-Split", "HydraLoRA"] {
            assert!(table.contains(method), "{table}");
        }
    }
    let other = fs::File::open(format!("{out}/.lock")).unwrap();
    other.lock().unwrap();
    let output = command("demo --steps 2 --out").arg(&out).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("another process is working there"));
    let page = fs::read_to_string(format!("{out}/report.html")).unwrap();
    assert!(page.contains("polyline") && page.contains("Head 3") && !page.contains("http"));
    // The picture of the README.
    let picture = fs::read_to_string(format!("{out}/demo.svg")).unwrap();
    for part in ["<svg xmlns", "Training loss", "nats per token", "step", "head 3", "arithmetic", "1/4 = 0.250"] {
        assert!(picture.contains(part), "{part:?} in {picture}");
    }
}

#[test]
fn bf16_learns_too() {
    let scratch = Scratch::new("bf16");
    let out = scratch.path("run");
    succeeds(&finetune(
        "hydra",
        &out,
        "--precision bf16 --batch 6 --steps 20 --lr 1e-2 --targets all --dropout 0 --warmup 0",
    ));
    let losses = column(&format!("{out}/metrics.jsonl"), "loss");
    assert!(losses[19] < losses[0] - 0.1, "{losses:?}");
}

#[test]
fn a_loss_that_is_not_a_number_stops_the_run_and_the_last_good_adapter_stays() {
    let scratch = Scratch::new("nan");
    let out = scratch.path("run");
    let output = hydra(&finetune(
        "hydra",
        &out,
        "--batch 6 --grad-accum 1 --steps 50 --lr 1e30 --schedule constant --warmup 0 --clip 0",
    ));
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(said.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{said}");
    // What stays gives a finite loss.
    let case = golden("hydra");
    let (model, data) = (case.join("model"), case.join("data.jsonl"));
    succeeds(&format!("eval loss --model {} --data {} --adapter {out}", model.display(), data.display()));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_what_was_saved() {
    use std::process::Command;
    let scratch = Scratch::new("full");
    let small = scratch.path("small");
    fs::create_dir(&small).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=300k", "tmpfs", &small]).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: a small file system can't be mounted here");
        return;
    }
    let out = format!("{small}/run");
    let first = hydra(&finetune("hydra", &out, "--rank 1 --heads 2 --targets q --steps 2"));
    let before = fs::read(format!("{out}/adapter_model.safetensors")).ok();
    fs::write(format!("{small}/ballast"), vec![0; 1 << 20]).unwrap_err();
    let second = hydra(&finetune("hydra", &out, "--rank 1 --heads 2 --targets q --steps 2 --resume"));
    let after = fs::read(format!("{out}/adapter_model.safetensors")).ok();
    let third = hydra(&finetune("hydra", &format!("{small}/other"), "--steps 2"));
    Command::new("umount").arg(&small).status().unwrap();
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    assert_eq!((second.status.code(), third.status.code()), (Some(1), Some(1)));
    assert!(String::from_utf8_lossy(&second.stderr).contains("No space left"));
    assert_eq!(before, after);
    assert!(before.is_some());
}

#[test]
fn an_adapter_names_its_model_by_a_path_that_holds_in_any_folder() {
    let scratch = Scratch::new("base-model");
    let out = scratch.path("run");
    let mut finetune =
        command(&format!("finetune --model model --data data.jsonl --method lora --targets q --steps 1 --out {out}"));
    assert!(finetune.current_dir(golden("lora")).output().unwrap().status.success());
    let named = json(&format!("{out}/adapter_config.json"))["base_model_name_or_path"].as_str().unwrap().to_string();
    assert!(Path::new(&named).is_absolute() && Path::new(&named).join("config.json").is_file(), "{named}");
}
