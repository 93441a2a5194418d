//! Dropout whose mask is a function of (seed, row, column), so that a backward pass or a recomputation draws it again.
//!
//! ```text
//! keep(row, col) = lane (col mod 4) of the 64-bit mix of (seed, row, col / 4), 16 bits, is at least p · 2¹⁶
//! out = keep · x / (1 − p),     p rounded to a multiple of 2⁻¹⁶
//! ```

use crate::error::{Error, exact};
use crate::gemm::{Element, Float, Values};
use crate::isa::Isa;
use crate::random;

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

/// Elements that one 64-bit mix decides.
const LANES: usize = 4;

/// Elements whose mixes are drawn together, so that they fill vectors.
const BLOCK: usize = 64;

impl Dropout {
    /// The mask of an operand that begins `rows` rows further down.
    pub fn skip(self, rows: usize) -> Self {
        Self { first_row: self.first_row.wrapping_add(rows as u64), ..self }
    }

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
    let (threshold, scale) = (mask.threshold(), mask.scale());
    exact("out", x.len(), out.len())?;
    blocks(
        isa,
        out,
        cols,
        mask,
        #[inline(always)]
        move |at, out: &mut [f32], draws| {
            let len = out.len();
            for ((out, x), draw) in out.iter_mut().zip(&x[at..at + len]).zip(draws) {
                *out = kept(x.widen(), draw, threshold, scale);
            }
        },
    )
}

/// `out` [rows, cols] = mask ∘ `x`: what is kept stays as it is, and 1 / (1 − p) is owed by the product that reads it.
pub fn dropout_unscaled<E: Float>(isa: Isa, out: &mut [E], x: &[E], cols: usize, mask: Dropout) -> Result<(), Error> {
    let (least, any) = unscaled(mask);
    exact("out", x.len(), out.len())?;
    blocks(
        isa,
        out,
        cols,
        mask,
        #[inline(always)]
        move |at, out: &mut [E], draws| {
            let len = out.len();
            for ((out, &x), draw) in out.iter_mut().zip(&x[at..at + len]).zip(draws) {
                *out = if any && draw >= least { x } else { E::zeroed() };
            }
        },
    )
}

/// [`dropout_unscaled`] of values of either type; `x` is rounded to E first.
pub(super) fn dropout_rows<E: Element>(
    isa: Isa,
    out: &mut [E],
    x: Values<'_>,
    cols: usize,
    mask: Dropout,
) -> Result<(), Error> {
    if let Some(x) = E::of_values(x) {
        return dropout_unscaled(isa, out, x, cols, mask);
    }
    exact("out", x.len(), out.len())?;
    whole_rows(out.len(), cols)?;
    match x {
        Values::F32(x) => out.iter_mut().zip(x).for_each(|(out, &x)| *out = E::round(x)),
        Values::Bf16(x) => out.iter_mut().zip(x).for_each(|(out, &x)| *out = E::round(x.widen())),
    }
    let (least, any) = unscaled(mask);
    blocks(
        isa,
        out,
        cols,
        mask,
        #[inline(always)]
        move |_, out: &mut [E], draws| {
            for (out, draw) in out.iter_mut().zip(draws) {
                *out = if any && draw >= least { *out } else { E::zeroed() };
            }
        },
    )
}

/// The least draw that keeps an element, and whether any does.
fn unscaled(mask: Dropout) -> (u16, bool) {
    (mask.threshold().min(0xffff) as u16, mask.threshold() <= 0xffff)
}

/// `x` [rows, cols] = mask ∘ `x` / (1 − p).
pub fn dropout_in_place(isa: Isa, x: &mut [f32], cols: usize, mask: Dropout) -> Result<(), Error> {
    let (threshold, scale) = (mask.threshold(), mask.scale());
    blocks(
        isa,
        x,
        cols,
        mask,
        #[inline(always)]
        move |_, x: &mut [f32], draws| {
            x.iter_mut().zip(draws).for_each(|(x, draw)| *x = kept(*x, draw, threshold, scale));
        },
    )
}

/// `dx` [rows, cols] += mask ∘ `dy` / (1 − p).
pub fn dropout_accumulate<E: Float>(
    isa: Isa,
    dx: &mut [E],
    dy: &[f32],
    cols: usize,
    mask: Dropout,
) -> Result<(), Error> {
    let (threshold, scale) = (mask.threshold(), mask.scale());
    exact("out", dy.len(), dx.len())?;
    blocks(
        isa,
        dx,
        cols,
        mask,
        #[inline(always)]
        move |at, dx: &mut [E], draws| {
            let len = dx.len();
            for ((dx, &dy), draw) in dx.iter_mut().zip(&dy[at..at + len]).zip(draws) {
                *dx = E::round(dx.widen() + kept(dy, draw, threshold, scale));
            }
        },
    )
}

/// `put(at, values, draws)` for each block of each row, which begins at element `at`.
#[inline(always)]
fn blocks<O>(
    isa: Isa,
    out: &mut [O],
    cols: usize,
    mask: Dropout,
    put: impl Fn(usize, &mut [O], [u16; BLOCK]),
) -> Result<(), Error> {
    whole_rows(out.len(), cols)?;
    isa.vectorize(
        #[inline(always)]
        || {
            for (row, out) in out.chunks_exact_mut(cols.max(1)).enumerate() {
                let key = row_key(mask.seed, mask.first_row.wrapping_add(row as u64));
                let (whole, rest) = out.as_chunks_mut::<BLOCK>();
                let last = whole.len();
                for (block, out) in whole.iter_mut().enumerate() {
                    put(row * cols + block * BLOCK, out, draws(key, block as u64));
                }
                put(row * cols + last * BLOCK, rest, draws(key, last as u64));
            }
        },
    );
    Ok(())
}

#[inline(always)]
fn kept(x: f32, draw: u16, threshold: u32, scale: f32) -> f32 {
    // A choice, not a product: 0 · ∞ would be NaN.
    if u32::from(draw) >= threshold { x * scale } else { 0.0 }
}

/// What decides about elements BLOCK · `block` .. of a row.
#[inline(always)]
fn draws(key: u64, block: u64) -> [u16; BLOCK] {
    const MIXES: usize = BLOCK / LANES;
    let first = block.wrapping_mul(MIXES as u64);
    let mut mixes = [0; MIXES];
    for (bits, i) in mixes.iter_mut().zip(0u64..) {
        *bits = mix(key, first.wrapping_add(i));
    }
    if cfg!(target_endian = "little") {
        bytemuck::cast(mixes)
    } else {
        core::array::from_fn(|i| lane(mixes[i / LANES], i % LANES) as u16)
    }
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

/// Output `counter` of SplitMix64 from `key`.
#[inline(always)]
fn mix(key: u64, counter: u64) -> u64 {
    random::mix(key.wrapping_add(counter.wrapping_mul(random::STEP)))
}
