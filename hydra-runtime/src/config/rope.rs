//! Rotary position embedding: how fast each pair of a head's columns turns.
//!
//! Pair i of a head of d columns turns by `position · f_i`, with `f_i = θ^(-2i/d)`, scaled by one of the ways in which
//! models are stretched to longer contexts. Some of these multiply the queries and keys by a factor in addition.

mod yarn;

pub use yarn::Yarn;

use std::f64::consts::PI;

/// Rotary positions.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The base θ.
    pub theta: f32,
    /// What stretches the positions.
    pub scaling: RopeScaling,
}

/// How the frequencies are stretched.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by this factor.
    Linear(f32),
    /// Low frequencies divided, high ones kept, those between blended (LLaMA 3.1).
    Llama3(Llama3Scaling),
    /// Each divided by its own factor, [head_dim / 2]: the `rope_freqs` tensor of GGUF.
    Factors(Vec<f32>),
    /// High ones kept, low ones divided, a ramp between them (YaRN).
    Yarn(Yarn),
    /// Not at all within the model's context (transformers' "dynamic"). Beyond it the base would grow with the sequence: no
    /// pass goes there.
    Dynamic(f32),
    /// LongRoPE within its original context, which is the model's here: beyond it all tokens would turn in another way.
    LongRope {
        /// What each frequency is divided by, [head_dim / 2]: `short_factor`.
        factors: Vec<f32>,
        /// What queries and keys are multiplied by.
        attention_factor: f32,
    },
}

/// LLaMA 3.1's numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Llama3Scaling {
    /// What low frequencies are divided by.
    pub factor: f32,
    /// Wavelengths above `original_context / low_freq_factor` are low frequencies.
    pub low_freq_factor: f32,
    /// Wavelengths below `original_context / high_freq_factor` are high ones.
    pub high_freq_factor: f32,
    /// The context before stretching.
    pub original_context: usize,
}

