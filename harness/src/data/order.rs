//! The order in which records are taken: each epoch takes all of them once, in its own random order.
//!
//! Epoch e's order is a Fisher-Yates shuffle of 0..n: for i from n − 1 down to 1, swap i with ⌊u (i + 1) / 2⁶⁴⌋, where u are
//! the outputs of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) started at seed + e · 0xD1B54A32D192ED03 (modulo 2⁶⁴).

use hydra_runtime::hydra_kernels::random::SplitMix64;

/// An endless stream of record indices.
pub struct Order {
    records: usize,
    /// `None` for the files' order.
    seed: Option<u64>,
}

impl Order {
    /// A stream over `records` records, at least one.
    pub fn new(records: usize, seed: Option<u64>) -> Self {
        assert!(records > 0, "an order of no records");
        Self { records, seed }
    }

    /// The indices at places `from .. to` of the stream.
    pub fn take(&self, from: usize, to: usize) -> Vec<usize> {
        let mut taken = Vec::with_capacity(to.saturating_sub(from));
        let mut place = from;
        while place < to {
            let (epoch, first) = (place / self.records, place % self.records);
            let last = self.records.min(first + to - place);
            taken.extend_from_slice(&self.epoch(epoch)[first..last]);
            place += last - first;
        }
        taken
    }

    fn epoch(&self, epoch: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.records).collect();
        if let Some(seed) = self.seed {
            let mut random = SplitMix64::new(seed.wrapping_add((epoch as u64).wrapping_mul(0xD1B5_4A32_D192_ED03)));
            for i in (1..self.records).rev() {
                order.swap(i, random.below(i + 1));
            }
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_epoch_has_every_record_once() {
        let order = Order::new(7, Some(3));
        let (first, second) = (order.take(0, 7), order.take(7, 14));
        assert_ne!(first, second);
        for mut epoch in [first, second] {
            epoch.sort();
            assert_eq!(epoch, [0, 1, 2, 3, 4, 5, 6]);
        }
    }

    #[test]
    fn a_stream_can_be_taken_up_anywhere() {
        let order = Order::new(5, Some(9));
        let whole = order.take(0, 23);
        let parts: Vec<usize> =
            [(0, 4), (4, 11), (11, 12), (12, 23)].iter().flat_map(|&(a, b)| order.take(a, b)).collect();
        assert_eq!(whole, parts);
    }

    #[test]
    fn file_order() {
        assert_eq!(Order::new(3, None).take(1, 8), [1, 2, 0, 1, 2, 0, 1]);
    }
}
