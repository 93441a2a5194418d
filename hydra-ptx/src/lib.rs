//! Hydra's CUDA kernels as PTX text, and how to launch them. No driver, no device, no unsafe code.
//!
//! `device/` is the kernels' source, in Rust; `build-ptx` compiles it to [`PTX`] and [`HOPPER_PTX`], which are checked in.
//! [`launch`] has one function for each kernel: entry, grid, block, shared memory and parameters. The tests hold all three
//! together: the text belongs to the sources, each launch fits its entry, and the sources, run by an emulator, compute what
//! `hydra_kernels::reference` says.

pub mod launch;
pub mod sizes;

/// The module's text, for sm_80 and, by the driver's own compiler, all that came after.
pub const PTX: &str = include_str!("../ptx/hydra.sm_80.ptx");

/// The text of the module for sm_90a, which has the kernels that use Hopper's own instructions. No other device loads it.
pub const HOPPER_PTX: &str = include_str!("../ptx/hydra.sm_90a.ptx");

/// The compute capability that [`HOPPER_PTX`] is for.
pub const HOPPER: (u32, u32) = (9, 0);

/// The least compute capability that has what the kernels use (bf16 matrix instructions, asynchronous copies).
pub const CAPABILITY: (u32, u32) = (8, 0);
