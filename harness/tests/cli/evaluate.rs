//! Held-out loss, MMLU and generation.

use super::support::{Scratch, assets, command, fails, golden, hydra, json, succeeds};
use serde_json::Value;
use std::fs;
use std::path::Path;

fn case(method: &str) -> String {
    let case = golden(method);
    format!("--model {} --adapter {}", case.join("model").display(), case.join("adapter").display())
}

#[test]
fn losses_are_those_of_pytorch() {
    for method in ["hydra", "lora", "split"] {
        let scratch = Scratch::new(&format!("loss-{method}"));
        let file = scratch.path("loss.json");
        let data = golden(method).join("data.jsonl");
        succeeds(&format!("eval loss {} --data {} --json {file} --precision f32", case(method), data.display()));
        let bytes = fs::read(golden(method).join("golden.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let value =
            |name: &str| f64::from(f32::from_le_bytes(tensors.tensor(name).unwrap().data().try_into().unwrap()));
        let found = json(&file);
        assert!((found["loss"].as_f64().unwrap() - value("loss")).abs() < 1e-4);
        assert_eq!(found["records"], 6);
        for (n, line) in fs::read_to_string(data).unwrap().lines().enumerate() {
            let record: Value = serde_json::from_str(line).unwrap();
            let loss = found["categories"][record["category"].as_str().unwrap()]["loss"].as_f64().unwrap();
            assert!((loss - value(&format!("nll.{n}"))).abs() < 1e-4, "{method} {n}");
        }
    }
}

const QUESTIONS: &str =
    "What is a fish?,Tope,Rope,Hope,Nope,A\n\"Add 17, and 25.\",40,41,42,43,C\nTwo tides?,day,week,sea,moon,A\n";

fn questions(scratch: &Scratch) -> String {
    for subject in ["anatomy", "virology"] {
        scratch.write(&format!("data/test/{subject}_test.csv"), QUESTIONS);
        scratch
            .write(&format!("data/dev/{subject}_dev.csv"), "Colour?,Red,Two,Three,Four,A\nTide?,Sea,Sun,Sand,Soil,A\n");
    }
    scratch.path("data")
}

#[test]
fn mmlu_reports_and_predictions() {
    let scratch = Scratch::new("mmlu");
    let (data, file, lines) = (questions(&scratch), scratch.path("m.json"), scratch.path("p.jsonl"));
    for (scoring, shots) in [("letter", 0), ("letter", 1), ("cloze", 0)] {
        let how = format!("--scoring {scoring} --shots {shots} --json {file} --predictions {lines}");
        let table = succeeds(&format!("eval mmlu {} --data {data} {how}", case("hydra")));
        assert!(table.contains("anatomy") && table.contains("micro"));
        let report = json(&file);
        let keys: Vec<_> = report.as_object().unwrap().keys().cloned().collect();
        let want =
            "accuracy_micro accuracy_macro stderr stderr_macro questions shots scoring groups subjects seconds tokens";
        assert_eq!(keys.join(" "), want);
        assert_eq!((report["questions"].as_u64(), report["shots"].as_u64()), (Some(6), Some(shots)));
        let predictions = fs::read_to_string(&lines).unwrap();
        assert_eq!(predictions.lines().count(), 6);
        let first: Value = serde_json::from_str(predictions.lines().next().unwrap()).unwrap();
        assert_eq!(
            (first["subject"].as_str(), first["index"].as_u64(), first["answer"].as_str()),
            (Some("anatomy"), Some(0), Some("A"))
        );
        assert_eq!(first["scores"].as_array().unwrap().len(), 4);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn predictions_and_the_table_may_share_a_file_that_is_stdout() {
    let scratch = Scratch::new("mmlu-stdout");
    let (data, out) = (questions(&scratch), scratch.path("out.txt"));
    let line = format!("eval mmlu {} --data {data} --predictions /dev/stdout", case("hydra"));
    assert!(super::support::command(&line).stdout(fs::File::create(&out).unwrap()).status().unwrap().success());
    let text = fs::read_to_string(&out).unwrap();
    assert_eq!(text.matches("\"scores\":").count(), 6, "{text}");
    assert!(text.contains("macro (mean of subjects)"), "{text}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_no_folder_of_results() {
    let scratch = Scratch::new("mmlu-ctrl-c");
    scratch.write("data/test/anatomy_test.csv", QUESTIONS.repeat(4000));
    let (data, out) = (scratch.path("data"), scratch.path("folder/out"));
    let line = format!("eval mmlu {} --data {data} --style lm-eval --threads 1 --lm-eval {out}", case("hydra"));
    super::support::stopped_leaves_nothing(&scratch, &line);
}

#[test]
fn mmlu_in_parquet_is_mmlu() {
    let scratch = Scratch::new("mmlu-parquet");
    scratch.write("csv/test/anatomy_test.csv", QUESTIONS.lines().take(2).collect::<Vec<_>>().join("\n"));
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/parquet/mmlu");
    scratch.write("hf/all/test-00000-of-00001.parquet", fs::read(file).unwrap());
    let lines = |data: &str| {
        let file = scratch.path("p.jsonl");
        succeeds(&format!("eval mmlu {} --data {} --predictions {file}", case("hydra"), scratch.path(data)));
        fs::read_to_string(file).unwrap()
    };
    assert_eq!(lines("hf"), lines("csv"));
}

#[test]
fn styles_of_mmlu() {
    let scratch = Scratch::new("styles");
    let (data, file, lines) = (questions(&scratch), scratch.path("m.json"), scratch.path("p.jsonl"));
    let scores = |style: &str| -> (Value, Vec<Value>) {
        let how = format!("{style} --shots 1 --json {file} --predictions {lines}");
        succeeds(&format!("eval mmlu {} --data {data} {how}", case("hydra")));
        let text = fs::read_to_string(&lines).unwrap();
        (json(&file), text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
    };
    let (plain, asked) = scores("");
    assert!(plain.get("style").is_none());
    let (lm_eval, same) = scores("--style lm-eval");
    // These questions have no space around them.
    assert_eq!((lm_eval["style"].as_str(), lm_eval["weighting"].as_str()), (Some("lm-eval"), Some("micro")));
    let predicted = |lines: &[Value]| lines.iter().map(|line| line["prediction"].clone()).collect::<Vec<_>>();
    assert_eq!(predicted(&asked), predicted(&same));
    // Log-probabilities: logits less one number for all four.
    let all =
        |line: &Value| -> Vec<f64> { line["scores"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect() };
    for (logits, logs) in asked.iter().zip(&same) {
        let (logits, logs) = (all(logits), all(logs));
        assert!((0..4).all(|i| logs[i] < 0.0 && (logits[i] - logs[i] - logits[0] + logs[0]).abs() < 1e-5));
    }
    let out = scratch.path("lm-eval");
    scores(&format!("--style lm-eval --lm-eval {out}"));
    assert_eq!(
        scratch.names("lm-eval"),
        ["results_hydra.json", "samples_mmlu_anatomy_hydra.jsonl", "samples_mmlu_virology_hydra.jsonl"]
    );
    let results = json(&format!("{out}/results_hydra.json"));
    assert_eq!(results["results"]["mmlu"]["acc,none"], lm_eval["accuracy_micro"]);
    assert_eq!(
        (results["n-shot"]["mmlu_anatomy"].as_u64(), results["versions"]["mmlu"].as_f64()),
        (Some(1), Some(2.0))
    );
    assert_eq!(results["group_subtasks"]["mmlu"], serde_json::json!(["mmlu_other"]));
    let samples = fs::read_to_string(format!("{out}/samples_mmlu_anatomy_hydra.jsonl")).unwrap();
    let sample: Value = serde_json::from_str(samples.lines().next().unwrap()).unwrap();
    assert_eq!((sample["doc"]["question"].as_str(), sample["target"].as_str()), (Some("What is a fish?"), Some("0")));
    assert_eq!(sample["arguments"]["gen_args_3"]["arg_1"], " D");
    assert_eq!(sample["filtered_resps"][0][0].as_str().unwrap().parse().ok(), same[0]["scores"][0].as_f64());
    let (_, original) = scores("--style hendrycks");
    let (opencompass, also) = scores("--style opencompass");
    assert!(original == also && original != asked);
    assert_eq!(opencompass["weighting"], "macro");
    // The likeliest of all tokens, which is seldom a letter for a model that has learnt nothing.
    let (helm, found) = scores("--style helm");
    assert_eq!((helm["weighting"].as_str(), found.len()), (Some("macro"), 6));
    assert!(found.iter().all(|line| ["A", "B", "C", "D", "-"].contains(&line["prediction"].as_str().unwrap())));
    let output = hydra(&format!("eval mmlu {} --data {data} --style helm --lm-eval {out}", case("hydra")));
    assert!(String::from_utf8(output.stderr).unwrap().contains("--lm-eval: expected --style lm-eval"));
    let output = hydra(&format!("eval mmlu {} --data {data} --style helm --scoring cloze", case("hydra")));
    assert!(String::from_utf8(output.stderr).unwrap().contains("--style: expected --scoring letter, found cloze"));
}

#[test]
fn a_shared_prefix_changes_no_score() {
    let scratch = Scratch::new("prefix");
    let (data, lines) = (questions(&scratch), scratch.path("p.jsonl"));
    // Enough of them for a prefix to be worth a pass.
    scratch.write("data/test/anatomy_test.csv", QUESTIONS.repeat(40));
    let run = |limit: &str| {
        succeeds(&format!("eval mmlu {} --data {data} --shots 1 --predictions {lines} {limit}", case("hydra")));
        let text = fs::read_to_string(&lines).unwrap();
        let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        first["scores"].as_array().unwrap().iter().map(|score| score.as_f64().unwrap()).collect::<Vec<_>>()
    };
    // With one question, nothing is shared.
    for (alone, shared) in run("--limit 1").iter().zip(run("")) {
        assert!((alone - shared).abs() < 1e-4, "{alone} {shared}");
    }
}

#[test]
fn generation_is_repeatable() {
    let model = case("hydra");
    let text = |more: &str| succeeds(&format!("generate {model} --prompt Name --max-tokens 12 {more}"));
    assert_eq!(text(""), text(""));
    assert_eq!(text("--temperature 0.9 --top-p 0.9 --seed 3"), text("--temperature 0.9 --top-p 0.9 --seed 3"));
    assert_ne!(text("--temperature 2 --seed 3"), text("--temperature 2 --seed 4"));
    for only in ["--top-k 1", "--min-p 1"] {
        assert_eq!(text(&format!("--temperature 2 --seed 3 {only}")), text(""));
    }
    for penalty in ["--repetition-penalty 2", "--presence-penalty 9", "--frequency-penalty 9"] {
        assert_ne!(text(penalty), text(""), "{penalty}");
    }
}

#[test]
fn models_are_described() {
    let text = succeeds(&format!("info {}", golden("hydra").join("model").display()));
    for word in ["parameters", "vocabulary", "512", "trainable", "memory to train", "F32"] {
        assert!(text.contains(word), "{word} in {text}");
    }
}

#[test]
fn a_text_that_ends_with_its_prompt_is_said_to() {
    let scratch = Scratch::new("ends-at-once");
    let model = golden("hydra").join("model");
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        scratch.write(&format!("m/{file}"), fs::read(model.join(file)).unwrap());
    }
    let vocab = json(&scratch.path("m/config.json"))["vocab_size"].as_u64().unwrap();
    let every: Vec<u64> = (0..vocab).collect();
    scratch.write("m/generation_config.json", format!("{{\"eos_token_id\": {every:?}}}"));
    let said = |more: &str| {
        let output = hydra(&format!("generate --model {} --prompt x{more}", scratch.path("m")));
        assert!(output.status.success() && output.stdout == b"\n", "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let plain = said("");
    assert!(plain.contains("ends the text right after the prompt") && !plain.contains("--template"), "{plain}");
    let template = "{% for message in messages %}{{ message['content'] }}{% endfor %}";
    scratch.write("m/tokenizer_config.json", format!("{{\"chat_template\": \"{template}\"}}"));
    assert!(said("").contains("--template chat"));
    assert!(!said(" --template chat").contains("--template"));
}

#[test]
fn a_prompt_comes_from_a_file_and_a_text_ends_before_a_stop_string() {
    let scratch = Scratch::new("prompt-file");
    let model = assets("model");
    let generate = format!("generate --model {model} --max-tokens 24");
    let own = succeeds(&format!("{generate} --prompt Once"));
    // An editor's last line break is no part of it; a second one is.
    let [file, other] = [("p.txt", "Once\n"), ("o.txt", "Once\n\n")].map(|(name, text)| scratch.write(name, text));
    assert_eq!(succeeds(&format!("{generate} --prompt-file {file}")), own);
    let from_stdin =
        command(&format!("{generate} --prompt-file -")).stdin(fs::File::open(&file).unwrap()).output().unwrap();
    assert_eq!(String::from_utf8(from_stdin.stdout).unwrap(), own);
    assert_ne!(succeeds(&format!("{generate} --prompt-file {other}")), own);

    let stop: String = own.chars().skip(4).filter(|c| !c.is_whitespace()).take(1).collect();
    let ended = succeeds(&format!("{generate} --prompt Once --stop never --stop {stop}"));
    assert_eq!(ended.trim_end_matches('\n'), own.split(&stop).next().unwrap());

    let absent = scratch.path("absent");
    fails(1, &format!("{generate} --prompt-file {absent}"), &["--prompt-file", "absent: No such file"]);
    fails(1, &format!("{generate} --prompt x --stop="), &["--stop", "empty"]);
    fails(2, &format!("{generate} --prompt x --prompt-file {file}"), &["--prompt-file"]);
    fails(2, &generate, &["--prompt <TEXT>"]);
}
