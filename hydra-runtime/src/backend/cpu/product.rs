//! Large products on threads: the panels of a block of columns are packed once, by all threads, and read by all.

use super::Cpu;
use super::buffer::{Element, chunks};
use super::workspace::{Area, PANEL_COLUMNS, PANEL_VALUES};
use crate::Result;
use crate::backend::Accumulate;
use half::bf16;
use hydra_kernels::gemm::{self, MatRef, PANEL_ALIGN, Panels, Source, Term, Values, ValuesMut};
use std::ops::Range;

/// A product with more terms than this into bf16 is summed in f32 beside it: with all of k at a time few columns' panels stay
/// in L2, with a part of it the sums have to be kept.
const DEEP: usize = 2048;

/// The right operand of a product, packed a block of columns at a time.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    /// Rows.
    pub k: usize,
    /// The columns from the given one on.
    pub source: &'a (dyn Fn(usize) -> Source<'a> + Sync),
    pub scale: f32,
}

impl Operand<'_> {
    /// Packs columns `first .. first + n`, each thread some whole panels.
    pub fn pack<'p, E: Element>(
        &self,
        cpu: &Cpu,
        isa: E::Isa,
        area: &'p mut Area,
        first: usize,
        n: usize,
    ) -> Result<Panels<'p, E>> {
        let out = area.take::<E>(gemm::panels_len::<E>(isa, self.k, n));
        let share = cpu.column_share(n, usize::MAX);
        let chunk = gemm::panels_len::<E>(isa, self.k, share).max(1);
        cpu.threads.each(out.chunks_mut(chunk), |i, out| {
            let done = i * share;
            let columns = (n - done).min(share);
            Ok(gemm::pack(isa, out, self.k, columns, (self.source)(first + done), self.scale)?)
        })?;
        Ok(Panels { data: out, k: self.k, n })
    }
}

/// B [k, n] packed into the front of `out`, here.
pub(super) fn pack<'p, E: Element>(
    isa: E::Isa,
    out: &'p mut [E],
    k: usize,
    n: usize,
    source: Source<'_>,
    scale: f32,
) -> Result<Panels<'p, E>> {
    let out = &mut out[..gemm::panels_len::<E>(isa, k, n)];
    gemm::pack(isa, out, k, n, source, scale)?;
    Ok(Panels { data: out, k, n })
}

/// What a product is added to.
#[derive(Clone, Copy)]
pub(super) enum Onto<'a> {
    Nothing,
    /// What is in its place.
    Itself,
    /// A matrix of its shape and type.
    Other(Values<'a>),
}

impl Onto<'_> {
    /// For rows `first ..` of a matrix `width` wide.
    pub fn rows(self, first: usize, width: usize) -> Self {
        match self {
            Onto::Other(values) => Onto::Other(values.skip(first * width)),
            same => same,
        }
    }
}

impl From<Accumulate> for Onto<'_> {
    fn from(store: Accumulate) -> Self {
        match store {
            Accumulate::Overwrite => Onto::Nothing,
            Accumulate::Add => Onto::Itself,
        }
    }
}

impl<'a> From<Option<Values<'a>>> for Onto<'a> {
    fn from(values: Option<Values<'a>>) -> Self {
        values.map_or(Onto::Nothing, Onto::Other)
    }
}

/// y [m, n] = `onto` + x · `weight`, a block of columns after the other; a row of x is as long as the operand is high.
#[allow(clippy::too_many_arguments)]
pub(super) fn product<E: Element>(
    cpu: &Cpu,
    isa: E::Isa,
    mut y: ValuesMut<'_>,
    n: usize,
    onto: Onto<'_>,
    x: Values<'_>,
    weight: Operand<'_>,
    area: &mut Area,
) -> Result<()> {
    let (rows, block) = (cpu.row_chunk(y.len() / n), column_block(cpu, weight.k));
    for first in (0..n).step_by(block) {
        let b = weight.pack::<E>(cpu, isa, area, first, block.min(n - first))?;
        let tasks = chunks(y.reborrow(), rows * n);
        cpu.threads.each(tasks.into_iter(), |i, y| {
            let a = MatRef::row_major(x.skip(i * rows * weight.k), weight.k);
            columns_of(cpu, isa, y, n, first, onto.rows(i * rows, n), &[Term { a, b }])
        })?;
    }
    Ok(())
}

/// Columns `first ..` of `y` [m, n] = `onto` + Σ terms, as many as the terms have.
pub(super) fn columns_of<E: Element>(
    cpu: &Cpu,
    isa: E::Isa,
    mut y: ValuesMut<'_>,
    n: usize,
    first: usize,
    onto: Onto<'_>,
    terms: &[Term<'_, E>],
) -> Result<()> {
    let (m, columns) = (y.len() / n, terms[0].b.n);
    let store = match onto {
        Onto::Nothing => Accumulate::Overwrite,
        Onto::Itself => Accumulate::Add,
        Onto::Other(values) => {
            // Here, where the product finds it in its cache.
            copy_columns(y.reborrow(), values, n, first..first + columns)?;
            Accumulate::Add
        }
    };
    match y {
        ValuesMut::Bf16(y) if terms[0].b.k > DEEP && store == Accumulate::Overwrite => {
            cpu.with_scratch(m * columns, |sums| {
                gemm::gemm(isa, &mut *sums, columns, m, columns, store, terms)?;
                for (y, sums) in y.chunks_mut(n).zip(sums.chunks_exact(columns)) {
                    gemm::to_bf16(cpu.bf16_isa, &mut y[first..first + columns], sums)?;
                }
                Ok(())
            })
        }
        y => Ok(gemm::gemm(isa, y.skip(first), n, m, columns, store, terms)?),
    }
}

fn copy_columns(y: ValuesMut<'_>, from: Values<'_>, width: usize, columns: Range<usize>) -> Result<()> {
    fn copy<E: Element>(y: &mut [E], from: &[E], width: usize, columns: Range<usize>) {
        for (y, from) in y.chunks_exact_mut(width).zip(from.chunks_exact(width)) {
            y[columns.clone()].copy_from_slice(&from[columns.clone()]);
        }
    }
    match y {
        ValuesMut::F32(y) => copy(y, f32::slice(from)?, width, columns),
        ValuesMut::Bf16(y) => copy(y, bf16::slice(from)?, width, columns),
    }
    Ok(())
}

/// Columns of a block that are packed together, of an operand of `k` rows.
pub(super) fn column_block(cpu: &Cpu, k: usize) -> usize {
    (PANEL_VALUES / k.max(1)).max(PANEL_COLUMNS).max(PANEL_ALIGN * cpu.threads()).next_multiple_of(PANEL_ALIGN)
}
