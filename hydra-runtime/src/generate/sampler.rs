//! How the next token is drawn.

use super::Sampling;
use crate::{Error, Result};
use hydra_kernels::random::mix;
use std::collections::{BTreeMap, BTreeSet};

/// Draws tokens as [`Sampling`] says. Seeded: the same seed draws the same text.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    state: u64,
    bias: Vec<(u32, f32)>,
    /// The tokens of the prompt and the answer, if there is a penalty for repeating them.
    seen: BTreeSet<u32>,
    /// How often each token has been drawn, if that changes logits.
    drawn: BTreeMap<u32, u32>,
    /// The changed logits.
    logits: Vec<f32>,
}

impl Sampler {
    /// Draws from softmax(logits / temperature) cut to the nucleus of mass `top_p`; the likeliest at temperature 0. Fails unless
    /// temperature ≥ 0 and 0 < top_p ≤ 1.
    pub fn new(temperature: f32, top_p: f32, seed: u64) -> Result<Self> {
        Sampling { temperature, top_p, seed, ..Sampling::default() }.sampler()
    }

    pub(super) fn of(sampling: Sampling) -> Self {
        let (seen, drawn) = (BTreeSet::new(), BTreeMap::new());
        Self { sampling, state: sampling.seed, bias: Vec::new(), seen, drawn, logits: Vec::new() }
    }

    /// OpenAI's `logit_bias`: adds to the logits of these tokens. Fails unless the numbers are finite; [`Sampler::sample`] fails
    /// if a token is outside the vocabulary.
    pub fn bias(mut self, bias: Vec<(u32, f32)>) -> Result<Self> {
        if let Some((token, added)) = bias.iter().find(|(_, added)| !added.is_finite()) {
            return Err(Error::Invalid(format!("bias {added} of token {token}: expected a finite number")));
        }
        self.bias = bias;
        Ok(self)
    }

    /// Takes note of the tokens before the first one that is drawn, for [`Sampling::repetition_penalty`]. `Model::generate` and
    /// [`Engine`](crate::serve::Engine) do it themselves.
    pub fn read(&mut self, prompt: &[u32]) {
        if self.sampling.repetition_penalty != 1.0 {
            self.seen.extend(prompt);
        }
    }

