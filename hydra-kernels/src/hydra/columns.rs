//! A thread's share of the operator, by columns: no thread waits for another, and no gradient is summed across threads.
//!
//! The threads divide the columns of y in the forward pass, and those of x and of y in the backward pass. Only the
//! adapter's narrow products with x or dy are computed by every thread, which costs nth · (a_rows + lora_heads) / d_out
//! of a thread's forward pass and about as much of its backward pass. This suits callers without a barrier inside an
//! operation, as ggml's custom operators; with one, [`Forward`](super::Forward) and [`Backward`] repeat nothing.
//!
//! Results have the same bits for any number of threads.

use super::backward::{Backward, dx_rows_scratch};
use super::dropout::dropout_in_place;
use super::gradients::GRADIENT_COLUMNS;
use super::layer::{AdapterRef, BackwardArgs, ForwardArgs, HydraLayer, inside};
use super::operand::{column_block, least, panels_scratch, ranges, row_block};
use super::product::{Block, Output};
use super::single::{forward, forward_scratch, gradients_scratch, mixed_scratch, recompute, state_scratch};
use crate::error::{Error, exact, product};
use crate::gemm::{Accumulate, Element, Float, MatRef, PANEL_ALIGN, Term, ValuesMut, gemm};
use crate::shape::HydraShape;
use crate::workspace::{Scratch, Workspace};
use core::ops::Range;

/// The columns of a thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThreadColumns {
    /// Of x, for dx, dA and dR.
    pub x: Range<usize>,
    /// Of y, for y and dB.
    pub y: Range<usize>,
}

impl ThreadColumns {
    /// Those of thread `ith` of `nth`, whole panels. They are empty for a thread beyond the last panel, and for `ith` ≥
    /// `nth`.
    pub const fn new(shape: &HydraShape, ith: usize, nth: usize) -> Self {
        Self { x: share(shape.d_in, ith, nth), y: share(shape.d_out, ith, nth) }
    }
}

/// Columns `ith` of `0..columns` cut into `nth` ranges that differ by a panel at most, the longer ones first.
const fn share(columns: usize, ith: usize, nth: usize) -> Range<usize> {
    if ith >= nth {
        return columns..columns;
    }
    let panels = columns.div_ceil(PANEL_ALIGN);
    let (each, longer) = (panels / nth, panels % nth);
    let first = ith * each + least(ith, longer);
    let end = first + each + (ith < longer) as usize;
    least(columns, first.saturating_mul(PANEL_ALIGN))..least(columns, end.saturating_mul(PANEL_ALIGN))
}

/// Memory that [`forward_columns`] needs at most for `columns` columns; `dropout` says whether there is dropout on A's
/// input.
pub const fn forward_columns_scratch<E: Element>(
    shape: &HydraShape,
    tokens: usize,
    columns: usize,
    dropout: bool,
) -> Scratch {
    forward_scratch::<E>(&HydraShape { d_out: columns, ..*shape }, tokens, dropout)
}

/// `y` [tokens, columns] = these `columns` of x Wᵀ + scale · mixed Bᵀ, and the whole `adapter_state` [tokens,
/// state_width].
///
/// Fails if there is a residual, or if the weight's rows are interleaved. Scratch: [`forward_columns_scratch`]. Writes
/// nothing if it returns an error.
pub fn forward_columns<'y, E: Element>(
    isa: E::Isa,
    layer: &HydraLayer<'_>,
    args: &ForwardArgs<'_>,
    columns: Range<usize>,
    (y, adapter_state): (impl Into<ValuesMut<'y>>, &mut [f32]),
    workspace: &mut Workspace<'_>,
) -> Result<(), Error> {
    layer.check(args.tokens, args.x, args.labels)?;
    inside("columns of y", &columns, layer.weight.rows())?;
    if args.residual.is_some() {
        return Err(Error::Shape("a range of columns is computed without a residual"));
    }
    let weight = layer.weight.slice_rows(columns.start, columns.len())?;
    let y = y.into();
    if columns.is_empty() {
        exact("y", 0, y.len())?;
        let dropout = args.dropouts.input.is_some();
        workspace.require(forward_columns_scratch::<E>(&layer.shape(), args.tokens, 0, dropout))?;
        return recompute::<E>(isa, layer, args, adapter_state, workspace);
    }
    // A layer of its own: the rows of W and of B that belong to these columns.
    let adapter = layer.adapter.map(|adapter| {
        let (shape, width) = (HydraShape { d_out: columns.len(), ..adapter.shape }, adapter.shape.mixed_width());
        AdapterRef { shape, b: &adapter.b[columns.start * width..columns.end * width], ..adapter }
    });
    forward::<E>(isa, &HydraLayer { weight, adapter }, args, y, adapter_state, workspace)
}

/// What [`backward_columns`] computes for its columns.
pub struct ColumnGradients<'a> {
    /// dx [tokens, columns of x], if it is needed: overwritten.
    pub dx: Option<ValuesMut<'a>>,
    /// \[dA; dR\] [stacked_rows, columns of x] and dB [columns of y, mixed_width], if they are needed: added to.
    pub adapter: Option<[&'a mut [f32]; 2]>,
}

