//! Files of records in all formats, and what is refused.

use super::support::{Scratch, assets, fails, finetune, golden, hydra, json, succeeds};
use std::fs;
use std::io::Write;

const CHATML: &str = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>\n' }}{% endfor %}\
                      {% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";

/// `eval loss` on the golden model.
fn eval(data: &str, more: &str) -> String {
    format!("eval loss --model {} --data {data} {more}", golden("hydra").join("model").display())
}

/// The loss and the number of target tokens.
fn loss(scratch: &Scratch, data: &str, more: &str) -> (f64, u64) {
    let file = scratch.path("loss.json");
    succeeds(&eval(data, &format!("{more} --json {file}")));
    let found = json(&file);
    (found["loss"].as_f64().unwrap(), found["tokens"].as_u64().unwrap())
}

fn turn(role: &str, content: &str) -> String {
    format!(r#"{{"role": "{role}", "content": "{content}"}}"#)
}

#[test]
fn an_array_is_read_as_its_lines() {
    let scratch = Scratch::new("array");
    let lines = golden("hydra").join("data.jsonl").display().to_string();
    let text = fs::read_to_string(&lines).unwrap();
    let elements: Vec<String> = text.lines().map(|line| line.replacen('{', "{\n  ", 1)).collect();
    let array = scratch.write("data.json", format!("[\n{}\n]\n", elements.join(",\n")));
    assert_eq!(loss(&scratch, &array, ""), loss(&scratch, &lines, ""));
    let adapter = |data: &str, name: &str| {
        let out = scratch.path(name);
        let model = golden("hydra").join("model");
        succeeds(&format!("finetune --model {} --data {data} --out {out} --steps 2 --batch 2", model.display()));
        fs::read(format!("{out}/adapter_model.safetensors")).unwrap()
    };
    assert!(adapter(&array, "from-array") == adapter(&lines, "from-lines"));
    // Commands that copy records write lines.
    let config = "seeds = [1]\n[defaults]\nsteps = 1\ntargets = 'q'\n[tune]\nlr = [1e-3]\n[[run]]\nname = 'a'\n";
    let (model, config) = (golden("hydra").join("model"), scratch.write("c.toml", config));
    let files = format!("--data {array} {array} --eval-data {array} --config {config} --out {}", scratch.path("c"));
    succeeds(&format!("compare --model {} {files}", model.display()));
}

#[test]
fn conversations_teach_what_an_exchange_teaches() {
    let scratch = Scratch::new("conversations");
    let template = scratch.write("chat.jinja", CHATML);
    let more = format!("--chat-template {template}");
    let pair = scratch.write("pair.jsonl", r#"{"prompt": "Add 17 and 25.", "completion": "It is 42."}"#);
    let exchange = loss(&scratch, &pair, &format!("{more} --template chat"));
    let [asked, answer] = [turn("user", "Add 17 and 25."), turn("assistant", "It is 42.")];
    let messages = scratch.write("messages.jsonl", format!(r#"{{"messages": [{asked}, {answer}], "id": 3}}"#));
    assert_eq!(loss(&scratch, &messages, &more), exchange);
    let sharegpt =
        r#"{"conversations": [{"from": "human", "value": "Add 17 and 25."}, {"from": "gpt", "value": "It is 42."}]}"#;
    let sharegpt = scratch.write("sharegpt.json", format!("[{sharegpt}]"));
    assert_eq!(loss(&scratch, &sharegpt, &more), exchange);
    // A second exchange adds its own targets, and the first keeps those that it has.
    let two = scratch.write("two.jsonl", format!(r#"{{"messages": [{asked}, {answer}, {asked}, {answer}]}}"#));
    assert_eq!(loss(&scratch, &two, &more).1, 2 * exchange.1);
    // All of a text is learnt but its first token, and its end.
    let text = scratch.write("text.jsonl", r#"{"text": "It is 42."}"#);
    let plain = scratch.write("plain.jsonl", r#"{"prompt": "", "completion": "It is 42."}"#);
    let (_, targets) = loss(&scratch, &plain, "");
    assert_eq!(loss(&scratch, &text, "").1, targets - 1);
}

#[test]
fn a_run_on_conversations_is_repeated_and_resumed() {
    let scratch = Scratch::new("chat-run");
    let template = scratch.write("chat.jinja", CHATML);
    let [user, answer] = [turn("user", "Add 17 and 25."), turn("assistant", "It is 42.")];
    let text = r#"{"messages": [USER, ANSWER], "text": "x"}"#.replace("USER", &user).replace("ANSWER", &answer);
    let data = scratch.write("data.jsonl", format!("{text}\n{text}\n"));
    let model = golden("hydra").join("model");
    let out = scratch.path("run");
    let line = format!("finetune --model {} --data {data} --steps 2 --batch 1", model.display());
    let chosen = format!("--data-format messages --chat-template {template}");
    succeeds(&format!("{line} {chosen} --out {out}"));
    let again = scratch.path("again");
    succeeds(&format!("finetune --config {out}/run.json --out {again}"));
    let adapter = |run: &str| fs::read(format!("{run}/adapter_model.safetensors")).unwrap();
    assert!(adapter(&out) == adapter(&again));
    let other = format!("--data-format text --out {out} --resume");
    fails(1, &format!("{line} --chat-template {template} {other}"), &["--data-format", "\"messages\"", "\"text\""]);
    scratch.write("chat.jinja", CHATML.replace("<|", "["));
    fails(1, &format!("{line} {chosen} --out {out} --resume"), &["--chat-template", "expected"]);
}

#[test]
fn conversations_that_are_refused() {
    let scratch = Scratch::new("bad-conversations");
    let template = scratch.write("chat.jinja", CHATML);
    let [user, answer] = [turn("user", "a"), turn("assistant", "b")];
    let good = format!(r#"{{"messages": [{user}, {answer}]}}"#);
    let refused = |second: &str, more: &str, wanted: &[&str]| {
        let data = scratch.write("d.jsonl", format!("{good}\n{second}\n"));
        let wanted: Vec<&str> = ["d.jsonl:"].iter().chain(wanted).copied().collect();
        fails(1, &eval(&data, more), &wanted);
        fails(
            1,
            &format!("{} {more}", finetune("hydra", &scratch.path("o"), ""))
                .replace(&golden("hydra").join("data.jsonl").display().to_string(), &data),
            &wanted,
        );
    };
    let more = format!("--chat-template {template}");
    let messages = |list: &str| format!(r#"{{"messages": [{list}]}}"#);
    refused(
        &messages(&user),
        &more,
        &["d.jsonl:2: expected a message of the assistant to learn, found none in 1 message"],
    );
    refused(&messages(&format!("{answer}, {user}")), &more, &["d.jsonl:2: message 1: role: expected system", "user"]);
    refused(
        &messages(&format!("{user}, {user}, {answer}")),
        &more,
        &["d.jsonl:2: message 2: role: expected assistant"],
    );
    refused(
        r#"{"text": "t"}"#,
        &more,
        &["d.jsonl:2: mixed formats in one file: expected messages, as in line 1, found text"],
    );
    refused(
        &good,
        "",
        &["d.jsonl:1: the model has no chat template; give one for conversations with --chat-template FILE"],
    );
    refused(&good, &format!("{more} --template alpaca"), &["--template alpaca: expected instructions", "d.jsonl:1"]);
    let raises = scratch.write(
        "raises.jinja",
        "{% if messages | length > 2 %}{{ raise_exception('no') }}{% endif %}\
        {% for m in messages %}{{ m.content }}{% endfor %}",
    );
    refused(
        &messages(&format!("{user}, {answer}, {user}, {answer}")),
        &format!("--chat-template {raises}"),
        &["d.jsonl:2: the chat template in line 1: ", "no"],
    );
    let hides = scratch.write("hides.jinja", "{% for m in messages %}{{ m.role }}{% endfor %}");
    refused(&good, &format!("--chat-template {hides}"), &["d.jsonl:1: ", "does not show message 2 (assistant)"]);
    fails(
        1,
        &eval(&scratch.write("cut.json", "[\n{\"text\": \"a\"},\n{\"te"), ""),
        &["cut.json:3: invalid JSON at column 4"],
    );
    fails(
        1,
        &eval(&scratch.write("both.jsonl", good.replace("{\"messages\"", "{\"text\": \"t\", \"messages\"")), &more),
        &["both.jsonl:1: both \"messages\" and \"text\": choose one with --data-format"],
    );
    fails(2, &eval("d.jsonl", "--data-format csv"), &["--data-format", "messages", "conversations"]);
    // Nothing is left of an answer that is cut off, and that is said.
    let long = messages(&format!("{}, {answer}", turn("user", &"long ".repeat(50))));
    let data = scratch.write("long.jsonl", format!("{good}\n{long}\n"));
    let output = hydra(&eval(&data, &format!("{more} --seq-len 32")));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.contains("of 2 records, 0 cut off at 32 tokens, 1 dropped"), "{said}");
}

#[test]
fn what_is_in_a_file_is_shown() {
    let scratch = Scratch::new("shown");
    let template = scratch.write("chat.jinja", CHATML);
    let turns =
        [turn("user", "Add 17 and 25."), turn("assistant", "It is\\n漢."), turn("user", "a"), turn("assistant", "b")];
    let long = format!(r#"{{"messages": [{}, {}]}}"#, turn("user", &"long ".repeat(50)), turn("assistant", "b"));
    let data = scratch.write("d.jsonl", format!("{{\"messages\": [{}]}}\n{long}\n", turns.join(", ")));
    let (model, file) = (golden("hydra").join("model"), scratch.path("found.json"));
    let line = format!("data {data} --model {} --chat-template {template} --seq-len 80", model.display());
    let text = succeeds(&format!("{line} --json {file}"));
    assert!(text.contains("messages        2") && text.contains("0 records are cut off, 1 dropped"), "{text}");
    assert!(text.contains("d.jsonl:1 (learnt: [[..]]):\n<¦|¦use¦r"), "{text}");
    // The assistant's words with the end of their turn; bytes of a character that has no token are shown as one.
    let learnt: Vec<String> =
        text.split("[[").skip(2).map(|rest| rest.split("]]").next().unwrap().replace('¦', "")).collect();
    assert_eq!(learnt, ["It is\\n\n漢.</s>", "b</s>"]);
    let found = json(&file);
    assert_eq!((found["dropped"].as_u64(), found["seq_len"].as_u64()), (Some(1), Some(80)));
    assert_eq!(found["files"][0]["format"], "messages");
    let [tokens, mask] = ["tokens", "mask"].map(|key| found["shown"][key].as_array().unwrap().len());
    assert!(tokens == mask && tokens > 20, "{tokens} {mask}");
    let [median, longest] = ["median", "longest"].map(|key| found["tokens"][key].as_u64().unwrap());
    assert!(median == tokens as u64 && longest > 80, "{median} {longest}");
    assert!(found["tokens"]["longest_at"].as_str().unwrap().ends_with("d.jsonl:2"));
    assert!(succeeds(&format!("{line} --show 2")).contains("d.jsonl:2"));
    fails(1, &format!("{line} --show 3"), &["--show 3: expected at most 2"]);
}

fn corpus(file: &str) -> Vec<u8> {
    fs::read(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(file)).unwrap()
}

#[test]
fn compressed_files_are_read_as_what_is_in_them() {
    let scratch = Scratch::new("compressed");
    let record = |prompt: &str, completion: &str| format!(r#"{{"prompt":"{prompt}","completion":"{completion}"}}"#);
    let plain = scratch.write("plain.jsonl", format!("{}\n{}\n", record("a", "ab"), record("b", "a")));
    let expected = loss(&scratch, &plain, "");
    let gzip = scratch.write("r.jsonl.gz", corpus("compressed/gzip"));
    assert_eq!(loss(&scratch, &gzip, ""), expected);
    // Two frames with what the first has, and one to skip between them.
    let twice = fs::read_to_string(&plain).unwrap().repeat(2);
    let zstd = scratch.write("r.jsonl.zst", corpus("compressed/zstd"));
    assert_eq!(loss(&scratch, &zstd, ""), loss(&scratch, &scratch.write("twice.jsonl", twice), ""));

    let template = scratch.write("chat.jinja", CHATML);
    let more = format!("--chat-template {template}");
    let messages = |turns: &[&str]| {
        let turns: Vec<String> =
            ["user", "assistant"].iter().cycle().zip(turns).map(|(role, text)| turn(role, text)).collect();
        format!(r#"{{"messages": [{}]}}"#, turns.join(", "))
    };
    let all = [&["Add 17 and 25.", "It is 42."][..], &["a", "b", "c", "dé"], &["a", "b"]].map(messages).join("\n");
    let expected = loss(&scratch, &scratch.write("messages.jsonl", all), &more);
    for name in ["messages", "gzip", "zstd_2"] {
        let file = scratch.write("m.parquet", corpus(&format!("parquet/{name}")));
        assert_eq!(loss(&scratch, &file, &more), expected, "{name}");
    }
    let lines: Vec<String> = (0..60).map(|i| record(["a", "a", "b"][i % 3], &format!("text {i}"))).collect();
    let expected = loss(&scratch, &scratch.write("l.jsonl", lines.join("\n")), "");
    for name in ["columns", "zstd"] {
        let file = scratch.write("columns.parquet", corpus(&format!("parquet/{name}")));
        assert_eq!(loss(&scratch, &file, ""), expected, "{name}");
    }
    // The copies that cluster writes are JSON lines.
    let text = fs::read_to_string(assets("corpus/train.jsonl")).unwrap();
    let lines: Vec<&str> = text.lines().step_by(10).collect();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(lines.join("\n").as_bytes()).unwrap();
    let packed = scratch.write("train.jsonl.gz", encoder.finish().unwrap());
    succeeds(&format!("cluster --data {packed} --k 2 --out {}", scratch.path("clusters")));
    let copied = fs::read_to_string(scratch.path("clusters/train.jsonl")).unwrap();
    assert_eq!(copied.lines().count(), lines.len());
}

#[test]
fn damaged_compressed_files() {
    let scratch = Scratch::new("damaged");
    let cut = |name: &str, file: &str, keep: usize| {
        let bytes = corpus(file);
        scratch.write(name, &bytes[..keep.min(bytes.len())])
    };
    let refused = |file: String, wanted: &[&str]| fails(1, &eval(&file, ""), wanted);
    refused(cut("c.gz", "compressed/gzip", 40), &["c.gz: truncated gzip file: it ends after", "bytes of text"]);
    refused(cut("c.zst", "compressed/zstd", 40), &["c.zst: ", "truncated Zstandard file, after"]);
    refused(
        cut("c.parquet", "parquet/messages", 1000),
        &["c.parquet: truncated parquet file: expected PAR1 at its end"],
    );
    let lz4 = "is compressed with LZ4";
    refused(cut("l.parquet", "parquet/lz4", 9999), &["l.parquet: ", lz4, "expected none, snappy, gzip or zstd"]);
    let mut bytes = corpus("parquet/zstd");
    let frame = bytes.windows(4).position(|four| four == [0x28, 0xB5, 0x2F, 0xFD]).unwrap();
    bytes[frame..frame + 4].fill(0xFF);
    refused(
        scratch.write("z.parquet", bytes),
        &["z.parquet: unreadable or truncated parquet file: ", "a page: damaged or truncated Zstandard file"],
    );
    let mut bytes = corpus("parquet/columns");
    bytes[4..40].fill(0xFF);
    refused(
        scratch.write("d.parquet", bytes),
        &["d.parquet: unreadable or truncated parquet file: damaged page header at byte 4"],
    );
    refused(
        scratch.write("p.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        &["p.jsonl: expected records, found a Git LFS pointer"],
    );
    // In a Parquet file, a line is a row.
    refused(
        cut("q.parquet", "parquet/mmlu", 9999),
        &["q.parquet:1: expected \"instruction\"", "found question, subject, choices, answer"],
    );
}

#[test]
fn records_are_split_by_category() {
    let scratch = Scratch::new("split");
    let data = assets("corpus/train.jsonl");
    let out = scratch.path("s");
    let said = succeeds(&format!("split --data {data} --test 0.25 --out {out}"));
    let read = |name: &str| fs::read_to_string(format!("{out}/{name}")).unwrap();
    let all = fs::read_to_string(&data).unwrap();
    let (train, test) = (read("train.jsonl"), read("test.jsonl"));
    // Each record is in one of them, in its order, as it was.
    let mut parts = [train.lines().peekable(), test.lines().peekable()];
    for line in all.lines() {
        assert!(parts.iter_mut().any(|part| part.next_if_eq(&line).is_some()), "{line}");
    }
    assert!(parts.iter_mut().all(|part| part.next().is_none()));
    let count = |text: &str, category: &str| text.lines().filter(|line| line.contains(category)).count();
    for row in said.lines().skip(1).take_while(|row| !row.starts_with("all")) {
        let [name, in_train, in_test] = row.split_whitespace().collect::<Vec<_>>()[..] else { panic!("{said}") };
        let category = format!("\"category\": \"{name}\"");
        let [in_train, in_test] = [in_train, in_test].map(|number| number.parse::<usize>().unwrap());
        assert_eq!([in_train, in_test], [count(&train, &category), count(&test, &category)], "{said}");
        let quarter = 0.25 * (in_train + in_test) as f64;
        assert!((in_test as f64 - quarter).abs() <= 1.0, "{said}");
    }
    let again = scratch.path("again");
    succeeds(&format!("split --data {data} --test 0.25 --out {again}"));
    assert_eq!(fs::read_to_string(format!("{again}/test.jsonl")).unwrap(), test);

    // What can't be split, and files that can't be one.
    let pair = r#"{"prompt": "p", "completion": "c"}"#;
    let equal = scratch.write("equal.jsonl", format!("{pair}\n{pair}\n"));
    let chat =
        scratch.write("chat.jsonl", format!(r#"{{"messages": [{}, {}]}}"#, turn("user", "a"), turn("assistant", "b")));
    let new = scratch.path("new");
    fails(1, &format!("split --data {equal} --out {new}"), &["equal.jsonl: 2 records", "can't be split"]);
    fails(1, &format!("split --data {equal} {chat} --out {new}"), &["chat.jsonl:1: mixed formats", "equal.jsonl:1"]);
    fails(1, &format!("split --data {data} --out {out}"), &["--out", "not empty"]);
    fails(2, &format!("split --data {data} --test 1 --out {new}"), &["--test", "between 0 and 1"]);
    assert!(!fs::exists(&new).unwrap());
}
