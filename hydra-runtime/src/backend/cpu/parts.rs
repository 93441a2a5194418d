//! What the ways to compute a layer share: parts of its rows and of its columns, and the bias.

use super::Cpu;
use super::buffer::{Element, pieces, row_parts};
use super::exec::Exec;
use super::workspace::{Area, PartPanels};
use crate::Result;
use crate::backend::HydraShape;
use hydra_kernels::Float;
use hydra_kernels::gemm::{PANEL_ALIGN, Panels, ValuesMut};
use hydra_kernels::hydra::{Forward, ForwardArgs, HydraLayer, column_block};
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

/// Memory for each part's mixed heads [tokens, mixed_width].
pub(super) fn mixed_of<'a>(parts: &[Part<'_>], area: &'a mut Area) -> Result<Vec<&'a mut [f32]>> {
    let len = |part: &Part<'_>| part.args.tokens * part.layer.shape().mixed_width();
    let mut rest = area.take::<f32>(parts.iter().map(len).sum())?;
    let own = |part| {
        let (own, others) = std::mem::take(&mut rest).split_at_mut(len(part));
        rest = others;
        own
    };
    Ok(parts.iter().map(own).collect())
}

/// A part whose [A; R] has been packed.
pub(super) struct Packed<'a, E: Element> {
    pub forward: Forward<'a, E>,
    pub args: ForwardArgs<'a>,
    pub stacked: [Panels<'a, E>; 2],
}

/// A part's results beside y.
pub(super) struct States<'a> {
    shape: HydraShape,
    tokens: usize,
    adapter_state: &'a mut [f32],
    mixed: &'a mut [f32],
}

/// Parts, each with its [A; R] packed, its results, and memory for the columns of its B.
pub(super) struct PackedParts<'a, E: Element> {
    pub packed: Vec<Packed<'a, E>>,
    pub states: Vec<States<'a>>,
    pub lora_up: Vec<&'a mut Area>,
}

impl<'a, E: Element> PackedParts<'a, E> {
    pub fn new(
        exec: Exec<'_, E>,
        parts: Vec<Part<'a>>,
        areas: &'a mut Vec<PartPanels>,
        mixed: &'a mut Area,
    ) -> Result<Self> {
        if areas.len() < parts.len() {
            areas.resize_with(parts.len(), PartPanels::default);
        }
        let mixed = mixed_of(&parts, mixed)?;
        let mut all = Self { packed: Vec::new(), states: Vec::new(), lora_up: Vec::new() };
        for ((Part { layer, args, adapter_state }, areas), mixed) in parts.into_iter().zip(areas).zip(mixed) {
            let forward = Forward::<E>::new(exec.isa, layer, args)?;
            let [a, router] = forward.stacked();
            let stacked = [exec.pack_shared(a, &mut areas.stacked)?, exec.pack_shared(router, &mut areas.router)?];
            all.packed.push(Packed { forward, args, stacked });
            all.states.push(States { shape: layer.shape(), tokens: args.tokens, adapter_state, mixed });
            all.lora_up.push(&mut areas.lora_up);
        }
        Ok(all)
    }
}

/// Some rows of one part, which a thread computes.
pub(super) struct RowTask<'a> {
    /// Which part.
    pub part: usize,
    /// Its rows.
    pub rows: Range<usize>,
    /// The first of them among the rows of all parts.
    pub first: usize,
    pub y: ValuesMut<'a>,
    pub adapter_state: &'a mut [f32],
    pub mixed: &'a mut [f32],
}

/// All rows of `y` [tokens of all parts, d_out], at most `rows` in a task.
pub(super) fn row_tasks<'a>(
    states: &'a mut [States<'_>],
    rows: usize,
    y: ValuesMut<'a>,
    d_out: usize,
) -> Vec<RowTask<'a>> {
    let ranges: Vec<_> = states.iter().enumerate().flat_map(|(i, part)| row_ranges(i, part.tokens, rows)).collect();
    let y = pieces(y, ranges.iter().map(|(_, range)| range.len() * d_out));
    let states = states.iter_mut().flat_map(|part| {
        let States { shape, tokens, adapter_state, mixed } = part;
        state_parts(shape, [*tokens, rows], adapter_state, mixed)
    });
    let mut first = 0;
    let task = |(((part, rows), y), (adapter_state, mixed)): (((usize, Range<usize>), _), _)| {
        let at = first;
        first += rows.len();
        RowTask { part, rows, first: at, y, adapter_state, mixed }
    };
    ranges.into_iter().zip(y).zip(states).map(task).collect()
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
fn row_ranges(part: usize, tokens: usize, rows: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
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
