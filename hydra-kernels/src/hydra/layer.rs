//! The operator's arguments: a layer with its parameters, and the inputs of a call.

use super::dropout::Dropout;
use super::gate::Gate;
use super::product::check_residual;
use crate::error::{Error, exact, product};
use crate::gemm::{Values, ValuesMut};
use crate::quant::Weight;
use crate::shape::HydraShape;
use core::ops::Range;

/// A frozen linear layer and, where there is one, its adapter.
#[derive(Clone, Copy, Debug)]
pub struct HydraLayer<'a> {
    /// W [d_out, d_in].
    pub weight: Weight<'a>,
    /// Without an adapter, the operator is the product with W.
    pub adapter: Option<AdapterRef<'a>>,
}

/// An adapter's kind and its parameters, row-major.
#[derive(Clone, Copy, Debug)]
pub struct AdapterRef<'a> {
    /// The sizes; d_in and d_out are the weight's.
    pub shape: HydraShape,
    /// \[A; R\], [stacked_rows, d_in].
    pub a: &'a [f32],
    /// B, [d_out, mixed_width]: head e owns columns e·rank .. (e+1)·rank.
    pub b: &'a [f32],
    /// alpha / rank.
    pub scale: f32,
    /// Where the heads' weights come from.
    pub gate: Gate,
}

/// The dropout masks of a training step; by default none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Dropouts {
    /// On A's input, [tokens, d_in]. The router reads x without dropout.
    pub input: Option<Dropout>,
    /// On the mixed heads, [tokens, mixed_width], so that each head has a mask of its own (R-LoRA, arXiv 2502.15455).
    pub mixed: Option<Dropout>,
}

/// The inputs of a forward pass.
#[derive(Clone, Copy, Debug)]
pub struct ForwardArgs<'a> {
    /// Rows of x.
    pub tokens: usize,
    /// [tokens, d_in].
    pub x: Values<'a>,
    /// Added to the result: [tokens, d_out], of y's type.
    pub residual: Option<Values<'a>>,
    /// Each token's head, `[tokens]`; only the label gate reads it.
    pub labels: &'a [u32],
    /// The masks; only the adapter reads them.
    pub dropouts: Dropouts,
}

impl<'a> ForwardArgs<'a> {
    /// For `x` [tokens, d_in], without residual, labels and dropout.
    pub fn new(tokens: usize, x: impl Into<Values<'a>>) -> Self {
        Self { tokens, x: x.into(), residual: None, labels: &[], dropouts: Dropouts::default() }
    }
}

/// The inputs of a backward pass, but for the adapter's state.
#[derive(Clone, Copy, Debug)]
pub struct BackwardArgs<'a> {
    /// Rows of x.
    pub tokens: usize,
    /// The gradient of y, [tokens, d_out].
    pub dy: Values<'a>,
    /// The forward pass's x, [tokens, d_in].
    pub x: Values<'a>,
    /// The forward pass's labels.
    pub labels: &'a [u32],
    /// The forward pass's masks.
    pub dropouts: Dropouts,
    /// Coefficient of the load-balancing loss over these tokens, whose gradient is added to that of a router's gate; 0
    /// for none.
    pub load_balance: f32,
}

impl<'a> BackwardArgs<'a> {
    /// For `dy` [tokens, d_out] and `x` [tokens, d_in], without labels, dropout and load-balancing loss.
    pub fn new(tokens: usize, dy: impl Into<Values<'a>>, x: impl Into<Values<'a>>) -> Self {
        Self { tokens, dy: dy.into(), x: x.into(), labels: &[], dropouts: Dropouts::default(), load_balance: 0.0 }
    }
}

impl HydraLayer<'_> {
    /// The adapter's shape, or [`HydraShape::frozen`].
    pub fn shape(&self) -> HydraShape {
        let frozen = HydraShape::frozen(self.weight.cols(), self.weight.rows());
        self.adapter.map_or(frozen, |adapter| adapter.shape)
    }

    /// An error unless a forward pass's results have the layer's sizes, `y` [tokens, d_out] and `adapter_state` [tokens,
    /// state_width], and the residual y's type.
    pub fn check_outputs(&self, args: &ForwardArgs<'_>, y: &ValuesMut<'_>, adapter_state: &[f32]) -> Result<(), Error> {
        self.shape().check_columns()?;
        exact("y", product(args.tokens, self.weight.rows())?, y.len())?;
        exact("adapter_state", product(args.tokens, self.shape().state_width())?, adapter_state.len())?;
        check_residual(y, args.residual)
    }

    /// An error unless the matrices, the labels and x fit together for `tokens` rows.
    pub(super) fn check(&self, tokens: usize, x: Values<'_>, labels: &[u32]) -> Result<(), Error> {
        self.shape().check_columns()?;
        exact("x", product(tokens, self.weight.cols())?, x.len())?;
        product(tokens, self.weight.rows())?;
        let Some(AdapterRef { shape, a, b, gate, .. }) = self.adapter else { return Ok(()) };
        shape.validate(tokens)?;
        exact("rows of weight", shape.d_out, self.weight.rows())?;
        exact("columns of weight", shape.d_in, self.weight.cols())?;
        exact("a", product(shape.stacked_rows(), shape.d_in)?, a.len())?;
        exact("b", product(shape.d_out, shape.mixed_width())?, b.len())?;
        gate.validate(&shape)?;
        if gate == Gate::Label { exact("labels", tokens, labels.len()) } else { Ok(()) }
    }

    /// The rows of \[A; R\] by what they read. The second range is empty if all of them read the same.
    pub(super) fn stacked_parts(&self, dropouts: &Dropouts) -> [StackedPart; 2] {
        let (shape, dropout) = (self.shape(), dropouts.input);
        let (end, factor) = match dropout {
            Some(dropout) => (shape.a_rows(), dropout.scale()),
            None => (shape.stacked_rows(), 1.0),
        };
        [
            StackedPart { first: 0, rows: end, dropout, factor },
            StackedPart { first: end, rows: shape.stacked_rows() - end, dropout: None, factor: 1.0 },
        ]
    }
}

/// Some rows of \[A; R\] that are multiplied by the same matrix: by x, or by x after dropout.
#[derive(Clone, Copy, Debug)]
pub struct StackedPart {
    pub(super) first: usize,
    pub(super) rows: usize,
    pub(super) dropout: Option<Dropout>,
    /// 1 / (1 − p): the dropped input itself is not scaled.
    pub(super) factor: f32,
}

impl StackedPart {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Whether they read x after dropout.
    pub fn reads_dropped(&self) -> bool {
        self.dropout.is_some()
    }
}

/// The labels of `rows`, if the gate reads labels.
pub(super) fn labels_of<'a>(gate: Gate, labels: &'a [u32], rows: &Range<usize>) -> &'a [u32] {
    if gate == Gate::Label { &labels[rows.clone()] } else { &[] }
}

/// An error unless `range` lies in `0..limit`.
pub(super) fn inside(operand: &'static str, range: &Range<usize>, limit: usize) -> Result<(), Error> {
    if range.start <= range.end && range.end <= limit {
        Ok(())
    } else {
        Err(Error::Range { operand, limit, got: range.end.max(range.start) })
    }
}
