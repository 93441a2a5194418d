//! Which head answers for a token, and how much: between the adapter's two products.
//!
//! The state of a token is one row `hidden` = [down | gate] of `a_rows + heads` floats, its gradient one row
//! [ddown | dlogits]. With a router the gate's columns first hold its logits. N heads, rank r:
//!
//! ```text
//! gate  = softmax(logits)                        dgate_e   = Σ_j dmixed[e·r+j] · down[j]
//! mixed[e·r+j] = gate_e · down[j]                ddown[j]  = Σ_e gate_e · dmixed[e·r+j]
//!                                                dlogits   = gate ∘ (dgate − Σ gate ∘ dgate)
//! ```
//!
//! With one A per head, `down[j]` is `down[e·r+j]`.

use crate::error::{Error, exact, product};
use crate::isa::Isa;
use crate::shape::HydraShape;
use crate::softmax::{softmax_backward_row, softmax_row};

/// Where the weights of the heads come from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gate<'a> {
    /// Softmax of the router's logits: HydraLoRA.
    Router,
    /// One-hot: the head of each token, `[tokens]`. A label that isn't a head (`u32::MAX`, say) means uniform.
    Label(&'a [u32]),
    /// 1/N each.
    Uniform,
    /// 1 each: LoRA, or a sum of LoRAs.
    One,
}

/// Turns the gate's columns of `hidden` [tokens, hidden] into weights: softmax in place of the logits that are there
/// (`Router`), or writes what the gate says.
pub fn activate(isa: Isa, shape: &HydraShape, hidden: &mut [f32], gate: Gate<'_>) -> Result<(), Error> {
    check(shape, hidden.len(), None, gate)?;
    let uniform = 1.0 / shape.heads as f32;
    let a_rows = shape.a_rows();
    isa.vectorize(
        #[inline(always)]
        || {
            for (t, row) in hidden.chunks_exact_mut(shape.hidden()).enumerate() {
                let weights = &mut row[a_rows..];
                match gate {
                    Gate::Router => softmax_row(weights),
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

/// `mixed` [tokens, heads·rank] = gate_e · down, from the activated `hidden` [tokens, hidden].
pub fn mix(isa: Isa, shape: &HydraShape, mixed: &mut [f32], hidden: &[f32]) -> Result<(), Error> {
    check(shape, hidden.len(), Some(mixed.len()), Gate::One)?;
    let (rank, a_rows) = (shape.rank, shape.a_rows());
    isa.vectorize(
        #[inline(always)]
        || {
            let rows = mixed.chunks_exact_mut(shape.mixed()).zip(hidden.chunks_exact(shape.hidden()));
            for (mixed, hidden) in rows {
                let (down, gate) = hidden.split_at(a_rows);
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

/// `dhidden` [tokens, hidden] = [ddown | dlogits] from `dmixed` [tokens, heads·rank] and the activated `hidden`.
/// dlogits are zeros unless the gate is the router.
pub fn mix_backward(
    isa: Isa,
    shape: &HydraShape,
    dhidden: &mut [f32],
    dmixed: &[f32],
    hidden: &[f32],
    gate: Gate<'_>,
) -> Result<(), Error> {
    check(shape, hidden.len(), Some(dmixed.len()), gate)?;
    exact("dhidden", hidden.len(), dhidden.len())?;
    let (rank, a_rows) = (shape.rank, shape.a_rows());
    isa.vectorize(
        #[inline(always)]
        || {
            let rows = dhidden
                .chunks_exact_mut(shape.hidden())
                .zip(dmixed.chunks_exact(shape.mixed()))
                .zip(hidden.chunks_exact(shape.hidden()));
            for ((dhidden, dmixed), hidden) in rows {
                let (ddown, dgate) = dhidden.split_at_mut(a_rows);
                let (down, weights) = hidden.split_at(a_rows);
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
                    Gate::Router => softmax_backward_row(dgate, weights),
                    _ => dgate.fill(0.0),
                }
            }
        },
    );
    Ok(())
}

fn check(shape: &HydraShape, hidden: usize, mixed: Option<usize>, gate: Gate<'_>) -> Result<(), Error> {
    shape.validate()?;
    exact("hidden", product(shape.tokens, shape.hidden())?, hidden)?;
    if let Some(mixed) = mixed {
        exact("mixed", product(shape.tokens, shape.mixed())?, mixed)?;
    }
    match gate {
        Gate::Label(labels) => exact("labels", shape.tokens, labels.len()),
        Gate::Router if !shape.router => Err(Error::Shape("the router gate needs a shape with a router")),
        _ => Ok(()),
    }
}
