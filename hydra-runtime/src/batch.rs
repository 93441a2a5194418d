//! Token sequences, and several of them packed into one row of tokens.
//!
//! A [`Packed`] batch is the concatenation of its sequences, without padding. Attention stays inside each sequence (and an
//! optional prefix that all of them continue); everything else works on the row as a whole.

use crate::{Error, Result};

/// No loss is taken at a position with this target.
pub const NO_TARGET: u32 = u32::MAX;

/// The lora head of a token whose label is unknown: its gate is uniform.
pub const NO_LORA_HEAD: u32 = u32::MAX;

/// One example: its tokens, what each position has to predict, and the lora head that its label names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sequence {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// As long as `tokens`: `targets[t]` is the token wanted after position `t`, or [`NO_TARGET`]. Already shifted.
    pub targets: Vec<u32>,
    /// For the label gate: the lora head of this example's label; `None` mixes all heads uniformly.
    pub lora_head: Option<u32>,
}

impl Sequence {
    /// A sequence that has nothing to predict: for scoring and generation.
    pub fn prompt(tokens: &[u32]) -> Self {
        Self { tokens: tokens.to_vec(), targets: vec![NO_TARGET; tokens.len()], lora_head: None }
    }

    /// A prompt and the answer that is to be predicted after it. (Without a prompt, nothing predicts the answer's first token.)
    pub fn answer(prompt: &[u32], answer: &[u32]) -> Self {
        let tokens = [prompt, answer].concat();
        let wanted = |t: usize| (t + 1 >= prompt.len()).then(|| tokens.get(t + 1)).flatten();
        let targets = (0..tokens.len()).map(|t| wanted(t).copied().unwrap_or(NO_TARGET)).collect();
        Self { tokens, targets, lora_head: None }
    }

    /// A sequence of which the tokens with a true `mask` (as long as `tokens`) are to be predicted from those before them.
    pub fn masked(tokens: Vec<u32>, mask: &[bool]) -> Self {
        assert_eq!(tokens.len(), mask.len(), "one mask value per token");
        let next = |t: usize| tokens.get(t + 1).copied().filter(|_| mask[t + 1]).unwrap_or(NO_TARGET);
        let targets = (0..tokens.len()).map(next).collect();
        Self { tokens, targets, lora_head: None }
    }
}

/// One sequence's place in the row: `start .. start + len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The first token's index.
    pub start: usize,
    /// Number of tokens, at least 1.
    pub len: usize,
}

/// Sequences laid end to end.
#[derive(Clone, Debug, Default)]
pub struct Packed {
    /// All tokens, `[tokens]`.
    pub tokens: Vec<u32>,
    /// Each token's position in its own sequence, the prefix counted, `[tokens]`.
    pub positions: Vec<u32>,
    /// Each token's lora head for the label gate, or [`NO_LORA_HEAD`], `[tokens]`.
    pub labels: Vec<u32>,
    /// The sequences' places: contiguous, in order, none empty.
    pub segments: Vec<Segment>,
    /// Row indices of the positions that have a target, ascending.
    pub target_rows: Vec<u32>,
    /// What is wanted there, as long as `target_rows`.
    pub targets: Vec<u32>,
}

