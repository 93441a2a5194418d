//! The operator on one thread: its phases one after the other, with all memory from one workspace.
//!
//! Every function checks its arguments first and writes nothing if it returns an error. The `_scratch` functions give
//! an upper bound for all instruction sets; their `dropout` says whether there is dropout on A's input.

use super::backward::{Backward, dropped_dx_rows_scratch, dx_rows_scratch};
use super::few::{FEW_TOKENS, Few, output_scratch, serves};
use super::forward::{Forward, adapter_rows_scratch, output_rows_scratch};
use super::gradients::{GRADIENT_COLUMNS, db_columns_scratch, stacked_columns_scratch};
use super::layer::{BackwardArgs, ForwardArgs, HydraLayer};
use super::operand::{column_block, least, panels_scratch, ranges, row_block};
use crate::error::{Error, exact, product};
use crate::gemm::{Accumulate, Element, ValuesMut};
use crate::isa::Isa;
use crate::shape::HydraShape;
use crate::workspace::{Scratch, Workspace};
use core::ops::Range;
use half::bf16;

/// Memory that [`forward`] needs at most.
pub const fn forward_scratch<E: Element>(shape: &HydraShape, tokens: usize, dropout: bool) -> Scratch {
    let columns = least(shape.d_out, column_block(shape.d_in));
    let rows = least(tokens, row_block::<E>());
    let block = panels_scratch::<E>(shape.d_in, columns).and(panels_scratch::<E>(shape.mixed_width(), columns));
    let in_rows = adapter_rows_scratch::<E>(shape, rows, dropout).or(output_rows_scratch::<bf16>(shape, rows, columns));
    let many = mixed_scratch(shape, tokens).and(stacked_scratch::<E>(shape)).and(block).and(in_rows);
    many.or(few_scratch(shape, tokens))
}

/// `y` [tokens, d_out] = residual + x Wᵀ + scale · mixed Bᵀ, and `adapter_state` [tokens, state_width] = \[lora_down |
/// gate\] (empty without an adapter).
///
/// Scratch: [`forward_scratch`].
pub fn forward<'y, E: Element>(
    isa: E::Isa,
    layer: &HydraLayer<'_>,
    args: &ForwardArgs<'_>,
    y: impl Into<ValuesMut<'y>>,
    adapter_state: &mut [f32],
    workspace: &mut Workspace<'_>,
) -> Result<(), Error> {
    let forward = Forward::<E>::new(isa, *layer, *args)?;
    let (mut y, shape, tokens) = (y.into(), layer.shape(), args.tokens);
    layer.check_outputs(args, &y, adapter_state)?;
    workspace.require(forward_scratch::<E>(&shape, tokens, args.dropouts.input.is_some()))?;
    let mut workspace = workspace.reborrow();
    if serves(args) {
        return few_forward::<E>(isa, layer, args, y, adapter_state, &mut workspace);
    }
    let (width, mixed_width) = (shape.state_width(), shape.mixed_width());
    let mixed = workspace.take_lines::<f32>(tokens * mixed_width)?;
    let [a, router] = forward.stacked();
    let stacked = [a.pack_whole(&mut workspace)?, router.pack_whole(&mut workspace)?];
    for columns in ranges(shape.d_out, column_block(shape.d_in)) {
        let mut workspace = workspace.reborrow();
        let first = columns.start == 0;
        let block = forward.block(columns)?.pack_whole(&mut workspace)?;
        for rows in ranges(tokens, row_block::<E>()) {
            let mixed = &mut mixed[rows.start * mixed_width..rows.end * mixed_width];
            if first {
                let adapter_state = &mut adapter_state[rows.start * width..rows.end * width];
                forward.adapter_rows(rows.clone(), &stacked, adapter_state, mixed, &mut workspace)?;
            }
            let y = y.reborrow().skip(rows.start * shape.d_out).first(rows.len() * shape.d_out);
            forward.output_rows(rows, &block, mixed, y, &mut workspace)?;
        }
    }
    Ok(())
}

fn few_forward<E: Element>(
    isa: E::Isa,
    layer: &HydraLayer<'_>,
    args: &ForwardArgs<'_>,
    mut y: ValuesMut<'_>,
    adapter_state: &mut [f32],
    workspace: &mut Workspace<'_>,
) -> Result<(), Error> {
    let (tokens, d_out, mut workspace) = (args.tokens, layer.weight.rows(), workspace.reborrow());
    let (few, mixed) = few_adapter_rows(E::widened(isa), layer, args, adapter_state, &mut workspace)?;
    for token in 0..tokens {
        let mut workspace = workspace.reborrow();
        match y.reborrow().skip(token * d_out).first(d_out) {
            ValuesMut::F32(y) => few.output(token, 0..d_out, mixed, y, &mut workspace)?,
            ValuesMut::Bf16(y) => {
                let row = workspace.take_lines::<f32>(d_out)?;
                few.output(token, 0..d_out, mixed, row, &mut workspace)?;
                E::narrow_sums(isa, y, row)?;
            }
        }
    }
    Ok(())
}

