//! What killed processes leave: nothing that keeps the next one from going on, and nothing that stays.

use super::support::{Scratch, assets, command, fails, finetune, golden, succeeds};
use std::fs;
use std::process::Stdio;
use std::time::Duration;

/// Names that a kill leaves behind: a file being written, one of the crate safetensors', one of an earlier version of hydra.
const LEFT: [&str; 3] = [".hydra-tmp-1-x7YzQw", ".tmpAb3dEf", ".run.json.17.tmp"];

fn leave(scratch: &Scratch, folder: &str) {
    for name in LEFT {
        scratch.write(&format!("{folder}/{name}"), "part of a fi");
    }
    scratch.write(&format!("{folder}/.lock"), "");
}

fn no_litter(scratch: &Scratch, folder: &str) {
    let names = scratch.names(folder);
    assert!(names.iter().all(|name| !name.starts_with('.') || name == ".lock"), "{folder}: {names:?}");
}

#[test]
fn a_run_that_was_killed_while_it_wrote_its_first_file_starts_again() {
    let scratch = Scratch::new("killed-first");
    leave(&scratch, "run");
    let line = finetune("hydra", &scratch.path("run"), "--steps 1 --targets q");
    fails(1, &format!("{line} --resume"), &["--resume: no run in"]);
    succeeds(&line);
    no_litter(&scratch, "run");
    for name in LEFT {
        scratch.write(&format!("run/{name}"), "part of a fi");
    }
    succeeds(&format!("{line} --resume"));
    no_litter(&scratch, "run");
    // Other files are somebody's.
    scratch.write("mine/.tmp", "");
    fails(1, &finetune("hydra", &scratch.path("mine"), ""), &["mine holds files but no run"]);
}

#[test]
fn an_experiment_that_was_killed_while_it_wrote_its_first_file_starts_again() {
    let scratch = Scratch::new("killed-experiment");
    let case = golden("hydra");
    let (model, data) = (case.join("model").display().to_string(), case.join("data.jsonl").display().to_string());
    let config = scratch.write("c.toml", "seeds = [1]\n[defaults]\nsteps = 1\ntargets = 'q'\n[[run]]\nname = 'a'\n");
    let files = format!("--model {model} --data {data} --eval-data {data} --config {config}");
    for (command, folder, run) in [
        ("compare", "c", "c/runs/a/seed-1"),
        ("heterogeneity --records 1 --counts 1", "h", "h/runs/a/categories-1/seed-1"),
    ] {
        leave(&scratch, folder);
        let line = format!("{command} {files} --out {}", scratch.path(folder));
        succeeds(&line);
        no_litter(&scratch, folder);
        // A run's folder, and that of the model without an adapter.
        let base = format!("{folder}/base");
        for part in [run, &base] {
            fs::remove_dir_all(scratch.path(part)).unwrap();
        }
        leave(&scratch, run);
        scratch.write(&format!("{base}/{}", LEFT[0]), "part of a fi");
        succeeds(&line);
        no_litter(&scratch, run);
        no_litter(&scratch, &base);
    }
}

#[cfg(unix)]
#[test]
fn new_folders_go_past_what_the_dead_left_and_leave_the_living_alone() {
    let scratch = Scratch::new("killed-folder");
    let case = golden("lora");
    let (model, adapter) = (case.join("model").display().to_string(), case.join("adapter").display().to_string());
    scratch.write(".hydra-tmp-1-dead/model.safetensors", "part of a fi");
    scratch.write(".hydra-tmp-1-living/model.safetensors", "part of a fi");
    let living = fs::File::open(scratch.path(".hydra-tmp-1-living")).unwrap();
    living.lock().unwrap();
    succeeds(&format!("merge --model {model} --adapter {adapter} --out {}", scratch.path("merged")));
    assert_eq!(scratch.names(""), [".hydra-tmp-1-living", "merged"]);
    drop(living);
    let data = assets("corpus/test.jsonl");
    succeeds(&format!("cluster --data {data} --k 2 --out {}", scratch.path("clusters")));
    assert_eq!(scratch.names(""), ["clusters", "merged"]);
    scratch.write(".hydra-tmp-1-dead", "part of a fi");
    let data = case.join("data.jsonl").display().to_string();
    succeeds(&format!("eval loss --model {model} --data {data} --json {}", scratch.path("loss.json")));
    assert_eq!(scratch.names(""), ["clusters", "loss.json", "merged"]);
}

/// Starts `line` again and again, and kills it after ever longer times, until it ends by itself.
fn kill_until_done(line: impl Fn() -> String, most: u64) -> u64 {
    for kills in 0..most {
        let mut child = command(&line()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(5 + 9 * kills));
        match child.try_wait().unwrap() {
            // It is this test's own.
            None => child.kill().unwrap(),
            Some(status) => {
                let said = child.wait_with_output().unwrap().stderr;
                assert!(status.success(), "after {kills} kills: {}", String::from_utf8_lossy(&said));
                return kills;
            }
        }
        child.wait().unwrap();
    }
    succeeds(&line());
    most
}

#[test]
fn a_run_that_is_killed_at_any_time_ends_in_the_same_bytes() {
    let scratch = Scratch::new("killed-run");
    let (whole, killed) = (scratch.path("whole"), scratch.path("killed"));
    let data = golden("hydra").join("data.jsonl").display().to_string();
    let options =
        format!("--targets all --batch 2 --steps 60 --dropout 0.1 --save-every 1 --eval-data {data} --eval-every 7");
    succeeds(&finetune("hydra", &whole, &options));
    let line = || {
        let resume = if fs::exists(format!("{killed}/run.json")).unwrap() { "--resume" } else { "" };
        finetune("hydra", &killed, &format!("{options} {resume}"))
    };
    let kills = kill_until_done(line, 60);
    assert!(kills > 3, "{kills} kills");
    for file in ["adapter_model.safetensors", "trainer_state.safetensors", "evals.jsonl"] {
        assert_eq!(
            fs::read(format!("{whole}/{file}")).unwrap(),
            fs::read(format!("{killed}/{file}")).unwrap(),
            "{file}"
        );
    }
    no_litter(&scratch, "killed");
}

#[test]
fn a_comparison_that_is_killed_at_any_time_gives_the_same_table() {
    let scratch = Scratch::new("killed-compare");
    let case = golden("hydra");
    let (model, data) = (case.join("model").display().to_string(), case.join("data.jsonl").display().to_string());
    let config = scratch.write(
        "c.toml",
        "seeds = [1, 2]\n[defaults]\nsteps = 20\ntargets = 'q'\nsave-every = 2\n[tune]\nlr = [1e-3, 1e-2]\nvalidation = 0.4\n\
         [[run]]\nname = 'a'\n[[run]]\nname = 'b'\ngate = 'uniform'\n",
    );
    let line = |out: &str| {
        format!(
            "compare --model {model} --data {data} --eval-data {data} --config {config} --out {}",
            scratch.path(out)
        )
    };
    succeeds(&line("whole"));
    let kills = kill_until_done(|| line("killed"), 60);
    assert!(kills > 3, "{kills} kills");
    let rows = |out: &str| {
        let rows = super::support::json(&scratch.path(&format!("{out}/compare.json")))["rows"].clone();
        rows.as_array().unwrap().iter().map(|row| row["scores"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(rows("whole"), rows("killed"));
    for folder in ["killed", "killed/tune", "killed/base", "killed/runs/a/seed-1", "killed/runs/b/seed-2"] {
        no_litter(&scratch, folder);
    }
}
