//! Adapters.

use crate::arguments::{Out, c_text, optional};
use crate::error::{Result, door, hydra_status, invalid};
use crate::handle::{self, Object, Table};
use crate::model::hydra_model;
use hydra_runtime::adapter::{Adapter, AdapterConfig, GateKind, HeadInit, Method};
use hydra_runtime::model::{AttachedAdapter, Model};
use hydra_runtime::projection::Projection;
use std::ffi::c_char;

/// An adapter that is attached to a model. 0 is no adapter.
pub type hydra_adapter = u64;

/// An adapter in memory, and on its model's device.
pub(crate) struct Attached {
    pub adapter: Adapter,
    pub attached: AttachedAdapter,
}

impl Object for Attached {
    const KIND: usize = 2;
    fn table() -> &'static Table<Self> {
        static TABLE: Table<Attached> = Table::new();
        &TABLE
    }
}

/// Gives an adapter, attached to `model`, a handle.
pub(crate) fn insert(model: &Model, adapter: Adapter) -> Result<hydra_adapter> {
    let attached = model.attach(&adapter)?;
    handle::insert(Attached { adapter, attached })
}

/// How matrices A are shared.
#[repr(i32)]
#[derive(Clone, Copy)]
pub enum hydra_method {
    /// One A, a B for each head.
    Hydra = 0,
    /// One A, one B.
    Lora = 1,
    /// An A and a B for each head.
    Split = 2,
}

/// What weighs the heads.
#[repr(i32)]
#[derive(Clone, Copy)]
pub enum hydra_gate {
    /// Softmax of a learned router.
    Router = 0,
    /// Each sequence, or in the operator each token, names its head.
    Label = 1,
    /// 1/N for each of N heads.
    Uniform = 2,
    /// 1 for each head.
    One = 3,
}

/// A linear layer of a block, as a bit of `hydra_adapter_options.targets`.
#[repr(u32)]
#[derive(Clone, Copy)]
pub enum hydra_projection {
    /// Queries.
    Q = 1,
    /// Keys.
    K = 2,
    /// Values.
    V = 4,
    /// The attention's output.
    O = 8,
    /// The feed-forward's gate.
    Gate = 16,
    /// The feed-forward's input.
    Up = 32,
    /// The feed-forward's output.
    Down = 64,
}

/// Kind and sizes of a new adapter.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hydra_adapter_options {
    /// A hydra_method.
    pub method: i32,
    /// A hydra_gate.
    pub gate: i32,
    /// Rank of each head.
    pub rank: usize,
    /// Number of heads.
    pub lora_heads: usize,
    /// The heads' sum is scaled by alpha / rank.
    pub alpha: f32,
    /// Probability of dropping a value of A's input in training.
    pub dropout: f32,
    /// Probability of dropping a value of the mixed heads in training.
    pub head_dropout: f32,
    /// The router's logits are divided by it. Under any other gate 1.
    pub temperature: f32,
    /// Only so many of a token's largest logits take part; 0 for all. Under any gate but the router's 0.
    pub top_k: usize,
    /// Weight of the load-balancing loss in training; 0 for none.
    pub load_balance: f32,
    /// The adapted layers: hydra_projection values, or-ed.
    pub targets: u32,
}

/// HydraLoRA as published: rank 4, four heads, a router, on the feed-forward's three layers. Any thread may call it.
#[unsafe(no_mangle)]
pub extern "C" fn hydra_adapter_options_default() -> hydra_adapter_options {
    let config = AdapterConfig::default();
    let bit = |target: &Projection| 1 << *target as u32;
    hydra_adapter_options {
        method: hydra_method::Hydra as i32,
        gate: hydra_gate::Router as i32,
        rank: config.rank,
        lora_heads: config.lora_heads,
        alpha: config.alpha,
        dropout: config.dropout,
        head_dropout: config.head_dropout,
        temperature: config.temperature,
        top_k: config.top_k.unwrap_or(0),
        load_balance: config.load_balance,
        targets: config.targets.iter().map(bit).sum(),
    }
}

