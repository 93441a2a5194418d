//! The phases of the forward pass for a handful of tokens.

use super::gate::{activate, mix};
use super::layer::{AdapterRef, Dropouts, ForwardArgs, HydraLayer, inside, labels_of};
use crate::error::{Error, exact};
use crate::gemm::{Float, Values};
use crate::isa::Isa;
use crate::matvec::{matvec, matvec_batch};
use crate::quant::Weight;
use crate::workspace::{Scratch, Workspace};
use core::ops::Range;

/// Up to this many tokens the weights are read as they are stored; above, packing panels pays.
pub const FEW_TOKENS: usize = 4;

/// Whether [`Few`] serves: at most [`FEW_TOKENS`], and no dropout.
pub fn serves(args: &ForwardArgs<'_>) -> bool {
    args.tokens <= FEW_TOKENS && args.dropouts.input.is_none() && args.dropouts.mixed.is_none()
}

/// A forward pass of a few tokens whose arguments have been checked.
///
/// Memory bounds its speed, so weights are read as they are stored and no panel is packed. All arithmetic is f32.
///
/// 1. [`Few::adapter_rows`]: the adapter's state and the mixed heads of all tokens.
/// 2. For each token and each range of y's columns: [`Few::output`].
///
/// A pass of any number of rows, [`Few::batch`], gives each of them the same bits. It reads each weight once:
/// [`Few::products`], then [`Few::add_adapter`], for each range of columns. Rows of several adapters share the
/// products.
#[derive(Clone, Copy)]
pub struct Few<'a> {
    isa: Isa,
    layer: HydraLayer<'a>,
    args: ForwardArgs<'a>,
    x: &'a [f32],
}

/// Scratch of [`Few::output`] for `columns` columns.
pub const fn output_scratch(columns: usize) -> Scratch {
    Scratch::lines::<f32>(columns)
}

impl<'a> Few<'a> {
    /// Checks the arguments. `widened` [tokens, d_in] receives x if it isn't f32.
    pub fn new(isa: Isa, layer: HydraLayer<'a>, args: ForwardArgs<'a>, widened: &'a mut [f32]) -> Result<Self, Error> {
        if !serves(&args) {
            return Err(Error::Shape("a pass of a few tokens has at most 4 and no dropout"));
        }
        Self::batch(isa, layer, args, widened)
    }

    /// The same for any number of rows.
    pub fn batch(
        isa: Isa,
        layer: HydraLayer<'a>,
        args: ForwardArgs<'a>,
        widened: &'a mut [f32],
    ) -> Result<Self, Error> {
        layer.check(args.tokens, args.x, args.labels)?;
        if args.dropouts != Dropouts::default() {
            return Err(Error::Shape("rows whose weights are read as they are stored have no dropout"));
        }
        if let Some(residual) = args.residual {
            exact("residual", args.tokens * layer.weight.rows(), residual.len())?;
        }
        let x = match args.x {
            Values::F32(x) => x,
            Values::Bf16(x) => {
                exact("widened", x.len(), widened.len())?;
                widened.iter_mut().zip(x).for_each(|(wide, x)| *wide = x.widen());
                widened
            }
        };
        Ok(Self { isa, layer, args, x })
    }

    /// Writes `adapter_state` [tokens, state_width], and `mixed` [tokens, mixed_width] = scale · the mixed heads. Does
    /// nothing without an adapter.
    pub fn adapter_rows(&self, adapter_state: &mut [f32], mixed: &mut [f32]) -> Result<(), Error> {
        let Some(AdapterRef { shape, a, scale, gate, .. }) = self.layer.adapter else { return Ok(()) };
        let (isa, tokens, width) = (self.isa, self.args.tokens, shape.state_width());
        exact("adapter_state", tokens * width, adapter_state.len())?;
        exact("mixed", tokens * shape.mixed_width(), mixed.len())?;
        let stacked = Weight::from_f32(shape.stacked_rows(), shape.d_in, a)?;
        for (t, adapter_state) in adapter_state.chunks_exact_mut(width).enumerate() {
            let x = &self.x[t * shape.d_in..][..shape.d_in];
            matvec(isa, &mut adapter_state[..shape.stacked_rows()], stacked, 0, x)?;
        }
        activate(isa, &shape, adapter_state, gate, labels_of(gate, self.args.labels, &(0..tokens)))?;
        mix(isa, &shape, mixed, adapter_state)?;
        mixed.iter_mut().for_each(|value| *value *= scale);
        Ok(())
    }

