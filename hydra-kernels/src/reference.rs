//! What each public operation means, in plain f64 loops: the oracle of the tests. It is never optimised.
//!
//! Nothing is checked but slice bounds. Matrices are row-major.

use crate::hydra::gate::{Gate, Routing};
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
    if x < f64::MIN_POSITIVE {
        // Subnormals scaled by 2⁵⁴.
        return ln(x * 18_014_398_509_481_984.0) - 54.0 * core::f64::consts::LN_2;
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

/// The largest element; NaN if there is one.
fn max(x: &[f64]) -> f64 {
    if x.iter().any(|x| x.is_nan()) { f64::NAN } else { x.iter().copied().fold(f64::NEG_INFINITY, f64::max) }
}

/// Softmax of one row in place; a row of −∞ becomes zeros, one with a NaN or +∞ NaNs.
pub fn softmax_row(x: &mut [f64]) {
    let max = max(x);
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
    let max = max(x);
    if max == f64::NEG_INFINITY { max } else { max + ln(x.iter().map(|x| exp(x - max)).sum()) }
}

/// Replaces the logits of one token with the weights of its heads. `label` is the token's.
pub fn activate_row(gate: Gate, label: Option<u32>, weights: &mut [f64]) {
    let uniform = 1.0 / weights.len() as f64;
    match (gate, label) {
        (Gate::Router(Routing { temperature, top_k }), _) => {
            let finite = weights.iter().filter(|x| **x > f64::NEG_INFINITY).count();
            for _ in top_k..finite {
                // Drop the smallest, of equal ones the last.
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
        (Gate::Label, Some(label)) if (label as usize) < weights.len() => {
            weights.fill(0.0);
            weights[label as usize] = 1.0;
        }
        (Gate::Label | Gate::Uniform, _) => weights.fill(uniform),
        (Gate::One, _) => weights.fill(1.0),
    }
}

/// The parameters of [`forward`] and [`backward`], as in [`crate::hydra`].
#[derive(Clone, Copy)]
pub struct Parameters<'a> {
    /// W [d_out, d_in].
    pub weight: &'a [f64],
    /// \[A; R\] [stacked_rows, d_in].
    pub a: &'a [f64],
    /// B [d_out, mixed_width].
    pub b: &'a [f64],
    /// alpha / rank.
    pub scale: f64,
    /// The gate.
    pub gate: Gate,
    /// Each token's label, `[tokens]`; only the label gate reads it.
    pub labels: &'a [u32],
    /// Coefficient of the load-balancing loss; 0 without one.
    pub load_balance: f64,
    /// Factor of each element of x before A, [tokens, d_in]: 1, or what dropout makes of it.
    pub mask: &'a [f64],
    /// Factor of each element of the mixed heads, [tokens, mixed_width].
    pub mixed_mask: &'a [f64],
}

/// The load-balancing loss of [`balance_loss_grad`](crate::hydra::gate::balance_loss_grad()) for tokens whose gates are
/// in `adapter_state`, with the largest gates counted in `counted`.
///
/// Where the two are equal it is the loss; its slope in `adapter_state` is what [`backward`] adds.
pub fn balance_loss(shape: &HydraShape, adapter_state: &[f64], counted: &[f64], coefficient: f64) -> f64 {
    let tokens = (adapter_state.len() / shape.state_width()) as f64;
    let mean =
        |e: usize| adapter_state.chunks(shape.state_width()).map(|row| row[shape.a_rows() + e]).sum::<f64>() / tokens;
    let sum: f64 = (0..shape.lora_heads).map(|e| share(shape, counted, e) * mean(e)).sum();
    coefficient * shape.lora_heads as f64 * sum
}

/// The share of tokens whose largest gate, of equal ones the first, is `head`'s.
fn share(shape: &HydraShape, adapter_state: &[f64], head: usize) -> f64 {
    let wins = |row: &&[f64]| {
        let weights = &row[shape.a_rows()..];
        weights.iter().enumerate().all(|(e, &x)| x < weights[head] || (x == weights[head] && e >= head))
    };
    let rows = adapter_state.chunks(shape.state_width());
    rows.clone().filter(wins).count() as f64 / rows.len() as f64
}

/// `y` [tokens, d_out] and `adapter_state` [tokens, state_width] = \[lora_down | gate\], from `x` [tokens, d_in].
pub fn forward(shape: &HydraShape, y: &mut [f64], adapter_state: &mut [f64], x: &[f64], parameters: &Parameters<'_>) {
    let (d_in, d_out, a_rows) = (shape.d_in, shape.d_out, shape.a_rows());
    for (t, adapter_state) in adapter_state.chunks_mut(shape.state_width()).enumerate() {
        let x = &x[t * d_in..][..d_in];
        let mask = &parameters.mask[t * d_in..][..d_in];
        adapter_state.fill(0.0);
        for (row, adapter_state) in adapter_state.iter_mut().take(shape.stacked_rows()).enumerate() {
            for c in 0..d_in {
                let masked = if row < a_rows { x[c] * mask[c] } else { x[c] };
                *adapter_state += parameters.a[row * d_in + c] * masked;
            }
        }
        activate_row(parameters.gate, parameters.labels.get(t).copied(), &mut adapter_state[a_rows..]);
        for o in 0..d_out {
            let mut sum: f64 = (0..d_in).map(|c| parameters.weight[o * d_in + c] * x[c]).sum();
            for column in 0..shape.mixed_width() {
                sum += parameters.scale
                    * parameters.b[o * shape.mixed_width() + column]
                    * mixed(shape, adapter_state, column)
                    * parameters.mixed_mask[t * shape.mixed_width() + column];
            }
            y[t * d_out + o] = sum;
        }
    }
}

/// gate_e · lora_down, for column e·rank + j.
fn mixed(shape: &HydraShape, adapter_state: &[f64], column: usize) -> f64 {
    adapter_state[shape.a_rows() + column / shape.rank] * adapter_state[lora_down_column(shape, column)]
}

/// The column of `adapter_state` that column e·rank + j of `mixed` scales.
fn lora_down_column(shape: &HydraShape, column: usize) -> usize {
    if shape.per_head_a { column } else { column % shape.rank }
}

/// The gradients that [`backward`] computes.
pub struct Gradients<'a> {
    /// [tokens, d_in], added to.
    pub dx: &'a mut [f64],
    /// [stacked_rows, d_in], added to.
    pub da: &'a mut [f64],
    /// [d_out, mixed_width], added to.
    pub db: &'a mut [f64],
    /// [tokens, state_width], overwritten: \[d_lora_down | dlogits\].
    pub d_adapter_state: &'a mut [f64],
}

/// Adds the gradients for `dy` [tokens, d_out], given forward's `x` [tokens, d_in] and `adapter_state` [tokens,
/// state_width].
pub fn backward(
    shape: &HydraShape,
    gradients: Gradients<'_>,
    dy: &[f64],
    x: &[f64],
    adapter_state: &[f64],
    parameters: &Parameters<'_>,
) {
    let Gradients { dx, da, db, d_adapter_state } = gradients;
    let (d_in, d_out, a_rows, width) = (shape.d_in, shape.d_out, shape.a_rows(), shape.mixed_width());
    let all = adapter_state;
    let tokens = all.len() / shape.state_width();
    for t in 0..tokens {
        let at = t * shape.state_width()..(t + 1) * shape.state_width();
        let (adapter_state, d_adapter_state) = (&adapter_state[at.clone()], &mut d_adapter_state[at]);
        let dy = &dy[t * d_out..][..d_out];
        d_adapter_state.fill(0.0);
        for column in 0..width {
            let kept = parameters.scale * parameters.mixed_mask[t * width + column];
            let mut dmixed = 0.0;
            for o in 0..d_out {
                dmixed += kept * dy[o] * parameters.b[o * width + column];
                db[o * width + column] += kept * dy[o] * mixed(shape, adapter_state, column);
            }
            let head = a_rows + column / shape.rank;
            d_adapter_state[head] += dmixed * adapter_state[lora_down_column(shape, column)];
            d_adapter_state[lora_down_column(shape, column)] += dmixed * adapter_state[head];
        }
        match parameters.gate {
            Gate::Router(Routing { temperature, .. }) => {
                for e in 0..shape.lora_heads {
                    let share = share(shape, all, e) * shape.lora_heads as f64 / tokens as f64;
                    d_adapter_state[a_rows + e] += parameters.load_balance * share;
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
