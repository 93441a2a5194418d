//! What the ways to compute a layer share: parts of its rows and of its columns, and the bias.

use super::Cpu;
use super::buffer::row_parts;
use crate::backend::HydraShape;
use hydra_kernels::Float;
use hydra_kernels::gemm::{PANEL_ALIGN, ValuesMut};
use hydra_kernels::hydra::{ForwardArgs, HydraLayer, column_block};
use std::ops::Range;

/// Bytes of a weight that are worth handing to another thread: some microseconds of reading.
pub(super) const TASK_BYTES: usize = 32 * 1024;

/// Some rows of a product and their adapter, which other rows of it need not have.
pub(super) struct Part<'a> {
    pub layer: HydraLayer<'a>,
    /// x and residual are these rows'.
    pub args: ForwardArgs<'a>,
    /// [tokens, state_width]; empty without an adapter.
    pub adapter_state: &'a mut [f32],
}

/// Blocks of columns of a result whose operand has `k` rows: a panel for each thread or more.
pub(super) fn blocks(cpu: &Cpu, columns: usize, k: usize) -> impl Iterator<Item = Range<usize>> {
    let block = column_block(k).max(PANEL_ALIGN * cpu.threads());
    (0..columns).step_by(block).map(move |first| first..columns.min(first + block))
}

/// Adapter states [tokens, state_width] or their gradients, and mixed heads [tokens, mixed_width], in parts of `rows`
/// rows. The parts are empty without an adapter.
pub(super) fn state_parts<'a>(
    shape: &HydraShape,
    [tokens, rows]: [usize; 2],
    states: &'a mut [f32],
    mixed: &'a mut [f32],
) -> impl ExactSizeIterator<Item = (&'a mut [f32], &'a mut [f32])> {
    row_parts(states, tokens, rows, shape.state_width()).zip(row_parts(mixed, tokens, rows, shape.mixed_width()))
}

/// The rows of part `part`, `tokens` of them, in ranges of `rows`.
pub(super) fn row_ranges(part: usize, tokens: usize, rows: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    (0..tokens).step_by(rows).map(move |first| (part, first..tokens.min(first + rows)))
}

/// Adds `bias` [d_out] to the rows of `y`.
pub(super) fn add_bias(cpu: &Cpu, y: ValuesMut<'_>, bias: &[f32]) {
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
