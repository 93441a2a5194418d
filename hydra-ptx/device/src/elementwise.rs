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

    /// out = silu(gate) ∘ up. Grid: [len / 256], 256 threads.
    fn swiglu(out: *mut u16, gate: *const u16, up: *const u16, len: u64) {
        if index() < len {
            let i = index() as usize;
            let g = value(gate.add(i));
            store(out.add(i), to_bf16(g * math::sigmoid(g) * value(up.add(i))));
        }
    }

    /// dgate: d out → d gate; dup is overwritten. Grid: [len / 256], 256 threads.
    fn swiglu_backward(dgate: *mut u16, dup: *mut u16, gate: *const u16, up: *const u16, len: u64) {
        if index() < len {
            let i = index() as usize;
            let (d, g, u) = (value(dgate.add(i)), value(gate.add(i)), value(up.add(i)));
            let sigmoid = math::sigmoid(g);
            store(dup.add(i), to_bf16(d * g * sigmoid));
            store(dgate.add(i), to_bf16(d * u * sigmoid * (1.0 + g * (1.0 - sigmoid))));
        }
    }
}
