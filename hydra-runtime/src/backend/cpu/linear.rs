//! [`Backend::linear`](crate::backend::Backend::linear) and its gradient: the backend's arguments as the operator takes
//! them.

use super::Cpu;
use super::buffer::{Activations, Element};
use super::exec::Exec;
use super::operator::{Outputs, many};
use super::parts::Part;
use super::rows::decode;
use crate::Result;
use crate::backend::{
    AdapterArgs, AnyBuffer, AnyBufferMut, DropoutKey, GateKind, Linear, LinearBackward, LinearOutput, LinearRows,
    RowKind, Weight,
};
use hydra_kernels::gemm::{Values, ValuesMut};
use hydra_kernels::hydra::{AdapterGradients, AdapterRef, BackwardArgs, Dropouts, ForwardArgs, Gradients, HydraLayer};

/// See [`crate::backend::Backend::linear`].
pub(super) fn forward<E: Element>(exec: Exec<'_, E>, args: Linear<'_, Cpu>) -> Result<()> {
    let Linear { output, tokens, x, weight, bias, adapter } = args;
    let (adapter, adapter_state) = match adapter {
        Some((adapter, state)) => (Some(adapter), &mut state[..tokens * adapter.slot.shape.state_width()]),
        None => (None, &mut [][..]),
    };
    let layer = layer(weight.weight(), adapter);
    let (x_len, y_len) = (tokens * layer.weight.cols(), tokens * layer.weight.rows());
    let (y, residual) = match output {
        LinearOutput::Buffer { y, residual } => (ValuesMut::F32(y), residual.map(|x| Values::F32(x))),
        LinearOutput::Activations { y, residual } => (y.values_mut(), residual.map(Activations::values)),
    };
    let args = ForwardArgs {
        tokens,
        x: x.values().first(x_len),
        residual: residual.map(|residual| residual.first(y_len)),
        labels: labels(adapter, tokens),
        dropouts: dropouts(adapter),
    };
    let bias = bias.map(|bias| &bias[..layer.weight.rows()]);
    exec.forward(layer, args, bias, Outputs { y: y.first(y_len), adapter_state })
}

/// See [`crate::backend::Backend::linear_rows`].
pub(super) fn rows<E: Element>(exec: Exec<'_, E>, args: LinearRows<'_, Cpu>) -> Result<()> {
    let LinearRows { output, x, weight, bias, kind, groups, states } = args;
    let weight = weight.weight();
    let (d_in, d_out) = (weight.cols(), weight.rows());
    let (y, residual) = match output {
        LinearOutput::Buffer { y, residual } => (ValuesMut::F32(y), residual.map(|x| Values::F32(x))),
        LinearOutput::Activations { y, residual } => (y.values_mut(), residual.map(Activations::values)),
    };
    let mut states = states.map_or(&mut [][..], |states| states);
    let (mut parts, mut first) = (Vec::with_capacity(groups.len()), 0);
    for group in groups {
        let (adapter, tokens) = (group.adapter.as_ref(), group.rows);
        let layer = layer(weight, adapter);
        let (adapter_state, rest) = std::mem::take(&mut states).split_at_mut(tokens * layer.shape().state_width());
        states = rest;
        let args = ForwardArgs {
            tokens,
            x: x.values().skip(first * d_in).first(tokens * d_in),
            residual: residual.map(|residual| residual.skip(first * d_out).first(tokens * d_out)),
            labels: labels(adapter, tokens),
            dropouts: Dropouts::default(),
        };
        parts.push(Part { layer, args, adapter_state });
        first += tokens;
    }
    let (x, y) = (x.values().first(first * d_in), y.first(first * d_out));
    let bias = bias.map(|bias| &bias[..d_out]);
    match kind {
        RowKind::Decode => decode(exec, x, parts, bias, y),
        RowKind::Prompt => many(exec, parts, bias, y),
    }
}

/// See [`crate::backend::Backend::linear_backward`].
pub(super) fn backward<E: Element>(exec: Exec<'_, E>, args: LinearBackward<'_, Cpu>) -> Result<()> {
    let LinearBackward { dx, dparams, tokens, dy, x, weight, adapter } = args;
    let (adapter, adapter_state) = match adapter {
        Some((adapter, state)) => (Some(adapter), &state[..tokens * adapter.slot.shape.state_width()]),
        None => (None, &[][..]),
    };
    let layer = layer(weight.weight(), adapter);
    let (x_len, y_len) = (tokens * layer.weight.cols(), tokens * layer.weight.rows());
    let dy = match dy {
        AnyBuffer::Buffer(dy) => Values::F32(dy),
        AnyBuffer::Activations(dy) => dy.values(),
    };
    let dx = dx.map(|(dx, accumulate)| match dx {
        AnyBufferMut::Buffer(dx) => (ValuesMut::F32(dx).first(x_len), accumulate),
        AnyBufferMut::Activations(dx) => (dx.values_mut().first(x_len), accumulate),
    });
    let args = BackwardArgs {
        tokens,
        dy: dy.first(y_len),
        x: x.values().first(x_len),
        labels: labels(adapter, tokens),
        dropouts: dropouts(adapter),
        load_balance: adapter.map_or(0.0, |adapter| adapter.balance),
    };
    let gradients =
        Gradients { dx, adapter: adapter.zip(dparams).map(|(adapter, dparams)| gradients(adapter, dparams)) };
    exec.backward(layer, args, Some(adapter_state), gradients)
}

/// The layer as the kernels take it.
fn layer<'a>(weight: Weight<'a>, adapter: Option<&AdapterArgs<'a, Cpu>>) -> HydraLayer<'a> {
    let adapter = adapter.map(|&AdapterArgs { slot, params, .. }| {
        let (a, b) = (&params[slot.a.clone()], &params[slot.b.clone()]);
        AdapterRef { shape: slot.shape, a, b, scale: slot.scale, gate: slot.gate.with(slot.routing) }
    });
    HydraLayer { weight, adapter }
}

/// The labels of a pass of `tokens` tokens, if its gate reads them.
fn labels<'a>(adapter: Option<&AdapterArgs<'a, Cpu>>, tokens: usize) -> &'a [u32] {
    match adapter {
        Some(args) if args.slot.gate == GateKind::Label => &args.labels[..tokens],
        _ => &[],
    }
}

/// The masks of a pass, from its first row on.
fn dropouts(adapter: Option<&AdapterArgs<'_, Cpu>>) -> Dropouts {
    let mask = |key: Option<DropoutKey>| key.map(|key| key.mask(0));
    adapter.map_or(Dropouts::default(), |args| Dropouts { input: mask(args.dropout), mixed: mask(args.head_dropout) })
}

/// Where the adapter's gradients lie in `dparams`, which is laid out as the parameters.
fn gradients<'a>(adapter: &AdapterArgs<'_, Cpu>, dparams: &'a mut [f32]) -> AdapterGradients<'a> {
    let ranges = [adapter.slot.a.clone(), adapter.slot.b.clone()];
    let [da, db] = dparams.get_disjoint_mut(ranges).expect("A and B lie apart in the parameters");
    AdapterGradients { da, db }
}
