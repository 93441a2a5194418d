//! Products with one small side: x [A; R]ᵀ with the gate behind it, dy B with the gate's adjoint behind it, and the adapter's
//! gradients, which sum over tokens. They are bound by reading x or dy, once for every 32 rows of the small side.
//!
//! Both sides are bf16 operands, sums are f32 and have a fixed order. [A; R] is split in two, s = h + l, and the product is x h + x l
//! (relative error 2⁻¹⁷): the router is sensitive. A block of 8 warps has a tile of 32 x 32 results; tiles of
//! the operands, 128 deep, pass through four stages in shared memory: while one is multiplied, three are on their way, because
//! what counts is how much of memory's time is used. Dropout is a mask on x, and its factor one on the sum, so x stays bf16.

use crate::gate::{Heads, mix_tokens, unmix_tokens};
use crate::mask::Mask;
use crate::prelude::*;
use crate::product::{Operand, Place};
use crate::rows::{Output, load_eight};
use crate::sizes::{DROPPED_TOKENS, SKINNY, SKINNY_DEPTH, SKINNY_STAGES, SKINNY_TILE_BYTES, THREADS};
use crate::tile::{a_fragment, at};

/// An operand's tile. It lies along k, [32 rows, 128 k], or across, [128 k, 32 rows].
struct Side<const ALONG: bool>(Operand);

impl<const ALONG: bool> Side<ALONG> {
    /// The address of a chunk of a tile that lies so.
    #[inline(always)]
    fn at(tile: u32, row: u32, chunk: u32) -> u32 {
        if ALONG { at::<{ SKINNY_DEPTH / 8 }>(tile, row, chunk) } else { at::<{ SKINNY / 8 }>(tile, row, chunk) }
    }

    #[inline(always)]
    fn place(tile: u32) -> Place<impl Fn(u32, u32) -> u32> {
        let (rows, chunks) = if ALONG { (SKINNY, SKINNY_DEPTH / 8) } else { (SKINNY_DEPTH, SKINNY / 8) };
        Place { rows, chunks, at: move |row, chunk| Self::at(tile, row, chunk) }
    }

    /// First row and column of the tile of rows `first ..` from `k` on, in the matrix as it lies.
    #[inline(always)]
    fn corner(first: u32, k: u32) -> (u32, u32) {
        if ALONG { (first, k) } else { (k, first) }
    }

    #[inline(always)]
    unsafe fn copy(&self, tile: u32, first: u32, k: u32) {
        let (row, column) = Self::corner(first, k);
        self.0.copy_tile(Self::place(tile), row, column);
    }

