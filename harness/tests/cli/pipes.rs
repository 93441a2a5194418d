//! Pipes under the names of files: whoever opened one would wait for another process.

use super::support::{Scratch, assets, command, finetune, golden, succeeds};
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

/// The longest that a refusal may take, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Puts a pipe in a file's place.
fn pipe(path: &str) {
    let _ = fs::remove_file(path);
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// Fails with one line about `path`, and doesn't wait.
#[track_caller]
fn refused(line: &str, path: &str) {
    let mut child = command(line).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("{line}: it waits for {path}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let wanted = format!("{path}: expected a regular file, found a pipe, a socket or a device\n");
    assert!(output.status.code() == Some(1) && said.ends_with(&wanted) && said.lines().count() == 1, "{line}: {said}");
}

#[test]
fn in_the_folder_of_a_run() {
    let scratch = Scratch::new("pipes");
    let out = scratch.path("run");
    let line = finetune("hydra", &out, "--steps 1 --targets q");
    succeeds(&line);
    for name in
        [".lock", "metrics.jsonl", "evals.jsonl", "trainer_state.safetensors", "adapter_config.json", "report.html"]
    {
        let path = format!("{out}/{name}");
        let kept = fs::read(&path).ok();
        pipe(&path);
        refused(&format!("{line} --resume"), &path);
        fs::remove_file(&path).unwrap();
        kept.iter().for_each(|bytes| fs::write(&path, bytes).unwrap());
    }
    succeeds(&format!("{line} --resume"));
    // Of an adapter without a history.
    pipe(&format!("{out}/run.json"));
    succeeds(&format!("analyze {out} --out {}", scratch.path("analysis")));
}

#[test]
fn in_the_folder_of_an_experiment() {
    let scratch = Scratch::new("pipes-compare");
    let (model, data, out) = (golden("hydra").join("model"), assets("corpus/test.jsonl"), scratch.path("c"));
    let config = scratch.write("c.toml", "seeds = [1]\n[defaults]\nsteps = 1\ntargets = 'q'\n[[run]]\nname = 'a'\n");
    let files = format!("--data {data} --eval-data {data} --config {config} --out {out}");
    let line = format!("compare --model {} {files}", model.display());
    succeeds(&line);
    for name in ["runs/a/seed-1/records.json", "base/records.json", "compare.json", ".lock"] {
        let path = format!("{out}/{name}");
        let kept = fs::read(&path).unwrap();
        pipe(&path);
        refused(&line, &path);
        fs::remove_file(&path).unwrap();
        fs::write(&path, kept).unwrap();
    }
    succeeds(&line);
}
