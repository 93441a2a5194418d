//! The loops around a micro-kernel, the same for every element type and instruction set but AMX.

use super::convert::{Held, round_rows, widen_rows};
use super::drive::Product;
use super::parts::{Block, Cut, Part, depth};
use super::{Accumulate, Element, Values};
use crate::isa::Isa;
use half::bf16;

/// Most rows in a tile of C on any instruction set.
pub(super) const MR_MAX: usize = 12;

/// Bytes of a row of A in a tile that one part of k takes at most: 12 of them are 18 KiB of a 32 KiB L1, the rest is for B's stream.
const PART_BYTES: usize = 1536;

/// Bytes of a second part that joins it.
const JOINED_BYTES: usize = 256;

/// From a row of a tile of A to the next, in bytes: an odd number of cache lines, so that rows fall into different sets.
const A_ROW_BYTES: usize = PART_BYTES + JOINED_BYTES + 64;

/// B's panels that stay in L2 (of 1 MiB or more) while tiles of A pass: half of it.
const B_BYTES: usize = 512 * 1024;

/// The most columns whose sums wait in f32 while other blocks of k are added.
const SUMS_COLUMNS: usize = 512;

/// With fewer columns of a deep product in L2, A would be read too often.
const SUMS_COLUMNS_LEAST: usize = 96;

/// A micro-kernel: `rows` × NR of C from tiles of A and panels of B.
pub(super) trait Micro: Copy {
    /// The type of B and of the panels.
    type E: Element;
    /// What a tile of A holds: E, or f32 where the instruction set has no product of E.
    type A: Held<Self::E>;
    const MR: usize;
    const NR: usize;
    const K_STEP: usize;

    /// The f32 instruction set that this one contains.
    fn isa(self) -> Isa;

    /// `tile[row · a_stride + q]` = element (row, q) of A for rows below `rows` and q below the part's length, zeros up to its
    /// depth. What lies behind in a row is overwritten by at most 64 bytes.
    fn load(self, tile: &mut [Self::A], part: &Part<'_, '_, Self::E>, first_row: usize, rows: usize) {
        self.isa().vectorize(
            #[inline(always)]
            || load::<Self>(tile, part, first_row, rows),
        );
    }

    /// C[i, j] = or += Σ over pieces Σ_p `a[i · a_stride + p]` · b[p, j], for i < `rows` ≤ MR, j < `cols` ≤ NR, p < `k`
    /// (a multiple of K_STEP).
    fn tile(self, pieces: &[Piece<'_, Self>], c: CTile<'_>);

    /// `c[i · stride + j]` = `sums[i · NR + j]` rounded, for j < `cols` and all rows of `sums`.
    fn round(self, c: &mut [bf16], stride: usize, sums: &[f32], cols: usize) {
        round_rows(self.isa(), c, stride, sums, Self::NR, cols);
    }
}

/// A part of a sum: a tile of A's rows and a panel.
#[derive(Clone, Copy)]
pub(super) struct Piece<'a, K: Micro> {
    pub(super) k: usize,
    pub(super) a: &'a [K::A],
    pub(super) b: &'a [K::E],
}

/// [`Micro::tile`] by one piece after the other, for kernels that would run out of registers in one loop over all.
#[inline(always)]
pub(super) fn one_by_one<K: Micro>(pieces: &[Piece<'_, K>], c: CTile<'_>, tile: impl Fn(&Piece<'_, K>, CTile<'_>)) {
    let CTile { data, stride, rows, cols, mut store } = c;
    for piece in pieces {
        tile(piece, CTile { data: &mut *data, stride, rows, cols, store });
        store = Accumulate::Add;
    }
}

/// Where a tile of C lies.
pub(super) struct CTile<'a> {
    pub(super) data: &'a mut [f32],
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) store: Accumulate,
}

