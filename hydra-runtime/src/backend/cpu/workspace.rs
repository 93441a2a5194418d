//! Memory that the CPU backend reuses from one operation to the next.

use super::aligned::Aligned;
use crate::Result;
use bytemuck::Pod;
use hydra_kernels::hydra::{MIN_BLOCK, PANEL_VALUES};
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

/// Memory that grows to the largest size asked for, for f32 or bf16 values, or for structs of whole words.
#[derive(Default)]
pub(super) struct Area(Aligned<u64>);

impl Area {
    /// `len` values; what they hold is not specified.
    pub fn take<T: Pod>(&mut self, len: usize) -> Result<&mut [T]> {
        let words = len.saturating_mul(size_of::<T>()).div_ceil(size_of::<u64>());
        Ok(&mut bytemuck::cast_slice_mut(&mut self.0.reserve(words)?[..words])[..len])
    }
}

/// The memory of one operation: an area for each of its operands that are alive at the same time.
#[derive(Default)]
pub(super) struct Workspace {
    /// Panels of the frozen weight.
    pub panels: Area,
    /// Panels of the adapter's part of a product in the backward pass.
    pub adapter_panels: Area,
    /// Panels of [A; R] where the state is computed again, of B in the backward pass.
    pub lora_panels: Area,
    /// With dropout on the adapter's input: panels of R where the state is computed again, of A in the backward pass.
    pub dropout_panels: Area,
    /// Panels of each part's adapter in the forward pass.
    pub parts: Vec<PartPanels>,
    /// x in f32, where weights are read as they are stored.
    pub widened: Area,
    /// x in eight bits, [tokens, blocks], where products are integers.
    pub quantized: Area,
    /// The mixed heads, [tokens, lora_heads * rank].
    pub mixed: Area,
    /// Gradient of `adapter_state`.
    pub d_adapter_state: Area,
    /// The adapter's input after dropout.
    pub dropped: Area,
    /// A gradient of [A; R] by blocks of columns.
    pub gradient: Area,
}

/// Panels of an adapter in the forward pass.
#[derive(Default)]
pub(super) struct PartPanels {
    /// [A; R], or A alone with dropout on the adapter's input.
    pub stacked: Area,
    /// R, with dropout on the adapter's input.
    pub router: Area,
    /// A block of columns of B.
    pub lora_up: Area,
}

impl Workspace {
    /// An estimate of its bytes at `tokens` rows, for a model whose widest matrix dimension is `widest`.
    pub fn bytes(tokens: usize, widest: usize, threads: usize) -> u64 {
        let rows = 2 * tokens * widest;
        let panels = 2 * PANEL_VALUES.max(MIN_BLOCK * widest);
        let scratch = threads * PANEL_VALUES;
        4 * (rows + panels + scratch) as u64
    }
}

/// As many workspaces as operations have run at once. An operation takes one out, so that none is locked while it runs.
#[derive(Default)]
pub(super) struct Workspaces(Mutex<Vec<Workspace>>);

impl Workspaces {
    /// A workspace that is the caller's alone until it is dropped.
    pub fn take(&self) -> Taken<'_> {
        // What a panicking call left behind is overwritten before it is read.
        let free = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Taken { workspaces: self, workspace: free.unwrap_or_default() }
    }
}

/// A workspace in use.
pub(super) struct Taken<'a> {
    workspaces: &'a Workspaces,
    workspace: Workspace,
}

impl Deref for Taken<'_> {
    type Target = Workspace;

    fn deref(&self) -> &Workspace {
        &self.workspace
    }
}

impl DerefMut for Taken<'_> {
    fn deref_mut(&mut self) -> &mut Workspace {
        &mut self.workspace
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let workspace = std::mem::take(&mut self.workspace);
        self.workspaces.0.lock().unwrap_or_else(PoisonError::into_inner).push(workspace);
    }
}
