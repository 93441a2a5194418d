//! Value by value, of bf16 activations: rotations, SwiGLU. A thread has eight neighbours, 16 bytes: with fewer, too little of memory's
//! time would be used.

use crate::math;
use crate::prelude::*;
use crate::rows::{Eight, Output, load_bf16};
use crate::sizes::THREADS;

/// This thread's number.
#[inline(always)]
fn index() -> u64 {
    block_x() as u64 * THREADS as u64 + thread() as u64
}

/// Eight neighbours of an array, or those of them that there are.
#[derive(Clone, Copy)]
struct Group {
    first: usize,
    len: u32,
    /// Whether `first` is a multiple of 8, and all eight are there.
    whole: bool,
}

impl Group {
    /// This thread's of `len` values, if there are any left for it.
    #[inline(always)]
    fn of_thread(len: u64) -> Option<Self> {
        let first = 8 * index();
        let left = len.saturating_sub(first).min(8) as u32;
        (left > 0).then_some(Self { first: first as usize, len: left, whole: left == 8 })
    }

    #[inline(always)]
    unsafe fn load(self, from: *const u16) -> Eight {
        load_bf16(from, self.first, self.len, self.whole)
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u16, values: Eight) {
        Output::new(to.cast(), core::ptr::null(), 1).put_row(self.first, values, self.len, self.whole);
    }
}

kernels! {
    /// Turns each pair (x[i], x[i + d/2]) of each head by its token's angle, or by `sign` −1 back; `table` [positions, d] holds
    /// cosines, then sines. Grid: [tokens · heads · (d/2 / 8) / 256], 256 threads.
    fn rope(x: *mut u16, table: *const f32, positions: *const u32, tokens: u32, heads: u32, d: u32, sign: f32) {
        let half = d / 2;
        let groups = half.div_ceil(8) as u64;
        assume(groups > 0 && heads > 0);
        let (head, i) = (index() / groups, (index() % groups) as u32 * 8);
        if head >= tokens as u64 * heads as u64 {
            return;
        }
        let position = load(positions.add((head / heads as u64) as usize));
        let row = table.add(position as usize * d as usize + i as usize);
        let first = head as usize * d as usize + i as usize;
        let left = Group { first, len: (half - i).min(8), whole: half.is_multiple_of(8) };
        let right = Group { first: first + half as usize, ..left };
        let (l, r) = (left.load(x), right.load(x));
        let (mut turned_l, mut turned_r) = ([0.0; 8], [0.0; 8]);
        for i in 0..8 {
            if i < left.len as usize {
                let (cos, sin) = (load(row.add(i)), sign * load(row.add(i + half as usize)));
                turned_l[i] = l[i] * cos - r[i] * sin;
                turned_r[i] = r[i] * cos + l[i] * sin;
            }
        }
        left.store(x, turned_l);
        right.store(x, turned_r);
    }

    /// out = silu(gate) ∘ up. Grid: [len / 2048], 256 threads.
    fn swiglu(out: *mut u16, gate: *const u16, up: *const u16, len: u64) {
        let Some(group) = Group::of_thread(len) else { return };
        let (g, u) = (group.load(gate), group.load(up));
        let mut values = [0.0; 8];
        for i in 0..8 {
            values[i] = g[i] * math::sigmoid(g[i]) * u[i];
        }
        group.store(out, values);
    }

    /// dgate: d out → d gate; dup is overwritten. Grid: [len / 2048], 256 threads.
    fn swiglu_backward(dgate: *mut u16, dup: *mut u16, gate: *const u16, up: *const u16, len: u64) {
        let Some(group) = Group::of_thread(len) else { return };
        let (d, g, u) = (group.load(dgate), group.load(gate), group.load(up));
        let (mut to_gate, mut to_up) = ([0.0; 8], [0.0; 8]);
        for i in 0..8 {
            let sigmoid = math::sigmoid(g[i]);
            to_gate[i] = d[i] * u[i] * sigmoid * (1.0 + g[i] * (1.0 - sigmoid));
            to_up[i] = d[i] * g[i] * sigmoid;
        }
        group.store(dgate, to_gate);
        group.store(dup, to_up);
    }
}
