//! What a record's JSON object says, in one of four formats, which its keys tell apart:
//!
//! ```text
//! instruction     {"instruction", "context"?, "response"}      databricks-dolly-15k
//!                 {"instruction", "input"?, "output"}          Alpaca
//!                 {"prompt", "completion"}
//! messages        {"messages": [{"role", "content"}, ..]}      OpenAI, Hugging Face
//! conversations   {"conversations": [{"from", "value"}, ..]}   ShareGPT
//! text            {"text"}
//! ```
//! Absent and null optional fields are empty. Other fields are ignored. Of context and input, and of response and output, the
//! first that has text counts. The role developer is another name of system. A text "system" beside "conversations" is their first
//! message, as LLaMA-Factory has it. A list of messages may be written as a text, which it is in a CSV file.

use crate::output::printable;
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use hydra_runtime::chat::Message;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::fmt;

/// `--data-format`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    #[default]
    /// An instruction and its response, in the keys of Dolly or Alpaca, or prompt and completion
    Instruction,
    /// A conversation as OpenAI and Hugging Face write it: role and content
    Messages,
    /// A conversation as ShareGPT writes it: from and value
    Conversations,
    /// Text without parts
    Text,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Instruction => "instruction",
            Self::Messages => "messages",
            Self::Conversations => "conversations",
            Self::Text => "text",
        })
    }
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A response is learnt.
    Instruction {
        /// What is asked.
        instruction: String,
        /// What it is asked about; may be empty.
        input: String,
        /// The answer to learn.
        response: String,
    },
    /// A conversation, of which the assistant's messages are learnt; it has at least one.
    Conversation(Vec<Message>),
    /// All of it is learnt.
    Text(String),
}

impl Default for Content {
    fn default() -> Self {
        Self::instruction(String::new())
    }
}

impl Content {
    /// An instruction without a response.
    pub fn instruction(instruction: String) -> Self {
        Self::Instruction { instruction, input: String::new(), response: String::new() }
    }

    /// What is asked: the instruction with its input, the user's messages, or the text.
    pub fn question(&self) -> String {
        match self {
            Self::Instruction { instruction, input, .. } => format!("{instruction}\n{input}"),
            Self::Conversation(messages) => {
                let asked = messages.iter().filter(|message| message.role == "user");
                asked.map(|message| message.content.as_str()).collect::<Vec<_>>().join("\n")
            }
            Self::Text(text) => text.clone(),
        }
    }

    /// Where [`Content::question`] begins: the instruction, the first user's message, or the text.
    pub fn opening(&self) -> &str {
        match self {
            Self::Instruction { instruction, .. } => instruction,
            Self::Conversation(messages) => {
                let asked = messages.iter().find(|message| message.role == "user");
                asked.map_or("", |message| &message.content)
            }
            Self::Text(text) => text,
        }
    }

    /// Whether it has nothing to learn from but the end of the text.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Instruction { response, .. } => response.is_empty(),
            Self::Conversation(messages) => {
                messages.iter().all(|message| message.role != "assistant" || message.content.is_empty())
            }
            Self::Text(text) => text.is_empty(),
        }
    }

    /// Reads an object in the format `asked`, or in the one that its keys tell.
    pub fn parse(object: &Map<String, Value>, asked: Option<Format>) -> Result<(Format, Self)> {
        let format = asked.map_or_else(|| recognise(object), Ok)?;
        let content = match format {
            Format::Instruction => instruction(object)?,
            Format::Messages => Self::Conversation(messages(object)?),
            Format::Conversations => Self::Conversation(conversations(object)?),
            Format::Text => Self::Text(required(object, "text")?),
        };
        Ok((format, content))
    }
}

