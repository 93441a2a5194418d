//! Dropout's mask: the same bits as `hydra_kernels::dropout`'s, a function of (seed, row, column).

/// A mask; `threshold` 0 drops nothing.
#[derive(Clone, Copy)]
pub struct Mask {
    /// Names the mask.
    pub seed: u64,
    /// p · 2¹⁶.
    pub threshold: u32,
    /// 1 / (1 − p).
    pub scale: f32,
}

impl Mask {
    /// Drops nothing.
    pub const NONE: Mask = Mask { seed: 0, threshold: 0, scale: 1.0 };

    /// Random bits for four columns of a row, 16 each.
    #[inline(always)]
    fn bits(self, row: u32, four: u32) -> u64 {
        mix(mix(mix(self.seed, 0), u64::from(row)), u64::from(four))
    }

    #[inline(always)]
    fn keeps(self, bits: u64, lane: u32) -> bool {
        (bits >> (16 * lane)) as u32 & 0xffff >= self.threshold
    }

    /// The value after dropout.
    #[inline(always)]
    pub fn apply(self, x: f32, row: u32, column: u32) -> f32 {
        if self.keeps(self.bits(row, column / 4), column % 4) { x * self.scale } else { 0.0 }
    }

    /// Eight bf16 of a row from `column` on, a multiple of 8, with zeros where values are dropped; the others are *not*
    /// scaled.
    #[inline(always)]
    pub fn cut(self, mut chunk: [u32; 4], row: u32, column: u32) -> [u32; 4] {
        for four in 0..2 {
            let bits = self.bits(row, column / 4 + four);
            for two in 0..2 {
                let low = if self.keeps(bits, 2 * two) { 0xffff } else { 0 };
                let high = if self.keeps(bits, 2 * two + 1) { 0xffff_0000 } else { 0 };
                chunk[(2 * four + two) as usize] &= low | high;
            }
        }
        chunk
    }
}

#[inline(always)]
fn mix(key: u64, counter: u64) -> u64 {
    let z = key.wrapping_add(counter.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}
