//! Dropout's mask: the very bits of `hydra_kernels::dropout`, as a function of (seed, row, column).

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
    /// The value after dropout.
    #[inline(always)]
    pub fn apply(self, x: f32, row: u32, column: u32) -> f32 {
        let bits = mix(mix(mix(self.seed, 0), u64::from(row)), u64::from(column / 4));
        let lane = (bits >> (column % 4 * 16)) as u32 & 0xffff;
        if lane >= self.threshold { x * self.scale } else { 0.0 }
    }
}

#[inline(always)]
fn mix(key: u64, counter: u64) -> u64 {
    let z = key.wrapping_add(counter.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}
