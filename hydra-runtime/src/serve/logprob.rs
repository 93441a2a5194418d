//! Log-probabilities of tokens.

use super::TokenLogprob;
use crate::{Error, Result};

/// The log-probability of `token`, and those of the `top` likeliest, given the logits of all.
pub(super) fn token_logprob(logits: &[f32], token: u32, top: usize) -> Result<TokenLogprob> {
    if let Some(&logit) = logits.iter().find(|logit| logit.is_nan() || **logit == f32::INFINITY) {
        return Err(Error::LogitNotFinite(logit));
    }
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
    let logprob = |id: u32| (f64::from(logits[id as usize]) - max - sum.ln()) as f32;
    let top = likeliest(logits, top).into_iter().map(|id| (id, logprob(id))).collect();
    Ok(TokenLogprob { token, logprob: logprob(token), top })
}

/// The ids of the `count` largest logits, the largest first, of equal ones the lower id.
fn likeliest(logits: &[f32], count: usize) -> Vec<u32> {
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let count = count.min(logits.len());
    let mut ids: Vec<u32> = if count == 0 { Vec::new() } else { (0..logits.len() as u32).collect() };
    if count < ids.len() {
        ids.select_nth_unstable_by(count, order);
        ids.truncate(count);
    }
    ids.sort_unstable_by(order);
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_add_up_and_the_likeliest_come_first() {
        let logits = [0.5, 2.0, -1.0, 2.0, f32::NEG_INFINITY];
        let all = token_logprob(&logits, 2, 9).unwrap();
        let ids: Vec<u32> = all.top.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, [1, 3, 0, 2, 4]);
        let sum: f32 = all.top.iter().map(|(_, logprob)| logprob.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6 && all.logprob == all.top[3].1);
        for count in 0..5 {
            assert_eq!(token_logprob(&logits, 0, count).unwrap().top, all.top[..count]);
        }
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(matches!(token_logprob(&[0.0, bad], 0, 1), Err(Error::LogitNotFinite(_))));
        }
    }
}
