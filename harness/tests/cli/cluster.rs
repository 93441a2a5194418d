//! Clusters of records, what is trained by them, and the heads that `--heads auto` chooses.

use super::support::{Scratch, command, fails, finetune, golden, json as read_json, succeeds};
use serde_json::{Value, json};
use std::fs;

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap()
}

/// `each` records of each of `topics` topics: most words are the topic's own, the others everyone's.
fn corpus(topics: usize, each: usize) -> String {
    let mut state = 88172645463325252u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) as usize % below
    };
    let letters = |n: usize| format!("{}{}", (b'a' + (n / 26) as u8) as char, (b'a' + (n % 26) as u8) as char);
    let mut text = String::new();
    for i in 0..topics * each {
        let topic = i % topics;
        let words: Vec<String> = (0..8 + random(16))
            .map(|_| match random(10) {
                0..6 => format!("topic{topic}{}", letters(random(40))),
                _ => format!("common{}", letters(random(20))),
            })
            .collect();
        let words = words.join(" ").replace(char::is_numeric, &letters(topic));
        let record = json!({"instruction": words, "response": "r", "category": format!("topic {topic}")});
        text += &format!("{record}\n");
    }
    text
}

#[test]
fn plainly_different_topics_are_counted_and_told_apart() {
    let scratch = Scratch::new("topics");
    for topics in 2..=8 {
        let data = scratch.write("topics.jsonl", corpus(topics, 60));
        for seed in [1, 2] {
            let out = scratch.path(&format!("{topics}-{seed}"));
            succeeds(&format!("cluster --data {data} --seed {seed} --out {out}"));
            let found = read_json(&format!("{out}/clusters.json"));
            assert_eq!(found["k"], topics, "seed {seed}: {}", found["tried"]);
            assert!(found["adjusted_rand_index"].as_f64().unwrap() > 0.95, "{topics} {seed}: {}", found["categories"]);
        }
    }
}

#[test]
fn a_larger_corpus_gives_one_number_for_all_seeds() {
    // The demo's domains, which are not so plainly different; and a corpus of one's own, if the environment names one.
    let own = std::env::var("HYDRA_CORPUS").ok();
    let demo = format!("{}/assets/corpus/train.jsonl", env!("CARGO_MANIFEST_DIR"));
    let test = format!("{}/assets/corpus/test.jsonl", env!("CARGO_MANIFEST_DIR"));
    for data in [Some(format!("{demo} {test}")), own].into_iter().flatten() {
        let scratch = Scratch::new("seeds");
        let chosen: Vec<Value> = (0..3)
            .map(|seed| {
                let out = scratch.path(&seed.to_string());
                succeeds(&format!("cluster --data {data} --seed {seed} --out {out}"));
                read_json(&format!("{out}/clusters.json"))["k"].clone()
            })
            .collect();
        assert!(chosen.iter().all(|k| *k == chosen[0]), "{data}: {chosen:?}");
    }
}

