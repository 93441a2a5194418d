//! From an element type and an instruction set to the driver and the micro-kernel that multiply it.

use super::bf16::{Float, round, round_rows, to_bf16};
use super::blocking::{PanelShape, Product};
use super::driver::{multiply, multiply_into_bf16};
use super::kernel::micro::MicroKernel;
use super::kernel::portable::{PortableBf16, PortableF32};
#[cfg(target_arch = "x86_64")]
use super::kernel::{
    amx,
    avx2::{Avx2Bf16, Avx2F32},
    avx512::{Avx512F32, Avx512WidenedBf16},
    avx512bf16::Avx512Bf16Kernel,
};
#[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
use super::kernel::{
    neon::{NeonF32, NeonWidenedBf16},
    neonbf16::NeonBf16Kernel,
};
use super::view::Values;
use crate::error::{Error, exact};
#[cfg(target_arch = "x86_64")]
use crate::isa::Avx512Bf16;
use crate::isa::{Bf16Isa, Isa};
use half::bf16;

/// The element type of packed panels: f32 or bf16. Products are summed in f32 for both. Other crates cannot implement
/// it.
pub trait Element: Float + Dispatch {
    /// The instruction sets that multiply it.
    type Isa: Copy + core::fmt::Debug + PartialEq + Send + Sync;
}

impl Element for f32 {
    type Isa = Isa;
}

impl Element for bf16 {
    type Isa = Bf16Isa;
}

/// What seals [`Element`]: the layout of panels, and the dispatch by instruction set, once for each call.
pub trait Dispatch: Sized {
    /// Neighbours along k that are adjacent in a panel.
    #[doc(hidden)]
    const ADJACENT: usize;
    /// The four bytes of a panel that hold `x` and, where a panel has pairs, its neighbour along k, `next`.
    #[doc(hidden)]
    fn unit(x: f32, next: f32) -> u32;
    /// The f32 instruction set that `isa` contains.
    #[doc(hidden)]
    fn widened(isa: Self::Isa) -> Isa
    where
        Self: Element;
    /// A slice of this type as values of either type.
    #[doc(hidden)]
    fn as_values(x: &[Self]) -> Values<'_>;
    /// The reverse of [`Self::as_values`]; `None` if the values are of the other type.
    #[doc(hidden)]
    fn of_values(values: Values<'_>) -> Option<&[Self]>;
    /// `out` = `x` rounded to bf16, as [`Self::multiply_into_bf16`] rounds its sums.
    #[doc(hidden)]
    fn narrow_sums(isa: Self::Isa, out: &mut [bf16], x: &[f32]) -> Result<(), Error>
    where
        Self: Element;
    /// The shape of panels.
    #[doc(hidden)]
    fn panel_shape(isa: Self::Isa) -> PanelShape
    where
        Self: Element;
    /// The instructions that pack panels of bf16 pairs, if `isa` has them and its panels are 32 columns wide.
    #[doc(hidden)]
    #[cfg(target_arch = "x86_64")]
    fn pair_packing(_isa: Self::Isa) -> Option<Avx512Bf16>
    where
        Self: Element,
    {
        None
    }
    /// C = or += Σ terms.
    #[doc(hidden)]
    fn multiply(isa: Self::Isa, c: &mut [f32], product: &Product<'_, '_, Self>)
    where
        Self: Element;
    /// [`Self::multiply`] into bf16. Returns `false`, and does nothing, where summing in f32 elsewhere first is faster.
    #[doc(hidden)]
    fn multiply_into_bf16(isa: Self::Isa, c: &mut [bf16], product: &Product<'_, '_, Self>) -> bool
    where
        Self: Element;
}

const fn shape_of<K: MicroKernel>() -> PanelShape {
    PanelShape { nr: K::NR, k_step: K::K_STEP }
}

impl Dispatch for f32 {
    const ADJACENT: usize = 1;

    #[inline(always)]
    fn unit(x: f32, _next: f32) -> u32 {
        x.to_bits()
    }

    #[inline(always)]
    fn widened(isa: Isa) -> Isa {
        isa
    }

    #[inline(always)]
    fn as_values(x: &[f32]) -> Values<'_> {
        Values::F32(x)
    }

    #[inline(always)]
    fn of_values(values: Values<'_>) -> Option<&[f32]> {
        match values {
            Values::F32(x) => Some(x),
            Values::Bf16(_) => None,
        }
    }

    fn narrow_sums(isa: Isa, out: &mut [bf16], x: &[f32]) -> Result<(), Error> {
        exact("out", x.len(), out.len())?;
        round_rows(isa, out, x.len().max(1), x, x.len().max(1), x.len());
        Ok(())
    }

