//! Draws from few and many categories.

use super::compare::test_records;
use super::support::{Scratch, assets, fails, files, json, succeeds};
use std::collections::BTreeMap;
use std::fs;

const CONFIG: &str = "
seeds = [1, 2]
[defaults]
targets = ['down']
steps = 3
lr = 3e-3
[[run]]
name = 'LoRA'
method = 'lora'
[[run]]
name = 'Split'
method = 'split'
rank = 1
head-dropout = 0.1
";

fn line(scratch: &Scratch, config: &str, out: &str, more: &str) -> String {
    let (model, train, test) =
        (assets("model"), assets("corpus/train.jsonl"), scratch.write("t.jsonl", test_records()));
    let config = scratch.write("c.toml", config);
    format!("heterogeneity --model {model} --data {train} --eval-data {test} --config {config} --out {out} {more}")
}

#[test]
fn the_curve_is_what_the_runs_gave() {
    let scratch = Scratch::new("heterogeneity");
    let out = scratch.path("out");
    let command = line(&scratch, CONFIG, &out, "--records 24 --counts 1,4");
    let table = succeeds(&command);
    assert!(table.contains("24 training records for each number of categories") && table.contains("Split"), "{table}");
    let result = json(&format!("{out}/heterogeneity.json"));
    assert_eq!(result["counts"], serde_json::json!([1, 4]));
    for seed in [1, 2] {
        for (count, each) in [(1, 24), (4, 6)] {
            let text = fs::read_to_string(format!("{out}/data/seed-{seed}/categories-{count}.jsonl")).unwrap();
            let mut of: BTreeMap<String, usize> = BTreeMap::new();
            for line in text.lines() {
                let record: serde_json::Value = serde_json::from_str(line).unwrap();
                *of.entry(record["category"].as_str().unwrap().to_string()).or_default() += 1;
            }
            assert_eq!((of.len(), of.values().all(|&n| n == each)), (count, true), "{of:?}");
            let first = result["orders"][seed.to_string()][0].as_str().unwrap();
            assert!(of.contains_key(first));
        }
    }
    // A point is the mean of its runs, measured on all and on each seed's first category.
    for (run, row) in ["lora", "split"].iter().zip(result["rows"].as_array().unwrap()) {
        for (count, point) in [1, 4].iter().zip(row["points"].as_array().unwrap()) {
            for (i, seed) in [1, 2].iter().enumerate() {
                let kept = json(&format!("{out}/runs/{run}/categories-{count}/seed-{seed}/result.json"));
                let held_out = &kept["found"]["held_out"];
                assert_eq!(point["loss"]["seeds"][i], held_out["loss"]);
                let first = result["orders"][seed.to_string()][0].as_str().unwrap();
                assert_eq!(point["first_category"]["seeds"][i], held_out["categories"][first]["loss"]);
            }
            assert_eq!(point["difference"].is_null(), *run == "lora");
        }
    }
    assert!(fs::read_to_string(format!("{out}/heterogeneity.md")).unwrap().contains("| Split | 4 |"));
    // Again: nothing is done; one that is missing is made again, the same.
    let kept = format!("{out}/runs/lora/categories-1/seed-1/adapter_model.safetensors");
    let written = || fs::metadata(&kept).unwrap().modified().unwrap();
    let before = written();
    fs::remove_dir_all(format!("{out}/runs/split/categories-4/seed-2")).unwrap();
    succeeds(&command);
    assert_eq!(
        (json(&format!("{out}/heterogeneity.json"))["rows"].clone(), written()),
        (result["rows"].clone(), before)
    );
    // Other draws do not belong there, and change nothing.
    let before = files(&out);
    let other = CONFIG.replace("samples = 50", "samples = 60");
    fails(1, &line(&scratch, &other, &out, "--records 25 --counts 1,4"), &["result.json", "data was"]);
    assert!(files(&out) == before);
}

#[test]
fn what_is_wrong_is_named() {
    let scratch = Scratch::new("heterogeneity-bad");
    let out = scratch.path("out");
    let wrong = |config: &str, more: &str, wanted: &[&str]| fails(1, &line(&scratch, config, &out, more), wanted);
    wrong(
        CONFIG,
        "--among facts,fiction",
        &["--among: expected some of arithmetic, facts, topics, words, found \"fiction\""],
    );
    wrong(CONFIG, "--records 5000", &["--records 5000", "the largest category"]);
    wrong(CONFIG, "--records 8 --counts 1,5", &["--counts 5: expected at most 4"]);
    wrong(&format!("{CONFIG}[tune]\nlr = [1e-3]\n").replace("lr = 3e-3\n", ""), "", &["[tune] is for compare"]);
    wrong(&format!("{CONFIG}[mmlu]\nlimit = 1\n"), "", &["[mmlu] is for compare"]);
    wrong(
        &CONFIG.replace("rank = 1", "rank = 1\nheads = 2"),
        "--records 8",
        &["run \"Split\" on 4 categories", "expected 4 heads, found 2"],
    );
    fails(2, &line(&scratch, CONFIG, &out, "--counts 0"), &["--counts", "from 1"]);
    assert!(!fs::exists(format!("{out}/runs")).unwrap());
}
