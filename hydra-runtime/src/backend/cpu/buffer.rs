//! Memory of the CPU backend: f32, and activations, which are bf16 where products multiply bf16.

use super::Cpu;
use super::aligned::{Aligned, LINE_FLOATS};
use crate::error::out_of_memory;
use crate::{Error, Result};
use bytemuck::Pod;
use half::bf16;
use hydra_kernels::gemm::{self, Values, ValuesMut};
use hydra_kernels::isa::Bf16Isa;
use hydra_kernels::{Float, Scratch, math};

/// f32 values.
pub type Buffer = Aligned<f32>;

/// What products read.
pub enum Activations {
    /// Under [`Precision::F32`](super::Precision::F32).
    F32(Aligned<f32>),
    /// Under [`Precision::Bf16`](super::Precision::Bf16).
    Bf16(Aligned<bf16>),
}

impl Activations {
    pub(super) fn values(&self) -> Values<'_> {
        match self {
            Self::F32(values) => Values::F32(values),
            Self::Bf16(values) => Values::Bf16(values),
        }
    }

    pub(super) fn values_mut(&mut self) -> ValuesMut<'_> {
        match self {
            Self::F32(values) => ValuesMut::F32(values),
            Self::Bf16(values) => ValuesMut::Bf16(values),
        }
    }
}

/// `len` zeros.
pub(super) fn zeroed<T: Pod>(len: usize) -> Result<Aligned<T>> {
    Aligned::zeroed(len).ok_or_else(|| out_of_memory(len.saturating_mul(size_of::<T>())))
}

/// A type of activations, and of a product's operands.
pub(super) trait Element: Float + hydra_kernels::Element + Default {
    /// The instructions that multiply this type on `cpu`.
    fn isa(cpu: &Cpu) -> Self::Isa;

    /// Fails if the activations are those of a backend of another precision.
    fn of(activations: &Activations) -> Result<&[Self]>;

    /// [`Element::of`].
    fn of_mut(activations: &mut Activations) -> Result<&mut [Self]>;

    fn values(x: &[Self]) -> Values<'_>;

    /// `x` as the operand of a product: in f32 `x` itself, in bf16 `rounded`, which holds the same values.
    fn operand<'a>(rounded: &'a [Self], x: &'a [f32]) -> Values<'a>;

    /// Elements of `rounded` for `len` values.
    fn operand_room(len: usize) -> usize;

    /// eˣ, as exact as its use requires.
    fn exp(x: f32) -> f32;
}

fn wrong_precision() -> Error {
    Error::Invalid("activations of a backend of another precision".into())
}

impl Element for f32 {
    fn isa(cpu: &Cpu) -> Self::Isa {
        cpu.isa
    }

    fn of(activations: &Activations) -> Result<&[f32]> {
        if let Activations::F32(values) = activations { Ok(values) } else { Err(wrong_precision()) }
    }

    fn of_mut(activations: &mut Activations) -> Result<&mut [f32]> {
        if let Activations::F32(values) = activations { Ok(values) } else { Err(wrong_precision()) }
    }

    fn values(x: &[f32]) -> Values<'_> {
        Values::F32(x)
    }

    fn operand<'a>(_rounded: &'a [f32], x: &'a [f32]) -> Values<'a> {
        Values::F32(x)
    }

    fn operand_room(_len: usize) -> usize {
        0
    }

    #[inline(always)]
    fn exp(x: f32) -> f32 {
        math::exp(x)
    }
}

impl Element for bf16 {
    fn isa(cpu: &Cpu) -> Self::Isa {
        cpu.bf16_isa
    }

    fn of(activations: &Activations) -> Result<&[bf16]> {
        if let Activations::Bf16(values) = activations { Ok(values) } else { Err(wrong_precision()) }
    }

    fn of_mut(activations: &mut Activations) -> Result<&mut [bf16]> {
        if let Activations::Bf16(values) = activations { Ok(values) } else { Err(wrong_precision()) }
    }

    fn values(x: &[bf16]) -> Values<'_> {
        Values::Bf16(x)
    }

    fn operand<'a>(rounded: &'a [bf16], _x: &'a [f32]) -> Values<'a> {
        Values::Bf16(rounded)
    }

    fn operand_room(len: usize) -> usize {
        len
    }

    #[inline(always)]
    fn exp(x: f32) -> f32 {
        math::exp_coarse(x)
    }
}

/// `len` elements off the front of a task's scratch.
pub(super) fn carve<E: Element>(scratch: &mut [f32], len: usize) -> (&mut [E], &mut [f32]) {
    let (front, rest) = scratch.split_at_mut(floats::<E>(len));
    (&mut bytemuck::cast_slice_mut(front)[..len], rest)
}

/// Floats of scratch that `len` elements take, whole cache lines.
pub(super) fn floats<E: Element>(len: usize) -> usize {
    Scratch::matrix::<E>(1, len).0.next_multiple_of(LINE_FLOATS)
}

/// Pieces of `len` values, the last of which may be shorter.
pub(super) fn chunks(values: ValuesMut<'_>, len: usize) -> Vec<ValuesMut<'_>> {
    match values {
        ValuesMut::F32(values) => values.chunks_mut(len.max(1)).map(ValuesMut::F32).collect(),
        ValuesMut::Bf16(values) => values.chunks_mut(len.max(1)).map(ValuesMut::Bf16).collect(),
    }
}

/// Pieces of the given lengths, one after the other.
pub(super) fn pieces(mut values: ValuesMut<'_>, lengths: impl Iterator<Item = usize>) -> Vec<ValuesMut<'_>> {
    fn front<'a, T>(values: &mut &'a mut [T], len: usize) -> &'a mut [T] {
        let (front, rest) = std::mem::take(values).split_at_mut(len);
        *values = rest;
        front
    }
    let piece = |len| match &mut values {
        ValuesMut::F32(values) => ValuesMut::F32(front(values, len)),
        ValuesMut::Bf16(values) => ValuesMut::Bf16(front(values, len)),
    };
    lengths.map(piece).collect()
}

/// A matrix [rows, width] in parts of `share` rows, the last of which may be shorter. `width` may be 0.
pub(super) fn row_parts<T>(
    mut values: &mut [T],
    rows: usize,
    share: usize,
    width: usize,
) -> impl ExactSizeIterator<Item = &mut [T]> {
    (0..rows.div_ceil(share)).map(move |_| {
        let len = values.len().min(share * width);
        let (part, rest) = std::mem::take(&mut values).split_at_mut(len);
        values = rest;
        part
    })
}

/// `out` = `x`, converted.
pub(super) fn convert(isa: Bf16Isa, out: ValuesMut<'_>, x: Values<'_>) -> Result<()> {
    match (out, x) {
        (ValuesMut::F32(out), Values::F32(x)) => out.copy_from_slice(x),
        (ValuesMut::Bf16(out), Values::Bf16(x)) => out.copy_from_slice(x),
        (ValuesMut::Bf16(out), Values::F32(x)) => gemm::to_bf16(isa, out, x)?,
        (ValuesMut::F32(out), Values::Bf16(x)) => isa.vectorize(
            #[inline(always)]
            || out.iter_mut().zip(x).for_each(|(out, x)| *out = x.widen()),
        ),
    }
    Ok(())
}
