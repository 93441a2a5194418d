//! How a product is cut: into tiles of C, panels of B and blocks of k.

use super::view::{Accumulate, MatRef, Panels, Term};

/// Columns that are a whole number of panels on every instruction set: a caller may cut n at any multiple of this.
pub const PANEL_ALIGN: usize = 32;

/// Rows of k that are a whole number of steps on every instruction set.
pub const K_ALIGN: usize = 32;

/// The largest MR of any micro-kernel but AMX's.
pub(super) const MR_MAX: usize = 12;

/// The largest NR of any micro-kernel.
pub(super) const NR_MAX: usize = 32;

/// KC in bytes: twelve rows of A are then 18 KiB of a 32 KiB L1, and the rest is for the stream of B.
pub(super) const KC_BYTES: usize = 1536;

/// The longest second term, in bytes of a row of A, that is summed in the same registers as the first.
pub(super) const JOINED_BYTES: usize = 256;

/// Bytes between the rows of a packed micro-panel of A: an odd number of cache lines, so that rows use different sets
/// of L1.
pub(super) const A_ROW_BYTES: usize = KC_BYTES + JOINED_BYTES + 64;

/// An upper bound of [`panels_len`](super::element::panels_len) over all instruction sets. Saturates.
pub const fn panels_bound(k: usize, n: usize) -> usize {
    k.div_ceil(K_ALIGN).saturating_mul(K_ALIGN).saturating_mul(n.div_ceil(PANEL_ALIGN).saturating_mul(PANEL_ALIGN))
}

/// The shape of B's panels on one instruction set.
#[derive(Clone, Copy)]
pub struct PanelShape {
    /// Columns of a panel.
    pub(super) nr: usize,
    /// Panels are padded to a multiple of this many rows.
    pub(super) k_step: usize,
}

/// A checked product of at least one element, without its C.
#[derive(Clone, Copy)]
pub struct Product<'t, 'a, E> {
    /// Distance between rows of C, at least `n`.
    pub(super) c_stride: usize,
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) accumulate: Accumulate,
    /// At least one of them has k > 0.
    pub(super) terms: &'t [Term<'a, E>],
}

/// Rows `first .. first + len` of a term's B, and the same columns of its A.
#[derive(Clone, Copy)]
pub(super) struct KBlock<'t, 'a, E> {
    term: &'t Term<'a, E>,
    pub(super) first: usize,
    pub(super) len: usize,
    /// `len`, rounded up to whole steps.
    pub(super) depth: usize,
    /// The rows of a panel in memory, rounded up to whole steps.
    k_padded: usize,
}

impl<'t, 'a, E> KBlock<'t, 'a, E> {
    /// The whole A of the term.
    pub(super) fn a(&self) -> MatRef<'a> {
        self.term.a
    }

    /// The index in A's data of this block's first element in row `i`. Wraps around where there is no such element.
    pub(super) fn start(&self, i: usize) -> usize {
        let MatRef { row_stride, col_stride, .. } = self.term.a;
        i.wrapping_mul(row_stride).wrapping_add(self.first.wrapping_mul(col_stride))
    }

    /// The panel of `nr` columns that starts at column `j`, and those after it, from this block's first row on.
    pub(super) fn panel(&self, j: usize, nr: usize) -> &'a [E] {
        let Panels { data, .. } = self.term.b;
        &data[j * self.k_padded + self.first * nr..]
    }

    /// Elements between two panels of `nr` columns.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn panel_stride(&self, nr: usize) -> usize {
        self.k_padded * nr
    }
}

/// What one pass over C sums in registers: a block of k, and a short one of the next term where there is one.
pub(super) type Pass<'t, 'a, E> = [Option<KBlock<'t, 'a, E>>; 2];

/// The rows of a pass, in whole steps.
pub(super) fn depth<E>(pass: &Pass<'_, '_, E>) -> usize {
    pass.iter().flatten().map(|block| block.depth).sum()
}

/// How k is cut into blocks.
#[derive(Clone, Copy)]
pub(super) struct KBlocking {
    /// Panels are padded to a multiple of this many rows.
    pub(super) k_step: usize,
    /// The most rows of a block.
    pub(super) kc: usize,
    /// The most rows of a block that joins another term's.
    pub(super) joined: usize,
}

impl KBlocking {
    /// All passes over the terms, in order.
    pub(super) fn passes<'t, 'a, E: Copy>(
        self,
        terms: &'t [Term<'a, E>],
    ) -> impl Iterator<Item = Pass<'t, 'a, E>> + Clone {
        let mut blocks = terms.iter().filter(|term| term.b.k > 0).flat_map(move |term| self.blocks(term)).peekable();
        core::iter::from_fn(move || {
            let block = blocks.next()?;
            Some([Some(block), blocks.next_if(|next| next.depth <= self.joined)])
        })
    }

    /// The equal blocks of one term, of whole steps but for the last.
    fn blocks<'t, 'a, E: Copy>(self, term: &'t Term<'a, E>) -> impl Iterator<Item = KBlock<'t, 'a, E>> + Clone {
        let k = term.b.k;
        let kc = k.div_ceil(k.div_ceil(self.kc)).next_multiple_of(self.k_step);
        (0..k).step_by(kc).map(move |first| {
            let len = kc.min(k - first);
            let k_padded = term.b.packed_k.next_multiple_of(self.k_step);
            KBlock { term, first, len, depth: len.next_multiple_of(self.k_step), k_padded }
        })
    }
}
