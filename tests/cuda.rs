//! The CUDA backend against the CPU's: every operation at random shapes, whole models, and PyTorch's trajectories.
//!
//! Each test exists three times: `on_the_emulator` runs the kernels' source on the CPU, thread by thread; `compiled`
//! interprets the PTX in the same way; `on_a_gpu` runs the PTX on a device and is ignored unless asked for: `cargo test
//! --features cuda --test cuda -- --ignored --test-threads 1` (one of them checks the device's free memory).

#![cfg(feature = "cuda")]

#[path = "cuda/context.rs"]
mod context;
#[path = "cuda/emulated.rs"]
mod emulated;
#[path = "cuda/linear.rs"]
mod linear;
#[path = "cuda/memory.rs"]
mod memory;
#[path = "cuda/model.rs"]
mod model;
#[path = "cuda/ops.rs"]
mod ops;
#[path = "cuda/support.rs"]
mod support;

use support::Random;

/// Lists the checks once for all devices.
macro_rules! all {
    ($($file:ident::$name:ident: $cases:literal;)*) => {
        mod on_the_emulator {
            $(#[test]
            fn $name() {
                for seed in 0..$cases {
                    super::$file::$name(&super::emulated::backend(), &mut super::Random::new(seed), 1);
                }
            })*
        }

        mod compiled {
            $(#[test]
            fn $name() {
                for seed in 0..$cases / 2 {
                    // Other shapes than those of the source's test.
                    super::$file::$name(&super::emulated::compiled(), &mut super::Random::new(1000 + seed), 1);
                }
            })*
        }

        mod on_a_gpu {
            $(#[test]
            #[ignore = "needs a CUDA device"]
            fn $name() {
                // A device compiles the kernels when it is opened.
                let gpu = super::support::gpu();
                for seed in 0..super::support::cases(4 * $cases) {
                    super::$file::$name(&gpu, &mut super::Random::new(seed), 8);
                }
            })*
        }
    };
}

all! {
    ops::memory: 3;
    ops::embedding: 6;
    ops::norms: 6;
    ops::head_norms: 6;
    ops::rotations: 6;
    ops::swiglu: 4;
    ops::gather_and_scatter: 4;
    ops::attention: 12;
    ops::lowest_scores: 2;
    ops::head: 8;
    ops::large_head: 4;
    ops::optimizer: 4;
    linear::frozen: 16;
    linear::adapted: 24;
    linear::nothing: 4;
    linear::decoded: 8;
    linear::large: 2;
}

#[test]
fn golden_cases_on_the_emulator() {
    model::golden(emulated::backend, 10);
}

#[test]
fn golden_cases_compiled() {
    // An interpreter takes seconds for a step. What ten of them add is the source's, and a GPU's.
    model::golden(emulated::compiled, 3);
}

#[test]
fn announced_memory_is_what_is_taken() {
    memory::announced_is_taken();
}

#[test]
fn more_values_than_32_bits_count() {
    memory::more_values_than_32_bits_count();
}

#[test]
fn a_step_waits_for_what_it_reads() {
    model::a_step_waits_for_what_it_reads();
}

#[test]
fn generation_compiled() {
    model::generation(emulated::compiled);
}

#[test]
fn generation_on_the_emulator() {
    model::generation(emulated::backend);
}

#[test]
fn serving_on_the_emulator() {
    model::served(emulated::backend);
}

#[test]
#[ignore = "needs a CUDA device"]
fn more_memory_than_there_is() {
    ops::more_memory_than_there_is(&support::gpu());
}

#[test]
#[ignore = "needs a CUDA device"]
fn work_under_way() {
    ops::work_under_way(support::gpu());
}

#[test]
#[ignore = "needs a CUDA device"]
fn the_hosts_context_stays_current() {
    context::the_hosts_context_stays_current();
}

#[test]
#[ignore = "needs a CUDA device"]
fn tall_products() {
    context::none_is_left(|| linear::tall(&support::gpu()));
}

#[test]
#[ignore = "needs a CUDA device"]
fn products_with_silent_ends() {
    linear::silent_ends(&support::gpu());
}

#[test]
#[ignore = "needs a CUDA device"]
fn tall_products_without_memory() {
    linear::tall_without_memory(&support::gpu());
}

#[test]
#[ignore = "needs a CUDA device"]
fn joined_products() {
    linear::joined(&support::gpu());
}

#[test]
#[ignore = "needs a CUDA device"]
fn golden_cases_on_a_gpu() {
    model::golden(support::gpu, 10);
}

#[test]
#[ignore = "needs a CUDA device"]
fn generation_on_a_gpu() {
    model::generation(support::gpu);
}

#[test]
#[ignore = "needs a CUDA device"]
fn serving_on_a_gpu() {
    model::served(support::gpu);
}
