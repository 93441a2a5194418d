//! B into panels, decoded, scaled and narrowed on the way.
//!
//! A source is read in its own direction, a stretch of up to 256 elements at a time (a whole super-block of the K-formats):
//! along n (a row of B: a row of W for dY W) it lands in panels as it is; along k (a column of B: a row of W for X Wᵀ) the
//! columns of a panel are gathered in a small buffer and transposed.

use super::drive::Tile;
use super::{Multiplicand, Source, panels_len};
use crate::error::{Error, at_least, extent};

/// Elements decoded at a time.
const STRETCH: usize = 256;

/// Most columns of a panel on any instruction set.
const NR_MAX: usize = 32;

/// Most neighbours along k in a panel.
const ADJACENT_MAX: usize = 2;

/// Packs `scale` · B [k, n] from `source` into `out`, which has at least [`panels_len`] elements.
///
/// Writes nothing if it returns an error.
pub fn pack<E: Multiplicand>(
    isa: E::Isa,
    out: &mut [E],
    k: usize,
    n: usize,
    source: Source<'_>,
    scale: f32,
) -> Result<(), Error> {
    let len = panels_len::<E>(isa, k, n);
    at_least("panels", len, out.len())?;
    match source {
        Source::Dense {
            data,
            k_stride,
            n_stride,
        } => {
            at_least("b", extent(k, n, k_stride, n_stride)?, data.len())?;
        }
        Source::WeightRows { weight, first } => {
            inside("weight rows", weight.rows(), first, n)?;
            inside("weight columns", weight.cols(), 0, k)?;
        }
        Source::WeightCols { weight, first } => {
            inside("weight columns", weight.cols(), first, n)?;
            inside("weight rows", weight.rows(), 0, k)?;
            let block = weight.format().first_col_multiple();
            if !first.is_multiple_of(block) {
                return Err(Error::Block {
                    operand: "first",
                    block,
                    got: first,
                });
            }
        }
    }
    if k == 0 || n == 0 {
        return Ok(());
    }
    let panel = E::tile(isa);
    let out = &mut out[..len];
    E::widened(isa).vectorize(
        #[inline(always)]
        || match source {
            Source::Dense {
                data,
                k_stride,
                n_stride: 1,
            } => {
                across(
                    out,
                    panel,
                    k,
                    n,
                    scale,
                    #[inline(always)]
                    |p, j, row: &mut [f32]| {
                        row.copy_from_slice(&data[p * k_stride + j..][..row.len()]);
                    },
                );
            }
            Source::Dense {
                data,
                k_stride,
                n_stride,
            } => {
                along(
                    out,
                    panel,
                    k,
                    n,
                    scale,
                    #[inline(always)]
                    |j, p, column: &mut [f32]| {
                        let from = &data[j * n_stride + p * k_stride..];
                        for (q, out) in column.iter_mut().enumerate() {
                            *out = from[q * k_stride];
                        }
                    },
                );
            }
            Source::WeightRows { weight, first } => {
                along(
                    out,
                    panel,
                    k,
                    n,
                    scale,
                    #[inline(always)]
                    |j, p, column: &mut [f32]| {
                        weight.decode(first + j, p, column);
                    },
                );
            }
            Source::WeightCols { weight, first } => {
                across(
                    out,
                    panel,
                    k,
                    n,
                    scale,
                    #[inline(always)]
                    |p, j, row: &mut [f32]| {
                        weight.decode(p, first + j, row);
                    },
                );
            }
        },
    );
    Ok(())
}

fn inside(operand: &'static str, limit: usize, first: usize, count: usize) -> Result<(), Error> {
    match first.checked_add(count) {
        Some(end) if end <= limit => Ok(()),
        end => Err(Error::Range {
            operand,
            limit,
            got: end.unwrap_or(usize::MAX),
        }),
    }
}

/// Rows of B, a stretch of columns at a time: `read(p, j, row)` fills B[p, j .. j + row.len()].
#[inline(always)]
fn across<E: Multiplicand>(
    out: &mut [E],
    Tile { nr, k_step }: Tile,
    k: usize,
    n: usize,
    scale: f32,
    read: impl Fn(usize, usize, &mut [f32]),
) {
    let panel_len = k.next_multiple_of(k_step) * nr;
    for first in (0..n).step_by(STRETCH) {
        let len = STRETCH.min(n - first);
        let panels = &mut out[first * (panel_len / nr)..];
        for p in (0..k.next_multiple_of(k_step)).step_by(E::ADJACENT) {
            let mut rows = [[0.0; STRETCH]; ADJACENT_MAX];
            for (q, row) in rows
                .iter_mut()
                .enumerate()
                .take(E::ADJACENT.min(k.saturating_sub(p)))
            {
                read(p + q, first, &mut row[..len]);
            }
            for (panel, j) in panels.chunks_exact_mut(panel_len).zip((0..len).step_by(nr)) {
                let group = &mut panel[p * nr..][..E::ADJACENT * nr];
                for (i, out) in group.iter_mut().enumerate() {
                    *out = E::narrow(scale * rows[i % E::ADJACENT][j + i / E::ADJACENT]);
                }
            }
        }
    }
}

/// Columns of B, a stretch of rows at a time: `read(j, p, column)` fills B[p .. p + column.len(), j].
#[inline(always)]
fn along<E: Multiplicand>(
    out: &mut [E],
    Tile { nr, k_step }: Tile,
    k: usize,
    n: usize,
    scale: f32,
    read: impl Fn(usize, usize, &mut [f32]),
) {
    let k_padded = k.next_multiple_of(k_step);
    for (panel, first) in out.chunks_exact_mut(k_padded * nr).zip((0..n).step_by(nr)) {
        for (part, p) in panel
            .chunks_mut(STRETCH * nr)
            .zip((0..k_padded).step_by(STRETCH))
        {
            let mut columns = [[0.0; STRETCH]; NR_MAX];
            let len = STRETCH.min(k - p.min(k));
            for (j, column) in columns.iter_mut().enumerate().take(nr.min(n - first)) {
                read(first + j, p, &mut column[..len]);
            }
            for (group, out) in part.chunks_exact_mut(E::ADJACENT * nr).enumerate() {
                for (i, out) in out.iter_mut().enumerate() {
                    *out = E::narrow(
                        scale * columns[i / E::ADJACENT][group * E::ADJACENT + i % E::ADJACENT],
                    );
                }
            }
        }
    }
}
