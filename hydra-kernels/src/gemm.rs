//! C = Σ_t A_t · B_t in tiles: A is read where it lies, B from packed panels, and sums are f32.
//!
//! ```text
//! C [m, n] row-major, A_t [m, k_t] at any strides, B_t [k_t, n] packed by `pack` (which decodes frozen weights)
//! ```
//!
//! **Panels.** NR columns of B lie together, zero-padded: f32 as `[n/NR][k][NR]`, bf16 as `[n/NR][k/2][NR][2]`, neighbours
//! along k adjacent, as VDPBF16PS wants them (and an AMX tile, in sixteen columns).
//!
//! **Blocks.** k is cut into equal blocks of at most KC, so that a tile of A (MR × KC, copied to the stack) stays in L1,
//! and n into groups of panels that stay in L2 while all the tiles of A pass over them.
//!
//! **Order.** An element of C is the sum over terms and blocks in order, each block summed in order of k: for a given
//! instruction set it doesn't depend on m, on n, or on how a caller cuts C into rows and panels.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512bf16;
mod convert;
mod drive;
mod pack;
mod portable;

use convert::widen;
pub use convert::{Float, to_bf16};
pub use pack::pack;

use crate::error::{Error, at_least, extent};
use crate::isa::{Bf16Isa, Isa};
use crate::quant::Weight;
use half::bf16;

/// Columns that are a whole number of panels on every instruction set: where to cut n.
pub const PANEL_ALIGN: usize = 32;

/// Rows of k that are a whole number of steps on every instruction set, for scratch sizes that don't depend on one.
pub const K_ALIGN: usize = 32;

/// The elements of an operand that is read in place. A product of bf16 rounds f32 (to nearest, ties to even) as it copies
/// them; one of f32 widens bf16.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half the memory.
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

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// From element `first` on.
    pub fn skip(&self, first: usize) -> Values<'a> {
        match self {
            Values::F32(data) => Values::F32(&data[first..]),
            Values::Bf16(data) => Values::Bf16(&data[first..]),
        }
    }

    /// The first `len` elements.
    pub fn first(&self, len: usize) -> Values<'a> {
        match self {
            Values::F32(data) => Values::F32(&data[..len]),
            Values::Bf16(data) => Values::Bf16(&data[..len]),
        }
    }

    /// `out[i]` = element `first + i · stride`.
    #[inline(always)]
    pub(crate) fn read(&self, first: usize, stride: usize, out: &mut [f32]) {
        match self {
            Values::F32(data) => read(&data[first..], stride, out),
            Values::Bf16(data) => read(&data[first..], stride, out),
        }
    }

    /// Element `i`.
    #[inline(always)]
    pub(crate) fn at(&self, i: usize) -> f32 {
        match self {
            Values::F32(data) => data[i],
            Values::Bf16(data) => widen(data[i]),
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

/// A matrix that is read in place: element (i, p) is `data[i · row_stride + p · col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// The elements.
    pub data: Values<'a>,
    /// From a row to the next.
    pub row_stride: usize,
    /// From a column to the next.
    pub col_stride: usize,
}

impl<'a> Rows<'a> {
    /// Row-major with `cols` columns.
    pub fn row_major(data: impl Into<Values<'a>>, cols: usize) -> Self {
        Rows { data: data.into(), row_stride: cols, col_stride: 1 }
    }

    /// The transpose of a row-major matrix with `cols` columns.
    pub fn transposed(data: impl Into<Values<'a>>, cols: usize) -> Self {
        Rows { data: data.into(), row_stride: 1, col_stride: cols }
    }
}

/// B [k, n] as [`pack`] left it.
#[derive(Clone, Copy, Debug)]
pub struct Panels<'a, E> {
    /// At least [`panels_len`] elements.
    pub data: &'a [E],
    /// Rows.
    pub k: usize,
    /// Columns.
    pub n: usize,
}

/// One product A · B of a sum.
#[derive(Clone, Copy, Debug)]
pub struct Term<'a, E> {
    /// [m, k].
    pub a: Rows<'a>,
    /// [k, n].
    pub b: Panels<'a, E>,
}

/// What happens to the old C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// C = sum.
    Overwrite,
    /// C += sum.
    Accumulate,
}

/// Where [`pack`] finds B [k, n].
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// B[p, j] = `data[p · k_stride + j · n_stride]`.
    Dense {
        /// The elements.
        data: Values<'a>,
        /// From a row of B to the next.
        k_stride: usize,
        /// From a column of B to the next.
        n_stride: usize,
    },
    /// B[p, j] = W[first + j, p]: for X Wᵀ. k is W's columns.
    WeightRows {
        /// W.
        weight: Weight<'a>,
        /// The row of W that is column 0 of B.
        first: usize,
    },
    /// B[p, j] = W[p, first + j]: for dY W. k is W's rows.
    WeightCols {
        /// W.
        weight: Weight<'a>,
        /// The column of W that is column 0 of B; a multiple of 32 in block formats.
        first: usize,
    },
}

/// An element type that [`gemm`] multiplies: f32, or bf16 (half the memory traffic; products and sums in f32).
pub trait Multiplicand: bytemuck::Pod + drive::Kernel {
    /// The instruction sets that multiply it.
    type Isa: Copy + core::fmt::Debug + PartialEq + Send + Sync;
}

impl Multiplicand for f32 {
    type Isa = Isa;
}

impl Multiplicand for bf16 {
    type Isa = Bf16Isa;
}

/// Elements that B [k, n] takes when packed. Saturates.
pub fn panels_len<E: Multiplicand>(isa: E::Isa, k: usize, n: usize) -> usize {
    let tile = E::tile(isa);
    let columns = n.checked_next_multiple_of(tile.nr).unwrap_or(usize::MAX);
    let rows = k.checked_next_multiple_of(tile.k_step).unwrap_or(usize::MAX);
    rows.saturating_mul(columns)
}

/// At least [`panels_len`] on every instruction set.
pub const fn panels_bound(k: usize, n: usize) -> usize {
    k.div_ceil(K_ALIGN).saturating_mul(K_ALIGN).saturating_mul(n.div_ceil(PANEL_ALIGN).saturating_mul(PANEL_ALIGN))
}

/// `c` [m, n], rows `c_stride` apart, = or += Σ_t A_t · B_t.
///
/// Every term has n columns; m, n, k and the number of terms may be 0. Writes nothing if it returns an error.
pub fn gemm<E: Multiplicand>(
    isa: E::Isa,
    c: &mut [f32],
    c_stride: usize,
    m: usize,
    n: usize,
    store: Store,
    terms: &[Term<'_, E>],
) -> Result<(), Error> {
    if m > 1 && c_stride < n {
        return Err(Error::Range { operand: "n", limit: c_stride, got: n });
    }
    at_least("c", extent(m, n, c_stride, 1)?, c.len())?;
    for Term { a, b } in terms {
        if b.n != n {
            return Err(Error::Length { operand: "columns of b", want: n, got: b.n });
        }
        at_least("a", extent(m, b.k, a.row_stride, a.col_stride)?, a.data.len())?;
        at_least("b", panels_len::<E>(isa, b.k, n), b.data.len())?;
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    if store == Store::Overwrite && terms.iter().all(|term| term.b.k == 0) {
        c.chunks_mut(c_stride.max(n)).take(m).for_each(|row| row[..n].fill(0.0));
        return Ok(());
    }
    E::multiply(isa, c, c_stride, m, n, store, terms);
    Ok(())
}
