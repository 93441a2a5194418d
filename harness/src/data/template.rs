//! From a record to tokens with their loss mask. An instruction becomes two texts by `--template`: a name, or a file with a
//! Jinja template. A conversation is rendered by the model's own chat template, or that of `--chat-template`.

use super::format::Content;
use super::limit;
use super::options::EncodingArgs;
use super::records::Record;
use anyhow::{Context, Result, anyhow, bail};
use hydra_runtime::chat::{ChatTemplate, InstructionTemplate, MaskedTokens, Texts};
use hydra_runtime::tokenizer::Tokenizer;
use std::cell::OnceCell;
use std::path::Path;

/// The templates of the options, ready to use.
pub struct Template {
    tokenizer: Tokenizer,
    name: String,
    instruction: InstructionTemplate,
    /// The text of `--chat-template`.
    chat_source: Option<String>,
    /// Compiled when the first conversation comes: not every model has one.
    chat: OnceCell<ChatTemplate>,
}

impl Template {
    /// Reads and compiles what the options name.
    pub fn new(options: &EncodingArgs, tokenizer: &Tokenizer) -> Result<Self> {
        let (name, chat_file) = (options.template(), options.chat_template.as_deref());
        let at = || format!("--chat-template {}", chat_file.unwrap_or(Path::new("")).display());
        let chat_source = chat_file.map(limit::settings).transpose().with_context(at)?;
        let own = chat_source.as_deref().map(|text| ChatTemplate::new(text, tokenizer)).transpose().with_context(at)?;
        let instruction = match own {
            Some(chat) if name == "chat" => InstructionTemplate::Chat(Box::new(chat)),
            _ => instruction_template(name, tokenizer)?,
        };
        let (tokenizer, name) = (tokenizer.clone(), name.to_string());
        Ok(Self { tokenizer, name, instruction, chat_source, chat: OnceCell::new() })
    }

    /// A record's tokens. Instructions have theirs as source and target, each tokenized by itself; of conversations the
    /// assistant's messages are learnt, of texts all, with the end-of-text token.
    pub fn tokens(&self, record: &Record) -> Result<MaskedTokens> {
        limit::tokenizing(match &record.content {
            Content::Instruction { instruction, input, response } => instruction.len() + input.len() + response.len(),
            Content::Conversation(messages) => messages.iter().map(|message| message.content.len()).sum(),
            Content::Text(text) => text.len(),
        })?;
        match &record.content {
            Content::Instruction { instruction, input, response } => {
                self.exchange(&self.instruction.render(instruction, input, response, record.category.as_deref())?)
            }
            Content::Conversation(messages) => Ok(self.chat()?.conversation(messages)?.tokens(&self.tokenizer)?),
            Content::Text(text) => self.text(text),
        }
    }

    /// The tokens of an instruction, without an answer.
    pub fn prompt(&self, instruction: &str) -> Result<Vec<u32>> {
        self.source(&self.instruction.render(instruction, "", "", None)?)
    }

    /// A record as a question: the tokens of its prompt, and the right answer. Of a conversation, that is the assistant's last
    /// message. Fails for a text, which has no answer.
    pub fn question(&self, record: &Record) -> Result<(Vec<u32>, String)> {
        match &record.content {
            Content::Instruction { instruction, input, response } => {
                let texts = self.instruction.render(instruction, input, "", record.category.as_deref())?;
                Ok((self.source(&texts)?, response.clone()))
            }
            Content::Conversation(messages) => {
                let last = messages.iter().rposition(|message| message.role == "assistant");
                let last = last.context("expected a message of the assistant")?;
                let prompt = self.chat()?.prompt(&messages[..last])?;
                Ok((self.tokenizer.encode_prompt(&prompt)?, messages[last].content.clone()))
            }
            Content::Text(_) => bail!("expected a record with an answer, found a text"),
        }
    }

    /// The tokenizer that the templates were made for.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    fn source(&self, texts: &Texts) -> Result<Vec<u32>> {
        let end = self.tokenizer.eos().filter(|_| texts.source_end);
        Ok(self.tokenizer.encode_prompt(&texts.source)?.into_iter().chain(end).collect())
    }

    /// Fails if `--template` was chosen, and none of `records` is an instruction.
    pub fn applies(&self, records: &[Record]) -> Result<()> {
        let uses = |record: &Record| matches!(record.content, Content::Instruction { .. });
        match records.first() {
            Some(first) if !matches!(self.name.as_str(), "plain" | "chat") && !records.iter().any(uses) => {
                let (name, place) = (&self.name, &first.place);
                bail!("--template {name}: expected instructions, found another format at {place}; leave --template out")
            }
            _ => Ok(()),
        }
    }

    fn chat(&self) -> Result<&ChatTemplate> {
        if let Some(chat) = self.chat.get() {
            return Ok(chat);
        }
        let chat = match &self.chat_source {
            Some(text) => ChatTemplate::new(text, &self.tokenizer)?,
            None => ChatTemplate::of(&self.tokenizer)
                .map_err(|error| anyhow!("{error}; give one for conversations with --chat-template FILE"))?,
        };
        Ok(self.chat.get_or_init(|| chat))
    }

    fn exchange(&self, texts: &Texts) -> Result<MaskedTokens> {
        let end = |wanted: bool| match (wanted, self.tokenizer.eos()) {
            (false, _) => Ok(None),
            (true, Some(eos)) => Ok(Some(eos)),
            (true, None) => bail!("the model names no EOS token to end an answer with"),
        };
        let mut tokens = self.tokenizer.encode_prompt(&texts.source)?;
        tokens.extend(end(texts.source_end)?);
        let mut mask = vec![false; tokens.len()];
        tokens.extend(self.tokenizer.encode(&texts.target)?);
        tokens.extend(end(texts.target_end)?);
        mask.resize(tokens.len(), true);
        Ok(MaskedTokens { tokens, mask })
    }

    fn text(&self, text: &str) -> Result<MaskedTokens> {
        let mut tokens = self.tokenizer.encode_prompt(text)?;
        tokens.extend(self.tokenizer.eos().filter(|eos| tokens.last() != Some(eos)));
        let mask = vec![true; tokens.len()];
        Ok(MaskedTokens { tokens, mask })
    }
}

fn instruction_template(name: &str, tokenizer: &Tokenizer) -> Result<InstructionTemplate> {
    let named = InstructionTemplate::by_name(name, tokenizer);
    if let Some(template) = named.with_context(|| format!("--template {name}"))? {
        return Ok(template);
    }
    let expected = "expected plain, official, alpaca, chat or a file";
    let text = limit::settings(Path::new(name)).with_context(|| format!("--template {name}: {expected}"))?;
    InstructionTemplate::jinja(text).with_context(|| name.to_string())
}
