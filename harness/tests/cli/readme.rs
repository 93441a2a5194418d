//! Every command and every configuration that the READMEs show is run, on the demo's tiny model and made-up data.

use super::server::{Server, TEMPLATE};
use super::support::{Scratch, assets, command};
use std::fs;
use std::path::Path;
use std::process::Command;

/// What a text shows, and what is run in its place.
type Substitutions = [(&'static str, &'static str)];

/// What a README names, and what the test puts in its place.
const SUBSTITUTIONS: [(&str, &str); 8] = [
    // A tenth of a second per run instead of hours.
    ("hydra demo", "hydra demo --steps 1"),
    ("hydra finetune", "hydra finetune --steps 2 --seq-len 64"),
    ("steps = 200", "steps = 1\nseq-len = 64"),
    ("seeds = [1, 2, 3]", "seeds = [1]"),
    ("seeds = [1, 2]", "seeds = [1]"),
    ("hydra generate", "hydra generate --max-tokens 8"),
    ("--records 400", "--records 20"),
    // No GPU is needed to see that the command is well formed.
    ("--device cuda:0", "--device cpu"),
];

/// Names of the READMEs' files, and the demo's that stand for them; of records, the first ones.
const FILES: [(&str, &str, usize); 3] = [
    ("train.jsonl", "corpus/train.jsonl", 96),
    ("test.jsonl", "corpus/test.jsonl", 24),
    ("corpus.jsonl", "corpus/train.jsonl", 96),
];
const FOLDERS: [(&str, &str); 2] = [("smollm2", "model"), ("mmlu", "mmlu")];

/// The lines of code blocks, fenced or indented, comments cut off, continued lines joined.
fn code(text: &str) -> Vec<String> {
    let (mut fenced, mut lines, mut whole) = (false, Vec::new(), String::new());
    for line in text.lines() {
        if line.starts_with("```") {
            fenced = !fenced;
        } else if let Some(code) = line.strip_prefix("    ").or(fenced.then_some(line)) {
            let code = code.split(" # ").next().unwrap().trim();
            match code.strip_suffix('\\') {
                Some(start) => whole += start,
                None => lines.push(std::mem::take(&mut whole) + code),
            }
        }
    }
    lines
}

/// The TOML blocks, by the names in their first lines: "# compare.toml".
fn configurations(text: &str) -> Vec<(String, String)> {
    let blocks = text.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let named = |block: &str| Some((block.lines().next()?.strip_prefix("# ")?.to_string(), block.to_string()));
    blocks.filter_map(named).collect()
}

fn substitute(text: &str, substitutions: &Substitutions) -> String {
    substitutions.iter().fold(text.to_string(), |text, (shown, run)| text.replace(shown, run))
}

/// Words as a shell has them; the READMEs quote with "..".
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (i, part) in line.split('"').enumerate() {
        match i % 2 {
            0 => words.extend(part.split_whitespace().map(str::to_owned)),
            _ => words.push(part.to_string()),
        }
    }
    words
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (entry, to) = (entry.as_ref().unwrap().path(), to.join(entry.as_ref().unwrap().file_name()));
        match entry.is_dir() {
            true => copy(&entry, &to),
            false => assert!(fs::copy(&entry, &to).is_ok()),
        }
    }
}

/// Runs curl as a README shows it, on a server that listens on another port.
fn request(shown: &str, server: &Server, folder: &str) {
    let line = shown.replace("localhost:8080", &server.address).replacen("curl ", "curl -sS --fail-with-body ", 1);
    let output = Command::new("sh").args(["-c", &line]).current_dir(folder).output().unwrap();
    let [said, failed] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(output.status.success() && !said.is_empty(), "{shown}\n{said}\n{failed}");
}

/// Runs a README's commands in their order; returns how many there are.
fn run(readme: &str) -> usize {
    let name = readme.replace('/', "-");
    let scratch = Scratch::new(&format!("readme{name}"));
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(readme)).unwrap();
    for (name, asset, records) in FILES {
        let text = fs::read_to_string(assets(asset)).unwrap();
        // Some of each category.
        let every = text.lines().count() / records;
        scratch.write(name, text.lines().step_by(every).map(|line| format!("{line}\n")).collect::<String>());
    }
    for (name, asset) in FOLDERS {
        copy(Path::new(&assets(asset)), Path::new(&scratch.path(name)));
    }
    for (name, text) in configurations(&text) {
        scratch.write(&name, substitute(&text, &SUBSTITUTIONS));
    }
    scratch.write("smollm2/chat_template.jinja", TEMPLATE);
    let is_command = |line: &String| line.starts_with("hydra ") || line.starts_with("curl ");
    let commands: Vec<String> = code(&text).into_iter().filter(is_command).collect();
    let mut server = None;
    for shown in &commands {
        if shown.starts_with("curl ") {
            request(shown, server.as_ref().expect("a server before the request"), &scratch.path(""));
            continue;
        }
        let words = words(&substitute(shown, &SUBSTITUTIONS));
        let mut child = command("");
        child.args(&words[1..]).current_dir(scratch.path(""));
        if words[1] == "fetch" {
            // There is no network: without pip in the path, the error says what to do; nothing else may be wrong.
            let output = child.args(["--to", "fetched"]).env("PATH", "").output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.code() == Some(1) && said.contains("no pip to download"), "{shown}: {said}");
            continue;
        }
        if words[1] == "serve" {
            server = Some(Server::spawn(child.args(["--port", "0"])));
            continue;
        }
        let output = child.output().unwrap();
        assert!(output.status.success(), "{readme}: {shown}\n{}", String::from_utf8_lossy(&output.stderr));
    }
    commands.len()
}