/// The pass of a few tokens and its mixed heads.
fn few_adapter_rows<'a>(
    isa: Isa,
    layer: &HydraLayer<'a>,
    args: &ForwardArgs<'a>,
    adapter_state: &mut [f32],
    workspace: &mut Workspace<'a>,
) -> Result<(Few<'a>, &'a [f32]), Error> {
    let few = Few::new(isa, *layer, *args, workspace.take_lines(args.x.len())?)?;
    let mixed = workspace.take_lines::<f32>(args.tokens * layer.shape().mixed_width())?;
    few.adapter_rows(adapter_state, mixed)?;
    Ok((few, mixed))
}

/// Memory for a few tokens; none for more.
const fn few_scratch(shape: &HydraShape, tokens: usize) -> Scratch {
    if tokens > FEW_TOKENS {
        return Scratch(0);
    }
    let x = Scratch::lines::<f32>(tokens.saturating_mul(shape.d_in));
    let row = Scratch::lines::<f32>(shape.d_out); // of a y in bf16
    x.and(mixed_scratch(shape, tokens)).and(row).and(output_scratch(shape.d_out))
}

pub(super) const fn mixed_scratch(shape: &HydraShape, tokens: usize) -> Scratch {
    Scratch::lines::<f32>(tokens.saturating_mul(shape.mixed_width()))
}

pub(super) const fn state_scratch(shape: &HydraShape, tokens: usize) -> Scratch {
    Scratch::lines::<f32>(tokens.saturating_mul(shape.state_width()))
}

/// Panels of [A; R], in one operand or in two.
const fn stacked_scratch<E: Element>(shape: &HydraShape) -> Scratch {
    let router = shape.stacked_rows() - shape.a_rows();
    let apart = panels_scratch::<E>(shape.d_in, shape.a_rows()).and(panels_scratch::<E>(shape.d_in, router));
    panels_scratch::<E>(shape.d_in, shape.stacked_rows()).or(apart)
}

/// Memory that [`recompute`] needs at most.
pub const fn recompute_scratch<E: Element>(shape: &HydraShape, tokens: usize, dropout: bool) -> Scratch {
    let rows = least(tokens, row_block::<E>());
    let in_rows = mixed_scratch(shape, rows).and(adapter_rows_scratch::<E>(shape, rows, dropout));
    stacked_scratch::<E>(shape).and(in_rows).or(few_scratch(&HydraShape { d_out: 0, ..*shape }, tokens))
}

/// Computes the `adapter_state` [tokens, state_width] that [`forward`] leaves, bit for bit, without its y: for a caller
/// that doesn't keep it between the passes.
///
/// Scratch: [`recompute_scratch`].
pub fn recompute<E: Element>(
    isa: E::Isa,
    layer: &HydraLayer<'_>,
    args: &ForwardArgs<'_>,
    adapter_state: &mut [f32],
    workspace: &mut Workspace<'_>,
) -> Result<(), Error> {
    let forward = Forward::<E>::new(isa, *layer, *args)?;
    let (shape, tokens) = (layer.shape(), args.tokens);
    let (width, mixed_width) = (shape.state_width(), shape.mixed_width());
    exact("adapter_state", tokens * width, adapter_state.len())?;
    workspace.require(recompute_scratch::<E>(&shape, tokens, args.dropouts.input.is_some()))?;
    let mut workspace = workspace.reborrow();
    if serves(args) {
        return few_adapter_rows(E::widened(isa), layer, args, adapter_state, &mut workspace).map(|_| ());
    }
    let [a, router] = forward.stacked();
    let stacked = [a.pack_whole(&mut workspace)?, router.pack_whole(&mut workspace)?];
    for rows in ranges(tokens, row_block::<E>()) {
        let mut workspace = workspace.reborrow();
        let mixed = workspace.take_lines::<f32>(rows.len() * mixed_width)?;
        let adapter_state = &mut adapter_state[rows.start * width..rows.end * width];
        forward.adapter_rows(rows, &stacked, adapter_state, mixed, &mut workspace)?;
    }
    Ok(())
}

