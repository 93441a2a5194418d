//! Panels from rows or columns of f32, for every element type and instruction set.
//!
//! B is read in the direction in which it is stored, up to 256 elements at a time (a whole block of the K-formats). A
//! row-stored B (a row of W for dY W) goes to its panels as it is. The columns of a column-stored B (rows of W for X
//! Wᵀ) are gathered for one panel and then transposed.

#[cfg(target_arch = "x86_64")]
use super::blocking::NR_MAX;
use super::blocking::PanelShape;
use super::element::Element;
#[cfg(target_arch = "x86_64")]
use super::kernel::pack512::{pack_columns, pack_pair_of_rows};
#[cfg(target_arch = "x86_64")]
use crate::isa::Avx512Bf16;

/// How many rows ahead a row-stored matrix is prefetched.
pub(super) const ROWS_AHEAD: usize = 12;

/// Elements that are decoded at a time.
const STRETCH: usize = 256;

/// Elements between two gathered columns: a cache line more than 1 KiB, so that columns use different sets of L1.
const COLUMN_STRIDE: usize = STRETCH + 16;

/// The largest [`Dispatch::ADJACENT`](super::element::Dispatch::ADJACENT).
const ADJACENT_MAX: usize = 2;

/// What a panel holds for one column at a time: an f32, or two bf16 that are neighbours along k.
type Unit = [u8; 4];

/// Panels to be filled with `scale` · B [k, n].
pub(super) struct PanelsMut<'a> {
    pub units: &'a mut [Unit],
    pub shape: PanelShape,
    pub k: usize,
    pub n: usize,
    pub scale: f32,
}

/// Packs a row-stored B in panels of NR columns: `read(p, j, row)` fills `row` with B[p, j ..], and `prefetch(p, j, len)` asks
/// memory for `len` elements from there on, of rows that need not exist.
#[inline(always)]
pub(super) fn pack_row_stored<E: Element, const NR: usize>(
    isa: E::Isa,
    panels: PanelsMut<'_>,
    read: impl Fn(usize, usize, &mut [f32]),
    prefetch: impl Fn(usize, usize, usize),
) {
    let PanelsMut { units, shape: PanelShape { nr, k_step }, k, n, scale } = panels;
    assert_eq!(nr, NR);
    let steps = k.next_multiple_of(k_step) / E::ADJACENT;
    // A stretch is a whole number of panels, so a panel's columns are always inside.
    let mut rows = [[0.0; STRETCH]; ADJACENT_MAX];
    for first in (0..n).step_by(STRETCH) {
        let len = STRETCH.min(n - first);
        let panels = &mut units[first * steps..];
        rows.iter_mut().for_each(|row| row[len..].fill(0.0));
        for step in 0..steps {
            for (q, row) in rows.iter_mut().enumerate().take(E::ADJACENT) {
                let p = step * E::ADJACENT + q;
                // The pieces of rows are too short for the hardware prefetcher.
                prefetch(p + ROWS_AHEAD, first, len);
                if p < k {
                    read(p, first, &mut row[..len]);
                } else {
                    row.fill(0.0);
                }
            }
            for (j, panel) in panels.chunks_exact_mut(steps * NR).enumerate().take(len.div_ceil(NR)) {
                let columns = rows.each_ref().map(|row| &row.as_chunks().0[j]);
                pack_step::<E, NR>(isa, &mut panel.as_chunks_mut().0[step], columns, scale);
            }
        }
    }
}

