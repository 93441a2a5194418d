//! The operator as candle's autograd calls it: y from x, [A; R] and B, and the gradients of these three.

use crate::weight::{FrozenWeight, unsupported};
use crate::wrap;
use candle_core::{CpuStorage, CustomOp3, DType, Error, Layout, Result, Shape, Storage, Tensor};
use half::bf16;
use hydra_runtime::backend::cpu::Cpu;
use hydra_runtime::hydra_kernels::gemm::{Accumulate, Values, ValuesMut};
use hydra_runtime::hydra_kernels::hydra::{
    AdapterGradients, AdapterRef, BackwardArgs, ForwardArgs, Gradients, HydraLayer,
};
use hydra_runtime::hydra_kernels::{Gate, HydraShape, Weight};
use std::sync::Arc;

/// What stays the same from call to call.
#[derive(Clone)]
pub(crate) struct Operator {
    pub cpu: Arc<Cpu>,
    pub weight: FrozenWeight,
    pub shape: HydraShape,
    pub scale: f32,
    pub gate: Gate,
}

/// One call: x [tokens, d_in], a [stacked_rows, d_in] and b [d_out, mixed_width], all contiguous.
pub(crate) struct Call {
    pub operator: Arc<Operator>,
    /// Each token's head, for the label gate.
    pub labels: Arc<[u32]>,
}

impl Operator {
    fn layer<'a>(&self, weight: Weight<'a>, a: &'a [f32], b: &'a [f32]) -> HydraLayer<'a> {
        let Self { shape, scale, gate, .. } = *self;
        HydraLayer { weight, adapter: Some(AdapterRef { shape, a, b, scale, gate }) }
    }
}

impl CustomOp3 for Call {
    fn name(&self) -> &'static str {
        "hydra-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, a, b) = (values(x, x_layout)?, parameters(a, a_layout)?, parameters(b, b_layout)?);
        let Operator { cpu, weight, shape, .. } = &*self.operator;
        let tokens = x_layout.dims()[0];
        let mut adapter_state = vec![0.0; tokens * shape.state_width()];
        let args = ForwardArgs { labels: &self.labels, ..ForwardArgs::new(tokens, x) };
        let y = weight.with(|weight| {
            let layer = self.operator.layer(weight, a, b);
            let len = tokens * shape.d_out;
            Ok(match x {
                Values::F32(_) => {
                    let mut y = vec![0.0; len];
                    cpu.layer_forward(layer, args, &mut y[..], &mut adapter_state).map_err(wrap)?;
                    CpuStorage::F32(y)
                }
                Values::Bf16(_) => {
                    let mut y = vec![bf16::ZERO; len];
                    cpu.layer_forward(layer, args, &mut y[..], &mut adapter_state).map_err(wrap)?;
                    CpuStorage::BF16(y)
                }
            })
        })?;
        Ok((y, Shape::from((tokens, shape.d_out))))
    }

    /// The adapter's state is computed again rather than kept: it costs the products with A and R, a few rows each.
    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let HydraShape { d_in, d_out, .. } = self.operator.shape;
        let (a_dims, b_dims) = ((self.operator.shape.stacked_rows(), d_in), (d_out, self.operator.shape.mixed_width()));
        let (mut da, mut db) = (vec![0.0; a_dims.0 * a_dims.1], vec![0.0; b_dims.0 * b_dims.1]);
        let (tokens, device, dy) = (x.dim(0)?, x.device(), dy.contiguous()?);
        let dx = match x.dtype() {
            DType::BF16 => {
                let mut dx = vec![bf16::ZERO; tokens * d_in];
                self.gradients([x, a, b, &dy], (&mut dx[..]).into(), [&mut da, &mut db])?;
                Tensor::from_vec(dx, (tokens, d_in), device)?
            }
            _ => {
                let mut dx = vec![0.0f32; tokens * d_in];
                self.gradients([x, a, b, &dy], (&mut dx[..]).into(), [&mut da, &mut db])?;
                Tensor::from_vec(dx, (tokens, d_in), device)?
            }
        };
        let (da, db) = (Tensor::from_vec(da, a_dims, device)?, Tensor::from_vec(db, b_dims, device)?);
        Ok((Some(dx), Some(da), Some(db)))
    }
}

impl Call {
    fn gradients(&self, [x, a, b, dy]: [&Tensor; 4], dx: ValuesMut<'_>, [da, db]: [&mut [f32]; 2]) -> Result<()> {
        let tokens = x.dim(0)?;
        let stored = [x, a, b, dy].map(Tensor::storage_and_layout);
        let [x, a, b, dy] = stored.each_ref().map(|(storage, layout)| match &**storage {
            Storage::Cpu(storage) => Ok((storage, *layout)),
            _ => Err(Error::msg("a tensor on a GPU: expected the CPU")),
        });
        let ((x, x_layout), (a, a_layout), (b, b_layout), (dy, dy_layout)) = (x?, a?, b?, dy?);
        let (x, dy) = (values(x, x_layout)?, values(dy, dy_layout)?);
        let (a, b) = (parameters(a, a_layout)?, parameters(b, b_layout)?);
        let args = BackwardArgs { labels: &self.labels, ..BackwardArgs::new(tokens, dy, x) };
        let gradients = Gradients { dx: Some((dx, Accumulate::Overwrite)), adapter: Some(AdapterGradients { da, db }) };
        let Operator { cpu, weight, .. } = &*self.operator;
        weight.with(|weight| cpu.layer_backward(self.operator.layer(weight, a, b), args, None, gradients).map_err(wrap))
    }
}

/// The values of x, y or their gradients.
fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<Values<'a>> {
    let (start, end) = range(layout)?;
    match storage {
        CpuStorage::F32(values) => Ok(Values::F32(&values[start..end])),
        CpuStorage::BF16(values) => Ok(Values::Bf16(&values[start..end])),
        _ => Err(Error::msg("x is neither f32 nor bf16")),
    }
}

/// The values of [A; R] or B.
fn parameters<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let (start, end) = range(layout)?;
    match storage {
        CpuStorage::F32(values) => Ok(&values[start..end]),
        _ => Err(Error::msg("an adapter's parameters are f32")),
    }
}

fn range(layout: &Layout) -> Result<(usize, usize)> {
    layout.contiguous_offsets().ok_or_else(|| Error::msg("a tensor that isn't contiguous"))
}

/// x as the operator takes it, [tokens, d_in].
pub(crate) fn rows(x: &Tensor, d_in: usize) -> Result<Tensor> {
    if !x.device().is_cpu() || !matches!(x.dtype(), DType::F32 | DType::BF16) {
        return Err(unsupported("x", x, "f32 or bf16"));
    }
    if x.dims().last() != Some(&d_in) {
        return Err(Error::msg(format!("x of shape {:?}: expected {d_in} columns", x.dims())));
    }
    x.reshape(((), d_in))?.contiguous()
}
