//! The caller's memory: what must lie apart, and a matrix that several threads write.

use crate::arguments::{check, slice_mut};
use crate::error::{Result, invalid};
use hydra_runtime::hydra_kernels::{Float, Workspace};
use std::ops::Range;

/// Memory that is read or written, as addresses.
pub(super) struct Span(&'static str, Range<usize>);

impl Span {
    pub(super) fn new<T>(what: &'static str, data: *const T, bytes: usize) -> Self {
        Span(what, data.addr()..data.addr().saturating_add(if data.is_null() { 0 } else { bytes }))
    }
}

/// An error if what is written overlaps with anything else.
pub(super) fn disjoint(written: &[Span], read: &[Span]) -> Result<()> {
    let overlap = |a: &Span, b: &Span| a.1.start < b.1.end && b.1.start < a.1.end;
    for (i, a) in written.iter().enumerate() {
        if let Some(b) = written[i + 1..].iter().chain(read).find(|b| overlap(a, b)) {
            return Err(invalid(format!("{} and {} overlap in memory", a.0, b.0)));
        }
    }
    Ok(())
}

/// `rows · columns`, or an error.
pub(super) fn count(rows: usize, columns: usize) -> Result<usize> {
    let values = rows.checked_mul(columns).filter(|values| *values <= isize::MAX as usize / 4);
    values.ok_or_else(|| invalid(format!("{rows} x {columns} values don't fit into memory")))
}

/// Where a thread computes its columns of a matrix [rows, width]: in place if they lie together, or else in scratch.
pub(super) enum Part<'a, T> {
    InPlace(&'a mut [T]),
    Apart(&'a mut [T]),
}

/// A matrix of which each thread writes some columns.
pub(super) struct Shared<T> {
    pub data: *mut T,
    pub rows: usize,
    pub width: usize,
}

impl<T: Float> Shared<T> {
    pub(super) fn in_place(&self, columns: &Range<usize>) -> bool {
        self.rows == 1 || columns.len() == self.width
    }

    /// # Safety
    /// The matrix is valid for writes, and no other thread uses these columns.
    pub(super) unsafe fn part<'a>(
        &self,
        what: &str,
        columns: &Range<usize>,
        workspace: &mut Workspace<'a>,
    ) -> Result<Part<'a, T>> {
        let len = self.rows * columns.len();
        if len > 0 {
            check(what, self.data.cast_const(), self.rows * self.width)?;
        }
        if self.in_place(columns) && len > 0 {
            // SAFETY: one row's columns, or all columns of all rows: together in memory, and this thread's alone.
            return Ok(Part::InPlace(unsafe { slice_mut(what, self.data.wrapping_add(columns.start), len)? }));
        }
        Ok(Part::Apart(workspace.take_lines::<T>(len)?))
    }

    /// Puts `part` [rows, columns] into place: each value is what `put` makes of the old one and the part's.
    ///
    /// # Safety
    /// As for [`Self::part`].
    pub(super) unsafe fn put(&self, columns: &Range<usize>, part: &[T], put: impl Fn(T, T) -> T) {
        for (row, part) in part.chunks_exact(columns.len().max(1)).enumerate() {
            for (column, &value) in columns.clone().zip(part) {
                let at = self.data.wrapping_add(row * self.width + column);
                // SAFETY: inside the matrix; no reference to these columns exists in any thread.
                unsafe { at.write(put(at.read(), value)) };
            }
        }
    }
}

impl<T> Part<'_, T> {
    pub(super) fn get(&mut self) -> &mut [T] {
        match self {
            Part::InPlace(part) | Part::Apart(part) => part,
        }
    }
}
