//! B into panels, decoded, scaled and narrowed on the way.
//!
//! A source is read in its own direction, a stretch of up to 256 elements at a time (a whole super-block of the K-formats):
//! along n (a row of B: a row of W for dY W) it lands in panels as it is; along k (a column of B: a row of W for X Wᵀ) the
//! columns of a panel are gathered in a small buffer and transposed.

#[cfg(target_arch = "x86_64")]
use super::Values;
use super::drive::Tile;
#[cfg(target_arch = "x86_64")]
use super::pairs::{PairPanels, pairs_across, pairs_along, panels_across, panels_along};
use super::{Element, Source, panels_len};
use crate::error::{Error, at_least, extent};
#[cfg(target_arch = "x86_64")]
use crate::isa::Avx512Bf16;
#[cfg(target_arch = "x86_64")]
use crate::quant::Format;

/// Elements decoded at a time.
const STRETCH: usize = 256;

/// Columns of a panel are a cache line more than 1 KiB apart while they are gathered, or they would share four sets of L1.
pub(super) const COLUMN_STRIDE: usize = STRETCH + 16;

/// Most columns of a panel on any instruction set.
const NR_MAX: usize = 32;

/// Most neighbours along k in a panel.
const ADJACENT_MAX: usize = 2;

/// The neighbours along k of one column, as they lie in a panel: an f32 or two bf16.
pub(super) type Unit = [u8; 4];

