//! Products of a wide operand with a narrow one: x [A; R]ᵀ, dy B, and the adapter's weight gradients, which sum over
//! tokens. Their time is that of reading x or dy, once for every 32 rows of the narrow side.
//!
//! Both operands are bf16, sums are f32 and have a fixed order. A block of 8 warps has a tile of 32 x 32 results. Tiles
//! of the operands, 128 deep, pass through four stages in shared memory: while one is multiplied, three are being
//! copied, which keeps enough loads in flight to use the memory's bandwidth. Dropout is a mask on x with its factor
//! applied to the sum, so that x stays bf16.

use crate::mask::Mask;
use crate::prelude::*;
use crate::product::{Operand, Place};
use crate::sizes::{SKINNY, SKINNY_DEPTH, SKINNY_STAGES, SKINNY_TILE_BYTES};
use crate::tile::{a_fragment, at};

/// One side of the product. Its tiles lie along k, [32 rows, 128 k], or across, [128 k, 32 rows].
pub struct Side<const ALONG: bool>(pub Operand);

impl<const ALONG: bool> Side<ALONG> {
    /// The address of a chunk of a tile.
    #[inline(always)]
    fn at(tile: u32, row: u32, chunk: u32) -> u32 {
        if ALONG { at::<{ SKINNY_DEPTH / 8 }>(tile, row, chunk) } else { at::<{ SKINNY / 8 }>(tile, row, chunk) }
    }

    #[inline(always)]
    fn place(tile: u32) -> Place<impl Fn(u32, u32) -> u32> {
        let (rows, chunks) = if ALONG { (SKINNY, SKINNY_DEPTH / 8) } else { (SKINNY_DEPTH, SKINNY / 8) };
        Place { rows, chunks, at: move |row, chunk| Self::at(tile, row, chunk) }
    }

    /// The first row and column, in the stored matrix, of the tile of rows `first ..` from `k` on.
    #[inline(always)]
    fn corner(first: u32, k: u32) -> (u32, u32) {
        if ALONG { (first, k) } else { (k, first) }
    }

    #[inline(always)]
    unsafe fn copy(&self, tile: u32, first: u32, k: u32) {
        let (row, column) = Self::corner(first, k);
        self.0.copy_tile(Self::place(tile), row, column);
    }

    /// Writes a tile to `to` with zeros where `mask` drops values. A thread reads what it has copied itself.
    #[inline(always)]
    unsafe fn cut(to: u32, from: u32, mask: Mask, first: u32, k: u32) {
        let (row, column) = Self::corner(first, k);
        Self::place(from).each(|r, chunk, address| {
            let left = mask.cut(ld_u4(address), row + r, column + 8 * chunk);
            st_u4(Self::at(to, r, chunk), left);
        });
    }

    /// A [16, 16] of rows `16 m ..`, k from `16 step` on.
    #[inline(always)]
    unsafe fn left(tile: u32, m: u32, step: u32) -> [u32; 4] {
        if ALONG {
            return a_fragment::<{ SKINNY_DEPTH / 8 }>(tile, 16 * m, 2 * step);
        }
        let lane = lane();
        let k = 16 * step + lane / 16 * 8 + lane % 8;
        ldmatrix_transposed(Self::at(tile, k, 2 * m + lane / 8 % 2))
    }

    /// Two B [16, 8] of rows `8 n ..` (its columns), k from `32 part` on.
    #[inline(always)]
    unsafe fn right(tile: u32, n: u32, part: u32) -> [u32; 4] {
        let lane = lane();
        if ALONG {
            ldmatrix(Self::at(tile, 8 * n + lane % 8, 4 * part + lane / 8))
        } else {
            ldmatrix_transposed(Self::at(tile, 32 * part + lane, n))
        }
    }
}

/// Σ_k x(i, k) · s(j, k) over a range of k, for a tile of 32 x 32 results. A warp has 16 x 8 of them and a thread four,
/// see [`each`].
pub struct SkinnyProduct<const X_ALONG: bool, const S_ALONG: bool> {
    /// The wide operand.
    x: Side<X_ALONG>,
    /// The narrow one.
    s: Side<S_ALONG>,
    /// The tile's first i and j.
    first: (u32, u32),
    /// The first k.
    k: u32,
    /// Tiles along x's k.
    x_tiles: u32,
    /// Tiles along s's k.
    tiles: u32,
    /// Dropout of x for some j.
    mask: Mask,
}

/// Two sums of a thread's results, so that no product waits for the one before.
type Sums = [[f32; 4]; 2];

impl<const X_ALONG: bool, const S_ALONG: bool> SkinnyProduct<X_ALONG, S_ALONG> {
    /// The tile that begins at i and j `first`. k goes from the first value of `k`, a multiple of 128, up to the
    /// second, a multiple of 128 or the operands' end. If s is `split`, in two parts as [`crate::adapter::split`]
    /// writes it, k goes over x twice.
    #[inline(always)]
    pub fn new(
        (x, s): (Side<X_ALONG>, Side<S_ALONG>),
        first: (u32, u32),
        k: (u32, u32),
        split: bool,
        mask: Mask,
    ) -> Self {
        let x_tiles = (k.1 - k.0).div_ceil(SKINNY_DEPTH);
        let tiles = if split { 2 * x_tiles } else { x_tiles };
        Self { x, s, first, k: k.0, x_tiles, tiles, mask }
    }

