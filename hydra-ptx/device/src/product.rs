//! C = addend + A · B + A₂ · B₂ with bf16 operands and f32 sums: the frozen product, the adapter's and a residual in
//! one pass over C, which is f32 or bf16. `addend` is null, C, or a matrix like C.
//!
//! ```text
//! rows:     C [m, n] = A [m, k] · Wᵀ,  W [n, k]     (x Wᵀ; B₂ is [n, k₂])
//! columns:  C [m, n] = A [m, k] · W,   W [k, n]     (dy W; B₂ is [k₂, n])
//! ```
//!
//! Two kernels share this file: [`crate::gemm`] with the matrix instructions of every device, and [`crate::wgmma`] with
//! Hopper's. A block has one tile of C in registers. Tiles of the operands pass through a few stages in shared memory:
//! while one is multiplied, others are being copied (`cp.async`). The second pair's tiles follow the first's, so the
//! adapter costs only its multiplications. A block format's tile is decoded by the threads that load it.

use crate::format::Format;
use crate::kernels::dense::ProductParams;
use crate::prelude::*;
use crate::rows::{Output, floats};
use crate::sizes::{GEMM_GROUP, STAGE_PADDING, THREADS};
use core::marker::PhantomData;

/// The size of a kernel's tiles, and where their chunks of 16 bytes lie in shared memory.
pub trait Tiling {
    /// Rows of a tile of C.
    const M: u32;
    /// Its columns.
    const N: u32;
    /// Depth of the operands' tiles: whole blocks of a quantised weight.
    const K: u32;
    /// A chunk of A's tile [M, K].
    fn a(base: u32, row: u32, chunk: u32) -> u32;
    /// A chunk of B's tile where its rows are the weight's, [N, K].
    fn b_rows(base: u32, row: u32, chunk: u32) -> u32;
    /// A chunk of B's tile where its rows are k, [K, N].
    fn b_columns(base: u32, row: u32, chunk: u32) -> u32;
}

/// A bf16 matrix, or blocks.
#[derive(Clone, Copy)]
pub struct Operand {
    at: *const u8,
    pitch: u32,
    rows: u32,
    /// A multiple of 8: padding is zero.
    columns: u32,
}

/// A tile in shared memory.
pub struct Place<At> {
    /// Its rows.
    pub rows: u32,
    /// Chunks of a row.
    pub chunks: u32,
    /// Where a row's chunk lies.
    pub at: At,
}

/// This thread's first row, its chunk (or pair of chunks) of a row of `chunks`, and the number of rows to its next one.
#[inline(always)]
fn share(chunks: u32) -> (u32, u32, u32) {
    (thread() / chunks, thread() % chunks, THREADS / chunks)
}

impl<At: Fn(u32, u32) -> u32> Place<At> {
    /// Calls `body(row, chunk, address)` for the chunks that [`Operand::copy_tile`] copies in this thread.
    #[inline(always)]
    pub unsafe fn each(self, body: impl Fn(u32, u32, u32)) {
        let (first, chunk, apart) = share(self.chunks);
        for step in 0..self.rows / apart {
            let row = first + step * apart;
            body(row, chunk, (self.at)(row, chunk));
        }
    }
}

impl Operand {
    /// An operand [rows, columns], `pitch` elements from a row to the next.
    #[inline(always)]
    pub fn new(at: *const u16, pitch: u32, rows: u32, columns: u32) -> Self {
        Self { at: at.cast(), pitch, rows, columns: padded(columns) }
    }

    /// Starts copying the tile whose first element is (`row`, `column`).
    #[inline(always)]
    pub unsafe fn copy_tile<At: Fn(u32, u32) -> u32>(self, to: Place<At>, row: u32, column: u32) {
        let (first, chunk, apart) = share(to.chunks);
        let (row, column) = (row + first, column + 8 * chunk);
        let from = self.at.wrapping_add((row as usize * self.pitch as usize + column as usize) * 2);
        for step in 0..to.rows / apart {
            let more = step * apart;
            let inside = row + more < self.rows && column < self.columns;
            let from = if inside { from.wrapping_add(more as usize * self.pitch as usize * 2) } else { self.at };
            copy_async((to.at)(first + more, chunk), from, inside);
        }
    }

