//! How a request has its tokens drawn: OpenAI's fields and vLLM's, and the sampler that they make.

use super::error::{ApiError, Result};
use super::fields::{Fields, wrong};
use hydra_runtime::generate::{self, Sampler};
use serde_json::Value;

/// The most tokens with a bias.
const MOST_BIASES: usize = 1024;
/// OpenAI's ranges of a penalty and of a bias.
const MOST_PENALTY: f32 = 2.0;
const MOST_BIAS: f64 = 100.0;

/// How tokens are drawn.
#[derive(Debug, PartialEq)]
pub struct Sampling {
    /// What the fields say, but for the seed.
    pub settings: generate::Sampling,
    /// Where the draws start.
    pub seed: Option<u64>,
    /// Token ids, and what is added to their logits.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Sampling {
    /// From a request's fields.
    pub fn take(fields: &mut Fields) -> Result<Self> {
        let mut number = |key: &str, default: f32, range: &str, within: fn(f32) -> bool| {
            Ok::<_, ApiError>(fields.number(key, range, within)?.unwrap_or(default))
        };
        let penalty = |x: f32| (-MOST_PENALTY..=MOST_PENALTY).contains(&x);
        let settings = generate::Sampling {
            temperature: number("temperature", 1.0, "from 0 to 2", |t| (0.0..=2.0).contains(&t))?,
            top_p: number("top_p", 1.0, "above 0 and at most 1", |p| p > 0.0 && p <= 1.0)?,
            min_p: number("min_p", 0.0, "from 0 to 1", |p| (0.0..=1.0).contains(&p))?,
            repetition_penalty: number("repetition_penalty", 1.0, "above 0", |x| x > 0.0 && x.is_finite())?,
            presence_penalty: number("presence_penalty", 0.0, "from -2 to 2", penalty)?,
            frequency_penalty: number("frequency_penalty", 0.0, "from -2 to 2", penalty)?,
            top_k: fields.top_k("top_k")?.unwrap_or(0),
            seed: 0,
        };
        let seed = fields.seed("seed")?;
        let logit_bias = fields.take("logit_bias").map_or(Ok(Vec::new()), biases)?;
        Ok(Self { settings, seed, logit_bias })
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
        let settings = generate::Sampling { seed, ..self.settings };
        Ok(settings.sampler()?.bias(self.logit_bias.clone())?)
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
