//! The phases of the backward pass, which a caller may run on any number of threads; those by columns are in
//! [`gradients`](super::gradients).

use super::dropout::{dropout_accumulate, dropout_in_place};
use super::gate::{Gate, balance_loss_grad, mix, mix_backward};
use super::layer::{AdapterRef, BackwardArgs, HydraLayer, inside};
use super::operand::Operand;
use super::product::{Block, Output, PackedBlock, block_scratch, multiply_block};
use crate::error::{Error, exact, product};
use crate::gemm::{Accumulate, Element, MatRef, Panels, Source, Term, Values, ValuesMut, gemm};
use crate::shape::HydraShape;
use crate::workspace::{Scratch, Workspace};
use core::ops::Range;

/// A backward pass whose arguments have been checked. Products run in `E`, the gate in f32.
///
/// 1. Pack B: [`Backward::lora_up`]. With a load-balancing loss, [`Backward::balance_loss_grad`].
/// 2. For each range of rows [`Backward::state_rows`], which leaves the gradient of the adapter's state and the mixed
///    heads.
/// 3. For dx, for each block of its columns ([`column_block`](super::column_block)): pack W's and \[A; R\]'s part,
///    [`Backward::block`]; then for each range of rows, while they are in the cache, [`Backward::dx_rows`]. With
///    dropout on the input, pack A ([`Backward::dropped_a`]) and call [`Backward::dropped_dx_rows`] once a range's
///    blocks are done.
/// 4. For the adapter's gradients, for each range of y's columns [`Backward::db_columns`]. With dropout on the input,
///    for each range of rows [`Backward::dropped_rows`]. Then for each of the [`Backward::stacked_parts`] and each
///    range of x's columns [`Backward::stacked_columns`], whose sums
///    [`StackedPart::add_to`](super::StackedPart::add_to) adds to the gradient.
#[derive(Clone, Copy)]
pub struct Backward<'a, E: Element> {
    pub(super) isa: E::Isa,
    pub(super) layer: HydraLayer<'a>,
    pub(super) args: BackwardArgs<'a>,
    adapter_state: &'a [f32],
}

/// Scratch of [`Backward::dx_rows`] for `rows` rows and a block of `columns` columns; `Y` is the type of dx, f32 or
/// bf16.
pub const fn dx_rows_scratch<Y>(shape: &HydraShape, rows: usize, columns: usize) -> Scratch {
    block_scratch::<Y>(shape.d_out, rows, columns)
}

/// Scratch of [`Backward::dropped_dx_rows`] for `rows` rows.
pub const fn dropped_dx_rows_scratch(shape: &HydraShape, rows: usize) -> Scratch {
    Scratch::lines::<f32>(rows.saturating_mul(shape.d_in))
}

impl<'a, E: Element> Backward<'a, E> {
    /// Checks the arguments. `adapter_state` [tokens, state_width] is what the forward pass left, empty without an
    /// adapter.
    pub fn new(
        isa: E::Isa,
        layer: HydraLayer<'a>,
        args: BackwardArgs<'a>,
        adapter_state: &'a [f32],
    ) -> Result<Self, Error> {
        layer.check(args.tokens, args.x, args.labels)?;
        exact("dy", product(args.tokens, layer.weight.rows())?, args.dy.len())?;
        exact("adapter_state", args.tokens * layer.shape().state_width(), adapter_state.len())?;
        if !args.load_balance.is_finite() {
            return Err(Error::Shape("the coefficient of the load-balancing loss is a number"));
        }
        Ok(Self { isa, layer, args, adapter_state })
    }

    /// The layer's shape.
    pub fn shape(&self) -> HydraShape {
        self.layer.shape()
    }

    /// Length of [`Backward::balance_loss_grad`]: one value for each head, or 0 without a load-balancing loss.
    pub fn balance_loss_grad_len(&self) -> usize {
        match self.layer.adapter {
            Some(AdapterRef { shape, gate: Gate::Router(_), .. }) if self.args.load_balance != 0.0 => shape.lora_heads,
            _ => 0,
        }
    }

    /// The gradient of the load-balancing loss over all tokens in a token's gate; it is the same for each.
    pub fn balance_loss_grad(&self, grad: &mut [f32]) -> Result<(), Error> {
        exact("balance_loss_grad", self.balance_loss_grad_len(), grad.len())?;
        match self.layer.adapter {
            Some(AdapterRef { shape, .. }) if !grad.is_empty() => {
                balance_loss_grad(&shape, grad, self.adapter_state, self.args.load_balance)
            }
            _ => Ok(()),
        }
    }

