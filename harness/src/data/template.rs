//! How a record becomes two texts, of which the second is learnt.
//!
//! | name | source | target |
//! |---|---|---|
//! | `plain` | instruction, newline and input if there is one, newline | response, end token |
//! | `official` | instruction, newline and input if there is one, end token | response, end token |
//! | `alpaca` | Stanford Alpaca's prompt, with or without its input section | response, end token |
//! | `chat` | the model's own chat template around the user's turn | the assistant's text and the end token of its turn |
//! | a file | the file, a Jinja template over `instruction`, `input` (also as `context`) and `category` | response, end token |
//!
//! `official` is the HydraLoRA authors' published one.

use super::chat::ChatTemplate;
use super::records::Record;
use anyhow::{Context, Result, bail};
use hydra_runtime::tokenizer::Tokenizer;
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior, context};
use std::path::Path;

/// A template, ready to use.
pub enum Template {
    /// See the table above.
    Plain,
    /// See the table above.
    Official,
    /// See the table above.
    Alpaca,
    /// See the table above.
    Chat(Box<ChatTemplate>),
    /// See the table above.
    File(Box<Environment<'static>>),
}

/// A record's two texts; each may be followed by the end token.
#[derive(Debug, PartialEq, Eq)]
pub struct Texts {
    /// What comes first; nothing in it is learnt.
    pub source: String,
    /// Whether the end token follows the source.
    pub source_end: bool,
    /// What is learnt.
    pub target: String,
    /// Whether the end token follows the target.
    pub target_end: bool,
}

impl Template {
    /// From `--template`: a name, or a file's path.
    pub fn from_argument(argument: &str, tokenizer: &Tokenizer) -> Result<Self> {
        Ok(match argument {
            "plain" => Self::Plain,
            "official" => Self::Official,
            "alpaca" => Self::Alpaca,
            "chat" => match tokenizer.chat_template() {
                Some(template) => Self::Chat(Box::new(ChatTemplate::new(template, tokenizer)?)),
                None => bail!("--template chat: the model has no chat template"),
            },
            path => {
                let names = "not plain, official, alpaca or chat, and as a file";
                let text =
                    std::fs::read_to_string(Path::new(path)).with_context(|| format!("--template {path}: {names}"))?;
                Self::File(Box::new(file(text).with_context(|| path.to_string())?))
            }
        })
    }

    /// A record's texts.
    pub fn render(&self, record: &Record) -> Result<Texts> {
        let Record { instruction, input, response, category, .. } = record;
        let asked = if input.is_empty() { instruction.clone() } else { format!("{instruction}\n{input}") };
        let (source, source_end) = match self {
            Self::Plain => (asked + "\n", false),
            Self::Official => (asked, true),
            Self::Alpaca => (alpaca(instruction, input), false),
            Self::Chat(chat) => {
                let (source, target, target_end) = chat.turn(&asked, response)?;
                return Ok(Texts { source, source_end: false, target, target_end });
            }
            Self::File(environment) => {
                let template = environment.get_template("source").map_err(|e| jinja(&e))?;
                let source = template.render(context! { instruction, input, context => input, category });
                (source.map_err(|e| jinja(&e))?, false)
            }
        };
        Ok(Texts { source, source_end, target: response.clone(), target_end: true })
    }
}

fn file(text: String) -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    // What is written is what is meant, the file's last newline too.
    environment.set_syntax(SyntaxConfig::builder().keep_trailing_newline(true).build().map_err(|e| jinja(&e))?);
    environment.add_template_owned("source", text).map_err(|e| jinja(&e))?;
    // A field that does not exist shows now, not at the first record.
    Template::File(Box::new(environment.clone())).render(&Record::default())?;
    Ok(environment)
}

/// Jinja's error without its copy of the template.
pub(super) fn jinja(error: &minijinja::Error) -> anyhow::Error {
    let line = error.line().map_or(String::new(), |line| format!(" in line {line}"));
    let detail = error.detail().map_or(String::new(), |detail| format!(": {detail}"));
    anyhow::anyhow!("the template{line}: {}{detail}", error.kind())
}

fn alpaca(instruction: &str, input: &str) -> String {
    let below = "Below is an instruction that describes a task";
    let write = "Write a response that appropriately completes the request.";
    if input.is_empty() {
        format!("{below}. {write}\n\n### Instruction:\n{instruction}\n\n### Response:\n")
    } else {
        let paired = "paired with an input that provides further context";
        format!(
            "{below}, {paired}. {write}\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record { instruction: "Add.".into(), input: "1 2".into(), response: "3".into(), ..Record::default() }
    }

    #[test]
    fn built_in_templates() {
        let plain = Template::Plain.render(&record()).unwrap();
        assert_eq!((plain.source.as_str(), plain.source_end), ("Add.\n1 2\n", false));
        let official = Template::Official.render(&record()).unwrap();
        assert_eq!((official.source.as_str(), official.source_end), ("Add.\n1 2", true));
        let alpaca = Template::Alpaca.render(&record()).unwrap();
        assert!(alpaca.source.ends_with("### Input:\n1 2\n\n### Response:\n"));
        let without = Template::Alpaca.render(&Record { input: String::new(), ..record() }).unwrap();
        assert!(!without.source.contains("Input") && without.source.contains("a task. Write"));
        assert_eq!((alpaca.target.as_str(), alpaca.target_end), ("3", true));
    }

    #[test]
    fn files_are_jinja_over_the_fields() {
        let environment = file("Q: {{ instruction }}{% if context %} ({{ input }}){% endif %}\nA: ".into()).unwrap();
        let texts = Template::File(Box::new(environment)).render(&record()).unwrap();
        assert_eq!((texts.source.as_str(), texts.target.as_str()), ("Q: Add. (1 2)\nA: ", "3"));
        assert!(file("{{ question }}".into()).is_err());
        assert!(file("{% if %}".into()).is_err());
    }
}
