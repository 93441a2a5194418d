//! A block's rectangle of x or dy, and its sums over tokens: Σ_t wide(t, c) · narrow(t, j) for 256 columns c and 32
//! columns j, in the registers of four warps of 64 columns.
//!
//! Tiles of 32 tokens pass through four stages in shared memory: while one is multiplied, three are being copied. Two
//! blocks on a multiprocessor keep 96 KiB in flight. Both operands are bf16, sums are f32 and have a fixed order.

use crate::prelude::*;
use crate::sizes::{NARROW, NARROW_TILE_BYTES, WIDE, WIDE_STAGES, WIDE_THREADS, WIDE_TILE_BYTES, WIDE_TOKENS};
use crate::tile::{at, b_fragments_transposed};

/// Chunks of a row of a wide tile.
pub const WIDE_CHUNKS: u32 = WIDE / 8;
/// Chunks of a row of a narrow tile.
pub const NARROW_CHUNKS: u32 = NARROW / 8;

/// Rows of a bf16 operand, of which a tile has `CHUNKS` chunks; a thread copies the chunks that [`chunks`] gives it, which
/// have the same column.
#[derive(Clone, Copy)]
pub struct Rows<const CHUNKS: u32> {
    at: *const u16,
    pitch: u32,
    /// This thread's first row and column.
    row: u32,
    column: u32,
    /// The end of the rows; 0 if the column lies beyond the last one.
    end: u32,
}

impl<const CHUNKS: u32> Rows<CHUNKS> {
    /// Of an operand with this pitch and so many columns, from `column` on; `rows` are the first one and the end.
    #[inline(always)]
    pub fn new((at, pitch): (*const u16, u32), columns: u32, rows: (u32, u32), column: u32) -> Self {
        let (row, column) = (rows.0 + thread() / CHUNKS, column + thread() % CHUNKS * 8);
        Self { at, pitch, row, column, end: if column < padded(columns) { rows.1 } else { 0 } }
    }

    /// Starts copying `ROWS` of the rows from number `skipped` on, with zeros beyond the end and beyond the last column.
    #[inline(always)]
    pub unsafe fn copy<const ROWS: u32>(&self, to: u32, skipped: u32) {
        let first = self.row + skipped;
        let from = self.at.wrapping_add(first as usize * self.pitch as usize + self.column as usize);
        chunks::<CHUNKS, ROWS>(|r, chunk| {
            let more = r - thread() / CHUNKS;
            // Where nothing is copied, the address doesn't matter.
            let from = from.wrapping_add(more as usize * self.pitch as usize);
            copy_async(at::<CHUNKS>(to, r, chunk), from.cast(), first + more < self.end);
        });
    }
}

/// Rows of a rounded tile from one of a thread's to the next.
const ROUNDED_APART: u32 = WIDE_THREADS * 2 / NARROW;

/// A thread's part of a tile [256, 32] of a f32 matrix: a pair of columns in every eighth row.
pub struct RoundedTile([[f32; 2]; (WIDE / ROUNDED_APART) as usize]);

impl RoundedTile {
    /// A thread's first row and its pair of columns.
    #[inline(always)]
    fn place() -> (u32, u32) {
        (thread() / (NARROW / 2), thread() % (NARROW / 2))
    }

    /// Loads all of it at once, of a matrix [rows, columns] from (`row`, `column`) on; beyond the matrix it is zero.
    #[inline(always)]
    pub unsafe fn load(from: *const f32, (rows, columns): (u32, u32), (row, column): (u32, u32)) -> Self {
        let (first, pair) = Self::place();
        let (row, column) = (row + first, column + 2 * pair);
        // Beyond the last column, the second of the pair is the last one of the matrix.
        let at = from.add(column.min(columns - 1) as usize);
        let second = from.add((column + 1).min(columns - 1) as usize);
        let mut values = [[0.0; 2]; (WIDE / ROUNDED_APART) as usize];
        for i in 0..WIDE / ROUNDED_APART {
            let skipped = u64::from((row + i * ROUNDED_APART).min(rows - 1)) * u64::from(columns);
            values[i as usize] = [load(at.add(skipped as usize)), load(second.add(skipped as usize))];
        }
        for i in 0..WIDE / ROUNDED_APART {
            for two in 0..2 {
                if row + i * ROUNDED_APART >= rows || column + two >= columns {
                    values[i as usize][two as usize] = 0.0;
                }
            }
        }
        Self(values)
    }

