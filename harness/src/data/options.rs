//! Options that say how records become tokens.

use super::format::Format;
use crate::options::Count;
use anyhow::{Result, bail};
use clap::Args;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The published setting.
const SEQ_LEN: usize = 1024;

/// How records become tokens.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct EncodingArgs {
    /// Prompt template for instructions: plain, official, alpaca, chat, or a Jinja file [default: plain]
    ///
    /// chat is the model's own chat template. A Jinja file may use instruction, input and category.
    #[arg(long, value_name = "NAME|FILE")]
    pub template: Option<String>,
    /// Jinja file to render conversations with [default: the model's own chat template]
    ///
    /// It may use messages, add_generation_prompt, bos_token and eos_token, and mark what is learnt with
    /// {% generation %} .. {% endgeneration %}.
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    /// Format of the records, where their keys fit several [default: the one that the keys tell]
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub data_format: Option<Format>,
    /// Cut sequences at N tokens [default: 1024, or the model's context if that is shorter]
    #[arg(long, value_name = "N")]
    pub seq_len: Option<Count>,
}

impl EncodingArgs {
    /// The template's name or file.
    pub fn template(&self) -> &str {
        self.template.as_deref().unwrap_or("plain")
    }

    /// The length that sequences are cut at, in tokens; `context` is the model's. Fails if the model can't take it.
    pub fn seq_len(&self, context: usize) -> Result<usize> {
        match self.seq_len.map(Count::get) {
            Some(length) if length > context => {
                bail!("--seq-len {length}: expected at most {context} tokens, the model's context")
            }
            Some(length) => Ok(length),
            None => Ok(context.min(SEQ_LEN)),
        }
    }
}