    fn panel_shape(isa: Isa) -> PanelShape {
        match isa {
            Isa::Portable => shape_of::<PortableF32>(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => shape_of::<Avx2F32>(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => shape_of::<Avx512F32>(),
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Isa::Neon(_) => shape_of::<NeonF32>(),
        }
    }

    fn multiply(isa: Isa, c: &mut [f32], product: &Product<'_, '_, f32>) {
        match isa {
            Isa::Portable => multiply(PortableF32, c, product),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => multiply(Avx2F32(isa), c, product),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => multiply(Avx512F32(isa), c, product),
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Isa::Neon(isa) => multiply(NeonF32(isa), c, product),
        }
    }

    fn multiply_into_bf16(isa: Isa, c: &mut [bf16], product: &Product<'_, '_, f32>) -> bool {
        match isa {
            Isa::Portable => multiply_into_bf16(PortableF32, c, product),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => multiply_into_bf16(Avx2F32(isa), c, product),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => multiply_into_bf16(Avx512F32(isa), c, product),
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Isa::Neon(isa) => multiply_into_bf16(NeonF32(isa), c, product),
        }
    }
}

impl Dispatch for bf16 {
    const ADJACENT: usize = 2;

    #[inline(always)]
    fn unit(x: f32, next: f32) -> u32 {
        let (x, next) = (u32::from(round(x).to_bits()), u32::from(round(next).to_bits()));
        // `x` at the lower address.
        if cfg!(target_endian = "big") { x << 16 | next } else { next << 16 | x }
    }

    #[inline(always)]
    fn widened(isa: Bf16Isa) -> Isa {
        isa.widened()
    }

    #[inline(always)]
    fn as_values(x: &[bf16]) -> Values<'_> {
        Values::Bf16(x)
    }

    #[inline(always)]
    fn of_values(values: Values<'_>) -> Option<&[bf16]> {
        match values {
            Values::Bf16(x) => Some(x),
            Values::F32(_) => None,
        }
    }

    fn narrow_sums(isa: Bf16Isa, out: &mut [bf16], x: &[f32]) -> Result<(), Error> {
        to_bf16(isa, out, x)
    }

    fn panel_shape(isa: Bf16Isa) -> PanelShape {
        match isa {
            Bf16Isa::Portable => shape_of::<PortableBf16>(),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx2(_) => shape_of::<Avx2Bf16>(),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx512(_) => shape_of::<Avx512WidenedBf16>(),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx512Bf16(_) => shape_of::<Avx512Bf16Kernel>(),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::AmxBf16(_) => amx::PANEL_SHAPE,
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Bf16Isa::Neon(_) => shape_of::<NeonWidenedBf16>(),
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Bf16Isa::NeonBf16(_) => shape_of::<NeonBf16Kernel>(),
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn pair_packing(isa: Bf16Isa) -> Option<Avx512Bf16> {
        match isa {
            Bf16Isa::Avx512Bf16(isa) => Some(isa),
            Bf16Isa::AmxBf16(isa) => Some(isa.avx512bf16()),
            _ => None,
        }
    }

    fn multiply(isa: Bf16Isa, c: &mut [f32], product: &Product<'_, '_, bf16>) {
        match isa {
            Bf16Isa::Portable => multiply(PortableBf16, c, product),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx2(isa) => multiply(Avx2Bf16(isa), c, product),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx512(isa) => multiply(Avx512WidenedBf16(isa), c, product),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx512Bf16(isa) => multiply(Avx512Bf16Kernel(isa), c, product),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::AmxBf16(isa) => amx::multiply(isa, c, product),
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Bf16Isa::Neon(isa) => multiply(NeonWidenedBf16(isa), c, product),
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Bf16Isa::NeonBf16(isa) => multiply(NeonBf16Kernel(isa), c, product),
        }
    }

    fn multiply_into_bf16(isa: Bf16Isa, c: &mut [bf16], product: &Product<'_, '_, bf16>) -> bool {
        match isa {
            Bf16Isa::Portable => multiply_into_bf16(PortableBf16, c, product),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx2(isa) => multiply_into_bf16(Avx2Bf16(isa), c, product),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx512(isa) => multiply_into_bf16(Avx512WidenedBf16(isa), c, product),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx512Bf16(isa) => multiply_into_bf16(Avx512Bf16Kernel(isa), c, product),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::AmxBf16(isa) => amx::multiply_into_bf16(isa, c, product),
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Bf16Isa::Neon(isa) => multiply_into_bf16(NeonWidenedBf16(isa), c, product),
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Bf16Isa::NeonBf16(isa) => multiply_into_bf16(NeonBf16Kernel(isa), c, product),
        }
    }
}

/// Elements of the panels of B [k, n]. Saturates.
pub fn panels_len<E: Element>(isa: E::Isa, k: usize, n: usize) -> usize {
    let shape = E::panel_shape(isa);
    let columns = n.checked_next_multiple_of(shape.nr).unwrap_or(usize::MAX);
    let rows = k.checked_next_multiple_of(shape.k_step).unwrap_or(usize::MAX);
    rows.saturating_mul(columns)
}
