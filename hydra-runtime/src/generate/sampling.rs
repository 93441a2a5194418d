//! What a token is drawn by.

use super::Sampler;
use crate::{Error, Result};

/// How tokens are drawn; by default each is the likeliest.
///
/// Penalties change the logits, then the temperature divides them, and then `top_k`, `top_p` and `min_p` leave tokens out, each
/// of those that the one before has left. That is the order of Hugging Face's transformers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Draws from softmax(logits / temperature); 0 takes the likeliest token each time.
    pub temperature: f32,
    /// Draws from this many of the likeliest tokens, and from others that are as likely as the last of them; 0: from all.
    pub top_k: usize,
    /// Draws from the likeliest tokens that together have this probability, above 0 and at most 1 (Holtzman et al., arXiv
    /// 1904.09751).
    pub top_p: f32,
    /// Draws from tokens that have at least this share of the likeliest one's probability, from 0 to 1 (Nguyen et al., arXiv
    /// 2407.01082).
    pub min_p: f32,
    /// Divides the logits of the tokens in the prompt and the answer if they are positive and multiplies them if they are
    /// negative (Keskar et al., arXiv 1909.05858, as in transformers); above 0, and 1 changes nothing.
    pub repetition_penalty: f32,
    /// OpenAI's: taken from the logit of each token that the answer has.
    pub presence_penalty: f32,
    /// OpenAI's: the same, for each time that the answer has it.
    pub frequency_penalty: f32,
    /// The same seed draws the same text.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// A sampler that draws like this. Fails if a number is out of its range.
    pub fn sampler(self) -> Result<Sampler> {
        let Self { temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, .. } = self;
        let finite = f32::is_finite;
        for (good, name, value, wanted) in [
            (finite(temperature) && temperature >= 0.0, "temperature", temperature, "a finite number from 0 on"),
            (top_p > 0.0 && top_p <= 1.0, "top-p", top_p, "a number above 0 and at most 1"),
            ((0.0..=1.0).contains(&min_p), "min-p", min_p, "a number from 0 to 1"),
            (
                finite(repetition_penalty) && repetition_penalty > 0.0,
                "repetition penalty",
                repetition_penalty,
                "a finite number above 0",
            ),
            (finite(presence_penalty), "presence penalty", presence_penalty, "a finite number"),
            (finite(frequency_penalty), "frequency penalty", frequency_penalty, "a finite number"),
        ] {
            if !good {
                return Err(Error::Invalid(format!("{name} {value}: expected {wanted}")));
            }
        }
        Ok(Sampler::of(self))
    }

    /// Whether the logits are changed before the temperature divides them.
    pub(super) fn penalizes(&self) -> bool {
        (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_settings_are_named() {
        let good = Sampling { temperature: 1.0, ..Sampling::default() };
        for (bad, wanted) in [
            (Sampling { temperature: -1.0, ..good }, "temperature -1: expected"),
            (Sampling { temperature: f32::NAN, ..good }, "temperature NaN: expected"),
            (Sampling { top_p: 0.0, ..good }, "top-p 0: expected"),
            (Sampling { top_p: 1.5, ..good }, "top-p 1.5: expected"),
            (Sampling { min_p: -0.1, ..good }, "min-p -0.1: expected"),
            (Sampling { min_p: f32::NAN, ..good }, "min-p NaN: expected"),
            (Sampling { repetition_penalty: 0.0, ..good }, "repetition penalty 0: expected"),
            (Sampling { repetition_penalty: f32::INFINITY, ..good }, "repetition penalty inf: expected"),
            (Sampling { presence_penalty: f32::NAN, ..good }, "presence penalty NaN: expected"),
            (Sampling { frequency_penalty: f32::INFINITY, ..good }, "frequency penalty inf: expected"),
        ] {
            let said = bad.sampler().unwrap_err().to_string();
            assert!(said.contains(wanted), "{said}");
        }
        assert!(Sampling { top_k: usize::MAX, min_p: 1.0, ..good }.sampler().is_ok());
    }
}
