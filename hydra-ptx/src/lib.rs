//! Hydra's CUDA kernels as PTX text, and how to launch them. No driver, no device, no unsafe code.
//!
//! `device/` is the kernels' source, in Rust; `build-ptx` compiles it to [`PTX`] and [`HOPPER_PTX`], which are checked
//! in. [`launch`] has one function for each kernel, which returns the entry, grid, block, shared memory and parameters
//! of a launch. The tests hold all three together: the text was compiled from the sources, each launch fits its entry,
//! and the sources, run by an emulator, compute what `hydra_kernels::reference` defines.

/// Expands the list of kernels (`kernels/`): a struct of each list of parameters, from which a launch takes its
/// arguments.
macro_rules! kernels {
    ($(
        $(#[$doc:meta])*
        $(hopper $hopper:ident::[$($hopper_name:ident)*])?
        struct $Params:ident for $module:ident::[$($name:ident)*] {
            $($(#[$field_doc:meta])* $field:ident: $type:ty,)*
        }
    )*) => {$(
        $(#[$doc])*
        pub struct $Params { $($(#[$field_doc])* pub $field: <$type as $crate::launch::Parameter>::Value,)* }

        impl $Params {
            /// The parameters in the kernel's order.
            pub fn args(self) -> Vec<$crate::launch::Arg> {
                vec![$($crate::launch::Arg::from(self.$field)),*]
            }
        }
    )*};
}

mod kernels;
pub mod launch;
pub mod sizes;

/// The module's text for sm_80; the driver compiles it for all later devices, too.
pub const PTX: &str = include_str!("../ptx/hydra.sm_80.ptx");

/// The text of the module for sm_90a, with the kernels that use instructions of Hopper alone. No other device loads it.
pub const HOPPER_PTX: &str = include_str!("../ptx/hydra.sm_90a.ptx");

/// The compute capability that [`HOPPER_PTX`] is for.
pub const HOPPER: (u32, u32) = (9, 0);

/// The lowest compute capability with what the kernels need: bf16 matrix instructions and asynchronous copies.
pub const CAPABILITY: (u32, u32) = (8, 0);