    /// `y` = columns `columns` of `token`'s row of residual + x Wᵀ + scale · mixed Bᵀ, in f32.
    ///
    /// `mixed` [tokens, mixed_width] is what [`Few::adapter_rows`] left. Scratch: [`output_scratch`]. Writes nothing if
    /// it returns an error.
    pub fn output(
        &self,
        token: usize,
        columns: Range<usize>,
        mixed: &[f32],
        y: &mut [f32],
        workspace: &mut Workspace<'_>,
    ) -> Result<(), Error> {
        let HydraLayer { weight, adapter } = self.layer;
        let (d_in, d_out) = (weight.cols(), weight.rows());
        if token >= self.args.tokens {
            return Err(Error::Range { operand: "token", limit: self.args.tokens, got: token });
        }
        inside("columns", &columns, d_out)?;
        exact("y", columns.len(), y.len())?;
        let width = self.layer.shape().mixed_width();
        exact("mixed", self.args.tokens * width, mixed.len())?;
        let product = workspace.reborrow().take_lines::<f32>(columns.len())?;
        matvec(self.isa, y, weight, columns.start, &self.x[token * d_in..][..d_in])?;
        if let Some(adapter) = adapter {
            let b = Weight::from_f32(d_out, width, adapter.b)?;
            matvec(self.isa, product, b, columns.start, &mixed[token * width..][..width])?;
            add(y, product.iter().copied());
        }
        match self.args.residual.map(|residual| residual.skip(token * d_out + columns.start)) {
            Some(Values::F32(residual)) => add(y, residual.iter().copied()),
            Some(Values::Bf16(residual)) => add(y, residual.iter().map(|x| x.widen())),
            None => {}
        }
        Ok(())
    }
}

/// Scratch of [`Few::add_adapter`] for `tokens` rows and `columns` columns.
pub const fn batch_scratch(tokens: usize, columns: usize) -> Scratch {
    Scratch::lines::<f32>(tokens.saturating_mul(columns))
}

impl Few<'_> {
    /// Number of rows.
    pub fn tokens(&self) -> usize {
        self.args.tokens
    }

    /// `y` [tokens, columns] = columns `columns` of x Wᵀ.
    ///
    /// Writes nothing if it returns an error.
    pub fn products(&self, columns: Range<usize>, y: &mut [f32]) -> Result<(), Error> {
        inside("columns", &columns, self.layer.weight.rows())?;
        exact("y", self.args.tokens * columns.len(), y.len())?;
        matvec_batch(self.isa, y, self.args.tokens, self.layer.weight, columns.start, self.x)
    }

    /// Adds columns `columns` of scale · mixed Bᵀ + residual to `y` [tokens, columns].
    ///
    /// `mixed` [tokens, mixed_width] is what [`Few::adapter_rows`] left. Scratch: [`batch_scratch`]. Writes nothing if
    /// it returns an error.
    pub fn add_adapter(
        &self,
        columns: Range<usize>,
        mixed: &[f32],
        y: &mut [f32],
        workspace: &mut Workspace<'_>,
    ) -> Result<(), Error> {
        let HydraLayer { weight, adapter } = self.layer;
        let (tokens, d_out, width) = (self.args.tokens, weight.rows(), self.layer.shape().mixed_width());
        inside("columns", &columns, d_out)?;
        exact("y", tokens * columns.len(), y.len())?;
        exact("mixed", tokens * width, mixed.len())?;
        let product = workspace.reborrow().take_lines::<f32>(y.len())?;
        if let Some(adapter) = adapter {
            let b = Weight::from_f32(d_out, width, adapter.b)?;
            matvec_batch(self.isa, product, tokens, b, columns.start, mixed)?;
            add(y, product.iter().copied());
        }
        let Some(residual) = self.args.residual else { return Ok(()) };
        for (t, y) in y.chunks_exact_mut(columns.len().max(1)).enumerate() {
            match residual.skip(t * d_out + columns.start) {
                Values::F32(residual) => add(y, residual.iter().copied()),
                Values::Bf16(residual) => add(y, residual.iter().map(|x| x.widen())),
            }
        }
        Ok(())
    }
}

fn add(y: &mut [f32], x: impl Iterator<Item = f32>) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
}
