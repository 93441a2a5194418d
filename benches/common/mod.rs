//! What the benches share: the machine's peak, measured in the same run as what is held against it.

#[path = "../../hydra-runtime/examples/throughput/peak.rs"]
mod peak;

use hydra_kernels::{Bf16Isa, Isa};
pub use peak::fastest;
use peak::{Pick, bf16_peak, f32_peak};

/// Floating-point operations a second of one core, by its best instructions: (f32, bf16), zero where this isn't known.
pub fn peaks() -> (f64, f64) {
    let undisturbed: Pick = |times| times[0];
    (f32_peak(Isa::detect(), undisturbed), bf16_peak(Bf16Isa::detect(), undisturbed))
}

/// Room for `len` values that begin at a cache line, as the engine's buffers do.
#[allow(dead_code)] // not every bench has operands of its own
pub fn aligned<T: Copy>(len: usize, value: T) -> OnLine<T> {
    OnLine { values: vec![value; len + 64], len }
}

/// See [`aligned`].
#[allow(dead_code)]
pub struct OnLine<T> {
    values: Vec<T>,
    len: usize,
}

#[allow(dead_code)]
impl<T> OnLine<T> {
    /// The values.
    pub fn on_line(&mut self) -> &mut [T] {
        let first = self.values.as_ptr().align_offset(64);
        &mut self.values[first..first + self.len]
    }
}