    /// The next token's id, given the logits of all. One of −∞ is never drawn; fails if there is no other, or one is NaN or ∞.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        if self.bias.is_empty() && !self.sampling.penalizes() {
            return self.draw(logits);
        }
        let mut changed = std::mem::take(&mut self.logits);
        changed.clear();
        changed.extend_from_slice(logits);
        let drawn = self.adjust(&mut changed).and_then(|()| self.draw(&changed));
        self.logits = changed;
        if let Ok(token) = drawn {
            *self.drawn.entry(token).or_default() += 1;
            self.read(&[token]);
        }
        drawn
    }

    /// Adds the biases, then takes the penalties.
    fn adjust(&self, logits: &mut [f32]) -> Result<()> {
        let vocab = logits.len();
        for &(token, added) in &self.bias {
            *logits.get_mut(token as usize).ok_or(Error::TokenOutOfRange { token, vocab })? += added;
        }
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.sampling;
        for &token in &self.seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if *logit < 0.0 { *logit * repetition_penalty } else { *logit / repetition_penalty };
            }
        }
        for (&token, &times) in &self.drawn {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit -= presence_penalty + frequency_penalty * times as f32;
            }
        }
        Ok(())
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
        let temperature = self.sampling.temperature;
        if temperature == 0.0 {
            return Ok(best as u32);
        }
        let weight = |&logit: &f32| f64::from((logit - max) / temperature).exp();
        let mut likeliest = Likeliest::new(logits.iter().map(weight));
        let Kept { tokens, weight } = likeliest.kept(&self.sampling);
        let mut left = self.uniform() * weight;
        for place in 0..tokens {
            let Some((id, weight)) = likeliest.get(place) else { break };
            left -= weight;
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

/// The tokens that may be drawn: how many of the likeliest, and what they weigh together.
struct Kept {
    tokens: usize,
    weight: f64,
}

/// Tokens with their weights, relative to the heaviest; the heaviest first, of equal ones the lower id. They are sorted as far as
/// they are asked for: to sort a vocabulary takes longer than to draw from it.
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

    /// What `top_k`, `top_p` and `min_p` leave, one after the other.
    fn kept(&mut self, sampling: &Sampling) -> Kept {
        let Sampling { top_k, top_p, min_p, .. } = *sampling;
        let Kept { tokens, weight } = self.top(top_k);
        if top_p == 1.0 && min_p == 0.0 {
            return Kept { tokens, weight };
        }
        let nucleus = if top_p < 1.0 { f64::from(top_p) * weight } else { f64::INFINITY };
        self.while_kept(|place, next, weight| place < tokens && weight < nucleus && next >= f64::from(min_p))
    }

    /// The `top_k` heaviest, and those that weigh as much as the last of them; 0: all.
    fn top(&mut self, top_k: usize) -> Kept {
        let last = top_k.checked_sub(1).and_then(|last| self.get(last));
        match last {
            Some((_, least)) => self.while_kept(|_, next, _| next >= least),
            None => Kept { tokens: self.weights.len(), weight: self.weights.iter().map(|(_, weight)| weight).sum() },
        }
    }

    /// The heaviest, as long as `keep` says so of a token's place, its weight and the weight of those before it.
    fn while_kept(&mut self, keep: impl Fn(usize, f64, f64) -> bool) -> Kept {
        let mut kept = Kept { tokens: 0, weight: 0.0 };
        while let Some((_, next)) = self.get(kept.tokens).filter(|&(_, next)| keep(kept.tokens, next, kept.weight)) {
            kept = Kept { tokens: kept.tokens + 1, weight: kept.weight + next };
        }
        kept
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
        let penalties = |presence_penalty, frequency_penalty| {
            Sampling { presence_penalty, frequency_penalty, ..Sampling::default() }.sampler().unwrap()
        };
        assert_eq!(drawn(penalties(0.0, 0.4), 6), [1, 1, 2, 1, 2, 0]);
        assert_eq!(drawn(penalties(1.5, 0.0), 5), [1, 2, 0, 1, 1], "once, however often");
        assert_eq!(drawn(penalties(-1.0, 0.0), 3), [1, 1, 1]);
        assert_eq!(drawn(greedy().bias(vec![(0, 100.0)]).unwrap(), 3), [0, 0, 0]);
        let both = penalties(0.6, 0.0).bias(vec![(1, -100.0)]).unwrap();
        assert_eq!(drawn(both, 3), [2, 0, 2], "1.5, 1.0 and then 0.9 against 0.4");
        let seeded = || Sampler::new(1.0, 1.0, 3).unwrap();
        assert_eq!(drawn(seeded().bias(vec![(0, 0.0)]).unwrap(), 50), drawn(seeded(), 50));
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(greedy().bias(vec![(0, bad)]).is_err());
        }
        let outside = greedy().bias(vec![(3, 1.0)]).unwrap().sample(&logits);
        assert!(matches!(outside, Err(Error::TokenOutOfRange { token: 3, vocab: 3 })));
    }

    /// Positive logits are divided and negative ones multiplied, once for each token of the prompt and the answer, before the other
    /// penalties.
    #[test]
    fn the_repetition_penalty_is_that_of_transformers() {
        let drawn = |sampling: Sampling, prompt: &[u32], logits: &[f32]| -> Vec<u32> {
            let mut sampler = sampling.sampler().unwrap();
            sampler.read(prompt);
            (0..5).map(|_| sampler.sample(logits).unwrap()).collect()
        };
        let repetition = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(
            drawn(repetition, &[], &[1.0, 4.0, 3.0]),
            [1, 2, 1, 1, 1],
            "4, then 3 against 2, then 2 against 1.5"
        );
        assert_eq!(drawn(repetition, &[1, 1, 9], &[1.0, 4.0, 3.0])[..2], [2, 1], "9 is no token of these");
        assert_eq!(drawn(repetition, &[1], &[-1.5, -1.0, -3.0])[..2], [0, 1], "-1.5 against -2, -2 against -3");
        assert_eq!(drawn(Sampling { repetition_penalty: 0.5, ..repetition }, &[0], &[1.0, 1.5]), [0; 5]);
        let both = Sampling { presence_penalty: 1.0, ..repetition };
        assert_eq!(drawn(both, &[], &[1.4, 4.0])[..3], [1, 0, 1], "4/2 - 1 against 1.4, then against 1.4/2 - 1");
    }

    /// The tokens that `TopKLogitsWarper`, `TopPLogitsWarper` and `MinPLogitsWarper` of transformers 5.24 leave, in this order, of the
    /// softmax at the temperature.
    #[test]
    fn filters_leave_what_those_of_transformers_leave() {
        let logits = [0.5, 2.0, 1.0, 1.0, -1.0, 3.0, f32::NEG_INFINITY, 0.0];
        let cases: [(f32, usize, f32, f32, &[u32]); 14] = [
            (1.0, 0, 1.0, 0.0, &[0, 1, 2, 3, 4, 5, 7]),
            (1.0, 100, 1.0, 0.0, &[0, 1, 2, 3, 4, 5, 7]),
            (1.0, 1, 1.0, 0.0, &[5]),
            (1.0, 3, 1.0, 0.0, &[1, 2, 3, 5]),
            (1.0, 4, 1.0, 0.0, &[1, 2, 3, 5]),
            (1.0, 0, 0.9, 0.0, &[1, 2, 3, 5]),
            (1.0, 0, 0.9, 0.1, &[1, 2, 3, 5]),
            (1.0, 4, 0.83, 0.0, &[1, 5]),
            (1.0, 0, 1.0, 0.1, &[1, 2, 3, 5]),
            (1.0, 0, 1.0, 0.2, &[1, 5]),
            (1.0, 0, 1.0, 1.0, &[5]),
            (2.0, 0, 0.8, 0.3, &[1, 2, 3, 5]),
            (0.5, 5, 0.99, 0.01, &[1, 2, 3, 5]),
            (3.0, 2, 1.0, 0.5, &[1, 5]),
        ];
        for (temperature, top_k, top_p, min_p, wanted) in cases {
            let sampling = Sampling { temperature, top_k, top_p, min_p, seed: 1, ..Sampling::default() };
            let mut sampler = sampling.sampler().unwrap();
            let mut counts = [0usize; 8];
            (0..20_000).for_each(|_| counts[sampler.sample(&logits).unwrap() as usize] += 1);
            let weight = |id: u32| f64::from(logits[id as usize] / temperature).exp();
            let total: f64 = wanted.iter().map(|&id| weight(id)).sum();
            for (id, &count) in (0..).zip(&counts) {
                let share = if wanted.contains(&id) { weight(id) / total } else { 0.0 };
                let found = count as f64 / 20_000.0;
                assert!(
                    (found - share).abs() < if share > 0.0 { 0.015 } else { 1e-9 },
                    "{id} of {sampling:?}: {counts:?}"
                );
            }
        }
    }
}
