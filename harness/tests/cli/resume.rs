//! Runs that are stopped, and go on.

use super::runs::{SHORT, adapter_bytes};
use super::support::{Scratch, column, command, fails, finetune, golden, hydra, json, succeeds};
use std::fs;
#[cfg(unix)]
use std::process::Stdio;

#[test]
fn a_resumed_run_is_the_same_run() {
    let scratch = Scratch::new("resume");
    let (whole, broken) = (scratch.path("whole"), scratch.path("broken"));
    succeeds(&finetune("hydra", &whole, SHORT));
    // Step 3 is saved; then the records of the fourth are gone as the process is.
    let saved = finetune("hydra", &broken, &format!("{SHORT} --save-every 3"));
    succeeds(&saved);
    let state = fs::read(format!("{broken}/trainer_state.safetensors")).unwrap();
    assert_eq!(adapter_bytes(&whole), adapter_bytes(&broken));
    fails(1, &finetune("hydra", &broken, &SHORT.replace("--seed 5", "--seed 6 --resume")), &["--seed", "6", "5"]);
    fails(1, &finetune("hydra", &broken, &SHORT.replace("1e-3", "1e-2 --resume")), &["--lr"]);
    fails(1, &finetune("hydra", &broken, SHORT), &["broken holds a run: give --resume to continue it"]);
    assert_eq!(state, fs::read(format!("{broken}/trainer_state.safetensors")).unwrap());
    succeeds(&format!("{saved} --resume"));
    assert_eq!(adapter_bytes(&whole), adapter_bytes(&broken));
    assert_eq!(column(&format!("{broken}/metrics.jsonl"), "loss").len(), 8);
}

/// What the files say about the run is no more than what the state itself says.
#[test]
fn a_state_of_another_run_is_refused() {
    let scratch = Scratch::new("other-state");
    let (out, other) = (scratch.path("run"), scratch.path("other"));
    let line = |out: &str, more: &str| format!("{} {more}", finetune("hydra", out, SHORT));
    succeeds(&line(&out, ""));
    succeeds(&line(&other, "--no-shuffle"));
    let state = |out: &str| format!("{out}/trainer_state.safetensors");
    let own = fs::read(state(&out)).unwrap();
    // Another seed in run.json.
    let run = format!("{out}/run.json");
    let mut edited = json(&run);
    edited["options"]["seed"] = 6.into();
    fs::write(&run, edited.to_string()).unwrap();
    let refused = format!("{}: the state of another run: expected --", state(&out));
    let seed = line(&out, "--resume").replace("--seed 5", "--seed 6");
    fails(1, &seed, &[&format!("{refused}seed 6, found 5")]);
    assert_eq!(own, fs::read(state(&out)).unwrap());
    // The state of another run; of one that an earlier version began, nothing is known.
    edited["options"]["seed"] = 5.into();
    fs::write(&run, edited.to_string()).unwrap();
    fs::copy(state(&other), state(&out)).unwrap();
    fails(1, &line(&out, "--resume"), &[&format!("{refused}no-shuffle false, found true")]);
    let unknown = String::from_utf8_lossy(&own).find("\"run\"").unwrap();
    let mut bytes = own.clone();
    bytes[unknown + 1] = b'R';
    fs::write(state(&out), bytes).unwrap();
    succeeds(&line(&out, "--resume"));
}

