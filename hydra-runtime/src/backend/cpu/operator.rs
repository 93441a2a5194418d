//! The operator of [`hydra_kernels::hydra`] on many threads: its phases, shared out.
//!
//! A task takes some rows through the adapter's products, the gate and the frozen product while they are in its cache.

use super::Cpu;
use super::buffer::{Element, chunks};
use super::exec::{Exec, with_element};
use super::gradient::adapter_gradients;
use super::parts::{Packed, PackedParts, Part, RowTask, TASK_BYTES, add_bias, blocks, row_tasks, state_parts};
use super::q8::{many as many_in_eight_bits, quantized};
use super::rows::decode;
use super::workspace::Workspace;
use crate::Result;
use crate::backend::{Accumulate, Backend};
use half::bf16;
use hydra_kernels::gemm::{self, ValuesMut};
use hydra_kernels::hydra::{
    Backward, BackwardArgs, Few, Forward, ForwardArgs, Gradients, HydraLayer, adapter_rows_scratch,
    dropped_dx_rows_scratch, dx_rows_scratch, few_output_scratch, few_serves, output_rows_scratch,
};
use hydra_kernels::q8::{product, product_scratch};
use hydra_kernels::{self as kernels, Scratch};
use std::ops::Range;

/// The HydraLoRA operator on this CPU's threads and in its [`Precision`](super::Precision), for programs with layers of their own.
///
/// Arguments, results and errors are those of [`hydra_kernels::hydra::forward`] and [`hydra_kernels::hydra::backward`],
/// without the instruction set and the workspace, which the CPU has.
impl Cpu {
    /// Writes y [tokens, d_out] = residual + x Wᵀ + scale · mixed Bᵀ, and `adapter_state` [tokens, state_width], which
    /// is empty without an adapter.
    pub fn layer_forward<'y>(
        &self,
        layer: HydraLayer<'_>,
        args: ForwardArgs<'_>,
        y: impl Into<ValuesMut<'y>>,
        adapter_state: &mut [f32],
    ) -> Result<()> {
        let (y, bias) = (y.into(), None);
        layer.check_outputs(&args, &y, adapter_state)?;
        let outputs = Outputs { y, adapter_state };
        with_element!(self.precision, E => Exec::<E>::new(self).forward(layer, args, bias, outputs))
    }

    /// The gradients for `args.dy`. Without `adapter_state`, the one that [`Cpu::layer_forward`] left is computed again.
    pub fn layer_backward(
        &self,
        layer: HydraLayer<'_>,
        args: BackwardArgs<'_>,
        adapter_state: Option<&[f32]>,
        gradients: Gradients<'_>,
    ) -> Result<()> {
        self.trains()?;
        gradients.check(&layer.shape(), args.tokens)?;
        with_element!(self.precision, E => Exec::<E>::new(self).backward(layer, args, adapter_state, gradients))
    }
}

/// What the forward pass writes.
pub(super) struct Outputs<'a> {
    /// [tokens, d_out].
    pub y: ValuesMut<'a>,
    /// [tokens, state_width]; empty without an adapter.
    pub adapter_state: &'a mut [f32],
}

impl<E: Element> Exec<'_, E> {
    /// See [`Cpu::layer_forward`]; `bias` [d_out] is added to each row of y.
    pub fn forward(
        self,
        layer: HydraLayer<'_>,
        args: ForwardArgs<'_>,
        bias: Option<&[f32]>,
        outputs: Outputs<'_>,
    ) -> Result<()> {
        let few_tokens = few_serves(&args);
        if few_tokens && (args.tokens == 1 || !self.cpu.in_eight_bits(layer.weight)) {
            return few(self, layer, args, bias, outputs);
        }
        let Outputs { y, adapter_state } = outputs;
        let (x, part) = (args.x, Part { layer, args, adapter_state });
        if few_tokens { decode(self, x, vec![part], bias, y) } else { many(self, vec![part], bias, y) }
    }

    /// See [`Cpu::layer_backward`].
    pub fn backward(
        self,
        layer: HydraLayer<'_>,
        args: BackwardArgs<'_>,
        adapter_state: Option<&[f32]>,
        gradients: Gradients<'_>,
    ) -> Result<()> {
        let recomputed = match adapter_state {
            Some(_) => Vec::new(),
            None => recompute(self, layer, &args)?,
        };
        let backward = Backward::<E>::new(self.isa, layer, args, adapter_state.unwrap_or(&recomputed))?;
        let workspace = &mut *self.cpu.workspaces.take();
        let mut balance = vec![0.0; backward.balance_loss_grad_len()];
        backward.balance_loss_grad(&mut balance)?;
        backward_rows(self, &backward, &args, (gradients.dx, &balance), workspace)?;
        match layer.adapter.and(gradients.adapter) {
            Some(gradients) => adapter_gradients(self, &backward, &args, gradients, workspace),
            None => Ok(()),
        }
    }
}