#[test]
fn what_was_found_is_written_down_and_repeatable() {
    let scratch = Scratch::new("cluster-files");
    let data = scratch.write("d.jsonl", corpus(3, 20));
    let run = |out: &str, threads: &str| {
        let options = format!("cluster --data {data} --k 2..6 --out {}", scratch.path(out));
        let output = command(&options).env("RAYON_NUM_THREADS", threads).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let said = run("one", "1");
    assert_eq!(said.replace("/one", "/two"), run("two", "2"));
    for file in ["clusters.json", "d.jsonl", "elbow.svg", "report.html"] {
        assert_eq!(read(&scratch.path(&format!("one/{file}"))), read(&scratch.path(&format!("two/{file}"))), "{file}");
    }
    let found = read_json(&scratch.path("one/clusters.json"));
    let tried = found["tried"].as_array().unwrap();
    assert_eq!(tried.iter().map(|one| one["k"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
    let inertia: Vec<f64> = tried.iter().map(|one| one["inertia"].as_f64().unwrap()).collect();
    assert!(inertia.is_sorted_by(|a, b| a > b), "{inertia:?}");
    assert_eq!((tried[0]["silhouette"].clone(), found["inertia"].clone()), (Value::Null, tried[2]["inertia"].clone()));
    assert_eq!(found["silhouette"], tried[2]["silhouette"]);
    assert_eq!((found["sizes"].clone(), found["records"].clone()), (json!([20, 20, 20]), json!(60)));
    for cluster in 0..3 {
        assert_eq!(found["nearest"][cluster].as_array().unwrap().len(), 3);
        assert!(found["terms"][cluster][0].as_str().unwrap().starts_with("topic"), "{}", found["terms"]);
    }
    // The records carry their cluster, and it is what clusters.json counts.
    let clusters: Vec<u64> = read(&scratch.path("one/d.jsonl"))
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["cluster"].as_u64().unwrap())
        .collect();
    assert_eq!((0..3).map(|c| clusters.iter().filter(|&&own| own == c).count()).collect::<Vec<_>>(), [20, 20, 20]);
    for (cluster, near) in found["nearest"].as_array().unwrap().iter().enumerate() {
        assert!(
            near.as_array().unwrap().iter().all(|n| clusters[n["record"].as_u64().unwrap() as usize] == cluster as u64)
        );
    }
    // The page and the plot are whole, self-contained, and say the same.
    let (page, plot) = (read(&scratch.path("one/report.html")), read(&scratch.path("one/elbow.svg")));
    assert!(page.contains("60 records fall into 3 clusters") && page.contains("Adjusted Rand index: 1.000"), "{page}");
    assert!(page.contains("line fitted from 3 on") && !page.contains("http") && page.contains("prefers-color-scheme"));
    assert!(
        plot.contains("xmlns=\"http://www.w3.org/2000/svg\"") && plot.contains("<style>") && plot.ends_with("</svg>\n")
    );
}

#[test]
fn one_number_is_taken_as_it_is() {
    let scratch = Scratch::new("cluster-k");
    let data = scratch.write("d.jsonl", corpus(3, 20));
    let said = succeeds(&format!("cluster --data {data} --k 5"));
    assert!(said.contains("5 clusters: as asked for") && said.lines().count() == 9, "{said}");
    assert!(succeeds(&format!("cluster --data {data} --k 1")).contains("1 clusters: as asked for"));
    assert!(!fs::exists(scratch.path("clusters.json")).unwrap(), "without --out nothing is written");
}

#[test]
fn records_are_kept_as_they_were() {
    let scratch = Scratch::new("cluster-kept");
    let fruit = r#"{"instruction": "apple pear", "response": "r", "n": 1.10, "big": 12345678901234567890123}"#;
    let tool = r#"{ "prompt" : "hammer saw", "completion" : "\u00e4", "cluster": "old", "z": [1.10] } "#;
    let other = r#"{"instruction": "saw hammer", "context": null, "output": "o"}"#;
    let one = scratch.write("a/one.jsonl", format!("\u{feff}{fruit}\r\n\n{tool}\n"));
    let two = scratch.write("b/two.jsonl", format!("{other}\n{}", fruit.replace("apple pear", "pear apple")));
    let out = scratch.path("out");
    succeeds(&format!("cluster --data {one} {two} --k 2 --out {out}"));
    let lines: Vec<String> = read(&format!("{out}/one.jsonl")).lines().map(str::to_string).collect();
    let kept = fruit.strip_suffix('}').unwrap();
    assert!(lines[0].starts_with(kept) && lines[0].len() == fruit.len() + r#", "cluster": 0"#.len(), "{}", lines[0]);
    let place = lines[1].find("\"cluster\": ").unwrap() + "\"cluster\": ".len();
    let restored = format!("{}\"old\"{}", &lines[1][..place], &lines[1][place + 1..]);
    assert_eq!((restored.as_str(), lines.len()), (tool.trim_end(), 2));
    let cluster = |line: &str| serde_json::from_str::<Value>(line).unwrap()["cluster"].as_u64().unwrap();
    let others: Vec<u64> = read(&format!("{out}/two.jsonl")).lines().map(cluster).collect();
    assert_eq!((cluster(&lines[0]), cluster(&lines[1])), (others[1], others[0]));
    assert_ne!(others[0], others[1]);
}

#[test]
fn what_cannot_be_clustered() {
    let scratch = Scratch::new("cluster-bad");
    let data = scratch.write("d.jsonl", corpus(2, 10));
    for k in ["0", "5..2", "a..b", "2..", "300"] {
        fails(2, &format!("cluster --data {data} --k {k}"), &["--k"]);
    }
    fails(2, "cluster --out o", &["--data"]);
    fails(1, &format!("cluster --data {data} --k 50"), &["--k 50: expected at most 20 clusters"]);
    let apart = scratch.write("apart.jsonl", "{\"prompt\":\"x y z 1 22\",\"completion\":\"c\"}\n".repeat(3));
    let out = scratch.path("out");
    fails(1, &format!("cluster --data {apart} --out {out}"), &["no word", "3 records"]);
    fails(1, &format!("cluster --data {} --out {out}", scratch.path("absent.jsonl")), &["absent.jsonl"]);
    let broken = scratch.write("broken.jsonl", "{\"prompt\":\"x\",\"completion\":\"c\"}\n{\"prompt\n");
    fails(1, &format!("cluster --data {broken} --out {out}"), &["broken.jsonl:2"]);
    let twice = scratch.write("again/d.jsonl", corpus(2, 10));
    fails(1, &format!("cluster --data {data} {twice} --out {out}"), &["two files with this name"]);
    succeeds(&format!("cluster --data {data} {twice}"));
    if cfg!(unix) {
        // It gives nothing when it is read again.
        fails(1, &format!("cluster --data /dev/stdin --out {out}"), &["/dev/stdin: expected a regular file"]);
        fails(1, &finetune("hydra", &out, "--data /dev/null"), &["/dev/null"]);
    }
    assert!(!fs::exists(&out).unwrap());
    let full = scratch.write("full/file", "mine");
    fails(1, &format!("cluster --data {data} --out {}", scratch.path("full")), &["full", "not empty"]);
    fails(1, &format!("cluster --data {data} --out {full}"), &["full/file"]);
    assert_eq!(read(&full), "mine");
    let left = scratch.names("");
    assert!(left.iter().all(|name| !name.starts_with(".hydra-tmp-")), "{left:?}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_nothing() {
    let scratch = Scratch::new("cluster-ctrl-c");
    let data = scratch.write("d.jsonl", corpus(8, 1500));
    super::support::stopped_leaves_nothing(
        &scratch,
        &format!("cluster --data {data} --out {}", scratch.path("folder/out")),
    );
}

const SHORT: &str = "--batch 4 --steps 2 --lr 1e-2 --warmup 0 --seq-len 64 --rank 2";

/// A fine-tune of the tiny model on `data`.
fn train(data: &str, out: &str, more: &str) -> String {
    let model = golden("hydra").join("model");
    format!("finetune --model {} --data {data} --out {out} {SHORT} {more}", model.display())
}

#[test]
fn heads_are_as_many_as_there_are_clusters() {
    let scratch = Scratch::new("auto");
    let data = scratch.write("d.jsonl", corpus(3, 30));
    let out = scratch.path("run");
    let output = command(&train(&data, &out, "--heads auto")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("3 heads: the elbow"), "{said}");
    let run = read_json(&format!("{out}/run.json"));
    assert_eq!((run["options"]["heads"].clone(), run["facts"]["clusters"]["k"].clone()), (json!(3), json!(3)));
    assert_eq!(run["facts"]["clusters"]["sizes"], json!([30, 30, 30]));
    // Clustered by the same code with the same seed.
    succeeds(&format!("cluster --data {data} --seed 41 --out {}", scratch.path("c")));
    assert_eq!(read_json(&scratch.path("c/clusters.json"))["tried"], run["facts"]["clusters"]["tried"]);
    succeeds(&train(&data, &out, "--heads auto --resume"));
    let none = scratch.path("none");
    fails(1, &train(&data, &none, "--heads auto --method lora"), &["one head"]);
    fails(1, &train(&data, &none, "--heads auto --gate label"), &["--heads auto", "hydra cluster"]);
    fails(2, &train(&data, &none, "--heads some"), &["--heads", "auto"]);
    let init = format!("--heads auto --init-adapter {out}");
    fails(1, &train(&data, &none, &init), &["--init-adapter"]);
    assert!(!fs::exists(&none).unwrap());
}

#[test]
fn labels_of_any_field_have_heads() {
    let scratch = Scratch::new("label-field");
    let data = scratch.write("d.jsonl", corpus(3, 20));
    let clustered = scratch.path("c");
    succeeds(&format!("cluster --data {data} --k 3 --out {clustered}"));
    let (data, out) = (format!("{clustered}/d.jsonl"), scratch.path("run"));
    let split = "--method split --label-field cluster --targets q,down --dropout 0";
    succeeds(&train(&data, &out, &format!("{split} --eval-data {data}")));
    let config = read_json(&format!("{out}/adapter_config.json"));
    assert_eq!((config["labels"].clone(), config["label_field"].clone()), (json!(["0", "1", "2"]), json!("cluster")));
    let run = read_json(&format!("{out}/run.json"));
    assert_eq!((run["options"]["label-field"].clone(), run["options"]["heads"].clone()), (json!("cluster"), json!(3)));

    // Evaluation takes the head from the same field; a record without it, or with another's, gets the mean of the heads.
    let model = golden("hydra").join("model");
    let loss = |data: &str, adapter: &str| {
        let file = scratch.path("loss.json");
        succeeds(&format!(
            "eval loss --model {} --data {data} --adapter {adapter} --seq-len 64 --json {file}",
            model.display()
        ));
        read_json(&file)["loss"].as_f64().unwrap()
    };
    let own = loss(&data, &out);
    assert_eq!(own, last_json(&format!("{out}/evals.jsonl"))["loss"].as_f64().unwrap());
    let relabelled = |from: &str, to: &str| {
        let text = read(&data);
        scratch.write("other.jsonl", text.lines().map(|line| line.replace(from, to) + "\n").collect::<String>())
    };
    let unknown = loss(&relabelled("\"cluster\": ", "\"cluster\": 7"), &out);
    let without = loss(&relabelled("\"cluster\": ", "\"else\": "), &out);
    assert_eq!(unknown, without);
    assert!((own - unknown).abs() > 1e-6, "{own} {unknown}");
    // Training on such records is said to be so.
    let strange = relabelled("\"cluster\": ", "\"cluster\": 7");
    let further = train(&strange, &scratch.path("further"), &format!("--init-adapter {out}"));
    let output = command(&further.replace("--seq-len 64", "--seq-len 256")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("60 of 60 records have no label with a head"), "{said}");
    // And that mean is what the uniform fold gives.
    let merged = scratch.path("merged");
    succeeds(&format!("merge --model {} --adapter {out} --gate uniform --out {merged}", model.display()));
    let file = scratch.path("merged.json");
    succeeds(&format!("eval loss --model {merged} --data {data} --seq-len 64 --json {file}"));
    assert!((read_json(&file)["loss"].as_f64().unwrap() - unknown).abs() < 1e-4);

    // Generation names its label; the head alone is not the mean.
    let generate =
        format!("generate --model {} --adapter {out} --prompt topic --max-tokens 24 --temperature 1", model.display());
    let texts: Vec<String> =
        ["", "--label 0", "--label 1"].map(|label| succeeds(&format!("{generate} {label}"))).into_iter().collect();
    assert!(texts[1] != texts[2] || texts[0] != texts[1], "{texts:?}");
    fails(1, &format!("{generate} --label 9"), &["--label: expected one of 0, 1, 2", "found \"9\""]);
    let router = golden("hydra").join("adapter");
    let other = format!("generate --model {} --adapter {} --prompt x --label 0", model.display(), router.display());
    fails(1, &other, &["--label 0", "router"]);
    fails(2, &format!("generate --model {} --prompt x --label 0", model.display()), &["--adapter"]);
}

fn last_json(path: &str) -> Value {
    serde_json::from_str(read(path).lines().last().unwrap()).unwrap()
}

#[test]
fn label_fields_that_do_not_fit() {
    let scratch = Scratch::new("label-bad");
    let out = scratch.path("run");
    let try_options = |options: &str, wanted: &[&str]| {
        fails(1, &finetune("hydra", &out, options), wanted);
        assert!(!fs::exists(&out).unwrap());
    };
    try_options("--label-field cluster", &["--label-field", "router"]);
    try_options("--gate label --label-field cluster", &["\"cluster\"", "none has one"]);
    let data = scratch.write("d.jsonl", r#"{"prompt": "p", "completion": "c", "cluster": [1]}"#);
    fails(
        1,
        &train(&data, &out, "--gate label --label-field cluster"),
        &["d.jsonl:1: \"cluster\": expected a string or a whole number, found a list"],
    );
    let adapter = golden("split").join("adapter");
    let (model, data) = (golden("split").join("model"), golden("split").join("data.jsonl"));
    let init = format!("--init-adapter {} --label-field cluster", adapter.display());
    let options = format!("finetune --model {} --data {} --out {out} {init}", model.display(), data.display());
    fails(1, &options, &["--label-field", "--init-adapter"]);
}
