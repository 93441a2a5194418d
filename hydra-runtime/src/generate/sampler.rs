//! How the next token is drawn.

use crate::{Error, Result};
use hydra_kernels::random::mix;

/// Draws tokens: greedy at temperature 0, else from softmax(logits / temperature) cut to the nucleus of mass `top_p`
/// (Holtzman et al., arXiv 1904.09751). Seeded: the same seed draws the same text.
#[derive(Clone, Debug)]
pub struct Sampler {
    temperature: f32,
    top_p: f32,
    state: u64,
}

impl Sampler {
    /// Fails unless temperature ≥ 0 and 0 < top_p ≤ 1.
    pub fn new(temperature: f32, top_p: f32, seed: u64) -> Result<Self> {
        if !(temperature >= 0.0 && temperature.is_finite()) {
            return Err(Error::Invalid(format!("temperature {temperature}: expected a finite number from 0 on")));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::Invalid(format!("top-p {top_p}: expected a number above 0 and at most 1")));
        }
        Ok(Self { temperature, top_p, state: seed })
    }

    /// The next token's id, given the logits of all. One of −∞ is never drawn; fails if there is no other, or one is NaN or ∞.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        if let Some(&logit) = logits.iter().find(|logit| logit.is_nan() || **logit == f32::INFINITY) {
            return Err(Error::LogitNotFinite(logit));
        }
        let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        let Some((best, &max)) = best.filter(|(_, max)| max.is_finite()) else {
            return Err(Error::Invalid(format!(
                "no token can be drawn: none of the {} logits is finite",
                logits.len()
            )));
        };
        if self.temperature == 0.0 {
            return Ok(best as u32);
        }
        let weight = |&logit: &f32| f64::from((logit - max) / self.temperature).exp();
        let mut candidates: Vec<(usize, f64)> = logits.iter().map(weight).enumerate().collect();
        candidates.sort_by(|a, b| b.1.total_cmp(&a.1));
        let total: f64 = candidates.iter().map(|(_, w)| w).sum();
        let mut mass = 0.0;
        let nucleus = candidates.iter().position(|(_, w)| {
            mass += w;
            mass >= f64::from(self.top_p) * total
        });
        candidates.truncate(nucleus.map_or(candidates.len(), |last| last + 1));
        let kept: f64 = candidates.iter().map(|(_, w)| w).sum();
        let mut left = self.uniform() * kept;
        for &(id, weight) in &candidates {
            left -= weight;
            if left < 0.0 {
                return Ok(id as u32);
            }
        }
        Ok(best as u32)
    }

    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(1);
        (mix(self.state) >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_largest() {
        let mut sampler = Sampler::new(0.0, 1.0, 7).unwrap();
        assert_eq!(sampler.sample(&[0.1, 3.0, -1.0]).unwrap(), 1);
    }

    #[test]
    fn what_is_no_number_is_not_drawn() {
        const NO: f32 = f32::NEG_INFINITY;
        for temperature in [0.0, 1.0, 1e-30] {
            let mut sampler = Sampler::new(temperature, 1.0, 7).unwrap();
            assert!((0..100).all(|_| sampler.sample(&[NO, -3.0, NO]).unwrap() == 1));
            for bad in [&[] as &[f32], &[NO, NO], &[0.0, f32::NAN], &[0.0, f32::INFINITY]] {
                assert!(sampler.sample(bad).is_err(), "{bad:?} at {temperature}");
            }
        }
    }

    #[test]
    fn frequencies_follow_the_softmax_within_the_nucleus() {
        let logits = [0.0, 1.0f32, 2.0, -9.0];
        let mut sampler = Sampler::new(1.0, 1.0, 3).unwrap();
        let mut counts = [0usize; 4];
        (0..20_000).for_each(|_| counts[sampler.sample(&logits).unwrap() as usize] += 1);
        let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        for (count, logit) in counts.iter().zip(logits) {
            assert!((*count as f64 / 20_000.0 - f64::from(logit).exp() / total).abs() < 0.01);
        }
        let mut nucleus = Sampler::new(1.0, 0.6, 3).unwrap();
        assert!((0..1000).all(|_| nucleus.sample(&logits).unwrap() == 2), "0.665 of the mass is in token 2");
    }

    #[test]
    fn bad_settings_are_refused() {
        assert!(Sampler::new(-1.0, 1.0, 0).is_err());
        assert!(Sampler::new(f32::NAN, 1.0, 0).is_err());
        assert!(Sampler::new(1.0, 0.0, 0).is_err());
    }
}
