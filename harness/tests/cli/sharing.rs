//! Experiments that several processes share: the tables of one process, whatever each of them did, and whoever was killed.

use super::support::{Scratch, assets, command, fails, json, succeeds};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

const CONFIG: &str = "seeds = [1, 2]\n[defaults]\ntargets = ['q', 'down']\nbatch = 4\nsteps = 30\nrank = 2\n[tune]\nlr = [1e-3, 4e-3]\n\
    [[run]]\nname = 'one'\nmethod = 'lora'\n[[run]]\nname = 'two'\n";

/// A command on the demo's model and some of its records.
fn experiment(scratch: &Scratch, name: &str, config: &str, more: &str, out: &str) -> String {
    let config = scratch.write("c.toml", config);
    let test = scratch.write("t.jsonl", super::compare::test_records());
    let (model, train) = (assets("model"), assets("corpus/train.jsonl"));
    format!("{name} --model {model} --data {train} --eval-data {test} --config {config} --threads 1 --out {out} {more}")
}

fn spawn(line: &str) -> Child {
    command(line).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// A result without what differs from run to run: times, memory, and the folder in commands.
fn lasting(path: &str) -> Value {
    fn strip(value: &mut Value) {
        match value {
            Value::Object(map) => {
                ["tokens_per_second", "peak_bytes", "peak_mib", "speed", "memory", "command"]
                    .iter()
                    .for_each(|key| drop(map.remove(*key)));
                map.values_mut().for_each(strip);
            }
            Value::Array(values) => values.iter_mut().for_each(strip),
            _ => {}
        }
    }
    let mut value = json(path);
    strip(&mut value);
    value
}

#[test]
fn three_workers_of_whom_one_is_killed_compare_as_one_process() {
    let scratch = Scratch::new("sharing-workers");
    let (alone, shared) = (scratch.path("alone"), scratch.path("shared"));
    succeeds(&experiment(&scratch, "compare", CONFIG, "", &alone));
    let line = |more: &str| experiment(&scratch, "compare", CONFIG, more, &shared);
    let mut victim = spawn(&line("--worker"));
    // It is in the midst of a run when it dies.
    let started = Instant::now();
    while !Path::new(&format!("{shared}/tune/one/lr-1e-3/metrics.jsonl")).exists() {
        assert!(started.elapsed() < Duration::from_secs(60), "the first run did not start");
        std::thread::sleep(Duration::from_millis(2));
    }
    fails(1, &line(""), &["shared", "another process is working there"]);
    victim.kill().unwrap();
    victim.wait().unwrap();
    fails(2, &line("--gather"), &["--gather", "runs are not finished", "\"one\""]);
    // `line` writes the configuration, which the others read.
    let line_of_worker = line("--worker");
    for worker in [(); 2].map(|()| spawn(&line_of_worker)) {
        let output = worker.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    succeeds(&line("--gather"));
    assert_eq!(lasting(&format!("{shared}/compare.json")), lasting(&format!("{alone}/compare.json")));
    for run in ["one/seed-1", "one/seed-2", "two/seed-1", "two/seed-2"] {
        let adapter = |out: &str| fs::read(format!("{out}/runs/{run}/adapter_model.safetensors")).unwrap();
        assert!(adapter(&shared) == adapter(&alone), "{run}");
    }
    // Everything is done: a further worker ends at once, and another configuration is refused.
    succeeds(&line("--worker"));
    let other = experiment(&scratch, "compare", &CONFIG.replace("30", "31"), "--worker", &shared);
    fails(1, &other, &["c.toml", "compare.toml", "one configuration"]);
}

#[test]
fn shards_leave_nothing_out() {
    let scratch = Scratch::new("sharing-shards");
    let config = "seeds = [1, 2]\n[defaults]\ntargets = ['q']\nsteps = 2\n[[run]]\nname = 'a'\n";
    let (alone, shared) = (scratch.path("alone"), scratch.path("shared"));
    let line = |more: &str, out: &str| {
        experiment(&scratch, "heterogeneity", config, &format!("--records 8 --counts 1,2 {more}"), out)
    };
    succeeds(&line("", &alone));
    succeeds(&line("--shard 1/2", &shared));
    fails(2, &line("--gather", &shared), &["--gather", "2 runs are not finished", "seed 2"]);
    // As a job of a Slurm array.
    let mut slurm = command(&line("--shard auto", &shared));
    slurm.envs([("SLURM_ARRAY_TASK_ID", "4"), ("SLURM_ARRAY_TASK_MIN", "4"), ("SLURM_ARRAY_TASK_COUNT", "2")]);
    assert!(slurm.output().unwrap().status.success());
    succeeds(&line("--gather", &shared));
    assert_eq!(lasting(&format!("{shared}/heterogeneity.json")), lasting(&format!("{alone}/heterogeneity.json")));
    fails(2, &line("--shard 2/2", &shared), &["--shard", "less than N"]);
    fails(2, &line("--shard auto", &shared), &["SLURM_ARRAY_TASK_ID"]);
    fails(2, &line("--worker --gather", &shared), &["--worker", "--gather"]);
}