impl CTile<'_> {
    /// The bounds contract of [`Micro::tile`], once per tile.
    #[inline(always)]
    pub(super) fn check<K: Micro>(&self, pieces: &[Piece<'_, K>]) {
        assert!((1..=K::MR).contains(&self.rows) && (1..=K::NR).contains(&self.cols));
        assert!(self.data.len() >= (self.rows - 1) * self.stride + self.cols);
        for Piece { k, a, b } in pieces {
            assert!(k.is_multiple_of(K::K_STEP) && b.len() >= k * K::NR);
            assert!(a.len() >= (self.rows - 1) * a_stride::<K::A>() + k);
        }
    }
}

/// From a row of a tile of A to the next.
pub(super) const fn a_stride<A>() -> usize {
    A_ROW_BYTES / size_of::<A>()
}

#[repr(align(64))]
struct ATile([u8; MR_MAX * A_ROW_BYTES]);

impl ATile {
    const ZEROED: ATile = ATile([0; MR_MAX * A_ROW_BYTES]);

    /// Rows `i .. i + rows` of a block's parts, side by side.
    fn load<K: Micro>(&mut self, kernel: K, block: &Block<'_, '_, K::E>, i: usize, rows: usize) {
        let mut at = 0;
        for part in block.iter().flatten() {
            kernel.load(&mut bytemuck::cast_slice_mut(&mut self.0)[at..], part, i, rows);
            at += part.depth;
        }
    }

    /// The sums of the block from column `j` on.
    fn multiply<'b, K: Micro>(&'b self, kernel: K, block: &Block<'_, 'b, K::E>, j: usize, c: CTile<'_>) {
        let a = bytemuck::cast_slice(&self.0);
        let piece = |part: &Part<'_, 'b, K::E>, at: usize| {
            let b = &part.panel(j, K::NR)[..part.depth * K::NR];
            Piece { k: part.depth, a: &a[at..], b }
        };
        match block {
            [Some(part), None] => kernel.tile(&[piece(part, 0)], c),
            [Some(part), Some(joined)] => kernel.tile(&[piece(part, 0), piece(joined, part.depth)], c),
            [None, _] => {}
        }
    }
}

fn cut<K: Micro>() -> Cut {
    let size = size_of::<K::A>();
    Cut { step: K::K_STEP, most: PART_BYTES / size, joined: JOINED_BYTES / size }
}

/// Columns whose panels, so many values deep, stay in L2.
fn group<K: Micro>(depth: usize) -> usize {
    (B_BYTES / (depth * size_of::<K::E>())).max(K::NR) / K::NR * K::NR
}

/// C = or += Σ terms, block by block: groups of panels, tiles of A, panels.
pub(super) fn drive<K: Micro>(kernel: K, c: &mut [f32], product: &Product<'_, '_, K::E>) {
    const { assert!(K::MR <= MR_MAX) };
    let &Product { c_stride, m, n, mut store, terms } = product;
    let mut tile = ATile::ZEROED;
    for block in cut::<K>().blocks(terms) {
        let group = group::<K>(depth(&block));
        for first in (0..n).step_by(group) {
            for i in (0..m).step_by(K::MR) {
                let rows = K::MR.min(m - i);
                tile.load(kernel, &block, i, rows);
                for j in (first..n.min(first + group)).step_by(K::NR) {
                    let data = &mut c[i * c_stride + j..];
                    let c = CTile { data, stride: c_stride, rows, cols: K::NR.min(n - j), store };
                    tile.multiply(kernel, &block, j, c);
                }
            }
        }
        store = Accumulate::Add;
    }
}