/// What [`backward`] computes.
pub struct Gradients<'a> {
    /// The gradient of x [tokens, d_in], if it is needed: overwritten or added to.
    pub dx: Option<(ValuesMut<'a>, Accumulate)>,
    /// The adapter's gradients, if they are needed: added to.
    pub adapter: Option<AdapterGradients<'a>>,
}

/// Where the adapter's gradients are added.
pub struct AdapterGradients<'a> {
    /// \[dA; dR\], [stacked_rows, d_in].
    pub da: &'a mut [f32],
    /// dB, [d_out, mixed_width].
    pub db: &'a mut [f32],
}

impl Gradients<'_> {
    /// An error unless the matrices have the sizes of a layer's, for `tokens` rows.
    pub fn check(&self, shape: &HydraShape, tokens: usize) -> Result<(), Error> {
        if let Some((dx, _)) = &self.dx {
            exact("dx", product(tokens, shape.d_in)?, dx.len())?;
        }
        if let Some(AdapterGradients { da, db }) = &self.adapter {
            exact("da", product(shape.stacked_rows(), shape.d_in)?, da.len())?;
            exact("db", product(shape.d_out, shape.mixed_width())?, db.len())?;
        }
        Ok(())
    }
}

/// Memory that [`backward`] needs at most.
pub const fn backward_scratch<E: Element>(shape: &HydraShape, tokens: usize, dropout: bool) -> Scratch {
    let state = state_scratch(shape, tokens);
    let kept = state.and(state).and(mixed_scratch(shape, tokens));
    let phases = row_phases_scratch::<E>(shape, tokens, dropout).or(gradients_scratch::<E>(shape, tokens, dropout));
    kept.and(phases.or(recompute_scratch::<E>(shape, tokens, dropout)))
}

/// The gradients for `args.dy`: dx = or += dy W + D(d_lora_down A) + dlogits R, and the adapter's, which are added.
///
/// `adapter_state` [tokens, state_width] is what the forward pass left, empty without an adapter; `None` computes it
/// again from x. Scratch: [`backward_scratch`].
pub fn backward<E: Element>(
    isa: E::Isa,
    layer: &HydraLayer<'_>,
    args: &BackwardArgs<'_>,
    adapter_state: Option<&[f32]>,
    gradients: Gradients<'_>,
    workspace: &mut Workspace<'_>,
) -> Result<(), Error> {
    let &BackwardArgs { tokens, x, labels, dropouts, .. } = args;
    layer.check(tokens, x, labels)?;
    let shape = layer.shape();
    gradients.check(&shape, tokens)?;
    workspace.require(backward_scratch::<E>(&shape, tokens, dropouts.input.is_some()))?;
    let mut workspace = workspace.reborrow();
    let computed = workspace.take_lines::<f32>(tokens * shape.state_width())?;
    let adapter_state = match adapter_state {
        Some(adapter_state) => adapter_state,
        None => {
            let forward = ForwardArgs { tokens, x, residual: None, labels, dropouts };
            recompute::<E>(isa, layer, &forward, computed, &mut workspace)?;
            computed
        }
    };
    let backward = Backward::<E>::new(isa, *layer, *args, adapter_state)?;
    let mixed = workspace.take_lines::<f32>(tokens * shape.mixed_width())?;
    let d_adapter_state = workspace.take_lines::<f32>(tokens * shape.state_width())?;
    row_phases(&backward, args, gradients.dx, [d_adapter_state, mixed], &mut workspace)?;
    match gradients.adapter {
        Some(gradients) => adapter_gradients(&backward, args, gradients, [d_adapter_state, mixed], &mut workspace),
        None => Ok(()),
    }
}

const fn row_phases_scratch<E: Element>(shape: &HydraShape, tokens: usize, dropout: bool) -> Scratch {
    let (columns, rows) = (least(shape.d_in, column_block(shape.d_out)), least(tokens, row_block::<E>()));
    let lora_up = panels_scratch::<E>(shape.d_out, shape.mixed_width());
    let block = panels_scratch::<E>(shape.d_out, columns).and(panels_scratch::<E>(shape.stacked_rows(), columns));
    let panels = Scratch::lines::<f32>(shape.lora_heads).and(lora_up).and(block);
    let dx = dx_rows_scratch::<bf16>(shape, rows, columns);
    if !dropout {
        return panels.and(dx);
    }
    panels.and(panels_scratch::<E>(shape.a_rows(), shape.d_in)).and(dx.or(dropped_dx_rows_scratch(shape, rows)))
}

