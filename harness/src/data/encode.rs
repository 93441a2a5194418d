//! From records to token sequences.
//!
//! Source and target are tokenised apart and concatenated, behind a BOS where the tokenizer's own post-processor adds one
//! (unless the template has written it). Every token of the target is wanted after the one before it. What is beyond the
//! sequence length is cut; a record of which no target is left is dropped; both are counted.

use super::records::Record;
use super::template::Template;
use crate::options::Count;
use anyhow::{Context, Result, bail};
use clap::Args;
use hydra_runtime::batch::{NO_TARGET, Sequence};
use hydra_runtime::chat::Texts;
use hydra_runtime::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};

/// How records become tokens.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct EncodingArgs {
    /// Prompt template: plain, official, alpaca, chat, or a Jinja file [default: plain]
    ///
    /// chat is the model's own chat template. A Jinja file may use instruction, input and category.
    #[arg(long, value_name = "NAME|FILE")]
    pub template: Option<String>,
    /// Cut sequences at N tokens [default: 1024, or the model's context if that is shorter]
    #[arg(long, value_name = "N")]
    pub seq_len: Option<Count>,
}

/// The published setting.
const SEQ_LEN: usize = 1024;

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

/// Turns records into sequences.
pub struct Encoder<'t> {
    /// The model's tokenizer.
    pub tokenizer: &'t Tokenizer,
    /// How a record becomes text.
    pub template: &'t Template,
    /// The most tokens of a sequence.
    pub seq_len: usize,
}

/// Encoded records.
#[derive(Debug, Default)]
pub struct Encoded {
    /// In the file's order.
    pub sequences: Vec<Sequence>,
    /// Each sequence's category.
    pub categories: Vec<Option<String>>,
    /// Records that lost their end.
    pub cut: usize,
    /// Records that are not there because no target was left.
    pub dropped: usize,
}

impl Encoded {
    /// In words, if anything was cut or dropped.
    pub fn remark(&self, seq_len: usize) -> Option<String> {
        let total = self.sequences.len() + self.dropped;
        let (cut, dropped) = (self.cut, self.dropped);
        (cut + dropped > 0).then(|| {
            format!("of {total} records {cut} were cut at {seq_len} tokens and {dropped} dropped, having no target before that")
        })
    }
}

impl Encoder<'_> {
    /// Encodes all of `records`; `labels` gives the heads of their labels, and others have none. Fails if nothing is left.
    pub fn encode(&self, records: &[Record], labels: &[String]) -> Result<Encoded> {
        let mut encoded = Encoded::default();
        for record in records {
            let texts = self.template.render(record).with_context(|| record.place.clone())?;
            let (source, target) = self.ids(&texts)?;
            let head = record.label.as_ref().and_then(|own| labels.iter().position(|label| label == own));
            let Some(sequence) = sequence(&source, &target, self.seq_len, head.map(|head| head as u32)) else {
                encoded.dropped += 1;
                continue;
            };
            encoded.cut += usize::from(source.len() + target.len() > self.seq_len);
            encoded.sequences.push(sequence);
            encoded.categories.push(record.category.clone());
        }
        if encoded.sequences.is_empty() {
            bail!("none of {} records has a target within {} tokens", records.len(), self.seq_len);
        }
        Ok(encoded)
    }

    fn ids(&self, texts: &Texts) -> Result<(Vec<u32>, Vec<u32>)> {
        let end = |wanted: bool| match (wanted, self.tokenizer.eos()) {
            (false, _) => Ok(None),
            (true, Some(eos)) => Ok(Some(eos)),
            (true, None) => bail!("the model names no end token"),
        };
        let mut source = self.tokenizer.encode_prompt(&texts.source)?;
        source.extend(end(texts.source_end)?);
        let mut target = self.tokenizer.encode(&texts.target)?;
        target.extend(end(texts.target_end)?);
        Ok((source, target))
    }
}

/// `None` if no target is left within `seq_len` tokens.
fn sequence(source: &[u32], target: &[u32], seq_len: usize, head: Option<u32>) -> Option<Sequence> {
    let source = &source[..source.len().min(seq_len)];
    let target = &target[..target.len().min(seq_len - source.len())];
    let sequence = Sequence { lora_head: head, ..Sequence::answer(source, target) };
    sequence.targets.iter().any(|&id| id != NO_TARGET).then_some(sequence)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO: u32 = NO_TARGET;

    #[test]
    fn targets_are_shifted() {
        let whole = sequence(&[1, 2, 3], &[4, 5], 9, Some(1)).unwrap();
        assert_eq!(
            (whole.tokens, whole.targets, whole.lora_head),
            (vec![1, 2, 3, 4, 5], vec![NO, NO, 4, 5, NO], Some(1))
        );
    }

    #[test]
    fn cut_where_it_is_too_long() {
        let cut = sequence(&[1, 2, 3], &[4, 5], 4, None).unwrap();
        assert_eq!((cut.tokens, cut.targets), (vec![1, 2, 3, 4], vec![NO, NO, 4, NO]));
        assert_eq!(sequence(&[1, 2, 3], &[4, 5], 3, None), None);
        assert_eq!(sequence(&[1], &[], 3, None), None);
    }

    #[test]
    fn nothing_before_the_target() {
        let bare = sequence(&[], &[4, 5], 9, None).unwrap();
        assert_eq!(bare.targets, [5, NO]);
    }
}