/// Memory that [`backward_columns`] needs at most for this many columns of x and any of y; `dropout` says whether there
/// is dropout on A's input.
pub const fn backward_columns_scratch<E: Element>(
    shape: &HydraShape,
    tokens: usize,
    columns: usize,
    dropout: bool,
) -> Scratch {
    let kept = state_scratch(shape, tokens).and(mixed_scratch(shape, tokens));
    let lora_up = panels_scratch::<E>(shape.d_out, shape.mixed_width());
    let state = Scratch::lines::<f32>(shape.lora_heads).and(lora_up);
    let dx = dx_columns_scratch::<E>(shape, tokens, columns, dropout);
    kept.and(state.or(dx).or(gradients_scratch::<E>(shape, tokens, dropout)))
}

/// The gradients for `args.dy` in a thread's columns.
///
/// `adapter_state` [tokens, state_width] is what the forward pass left, empty without an adapter. Scratch:
/// [`backward_columns_scratch`]. Writes nothing if it returns an error.
pub fn backward_columns<E: Element>(
    isa: E::Isa,
    layer: &HydraLayer<'_>,
    args: &BackwardArgs<'_>,
    adapter_state: &[f32],
    columns: &ThreadColumns,
    gradients: ColumnGradients<'_>,
    workspace: &mut Workspace<'_>,
) -> Result<(), Error> {
    let backward = Backward::<E>::new(isa, *layer, *args, adapter_state)?;
    let (shape, tokens) = (layer.shape(), args.tokens);
    columns.check(&shape, tokens, &gradients)?;
    let dropping = args.dropouts.input.is_some() && layer.adapter.is_some();
    workspace.require(backward_columns_scratch::<E>(&shape, tokens, columns.x.len(), dropping))?;
    let mut workspace = workspace.reborrow();
    let d_adapter_state = workspace.take_lines::<f32>(tokens * shape.state_width())?;
    let mixed = workspace.take_lines::<f32>(tokens * shape.mixed_width())?;
    state(&backward, d_adapter_state, mixed, &mut workspace)?;
    if let Some(dx) = gradients.dx {
        dx_columns(&backward, columns.x.clone(), d_adapter_state, dx, &mut workspace)?;
    }
    match gradients.adapter {
        Some(gradients) => adapter_columns(&backward, columns, [d_adapter_state, mixed], gradients, &mut workspace),
        None => Ok(()),
    }
}

impl ThreadColumns {
    fn check(&self, shape: &HydraShape, tokens: usize, gradients: &ColumnGradients<'_>) -> Result<(), Error> {
        inside("columns of x", &self.x, shape.d_in)?;
        inside("columns of y", &self.y, shape.d_out)?;
        if self.x.start < self.x.end && !self.x.start.is_multiple_of(PANEL_ALIGN) {
            return Err(Error::Block { operand: "columns of x", block: PANEL_ALIGN, got: self.x.start });
        }
        if let Some(dx) = &gradients.dx {
            exact("dx", product(tokens, self.x.len())?, dx.len())?;
        }
        if let Some([da, db]) = &gradients.adapter {
            exact("da", product(shape.stacked_rows(), self.x.len())?, da.len())?;
            exact("db", product(self.y.len(), shape.mixed_width())?, db.len())?;
        }
        Ok(())
    }
}

/// The gradient of the adapter's state, and the mixed heads, of all tokens.
fn state<E: Element>(
    backward: &Backward<'_, E>,
    d_adapter_state: &mut [f32],
    mixed: &mut [f32],
    workspace: &mut Workspace<'_>,
) -> Result<(), Error> {
    let (shape, mut workspace) = (backward.shape(), workspace.reborrow());
    let (width, mixed_width) = (shape.state_width(), shape.mixed_width());
    let balance = workspace.take_lines::<f32>(backward.balance_loss_grad_len())?;
    backward.balance_loss_grad(balance)?;
    let lora_up = backward.lora_up().pack_whole(&mut workspace)?;
    for rows in ranges(backward.args.tokens, row_block::<E>()) {
        let d_adapter_state = &mut d_adapter_state[rows.start * width..rows.end * width];
        let mixed = &mut mixed[rows.start * mixed_width..rows.end * mixed_width];
        backward.state_rows(rows, &lora_up, balance, d_adapter_state, mixed)?;
    }
    Ok(())
}

const fn dx_columns_scratch<E: Element>(shape: &HydraShape, tokens: usize, columns: usize, dropout: bool) -> Scratch {
    let (columns, rows) = (least(columns, column_block(shape.d_out)), least(tokens, row_block::<E>()));
    let block = panels_scratch::<E>(shape.d_out, columns).and(panels_scratch::<E>(shape.stacked_rows(), columns));
    let blocks = block.and(dx_rows_scratch::<half::bf16>(shape, rows, columns));
    if !dropout {
        return blocks;
    }
    let sums = Scratch::lines::<f32>(rows.saturating_mul(shape.d_in));
    blocks.or(panels_scratch::<E>(shape.a_rows(), shape.d_in).and(sums))
}