/// The format that the keys tell.
fn recognise(object: &Map<String, Value>) -> Result<Format> {
    let has = |key: &str| object.contains_key(key);
    // Alpaca's own files have the prompt and the answer once more as "text".
    if has("instruction") && (has("response") || has("output")) || has("prompt") && has("completion") {
        return Ok(Format::Instruction);
    }
    let formats = [Format::Messages, Format::Conversations, Format::Text];
    match formats.into_iter().filter(|format| has(&format.to_string())).collect::<Vec<_>>()[..] {
        [format] => Ok(format),
        [first, second, ..] => bail!("both \"{first}\" and \"{second}\": choose one with --data-format"),
        [] if has("instruction") => bail!("expected \"response\" or \"output\" beside \"instruction\""),
        [] if has("prompt") => bail!("no \"completion\""),
        [] => {
            let keys: Vec<&str> = object.keys().map(String::as_str).collect();
            bail!(
                "expected \"instruction\" and \"response\", \"prompt\" and \"completion\", \"messages\", \"conversations\" or \
                 \"text\", found {}",
                if keys.is_empty() { "no key".into() } else { printable(&keys.join(", ")) }
            )
        }
    }
}

fn instruction(object: &Map<String, Value>) -> Result<Content> {
    if !object.contains_key("instruction") {
        let (instruction, response) = (required(object, "prompt")?, required(object, "completion")?);
        return Ok(Content::Instruction { instruction, input: String::new(), response });
    }
    let present = ["response", "output"].into_iter().find(|key| object.contains_key(*key));
    let Some(present) = present else { bail!("expected \"response\" or \"output\" beside \"instruction\"") };
    let response = first_text(object, ["response", "output"])?;
    Ok(Content::Instruction {
        instruction: required(object, "instruction")?,
        input: first_text(object, ["context", "input"])?.unwrap_or_default(),
        response: response.map_or_else(|| required(object, present), Ok)?,
    })
}

/// The first text of `keys` that isn't empty, or an empty one if there is no other.
fn first_text(object: &Map<String, Value>, keys: [&str; 2]) -> Result<Option<String>> {
    let mut found = None;
    for key in keys {
        match optional(object, key)? {
            Some(text) if !text.is_empty() => return Ok(Some(text)),
            text => found = found.or(text),
        }
    }
    Ok(found)
}

fn messages(object: &Map<String, Value>) -> Result<Vec<Message>> {
    nothing_in(object, &["tools"])?;
    conversation(&list(object, "messages")?, message)
}

/// A message of OpenAI's.
fn message(object: &Map<String, Value>) -> Result<Message> {
    nothing_in(object, &["tool_calls", "function_call", "reasoning_content"])?;
    Ok(Message { role: required(object, "role")?, content: text_of(object, "content")? })
}

/// An error if a field has something that a template would write.
fn nothing_in(object: &Map<String, Value>, keys: &[&str]) -> Result<()> {
    let nothing = |value: &Value| match value {
        Value::Null => true,
        // Tools may be a list as a text.
        Value::String(text) => matches!(text.as_str(), "" | "[]"),
        Value::Array(values) => values.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    match keys.iter().find(|&&key| object.get(key).is_some_and(|value| !nothing(value))) {
        Some(key) => bail!("\"{key}\": expected none, as roles and texts alone are learnt"),
        None => Ok(()),
    }
}

fn conversations(object: &Map<String, Value>) -> Result<Vec<Message>> {
    nothing_in(object, &["tools"])?;
    let mut values = list(object, "conversations")?;
    // LLaMA-Factory's files have the system message beside the others.
    let is_first = |text: &str| values.first().is_some_and(|first| first["value"] == *text);
    if let Some(system) = optional(object, "system")?.filter(|text| !text.is_empty() && !is_first(text)) {
        values.to_mut().insert(0, serde_json::json!({"from": "system", "value": system}));
    }
    conversation(&values, |message| {
        // Some files have the other format's messages under this key.
        if !message.contains_key("from") && message.contains_key("role") {
            return self::message(message);
        }
        let from = required(message, "from")?;
        let role = match from.as_str() {
            "human" | "user" => "user",
            "gpt" | "assistant" | "chatgpt" | "model" => "assistant",
            "system" => "system",
            "tool" | "observation" => "tool",
            other => bail!("\"from\": expected system, human, gpt or tool, found \"{}\"", printable(other)),
        };
        Ok(Message { role: role.into(), content: required(message, "value")? })
    })
}

/// A list of messages. Hugging Face's `datasets` also writes them as one object of lists: {"from": [..], "value": [..]}.
fn list<'o>(object: &'o Map<String, Value>, key: &str) -> Result<Cow<'o, [Value]>> {
    let value = object.get(key).map(structure).with_context(|| format!("no \"{key}\""))?;
    match value {
        Cow::Borrowed(Value::Array(values)) => return Ok(Cow::Borrowed(values)),
        Cow::Owned(Value::Array(values)) => return Ok(Cow::Owned(values)),
        _ => {}
    }
    match &*value {
        Value::Object(lists) if !lists.is_empty() && lists.values().all(Value::is_array) => {
            let length = lists.values().filter_map(Value::as_array).map(Vec::len).max().unwrap_or(0);
            let message = |i: usize| {
                let part = |(key, list): (&String, &Value)| Some((key.clone(), list.get(i)?.clone()));
                Value::Object(lists.iter().filter_map(part).collect())
            };
            Ok((0..length).map(message).collect())
        }
        other => bail!("\"{key}\": expected a list, found {}", kind(other)),
    }
}

