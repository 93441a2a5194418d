//! A backward pass.

use super::kinds::{Plain, bytes, part_scratch, plain};
use super::layer::{dropouts, hydra_layer, labels, values};
use super::memory::{Part, Shared, Span, count, disjoint};
use super::thread::hydra_thread;
use crate::arguments::{Out, reference, slice, slice_mut};
use crate::error::{Result, door, hydra_status, invalid};
use half::bf16;
use hydra_runtime::hydra_kernels::hydra::{
    BackwardArgs, ColumnGradients, HydraLayer, ThreadColumns, backward_columns, backward_columns_scratch,
};
use hydra_runtime::hydra_kernels::{Bf16Isa, Element, Float, HydraShape, Isa, Scratch, ValuesMut};
use std::ffi::c_void;

/// A backward pass. Its x, labels and dropout are the forward pass's.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hydra_backward_args {
    /// Rows of x and y.
    pub tokens: usize,
    /// Of x, dy and dx: HYDRA_TYPE_F32 or HYDRA_TYPE_BF16.
    pub element: i32,
    /// The gradient of y, [tokens, d_out].
    pub dy: *const c_void,
    /// [tokens, d_in].
    pub x: *const c_void,
    /// What the forward pass wrote. Not read without an adapter.
    pub adapter_state: *const f32,
    /// The gradient of x, [tokens, d_in], written; null if it isn't needed.
    pub dx: *mut c_void,
    /// The gradient of A over R, of the size of `a`, added to; null together with `db` if it isn't needed.
    pub da: *mut f32,
    /// The gradient of B, of the size of `b`, added to.
    pub db: *mut f32,
    /// As in the forward pass.
    pub labels: *const u32,
    /// As in the forward pass.
    pub dropout: f32,
    /// As in the forward pass.
    pub dropout_seed: u64,
    /// Weight of the load-balancing loss, whose gradient is added to the router's; 0 for none.
    pub load_balance: f32,
}

fn backward_need<E: Element>(shape: &HydraShape, args: &hydra_backward_args, nth: usize) -> Result<Scratch> {
    let (tokens, element) = (args.tokens, plain("element", args.element)?);
    let columns = ThreadColumns::new(shape, 0, nth).x.len();
    let parts = part_scratch(element, tokens, columns).and(part_scratch(Plain::F32, shape.stacked_rows(), columns));
    let dropping = args.dropout > 0.0 && shape.rank > 0;
    Ok(parts.and(backward_columns_scratch::<E>(shape, tokens, columns, dropping)))
}

/// Writes the floats of scratch that each of `nth` threads needs for a backward pass to `floats`. Of `args`, only tokens,
/// element and dropout are read. Any thread may call it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_backward_scratch(
    layer: *const hydra_layer,
    args: *const hydra_backward_args,
    nth: usize,
    floats: *mut usize,
) -> hydra_status {
    // SAFETY: the caller's word, for all.
    door(|| unsafe {
        let (layer, args) = (reference("layer", layer)?, reference("args", args)?);
        let (out, shape) = (Out::new("floats", floats)?, layer.shape()?);
        out.set(match plain("product_type", layer.product_type)? {
            Plain::F32 => backward_need::<f32>(&shape, args, nth)?.0,
            Plain::Bf16 => backward_need::<bf16>(&shape, args, nth)?.0,
        });
        Ok(())
    })
}

/// What thread `ith` of `nth` does of a backward pass. After all of them have returned, dx, da and db are complete.
///
/// Otherwise as hydra_forward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_backward(
    layer: *const hydra_layer,
    args: *const hydra_backward_args,
    thread: *const hydra_thread,
) -> hydra_status {
    // SAFETY: the caller's word, for all.
    door(|| unsafe {
        let (layer, args) = (reference("layer", layer)?, reference("args", args)?);
        let thread = reference("thread", thread)?;
        with_types!(backward, layer, args, thread)
    })
}

