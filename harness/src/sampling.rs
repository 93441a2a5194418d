//! How `generate` and `chat` draw tokens.

use crate::options::Seed;
use anyhow::Result;
use clap::Args;
use hydra_runtime::generate::Sampling;

/// Options of sampling.
#[derive(Args, Clone, Copy)]
pub struct SamplingArgs {
    /// Sampling temperature (0 = greedy) [default: 0 for generate, 0.7 for chat]
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Top-k sampling: draw from the K likeliest tokens (0 = all)
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Top-p (nucleus) sampling: draw from the likeliest tokens that together have probability P
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Min-p sampling: draw from tokens at least P times as likely as the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f32,
    /// Divide the logits of tokens that occurred by this, multiply negative ones (1 = no penalty)
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Subtract this from the logit of each token in the answer (OpenAI's)
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    presence_penalty: f32,
    /// Subtract this for each time that the answer has the token (OpenAI's)
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// Random seed of sampling
    #[arg(long, value_name = "SEED", default_value_t = Seed::new(0))]
    seed: Seed,
}

impl SamplingArgs {
    /// What the options say, with this temperature unless they have one. Fails if one is out of range.
    pub fn or_temperature(self, temperature: f32) -> Result<Sampling> {
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(temperature),
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: self.seed.get(),
        };
        sampling.sampler()?;
        Ok(sampling)
    }
}
