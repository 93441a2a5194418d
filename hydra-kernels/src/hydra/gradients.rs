//! The phases of the adapter's gradients: products over all tokens, by columns.
//!
//! ```text
//! dB += scale · dyᵀ mixed       dA += d_lora_downᵀ D(x)       dR += dlogitsᵀ x
//! ```
//!
//! Each is computed transposed, [few rows, tokens] · [tokens, a range of columns]. Sums over tokens run in blocks of a
//! fixed length, so that they don't depend on how columns are cut.

use super::backward::Backward;
use super::dropout::dropout_rows;
use super::layer::{AdapterRef, StackedPart, inside};
use super::operand::{least, panels_scratch};
use crate::error::{Error, exact};
use crate::gemm::{Accumulate, Element, MatRef, PANEL_ALIGN, Panels, Source, Term, Values, gemm, pack, panels_len};
use crate::shape::HydraShape;
use crate::workspace::{Scratch, Workspace};
use core::ops::Range;

/// Tokens that are summed together.
const fn token_block<E>() -> usize {
    1024 / size_of::<E>()
}

/// Columns of a range at most: with a block of tokens, their panels are 256 KiB.
pub const GRADIENT_COLUMNS: usize = 8 * PANEL_ALIGN;

/// Scratch of [`Backward::db_columns`] for `columns` columns of y.
pub const fn db_columns_scratch<E: Element>(shape: &HydraShape, tokens: usize, columns: usize) -> Scratch {
    sums_scratch(shape.mixed_width(), columns).and(product_scratch::<E>(tokens, columns))
}

/// Scratch of [`Backward::stacked_columns`] for `columns` columns of x.
pub const fn stacked_columns_scratch<E: Element>(tokens: usize, columns: usize) -> Scratch {
    product_scratch::<E>(tokens, columns)
}

const fn product_scratch<E: Element>(tokens: usize, columns: usize) -> Scratch {
    panels_scratch::<E>(least(tokens, token_block::<E>()), columns)
}

const fn sums_scratch(rows: usize, columns: usize) -> Scratch {
    Scratch::lines::<f32>(rows.saturating_mul(columns))
}