/// Losses before and after are of the same records.
#[test]
fn a_run_is_resumed_with_the_same_eval_set() {
    let scratch = Scratch::new("resume-eval");
    let (out, data) = (scratch.path("run"), fs::read(golden("hydra").join("data.jsonl")).unwrap());
    let first = data.split_inclusive(|byte| *byte == b'\n').next().unwrap();
    let (one, same, other) =
        (scratch.write("e.jsonl", &data), scratch.write("s.jsonl", &data), scratch.write("o.jsonl", first));
    let line = finetune("hydra", &out, "--targets q --batch 2 --steps 2");
    succeeds(&format!("{line} --eval-data {one}"));
    let [run, evals] = ["run.json", "evals.jsonl"].map(|name| format!("{out}/{name}"));
    let kept = [&run, &evals].map(|path| fs::read(path).unwrap());
    let refused = "run.json: --resume needs the options of the run: expected --eval-data ";
    fails(1, &format!("{line} --eval-data {other} --resume"), &[refused, "e.jsonl", "o.jsonl"]);
    fails(1, &format!("{line} --resume"), &[refused, "e.jsonl", "found null"]);
    assert_eq!(kept, [&run, &evals].map(|path| fs::read(path).unwrap()));
    // Where the file lies makes no difference.
    succeeds(&format!("{line} --eval-data {same} --resume"));
    assert_eq!(column(&evals, "step"), [0.0, 2.0]);
    // A run that has measured none may begin to.
    let blind = finetune("hydra", &scratch.path("blind"), "--targets q --batch 2 --steps 2");
    succeeds(&blind);
    succeeds(&format!("{blind} --eval-data {one} --resume"));
    assert_eq!(column(&scratch.path("blind/evals.jsonl"), "step"), [2.0]);
}

#[test]
fn a_model_that_has_changed_is_not_resumed_on() {
    let scratch = Scratch::new("swapped");
    let (model, out) = (scratch.path("model"), scratch.path("run"));
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        scratch.write(&format!("model/{file}"), fs::read(golden("hydra").join("model").join(file)).unwrap());
    }
    let data = golden("hydra").join("data.jsonl");
    let line = format!("finetune --model {model} --data {} --out {out} {SHORT}", data.display());
    succeeds(&line);
    let state = fs::read(format!("{out}/trainer_state.safetensors")).unwrap();
    let weights = format!("{model}/model.safetensors");
    let same = fs::read(&weights).unwrap();
    // Another of the same shape: every weight is a little larger.
    let start = 8 + u64::from_le_bytes(same[..8].try_into().unwrap()) as usize;
    let other = same[start..].chunks(4).flat_map(|x| (1.001 * f32::from_le_bytes(x.try_into().unwrap())).to_le_bytes());
    fs::write(&weights, [&same[..start], &other.collect::<Vec<_>>()].concat()).unwrap();
    fails(1, &format!("{line} --resume"), &["--model", &model, "other weights", "run.json"]);
    assert_eq!(state, fs::read(format!("{out}/trainer_state.safetensors")).unwrap());
    // Where it isn't known what the run began with, it goes on.
    let run = format!("{out}/run.json");
    let mut earlier = json(&run);
    assert!(earlier["facts"].as_object_mut().unwrap().remove("model_fingerprint").is_some());
    fs::write(&run, earlier.to_string()).unwrap();
    succeeds(&format!("{line} --resume"));
}

#[cfg(unix)]
#[test]
fn a_run_with_options_goes_on_bit_for_bit() {
    let scratch = Scratch::new("options-resume");
    let (whole, broken) = (scratch.path("whole"), scratch.path("broken"));
    let options = "--head-dropout 0.2 --router-temperature 0.5 --head-init random --load-balance 0.1 --router-lr 1e-2";
    let long = format!("{} {options}", SHORT.replace("--steps 8", "--steps 200"));
    stopped_after(3, libc::SIGTERM, &finetune("hydra", &broken, &long), &format!("{broken}/metrics.jsonl"));
    succeeds(&format!("{} --resume", finetune("hydra", &broken, &long)));
    succeeds(&finetune("hydra", &whole, &long));
    assert_eq!(adapter_bytes(&whole), adapter_bytes(&broken));
}

