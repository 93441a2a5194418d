//! The adapter's first product for many tokens, x [A; R]ᵀ, and its gate; [`crate::lora_matvec`] has those for a few.
//!
//! The time of this kernel is that of reading x once. So x goes from the device's memory straight into registers, and
//! a thread has 128 bytes of it on their way while it multiplies the 128 before. A block has 32 tokens. Its warps take
//! turns along the columns, and their sums are added at the end.
//!
//! A matrix instruction may sum over k in any order, as long as both operands have the same one. Of a row of x, the
//! four lanes that share it load 16 bytes each: those eight columns are four k of each of two instructions.
//!
//! [A; R] is f32. It is split into two parts of bf16, s = h + l, and the product is x h + x l (relative error 2⁻¹⁷),
//! because the router is sensitive to rounding.

use crate::gate::{Adapter, Row, SharedRow, mix};
use crate::kernels::adapter::{LoraDownParams, PadParams};
use crate::mask::Mask;
use crate::prelude::*;
use crate::rows::{floats, load_eight};
use crate::sizes::{
    LORA_DOWN_PITCH, LORA_DOWN_ROUNDED, LORA_DOWN_ROWS, LORA_DOWN_SUMS, LORA_DOWN_TOKENS, THREADS, lora_down_state,
};

/// `out` [rows, padded] = x [rows, width], each row filled up with zeros to a multiple of 8. Grid: [rows · padded /
/// 256], 256 threads.
#[inline(always)]
pub unsafe fn pad(p: PadParams) {
    let pitch = padded(p.width);
    assume(pitch > 0);
    let i = block_x() * THREADS + thread();
    let (row, column) = (i / pitch, i % pitch);
    if row < p.rows {
        let from = p.x.add(row as usize * p.width as usize + column as usize);
        store(p.out.add(i as usize), if column < p.width { load(from) } else { 0.0 });
    }
}

impl LoraDownParams {
    #[inline(always)]
    fn adapter(&self) -> Adapter {
        let &Self { a_rows, lora_heads, rank, per_head_a, gate, labels, inverse_temperature, top_k, .. } = self;
        let head_dropout = Mask { seed: self.head_seed, threshold: self.head_threshold, scale: self.head_keep_scale };
        Adapter { a_rows, lora_heads, rank, per_head_a, gate, labels, inverse_temperature, top_k, head_dropout }
    }
}

/// `adapter_state` = [D(x) Aᵀ | gate(x Rᵀ)] and the operand `mixed` = scale · H(gate ∘ lora_down), where D and H are
/// dropout of x and of the heads; and B as an operand. Grid: [tokens / 32 + d_out · columns of `mixed` / 8 / 2048], 256
/// threads.
#[inline(always)]
pub unsafe fn lora_down(p: LoraDownParams) {
    let product_blocks = p.tokens.div_ceil(LORA_DOWN_TOKENS);
    if block_x() >= product_blocks {
        round_b(&p, block_x() - product_blocks);
        return;
    }
    let (adapter, rows) = (p.adapter(), p.stacked_rows);
    let first = block_x() * LORA_DOWN_TOKENS;
    let count = (p.tokens - first).min(LORA_DOWN_TOKENS);
    let width = adapter.state_width();
    let in_shared = lora_down_state(width) > 0;
    let of_shared = |t: u32| SharedRow(shared() + LORA_DOWN_SUMS + t * (width | 1) * 4);
    let of_device = |t: u32| p.adapter_state.wrapping_add((first + t) as usize * width as usize);
    let mut row0 = 0;
    while row0 < rows {
        // Other threads may still add the sums of the rows before.
        barrier();
        let turn = Turn { first, row0, thread: opaque(thread()) };
        match (p.threshold > 0, rows - row0 <= 16) {
            (false, true) => Tiles::<1, 2, false>::new(&p, turn).run(),
            (false, false) => Tiles::<2, 1, false>::new(&p, turn).run(),
            (true, true) => Tiles::<1, 2, true>::new(&p, turn).run(),
            (true, false) => Tiles::<2, 1, true>::new(&p, turn).run(),
        }
        barrier();
        let (t, mut j) = (turn.thread % LORA_DOWN_TOKENS, turn.thread / LORA_DOWN_TOKENS);
        while t < count && j < (rows - row0).min(LORA_DOWN_ROWS) {
            let (row, mut sum) = (row0 + j, 0.0);
            for warp in 0..THREADS / WARP {
                sum += ld_f32(sum_at(warp, j, t));
            }
            if p.threshold > 0 && row < p.a_rows {
                sum *= p.keep_scale;
            }
            if in_shared {
                of_shared(t).put(row, sum)
            } else {
                of_device(t).put(row, sum)
            }
            j += THREADS / LORA_DOWN_TOKENS;
        }
        row0 += LORA_DOWN_ROWS;
    }
    barrier();
    if !in_shared {
        mix(adapter, of_device, (p.mixed, p.mixed_pitch), p.scale, first, count);
        return;
    }
    mix(adapter, of_shared, (p.mixed, p.mixed_pitch), p.scale, first, count);
    assume(width > 0);
    let mut i = thread();
    while i < count * width {
        let value = of_shared(i / width).get(i % width);
        store(p.adapter_state.add(first as usize * width as usize + i as usize), value);
        i += THREADS;
    }
}