    /// scale · B, for dy B.
    pub fn lora_up(&self) -> Operand<'a, E> {
        let (b, scale) = self.layer.adapter.map_or((&[] as &[f32], 1.0), |adapter| (adapter.b, adapter.scale));
        let (k, n) = (self.layer.weight.rows(), self.layer.shape().mixed_width());
        let source = Source::Dense { data: Values::F32(b), k_stride: n, n_stride: 1 };
        Operand { isa: self.isa, source, k, n, scale }
    }

    /// Writes the rows `rows` of the gradient of the adapter's state, \[d_lora_down | dlogits\], and of the mixed
    /// heads, which dB needs.
    ///
    /// `d_adapter_state` [rows, state_width] and `mixed` [rows, mixed_width] hold these rows alone. `lora_up` are the
    /// panels of [`Backward::lora_up`], and `balance_loss_grad` is what [`Backward::balance_loss_grad`] left. Does
    /// nothing without an adapter. Writes nothing if it returns an error.
    pub fn state_rows(
        &self,
        rows: Range<usize>,
        lora_up: &Panels<'_, E>,
        balance_loss_grad: &[f32],
        d_adapter_state: &mut [f32],
        mixed: &mut [f32],
    ) -> Result<(), Error> {
        let Some(AdapterRef { shape, gate, .. }) = self.layer.adapter else { return Ok(()) };
        let (isa, plain, m, n) = (self.isa, E::widened(self.isa), rows.len(), shape.mixed_width());
        let (d_out, width) = (shape.d_out, shape.state_width());
        inside("rows", &rows, self.args.tokens)?;
        self.lora_up().check(lora_up)?;
        exact("balance_loss_grad", self.balance_loss_grad_len(), balance_loss_grad.len())?;
        exact("d_adapter_state", m * width, d_adapter_state.len())?;
        exact("mixed", m * n, mixed.len())?;
        let adapter_state = &self.adapter_state[rows.start * width..rows.end * width];
        let dy = self.args.dy.skip(rows.start * d_out).first(m * d_out);
        let drop_heads = |mixed: &mut [f32]| match self.args.dropouts.mixed {
            Some(dropout) => dropout_in_place(plain, mixed, n, dropout.skip(rows.start)),
            None => Ok(()),
        };
        let term = Term { a: MatRef::row_major(dy, d_out), b: *lora_up };
        gemm(isa, &mut *mixed, n, m, n, Accumulate::Overwrite, &[term])?;
        drop_heads(mixed)?;
        mix_backward(plain, &shape, d_adapter_state, mixed, adapter_state, gate, balance_loss_grad)?;
        mix(plain, &shape, mixed, adapter_state)?;
        drop_heads(mixed)
    }

    /// The first of the rows of \[A; R\] that read x itself: the router's if there is dropout on A's input.
    fn first_undropped(&self) -> usize {
        if self.args.dropouts.input.is_some() { self.layer.shape().a_rows() } else { 0 }
    }

    /// The operands of `columns` of dx: W, for dy W, and the rows of \[A; R\] that read x itself. In block formats of
    /// W, columns begin at a multiple of 32. Fails if dx has fewer columns.
    pub fn block(&self, columns: Range<usize>) -> Result<Block<'a, E>, Error> {
        let d_in = self.layer.weight.cols();
        inside("columns of dx", &columns, d_in)?;
        let (isa, n, first_row) = (self.isa, columns.len(), self.first_undropped());
        let a = self.layer.adapter.map_or(&[] as &[f32], |adapter| adapter.a);
        let data = Values::F32(&a[(first_row * d_in + columns.start).min(a.len())..]);
        let frozen = Source::WeightCols { weight: self.layer.weight, first: columns.start };
        let stacked = Source::Dense { data, k_stride: d_in, n_stride: 1 };
        let k = self.layer.shape().stacked_rows() - first_row;
        Ok(Block {
            first: columns.start,
            frozen: Operand { isa, source: frozen, k: self.layer.weight.rows(), n, scale: 1.0 },
            adapter: Operand { isa, source: stacked, k, n, scale: 1.0 },
        })
    }

    /// The block's columns of the rows `rows` of dx = or += dy W + d_adapter_state \[A; R\]. With dropout on the input,
    /// A's part is left to [`Backward::dropped_dx_rows`].
    ///
    /// `dx` [rows, d_in] and `d_adapter_state` [rows, state_width] hold these rows alone. Scratch: [`dx_rows_scratch`].
    /// Writes nothing if it returns an error.
    pub fn dx_rows<'y>(
        &self,
        rows: Range<usize>,
        block: &PackedBlock<'_, E>,
        d_adapter_state: &[f32],
        (dx, accumulate): (impl Into<ValuesMut<'y>>, Accumulate),
        workspace: &mut Workspace<'_>,
    ) -> Result<(), Error> {
        let output = Output { y: dx.into(), width: self.layer.weight.cols(), accumulate, residual: None };
        self.multiply_dx(rows, block, d_adapter_state, output, workspace)
    }

    /// [`Backward::dx_rows`] into rows of any width that has room for the block.
    pub(super) fn multiply_dx(
        &self,
        rows: Range<usize>,
        block: &PackedBlock<'_, E>,
        d_adapter_state: &[f32],
        output: Output<'_>,
        workspace: &mut Workspace<'_>,
    ) -> Result<(), Error> {
        let (shape, m, first_row) = (self.layer.shape(), rows.len(), self.first_undropped());
        let (d_out, width) = (shape.d_out, shape.state_width());
        inside("rows", &rows, self.args.tokens)?;
        exact("d_adapter_state", m * width, d_adapter_state.len())?;
        block.check([d_out, shape.stacked_rows() - first_row])?;
        let dy = self.args.dy.skip(rows.start * d_out).first(m * d_out);
        let undropped = &d_adapter_state[first_row.min(d_adapter_state.len())..];
        let terms = [MatRef::row_major(dy, d_out), MatRef::row_major(undropped, width)];
        multiply_block(self.isa, block, output, m, terms, workspace)
    }

    /// A, for d_lora_down A, which goes back through dropout on the input. It is empty without that dropout.
    pub fn dropped_a(&self) -> Operand<'a, E> {
        let (d_in, k) = (self.layer.weight.cols(), self.first_undropped());
        let data = Values::F32(self.layer.adapter.map_or(&[], |adapter| adapter.a));
        let source = Source::Dense { data, k_stride: d_in, n_stride: 1 };
        Operand { isa: self.isa, source, k, n: if k > 0 { d_in } else { 0 }, scale: 1.0 }
    }

    /// The rows `rows` of `dx` [rows, d_in] += mask ∘ (d_lora_down A) / (1 − p). Does nothing without dropout on the
    /// input.
    ///
    /// `a` are the panels of [`Backward::dropped_a`]. Scratch: [`dropped_dx_rows_scratch`]. Writes nothing if it
    /// returns an error.
    pub fn dropped_dx_rows<'y>(
        &self,
        rows: Range<usize>,
        a: &Panels<'_, E>,
        d_adapter_state: &[f32],
        dx: impl Into<ValuesMut<'y>>,
        workspace: &mut Workspace<'_>,
    ) -> Result<(), Error> {
        let (Some(dropout), Some(AdapterRef { shape, .. })) = (self.args.dropouts.input, self.layer.adapter) else {
            return Ok(());
        };
        let (dx, plain, m) = (dx.into(), E::widened(self.isa), rows.len());
        let (d_in, width) = (shape.d_in, shape.state_width());
        inside("rows", &rows, self.args.tokens)?;
        self.dropped_a().check(a)?;
        exact("d_adapter_state", m * width, d_adapter_state.len())?;
        exact("dx", m * d_in, dx.len())?;
        let sums = workspace.reborrow().take_lines::<f32>(m * d_in)?;
        let term = Term { a: MatRef::row_major(d_adapter_state, width), b: *a };
        gemm(self.isa, &mut *sums, d_in, m, d_in, Accumulate::Overwrite, &[term])?;
        match dx {
            ValuesMut::F32(dx) => dropout_accumulate(plain, dx, sums, d_in, dropout.skip(rows.start)),
            ValuesMut::Bf16(dx) => dropout_accumulate(plain, dx, sums, d_in, dropout.skip(rows.start)),
        }
    }
}
