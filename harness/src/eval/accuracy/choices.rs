//! Multiple-choice questions in the forms of the usual data sets, as JSON objects:
//!
//! ```text
//! {"question", "choices": {"text": [..], "label": [..]}, "answerKey"}       ARC, on Hugging Face
//! {"question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}       ARC, as published
//! {"ctx" or "ctx_a" and "ctx_b", "activity_label", "endings", "label"}      HellaSwag
//! {"goal", "sol1", "sol2", "label"}                                         PIQA
//! {"passage", "question", "answer": true or false, or "label": 1 or 0}      BoolQ
//! {"question", "choices": [..], "answer": index, letter or choice}          MMLU and others; also "options", "label"
//! ```
//! A list may be written as a text, and so may true and false, which they are in a CSV file.
//! The prompts are those of EleutherAI's lm-evaluation-harness.

use crate::data::format::{kind, structure};
use crate::output::printable;
use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

/// A question with its choices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choices {
    /// The question alone: what `--template` gets.
    pub question: String,
    /// The whole prompt; a space and a choice follow it.
    pub prompt: String,
    /// At least two.
    pub choices: Vec<String>,
    /// Index of the right one.
    pub answer: usize,
}

impl Choices {
    /// Reads an object; `None` if it is in none of the forms.
    pub fn parse(object: &Map<String, Value>) -> Result<Option<Self>> {
        let has = |key: &str| object.contains_key(key);
        let found = if has("endings") && (has("ctx") || has("ctx_a")) {
            hellaswag(object)?
        } else if has("goal") && has("sol1") && has("sol2") {
            piqa(object)?
        } else if has("passage") && has("question") && !has("choices") && !has("options") {
            boolq(object)?
        } else if object.get("question").is_some_and(Value::is_object) || has("choices") || has("options") {
            listed(object)?
        } else {
            return Ok(None);
        };
        if found.choices.len() < 2 {
            bail!("expected at least two choices, found {}", found.choices.len());
        }
        Ok(Some(found))
    }
}

fn hellaswag(object: &Map<String, Value>) -> Result<Choices> {
    let context = match object.get("ctx_a") {
        Some(_) => {
            let b = text(object, "ctx_b")?;
            let (first, rest) = b.split_at(b.chars().next().map_or(0, char::len_utf8));
            format!("{} {}{}", text(object, "ctx_a")?, first.to_uppercase(), rest.to_lowercase())
        }
        None => text(object, "ctx")?.to_string(),
    };
    let prompt = match object.get("activity_label") {
        Some(_) => cleaned(&format!("{}: {context}", text(object, "activity_label")?)),
        None => cleaned(&context),
    };
    let choices: Vec<String> = strings(object, "endings")?.iter().map(|ending| cleaned(ending)).collect();
    let answer = index(object, "label", &choices, &[])?;
    Ok(Choices { question: prompt.clone(), prompt, choices, answer })
}

/// Without the marks of WikiHow's articles: " [title]" ends a sentence, other words in brackets vanish.
fn cleaned(text: &str) -> String {
    let text = text.trim().replace(" [title]", ". ");
    let mut plain = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some((before, after)) = rest.split_once('[') {
        let Some((_, behind)) = after.split_once(']').filter(|(inside, _)| !inside.contains('\n')) else { break };
        plain += before;
        rest = behind;
    }
    (plain + rest).replace("  ", " ")
}

fn piqa(object: &Map<String, Value>) -> Result<Choices> {
    let question = text(object, "goal")?.to_string();
    let choices = vec![text(object, "sol1")?.to_string(), text(object, "sol2")?.to_string()];
    let answer = index(object, "label", &choices, &[])?;
    Ok(Choices { prompt: asked(&question), question, choices, answer })
}

