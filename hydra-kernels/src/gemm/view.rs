//! Views of the operands: elements in f32 or bf16, strided matrices, packed panels.

use super::bf16::Float;
use half::bf16;

/// Elements that are read in place. A bf16 product rounds f32 elements to nearest, ties to even, as it copies them; an
/// f32 product widens bf16 elements.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

impl<'a> Values<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Values::F32(data) => data.len(),
            Values::Bf16(data) => data.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements from `first` on.
    ///
    /// # Panics
    /// If there are fewer than `first`.
    pub fn skip(&self, first: usize) -> Values<'a> {
        match self {
            Values::F32(data) => Values::F32(&data[first..]),
            Values::Bf16(data) => Values::Bf16(&data[first..]),
        }
    }

    /// The first `len` elements.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn first(&self, len: usize) -> Values<'a> {
        match self {
            Values::F32(data) => Values::F32(&data[..len]),
            Values::Bf16(data) => Values::Bf16(&data[..len]),
        }
    }

    /// `out[i]` = element `first + i · stride`, widened.
    #[inline(always)]
    pub(crate) fn read(&self, first: usize, stride: usize, out: &mut [f32]) {
        match self {
            Values::F32(data) => read(&data[first..], stride, out),
            Values::Bf16(data) => read(&data[first..], stride, out),
        }
    }

    /// Element `i`, widened.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(crate) fn at(&self, i: usize) -> f32 {
        match self {
            Values::F32(data) => data[i],
            Values::Bf16(data) => data[i].widen(),
        }
    }
}

#[inline(always)]
fn read<E: Float>(from: &[E], stride: usize, out: &mut [f32]) {
    if stride == 1 {
        let from = &from[..out.len()];
        out.iter_mut().zip(from).for_each(|(out, x)| *out = x.widen());
    } else {
        out.iter_mut().enumerate().for_each(|(i, out)| *out = from[i * stride].widen());
    }
}

impl<'a> From<&'a [f32]> for Values<'a> {
    fn from(data: &'a [f32]) -> Self {
        Values::F32(data)
    }
}

impl<'a> From<&'a [bf16]> for Values<'a> {
    fn from(data: &'a [bf16]) -> Self {
        Values::Bf16(data)
    }
}

/// Elements that a product writes: f32, or bf16, rounded once from the complete f32 sum.
#[derive(Debug)]
pub enum ValuesMut<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// bfloat16.
    Bf16(&'a mut [bf16]),
}

impl<'a> ValuesMut<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            ValuesMut::F32(data) => data.len(),
            ValuesMut::Bf16(data) => data.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first `len` elements.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn first(self, len: usize) -> Self {
        match self {
            ValuesMut::F32(data) => ValuesMut::F32(&mut data[..len]),
            ValuesMut::Bf16(data) => ValuesMut::Bf16(&mut data[..len]),
        }
    }

    /// The elements from `first` on.
    ///
    /// # Panics
    /// If there are fewer than `first`.
    pub fn skip(self, first: usize) -> Self {
        match self {
            ValuesMut::F32(data) => ValuesMut::F32(&mut data[first..]),
            ValuesMut::Bf16(data) => ValuesMut::Bf16(&mut data[first..]),
        }
    }

    /// The same elements, borrowed for a shorter time.
    pub fn reborrow(&mut self) -> ValuesMut<'_> {
        match self {
            ValuesMut::F32(data) => ValuesMut::F32(data),
            ValuesMut::Bf16(data) => ValuesMut::Bf16(data),
        }
    }
}

impl<'a> From<&'a mut [f32]> for ValuesMut<'a> {
    fn from(data: &'a mut [f32]) -> Self {
        ValuesMut::F32(data)
    }
}

impl<'a> From<&'a mut [bf16]> for ValuesMut<'a> {
    fn from(data: &'a mut [bf16]) -> Self {
        ValuesMut::Bf16(data)
    }
}

/// A strided view of a matrix: element (i, p) is `data[i · row_stride + p · col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct MatRef<'a> {
    /// The elements.
    pub data: Values<'a>,
    /// Distance between neighbouring rows, in elements.
    pub row_stride: usize,
    /// Distance between neighbouring columns, in elements.
    pub col_stride: usize,
}

impl<'a> MatRef<'a> {
    /// A row-major matrix with `cols` columns.
    pub fn row_major(data: impl Into<Values<'a>>, cols: usize) -> Self {
        MatRef { data: data.into(), row_stride: cols, col_stride: 1 }
    }

    /// The transpose of a row-major matrix with `cols` columns.
    pub fn transposed(data: impl Into<Values<'a>>, cols: usize) -> Self {
        MatRef { data: data.into(), row_stride: 1, col_stride: cols }
    }
}

/// B [k, n] as [`pack`](crate::gemm::pack) stored it.
#[derive(Clone, Copy, Debug)]
pub struct Panels<'a, E> {
    /// At least [`panels_len`](crate::gemm::panels_len) elements.
    pub data: &'a [E],
    /// Rows of B.
    pub k: usize,
    /// Columns of B.
    pub n: usize,
}

/// One product A · B of the sum.
#[derive(Clone, Copy, Debug)]
pub struct Term<'a, E> {
    /// A [m, k].
    pub a: MatRef<'a>,
    /// B [k, n].
    pub b: Panels<'a, E>,
}

/// Whether a product replaces C or is added to it: the β of a BLAS `gemm`, restricted to 0 and 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accumulate {
    /// β = 0: C = A B. The old C is never read, so it may hold NaN.
    Overwrite,
    /// β = 1: C += A B.
    Add,
}