#[test]
fn commands_of_the_main_readme() {
    assert!(run("README.md") >= 5);
}

#[test]
fn commands_of_the_harness_readme() {
    assert!(run("harness/README.md") >= 20);
}

/// What the script of the experiments has, and what the test puts in its place: a few records, one step per run.
const SMALLER: [(&str, &str); 7] = [
    ("seeds = [1, 2, 3]", "seeds = [1]"),
    ("seq-len = 512", "seq-len = 64"),
    ("limit = 5\n", "limit = 1\n"),
    ("max-tokens = 160", "max-tokens = 4"),
    ("--steps 60", "--steps 1"),
    ("--records 200 --counts 1,4,16", "--records 4 --counts 1,2"),
    ("awk 'NR % ", "awk 'NR % 4"),
];

#[test]
fn the_experiments_are_repeated() {
    let scratch = Scratch::new("experiments");
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("experiments")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml" || extension == "sh") {
            let text = substitute(&fs::read_to_string(&path).unwrap(), &SMALLER);
            let line = |line: &str| format!("{}\n", if line.starts_with("steps = ") { "steps = 1" } else { line });
            let text: String = text.lines().map(line).collect();
            scratch.write(path.file_name().unwrap().to_str().unwrap(), text);
        }
    }
    // The demo's records, under the categories that the script selects.
    let categories = ["math", "code", "summarization", "brainstorming", "bbh_snarks", "bbh_navigate", "open_qa"];
    for (name, records) in [("train.jsonl", 140), ("test.jsonl", 70)] {
        let text = fs::read_to_string(assets(&format!("corpus/{name}"))).unwrap();
        let lines = text.lines().take(records).zip(categories.iter().cycle()).map(|(line, category)| {
            let (start, rest) = line.split_once("\"category\": \"").expect("a category");
            format!("{start}\"category\": \"{category}\"{}\n", rest.split_once('"').unwrap().1)
        });
        scratch.write(&format!("corpus/{name}"), lines.collect::<String>());
    }
    copy(Path::new(&assets("model")), Path::new(&scratch.path("smollm2")));
    copy(Path::new(&assets("mmlu")), Path::new(&scratch.path("mmlu")));
    scratch.write("bin/hydra", format!("#!/bin/sh\nexec {} \"$@\"\n", env!("CARGO_BIN_EXE_hydra")));
    let mut script = Command::new("sh");
    script.args(["-c", "chmod +x bin/hydra && PATH=$PWD/bin:$PATH exec bash ./repeat.sh corpus corpus"]);
    let output = script.current_dir(scratch.path("")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for made in ["corpus", "dolly", "corpus-long", "dolly-long", "answers"] {
        assert!(Path::new(&scratch.path(&format!("compare-{made}"))).join("compare.json").exists(), "{made}");
    }
    for made in ["heterogeneity", "analysis-11", "analysis-14"] {
        assert!(Path::new(&scratch.path(made)).join("report.html").exists(), "{made}");
    }
}

#[test]
fn every_command_is_shown() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let help = String::from_utf8(command("--help").output().unwrap().stdout).unwrap();
    let list = help.split_once("Commands:\n").unwrap().1.split("\n\n").next().unwrap();
    let names: Vec<&str> = list.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    assert!(names.len() > 10, "{names:?}");
    let code = code(&text);
    for name in names.iter().filter(|&&name| name != "help") {
        assert!(code.iter().any(|line| line.starts_with(&format!("hydra {name}"))), "{name}");
    }
}

/// The main README's program is that of hydra-runtime's README, which is compiled as a test of its documentation.
#[test]
fn the_program_of_the_main_readme_compiles() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let program = |readme: &str| {
        let text = fs::read_to_string(root.join(readme)).unwrap();
        let (_, after) = text.split_once("```rust,no_run\n").expect("a program");
        after.split_once("```").expect("its end").0.to_string()
    };
    assert_eq!(program("README.md"), program("hydra-runtime/README.md"));
}