/// Rounds a part of B: eight times eight values a thread, which it loads before it stores any.
#[inline(always)]
unsafe fn round_b(p: &LoraDownParams, part: u32) {
    let width = p.adapter().mixed_width();
    let chunks = padded(width) / 8;
    assume(chunks > 0);
    let (count, number) = (p.d_out * chunks, |n: usize| (part * LORA_DOWN_ROUNDED + n as u32) * THREADS + thread());
    let mut values = [[0.0; 8]; LORA_DOWN_ROUNDED as usize];
    if width.is_multiple_of(8) && (p.b as usize).is_multiple_of(16) {
        for n in 0..values.len() {
            let from = p.b.cast::<U4>().add(2 * number(n).min(count - 1) as usize);
            values[n] = floats(load(from).0, load(from.add(1)).0);
        }
    } else {
        for n in 0..values.len() {
            let i = number(n).min(count - 1);
            values[n] = load_eight(p.b, i / chunks, i % chunks * 8, width);
        }
    }
    for n in 0..values.len() {
        let i = number(n);
        if i < count {
            let to = p.b_bf16.add((i / chunks) as usize * p.b_bf16_pitch as usize + (i % chunks * 8) as usize);
            store(to.cast(), U4(pack8(values[n])));
        }
    }
}

/// Where a warp's sum of row `j` and token `t` lies in shared memory.
#[inline(always)]
fn sum_at(warp: u32, j: u32, t: u32) -> u32 {
    shared() + ((warp * LORA_DOWN_ROWS + j) * LORA_DOWN_PITCH + t) * 4
}

/// What a thread computes in one turn.
#[derive(Clone, Copy)]
struct Turn {
    /// The block's first token.
    first: u32,
    /// The first row of [A; R].
    row0: u32,
    /// This thread. The compiler doesn't know that it is the same in each turn: else it would compute what depends on
    /// it once for all of them, in more registers than there are.
    thread: u32,
}

impl Turn {
    #[inline(always)]
    fn lane(self) -> u32 {
        self.thread % WARP
    }

    #[inline(always)]
    fn warp(self) -> u32 {
        self.thread / WARP
    }
}

/// Rows of x of which a thread loads columns: one for each of four matrix instructions of 8 tokens.
const X_ROWS: usize = 4;

/// What a thread holds of a chunk of 32 P columns: eight of each 32, in four rows of x and in 2 M rows of [A; R].
struct Chunk<const M: usize, const P: usize> {
    x: [[[u32; 4]; P]; X_ROWS],
    s: [[[[f32; 8]; P]; 2]; M],
}

/// A thread's sums of 16 rows of [A; R].
type Sums = [[f32; 4]; X_ROWS];

/// A warp's product of 16 M rows of [A; R] and 32 tokens.
struct Tiles<const M: usize, const P: usize, const DROPS: bool> {
    turn: Turn,
    /// The thread's rows. Beyond the last row the last one is read again, and its results are not used.
    x: [*const u16; X_ROWS],
    s: [[*const f32; 2]; M],
    /// Columns of both, a multiple of 8.
    columns: u32,
    /// Dropout of x for rows of A.
    mask: Mask,
    /// Rows of A, counted from this turn's first row.
    a_rows: u32,
}

impl<const M: usize, const P: usize, const DROPS: bool> Tiles<M, P, DROPS> {
    /// Columns of a chunk.
    const WIDTH: u32 = 32 * P as u32;

    #[inline(always)]
    unsafe fn new(p: &LoraDownParams, turn: Turn) -> Self {
        let columns = padded(p.d_in);
        let row = |first: u32, i: usize, end: u32| (first + turn.lane() / 4 + 8 * i as u32).min(end - 1);
        let x = |i: usize| p.x.wrapping_add(row(turn.first, i, p.tokens) as usize * p.x_pitch as usize);
        let s = |i: usize| p.a.wrapping_add(row(turn.row0, i, p.stacked_rows) as usize * columns as usize);
        Self {
            turn,
            x: core::array::from_fn(x),
            s: core::array::from_fn(|m| [s(2 * m), s(2 * m + 1)]),
            columns,
            mask: Mask { seed: p.seed, threshold: p.threshold, scale: p.keep_scale },
            a_rows: p.a_rows.saturating_sub(turn.row0),
        }
    }

    /// The first of a thread's columns in a part of a chunk.
    #[inline(always)]
    fn column(&self, chunk: u32, part: usize) -> u32 {
        chunk * Self::WIDTH + part as u32 * 32 + self.turn.lane() % 4 * 8
    }

