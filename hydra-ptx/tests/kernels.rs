//! The kernels' source, run thread by thread by the emulator, against `hydra_kernels::reference` and plain loops.

#[path = "kernels/adapter.rs"]
mod adapter;
#[path = "kernels/emulator.rs"]
mod emulator;
#[path = "kernels/expected.rs"]
mod expected;
#[path = "kernels/gemm.rs"]
mod gemm;
#[path = "kernels/support.rs"]
mod support;