impl hydra_backward_args {
    /// # Safety
    /// Pointers are valid for reads of what the layer and `tokens` say.
    unsafe fn read<'a>(&self, layer: &HydraLayer<'_>, element: Plain) -> Result<BackwardArgs<'a>> {
        let (shape, tokens) = (layer.shape(), self.tokens);
        if !self.load_balance.is_finite() {
            return Err(invalid(format!("load_balance: expected a finite number, found {}", self.load_balance)));
        }
        // SAFETY: the caller's word.
        let (dy, x, labels) = unsafe {
            let dy = values("dy", element, self.dy, count(tokens, shape.d_out)?)?;
            let x = values("x", element, self.x, count(tokens, shape.d_in)?)?;
            (dy, x, labels(layer, self.labels, tokens)?)
        };
        let (dropouts, load_balance) = (dropouts(self.dropout, self.dropout_seed)?, self.load_balance);
        Ok(BackwardArgs { tokens, dy, x, labels, dropouts, load_balance })
    }

    /// An error unless what is written is apart from everything else.
    fn check(&self, raw: &hydra_layer, shape: &HydraShape, element: Plain, thread: &hydra_thread) -> Result<()> {
        if self.da.is_null() != self.db.is_null() {
            return Err(invalid("da and db: expected both or neither, found one that is null"));
        }
        let (x, y) = (count(self.tokens, shape.d_in)?, count(self.tokens, shape.d_out)?);
        let (da, db) = (count(shape.stacked_rows(), shape.d_in)?, count(shape.d_out, shape.mixed_width())?);
        let written = [
            Span::new("dx", self.dx, x * bytes(element)),
            Span::new("da", self.da, da * 4),
            Span::new("db", self.db, db * 4),
            thread.span(),
        ];
        let read = [
            Span::new("dy", self.dy, y * bytes(element)),
            Span::new("x", self.x, x * bytes(element)),
            Span::new("adapter_state", self.adapter_state, count(self.tokens, shape.state_width())? * 4),
            raw.label_span(self.labels, self.tokens)?,
        ];
        disjoint(&written, &read)?;
        disjoint(&written, &raw.spans())
    }
}

unsafe fn backward<E: Element, T: Float>(
    isa: E::Isa,
    raw: &hydra_layer,
    args: &hydra_backward_args,
    thread: &hydra_thread,
) -> Result<()>
where
    for<'a> &'a mut [T]: Into<ValuesMut<'a>>,
{
    // SAFETY: the caller's word.
    let (layer, element) = (unsafe { raw.read()? }, plain("element", args.element)?);
    let (shape, tokens, width) = (layer.shape(), args.tokens, layer.shape().mixed_width());
    args.check(raw, &shape, element, thread)?;
    // SAFETY: the caller's word.
    let (arguments, adapter_state) = unsafe {
        let state = slice("adapter_state", args.adapter_state, count(tokens, shape.state_width())?)?;
        (args.read(&layer, element)?, state)
    };
    let columns = thread.columns(&shape)?;
    // SAFETY: the caller's word.
    let mut workspace = unsafe { thread.workspace(backward_need::<E>(&shape, args, thread.nth)?)? };
    if columns.x.is_empty() && columns.y.is_empty() {
        return Ok(());
    }
    let dx = (!args.dx.is_null()).then(|| Shared { data: args.dx.cast::<T>(), rows: tokens, width: shape.d_in });
    let da = (layer.adapter.is_some() && !args.da.is_null()).then(|| Shared {
        data: args.da,
        rows: shape.stacked_rows(),
        width: shape.d_in,
    });
    let (mut dx_part, mut da_part, mut db) = (None, None, &mut [][..]);
    // SAFETY: the caller's word; other threads have other columns. Those of y are rows of B, which lie together.
    unsafe {
        if let Some(dx) = &dx {
            dx_part = Some(dx.part("dx", &columns.x, &mut workspace)?);
        }
        if let Some(da) = &da {
            da_part = Some(da.part("da", &columns.x, &mut workspace)?);
            db = slice_mut("db", args.db.wrapping_add(columns.y.start * width), columns.y.len() * width)?;
        }
    }
    if let Some(Part::Apart(part)) = &mut da_part {
        part.fill(0.0);
    }
    let gradients = ColumnGradients {
        dx: dx_part.as_mut().map(|part| part.get().into()),
        adapter: da_part.as_mut().map(|part| [part.get(), db]),
    };
    backward_columns::<E>(isa, &layer, &arguments, adapter_state, &columns, gradients, &mut workspace)?;
    if let (Some(dx), Some(Part::Apart(part))) = (&dx, dx_part) {
        // SAFETY: as for `part`.
        unsafe { dx.put(&columns.x, part, |_, new| new) };
    }
    if let (Some(da), Some(Part::Apart(part))) = (&da, da_part) {
        // SAFETY: as for `part`.
        unsafe { da.put(&columns.x, part, |old, new| old + new) };
    }
    Ok(())
}
