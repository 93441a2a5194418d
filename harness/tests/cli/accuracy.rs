//! `eval accuracy`: generated answers and choices.

use super::support::{Scratch, fails, golden, hydra, json, succeeds};
use serde_json::Value;
use std::fs;

fn eval(data: &str, more: &str) -> String {
    format!("eval accuracy --model {} --data {data} {more}", golden("hydra").join("model").display())
}

fn lines(path: &str) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The records as questions, of which each choice is the right answer once: the scores tell which one is the likeliest.
fn each_choice(records: impl IntoIterator<Item = Value>) -> String {
    let choices = serde_json::json!(["a", "the", "to", "is", "in", "and"]);
    let of = |record: Value| {
        let choices = choices.clone();
        (0..6).map(move |answer| {
            let mut record = record.clone();
            (record["question"], record["choices"]) = (record["instruction"].clone(), choices.clone());
            record["answer"] = answer.into();
            record.to_string() + "\n"
        })
    };
    records.into_iter().flat_map(of).collect()
}

/// Answers that the model itself gives are right ones, whatever else is answered beside them.
#[test]
fn generated_answers() {
    let scratch = Scratch::new("generated");
    let prompts = ["Name", "Add 17 and 25.", "Two tides?", "What is a fish?", "Colour"];
    let model = golden("hydra").join("model").display().to_string();
    let answer = |prompt: &str| {
        let mut command = super::support::command(&format!("generate --model {model} --max-tokens 6 --template plain"));
        let output = command.args(["--prompt", prompt]).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap().trim_end_matches('\n').to_string()
    };
    let record = |(i, prompt): (usize, &&str)| {
        let completion = if i == 2 { "another answer".into() } else { answer(prompt) };
        let category = if i < 3 { "x" } else { "y" };
        serde_json::json!({"prompt": prompt, "completion": completion, "category": category}).to_string()
    };
    let records: Vec<String> = prompts.iter().enumerate().map(record).collect();
    let data = scratch.write("d.jsonl", records.join("\n"));
    let (file, predictions) = (scratch.path("a.json"), scratch.path("p.jsonl"));
    let mut found = Vec::new();
    for batch in [1, 3] {
        let more = format!("--max-tokens 6 --batch {batch} --json {file} --predictions {predictions}");
        let table = succeeds(&eval(&data, &more));
        assert!(table.contains("macro (mean of categories)") && table.contains("accuracy %"), "{table}");
        let report = json(&file);
        assert_eq!((report["metric"].as_str(), report["questions"].as_u64()), (Some("exact"), Some(5)));
        assert_eq!(
            (report["accuracy"].as_f64(), report["categories"]["y"]["accuracy"].as_f64()),
            (Some(0.8), Some(1.0))
        );
        assert!((report["stderr"].as_f64().unwrap() - 0.2).abs() < 1e-9);
        found.push(lines(&predictions));
    }
    assert_eq!(found[0], found[1]);
    assert_eq!((found[0][2]["answer"].as_str(), found[0][2]["score"].as_f64()), (Some("another answer"), Some(0.0)));
    assert!(found[0][0]["at"].as_str().unwrap().ends_with("d.jsonl:1"));
    // What follows a stop string is not part of an answer.
    let whole = found[0][0]["prediction"].as_str().unwrap().to_string();
    let stop = whole.trim().split(' ').next_back().unwrap().to_string();
    let mut command =
        super::support::command(&eval(&data, &format!("--max-tokens 6 --limit 1 --predictions {predictions}")));
    assert!(command.args(["--stop", &stop]).output().unwrap().status.success());
    let stopped = lines(&predictions);
    assert_eq!(stopped.len(), 2);
    assert_eq!(stopped[0]["prediction"].as_str().unwrap(), &whole[..whole.find(&stop).unwrap()]);
    for metric in ["contains", "f1"] {
        succeeds(&eval(&data, &format!("--max-tokens 2 --metric {metric} --json {file}")));
        assert_eq!(json(&file)["metric"], metric);
    }
}

