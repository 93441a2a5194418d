//! Row by row: RMSNorm, the embedding, gather and scatter, bf16 operands.

use crate::format::eight_of;
use crate::prelude::*;
use crate::sizes::THREADS;

/// Eight neighbours in memory.
pub type Eight = [f32; 8];

/// Eight values of row `row` of a [_, columns] matrix from `column` on, with zeros beyond its end.
#[inline(always)]
pub unsafe fn load_eight(from: *const f32, row: u32, column: u32, columns: u32) -> Eight {
    let from = from.add(row as usize * columns as usize + column as usize);
    if column + 8 <= columns && (from as usize).is_multiple_of(16) {
        let from = from.cast::<U4>();
        return floats(load(from).0, load(from.add(1)).0);
    }
    let mut values = [0.0; 8];
    for i in 0..8 {
        if column + i < columns {
            values[i as usize] = load(from.add(i as usize));
        }
    }
    values
}

/// bf16 from `index` on: all eight, or the first `len` and zeros. `aligned` says that `index` is a multiple of 8 and there are eight.
#[inline(always)]
pub unsafe fn load_bf16(from: *const u16, index: usize, len: u32, aligned: bool) -> Eight {
    let from = from.add(index);
    if aligned {
        return unpack8(load(from.cast::<U4>()).0);
    }
    let mut values = [0.0; 8];
    for i in 0..8 {
        if i < len {
            values[i as usize] = from_bf16(load(from.add(i as usize)));
        }
    }
    values
}

/// Eight values of a row of a bf16 operand [rows, pitch] from `column` on, a multiple of 8; zero outside of it.
#[inline(always)]
pub unsafe fn load_chunk(from: *const u16, pitch: u32, row: u32, rows: u32, column: u32) -> [u32; 4] {
    if row >= rows || column >= pitch {
        return [0; 4];
    }
    load(from.add(row as usize * pitch as usize + column as usize).cast::<U4>()).0
}

/// What a product writes: values of f32 or bf16, each in addition to one of the same kind in `before`, which may be null (nothing is
/// added), or the same memory.
#[derive(Clone, Copy)]
pub struct Output {
    at: *mut u8,
    before: *const u8,
    bf16: bool,
}

impl Output {
    /// `bf16` is 0 for f32.
    #[inline(always)]
    pub fn new(at: *mut u8, before: *const u8, bf16: u32) -> Self {
        Self { at, before, bf16: bf16 != 0 }
    }

    /// Value `index`.
    #[inline(always)]
    pub unsafe fn put(self, index: usize, value: f32) {
        let adds = !self.before.is_null();
        if self.bf16 {
            let before = if adds { from_bf16(load(self.before.cast::<u16>().add(index))) } else { 0.0 };
            store(self.at.cast::<u16>().add(index), to_bf16(before + value));
        } else {
            let before = if adds { load(self.before.cast::<f32>().add(index)) } else { 0.0 };
            store(self.at.cast::<f32>().add(index), before + value);
        }
    }

    /// Values from `index` on: all eight, or the first `len`. `aligned` says that `index` is a multiple of 8 and there are eight.
    #[inline(always)]
    pub unsafe fn put_row(self, index: usize, values: Eight, len: u32, aligned: bool) {
        if aligned {
            self.put_eight(index, values);
            return;
        }
        for i in 0..8 {
            if i < len {
                self.put(index + i as usize, values[i as usize]);
            }
        }
    }

    #[inline(always)]
    unsafe fn put_eight(self, index: usize, mut values: Eight) {
        let adds = !self.before.is_null();
        let mut before = [0.0; 8];
        if adds && self.bf16 {
            before = unpack8(load(self.before.cast::<u16>().add(index).cast::<U4>()).0);
        } else if adds {
            let at = self.before.cast::<f32>().add(index).cast::<U4>();
            before = floats(load(at).0, load(at.add(1)).0);
        }
        for i in 0..8 {
            values[i] += before[i];
        }
        if self.bf16 {
            store(self.at.cast::<u16>().add(index).cast(), U4(pack8(values)));
        } else {
            let at = self.at.cast::<f32>().add(index).cast::<U4>();
            let [a, b, c, d, e, f, g, h] = values;
            store(at, U4([a.to_bits(), b.to_bits(), c.to_bits(), d.to_bits()]));
            store(at.add(1), U4([e.to_bits(), f.to_bits(), g.to_bits(), h.to_bits()]));
        }
    }
}

/// sum + Σ a ∘ b.
#[inline(always)]
pub fn dot(a: Eight, b: Eight, mut sum: f32) -> f32 {
    for i in 0..8 {
        sum = fma(a[i], b[i], sum);
    }
    sum
}

/// Eight f32 from their bits.
#[inline(always)]
pub fn floats([a, b, c, d]: [u32; 4], [e, f, g, h]: [u32; 4]) -> Eight {
    let of = f32::from_bits;
    [of(a), of(b), of(c), of(d), of(e), of(f), of(g), of(h)]
}

