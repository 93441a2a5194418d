//! A frozen linear layer and its adapter on many threads: the phases of [`hydra_kernels::hydra`], shared out.
//!
//! A task takes some rows through the adapter's products, the gate and the frozen product while they are in its cache.

use super::Cpu;
use super::buffer::{Activations, Element, chunks, row_parts};
use super::exec::Exec;
use super::gradient::adapter_gradients;
use super::workspace::Workspace;
use crate::Result;
use crate::backend::{
    Accumulate, AdapterArgs, AnyBuffer, AnyBufferMut, DropoutKey, GateKind, HydraShape, Linear, LinearBackward,
    LinearOutput, Weight,
};
use half::bf16;
use hydra_kernels::gemm::{self, PANEL_ALIGN, Values, ValuesMut};
use hydra_kernels::hydra::{
    AdapterGradients, AdapterRef, Backward, BackwardArgs, Dropouts, Few, Forward, ForwardArgs, HydraLayer,
    adapter_rows_scratch, column_block, dropped_dx_rows_scratch, dx_rows_scratch, few_output_scratch, few_serves,
    output_rows_scratch,
};
use hydra_kernels::{Float, Scratch};
use std::ops::Range;

/// Bytes of a weight that are worth handing to another thread: some microseconds of reading.
const TASK_BYTES: usize = 32 * 1024;

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
    let outputs = Outputs { y: y.first(y_len), adapter_state };
    let bias = bias.map(|bias| &bias[..layer.weight.rows()]);
    if few_serves(&args) { few(exec, layer, args, bias, outputs) } else { many(exec, layer, args, bias, outputs) }
}

/// What the forward pass writes.
struct Outputs<'a> {
    /// [tokens, d_out].
    y: ValuesMut<'a>,
    /// [tokens, state_width]; empty without an adapter.
    adapter_state: &'a mut [f32],
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
    let backward = Backward::<E>::new(exec.isa, layer, args, adapter_state)?;
    let workspace = &mut *exec.cpu.workspaces.take();
    let mut balance = vec![0.0; backward.balance_loss_grad_len()];
    backward.balance_loss_grad(&mut balance)?;
    backward_rows(exec, &backward, &args, (dx, &balance), workspace)?;
    match adapter.zip(dparams) {
        Some((adapter, dparams)) => adapter_gradients(exec, &backward, &args, gradients(adapter, dparams), workspace),
        None => Ok(()),
    }
}

/// The layer as the kernels take it.
fn layer<'a>(weight: Weight<'a>, adapter: Option<&AdapterArgs<'a, Cpu>>) -> HydraLayer<'a> {
    let adapter = adapter.map(|&AdapterArgs { slot, params, .. }| {
        let gate = match slot.gate {
            GateKind::Router => hydra_kernels::Gate::Router(slot.routing),
            GateKind::Label => hydra_kernels::Gate::Label,
            GateKind::Uniform => hydra_kernels::Gate::Uniform,
            GateKind::One => hydra_kernels::Gate::One,
        };
        let (a, b) = (&params[slot.a.clone()], &params[slot.b.clone()]);
        AdapterRef { shape: slot.shape, a, b, scale: slot.scale, gate }
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

/// Blocks of columns of a result whose operand has `k` rows: a panel for each thread or more.
fn blocks(cpu: &Cpu, columns: usize, k: usize) -> impl Iterator<Item = Range<usize>> {
    let block = column_block(k).max(PANEL_ALIGN * cpu.threads());
    (0..columns).step_by(block).map(move |first| first..columns.min(first + block))
}

/// Adapter states [tokens, state_width] or their gradients, and mixed heads [tokens, mixed_width], in parts of `rows`
/// rows. The parts are empty without an adapter.
fn state_parts<'a>(
    shape: &HydraShape,
    [tokens, rows]: [usize; 2],
    states: &'a mut [f32],
    mixed: &'a mut [f32],
) -> impl ExactSizeIterator<Item = (&'a mut [f32], &'a mut [f32])> {
    row_parts(states, tokens, rows, shape.state_width()).zip(row_parts(mixed, tokens, rows, shape.mixed_width()))
}

/// Adds `bias` [d_out] to the rows of `y`.
fn add_bias(cpu: &Cpu, y: ValuesMut<'_>, bias: &[f32]) {
    #[inline(always)]
    fn add<T: Float>(y: &mut [T], bias: &[f32]) {
        for row in y.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(y, bias)| *y = T::round(y.widen() + bias));
        }
    }
    cpu.isa.vectorize(
        #[inline(always)]
        || match y {
            ValuesMut::F32(y) => add(y, bias),
            ValuesMut::Bf16(y) => add(y, bias),
        },
    );
}

