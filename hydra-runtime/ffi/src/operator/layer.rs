//! A layer, and the inputs that both passes read.

use super::kinds::{Plain, format};
use super::memory::{Span, count};
use crate::adapter::hydra_gate;
use crate::arguments::slice;
use crate::error::{Result, invalid};
use crate::train::HYDRA_NO_LORA_HEAD;
use half::bf16;
use hydra_runtime::hydra_kernels::hydra::HydraLayer;
use hydra_runtime::hydra_kernels::{
    AdapterRef, Dropout, Dropouts, Gate, HydraShape, Routing, RowOrder, Values, Weight,
};
use std::ffi::c_void;

/// A frozen linear layer and its adapter. Matrices are row-major.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hydra_layer {
    /// Columns of x.
    pub d_in: usize,
    /// Columns of y.
    pub d_out: usize,
    /// W [d_out, d_in], in the format `weight_type`, at any alignment.
    pub weight: *const c_void,
    /// Bytes of `weight`.
    pub weight_bytes: usize,
    /// A hydra_type.
    pub weight_type: i32,
    /// What is multiplied in: HYDRA_TYPE_F32, or HYDRA_TYPE_BF16 with sums in f32.
    pub product_type: i32,
    /// Rank of each head. 0: there is no adapter, and what follows isn't read.
    pub rank: usize,
    /// Number of heads, N.
    pub lora_heads: usize,
    /// Not 0: each head has an A of its own.
    pub per_head_a: i32,
    /// A hydra_gate. Only HYDRA_GATE_ROUTER has the router's rows R.
    pub gate: i32,
    /// The router's logits are divided by it; 1 as published.
    pub temperature: f32,
    /// Only this many of a token's largest logits take part; 0 for all.
    pub top_k: usize,
    /// alpha / rank.
    pub scale: f32,
    /// A over R: [a_rows + N with a router, d_in], where a_rows is rank, or N · rank with an A for each head.
    pub a: *const f32,
    /// Values of `a`.
    pub a_len: usize,
    /// B [d_out, N · rank]: head e has columns e · rank to (e + 1) · rank.
    pub b: *const f32,
    /// Values of `b`.
    pub b_len: usize,
}

impl hydra_layer {
    fn gate(&self) -> Result<Gate> {
        let top_k = if self.top_k == 0 { usize::MAX } else { self.top_k };
        match self.gate {
            g if g == hydra_gate::Router as i32 => Ok(Gate::Router(Routing { temperature: self.temperature, top_k })),
            g if g == hydra_gate::Label as i32 => Ok(Gate::Label),
            g if g == hydra_gate::Uniform as i32 => Ok(Gate::Uniform),
            g if g == hydra_gate::One as i32 => Ok(Gate::One),
            g => Err(invalid(format!("gate: {g} is no hydra_gate"))),
        }
    }

    /// The sizes alone; no pointer is read.
    pub(super) fn shape(&self) -> Result<HydraShape> {
        let &Self { d_in, d_out, rank, lora_heads, .. } = self;
        count(d_in, d_out)?;
        if rank == 0 {
            return Ok(HydraShape::frozen(d_in, d_out));
        }
        let router = matches!(self.gate()?, Gate::Router(_));
        let shape = HydraShape { d_in, d_out, rank, lora_heads, per_head_a: self.per_head_a != 0, router };
        shape.validate(0)?;
        Ok(shape)
    }

    /// # Safety
    /// Pointers are valid for reads of what their lengths say, during `'a`.
    pub(super) unsafe fn read<'a>(&self) -> Result<HydraLayer<'a>> {
        let shape = self.shape()?;
        // SAFETY: the caller's word.
        let bytes = unsafe { slice("weight", self.weight.cast::<u8>(), self.weight_bytes)? };
        let weight = Weight::new(format(self.weight_type)?, self.d_out, self.d_in, bytes, RowOrder::Natural)?;
        if self.rank == 0 {
            return Ok(HydraLayer { weight, adapter: None });
        }
        if !self.scale.is_finite() {
            return Err(invalid(format!("scale: expected a finite number, found {}", self.scale)));
        }
        // SAFETY: the caller's word.
        let (a, b) = unsafe { (slice("a", self.a, self.a_len)?, slice("b", self.b, self.b_len)?) };
        Ok(HydraLayer { weight, adapter: Some(AdapterRef { shape, a, b, scale: self.scale, gate: self.gate()? }) })
    }

    /// The labels, if they are read.
    pub(super) fn label_span(&self, data: *const u32, tokens: usize) -> Result<Span> {
        let read = self.rank > 0 && self.gate == hydra_gate::Label as i32;
        Ok(Span::new("labels", data, if read { count(tokens, 4)? } else { 0 }))
    }

    pub(super) fn spans(&self) -> [Span; 3] {
        let bytes = |len: usize| if self.rank == 0 { 0 } else { len.saturating_mul(4) };
        [
            Span::new("weight", self.weight, self.weight_bytes),
            Span::new("a", self.a, bytes(self.a_len)),
            Span::new("b", self.b, bytes(self.b_len)),
        ]
    }
}

/// # Safety
/// As for [`slice`].
pub(super) unsafe fn values<'a>(what: &str, plain: Plain, data: *const c_void, len: usize) -> Result<Values<'a>> {
    // SAFETY: the caller's word.
    unsafe {
        Ok(match plain {
            Plain::F32 => Values::F32(slice(what, data.cast::<f32>(), len)?),
            Plain::Bf16 => Values::Bf16(slice(what, data.cast::<bf16>(), len)?),
        })
    }
}

/// The labels, if they are read: each of them a head, or none.
///
/// # Safety
/// As for [`slice`].
pub(super) unsafe fn labels<'a>(layer: &HydraLayer<'_>, data: *const u32, tokens: usize) -> Result<&'a [u32]> {
    let Some(adapter) = layer.adapter.filter(|adapter| adapter.gate == Gate::Label) else { return Ok(&[]) };
    // SAFETY: the caller's word.
    let labels = unsafe { slice("labels", data, tokens)? };
    let heads = adapter.shape.lora_heads;
    let wrong = |&(_, &label): &(usize, &u32)| label as usize >= heads && label != HYDRA_NO_LORA_HEAD;
    match labels.iter().enumerate().find(wrong) {
        Some((token, label)) => Err(invalid(format!("labels: token {token} is for head {label} of {heads}"))),
        None => Ok(labels),
    }
}

pub(super) fn dropouts(p: f32, seed: u64) -> Result<Dropouts> {
    if !(0.0..=1.0).contains(&p) {
        return Err(invalid(format!("dropout: expected a probability, found {p}")));
    }
    let mask = Dropout { p, seed, first_row: 0 };
    Ok(Dropouts { input: (p > 0.0).then_some(mask), mixed: None })
}