    #[inline(always)]
    fn x_tile(tile: u32) -> u32 {
        shared() + tile % SKINNY_STAGES * 2 * SKINNY_TILE_BYTES
    }

    #[inline(always)]
    fn s_tile(tile: u32) -> u32 {
        Self::x_tile(tile) + SKINNY_TILE_BYTES
    }

    /// x's tile after dropout. There are two, so that one can be written while the other is read.
    #[inline(always)]
    fn dropped_tile(tile: u32) -> u32 {
        shared() + (2 * SKINNY_STAGES + tile % 2) * SKINNY_TILE_BYTES
    }

    /// A tile's first k in s.
    #[inline(always)]
    fn s_k(&self, tile: u32) -> u32 {
        self.k + tile * SKINNY_DEPTH
    }

    /// And in x.
    #[inline(always)]
    fn x_k(&self, tile: u32) -> u32 {
        self.s_k(if tile < self.x_tiles { tile } else { tile - self.x_tiles })
    }

    /// Starts the copies of a tile, and ends a group of copies even where no tile is left: so the latest groups are
    /// always the tiles ahead.
    #[inline(always)]
    unsafe fn fetch(&self, tile: u32) {
        if tile < self.tiles {
            self.x.copy(Self::x_tile(tile), self.first.0, self.x_k(tile));
            self.s.copy(Self::s_tile(tile), self.first.1, self.s_k(tile));
        }
        copy_commit();
    }

    /// Adds the products of a tile to `plain`, and with dropout those of x after dropout to `dropped`.
    #[inline(always)]
    unsafe fn multiply(&self, tile: u32, plain: &mut Sums, dropped: &mut Sums) {
        let (m, n) = (warp() / 4, warp() % 4);
        for part in 0..SKINNY_DEPTH / 32 {
            let [b0, b1, b2, b3] = Side::<S_ALONG>::right(Self::s_tile(tile), n, part);
            let multiply = |acc: &mut Sums, x: u32| {
                mma_bf16(&mut acc[0], Side::<X_ALONG>::left(x, m, 2 * part), [b0, b1]);
                mma_bf16(&mut acc[1], Side::<X_ALONG>::left(x, m, 2 * part + 1), [b2, b3]);
            };
            multiply(plain, Self::x_tile(tile));
            if self.mask.threshold > 0 {
                multiply(dropped, Self::dropped_tile(tile));
            }
        }
    }

    /// A thread's results. Those whose j `drops` holds for read x after dropout, if the mask drops anything.
    #[inline(always)]
    pub unsafe fn run(&self, drops: impl Fn(u32) -> bool) -> [f32; 4] {
        let (mut plain, mut dropped) = ([[0.0; 4]; 2], [[0.0; 4]; 2]);
        let has_dropout = self.mask.threshold > 0;
        // Other threads may still read what shared memory held before.
        barrier();
        for tile in 0..SKINNY_STAGES - 1 {
            self.fetch(tile);
        }
        let mut tile = 0;
        while tile < self.tiles {
            copy_wait::<{ SKINNY_STAGES - 2 }>();
            if has_dropout {
                let (to, from) = (Self::dropped_tile(tile), Self::x_tile(tile));
                Side::<X_ALONG>::cut(to, from, self.mask, self.first.0, self.x_k(tile));
            }
            // All threads' copies of the tile have arrived, and nobody reads the tile that the next copies overwrite.
            barrier();
            self.fetch(tile + SKINNY_STAGES - 1);
            self.multiply(tile, &mut plain, &mut dropped);
            tile += 1;
        }
        let mut result = [0.0; 4];
        for i in 0..4 {
            let masked = has_dropout && drops(result_column(i));
            let scaled = self.mask.scale * (dropped[0][i] + dropped[1][i]);
            result[i] = if masked { scaled } else { plain[0][i] + plain[1][i] };
        }
        result
    }
}

/// The row of a thread's result `i` in the tile.
#[inline(always)]
fn result_row(i: usize) -> u32 {
    warp() / 4 * 16 + lane() / 4 + i as u32 / 2 * 8
}

/// The column of a thread's result `i`.
#[inline(always)]
fn result_column(i: usize) -> u32 {
    warp() % 4 * 8 + lane() % 4 * 2 + i as u32 % 2
}

/// Calls `body(row, column, value)` for those of a thread's results that lie inside [rows, columns].
#[inline(always)]
pub unsafe fn each(acc: [f32; 4], rows: u32, columns: u32, body: impl Fn(u32, u32, f32)) {
    for i in 0..4 {
        let (row, column) = (result_row(i), result_column(i));
        if row < rows && column < columns {
            body(row, column, acc[i]);
        }
    }
}
