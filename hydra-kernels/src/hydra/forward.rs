//! The phases of the forward pass, which a caller may run on any number of threads.

use super::dropout::{dropout_in_place, dropout_rows};
use super::gate::{activate, mix};
use super::layer::{AdapterRef, ForwardArgs, HydraLayer, inside, labels_of};
use super::operand::Operand;
use super::product::{Block, Output, PackedBlock, block_scratch, check_residual, multiply_block};
use crate::error::{Error, exact, product};
use crate::gemm::{Accumulate, Element, MatRef, Panels, Source, Term, Values, ValuesMut, gemm};
use crate::shape::HydraShape;
use crate::workspace::{Scratch, Workspace};
use core::ops::Range;

/// A forward pass whose arguments have been checked. Products run in `E`, the gate in f32.
///
/// 1. Pack \[A; R\]: [`Forward::stacked`].
/// 2. For each block of columns of y ([`column_block`](super::column_block)) pack W's and B's part: [`Forward::block`].
///    Several threads may pack parts of an operand.
/// 3. For each range of rows: with the first block [`Forward::adapter_rows`], which leaves the adapter's state and the
///    mixed heads, and then, while the rows are in the cache, [`Forward::output_rows`].
#[derive(Clone, Copy)]
pub struct Forward<'a, E: Element> {
    isa: E::Isa,
    layer: HydraLayer<'a>,
    args: ForwardArgs<'a>,
}

/// Scratch of [`Forward::adapter_rows`] for `rows` rows; `dropout` says whether there is dropout on the input.
pub const fn adapter_rows_scratch<E: Element>(shape: &HydraShape, rows: usize, dropout: bool) -> Scratch {
    Scratch::lines::<E>(if dropout { rows.saturating_mul(shape.d_in) } else { 0 })
}

/// Scratch of [`Forward::output_rows`] for `rows` rows and a block of `columns` columns; `Y` is the type of y, f32 or
/// bf16.
pub const fn output_rows_scratch<Y>(shape: &HydraShape, rows: usize, columns: usize) -> Scratch {
    block_scratch::<Y>(shape.d_in, rows, columns)
}

impl<'a, E: Element> Forward<'a, E> {
    /// Checks the arguments.
    pub fn new(isa: E::Isa, layer: HydraLayer<'a>, args: ForwardArgs<'a>) -> Result<Self, Error> {
        layer.check(args.tokens, args.x, args.labels)?;
        if let Some(residual) = args.residual {
            exact("residual", product(args.tokens, layer.weight.rows())?, residual.len())?;
        }
        Ok(Self { isa, layer, args })
    }

    /// The layer's shape.
    pub fn shape(&self) -> HydraShape {
        self.layer.shape()
    }

    /// \[A; R\]ᵀ, for x \[A; R\]ᵀ. With dropout on the input, A and R read different inputs, and R is the second
    /// operand; otherwise the second operand is empty.
    pub fn stacked(&self) -> [Operand<'a, E>; 2] {
        let d_in = self.layer.weight.cols();
        let a = self.layer.adapter.map_or(&[] as &[f32], |adapter| adapter.a);
        self.layer.stacked_parts(&self.args.dropouts).map(|part| {
            let data = Values::F32(&a[part.first * d_in..]);
            let source = Source::Dense { data, k_stride: 1, n_stride: d_in };
            Operand { isa: self.isa, source, k: d_in, n: part.rows, scale: part.factor }
        })
    }

