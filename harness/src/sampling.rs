//! How `generate` and `chat` draw tokens.

use crate::options::Seed;
use anyhow::Result;
use clap::Args;
use hydra_runtime::generate::Sampler;

/// Options of sampling.
#[derive(Args, Clone, Copy)]
pub struct SamplingArgs {
    /// Sampling temperature (0 = greedy) [default: 0 for generate, 0.7 for chat]
    #[arg(long, value_name = "T", help_heading = "Sampling")]
    temperature: Option<f32>,
    /// Top-p (nucleus) sampling: draw from the likeliest tokens that together have probability P
    #[arg(long, value_name = "P", default_value_t = 1.0, help_heading = "Sampling")]
    top_p: f32,
    /// Random seed of sampling
    #[arg(long, value_name = "SEED", default_value_t = Seed::new(0), help_heading = "Sampling")]
    seed: Seed,
}

/// How tokens are drawn.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// Draws from the likeliest tokens that together have this probability.
    pub top_p: f32,
    /// Where the draws start.
    pub seed: u64,
}

impl SamplingArgs {
    /// What the options say, with this temperature unless they have one. Fails if one is out of range.
    pub fn or_temperature(self, temperature: f32) -> Result<Sampling> {
        let temperature = self.temperature.unwrap_or(temperature);
        let sampling = Sampling { temperature, top_p: self.top_p, seed: self.seed.get() };
        sampling.sampler()?;
        Ok(sampling)
    }
}

impl Sampling {
    /// Draws so. Fails if a value is out of range.
    pub fn sampler(self) -> Result<Sampler> {
        Ok(Sampler::new(self.temperature, self.top_p, self.seed)?)
    }
}