    /// Writes it to `to` in bf16.
    #[inline(always)]
    pub unsafe fn put(self, to: u32) {
        let (first, pair) = Self::place();
        for i in 0..WIDE / ROUNDED_APART {
            let [low, high] = self.0[i as usize];
            st_u32(at::<NARROW_CHUNKS>(to, first + i * ROUNDED_APART, pair / 4) + pair % 4 * 4, pack_bf16(low, high));
        }
    }
}

/// Calls `body(row, chunk)` for this thread's chunks of a tile.
#[inline(always)]
pub unsafe fn chunks<const CHUNKS: u32, const ROWS: u32>(body: impl Fn(u32, u32)) {
    assume(thread() < WIDE_THREADS);
    for step in 0..CHUNKS * ROWS / WIDE_THREADS {
        body(step * (WIDE_THREADS / CHUNKS) + thread() / CHUNKS, thread() % CHUNKS);
    }
}

/// The wide tile of this number in shared memory.
#[inline(always)]
pub fn wide_tile(number: u32) -> u32 {
    shared() + number % WIDE_STAGES * WIDE_TILE_BYTES
}

/// The narrow operand's tile number `stage`, behind the wide ones.
#[inline(always)]
pub fn narrow_tile(stage: u32) -> u32 {
    shared() + WIDE_STAGES * WIDE_TILE_BYTES + stage * NARROW_TILE_BYTES
}

/// Tiles of a range of tokens.
#[inline(always)]
pub fn tiles((first, end): (u32, u32)) -> u32 {
    (end - first).div_ceil(WIDE_TOKENS)
}

/// A thread's sums: `[m][n][i]` is value i of `mma.m16n8k16`'s result for the warp's columns c from 16 m on and the
/// columns j from 8 n on.
#[derive(Clone, Copy)]
pub struct TokenSums([[[f32; 4]; 4]; 4]);

/// The narrow operand's fragments for 16 tokens: all of its 32 columns.
pub type Narrow = [[u32; 2]; 4];

/// The fragments of a narrow tile [_, 32] whose rows from `row` on are k.
#[inline(always)]
pub unsafe fn narrow_fragments(tile: u32, row: u32) -> Narrow {
    let [[a, b], [c, d]] = narrow_halves(tile, row, 0);
    [a, b, c, d]
}

/// The same: of half `first` of the columns, and of the other one.
#[inline(always)]
pub unsafe fn narrow_halves(tile: u32, row: u32, first: u32) -> [[[u32; 2]; 2]; 2] {
    let [a, b, c, d] = b_fragments_transposed::<NARROW_CHUNKS>(tile, row, 2 * first);
    let [e, f, g, h] = b_fragments_transposed::<NARROW_CHUNKS>(tile, row, 2 - 2 * first);
    [[[a, b], [c, d]], [[e, f], [g, h]]]
}

impl TokenSums {
    /// Zeros.
    pub const ZERO: Self = Self([[[0.0; 4]; 4]; 4]);

    /// Adds the products of 16 of a wide tile's tokens, from `token` on, for the warp's columns from 16 `m` on.
    #[inline(always)]
    pub unsafe fn add(&mut self, tile: u32, token: u32, m: u32, narrow: &Narrow) {
        let lane = lane();
        let row = token + lane / 16 * 8 + lane % 8;
        let left = ldmatrix_transposed(at::<WIDE_CHUNKS>(tile, row, 8 * warp() + 2 * m + lane / 8 % 2));
        for n in 0..4 {
            mma_bf16(&mut self.0[m as usize][n], left, narrow[n]);
        }
    }

    /// Adds the products of a wide tile and a narrow one.
    #[inline(always)]
    pub unsafe fn add_tile(&mut self, tile: u32, narrow: u32) {
        for step in 0..WIDE_TOKENS / 16 {
            let narrow = narrow_fragments(narrow, 16 * step);
            for m in 0..4 {
                self.add(tile, 16 * step, m, &narrow);
            }
        }
    }