    /// The operands of `columns` of y. Fails if y has fewer columns.
    pub fn block(&self, columns: Range<usize>) -> Result<Block<'a, E>, Error> {
        inside("columns of y", &columns, self.layer.weight.rows())?;
        let (isa, n, width) = (self.isa, columns.len(), self.layer.shape().mixed_width());
        let (b, scale) = self.layer.adapter.map_or((&[] as &[f32], 1.0), |adapter| (adapter.b, adapter.scale));
        let frozen = Source::WeightRows { weight: self.layer.weight, first: columns.start };
        let adapter = Source::Dense { data: Values::F32(&b[columns.start * width..]), k_stride: 1, n_stride: width };
        Ok(Block {
            first: columns.start,
            frozen: Operand { isa, source: frozen, k: self.layer.weight.cols(), n, scale: 1.0 },
            adapter: Operand { isa, source: adapter, k: width, n, scale },
        })
    }

    /// Writes the rows `rows` of the adapter's state and of the mixed heads.
    ///
    /// `adapter_state` [rows, state_width] and `mixed` [rows, mixed_width] hold these rows alone; `stacked` are the
    /// panels of [`Forward::stacked`]. Does nothing without an adapter. Scratch: [`adapter_rows_scratch`]. Writes
    /// nothing if it returns an error.
    pub fn adapter_rows(
        &self,
        rows: Range<usize>,
        stacked: &[Panels<'_, E>; 2],
        adapter_state: &mut [f32],
        mixed: &mut [f32],
        workspace: &mut Workspace<'_>,
    ) -> Result<(), Error> {
        let Some(AdapterRef { shape, gate, .. }) = self.layer.adapter else { return Ok(()) };
        let (isa, plain, m, d_in, width) =
            (self.isa, E::widened(self.isa), rows.len(), shape.d_in, shape.state_width());
        inside("rows", &rows, self.args.tokens)?;
        exact("adapter_state", m * width, adapter_state.len())?;
        exact("mixed", m * shape.mixed_width(), mixed.len())?;
        for (operand, panels) in self.stacked().iter().zip(stacked) {
            operand.check(panels)?;
        }
        let dropout = self.args.dropouts.input;
        workspace.require(adapter_rows_scratch::<E>(&shape, m, dropout.is_some()))?;
        if m == 0 {
            return Ok(());
        }
        let x = self.args.x.skip(rows.start * d_in).first(m * d_in);
        let [a, router] = *stacked;
        let input = match dropout {
            None => x,
            Some(dropout) => {
                let dropped = workspace.reborrow().take_lines::<E>(m * d_in)?;
                dropout_rows(plain, dropped, x, d_in, dropout.skip(rows.start))?;
                E::as_values(dropped)
            }
        };
        let term = Term { a: MatRef::row_major(input, d_in), b: a };
        gemm(isa, &mut *adapter_state, width, m, a.n, Accumulate::Overwrite, &[term])?;
        if router.n > 0 {
            let term = Term { a: MatRef::row_major(x, d_in), b: router };
            gemm(isa, &mut adapter_state[a.n..], width, m, router.n, Accumulate::Overwrite, &[term])?;
        }
        activate(plain, &shape, adapter_state, gate, labels_of(gate, self.args.labels, &rows))?;
        mix(plain, &shape, mixed, adapter_state)?;
        match self.args.dropouts.mixed {
            Some(dropout) => dropout_in_place(plain, mixed, shape.mixed_width(), dropout.skip(rows.start)),
            None => Ok(()),
        }
    }

    /// Writes the block's columns of the rows `rows` of y: residual + x Wᵀ + scale · mixed Bᵀ.
    ///
    /// `y` [rows, d_out] and `mixed` [rows, mixed_width] hold these rows alone; `mixed` is what
    /// [`Forward::adapter_rows`] left. Scratch: [`output_rows_scratch`]. Writes nothing if it returns an error.
    pub fn output_rows<'y>(
        &self,
        rows: Range<usize>,
        block: &PackedBlock<'_, E>,
        mixed: &[f32],
        y: impl Into<ValuesMut<'y>>,
        workspace: &mut Workspace<'_>,
    ) -> Result<(), Error> {
        let (y, d_in, d_out) = (y.into(), self.layer.weight.cols(), self.layer.weight.rows());
        let (m, width) = (rows.len(), self.layer.shape().mixed_width());
        inside("rows", &rows, self.args.tokens)?;
        exact("mixed", m * width, mixed.len())?;
        block.check([d_in, width])?;
        let residual = self.args.residual.map(|residual| residual.skip(rows.start * d_out).first(m * d_out));
        check_residual(&y, residual)?;
        let x = self.args.x.skip(rows.start * d_in).first(m * d_in);
        let output = Output { y, width: d_out, accumulate: Accumulate::Overwrite, residual };
        let terms = [MatRef::row_major(x, d_in), MatRef::row_major(mixed, width)];
        multiply_block(self.isa, block, output, m, terms, workspace)
    }
}
