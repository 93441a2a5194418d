//! Products with one small side: x [A; R]ᵀ with the gate behind it, dy B with the gate's adjoint behind it, and the adapter's
//! gradients, which sum over tokens. They are bound by reading x or dy, once.
//!
//! The large side is bf16. To f32's precision, nearly, on matrix instructions: the small operand is split into two bf16,
//! s = h + l, and the product is x h + x l with f32 sums (relative error 2⁻¹⁷); the router is sensitive. A block of 8 warps has a
//! tile of 32 x 32 results; tiles of the operands, 64 deep, pass through shared memory, the next one in registers meanwhile. Sums
//! have a fixed order. Dropout is a mask on x, and its factor one on the sum, so x stays bf16.

use crate::gate::{Heads, mix_tokens, unmix_tokens};
use crate::mask::Mask;
use crate::prelude::*;
use crate::rows::{Eight, Output, load_chunk, load_eight};
use crate::sizes::{DROPPED_TOKENS, SKINNY, SKINNY_DEPTH, THREADS};
use crate::tile::{a_fragment, at};

/// Bytes of a tile of bf16.
const TILE: u32 = SKINNY * SKINNY_DEPTH * 2;

/// How an operand lies: along k, a tile is [32 rows, 64 k], else [64 k, 32 rows], in chunks of eight neighbours. A thread loads one.
#[inline(always)]
fn chunk_of_thread(along: bool) -> (u32, u32) {
    let chunks = if along { SKINNY_DEPTH / 8 } else { SKINNY / 8 };
    (thread() / chunks, thread() % chunks)
}

/// The address of a chunk of a tile that lies so.
#[inline(always)]
fn chunk_at<const ALONG: bool>(tile: u32, row: u32, chunk: u32) -> u32 {
    if ALONG { at::<{ SKINNY_DEPTH / 8 }>(tile, row, chunk) } else { at::<{ SKINNY / 8 }>(tile, row, chunk) }
}

/// Stores this thread's chunk as two bf16 tiles whose sum is the value to 2⁻¹⁷: its upper half, and what that leaves.
#[inline(always)]
unsafe fn store_split<const ALONG: bool>(tile: u32, values: Eight) {
    let (row, chunk) = chunk_of_thread(ALONG);
    let high = pack8(values);
    let mut rest = [0.0; 8];
    for i in 0..8 {
        rest[i] = values[i] - from_bf16((high[i / 2] >> (i % 2 * 16)) as u16);
    }
    st_u4(chunk_at::<ALONG>(tile, row, chunk), high);
    st_u4(chunk_at::<ALONG>(tile + TILE, row, chunk), pack8(rest));
}

/// A [16, 16] of rows `16 m ..`, k from `16 step` on.
#[inline(always)]
unsafe fn left<const ALONG: bool>(tile: u32, m: u32, step: u32) -> [u32; 4] {
    if ALONG {
        return a_fragment::<{ SKINNY_DEPTH / 8 }>(tile, 16 * m, 2 * step);
    }
    let lane = lane();
    let k = 16 * step + lane / 16 * 8 + lane % 8;
    ldmatrix_transposed(chunk_at::<false>(tile, k, 2 * m + lane / 8 % 2))
}

/// Two B [16, 8] of rows `8 n ..` (its columns), k from `32 half` on.
#[inline(always)]
unsafe fn right<const ALONG: bool>(tile: u32, n: u32, half: u32) -> [u32; 4] {
    let lane = lane();
    if ALONG {
        ldmatrix(chunk_at::<true>(tile, 8 * n + lane % 8, 4 * half + lane / 8))
    } else {
        ldmatrix_transposed(chunk_at::<false>(tile, 32 * half + lane, n))
    }
}

/// acc += x · s, the lower halves of s first.
#[inline(always)]
unsafe fn multiply<const X_ALONG: bool>(acc: &mut [f32; 4], x: u32, m: u32, step: u32, s: [[u32; 2]; 2]) {
    let x = left::<X_ALONG>(x, m, step);
    mma_bf16(acc, x, s[1]);
    mma_bf16(acc, x, s[0]);
}