#[cfg(unix)]
/// Runs a fine-tune and sends it a signal after so many steps; returns how many it took.
fn stopped_after(steps: usize, signal: i32, line: &str, metrics: &str) -> usize {
    let mut child = command(line).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while fs::read_to_string(metrics).map_or(0, |text| text.lines().count()) < steps {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // SAFETY: kill(2) has no memory to get wrong; the child has not been waited for, so the id is still its own.
    let sent = unsafe { libc::kill(child.id() as i32, signal) };
    assert_eq!(sent, 0);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    column(metrics, "step").len()
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_the_run_goes_on() {
    let scratch = Scratch::new("ctrl-c");
    let (whole, broken) = (scratch.path("whole"), scratch.path("broken"));
    let long = SHORT.replace("--steps 8", "--steps 300");
    let metrics = format!("{broken}/metrics.jsonl");
    let done = stopped_after(3, libc::SIGINT, &finetune("hydra", &broken, &long), &metrics);
    assert!((3..300).contains(&done));
    succeeds(&format!("{} --resume", finetune("hydra", &broken, &long)));
    succeeds(&finetune("hydra", &whole, &long));
    assert_eq!(adapter_bytes(&whole), adapter_bytes(&broken));
    assert_eq!(column(&metrics, "loss"), column(&format!("{whole}/metrics.jsonl"), "loss"));
}

/// Not after it, which may take long; nothing is lost, and the measurement is made anew.
#[cfg(unix)]
#[test]
fn ctrl_c_ends_a_measurement() {
    let scratch = Scratch::new("ctrl-c-measuring");
    let out = scratch.path("run");
    let records = fs::read_to_string(golden("hydra").join("data.jsonl")).unwrap();
    let many = scratch.write("many.jsonl", records.repeat(12_000));
    let evals = format!("{out}/evals.jsonl");
    let line = finetune("hydra", &out, &format!("{SHORT} --eval-data {many}"));
    let mut child = command(&line).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    while !fs::exists(&evals).unwrap() {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // SAFETY: kill(2) has no memory to get wrong; the child has not been waited for, so the id is still its own.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("stopping"), "{said}");
    assert_eq!(fs::read_to_string(&evals).unwrap(), "", "the measurement before the first step");
    assert!(fs::exists(format!("{out}/trainer_state.safetensors")).unwrap());
}

#[cfg(unix)]
#[test]
fn one_process_at_a_time() {
    let scratch = Scratch::new("two-processes");
    let out = scratch.path("run");
    let long = finetune("hydra", &out, &SHORT.replace("--steps 8", "--steps 100000"));
    let mut first = command(&long).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while !fs::exists(format!("{out}/metrics.jsonl")).unwrap() {
        assert!(first.try_wait().unwrap().is_none(), "it ended by itself");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let second = hydra(&format!("{long} --resume"));
    // It is this test's own; ended at once, its lock goes with it.
    first.kill().unwrap();
    first.wait().unwrap();
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(second.status.code() == Some(1) && said.contains("another process"), "{said}");
    fails(1, &format!("{} --resume", long.replace("--seed 5", "--seed 6")), &["--seed"]);
    // A lock that nobody holds, and no run: as if nothing were there.
    scratch.write("new/.lock", "");
    succeeds(&finetune("hydra", &scratch.path("new"), SHORT));
}

#[test]
fn a_line_of_metrics_that_is_damaged_takes_none_with_it() {
    let scratch = Scratch::new("metrics");
    let out = scratch.path("run");
    let metrics = format!("{out}/metrics.jsonl");
    succeeds(&finetune("hydra", &out, SHORT));
    let whole = fs::read_to_string(&metrics).unwrap();
    let damaged = whole.replacen("{\"step\":3,", "{\"step\":3;", 1);
    assert_ne!(whole, damaged);
    fs::write(&metrics, &damaged).unwrap();
    let again = hydra(&format!("{} --resume", finetune("hydra", &out, SHORT)));
    let said = String::from_utf8_lossy(&again.stderr);
    assert!(again.status.code() == Some(1) && said.contains("metrics.jsonl:3"), "{said}");
    assert_eq!(fs::read_to_string(&metrics).unwrap(), damaged);
    // Torn by a crash: the step is one of those to do again, here of none.
    fs::write(&metrics, &whole[..whole.len() - 20]).unwrap();
    let again = hydra(&format!("{} --resume", finetune("hydra", &out, SHORT)));
    let said = String::from_utf8_lossy(&again.stderr);
    assert!(again.status.success() && said.contains("7 of 8 steps"), "{said}");
}