fn boolq(object: &Map<String, Value>) -> Result<Choices> {
    let prompt = format!("{}\nQuestion: {}?\nAnswer:", text(object, "passage")?, text(object, "question")?);
    let question = format!("{}\n{}?", text(object, "passage")?, text(object, "question")?);
    let choices = vec!["no".to_string(), "yes".into()];
    let answer = match object.get("answer") {
        Some(Value::Bool(answer)) => usize::from(*answer),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => 1,
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => 0,
        Some(_) => index(object, "answer", &choices, &[])?,
        None => index(object, "label", &choices, &[])?,
    };
    Ok(Choices { question, prompt, choices, answer })
}

/// A question with a list of choices.
fn listed(object: &Map<String, Value>) -> Result<Choices> {
    let (stem, holder) = match object.get("question") {
        Some(Value::Object(question)) => (text(question, "stem")?, question),
        Some(_) => (text(object, "question")?, object),
        None => {
            let key = ["instruction", "prompt"].into_iter().find(|key| object.contains_key(*key));
            (text(object, key.context("no \"question\" beside the choices")?)?, object)
        }
    };
    let key = if holder.contains_key("choices") { "choices" } else { "options" };
    let (choices, labels) = match holder.get(key).map(structure).as_deref() {
        Some(Value::Object(lists)) => (strings(lists, "text")?, strings(lists, "label")?),
        Some(Value::Array(all)) if all.iter().all(Value::is_object) => {
            let of = |part: &str| all.iter().map(|one| text_of(one, part)).collect::<Result<Vec<_>>>();
            (of("text")?, of("label")?)
        }
        _ => (strings(holder, key)?, Vec::new()),
    };
    let keys = ["answerKey", "answer", "label", "response", "output", "completion"];
    let key = keys.into_iter().find(|key| object.contains_key(*key)).context("no \"answer\" beside the choices")?;
    let answer = index(object, key, &choices, &labels)?;
    let input = ["context", "input"].into_iter().find_map(|key| object.get(key)?.as_str());
    let question = input.filter(|input| !input.is_empty()).map_or(stem.to_string(), |input| format!("{stem}\n{input}"));
    Ok(Choices { prompt: asked(&question), question, choices, answer })
}

fn asked(question: &str) -> String {
    format!("Question: {question}\nAnswer:")
}

/// The right choice: its index from 0 (also as text), its label or letter, or itself.
fn index(object: &Map<String, Value>, key: &str, choices: &[String], labels: &[String]) -> Result<usize> {
    let value = object.get(key).with_context(|| format!("no \"{key}\""))?;
    let last = choices.len().saturating_sub(1);
    let found = match value {
        Value::Number(number) => number.as_u64().and_then(|number| usize::try_from(number).ok()),
        Value::String(own) => {
            let own = own.trim();
            let among = |all: &[String]| all.iter().position(|one| one.trim() == own);
            let letter = || match own.as_bytes() {
                [letter @ b'A'..=b'Z'] => Some(usize::from(letter - b'A')),
                _ => None,
            };
            // Labels count before anything else: those of some of ARC's questions are "1" to "4".
            among(labels)
                .or_else(|| if labels.is_empty() { among(choices) } else { None })
                .or_else(letter)
                .or_else(|| own.parse().ok())
        }
        _ => None,
    };
    found.filter(|&found| found <= last).with_context(|| {
        let shown = printable(&value.to_string());
        format!("\"{key}\": expected 0 to {last}, a letter or one of the choices, found {shown}")
    })
}

fn text<'o>(object: &'o Map<String, Value>, key: &str) -> Result<&'o str> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => bail!("\"{key}\": expected a string, found {}", kind(other)),
        None => bail!("no \"{key}\""),
    }
}

fn text_of(value: &Value, key: &str) -> Result<String> {
    let Value::Object(object) = value else { bail!("expected an object, found {}", kind(value)) };
    text(object, key).map(str::to_owned)
}