    /// Decodes a tile of a quantised matrix, a pair of chunks at a time.
    #[inline(always)]
    unsafe fn decode_tile<F: Format, At: Fn(u32, u32) -> u32>(
        self,
        scales: *const u8,
        to: Place<At>,
        row: u32,
        column: u32,
    ) {
        let (first, pair, apart) = share(to.chunks / 2);
        for step in 0..to.rows / apart {
            let r = first + step * apart;
            for half in 0..2 {
                let chunk = 2 * pair + half;
                let (row, column) = (row + r, column + 8 * chunk);
                let mut values = [0.0; 8];
                if row < self.rows && column < self.columns {
                    values = F::eight(self.at, scales, row, column / 8, self.pitch);
                }
                st_u4((to.at)(r, chunk), pack8(values));
            }
        }
    }
}

/// This block's first row and column of C. Blocks start in order of their number. They cover C in groups of a few rows
/// of tiles, column by column within a group, so that the blocks that run together cover roughly a square and share
/// what they read.
#[inline(always)]
unsafe fn tile_of_block<T: Tiling>(m: u32, n: u32) -> (u32, u32) {
    let (rows, columns) = (m.div_ceil(T::M), n.div_ceil(T::N));
    let number = block_y() * columns + block_x();
    let in_group = GEMM_GROUP * columns;
    assume(in_group > 0);
    let (first, place) = (number / in_group * GEMM_GROUP, number % in_group);
    let height = (rows - first).min(GEMM_GROUP);
    assume(height > 0);
    ((first + place % height) * T::M, place / height * T::N)
}

/// A launch's operands, and this block's tile of C. `ROWS` is the form.
pub struct Product<F, T, const ROWS: bool> {
    /// Rows of C.
    pub m: u32,
    /// Its columns.
    pub n: u32,
    /// Elements from a row of it to the next.
    c_pitch: u32,
    /// The tile's first row.
    pub m0: u32,
    /// Its first column.
    pub n0: u32,
    a: Operand,
    w: Operand,
    scales: *const u8,
    a2: Operand,
    b2: Operand,
    /// Tiles along k.
    first_tiles: u32,
    /// Tiles along k and k₂.
    all_tiles: u32,
    of: PhantomData<(F, T)>,
}

impl<F: Format, T: Tiling, const ROWS: bool> Product<F, T, ROWS> {
    /// Sums from a staged row to the next, chosen so that neighbouring rows lie in different banks.
    const PITCH: u32 = T::N + STAGE_PADDING;

    /// Of a kernel's parameters.
    #[inline(always)]
    pub unsafe fn new(p: &ProductParams) -> Self {
        let &ProductParams { c_pitch, m, n, a, a_pitch, k, w, scales, pitch, a2, a2_pitch, k2, b2, b2_pitch, .. } = p;
        let right = |at: *const u8, pitch: u32, k: u32| {
            if ROWS {
                Operand { at, pitch, rows: n, columns: padded(k) }
            } else {
                Operand { at, pitch, rows: k, columns: padded(n) }
            }
        };
        let (m0, n0) = tile_of_block::<T>(m, n);
        let first_tiles = k.div_ceil(T::K);
        Self {
            m,
            n,
            c_pitch,
            m0,
            n0,
            a: Operand::new(a, a_pitch, m, k),
            w: right(w, pitch, k),
            scales,
            a2: Operand::new(a2, a2_pitch, m, k2),
            b2: right(b2.cast(), b2_pitch, k2),
            first_tiles,
            all_tiles: first_tiles + k2.div_ceil(T::K),
            of: PhantomData,
        }
    }

    /// How many tiles the operands have.
    #[inline(always)]
    pub fn tiles(&self) -> u32 {
        self.all_tiles
    }

