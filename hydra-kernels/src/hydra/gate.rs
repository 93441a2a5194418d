//! The gate weighs the heads of each token, between the adapter's two products.
//!
//! A token's state is one row `adapter_state` = \[lora_down | gate\] of `a_rows + lora_heads` floats, where lora_down
//! is A x; its gradient is one row \[d_lora_down | dlogits\]. With a router, the gate's columns first hold its logits R
//! x. For rank r:
//!
//! ```text
//! gate  = softmax(logits)                             dgate_e        = Σ_j dmixed[e·r+j] · lora_down[j]
//! mixed[e·r+j] = gate_e · lora_down[j]                d_lora_down[j] = Σ_e gate_e · dmixed[e·r+j]
//!                                                     dlogits        = gate ∘ (dgate − Σ gate ∘ dgate)
//! ```
//!
//! With one A per head, `lora_down[j]` is `lora_down[e·r+j]`. [`Routing`] has the variants of the softmax, and
//! [`balance_loss_grad`] the load-balancing loss. Every instruction set gives the same bits.

use crate::error::{Error, exact, product};
use crate::isa::Isa;
use crate::shape::HydraShape;
use crate::simd::reduce::max;
use crate::softmax::{softmax_backward_row, softmax_row};

/// How a router's logits become weights. The default is HydraLoRA's plain softmax.
///
/// ```text
/// gate = softmax of logits / temperature over the top_k largest logits (of equal ones the first), 0 elsewhere
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routing {
    /// Above 0; with 1 the logits stay as they are.
    pub temperature: f32,
    /// At least 1; the number of heads or more selects all of them.
    pub top_k: usize,
}

impl Default for Routing {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: usize::MAX }
    }
}

/// Where the weights of the heads come from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gate {
    /// Softmax of the router's logits: HydraLoRA.
    Router(Routing),
    /// One-hot: each token names its head, its label. A label that is no head (`u32::MAX`, say) means uniform weights.
    Label,
    /// 1/N for each of N heads.
    Uniform,
    /// 1 for each head: LoRA, or a sum of LoRAs.
    One,
}

impl Gate {
    /// An error unless the gate's settings are valid and fit the shape.
    pub fn validate(&self, shape: &HydraShape) -> Result<(), Error> {
        let Gate::Router(Routing { temperature, top_k }) = *self else { return Ok(()) };
        if !shape.router {
            return Err(Error::Shape("the router gate needs a shape with a router"));
        }
        // A normal number, so that its inverse is finite.
        if !(temperature > 0.0 && temperature.is_normal()) {
            return Err(Error::Shape("a router's temperature is a number above 0"));
        }
        if top_k == 0 {
            return Err(Error::Shape("a router uses at least one head"));
        }
        Ok(())
    }
}

/// Turns the gate's columns of `adapter_state` [tokens, state_width] into weights: in place of the logits that are
/// there (router), or whatever was there (other gates).
///
/// `labels` `[tokens]` is each token's head; only the label gate reads it. Writes nothing if it returns an error.
pub fn activate(
    isa: Isa,
    shape: &HydraShape,
    adapter_state: &mut [f32],
    gate: Gate,
    labels: &[u32],
) -> Result<(), Error> {
    let tokens = rows(shape, adapter_state.len())?;
    gate.validate(shape)?;
    if gate == Gate::Label {
        exact("labels", tokens, labels.len())?;
    }
    let uniform = 1.0 / shape.lora_heads as f32;
    let a_rows = shape.a_rows();
    isa.vectorize(
        #[inline(always)]
        || {
            for (t, row) in adapter_state.chunks_exact_mut(shape.state_width()).enumerate() {
                let weights = &mut row[a_rows..];
                match gate {
                    Gate::Router(Routing { temperature, top_k }) => {
                        keep_largest(weights, top_k);
                        let (largest, inverse) = (max(weights), 1.0 / temperature);
                        // As differences, logits don't overflow; a row of −∞ has none.
                        if largest > f32::NEG_INFINITY {
                            weights.iter_mut().for_each(|logit| *logit = (*logit - largest) * inverse);
                        }
                        softmax_row(weights);
                    }
                    Gate::Label => match weights.get(labels[t] as usize) {
                        Some(_) => {
                            weights.fill(0.0);
                            weights[labels[t] as usize] = 1.0;
                        }
                        None => weights.fill(uniform),
                    },
                    Gate::Uniform => weights.fill(uniform),
                    Gate::One => weights.fill(1.0),
                }
            }
        },
    );
    Ok(())
}

