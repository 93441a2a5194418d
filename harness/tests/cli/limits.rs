//! Inputs without end, and the limits that a system sets: of a file's size and of addresses.

use super::support::{Scratch, command, fails, finetune, golden, succeeds};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// What ends with one line, under a limit.
#[track_caller]
fn fails_under(limit: (libc::__rlimit_resource_t, u64), line: &str, wanted: &[&str]) {
    let (resource, most) = limit;
    let mut command = command(line);
    // SAFETY: setrlimit(2) may be called between fork and exec, and the structure lives through the call.
    unsafe {
        command.pre_exec(move || {
            let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
            (libc::setrlimit(resource, &limit) == 0).then_some(()).ok_or_else(std::io::Error::last_os_error)
        });
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().last().unwrap_or_default();
    assert_eq!(output.status.code(), Some(1), "{line}: {said}");
    assert!(last.starts_with("error: ") && wanted.iter().all(|word| last.contains(word)), "{wanted:?} in {said}");
    assert!(!last.contains(".hydra-tmp-"), "{said}");
}

/// Pipes without a writer are not waited for where they could not be used.
#[test]
fn what_has_no_end() {
    let scratch = Scratch::new("endless");
    let (out, pipe) = (scratch.path("run"), scratch.path("pipe"));
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let data = golden("hydra").join("data.jsonl").display().to_string();
    for endless in ["/dev/zero", &pipe] {
        let line = finetune("hydra", &out, "").replace(&data, endless);
        fails(1, &line, &[endless, "expected a regular file"]);
        fails(1, &finetune("hydra", &out, &format!("--eval-data {endless}")), &[endless, "expected a regular file"]);
    }
    for option in ["--config", "--template", "--chat-template"] {
        let line = finetune("hydra", &out, &format!("{option} /dev/zero"));
        fails(1, &line, &["/dev/zero", "expected at most 64 MiB for a file of settings"]);
    }
    let mut chat = command(&format!("chat --model {}", golden("hydra").join("model").display()));
    let output = chat.stdin(std::fs::File::open("/dev/zero").unwrap()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.ends_with("error: stdin: expected a line of at most 16 MiB, found more\n"), "{said}");
    assert_eq!((output.status.code(), scratch.names("")), (Some(1), vec!["pipe".into()]));
}

/// `ulimit -f` ends what has no handler for its signal.
#[test]
fn files_may_not_be_as_large_as_needed() {
    let scratch = Scratch::new("large");
    let out = scratch.path("run");
    let line = finetune("hydra", &out, "--steps 2 --batch 2 --save-every 1");
    let limit = |bytes: u64| (libc::RLIMIT_FSIZE, bytes);
    fails_under(limit(100), &line, &["run/run.json: File too large"]);
    fails_under(limit(3000), &line, &["run/adapter_model.safetensors: File too large"]);
    assert!(scratch.names("run").iter().all(|name| !name.contains("tmp")), "{:?}", scratch.names("run"));
    succeeds(&format!("{line} --resume"));
    let clusters = scratch.path("clusters");
    let data = golden("hydra").join("data.jsonl").display().to_string();
    let line = format!("cluster --data {data} --k 2 --out {clusters}");
    fails_under(limit(100), &line, &["can't write: ", "/clusters/clusters.json: File too large"]);
    assert_eq!(scratch.names(""), ["run"]);
}

/// `ulimit -v` leaves less than the machine has.
#[test]
fn memory_is_what_limits_leave() {
    let scratch = Scratch::new("addresses");
    let line = finetune("hydra", &scratch.path("run"), "--heads 256 --rank 256 --threads 1");
    fails_under((libc::RLIMIT_AS, 400 << 20), &line, &["an adapter of rank 256 needs", "MiB of memory are free"]);
    let text = format!(r#"{{"text": "{}"}}"#, "a b ".repeat(1 << 20));
    let data = scratch.write("d.jsonl", text);
    let line = line.replace(&golden("hydra").join("data.jsonl").display().to_string(), &data);
    let line = line.replace("256", "4");
    let wanted = ["d.jsonl:1: a text of 4.0 MiB needs 768.0 MiB, and ", "MiB of memory are free"];
    fails_under((libc::RLIMIT_AS, 400 << 20), &line, &wanted);
    assert_eq!(scratch.names(""), ["d.jsonl"]);
}
