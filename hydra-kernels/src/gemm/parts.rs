//! k, cut into blocks: what a tile of A holds at a time.

use super::{MatRef, Panels, Term};

/// Rows `first .. first + len` of a term's B, with A's columns.
#[derive(Clone, Copy)]
pub(super) struct Part<'t, 'a, E> {
    term: &'t Term<'a, E>,
    pub(super) first: usize,
    pub(super) len: usize,
    /// `len` in whole steps.
    pub(super) depth: usize,
    /// B's rows in whole steps.
    k_padded: usize,
}

impl<'t, 'a, E> Part<'t, 'a, E> {
    /// All of A.
    pub(super) fn a(&self) -> MatRef<'a> {
        self.term.a
    }

    /// Where its first element in row `i` of A lies, if there is one; nothing is read.
    pub(super) fn start(&self, i: usize) -> usize {
        let MatRef { row_stride, col_stride, .. } = self.term.a;
        i.wrapping_mul(row_stride).wrapping_add(self.first.wrapping_mul(col_stride))
    }

    /// The panel of `nr` columns that begins at column `j`, and those after it, from this part's first row on.
    pub(super) fn panel(&self, j: usize, nr: usize) -> &'a [E] {
        let Panels { data, .. } = self.term.b;
        &data[j * self.k_padded + self.first * nr..]
    }

    /// From a panel of `nr` columns to the next.
    pub(super) fn panel_stride(&self, nr: usize) -> usize {
        self.k_padded * nr
    }
}

/// One or two parts that are summed in the same registers.
pub(super) type Block<'t, 'a, E> = [Option<Part<'t, 'a, E>>; 2];

/// The rows of its parts, in whole steps.
pub(super) fn depth<E>(block: &Block<'_, '_, E>) -> usize {
    block.iter().flatten().map(|part| part.depth).sum()
}

/// How k is cut.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    /// Panels are padded to a multiple of this many rows.
    pub(super) step: usize,
    /// Most rows of a part.
    pub(super) most: usize,
    /// Most rows of a second part.
    pub(super) joined: usize,
}

impl Cut {
    /// All terms, block by block.
    pub(super) fn blocks<'t, 'a, E: Copy>(
        self,
        terms: &'t [Term<'a, E>],
    ) -> impl Iterator<Item = Block<'t, 'a, E>> + Clone {
        let mut parts = terms.iter().filter(|term| term.b.k > 0).flat_map(move |term| self.parts(term)).peekable();
        core::iter::from_fn(move || {
            let part = parts.next()?;
            Some([Some(part), parts.next_if(|next| next.depth <= self.joined)])
        })
    }

    /// Equal parts, whole steps but for the last.
    fn parts<'t, 'a, E: Copy>(self, term: &'t Term<'a, E>) -> impl Iterator<Item = Part<'t, 'a, E>> + Clone {
        let k = term.b.k;
        let block = k.div_ceil(k.div_ceil(self.most)).next_multiple_of(self.step);
        (0..k).step_by(block).map(move |first| {
            let len = block.min(k - first);
            let k_padded = k.next_multiple_of(self.step);
            Part { term, first, len, depth: len.next_multiple_of(self.step), k_padded }
        })
    }
}
