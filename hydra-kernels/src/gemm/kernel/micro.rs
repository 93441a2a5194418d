//! The interface between the driver and a micro-kernel: MR × NR of C from a micro-panel of A and a panel of B.

use crate::gemm::bf16::{PackedA, round_rows};
use crate::gemm::blocking::{A_ROW_BYTES, KBlock, KC_BYTES};
use crate::gemm::view::{Accumulate, Values};
use crate::isa::Isa;
use half::bf16;

/// A micro-kernel: the operations that differ between instruction sets.
pub(in crate::gemm) trait MicroKernel: Copy {
    /// The element type of B's panels.
    type B: bytemuck::Pod;
    /// The element type of A's micro-panels: `B`, or f32 where the instruction set has no product of `B`.
    type A: PackedA<Self::B>;
    /// Rows of a tile of C.
    const MR: usize;
    /// Columns of a tile of C, and of a panel of B.
    const NR: usize;
    /// Panels are padded to a multiple of this many rows of k.
    const K_STEP: usize;
    /// The most bytes of a row of A in one block of k; at most the default.
    const KC_BYTES: usize = KC_BYTES;

    /// The f32 instruction set that this one contains.
    fn isa(self) -> Isa;

    /// Packs rows `first_row .. first_row + rows` of a block's A: `panel[row · a_stride + q]` = element (row, q) for q
    /// below the block's length, and zeros up to its depth. May overwrite up to 64 bytes behind that in each row.
    fn pack_a(self, panel: &mut [Self::A], block: &KBlock<'_, '_, Self::B>, first_row: usize, rows: usize) {
        self.isa().vectorize(
            #[inline(always)]
            || pack_rows::<Self>(panel, block, first_row, rows),
        );
    }

    /// C[i, j] = or += Σ over pairs of panels Σ_p `a[i · a_stride + p]` · b[p, j], for i < `c.rows` ≤ MR, j < `c.cols`
    /// ≤ NR and p < `k`, a multiple of K_STEP.
    fn multiply(self, panels: &[PanelPair<'_, Self>], c: CTile<'_>);

    /// `c[i · stride + j]` = `sums[i · NR + j]` rounded, for j < `cols` and every row of `sums`.
    fn round(self, c: &mut [bf16], stride: usize, sums: &[f32], cols: usize) {
        round_rows(self.isa(), c, stride, sums, Self::NR, cols);
    }
}

/// The operands of one block of k: a micro-panel of A and a panel of B.
#[derive(Clone, Copy)]
pub(in crate::gemm) struct PanelPair<'a, K: MicroKernel> {
    pub k: usize,
    pub a: &'a [K::A],
    pub b: &'a [K::B],
}

/// A tile of C.
pub(in crate::gemm) struct CTile<'a> {
    pub data: &'a mut [f32],
    pub stride: usize,
    pub rows: usize,
    pub cols: usize,
    pub accumulate: Accumulate,
}

impl CTile<'_> {
    /// The bounds contract of [`MicroKernel::multiply`], asserted once for each tile.
    #[inline(always)]
    pub fn check<K: MicroKernel>(&self, panels: &[PanelPair<'_, K>]) {
        assert!((1..=K::MR).contains(&self.rows) && (1..=K::NR).contains(&self.cols));
        assert!(self.data.len() >= (self.rows - 1) * self.stride + self.cols);
        for PanelPair { k, a, b } in panels {
            assert!(k.is_multiple_of(K::K_STEP) && b.len() >= k * K::NR);
            assert!(a.len() >= (self.rows - 1) * a_stride::<K::A>() + k);
        }
    }
}

/// Multiplies one pair of panels after the other, for kernels that would run out of registers in one loop over all.
#[inline(always)]
pub(super) fn one_by_one<K: MicroKernel>(
    panels: &[PanelPair<'_, K>],
    c: CTile<'_>,
    tile: impl Fn(&PanelPair<'_, K>, CTile<'_>),
) {
    let CTile { data, stride, rows, cols, mut accumulate } = c;
    for pair in panels {
        tile(pair, CTile { data: &mut *data, stride, rows, cols, accumulate });
        accumulate = Accumulate::Add;
    }
}

/// Elements between two rows of a micro-panel of A.
pub(in crate::gemm) const fn a_stride<A>() -> usize {
    A_ROW_BYTES / size_of::<A>()
}

/// [`MicroKernel::pack_a`] for any strides, to be inlined into a vectorized caller.
#[inline(always)]
pub(super) fn pack_rows<K: MicroKernel>(
    panel: &mut [K::A],
    block: &KBlock<'_, '_, K::B>,
    first_row: usize,
    rows: usize,
) {
    let a = block.a();
    let first = block.start(first_row);
    let strides = (a.row_stride, a.col_stride);
    match a.data {
        Values::F32(data) => copy::<f32, K::A>(panel, &data[first..], strides, rows, block.len, K::A::from_f32),
        Values::Bf16(data) => copy::<bf16, K::A>(panel, &data[first..], strides, rows, block.len, K::A::from_bf16),
    }
    for out in panel.chunks_mut(a_stride::<K::A>()).take(rows) {
        out[block.len..block.depth].fill(bytemuck::Zeroable::zeroed());
    }
}

/// `panel[row · a_stride + q]` = `from[row · row_stride + q · col_stride]`, converted.
#[inline(always)]
fn copy<E: Copy, A>(
    panel: &mut [A],
    from: &[E],
    (row_stride, col_stride): (usize, usize),
    rows: usize,
    k: usize,
    convert: impl Fn(E) -> A,
) {
    let stride = a_stride::<A>();
    if row_stride == 1 && col_stride != 1 {
        return copy_columns(panel, from, col_stride, rows, k, convert);
    }
    for (row, out) in panel.chunks_mut(stride).take(rows).enumerate() {
        let from = &from[row * row_stride..];
        if col_stride == 1 {
            for (out, &a) in out.iter_mut().zip(&from[..k]) {
                *out = convert(a);
            }
        } else {
            for (q, out) in out[..k].iter_mut().enumerate() {
                *out = convert(from[q * col_stride]);
            }
        }
    }
}

/// [`copy`] of a column-major A: along its columns, in blocks of 4 × 4 that the compiler keeps in registers and shuffles.
#[inline(always)]
fn copy_columns<E: Copy, A>(
    panel: &mut [A],
    from: &[E],
    col_stride: usize,
    rows: usize,
    k: usize,
    convert: impl Fn(E) -> A,
) {
    let stride = a_stride::<A>();
    let whole = if rows.is_multiple_of(4) { k / 4 * 4 } else { 0 };
    for q in (0..whole).step_by(4) {
        for row in (0..rows).step_by(4) {
            let mut block = [[from[0]; 4]; 4];
            for (i, column) in block.iter_mut().enumerate() {
                column.copy_from_slice(&from[(q + i) * col_stride + row..][..4]);
            }
            for i in 0..4 {
                let out = &mut panel[(row + i) * stride + q..][..4];
                out.iter_mut().zip(&block).for_each(|(out, column)| *out = convert(column[i]));
            }
        }
    }
    for q in whole..k {
        for (row, &a) in from[q * col_stride..][..rows].iter().enumerate() {
            panel[row * stride + q] = convert(a);
        }
    }
}
