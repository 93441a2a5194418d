//! Large products on threads: the panels of a block of columns are packed once, by all threads, and read by all.

use super::Cpu;
use super::buffer::Element;
use super::workspace::{Area, PANEL_VALUES};
use crate::Result;
use hydra_kernels::gemm::{self, PANEL_ALIGN, Panels, Source};
use rayon::prelude::*;

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
        let share = n.div_ceil(2 * cpu.threads).next_multiple_of(PANEL_ALIGN);
        let chunk = gemm::panels_len::<E>(isa, self.k, share).max(1);
        cpu.pool.install(|| {
            out.par_chunks_mut(chunk).enumerate().try_for_each(|(i, out)| {
                let done = i * share;
                let columns = (n - done).min(share);
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