/// `dx` [tokens, columns]: dy W + d_adapter_state \[A; R\], and A's part through dropout on the input.
fn dx_columns<E: Element>(
    backward: &Backward<'_, E>,
    columns: Range<usize>,
    d_adapter_state: &[f32],
    mut dx: ValuesMut<'_>,
    workspace: &mut Workspace<'_>,
) -> Result<(), Error> {
    let (shape, tokens, width) = (backward.shape(), backward.args.tokens, columns.len());
    for part in ranges_within(&columns, column_block(shape.d_out)) {
        let mut workspace = workspace.reborrow();
        let first = part.start - columns.start;
        let block = Block { first, ..backward.block(part)? }.pack_whole(&mut workspace)?;
        for rows in ranges(tokens, row_block::<E>()) {
            let y = dx.reborrow().skip(rows.start * width).first(rows.len() * width);
            let output = Output { y, width, accumulate: Accumulate::Overwrite, residual: None };
            let d_adapter_state = &d_adapter_state[rows.start * shape.state_width()..rows.end * shape.state_width()];
            backward.multiply_dx(rows, &block, d_adapter_state, output, &mut workspace)?;
        }
    }
    let Some(mask) = backward.args.dropouts.input.filter(|_| shape.a_rows() > 0) else { return Ok(()) };
    let (mut workspace, d_in) = (workspace.reborrow(), shape.d_in);
    let a = backward.dropped_a().pack_whole(&mut workspace)?;
    for rows in ranges(tokens, row_block::<E>()) {
        let (mut workspace, m) = (workspace.reborrow(), rows.len());
        let sums = workspace.take_lines::<f32>(m * d_in)?;
        let down = MatRef::row_major(&d_adapter_state[rows.start * shape.state_width()..], shape.state_width());
        gemm(backward.isa, &mut *sums, d_in, m, d_in, Accumulate::Overwrite, &[Term { a: down, b: a }])?;
        dropout_in_place(E::widened(backward.isa), sums, d_in, mask.skip(rows.start))?;
        let sums = sums.chunks_exact(d_in.max(1)).map(|row| &row[columns.clone()]);
        match dx.reborrow().skip(rows.start * width).first(m * width) {
            ValuesMut::F32(dx) => add_rows(dx, width, sums),
            ValuesMut::Bf16(dx) => add_rows(dx, width, sums),
        }
    }
    Ok(())
}

fn add_rows<'a, T: Float>(to: &mut [T], width: usize, rows: impl Iterator<Item = &'a [f32]>) {
    for (to, row) in to.chunks_exact_mut(width.max(1)).zip(rows) {
        to.iter_mut().zip(row).for_each(|(to, x)| *to = T::round(to.widen() + x));
    }
}

/// The adapter's gradients in a thread's columns.
fn adapter_columns<E: Element>(
    backward: &Backward<'_, E>,
    columns: &ThreadColumns,
    [d_adapter_state, mixed]: [&[f32]; 2],
    [da, db]: [&mut [f32]; 2],
    workspace: &mut Workspace<'_>,
) -> Result<(), Error> {
    let (shape, tokens, mut workspace) = (backward.shape(), backward.args.tokens, workspace.reborrow());
    let (d_in, mixed_width) = (shape.d_in, shape.mixed_width());
    for part in ranges_within(&columns.y, GRADIENT_COLUMNS) {
        let (first, end) = (part.start - columns.y.start, part.end - columns.y.start);
        backward.db_columns(part, mixed, &mut db[first * mixed_width..end * mixed_width], &mut workspace)?;
    }
    let dropping = backward.stacked_parts().iter().any(|part| part.reads_dropped() && part.rows() > 0);
    let dropped = workspace.take_lines::<E>(if dropping { tokens * d_in } else { 0 })?;
    if dropping {
        for rows in ranges(tokens, row_block::<E>()) {
            backward.dropped_rows(rows.clone(), &mut dropped[rows.start * d_in..rows.end * d_in])?;
        }
    }
    for stacked in backward.stacked_parts().into_iter().filter(|stacked| stacked.rows() > 0) {
        for part in ranges_within(&columns.x, GRADIENT_COLUMNS) {
            let mut workspace = workspace.reborrow();
            let sums = workspace.take_lines::<f32>(stacked.rows() * part.len())?;
            let local = part.start - columns.x.start..part.end - columns.x.start;
            backward.stacked_columns(&stacked, part, d_adapter_state, dropped, sums, &mut workspace)?;
            stacked.add_to(da, columns.x.len(), local, sums)?;
        }
    }
    Ok(())
}

/// `range` in ranges of `len`, the last of which may be shorter.
fn ranges_within(range: &Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.clone().step_by(len).map(move |first| first..end.min(first + len))
}
