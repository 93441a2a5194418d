//! Links the kernels without `std` and without `alloc`: a final artefact that needed an allocator would not build.
#![no_std]

use hydra_kernels::hydra::{backward, forward};
use hydra_kernels::{AdapterRef, Dropouts, Gate, HydraShape, Isa, Routing, Weight, Workspace};

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// A forward and a backward pass on buffers of the stack.
#[unsafe(no_mangle)]
pub extern "C" fn hydra_step() -> i32 {
    let shape = HydraShape { tokens: 2, d_in: 4, d_out: 3, rank: 1, lora_heads: 2, per_head_a: false, router: true };
    let (x, w, a, b) = ([0.5; 8], [0.25; 12], [0.125; 12], [1.0; 6]);
    let (mut y, mut adapter_state) = ([0.0; 6], [0.0; 6]);
    let (mut dx, mut da, mut db) = ([0.0; 8], [0.0; 12], [0.0; 6]);
    let mut memory = [0.0; 4096];
    let workspace = &mut Workspace::new(&mut memory);
    let adapter = AdapterRef { a: &a, b: &b, scale: 1.0 };
    let isa = Isa::detect();
    let Ok(weight) = Weight::from_f32(3, 4, &w) else { return 1 };
    let gate = Gate::Router(Routing::default());
    let none = Dropouts::default();
    let forth = forward::<f32>(isa, &shape, &mut y, &mut adapter_state, &x, weight, adapter, gate, none, workspace);
    let (dx, da, db) = (&mut dx, &mut da, &mut db);
    let back = backward::<f32>(isa, &shape, dx, da, db, &y, &x, weight, adapter, &adapter_state, gate, none, workspace);
    i32::from(forth.is_err() || back.is_err())
}