/// The log-likelihood of a choice is minus the loss of the record that ends with it.
#[test]
fn choices_by_their_likelihood() {
    let scratch = Scratch::new("choices");
    let question = r#"{"question":"What is a fish?","subject":"s","choices":["Tope","Rope it is","Nope"],"answer":0}"#;
    let predictions = scratch.path("p.jsonl");
    let run = |data: &str, more: &str| {
        succeeds(&eval(data, &format!("{more} --predictions {predictions}")));
        lines(&predictions)
    };
    let data = scratch.write("q.jsonl", question);
    let found = &run(&data, "--template plain")[0];
    let likelihoods: Vec<f64> =
        found["log_likelihoods"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    let best = (0..3).max_by(|&a, &b| likelihoods[a].total_cmp(&likelihoods[b])).unwrap();
    assert_eq!(found["prediction"], ["Tope", "Rope it is", "Nope"][best]);
    assert_eq!(found["score"].as_f64(), Some(f64::from(u8::from(best == 0))));
    // The same three as generated answers would be compared: exact takes the text of the right choice.
    let text = succeeds(&eval(&data, "--metric exact --max-tokens 3"));
    assert!(text.contains("all") && !text.contains("per character"), "{text}");
    let all = [
        question,
        r#"{"question":"Which?","choices":{"text":["a","b","c","d"],"label":["A","B","C","D"]},"answerKey":"C"}"#,
        r#"{"goal":"Boil water","sol1":"Fire","sol2":"Ice","label":0}"#,
        r#"{"passage":"Ice is cold.","question":"is ice cold","answer":true}"#,
        r#"{"ctx":"A man sits","endings":["up.","down.","in.","out."],"label":"1"}"#,
    ];
    let data = scratch.write("all.jsonl", all.join("\n"));
    let file = scratch.path("a.json");
    let found = run(&data, &format!("--json {file}"));
    let counts: Vec<usize> = found.iter().map(|line| line["log_likelihoods"].as_array().unwrap().len()).collect();
    assert_eq!(counts, [3, 4, 2, 2, 4]);
    let report = json(&file);
    assert_eq!((report["metric"].as_str(), report["questions"].as_u64()), (Some("choice"), Some(5)));
    let mean = found.iter().map(|line| line["score_norm"].as_f64().unwrap()).sum::<f64>() / 5.0;
    assert!((report["accuracy_norm"].as_f64().unwrap() - mean).abs() < 1e-12);
}

/// Under the label gate, a record's answer is that of its label's head.
#[test]
fn heads_of_labels() {
    let scratch = Scratch::new("heads");
    let (model, adapter) = (golden("split").join("model"), golden("split").join("adapter"));
    let data = golden("split").join("data.jsonl");
    let line = |more: &str| {
        let (model, adapter, data) = (model.display(), adapter.display(), data.display());
        format!("eval accuracy --model {model} --adapter {adapter} --data {data} --max-tokens 4 {more}")
    };
    let predictions = scratch.path("p.jsonl");
    succeeds(&line(&format!("--predictions {predictions}")));
    let own = lines(&predictions);
    for line_of in &own {
        let label = line_of["category"].as_str().unwrap();
        succeeds(&line(&format!("--label {label} --predictions {predictions}")));
        let at = |line: &&Value| line["at"] == line_of["at"];
        assert_eq!(lines(&predictions).iter().find(at), Some(line_of));
    }
}

#[test]
fn a_run_is_measured_by_its_answers() {
    let scratch = Scratch::new("finetune-answers");
    let (model, data) = (golden("hydra").join("model"), golden("hydra").join("data.jsonl").display().to_string());
    let line = |out: &str, more: &str| {
        format!("finetune --model {} --data {data} --steps 1 --batch 2 --out {out} {more}", model.display())
    };
    let out = scratch.path("out");
    let text = succeeds(&line(&out, &format!("--accuracy-data {data} --accuracy-metric f1 --accuracy-max-tokens 4")));
    assert!(text.contains("F1 %") && text.contains("before") && text.contains("after"), "{text}");
    let page = fs::read_to_string(format!("{out}/report.html")).unwrap();
    assert!(page.contains("F1 by category") && page.contains("standard errors over questions, words in common"));
    let found = json(&format!("{out}/accuracy.json"));
    let file = scratch.path("a.json");
    for (key, adapter) in [("before", String::new()), ("after", format!("--adapter {out}"))] {
        succeeds(&eval(&data, &format!("{adapter} --metric f1 --max-tokens 4 --json {file}")));
        let expected = json(&file);
        assert_eq!(
            (&found[key]["accuracy"], &found[key]["categories"]),
            (&expected["accuracy"], &expected["categories"])
        );
    }
    // Where a run starts from an adapter, that is before.
    let (second, start) = (scratch.path("second"), golden("hydra").join("adapter").display().to_string());
    // "the", which is the likeliest for the model alone.
    let all = each_choice(lines(&data));
    let questions = scratch.write("q.jsonl", all.lines().skip(1).step_by(6).collect::<Vec<_>>().join("\n"));
    succeeds(&line(&second, &format!("--init-adapter {start} --accuracy-data {questions}")));
    let [bare, started] = [String::new(), format!("--adapter {start}")].map(|adapter| {
        succeeds(&eval(&questions, &format!("{adapter} --json {file}")));
        json(&file)["categories"].clone()
    });
    assert_eq!(json(&format!("{second}/accuracy.json"))["before"]["categories"], started);
    assert_ne!(bare, started);
    let run = json(&format!("{out}/run.json"));
    assert_eq!(
        (run["running"]["accuracy"]["metric"].as_str(), run["spec"]["accuracy-max-tokens"].as_u64()),
        (Some("f1"), Some(4))
    );
    assert!(!succeeds(&line(&scratch.path("plain"), "")).contains("before"));
    fails(2, &line(&scratch.path("o"), "--accuracy-metric f1"), &["--accuracy-data"]);
    // Before the training: there is no folder then.
    let text = scratch.write("text.jsonl", r#"{"text":"t"}"#);
    fails(
        1,
        &line(&scratch.path("o"), &format!("--accuracy-data {text}")),
        &["text.jsonl:1: expected a record with an answer"],
    );
    assert!(!fs::exists(scratch.path("o")).unwrap());
}

/// Every run answers the records, and differences are paired.
#[test]
fn runs_are_compared_by_their_answers() {
    let scratch = Scratch::new("answers");
    let data = golden("hydra").join("data.jsonl").display().to_string();
    let base = "seeds = [1, 2]\n[defaults]\nsteps = 1\nbatch = 2\ntargets = 'q'\n";
    let table = format!("[accuracy]\ndata = '{data}'\nmetric = 'f1'\nmax-tokens = 4\n");
    let runs = "[[run]]\nname = 'a'\n[[run]]\nname = 'b'\nlr = 1e-2\n";
    let out = scratch.path("out");
    let compare = |config: &str, out: &str| {
        let config = scratch.write("c.toml", config);
        let model = golden("hydra").join("model");
        format!("compare --model {} --data {data} --eval-data {data} --config {config} --out {out}", model.display())
    };
    let config = format!("{base}{table}{runs}");
    let text = succeeds(&compare(&config, &out));
    assert!(text.contains("F1 %") && !text.contains("accuracy %"), "{text}");
    let found = json(&format!("{out}/compare.json"));
    assert_eq!(
        (found["accuracy"]["metric"].as_str(), found["base"]["accuracy"]["questions"].as_u64()),
        (Some("f1"), Some(6))
    );
    let row = &found["rows"][1];
    assert!(row["scores"]["accuracy"]["mean"].is_f64() && row["difference"]["accuracy"]["low"].is_f64(), "{row}");
    let markdown = fs::read_to_string(format!("{out}/compare.md")).unwrap();
    assert!(markdown.contains("## F1 by category, %"), "{markdown}");
    assert!(fs::read_to_string(format!("{out}/report.html")).unwrap().contains("F1 by category, %"));
    let svg = fs::read_to_string(format!("{out}/accuracy-difference.svg")).unwrap();
    assert!(svg.contains("F1: difference from “a”") && svg.contains("percentage points, 95 % interval;"), "{svg}");
    // What is finished is taken over, unless other records are answered.
    assert_eq!(succeeds(&compare(&config, &out)), text);
    fails(1, &compare(&config.replace("max-tokens = 4", "max-tokens = 5"), &out), &["accuracy"]);
    fails(1, &compare(&config.replace("'f1'", "'f2'"), &scratch.path("o")), &["c.toml:", "f2"]);
    fails(1, &compare(&config.replace(&format!("data = '{data}'\n"), ""), &scratch.path("o")), &["c.toml:", "data"]);
}

/// Under the label gate, the heads of a comparison are those of its runs' own fields.
#[test]
fn runs_are_compared_by_the_heads_of_their_own_labels() {
    let scratch = Scratch::new("answers-of-labels");
    let (model, golden) = (golden("split").join("model").display().to_string(), golden("split"));
    // Its labels are in another field now, and in "category" there is another's.
    let mut config = json(&golden.join("adapter/adapter_config.json").display().to_string());
    config["label_field"] = "topic".into();
    let weights = "adapter_model.safetensors";
    scratch.write(&format!("adapter/{weights}"), fs::read(golden.join("adapter").join(weights)).unwrap());
    scratch.write("adapter/adapter_config.json", config.to_string());
    let records = lines(&golden.join("data.jsonl").display().to_string());
    let labels: Vec<Value> = records.iter().map(|record| record["category"].clone()).collect();
    let others = labels.iter().cycle().skip(1);
    let with_topics = records.into_iter().zip(&labels).zip(others).map(|((mut record, topic), category)| {
        (record["topic"], record["category"]) = (topic.clone(), category.clone());
        record
    });
    let data = scratch.write("d.jsonl", each_choice(with_topics));
    let (adapter, out) = (scratch.path("adapter"), scratch.path("out"));
    let config = scratch.write(
        "c.toml",
        format!(
            "seeds = [1]\n[defaults]\nsteps = 1\nbatch = 6\nlr = 1e-6\n[accuracy]\ndata = '{data}'\n\
             [[run]]\nname = 'own'\ninit-adapter = '{adapter}'\n[[run]]\nname = 'router'\n"
        ),
    );
    let files = format!("--data {data} --eval-data {data} --config {config}");
    succeeds(&format!("compare --model {model} {files} --out {out}"));
    let predictions = scratch.path("p.jsonl");
    for run in ["own", "router"] {
        let run = format!("{out}/runs/{run}/seed-1");
        let more = format!("--data {data} --predictions {predictions}");
        succeeds(&format!("eval accuracy --model {model} --adapter {run} {more}"));
        let expected: Vec<Value> = lines(&predictions).into_iter().map(|line| line["score"].clone()).collect();
        assert_eq!(json(&format!("{run}/records.json"))["answers"], Value::from(expected), "{run}");
    }
}

#[test]
fn questions_that_are_refused() {
    let scratch = Scratch::new("bad-questions");
    let refused = |text: &str, more: &str, wanted: &[&str]| {
        fails(1, &eval(&scratch.write("q.jsonl", text), more), wanted);
    };
    let good = r#"{"question":"q","choices":["a","b"],"answer":0}"#;
    let record = r#"{"prompt":"p","completion":"c"}"#;
    refused(&format!("{good}\n{record}"), "", &["q.jsonl:2: expected a question with choices"]);
    refused(record, "--metric choice", &["q.jsonl:1: expected a question with choices"]);
    refused(
        &good.replace("0}", "2}"),
        "",
        &["q.jsonl:1: \"answer\": expected 0 to 1, a letter or one of the choices, found 2"],
    );
    refused(r#"{"text":"t"}"#, "", &["q.jsonl:1: expected a record with an answer, found a text"]);
    refused(
        &record.replace("\"p\"", &format!("\"{}\"", "long ".repeat(300))),
        "",
        &["q.jsonl:1: expected 1 to 255 tokens"],
    );
    refused(
        &good.replace("\"q\"", &format!("\"{}\"", "long ".repeat(300))),
        "",
        &["q.jsonl:1: expected at most 256 tokens"],
    );
    refused("{", "", &["q.jsonl:1: invalid JSON"]);
    refused(record, "--template chat", &["--template chat", "no chat template"]);
    let same = scratch.path("o.json");
    fails(1, &eval("q.jsonl", &format!("--json {same} --predictions {same}")), &["--json and --predictions are both"]);
    fails(2, &eval("q.jsonl", "--metric guess"), &["--metric", "choice", "contains"]);
    let output = hydra(&eval(&scratch.write("q.jsonl", record), "--stop= --max-tokens 2"));
    assert!(String::from_utf8(output.stderr).unwrap().contains("an empty stop string"));
}
