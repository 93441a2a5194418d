//! A forward pass.

use super::kinds::{Plain, bytes, part_scratch, plain};
use super::layer::{dropouts, hydra_layer, labels, values};
use super::memory::{Part, Shared, Span, count, disjoint};
use super::thread::hydra_thread;
use crate::arguments::{Out, reference, slice_mut};
use crate::error::{Result, door, hydra_status};
use half::bf16;
use hydra_runtime::hydra_kernels::hydra::{ForwardArgs, ThreadColumns, forward_columns, forward_columns_scratch};
use hydra_runtime::hydra_kernels::{Bf16Isa, Element, Float, HydraShape, Isa, Scratch, ValuesMut};
use std::ffi::c_void;

/// A forward pass: y = x Wᵀ + scale · Σ gate_e (x Aᵀ) B_eᵀ.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hydra_forward_args {
    /// Rows of x and y.
    pub tokens: usize,
    /// Of x and y: HYDRA_TYPE_F32 or HYDRA_TYPE_BF16.
    pub element: i32,
    /// [tokens, d_in].
    pub x: *const c_void,
    /// [tokens, d_out], written.
    pub y: *mut c_void,
    /// What a backward pass needs: [tokens, a_rows + N], written; null if it isn't needed.
    pub adapter_state: *mut f32,
    /// For HYDRA_GATE_LABEL: each token's head, or HYDRA_NO_LORA_HEAD.
    pub labels: *const u32,
    /// Probability of dropping a value of A's input; 0 outside of training.
    pub dropout: f32,
    /// Chooses what is dropped.
    pub dropout_seed: u64,
}

impl hydra_forward_args {
    /// An error unless what is written is apart from everything else.
    fn check(&self, raw: &hydra_layer, shape: &HydraShape, element: Plain, thread: &hydra_thread) -> Result<()> {
        let written = [
            Span::new("y", self.y, count(self.tokens, shape.d_out)? * bytes(element)),
            Span::new("adapter_state", self.adapter_state, count(self.tokens, shape.state_width())? * 4),
            thread.span(),
        ];
        let x = Span::new("x", self.x, count(self.tokens, shape.d_in)? * bytes(element));
        disjoint(&written, &[x, raw.label_span(self.labels, self.tokens)?])?;
        disjoint(&written, &raw.spans())
    }
}

fn forward_need<E: Element>(shape: &HydraShape, args: &hydra_forward_args, nth: usize) -> Result<Scratch> {
    let (tokens, element) = (args.tokens, plain("element", args.element)?);
    let columns = ThreadColumns::new(shape, 0, nth).y.len();
    let state = Scratch::lines::<f32>(tokens.saturating_mul(shape.state_width()));
    let operator = forward_columns_scratch::<E>(shape, tokens, columns, args.dropout > 0.0);
    Ok(state.and(part_scratch(element, tokens, columns)).and(operator))
}

/// Writes the floats of scratch that each of `nth` threads needs for a forward pass to `floats`. Of `args`, only tokens,
/// element and dropout are read. Any thread may call it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_forward_scratch(
    layer: *const hydra_layer,
    args: *const hydra_forward_args,
    nth: usize,
    floats: *mut usize,
) -> hydra_status {
    // SAFETY: the caller's word, for all.
    door(|| unsafe {
        let (layer, args) = (reference("layer", layer)?, reference("args", args)?);
        let (out, shape) = (Out::new("floats", floats)?, layer.shape()?);
        out.set(match plain("product_type", layer.product_type)? {
            Plain::F32 => forward_need::<f32>(&shape, args, nth)?.0,
            Plain::Bf16 => forward_need::<bf16>(&shape, args, nth)?.0,
        });
        Ok(())
    })
}

/// What thread `ith` of `nth` does of a forward pass. After all of them have returned, y and adapter_state are complete.
///
/// Each of the threads calls it once, with the same layer and args, at the same time or one after the other. Results have
/// the same bits for any number of threads. It allocates nothing, unless for an error's text, and starts no threads. All
/// memory is the caller's; what is written must not overlap with anything else.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_forward(
    layer: *const hydra_layer,
    args: *const hydra_forward_args,
    thread: *const hydra_thread,
) -> hydra_status {
    // SAFETY: the caller's word, for all.
    door(|| unsafe {
        let (layer, args) = (reference("layer", layer)?, reference("args", args)?);
        let thread = reference("thread", thread)?;
        with_types!(forward, layer, args, thread)
    })
}

unsafe fn forward<E: Element, T: Float>(
    isa: E::Isa,
    raw: &hydra_layer,
    args: &hydra_forward_args,
    thread: &hydra_thread,
) -> Result<()>
where
    for<'a> &'a mut [T]: Into<ValuesMut<'a>>,
{
    // SAFETY: the caller's word.
    let (layer, element) = (unsafe { raw.read()? }, plain("element", args.element)?);
    let (shape, tokens) = (layer.shape(), args.tokens);
    args.check(raw, &shape, element, thread)?;
    // SAFETY: the caller's word.
    let (x, labels) = unsafe {
        let x = values("x", element, args.x, count(tokens, shape.d_in)?)?;
        (x, labels(&layer, args.labels, tokens)?)
    };
    let dropouts = dropouts(args.dropout, args.dropout_seed)?;
    let arguments = ForwardArgs { labels, dropouts, ..ForwardArgs::new(tokens, x) };
    let (columns, state_len) = (thread.columns(&shape)?.y, count(tokens, shape.state_width())?);
    // SAFETY: the caller's word.
    let mut workspace = unsafe { thread.workspace(forward_need::<E>(&shape, args, thread.nth)?)? };
    if columns.is_empty() && thread.ith > 0 {
        return Ok(());
    }
    let state = if thread.ith == 0 && !args.adapter_state.is_null() {
        // SAFETY: the caller's word; other threads don't use it.
        unsafe { slice_mut("adapter_state", args.adapter_state, state_len)? }
    } else {
        workspace.take_lines::<f32>(state_len)?
    };
    let y = Shared { data: args.y.cast::<T>(), rows: tokens, width: shape.d_out };
    // SAFETY: the caller's word; other threads have other columns.
    let mut part = unsafe { y.part("y", &columns, &mut workspace)? };
    forward_columns::<E>(isa, &layer, &arguments, columns.clone(), (part.get(), state), &mut workspace)?;
    if let Part::Apart(part) = part {
        // SAFETY: as for `part`.
        unsafe { y.put(&columns, part, |_, new| new) };
    }
    Ok(())
}
