//! [`pack`]: B into panels, decoded, scaled and rounded on the way.

use super::element::{Element, panels_len};
use super::kernel::micro::MicroKernel;
#[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
use super::kernel::neon::NeonF32;
use super::kernel::portable::PortableF32;
#[cfg(target_arch = "x86_64")]
use super::kernel::{
    avx2::Avx2F32,
    avx512::Avx512F32,
    pack512::{self, PairPanels},
};
use super::panels::{PanelsMut, pack_column_stored, pack_row_stored};
use super::view::Values;
use crate::error::{Error, at_least, extent};
#[cfg(target_arch = "x86_64")]
use crate::isa::Avx512Bf16;
use crate::isa::{Isa, baseline};
#[cfg(target_arch = "x86_64")]
use crate::quant::Format;
use crate::quant::Weight;

/// The matrix B [k, n] that [`pack`] reads.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// B[p, j] = `data[p · k_stride + j · n_stride]`.
    Dense {
        /// The elements.
        data: Values<'a>,
        /// Distance between neighbouring rows of B, in elements.
        k_stride: usize,
        /// Distance between neighbouring columns of B, in elements.
        n_stride: usize,
    },
    /// B[p, j] = W[first + j, p], for X Wᵀ. k is at most the number of W's columns.
    WeightRows {
        /// W.
        weight: Weight<'a>,
        /// The row of W that is column 0 of B.
        first: usize,
    },
    /// B[p, j] = W[p, first + j], for dY W. k is at most the number of W's rows.
    WeightCols {
        /// W.
        weight: Weight<'a>,
        /// The column of W that is column 0 of B; a multiple of 32 in block formats.
        first: usize,
    },
}

/// Packs `scale` · B [k, n] from `source` into the first [`panels_len`] elements of `out`.
///
/// Returns an error, and writes nothing, if `out` is too short or B is not inside `source`.
pub fn pack<E: Element>(
    isa: E::Isa,
    out: &mut [E],
    k: usize,
    n: usize,
    source: Source<'_>,
    scale: f32,
) -> Result<(), Error> {
    let len = panels_len::<E>(isa, k, n);
    at_least("panels", len, out.len())?;
    check(source, k, n)?;
    if k == 0 || n == 0 {
        return Ok(());
    }
    let shape = E::panel_shape(isa);
    let out = bytemuck::cast_slice_mut::<E, u8>(&mut out[..len]);
    #[cfg(target_arch = "x86_64")]
    if let Some(pairs) = E::pair_packing(isa)
        && pack_pairs(pairs, PairPanels::new(out, shape.k_step, [k, n], scale), source)
    {
        return Ok(());
    }
    let (units, _) = out.as_chunks_mut();
    pack_decoded::<E>(isa, PanelsMut { units, shape, k, n, scale }, source);
    Ok(())
}

/// `Ok` if `source` contains B [k, n].
fn check(source: Source<'_>, k: usize, n: usize) -> Result<(), Error> {
    match source {
        Source::Dense { data, k_stride, n_stride } => at_least("b", extent(k, n, k_stride, n_stride)?, data.len()),
        Source::WeightRows { weight, first } => {
            inside("weight rows", weight.rows(), first, n)?;
            inside("weight columns", weight.cols(), 0, k)
        }
        Source::WeightCols { weight, first } => {
            inside("weight columns", weight.cols(), first, n)?;
            inside("weight rows", weight.rows(), 0, k)?;
            let block = weight.format().first_col_multiple();
            if first.is_multiple_of(block) { Ok(()) } else { Err(Error::Block { operand: "first", block, got: first }) }
        }
    }
}

fn inside(operand: &'static str, limit: usize, first: usize, count: usize) -> Result<(), Error> {
    match first.checked_add(count) {
        Some(end) if end <= limit => Ok(()),
        end => Err(Error::Range { operand, limit, got: end.unwrap_or(usize::MAX) }),
    }
}