    /// Writes a tile to `to` without what `mask` drops. A thread reads what it has copied itself.
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

/// Σ_k x(i, k) · s(j, k) over `from ≤ k < to` for a tile of 32 x 32 with its first row and column at `first`: a warp has 16 x 8 of
/// it, a thread four, see [`each`]. `from` is a multiple of 128; so is `to`, or it is the end. If s is `split`, what [`split`] has
/// made, k goes over x twice. If `mask` drops anything, the columns for which `dropped` holds read x after dropout.
#[inline(always)]
unsafe fn tile_product<const X_ALONG: bool, const S_ALONG: bool>(
    (from, to): (u32, u32),
    x: Side<X_ALONG>,
    s: Side<S_ALONG>,
    first: (u32, u32),
    split: bool,
    mask: Mask,
    dropped: impl Fn(u32) -> bool,
) -> [f32; 4] {
    let x_tile = |tile: u32| shared() + tile % SKINNY_STAGES * 2 * SKINNY_TILE_BYTES;
    let s_tile = |tile: u32| x_tile(tile) + SKINNY_TILE_BYTES;
    // Two, so that one can be written while the other is still read.
    let dropped_tile = |tile: u32| shared() + (2 * SKINNY_STAGES + tile % 2) * SKINNY_TILE_BYTES;
    let two = mask.threshold > 0;
    let once = (to - from).div_ceil(SKINNY_DEPTH);
    let tiles = if split { 2 * once } else { once };
    let k = |tile: u32| from + tile * SKINNY_DEPTH;
    let x_k = |tile: u32| k(if tile < once { tile } else { tile - once });
    let fetch = |tile: u32| {
        if tile < tiles {
            x.copy(x_tile(tile), first.0, x_k(tile));
            s.copy(s_tile(tile), first.1, k(tile));
        }
        copy_commit();
    };
    let (m, n) = (warp() / 4, warp() % 4);
    let (mut plain, mut other) = ([[0.0; 4]; 2], [[0.0; 4]; 2]);
    // Others may still read what was here.
    barrier();
    for tile in 0..SKINNY_STAGES - 1 {
        fetch(tile);
    }
    let mut tile = 0;
    while tile < tiles {
        copy_wait::<{ SKINNY_STAGES - 2 }>();
        if two {
            Side::<X_ALONG>::cut(dropped_tile(tile), x_tile(tile), mask, first.0, x_k(tile));
        }
        // The tile is here for all threads, and all are done with the one that the next copy overwrites.
        barrier();
        fetch(tile + SKINNY_STAGES - 1);
        for part in 0..SKINNY_DEPTH / 32 {
            let [b0, b1, b2, b3] = Side::<S_ALONG>::right(s_tile(tile), n, part);
            let multiply = |acc: &mut [[f32; 4]; 2], x: u32| {
                // Two sums, so that no product waits for the one before.
                mma_bf16(&mut acc[0], Side::<X_ALONG>::left(x, m, 2 * part), [b0, b1]);
                mma_bf16(&mut acc[1], Side::<X_ALONG>::left(x, m, 2 * part + 1), [b2, b3]);
            };
            multiply(&mut plain, x_tile(tile));
            if two {
                multiply(&mut other, dropped_tile(tile));
            }
        }
        tile += 1;
    }
    let mut result = [0.0; 4];
    for i in 0..4 {
        let masked = two && dropped(result_column(i));
        result[i] = if masked { mask.scale * (other[0][i] + other[1][i]) } else { plain[0][i] + plain[1][i] };
    }
    result
}

/// The row of a thread's result `i` in the tile.
#[inline(always)]
fn result_row(i: usize) -> u32 {
    warp() / 4 * 16 + lane() / 4 + i as u32 / 2 * 8
}

/// Its column.
#[inline(always)]
fn result_column(i: usize) -> u32 {
    warp() % 4 * 8 + lane() % 4 * 2 + i as u32 % 2
}

/// Does `body(row, column, value)` for a thread's results inside [rows, columns].
#[inline(always)]
unsafe fn each(acc: [f32; 4], rows: u32, columns: u32, body: impl Fn(u32, u32, f32)) {
    for i in 0..4 {
        let (row, column) = (result_row(i), result_column(i));
        if row < rows && column < columns {
            body(row, column, acc[i]);
        }
    }
}

kernels! {
    /// `out` [rows, 2 half] = h | l for x [rows, width] = h + l to 2⁻¹⁷, in bf16; half is the width's next multiple of 128, and the rest
    /// zero. Grid: [rows · half / 8 / 256], 256 threads.
    fn split(out: *mut u16, x: *const f32, rows: u32, width: u32) {
        let half = width.next_multiple_of(SKINNY_DEPTH);
        let chunks = half / 8;
        assume(chunks > 0);
        let i = block_x() * THREADS + thread();
        let (row, column) = (i / chunks, i % chunks * 8);
        if row >= rows {
            return;
        }
        let values = load_eight(x, row, column, width);
        let (high, mut rest) = (pack8(values), [0.0; 8]);
        for i in 0..8 {
            rest[i] = values[i] - from_bf16((high[i / 2] >> (i % 2 * 16)) as u16);
        }
        let to = out.add(row as usize * 2 * half as usize + column as usize);
        store(to.cast(), U4(high));
        store(to.add(half as usize).cast(), U4(pack8(rest)));
    }

    /// `hidden` [tokens, a_rows + heads] = [D(x) Aᵀ | gate(x Rᵀ)] and `mixed` [tokens, padded heads rank] = scale · H(gate ∘ down)
    /// as bf16. `x` is [tokens, padded d_in], `a` is [A; R] as [`split`] leaves it.
    /// Grid: [tokens / 32], 256 threads.
    fn down(
        hidden: *mut f32,
        mixed: *mut u16,
        tokens: u32,
        x: *const u16,
        d_in: u32,
        a: *const u16,
        rows: u32,
        scale: f32,
        a_rows: u32,
        heads: u32,
        rank: u32,
        per_head: u32,
        gate: u32,
        labels: *const u32,
        sharpness: f32,
        top_k: u32,
        heads_seed: u64,
        heads_threshold: u32,
        heads_scale: f32,
        seed: u64,
        threshold: u32,
        keep_scale: f32,
    ) {
        let mask = Mask { seed: heads_seed, threshold: heads_threshold, scale: heads_scale };
        let heads = Heads { a_rows, heads, rank, per_head, gate, labels, sharpness, top_k, mask };
        let mask = Mask { seed, threshold, scale: keep_scale };
        let first = block_x() * SKINNY;
        let count = (tokens - first).min(SKINNY);
        let mut row0 = 0;
        while row0 < rows {
            let a = Operand::new(a, rows, 2 * d_in.next_multiple_of(SKINNY_DEPTH));
            let (x, a) = (Side::<true>(Operand::new(x, tokens, d_in)), Side::<true>(a));
            let acc = tile_product((0, d_in), x, a, (first, row0), true, mask, |j| row0 + j < a_rows);
            each(acc, count, rows - row0, |t, j, value| {
                store(hidden.add((first + t) as usize * heads.hidden() as usize + (row0 + j) as usize), value);
            });
            row0 += SKINNY;
        }
        barrier();
        mix_tokens(heads, hidden, mixed, scale, first, first + count);
    }

    /// The adjoint of what follows [`down`]: from dy [tokens, padded d_out] and B as an operand [d_out, padded heads rank],
    /// `dhidden` [tokens, a_rows + heads] = [ddown | dlogits], again as the operand `dhidden16` [tokens, padded rows], a third time,
    /// if `through` isn't null, with zeros for A's part, and the operand `mixed` [tokens, padded heads rank]. `dmixed` is room for
    /// [tokens, heads rank]. `push` is [`gate_push`](crate::gate::gate_push)'s, or null. Grid: [tokens / 32], 256 threads.
    fn up_backward(
        dhidden: *mut f32,
        dhidden16: *mut u16,
        through: *mut u16,
        mixed: *mut u16,
        dmixed: *mut f32,
        tokens: u32,
        dy: *const u16,
        d_out: u32,
        b: *const u16,
        hidden: *const f32,
        push: *const f32,
        scale: f32,
        rows: u32,
        a_rows: u32,
        heads: u32,
        rank: u32,
        per_head: u32,
        gate: u32,
        sharpness: f32,
        heads_seed: u64,
        heads_threshold: u32,
        heads_scale: f32,
    ) {
        let mask = Mask { seed: heads_seed, threshold: heads_threshold, scale: heads_scale };
        let labels = core::ptr::null();
        let heads = Heads { a_rows, heads, rank, per_head, gate, labels, sharpness, top_k: heads, mask };
        let first = block_x() * SKINNY;
        let count = (tokens - first).min(SKINNY);
        let width = heads.mixed();
        let mut column0 = 0;
        while column0 < width {
            let (dy, b) = (Side::<true>(Operand::new(dy, tokens, d_out)), Side::<false>(Operand::new(b, d_out, width)));
            let acc = tile_product((0, d_out), dy, b, (first, column0), false, Mask::NONE, |_| false);
            each(acc, count, width - column0, |t, j, value| {
                let to = dmixed.add((first + t) as usize * width as usize + (column0 + j) as usize);
                store(to, heads.dropped(scale * value, first + t, column0 + j));
            });
            column0 += SKINNY;
        }
        barrier();
        unmix_tokens(heads, dhidden, mixed, dmixed, hidden, push, first, count);
        barrier();
        let pitch = padded(rows);
        assume(pitch > 0);
        let mut i = thread();
        while i < count * pitch {
            let (t, column) = ((first + i / pitch) as usize, i % pitch);
            let from = dhidden.add(t * heads.hidden() as usize + column as usize);
            let value = if column < rows { to_bf16(load(from)) } else { 0 };
            let at = t * pitch as usize + column as usize;
            store(dhidden16.add(at), value);
            if !through.is_null() {
                store(through.add(at), if column < a_rows { 0 } else { value });
            }
            i += THREADS;
        }
    }

    /// `out`(c, j) += scale · Σ_t D(big)[t, c] · small[t, j] for c < columns, j < rows, at `out[c · c_stride + j · j_stride]`: dB
    /// and d[A; R]. `big` is [tokens, padded columns], `small` [tokens, padded rows]; dropout is before rows j < a_rows. A block
    /// has `share` tokens, a multiple of 128. If that isn't all, the sums go to `parts` [shares, columns, rows] instead, for
    /// [`outer_total`]. Grid: [columns / 32, rows / 32 · shares], 256 threads.
    fn outer(
        out: *mut f32,
        c_stride: u32,
        j_stride: u32,
        tokens: u32,
        big: *const u16,
        columns: u32,
        small: *const u16,
        rows: u32,
        scale: f32,
        a_rows: u32,
        seed: u64,
        threshold: u32,
        keep_scale: f32,
        share: u32,
        parts: *mut f32,
    ) {
        let mask = Mask { seed, threshold, scale: keep_scale };
        let tiles = rows.div_ceil(SKINNY);
        assume(tiles > 0);
        let (number, c0, j0) = (block_y() / tiles, block_x() * SKINNY, block_y() % tiles * SKINNY);
        let tokens_here = (number * share, tokens.min(number * share + share));
        let (big, small) = (Operand::new(big, tokens, columns), Operand::new(small, tokens, rows));
        let (big, small) = (Side::<false>(big), Side::<false>(small));
        let acc = tile_product(tokens_here, big, small, (c0, j0), false, mask, |j| j0 + j < a_rows);
        each(acc, columns - c0, rows - j0, |c, j, value| {
            let (c, j) = ((c0 + c) as usize, (j0 + j) as usize);
            if share < tokens {
                store(parts.add((number as usize * columns as usize + c) * rows as usize + j), value);
            } else {
                let to = out.add(c * c_stride as usize + j * j_stride as usize);
                store(to, load(to) + scale * value);
            }
        });
    }

    /// `out`(c, j) += scale · Σ parts. Grid: [columns · rows / 256], 256 threads.
    fn outer_total(
        out: *mut f32,
        c_stride: u32,
        j_stride: u32,
        parts: *const f32,
        shares: u32,
        columns: u32,
        rows: u32,
        scale: f32,
    ) {
        assume(rows > 0);
        let i = block_x() * THREADS + thread();
        let (c, j) = (i / rows, i % rows);
        if c >= columns {
            return;
        }
        let (mut sum, mut number) = (0.0, 0);
        while number < shares {
            sum += load(parts.add((number as usize * columns as usize + c as usize) * rows as usize + j as usize));
            number += 1;
        }
        let to = out.add(c as usize * c_stride as usize + j as usize * j_stride as usize);
        store(to, load(to) + scale * sum);
    }

    /// dx [tokens, d_in] += D(ddown A): the part of dx that went through dropout. Grid:
    /// [d_in / 256, tokens / 8], 256 threads.
    fn dropped_add(
        dx: *mut u8,
        bf16: u32,
        tokens: u32,
        d_in: u32,
        dhidden: *const f32,
        hidden: u32,
        a: *const f32,
        a_rows: u32,
        seed: u64,
        threshold: u32,
        keep_scale: f32,
    ) {
        let mask = Mask { seed, threshold, scale: keep_scale };
        let dx = Output::new(dx, dx, bf16);
        let (column, first) = (block_x() * THREADS + thread(), block_y() * DROPPED_TOKENS);
        if column >= d_in {
            return;
        }
        let mut acc = [0.0; DROPPED_TOKENS as usize];
        let mut j = 0;
        while j < a_rows {
            let weight = load(a.add(j as usize * d_in as usize + column as usize));
            for t in 0..DROPPED_TOKENS {
                if first + t < tokens {
                    let d = load(dhidden.add((first + t) as usize * hidden as usize + j as usize));
                    acc[t as usize] = fma(d, weight, acc[t as usize]);
                }
            }
            j += 1;
        }
        for t in 0..DROPPED_TOKENS {
            if first + t < tokens {
                let at = (first + t) as usize * d_in as usize + column as usize;
                dx.put(at, mask.apply(acc[t as usize], first + t, column));
            }
        }
    }
}
