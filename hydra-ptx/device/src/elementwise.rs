//! Elementwise operations on bf16 activations: rotary embedding, SwiGLU. A thread has eight neighbours, 16 bytes:
//! smaller loads would not use the memory's bandwidth.

use crate::kernels::model::{RopeParams, SwigluBackwardParams, SwigluParams};
use crate::math;
use crate::prelude::*;
use crate::rows::{Eight, Output, load_bf16};
use crate::sizes::THREADS;

/// This thread's number.
#[inline(always)]
fn index() -> u64 {
    block_x() as u64 * THREADS as u64 + thread() as u64
}

/// A thread's row and first column in a matrix [rows, d].
#[derive(Clone, Copy)]
struct Place {
    row: usize,
    column: u32,
    d: u32,
}

impl Place {
    /// This thread's, if it has one.
    #[inline(always)]
    unsafe fn of_thread(rows: u32, d: u32) -> Option<Self> {
        let (groups, i) = (d.div_ceil(8), block_x() * THREADS + thread());
        assume(groups > 0);
        let (row, column) = (i / groups, i % groups * 8);
        (row < rows).then_some(Self { row: row as usize, column, d })
    }

    /// The group in a matrix with `pitch` elements from a row to the next.
    #[inline(always)]
    fn group(self, pitch: u32) -> Group {
        Group {
            first: self.row * pitch as usize + self.column as usize,
            len: (self.d - self.column).min(8),
            whole: self.d.is_multiple_of(8) && pitch.is_multiple_of(8),
        }
    }
}

/// Eight neighbours in an array, or fewer at its end.
#[derive(Clone, Copy)]
struct Group {
    first: usize,
    len: u32,
    /// Whether `first` is a multiple of 8, and `len` is 8.
    whole: bool,
}

impl Group {
    #[inline(always)]
    unsafe fn load(self, from: *const u16) -> Eight {
        load_bf16(from, self.first, self.len, self.whole)
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u16, values: Eight) {
        Output::new(to.cast(), core::ptr::null(), 1).put_row(self.first, values, self.len, self.whole);
    }
}

/// Rotates each pair (x[i], x[i + d/2]) of each head by its token's angle. Grid: [tokens · heads · (d/2 / 8) / 256],
/// 256 threads.
#[inline(always)]
pub unsafe fn rope(p: RopeParams) {
    let half = p.d / 2;
    let groups = half.div_ceil(8) as u64;
    assume(groups > 0 && p.n_heads > 0);
    let (head, i) = (index() / groups, (index() % groups) as u32 * 8);
    if head >= p.tokens as u64 * p.n_heads as u64 {
        return;
    }
    let (token, head) = ((head / p.n_heads as u64) as usize, (head % p.n_heads as u64) as usize);
    let position = load(p.positions.add(token));
    let row = p.table.add(position as usize * p.d as usize + i as usize);
    let first = token * p.pitch as usize + head * p.d as usize + i as usize;
    let whole = half.is_multiple_of(8) && p.pitch.is_multiple_of(8);
    let left = Group { first, len: (half - i).min(8), whole };
    let right = Group { first: first + half as usize, ..left };
    let (l, r) = (left.load(p.x), right.load(p.x));
    let (mut rotated_l, mut rotated_r) = ([0.0; 8], [0.0; 8]);
    for i in 0..8 {
        if i < left.len as usize {
            let (cos, sin) = (load(row.add(i)), p.sign * load(row.add(i + half as usize)));
            rotated_l[i] = l[i] * cos - r[i] * sin;
            rotated_r[i] = r[i] * cos + l[i] * sin;
        }
    }
    left.store(p.x, rotated_l);
    right.store(p.x, rotated_r);
}

/// out = silu(gate) ∘ up. Grid: [rows · (d / 8) / 256], 256 threads.
#[inline(always)]
pub unsafe fn swiglu(p: SwigluParams) {
    let Some(place) = Place::of_thread(p.rows, p.d) else { return };
    let group = place.group(p.d);
    let (g, u) = (group.load(p.gate), group.load(p.up));
    let mut values = [0.0; 8];
    for i in 0..8 {
        values[i] = g[i] * math::sigmoid(g[i]) * u[i];
    }
    place.group(p.pitch).store(p.out, values);
}

/// The gradients of gate and up. Grid: [rows · (d / 8) / 256], 256 threads.
#[inline(always)]
pub unsafe fn swiglu_backward(p: SwigluBackwardParams) {
    let Some(place) = Place::of_thread(p.rows, p.d) else { return };
    let (group, gate_group) = (place.group(p.d), place.group(p.dgate_pitch));
    let (d, g, u) = (gate_group.load(p.dgate), group.load(p.gate), group.load(p.up));
    let (mut dgate, mut dup) = ([0.0; 8], [0.0; 8]);
    for i in 0..8 {
        let sigmoid = math::sigmoid(g[i]);
        dgate[i] = d[i] * u[i] * sigmoid * (1.0 + g[i] * (1.0 - sigmoid));
        dup[i] = d[i] * g[i] * sigmoid;
    }
    gate_group.store(p.dgate, dgate);
    place.group(p.dup_pitch).store(p.dup, dup);
}
