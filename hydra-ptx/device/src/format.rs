//! The storage of frozen weights on the device, and how eight of their values are loaded at once.
//!
//! bf16 rows are padded to `pitch`. Blocks of 32 keep GGUF's values but are taken apart: all quants (16 or 32 bytes a
//! block, so that they can be loaded in one piece), and all scales in a second array. Decoding is exact, as on the CPU.

use crate::prelude::*;
use crate::sizes::{FORMAT_Q4_0, FORMAT_Q4_1, FORMAT_Q8_0};

/// A storage format.
pub trait Format {
    /// Whether tiles can be copied without decoding.
    const PLAIN: bool;
    /// Eight values of `row`, from column 8 · `group` on. `pitch` is in elements, including the padding.
    unsafe fn eight(w: *const u8, scales: *const u8, row: u32, group: u32, pitch: u32) -> [f32; 8];
}

/// bf16.
pub struct Bf16;
/// GGUF's Q8_0.
pub struct Q8_0;
/// GGUF's Q4_0.
pub struct Q4_0;
/// GGUF's Q4_1.
pub struct Q4_1;

/// The f32 of an f16, subnormals included.
#[inline(always)]
fn from_f16(half: u16) -> f32 {
    let bits = u32::from(half);
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | (bits & 0x8000) << 16)
}

#[inline(always)]
fn group_at(row: u32, group: u32, pitch: u32) -> usize {
    row as usize * (pitch / 8) as usize + group as usize
}

/// Group `at` of a nibble format: bytes 8 (at % 2) .. of its block, the low nibbles in its first half.
#[inline(always)]
unsafe fn nibbles(w: *const u8, at: usize) -> [u32; 8] {
    let bytes = load(w.add(at / 4 * 16 + at % 2 * 8).cast::<u64>()) >> (at / 2 % 2 * 4);
    core::array::from_fn(|i| (bytes >> (8 * i)) as u32 & 15)
}

impl Format for Bf16 {
    const PLAIN: bool = true;
    #[inline(always)]
    unsafe fn eight(w: *const u8, _: *const u8, row: u32, group: u32, pitch: u32) -> [f32; 8] {
        unpack8(load(w.cast::<U4>().add(group_at(row, group, pitch))).0)
    }
}

impl Format for Q8_0 {
    const PLAIN: bool = false;
    #[inline(always)]
    unsafe fn eight(w: *const u8, scales: *const u8, row: u32, group: u32, pitch: u32) -> [f32; 8] {
        let at = group_at(row, group, pitch);
        let d = from_f16(load(scales.cast::<u16>().add(at / 4)));
        let bytes = load(w.cast::<u64>().add(at));
        core::array::from_fn(|i| f32::from((bytes >> (8 * i)) as u8 as i8) * d)
    }
}

impl Format for Q4_0 {
    const PLAIN: bool = false;
    #[inline(always)]
    unsafe fn eight(w: *const u8, scales: *const u8, row: u32, group: u32, pitch: u32) -> [f32; 8] {
        let at = group_at(row, group, pitch);
        let d = from_f16(load(scales.cast::<u16>().add(at / 4)));
        nibbles(w, at).map(
            #[inline(always)]
            |q| (q as i32 - 8) as f32 * d,
        )
    }
}

impl Format for Q4_1 {
    const PLAIN: bool = false;
    #[inline(always)]
    unsafe fn eight(w: *const u8, scales: *const u8, row: u32, group: u32, pitch: u32) -> [f32; 8] {
        let at = group_at(row, group, pitch);
        let pair = load(scales.cast::<u32>().add(at / 4));
        let (d, m) = (from_f16(pair as u16), from_f16((pair >> 16) as u16));
        nibbles(w, at).map(
            #[inline(always)]
            |q| q as f32 * d + m,
        )
    }
}

/// [`Format::eight`] of a format that is known at run time: one branch, in which threads don't diverge.
#[inline(always)]
pub unsafe fn eight_of(format: u32, w: *const u8, scales: *const u8, row: u32, group: u32, pitch: u32) -> [f32; 8] {
    match format {
        FORMAT_Q8_0 => Q8_0::eight(w, scales, row, group, pitch),
        FORMAT_Q4_0 => Q4_0::eight(w, scales, row, group, pitch),
        FORMAT_Q4_1 => Q4_1::eight(w, scales, row, group, pitch),
        _ => Bf16::eight(w, scales, row, group, pitch),
    }
}