/// Σ_k x(i, k) · s(j, k) for a tile of 32 x 32: a warp has 16 x 8 of it, a thread four, see [`each`]. `x` and `s` give eight
/// neighbours, from a row and a first column of the matrix as it lies, counted from the tile's corner, which is at `corner` of x.
/// If `mask` drops anything, the columns for which `dropped` holds read x after dropout.
#[inline(always)]
unsafe fn tile_product<const X_ALONG: bool, const S_ALONG: bool>(
    depth: u32,
    x: impl Fn(u32, u32) -> [u32; 4],
    s: impl Fn(u32, u32) -> Eight,
    mask: Mask,
    corner: (u32, u32),
    dropped: impl Fn(u32) -> bool,
) -> [f32; 4] {
    let (plain_tile, dropped_tile, small_tile) = (shared(), shared() + TILE, shared() + 2 * TILE);
    let two = mask.threshold > 0;
    // Row and first column of this thread's chunk in a matrix that lies along k or not.
    let place = |along: bool, k0: u32| {
        let (row, chunk) = chunk_of_thread(along);
        if along { (row, k0 + 8 * chunk) } else { (k0 + row, 8 * chunk) }
    };
    let load = |k0: u32| {
        let ((x_row, x_column), (s_row, s_column)) = (place(X_ALONG, k0), place(S_ALONG, k0));
        (x(x_row, x_column), s(s_row, s_column))
    };
    let (m, n) = (warp() / 4, warp() % 4);
    let (mut plain, mut other) = ([0.0; 4], [0.0; 4]);
    let mut next = load(0);
    let mut k0 = 0;
    while k0 < depth {
        barrier();
        let (row, chunk) = chunk_of_thread(X_ALONG);
        st_u4(chunk_at::<X_ALONG>(plain_tile, row, chunk), next.0);
        if two {
            let (x_row, x_column) = place(X_ALONG, k0);
            let left = mask.cut(next.0, corner.0 + x_row, corner.1 + x_column);
            st_u4(chunk_at::<X_ALONG>(dropped_tile, row, chunk), left);
        }
        store_split::<S_ALONG>(small_tile, next.1);
        barrier();
        // On its way while this tile is multiplied.
        if k0 + SKINNY_DEPTH < depth {
            next = load(k0 + SKINNY_DEPTH);
        }
        for half in 0..2 {
            let (high, low) = (right::<S_ALONG>(small_tile, n, half), right::<S_ALONG>(small_tile + TILE, n, half));
            let s = [[[high[0], high[1]], [low[0], low[1]]], [[high[2], high[3]], [low[2], low[3]]]];
            for step in 0..2 {
                multiply::<X_ALONG>(&mut plain, plain_tile, m, 2 * half + step, s[step as usize]);
            }
            if two {
                for step in 0..2 {
                    multiply::<X_ALONG>(&mut other, dropped_tile, m, 2 * half + step, s[step as usize]);
                }
            }
        }
        k0 += SKINNY_DEPTH;
    }
    for i in 0..4 {
        if two && dropped(result_column(i)) {
            plain[i] = mask.scale * other[i];
        }
    }
    plain
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
    /// `hidden` [tokens, a_rows + heads] = [D(x) Aᵀ | gate(x Rᵀ)] and `mixed` [tokens, padded heads rank] = scale · H(gate ∘ down)
    /// as bf16. `x` is [tokens, padded d_in], `a` is [A; R], [rows, d_in]. Grid: [tokens / 32], 256 threads.
    fn down(
        hidden: *mut f32,
        mixed: *mut u16,
        tokens: u32,
        x: *const u16,
        d_in: u32,
        a: *const f32,
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
            let acc = tile_product::<true, true>(
                d_in,
                |t, k| load_chunk(x, padded(d_in), first + t, tokens, k),
                |j, k| load_eight(a, d_in, row0 + j, rows, k, d_in),
                mask,
                (first, 0),
                |j| row0 + j < a_rows,
            );
            each(acc, count, rows - row0, |t, j, value| {
                store(hidden.add((first + t) as usize * heads.hidden() as usize + (row0 + j) as usize), value);
            });
            row0 += SKINNY;
        }
        barrier();
        mix_tokens(heads, hidden, mixed, scale, first, first + count);
    }

    /// The adjoint of what follows [`down`]: from dy [tokens, padded d_out] and B [d_out, heads rank], `dhidden`
    /// [tokens, a_rows + heads] = [ddown | dlogits] and again as bf16 (`dhidden_operand` [tokens, padded rows]; with `dropped` A's
    /// part of it is zero), and `mixed` [tokens, heads rank]. `dmixed` is room for [tokens, heads rank].
    /// `push` is [`gate_push`](crate::gate::gate_push)'s, or null. Grid: [tokens / 32], 256 threads.
    fn up_backward(
        dhidden: *mut f32,
        dhidden_operand: *mut u16,
        mixed: *mut f32,
        dmixed: *mut f32,
        tokens: u32,
        dy: *const u16,
        d_out: u32,
        b: *const f32,
        hidden: *const f32,
        push: *const f32,
        scale: f32,
        rows: u32,
        dropped: u32,
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
            let acc = tile_product::<true, false>(
                d_out,
                |t, k| load_chunk(dy, padded(d_out), first + t, tokens, k),
                |k, j| load_eight(b, width, k, d_out, column0 + j, width),
                Mask::NONE,
                (first, 0),
                |_| false,
            );
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
            let through = column < rows && !(dropped != 0 && column < a_rows);
            let value = if through { load(dhidden.add(t * heads.hidden() as usize + column as usize)) } else { 0.0 };
            store(dhidden_operand.add(t * pitch as usize + column as usize), to_bf16(value));
            i += THREADS;
        }
    }

    /// `out`(c, j) += scale · Σ_t D(big)[t, c] · small[t, j] for c < columns, j < rows, at `out[c · c_stride + j · j_stride]`: dB
    /// and d[A; R]. `big` is [tokens, padded columns], `small` [tokens, small_pitch]; dropout is before rows j < a_rows.
    /// Grid: [columns / 32, rows / 32], 256 threads.
    fn outer(
        out: *mut f32,
        c_stride: u32,
        j_stride: u32,
        tokens: u32,
        big: *const u16,
        columns: u32,
        small: *const f32,
        small_pitch: u32,
        rows: u32,
        scale: f32,
        a_rows: u32,
        seed: u64,
        threshold: u32,
        keep_scale: f32,
    ) {
        let mask = Mask { seed, threshold, scale: keep_scale };
        let (c0, j0) = (block_x() * SKINNY, block_y() * SKINNY);
        let acc = tile_product::<false, false>(
            tokens,
            |t, c| load_chunk(big, padded(columns), t, tokens, c0 + c),
            |t, j| load_eight(small, small_pitch, t, tokens, j0 + j, rows),
            mask,
            (0, c0),
            |j| j0 + j < a_rows,
        );
        each(acc, columns - c0, rows - j0, |c, j, value| {
            let to = out.add((c0 + c) as usize * c_stride as usize + (j0 + j) as usize * j_stride as usize);
            store(to, load(to) + scale * value);
        });
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
