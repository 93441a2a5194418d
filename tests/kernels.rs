//! The kernels against their f64 reference, on every instruction set of the machine, and on emulated AMX where it has
//! none.
//!
//! `HYDRA_REQUIRE_ISA=avx512 cargo test` fails on a machine without AVX-512, instead of passing without testing it.

#[cfg(all(target_arch = "x86_64", target_os = "linux", feature = "amx"))]
#[path = "kernels/amx.rs"]
mod amx;
#[path = "kernels/columns.rs"]
mod columns;
#[path = "kernels/elementwise.rs"]
mod elementwise;
#[path = "kernels/gate.rs"]
mod gate;
#[path = "kernels/gemm.rs"]
mod gemm;
#[path = "kernels/isa.rs"]
mod isa;
#[path = "kernels/matvec.rs"]
mod matvec;
#[path = "kernels/memory.rs"]
mod memory;
#[path = "kernels/operator.rs"]
mod operator;
#[path = "kernels/phases.rs"]
mod phases;
#[path = "kernels/q8.rs"]
mod q8;
#[path = "kernels/quant.rs"]
mod quant;
#[path = "kernels/refused.rs"]
mod refused;
#[path = "kernels/support.rs"]
mod support;
