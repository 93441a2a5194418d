//! Links the kernels without `std` and without `alloc`: a final artefact that needed an allocator would not build.
//!
//! `hydra-kernels/sizes` measures what each of these functions needs.
#![no_std]

use core::hint::black_box;
use hydra_kernels::hydra::{
    AdapterGradients, AdapterRef, BackwardArgs, ForwardArgs, Gradients, HydraLayer, backward, forward,
};
use hydra_kernels::{Accumulate, Bf16Isa, Element, Error, Gate, HydraShape, Isa, Routing, Weight, Workspace};

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// A forward pass in f32: 0, or 1 if it was refused.
#[unsafe(no_mangle)]
pub extern "C" fn hydra_forward(memory: &mut [f32; 4096]) -> i32 {
    i32::from(step::<f32>(Isa::detect(), memory, false).is_err())
}

/// A forward and a backward pass in f32: 0, or 1 if one of them was refused.
#[unsafe(no_mangle)]
pub extern "C" fn hydra_step(memory: &mut [f32; 4096]) -> i32 {
    i32::from(step::<f32>(Isa::detect(), memory, true).is_err())
}

/// The same with products of bf16.
#[unsafe(no_mangle)]
pub extern "C" fn hydra_step_bf16(memory: &mut [f32; 4096]) -> i32 {
    i32::from(step::<half::bf16>(Bf16Isa::detect(), memory, true).is_err())
}

#[inline(always)]
fn step<E: Element>(isa: E::Isa, memory: &mut [f32], with_backward: bool) -> Result<(), Error> {
    let shape = HydraShape { d_in: 4, d_out: 3, rank: 1, lora_heads: 2, per_head_a: false, router: true };
    let (x, w, a, b) = ([0.5; 8], [0.25; 12], [0.125; 12], [1.0; 6]);
    let gate = Gate::Router(Routing::default());
    let adapter = AdapterRef { shape, a: &a, b: &b, scale: 1.0, gate };
    // The compiler may not use that it knows the arguments.
    let layer = black_box(HydraLayer { weight: Weight::from_f32(3, 4, &w)?, adapter: Some(adapter) });

    let workspace = &mut Workspace::new(memory);
    let (mut y, mut adapter_state) = ([0.0; 6], [0.0; 6]);
    let args = black_box(ForwardArgs::new(2, &x[..]));
    forward::<E>(isa, &layer, &args, &mut y[..], &mut adapter_state, workspace)?;
    if !with_backward {
        return Ok(());
    }

    let (mut dx, mut da, mut db) = ([0.0; 8], [0.0; 12], [0.0; 6]);
    let gradients = Gradients {
        dx: Some(((&mut dx[..]).into(), Accumulate::Overwrite)),
        adapter: Some(AdapterGradients { da: &mut da, db: &mut db }),
    };
    let args = black_box(BackwardArgs::new(2, &y[..], &x[..]));
    backward::<E>(isa, &layer, &args, Some(&adapter_state), gradients, workspace)
}
