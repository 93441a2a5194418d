//! f32 to bf16.

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

/// `half`'s own conversion has branches; this one vectorises.
#[inline(always)]
pub(super) fn round(x: f32) -> bf16 {
    let bits = x.to_bits();
    let even = 0x7fff + (bits >> 16 & 1);
    let rounded = (bits.wrapping_add(even) >> 16) as u16;
    let quiet = (bits >> 16) as u16 | 0x40;
    bf16::from_bits(if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded })
}