kernels! {
    /// y = x · inv_rms · weight, inv_rms = 1 / √(mean x² + eps); x, y [rows, d]. Grid: [rows], 256 threads.
    fn rms_norm(y: *mut u16, inv_rms: *mut f32, x: *const f32, weight: *const f32, d: u32, eps: f32) {
        let row = block_x();
        let eight = |group: u32| load_eight(x, row, 8 * group, d);
        let (mut sum, mut group) = (0.0, thread());
        while 8 * group < d {
            let values = eight(group);
            sum = dot(values, values, sum);
            group += THREADS;
        }
        let inverse = 1.0 / sqrt(over_block::<Sum>(sum, shared()) / d as f32 + eps);
        if thread() == 0 {
            store(inv_rms.add(row as usize), inverse);
        }
        let y = Output::new(y.cast(), core::ptr::null(), 1);
        group = thread();
        while 8 * group < d {
            let (mut values, weights) = (eight(group), load_eight(weight, 0, 8 * group, d));
            for i in 0..8 {
                values[i] = values[i] * inverse * weights[i];
            }
            y.put_row(row as usize * d as usize + 8 * group as usize, values, d - 8 * group, d.is_multiple_of(8));
            group += THREADS;
        }
    }

    /// dx += inv_rms · (dy ∘ w − x · inv_rms² · mean(dy ∘ w ∘ x)). Grid: [rows], 256 threads.
    fn rms_norm_backward(
        dx: *mut f32,
        dy: *const f32,
        x: *const f32,
        inv_rms: *const f32,
        weight: *const f32,
        d: u32,
    ) {
        let row = block_x();
        let eight = |group: u32| load_eight(x, row, 8 * group, d);
        let scaled = |group: u32| {
            let (mut values, weights) = (load_eight(dy, row, 8 * group, d), load_eight(weight, 0, 8 * group, d));
            for i in 0..8 {
                values[i] *= weights[i];
            }
            values
        };
        let (mut sum, mut group) = (0.0, thread());
        while 8 * group < d {
            sum = dot(scaled(group), eight(group), sum);
            group += THREADS;
        }
        let inverse = load(inv_rms.add(row as usize));
        let along = inverse * inverse * (over_block::<Sum>(sum, shared()) / d as f32);
        let dx = Output::new(dx.cast(), dx.cast(), 0);
        group = thread();
        while 8 * group < d {
            let (mut values, x) = (scaled(group), eight(group));
            for i in 0..8 {
                values[i] = inverse * (values[i] - x[i] * along);
            }
            dx.put_row(row as usize * d as usize + 8 * group as usize, values, d - 8 * group, d.is_multiple_of(8));
            group += THREADS;
        }
    }

    /// out[t] = table[ids[t]], decoded; out [tokens, d]. Grid: [tokens], 256 threads.
    fn embed(out: *mut f32, table: *const u8, scales: *const u8, format: u32, pitch: u32, d: u32, ids: *const u32) {
        let (id, out) = (load(ids.add(block_x() as usize)), out.add(block_x() as usize * d as usize));
        let mut group = thread();
        while 8 * group < d {
            let values = eight_of(format, table, scales, id, group, pitch);
            for i in 0..8 {
                let column = 8 * group + i;
                if column < d {
                    store(out.add(column as usize), values[i as usize]);
                }
            }
            group += THREADS;
        }
    }

    /// out[i] = x[rows[i]], rows of width d. Grid: [rows], 256 threads.
    fn gather(out: *mut f32, x: *const f32, rows: *const u32, d: u32) {
        let from = x.add(load(rows.add(block_x() as usize)) as usize * d as usize);
        let to = out.add(block_x() as usize * d as usize);
        let mut i = thread();
        while i < d {
            store(to.add(i as usize), load(from.add(i as usize)));
            i += THREADS;
        }
    }

    /// out[rows[i]] = x[i]; the rest is for the caller to zero. Grid: [rows], 256 threads.
    fn scatter(out: *mut f32, x: *const f32, rows: *const u32, d: u32) {
        let to = out.add(load(rows.add(block_x() as usize)) as usize * d as usize);
        let from = x.add(block_x() as usize * d as usize);
        let mut i = thread();
        while i < d {
            store(to.add(i as usize), load(from.add(i as usize)));
            i += THREADS;
        }
    }

    /// `out` = w, a matrix of `chunks` times eight values in blocks, as bf16. Such rows have no padding, so they are one long row.
    /// Grid: [chunks / 256], 256 threads.
    fn decode(out: *mut u16, format: u32, w: *const u8, scales: *const u8, chunks: u32) {
        let i = block_x() * THREADS + thread();
        if i < chunks {
            store(out.cast::<U4>().add(i as usize), U4(pack8(eight_of(format, w, scales, 0, i, 0))));
        }
    }

    /// `out` [rows, padded width] = x [rows, width] as bf16, the padding zero; x is f32 or, with `bf16`, bf16. Grid:
    /// [rows · padded width / 8 / 256], 256 threads.
    fn operand(out: *mut u16, x: *const u8, bf16: u32, rows: u32, width: u32) {
        let chunks = padded(width) / 8;
        assume(chunks > 0);
        let i = block_x() as u64 * THREADS as u64 + thread() as u64;
        if i >= rows as u64 * chunks as u64 {
            return;
        }
        let (row, column) = ((i / chunks as u64) as u32, (i % chunks as u64) as u32 * 8);
        let values = if bf16 == 0 {
            load_eight(x.cast(), row, column, width)
        } else {
            let index = row as usize * width as usize + column as usize;
            load_bf16(x.cast(), index, width - column, width.is_multiple_of(8))
        };
        store(out.cast::<U4>().add(i as usize), U4(pack8(values)));
    }
}
