//! What each public operation means, in plain f64 loops: the oracle of the tests, never optimised.
//!
//! Nothing is checked beyond slice bounds; matrices are row-major.

use crate::gate::{Gate, Routing};
use crate::shape::HydraShape;

/// eˣ to 10⁻¹⁵: halved until small, a Taylor series, squared back.
pub fn exp(x: f64) -> f64 {
    if x.is_nan() {
        return x;
    }
    if x < -745.2 {
        return 0.0;
    }
    if x > 709.8 {
        return f64::INFINITY;
    }
    let n = (x / core::f64::consts::LN_2) as i32;
    let r = x - f64::from(n) * 0.693_147_180_369_123_8 - f64::from(n) * 1.908_214_929_270_587_7e-10;
    let (mut term, mut sum) = (1.0, 1.0);
    for i in 1..30 {
        term *= r / f64::from(i);
        sum += term;
    }
    let power = |n: i32| f64::from_bits(((n + 1023) as u64) << 52);
    sum * power(n / 2) * power(n - n / 2)
}

/// ln x for positive x: Newton's iteration on [`exp`].
pub fn ln(x: f64) -> f64 {
    if x <= 0.0 || !x.is_finite() {
        return if x == 0.0 {
            f64::NEG_INFINITY
        } else if x == f64::INFINITY {
            x
        } else {
            f64::NAN
        };
    }
    let mut y = f64::from((x.to_bits() >> 52) as i32 - 1023) * core::f64::consts::LN_2;
    for _ in 0..8 {
        y += x / exp(y) - 1.0;
    }
    y
}

/// `c` [m, n] += Σ_p a(i, p) · b(p, j).
pub fn gemm(
    c: &mut [f64],
    m: usize,
    k: usize,
    n: usize,
    a: impl Fn(usize, usize) -> f64,
    b: impl Fn(usize, usize) -> f64,
) {
    for i in 0..m {
        for j in 0..n {
            for p in 0..k {
                c[i * n + j] += a(i, p) * b(p, j);
            }
        }
    }
}

/// Softmax of one row in place; a row of −∞ becomes zeros.
pub fn softmax_row(x: &mut [f64]) {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        x.fill(0.0);
        return;
    }
    x.iter_mut().for_each(|x| *x = exp(*x - max));
    let sum: f64 = x.iter().sum();
    x.iter_mut().for_each(|x| *x /= sum);
}

/// `dp` becomes p ∘ (dp − Σ p ∘ dp).
pub fn softmax_backward_row(dp: &mut [f64], p: &[f64]) {
    let dot: f64 = dp.iter().zip(p).map(|(dp, p)| dp * p).sum();
    dp.iter_mut().zip(p).for_each(|(dp, p)| *dp = p * (*dp - dot));
}

/// log Σ exp x.
pub fn log_sum_exp(x: &[f64]) -> f64 {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY { max } else { max + ln(x.iter().map(|x| exp(x - max)).sum()) }
}

/// The weights of the heads for token `t`, in place of its logits.
pub fn activate_row(gate: Gate<'_>, t: usize, weights: &mut [f64]) {
    let uniform = 1.0 / weights.len() as f64;
    match gate {
        Gate::Router(Routing { temperature, top_k, .. }) => {
            let there = weights.iter().filter(|x| **x > f64::NEG_INFINITY).count();
            for _ in top_k..there {
                // The least goes, of equals the last.
                let mut least = None;
                for e in 0..weights.len() {
                    if weights[e] > f64::NEG_INFINITY && least.is_none_or(|least: usize| weights[e] <= weights[least]) {
                        least = Some(e);
                    }
                }
                least.into_iter().for_each(|least| weights[least] = f64::NEG_INFINITY);
            }
            weights.iter_mut().for_each(|x| *x /= f64::from(temperature));
            softmax_row(weights);
        }
        Gate::Label(labels) if (labels[t] as usize) < weights.len() => {
            weights.fill(0.0);
            weights[labels[t] as usize] = 1.0;
        }
        Gate::Label(_) | Gate::Uniform => weights.fill(uniform),
        Gate::One => weights.fill(1.0),
    }
}

/// The parameters of [`forward`] and [`backward`], as in [`crate::hydra`].
#[derive(Clone, Copy)]
pub struct Parameters<'a> {
    /// W [d_out, d_in].
    pub weight: &'a [f64],
    /// \[A; R\] [stacked_rows, d_in].
    pub a: &'a [f64],
    /// B [d_out, lora_heads·rank].
    pub b: &'a [f64],
    /// alpha / rank.
    pub scale: f64,
    /// The gate.
    pub gate: Gate<'a>,
    /// What dropout multiplies each element of x with, [tokens, d_in].
    pub mask: &'a [f64],
    /// What dropout multiplies each element of the mixed heads with, [tokens, lora_heads·rank].
    pub heads_mask: &'a [f64],
}

/// The load-balance term of [`Routing`] for tokens whose gates are in `adapter_state`, with the largest gates counted in `at`: where
/// the two are equal it is the term's value; its slope in `adapter_state` is what [`backward`] adds.
pub fn balance(shape: &HydraShape, adapter_state: &[f64], at: &[f64], gate: Gate<'_>) -> f64 {
    let Gate::Router(Routing { balance, .. }) = gate else { return 0.0 };
    let (tokens, lora_heads) = (shape.tokens as f64, shape.lora_heads);
    let mean =
        |e: usize| adapter_state.chunks(shape.state_width()).map(|row| row[shape.a_rows() + e]).sum::<f64>() / tokens;
    let sum: f64 = (0..lora_heads).map(|e| share(shape, at, e) * mean(e)).sum();
    f64::from(balance) * lora_heads as f64 * sum
}

