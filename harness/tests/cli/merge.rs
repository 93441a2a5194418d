//! Merged models: what they lose nothing of, and what is not merged.

use super::support::{Scratch, fails, golden, hydra, json, succeeds};
use serde_json::Value;
use std::fs;

fn merge(case: &str, out: &str, more: &str) -> String {
    let case = golden(case);
    let (model, adapter) = (case.join("model"), case.join("adapter"));
    format!("merge --model {} --adapter {} --out {out} {more}", model.display(), adapter.display())
}

#[test]
fn a_merged_lora_has_the_losses_of_the_unmerged_one() {
    let scratch = Scratch::new("merge-lora");
    let out = scratch.path("m");
    let said = succeeds(&merge("lora", &out, ""));
    assert!(said.contains("largest difference of a logit") && said.contains("F32, 1 file"), "{said}");
    let case = golden("lora");
    let data = case.join("data.jsonl");
    let loss = |model: &str| {
        let file = scratch.path("loss.json");
        succeeds(&format!("eval loss {model} --data {} --json {file}", data.display()));
        json(&file)["loss"].as_f64().unwrap()
    };
    let unmerged =
        loss(&format!("--model {} --adapter {}", case.join("model").display(), case.join("adapter").display()));
    let merged = loss(&format!("--model {out}"));
    let plain = loss(&format!("--model {}", case.join("model").display()));
    assert!((merged - unmerged).abs() < 1e-5 && (plain - unmerged).abs() > 1e-2, "{merged} {unmerged} {plain}");
    let facts = json(&format!("{out}/hydra_merge.json"));
    assert_eq!((facts["gate"].as_str(), facts["approximation"].clone()), (Some("one"), Value::Null));
    assert!(facts["relative_difference"].as_f64().unwrap() < 1e-5);
    for file in ["config.json", "tokenizer.json"] {
        assert!(fs::exists(format!("{out}/{file}")).unwrap());
    }
}

#[test]
fn a_router_is_merged_only_as_the_approximation_that_is_asked_for() {
    let scratch = Scratch::new("merge-router");
    let out = scratch.path("m");
    fails(1, &merge("hydra", &out, ""), &["router", "every token", "--gate uniform or head:I"]);
    assert!(!fs::exists(&out).unwrap());
    for gate in ["uniform", "head:0", "head:1"] {
        let out = scratch.path(gate);
        let output = hydra(&merge("hydra", &out, &format!("--gate {gate} --dtype bf16")));
        assert!(output.status.success());
        assert!(String::from_utf8_lossy(&output.stderr).contains("an approximation"));
        let facts = json(&format!("{out}/hydra_merge.json"));
        assert!(facts["approximation"].as_str().unwrap().contains("router"));
        assert_eq!((facts["gate"].as_str(), facts["dtype"].as_str()), (Some(gate), Some("BF16")));
        assert_eq!(json(&format!("{out}/config.json"))["torch_dtype"], "bfloat16");
    }
    fails(1, &merge("split", &out, ""), &["label", "--gate head:I"]);
    let output = hydra(&merge("split", &out, "--gate head:5 --threads 1"));
    assert!(output.status.success() && output.stderr.is_empty(), "exact for records of that label");
}

#[test]
fn what_is_not_merged() {
    let scratch = Scratch::new("merge-bad");
    let out = scratch.path("m");
    for gate in ["head", "head:", "head:-1", "mean", "head:1.5"] {
        fails(2, &merge("hydra", &out, &format!("--gate {gate}")), &["--gate", "uniform"]);
    }
    fails(1, &merge("hydra", &out, "--gate head:2"), &["head 2", "2 heads"]);
    fails(1, &merge("hydra", &out, "--gate one"), &["one head, found 2"]);
    fails(2, &merge("lora", &out, "--shard-size 0"), &["--shard-size"]);
    fails(2, &merge("lora", &out, "--dtype q4_0"), &["--dtype"]);
    let kept = scratch.write("kept/file", "mine");
    fails(1, &merge("lora", &scratch.path("kept"), ""), &["kept", "not empty"]);
    fails(1, &merge("lora", &kept, ""), &["kept/file"]);
    assert_eq!(fs::read_to_string(&kept).unwrap(), "mine");
    let other = golden("split").join("model");
    let adapter = golden("lora").join("adapter");
    fails(1, &format!("merge --model {} --adapter {} --out {out}", other.display(), adapter.display()), &["lora"]);
    let absent = scratch.path("absent");
    let model = golden("lora").join("model");
    fails(
        1,
        &format!("merge --model {} --adapter {absent} --out {out}", model.display()),
        &["absent: No such file or directory"],
    );
    assert!(!fs::exists(&out).unwrap());
}

#[test]
fn a_merge_that_is_too_far_off_is_not_kept() {
    let scratch = Scratch::new("merge-far");
    let case = golden("lora");
    for file in ["config.json", "tokenizer.json"] {
        scratch.write(&format!("base/{file}"), fs::read(case.join("model").join(file)).unwrap());
    }
    // The last tensor is the last norm's: weights that f16 rounds by a fifth, and one that it can't hold.
    let last = json(&scratch.path("base/config.json"))["hidden_size"].as_u64().unwrap() as usize;
    let whole = fs::read(case.join("model/model.safetensors")).unwrap();
    let change = |from_end: usize, value: f32| {
        let mut bytes = whole.clone();
        let end = bytes.len();
        bytes[end - 4 * from_end..].chunks_exact_mut(4).for_each(|x| x.copy_from_slice(&value.to_le_bytes()));
        scratch.write("base/model.safetensors", bytes);
    };
    let (model, out) = (scratch.path("base"), scratch.path("m"));
    let merge = format!("merge --model {model} --adapter {} --out {out}", case.join("adapter").display());
    for (from_end, value, wanted) in [(last, 1e-7, ["differ", "not kept"]), (1, 1e6, ["model.norm.weight", "finite"])] {
        change(from_end, value);
        fails(1, &format!("{merge} --dtype f16"), &[wanted[0], wanted[1], "F16"]);
        assert_eq!(scratch.names(""), ["base"], "only the base model is left");
    }
    succeeds(&merge);
    assert!(fs::exists(&out).unwrap());
}
