//! Value by value, of bf16 activations: rotations, SwiGLU.

use crate::math;
use crate::prelude::*;
use crate::sizes::THREADS;

/// This thread's value.
#[inline(always)]
fn index() -> u64 {
    block_x() as u64 * THREADS as u64 + thread() as u64
}

#[inline(always)]
unsafe fn value(from: *const u16) -> f32 {
    from_bf16(load(from))
}

/// Two neighbours of an array, or its last value alone.
#[derive(Clone, Copy)]
struct Two {
    first: usize,
    alone: bool,
}

impl Two {
    /// This thread's of `len` values, if there are any left for it.
    #[inline(always)]
    fn of_thread(len: u64) -> Option<Self> {
        let first = 2 * index();
        (first < len).then_some(Self { first: first as usize, alone: first + 1 == len })
    }

    #[inline(always)]
    unsafe fn load(self, from: *const u16) -> [f32; 2] {
        let from = from.add(self.first);
        if self.alone { [value(from), 0.0] } else { unpack2(load(from.cast())) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u16, [x, y]: [f32; 2]) {
        let (to, both) = (to.add(self.first), pack_bf16(x, y));
        if self.alone { store(to, both as u16) } else { store(to.cast(), both) }
    }
}

kernels! {
    /// Turns each pair (x[i], x[i + d/2]) of each head by its token's angle, or by `sign` −1 back; `table` [positions, d] holds
    /// cosines, then sines. Grid: [tokens · heads · d/2 / 256], 256 threads.
    fn rope(x: *mut u16, table: *const f32, positions: *const u32, tokens: u32, heads: u32, d: u32, sign: f32) {
        let half = (d / 2) as u64;
        assume(half > 0 && heads > 0);
        let (head, i) = (index() / half, (index() % half) as usize);
        if head >= tokens as u64 * heads as u64 {
            return;
        }
        let position = load(positions.add((head / heads as u64) as usize));
        let row = table.add(position as usize * d as usize);
        let (cos, sin) = (load(row.add(i)), sign * load(row.add(i + half as usize)));
        let left = x.add(head as usize * d as usize + i);
        let right = left.add(half as usize);
        let (l, r) = (value(left), value(right));
        store(left, to_bf16(l * cos - r * sin));
        store(right, to_bf16(r * cos + l * sin));
    }

    /// out = silu(gate) ∘ up. Grid: [len / 512], 256 threads.
    fn swiglu(out: *mut u16, gate: *const u16, up: *const u16, len: u64) {
        let Some(two) = Two::of_thread(len) else { return };
        let (g, u) = (two.load(gate), two.load(up));
        let value = |i: usize| g[i] * math::sigmoid(g[i]) * u[i];
        two.store(out, [value(0), value(1)]);
    }

    /// dgate: d out → d gate; dup is overwritten. Grid: [len / 512], 256 threads.
    fn swiglu_backward(dgate: *mut u16, dup: *mut u16, gate: *const u16, up: *const u16, len: u64) {
        let Some(two) = Two::of_thread(len) else { return };
        let (d, g, u) = (two.load(dgate), two.load(gate), two.load(up));
        let gradients = |i: usize| {
            let sigmoid = math::sigmoid(g[i]);
            (d[i] * u[i] * sigmoid * (1.0 + g[i] * (1.0 - sigmoid)), d[i] * g[i] * sigmoid)
        };
        let ((dgate0, dup0), (dgate1, dup1)) = (gradients(0), gradients(1));
        two.store(dgate, [dgate0, dgate1]);
        two.store(dup, [dup0, dup1]);
    }
}
