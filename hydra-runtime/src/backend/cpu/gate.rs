//! Rows of an adapter between its two products: from `adapter_state` to the mixed heads, and back.
//!
//! ```text
//! mixed = H(gate ∘ down)        d_adapter_state = [ddown | dlogits] from H(dmixed)        H: the heads' dropout, if there is one
//! ```
//! The mathematics is `hydra_kernels::gate`'s; a call has `first_row ..` of a pass's rows, as many as its buffers hold.

use super::Cpu;
use super::linear::Args;
use crate::Result;
use crate::backend::GateKind;
use hydra_kernels::dropout;
use hydra_kernels::gate::{self, Gate, Routing};

/// Activates the gate's columns of `adapter_state`, and mixes.
pub(super) fn mix_rows(
    cpu: &Cpu,
    args: &Args<'_>,
    first_row: usize,
    mixed: &mut [f32],
    adapter_state: &mut [f32],
) -> Result<()> {
    let shape = args.slot.shape(adapter_state.len() / args.slot.shape.state_width());
    gate::activate(cpu.isa, &shape, adapter_state, gate_of(args, first_row, shape.tokens))?;
    mix_activated(cpu, args, first_row, mixed, adapter_state)
}

/// `mixed` holds dmixed on entry and, as dB needs them, the mixed heads on return. `push` is [`push_of`]'s.
pub(super) fn unmix_rows(
    cpu: &Cpu,
    args: &Args<'_>,
    first_row: usize,
    d_adapter_state: &mut [f32],
    mixed: &mut [f32],
    adapter_state: &[f32],
    push: &[f32],
) -> Result<()> {
    let shape = args.slot.shape(adapter_state.len() / args.slot.shape.state_width());
    drop_heads(cpu, args, first_row, mixed)?;
    gate::mix_backward(
        cpu.isa,
        &shape,
        d_adapter_state,
        mixed,
        adapter_state,
        gate_of(args, first_row, shape.tokens),
        push,
    )?;
    mix_activated(cpu, args, first_row, mixed, adapter_state)
}

/// What the load-balance term adds to every token's dgate, from `adapter_state` of the whole pass.
pub(super) fn push_of(args: &Args<'_>, tokens: usize, adapter_state: &[f32]) -> Result<Vec<f32>> {
    let (shape, gate) = (args.slot.shape(tokens), gate_of(args, 0, tokens));
    let mut push = vec![0.0; gate.pushes(&shape)];
    gate::push(&shape, &mut push, adapter_state, gate)?;
    Ok(push)
}

fn mix_activated(cpu: &Cpu, args: &Args<'_>, first_row: usize, mixed: &mut [f32], adapter_state: &[f32]) -> Result<()> {
    gate::mix(cpu.isa, &args.slot.shape(adapter_state.len() / args.slot.shape.state_width()), mixed, adapter_state)?;
    drop_heads(cpu, args, first_row, mixed)
}

fn drop_heads(cpu: &Cpu, args: &Args<'_>, first_row: usize, mixed: &mut [f32]) -> Result<()> {
    let Some(key) = args.head_dropout else { return Ok(()) };
    Ok(dropout::dropout_in_place(cpu.isa, mixed, args.slot.shape.mixed(), key.mask(first_row))?)
}

fn gate_of<'a>(args: &Args<'a>, first_row: usize, tokens: usize) -> Gate<'a> {
    match args.slot.gate {
        GateKind::Router => Gate::Router(Routing { balance: args.balance, ..args.slot.routing }),
        GateKind::Label => Gate::Label(&args.labels[first_row..first_row + tokens]),
        GateKind::Uniform => Gate::Uniform,
        GateKind::One => Gate::One,
    }
}