fn strings(object: &Map<String, Value>, key: &str) -> Result<Vec<String>> {
    let value = object.get(key).map(structure);
    let Some(Value::Array(values)) = value.as_deref() else {
        bail!("\"{key}\": expected a list of strings, found {}", value.as_deref().map_or("nothing", kind))
    };
    let string = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        other => bail!("\"{key}\": expected a list of strings, found {} in it", kind(other)),
    };
    values.iter().map(string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Option<Choices>> {
        Choices::parse(&serde_json::from_str(text).unwrap())
    }

    #[track_caller]
    fn found(text: &str, prompt: &str, choices: &[&str], answer: usize) {
        let found = parse(text).unwrap().unwrap();
        assert_eq!((found.prompt.as_str(), found.answer), (prompt, answer));
        assert_eq!(found.choices, choices);
    }

    #[test]
    fn the_usual_data_sets() {
        let arc = "Question: Which?\nAnswer:";
        found(
            r#"{"id":"x","question":"Which?","choices":{"text":["a","b"],"label":["1","2"]},"answerKey":"2"}"#,
            arc,
            &["a", "b"],
            1,
        );
        found(
            r#"{"question":{"stem":"Which?","choices":[{"text":"a","label":"A"},{"text":"b","label":"B"}]},"answerKey":"A"}"#,
            arc,
            &["a", "b"],
            0,
        );
        found(
            r#"{"activity_label":"Shaving","ctx_a":"A man sits. [title] He","ctx_b":"then LOOKS","ctx":"-","endings":["up [x] now.","down."],"label":"1"}"#,
            "Shaving: A man sits.. He Then looks",
            &["up now.", "down."],
            1,
        );
        found(
            r#"{"goal":"Boil?","sol1":"Fire","sol2":"Ice","label":0}"#,
            "Question: Boil?\nAnswer:",
            &["Fire", "Ice"],
            0,
        );
        found(
            r#"{"passage":"P.","question":"is it","answer":true,"title":"t"}"#,
            "P.\nQuestion: is it?\nAnswer:",
            &["no", "yes"],
            1,
        );
        for answer in [r#""label":0,"idx":1"#, r#""answer":"False""#] {
            let text = format!(r#"{{"passage":"P.","question":"is it",{answer}}}"#);
            found(&text, "P.\nQuestion: is it?\nAnswer:", &["no", "yes"], 0);
        }
        for answer in ["2", "\"C\"", "\"z\"", "\"2\""] {
            let text = format!(r#"{{"question":"Which?","subject":"s","choices":["x","y","z"],"answer":{answer}}}"#);
            found(&text, arc, &["x", "y", "z"], 2);
        }
        for options in [r#"["x","y"]"#, r#""[\"x\",\"y\"]""#] {
            let text = format!(r#"{{"instruction":"Which?","input":"Of these","options":{options},"output":"y"}}"#);
            found(&text, "Question: Which?\nOf these\nAnswer:", &["x", "y"], 1);
        }
        assert_eq!(parse(r#"{"instruction":"i","output":"o"}"#).unwrap(), None);
    }

    #[test]
    fn what_is_wrong_with_a_question() {
        let wrong = |text: &str| parse(text).unwrap_err().to_string();
        let label = wrong(r#"{"goal":"g","sol1":"a","sol2":"b","label":-1}"#);
        assert_eq!(label, "\"label\": expected 0 to 1, a letter or one of the choices, found -1");
        assert!(wrong(r#"{"ctx":"c","endings":["a","b"],"label":""}"#).ends_with("found \"\""));
        assert!(wrong(r#"{"question":"q","choices":["a"],"answer":0}"#).contains("at least two choices, found 1"));
        assert!(wrong(r#"{"question":"q","choices":["a","b"]}"#).contains("no \"answer\""));
        assert!(wrong(r#"{"question":"q","choices":"a","answer":0}"#).contains("\"choices\": expected a list"));
        assert!(wrong(r#"{"choices":["a","b"],"answer":0}"#).contains("no \"question\""));
    }
}
