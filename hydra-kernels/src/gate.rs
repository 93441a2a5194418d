//! Which head answers for a token, and how much: between the adapter's two products.
//!
//! The state of a token is one row `adapter_state` = [down | gate] of `a_rows + heads` floats, its gradient one row
//! [ddown | dlogits]. With a router the gate's columns first hold its logits. N heads, rank r:
//!
//! ```text
//! gate  = softmax(logits)                        dgate_e   = Σ_j dmixed[e·r+j] · down[j]
//! mixed[e·r+j] = gate_e · down[j]                ddown[j]  = Σ_e gate_e · dmixed[e·r+j]
//!                                                dlogits   = gate ∘ (dgate − Σ gate ∘ dgate)
//! ```
//!
//! With one A per head, `down[j]` is `down[e·r+j]`. A router may be sharper or duller, use its best heads alone, and be trained
//! to use all of them: [`Routing`].

use crate::error::{Error, exact, product};
use crate::isa::Isa;
use crate::shape::HydraShape;
use crate::softmax::{softmax_backward_row, softmax_row};

/// How a router's logits become weights, and what its training adds. The default is HydraLoRA's.
///
/// ```text
/// gate  = softmax over the top_k largest of logits / temperature, of equals those of lower index; 0 elsewhere
/// added = balance · N · Σ_e f_e · P_e       f_e: share of the call's tokens whose largest gate is e, of equals the lower;
///                                           P_e: mean of gate_e over them (Fedus et al., arXiv 2101.03961, eq. 4)
/// ```
/// `added` is a term of the loss of which only the gradient is ever taken, in P and not in f: it gives every token the same
/// ∂/∂gate_e = balance · N · f_e / tokens, the [`push`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routing {
    /// Above 0; 1 leaves the logits as they are.
    pub temperature: f32,
    /// At least 1; as many as there are heads, or more, is all.
    pub top_k: usize,
    /// The weight of the load-balance term; 0 for none. Forward passes don't read it.
    pub balance: f32,
}

impl Default for Routing {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: usize::MAX, balance: 0.0 }
    }
}

/// Where the weights of the heads come from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gate<'a> {
    /// Softmax of the router's logits: HydraLoRA.
    Router(Routing),
    /// One-hot: the head of each token, `[tokens]`. A label that isn't a head (`u32::MAX`, say) means uniform.
    Label(&'a [u32]),
    /// 1/N each.
    Uniform,
    /// 1 each: LoRA, or a sum of LoRAs.
    One,
}

impl Gate<'_> {
    /// Values of the [`push`] that the gradient of this gate takes: a head each, or none without a load-balance term.
    pub fn pushes(&self, shape: &HydraShape) -> usize {
        match self {
            Gate::Router(Routing { balance, .. }) if *balance != 0.0 => shape.lora_heads,
            _ => 0,
        }
    }

    /// An error unless the gate means something for this shape.
    pub(crate) fn validate(&self, shape: &HydraShape) -> Result<(), Error> {
        match *self {
            Gate::Label(labels) => exact("labels", shape.tokens, labels.len()),
            Gate::Router(_) if !shape.router => Err(Error::Shape("the router gate needs a shape with a router")),
            Gate::Router(Routing { temperature, top_k, balance }) => {
                // Normal, so that its inverse is a number.
                if !(temperature > 0.0 && temperature.is_normal()) {
                    return Err(Error::Shape("a router's temperature is a number above 0"));
                }
                if top_k == 0 || !balance.is_finite() {
                    return Err(Error::Shape(
                        "a router uses at least one head, and its load-balance weight is a number",
                    ));
                }
                Ok(())
            }
            Gate::Uniform | Gate::One => Ok(()),
        }
    }
}

