//! Memory of the CPU backend: f32, or bf16 where large products read it.

use super::aligned::{Aligned, LINE_FLOATS};
use crate::Result;
use crate::error::out_of_memory;
use half::bf16;
use hydra_kernels::gemm::{self, Values, ValuesMut};
use hydra_kernels::isa::Bf16Isa;
use hydra_kernels::{Float, Scratch, math};

/// Values that operations read and write.
pub enum Buffer {
    /// Whatever is summed up or kept for long.
    F32(Aligned<f32>),
    /// Activations, where products have bf16 operands.
    Bf16(Aligned<bf16>),
}

impl Buffer {
    pub(super) fn zeroed<E: Element>(len: usize) -> Result<Self> {
        let values = Aligned::zeroed(len).ok_or_else(|| out_of_memory(len.saturating_mul(size_of::<E>())))?;
        Ok(E::buffer(values))
    }

    pub(super) fn values(&self) -> Values<'_> {
        match self {
            Buffer::F32(values) => Values::F32(values),
            Buffer::Bf16(values) => Values::Bf16(values),
        }
    }

    pub(super) fn values_mut(&mut self) -> ValuesMut<'_> {
        match self {
            Buffer::F32(values) => ValuesMut::F32(values),
            Buffer::Bf16(values) => ValuesMut::Bf16(values),
        }
    }
}

/// A type of buffer, and of a product's operands.
pub(super) trait Element: Float + hydra_kernels::Element + Default {
    fn buffer(values: Aligned<Self>) -> Buffer;

    /// # Panics
    /// If the buffer holds the other type: activations come from `Backend::activation`, all else from `Backend::buffer`.
    fn of(buffer: &Buffer) -> &[Self];

    fn values(x: &[Self]) -> Values<'_>;

    /// The reverse of [`Element::values`].
    ///
    /// # Panics
    /// As [`Element::of`].
    fn slice(values: Values<'_>) -> &[Self];

    /// eˣ, as exact as what will be made of it.
    fn exp(x: f32) -> f32;

    /// [`Element::of`].
    fn of_mut(buffer: &mut Buffer) -> &mut [Self];
}

const WRONG_KIND: &str = "an activation where a buffer is wanted, or the reverse";

impl Element for f32 {
    fn buffer(values: Aligned<f32>) -> Buffer {
        Buffer::F32(values)
    }

    #[inline(always)]
    fn exp(x: f32) -> f32 {
        math::exp(x)
    }

    fn values(x: &[f32]) -> Values<'_> {
        Values::F32(x)
    }

    fn slice(values: Values<'_>) -> &[f32] {
        let Values::F32(x) = values else { panic!("{WRONG_KIND}") };
        x
    }

    fn of(buffer: &Buffer) -> &[f32] {
        let Buffer::F32(values) = buffer else { panic!("{WRONG_KIND}") };
        values
    }

    fn of_mut(buffer: &mut Buffer) -> &mut [f32] {
        let Buffer::F32(values) = buffer else { panic!("{WRONG_KIND}") };
        values
    }
}

impl Element for bf16 {
    fn buffer(values: Aligned<bf16>) -> Buffer {
        Buffer::Bf16(values)
    }

    #[inline(always)]
    fn exp(x: f32) -> f32 {
        math::exp_coarse(x)
    }

    fn values(x: &[bf16]) -> Values<'_> {
        Values::Bf16(x)
    }

    fn slice(values: Values<'_>) -> &[bf16] {
        let Values::Bf16(x) = values else { panic!("{WRONG_KIND}") };
        x
    }

    fn of(buffer: &Buffer) -> &[bf16] {
        let Buffer::Bf16(values) = buffer else { panic!("{WRONG_KIND}") };
        values
    }

    fn of_mut(buffer: &mut Buffer) -> &mut [bf16] {
        let Buffer::Bf16(values) = buffer else { panic!("{WRONG_KIND}") };
        values
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
        ValuesMut::F32(values) => values.chunks_mut(len).map(ValuesMut::F32).collect(),
        ValuesMut::Bf16(values) => values.chunks_mut(len).map(ValuesMut::Bf16).collect(),
    }
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
