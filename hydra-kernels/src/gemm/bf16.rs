//! Conversions between f32 and bf16.

use crate::error::{Error, exact};
use crate::isa::{Bf16Isa, Isa};
#[cfg(target_arch = "x86_64")]
use crate::simd::round::round_slice;
use half::bf16;

/// `out` = `x` rounded to nearest, ties to even; NaN stays NaN. AVX-512 BF16 and AMX round subnormals to zero.
///
/// Returns an error, and writes nothing, if the lengths differ.
pub fn to_bf16(isa: Bf16Isa, out: &mut [bf16], x: &[f32]) -> Result<(), Error> {
    exact("out", x.len(), out.len())?;
    match isa {
        #[cfg(target_arch = "x86_64")]
        Bf16Isa::Avx512Bf16(isa) => round_slice(isa, out, x),
        #[cfg(target_arch = "x86_64")]
        Bf16Isa::AmxBf16(isa) => round_slice(isa.avx512bf16(), out, x),
        _ => isa.vectorize(
            #[inline(always)]
            || out.iter_mut().zip(x).for_each(|(out, &x)| *out = round(x)),
        ),
    }
    Ok(())
}

/// A type in which activations may be stored: f32 or bf16. Arithmetic is f32.
pub trait Float: bytemuck::Pod + Send + Sync {
    /// The value as f32, which is exact.
    fn widen(self) -> f32;
    /// Rounds to nearest, ties to even; NaN stays NaN.
    fn round(x: f32) -> Self;
    /// `out` = `x` rounded, by [`to_bf16`] or a copy. Returns an error if the lengths differ.
    fn narrow(isa: Bf16Isa, out: &mut [Self], x: &[f32]) -> Result<(), Error>;
}

impl Float for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn round(x: f32) -> f32 {
        x
    }

    #[inline(always)]
    fn narrow(_isa: Bf16Isa, out: &mut [f32], x: &[f32]) -> Result<(), Error> {
        exact("out", x.len(), out.len())?;
        out.copy_from_slice(x);
        Ok(())
    }
}

impl Float for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        widen(self)
    }

    #[inline(always)]
    fn round(x: f32) -> bf16 {
        round(x)
    }

    fn narrow(isa: Bf16Isa, out: &mut [bf16], x: &[f32]) -> Result<(), Error> {
        to_bf16(isa, out, x)
    }
}

/// The value as f32, which is exact.
#[inline(always)]
pub(super) fn widen(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// Rounds to nearest, ties to even. Unlike `half`'s conversion it has no branches, so it vectorizes.
#[inline(always)]
pub(super) fn round(x: f32) -> bf16 {
    let bits = x.to_bits();
    let even = 0x7fff + (bits >> 16 & 1);
    let rounded = (bits.wrapping_add(even) >> 16) as u16;
    let quiet = (bits >> 16) as u16 | 0x40;
    bf16::from_bits(if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded })
}

/// `c[i · c_stride + j]` = `sums[i · sums_stride + j]` rounded, for j < `cols` and every row of `sums`.
#[inline]
pub(super) fn round_rows(isa: Isa, c: &mut [bf16], c_stride: usize, sums: &[f32], sums_stride: usize, cols: usize) {
    isa.vectorize(
        #[inline(always)]
        || {
            for (c, sums) in c.chunks_mut(c_stride).zip(sums.chunks(sums_stride)) {
                c[..cols].iter_mut().zip(&sums[..cols]).for_each(|(c, &sum)| *c = round(sum));
            }
        },
    );
}

/// `sums[i · sums_stride + j]` = `c[i · c_stride + j]`, for j < `cols` and every row of `sums`.
#[inline]
pub(super) fn widen_rows(isa: Isa, sums: &mut [f32], sums_stride: usize, c: &[bf16], c_stride: usize, cols: usize) {
    isa.vectorize(
        #[inline(always)]
        || {
            for (sums, c) in sums.chunks_mut(sums_stride).zip(c.chunks(c_stride)) {
                sums[..cols].iter_mut().zip(&c[..cols]).for_each(|(sum, &c)| *sum = widen(c));
            }
        },
    );
}

/// The element type of a packed micro-panel of A, for products with B's elements `E`. Values are rounded to `E`.
pub(super) trait PackedA<E>: bytemuck::Pod {
    /// Rounds to E.
    fn from_f32(x: f32) -> Self;
    /// The value, which is exact.
    fn from_bf16(x: bf16) -> Self;
}

impl PackedA<f32> for f32 {
    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }

    #[inline(always)]
    fn from_bf16(x: bf16) -> f32 {
        widen(x)
    }
}

/// For instruction sets that have no bf16 product.
impl PackedA<bf16> for f32 {
    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        widen(round(x))
    }

    #[inline(always)]
    fn from_bf16(x: bf16) -> f32 {
        widen(x)
    }
}

impl PackedA<bf16> for bf16 {
    #[inline(always)]
    fn from_f32(x: f32) -> bf16 {
        round(x)
    }

    #[inline(always)]
    fn from_bf16(x: bf16) -> bf16 {
        x
    }
}
