//! Hopper's asynchronous matrix instructions, a warp at a time. The four warps of a warpgroup have to ask for the same
//! products in the same order.
//!
//! A product is computed when it is started, but a GPU may read its operands at any time until it has been waited for.
//! So the operands are read again then: a store in between is a race, or, behind a barrier, is found by the changed
//! value. Operands that a thread has written without a fence between the two proxies of shared memory are refused.

use super::block::{Block, LANES};
use std::collections::VecDeque;

/// One `wgmma.mma_async.m64n256k16`: two descriptors, and whether B's rows are k.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Operands {
    pub a: u64,
    pub b: u64,
    pub transposed: bool,
}

/// Columns of a product.
const N: usize = 256;
/// Its depth.
const K: usize = 16;

/// A thread's part of a product: `[f32; 4]` as `mma.m16n8k16` leaves them, for each eight columns.
pub(crate) type Part = [[f32; 4]; N / 8];

/// Two bytes of shared memory that a product has read.
struct Read {
    address: u32,
    bits: u16,
}

/// A warp's products.
#[derive(Default)]
pub(crate) struct Products {
    /// Reads of the open group: from a fence to the commit.
    open: Option<Vec<Read>>,
    pending: VecDeque<Vec<Read>>,
    /// All products since the block began.
    asked: Vec<Operands>,
}

/// The address of element (`outer`, `k`) of 16-bit values; `outer` is a row of A or a column of B.
fn element(descriptor: u64, outer: usize, k: usize, rows_are_k: bool) -> u32 {
    let field = |from: u32| ((descriptor >> from & 0x3fff) << 4) as usize;
    assert_eq!(
        (descriptor >> 49 & 7, descriptor >> 62),
        (0, 1),
        "128-byte swizzling that starts at a multiple of 1,024"
    );
    let (panel, eight) = (field(16), field(32));
    let offset = if rows_are_k {
        outer / 64 * panel + k / 8 * eight + k % 8 * 128 + outer % 64 * 2
    } else {
        outer / 8 * eight + outer % 8 * 128 + k * 2
    };
    let address = (field(0) + offset) as u32;
    address ^ (address >> 7 & 7) << 4
}

impl Block {
    /// `wgmma.fence`.
    pub fn wgmma_fence(&mut self, warp: usize) {
        self.products[warp].open.get_or_insert_default();
    }

    /// A warp's part of a product: the values that each of its threads adds to its sums.
    pub fn wgmma(&mut self, warp: usize, operands: Operands) -> [Part; LANES] {
        let Operands { a, b, transposed } = operands;
        let mut reads = Vec::new();
        let mut read = |block: &mut Self, address: u32| {
            let bits = block.proxy_load(address);
            reads.push(Read { address, bits });
            f32::from_bits(u32::from(bits) << 16)
        };
        let first = warp % 4 * 16;
        let left: [[f32; K]; 16] =
            std::array::from_fn(|row| std::array::from_fn(|k| read(self, element(a, first + row, k, false))));
        let right: Vec<[f32; K]> =
            (0..N).map(|column| std::array::from_fn(|k| read(self, element(b, column, k, transposed)))).collect();
        let products = &mut self.products[warp];
        products.open.as_mut().expect("wgmma.fence before wgmma").extend(reads);
        products.asked.push(operands);
        let place = products.asked.len() - 1;
        for other in warp / 4 * 4..warp {
            let asked = self.products[other].asked.get(place);
            assert!(
                asked.is_none_or(|asked| *asked == operands),
                "warps of a warpgroup ask for {asked:?}, {operands:?}"
            );
        }
        let dot = |row: usize, column: usize| left[row].iter().zip(&right[column]).map(|(a, b)| a * b).sum::<f32>();
        std::array::from_fn(|lane| {
            let (row, column) = (lane / 4, 2 * (lane % 4));
            std::array::from_fn(|i| std::array::from_fn(|j| dot(row + j / 2 * 8, 8 * i + column + j % 2)))
        })
    }

    /// `wgmma.commit_group`.
    pub fn wgmma_commit(&mut self, warp: usize) {
        let products = &mut self.products[warp];
        products.pending.push_back(products.open.take().unwrap_or_default());
    }

    /// `wgmma.wait_group`.
    pub fn wgmma_wait(&mut self, warp: usize, pending: usize) {
        while self.products[warp].pending.len() > pending {
            for Read { address, bits } in self.products[warp].pending.pop_front().unwrap_or_default() {
                assert_eq!(self.proxy_load(address), bits, "{address:#x} changed while it was multiplied");
            }
        }
    }

    /// Checks, at the block's end, that every product was waited for.
    pub fn wgmma_end(&self) {
        for group in self.products.chunks(4) {
            for products in group {
                assert!(products.pending.is_empty() && products.open.is_none(), "products that nothing waited for");
                assert_eq!(
                    products.asked.len(),
                    group[0].asked.len(),
                    "warps of a warpgroup ask for the same products"
                );
            }
        }
    }
}
