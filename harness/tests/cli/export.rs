//! What `hydra export` writes for other engines, and what it refuses.

use super::support::{Scratch, fails, golden, hydra, json, succeeds};
use std::fs;
use std::path::Path;

fn export(case: &str, format: &str, out: &str, more: &str) -> String {
    let case = golden(case);
    let (model, adapter) = (case.join("model"), case.join("adapter"));
    format!("export --model {} --adapter {} --format {format} --out {out} {more}", model.display(), adapter.display())
}

/// The loss of the case's records.
fn loss(scratch: &Scratch, case: &str, model: &str) -> f64 {
    let (data, file) = (golden(case).join("data.jsonl"), scratch.path("loss.json"));
    succeeds(&format!("eval loss {model} --data {} --json {file}", data.display()));
    json(&file)["loss"].as_f64().unwrap()
}

#[test]
fn every_form_of_a_lora_has_its_losses() {
    let scratch = Scratch::new("export-lora");
    let (model, adapter) = (golden("lora").join("model"), golden("lora").join("adapter"));
    let want = loss(&scratch, "lora", &format!("--model {} --adapter {}", model.display(), adapter.display()));
    for (format, dtype) in [("gguf-lora", ""), ("peft", ""), ("gguf", "--dtype f32"), ("hf", "--dtype f32")] {
        let out = scratch.path(format);
        let said = succeeds(&export("lora", format, &out, dtype));
        assert!(said.contains("largest difference of a logit") && said.contains("KL"), "{said}");
        let found = match format {
            "gguf-lora" | "peft" => loss(&scratch, "lora", &format!("--model {} --adapter {out}", model.display())),
            _ => loss(&scratch, "lora", &format!("--model {out}")),
        };
        assert!((found - want).abs() < 1e-5, "{format}: {found} {want}");
    }
    // Rows of 32 are whole blocks, those of 72 are not.
    let [exact, small] = ["f32", "q8_0"].map(|dtype| {
        let out = scratch.path(&format!("{dtype}.gguf"));
        let output = hydra(&export("hydra", "gguf", &out, &format!("--gate uniform --dtype {dtype}")));
        assert!(output.status.success());
        (out, String::from_utf8(output.stdout).unwrap())
    });
    assert!(
        small.1.contains("Q8_0, F16")
            && fs::metadata(&small.0).unwrap().len() < fs::metadata(&exact.0).unwrap().len() / 2
    );
    let [exact, small] = [exact, small].map(|(file, _)| loss(&scratch, "hydra", &format!("--model {file}")));
    assert!((exact - small).abs() < 0.02 && exact != small, "{exact} {small}");
}

#[test]
fn a_router_is_exported_only_as_the_approximation_that_is_asked_for() {
    let scratch = Scratch::new("export-router");
    for format in ["gguf-lora", "gguf", "peft", "hf"] {
        let out = scratch.path(format);
        fails(1, &export("hydra", format, &out, ""), &["router", "every token", "--gate uniform or head:I"]);
        assert!(scratch.names("").is_empty(), "nothing is left");
        let output = hydra(&export("hydra", format, &out, "--gate uniform"));
        assert!(output.status.success() && String::from_utf8_lossy(&output.stderr).contains("an approximation"));
        let says = match format {
            "peft" => fs::read(format!("{out}/hydra_export.json")).unwrap(),
            "hf" => fs::read(format!("{out}/hydra_merge.json")).unwrap(),
            _ => fs::read(&out).unwrap(),
        };
        let wanted = b"an approximation: the adapter's router over 2 heads is left out";
        assert!(says.windows(wanted.len()).any(|text| text == wanted), "{format}");
        if format == "peft" || format == "hf" {
            fs::remove_dir_all(&out).unwrap()
        } else {
            fs::remove_file(&out).unwrap()
        }
    }
}