/// Turns the gate's columns of `adapter_state` [tokens, state_width] into weights: softmax in place of the logits that are there
/// (`Router`), or writes what the gate says.
pub fn activate(isa: Isa, shape: &HydraShape, adapter_state: &mut [f32], gate: Gate<'_>) -> Result<(), Error> {
    check(shape, adapter_state.len(), None, gate)?;
    let uniform = 1.0 / shape.lora_heads as f32;
    let a_rows = shape.a_rows();
    isa.vectorize(
        #[inline(always)]
        || {
            for (t, row) in adapter_state.chunks_exact_mut(shape.state_width()).enumerate() {
                let weights = &mut row[a_rows..];
                match gate {
                    Gate::Router(Routing { temperature, top_k, .. }) => {
                        keep_largest(weights, top_k);
                        let inverse = 1.0 / temperature;
                        weights.iter_mut().for_each(|logit| *logit *= inverse);
                        softmax_row(weights);
                    }
                    Gate::Label(labels) => match weights.get(labels[t] as usize) {
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

/// All but the `k` largest become −∞; of equals the first are kept. A NaN is neither kept nor lost: softmax makes its row NaN.
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

/// `push` [[`Gate::pushes`]] = balance · N · f_e / tokens: what the load-balance term of [`Routing`] adds to each token's dgate,
/// from the activated `adapter_state` [tokens, state_width] of all tokens of the call. (f's counts are exact up to 2²⁴ tokens.)
pub fn push(shape: &HydraShape, push: &mut [f32], adapter_state: &[f32], gate: Gate<'_>) -> Result<(), Error> {
    check(shape, adapter_state.len(), None, gate)?;
    exact("push", gate.pushes(shape), push.len())?;
    let Gate::Router(Routing { balance, .. }) = gate else { return Ok(()) };
    if push.is_empty() {
        return Ok(());
    }
    push.fill(0.0);
    for row in adapter_state.chunks_exact(shape.state_width()) {
        let weights = &row[shape.a_rows()..];
        let mut largest = 0;
        for (e, weight) in weights.iter().enumerate() {
            if *weight > weights[largest] {
                largest = e;
            }
        }
        push[largest] += 1.0;
    }
    let tokens = shape.tokens.max(1) as f32;
    let scale = balance * shape.lora_heads as f32 / tokens;
    push.iter_mut().for_each(|count| *count = scale * (*count / tokens));
    Ok(())
}

/// `mixed` [tokens, lora_heads·rank] = gate_e · down, from the activated `adapter_state` [tokens, state_width].
pub fn mix(isa: Isa, shape: &HydraShape, mixed: &mut [f32], adapter_state: &[f32]) -> Result<(), Error> {
    check(shape, adapter_state.len(), Some(mixed.len()), Gate::One)?;
    let (rank, a_rows) = (shape.rank, shape.a_rows());
    isa.vectorize(
        #[inline(always)]
        || {
            let rows = mixed.chunks_exact_mut(shape.mixed()).zip(adapter_state.chunks_exact(shape.state_width()));
            for (mixed, adapter_state) in rows {
                let (down, gate) = adapter_state.split_at(a_rows);
                for (e, (mixed, &gate)) in mixed.chunks_exact_mut(rank).zip(gate).enumerate() {
                    let down = if shape.per_head_a { &down[e * rank..][..rank] } else { down };
                    for (mixed, down) in mixed.iter_mut().zip(down) {
                        *mixed = gate * down;
                    }
                }
            }
        },
    );
    Ok(())
}

/// `d_adapter_state` [tokens, state_width] = [ddown | dlogits] from `dmixed` [tokens, lora_heads·rank] and the activated `adapter_state`.
/// dlogits are zeros unless the gate is the router. `push` is [`push`]'s, of all tokens of the pass of which these may be some.
pub fn mix_backward(
    isa: Isa,
    shape: &HydraShape,
    d_adapter_state: &mut [f32],
    dmixed: &[f32],
    adapter_state: &[f32],
    gate: Gate<'_>,
    push: &[f32],
) -> Result<(), Error> {
    check(shape, adapter_state.len(), Some(dmixed.len()), gate)?;
    exact("push", gate.pushes(shape), push.len())?;
    exact("d_adapter_state", adapter_state.len(), d_adapter_state.len())?;
    let (rank, a_rows) = (shape.rank, shape.a_rows());
    isa.vectorize(
        #[inline(always)]
        || {
            let rows = d_adapter_state
                .chunks_exact_mut(shape.state_width())
                .zip(dmixed.chunks_exact(shape.mixed()))
                .zip(adapter_state.chunks_exact(shape.state_width()));
            for ((d_adapter_state, dmixed), adapter_state) in rows {
                let (ddown, dgate) = d_adapter_state.split_at_mut(a_rows);
                let (down, weights) = adapter_state.split_at(a_rows);
                ddown.fill(0.0);
                for (e, dmixed) in dmixed.chunks_exact(rank).enumerate() {
                    let at = if shape.per_head_a { e * rank } else { 0 };
                    let mut dot = 0.0;
                    for j in 0..rank {
                        dot += dmixed[j] * down[at + j];
                        ddown[at + j] += weights[e] * dmixed[j];
                    }
                    dgate[e] = dot;
                }
                match gate {
                    Gate::Router(Routing { temperature, .. }) => {
                        dgate.iter_mut().zip(push).for_each(|(dgate, push)| *dgate += push);
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

fn check(shape: &HydraShape, adapter_state: usize, mixed: Option<usize>, gate: Gate<'_>) -> Result<(), Error> {
    shape.validate()?;
    exact("adapter_state", product(shape.tokens, shape.state_width())?, adapter_state)?;
    if let Some(mixed) = mixed {
        exact("mixed", product(shape.tokens, shape.mixed())?, mixed)?;
    }
    gate.validate(shape)
}