/// Packs `scale` · B [k, n] from `source` into `out`, which has at least [`panels_len`] elements.
///
/// Writes nothing if it returns an error.
pub fn pack<E: Element>(
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
        Source::Dense { data, k_stride, n_stride } => {
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
                return Err(Error::Block { operand: "first", block, got: first });
            }
        }
    }
    if k == 0 || n == 0 {
        return Ok(());
    }
    let panel = E::tile(isa);
    let out = bytemuck::cast_slice_mut::<E, u8>(&mut out[..len]);
    #[cfg(target_arch = "x86_64")]
    if let Some(pairs) = E::pairs(isa) {
        let steps = k.next_multiple_of(panel.k_step) / 2;
        let (out, _) = out.as_chunks_mut();
        let panels = PairPanels { out, steps, k, n, scale };
        match source {
            Source::Dense { data, k_stride, n_stride: 1 } => {
                panels_across(pairs, panels, data, k_stride);
                return Ok(());
            }
            Source::Dense { data: Values::Bf16(data), k_stride: 1, n_stride } => {
                let column = |j: usize| bytemuck::cast_slice(&data[j * n_stride..][..k]);
                panels_along(pairs, panels, column);
                return Ok(());
            }
            Source::WeightRows { weight, first } if weight.format() == Format::Bf16 => {
                panels_along(pairs, panels, |j| &weight.stored(first + j)[..2 * k]);
                return Ok(());
            }
            _ => {}
        }
    }
    let (out, _) = out.as_chunks_mut::<4>();
    let plain = E::widened(isa);
    plain.vectorize(
        #[inline(always)]
        || match source {
            Source::Dense { data, k_stride, n_stride: 1 } => {
                across::<E>(
                    isa,
                    out,
                    panel,
                    k,
                    n,
                    scale,
                    #[inline(always)]
                    |p, j, row: &mut [f32]| {
                        data.read(p * k_stride + j, 1, row);
                    },
                );
            }
            Source::Dense { data, k_stride, n_stride } => {
                along::<E>(
                    isa,
                    out,
                    panel,
                    k,
                    n,
                    scale,
                    #[inline(always)]
                    |j, p, column: &mut [f32]| {
                        data.read(j * n_stride + p * k_stride, k_stride, column);
                    },
                );
            }
            Source::WeightRows { weight, first } => {
                along::<E>(
                    isa,
                    out,
                    panel,
                    k,
                    n,
                    scale,
                    #[inline(always)]
                    |j, p, column: &mut [f32]| {
                        weight.decode_with(plain, first + j, p, column);
                    },
                );
            }
            Source::WeightCols { weight, first } => {
                across::<E>(
                    isa,
                    out,
                    panel,
                    k,
                    n,
                    scale,
                    #[inline(always)]
                    |p, j, row: &mut [f32]| {
                        weight.decode_with(plain, p, first + j, row);
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
        end => Err(Error::Range { operand, limit, got: end.unwrap_or(usize::MAX) }),
    }
}

/// Rows of B, a stretch of columns at a time: `read(p, j, row)` fills B[p, j .. j + row.len()].
#[inline(always)]
fn across<E: Element>(
    isa: E::Isa,
    out: &mut [Unit],
    Tile { nr, k_step }: Tile,
    k: usize,
    n: usize,
    scale: f32,
    read: impl Fn(usize, usize, &mut [f32]),
) {
    let steps = k.next_multiple_of(k_step) / E::ADJACENT;
    let mut rows = [[0.0; STRETCH]; ADJACENT_MAX]; // a whole number of panels, so that a panel of 32 is always inside
    for first in (0..n).step_by(STRETCH) {
        let len = STRETCH.min(n - first);
        let panels = &mut out[first * steps..];
        rows.iter_mut().for_each(|row| row[len..].fill(0.0));
        for step in 0..steps {
            for (q, row) in rows.iter_mut().enumerate().take(E::ADJACENT) {
                let p = step * E::ADJACENT + q;
                if p < k {
                    read(p, first, &mut row[..len]);
                } else {
                    row.fill(0.0);
                }
            }
            for (panel, j) in panels.chunks_exact_mut(steps * nr).zip((0..len).step_by(nr)) {
                let group = &mut panel[step * nr..][..nr];
                let [row, next] = &rows;
                #[cfg(target_arch = "x86_64")]
                if let Some(pairs) = E::pairs(isa) {
                    let (Some(row), Some(next)) = (row[j..].first_chunk(), next[j..].first_chunk()) else { continue };
                    let (group, _) = group.as_flattened_mut().as_chunks_mut();
                    pairs_across(pairs, &mut group[0], row, next, scale);
                    continue;
                }
                for ((out, &x), &next) in group.iter_mut().zip(&row[j..j + nr]).zip(&next[j..j + nr]) {
                    *out = E::unit(scale * x, scale * next).to_ne_bytes();
                }
            }
        }
    }
}

/// Columns of B, a stretch of rows at a time: `read(j, p, column)` fills B[p .. p + column.len(), j].
#[inline(always)]
fn along<E: Element>(
    isa: E::Isa,
    out: &mut [Unit],
    tile: Tile,
    k: usize,
    n: usize,
    scale: f32,
    read: impl Fn(usize, usize, &mut [f32]),
) {
    // A width that the compiler knows makes the transposition straight-line code.
    match tile.nr {
        8 => along_width::<E, 8>(out, tile.k_step, k, n, scale, read),
        16 => along_width::<E, 16>(out, tile.k_step, k, n, scale, read),
        _ => {
            #[cfg(target_arch = "x86_64")]
            if let Some(pairs) = E::pairs(isa) {
                return along_pairs(pairs, out, tile.k_step, k, n, scale, read);
            }
            along_width::<E, NR_MAX>(out, tile.k_step, k, n, scale, read)
        }
    }
}

#[inline(always)]
fn along_width<E: Element, const NR: usize>(
    out: &mut [Unit],
    k_step: usize,
    k: usize,
    n: usize,
    scale: f32,
    read: impl Fn(usize, usize, &mut [f32]),
) {
    let steps = k.next_multiple_of(k_step) / E::ADJACENT;
    let mut columns = [[0u32; COLUMN_STRIDE]; NR];
    for (panel, first) in out.chunks_exact_mut(steps * NR).zip((0..n).step_by(NR)) {
        for (part, p) in panel.chunks_mut(STRETCH / E::ADJACENT * NR).zip((0..).step_by(STRETCH)) {
            let len = STRETCH.min(k - k.min(p));
            for (j, column) in columns.iter_mut().enumerate() {
                let mut decoded = [0.0; STRETCH];
                if first + j < n {
                    read(first + j, p, &mut decoded[..len]);
                }
                for (unit, x) in column.iter_mut().zip(decoded.chunks_exact(E::ADJACENT)) {
                    *unit = E::unit(scale * x[0], scale * x[E::ADJACENT - 1]);
                }
            }
            let (rows, _) = part.as_chunks_mut::<NR>();
            transpose(rows, &columns);
        }
    }
}

/// The same for pairs of bf16 in panels of 32, rounded and transposed in registers.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn along_pairs(
    pairs: Avx512Bf16,
    out: &mut [Unit],
    k_step: usize,
    k: usize,
    n: usize,
    scale: f32,
    read: impl Fn(usize, usize, &mut [f32]),
) {
    const STEPS: usize = 16;
    let steps = k.next_multiple_of(k_step) / 2;
    let mut columns = [[0.0f32; COLUMN_STRIDE]; NR_MAX];
    for (panel, first) in out.chunks_exact_mut(steps * NR_MAX).zip((0..n).step_by(NR_MAX)) {
        for (part, p) in panel.chunks_mut(STRETCH / 2 * NR_MAX).zip((0..).step_by(STRETCH)) {
            let len = STRETCH.min(k - k.min(p));
            for (j, column) in columns.iter_mut().enumerate() {
                let read_to = if first + j < n { len } else { 0 };
                if read_to > 0 {
                    read(first + j, p, &mut column[..read_to]);
                }
                column[read_to..STRETCH].fill(0.0);
            }
            for (i, group) in part.chunks_mut(STEPS * NR_MAX).enumerate() {
                let (group, _) = group.as_flattened_mut().as_chunks_mut();
                pairs_along(pairs, group, &columns, i * 2 * STEPS, scale);
            }
        }
    }
}

/// `rows[i][j]` = `columns[j][i]`, in blocks of 4 × 4 that the compiler keeps in registers and shuffles.
#[inline(always)]
fn transpose<const NR: usize>(rows: &mut [[Unit; NR]], columns: &[[u32; COLUMN_STRIDE]; NR]) {
    let (fours, rest) = rows.as_chunks_mut::<4>();
    for (four, rows) in fours.iter_mut().enumerate() {
        for (column_group, j) in columns.as_chunks::<4>().0.iter().zip((0..NR).step_by(4)) {
            let block: [[u32; 4]; 4] = core::array::from_fn(|c| column_group[c].as_chunks::<4>().0[four]);
            for (i, row) in rows.iter_mut().enumerate() {
                let out: [u32; 4] = core::array::from_fn(|c| block[c][i]);
                row[j..j + 4].copy_from_slice(&out.map(u32::to_ne_bytes));
            }
        }
    }
    for (i, row) in rest.iter_mut().enumerate() {
        for (unit, column) in row.iter_mut().zip(columns) {
            *unit = column[fours.len() * 4 + i].to_ne_bytes();
        }
    }
}
