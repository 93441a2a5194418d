//! Row by row: RMSNorm, the embedding, gather and scatter, bf16 operands; and how products load and store eight values
//! at once.

use crate::format::eight_of;
use crate::kernels::dense::{DecodeParams, OperandParams};
use crate::kernels::model::{AddBiasParams, EmbedParams, MoveRowsParams, RmsNormBackwardParams, RmsNormParams};
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

/// Eight bf16 from `index` on, with zeros from the `len`-th on. `aligned` says that `index` is a multiple of 8 and
/// `len` at least 8.
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

/// Eight values of row `row` of a bf16 operand [_, columns] from `column` on, a multiple of 8; zero behind its end.
#[inline(always)]
pub unsafe fn load_chunk(from: *const u16, pitch: u32, row: u32, columns: u32, column: u32) -> [u32; 4] {
    if column >= columns {
        return [0; 4];
    }
    load(from.add(row as usize * pitch as usize + column as usize).cast::<U4>()).0
}

/// What a product writes: values of f32 or bf16, each plus a value of the same kind in `addend`, which may be null
/// (nothing is added) or the same memory (the product is accumulated).
#[derive(Clone, Copy)]
pub struct Output {
    at: *mut u8,
    addend: *const u8,
    bf16: bool,
}

impl Output {
    /// `bf16` is 1 for bf16, 0 for f32.
    #[inline(always)]
    pub fn new(at: *mut u8, addend: *const u8, bf16: u32) -> Self {
        Self { at, addend, bf16: bf16 != 0 }
    }

    /// Writes value `index`.
    #[inline(always)]
    pub unsafe fn put(self, index: usize, value: f32) {
        let has_addend = !self.addend.is_null();
        if self.bf16 {
            let addend = if has_addend { from_bf16(load(self.addend.cast::<u16>().add(index))) } else { 0.0 };
            store(self.at.cast::<u16>().add(index), to_bf16(addend + value));
        } else {
            let addend = if has_addend { load(self.addend.cast::<f32>().add(index)) } else { 0.0 };
            store(self.at.cast::<f32>().add(index), addend + value);
        }
    }