/// For many tokens: each thread computes some rows of the result.
fn many<E: Element>(
    exec: Exec<'_, E>,
    layer: HydraLayer<'_>,
    args: ForwardArgs<'_>,
    bias: Option<&[f32]>,
    outputs: Outputs<'_>,
) -> Result<()> {
    let Outputs { mut y, adapter_state } = outputs;
    let (cpu, shape, tokens) = (exec.cpu, layer.shape(), args.tokens);
    let forward = Forward::<E>::new(exec.isa, layer, args)?;
    let Workspace { panels, adapter_panels, lora_panels, dropout_panels, mixed, .. } = &mut *cpu.workspaces.take();
    let mixed = mixed.take::<f32>(tokens * shape.mixed_width());
    let [a, router] = forward.stacked();
    let stacked = [exec.pack_shared(a, lora_panels)?, exec.pack_shared(router, dropout_panels)?];
    let rows = cpu.row_chunk(tokens);
    for columns in blocks(cpu, shape.d_out, shape.d_in) {
        let (first, last) = (columns.start == 0, columns.end == shape.d_out);
        let scratch = match y {
            ValuesMut::F32(_) => output_rows_scratch::<f32>(&shape, rows, columns.len()),
            ValuesMut::Bf16(_) => output_rows_scratch::<bf16>(&shape, rows, columns.len()),
        };
        let scratch = scratch.or(adapter_rows_scratch::<E>(&shape, rows, args.dropouts.input.is_some()));
        let block = exec.pack_block(forward.block(columns)?, [panels, adapter_panels])?;
        let states = state_parts(&shape, [tokens, rows], adapter_state, mixed);
        let tasks = chunks(y.reborrow(), rows * shape.d_out).into_iter().zip(states);
        cpu.threads.each(tasks, |i, (mut y, (adapter_state, mixed))| {
            let rows = i * rows..tokens.min((i + 1) * rows);
            cpu.with_workspace(scratch, |workspace| {
                if first {
                    forward.adapter_rows(rows.clone(), &stacked, adapter_state, mixed, workspace)?;
                }
                forward.output_rows(rows, &block, mixed, y.reborrow(), workspace)?;
                if let Some(bias) = bias.filter(|_| last) {
                    add_bias(cpu, y, bias);
                }
                Ok(())
            })
        })?;
    }
    Ok(())
}

