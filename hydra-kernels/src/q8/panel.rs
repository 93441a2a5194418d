//! Rows of W unpacked side by side, so that a vector holds four columns of each of them.

// Passed by name, a function would be called through a shim that is compiled without the caller's instruction set.
#![allow(clippy::redundant_closure)]

#[cfg(target_arch = "x86_64")]
use super::panel256;
use crate::isa::Isa;
use crate::quant::codes::{self, Group};
use crate::quant::{GROUP, Weight, by_block_format};
use bytemuck::{Pod, Zeroable};
use core::ops::Range;

/// Rows of W in a panel: the lanes of a 512-bit register.
pub const NR: usize = 16;

/// Columns whose products a lane adds up in one instruction.
const QUAD: usize = 4;

/// One group of 32 columns of [`NR`] rows.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct PanelGroup {
    /// `codes[i][4 · row + j]` is the code of column 4 · i + j.
    pub(super) codes: [[u8; NR * QUAD]; GROUP / QUAD],
    /// Each row's scale; in Q3_K and Q6_K, that of the group's first half.
    pub(super) scales: [f32; NR],
    /// Each row's minimum; in Q3_K and Q6_K, the scale of the group's second half; in Q2_K, the minima of both halves;
    /// otherwise 0.
    pub(super) seconds: [f32; NR],
}

// SAFETY: all bytes zero are integers and floats that are zero.
unsafe impl Zeroable for PanelGroup {}
// SAFETY: `repr(C)` with fields for which any bits are valid; their sizes leave no padding, as asserted here.
unsafe impl Pod for PanelGroup {}
const _: () = assert!(size_of::<PanelGroup>() == NR * (GROUP + 2 * size_of::<f32>()));

/// Unpacks the rows `rows` of W, at most [`NR`], into a panel of all their groups. Rows that there are not are zeros.
pub(super) fn unpack(isa: Isa, panel: &mut [PanelGroup], weight: Weight<'_>, rows: Range<usize>) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(isa) => return panel256::unpack(isa, panel, weight, rows),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(isa) => return panel256::unpack(isa, panel, weight, rows),
        _ => {}
    }
    macro_rules! groups {
        ($group:ident, $bytes:literal, $groups:literal, $bits:literal, $minimum:literal) => {
            isa.vectorize(
                #[inline(always)]
                || {
                    unpack_groups::<$bytes, $groups>(
                        panel,
                        weight,
                        rows,
                        #[inline(always)]
                        |block, sub| codes::$group(block, sub),
                    )
                },
            )
        };
    }
    by_block_format!(weight.format(), groups)
}

/// Blocks of `BYTES` bytes, each of `SUBS` groups.
#[inline(always)]
fn unpack_groups<const BYTES: usize, const SUBS: usize>(
    panel: &mut [PanelGroup],
    weight: Weight<'_>,
    rows: Range<usize>,
    group: impl Fn(&[u8; BYTES], usize) -> Group,
) {
    if rows.len() < NR {
        panel.fill(PanelGroup::zeroed());
    }
    for (lane, row) in rows.enumerate() {
        let blocks = weight.stored(row).as_chunks::<BYTES>().0;
        for (out, block) in panel.chunks_mut(SUBS).zip(blocks) {
            for (sub, out) in out.iter_mut().enumerate() {
                let (codes, [scale, second]) = group(block, sub);
                (out.scales[lane], out.seconds[lane]) = (scale, second);
                for (out, codes) in out.codes.iter_mut().zip(codes.as_chunks::<QUAD>().0) {
                    out[QUAD * lane..][..QUAD].copy_from_slice(codes);
                }
            }
        }
    }
}