    /// Writes values from `index` on: all eight, or the first `len`. `aligned` says that `index` is a multiple of 8 and
    /// there are eight.
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
        let has_addend = !self.addend.is_null();
        let mut addend = [0.0; 8];
        if has_addend && self.bf16 {
            addend = unpack8(load(self.addend.cast::<u16>().add(index).cast::<U4>()).0);
        } else if has_addend {
            let at = self.addend.cast::<f32>().add(index).cast::<U4>();
            addend = floats(load(at).0, load(at.add(1)).0);
        }
        for i in 0..8 {
            values[i] += addend[i];
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

/// y = x · inv_rms · weight, inv_rms = 1 / √(mean x² + eps). Grid: [rows], 256 threads.
#[inline(always)]
pub unsafe fn rms_norm(p: RmsNormParams) {
    let (row, d) = (block_x(), p.d);
    let eight = |group: u32| load_eight(p.x, row, 8 * group, d);
    let (mut sum, mut group) = (0.0, thread());
    while 8 * group < d {
        let values = eight(group);
        sum = dot(values, values, sum);
        group += THREADS;
    }
    let inverse = 1.0 / sqrt(over_block::<Sum>(sum, shared()) / d as f32 + p.eps);
    if thread() == 0 {
        store(p.inv_rms.add(row as usize), inverse);
    }
    let y = Output::new(p.y.cast(), core::ptr::null(), 1);
    group = thread();
    while 8 * group < d {
        let (mut values, weights) = (eight(group), load_eight(p.weight, 0, 8 * group, d));
        for i in 0..8 {
            values[i] = values[i] * inverse * weights[i];
        }
        let aligned = d.is_multiple_of(8) && p.y_pitch.is_multiple_of(8);
        y.put_row(row as usize * p.y_pitch as usize + 8 * group as usize, values, d - 8 * group, aligned);
        group += THREADS;
    }
}

/// dx += inv_rms · (dy ∘ w − x · inv_rms² · mean(dy ∘ w ∘ x)). Grid: [rows], 256 threads.
#[inline(always)]
pub unsafe fn rms_norm_backward(p: RmsNormBackwardParams) {
    let (row, d) = (block_x(), p.d);
    let eight = |group: u32| load_eight(p.x, row, 8 * group, d);
    let scaled = |group: u32| {
        let (mut values, weights) = (load_eight(p.dy, row, 8 * group, d), load_eight(p.weight, 0, 8 * group, d));
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
    let inverse = load(p.inv_rms.add(row as usize));
    let along = inverse * inverse * (over_block::<Sum>(sum, shared()) / d as f32);
    let dx = Output::new(p.dx.cast(), p.dx.cast(), 0);
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

/// y[t] += bias. Grid: [rows · (d / 8) / 256], 256 threads.
#[inline(always)]
pub unsafe fn add_bias(p: AddBiasParams) {
    let groups = p.d.div_ceil(8);
    assume(groups > 0);
    let i = block_x() as u64 * THREADS as u64 + thread() as u64;
    if i >= p.rows as u64 * groups as u64 {
        return;
    }
    let (row, column) = ((i / groups as u64) as usize, (i % groups as u64) as u32 * 8);
    let bias = load_eight(p.bias, 0, column, p.d);
    let y = Output::new(p.y, p.y, p.bf16);
    y.put_row(row * p.d as usize + column as usize, bias, p.d - column, p.d.is_multiple_of(8));
}

/// out[t] = table[ids[t]], decoded. Grid: [tokens], 256 threads.
#[inline(always)]
pub unsafe fn embed(p: EmbedParams) {
    let (id, out) = (load(p.ids.add(block_x() as usize)), p.out.add(block_x() as usize * p.d as usize));
    let mut group = thread();
    while 8 * group < p.d {
        let values = eight_of(p.format, p.table, p.scales, id, group, p.pitch);
        for i in 0..8 {
            let column = 8 * group + i;
            if column < p.d {
                store(out.add(column as usize), values[i as usize]);
            }
        }
        group += THREADS;
    }
}

/// Copies a row of `d` words.
#[inline(always)]
unsafe fn copy_row(to: *mut f32, from: *const f32, d: u32) {
    let mut i = thread();
    while i < d {
        store(to.add(i as usize), load(from.add(i as usize)));
        i += THREADS;
    }
}

/// out[i] = x[rows[i]]. Grid: [rows], 256 threads.
#[inline(always)]
pub unsafe fn gather(p: MoveRowsParams) {
    let from = p.x.add(load(p.rows.add(block_x() as usize)) as usize * p.x_pitch as usize);
    copy_row(p.out.add(block_x() as usize * p.d as usize), from, p.d);
}

/// out[rows[i]] = x[i]; the caller clears the other rows. Grid: [rows], 256 threads.
#[inline(always)]
pub unsafe fn scatter(p: MoveRowsParams) {
    let to = p.out.add(load(p.rows.add(block_x() as usize)) as usize * p.d as usize);
    copy_row(to, p.x.add(block_x() as usize * p.x_pitch as usize), p.d);
}

/// `out` = w as bf16. Rows of blocks have no padding, so w is one long row of `chunks` times eight values. Grid:
/// [chunks / 256], 256 threads.
#[inline(always)]
pub unsafe fn decode(p: DecodeParams) {
    let i = block_x() * THREADS + thread();
    if i < p.chunks {
        let of_row = p.columns / 8;
        assume(of_row > 0);
        let to = p.out.add((i / of_row) as usize * p.pitch as usize + 8 * (i % of_row) as usize);
        store(to.cast(), U4(pack8(eight_of(p.format, p.w, p.scales, 0, i, 0))));
    }
}

/// `out` [rows, padded width] = x [x_rows, width] as bf16, with zeros in the padding and in further rows. Grid: [rows · padded width / 8 /
/// 256], 256 threads.
#[inline(always)]
pub unsafe fn operand(p: OperandParams) {
    let width = p.width;
    let chunks = padded(width) / 8;
    assume(chunks > 0);
    let i = block_x() as u64 * THREADS as u64 + thread() as u64;
    if i >= p.rows as u64 * chunks as u64 {
        return;
    }
    let (row, column) = ((i / chunks as u64) as u32, (i % chunks as u64) as u32 * 8);
    let values = if row >= p.x_rows {
        [0.0; 8]
    } else if p.bf16 == 0 {
        load_eight(p.x.cast(), row, column, width)
    } else {
        let index = row as usize * width as usize + column as usize;
        load_bf16(p.x.cast(), index, width - column, width.is_multiple_of(8))
    };
    let to = p.out.add(row as usize * p.pitch as usize + column as usize);
    store(to.cast(), U4(pack8(values)));
}