/// For a handful of tokens: each thread reads some rows of the weight.
fn few<E: Element>(
    exec: Exec<'_, E>,
    layer: HydraLayer<'_>,
    args: ForwardArgs<'_>,
    bias: Option<&[f32]>,
    outputs: Outputs<'_>,
) -> Result<()> {
    let Outputs { mut y, adapter_state } = outputs;
    let (cpu, shape, weight) = (exec.cpu, layer.shape(), layer.weight);
    let Workspace { widened, mixed, .. } = &mut *cpu.workspaces.take();
    let few = Few::new(cpu.isa, layer, args, widened.take::<f32>(args.x.len()))?;
    let mixed = mixed.take::<f32>(args.tokens * shape.mixed_width());
    few.adapter_rows(adapter_state, mixed)?;
    let bytes = weight.format().row_bytes(shape.d_in).unwrap_or(usize::MAX).saturating_mul(shape.d_out);
    let columns = shape.d_out.div_ceil((bytes / TASK_BYTES).clamp(1, cpu.threads()));
    let scratch = few_output_scratch(columns);
    for (token, y) in chunks(y.reborrow(), shape.d_out).into_iter().enumerate() {
        cpu.threads.each(chunks(y, columns).into_iter(), |i, y| {
            let columns = i * columns..i * columns + y.len();
            let bias = bias.map(|bias| &bias[columns.clone()]);
            cpu.with_workspace(scratch.and(scratch), |workspace| match y {
                ValuesMut::F32(y) => {
                    few.output(token, columns, mixed, y, workspace)?;
                    bias.into_iter().for_each(|bias| add_bias(cpu, ValuesMut::F32(y), bias));
                    Ok(())
                }
                ValuesMut::Bf16(y) => {
                    let sums = workspace.take_lines::<f32>(y.len())?;
                    few.output(token, columns, mixed, sums, workspace)?;
                    bias.into_iter().for_each(|bias| add_bias(cpu, ValuesMut::F32(sums), bias));
                    Ok(gemm::to_bf16(cpu.bf16_isa, y, sums)?)
                }
            })
        })?;
    }
    Ok(())
}

/// The phases over rows. They leave the mixed heads and the gradient of the adapter's state in the workspace.
fn backward_rows<E: Element>(
    exec: Exec<'_, E>,
    backward: &Backward<'_, E>,
    args: &BackwardArgs<'_>,
    (dx, balance): (Option<(ValuesMut<'_>, Accumulate)>, &[f32]),
    workspace: &mut Workspace,
) -> Result<()> {
    let (cpu, shape, tokens) = (exec.cpu, backward.shape(), args.tokens);
    let (d_in, dropping) = (shape.d_in, args.dropouts.input.is_some());
    let Workspace { panels, adapter_panels, lora_panels, dropout_panels, .. } = workspace;
    let mixed = workspace.mixed.take::<f32>(tokens * shape.mixed_width());
    let d_adapter_state = workspace.d_adapter_state.take::<f32>(tokens * shape.state_width());
    let lora_up = exec.pack_shared(backward.lora_up(), lora_panels)?;
    let rows = cpu.row_chunk(tokens);
    let range = |i: usize| i * rows..tokens.min((i + 1) * rows);
    let Some((mut dx, accumulate)) = dx else {
        return cpu.threads.each(
            state_parts(&shape, [tokens, rows], d_adapter_state, mixed),
            |i, (d_adapter_state, mixed)| {
                Ok(backward.state_rows(range(i), &lora_up, balance, d_adapter_state, mixed)?)
            },
        );
    };
    let dropped_a = exec.pack_shared(backward.dropped_a(), dropout_panels)?;
    for columns in blocks(cpu, d_in, shape.d_out) {
        let (first, last) = (columns.start == 0, columns.end == d_in);
        let scratch = match dx {
            ValuesMut::F32(_) => dx_rows_scratch::<f32>(&shape, rows, columns.len()),
            ValuesMut::Bf16(_) => dx_rows_scratch::<bf16>(&shape, rows, columns.len()),
        };
        let scratch = scratch.or(if dropping { dropped_dx_rows_scratch(&shape, rows) } else { Scratch(0) });
        let block = exec.pack_block(backward.block(columns)?, [panels, adapter_panels])?;
        let states = state_parts(&shape, [tokens, rows], d_adapter_state, mixed);
        let tasks = chunks(dx.reborrow(), rows * d_in).into_iter().zip(states);
        cpu.threads.each(tasks, |i, (mut dx, (d_adapter_state, mixed))| {
            if first {
                backward.state_rows(range(i), &lora_up, balance, d_adapter_state, mixed)?;
            }
            cpu.with_workspace(scratch, |workspace| {
                backward.dx_rows(range(i), &block, d_adapter_state, (dx.reborrow(), accumulate), workspace)?;
                if last {
                    backward.dropped_dx_rows(range(i), &dropped_a, d_adapter_state, dx, workspace)?;
                }
                Ok(())
            })
        })?;
    }
    Ok(())
}
