//! Sixteen f32 at a time: one register of AVX-512, two of AVX2, four of NEON.

use super::bytes::Bytes;

/// Values in a vector.
pub(crate) const LANES: usize = 16;

/// A vector instruction set as dot products with quantized rows need it.
///
/// A value that implements this proves that the CPU has the instructions. They are used only where the methods are
/// inlined into a closure of [`crate::isa::Isa::vectorize`].
pub(crate) trait Lanes: Copy {
    /// Sixteen f32.
    type V: Copy;
    /// The map q ↦ d·q + m for q in 0..16.
    type Table: Copy;

    /// See [`crate::isa::Isa::vectorize`].
    fn vectorize<R>(self, op: impl FnOnce() -> R) -> R;
    /// `x` in every lane.
    fn splat(self, x: f32) -> Self::V;
    /// Prefetches the cache line at an address, which may be out of bounds or unmapped.
    fn prefetch(self, at: *const u8);
    /// Sixteen f32.
    fn load(self, x: &[f32; LANES]) -> Self::V;
    /// The sixteen values.
    fn store(self, v: Self::V) -> [f32; LANES];
    /// Sixteen f32 at any alignment.
    fn f32(self, bytes: &[u8; 64]) -> Self::V;
    /// Sixteen f16, widened.
    fn f16(self, bytes: &[u8; 32]) -> Self::V;
    /// Sixteen bf16, widened.
    fn bf16(self, bytes: &[u8; 32]) -> Self::V;
    /// The first of four f16, widened, in every lane.
    fn half(self, bytes: &[u8; 8]) -> Self::V;
    /// The first and the second of four f16, widened, each in every lane of a vector.
    fn halves(self, bytes: &[u8; 8]) -> (Self::V, Self::V);
    /// The first of four f16 in the first eight lanes and minus the second in the last eight, widened.
    fn scale_and_min(self, bytes: &[u8; 8]) -> Self::V;
    /// The bytes of `table` at `places`, which are below 16.
    fn lookup(self, table: Bytes, places: Bytes) -> Bytes;
    /// Sixteen u8 as f32.
    fn unsigned(self, bytes: Bytes) -> Self::V;
    /// Sixteen i8 as f32.
    fn signed(self, bytes: Bytes) -> Self::V;
    /// a·b.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a·b + c, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The map q ↦ d·q + m.
    fn table(self, d: Self::V, m: Self::V) -> Self::Table;
    /// d·q + m for 32 codes of five bits: their lower four are the low nibbles of `packed` and then its high ones, and
    /// their fifth bits are those of `fifths`, in order.
    fn fives(self, scale: (Self::V, Self::V), packed: Bytes, fifths: [u8; 4]) -> (Self::V, Self::V);
    /// Each byte's low nibble mapped by `low`, and its high nibble by `high`.
    fn nibbles(self, low: Self::Table, high: Self::Table, packed: Bytes) -> (Self::V, Self::V);
}
