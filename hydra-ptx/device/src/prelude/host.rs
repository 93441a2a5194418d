//! The prelude on the CPU: an emulated thread calls its block. The functions are documented in `nvptx.rs`; layouts of
//! `ldmatrix` and `mma` are those of the PTX ISA 8.x, section "Warp-level matrix instructions".

#![allow(missing_docs)]

use crate::emulator::block::{Place, Request, ask, with_block};
use crate::emulator::wgmma::Operands;
use core::panic::Location;

pub fn thread() -> u32 {
    with_block(|block| block.current)
}

pub fn threads() -> u32 {
    with_block(|block| block.threads)
}

pub fn block_x() -> u32 {
    with_block(|block| block.index[0])
}

pub fn block_y() -> u32 {
    with_block(|block| block.index[1])
}

#[track_caller]
pub fn barrier() {
    ask(Request::Barrier, Place::Source(Location::caller()));
}

pub fn keep_order() {}

#[track_caller]
pub fn shuffle_xor(value: f32, lanes: u32) -> f32 {
    f32::from_bits(ask(Request::Shuffle { value: value.to_bits(), lanes }, Place::Source(Location::caller()))[0])
}

/// Not 0, so that an address without the base is an error.
pub const SHARED_BASE: u32 = 0x400;

pub fn shared() -> u32 {
    SHARED_BASE
}

pub fn opaque(x: u32) -> u32 {
    x
}

#[track_caller]
pub unsafe fn ld_f32(address: u32) -> f32 {
    f32::from_le_bytes(with_block(|block| block.shared_load(address)))
}

#[track_caller]
pub unsafe fn st_f32(address: u32, value: f32) {
    with_block(|block| block.shared_store(address, &value.to_le_bytes()))
}

#[track_caller]
pub unsafe fn st_u32(address: u32, value: u32) {
    with_block(|block| block.shared_store(address, &value.to_le_bytes()))
}

#[track_caller]
pub unsafe fn ld_f64(address: u32) -> f64 {
    f64::from_le_bytes(with_block(|block| block.shared_load(address)))
}

#[track_caller]
pub unsafe fn st_f64(address: u32, value: f64) {
    with_block(|block| block.shared_store(address, &value.to_le_bytes()))
}

#[track_caller]
pub unsafe fn st_f2(address: u32, [first, second]: [f32; 2]) {
    let bits = u64::from(first.to_bits()) | u64::from(second.to_bits()) << 32;
    with_block(|block| block.shared_store(address, &bits.to_le_bytes()))
}

#[track_caller]
pub unsafe fn ld_f2(address: u32) -> [f32; 2] {
    let bits = u64::from_le_bytes(with_block(|block| block.shared_load(address)));
    [bits as u32, (bits >> 32) as u32].map(f32::from_bits)
}

#[track_caller]
pub unsafe fn ld_u4(address: u32) -> [u32; 4] {
    let bytes: [u8; 16] = with_block(|block| block.shared_load(address));
    core::array::from_fn(|i| u32::from_le_bytes(core::array::from_fn(|j| bytes[4 * i + j])))
}

#[track_caller]
pub unsafe fn st_u4(address: u32, value: [u32; 4]) {
    let mut bytes = [0; 16];
    value.iter().enumerate().for_each(|(i, word)| bytes[4 * i..4 * i + 4].copy_from_slice(&word.to_le_bytes()));
    with_block(|block| block.shared_store(address, &bytes))
}

#[track_caller]
pub unsafe fn ldmatrix(address: u32) -> [u32; 4] {
    ask(Request::Ldmatrix { address, transposed: false }, Place::Source(Location::caller()))
}

#[track_caller]
pub unsafe fn ldmatrix_transposed(address: u32) -> [u32; 4] {
    ask(Request::Ldmatrix { address, transposed: true }, Place::Source(Location::caller()))
}

#[track_caller]
pub unsafe fn ldmatrix_twice([first, second]: [u32; 2]) -> [[u32; 4]; 2] {
    [ldmatrix(first), ldmatrix(second)]
}

#[track_caller]
pub unsafe fn ldmatrix_transposed_twice([first, second]: [u32; 2]) -> [[u32; 4]; 2] {
    [ldmatrix_transposed(first), ldmatrix_transposed(second)]
}

#[track_caller]
pub fn mma_bf16(acc: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
    *acc = ask(Request::Mma { a, b, c: *acc }, Place::Source(Location::caller())).map(f32::from_bits);
}

#[track_caller]
pub unsafe fn copy_async(to: u32, from: *const u8, inside: bool) {
    with_block(|block| block.copy_async(to, from, inside))
}

pub fn copy_commit() {
    with_block(|block| block.copy_commit())
}

#[track_caller]
pub fn copy_wait<const PENDING: u32>() {
    with_block(|block| block.copy_wait(PENDING as usize))
}

pub fn proxy_fence() {
    with_block(|block| block.proxy_fence())
}

pub struct Sums([[f32; 4]; 32]);

impl Sums {
    pub fn zero() -> Self {
        Self([[0.0; 4]; 32])
    }

    #[track_caller]
    pub unsafe fn start<const TRANSPOSED: bool>(&mut self, a: [u64; 4], b: [u64; 4]) {
        let place = Place::Source(Location::caller());
        ask(Request::WgmmaFence, place);
        for (a, b) in a.into_iter().zip(b) {
            ask(Request::Wgmma(Operands { a, b, transposed: TRANSPOSED }), place);
            let part = with_block(|block| block.parts[block.current as usize]);
            self.0.iter_mut().zip(part).for_each(|(sums, part)| *sums = core::array::from_fn(|i| sums[i] + part[i]));
        }
        ask(Request::WgmmaCommit, place);
    }

    #[track_caller]
    pub fn wait_for_all_but_one(&mut self) {
        ask(Request::WgmmaWait { pending: 1 }, Place::Source(Location::caller()));
    }

    #[track_caller]
    pub fn finish(self) -> [[f32; 4]; 32] {
        ask(Request::WgmmaWait { pending: 0 }, Place::Source(Location::caller()));
        self.0
    }
}

#[track_caller]
pub unsafe fn load<T: Copy>(from: *const T) -> T {
    with_block(|block| block.check_global(from as usize, size_of::<T>(), align_of::<T>(), false));
    *from
}

#[track_caller]
pub unsafe fn store<T: Copy>(to: *mut T, value: T) {
    with_block(|block| block.check_global(to as usize, size_of::<T>(), align_of::<T>(), true));
    *to = value;
}

pub fn exp2(x: f32) -> f32 {
    x.exp2()
}

pub fn sqrt(x: f32) -> f32 {
    x.sqrt()
}

/// Rounded twice, because the library's fused operation is slow where the CPU has no instruction for it.
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    a * b + c
}

pub fn pack_bf16(low: f32, high: f32) -> u32 {
    let round = |x: f32| {
        let bits = x.to_bits();
        if x.is_nan() { 0x7fff } else { (bits + 0x7fff + (bits >> 16 & 1)) >> 16 }
    };
    round(low) | round(high) << 16
}
