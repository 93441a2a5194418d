//! The loops around a micro-kernel, the same for every element type and instruction set.

use super::convert::round;
use super::portable::{PortableBf16, PortableF32};
use super::{Multiplicand, Store, Term, Values};
#[cfg(target_arch = "x86_64")]
use super::{
    amx,
    avx2::{Avx2F32, Avx2Widened},
    avx512::{Avx512F32, Avx512Widened},
    avx512bf16::Avx512Pairs,
};
#[cfg(target_arch = "x86_64")]
use crate::isa::Avx512Bf16;
use crate::isa::{Bf16Isa, Isa};
use half::bf16;

/// Most rows in a tile of C on any instruction set.
pub(super) const MR_MAX: usize = 12;

/// A tile of A takes at most this many bytes a row: 12 of them are 18 KiB of a 32 KiB L1, the rest is for B's stream.
pub(super) const A_ROW_BYTES: usize = 1536;

/// 64 bytes more from row to row, so that the rows of a tile fall into different sets of the cache.
const A_STRIDE: usize = A_ROW_BYTES / 4 + 16;

/// B's panels that stay in L2 (of 1 MiB or more) while tiles of A pass: half of it.
const B_BYTES: usize = 512 * 1024;

/// How an element type is tiled on one instruction set.
#[derive(Clone, Copy)]
pub struct Tile {
    /// Columns of a panel.
    pub(super) nr: usize,
    /// Panels are padded to a multiple of this many rows.
    pub(super) k_step: usize,
}

/// What [`Multiplicand`] seals: the dispatch to micro-kernels and the panel's arrangement.
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
        Self: Multiplicand;
    #[doc(hidden)]
    fn tile(isa: Self::Isa) -> Tile
    where
        Self: Multiplicand;
    /// A product into bf16 in one go, where the instruction set has a way; else `false`, and nothing is done.
    #[doc(hidden)]
    fn multiply_rounded(
        _isa: Self::Isa,
        _c: &mut [bf16],
        _c_stride: usize,
        _m: usize,
        _n: usize,
        _terms: &[Term<'_, Self>],
    ) -> bool
    where
        Self: Multiplicand,
    {
        false
    }
    /// The instructions that pack pairs of bf16, if these panels are of such pairs.
    #[doc(hidden)]
    #[cfg(target_arch = "x86_64")]
    fn pairs(_isa: Self::Isa) -> Option<Avx512Bf16>
    where
        Self: Multiplicand,
    {
        None
    }
    #[doc(hidden)]
    fn multiply(
        isa: Self::Isa,
        c: &mut [f32],
        c_stride: usize,
        m: usize,
        n: usize,
        store: Store,
        terms: &[Term<'_, Self>],
    ) where
        Self: Multiplicand;
}

/// A micro-kernel: `rows` × NR of C from a tile of A and a panel of B.
pub(super) trait Micro: Copy {
    /// The type of A and of the panels.
    type E: Multiplicand;
    /// What a tile of A holds: E, or f32 where the instruction set has no product of E.
    type A: bytemuck::Pod;
    const MR: usize;
    const NR: usize;
    const K_STEP: usize;

    /// The f32 instruction set that this one contains.
    fn isa(self) -> Isa;

    /// An element of A as a tile holds it: rounded to E.
    fn of_f32(a: f32) -> Self::A;

    /// The same from bf16: exact.
    fn of_bf16(a: bf16) -> Self::A;

    /// C[i, j] = or += Σ_p `a[i · a_stride + p]` · b[p, j], for i < `rows` ≤ MR, j < `cols` ≤ NR, p < `k`
    /// (a multiple of K_STEP).
    fn tile(self, k: usize, a: &[Self::A], b: &[Self::E], c: CTile<'_>);
}

/// Where a tile of C lies.
pub(super) struct CTile<'a> {
    pub(super) data: &'a mut [f32],
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) store: Store,
}

impl CTile<'_> {
    /// The bounds contract of [`Micro::tile`], once per tile.
    #[inline(always)]
    pub(super) fn check<K: Micro>(&self, k: usize, a: &[K::A], b: &[K::E]) {
        assert!((1..=K::MR).contains(&self.rows) && (1..=K::NR).contains(&self.cols));
        assert!(self.data.len() >= (self.rows - 1) * self.stride + self.cols);
        assert!(k.is_multiple_of(K::K_STEP) && b.len() >= k * K::NR);
        assert!(k <= a_stride::<K::A>() && a.len() >= self.rows * a_stride::<K::A>());
    }
}

/// From a row of a tile of A to the next.
pub(super) const fn a_stride<A>() -> usize {
    A_STRIDE * size_of::<f32>() / size_of::<A>()
}

#[repr(align(64))]
struct ATile([f32; MR_MAX * A_STRIDE]);