    /// Starts copying a tile of A and B to shared memory, and ends a group of copies even where nothing is left to
    /// copy: so the latest groups are always the tiles ahead.
    #[inline(always)]
    pub unsafe fn fetch(&self, tile: u32, a_to: u32, b_to: u32) {
        if tile < self.all_tiles {
            let frozen = tile < self.first_tiles;
            let (a, b, skipped) = if frozen { (self.a, self.w, 0) } else { (self.a2, self.b2, self.first_tiles) };
            let k0 = (tile - skipped) * T::K;
            self.copy_a(a, a_to, k0);
            if F::PLAIN || !frozen { self.copy_b(b, b_to, k0) } else { self.decode_w(b_to, k0) }
        }
        copy_commit();
    }

    #[inline(always)]
    unsafe fn copy_a(&self, a: Operand, to: u32, k0: u32) {
        let at = |row, chunk| T::a(to, row, chunk);
        a.copy_tile(Place { rows: T::M, chunks: T::K / 8, at }, self.m0, k0);
    }

    #[inline(always)]
    unsafe fn copy_b(&self, b: Operand, to: u32, k0: u32) {
        if ROWS {
            let at = |row, chunk| T::b_rows(to, row, chunk);
            b.copy_tile(Place { rows: T::N, chunks: T::K / 8, at }, self.n0, k0);
        } else {
            let at = |row, chunk| T::b_columns(to, row, chunk);
            b.copy_tile(Place { rows: T::K, chunks: T::N / 8, at }, k0, self.n0);
        }
    }

    #[inline(always)]
    unsafe fn decode_w(&self, to: u32, k0: u32) {
        if ROWS {
            let at = |row, chunk| T::b_rows(to, row, chunk);
            self.w.decode_tile::<F, _>(self.scales, Place { rows: T::N, chunks: T::K / 8, at }, self.n0, k0);
        } else {
            let at = |row, chunk| T::b_columns(to, row, chunk);
            self.w.decode_tile::<F, _>(self.scales, Place { rows: T::K, chunks: T::N / 8, at }, k0, self.n0);
        }
    }

    /// Writes a thread's part of a matrix instruction's result to shared memory: of 16 x 8 sums with the first at
    /// (`row`, `column`), those in row lane / 4 and the eighth after it, columns 2 (lane % 4) and the next.
    #[inline(always)]
    pub unsafe fn stage(to: u32, row: u32, column: u32, sums: [f32; 4]) {
        let at = to + ((row + lane() / 4) * Self::PITCH + column + lane() % 4 * 2) * 4;
        st_f2(at, [sums[0], sums[1]]);
        st_f2(at + 8 * Self::PITCH * 4, [sums[2], sums[3]]);
    }

    /// Writes `rows` rows of the tile of C from `row` on, which all threads have staged at `from`.
    #[inline(always)]
    pub unsafe fn store(&self, c: Output, from: u32, row: u32, rows: u32) {
        let (chunks, mut i) = (T::N / 8, thread());
        while i < rows * chunks {
            let (r, chunk) = (i / chunks, i % chunks);
            let (row, column) = (self.m0 + row + r, self.n0 + 8 * chunk);
            if row < self.m && column < self.n {
                let at = from + (r * Self::PITCH + 8 * chunk) * 4;
                let index = row as usize * self.c_pitch as usize + column as usize;
                let aligned = self.n.is_multiple_of(8) && self.c_pitch.is_multiple_of(8);
                c.put_row(index, floats(ld_u4(at), ld_u4(at + 16)), self.n - column, aligned);
            }
            i += THREADS;
        }
    }
}

/// A kernel for each form and format; `$gemm` computes it.
macro_rules! products {
    ($gemm:ident; $($name:ident: $format:ident, $rows:literal;)*) => {$(
        /// See `product.rs`. Grid: [n / tile, m / tile], 256 threads.
        #[inline(always)]
        pub unsafe fn $name(p: crate::kernels::dense::ProductParams) {
            $gemm::<crate::format::$format, $rows>(Output::new(p.c, p.addend, p.bf16), &Product::new(&p))
        }
    )*};
}
pub(crate) use products;
