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
use hydra_kernels::gate::{self, Gate};

/// Activates the gate's columns of `adapter_state`, and mixes.
pub(super) fn mix_rows(
    cpu: &Cpu,
    args: &Args<'_>,
    first_row: usize,
    mixed: &mut [f32],
    adapter_state: &mut [f32],
) -> Result<()> {
    let shape = &args.slot.shape;
    let tokens = adapter_state.len() / shape.state_width();
    let labels = args.labels.get(first_row..first_row + tokens).unwrap_or_default();
    gate::activate(cpu.isa, shape, adapter_state, gate_of(args), labels)?;
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
    drop_heads(cpu, args, first_row, mixed)?;
    gate::mix_backward(cpu.isa, &args.slot.shape, d_adapter_state, mixed, adapter_state, gate_of(args), push)?;
    mix_activated(cpu, args, first_row, mixed, adapter_state)
}

/// What the load-balance term adds to every token's dgate, from `adapter_state` of the whole pass.
pub(super) fn push_of(args: &Args<'_>, tokens: usize, adapter_state: &[f32]) -> Result<Vec<f32>> {
    let shape = &args.slot.shape;
    let pushes = args.slot.gate == GateKind::Router && args.balance != 0.0;
    let mut push = vec![0.0; if pushes { shape.lora_heads } else { 0 }];
    if pushes {
        gate::balance_loss_grad(shape, &mut push, &adapter_state[..tokens * shape.state_width()], args.balance)?;
    }
    Ok(push)
}

fn mix_activated(cpu: &Cpu, args: &Args<'_>, first_row: usize, mixed: &mut [f32], adapter_state: &[f32]) -> Result<()> {
    gate::mix(cpu.isa, &args.slot.shape, mixed, adapter_state)?;
    drop_heads(cpu, args, first_row, mixed)
}

fn drop_heads(cpu: &Cpu, args: &Args<'_>, first_row: usize, mixed: &mut [f32]) -> Result<()> {
    let Some(key) = args.head_dropout else { return Ok(()) };
    Ok(dropout::dropout_in_place(cpu.isa, mixed, args.slot.shape.mixed_width(), key.mask(first_row))?)
}

fn gate_of(args: &Args<'_>) -> Gate {
    match args.slot.gate {
        GateKind::Router => Gate::Router(args.slot.routing),
        GateKind::Label => Gate::Label,
        GateKind::Uniform => Gate::Uniform,
        GateKind::One => Gate::One,
    }
}
