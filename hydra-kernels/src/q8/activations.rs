//! Rows of activations in eight bits.

#[cfg(target_arch = "x86_64")]
use super::quantize256;
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
        let rows = out.chunks_exact_mut(blocks(cols)).zip(x.chunks_exact(cols));
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => quantize256::rows(isa, rows),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => quantize256::rows(isa, rows),
            _ => isa.vectorize(
                #[inline(always)]
                || rows.for_each(|(out, x)| quantize_row(out, x, quantize_group)),
            ),
        }
    }
    Ok(())
}

/// A group's scale, and the sums of its first half and of all of it.
pub(super) type Summary = (f32, [i32; 2]);

/// Quantizes a row, each group by `group`.
#[inline(always)]
pub(super) fn quantize_row(out: &mut [Block], x: &[f32], group: impl Fn(&mut [i8; GROUP], &[f32; GROUP]) -> Summary) {
    let (groups, _) = x.as_chunks::<GROUP>();
    for (out, groups) in out.iter_mut().zip(groups.chunks(GROUPS)) {
        if groups.len() < GROUPS {
            *out = Block::ZERO;
        }
        let (codes, _) = out.codes.as_chunks_mut::<GROUP>();
        for (i, (codes, x)) in codes.iter_mut().zip(groups).enumerate() {
            let (scale, [first, all]) = group(codes, x);
            (out.scales[i], out.sums[i], out.first_halves[i]) = (scale, all as f32, first as f32);
        }
    }
}

/// The scale of a group that is not quantized, by the bits of its largest magnitude: magnitudes as integers are in the
/// order of their values, and NaN is above all. Zero if 127 divided by it may be infinite, NaN after a NaN or an infinity.
#[inline(always)]
pub(super) fn degenerate(largest: u32) -> Option<f32> {
    const INFINITY: u32 = f32::INFINITY.to_bits();
    /// 2⁻¹⁰⁰
    const LEAST: u32 = (127 - 100) << 23;
    match largest {
        ..LEAST => Some(0.0),
        LEAST..INFINITY => None,
        _ => Some(f32::NAN),
    }
}

/// Writes q = round(x / d), in plain Rust.
#[inline(always)]
fn quantize_group(codes: &mut [i8; GROUP], x: &[f32; GROUP]) -> Summary {
    /// Adding 1.5·2²³ leaves the nearest integer, ties to even, in the low bits of the mantissa.
    const MAGIC: f32 = 12_582_912.0;
    let largest = x.iter().fold(0, |largest: u32, x| largest.max(x.to_bits() & 0x7fff_ffff));
    if let Some(scale) = degenerate(largest) {
        codes.fill(0);
        return (scale, [0; 2]);
    }
    let largest = f32::from_bits(largest);
    let inverse = 127.0 / largest;
    for (code, x) in codes.iter_mut().zip(x) {
        *code = ((x * inverse + MAGIC).to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32) as i8;
    }
    let sum = |codes: &[i8]| codes.iter().map(|&code| i32::from(code)).sum::<i32>();
    let (first, second) = codes.split_at(GROUP / 2);
    let first = sum(first);
    (largest / 127.0, [first, first + sum(second)])
}
