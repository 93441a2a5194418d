//! How a request has its tokens drawn: OpenAI's fields, and the sampler that they make.

use super::error::{ApiError, Result};
use super::fields::{Fields, wrong};
use hydra_runtime::generate::Sampler;
use serde_json::Value;

/// The most tokens with a bias.
const MOST_BIASES: usize = 1024;
/// OpenAI's ranges of a penalty and of a bias.
const MOST_PENALTY: f64 = 2.0;
const MOST_BIAS: f64 = 100.0;

/// How tokens are drawn.
#[derive(Debug, PartialEq)]
pub struct Sampling {
    /// From 0 (greedy) to 2.
    pub temperature: f32,
    /// Above 0, up to 1.
    pub top_p: f32,
    /// Where the draws start.
    pub seed: Option<u64>,
    /// Taken from the logit of each token that the answer has.
    pub presence_penalty: f32,
    /// The same, for each time.
    pub frequency_penalty: f32,
    /// Token ids, and what is added to their logits.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Sampling {
    /// From a request's fields.
    pub fn take(fields: &mut Fields) -> Result<Self> {
        let temperature = fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0) as f32;
        let top_p = fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0) as f32;
        if top_p == 0.0 {
            return Err(ApiError::field("top_p", "expected a number above 0 and at most 1, found 0"));
        }
        let seed = fields.seed("seed")?;
        let mut penalty =
            |key: &str| -> Result<f32> { Ok(fields.number(key, -MOST_PENALTY..=MOST_PENALTY)?.unwrap_or(0.0) as f32) };
        let (presence_penalty, frequency_penalty) = (penalty("presence_penalty")?, penalty("frequency_penalty")?);
        let logit_bias = fields.take("logit_bias").map_or(Ok(Vec::new()), biases)?;
        Ok(Self { temperature, top_p, seed, presence_penalty, frequency_penalty, logit_bias })
    }

    /// Fails if a token with a bias is none of the vocabulary's.
    pub fn check(&self, vocab: usize) -> Result<()> {
        match self.logit_bias.iter().find(|(token, _)| *token as usize >= vocab) {
            Some((token, _)) => {
                Err(ApiError::field("logit_bias", format!("expected token ids below {vocab}, found {token}")))
            }
            None => Ok(()),
        }
    }

    /// Draws as the request wants it, from `seed`.
    pub fn sampler(&self, seed: u64) -> Result<Sampler> {
        let sampler = Sampler::new(self.temperature, self.top_p, seed)?;
        Ok(sampler.penalties(self.presence_penalty, self.frequency_penalty)?.bias(self.logit_bias.clone())?)
    }
}

/// `{"50256": -100}`
fn biases(value: Value) -> Result<Vec<(u32, f32)>> {
    let one = |(token, bias): (&String, &Value)| {
        let bias = bias.as_f64().filter(|bias| (-MOST_BIAS..=MOST_BIAS).contains(bias))?;
        Some((token.parse::<u32>().ok()?, bias as f32))
    };
    let expected = || format!("an object of at most {MOST_BIASES} token ids, each with a number from -100 to 100");
    let map = value.as_object().filter(|map| map.len() <= MOST_BIASES);
    let read = map.and_then(|map| map.iter().map(one).collect());
    read.ok_or_else(|| wrong("logit_bias", &expected(), &value))
}
