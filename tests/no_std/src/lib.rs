//! Links the kernels without `std` and without `alloc`: a final artefact that needed an allocator would not build.
#![no_std]

use hydra_kernels::hydra::{
    AdapterGradients, AdapterRef, BackwardArgs, ForwardArgs, Gradients, HydraLayer, backward, forward,
};
use hydra_kernels::{Accumulate, Error, Gate, HydraShape, Isa, Routing, Weight, Workspace};

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// A forward and a backward pass on buffers of the stack: 0, or 1 if one of them was refused.
#[unsafe(no_mangle)]
pub extern "C" fn hydra_step() -> i32 {
    i32::from(step().is_err())
}

fn step() -> Result<(), Error> {
    let shape = HydraShape { d_in: 4, d_out: 3, rank: 1, lora_heads: 2, per_head_a: false, router: true };
    let (x, w, a, b) = ([0.5; 8], [0.25; 12], [0.125; 12], [1.0; 6]);
    let gate = Gate::Router(Routing::default());
    let adapter = AdapterRef { shape, a: &a, b: &b, scale: 1.0, gate };
    let layer = HydraLayer { weight: Weight::from_f32(3, 4, &w)?, adapter: Some(adapter) };

    let (isa, mut memory) = (Isa::detect(), [0.0; 4096]);
    let workspace = &mut Workspace::new(&mut memory);
    let (mut y, mut adapter_state) = ([0.0; 6], [0.0; 6]);
    let args = ForwardArgs::new(2, &x[..]);
    forward::<f32>(isa, &layer, &args, &mut y[..], &mut adapter_state, workspace)?;

    let (mut dx, mut da, mut db) = ([0.0; 8], [0.0; 12], [0.0; 6]);
    let gradients = Gradients {
        dx: Some(((&mut dx[..]).into(), Accumulate::Overwrite)),
        adapter: Some(AdapterGradients { da: &mut da, db: &mut db }),
    };
    let args = BackwardArgs::new(2, &y[..], &x[..]);
    backward::<f32>(isa, &layer, &args, Some(&adapter_state), gradients, workspace)
}
