//! Rows of activations in eight bits.

use crate::error::{Error, exact, product};
use crate::isa::Isa;
use crate::quant::GROUP;
use bytemuck::{Pod, Zeroable};

/// Groups in a block.
const GROUPS: usize = 8;

/// 256 columns of a row: eight groups of 32. What a row does not have is zeros.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Block {
    /// The integers q, from −127 to 127.
    pub(super) codes: [i8; GROUPS * GROUP],
    /// Each group's scale.
    pub(super) scales: [f32; GROUPS],
    /// Σ q of each group.
    pub(super) sums: [f32; GROUPS],
    /// Σ q of the first half of each group.
    pub(super) first_halves: [f32; GROUPS],
}

// SAFETY: all bytes zero are integers and floats that are zero.
unsafe impl Zeroable for Block {}
// SAFETY: `repr(C)` with fields for which any bits are valid; their sizes leave no padding, as asserted here.
unsafe impl Pod for Block {}
const _: () = assert!(size_of::<Block>() == GROUPS * GROUP + 3 * 4 * GROUPS);

impl Block {
    /// Zeros.
    pub const ZERO: Block =
        Block { codes: [0; GROUPS * GROUP], scales: [0.0; GROUPS], sums: [0.0; GROUPS], first_halves: [0.0; GROUPS] };
}

/// Blocks of a row of `cols` columns.
pub const fn blocks(cols: usize) -> usize {
    cols.div_ceil(GROUPS * GROUP)
}

/// Quantizes `x` [tokens, cols] into `out` [tokens, [`blocks`]`(cols)`], with the same bits on every instruction set.
///
/// Returns an error, and writes nothing, unless `cols` is a multiple of 32 and the lengths fit.
pub fn quantize(isa: Isa, out: &mut [Block], cols: usize, x: &[f32]) -> Result<(), Error> {
    if !cols.is_multiple_of(GROUP) {
        return Err(Error::Block { operand: "columns of x", block: GROUP, got: cols });
    }
    let tokens = x.len().checked_div(cols).unwrap_or(0);
    exact("x", product(tokens, cols)?, x.len())?;
    exact("quantized x", product(tokens, blocks(cols))?, out.len())?;
    if cols > 0 {
        isa.vectorize(
            #[inline(always)]
            || {
                for (out, x) in out.chunks_exact_mut(blocks(cols)).zip(x.chunks_exact(cols)) {
                    quantize_row(out, x);
                }
            },
        );
    }
    Ok(())
}

#[inline(always)]
fn quantize_row(out: &mut [Block], x: &[f32]) {
    let (groups, _) = x.as_chunks::<GROUP>();
    for (out, groups) in out.iter_mut().zip(groups.chunks(GROUPS)) {
        if groups.len() < GROUPS {
            *out = Block::ZERO;
        }
        let (codes, _) = out.codes.as_chunks_mut::<GROUP>();
        for (i, (codes, x)) in codes.iter_mut().zip(groups).enumerate() {
            out.scales[i] = quantize_group(codes, x);
            let [mut first, mut second] = [0; 2];
            for j in 0..GROUP / 2 {
                first += i32::from(codes[j]);
                second += i32::from(codes[GROUP / 2 + j]);
            }
            (out.sums[i], out.first_halves[i]) = ((first + second) as f32, first as f32);
        }
    }
}

/// Writes q = round(x / d), and returns d. After a NaN or an infinity d is NaN.
#[inline(always)]
fn quantize_group(codes: &mut [i8; GROUP], x: &[f32; GROUP]) -> f32 {
    const INFINITY: u32 = f32::INFINITY.to_bits();
    /// 2⁻¹⁰⁰: 127 divided by less may be infinite.
    const LEAST: u32 = (127 - 100) << 23;
    /// Adding 1.5·2²³ leaves the nearest integer, ties to even, in the low bits of the mantissa.
    const MAGIC: f32 = 12_582_912.0;
    // As integers, magnitudes are in the order of their values, and NaN is above all.
    let largest = x.iter().fold(0, |largest: u32, x| largest.max(x.to_bits() & 0x7fff_ffff));
    if !(LEAST..INFINITY).contains(&largest) {
        codes.fill(0);
        return if largest < LEAST { 0.0 } else { f32::NAN };
    }
    let largest = f32::from_bits(largest);
    let inverse = 127.0 / largest;
    for (code, x) in codes.iter_mut().zip(x) {
        *code = ((x * inverse + MAGIC).to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32) as i8;
    }
    largest / 127.0
}
