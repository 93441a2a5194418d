//! Large products on threads: the panels of a block of columns are packed once, by all threads, and read by all.

use super::Cpu;
use super::workspace::{Area, PANEL_VALUES};
use crate::Result;
use crate::backend::Store;
use half::bf16;
use hydra_kernels::gemm::{self, Multiplicand, PANEL_ALIGN, Panels, Rows, Source, Term};
use rayon::prelude::*;

/// A product's operand type, and how f32 rows become it.
pub(super) trait Element: Multiplicand + Send + Sync {
    /// `x` as operands; `area` is where they go if they aren't f32.
    fn operand<'a>(cpu: &Cpu, area: &'a mut Area, x: &'a [f32]) -> Result<&'a [Self]>;

    /// The same inside a task: `scratch` is as long as `x`.
    fn convert<'a>(cpu: &Cpu, scratch: &'a mut [f32], x: &'a [f32]) -> Result<&'a [Self]>;
}

impl Element for f32 {
    fn operand<'a>(_cpu: &Cpu, _area: &'a mut Area, x: &'a [f32]) -> Result<&'a [f32]> {
        Ok(x)
    }

    fn convert<'a>(_cpu: &Cpu, _scratch: &'a mut [f32], x: &'a [f32]) -> Result<&'a [f32]> {
        Ok(x)
    }
}

impl Element for bf16 {
    fn operand<'a>(cpu: &Cpu, area: &'a mut Area, x: &'a [f32]) -> Result<&'a [bf16]> {
        const CHUNK: usize = 16 * 1024;
        let out = area.take::<bf16>(x.len());
        cpu.pool.install(|| {
            let chunks = out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
            chunks.try_for_each(|(out, x)| gemm::to_bf16(cpu.isa, out, x))
        })?;
        Ok(out)
    }

    fn convert<'a>(cpu: &Cpu, scratch: &'a mut [f32], x: &'a [f32]) -> Result<&'a [bf16]> {
        let out = &mut bytemuck::cast_slice_mut(scratch)[..x.len()];
        gemm::to_bf16(cpu.isa, out, x)?;
        Ok(out)
    }
}

/// One addend of a product: rows times the columns that `source` packs.
pub(super) struct Addend<'a, E> {
    /// [m, k], row-major.
    pub rows: &'a [E],
    pub row_stride: usize,
    pub k: usize,
    /// The packed operand's columns from the given one on.
    pub source: &'a (dyn Fn(usize) -> Source<'a> + Sync),
    pub scale: f32,
}

impl<E: Element> Addend<'_, E> {
    /// Packs columns `first .. first + n`, each thread some whole panels.
    pub fn pack<'p>(
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

    fn term<'t>(&'t self, first_row: usize, panels: &Panels<'t, E>) -> Term<'t, E> {
        let rows = Rows { data: &self.rows[first_row * self.row_stride..], row_stride: self.row_stride, col_stride: 1 };
        Term { a: rows, b: Panels { data: panels.data, k: panels.k, n: panels.n } }
    }
}

/// c [m, n] = or += the sum of one or two products, m being `c`'s length over `n`.
pub(super) fn product<E: Element>(
    cpu: &Cpu,
    isa: E::Isa,
    c: &mut [f32],
    n: usize,
    store: Store,
    (large, large_area): (&Addend<'_, E>, &mut Area),
    mut small: Option<(&Addend<'_, E>, &mut Area)>,
) -> Result<()> {
    let rows = cpu.row_chunk(c.len() / n);
    let block = (PANEL_VALUES / large.k.max(1)).max(PANEL_ALIGN * cpu.threads).next_multiple_of(PANEL_ALIGN);
    for first in (0..n).step_by(block) {
        let columns = block.min(n - first);
        let large_panels = large.pack(cpu, isa, large_area, first, columns)?;
        let small_panels = match &mut small {
            Some((addend, area)) => Some((*addend, addend.pack(cpu, isa, area, first, columns)?)),
            None => None,
        };
        cpu.pool.install(|| {
            c.par_chunks_mut(rows * n).enumerate().try_for_each(|(i, c)| {
                let m = c.len() / n;
                let c = &mut c[first..];
                let term = large.term(i * rows, &large_panels);
                match &small_panels {
                    Some((addend, panels)) => {
                        gemm::gemm(isa, c, n, m, columns, store, &[term, addend.term(i * rows, panels)])
                    }
                    None => gemm::gemm(isa, c, n, m, columns, store, &[term]),
                }
            })
        })?;
    }
    Ok(())
}