/// The list or object that a text is the JSON of; otherwise the value as it is.
pub fn structure(value: &Value) -> Cow<'_, Value> {
    let Value::String(text) = value else { return Cow::Borrowed(value) };
    match serde_json::from_str(text) {
        Ok(Value::Array(values)) => Cow::Owned(Value::Array(values)),
        Ok(Value::Object(map)) => Cow::Owned(Value::Object(map)),
        _ => Cow::Borrowed(value),
    }
}

/// Reads a conversation's messages and checks their order.
fn conversation(values: &[Value], read: impl Fn(&Map<String, Value>) -> Result<Message>) -> Result<Vec<Message>> {
    let mut messages: Vec<Message> = Vec::with_capacity(values.len());
    for (number, value) in (1..).zip(values) {
        let at = || format!("message {number}");
        let Value::Object(object) = value else { bail!("{}: expected an object, found {}", at(), kind(value)) };
        let message = read(object).with_context(at)?;
        let expected: &[&str] = match messages.last().map(|before| before.role.as_str()) {
            None => &["system", "developer", "user"],
            Some("user") => &["assistant"],
            Some("assistant") => &["user", "tool"],
            Some("tool") => &["assistant", "tool"],
            Some(_) => &["user"],
        };
        if !expected.contains(&message.role.as_str()) {
            bail!("{}: role: expected {}, found \"{}\"", at(), expected.join(" or "), printable(&message.role));
        }
        // As in a request to `hydra serve`, so that a conversation has the same tokens in both.
        let role = if message.role == "developer" { "system".into() } else { message.role };
        messages.push(Message { role, ..message });
    }
    if !messages.iter().any(|message| message.role == "assistant") {
        let count = messages.len();
        let messages = if count == 1 { "message" } else { "messages" };
        bail!("expected a message of the assistant to learn, found none in {count} {messages}");
    }
    Ok(messages)
}

/// A text: a string, or OpenAI's list of parts, all of them texts.
fn text_of(object: &Map<String, Value>, key: &str) -> Result<String> {
    let Some(Value::Array(parts)) = object.get(key) else { return required(object, key) };
    let mut text = String::new();
    for part in parts {
        match (part["type"].as_str(), part["text"].as_str()) {
            (Some("text"), Some(own)) => text += own,
            (found, _) => bail!(
                "\"{key}\": expected parts of type text, found {}",
                found.map_or("another value".into(), |found| format!("\"{}\"", printable(found)))
            ),
        }
    }
    Ok(text)
}

fn required(object: &Map<String, Value>, key: &str) -> Result<String> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => bail!("\"{key}\": expected a string, found {}", kind(other)),
        None => bail!("no \"{key}\""),
    }
}

/// A string, or nothing.
pub fn optional(object: &Map<String, Value>, key: &str) -> Result<Option<String>> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(_) => required(object, key).map(Some),
    }
}

