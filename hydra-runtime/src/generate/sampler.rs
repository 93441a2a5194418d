//! How the next token is drawn.

use crate::{Error, Result};
use hydra_kernels::random::mix;
use std::collections::BTreeMap;

/// Draws tokens: greedy at temperature 0, else from softmax(logits / temperature) cut to the nucleus of mass `top_p`
/// (Holtzman et al., arXiv 1904.09751). Seeded: the same seed draws the same text.
#[derive(Clone, Debug)]
pub struct Sampler {
    temperature: f32,
    top_p: f32,
    state: u64,
    /// `None`: logits are taken as they are.
    adjustments: Option<Adjustments>,
}

/// What changes logits before a token is drawn.
#[derive(Clone, Debug, Default)]
struct Adjustments {
    presence: f32,
    frequency: f32,
    bias: Vec<(u32, f32)>,
    /// How often each token has been drawn.
    drawn: BTreeMap<u32, u32>,
    /// The changed logits.
    logits: Vec<f32>,
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
        Ok(Self { temperature, top_p, state: seed, adjustments: None })
    }

    /// OpenAI's penalties: the logit of a token that has been drawn before loses `presence`, and `frequency` for each time.
    /// Fails unless both are finite.
    pub fn penalties(mut self, presence: f32, frequency: f32) -> Result<Self> {
        if !(presence.is_finite() && frequency.is_finite()) {
            return Err(Error::Invalid(format!("penalties {presence} and {frequency}: expected finite numbers")));
        }
        if presence != 0.0 || frequency != 0.0 || self.adjustments.is_some() {
            let adjustments = self.adjustments.get_or_insert_default();
            (adjustments.presence, adjustments.frequency) = (presence, frequency);
        }
        Ok(self)
    }

    /// OpenAI's `logit_bias`: adds to the logits of these tokens. Fails unless the numbers are finite; [`Sampler::sample`] fails
    /// if a token is outside the vocabulary.
    pub fn bias(mut self, bias: Vec<(u32, f32)>) -> Result<Self> {
        if let Some((token, added)) = bias.iter().find(|(_, added)| !added.is_finite()) {
            return Err(Error::Invalid(format!("bias {added} of token {token}: expected a finite number")));
        }
        if !bias.is_empty() || self.adjustments.is_some() {
            self.adjustments.get_or_insert_default().bias = bias;
        }
        Ok(self)
    }

    /// The next token's id, given the logits of all. One of −∞ is never drawn; fails if there is no other, or one is NaN or ∞.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let Some(mut adjustments) = self.adjustments.take() else { return self.draw(logits) };
        let drawn = adjustments.apply(logits).and_then(|logits| self.draw(logits));
        if let Ok(token) = drawn {
            *adjustments.drawn.entry(token).or_default() += 1;
        }
        self.adjustments = Some(adjustments);
        drawn
    }

    fn draw(&mut self, logits: &[f32]) -> Result<u32> {
        if let Some(&logit) = logits.iter().find(|logit| logit.is_nan() || **logit == f32::INFINITY) {
            return Err(Error::LogitNotFinite(logit));
        }
        // The first of equals, which comes last here.
        let best = logits.iter().enumerate().rev().max_by(|a, b| a.1.total_cmp(b.1));
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
        let mut likeliest = Likeliest::new(logits.iter().map(weight));
        let total: f64 = likeliest.weights.iter().map(|(_, weight)| weight).sum();
        let kept = if self.top_p < 1.0 { likeliest.nucleus(f64::from(self.top_p) * total) } else { total };
        let (mut left, mut place) = (self.uniform() * kept, 0);
        while let Some((id, weight)) = likeliest.get(place) {
            (left, place) = (left - weight, place + 1);
            if left < 0.0 {
                return Ok(id);
            }
        }
        Ok(best as u32)
    }

    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(1);
        (mix(self.state) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Tokens with their weights, the heaviest first, of equal ones the lower id. They are sorted as far as they are asked for: to
/// sort a vocabulary takes longer than to draw from it.
struct Likeliest {
    weights: Vec<(u32, f64)>,
    sorted: usize,
}

impl Likeliest {
    fn new(weights: impl Iterator<Item = f64>) -> Self {
        Self { weights: (0..).zip(weights).collect(), sorted: 0 }
    }

    fn get(&mut self, place: usize) -> Option<(u32, f64)> {
        if place >= self.sorted && self.sorted < self.weights.len() {
            let order = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
            let rest = &mut self.weights[self.sorted..];
            // Few draws go further than 64; eight times as many each time, so that even a flat distribution is sorted in few parts.
            let more = (7 * self.sorted).max(64).min(rest.len());
            rest.select_nth_unstable_by(more - 1, order);
            rest[..more].sort_unstable_by(order);
            self.sorted += more;
        }
        self.weights.get(place).copied()
    }

    /// The weight of the fewest tokens that together have at least this one.
    fn nucleus(&mut self, weight: f64) -> f64 {
        let (mut kept, mut place) = (0.0, 0);
        while let Some((_, more)) = self.get(place).filter(|_| kept < weight) {
            (kept, place) = (kept + more, place + 1);
        }
        kept
    }
}

impl Adjustments {
    fn apply(&mut self, logits: &[f32]) -> Result<&[f32]> {
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        for &(token, added) in &self.bias {
            let vocab = logits.len();
            let logit = self.logits.get_mut(token as usize).ok_or(Error::TokenOutOfRange { token, vocab })?;
            *logit += added;
        }
        for (&token, &times) in &self.drawn {
            if let Some(logit) = self.logits.get_mut(token as usize) {
                *logit -= self.presence + self.frequency * times as f32;
            }
        }
        Ok(&self.logits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_largest() {
        let mut sampler = Sampler::new(0.0, 1.0, 7).unwrap();
        assert_eq!(sampler.sample(&[0.1, 3.0, -1.0]).unwrap(), 1);
        assert_eq!(sampler.sample(&[0.1, 3.0, 3.0]).unwrap(), 1, "the first of equals");
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
    fn what_is_sorted_in_parts_is_drawn_as_if_it_were_sorted() {
        for (spread, levels) in [(12.0, 1e6), (0.5, 1e6), (4.0, 8.0)] {
            let number = |i: u64| (mix(i) >> 11) as f64 / (1u64 << 53) as f64;
            let logits: Vec<f32> = (0..3000).map(|i| ((number(i) * levels).floor() / levels * spread) as f32).collect();
            let max = logits.iter().copied().fold(f32::MIN, f32::max);
            let mut sorted: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|&l| f64::from(l - max).exp())).collect();
            let total: f64 = sorted.iter().map(|(_, weight)| weight).sum();
            let weights = sorted.clone();
            sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
            let mut likeliest = Likeliest { weights, sorted: 0 };
            assert!((0..3001).all(|place| likeliest.get(place) == sorted.get(place).copied()));
            for top_p in [1.0, 0.99, 0.5, 1e-9] {
                let mut sampler = Sampler::new(1.0, top_p, 3).unwrap();
                for draw in 1..200 {
                    let within = |mass: &mut f64, &(id, weight): &(u32, f64)| {
                        let before = *mass;
                        *mass += weight;
                        (before < f64::from(top_p) * total).then_some((id, weight, *mass))
                    };
                    let nucleus: Vec<_> = sorted.iter().scan(0.0, within).collect();
                    let target = ((mix(3 + draw) >> 11) as f64 / (1u64 << 53) as f64) * nucleus.last().unwrap().2;
                    let drawn = sampler.sample(&logits).unwrap();
                    let (_, weight, mass) = *nucleus.iter().find(|(id, ..)| *id == drawn).unwrap();
                    let error = 1e-9 * total;
                    assert!(
                        mass - weight - error <= target && target <= mass + error,
                        "draw {draw} of {spread}, {top_p}"
                    );
                }
            }
        }
    }

    #[test]
    fn penalties_and_bias_are_openais() {
        let greedy = || Sampler::new(0.0, 1.0, 7).unwrap();
        let logits = [1.0, 2.0, 1.5];
        let drawn = |mut sampler: Sampler, times: usize| -> Vec<u32> {
            (0..times).map(|_| sampler.sample(&logits).unwrap()).collect()
        };
        assert_eq!(drawn(greedy().penalties(0.0, 0.4).unwrap(), 6), [1, 1, 2, 1, 2, 0]);
        assert_eq!(drawn(greedy().penalties(1.5, 0.0).unwrap(), 5), [1, 2, 0, 1, 1], "once, however often");
        assert_eq!(drawn(greedy().penalties(-1.0, 0.0).unwrap(), 3), [1, 1, 1]);
        assert_eq!(drawn(greedy().bias(vec![(0, 100.0)]).unwrap(), 3), [0, 0, 0]);
        let both = greedy().bias(vec![(1, -100.0)]).unwrap().penalties(0.6, 0.0).unwrap();
        assert_eq!(drawn(both, 3), [2, 0, 2], "1.5, 1.0 and then 0.9 against 0.4");
        // What changes nothing leaves the sampler as it was, and its draws.
        let same = greedy().penalties(0.0, 0.0).unwrap().bias(Vec::new()).unwrap();
        assert!(same.adjustments.is_none());
        let seeded = || Sampler::new(1.0, 1.0, 3).unwrap();
        assert_eq!(drawn(seeded().bias(vec![(0, 0.0)]).unwrap(), 50), drawn(seeded(), 50));
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(greedy().penalties(bad, 0.0).is_err() && greedy().penalties(0.0, bad).is_err());
            assert!(greedy().bias(vec![(0, bad)]).is_err());
        }
        let outside = greedy().bias(vec![(3, 1.0)]).unwrap().sample(&logits);
        assert!(matches!(outside, Err(Error::TokenOutOfRange { token: 3, vocab: 3 })));
    }

    #[test]
    fn bad_settings_are_refused() {
        assert!(Sampler::new(-1.0, 1.0, 0).is_err());
        assert!(Sampler::new(f32::NAN, 1.0, 0).is_err());
        assert!(Sampler::new(1.0, 0.0, 0).is_err());
    }
}
