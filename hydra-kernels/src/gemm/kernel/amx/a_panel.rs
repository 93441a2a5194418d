//! A micro-panel of A as tiles: in place where tiles can be loaded from the operand itself, or packed.

use super::pack_a::pack_a;
use super::sizes::{K_MAX, K_STEP, MR};
use crate::gemm::blocking::{KBlock, Pass};
use crate::gemm::view::Values;
use crate::isa::AmxBf16;
use core::mem::MaybeUninit;
use half::bf16;

/// Room for the packed tiles of one pass.
#[repr(align(64))]
pub(super) struct APanel([MaybeUninit<bf16>; MR * K_MAX]);

/// The tiles of one block of k. At each step along k there is one for the upper 16 rows and one for the lower.
#[derive(Clone, Copy)]
pub(super) enum ATiles<'a> {
    /// Packed, from this element of the [`APanel`] on.
    Packed(usize),
    /// In A itself, whose first row starts `data`.
    InPlace { data: &'a [bf16], row_stride: usize },
}

impl APanel {
    /// In the caller's room: returned by value, it would be on the stack twice in a debug build.
    pub(super) fn of(room: &mut MaybeUninit<Self>) -> &mut Self {
        // SAFETY: it consists of values that need not be initialised.
        unsafe { room.assume_init_mut() }
    }

    /// The tiles from element `at` on.
    pub(super) fn tiles(&self, at: usize) -> *const bf16 {
        self.0[at..].as_ptr().cast()
    }

    /// Provides the tiles of rows `i .. i + rows`, at most [`MR`], for both blocks of a pass.
    pub(super) fn pack<'a>(
        &mut self,
        isa: AmxBf16,
        pass: &Pass<'_, 'a, bf16>,
        i: usize,
        rows: usize,
    ) -> [ATiles<'a>; 2] {
        let mut tiles = [ATiles::Packed(0); 2];
        let mut used = 0;
        for (block, tiles) in pass.iter().flatten().zip(&mut tiles) {
            if let Some(data) = in_place(block, i) {
                *tiles = ATiles::InPlace { data, row_stride: block.a().row_stride };
                continue;
            }
            *tiles = ATiles::Packed(used);
            pack_a(isa, &mut self.0[used..], block, i, rows);
            used += block.depth * MR;
        }
        tiles
    }
}

/// The block's A from row `i` on, if tiles can be loaded from it as fast as from a copy.
///
/// That takes bf16 in whole steps, with the 32 values of a row and step in one cache line, and rows that do not crowd
/// into a few sets of L1.
fn in_place<'a>(block: &KBlock<'_, 'a, bf16>, i: usize) -> Option<&'a [bf16]> {
    let a = block.a();
    let Values::Bf16(data) = a.data else { return None };
    if a.col_stride != 1 {
        return None;
    }
    let data = &data[i * a.row_stride + block.first..];
    let whole_lines = a.row_stride.is_multiple_of(K_STEP)
        && block.len.is_multiple_of(K_STEP)
        && data.as_ptr().addr().is_multiple_of(64);
    let row_lines = a.row_stride / K_STEP;
    (whole_lines && !row_lines.is_multiple_of(32)).then_some(data)
}
