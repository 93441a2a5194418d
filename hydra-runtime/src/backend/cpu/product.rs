//! Large products on threads: the panels of a block of columns are packed once, by all threads, and read by all.

use super::Cpu;
use super::buffer::{Element, ValuesMut};
use super::workspace::{Area, PANEL_VALUES};
use crate::Result;
use crate::backend::Store;
use hydra_kernels::gemm::{self, PANEL_ALIGN, Panels, Source, Term, Values};
use rayon::prelude::*;

/// Columns of a bf16 result that are summed in f32 before they are rounded: with 256 rows a quarter of L2.
const ROUNDED_COLUMNS: usize = 512;

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
        let chunk = gemm::panels_len::<E>(isa, self.k, PANEL_ALIGN).max(1);
        cpu.pool.install(|| {
            out.par_chunks_mut(chunk).enumerate().try_for_each(|(i, out)| {
                let done = i * PANEL_ALIGN;
                let columns = (n - done).min(PANEL_ALIGN);
                gemm::pack(isa, out, self.k, columns, (self.source)(first + done), self.scale)
            })
        })?;
        Ok(Panels { data: out, k: self.k, n })
    }
}

/// Columns of a block that are packed together, of an operand of `k` rows.
pub(super) fn column_block(cpu: &Cpu, k: usize) -> usize {
    (PANEL_VALUES / k.max(1)).max(PANEL_ALIGN * cpu.threads).next_multiple_of(PANEL_ALIGN)
}

/// Columns `first ..` of `y` [m, n] = or += Σ terms, as many as the terms have; called inside a task.
pub(super) fn multiply<E: Element>(
    cpu: &Cpu,
    isa: E::Isa,
    y: ValuesMut<'_>,
    n: usize,
    first: usize,
    store: Store,
    terms: &[Term<'_, E>],
) -> Result<()> {
    let (m, columns) = (y.len() / n, terms[0].b.n);
    let y = match y {
        ValuesMut::F32(y) => return Ok(gemm::gemm(isa, &mut y[first..], n, m, columns, store, terms)?),
        ValuesMut::Bf16(y) => y,
    };
    cpu.with_scratch(m * columns.min(ROUNDED_COLUMNS), |sums| {
        for done in (0..columns).step_by(ROUNDED_COLUMNS) {
            let width = ROUNDED_COLUMNS.min(columns - done);
            let place = |row: usize| row * n + first + done;
            if store == Store::Accumulate {
                for (row, sums) in sums.chunks_exact_mut(width).take(m).enumerate() {
                    super::buffer::convert(cpu.isa, ValuesMut::F32(sums), Values::Bf16(&y[place(row)..][..width]))?;
                }
            }
            let part = |term: &Term<'_, E>| gemm::panels_len::<E>(isa, term.b.k, done);
            let parts: Vec<_> = terms
                .iter()
                .map(|term| Term { a: term.a, b: Panels { data: &term.b.data[part(term)..], k: term.b.k, n: width } })
                .collect();
            gemm::gemm(isa, sums, width, m, width, store, &parts)?;
            for (row, sums) in sums.chunks_exact(width).take(m).enumerate() {
                gemm::to_bf16(cpu.isa, &mut y[place(row)..][..width], sums)?;
            }
        }
        Ok(())
    })
}