impl<E: Element> Backward<'_, E> {
    /// `db` [columns, mixed_width], dB's rows of these `columns` of y, += scale · dyᵀ mixed.
    ///
    /// `mixed` [tokens, mixed_width] is what [`Backward::state_rows`] left. Scratch: [`db_columns_scratch`]. Writes
    /// nothing if it returns an error.
    pub fn db_columns(
        &self,
        columns: Range<usize>,
        mixed: &[f32],
        db: &mut [f32],
        workspace: &mut Workspace<'_>,
    ) -> Result<(), Error> {
        let Some(AdapterRef { shape, scale, .. }) = self.layer.adapter else { return Ok(()) };
        let (n, width) = (columns.len(), shape.mixed_width());
        inside("columns", &columns, shape.d_out)?;
        exact("mixed", self.args.tokens * width, mixed.len())?;
        exact("db", n * width, db.len())?;
        workspace.require(db_columns_scratch::<E>(&shape, self.args.tokens, n))?;
        let mut workspace = workspace.reborrow();
        let sums = workspace.take_lines::<f32>(n * width)?;
        let dy = Columns { data: self.args.dy, width: shape.d_out, columns };
        self.sum_over_tokens(MatRef::transposed(mixed, width), width, dy, sums, &mut workspace)?;
        // dB's rows are the product's columns.
        for (column, db) in db.chunks_exact_mut(width).enumerate() {
            db.iter_mut().enumerate().for_each(|(j, db)| *db += scale * sums[j * n + column]);
        }
        Ok(())
    }

    /// The rows of \[A; R\] by what they read. Without dropout on A's input all read x, and the second part is empty.
    pub fn stacked_parts(&self) -> [StackedPart; 2] {
        self.layer.stacked_parts(&self.args.dropouts)
    }

    /// Writes the rows `rows` of A's input after dropout, not yet scaled by 1 / (1 − p): `dropped` [rows, d_in]. Does
    /// nothing without that dropout.
    pub fn dropped_rows(&self, rows: Range<usize>, dropped: &mut [E]) -> Result<(), Error> {
        let (Some(dropout), d_in) = (self.args.dropouts.input, self.layer.weight.cols()) else { return Ok(()) };
        inside("rows", &rows, self.args.tokens)?;
        let x = self.args.x.skip(rows.start * d_in).first(rows.len() * d_in);
        dropout_rows(E::widened(self.isa), dropped, x, d_in, dropout.skip(rows.start))
    }

    /// `sums` [part's rows, columns] = d_adapter_stateᵀ x, or the dropped x, for these `columns` of x;
    /// [`StackedPart::add_to`] adds them to the gradient.
    ///
    /// `d_adapter_state` [tokens, state_width] is what [`Backward::state_rows`] left, and `dropped` [tokens, d_in] what
    /// [`Backward::dropped_rows`] left; it is read if the part [reads it](StackedPart::reads_dropped). Scratch:
    /// [`stacked_columns_scratch`]. Writes nothing if it returns an error.
    pub fn stacked_columns(
        &self,
        part: &StackedPart,
        columns: Range<usize>,
        d_adapter_state: &[f32],
        dropped: &[E],
        sums: &mut [f32],
        workspace: &mut Workspace<'_>,
    ) -> Result<(), Error> {
        let (shape, tokens) = (self.layer.shape(), self.args.tokens);
        let width = shape.state_width();
        inside("columns", &columns, shape.d_in)?;
        inside("rows of the state", &(part.first..part.first + part.rows), width)?;
        exact("d_adapter_state", tokens * width, d_adapter_state.len())?;
        exact("sums", part.rows * columns.len(), sums.len())?;
        let data = if part.reads_dropped() { E::as_values(dropped) } else { self.args.x };
        exact("dropped", self.args.x.len(), data.len())?;
        let rows = MatRef::transposed(&d_adapter_state[part.first.min(d_adapter_state.len())..], width);
        let x = Columns { data, width: shape.d_in, columns };
        self.sum_over_tokens(rows, part.rows, x, sums, workspace)
    }

    /// `sums` [height, columns] = `rows` [height, tokens] · `x` [tokens, columns].
    fn sum_over_tokens(
        &self,
        rows: MatRef<'_>,
        height: usize,
        x: Columns<'_>,
        sums: &mut [f32],
        workspace: &mut Workspace<'_>,
    ) -> Result<(), Error> {
        let (isa, tokens, n) = (self.isa, self.args.tokens, x.columns.len());
        let mut workspace = workspace.reborrow();
        let block = token_block::<E>();
        let panels = workspace.take_lines::<E>(panels_len::<E>(isa, block.min(tokens), n))?;
        sums.fill(0.0);
        for t in (0..tokens).step_by(block) {
            let k = block.min(tokens - t);
            let data = x.data.skip((t * x.width + x.columns.start).min(x.data.len()));
            pack(isa, panels, k, n, Source::Dense { data, k_stride: x.width, n_stride: 1 }, 1.0)?;
            let a = MatRef { data: rows.data.skip(t * rows.col_stride), ..rows };
            let term = Term { a, b: Panels::new(&*panels, k, n) };
            gemm(isa, &mut *sums, n, height, n, Accumulate::Add, &[term])?;
        }
        Ok(())
    }
}

/// Some columns of a row-major matrix.
struct Columns<'a> {
    data: Values<'a>,
    width: usize,
    columns: Range<usize>,
}

impl StackedPart {
    /// Adds `sums` [rows, columns] of [`Backward::stacked_columns`] to these `columns` of `da` [stacked_rows, d_in].
    pub fn add_to(&self, da: &mut [f32], d_in: usize, columns: Range<usize>, sums: &[f32]) -> Result<(), Error> {
        inside("columns", &columns, d_in)?;
        inside("rows of da", &(self.first..self.first + self.rows), da.len() / d_in.max(1))?;
        exact("sums", self.rows * columns.len(), sums.len())?;
        if columns.is_empty() {
            return Ok(());
        }
        let rows = da[self.first * d_in..].chunks_exact_mut(d_in);
        for (da, sums) in rows.zip(sums.chunks_exact(columns.len())) {
            da[columns.clone()].iter_mut().zip(sums).for_each(|(da, sum)| *da += self.factor * sum);
        }
        Ok(())
    }
}
