//! f32 to bf16 and back.

use crate::error::{Error, exact};
use crate::isa::Isa;
use half::bf16;

/// `out` = `x` rounded to nearest, ties to even; NaN stays NaN.
pub fn to_bf16(isa: Isa, out: &mut [bf16], x: &[f32]) -> Result<(), Error> {
    exact("out", x.len(), out.len())?;
    isa.vectorize(
        #[inline(always)]
        || {
            for (out, &x) in out.iter_mut().zip(x) {
                *out = round(x);
            }
        },
    );
    Ok(())
}

/// A type in which activations may be kept; arithmetic is f32.
pub trait Float: bytemuck::Pod + Send + Sync {
    /// Exact.
    fn widen(self) -> f32;
    /// To nearest, ties to even; NaN stays NaN.
    fn round(x: f32) -> Self;
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
}

/// Exact.
#[inline(always)]
pub(super) fn widen(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// `half`'s own conversion has branches; this one vectorises.
#[inline(always)]
pub(super) fn round(x: f32) -> bf16 {
    let bits = x.to_bits();
    let even = 0x7fff + (bits >> 16 & 1);
    let rounded = (bits.wrapping_add(even) >> 16) as u16;
    let quiet = (bits >> 16) as u16 | 0x40;
    bf16::from_bits(if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded })
}
