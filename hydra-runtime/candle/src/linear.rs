//! A linear layer with an adapter, as candle's models use layers.

use crate::operator::{Call, Operator, rows};
use crate::weight::FrozenWeight;
use candle_core::{Device, Error, Module, Result, Tensor, Var};
use hydra_runtime::adapter::{Adapter, AdapterConfig, AdapterPair};
use hydra_runtime::backend::cpu::Cpu;
use hydra_runtime::hydra_kernels::Gate;
use hydra_runtime::projection::Projection;
use std::sync::Arc;

/// y = x Wᵀ + bias + scale · Σₑ gateₑ · (x Aᵀ) Bₑᵀ, with W and the bias frozen.
///
/// Cloning is cheap, and clones share the adapter's parameters.
#[derive(Clone)]
pub struct HydraLinear {
    operator: Arc<Operator>,
    bias: Option<Tensor>,
    /// [A; R], [stacked_rows, d_in].
    a: Var,
    /// [d_out, lora_heads · rank].
    b: Var,
    trains: bool,
}

impl HydraLinear {
    /// A layer over `weight` [d_out, d_in] with the adapter that `pair` holds. `config` says what kind it is.
    pub fn new(cpu: Arc<Cpu>, weight: FrozenWeight, config: &AdapterConfig, pair: &AdapterPair) -> Result<Self> {
        let (d_out, d_in) = weight.dims();
        if (d_out, d_in) != (pair.d_out, pair.d_in) {
            let message =
                format!("the adapter is for [{}, {}], the weight is [{d_out}, {d_in}]", pair.d_out, pair.d_in);
            return Err(Error::msg(message));
        }
        let adapter = pair.adapter_ref(config);
        let shape = adapter.shape;
        let (stacked, mixed) = (shape.stacked_rows(), shape.mixed_width());
        let a = Var::from_vec(pair.a.clone(), (stacked, d_in), &Device::Cpu)?;
        let b = Var::from_vec(pair.b.clone(), (d_out, mixed), &Device::Cpu)?;
        let operator = Operator { cpu, weight, shape, scale: adapter.scale, gate: adapter.gate };
        Ok(Self { operator: Arc::new(operator), bias: None, a, b, trains: true })
    }

    /// The layer for one projection of one layer of a model, from an adapter's file: see [`Adapter::open`].
    pub fn from_adapter(
        cpu: Arc<Cpu>,
        weight: FrozenWeight,
        adapter: &Adapter,
        layer: usize,
        projection: Projection,
    ) -> Result<Self> {
        let pair = adapter.layers.get(layer).and_then(|pairs| pairs[projection].as_ref());
        let pair =
            pair.ok_or_else(|| Error::msg(format!("the adapter has no {} in layer {layer}", projection.name())))?;
        Self::new(cpu, weight, &adapter.config, pair)
    }

    /// With a frozen bias [d_out].
    pub fn with_bias(mut self, bias: Tensor) -> Result<Self> {
        if bias.dims() != [self.operator.shape.d_out] {
            let message = format!("bias of shape {:?}: expected [{}]", bias.dims(), self.operator.shape.d_out);
            return Err(Error::msg(message));
        }
        self.bias = Some(bias.detach());
        Ok(self)
    }

    /// The same layer, for inference: autograd keeps nothing for the adapter's parameters.
    pub fn frozen(mut self) -> Self {
        self.trains = false;
        self
    }

    /// The trainable parameters: the stacked [A; R] [stacked_rows, d_in], and B [d_out, lora_heads · rank].
    pub fn vars(&self) -> [Var; 2] {
        [self.a.clone(), self.b.clone()]
    }

    /// The parameters' values, to be put into an [`Adapter`] that is saved with [`Adapter::save`].
    pub fn pair(&self) -> Result<AdapterPair> {
        let shape = self.operator.shape;
        let values = |var: &Var| var.flatten_all()?.to_vec1::<f32>();
        Ok(AdapterPair { d_in: shape.d_in, d_out: shape.d_out, a: values(&self.a)?, b: values(&self.b)? })
    }

    /// [`Module::forward`] under the label gate: `labels` has each token's head, or `u32::MAX` for all heads alike.
    pub fn forward_labels(&self, x: &Tensor, labels: &[u32]) -> Result<Tensor> {
        let shape = self.operator.shape;
        let tokens = rows(x, shape.d_in)?;
        let unknown = |&&label: &&u32| label as usize >= shape.lora_heads && label != u32::MAX;
        if let (Gate::Label, Some(label)) = (self.operator.gate, labels.iter().find(unknown)) {
            return Err(Error::msg(format!("a label for head {label}: the adapter has {} heads", shape.lora_heads)));
        }
        let (a, b) = match self.trains {
            true => (self.a.as_tensor().clone(), self.b.as_tensor().clone()),
            false => (self.a.as_detached_tensor(), self.b.as_detached_tensor()),
        };
        let call = Call { operator: self.operator.clone(), labels: labels.into() };
        let y = tokens.apply_op3(&a, &b, call)?;
        let y = match &self.bias {
            Some(bias) => y.broadcast_add(&bias.to_dtype(y.dtype())?)?,
            None => y,
        };
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = shape.d_out;
        }
        y.reshape(dims)
    }
}

impl Module for HydraLinear {
    /// x [.., d_in], f32 or bf16, gives y [.., d_out] of its type. A NaN is no error: what depends on it becomes NaN.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_labels(x, &[])
    }
}
