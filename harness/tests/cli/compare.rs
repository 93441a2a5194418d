//! Comparisons: the table's figures, going on, refusing what does not belong together.

use super::support::{Scratch, assets, column, fails, files, golden, hydra, json, succeeds};
use serde_json::Value;
use std::fs;

const RUNS: &str = "
[[run]]
name = 'LoRA'
method = 'lora'
rank = 4

[[run]]
name = 'Hydra, uniform'
gate = 'uniform'
rank = 2
";

fn config(seeds: &str, steps: usize, more: &str) -> String {
    format!(
        "seeds = {seeds}\n[defaults]\ntargets = ['q', 'down']\nbatch = 4\nsteps = {steps}\ndropout = 0.1\n{more}{RUNS}"
    )
}

fn compare(scratch: &Scratch, config: &str, out: &str, more: &str) -> String {
    let config = scratch.write("c.toml", config);
    let (model, train, test) =
        (assets("model"), assets("corpus/train.jsonl"), scratch.write("t.jsonl", test_records()));
    format!("compare --model {model} --data {train} --eval-data {test} --config {config} --out {out} {more}")
}

/// Some of each category.
pub fn test_records() -> String {
    let text = fs::read_to_string(assets("corpus/test.jsonl")).unwrap();
    text.lines().take(40).map(|line| format!("{line}\n")).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[test]
fn runs_may_have_any_option_of_the_heads() {
    let scratch = Scratch::new("compare-options");
    let out = scratch.path("out");
    let of_router = [
        "head-dropout = 0.2",
        "head-init = 'random'",
        "router-temperature = 0.5",
        "top-k = 2",
        "load-balance = 0.1",
        "router-lr = 1e-2",
    ];
    let runs: String =
        of_router.iter().enumerate().map(|(i, option)| format!("[[run]]\nname = 'r{i}'\n{option}\n")).collect();
    let defaults = "seeds = [1]\n[defaults]\ntargets = ['down']\nsteps = 4\nlr = 3e-3\nrank = 1\n";
    succeeds(&compare(&scratch, &format!("{defaults}[[run]]\nname = 'plain'\n{runs}"), &out, ""));
    let result = json(&format!("{out}/compare.json"));
    let mut losses: Vec<f64> =
        result["rows"].as_array().unwrap().iter().map(|row| numbers(&row["scores"]["loss"]["seeds"])[0]).collect();
    assert_eq!(losses.len(), 7);
    losses.sort_by(f64::total_cmp);
    losses.dedup();
    assert_eq!(losses.len(), 7, "each option does something");
    // A name on a terminal.
    let named = defaults.replace("steps = 4", "steps = 1") + "[[run]]\nname = \"\\u001b[31mred\\nline\"\n";
    let output = hydra(&compare(&scratch, &named, &scratch.path("named"), ""));
    let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(output.status.success() && said.contains("[31mred") && !said.contains('\u{1b}'), "{said}");
    let wrong = format!("{defaults}[[run]]\nname = 'a'\nmethod = 'lora'\ntop-k = 2");
    fails(1, &compare(&scratch, &wrong, &scratch.path("wrong"), ""), &["top-k", "gate is one"]);
}

#[test]
fn the_table_is_what_the_runs_gave() {
    let scratch = Scratch::new("compare");
    let out = scratch.path("out");
    let tune = "[tune]\nlr = [1e-3, 4e-3]\nfraction = 0.5\n[mmlu]\nscoring = 'cloze'\nlimit = 2\n";
    let command = compare(&scratch, &config("[1, 2]", 4, tune), &out, &format!("--mmlu {}", assets("mmlu")));
    let table = succeeds(&command);
    assert!(table.contains("Hydra, uniform") && table.contains("±"), "{table}");
    assert!(table.contains("has the one of 1e-3, 4e-3 with") && table.contains("over seeds and records"), "{table}");
    let result = json(&format!("{out}/compare.json"));
    let rows = result["rows"].as_array().unwrap();
    let losses: Vec<Vec<f64>> = rows.iter().map(|row| numbers(&row["scores"]["loss"]["seeds"])).collect();
    for (row, losses) in rows.iter().zip(&losses) {
        let loss = &row["scores"]["loss"];
        assert!((loss["mean"].as_f64().unwrap() - mean(losses)).abs() < 1e-12);
        // Of two values: half their distance.
        assert!((loss["stderr"].as_f64().unwrap() - (losses[0] - losses[1]).abs() / 2.0).abs() < 1e-12);
        assert!(losses.iter().all(|&loss| loss < result["base"]["loss"]["loss"].as_f64().unwrap()));
        assert_eq!(row["tokens"], rows[0]["tokens"]);
        // The rate is the better of the two that were tried, and the one that was trained with.
        let trials = row["tuned"]["trials"].as_array().unwrap();
        let tried: Vec<f64> = trials.iter().map(|trial| trial["loss"].as_f64().unwrap()).collect();
        let best = usize::from(tried[1] < tried[0]);
        assert_eq!(
            (trials[best]["lr"].as_f64(), row["tuned"]["at_the_end"].as_bool()),
            (row["lr"].as_f64(), Some(true))
        );
    }
    let run = format!("{out}/runs/hydra-uniform/seed-2");
    assert_eq!(json(&format!("{run}/run.json"))["options"]["lr"], rows[1]["lr"]);
    // The same loss as when the adapter is measured by hand.
    let file = scratch.path("loss.json");
    let (model, test) = (assets("model"), scratch.path("t.jsonl"));
    succeeds(&format!("eval loss --model {model} --adapter {run} --data {test} --json {file}"));
    let by_hand = json(&file);
    assert!((by_hand["loss"].as_f64().unwrap() - losses[1][1]).abs() < 1e-9);
    let category = &rows[1]["scores"]["categories"]["topics"]["seeds"][1];
    assert!((by_hand["categories"]["topics"]["loss"].as_f64().unwrap() - category.as_f64().unwrap()).abs() < 1e-9);
    let difference = &rows[1]["difference"]["loss"];
    let [mid, low, high] = ["mean", "low", "high"].map(|key| difference[key].as_f64().unwrap());
    assert!((mid - (mean(&losses[1]) - mean(&losses[0]))).abs() < 1e-9, "{difference}");
    assert!(low < mid && mid < high);
    assert!(rows[0]["difference"].is_null());
    let micro = numbers(&rows[0]["scores"]["mmlu_micro"]["seeds"]);
    assert!(micro.iter().all(|share| (share * 8.0).fract() == 0.0), "of eight questions: {micro:?}");
    // The validation records are training records, none of which is trained on in a trial.
    let lines = |path: &str| fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect::<Vec<_>>();
    let (train, apart) = (lines(&format!("{out}/tune/train.jsonl")), lines(&format!("{out}/tune/validation.jsonl")));
    let all = lines(&assets("corpus/train.jsonl"));
    assert_eq!((train.len() + apart.len(), apart.len()), (all.len(), (all.len() as f64 / 10.0).round() as usize));
    assert!(apart.iter().all(|line| all.contains(line)));
    let markdown = fs::read_to_string(format!("{out}/compare.md")).unwrap();
    assert!(markdown.contains("| LoRA |") && markdown.contains("| topics |") && markdown.contains("(chosen)"));
    assert!(fs::read_to_string(format!("{out}/loss-difference.svg")).unwrap().starts_with("<svg xmlns"));

    // Again: all is there, nothing is done, the same result. Another seed: only that is done.
    let adapter = format!("{run}/adapter_model.safetensors");
    let written = || fs::metadata(&adapter).unwrap().modified().unwrap();
    let before = written();
    succeeds(&command);
    assert_eq!(json(&format!("{out}/compare.json")), result);
    fs::remove_dir_all(format!("{out}/runs/lora/seed-1")).unwrap();
    succeeds(&compare(&scratch, &config("[1, 2, 3]", 4, tune), &out, &format!("--mmlu {}", assets("mmlu"))));
    let more = json(&format!("{out}/compare.json"));
    assert_eq!(numbers(&more["rows"][0]["scores"]["loss"]["seeds"])[..2], losses[0], "made again, the same to the bit");
    assert_eq!(written(), before);

    // Another configuration in the same folder is refused, and nothing is lost.
    let other = config("[1, 2]", 4, tune).replace("rank = 2", "rank = 3");
    let other = compare(&scratch, &other, &out, &format!("--mmlu {}", assets("mmlu")));
    let before = files(&out);
    fails(1, &other, &["result.json", "rank was 2 and is 3", "another --out"]);
    let shorter = scratch.write("short.jsonl", all[..200].join("\n"));
    let other = compare(&scratch, &config("[1, 2, 3]", 4, tune), &out, &format!("--mmlu {}", assets("mmlu")));
    fails(1, &other.replace(&assets("corpus/train.jsonl"), &shorter), &["result.json", "eval-data was"]);
    assert!(files(&out) == before, "what is refused changes nothing");
}

#[test]
fn one_seed_has_no_standard_error() {
    let scratch = Scratch::new("compare-one");
    let out = scratch.path("out");
    let table = succeeds(&compare(&scratch, &config("[5]", 2, ""), &out, ""));
    assert!(table.contains("One seed: there is no standard error") && !table.contains("±"), "{table}");
    assert!(table.contains("alone: how much seeds differ is not in it"), "{table}");
    let result = json(&format!("{out}/compare.json"));
    assert!(result["rows"][1]["scores"]["loss"]["stderr"].is_null() && result["mmlu"].is_null());
    assert!(result["rows"][1]["difference"]["loss"]["low"].is_number());
    let asks = compare(&scratch, &config("[5]", 2, "[mmlu]\nlimit = 1\n"), &scratch.path("asks"), "");
    fails(1, &asks, &[".toml: [mmlu] needs --mmlu DIR"]);
}

#[test]
fn a_run_that_diverges_is_said_to() {
    let scratch = Scratch::new("compare-nan");
    let out = scratch.path("out");
    let text = config("[5]", 6, "warmup = 0\nclip = 0\nlr = 1e-3\n").replace("rank = 2\n", "rank = 2\nlr = 1e37\n");
    let table = succeeds(&compare(&scratch, &text, &out, ""));
    assert!(table.contains("diverged") && table.contains("Run “Hydra, uniform”, seed 5: stopped at step"), "{table}");
    let result = json(&format!("{out}/compare.json"));
    assert!(result["rows"][1]["scores"].is_null() && result["rows"][1]["difference"].is_null());
    assert!(result["rows"][0]["scores"]["loss"]["mean"].is_number());
}

/// After the last step, so that no step's loss tells.
#[test]
fn a_run_that_diverges_at_its_end_is_kept_as_such() {
    let scratch = Scratch::new("compare-nan-end");
    let out = scratch.path("out");
    let text = config("[5]", 1, "warmup = 0\nlr = 1e-3\n[mmlu]\nlimit = 1\n");
    let mut runs = text.replace("targets = ['q', 'down']\n", "").replace("rank = 2\n", "rank = 2\nlr = 1e30\n");
    runs += "[[run]]\nname = 'Router'\nlr = 1e30\n";
    let line = compare(&scratch, &runs, &out, &format!("--mmlu {}", assets("mmlu")));
    let table = succeeds(&line);
    assert!(table.contains("Run “Hydra, uniform”, seed 5: the eval loss is NaN"), "{table}");
    assert!(table.contains("Run “Router”, seed 5: step 1: the router's weight is NaN"), "{table}");
    assert_eq!(succeeds(&line), table, "taken up as it is");
    let result = json(&format!("{out}/compare.json"));
    assert!(result["rows"][1]["scores"].is_null() && result["rows"][0]["scores"]["loss"]["mean"].is_number());
}

#[test]
fn the_configuration_may_be_the_one_in_the_folder() {
    let scratch = Scratch::new("compare-own-config");
    let out = scratch.path("out");
    let text = config("[5]", 1, "");
    let line = compare(&scratch, &text, &out, "");
    let table = succeeds(&line);
    let own = format!("{out}/compare.toml");
    assert_eq!(succeeds(&line.replace(&scratch.path("c.toml"), &own)), table);
    assert_eq!(fs::read_to_string(own).unwrap(), text);
    // One of a former version: what it kept is read, once its table of intervals is removed.
    let before = files(&out);
    let former = format!("{text}[bootstrap]\nsamples = 50\n");
    fails(
        1,
        &compare(&scratch, &former, &out, ""),
        &["c.toml:", "[bootstrap]: intervals are no longer bootstrapped: remove this table"],
    );
    assert!(files(&out) == before, "what is refused changes nothing");
}

/// Of a template, the file's contents count.
#[test]
fn a_template_that_has_changed_is_not_mixed_with_what_is_kept() {
    let scratch = Scratch::new("compare-template");
    let data = golden("hydra").join("data.jsonl").display().to_string();
    let (template, chat) = (scratch.path("t.jinja"), scratch.path("c.jinja"));
    let write = |template: &str, chat: &str| {
        scratch.write("t.jinja", template);
        scratch.write("c.jinja", chat);
    };
    let (one, other) = ("Q: {{ instruction }}\n", "{% for m in messages %}{{ m.content }}{% endfor %}");
    let config = scratch.write(
        "c.toml",
        format!(
            "seeds = [1]\n[defaults]\ntargets = 'q'\nsteps = 1\ntemplate = '{template}'\nchat-template = '{chat}'\n\
             [[run]]\nname = 'a'\n"
        ),
    );
    let (model, out) = (golden("hydra").join("model"), scratch.path("out"));
    let line =
        format!("compare --model {} --data {data} --eval-data {data} --config {config} --out {out}", model.display());
    write(one, other);
    let table = succeeds(&line);
    let again = |wanted: &[&str]| {
        let output = hydra(&line);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && wanted.iter().all(|word| said.contains(word)), "{said}");
    };
    write("Question: {{ instruction }}\n", other);
    again(&["seed-1/result.json: made with other options: template-file was "]);
    write(one, &format!("{other} "));
    again(&["seed-1/result.json: made with other options: chat-template-file was "]);
    // The model without an adapter has had the same template.
    fs::remove_dir_all(format!("{out}/runs")).unwrap();
    write("Question: {{ instruction }}\n", other);
    again(&["base/result.json: made with other options: template-file was "]);
    write(one, other);
    assert_eq!(succeeds(&line).lines().count(), table.lines().count());
}

