//! CSV and TSV wherever records are taken: they are read as the JSON lines that say the same.

use super::support::{Scratch, assets, fails, files, golden, json, succeeds};
use flate2::{Compression, write::GzEncoder};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use serde_json::Value;
use std::fs;
use std::io::Write;

/// Records of the demo, one in ten; some texts have commas, and some quotes and line breaks are put into them.
fn records() -> Vec<Value> {
    let text = fs::read_to_string(assets("corpus/train.jsonl")).unwrap();
    let record = |(i, line): (usize, &str)| {
        let mut record: Value = serde_json::from_str(line).unwrap();
        if i % 3 == 0 {
            record["context"] = format!("\"{i}\",\r\n\té").into();
        }
        record
    };
    text.lines().step_by(10).enumerate().map(record).collect()
}

/// The texts of records in a table.
fn table(records: &[Value], separator: u8) -> Vec<u8> {
    let mut writer = csv::WriterBuilder::new().delimiter(separator).from_writer(Vec::new());
    writer.write_record(records[0].as_object().unwrap().keys()).unwrap();
    for record in records {
        writer.write_record(record.as_object().unwrap().values().map(|text| text.as_str().unwrap())).unwrap();
    }
    writer.into_inner().unwrap()
}

fn lines(records: &[Value]) -> String {
    records.iter().map(|record| record.to_string() + "\n").collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn every_command_reads_tables() {
    let scratch = Scratch::new("tables");
    let (records, model) = (records(), assets("model"));
    let same = scratch.write("same.jsonl", lines(&records));
    let csv = scratch.write("a.csv", [b"\xEF\xBB\xBF", table(&records, b',').as_slice()].concat());
    let packed = scratch.write("b.csv.gz", gzip(&table(&records, b',')));
    let tsv = scratch.write("c.TSV.zst", compress_to_vec(&*table(&records, b'\t'), CompressionLevel::Fastest));
    let shown = |data: &str| {
        let file = scratch.path("data.json");
        succeeds(&format!("data {data} --model {model} --show 4 --json {file}"));
        let mut found = json(&file);
        for at in ["/files", "/shown/at", "/tokens/longest_at"] {
            *found.pointer_mut(at).unwrap() = Value::Null;
        }
        found
    };
    let loss = |data: &str| {
        let file = scratch.path("loss.json");
        succeeds(&format!("eval loss --model {model} --data {data} --json {file}"));
        json(&file)["categories"].clone()
    };
    for data in [&csv, &packed, &tsv] {
        assert_eq!((shown(data), loss(data)), (shown(&same), loss(&same)), "{data}");
    }
    let adapter = |data: &str, name: &str| {
        let out = scratch.path(name);
        let more = format!("--eval-data {data} --gate label --steps 2 --batch 4 --targets q");
        succeeds(&format!("finetune --model {model} --data {data} --out {out} {more}"));
        fs::read(format!("{out}/adapter_model.safetensors")).unwrap()
    };
    assert!(adapter(&csv, "of-table") == adapter(&same, "of-lines"));

    // Commands that copy records write lines.
    let copies = |command: &str, data: &str, name: &str| {
        let out = scratch.path(&format!("{name}-{command}"));
        let options = if command == "cluster" { "--k 2" } else { "--test 0.2" };
        succeeds(&format!("{command} --data {data} {options} --out {out}"));
        let mut copies = files(out);
        copies.retain(|name, _| name.ends_with(".jsonl"));
        copies.into_values().map(|text| String::from_utf8(text).unwrap().replace(' ', "")).collect::<Vec<_>>()
    };
    for command in ["split", "cluster"] {
        assert_eq!(copies(command, &tsv, "of-table"), copies(command, &same, "of-lines"), "{command}");
    }
    assert_eq!(scratch.names("of-table-cluster")[0], "c.jsonl");
    let config = |more: &str| {
        let text = format!("seeds = [1]\n[defaults]\nsteps = 1\ntargets = 'q'\n{more}\n[[run]]\nname = 'a'\n");
        scratch.write("c.toml", text)
    };
    let files = |out: &str| format!("--model {model} --data {csv} --eval-data {packed} --out {}", scratch.path(out));
    let tuned = config(&format!("[tune]\nlr = [1e-3]\n[accuracy]\ndata = '{tsv}'\nlimit = 1\nmax-tokens = 1"));
    succeeds(&format!("compare --config {tuned} {}", files("compared")));
    succeeds(&format!("heterogeneity --config {} --records 8 --counts 1,2 {}", config(""), files("mixed")));
}

#[test]
fn other_formats_in_tables() {
    let scratch = Scratch::new("tables-formats");
    let model = golden("hydra").join("model").display().to_string();
    let template = scratch.write("chat.jinja", "{% for m in messages %}{{ m.role + ': ' + m.content }}\n{% endfor %}");
    let loss = |name: &str, text: &str| {
        let (data, file) = (scratch.write(name, text), scratch.path("loss.json"));
        succeeds(&format!("eval loss --model {model} --data {data} --chat-template {template} --json {file}"));
        json(&file)["loss"].clone()
    };
    let turns = r#"[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]"#;
    let quoted = turns.replace('"', "\"\"");
    let conversation = loss("m.csv", &format!("id,messages\n1,\"{quoted}\"\n"));
    assert_eq!(conversation, loss("m.jsonl", &format!(r#"{{"messages": {turns}}}"#)));
    // The index that pandas writes has no name.
    assert_eq!(loss("t.csv", ",text\n0,A hydra\n"), loss("t.jsonl", r#"{"text": "A hydra"}"#));
    let accuracy = |name: &str, text: &str| {
        let (data, file) = (scratch.write(name, text), scratch.path("accuracy.json"));
        succeeds(&format!("eval accuracy --model {model} --data {data} --json {file}"));
        let found = json(&file);
        assert_eq!(found["metric"], "choice");
        found["categories"].clone()
    };
    let asked = "goal\tsol1\tsol2\tlabel\tcategory\nBoil?\tFire\tIce\t0\tx\nFreeze?\tFire\tIce\t1\t\n";
    let same = "{\"goal\":\"Boil?\",\"sol1\":\"Fire\",\"sol2\":\"Ice\",\"label\":0,\"category\":\"x\"}\n\
                {\"goal\":\"Freeze?\",\"sol1\":\"Fire\",\"sol2\":\"Ice\",\"label\":1}";
    assert_eq!(accuracy("q.tsv", asked), accuracy("q.jsonl", same));
}

#[test]
fn tables_that_are_refused() {
    let scratch = Scratch::new("bad-tables");
    let model = golden("hydra").join("model").display().to_string();
    let refused = |name: &str, bytes: &[u8], wanted: &str| {
        let data = scratch.write(name, bytes);
        let out = scratch.path("out");
        for command in [
            format!("finetune --model {model} --data {data} --out {out}"),
            format!("eval loss --model {model} --data {data}"),
            format!("split --data {data} --out {out}"),
            format!("cluster --data {data} --out {out}"),
        ] {
            fails(1, &command, &[&format!("{name}:"), wanted]);
            assert!(!fs::exists(&out).unwrap(), "{command}");
        }
    };
    refused("a.csv", b"", "expected a first row with the columns' names, found an empty file");
    refused("a.csv", b"prompt,completion\n", "no records");
    refused("a.csv", b"prompt,prompt\n", "a.csv:1: expected a name of its own for each column, found \"prompt\" twice");
    refused("a.csv", b"prompt,completion\na,b\nc\n", "a.csv:3: expected 2 fields, as in line 1, found 1");
    refused("a.csv", b"prompt,completion\na,\"b\nc\n", "a.csv:2: expected a quote that closes the field");
    refused("a.tsv.gz", &gzip(b"prompt\tcompletion\na\tb\xFF\n"), "a.tsv.gz:2: expected UTF-8, found byte 0xFF");
    let columns = "a.csv:2: expected \"instruction\" and \"response\", \"prompt\" and \"completion\"";
    refused("a.csv", b"prompt;completion\na;b\n", columns);
    refused(
        "a.csv",
        b"instruction,answer\na,b\n",
        "a.csv:2: expected \"response\" or \"output\" beside \"instruction\"",
    );
    refused("a.csv", b"messages\nhello\n", "a.csv:2: \"messages\": expected a list, found a string");
    refused(
        "a.csv",
        b"\xFF\xFEa\0",
        "expected JSON, CSV or TSV in UTF-8 (also in gzip or Zstandard) or Parquet, found UTF-16",
    );
}