/// All but the `k` largest become −∞; of equal logits the first are kept. A NaN never becomes −∞: softmax then makes
/// its row NaN.
#[inline(always)]
fn keep_largest(logits: &mut [f32], k: usize) {
    if k >= logits.len() {
        return;
    }
    let before = |a: (f32, usize), b: (f32, usize)| a.0 > b.0 || (a.0 == b.0 && a.1 < b.1);
    let mut last = (f32::INFINITY, 0);
    for taken in 0..k {
        let mut next = None;
        for (e, &logit) in logits.iter().enumerate() {
            let here = (logit, e);
            let left = taken == 0 || before(last, here);
            if left && !logit.is_nan() && next.is_none_or(|next| before(here, next)) {
                next = Some(here);
            }
        }
        let Some(next) = next else { return };
        last = next;
    }
    for (e, logit) in logits.iter_mut().enumerate() {
        if before(last, (*logit, e)) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// `mixed` [tokens, mixed_width] = gate_e · lora_down, from the activated `adapter_state` [tokens, state_width].
pub fn mix(isa: Isa, shape: &HydraShape, mixed: &mut [f32], adapter_state: &[f32]) -> Result<(), Error> {
    let tokens = rows(shape, adapter_state.len())?;
    exact("mixed", product(tokens, shape.mixed_width())?, mixed.len())?;
    let (rank, a_rows) = (shape.rank, shape.a_rows());
    isa.vectorize(
        #[inline(always)]
        || {
            let rows = mixed.chunks_exact_mut(shape.mixed_width()).zip(adapter_state.chunks_exact(shape.state_width()));
            for (mixed, adapter_state) in rows {
                let (lora_down, gate) = adapter_state.split_at(a_rows);
                for (e, (mixed, &gate)) in mixed.chunks_exact_mut(rank).zip(gate).enumerate() {
                    let lora_down = if shape.per_head_a { &lora_down[e * rank..][..rank] } else { lora_down };
                    for (mixed, lora_down) in mixed.iter_mut().zip(lora_down) {
                        *mixed = gate * lora_down;
                    }
                }
            }
        },
    );
    Ok(())
}

/// `d_adapter_state` [tokens, state_width] = \[d_lora_down | dlogits\], from `dmixed` [tokens, mixed_width] and the
/// activated `adapter_state` [tokens, state_width]. dlogits are zeros unless the gate is the router.
///
/// `balance_loss_grad` is what [`balance_loss_grad`](fn@balance_loss_grad) computed from all tokens of the pass, these
/// being some of them, or empty without a load-balancing loss; only the router reads it.
pub fn mix_backward(
    isa: Isa,
    shape: &HydraShape,
    d_adapter_state: &mut [f32],
    dmixed: &[f32],
    adapter_state: &[f32],
    gate: Gate,
    balance_loss_grad: &[f32],
) -> Result<(), Error> {
    let tokens = rows(shape, adapter_state.len())?;
    gate.validate(shape)?;
    exact("d_adapter_state", adapter_state.len(), d_adapter_state.len())?;
    exact("dmixed", product(tokens, shape.mixed_width())?, dmixed.len())?;
    if !balance_loss_grad.is_empty() {
        exact("balance_loss_grad", shape.lora_heads, balance_loss_grad.len())?;
    }
    let (rank, a_rows) = (shape.rank, shape.a_rows());
    isa.vectorize(
        #[inline(always)]
        || {
            let rows = d_adapter_state
                .chunks_exact_mut(shape.state_width())
                .zip(dmixed.chunks_exact(shape.mixed_width()))
                .zip(adapter_state.chunks_exact(shape.state_width()));
            for ((d_adapter_state, dmixed), adapter_state) in rows {
                let (d_lora_down, dgate) = d_adapter_state.split_at_mut(a_rows);
                let (lora_down, weights) = adapter_state.split_at(a_rows);
                d_lora_down.fill(0.0);
                for (e, dmixed) in dmixed.chunks_exact(rank).enumerate() {
                    let at = if shape.per_head_a { e * rank } else { 0 };
                    let mut dot = 0.0;
                    for j in 0..rank {
                        dot += dmixed[j] * lora_down[at + j];
                        d_lora_down[at + j] += weights[e] * dmixed[j];
                    }
                    dgate[e] = dot;
                }
                match gate {
                    Gate::Router(Routing { temperature, .. }) => {
                        dgate.iter_mut().zip(balance_loss_grad).for_each(|(dgate, added)| *dgate += added);
                        softmax_backward_row(dgate, weights);
                        let inverse = 1.0 / temperature;
                        dgate.iter_mut().for_each(|dlogit| *dlogit *= inverse);
                    }
                    _ => dgate.fill(0.0),
                }
            }
        },
    );
    Ok(())
}

/// The gradient of the load-balancing loss (Switch Transformer, arXiv 2101.03961, eq. 4) in a token's gate, the same
/// for every token: `grad` \[lora_heads\] = `coefficient` · N · f_e / tokens.
///
/// ```text
/// loss = coefficient · N · Σ_e f_e · P_e     f_e: share of the tokens whose largest gate is e, of equal ones the first
///                                            P_e: mean of gate_e over the tokens
/// ```
/// The gradient is taken in P, not in f. `adapter_state` [tokens, state_width] holds the activated gates of all tokens
/// of the pass. (f is exact up to 2²⁴ tokens.)
pub fn balance_loss_grad(
    shape: &HydraShape,
    grad: &mut [f32],
    adapter_state: &[f32],
    coefficient: f32,
) -> Result<(), Error> {
    let tokens = rows(shape, adapter_state.len())?;
    exact("balance_loss_grad", shape.lora_heads, grad.len())?;
    if !coefficient.is_finite() {
        return Err(Error::Shape("the coefficient of the load-balancing loss is a number"));
    }
    grad.fill(0.0);
    for row in adapter_state.chunks_exact(shape.state_width()) {
        let weights = &row[shape.a_rows()..];
        let mut largest = 0;
        for (e, weight) in weights.iter().enumerate() {
            if *weight > weights[largest] {
                largest = e;
            }
        }
        grad[largest] += 1.0;
    }
    let tokens = tokens.max(1) as f32;
    let scale = coefficient * shape.lora_heads as f32 / tokens;
    grad.iter_mut().for_each(|count| *count = scale * (*count / tokens));
    Ok(())
}

/// The number of tokens whose states are `len` floats.
fn rows(shape: &HydraShape, len: usize) -> Result<usize, Error> {
    shape.validate(0)?;
    let width = shape.state_width();
    if len.is_multiple_of(width) {
        Ok(len / width)
    } else {
        Err(Error::Block { operand: "adapter_state", block: width, got: len })
    }
}