    /// `factor` times these sums where `chosen(j)`, else those of `other`.
    #[inline(always)]
    pub fn choose(&mut self, other: &Self, factor: f32, chosen: impl Fn(u32) -> bool) {
        for m in 0..4 {
            for n in 0..4 {
                for i in 0..4 {
                    let (own, other) = (self.0[m][n][i] * factor, other.0[m][n][i]);
                    self.0[m][n][i] = if chosen(column(n) + i as u32 % 2) { own } else { other };
                }
            }
        }
    }

    /// Calls `body(c, j, sums of j and j + 1)` for a thread's results, c counted from the block's first column.
    #[inline(always)]
    pub unsafe fn each(&self, body: impl Fn(u32, u32, [f32; 2])) {
        for m in 0..4 {
            for n in 0..4 {
                let (c, [a, b, d, e]) = (64 * warp() + 16 * m as u32 + lane() / 4, self.0[m][n]);
                body(c, column(n), [a, b]);
                body(c + 8, column(n), [d, e]);
            }
        }
    }
}

/// A thread's first column of those from 8 n on in `mma.m16n8k16`'s result.
#[inline(always)]
pub fn column(n: usize) -> u32 {
    8 * n as u32 + lane() % 4 * 2
}

/// Two neighbours, which one instruction loads or stores.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct Two(pub [f32; 2]);

/// The sum of `count` parts, `apart` floats from one to the next, for two neighbours from `from` on. 16 parts are
/// loaded at once, then eight; beyond the end, the last one is loaded again and left out.
#[inline(always)]
pub unsafe fn total_of_two(mut from: *const f32, apart: u32, mut count: u32) -> [f32; 2] {
    let (mut sum, apart) = ([0.0; 2], opaque(apart) as usize);
    while count >= 16 {
        let parts: [Two; 16] = core::array::from_fn(|i| load(from.add(i * apart).cast()));
        for i in 0..16 {
            sum = [sum[0] + parts[i].0[0], sum[1] + parts[i].0[1]];
        }
        (from, count) = (from.add(16 * apart), count - 16);
    }
    while count > 0 {
        let parts: [Two; 8] =
            core::array::from_fn(|i| load(from.add((i as u32).min(count - 1) as usize * apart).cast()));
        for i in 0..8 {
            let [a, b] = if (i as u32) < count { parts[i].0 } else { [0.0; 2] };
            sum = [sum[0] + a, sum[1] + b];
        }
        (from, count) = (from.wrapping_add(8 * apart), count.saturating_sub(8));
    }
    sum
}

/// A sum of parts, which is added to `out` [rows, columns].
pub struct Total {
    /// Where it is added.
    pub out: *mut f32,
    /// Its rows.
    pub rows: u32,
    /// Its columns.
    pub columns: u32,
    /// A factor of the sum.
    pub scale: f32,
}

impl Total {
    /// Adds `count` parts [rows, pitch]: two neighbours, number `i` of all.
    #[inline(always)]
    pub unsafe fn add(&self, parts: *const f32, count: u32, i: u32) {
        let pitch = padded(self.columns);
        let twos = pitch / 2;
        assume(twos > 0);
        let (row, column) = (i / twos, i % twos * 2);
        if row >= self.rows || column >= self.columns {
            return;
        }
        let from = parts.add(row as usize * pitch as usize + column as usize);
        // Beyond the last column, the second of the two is the first again.
        let last = column + 1 == self.columns;
        let to = self.out.add(row as usize * self.columns as usize + column as usize);
        let second = if last { to } else { to.add(1) };
        // Opaque, so that the compiler doesn't start these loads behind the sum.
        let before = [to, second].map(|at| f32::from_bits(opaque(load(at).to_bits())));
        let [a, b] = total_of_two(from, self.rows * pitch, count);
        let [a, b] = [before[0] + self.scale * a, before[1] + self.scale * b];
        store(to, a);
        store(second, if last { a } else { b });
    }
}
