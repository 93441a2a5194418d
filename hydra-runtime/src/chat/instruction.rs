//! How an instruction becomes two texts: the source, which is given, and the target, which is learnt.

use super::{ChatTemplate, refused, sandbox};
use crate::Result;
use crate::tokenizer::Tokenizer;
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior, context};

/// What errors call a template of the caller's.
const OWN: &str = "the template";
/// Its name in the environment.
const NAME: &str = "source";

/// A template for an instruction, an input that it may have, and a response.
///
/// | variant | source | target |
/// |---|---|---|
/// | `Plain` | instruction, newline and input if there is one, newline | response, end-of-text token |
/// | `Official` | instruction, newline and input if there is one, end-of-text token | response, end-of-text token |
/// | `Alpaca` | Stanford Alpaca's prompt, with or without its input section | response, end-of-text token |
/// | `Chat` | the model's own chat template around the user's turn | the assistant's text and what ends its turn |
/// | `Jinja` | a Jinja template over `instruction`, `input` (also as `context`) and `category` | response, end-of-text token |
///
/// `Official` is the HydraLoRA authors' published one.
#[non_exhaustive]
pub enum InstructionTemplate {
    /// See the table above.
    Plain,
    /// See the table above.
    Official,
    /// See the table above.
    Alpaca,
    /// See the table above.
    Chat(Box<ChatTemplate>),
    /// See the table above; made by [`InstructionTemplate::jinja`].
    Jinja(Box<Environment<'static>>),
}

/// Two texts. Each may be followed by the end-of-text token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Texts {
    /// What comes first; nothing in it is learnt.
    pub source: String,
    /// Whether the end-of-text token follows the source.
    pub source_end: bool,
    /// What is learnt.
    pub target: String,
    /// Whether the end-of-text token follows the target.
    pub target_end: bool,
}

impl InstructionTemplate {
    /// The names of the built-in templates.
    pub const NAMES: [&str; 4] = ["plain", "official", "alpaca", "chat"];

    /// A built-in template by its name; `None` if there is none of this name. Fails for "chat" if the model has no chat template.
    pub fn by_name(name: &str, tokenizer: &Tokenizer) -> Result<Option<Self>> {
        Ok(Some(match name {
            "plain" => Self::Plain,
            "official" => Self::Official,
            "alpaca" => Self::Alpaca,
            "chat" => Self::Chat(Box::new(ChatTemplate::of(tokenizer)?)),
            _ => return Ok(None),
        }))
    }

    /// Compiles a Jinja template. Fails if it names a field that does not exist.
    pub fn jinja(text: impl Into<String>) -> Result<Self> {
        // The template's last newline is part of it.
        let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build();
        let made = syntax.and_then(|syntax| sandbox::environment(NAME, &text.into(), syntax));
        let mut environment = made.map_err(|error| refused(OWN, &error))?;
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        let template = Self::Jinja(Box::new(environment));
        template.render("", "", "", None)?;
        Ok(template)
    }

    /// The texts of an instruction, its input (empty for none), the response, and a category.
    pub fn render(&self, instruction: &str, input: &str, response: &str, category: Option<&str>) -> Result<Texts> {
        let asked = || if input.is_empty() { instruction.to_string() } else { format!("{instruction}\n{input}") };
        let (source, source_end) = match self {
            Self::Plain => (asked() + "\n", false),
            Self::Official => (asked(), true),
            Self::Alpaca => (alpaca(instruction, input), false),
            Self::Chat(chat) => return chat.exchange(&asked(), response),
            Self::Jinja(environment) => {
                let context = context! { instruction, input, context => input, category };
                (sandbox::render(environment, NAME, context).map_err(|error| refused(OWN, &error))?, false)
            }
        };
        Ok(Texts { source, source_end, target: response.into(), target_end: true })
    }
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

    #[test]
    fn built_in_templates() {
        let render = |template: InstructionTemplate, input| template.render("Add.", input, "3", None).unwrap();
        let plain = render(InstructionTemplate::Plain, "1 2");
        assert_eq!((plain.source.as_str(), plain.source_end), ("Add.\n1 2\n", false));
        let official = render(InstructionTemplate::Official, "1 2");
        assert_eq!((official.source.as_str(), official.source_end), ("Add.\n1 2", true));
        let alpaca = render(InstructionTemplate::Alpaca, "1 2");
        assert!(alpaca.source.ends_with("### Input:\n1 2\n\n### Response:\n"));
        let without = render(InstructionTemplate::Alpaca, "");
        assert!(!without.source.contains("Input") && without.source.contains("a task. Write"));
        assert_eq!((alpaca.target.as_str(), alpaca.target_end), ("3", true));
    }

    #[test]
    fn jinja_over_the_fields() {
        let text = "Q: {{ instruction }}{% if context %} ({{ input }}){% endif %}\nA: ";
        let texts = InstructionTemplate::jinja(text).unwrap().render("Add.", "1 2", "3", None).unwrap();
        assert_eq!((texts.source.as_str(), texts.target.as_str()), ("Q: Add. (1 2)\nA: ", "3"));
        assert!(InstructionTemplate::jinja("{{ question }}").is_err());
        assert!(InstructionTemplate::jinja("{% if %}").is_err());
    }
}