    /// Loads a chunk, with zeros beyond the last column.
    #[inline(always)]
    unsafe fn fetch(&self, chunk: u32) -> Chunk<M, P> {
        let mut to = Chunk { x: [[[0; 4]; P]; X_ROWS], s: [[[[0.0; 8]; P]; 2]; M] };
        for part in 0..P {
            let column = self.column(chunk, part) as usize;
            if column >= self.columns as usize {
                continue;
            }
            for i in 0..X_ROWS {
                to.x[i][part] = load(self.x[i].add(column).cast::<U4>()).0;
            }
            for m in 0..M {
                for half in 0..2 {
                    let from = self.s[m][half].add(column).cast::<U4>();
                    to.s[m][half][part] = floats(load(from).0, load(from.add(1)).0);
                }
            }
        }
        to
    }

    /// sums += s xᵀ over eight columns of each thread. `rows` has a bit mask for each of the thread's two rows of s.
    #[inline(always)]
    unsafe fn multiply_part(sums: &mut Sums, s: &[[[u32; 4]; 2]; 2], rows: [u32; 2], x: &[[u32; 4]; X_ROWS]) {
        for part in 0..2 {
            let s = s[part];
            for k in 0..2 {
                let (k, next) = (2 * k, 2 * k + 1);
                let left = [s[0][k] & rows[0], s[1][k] & rows[1], s[0][next] & rows[0], s[1][next] & rows[1]];
                for i in 0..X_ROWS {
                    mma_bf16(&mut sums[i], left, [x[i][k], x[i][next]]);
                }
            }
        }
    }

    /// sums += s xᵀ over a chunk.
    #[inline(always)]
    unsafe fn multiply(&self, sums: &mut [Sums; M], chunk: &Chunk<M, P>, number: u32) {
        for part in 0..P {
            let (mut x, mut dropped) = ([[0; 4]; X_ROWS], [[0; 4]; X_ROWS]);
            for i in 0..X_ROWS {
                x[i] = chunk.x[i][part];
                if DROPS {
                    let row = self.turn.first + self.turn.lane() / 4 + 8 * i as u32;
                    dropped[i] = self.mask.cut(x[i], row, self.column(number, part));
                }
            }
            for m in 0..M {
                let s = split([chunk.s[m][0][part], chunk.s[m][1][part]]);
                if !DROPS {
                    Self::multiply_part(&mut sums[m], &s, [!0; 2], &x);
                    continue;
                }
                // A's rows read x after dropout, the router's x itself.
                let row = 16 * m as u32;
                let of_a = |row: u32| if row + self.turn.lane() / 4 < self.a_rows { !0u32 } else { 0 };
                let of_a = [of_a(row), of_a(row + 8)];
                if row < self.a_rows {
                    Self::multiply_part(&mut sums[m], &s, of_a, &dropped);
                }
                if row + 16 > self.a_rows {
                    Self::multiply_part(&mut sums[m], &s, [!of_a[0], !of_a[1]], &x);
                }
            }
        }
    }

    /// Writes the warp's sums to shared memory. Two chunks have registers of their own: copying one to the other would
    /// wait for it to arrive.
    #[inline(always)]
    unsafe fn run(&self) {
        let (mut sums, warps) = ([[[0.0; 4]; X_ROWS]; M], THREADS / WARP);
        let mut number = self.turn.warp();
        let mut even = self.fetch(number);
        let mut odd = self.fetch(number + warps);
        while number * Self::WIDTH < self.columns {
            self.multiply(&mut sums, &even, number);
            even = self.fetch(number + 2 * warps);
            number += warps;
            // The compiler moves no loads across this branch: else it would start all of them after both products.
            if number * Self::WIDTH >= self.columns {
                break;
            }
            self.multiply(&mut sums, &odd, number);
            odd = self.fetch(number + 2 * warps);
            number += warps;
        }
        for m in 0..M {
            for i in 0..X_ROWS {
                let (j, t) = (16 * m as u32 + self.turn.lane() / 4, 8 * i as u32 + self.turn.lane() % 4 * 2);
                let sums = sums[m][i];
                st_f2(sum_at(self.turn.warp(), j, t), [sums[0], sums[1]]);
                st_f2(sum_at(self.turn.warp(), j + 8, t), [sums[2], sums[3]]);
            }
        }
    }
}

/// Eight values of two rows in two parts of bf16, whose sums are the values to 2⁻¹⁷.
#[inline(always)]
fn split(values: [[f32; 8]; 2]) -> [[[u32; 4]; 2]; 2] {
    let (mut high, mut low) = ([[0; 4]; 2], [[0; 4]; 2]);
    for row in 0..2 {
        high[row] = pack8(values[row]);
        let (rounded, mut rest) = (unpack8(high[row]), [0.0; 8]);
        for i in 0..8 {
            rest[i] = values[row][i] - rounded[i];
        }
        low[row] = pack8(rest);
    }
    [high, low]
}
