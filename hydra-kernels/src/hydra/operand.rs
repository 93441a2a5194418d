//! The right operands of the operator's products, which are packed into panels, and the blocks in which that is done.

use super::layer::inside;
use crate::error::{Error, exact};
use crate::gemm::{Element, PANEL_ALIGN, Panels, Source, pack, panels_bound, panels_len};
use crate::workspace::{Scratch, Workspace};
use core::ops::Range;

/// Values in the panels of a block of columns: a share of L3 that leaves room for the rows.
pub const PANEL_VALUES: usize = 1024 * 1024;

/// Fewest columns in a block: all rows are read again for each block.
pub const MIN_BLOCK: usize = 512;

/// Columns of an operand with `k` rows that are packed at a time, a multiple of [`PANEL_ALIGN`].
pub const fn column_block(k: usize) -> usize {
    let columns = PANEL_VALUES / if k == 0 { 1 } else { k };
    let columns = if columns < MIN_BLOCK { MIN_BLOCK } else { columns };
    columns.next_multiple_of(PANEL_ALIGN)
}

/// Rows that are whole micro-tiles on every instruction set, for operands of type `E`.
pub const fn row_step<E: Element>() -> usize {
    if size_of::<E>() == size_of::<f32>() { 48 } else { 32 }
}

/// Most [steps](row_step) in a range of rows, so that what a range has computed is still in L2 when its next product
/// reads it.
pub const MAX_ROW_STEPS: usize = 16;

/// Rows that the single-threaded passes take at a time.
pub(super) const fn row_block<E: Element>() -> usize {
    MAX_ROW_STEPS * row_step::<E>()
}

/// `0..total` in ranges of `len`, the last of which may be shorter; one empty range if `total` is 0.
pub(super) fn ranges(total: usize, len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..total.max(1)).step_by(len).map(move |first| first..total.min(first + len))
}

/// The right operand [k, n] of a product: part of a frozen weight or of an adapter, as it is stored.
#[derive(Clone, Copy)]
pub struct Operand<'a, E: Element> {
    pub(super) isa: E::Isa,
    pub(super) source: Source<'a>,
    pub(super) k: usize,
    pub(super) n: usize,
    pub(super) scale: f32,
}

impl<'a, E: Element> Operand<'a, E> {
    /// `scale` · the matrix [k, n] that `source` describes.
    pub fn new(isa: E::Isa, [k, n]: [usize; 2], source: Source<'a>, scale: f32) -> Self {
        Operand { isa, source, k, n, scale }
    }

    /// Columns.
    pub fn columns(&self) -> usize {
        self.n
    }

    /// Elements in the panels of `columns` columns.
    pub fn panels_len(&self, columns: usize) -> usize {
        panels_len::<E>(self.isa, self.k, columns)
    }

    /// Packs `columns`, which begin at a multiple of [`PANEL_ALIGN`], into `out` of [`Operand::panels_len`] elements.
    ///
    /// Ranges that follow each other have panels that follow each other, so several threads may pack one operand.
    /// Writes nothing if it returns an error.
    pub fn pack(&self, columns: Range<usize>, out: &mut [E]) -> Result<(), Error> {
        inside("columns", &columns, self.n)?;
        if !columns.start.is_multiple_of(PANEL_ALIGN) {
            return Err(Error::Block { operand: "columns", block: PANEL_ALIGN, got: columns.start });
        }
        exact("panels", self.panels_len(columns.len()), out.len())?;
        if columns.is_empty() {
            return Ok(());
        }
        let source = match self.source {
            Source::Dense { data, k_stride, n_stride } => {
                let first = columns.start.saturating_mul(n_stride).min(data.len());
                Source::Dense { data: data.skip(first), k_stride, n_stride }
            }
            Source::WeightRows { weight, first } => {
                Source::WeightRows { weight, first: first.saturating_add(columns.start) }
            }
            Source::WeightCols { weight, first } => {
                Source::WeightCols { weight, first: first.saturating_add(columns.start) }
            }
        };
        pack(self.isa, out, self.k, columns.len(), source, self.scale)
    }

    /// The operand as products read it, after all its columns have been packed into `data`.
    pub fn panels<'p>(&self, data: &'p [E]) -> Result<Panels<'p, E>, Error> {
        exact("panels", self.panels_len(self.n), data.len())?;
        Ok(Panels::new(data, self.k, self.n))
    }

    /// Packs all columns into the workspace.
    pub(super) fn pack_whole<'p>(&self, workspace: &mut Workspace<'p>) -> Result<Panels<'p, E>, Error> {
        let data = workspace.take_lines::<E>(self.panels_len(self.n))?;
        self.pack(0..self.n, data)?;
        self.panels(data)
    }

    /// An error unless `panels` have this operand's size.
    pub(super) fn check(&self, panels: &Panels<'_, E>) -> Result<(), Error> {
        exact("rows of panels", self.k, panels.k)?;
        exact("rows of panels", self.k, panels.packed_k)?;
        exact("columns of panels", self.n, panels.n)?;
        exact("panels", self.panels_len(self.n), panels.data.len())
    }
}

/// What [`Operand::pack_whole`] takes on any instruction set.
pub(super) const fn panels_scratch<E: Element>(k: usize, n: usize) -> Scratch {
    Scratch::lines::<E>(panels_bound(k, n))
}

/// The smaller of two sizes.
pub(super) const fn least(a: usize, b: usize) -> usize {
    if a < b { a } else { b }
}
