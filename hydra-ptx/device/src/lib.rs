//! Hydra's CUDA kernels.
//!
//! The same source is compiled to PTX (`../build-ptx`) and, on any other target, to functions that [`emulator`] runs
//! thread by thread. Only [`prelude`] knows which of the two it is. Kernels and their parameters are listed in
//! [`kernels`], which the launch table shares. Matrices are row-major; activations are bf16, other buffers f32.
//! Operands of matrix instructions are bf16, their rows padded with zeros to a multiple of 8 columns (the *pitch*);
//! most activations need no padding and serve as operands directly. Sums are f32 and have a fixed order: no atomics.
//!
//! Everything here is unsafe in the same way: a kernel trusts its launch (`hydra-ptx/src/launch.rs`) for pointers and
//! sizes. So the crate doesn't mark each use of a pointer; the emulator checks all accesses in tests.

#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg_attr(
    target_arch = "nvptx64",
    feature(abi_ptx, asm_experimental_arch, core_intrinsics, link_llvm_intrinsics, stdarch_nvptx)
)]
#![cfg_attr(target_arch = "nvptx64", allow(internal_features))]
#![allow(unsafe_op_in_unsafe_fn, clippy::missing_safety_doc)]
#![cfg_attr(target_arch = "nvptx64", allow(dead_code, unused_imports))] // what the other module's kernels use
// Registers are matrices with two indices.
#![allow(clippy::needless_range_loop)]
// Shapes, and the CPU's mathematics, are written as they are elsewhere.
#![allow(rustdoc::broken_intra_doc_links)]

/// Expands the list of kernels in `hydra-ptx/src/kernels`: a struct of each list of parameters; on the GPU an entry
/// point of each kernel, elsewhere an [`emulator::Entry`] in `ENTRIES`. Kernels marked `hopper` are in a module of
/// their own, which is compiled with `--cfg hopper`.
macro_rules! kernels {
    (@params [$($doc:tt)*] $Params:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $($doc)*
        #[derive(Clone, Copy)]
        pub struct $Params { $($(#[$field_doc])* pub $field: $type,)* }
    };
    (@entry $cfg:meta, $module:ident, $name:ident, $Params:ident {
        $($(#[$field_doc:meta])* $field:ident: $type:ty,)*
    }) => {
        /// The entry point of the kernel of this name.
        #[cfg(all(target_arch = "nvptx64", $cfg))]
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $name($($field: $type),*) {
            crate::$module::$name($Params { $($field),* })
        }
    };
    (@emulated $module:ident, $name:ident, $Params:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        crate::emulator::Entry {
            name: stringify!($name),
            params: &[$(<$type as crate::emulator::Param>::KIND),*],
            call: |slots| {
                let mut slots = slots.iter();
                let mut next = || *slots.next().expect("a slot for each parameter");
                let params = $Params { $($field: crate::emulator::Param::from_slot(next())),* };
                // SAFETY: the caller of `call` vouches for the parameters.
                unsafe { crate::$module::$name(params) }
            },
        }
    };
    ($(
        $(#[$doc:meta])*
        $(hopper $hopper:ident::[$($hopper_name:ident)*])?
        struct $Params:ident for $module:ident::[$($name:ident)*] $fields:tt
    )*) => {
        $(kernels! { @params [$(#[$doc])*] $Params $fields })*
        $($(kernels! { @entry not(hopper), $module, $name, $Params $fields })*)*
        $($($(kernels! { @entry hopper, $hopper, $hopper_name, $Params $fields })*)?)*

        /// This file's kernels.
        #[cfg(not(target_arch = "nvptx64"))]
        pub const ENTRIES: &[crate::emulator::Entry] = &[
            $($(kernels! { @emulated $module, $name, $Params $fields },)*)*
            $($($(kernels! { @emulated $hopper, $hopper_name, $Params $fields },)*)?)*
        ];
    };
}

pub mod adapter_backward;
pub mod attention;
pub mod attention_backward;
pub mod attention_dkv;
pub mod attention_tiles;
pub mod dropped_dx;
pub mod elementwise;
#[cfg(not(target_arch = "nvptx64"))]
pub mod emulator;
pub mod format;
pub mod gate;
pub mod gate_backward;
pub mod gemm;
pub mod heads;
#[path = "../../src/kernels/mod.rs"]
pub mod kernels;
pub mod lora_down;
pub mod lora_matvec;
pub mod loss;
pub mod mask;
#[path = "../../../hydra-kernels/src/math.rs"]
pub mod math;
pub mod matvec;
pub mod mixed;
pub mod optimizer;
pub mod prelude;
pub mod product;
pub mod rows;
#[path = "../../src/sizes.rs"]
pub mod sizes;
pub mod tile;
pub mod wgmma;
pub mod wide;

#[cfg(target_arch = "nvptx64")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    unsafe { core::arch::nvptx::trap() }
}

/// All kernels.
#[cfg(not(target_arch = "nvptx64"))]
pub fn entries() -> impl Iterator<Item = &'static emulator::Entry> {
    use kernels::{adapter, attention, dense, model};
    [adapter::ENTRIES, attention::ENTRIES, dense::ENTRIES, model::ENTRIES].into_iter().flatten()
}
