//! `hydra chat` over a pipe, on the demo's tiny model.

use super::server::{adapter, chat_model};
use super::support::{Scratch, command, fails, json};
use serde_json::json;
use std::io::Write;
use std::process::{Output, Stdio};

/// What is said to these lines.
fn chat(arguments: &str, lines: &str) -> Output {
    let mut child = command(&format!("chat --temperature 0 --max-tokens 8 {arguments}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[track_caller]
fn said(arguments: &str, lines: &str) -> String {
    let output = chat(arguments, lines);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A text without its colours.
fn plain(text: &str) -> String {
    let mut parts = text.split("\x1b[");
    let first = parts.next().unwrap().to_string();
    parts.fold(first, |text, part| text + part.split_once('m').unwrap().1)
}

/// What `hydra generate` continues a text with, and a line's end.
fn generated(model: &str, adapter: Option<&str>, prompt: &str) -> String {
    let mut command = command(&format!("generate --model {model} --max-tokens 8"));
    command.args(["--prompt", prompt]);
    if let Some(adapter) = adapter {
        command.args(["--adapter", adapter]);
    }
    String::from_utf8(command.output().unwrap().stdout).unwrap()
}

#[test]
fn a_conversation_with_its_commands() {
    let scratch = Scratch::new("chat");
    let model = chat_model(&scratch);
    let hydra = adapter(&scratch, "hydra", "--targets all");
    let arguments = format!("--model {model} --adapter {hydra}");
    let first = generated(&model, Some(&hydra), "user: Name three\nassistant:");
    assert_eq!(said(&arguments, "Name three\n"), first);

    // The second answer knows the first exchange; after /reset it doesn't.
    let history =
        format!("user: Name three\nassistant: {}\nuser: More\nof them\nassistant:", first.trim_end_matches('\n'));
    let second = generated(&model, Some(&hydra), &history);
    let alone = generated(&model, None, "system: Be brief.\nuser: Name three\nassistant:");
    let saved = scratch.path("saved.json");
    let lines = format!(
        "Name three\nMore\\\nof them\n/save {saved}\n/reset\n/adapter none\n/system Be brief.\nName three\n/adapter\n/help\n/quit\nno more"
    );
    let whole = said(&arguments, &lines);
    let rest = whole.strip_prefix(&format!("{first}{second}{alone}")).unwrap_or_else(|| panic!("{whole:?}"));
    assert!(rest.starts_with("  hydra\n* none\n/adapter [NAME]"), "{rest:?}");
    let messages = &json(&saved)["messages"];
    assert_eq!(messages[2], json!({ "role": "user", "content": "More\nof them" }));
    assert_eq!(
        messages[1],
        json!({ "role": "assistant", "content": first.strip_suffix('\n').unwrap(), "adapter": "hydra" })
    );

    // Colours change nothing but colours, and say how many tokens each head has.
    let coloured = said(
        &arguments,
        "/router\nName three\n/router 1 up_proj\n/reset\nName three\n/router off\n/reset\nName three\n",
    );
    assert!(coloured.contains("\x1b[3"), "{coloured:?}");
    let text = plain(&coloured);
    let legend = text.strip_prefix(&first).unwrap().lines().next().unwrap();
    let counts: Vec<usize> = legend
        .split(", ")
        .map(|entry| entry.strip_suffix(" tokens").and_then(|entry| entry.split(": ").nth(1)).unwrap().parse().unwrap())
        .collect();
    assert!((1..=8).contains(&counts.iter().sum::<usize>()), "{legend}");
    assert!(text.ends_with(&first) && text.matches(&first).count() == 3, "{text:?}");
    assert!(said(&format!("--model {model}"), "/router\nName three\n").contains("no router here"));
}

#[test]
fn mistakes_end_a_script() {
    let scratch = Scratch::new("chat-mistakes");
    let model = chat_model(&scratch);
    for (lines, wanted) in [
        ("/adapter x\n", "/adapter: expected one of none, found \"x\""),
        ("/none\n", "/none: no such command"),
        ("/save\n", "expected a file's name"),
        (&"many words ".repeat(400), "/reset forgets it"),
    ] {
        let output = chat(&format!("--model {model}"), lines);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains(wanted), "{wanted:?} in {said}");
    }
    fails(1, &format!("chat --model {model} --ctx 1"), &["--ctx: expected a number from 2 to 512"]);
    fails(1, &format!("chat --model {model} --adapter {}", scratch.path("none")), &["--adapter"]);
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_the_answer_and_not_the_conversation() {
    use std::io::Read;
    let scratch = Scratch::new("chat-stop");
    let model = chat_model(&scratch);
    let mut child = command(&format!("chat --model {model} --temperature 2 --seed 3"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    input.write_all(b"Name three\n").unwrap();
    let mut first = [0; 1];
    output.read_exact(&mut first).unwrap();
    let process = i32::try_from(child.id()).unwrap();
    // SAFETY: the process is a child that has not been waited for.
    assert_eq!(unsafe { libc::kill(process, libc::SIGINT) }, 0);
    input.write_all(b"/help\n").unwrap();
    drop(input);
    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("/adapter [NAME]"), "{rest:?}");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
