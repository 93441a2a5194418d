//! [`gemm`]: checks its arguments, then hands the product to the instruction set's driver.

use super::bf16::widen_rows;
use super::blocking::{PANEL_ALIGN, Product};
use super::element::{Element, panels_len};
use super::view::{Accumulate, MatRef, Panels, Term, ValuesMut};
use crate::error::{Error, at_least, extent};
use half::bf16;

/// The most terms of a product into bf16.
pub const BF16_TERMS: usize = 4;

/// C = or += Σ_t A_t · B_t, for `c` [m, n] with rows `c_stride` apart.
///
/// Each A_t has m rows and each B_t n columns. m, n, k and the number of terms may be 0; a product into bf16 has at
/// most [`BF16_TERMS`] terms.
///
/// Returns an error, and writes nothing, if an operand is too short for its shape or the terms do not fit C.
pub fn gemm<'c, E: Element>(
    isa: E::Isa,
    c: impl Into<ValuesMut<'c>>,
    c_stride: usize,
    m: usize,
    n: usize,
    accumulate: Accumulate,
    terms: &[Term<'_, E>],
) -> Result<(), Error> {
    let c = c.into();
    check(isa, &c, c_stride, [m, n], terms)?;
    if m == 0 || n == 0 {
        return Ok(());
    }
    let product = Product { c_stride: c_stride.max(n), m, n, accumulate, terms };
    if terms.iter().all(|term| term.b.k == 0) {
        if accumulate == Accumulate::Overwrite {
            fill_zeros(c, &product);
        }
        return Ok(());
    }
    match c {
        ValuesMut::F32(c) => E::multiply(isa, c, &product),
        ValuesMut::Bf16(c) => {
            if !E::multiply_into_bf16(isa, c, &product) {
                multiply_by_tiles(isa, c, &product)?;
            }
        }
    }
    Ok(())
}

fn check<E: Element>(
    isa: E::Isa,
    c: &ValuesMut<'_>,
    c_stride: usize,
    [m, n]: [usize; 2],
    terms: &[Term<'_, E>],
) -> Result<(), Error> {
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
        at_least("packed rows of b", b.k, b.packed_k)?;
        at_least("b", b.extent(isa), b.data.len())?;
    }
    Ok(())
}

fn fill_zeros<E>(c: ValuesMut<'_>, product: &Product<'_, '_, E>) {
    let &Product { c_stride, m, n, .. } = product;
    match c {
        ValuesMut::F32(c) => c.chunks_mut(c_stride).take(m).for_each(|row| row[..n].fill(0.0)),
        ValuesMut::Bf16(c) => c.chunks_mut(c_stride).take(m).for_each(|row| row[..n].fill(bf16::ZERO)),
    }
}

/// Rows and columns of a tile of f32 sums on the stack: whole tiles of every micro-kernel.
const TILE_ROWS: usize = 96;
const TILE_COLUMNS: usize = 4 * PANEL_ALIGN;

/// A product into bf16, summed in f32 on the stack tile by tile.
fn multiply_by_tiles<E: Element>(isa: E::Isa, c: &mut [bf16], product: &Product<'_, '_, E>) -> Result<(), Error> {
    let &Product { c_stride, m, n, accumulate, terms } = product;
    let mut sums = [0.0; TILE_ROWS * TILE_COLUMNS];
    for j in (0..n).step_by(TILE_COLUMNS) {
        let columns = TILE_COLUMNS.min(n - j);
        for i in (0..m).step_by(TILE_ROWS) {
            let rows = TILE_ROWS.min(m - i);
            let no_term = Term { a: MatRef::row_major(&[] as &[f32], 0), b: Panels::new(&[], 0, columns) };
            let mut tile_terms = [no_term; BF16_TERMS];
            for (tile_term, Term { a, b }) in tile_terms.iter_mut().zip(terms.iter().filter(|term| term.b.k > 0)) {
                let a = MatRef { data: a.data.skip((i * a.row_stride).min(a.data.len())), ..*a };
                let b = Panels { data: &b.data[panels_len::<E>(isa, b.packed_k, j)..], n: columns, ..*b };
                *tile_term = Term { a, b };
            }
            let sums = &mut sums[..rows * columns];
            let c = &mut c[i * c_stride + j..];
            if accumulate == Accumulate::Add {
                widen_rows(E::widened(isa), sums, columns, c, c_stride, columns);
            }
            let terms = &tile_terms[..terms.len()];
            E::multiply(isa, sums, &Product { c_stride: columns, m: rows, n: columns, accumulate, terms });
            for (c, sums) in c.chunks_mut(c_stride).zip(sums.chunks_exact(columns)) {
                E::narrow_sums(isa, &mut c[..columns], sums)?;
            }
        }
    }
    Ok(())
}
