//! From records to token sequences.
//!
//! Source and target are tokenized separately and concatenated, after a BOS token if the tokenizer's post-processor adds one
//! and the template has not written it. Every token of the target is to be predicted from those before it. What exceeds the
//! sequence length is cut off; a record without any target left is dropped; both are counted.

use super::records::Record;
use super::template::Template;
use crate::options::Count;
use crate::progress::Progress;
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

/// More records than this are encoded with a progress bar.
const MANY: usize = 5000;

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
    /// In the records' order.
    pub sequences: Vec<Sequence>,
    /// Each sequence's category.
    pub categories: Vec<Option<String>>,
    /// Records whose end was cut off.
    pub cut: usize,
    /// Records that were dropped because no target was left.
    pub dropped: usize,
}

impl Encoded {
    /// In words, if anything was cut or dropped.
    pub fn remark(&self, seq_len: usize) -> Option<String> {
        let total = self.sequences.len() + self.dropped;
        let (cut, dropped) = (self.cut, self.dropped);
        (cut + dropped > 0).then(|| {
            format!("of {total} records, {cut} were cut off at {seq_len} tokens and {dropped} dropped, as nothing was left to learn")
        })
    }
}

impl Encoder<'_> {
    /// Encodes all of `records`. A record's head is the position of its label in `labels`. Fails if no record has a target left.
    pub fn encode(&self, records: &[Record], labels: &[String]) -> Result<Encoded> {
        let mut encoded = Encoded::default();
        let mut progress = (records.len() > MANY).then(|| Progress::new("records", records.len() as u64, 0));
        for (number, record) in records.iter().enumerate() {
            if let Some(progress) = progress.as_mut().filter(|_| number % 100 == 0) {
                progress.update(number as u64, "tokenizing");
            }
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
            bail!("--seq-len {} cuts off every answer; raise it", self.seq_len);
        }
        Ok(encoded)
    }

    fn ids(&self, texts: &Texts) -> Result<(Vec<u32>, Vec<u32>)> {
        let end = |wanted: bool| match (wanted, self.tokenizer.eos()) {
            (false, _) => Ok(None),
            (true, Some(eos)) => Ok(Some(eos)),
            (true, None) => bail!("the model names no EOS token to end an answer with"),
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
    fn long_records_are_cut_off() {
        let cut = sequence(&[1, 2, 3], &[4, 5], 4, None).unwrap();
        assert_eq!((cut.tokens, cut.targets), (vec![1, 2, 3, 4], vec![NO, NO, 4, NO]));
        assert_eq!(sequence(&[1, 2, 3], &[4, 5], 3, None), None);
        assert_eq!(sequence(&[1], &[], 3, None), None);
    }

    #[test]
    fn a_target_without_a_source() {
        let bare = sequence(&[], &[4, 5], 9, None).unwrap();
        assert_eq!(bare.targets, [5, NO]);
    }
}