impl Packed {
    /// Lays `sequences` end to end, each starting at position `prefix`.
    ///
    /// Fails if a sequence is empty, its targets are of another length, or an id is outside the vocabulary.
    pub fn new<'s>(sequences: impl IntoIterator<Item = &'s Sequence>, prefix: usize, vocab: usize) -> Result<Self> {
        let mut packed = Self::default();
        for sequence in sequences {
            packed.push(sequence, prefix, vocab)?;
        }
        Ok(packed)
    }

    /// Lays a sequence behind the others, starting at position `prefix`. Fails as [`Packed::new`] does.
    pub(crate) fn push(&mut self, sequence: &Sequence, prefix: usize, vocab: usize) -> Result<()> {
        let (start, len) = (self.tokens.len(), sequence.tokens.len());
        if len == 0 {
            return Err(Error::Invalid("a sequence without tokens".into()));
        }
        if sequence.targets.len() != len {
            return Err(Error::Invalid(format!("a sequence of {len} tokens with {} targets", sequence.targets.len())));
        }
        let outside = |&&id: &&u32| id as usize >= vocab;
        let targets = sequence.targets.iter().filter(|&&id| id != NO_TARGET);
        if let Some(id) = sequence.tokens.iter().chain(targets).find(outside) {
            return Err(Error::TokenOutOfRange { token: *id, vocab });
        }
        self.tokens.extend_from_slice(&sequence.tokens);
        self.positions.extend((prefix..prefix + len).map(|p| p as u32));
        self.labels.resize(start + len, sequence.lora_head.unwrap_or(NO_LORA_HEAD));
        self.segments.push(Segment { start, len });
        for (t, &target) in sequence.targets.iter().enumerate() {
            if target != NO_TARGET {
                self.target_rows.push((start + t) as u32);
                self.targets.push(target);
            }
        }
        Ok(())
    }

    /// Number of tokens in the row.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

/// Cuts `lengths` into consecutive groups of at most `max_tokens` each: what one pass over the model takes.
///
/// Fails if one sequence alone is longer than that.
pub fn groups(lengths: &[usize], max_tokens: usize) -> Result<Vec<core::ops::Range<usize>>> {
    let (mut out, mut first, mut sum) = (Vec::new(), 0, 0);
    for (i, &len) in lengths.iter().enumerate() {
        if len > max_tokens {
            return Err(Error::SequenceTooLong { tokens: len, limit: max_tokens });
        }
        if sum + len > max_tokens {
            out.push(first..i);
            (first, sum) = (i, 0);
        }
        sum += len;
    }
    if first < lengths.len() {
        out.push(first..lengths.len());
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_end_to_end() {
        let a = Sequence { tokens: vec![5, 6, 7], targets: vec![NO_TARGET, 7, 1], lora_head: Some(2) };
        let b = Sequence::prompt(&[3, 4]);
        let packed = Packed::new([&a, &b], 10, 8).unwrap();
        assert_eq!(packed.positions, [10, 11, 12, 10, 11]);
        assert_eq!(packed.labels, [2, 2, 2, NO_LORA_HEAD, NO_LORA_HEAD]);
        assert_eq!(packed.segments, [Segment { start: 0, len: 3 }, Segment { start: 3, len: 2 }]);
        assert_eq!((packed.target_rows, packed.targets), (vec![1, 2], vec![7, 1]));
    }

    #[test]
    fn answers_are_predicted_from_the_prompts_last_token_on() {
        const NO: u32 = NO_TARGET;
        assert_eq!(Sequence::answer(&[1, 2, 3], &[4, 5]).targets, [NO, NO, 4, 5, NO]);
        assert_eq!(Sequence::answer(&[], &[4, 5]).targets, [5, NO]);
        assert_eq!(Sequence::answer(&[1, 2], &[]), Sequence::prompt(&[1, 2]));
        assert_eq!(Sequence::masked(vec![1, 2, 3, 4], &[true, false, true, false]).targets, [NO, 3, NO, NO]);
    }

    #[test]
    fn refuses_what_does_not_fit() {
        assert!(Packed::new([&Sequence::default()], 0, 8).is_err());
        assert!(Packed::new([&Sequence::prompt(&[8])], 0, 8).is_err());
        let short = Sequence { tokens: vec![1, 2], targets: vec![NO_TARGET], lora_head: None };
        assert!(Packed::new([&short], 0, 8).is_err());
    }

    #[test]
    fn groups_fill_up_to_the_limit() {
        assert_eq!(groups(&[3, 3, 4, 1], 6).unwrap(), [0..2, 2..4]);
        assert!(groups(&[], 6).unwrap().is_empty());
        assert!(groups(&[7], 6).is_err());
    }
}