/// PEFT's rank_pattern: one adapter of the largest rank, which `hydra info` takes apart.
#[test]
fn a_lora_of_several_ranks() {
    let scratch = Scratch::new("export-ranks");
    let model = golden("hydra").join("model").display().to_string();
    let adapter = Path::new(env!("CARGO_MANIFEST_DIR")).join("../hydra-runtime/tests/files/peft/patterns");
    let adapter = adapter.display().to_string();
    let shown = succeeds(&format!("info {model} --adapter {adapter}"));
    assert!(shown.contains("rank by projection     7 in 1, 4 in 3, 3 in 2, 2 in 2; filled up with zeros"), "{shown}");
    assert_eq!(shown.matches("rank by projection").count(), 1, "the default adapter has one rank");
    let listed = succeeds(&format!("info {adapter}"));
    assert!(
        listed.contains("rank_pattern           {\"^model") && listed.contains("lora_B.weight F32 [32, 7]"),
        "{listed}"
    );
    for format in ["peft", "gguf-lora"] {
        let out = scratch.path(format);
        succeeds(&format!("export --model {model} --adapter {adapter} --format {format} --out {out}"));
        assert!(succeeds(&format!("info {model} --adapter {out}")).contains("7 in 1, 4 in 3"));
    }
}

#[test]
fn what_is_not_exported() {
    let scratch = Scratch::new("export-bad");
    let there = scratch.write("there.gguf", "mine");
    for format in ["gguf", "gguf-lora"] {
        fails(1, &export("lora", format, &there, ""), &["there.gguf", "already there", "a new file's name"]);
    }
    let folder = scratch.path("");
    for format in ["peft", "hf"] {
        fails(1, &export("lora", format, &there, ""), &["there.gguf: a file: expected a new or empty folder"]);
        fails(1, &export("lora", format, &folder, ""), &[&folder, ": not empty: expected a new or empty folder"]);
    }
    assert_eq!(fs::read_to_string(&there).unwrap(), "mine");
    assert_eq!(scratch.names(""), ["there.gguf"]);
    let out = scratch.path("out");
    fails(2, &export("lora", "gguf-lora", &out, "--dtype q8_0"), &["--dtype", "f32"]);
    fails(2, &export("lora", "hf", &out, "--dtype q4_k"), &["--dtype", "f32, f16 or bf16"]);
    fails(2, &export("lora", "gguf", &out, "--dtype q3_k"), &["--dtype", "q4_k"]);
    fails(2, &export("lora", "onnx", &out, ""), &["--format", "gguf-lora"]);
    fails(1, &export("hydra", "gguf-lora", &out, "--gate head:2"), &["head 2", "2 heads"]);
    // A damaged file is no adapter, and neither is one of another model.
    let lora = scratch.path("lora.gguf");
    succeeds(&export("lora", "gguf-lora", &lora, ""));
    let whole = fs::read(&lora).unwrap();
    let cut = scratch.write("cut.gguf", &whole[..whole.len() / 2]);
    let model = golden("lora").join("model");
    let generate = |adapter: &str| {
        format!("generate --model {} --adapter {adapter} --prompt Nine --max-tokens 1", model.display())
    };
    fails(1, &generate(&cut), &["cut.gguf", "truncated"]);
    succeeds(&generate(&lora));
    let other = golden("qwen2").join("model");
    fails(1, &format!("generate --model {} --adapter {lora} --prompt Nine", other.display()), &["lora.gguf", "qwen2"]);
    fails(1, &format!("info {cut}"), &["cut.gguf", "truncated"]);
}

#[cfg(unix)]
#[test]
fn a_full_disk_is_told_by_the_name_that_was_asked_for() {
    let scratch = Scratch::new("export-full");
    for format in ["gguf-lora", "gguf", "peft", "hf"] {
        let out = scratch.path(format);
        // A limit of a file's size is met as a full disk is.
        let hydra = env!("CARGO_BIN_EXE_hydra");
        let line = format!("trap '' XFSZ; ulimit -f 1; exec {hydra} {}", export("lora", format, &out, ""));
        let output = std::process::Command::new("sh").args(["-c", &line]).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && said.lines().count() == 1, "{said}");
        assert!(said.starts_with(&format!("error: {out}")) && !said.contains("hydra-tmp"), "{said}");
        assert!(scratch.names("").is_empty(), "{:?}", scratch.names(""));
    }
}