/// What errors call a value.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<(Format, Content)> {
        Content::parse(&serde_json::from_str(text).unwrap(), None)
    }

    #[track_caller]
    fn wrong(text: &str) -> String {
        format!("{:#}", parse(text).unwrap_err())
    }

    #[test]
    fn instructions() {
        let content = |instruction: &str, input: &str, response: &str| Content::Instruction {
            instruction: instruction.into(),
            input: input.into(),
            response: response.into(),
        };
        let found = |text: &str| parse(text).unwrap().1;
        assert_eq!(found(r#"{"instruction":"i","context":"c","response":"r"}"#), content("i", "c", "r"));
        let alpaca = r#"{"instruction":"i","input":null,"output":"o","text":"i o"}"#;
        assert_eq!(found(alpaca), content("i", "", "o"));
        assert_eq!(found(r#"{"prompt":"p","completion":"c","else":3}"#), content("p", "", "c"));
        // The first that has text counts.
        let both = r#"{"instruction":"i","context":CONTEXT,"input":"x","response":RESPONSE,"output":"o"}"#;
        for nothing in ["null", "\"\""] {
            let text = both.replace("CONTEXT", nothing).replace("RESPONSE", nothing);
            assert_eq!(found(&text), content("i", "x", "o"));
        }
        let text = both.replace("CONTEXT", "\"c\"").replace("RESPONSE", "\"r\"");
        assert_eq!(found(&text), content("i", "c", "r"));
        assert_eq!(found(r#"{"instruction":"i","response":"","output":null}"#), content("i", "", ""));
        let null = r#""response": expected a string, found null"#;
        assert_eq!(wrong(r#"{"instruction":"i","response":null}"#), null);
        assert_eq!(wrong(r#"{"instruction":"i","response":null,"output":null}"#), null);
        assert_eq!(wrong(r#"{"instruction":"i"}"#), r#"expected "response" or "output" beside "instruction""#);
        assert_eq!(wrong(r#"{"prompt":"i"}"#), r#"no "completion""#);
        assert_eq!(wrong(r#"{"instruction":"i","response":3}"#), r#""response": expected a string, found a number"#);
        assert!(wrong(r#"{"txt":"i"}"#).starts_with(r#"expected "instruction" and "response""#));
        assert!(wrong(r#"{"txt":"i","more":1}"#).ends_with("found txt, more"));
    }

    #[test]
    fn conversations_of_both_kinds() {
        let turns = [Message::system("S"), Message::user("a"), Message::assistant("b"), Message::user("c")];
        let (format, content) = parse(
            r#"{"messages":[{"role":"system","content":"S"},{"role":"user","content":[{"type":"text","text":"a"}]},
                {"role":"assistant","content":"b","tool_calls":[]},{"role":"user","content":"c","name":"n"}],"prompt":"a"}"#,
        )
        .unwrap();
        assert_eq!((format, &content), (Format::Messages, &Content::Conversation(turns.to_vec())));
        assert_eq!(content.question(), "a\nc");
        let (format, content) = parse(
            r#"{"conversations":[{"from":"system","value":"S"},{"from":"human","value":"a"},{"from":"gpt","value":"b"},
                {"role":"user","content":"c"}],"id":1}"#,
        )
        .unwrap();
        assert_eq!((format, &content), (Format::Conversations, &Content::Conversation(turns.to_vec())));
        for text in [
            r#"{"messages":[{"role":"developer","content":"S"},{"role":"user","content":"a"},
                {"role":"assistant","content":"b"},{"role":"user","content":"c"}]}"#,
            r#"{"conversations":[{"role":"developer","content":"S"},{"role":"user","content":"a"},
                {"role":"assistant","content":"b"},{"role":"user","content":"c"}]}"#,
        ] {
            assert_eq!(parse(text).unwrap().1, content);
        }
    }

    #[test]
    fn a_system_message_beside_the_conversation() {
        let record = |more: &str| {
            format!(r#"{{"conversations":[{{"from":"human","value":"a"}},{{"from":"gpt","value":"b"}}]{more}}}"#)
        };
        let plain = Content::Conversation(vec![Message::user("a"), Message::assistant("b")]);
        for nothing in ["", r#","system":null"#, r#","system":"","tools":"[]""#] {
            assert_eq!(parse(&record(nothing)).unwrap().1, plain);
        }
        let all = [Message::system("S"), Message::user("a"), Message::assistant("b")];
        assert_eq!(parse(&record(r#","system":"S""#)).unwrap().1, Content::Conversation(all.to_vec()));
        assert!(wrong(&record(r#","tools":"[{}]""#)).starts_with("\"tools\": expected none"));
        let within = |system: &str| {
            let list = r#"[{"from":"system","value":"S"},{"from":"human","value":"a"},{"from":"gpt","value":"b"}]"#;
            format!(r#"{{"conversations":{list},"system":"{system}"}}"#)
        };
        assert_eq!(parse(&within("S")).unwrap().1, Content::Conversation(all.to_vec()));
        assert_eq!(wrong(&within("T")), r#"message 2: role: expected user, found "system""#);
    }

    #[test]
    fn messages_as_lists_of_their_parts() {
        let found = parse(r#"{"conversations":{"from":["human","gpt"],"value":["a","b"]}}"#).unwrap().1;
        assert_eq!(found, Content::Conversation(vec![Message::user("a"), Message::assistant("b")]));
        let short = wrong(r#"{"conversations":{"from":["human","gpt"],"value":["a"]}}"#);
        assert_eq!(short, r#"message 2: no "value""#);
        assert_eq!(wrong(r#"{"messages":{"role":"user"}}"#), r#""messages": expected a list, found an object"#);
        let text = r#"{"conversations":"[{\"from\":\"human\",\"value\":\"a\"},{\"from\":\"gpt\",\"value\":\"b\"}]"}"#;
        assert_eq!(parse(text).unwrap().1, found);
        assert_eq!(wrong(r#"{"messages":"[{"}"#), r#""messages": expected a list, found a string"#);
    }

    #[test]
    fn what_is_wrong_with_a_conversation() {
        let messages = |list: &str| wrong(&format!(r#"{{"messages":{list}}}"#));
        let [user, assistant] = ["user", "assistant"].map(|role| format!(r#"{{"role":"{role}","content":"x"}}"#));
        assert_eq!(messages("3"), r#""messages": expected a list, found a number"#);
        assert_eq!(messages("[]"), "expected a message of the assistant to learn, found none in 0 messages");
        assert_eq!(
            messages(&format!("[{user}]")),
            "expected a message of the assistant to learn, found none in 1 message"
        );
        assert_eq!(messages("[3]"), "message 1: expected an object, found a number");
        assert_eq!(messages(r#"[{"content":"x"}]"#), r#"message 1: no "role""#);
        let order =
            |found: &str, wanted: &str, at: usize| format!("message {at}: role: expected {wanted}, found \"{found}\"");
        assert_eq!(messages(&format!("[{assistant}]")), order("assistant", "system or developer or user", 1));
        assert_eq!(messages(&format!("[{user},{user}]")), order("user", "assistant", 2));
        assert_eq!(messages(&format!("[{user},{assistant},{assistant}]")), order("assistant", "user or tool", 3));
        let image = r#"[{"role":"user","content":[{"type":"image_url"}]}]"#;
        assert_eq!(messages(image), r#"message 1: "content": expected parts of type text, found "image_url""#);
        let thought = format!(r#"[{user},{{"role":"assistant","content":"b","reasoning_content":"hm"}}]"#);
        assert!(messages(&thought).starts_with("message 2: \"reasoning_content\": expected none"));
        assert_eq!(wrong(&format!(r#"{{"conversations":{thought}}}"#)), messages(&thought));
        let tools = wrong(r#"{"messages":[],"tools":[{"name":"f"}]}"#);
        assert_eq!(tools, "\"tools\": expected none, as roles and texts alone are learnt");
        let calls = format!(r#"[{user},{{"role":"assistant","content":null,"tool_calls":[1]}}]"#);
        assert!(messages(&calls).starts_with("message 2: \"tool_calls\": expected none"));
        let from = wrong(r#"{"conversations":[{"from":"bot","value":"x"}]}"#);
        assert_eq!(from, r#"message 1: "from": expected system, human, gpt or tool, found "bot""#);
    }

    #[test]
    fn two_formats_in_one_record() {
        let text = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"text":"t"}"#;
        assert_eq!(wrong(text), r#"both "messages" and "text": choose one with --data-format"#);
        let object = serde_json::from_str(text).unwrap();
        let chosen = |format| Content::parse(&object, Some(format)).map(|(_, content)| content);
        assert_eq!(chosen(Format::Text).unwrap(), Content::Text("t".into()));
        assert!(matches!(chosen(Format::Messages).unwrap(), Content::Conversation(turns) if turns.len() == 2));
        assert_eq!(chosen(Format::Conversations).unwrap_err().to_string(), r#"no "conversations""#);
    }
}