#[cfg(unix)]
#[test]
fn ctrl_c_and_the_comparison_goes_on() {
    use super::support::command;
    use std::process::Stdio;
    let scratch = Scratch::new("compare-ctrl-c");
    let (whole, broken) = (scratch.path("whole"), scratch.path("broken"));
    let text = config("[1]", 60, "save-every = 7\n");
    let line = compare(&scratch, &text, &broken, "");
    let mut child = command(&line).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let metrics = format!("{broken}/runs/hydra-uniform/seed-1/metrics.jsonl");
    while fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < 3 {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // SAFETY: kill(2) has no memory to get wrong; the child has not been waited for, so the id is still its own.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!((3..60).contains(&column(&metrics, "step").len()));
    assert!(!fs::exists(format!("{broken}/compare.json")).unwrap());
    let again = hydra(&line);
    assert!(again.status.success());
    let said = String::from_utf8_lossy(&again.stderr);
    succeeds(&compare(&scratch, &text, &whole, ""));
    let scores = |out: &str| {
        json(&format!("{out}/compare.json"))["rows"]
            .as_array()
            .unwrap()
            .iter()
            .map(|row| row["scores"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(scores(&whole), scores(&broken), "{said}");
}

#[test]
fn heads_may_be_clusters_and_labels_any_field() {
    let scratch = Scratch::new("compare-clusters");
    let (clustered, out) = (scratch.path("clustered"), scratch.path("out"));
    let (model, test) = (assets("model"), scratch.write("test.jsonl", test_records()));
    let train = assets("corpus/train.jsonl");
    succeeds(&format!("cluster --data {train} {test} --k 3 --out {clustered}"));
    let runs = "[[run]]\nname = 'by cluster'\nmethod = 'split'\nlabel-field = 'cluster'\n\
                [[run]]\nname = 'auto'\nheads = 'auto'\n[[run]]\nname = 'by category'\ngate = 'label'\n";
    let text = |runs: &str| {
        let defaults = "[defaults]\ntargets = ['down']\nrank = 1\nbatch = 4\nsteps = 2\n";
        format!("seeds = [1, 2]\n{defaults}{runs}")
    };
    let line = |data: &str, runs: &str, out: &str| {
        let config = scratch.write("c.toml", text(runs));
        format!(
            "compare --model {model} --data {data} --eval-data {clustered}/test.jsonl --config {config} --out {out}"
        )
    };
    let train = format!("{clustered}/train.jsonl");
    succeeds(&line(&train, runs, &out));
    let options = |run: &str| json(&format!("{out}/runs/{run}/seed-1/run.json"))["options"].clone();
    let cluster = options("by-cluster");
    assert_eq!((&cluster["label-field"], &cluster["heads"]), (&"cluster".into(), &3.into()));
    let category = options("by-category");
    assert_eq!((&category["label-field"], &category["heads"]), (&"category".into(), &4.into()));
    // As many as finetune finds by itself, with the same seed.
    let (auto, alone) = (json(&format!("{out}/runs/auto/seed-1/run.json")), scratch.path("alone"));
    let same = "--heads auto --targets down --rank 1 --batch 4 --steps 2 --seed 1";
    succeeds(&format!("finetune --model {model} --data {train} --out {alone} {same}"));
    let alone = json(&format!("{alone}/run.json"));
    assert_eq!(auto["facts"]["clusters"], alone["facts"]["clusters"]);
    assert_eq!(auto["options"]["heads"], auto["facts"]["clusters"]["k"]);
    // The held-out records' labels count: measured by hand, the loss is the same.
    let (run, file) = (format!("{out}/runs/by-cluster/seed-2"), scratch.path("loss.json"));
    succeeds(&format!("eval loss --model {model} --adapter {run} --data {clustered}/test.jsonl --json {file}"));
    let kept = json(&format!("{out}/compare.json"))["rows"][0]["scores"]["loss"]["seeds"][1].as_f64().unwrap();
    assert!((json(&file)["loss"].as_f64().unwrap() - kept).abs() < 1e-9);

    // What doesn't go together is said before anything is trained.
    let wrong = |runs: &str, wanted: &[&str]| {
        let bad = scratch.path("bad");
        fails(1, &line(&train, runs, &bad), wanted);
        assert!(!fs::exists(format!("{bad}/runs")).unwrap());
    };
    wrong("[[run]]\nname = 'a'\nlabel-field = 'cluster'\n", &["run \"a\"", "--label-field", "router"]);
    wrong("[[run]]\nname = 'a'\ngate = 'label'\nlabel-field = 'topic'\n", &["run \"a\"", "\"topic\"", "none has one"]);
    wrong("[[run]]\nname = 'a'\nmethod = 'lora'\nheads = 'auto'\n", &["run \"a\"", "one head"]);
    wrong("[[run]]\nname = 'a'\ngate = 'label'\nheads = 'auto'\n", &["run \"a\"", "hydra cluster"]);
    wrong("[[run]]\nname = 'a'\nheads = 'some'\n", &["c.toml:9: run \"a\": heads: ", "or auto, found \"some\""]);
}

#[test]
fn what_is_wrong_is_named() {
    let scratch = Scratch::new("compare-bad");
    let out = scratch.path("out");
    let wrong = |text: &str, wanted: &[&str]| {
        fails(1, &compare(&scratch, text, &out, ""), wanted);
        assert!(!fs::exists(format!("{out}/runs")).unwrap());
    };
    wrong(
        "seeds = [1]\n[[run]]\nname = 'a'\nrnak = 4\n",
        &[
            "c.toml:4: run \"a\": unknown option rnak: expected one of alpha, batch, chat-template, clip, data-format, dropout, ",
        ],
    );
    wrong(
        "seeds = [1]\n[[run]]\nname = 'a'\nrank = 'x'\n",
        &["c.toml:4: run \"a\": rank: expected a whole number from 1, found string \"x\""],
    );
    wrong("seeds = [1\n", &["c.toml:", "array"]);
    wrong("seeds = [1]\nruns = 3\n[[run]]\nname = 'a'", &["c.toml:2", "runs"]);
    wrong("seeds = []\n[[run]]\nname = 'a'", &["seeds = []"]);
    wrong("[[run]]\nname = 'a'", &["missing key seeds"]);
    wrong(
        "seeds = [1]\n[[run]]\nname = 'a'\nmethod = 'lora'\nheads = 3",
        &["run \"a\"", "has one head: leave --heads 3 out"],
    );
    wrong("seeds = [1]\n[[run]]\nname = 'a'\ntargets = 'w'", &["c.toml:4: run \"a\": targets: ", "found \"w\""]);
    wrong(
        "seeds = [1]\n[tune]\nlr = [1e-3]\nvalidation = 1e-9\n[[run]]\nname = 'a'",
        &["validation", "one part empty"],
    );
    let (model, config) = (assets("model"), scratch.write("c.toml", config("[1]", 1, "")));
    let data = assets("corpus/train.jsonl");
    let line = |data: &str, eval: &str, out: &str| {
        format!("compare --model {model} --data {data} --eval-data {eval} --config {config} --out {out}")
    };
    fails(1, &line(&data, &scratch.path("none.jsonl"), &scratch.path("o1")), &["none.jsonl"]);
    fails(1, &line(&scratch.write("bad.jsonl", "{}\n"), &data, &scratch.path("o2")), &["bad.jsonl:1"]);
    let mine = scratch.write("mine/file.txt", "mine").replace("/file.txt", "");
    fails(1, &line(&data, &data, &mine), &["mine holds files but no compare.toml"]);
    fails(1, &line(&data, &data, &scratch.path("o3")).replace("c.toml", "none.toml"), &["none.toml"]);
    fails(2, "compare --model m", &["--config"]);
}