/// The phases over rows: the gradient of the adapter's state, the mixed heads, and dx.
fn row_phases<E: Element>(
    backward: &Backward<'_, E>,
    args: &BackwardArgs<'_>,
    dx: Option<(ValuesMut<'_>, Accumulate)>,
    [d_adapter_state, mixed]: [&mut [f32]; 2],
    workspace: &mut Workspace<'_>,
) -> Result<(), Error> {
    let (shape, tokens, mut workspace) = (backward.shape(), args.tokens, workspace.reborrow());
    let (width, mixed_width, d_in) = (shape.state_width(), shape.mixed_width(), shape.d_in);
    let balance = workspace.take_lines::<f32>(backward.balance_loss_grad_len())?;
    backward.balance_loss_grad(balance)?;
    let lora_up = backward.lora_up().pack_whole(&mut workspace)?;
    let mut state_rows = |rows: &Range<usize>, d_adapter_state: &mut [f32]| {
        let mixed = &mut mixed[rows.start * mixed_width..rows.end * mixed_width];
        backward.state_rows(rows.clone(), &lora_up, balance, d_adapter_state, mixed)
    };
    let Some((mut dx, accumulate)) = dx else {
        return ranges(tokens, row_block::<E>())
            .try_for_each(|rows| state_rows(&rows, &mut d_adapter_state[rows.start * width..rows.end * width]));
    };
    let dropped_a = backward.dropped_a().pack_whole(&mut workspace)?;
    for columns in ranges(d_in, column_block(shape.d_out)) {
        let mut workspace = workspace.reborrow();
        let (first, last) = (columns.start == 0, columns.end == d_in);
        let block = backward.block(columns)?.pack_whole(&mut workspace)?;
        for rows in ranges(tokens, row_block::<E>()) {
            let d_adapter_state = &mut d_adapter_state[rows.start * width..rows.end * width];
            if first {
                state_rows(&rows, d_adapter_state)?;
            }
            let mut dx = dx.reborrow().skip(rows.start * d_in).first(rows.len() * d_in);
            backward.dx_rows(rows.clone(), &block, d_adapter_state, (dx.reborrow(), accumulate), &mut workspace)?;
            if last {
                backward.dropped_dx_rows(rows, &dropped_a, d_adapter_state, dx, &mut workspace)?;
            }
        }
    }
    Ok(())
}

pub(super) const fn gradients_scratch<E: Element>(shape: &HydraShape, tokens: usize, dropout: bool) -> Scratch {
    let dropped = Scratch::lines::<E>(if dropout { tokens.saturating_mul(shape.d_in) } else { 0 });
    let sums = Scratch::lines::<f32>(shape.stacked_rows().saturating_mul(GRADIENT_COLUMNS));
    let stacked = dropped.and(sums).and(stacked_columns_scratch::<E>(tokens, GRADIENT_COLUMNS));
    db_columns_scratch::<E>(shape, tokens, GRADIENT_COLUMNS).or(stacked)
}

/// The phases of the adapter's gradients.
fn adapter_gradients<E: Element>(
    backward: &Backward<'_, E>,
    args: &BackwardArgs<'_>,
    AdapterGradients { da, db }: AdapterGradients<'_>,
    [d_adapter_state, mixed]: [&[f32]; 2],
    workspace: &mut Workspace<'_>,
) -> Result<(), Error> {
    let (shape, tokens, mut workspace) = (backward.shape(), args.tokens, workspace.reborrow());
    let (d_in, width) = (shape.d_in, shape.mixed_width());
    for columns in ranges(shape.d_out, GRADIENT_COLUMNS) {
        let db = &mut db[columns.start * width..columns.end * width];
        backward.db_columns(columns, mixed, db, &mut workspace)?;
    }
    let dropping = args.dropouts.input.is_some();
    let dropped = workspace.take_lines::<E>(if dropping { tokens * d_in } else { 0 })?;
    if dropping {
        for rows in ranges(tokens, row_block::<E>()) {
            backward.dropped_rows(rows.clone(), &mut dropped[rows.start * d_in..rows.end * d_in])?;
        }
    }
    for part in backward.stacked_parts() {
        for columns in ranges(d_in, GRADIENT_COLUMNS) {
            let mut workspace = workspace.reborrow();
            let sums = workspace.take_lines::<f32>(part.rows() * columns.len())?;
            backward.stacked_columns(&part, columns.clone(), d_adapter_state, dropped, sums, &mut workspace)?;
            part.add_to(da, d_in, columns, sums)?;
        }
    }
    Ok(())
}
