//! Adapters from inside.

use super::support::{Scratch, assets, fails, golden, json, succeeds};
use serde_json::Value;
use std::fs;

fn adapter(method: &str) -> String {
    golden(method).join("adapter").display().to_string()
}

fn copy(scratch: &Scratch, method: &str, name: &str) -> String {
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        scratch.write(&format!("{name}/{file}"), fs::read(golden(method).join("adapter").join(file)).unwrap());
    }
    scratch.path(name)
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

#[test]
fn an_adapter_and_its_copy_are_the_same_inside() {
    let scratch = Scratch::new("analyze");
    let (one, two, out) = (copy(&scratch, "split", "one"), copy(&scratch, "split", "two"), scratch.path("out"));
    let text = succeeds(&format!("analyze {one} {two} --out {out} --seed 3"));
    assert!(text.contains("effective rank") && text.contains("adapters"), "{text}");
    let result = json(&format!("{out}/analysis.json"));
    // 2 layers, 7 projections; every head of one against every head of the other; within each the pairs of its heads.
    let heads = result["adapters"][0]["heads"].as_u64().unwrap();
    for side in ["a", "b"] {
        assert_eq!(result[side]["points"].as_array().unwrap().len() as u64, 2 * 2 * 7 * heads);
        assert_eq!(result[side]["across_adapters"]["all"]["pairs"], 2 * 7 * heads * heads);
        let within = &result[side]["across_heads"]["all"];
        assert_eq!(within["pairs"], 2 * 2 * 7 * heads * (heads - 1) / 2);
        // Of the pairs across, those of a head with its copy are 1, the others as within.
        let n = heads as f64;
        for measure in ["cosine", "cka", "subspace"] {
            let want = (1.0 + (n - 1.0) * number(&within[measure])) / n;
            let got = number(&result[side]["across_adapters"]["all"][measure]);
            assert!((got - want).abs() < 1e-6, "{side} {measure}: {got}, wanted {want}");
        }
        let layers = result[side]["across_heads"]["by_layer"].as_array().unwrap();
        let mean = layers.iter().map(|layer| number(&layer["subspace"])).sum::<f64>() / 2.0;
        assert!((mean - number(&within["subspace"])).abs() < 1e-9);
        // The same matrix is at the same place.
        let points = result[side]["points"].as_array().unwrap();
        let half = points.len() / 2;
        let place = |i: usize| [number(&points[i]["place"][0]), number(&points[i]["place"][1])];
        let spread = (0..half).map(|i| place(i)[0].abs()).fold(0.0, f64::max);
        for i in 0..half {
            let [a, b] = [place(i), place(i + half)];
            assert!((a[0] - b[0]).hypot(a[1] - b[1]) < 0.2 * spread, "{side} {i}: {a:?} {b:?}");
        }
    }
    let before = fs::read(format!("{out}/analysis.json")).unwrap();
    succeeds(&format!("analyze {one} {two} --out {out} --seed 3"));
    assert_eq!(before, fs::read(format!("{out}/analysis.json")).unwrap(), "a seed repeats");
    succeeds(&format!("analyze {one} {two} --out {out} --seed 4 --names first,second"));
    assert_eq!(json(&format!("{out}/analysis.json"))["adapters"][1]["name"], "second");
    for picture in ["tsne-a-by-adapter.svg", "tsne-b-by-head.svg", "subspace.svg"] {
        let picture = fs::read_to_string(format!("{out}/{picture}")).unwrap();
        assert!(picture.starts_with("<svg xmlns") && picture.contains("class=\"dot\""), "{picture}");
    }
}

#[test]
fn one_adapter_and_its_router() {
    let scratch = Scratch::new("analyze-router");
    let (case, out) = (golden("hydra"), scratch.path("out"));
    let (model, data) = (case.join("model"), case.join("data.jsonl"));
    let text = succeeds(&format!(
        "analyze {} --out {out} --model {} --data {}",
        adapter("hydra"),
        model.display(),
        data.display()
    ));
    assert!(text.contains("nothing to compare between adapters") && text.contains("mutual information"), "{text}");
    let result = json(&format!("{out}/analysis.json"));
    assert!(result["a"]["across_adapters"]["all"].is_null() && result["a"]["across_heads"]["all"].is_null());
    assert!(result["b"]["across_heads"]["all"]["pairs"].is_number());
    let router = &result["router"][0];
    assert_eq!(router["watched"].as_object().unwrap().len(), 6);
    // Two heads, six categories: at most one bit.
    assert_eq!(number(&router["most_bits"]), 1.0);
    let places = router["places"].as_array().unwrap();
    assert_eq!(places.len(), 14);
    for place in places {
        for gate in place["gate"].as_object().unwrap().values() {
            let sum: f64 = gate.as_array().unwrap().iter().map(number).sum();
            assert!((sum - 1.0).abs() < 1e-6);
        }
        let bits = number(&place["mutual_information_bits"]);
        assert!((-1e-12..=1.0).contains(&bits));
        // A mean gate is at least as even as the gates that it is the mean of.
        assert!(number(&place["balance"]) >= number(&place["entropy"]) - 1e-6, "{place}");
    }
    assert!(fs::read_to_string(format!("{out}/report.html")).unwrap().contains("<details>"));
}

