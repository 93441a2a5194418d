//! `--template`: how a record becomes two texts, of which the second is learned. The templates are those of
//! [`hydra_runtime::chat::InstructionTemplate`], by name, or a file with a Jinja template.

use super::records::Record;
use anyhow::{Context, Result};
use hydra_runtime::chat::{InstructionTemplate, Texts};
use hydra_runtime::tokenizer::Tokenizer;

/// A template, ready to use.
pub struct Template(InstructionTemplate);

impl Template {
    /// From `--template`: a name, or a file's path.
    pub fn from_argument(argument: &str, tokenizer: &Tokenizer) -> Result<Self> {
        let named = InstructionTemplate::by_name(argument, tokenizer);
        if let Some(template) = named.with_context(|| format!("--template {argument}"))? {
            return Ok(Self(template));
        }
        let expected = "expected plain, official, alpaca, chat or a file";
        let text = std::fs::read_to_string(argument).with_context(|| format!("--template {argument}: {expected}"))?;
        Ok(Self(InstructionTemplate::jinja(text).with_context(|| argument.to_string())?))
    }

    /// A record's texts.
    pub fn render(&self, record: &Record) -> Result<Texts> {
        let Record { instruction, input, response, category, .. } = record;
        Ok(self.0.render(instruction, input, response, category.as_deref())?)
    }
}
