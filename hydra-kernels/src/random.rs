//! The random generator of everything that is drawn: initial values, dropout masks, orders of records.

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). Its k-th output from a seed is [`mix`] of seed + (k − 1) · [`STEP`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitMix64(u64);

/// What the state grows by at each output: 2⁶⁴ over the golden ratio.
pub const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

impl SplitMix64 {
    /// A generator that starts at `seed`.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next output.
    pub const fn next_u64(&mut self) -> u64 {
        let output = mix(self.0);
        self.0 = self.0.wrapping_add(STEP);
        output
    }

    /// The next output's upper 53 bits as a number from 0 on, below 1.
    pub const fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A number in `0..n`, from the next output: its product with n, divided by 2⁶⁴.
    pub const fn below(&mut self, n: usize) -> usize {
        ((self.next_u64() as u128 * n as u128) >> 64) as usize
    }
}

/// The first output from `seed`. Seeds that differ in one bit give outputs without a visible relation.
#[inline(always)]
pub const fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(STEP);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first outputs of the authors' program from seed 1234567.
    #[test]
    fn outputs_are_the_published_ones() {
        let mut random = SplitMix64::new(1_234_567);
        let outputs = [0; 5].map(|_: u64| random.next_u64());
        let published = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
            4_593_380_528_125_082_431,
            16_408_922_859_458_223_821,
        ];
        assert_eq!(outputs, published);
    }
}
