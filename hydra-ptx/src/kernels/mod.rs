//! All kernels and their parameters, listed once for the device and for the launch table.
//!
//! These files are compiled twice, each time after a definition of `kernels!`. In `hydra-ptx/device` it makes a struct
//! of each list of parameters, and an entry point of each kernel. An entry point takes the struct's fields one by one:
//! in a struct passed to PTX, the compiler couldn't know that an address is one of global memory. In `hydra-ptx` it
//! makes the structs that a launch fills in.
//!
//! `struct P for module::[kernels]` names the kernels that take P, and their module in `hydra-ptx/device/src`; a line
//! with `hopper` before it names those that are compiled for sm_90a alone. Matrices are row-major, flags are 0 or 1. An
//! *operand* is a bf16 matrix whose rows are padded with zeros to a multiple of 8 columns.

pub mod adapter;
pub mod attention;
pub mod dense;
pub mod model;
