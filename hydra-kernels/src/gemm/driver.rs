//! The five loops around a micro-kernel, the same for every element type and instruction set but AMX.
//!
//! Over blocks of k, groups of B's panels (kept in L2), micro-panels of A (kept in L1), panels of a group, and inside
//! the micro-kernel over the rows of a block.

use super::bf16::widen_rows;
use super::blocking::{A_ROW_BYTES, JOINED_BYTES, KBlock, KBlocking, KC_BYTES, MR_MAX, NR_MAX, Pass, Product, depth};
use super::kernel::micro::{CTile, MicroKernel, PanelPair};
use super::view::Accumulate;
use half::bf16;

/// Bytes of the panels of B that stay in L2 while micro-panels of A pass over them: half of an L2 of 1 MiB.
const B_BYTES: usize = 512 * 1024;

/// The most columns whose f32 sums are kept while further blocks of k are added, before they are rounded to bf16.
const SUMS_COLUMNS: usize = 512;

/// The fewest columns for which that pays: with fewer of a deep product in L2, A would be read too often.
const SUMS_COLUMNS_LEAST: usize = 96;

/// A packed micro-panel of A: MR rows of one pass.
#[repr(align(64))]
struct APanel([u8; MR_MAX * A_ROW_BYTES]);

impl APanel {
    const ZEROED: APanel = APanel([0; MR_MAX * A_ROW_BYTES]);

    /// Packs rows `i .. i + rows` of a pass's blocks, side by side.
    fn pack<K: MicroKernel>(&mut self, kernel: K, pass: &Pass<'_, '_, K::B>, i: usize, rows: usize) {
        let mut at = 0;
        for block in pass.iter().flatten() {
            kernel.pack_a(&mut bytemuck::cast_slice_mut(&mut self.0)[at..], block, i, rows);
            at += block.depth;
        }
    }

    /// Multiplies by the panels of B that start at column `j`.
    fn multiply<'b, K: MicroKernel>(&'b self, kernel: K, pass: &Pass<'_, 'b, K::B>, j: usize, c: CTile<'_>) {
        let a = bytemuck::cast_slice(&self.0);
        let pair = |block: &KBlock<'_, 'b, K::B>, at: usize| {
            let b = &block.panel(j, K::NR)[..block.depth * K::NR];
            PanelPair { k: block.depth, a: &a[at..], b }
        };
        match pass {
            [Some(block), None] => kernel.multiply(&[pair(block, 0)], c),
            [Some(block), Some(joined)] => kernel.multiply(&[pair(block, 0), pair(joined, block.depth)], c),
            [None, _] => {}
        }
    }
}

fn blocking<K: MicroKernel>() -> KBlocking {
    let size = size_of::<K::A>();
    KBlocking { k_step: K::K_STEP, kc: K::KC_BYTES / size, joined: JOINED_BYTES / size }
}

/// NC: the columns whose panels, `depth` rows deep, stay in L2.
fn nc<K: MicroKernel>(depth: usize) -> usize {
    (B_BYTES / (depth * size_of::<K::B>())).max(K::NR) / K::NR * K::NR
}

/// C = or += Σ terms.
pub(super) fn multiply<K: MicroKernel>(kernel: K, c: &mut [f32], product: &Product<'_, '_, K::B>) {
    const { assert!(K::MR <= MR_MAX && K::KC_BYTES <= KC_BYTES) };
    let &Product { c_stride, m, n, mut accumulate, terms } = product;
    let mut a = APanel::ZEROED;
    for pass in blocking::<K>().passes(terms) {
        let nc = nc::<K>(depth(&pass));
        for first in (0..n).step_by(nc) {
            for i in (0..m).step_by(K::MR) {
                let rows = K::MR.min(m - i);
                a.pack(kernel, &pass, i, rows);
                for j in (first..n.min(first + nc)).step_by(K::NR) {
                    let data = &mut c[i * c_stride + j..];
                    let c = CTile { data, stride: c_stride, rows, cols: K::NR.min(n - j), accumulate };
                    a.multiply(kernel, &pass, j, c);
                }
            }
        }
        accumulate = Accumulate::Add;
    }
}

/// [`multiply`] into bf16. The sums of a micro-panel of A stay in f32, in L1, until the last pass.
///
/// Returns `false`, and does nothing, where k is so large that the panels of only a few columns would stay in L2.
pub(super) fn multiply_into_bf16<K: MicroKernel>(kernel: K, c: &mut [bf16], product: &Product<'_, '_, K::B>) -> bool {
    let passes = blocking::<K>().passes(product.terms);
    let nc = nc::<K>(passes.clone().map(|pass| depth(&pass)).sum());
    if passes.clone().nth(1).is_none() {
        sum_and_round::<K, { MR_MAX * NR_MAX }>(kernel, c, product, nc, passes);
    } else if nc >= SUMS_COLUMNS_LEAST.min(product.n) {
        sum_and_round::<K, { MR_MAX * SUMS_COLUMNS }>(kernel, c, product, nc.min(SUMS_COLUMNS), passes);
    } else {
        return false;
    }
    true
}

/// [`multiply_into_bf16`] with `SUMS` f32 on the stack: the sums of a group of panels, or of one tile if there is one
/// pass.
fn sum_and_round<'t, 'a: 't, K: MicroKernel + 't, const SUMS: usize>(
    kernel: K,
    c: &mut [bf16],
    product: &Product<'_, '_, K::B>,
    nc: usize,
    passes: impl Iterator<Item = Pass<'t, 'a, K::B>> + Clone,
) {
    const { assert!(K::MR <= MR_MAX && K::NR <= NR_MAX) };
    let &Product { c_stride, m, n, .. } = product;
    let mut a = APanel::ZEROED;
    let mut sums = [0.0; SUMS];
    for first in (0..n).step_by(nc) {
        for i in (0..m).step_by(K::MR) {
            let rows = K::MR.min(m - i);
            let mut passes = passes.clone().enumerate().peekable();
            while let Some((index, pass)) = passes.next() {
                a.pack(kernel, &pass, i, rows);
                let accumulate = if index == 0 { product.accumulate } else { Accumulate::Add };
                for j in (first..n.min(first + nc)).step_by(K::NR) {
                    let sums = &mut sums[K::MR * (j - first) % SUMS..][..rows * K::NR];
                    let c = &mut c[i * c_stride + j..];
                    let cols = K::NR.min(n - j);
                    if index == 0 && accumulate == Accumulate::Add {
                        widen_rows(kernel.isa(), sums, K::NR, c, c_stride, cols);
                    }
                    a.multiply(kernel, &pass, j, CTile { data: sums, stride: K::NR, rows, cols, accumulate });
                    if passes.peek().is_none() {
                        kernel.round(c, c_stride, sums, cols);
                    }
                }
            }
        }
    }
}
