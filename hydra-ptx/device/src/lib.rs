//! Hydra's CUDA kernels.
//!
//! The same source is compiled to PTX (`../build-ptx`) and, on any other target, to functions that [`emulator`] runs thread by
//! thread. Only [`prelude`] knows which it is. Matrices are row-major; activations are bf16, other buffers f32, operands of
//! matrix instructions are bf16 with rows padded by zeros to a multiple of 8 (their *pitch*; most activations need no padding, and
//! are operands as they lie), sums are f32 and in a fixed order: no atomics.
//!
//! Everything here is unsafe in the same way: a kernel trusts its launch (`hydra-ptx/src/launch.rs`) for pointers and sizes.
//! So the crate doesn't mark what each line trusts; the emulator checks all accesses in tests.

#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg_attr(
    target_arch = "nvptx64",
    feature(abi_ptx, asm_experimental_arch, core_intrinsics, link_llvm_intrinsics, stdarch_nvptx)
)]
#![cfg_attr(target_arch = "nvptx64", allow(internal_features))]
#![allow(unsafe_op_in_unsafe_fn, clippy::missing_safety_doc, clippy::too_many_arguments)]
#![cfg_attr(target_arch = "nvptx64", allow(dead_code, unused_imports))] // what the other module's kernels use
// Registers are matrices with two indices.
#![allow(clippy::needless_range_loop)]
// Shapes, and the CPU's mathematics, are written as they are elsewhere.
#![allow(rustdoc::broken_intra_doc_links)]

/// Defines kernels: functions of a PTX module, or of this crate with an [`emulator::Entry`] beside each, in `ENTRIES`. There are two
/// modules: one for every device, and, compiled with `--cfg hopper`, one of the kernels that are marked `hopper`.
macro_rules! kernels {
    (hopper: $($kernels:tt)*) => { kernels! { @hopper; $($kernels)* } };
    (@$module:meta; $($(#[$meta:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block)*) => {
        $(
            #[cfg(all(target_arch = "nvptx64", $module))]
            $(#[$meta])*
            #[unsafe(no_mangle)]
            pub unsafe extern "ptx-kernel" fn $name($($arg: $ty),*) $body

            #[cfg(not(target_arch = "nvptx64"))]
            $(#[$meta])*
            pub unsafe fn $name($($arg: $ty),*) $body
        )*

        /// This file's kernels.
        #[cfg(not(target_arch = "nvptx64"))]
        pub const ENTRIES: &[crate::emulator::Entry] = &[$(
            crate::emulator::Entry {
                name: stringify!($name),
                params: &[$(<$ty as crate::emulator::Param>::KIND),*],
                call: |slots| {
                    let mut slots = slots.iter();
                    $(let $arg = <$ty as crate::emulator::Param>::from_slot(*slots.next().expect("a slot a parameter"));)*
                    // SAFETY: the caller of `call` vouches for the parameters.
                    unsafe { $name($($arg),*) }
                },
            },
        )*];
    };
    ($($kernels:tt)*) => { kernels! { @not(hopper); $($kernels)* } };
}

pub mod attention;
pub mod attention_backward;
pub mod elementwise;
#[cfg(not(target_arch = "nvptx64"))]
pub mod emulator;
pub mod few;
pub mod format;
pub mod gate;
pub mod gemm;
pub mod loss;
pub mod mask;
#[path = "../../../hydra-kernels/src/math.rs"]
pub mod math;
pub mod matvec;
pub mod optimizer;
pub mod prelude;
pub mod product;
pub mod rows;
#[path = "../../src/sizes.rs"]
pub mod sizes;
pub mod skinny;
pub mod tile;
pub mod wgmma;

#[cfg(target_arch = "nvptx64")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    unsafe { core::arch::nvptx::trap() }
}

/// All kernels.
#[cfg(not(target_arch = "nvptx64"))]
pub fn entries() -> impl Iterator<Item = &'static emulator::Entry> {
    [
        attention::ENTRIES,
        attention_backward::ENTRIES,
        elementwise::ENTRIES,
        few::ENTRIES,
        gate::ENTRIES,
        gemm::ENTRIES,
        loss::ENTRIES,
        matvec::ENTRIES,
        optimizer::ENTRIES,
        rows::ENTRIES,
        skinny::ENTRIES,
        wgmma::ENTRIES,
    ]
    .into_iter()
    .flatten()
}