/// One step along k of a panel, from its columns of one row or two.
#[inline(always)]
fn pack_step<E: Element, const NR: usize>(
    isa: E::Isa,
    units: &mut [Unit; NR],
    [row, next]: [&[f32; NR]; ADJACENT_MAX],
    scale: f32,
) {
    #[cfg(target_arch = "x86_64")]
    if let Some(pairs) = E::pair_packing(isa) {
        let (Some(row), Some(next)) = (row.first_chunk(), next.first_chunk()) else { return };
        let (step, _) = units.as_flattened_mut().as_chunks_mut();
        return pack_pair_of_rows(pairs, &mut step[0], row, next, scale);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = isa; // no other architecture has instructions that pack pairs
    // By way of an array, or the compiler does it one after the other.
    let mut packed = [0; NR];
    for (packed, (&x, &next)) in packed.iter_mut().zip(row.iter().zip(next)) {
        *packed = E::unit(scale * x, scale * next);
    }
    units.iter_mut().zip(packed).for_each(|(unit, packed)| *unit = packed.to_ne_bytes());
}

/// Packs a column-stored B in panels of NR columns: `read(p, j, column)` fills `column` with B[p .., j].
#[inline(always)]
pub(super) fn pack_column_stored<E: Element, const NR: usize>(
    isa: E::Isa,
    panels: PanelsMut<'_>,
    read: impl Fn(usize, usize, &mut [f32]),
) {
    assert_eq!(panels.shape.nr, NR);
    let mut columns = [[0; COLUMN_STRIDE]; NR];
    #[cfg(target_arch = "x86_64")]
    if NR == NR_MAX
        && let Some(pairs) = E::pair_packing(isa)
    {
        let columns = bytemuck::cast_slice_mut(columns.as_flattened_mut()).as_chunks_mut().0;
        let Some(columns) = columns.first_chunk_mut() else { return }; // there are NR = NR_MAX
        return gather_and_transpose_pairs(pairs, panels, columns, read);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = isa;
    gather_and_transpose::<E, NR>(panels, &mut columns, read);
}

/// [`pack_column_stored`] by way of gathered `columns`, whose old values do not matter.
#[inline(always)]
fn gather_and_transpose<E: Element, const NR: usize>(
    panels: PanelsMut<'_>,
    columns: &mut [[u32; COLUMN_STRIDE]; NR],
    read: impl Fn(usize, usize, &mut [f32]),
) {
    let PanelsMut { units, shape: PanelShape { k_step, .. }, k, n, scale } = panels;
    let steps = k.next_multiple_of(k_step) / E::ADJACENT;
    for (panel, first) in units.chunks_exact_mut(steps * NR).zip((0..n).step_by(NR)) {
        for (stretch, p) in panel.chunks_mut(STRETCH / E::ADJACENT * NR).zip((0..).step_by(STRETCH)) {
            let len = STRETCH.min(k - k.min(p));
            for (j, column) in columns.iter_mut().enumerate() {
                let mut decoded = [0.0; STRETCH];
                if first + j < n {
                    read(p, first + j, &mut decoded[..len]);
                }
                for (unit, x) in column.iter_mut().zip(decoded.chunks_exact(E::ADJACENT)) {
                    *unit = E::unit(scale * x[0], scale * x[E::ADJACENT - 1]);
                }
            }
            let (rows, _) = stretch.as_chunks_mut::<NR>();
            transpose(rows, columns);
        }
    }
}

/// [`pack_column_stored`] for panels of bf16 pairs in 32 columns, rounded and transposed in registers.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn gather_and_transpose_pairs(
    pairs: Avx512Bf16,
    panels: PanelsMut<'_>,
    columns: &mut [[f32; COLUMN_STRIDE]; NR_MAX],
    read: impl Fn(usize, usize, &mut [f32]),
) {
    const STEPS: usize = 16;
    let PanelsMut { units, shape: PanelShape { k_step, .. }, k, n, scale } = panels;
    let steps = k.next_multiple_of(k_step) / 2;
    for (panel, first) in units.chunks_exact_mut(steps * NR_MAX).zip((0..n).step_by(NR_MAX)) {
        for (stretch, p) in panel.chunks_mut(STRETCH / 2 * NR_MAX).zip((0..).step_by(STRETCH)) {
            let len = STRETCH.min(k - k.min(p));
            for (j, column) in columns.iter_mut().enumerate() {
                let read_to = if first + j < n { len } else { 0 };
                if read_to > 0 {
                    read(p, first + j, &mut column[..read_to]);
                }
                column[read_to..STRETCH].fill(0.0);
            }
            for (i, group) in stretch.chunks_mut(STEPS * NR_MAX).enumerate() {
                let (group, _) = group.as_flattened_mut().as_chunks_mut();
                pack_columns(pairs, group, columns, i * 2 * STEPS, scale);
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
