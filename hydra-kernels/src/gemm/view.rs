//! Views of the operands: elements in f32 or bf16, strided matrices, packed panels.

use super::bf16::Float;
use super::blocking::{K_ALIGN, PANEL_ALIGN};
use super::element::{Element, panels_len};
use crate::error::{Error, at_least};
use core::ops::Range;
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

    /// Prefetches `len` elements from `first` on, which need not exist.
    #[inline(always)]
    pub(crate) fn prefetch(&self, first: usize, len: usize) {
        #[cfg(target_arch = "x86_64")]
        {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let (at, bytes) = match self {
                Values::F32(data) => (data.as_ptr().wrapping_add(first).cast::<i8>(), 4 * len),
                Values::Bf16(data) => (data.as_ptr().wrapping_add(first).cast(), 2 * len),
            };
            for line in (0..bytes).step_by(64) {
                // SAFETY: x86-64 includes SSE; a prefetch of any address is allowed and reads nothing.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(line)) }
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (first, len);
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
    /// At least [`panels_len`](crate::gemm::panels_len) elements; of a [`part`](Self::part), from its first one on.
    pub data: &'a [E],
    /// Rows of B.
    pub k: usize,
    /// Columns of B.
    pub n: usize,
    /// Rows that were packed: `k`, or more if these are a [`part`](Self::part).
    pub packed_k: usize,
}

impl<'a, E: Element> Panels<'a, E> {
    /// All that was packed as [k, n].
    pub fn new(data: &'a [E], k: usize, n: usize) -> Self {
        Self { data, k, n, packed_k: k }
    }

    /// Some rows and columns: multiples of [`K_ALIGN`] and of [`PANEL_ALIGN`] to begin with, and to end with either such a
    /// multiple or the last one.
    ///
    /// Returns an error if a range begins or ends elsewhere, or if `data` is too short.
    pub fn part(self, isa: E::Isa, rows: Range<usize>, columns: Range<usize>) -> Result<Self, Error> {
        aligned("rows of b", &rows, self.k, K_ALIGN)?;
        aligned("columns of b", &columns, self.n, PANEL_ALIGN)?;
        let first = panels_len::<E>(isa, self.packed_k, columns.start)
            .saturating_add(rows.start.saturating_mul(E::panel_shape(isa).nr));
        let part = Self { k: rows.len(), n: columns.len(), ..self };
        at_least("b", first.saturating_add(part.extent(isa)), self.data.len())?;
        Ok(Self { data: &self.data[first..], ..part })
    }

    /// Elements that `data` has at least.
    pub(super) fn extent(&self, isa: E::Isa) -> usize {
        let whole = panels_len::<E>(isa, self.packed_k, self.n);
        if self.k == 0 || self.n == 0 || whole == usize::MAX {
            return if self.k == 0 { 0 } else { whole };
        }
        let nr = E::panel_shape(isa).nr;
        // The last panel ends where its last row does.
        (whole - panels_len::<E>(isa, self.packed_k, nr)).saturating_add(panels_len::<E>(isa, self.k, nr))
    }
}

/// `Ok` if `range` lies in 0 .. `limit` and begins and ends at multiples of `block`, or ends with the last.
fn aligned(operand: &'static str, range: &Range<usize>, limit: usize, block: usize) -> Result<(), Error> {
    if range.end > limit || range.start > range.end {
        return Err(Error::Range { operand, limit, got: range.start.max(range.end) });
    }
    let end = if range.end == limit { 0 } else { range.end };
    match [range.start, end].into_iter().find(|at| !at.is_multiple_of(block)) {
        Some(got) => Err(Error::Block { operand, block, got }),
        None => Ok(()),
    }
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