/// The terms one after the other.
pub(super) fn drive<K: Micro>(
    kernel: K,
    c: &mut [f32],
    c_stride: usize,
    m: usize,
    n: usize,
    store: Store,
    terms: &[Term<'_, K::E>],
) {
    let mut store = store;
    for term in terms.iter().filter(|term| term.b.k > 0) {
        drive_term(kernel, c, c_stride, m, n, store, term);
        store = Store::Accumulate;
    }
}

/// One term: blocks of k, groups of panels, tiles of A, panels.
fn drive_term<K: Micro>(
    kernel: K,
    c: &mut [f32],
    c_stride: usize,
    m: usize,
    n: usize,
    store: Store,
    term: &Term<'_, K::E>,
) {
    const { assert!(K::MR <= MR_MAX) };
    let k_total = term.b.k;
    let k_padded = k_total.next_multiple_of(K::K_STEP);
    let k_most = A_ROW_BYTES / size_of::<K::A>();
    let k_block = k_padded.div_ceil(k_padded.div_ceil(k_most)).next_multiple_of(K::K_STEP);
    let n_block = (B_BYTES / (k_block * size_of::<K::E>())).max(K::NR) / K::NR * K::NR;
    let mut tile = ATile([0.0; MR_MAX * A_STRIDE]);
    let a_tile: &mut [K::A] = bytemuck::cast_slice_mut(&mut tile.0);
    let mut store = store;
    for p in (0..k_total).step_by(k_block) {
        let k_real = k_block.min(k_total - p);
        let k = k_real.next_multiple_of(K::K_STEP);
        for first in (0..n).step_by(n_block) {
            let last = n.min(first + n_block);
            for i in (0..m).step_by(K::MR) {
                let rows = K::MR.min(m - i);
                kernel.isa().vectorize(
                    #[inline(always)]
                    || load::<K>(a_tile, term, i, rows, p, k_real, k),
                );
                for j in (first..last).step_by(K::NR) {
                    let panel = &term.b.data[j * k_padded + p * K::NR..][..k * K::NR];
                    kernel.tile(
                        k,
                        a_tile,
                        panel,
                        CTile {
                            data: &mut c[i * c_stride + j..],
                            stride: c_stride,
                            rows,
                            cols: K::NR.min(n - j),
                            store,
                        },
                    );
                }
            }
        }
        store = Store::Accumulate;
    }
}

/// Copies A[i .. i + rows, p .. p + k_real] into a tile, zeros up to column `k`.
#[allow(clippy::too_many_arguments)]
#[inline(always)]
fn load<K: Micro>(tile: &mut [K::A], term: &Term<'_, K::E>, i: usize, rows: usize, p: usize, k_real: usize, k: usize) {
    let a = &term.a;
    let first = i * a.row_stride + p * a.col_stride;
    match a.data {
        Values::F32(data) => {
            copy::<f32, K::A>(tile, &data[first..], a.row_stride, a.col_stride, rows, k_real, K::of_f32)
        }
        Values::Bf16(data) => {
            copy::<bf16, K::A>(tile, &data[first..], a.row_stride, a.col_stride, rows, k_real, K::of_bf16)
        }
    }
    for out in tile.chunks_mut(a_stride::<K::A>()).take(rows) {
        out[k_real..k].fill(bytemuck::Zeroable::zeroed());
    }
}

/// `tile[row · a_stride + q]` = `from[row · row_stride + q · col_stride]`, converted.
#[inline(always)]
fn copy<E: Copy, A>(
    tile: &mut [A],
    from: &[E],
    row_stride: usize,
    col_stride: usize,
    rows: usize,
    k: usize,
    convert: impl Fn(E) -> A,
) {
    let stride = a_stride::<A>();
    if row_stride == 1 && col_stride != 1 {
        // A transpose: along its contiguous direction first.
        for q in 0..k {
            for (row, &a) in from[q * col_stride..][..rows].iter().enumerate() {
                tile[row * stride + q] = convert(a);
            }
        }
        return;
    }
    for (row, out) in tile.chunks_mut(stride).take(rows).enumerate() {
        let from = &from[row * row_stride..];
        if col_stride == 1 {
            for (out, &a) in out.iter_mut().zip(&from[..k]) {
                *out = convert(a);
            }
        } else {
            for (q, out) in out[..k].iter_mut().enumerate() {
                *out = convert(from[q * col_stride]);
            }
        }
    }
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

    fn tile(isa: Isa) -> Tile {
        match isa {
            Isa::Portable => tile_of::<PortableF32>(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => tile_of::<Avx2F32>(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => tile_of::<Avx512F32>(),
        }
    }

    fn multiply(isa: Isa, c: &mut [f32], c_stride: usize, m: usize, n: usize, store: Store, terms: &[Term<'_, f32>]) {
        match isa {
            Isa::Portable => drive(PortableF32, c, c_stride, m, n, store, terms),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => drive(Avx2F32(isa), c, c_stride, m, n, store, terms),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => drive(Avx512F32(isa), c, c_stride, m, n, store, terms),
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

    fn multiply_rounded(
        isa: Bf16Isa,
        c: &mut [bf16],
        c_stride: usize,
        m: usize,
        n: usize,
        terms: &[Term<'_, bf16>],
    ) -> bool {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::AmxBf16(isa) => amx::drive_rounded(isa, c, c_stride, m, n, terms),
            _ => false,
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

    fn multiply(
        isa: Bf16Isa,
        c: &mut [f32],
        c_stride: usize,
        m: usize,
        n: usize,
        store: Store,
        terms: &[Term<'_, bf16>],
    ) {
        match isa {
            Bf16Isa::Portable => drive(PortableBf16, c, c_stride, m, n, store, terms),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx2(isa) => drive(Avx2Widened(isa), c, c_stride, m, n, store, terms),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx512(isa) => drive(Avx512Widened(isa), c, c_stride, m, n, store, terms),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx512Bf16(isa) => drive(Avx512Pairs(isa), c, c_stride, m, n, store, terms),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::AmxBf16(isa) => amx::drive(isa, c, c_stride, m, n, store, terms),
        }
    }
}