/// Packs the sources that need no decoding with AVX-512 BF16. Returns `false`, and does nothing, for any other.
#[cfg(target_arch = "x86_64")]
fn pack_pairs(isa: Avx512Bf16, panels: PairPanels<'_>, source: Source<'_>) -> bool {
    let k = panels.k;
    match source {
        Source::Dense { data, k_stride, n_stride: 1 } => pack512::pack_row_stored(isa, panels, data, k_stride),
        Source::Dense { data: Values::Bf16(data), k_stride: 1, n_stride } => {
            pack512::pack_column_stored(isa, panels, |j| bytemuck::cast_slice(&data[j * n_stride..][..k]));
        }
        Source::WeightRows { weight, first } if weight.format() == Format::Bf16 => {
            pack512::pack_column_stored(isa, panels, |j| &weight.stored(first + j)[..2 * k]);
        }
        _ => return false,
    }
    true
}

/// Packs any source by way of f32.
fn pack_decoded<E: Element>(isa: E::Isa, panels: PanelsMut<'_>, source: Source<'_>) {
    if source.is_row_stored() {
        pack_stored::<E, true>(isa, panels, source);
    } else {
        pack_stored::<E, false>(isa, panels, source);
    }
}

/// [`pack_decoded`] for sources that are row-stored, or for the others. Each instruction set gets code for the width of its
/// own panels alone. In debug builds, both kinds together need much stack.
fn pack_stored<E: Element, const ROWS: bool>(isa: E::Isa, panels: PanelsMut<'_>, source: Source<'_>) {
    match E::widened(isa) {
        Isa::Portable => baseline(
            #[inline(always)]
            || pack_panels::<E, { PortableF32::NR }, ROWS>(isa, Isa::Portable, panels, source),
        ),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(avx2) => avx2.vectorize(
            #[inline(always)]
            || pack_panels::<E, { Avx2F32::NR }, ROWS>(isa, Isa::Avx2(avx2), panels, source),
        ),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(avx512) => avx512.vectorize(
            #[inline(always)]
            || pack_panels::<E, { Avx512F32::NR }, ROWS>(isa, Isa::Avx512(avx512), panels, source),
        ),
        #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
        Isa::Neon(neon) => neon.vectorize(
            #[inline(always)]
            || pack_panels::<E, { NeonF32::NR }, ROWS>(isa, Isa::Neon(neon), panels, source),
        ),
    }
}

/// [`pack_stored`] for panels of NR columns, to be inlined into a caller that is vectorized with `plain`.
#[inline(always)]
fn pack_panels<E: Element, const NR: usize, const ROWS: bool>(
    isa: E::Isa,
    plain: Isa,
    panels: PanelsMut<'_>,
    source: Source<'_>,
) {
    if ROWS {
        pack_row_stored::<E, NR>(
            isa,
            panels,
            #[inline(always)]
            |p, j, row| source.read(plain, p, j, row),
            #[inline(always)]
            |p, j, len| source.prefetch_row(p, j, len),
        );
    } else {
        pack_column_stored::<E, NR>(
            isa,
            panels,
            #[inline(always)]
            |p, j, column| source.read(plain, p, j, column),
        );
    }
}

impl Source<'_> {
    /// Whether neighbours in a row of B are neighbours in memory, or share a block.
    fn is_row_stored(&self) -> bool {
        matches!(self, Source::Dense { n_stride: 1, .. } | Source::WeightCols { .. })
    }

    /// Prefetches `len` elements of a row of B, which need not exist, where they are stored as they are.
    #[inline(always)]
    fn prefetch_row(&self, p: usize, j: usize, len: usize) {
        if let Source::Dense { data, k_stride, .. } = self {
            data.prefetch(p.wrapping_mul(*k_stride).wrapping_add(j), len);
        }
    }

    /// Fills `out` with B from element (p, j) on, along its row or its column: in the direction in which B is stored.
    #[inline(always)]
    fn read(&self, isa: Isa, p: usize, j: usize, out: &mut [f32]) {
        let (weight, row, column) = match *self {
            Source::Dense { data, k_stride, n_stride } => {
                let stride = if n_stride == 1 { 1 } else { k_stride };
                return data.read(p * k_stride + j * n_stride, stride, out);
            }
            Source::WeightRows { weight, first } => (weight, first + j, p),
            Source::WeightCols { weight, first } => (weight, p, first + j),
        };
        weight.decode_with(isa, row, column, out);
    }
}