/// The share of tokens whose largest gate, of equals the first, is `head`'s.
fn share(shape: &HydraShape, adapter_state: &[f64], head: usize) -> f64 {
    let wins = |row: &&[f64]| {
        let weights = &row[shape.a_rows()..];
        weights.iter().enumerate().all(|(e, &x)| x < weights[head] || (x == weights[head] && e >= head))
    };
    adapter_state.chunks(shape.state_width()).filter(wins).count() as f64 / shape.tokens as f64
}

/// `y` [tokens, d_out] and `adapter_state` [tokens, state_width] = [down | gate].
pub fn forward(shape: &HydraShape, y: &mut [f64], adapter_state: &mut [f64], x: &[f64], parameters: &Parameters<'_>) {
    let (d_in, d_out, a_rows) = (shape.d_in, shape.d_out, shape.a_rows());
    for t in 0..shape.tokens {
        let x = &x[t * d_in..][..d_in];
        let mask = &parameters.mask[t * d_in..][..d_in];
        let adapter_state = &mut adapter_state[t * shape.state_width()..][..shape.state_width()];
        adapter_state.fill(0.0);
        for (row, adapter_state) in adapter_state.iter_mut().take(shape.stacked_rows()).enumerate() {
            for c in 0..d_in {
                let masked = if row < a_rows { x[c] * mask[c] } else { x[c] };
                *adapter_state += parameters.a[row * d_in + c] * masked;
            }
        }
        activate_row(parameters.gate, t, &mut adapter_state[a_rows..]);
        for o in 0..d_out {
            let mut sum: f64 = (0..d_in).map(|c| parameters.weight[o * d_in + c] * x[c]).sum();
            for column in 0..shape.mixed() {
                sum += parameters.scale
                    * parameters.b[o * shape.mixed() + column]
                    * mixed(shape, adapter_state, column)
                    * parameters.heads_mask[t * shape.mixed() + column];
            }
            y[t * d_out + o] = sum;
        }
    }
}

/// gate_e · down, for column e·rank + j.
fn mixed(shape: &HydraShape, adapter_state: &[f64], column: usize) -> f64 {
    adapter_state[shape.a_rows() + column / shape.rank] * adapter_state[down(shape, column)]
}

/// The column of `adapter_state` that column e·rank + j of `mixed` scales.
fn down(shape: &HydraShape, column: usize) -> usize {
    if shape.per_head_a { column } else { column % shape.rank }
}

/// The gradients that [`backward`] adds to.
pub struct Gradients<'a> {
    /// [tokens, d_in].
    pub dx: &'a mut [f64],
    /// [stacked_rows, d_in].
    pub da: &'a mut [f64],
    /// [d_out, lora_heads·rank].
    pub db: &'a mut [f64],
    /// [tokens, state_width], overwritten: [ddown | dlogits].
    pub d_adapter_state: &'a mut [f64],
}

/// Adds the gradients for `dy` [tokens, d_out], given forward's `adapter_state`.
pub fn backward(
    shape: &HydraShape,
    gradients: Gradients<'_>,
    dy: &[f64],
    x: &[f64],
    adapter_state: &[f64],
    parameters: &Parameters<'_>,
) {
    let Gradients { dx, da, db, d_adapter_state } = gradients;
    let (d_in, d_out, a_rows, width) = (shape.d_in, shape.d_out, shape.a_rows(), shape.mixed());
    let all = adapter_state;
    for t in 0..shape.tokens {
        let at = t * shape.state_width()..(t + 1) * shape.state_width();
        let (adapter_state, d_adapter_state) = (&adapter_state[at.clone()], &mut d_adapter_state[at]);
        let dy = &dy[t * d_out..][..d_out];
        d_adapter_state.fill(0.0);
        for column in 0..width {
            let kept = parameters.scale * parameters.heads_mask[t * width + column];
            let mut dmixed = 0.0;
            for o in 0..d_out {
                dmixed += kept * dy[o] * parameters.b[o * width + column];
                db[o * width + column] += kept * dy[o] * mixed(shape, adapter_state, column);
            }
            let head = a_rows + column / shape.rank;
            d_adapter_state[head] += dmixed * adapter_state[down(shape, column)];
            d_adapter_state[down(shape, column)] += dmixed * adapter_state[head];
        }
        match parameters.gate {
            Gate::Router(Routing { temperature, balance, .. }) => {
                for e in 0..shape.lora_heads {
                    let push = share(shape, all, e) * shape.lora_heads as f64 / shape.tokens as f64;
                    d_adapter_state[a_rows + e] += f64::from(balance) * push;
                }
                softmax_backward_row(&mut d_adapter_state[a_rows..], &adapter_state[a_rows..]);
                d_adapter_state[a_rows..].iter_mut().for_each(|x| *x /= f64::from(temperature));
            }
            _ => d_adapter_state[a_rows..].fill(0.0),
        }
        for c in 0..d_in {
            let at = t * d_in + c;
            dx[at] += (0..d_out).map(|o| dy[o] * parameters.weight[o * d_in + c]).sum::<f64>();
            for row in 0..shape.stacked_rows() {
                let mask = if row < a_rows { parameters.mask[at] } else { 1.0 };
                dx[at] += d_adapter_state[row] * parameters.a[row * d_in + c] * mask;
                da[row * d_in + c] += d_adapter_state[row] * x[at] * mask;
            }
        }
    }
}
