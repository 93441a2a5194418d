//! The CPU as products of one precision see it.

use super::Cpu;
use super::buffer::Element;
use super::workspace::Area;
use crate::Result;
use crate::backend::Accumulate;
use hydra_kernels::gemm::{self, MatRef, Panels, Source, Term};
use hydra_kernels::hydra::{Block, Operand, PackedBlock};

/// `$body` with `$element`, the type of activations under a [`Precision`](super::Precision).
macro_rules! with_element {
    ($precision:expr, $element:ident => $body:expr) => {
        match $precision {
            $crate::backend::cpu::Precision::F32 | $crate::backend::cpu::Precision::Q8 => {
                type $element = f32;
                $body
            }
            $crate::backend::cpu::Precision::Bf16 => {
                type $element = half::bf16;
                $body
            }
        }
    };
}
pub(super) use with_element;

/// A CPU, and the instructions that multiply operands of type `E` on it.
pub(super) struct Exec<'a, E: Element> {
    pub cpu: &'a Cpu,
    pub isa: E::Isa,
}

impl<E: Element> Clone for Exec<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<E: Element> Copy for Exec<'_, E> {}

impl<'a, E: Element> Exec<'a, E> {
    pub fn new(cpu: &'a Cpu) -> Self {
        Self { cpu, isa: E::isa(cpu) }
    }

    /// Packs B [k, n], scaled, into the front of `out`.
    pub fn pack<'p>(
        self,
        out: &'p mut [E],
        [k, n]: [usize; 2],
        source: Source<'_>,
        scale: f32,
    ) -> Result<Panels<'p, E>> {
        let out = &mut out[..gemm::panels_len::<E>(self.isa, k, n)];
        gemm::pack(self.isa, out, k, n, source, scale)?;
        Ok(Panels::new(out, k, n))
    }

    /// Packs all columns of an operand, each thread some whole panels.
    pub fn pack_shared<'p>(self, operand: Operand<'_, E>, area: &'p mut Area) -> Result<Panels<'p, E>> {
        let columns = operand.columns();
        let out = area.take::<E>(operand.panels_len(columns))?;
        let share = self.cpu.column_share(columns, usize::MAX);
        self.cpu.threads.each(out.chunks_mut(operand.panels_len(share).max(1)), |i, out| {
            Ok(operand.pack(i * share..columns.min((i + 1) * share), out)?)
        })?;
        Ok(operand.panels(out)?)
    }

    /// The same of both operands of a block.
    pub fn pack_block<'p>(
        self,
        block: Block<'_, E>,
        [frozen, adapter]: [&'p mut Area; 2],
    ) -> Result<PackedBlock<'p, E>> {
        let frozen = self.pack_shared(block.frozen, frozen)?;
        Ok(block.packed(frozen.data, self.pack_shared(block.adapter, adapter)?.data)?)
    }

    /// c [m, n] = or += a b; n is the panels'.
    pub fn multiply(self, c: &mut [f32], m: usize, store: Accumulate, a: MatRef<'_>, b: Panels<'_, E>) -> Result<()> {
        self.multiply_strided(c, b.n, m, store, a, b)
    }

    /// The same with the rows of c `c_stride` apart.
    pub fn multiply_strided(
        self,
        c: &mut [f32],
        c_stride: usize,
        m: usize,
        store: Accumulate,
        a: MatRef<'_>,
        b: Panels<'_, E>,
    ) -> Result<()> {
        Ok(gemm::gemm(self.isa, c, c_stride, m, b.n, store, &[Term { a, b }])?)
    }

    /// `out` = `x`, rounded.
    pub fn narrow(self, out: &mut [E], x: &[f32]) -> Result<()> {
        Ok(E::narrow(self.cpu.bf16_isa, out, x)?)
    }
}