/// The adapter's state [tokens, state_width] of a forward pass over the same tokens.
fn recompute<E: Element>(exec: Exec<'_, E>, layer: HydraLayer<'_>, args: &BackwardArgs<'_>) -> Result<Vec<f32>> {
    let BackwardArgs { tokens, x, labels, dropouts, .. } = *args;
    let args = ForwardArgs { labels, dropouts, ..ForwardArgs::new(tokens, x) };
    let (cpu, shape) = (exec.cpu, layer.shape());
    let forward = Forward::<E>::new(exec.isa, layer, args)?;
    let mut states = vec![0.0; tokens * shape.state_width()];
    let Workspace { lora_panels, dropout_panels, widened, mixed, .. } = &mut *cpu.workspaces.take();
    let mixed = mixed.take::<f32>(tokens * shape.mixed_width())?;
    if few_serves(&args) {
        Few::new(cpu.isa, layer, args, widened.take::<f32>(x.len())?)?.adapter_rows(&mut states, mixed)?;
        return Ok(states);
    }
    let [a, router] = forward.stacked();
    let stacked = [exec.pack_shared(a, lora_panels)?, exec.pack_shared(router, dropout_panels)?];
    let rows = cpu.row_chunk(tokens);
    let scratch = adapter_rows_scratch::<E>(&shape, rows, dropouts.input.is_some());
    cpu.threads.each(state_parts(&shape, [tokens, rows], &mut states, mixed), |i, (states, mixed)| {
        let rows = i * rows..tokens.min((i + 1) * rows);
        cpu.with_workspace(scratch, |workspace| Ok(forward.adapter_rows(rows, &stacked, states, mixed, workspace)?))
    })?;
    Ok(states)
}

/// For many tokens: each thread computes some rows of `y`, which belong to one part each. All parts have the same
/// weight.
pub(super) fn many<E: Element>(
    exec: Exec<'_, E>,
    parts: Vec<Part<'_>>,
    bias: Option<&[f32]>,
    mut y: ValuesMut<'_>,
) -> Result<()> {
    let (cpu, Some(weight)) = (exec.cpu, parts.first().map(|part| part.layer.weight)) else { return Ok(()) };
    if cpu.in_eight_bits(weight) {
        return many_in_eight_bits(exec, parts, bias, y);
    }
    let (d_in, d_out) = (weight.cols(), weight.rows());
    let Workspace { panels, parts: areas, mixed, .. } = &mut *cpu.workspaces.take();
    let rows = cpu.row_chunk(parts.iter().map(|part| part.args.tokens).sum());
    let PackedParts { packed, mut states, mut lora_up } = PackedParts::new(exec, parts, areas, mixed)?;
    for columns in blocks(cpu, d_out, d_in) {
        let (first, last) = (columns.start == 0, columns.end == d_out);
        let frozen = exec.pack_shared(packed[0].forward.block(columns.clone())?.frozen, panels)?;
        let mut blocks = Vec::with_capacity(packed.len());
        for (part, lora_up) in packed.iter().zip(&mut lora_up) {
            let block = part.forward.block(columns.clone())?;
            blocks.push(block.packed(frozen.data, exec.pack_shared(block.adapter, lora_up)?.data)?);
        }
        cpu.threads.each(row_tasks(&mut states, rows, y.reborrow(), d_out).into_iter(), |_, task| {
            let RowTask { part, rows, mut y, adapter_state, mixed, .. } = task;
            let (Packed { forward, args, stacked }, block) = (&packed[part], &blocks[part]);
            let (shape, n) = (forward.shape(), columns.len());
            let scratch = match y {
                ValuesMut::F32(_) => output_rows_scratch::<f32>(&shape, rows.len(), n),
                ValuesMut::Bf16(_) => output_rows_scratch::<bf16>(&shape, rows.len(), n),
            };
            let scratch = scratch.or(adapter_rows_scratch::<E>(&shape, rows.len(), args.dropouts.input.is_some()));
            cpu.with_workspace(scratch, |workspace| {
                if first {
                    forward.adapter_rows(rows.clone(), stacked, adapter_state, mixed, workspace)?;
                }
                forward.output_rows(rows, block, mixed, y.reborrow(), workspace)?;
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
    let Workspace { widened, mixed, quantized: area, .. } = &mut *cpu.workspaces.take();
    let in_eight_bits = cpu.in_eight_bits(weight).then(|| quantized(cpu, args.x, weight.cols(), area)).transpose()?;
    let few = Few::new(cpu.isa, layer, args, widened.take::<f32>(args.x.len())?)?;
    let mixed = mixed.take::<f32>(args.tokens * shape.mixed_width())?;
    few.adapter_rows(adapter_state, mixed)?;
    let bytes = weight.format().row_bytes(shape.d_in).unwrap_or(usize::MAX).saturating_mul(shape.d_out);
    let columns = shape.d_out.div_ceil((bytes / TASK_BYTES).clamp(1, cpu.threads()));
    let scratch = few_output_scratch(columns);
    let scratch = scratch.and(scratch).and(match in_eight_bits {
        Some(_) => product_scratch(shape.d_in),
        None => Scratch(0),
    });
    // One token of one row of x in eight bits, or of some in f32.
    let output = |token, columns: Range<usize>, y: &mut [f32], workspace: &mut kernels::Workspace<'_>| {
        let Some(x) = in_eight_bits else { return few.output(token, columns, mixed, y, workspace) };
        product(cpu.q8_isa, y, weight, columns.clone(), x, workspace)?;
        few.add_adapter(columns, mixed, y, workspace)
    };
    for (token, y) in chunks(y.reborrow(), shape.d_out).into_iter().enumerate() {
        cpu.threads.each(chunks(y, columns).into_iter(), |i, y| {
            let columns = i * columns..i * columns + y.len();
            let bias = bias.map(|bias| &bias[columns.clone()]);
            cpu.with_workspace(scratch, |workspace| match y {
                ValuesMut::F32(y) => {
                    output(token, columns, y, workspace)?;
                    bias.into_iter().for_each(|bias| add_bias(cpu, ValuesMut::F32(y), bias));
                    Ok(())
                }
                ValuesMut::Bf16(y) => {
                    let sums = workspace.take_lines::<f32>(y.len())?;
                    output(token, columns, sums, workspace)?;
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
    let mixed = workspace.mixed.take::<f32>(tokens * shape.mixed_width())?;
    let d_adapter_state = workspace.d_adapter_state.take::<f32>(tokens * shape.state_width())?;
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
