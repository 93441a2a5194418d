//! From an element type and an instruction set to the loops that multiply it.

use super::convert::{round, round_rows, to_bf16};
use super::portable::{PortableBf16, PortableF32};
use super::tiled::{Micro, drive, drive_rounded};
use super::{Accumulate, Element, Term, Values};
#[cfg(target_arch = "x86_64")]
use super::{
    amx,
    avx2::{Avx2F32, Avx2Widened},
    avx512::{Avx512F32, Avx512Widened},
    avx512bf16::Avx512Pairs,
};
use crate::error::{Error, exact};
#[cfg(target_arch = "x86_64")]
use crate::isa::Avx512Bf16;
use crate::isa::{Bf16Isa, Isa};
use half::bf16;

/// How an element type is tiled on one instruction set.
#[derive(Clone, Copy)]
pub struct Tile {
    /// Columns of a panel.
    pub(super) nr: usize,
    /// Panels are padded to a multiple of this many rows.
    pub(super) k_step: usize,
}

/// A product of at least one element, whose operands have been checked, but for where it goes.
#[derive(Clone, Copy)]
pub struct Product<'t, 'a, E> {
    /// From a row of C to the next, at least `n`.
    pub(super) c_stride: usize,
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) store: Accumulate,
    /// Of which one has a k.
    pub(super) terms: &'t [Term<'a, E>],
}

/// What [`Element`] seals: the dispatch to micro-kernels and the panel's arrangement.
pub trait Kernel: Sized {
    /// Neighbours along k that lie side by side in a panel.
    #[doc(hidden)]
    const ADJACENT: usize;
    /// `x` and its neighbour along k (the same `x` where a panel has none), as they lie in a panel.
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
    /// The reverse of [`Kernel::as_values`]; `None` if the values are of the other type.
    #[doc(hidden)]
    fn of_values(values: Values<'_>) -> Option<&[Self]>;
    /// `out` = `x` rounded to bf16, as products into bf16 round their sums.
    #[doc(hidden)]
    fn narrow_sums(isa: Self::Isa, out: &mut [bf16], x: &[f32]) -> Result<(), Error>
    where
        Self: Element;
    #[doc(hidden)]
    fn tile(isa: Self::Isa) -> Tile
    where
        Self: Element;
    /// A product into bf16 in one go, where the instruction set has a way; else `false`, and nothing is done.
    #[doc(hidden)]
    fn multiply_rounded(isa: Self::Isa, c: &mut [bf16], product: &Product<'_, '_, Self>) -> bool
    where
        Self: Element;
    /// The instructions that pack pairs of bf16, if these panels are of such pairs.
    #[doc(hidden)]
    #[cfg(target_arch = "x86_64")]
    fn pairs(_isa: Self::Isa) -> Option<Avx512Bf16>
    where
        Self: Element,
    {
        None
    }
    #[doc(hidden)]
    fn multiply(isa: Self::Isa, c: &mut [f32], product: &Product<'_, '_, Self>)
    where
        Self: Element;
}

const fn tile_of<K: Micro>() -> Tile {
    Tile { nr: K::NR, k_step: K::K_STEP }
}

impl Kernel for f32 {
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

    fn tile(isa: Isa) -> Tile {
        match isa {
            Isa::Portable => tile_of::<PortableF32>(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => tile_of::<Avx2F32>(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => tile_of::<Avx512F32>(),
        }
    }

    fn multiply_rounded(isa: Isa, c: &mut [bf16], product: &Product<'_, '_, f32>) -> bool {
        match isa {
            Isa::Portable => drive_rounded(PortableF32, c, product),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => drive_rounded(Avx2F32(isa), c, product),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => drive_rounded(Avx512F32(isa), c, product),
        }
    }

    fn multiply(isa: Isa, c: &mut [f32], product: &Product<'_, '_, f32>) {
        match isa {
            Isa::Portable => drive(PortableF32, c, product),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => drive(Avx2F32(isa), c, product),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => drive(Avx512F32(isa), c, product),
        }
    }
}

impl Kernel for bf16 {
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

    fn tile(isa: Bf16Isa) -> Tile {
        match isa {
            Bf16Isa::Portable => tile_of::<PortableBf16>(),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx2(_) => tile_of::<Avx2Widened>(),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx512(_) => tile_of::<Avx512Widened>(),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx512Bf16(_) => tile_of::<Avx512Pairs>(),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::AmxBf16(_) => Tile { nr: amx::NR, k_step: amx::K_STEP },
        }
    }

    fn multiply_rounded(isa: Bf16Isa, c: &mut [bf16], product: &Product<'_, '_, bf16>) -> bool {
        match isa {
            Bf16Isa::Portable => drive_rounded(PortableBf16, c, product),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx2(isa) => drive_rounded(Avx2Widened(isa), c, product),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx512(isa) => drive_rounded(Avx512Widened(isa), c, product),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx512Bf16(isa) => drive_rounded(Avx512Pairs(isa), c, product),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::AmxBf16(isa) => amx::drive_rounded(isa, c, product),
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn pairs(isa: Bf16Isa) -> Option<Avx512Bf16> {
        match isa {
            Bf16Isa::Avx512Bf16(isa) => Some(isa),
            Bf16Isa::AmxBf16(isa) => Some(isa.avx512bf16()),
            _ => None,
        }
    }

    fn multiply(isa: Bf16Isa, c: &mut [f32], product: &Product<'_, '_, bf16>) {
        match isa {
            Bf16Isa::Portable => drive(PortableBf16, c, product),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx2(isa) => drive(Avx2Widened(isa), c, product),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx512(isa) => drive(Avx512Widened(isa), c, product),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx512Bf16(isa) => drive(Avx512Pairs(isa), c, product),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::AmxBf16(isa) => amx::drive(isa, c, product),
        }
    }
}
