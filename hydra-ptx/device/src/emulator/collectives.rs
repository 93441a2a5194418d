//! Collectives of a warp, computed from what its 32 lanes ask for. Layouts are those of the PTX ISA 8.x, section
//! "Warp-level matrix instructions".

use super::block::{LANES, Place, Reply, Request, with_block};

/// `shfl.bfly`.
pub(super) fn shuffle(requests: &[Request; LANES]) -> [Reply; LANES] {
    core::array::from_fn(|lane| {
        let Request::Shuffle { lanes, .. } = requests[lane] else { unreachable!("the same place") };
        let Request::Shuffle { value, .. } = requests[lane ^ lanes as usize] else { unreachable!("the same place") };
        [value, 0, 0, 0]
    })
}

/// `ldmatrix.x4`: lane 8 i + r gives the address of row r of matrix i. The eight rows of a matrix have to lie in different
/// banks, else they would be read one after the other.
pub(super) fn ldmatrix(requests: &[Request; LANES], transposed: bool, warp: usize, place: Place) -> [Reply; LANES] {
    for rows in requests.chunks_exact(8) {
        let banks = rows.iter().fold(0u32, |banks, row| {
            let Request::Ldmatrix { address, .. } = row else { unreachable!("the same place") };
            banks | 1 << (address / 16 % 8)
        });
        assert_eq!(banks, 0xff, "{place}: ldmatrix of rows in the same banks");
    }
    let rows: [[u16; 8]; LANES] = core::array::from_fn(|lane| {
        let Request::Ldmatrix { address, .. } = requests[lane] else { unreachable!("the same place") };
        assert!(address.is_multiple_of(16), "{place}: ldmatrix at {address:#x}, not aligned");
        let bytes: [u8; 16] = with_block(|block| {
            block.current = (warp * LANES + lane) as u32;
            block.shared_load(address)
        });
        core::array::from_fn(|i| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]))
    });
    core::array::from_fn(|lane| {
        core::array::from_fn(|matrix| {
            let element = |row: usize, column: usize| u32::from(rows[8 * matrix + row][column]);
            let (outer, inner) = (lane / 4, 2 * (lane % 4));
            if transposed {
                element(inner, outer) | element(inner + 1, outer) << 16
            } else {
                element(outer, inner) | element(outer, inner + 1) << 16
            }
        })
    })
}

/// `mma.m16n8k16`. With g = lane / 4 and t = lane % 4: a₀ = A[g, 2t..], a₁ = A[g + 8, 2t..], a₂ = A[g, 2t + 8..], a₃ =
/// A[g + 8, 2t + 8..]; b₀ = B[2t.., g], b₁ = B[2t + 8.., g]; c₀, c₁ = C[g, 2t..], c₂, c₃ = C[g + 8, 2t..].
pub(super) fn mma(requests: &[Request; LANES]) -> [Reply; LANES] {
    let (mut a, mut b, mut c) = ([[0f32; 16]; 16], [[0f32; 8]; 16], [[0f32; 8]; 16]);
    let half = |word: u32, high: usize| f32::from_bits(if high == 1 { word & 0xffff_0000 } else { word << 16 });
    for (lane, request) in requests.iter().enumerate() {
        let Request::Mma { a: ra, b: rb, c: rc } = request else { unreachable!("the same place") };
        let (g, t) = (lane / 4, 2 * (lane % 4));
        for i in 0..2 {
            for r in 0..4 {
                a[g + r % 2 * 8][t + r / 2 * 8 + i] = half(ra[r], i);
            }
            for r in 0..2 {
                b[t + r * 8 + i][g] = half(rb[r], i);
                c[g + r * 8][t + i] = rc[2 * r + i];
            }
        }
    }
    for (a, c) in a.iter().zip(&mut c) {
        for (a, b) in a.iter().zip(&b) {
            for (c, b) in c.iter_mut().zip(b) {
                *c += a * b;
            }
        }
    }
    core::array::from_fn(|lane| {
        let (g, t) = (lane / 4, 2 * (lane % 4));
        core::array::from_fn(|i| c[g + i / 2 * 8][t + i % 2].to_bits())
    })
}
