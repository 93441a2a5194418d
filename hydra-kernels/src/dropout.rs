//! Dropout whose mask is a function of (seed, row, column), so that a backward pass or a recomputation draws it again.
//!
//! ```text
//! keep(row, col) = lane (col mod 4) of the 64-bit mix of (seed, row, col / 4), 16 bits, is at least p · 2¹⁶
//! out = keep · x / (1 − p),     p rounded to a multiple of 2⁻¹⁶
//! ```

use crate::error::{Error, exact};
use crate::gemm::Float;
use crate::isa::Isa;

/// A mask and its scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of dropping an element; taken into [0, 1] and rounded to a multiple of 2⁻¹⁶. With 1 all is zero.
    pub p: f32,
    /// Chooses the mask.
    pub seed: u64,
    /// The mask's row for the first row of the operand: a thread that has rows 100.. passes 100.
    pub first_row: u64,
}

/// Elements that one mix decides.
const LANES: usize = 4;

impl Dropout {
    /// p · 2¹⁶, rounded: 0 ..= 65536.
    pub fn threshold(&self) -> u32 {
        (self.p * 65536.0 + 0.5).clamp(0.0, 65536.0) as u32
    }

    /// 1 / (1 − p) for the rounded p; 0 if nothing is kept.
    pub fn scale(&self) -> f32 {
        match 65536 - self.threshold() {
            0 => 0.0,
            kept => 65536.0 / kept as f32,
        }
    }

    /// Whether the mask keeps element (`row`, `col`), `row` counted from the mask's own row 0.
    pub fn keeps(&self, row: u64, col: usize) -> bool {
        let bits = mix(row_key(self.seed, row), (col / LANES) as u64);
        lane(bits, col % LANES) >= self.threshold()
    }
}

/// `out` [rows, cols] = mask ∘ `x` / (1 − p).
pub fn dropout<E: Float>(isa: Isa, out: &mut [f32], x: &[E], cols: usize, mask: Dropout) -> Result<(), Error> {
    apply(
        isa,
        out,
        x,
        cols,
        mask,
        #[inline(always)]
        |out: &mut f32, x| *out = x,
    )
}

/// `x` [rows, cols] = mask ∘ `x` / (1 − p).
pub fn dropout_in_place(isa: Isa, x: &mut [f32], cols: usize, mask: Dropout) -> Result<(), Error> {
    whole_rows(x.len(), cols)?;
    let (threshold, scale) = (mask.threshold(), mask.scale());
    isa.vectorize(
        #[inline(always)]
        || {
            for (x, row) in x.chunks_exact_mut(cols.max(1)).zip(0u64..) {
                let key = row_key(mask.seed, mask.first_row.wrapping_add(row));
                for (x, group) in x.chunks_mut(LANES).zip(0u64..) {
                    let bits = mix(key, group);
                    for (i, x) in x.iter_mut().enumerate() {
                        *x = kept(*x, bits, i, threshold, scale);
                    }
                }
            }
        },
    );
    Ok(())
}

/// `dx` [rows, cols] += mask ∘ `dy` / (1 − p).
pub fn dropout_accumulate<E: Float>(
    isa: Isa,
    dx: &mut [E],
    dy: &[f32],
    cols: usize,
    mask: Dropout,
) -> Result<(), Error> {
    apply(
        isa,
        dx,
        dy,
        cols,
        mask,
        #[inline(always)]
        |dx: &mut E, dy| *dx = E::round(dx.widen() + dy),
    )
}

#[inline(always)]
fn apply<O, X: Float>(
    isa: Isa,
    out: &mut [O],
    x: &[X],
    cols: usize,
    mask: Dropout,
    put: impl Fn(&mut O, f32),
) -> Result<(), Error> {
    exact("out", x.len(), out.len())?;
    whole_rows(x.len(), cols)?;
    let (threshold, scale) = (mask.threshold(), mask.scale());
    isa.vectorize(
        #[inline(always)]
        || {
            let rows = out.chunks_exact_mut(cols.max(1)).zip(x.chunks_exact(cols.max(1)));
            for ((out, x), row) in rows.zip(0u64..) {
                let key = row_key(mask.seed, mask.first_row.wrapping_add(row));
                let (out_whole, out_rest) = out.as_chunks_mut::<LANES>();
                let (x_whole, x_rest) = x.as_chunks::<LANES>();
                let last = x_whole.len() as u64;
                for ((out, x), group) in out_whole.iter_mut().zip(x_whole).zip(0u64..) {
                    put_group(out, x, mix(key, group), threshold, scale, &put);
                }
                put_group(out_rest, x_rest, mix(key, last), threshold, scale, &put);
            }
        },
    );
    Ok(())
}

#[inline(always)]
fn put_group<O, X: Float>(out: &mut [O], x: &[X], bits: u64, threshold: u32, scale: f32, put: &impl Fn(&mut O, f32)) {
    for (i, (out, &x)) in out.iter_mut().zip(x).enumerate() {
        put(out, kept(x.widen(), bits, i, threshold, scale));
    }
}

#[inline(always)]
fn kept(x: f32, bits: u64, i: usize, threshold: u32, scale: f32) -> f32 {
    // A choice, not a product: 0 · ∞ would be NaN.
    if lane(bits, i) >= threshold { x * scale } else { 0.0 }
}

fn whole_rows(len: usize, cols: usize) -> Result<(), Error> {
    if !len.is_multiple_of(cols.max(1)) || (cols == 0 && len > 0) {
        return Err(Error::Block { operand: "x", block: cols, got: len });
    }
    Ok(())
}

#[inline(always)]
fn lane(bits: u64, i: usize) -> u32 {
    (bits >> (16 * i)) as u32 & 0xffff
}

/// The start of a row's stream.
#[inline(always)]
fn row_key(seed: u64, row: u64) -> u64 {
    mix(mix(seed, 0), row)
}

/// Splitmix64's finaliser (Steele, Lea and Flood 2014) over a Weyl sequence from `key`.
#[inline(always)]
fn mix(key: u64, counter: u64) -> u64 {
    let z = key.wrapping_add(counter.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}
