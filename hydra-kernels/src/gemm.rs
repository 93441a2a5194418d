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
//! and n into groups of panels that stay in L2 while all the tiles of A pass over them. A short second term (an adapter's)
//! joins the first's last block. A bf16 result is rounded tile by tile, when its last block has been summed.
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
#[cfg(target_arch = "x86_64")]
mod pairs;
mod parts;
mod portable;
mod tiled;
#[cfg(target_arch = "x86_64")]
mod transpose;

pub use convert::{Float, to_bf16};
use convert::{round_rows, widen, widen_rows};
use drive::Product;
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

/// Where a product goes: f32, or bf16 (rounded once, when all is summed).
#[derive(Debug)]
pub enum ValuesMut<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// Half the memory.
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

    /// Whether there are none.
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

    /// From element `first` on.
    ///
    /// # Panics
    /// If there are fewer than `first`.
    pub fn skip(self, first: usize) -> Self {
        match self {
            ValuesMut::F32(data) => ValuesMut::F32(&mut data[first..]),
            ValuesMut::Bf16(data) => ValuesMut::Bf16(&mut data[first..]),
        }
    }

    /// The same, for a while.
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
    /// Row-major with `cols` columns.
    pub fn row_major(data: impl Into<Values<'a>>, cols: usize) -> Self {
        MatRef { data: data.into(), row_stride: cols, col_stride: 1 }
    }

    /// The transpose of a row-major matrix with `cols` columns.
    pub fn transposed(data: impl Into<Values<'a>>, cols: usize) -> Self {
        MatRef { data: data.into(), row_stride: 1, col_stride: cols }
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
    pub a: MatRef<'a>,
    /// [k, n].
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
    /// B[p, j] = W[first + j, p]: for X Wᵀ. k is W's columns, or fewer of them.
    WeightRows {
        /// W.
        weight: Weight<'a>,
        /// The row of W that is column 0 of B.
        first: usize,
    },
    /// B[p, j] = W[p, first + j]: for dY W. k is W's rows, or fewer of them.
    WeightCols {
        /// W.
        weight: Weight<'a>,
        /// The column of W that is column 0 of B; a multiple of 32 in block formats.
        first: usize,
    },
}

/// The element type of the packed panels that [`gemm`] multiplies: f32 or bf16. Products are summed in f32 for both.
pub trait Element: Float + drive::Kernel {
    /// The instruction sets that multiply it.
    type Isa: Copy + core::fmt::Debug + PartialEq + Send + Sync;
}

impl Element for f32 {
    type Isa = Isa;
}

impl Element for bf16 {
    type Isa = Bf16Isa;
}

/// Elements that B [k, n] takes when packed. Saturates.
pub fn panels_len<E: Element>(isa: E::Isa, k: usize, n: usize) -> usize {
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
/// Every term has n columns; m, n, k and the number of terms may be 0, and into bf16 there are at most [`BF16_TERMS`] terms.
/// Writes nothing if it returns an error.
pub fn gemm<'c, E: Element>(
    isa: E::Isa,
    c: impl Into<ValuesMut<'c>>,
    c_stride: usize,
    m: usize,
    n: usize,
    store: Accumulate,
    terms: &[Term<'_, E>],
) -> Result<(), Error> {
    let c = c.into();
    if m > 1 && c_stride < n {
        return Err(Error::Range { operand: "n", limit: c_stride, got: n });
    }
    at_least("c", extent(m, n, c_stride, 1)?, c.len())?;
    if matches!(c, ValuesMut::Bf16(_)) && terms.len() > BF16_TERMS {
        return Err(Error::Range { operand: "terms", limit: BF16_TERMS, got: terms.len() });
    }
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
    let product = Product { c_stride: c_stride.max(n), m, n, store, terms };
    if terms.iter().all(|term| term.b.k == 0) {
        if store == Accumulate::Overwrite {
            match c {
                ValuesMut::F32(c) => c.chunks_mut(product.c_stride).take(m).for_each(|row| row[..n].fill(0.0)),
                ValuesMut::Bf16(c) => c.chunks_mut(product.c_stride).take(m).for_each(|row| row[..n].fill(bf16::ZERO)),
            }
        }
        return Ok(());
    }
    match c {
        ValuesMut::F32(c) => E::multiply(isa, c, &product),
        ValuesMut::Bf16(c) => {
            if !E::multiply_rounded(isa, c, &product) {
                by_blocks(isa, c, &product);
            }
        }
    }
    Ok(())
}

/// The most terms of a product into bf16, whose blocks of sums are on the stack with their operands.
pub const BF16_TERMS: usize = 4;

/// Rows and columns of a block of sums on the stack: whole tiles of every instruction set.
const BLOCK_ROWS: usize = 96;
const BLOCK_COLUMNS: usize = 4 * PANEL_ALIGN;

/// A bf16 result, summed in f32 a block at a time.
fn by_blocks<E: Element>(isa: E::Isa, c: &mut [bf16], product: &Product<'_, '_, E>) {
    let &Product { c_stride, m, n, store, terms } = product;
    let mut block = [0.0; BLOCK_ROWS * BLOCK_COLUMNS];
    for j in (0..n).step_by(BLOCK_COLUMNS) {
        let columns = BLOCK_COLUMNS.min(n - j);
        for i in (0..m).step_by(BLOCK_ROWS) {
            let rows = BLOCK_ROWS.min(m - i);
            let mut parts = [Term { a: MatRef::row_major(&[] as &[f32], 0), b: Panels { data: &[], k: 0, n: columns } };
                BF16_TERMS];
            for (part, Term { a, b }) in parts.iter_mut().zip(terms) {
                let a = MatRef { data: a.data.skip((i * a.row_stride).min(a.data.len())), ..*a };
                let b = Panels { data: &b.data[panels_len::<E>(isa, b.k, j)..], k: b.k, n: columns };
                *part = Term { a, b };
            }
            let sums = &mut block[..rows * columns];
            let c = &mut c[i * c_stride + j..];
            if store == Accumulate::Add {
                widen_rows(E::widened(isa), sums, columns, c, c_stride, columns);
            }
            let terms = &parts[..terms.len()];
            E::multiply(isa, sums, &Product { c_stride: columns, m: rows, n: columns, store, terms });
            round_rows(E::widened(isa), c, c_stride, sums, columns, columns);
        }
    }
}
