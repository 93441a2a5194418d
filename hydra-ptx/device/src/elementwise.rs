//! Value by value: rotations, SwiGLU.

use crate::math;
use crate::prelude::*;
use crate::sizes::THREADS;

/// This thread's value.
#[inline(always)]
fn index() -> u64 {
    block_x() as u64 * THREADS as u64 + thread() as u64
}

kernels! {
    /// Turns each pair (x[i], x[i + d/2]) of each head by its token's angle, or by `sign` −1 back; `table` [positions, d] holds
    /// cosines, then sines. Grid: [tokens · heads · d/2 / 256], 256 threads.
    fn rope(x: *mut f32, table: *const f32, positions: *const u32, tokens: u32, heads: u32, d: u32, sign: f32) {
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
        let (l, r) = (load(left), load(right));
        store(left, l * cos - r * sin);
        store(right, r * cos + l * sin);
    }

    /// out = silu(gate) ∘ up. Grid: [len / 256], 256 threads.
    fn swiglu(out: *mut f32, gate: *const f32, up: *const f32, len: u64) {
        if index() < len {
            let i = index() as usize;
            let g = load(gate.add(i));
            store(out.add(i), g * math::sigmoid(g) * load(up.add(i)));
        }
    }

    /// dgate: d out → d gate; dup is overwritten. Grid: [len / 256], 256 threads.
    fn swiglu_backward(dgate: *mut f32, dup: *mut f32, gate: *const f32, up: *const f32, len: u64) {
        if index() < len {
            let i = index() as usize;
            let (d, g, u) = (load(dgate.add(i)), load(gate.add(i)), load(up.add(i)));
            let sigmoid = math::sigmoid(g);
            store(dup.add(i), d * g * sigmoid);
            store(dgate.add(i), d * u * sigmoid * (1.0 + g * (1.0 - sigmoid)));
        }
    }
}
