//! The frozen product and, as a second term of the same sum, the adapter's: for a range of rows and a block of columns.

use super::operand::Operand;
use crate::error::{Error, exact, product};
use crate::gemm::{Accumulate, Element, MatRef, Panels, Term, Values, ValuesMut, gemm};
use crate::workspace::{Scratch, Workspace};
use core::ops::Range;

/// A product with more than this many rows of W into bf16 is summed in f32 outside the result: with all of k at a time,
/// the panels of few columns would fit in L2; with a part of k at a time, the sums have to be kept.
const DEEP: usize = 2048;

/// The operands of a block of columns of the result: the frozen weight's and the adapter's.
///
/// Pack both, then give the panels to [`Block::packed`].
#[derive(Clone, Copy)]
pub struct Block<'a, E: Element> {
    pub(super) first: usize,
    /// Part of W.
    pub frozen: Operand<'a, E>,
    /// The adapter's term, with as many columns. It has no rows if the layer has no adapter.
    pub adapter: Operand<'a, E>,
}

impl<E: Element> Block<'_, E> {
    /// The block as products read it, after all columns of its operands have been packed.
    pub fn packed<'p>(&self, frozen: &'p [E], adapter: &'p [E]) -> Result<PackedBlock<'p, E>, Error> {
        let (frozen, adapter) = (self.frozen.panels(frozen)?, self.adapter.panels(adapter)?);
        Ok(PackedBlock { first: self.first, frozen, adapter })
    }

    /// Packs both operands into the workspace.
    pub(super) fn pack_whole<'p>(&self, workspace: &mut Workspace<'p>) -> Result<PackedBlock<'p, E>, Error> {
        let (frozen, adapter) = (self.frozen.pack_whole(workspace)?, self.adapter.pack_whole(workspace)?);
        Ok(PackedBlock { first: self.first, frozen, adapter })
    }
}

/// A packed [`Block`], which any number of threads may multiply rows by.
#[derive(Clone, Copy)]
pub struct PackedBlock<'p, E: Element> {
    first: usize,
    frozen: Panels<'p, E>,
    adapter: Panels<'p, E>,
}

impl<E: Element> PackedBlock<'_, E> {
    /// An error unless the operands have these numbers of rows.
    pub(super) fn check(&self, [frozen, adapter]: [usize; 2]) -> Result<(), Error> {
        exact("rows of the frozen operand", frozen, self.frozen.k)?;
        exact("rows of the adapter's operand", adapter, self.adapter.k)
    }
}

/// Rows of a result.
pub(super) struct Output<'y> {
    /// [rows, width].
    pub y: ValuesMut<'y>,
    pub width: usize,
    /// Whether the product is added to `y`; not used with a residual.
    pub accumulate: Accumulate,
    /// What the product is added to instead, [rows, width].
    pub residual: Option<Values<'y>>,
}

/// Scratch of a block's product for `rows` rows and `columns` columns of a result of type `Y`; W has `k` rows.
pub(super) const fn block_scratch<Y>(k: usize, rows: usize, columns: usize) -> Scratch {
    let outside = k > DEEP && size_of::<Y>() < size_of::<f32>();
    Scratch::lines::<f32>(if outside { rows.saturating_mul(columns) } else { 0 })
}

/// The block's columns of `output` = residual or old value + `x` · frozen + `z` · adapter; x and z have `m` rows.
///
/// Writes nothing if it returns an error.
pub(super) fn multiply_block<E: Element>(
    isa: E::Isa,
    block: &PackedBlock<'_, E>,
    mut output: Output<'_>,
    m: usize,
    [x, z]: [MatRef<'_>; 2],
    workspace: &mut Workspace<'_>,
) -> Result<(), Error> {
    let (width, columns) = (output.width, block.frozen.n);
    exact("rows of the result", product(m, width)?, output.y.len())?;
    if block.first + columns > width {
        return Err(Error::Range { operand: "columns", limit: width, got: block.first + columns });
    }
    if m == 0 || columns == 0 {
        return Ok(());
    }
    let terms = [Term { a: x, b: block.frozen }, Term { a: z, b: block.adapter }];
    let terms = if block.adapter.k == 0 { &terms[..1] } else { &terms };
    let deep = block.frozen.k > DEEP && output.accumulate == Accumulate::Overwrite && output.residual.is_none();
    match output.y {
        ValuesMut::Bf16(y) if deep => {
            let sums = workspace.reborrow().take_lines::<f32>(m * columns)?;
            gemm(isa, &mut *sums, columns, m, columns, Accumulate::Overwrite, terms)?;
            for (y, sums) in y.chunks_mut(width).zip(sums.chunks_exact(columns)) {
                E::narrow_sums(isa, &mut y[block.first..block.first + columns], sums)?;
            }
            Ok(())
        }
        ref mut y => {
            let accumulate = match output.residual {
                // Copied here, so that the product finds it in the cache.
                Some(residual) => {
                    copy_columns(y.reborrow(), residual, width, block.first..block.first + columns)?;
                    Accumulate::Add
                }
                None => output.accumulate,
            };
            gemm(isa, y.reborrow().skip(block.first), width, m, columns, accumulate, terms)
        }
    }
}

/// An error unless `residual` can be copied to `y`.
pub(super) fn check_residual(y: &ValuesMut<'_>, residual: Option<Values<'_>>) -> Result<(), Error> {
    match (y, residual) {
        (_, None) | (ValuesMut::F32(_), Some(Values::F32(_))) | (ValuesMut::Bf16(_), Some(Values::Bf16(_))) => Ok(()),
        _ => Err(Error::Shape("a residual is of the result's type")),
    }
}

fn copy_columns(y: ValuesMut<'_>, from: Values<'_>, width: usize, columns: Range<usize>) -> Result<(), Error> {
    fn copy<T: Copy>(y: &mut [T], from: &[T], width: usize, columns: Range<usize>) {
        for (y, from) in y.chunks_exact_mut(width).zip(from.chunks_exact(width)) {
            y[columns.clone()].copy_from_slice(&from[columns.clone()]);
        }
    }
    check_residual(&y, Some(from))?;
    match (y, from) {
        (ValuesMut::F32(y), Values::F32(from)) => copy(y, from, width, columns),
        (ValuesMut::Bf16(y), Values::Bf16(from)) => copy(y, from, width, columns),
        _ => {}
    }
    Ok(())
}
