//! Memory of the CPU backend: f32, or bf16 where large products read it.

use crate::{Error, Result};
use half::bf16;
use hydra_kernels::gemm::{self, Values};
use hydra_kernels::isa::Isa;
use hydra_kernels::{Float, Multiplicand};

/// Values that operations read and write.
#[derive(Debug)]
pub enum Buffer {
    /// Whatever is summed up or kept for long.
    F32(Vec<f32>),
    /// Activations, where products have bf16 operands.
    Bf16(Vec<bf16>),
}

impl Buffer {
    pub(super) fn zeroed<E: Element>(len: usize) -> Result<Self> {
        let mut buffer = Vec::<E>::new();
        let bytes = len as u64 * size_of::<E>() as u64;
        let refused = |_| Error::Invalid(format!("out of memory: {} MiB asked for", bytes >> 20));
        buffer.try_reserve_exact(len).map_err(refused)?;
        drop(buffer);
        // Zeroed pages come from the system untouched: memory that is never used is never resident.
        Ok(E::buffer(vec![E::default(); len]))
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
pub(super) trait Element: Float + Multiplicand + Default {
    fn buffer(values: Vec<Self>) -> Buffer;

    /// # Panics
    /// If the buffer holds the other type: activations come from `Backend::activation`, all else from `Backend::buffer`.
    fn of(buffer: &Buffer) -> &[Self];

    fn values(x: &[Self]) -> Values<'_>;

    /// [`Element::of`].
    fn of_mut(buffer: &mut Buffer) -> &mut [Self];
}

const WRONG_KIND: &str = "an activation where a buffer is wanted, or the reverse";

impl Element for f32 {
    fn buffer(values: Vec<f32>) -> Buffer {
        Buffer::F32(values)
    }

    fn values(x: &[f32]) -> Values<'_> {
        Values::F32(x)
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
    fn buffer(values: Vec<bf16>) -> Buffer {
        Buffer::Bf16(values)
    }

    fn values(x: &[bf16]) -> Values<'_> {
        Values::Bf16(x)
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

/// A product's result: f32, or rounded as it is written.
pub(super) enum ValuesMut<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

impl<'a> ValuesMut<'a> {
    pub fn first(self, len: usize) -> Self {
        match self {
            ValuesMut::F32(values) => ValuesMut::F32(&mut values[..len]),
            ValuesMut::Bf16(values) => ValuesMut::Bf16(&mut values[..len]),
        }
    }

    pub fn skip(self, first: usize) -> Self {
        match self {
            ValuesMut::F32(values) => ValuesMut::F32(&mut values[first..]),
            ValuesMut::Bf16(values) => ValuesMut::Bf16(&mut values[first..]),
        }
    }

    pub fn reborrow(&mut self) -> ValuesMut<'_> {
        match self {
            ValuesMut::F32(values) => ValuesMut::F32(values),
            ValuesMut::Bf16(values) => ValuesMut::Bf16(values),
        }
    }

    /// Pieces of `len` values, the last of which may be shorter.
    pub fn chunks(self, len: usize) -> Vec<ValuesMut<'a>> {
        match self {
            ValuesMut::F32(values) => values.chunks_mut(len).map(ValuesMut::F32).collect(),
            ValuesMut::Bf16(values) => values.chunks_mut(len).map(ValuesMut::Bf16).collect(),
        }
    }

    pub fn len(&self) -> usize {
        match self {
            ValuesMut::F32(values) => values.len(),
            ValuesMut::Bf16(values) => values.len(),
        }
    }
}

/// `out` = `x`, converted.
pub(super) fn convert(isa: Isa, out: ValuesMut<'_>, x: Values<'_>) -> Result<()> {
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