impl Rope {
    /// Radians per position of each pair, [head_dim / 2].
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        let theta = f64::from(self.theta);
        let plain = (0..head_dim / 2).map(|i| theta.powf(-((2 * i) as f64) / head_dim as f64));
        let scaled = plain.enumerate().map(|(i, frequency)| match &self.scaling {
            RopeScaling::None | RopeScaling::Dynamic(_) => frequency,
            RopeScaling::Linear(factor) => frequency / f64::from(*factor),
            RopeScaling::Llama3(scaling) => scaling.apply(frequency),
            RopeScaling::Yarn(yarn) => yarn.apply(frequency, i, head_dim, theta),
            RopeScaling::Factors(factors) | RopeScaling::LongRope { factors, .. } => frequency / f64::from(factors[i]),
        });
        scaled.map(|frequency| frequency as f32).collect()
    }

    /// What cosines and sines are multiplied by, and with them queries and keys.
    pub fn attention_factor(&self) -> f32 {
        match &self.scaling {
            RopeScaling::Yarn(Yarn { attention_factor, .. }) | RopeScaling::LongRope { attention_factor, .. } => {
                *attention_factor
            }
            _ => 1.0,
        }
    }

    /// The name of a scaling that is only known up to the model's context: beyond it transformers turns all tokens in
    /// another way, as far as the sequence is long.
    pub(crate) fn within_context(&self) -> Option<&'static str> {
        match &self.scaling {
            RopeScaling::Dynamic(_) => Some("dynamic"),
            RopeScaling::LongRope { .. } => Some("longrope"),
            _ => None,
        }
    }

    /// What each plain frequency is divided by, [head_dim / 2], where that isn't one number: GGUF's `rope_freqs`.
    pub(crate) fn factors(&self, head_dim: usize) -> Option<Vec<f32>> {
        match &self.scaling {
            RopeScaling::Factors(factors) => Some(factors.clone()),
            RopeScaling::Llama3(_) => {
                let plain = Self { theta: self.theta, scaling: RopeScaling::None }.inverse_frequencies(head_dim);
                let pairs = plain.into_iter().zip(self.inverse_frequencies(head_dim));
                Some(pairs.map(|(plain, scaled)| plain / scaled).collect())
            }
            _ => None,
        }
    }

    /// The published LLaMA 3 numbers that give these factors, if some do: GGUF keeps the factors alone.
    pub(super) fn as_llama3(&self, head_dim: usize) -> Option<Llama3Scaling> {
        let RopeScaling::Factors(factors) = &self.scaling else { return None };
        let factor = factors.iter().copied().fold(1.0, f32::max);
        let scaling = Llama3Scaling { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
        let guess = Self { theta: self.theta, scaling: RopeScaling::Llama3(scaling) };
        let close = |(a, b): (f32, f32)| (a - b).abs() <= 1e-5 * a.abs();
        let (ours, theirs) = (self.inverse_frequencies(head_dim), guess.inverse_frequencies(head_dim));
        ours.into_iter().zip(theirs).all(close).then_some(scaling)
    }

    /// Whether the numbers can be computed with.
    pub(super) fn check(&self, head_dim: usize) -> Result<(), String> {
        positive("rope theta", self.theta)?;
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear(factor) | RopeScaling::Dynamic(factor) => positive("rope scaling factor", *factor),
            RopeScaling::Yarn(yarn) => yarn.check(self.theta),
            RopeScaling::Llama3(s) => {
                positive("rope scaling factor", s.factor)?;
                positive("rope low_freq_factor", s.low_freq_factor)?;
                positive("rope high_freq_factor", s.high_freq_factor)?;
                if s.high_freq_factor <= s.low_freq_factor {
                    let (high, low) = (s.high_freq_factor, s.low_freq_factor);
                    return Err(format!("rope high_freq_factor {high}, wanted more than low_freq_factor {low}"));
                }
                positive("rope original_max_position_embeddings", s.original_context as f32)
            }
            RopeScaling::Factors(factors) | RopeScaling::LongRope { factors, .. } => {
                positive("rope attention_factor", self.attention_factor())?;
                if factors.len() != head_dim / 2 {
                    return Err(format!("{} rope factors, wanted {}", factors.len(), head_dim / 2));
                }
                factors.iter().try_for_each(|&factor| positive("rope factor", factor))
            }
        }
    }
}

/// Fails unless `value` is one that can be divided by.
fn positive(what: &str, value: f32) -> Result<(), String> {
    let good = value.is_finite() && value > 0.0;
    if good { Ok(()) } else { Err(format!("{what} {value}, wanted a positive number")) }
}

impl Llama3Scaling {
    fn apply(&self, frequency: f64) -> f64 {
        let context = self.original_context as f64;
        let (low, high) = (f64::from(self.low_freq_factor), f64::from(self.high_freq_factor));
        let divided = frequency / f64::from(self.factor);
        let wavelength = 2.0 * PI / frequency;
        if wavelength > context / low {
            divided
        } else if wavelength < context / high {
            frequency
        } else {
            let smooth = (context / wavelength - low) / (high - low);
            (1.0 - smooth) * divided + smooth * frequency
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_of_llama_3_are_recognised() {
        let scaling =
            Llama3Scaling { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
        let plain = Rope { theta: 5e5, scaling: RopeScaling::None };
        let stretched = Rope { scaling: RopeScaling::Llama3(scaling), ..plain.clone() };
        let pairs = plain.inverse_frequencies(64).into_iter().zip(stretched.inverse_frequencies(64));
        let mut factors: Vec<f32> = pairs.map(|(plain, stretched)| plain / stretched).collect();
        let rope = |factors: &[f32]| Rope { theta: 5e5, scaling: RopeScaling::Factors(factors.to_vec()) };
        assert_eq!(rope(&factors).as_llama3(64), Some(scaling));
        factors[20] *= 1.1;
        assert_eq!(rope(&factors).as_llama3(64), None);
    }
}