/// [`drive`] into bf16. A tile's sums wait in f32, in L1, for the last block. Returns `false`, and does nothing, where k is so long
/// that few columns' panels would stay in L2 and A would be read too often.
pub(super) fn drive_rounded<K: Micro>(kernel: K, c: &mut [bf16], product: &Product<'_, '_, K::E>) -> bool {
    let blocks = cut::<K>().blocks(product.terms);
    let group = group::<K>(blocks.clone().map(|block| depth(&block)).sum());
    if blocks.clone().nth(1).is_none() {
        rounded::<K, { MR_MAX * NR_MAX }>(kernel, c, product, group, blocks);
    } else if group >= SUMS_COLUMNS_LEAST.min(product.n) {
        rounded::<K, { MR_MAX * SUMS_COLUMNS }>(kernel, c, product, group.min(SUMS_COLUMNS), blocks);
    } else {
        return false;
    }
    true
}

/// Most columns of a panel on any instruction set.
const NR_MAX: usize = 32;

/// [`drive_rounded`] with room for so many sums: all of a group's, or one tile's where there is one block.
fn rounded<'t, 'a: 't, K: Micro + 't, const SUMS: usize>(
    kernel: K,
    c: &mut [bf16],
    product: &Product<'_, '_, K::E>,
    group: usize,
    blocks: impl Iterator<Item = Block<'t, 'a, K::E>> + Clone,
) {
    const { assert!(K::MR <= MR_MAX && K::NR <= NR_MAX) };
    let &Product { c_stride, m, n, .. } = product;
    let mut tile = ATile::ZEROED;
    let mut sums = [0.0; SUMS];
    for first in (0..n).step_by(group) {
        for i in (0..m).step_by(K::MR) {
            let rows = K::MR.min(m - i);
            let mut blocks = blocks.clone().enumerate().peekable();
            while let Some((index, block)) = blocks.next() {
                tile.load(kernel, &block, i, rows);
                let store = if index == 0 { product.store } else { Accumulate::Add };
                for j in (first..n.min(first + group)).step_by(K::NR) {
                    let sums = &mut sums[K::MR * (j - first) % SUMS..][..rows * K::NR];
                    let c = &mut c[i * c_stride + j..];
                    let cols = K::NR.min(n - j);
                    if index == 0 && store == Accumulate::Add {
                        widen_rows(kernel.isa(), sums, K::NR, c, c_stride, cols);
                    }
                    tile.multiply(kernel, &block, j, CTile { data: sums, stride: K::NR, rows, cols, store });
                    if blocks.peek().is_none() {
                        kernel.round(c, c_stride, sums, cols);
                    }
                }
            }
        }
    }
}

/// [`Micro::load`] for rows at any strides.
#[inline(always)]
pub(super) fn load<K: Micro>(tile: &mut [K::A], part: &Part<'_, '_, K::E>, first_row: usize, rows: usize) {
    let a = part.a();
    let first = part.start(first_row);
    let strides = (a.row_stride, a.col_stride);
    match a.data {
        Values::F32(data) => copy::<f32, K::A>(tile, &data[first..], strides, rows, part.len, K::A::of_f32),
        Values::Bf16(data) => copy::<bf16, K::A>(tile, &data[first..], strides, rows, part.len, K::A::of_bf16),
    }
    for out in tile.chunks_mut(a_stride::<K::A>()).take(rows) {
        out[part.len..part.depth].fill(bytemuck::Zeroable::zeroed());
    }
}

/// `tile[row · a_stride + q]` = `from[row · row_stride + q · col_stride]`, converted.
#[inline(always)]
fn copy<E: Copy, A>(
    tile: &mut [A],
    from: &[E],
    (row_stride, col_stride): (usize, usize),
    rows: usize,
    k: usize,
    convert: impl Fn(E) -> A,
) {
    let stride = a_stride::<A>();
    if row_stride == 1 && col_stride != 1 {
        // A transpose: along its contiguous direction first.
        for q in 0..k {
            for (row, &a) in from[q * col_stride..][..rows].iter().enumerate() {
                tile[row * stride + q] = convert(a);
            }
        }
        return;
    }
    for (row, out) in tile.chunks_mut(stride).take(rows).enumerate() {
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