#[test]
fn how_far_a_has_moved_from_its_start() {
    let scratch = Scratch::new("analyze-start");
    let (model, train, out) = (assets("model"), assets("corpus/train.jsonl"), scratch.path("out"));
    let train = |name: &str, more: &str| {
        let run = scratch.path(name);
        succeeds(&format!("finetune --model {model} --data {train} --steps 3 --out {run} --heads 4 {more}"));
        run
    };
    let (still, moved) = (train("still", "--lr 0 --seed 9"), train("moved", "--lr 3e-2 --seed 9 --method split"));
    let text = succeeds(&format!("analyze {still} {moved} --out {out}"));
    assert!(text.contains("All adapters were trained with the same seed"), "{text}");
    let result = json(&format!("{out}/analysis.json"));
    assert_eq!(result["same_seed"], true);
    let cosine = |i: usize| number(&result["adapters"][i]["cosine_of_a_to_its_start"]);
    assert!((cosine(0) - 1.0).abs() < 1e-9 && (0.01..0.999).contains(&cosine(1)), "{} {}", cosine(0), cosine(1));
    // B of the one is zero still: it has no direction, and no pair.
    assert!(result["b"]["across_adapters"]["all"].is_null());
    assert_eq!(number(&result["adapters"][0]["effective_rank_b"]), 0.0);
    let other = train("other", "--lr 0 --seed 4");
    let text = succeeds(&format!("analyze {still} {moved} {other} --out {out}"));
    assert!(
        text.contains("still and moved were trained with seed 9, so their A matrices started as the same"),
        "{text}"
    );
    let result = json(&format!("{out}/analysis.json"));
    let points = result["a"]["points"].as_array().unwrap().len() as f64;
    assert_eq!((number(&result["a"]["perplexity"]), points < 90.0), ((points - 1.0) / 3.0, true));
    fs::remove_file(format!("{moved}/run.json")).unwrap();
    let text = succeeds(&format!("analyze {still} {moved} --out {out}"));
    assert!(text.contains("Some folders have no run.json that states the seed"), "{text}");
}

#[test]
fn what_is_wrong_is_named() {
    let scratch = Scratch::new("analyze-bad");
    let (hydra, lora, out) = (adapter("hydra"), adapter("lora"), scratch.path("out"));
    let model = golden("lora").join("model").display().to_string();
    let data = golden("lora").join("data.jsonl").display().to_string();
    fails(2, "analyze --out o", &["ADAPTER"]);
    fails(2, &format!("analyze {hydra} --out {out} --data {data}"), &["--model"]);
    fails(1, &format!("analyze {hydra} {} --out {out}", scratch.path("none")), &["none: No such file"]);
    fails(1, &format!("analyze {hydra} {hydra} --out {out}"), &["given twice"]);
    fails(1, &format!("analyze {hydra} {lora} --out {out} --names a"), &["--names: expected 2 names", "found 1"]);
    fails(1, &format!("analyze {hydra} {lora} --out {out} --names a,a"), &["--names", "\"a\" twice"]);
    fails(1, &format!("analyze {lora} --out {out} --model {model} --data {data}"), &["no adapter has one"]);
    let small = scratch.path("small");
    let (tiny, train) = (assets("model"), assets("corpus/train.jsonl"));
    succeeds(&format!("finetune --model {tiny} --data {train} --steps 1 --out {small} --rank 1 --heads 2"));
    fails(1, &format!("analyze {hydra} {small} --out {out}"), &["layers", "not of one model"]);
    let other = format!("analyze {small} --out {out} --model {model} --data {data}");
    fails(1, &other, &["small", "--model"]);
    let file = scratch.write("file", "mine");
    fails(1, &format!("analyze {hydra} --out {file}"), &["--out: can't make"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    let report = fs::read(format!("{small}/report.html")).unwrap();
    fails(1, &format!("analyze {hydra} --out {small}"), &["--out", "report.html"]);
    assert_eq!(fs::read(format!("{small}/report.html")).unwrap(), report);
    let mut bytes = fs::read(format!("{small}/adapter_model.safetensors")).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(format!("{small}/adapter_model.safetensors"), bytes).unwrap();
    fails(1, &format!("analyze {small} --out {out}"), &["small", "NaN"]);
}
