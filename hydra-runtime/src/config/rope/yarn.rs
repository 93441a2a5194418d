//! YaRN (arXiv 2309.00071): pairs of columns that turn often within the original context keep their frequency, those that
//! turn seldom are divided by the factor, and those between are blended along a ramp over the pairs.

use super::positive;
use std::f64::consts::PI;

/// YaRN's numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// What low frequencies are divided by.
    pub factor: f32,
    /// The context before stretching.
    pub original_context: usize,
    /// The ramp begins at the pair that turns this often within the original context; the pairs before it are kept.
    pub beta_fast: f32,
    /// The ramp ends at the pair that turns this often; those behind it are divided.
    pub beta_slow: f32,
    /// Whether the ramp begins and ends at whole pairs.
    pub truncate: bool,
    /// What cosines and sines are multiplied by, which sharpens attention by its square.
    pub attention_factor: f32,
}

impl Yarn {
    /// `beta_fast` and `beta_slow` where nothing else is said.
    pub(crate) const BETAS: [f32; 2] = [32.0, 1.0];

    /// The paper's attention factor for a context that is stretched by `factor`; `mscale` weighs its logarithm.
    pub(crate) fn mscale(factor: f64, mscale: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
    }

    /// The frequency of pair `i`, given the plain one.
    pub(super) fn apply(&self, frequency: f64, i: usize, head_dim: usize, theta: f64) -> f64 {
        let [low, high] = self.ramp(head_dim as f64, theta);
        let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        divided * frequency / f64::from(self.factor) + (1.0 - divided) * frequency
    }

    /// The pairs at which the ramp begins and ends.
    fn ramp(&self, head_dim: f64, theta: f64) -> [f64; 2] {
        let context = self.original_context as f64;
        let pair = |turns: f32| head_dim * (context / (f64::from(turns) * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let [low, high] = [pair(self.beta_fast), pair(self.beta_slow)];
        let [low, high] = if self.truncate { [low.floor(), high.ceil()] } else { [low, high] };
        let [low, high] = [low.max(0.0), high.min(head_dim - 1.0)];
        // transformers' way around a ramp without a length.
        [low, if low == high { high + 0.001 } else { high }]
    }

    pub(super) fn check(&self, theta: f32) -> Result<(), String> {
        positive("rope scaling factor", self.factor)?;
        positive("rope beta_fast", self.beta_fast)?;
        positive("rope beta_slow", self.beta_slow)?;
        positive("rope attention_factor", self.attention_factor)?;
        positive("rope original_max_position_embeddings", self.original_context as f32)?;
        // The ramp's ends are logarithms to this base.
        if theta > 1.0 { Ok(()) } else { Err(format!("rope theta {theta}, wanted more than 1 for YaRN")) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Rope, RopeScaling};
    use super::*;

    /// As `ROPE_INIT_FUNCTIONS["yarn"]` of transformers 5.24 computes them.
    #[test]
    fn frequencies_are_those_of_transformers() {
        let (factor, attention_factor) = (4.0, 1.0);
        let usual =
            Yarn { factor, original_context: 64, beta_fast: 32.0, beta_slow: 1.0, truncate: true, attention_factor };
        let other = Yarn { original_context: 256, beta_fast: 8.0, beta_slow: 2.0, truncate: false, ..usual };
        let cases: [(f32, Yarn, [f32; 8]); 2] = [
            (1e4, usual, [1.0, 0.237_170_82, 0.05, 0.007_905_695, 0.0025, 7.905_694_7e-4, 2.5e-4, 7.905_695e-5]),
            (
                5e5,
                other,
                [
                    1.0,
                    0.192_617_98,
                    0.009_401_508,
                    0.001_823_166_3,
                    3.535_533_6e-4,
                    6.856_205e-5,
                    1.329_573_9e-5,
                    2.578_346_3e-6,
                ],
            ),
        ];
        for (theta, yarn, wanted) in cases {
            let got = Rope { theta, scaling: RopeScaling::Yarn(yarn) }.inverse_frequencies(16);
            let apart = got.iter().zip(&wanted).map(|(got, wanted)| (got - wanted).abs() / wanted);
            assert!(apart.fold(0.0, f32::max) < 1e-6, "{got:?}");
        }
    }
}
