//! From records to token sequences.
//!
//! A sequence begins with a BOS token if the tokenizer's post-processor adds one and the template has not written it. Every
//! token of the loss mask is to be predicted from those before it. What exceeds the sequence length is cut off; a record
//! without any target left is dropped; both are counted.

use super::records::Record;
use super::template::Template;
use crate::progress::Progress;
use crate::sha256;
use anyhow::{Context, Result, bail};
use hydra_runtime::batch::{NO_TARGET, Sequence};
use hydra_runtime::chat::MaskedTokens;

/// More records than this are encoded with a progress bar.
const MANY: usize = 5000;

/// Turns records into sequences.
pub struct Encoder<'t> {
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
    /// A digest of the sequences.
    pub fn digest(&self) -> String {
        let words = |s: &Sequence| [s.tokens.as_slice(), &s.targets, s.lora_head.as_slice()].concat();
        let bytes: Vec<u8> = self.sequences.iter().flat_map(words).flat_map(u32::to_le_bytes).collect();
        let lengths: Vec<u8> = self.sequences.iter().flat_map(|s| (s.tokens.len() as u64).to_le_bytes()).collect();
        sha256::of_parts([bytes.as_slice(), &lengths])
    }

    /// In words, if anything was cut or dropped.
    pub fn remark(&self, seq_len: usize) -> Option<String> {
        let total = self.sequences.len() + self.dropped;
        let (cut, dropped) = (self.cut, self.dropped);
        (cut + dropped > 0).then(|| {
            format!(
                "of {total} records, {cut} cut off at {seq_len} tokens, {dropped} dropped as nothing was left to learn"
            )
        })
    }
}

impl Encoder<'_> {
    /// Encodes all of `records`. A record's head is the position of its label in `labels`. Fails if no record has a target left.
    pub fn encode(&self, records: &[Record], labels: &[String]) -> Result<Encoded> {
        self.template.applies(records)?;
        let mut encoded = Encoded::default();
        let mut progress = (records.len() > MANY).then(|| Progress::new("records", records.len() as u64, 0));
        for (number, record) in records.iter().enumerate() {
            if let Some(progress) = progress.as_mut().filter(|_| number % 100 == 0) {
                progress.update(number as u64, "tokenizing");
            }
            let MaskedTokens { tokens, mask } = self.template.tokens(record).with_context(|| record.place.clone())?;
            let length = tokens.len();
            let head = record.label.as_ref().and_then(|own| labels.iter().position(|label| label == own));
            let Some(sequence) = sequence(tokens, mask, self.seq_len, head.map(|head| head as u32)) else {
                encoded.dropped += 1;
                continue;
            };
            encoded.cut += usize::from(length > self.seq_len);
            encoded.sequences.push(sequence);
            encoded.categories.push(record.category.clone());
        }
        if encoded.sequences.is_empty() {
            bail!("--seq-len {} cuts off every answer; raise it", self.seq_len);
        }
        Ok(encoded)
    }
}

/// `None` if no target is left within `seq_len` tokens.
pub fn sequence(mut tokens: Vec<u32>, mut mask: Vec<bool>, seq_len: usize, head: Option<u32>) -> Option<Sequence> {
    tokens.truncate(seq_len);
    mask.truncate(seq_len);
    let sequence = Sequence { lora_head: head, ..Sequence::masked(tokens, &mask) };
    sequence.targets.iter().any(|&id| id != NO_TARGET).then_some(sequence)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO: u32 = NO_TARGET;

    /// A source that is given and a target that is learnt.
    fn exchange(source: &[u32], target: &[u32], seq_len: usize, head: Option<u32>) -> Option<Sequence> {
        let mask = source.iter().map(|_| false).chain(target.iter().map(|_| true)).collect();
        sequence([source, target].concat(), mask, seq_len, head)
    }

    #[test]
    fn targets_are_shifted() {
        let whole = exchange(&[1, 2, 3], &[4, 5], 9, Some(1)).unwrap();
        assert_eq!(
            (whole.tokens, whole.targets, whole.lora_head),
            (vec![1, 2, 3, 4, 5], vec![NO, NO, 4, 5, NO], Some(1))
        );
    }

    #[test]
    fn long_records_are_cut_off() {
        let cut = exchange(&[1, 2, 3], &[4, 5], 4, None).unwrap();
        assert_eq!((cut.tokens, cut.targets), (vec![1, 2, 3, 4], vec![NO, NO, 4, NO]));
        assert_eq!(exchange(&[1, 2, 3], &[4, 5], 3, None), None);
        assert_eq!(exchange(&[1], &[], 3, None), None);
    }

    #[test]
    fn a_target_without_a_source() {
        let bare = exchange(&[], &[4, 5], 9, None).unwrap();
        assert_eq!(bare.targets, [5, NO]);
    }
}