impl hydra_adapter_options {
    fn config(&self) -> Result<AdapterConfig> {
        const METHODS: [Method; 3] = [Method::Hydra, Method::Lora, Method::Split];
        const GATES: [GateKind; 4] = [GateKind::Router, GateKind::Label, GateKind::Uniform, GateKind::One];
        let method = usize::try_from(self.method).ok().and_then(|i| METHODS.get(i));
        let gate = usize::try_from(self.gate).ok().and_then(|i| GATES.get(i));
        if self.targets >> Projection::ALL.len() != 0 {
            return Err(invalid(format!("targets: expected hydra_projection bits, found {:#x}", self.targets)));
        }
        let chosen = |target: &Projection| self.targets >> *target as u32 & 1 == 1;
        Ok(AdapterConfig {
            method: *method
                .ok_or_else(|| invalid(format!("method: expected a hydra_method, found {}", self.method)))?,
            gate: *gate.ok_or_else(|| invalid(format!("gate: expected a hydra_gate, found {}", self.gate)))?,
            rank: self.rank,
            lora_heads: self.lora_heads,
            alpha: self.alpha,
            dropout: self.dropout,
            head_dropout: self.head_dropout,
            temperature: self.temperature,
            top_k: (self.top_k > 0).then_some(self.top_k),
            load_balance: self.load_balance,
            targets: Projection::ALL.into_iter().filter(chosen).collect(),
            head_init: HeadInit::Zero,
            ..AdapterConfig::default()
        })
    }
}

/// Makes a new adapter for the model, which changes nothing yet: A is random by `seed`, B is zero. `options` may be null,
/// for the defaults. Any thread may call it. The caller owns `adapter` and frees it with `hydra_adapter_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_adapter_init(
    model: hydra_model,
    options: *const hydra_adapter_options,
    seed: u64,
    adapter: *mut hydra_adapter,
) -> hydra_status {
    // SAFETY: the caller's word, for all.
    door(|| unsafe {
        let (model, options) = (handle::get::<Model>(model)?, optional("options", options)?);
        let out = Out::new("adapter", adapter)?;
        let options = options.copied().unwrap_or_else(|| hydra_adapter_options_default());
        let adapter = Adapter::init(model.config(), options.config()?, seed)?;
        out.set(insert(&model, adapter)?);
        Ok(())
    })
}

/// Reads an adapter's folder, of this library, of the published implementation or of HF PEFT, for the model. Any thread may
/// call it. The caller owns `adapter` and frees it with `hydra_adapter_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_adapter_load(
    model: hydra_model,
    folder: *const c_char,
    adapter: *mut hydra_adapter,
) -> hydra_status {
    // SAFETY: the caller's word, for all.
    door(|| unsafe {
        let (model, folder) = (handle::get::<Model>(model)?, c_text("folder", folder)?);
        let out = Out::new("adapter", adapter)?;
        out.set(insert(&model, Adapter::load(folder, model.config())?)?);
        Ok(())
    })
}

/// Attaches an adapter to another model of the same sizes; the new handle is as one that was loaded for it. Any thread may
/// call it. The caller owns `attached` and frees it with `hydra_adapter_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_adapter_attach(
    adapter: hydra_adapter,
    model: hydra_model,
    attached: *mut hydra_adapter,
) -> hydra_status {
    // SAFETY: the caller's word.
    door(|| unsafe {
        let (adapter, model) = (handle::get::<Attached>(adapter)?, handle::get::<Model>(model)?);
        let out = Out::new("attached", attached)?;
        out.set(insert(&model, adapter.adapter.clone())?);
        Ok(())
    })
}

/// Copies one head with its A and B as a LoRA, without the gate, for the same model. Of an adapter with the label gate, it
/// generates as trained for that head's label. Any thread may call it. The caller owns `alone` and frees it with
/// `hydra_adapter_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_adapter_head(
    adapter: hydra_adapter,
    head: u32,
    alone: *mut hydra_adapter,
) -> hydra_status {
    // SAFETY: the caller's word.
    door(|| unsafe {
        let (adapter, out) = (handle::get::<Attached>(adapter)?, Out::new("alone", alone)?);
        out.set(insert(adapter.attached.model(), adapter.adapter.head(head as usize)?)?);
        Ok(())
    })
}

/// Writes the adapter's two files into a folder, which is made if need be. Any thread may call it, but not two for one
/// folder at the same time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_adapter_save(adapter: hydra_adapter, folder: *const c_char) -> hydra_status {
    // SAFETY: the caller's word.
    door(|| unsafe {
        let (adapter, folder) = (handle::get::<Attached>(adapter)?, c_text("folder", folder)?);
        Ok(adapter.adapter.save(folder)?)
    })
}

/// Writes the number of the adapter's parameters to `count`. Any thread may call it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_adapter_parameters(adapter: hydra_adapter, count: *mut u64) -> hydra_status {
    // SAFETY: the caller's word.
    door(|| unsafe {
        let (adapter, out) = (handle::get::<Attached>(adapter)?, Out::new("count", count)?);
        out.set(adapter.adapter.parameters());
        Ok(())
    })
}

/// Frees an adapter. Generators and trainers that were made with it stay usable. 0 is allowed. Any thread may call it, even
/// while others use the adapter.
#[unsafe(no_mangle)]
pub extern "C" fn hydra_adapter_free(adapter: hydra_adapter) -> hydra_status {
    door(|| handle::remove::<Attached>(adapter))
}
