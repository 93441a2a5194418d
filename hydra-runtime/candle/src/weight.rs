//! The frozen weight of a layer, as candle holds it.

use crate::wrap;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{CpuStorage, Error, Result, Storage, Tensor};
use hydra_runtime::hydra_kernels::{Format, RowOrder, Weight};
use std::sync::Arc;

/// A frozen weight [d_out, d_in] on the CPU, shared with whoever else holds it.
#[derive(Clone, Debug)]
pub struct FrozenWeight(Data);

#[derive(Clone, Debug)]
enum Data {
    Dense(Tensor),
    Quantized(Arc<QTensor>),
}

impl TryFrom<Tensor> for FrozenWeight {
    type Error = Error;

    /// A matrix of f32, bf16 or f16 values. It is copied only if it isn't contiguous.
    fn try_from(weight: Tensor) -> Result<Self> {
        let weight = Self(Data::Dense(weight.detach().contiguous()?));
        weight.with(|_| Ok(()))?;
        Ok(weight)
    }
}

impl TryFrom<Arc<QTensor>> for FrozenWeight {
    type Error = Error;

    /// A matrix in one of GGUF's block formats.
    fn try_from(weight: Arc<QTensor>) -> Result<Self> {
        let weight = Self(Data::Quantized(weight));
        weight.with(|_| Ok(()))?;
        Ok(weight)
    }
}

impl FrozenWeight {
    /// Calls `body` with the weight as the kernels take it.
    pub(crate) fn with<R>(&self, body: impl FnOnce(Weight<'_>) -> Result<R>) -> Result<R> {
        match &self.0 {
            Data::Dense(tensor) => {
                let [rows, columns] = matrix(tensor.dims())?;
                let (storage, layout) = tensor.storage_and_layout();
                let (start, end) =
                    layout.contiguous_offsets().ok_or_else(|| Error::msg("a weight that isn't contiguous"))?;
                let (format, bytes) = match &*storage {
                    Storage::Cpu(CpuStorage::F32(values)) => (Format::F32, bytemuck::cast_slice(&values[start..end])),
                    Storage::Cpu(CpuStorage::BF16(values)) => (Format::Bf16, bytemuck::cast_slice(&values[start..end])),
                    Storage::Cpu(CpuStorage::F16(values)) => (Format::F16, bytemuck::cast_slice(&values[start..end])),
                    _ => return Err(unsupported("weight", tensor, "f32, bf16 or f16")),
                };
                body(Weight::new(format, rows, columns, bytes, RowOrder::Natural).map_err(wrap)?)
            }
            Data::Quantized(tensor) => {
                let [rows, columns] = matrix(tensor.shape().dims())?;
                let format = match tensor.dtype() {
                    GgmlDType::F32 => Format::F32,
                    GgmlDType::F16 => Format::F16,
                    GgmlDType::BF16 => Format::Bf16,
                    GgmlDType::Q4_0 => Format::Q4_0,
                    GgmlDType::Q4_1 => Format::Q4_1,
                    GgmlDType::Q5_0 => Format::Q5_0,
                    GgmlDType::Q5_1 => Format::Q5_1,
                    GgmlDType::Q8_0 => Format::Q8_0,
                    GgmlDType::Q2K => Format::Q2K,
                    GgmlDType::Q3K => Format::Q3K,
                    GgmlDType::Q4K => Format::Q4K,
                    GgmlDType::Q5K => Format::Q5K,
                    GgmlDType::Q6K => Format::Q6K,
                    other => return Err(Error::msg(format!("a weight of type {other:?}: expected {}", formats()))),
                };
                if !tensor.device().is_cpu() {
                    return Err(Error::msg("a weight on a GPU: expected the CPU"));
                }
                body(Weight::new(format, rows, columns, &tensor.data()?, RowOrder::Natural).map_err(wrap)?)
            }
        }
    }

    /// d_out and d_in.
    pub fn dims(&self) -> (usize, usize) {
        let dims = match &self.0 {
            Data::Dense(tensor) => tensor.dims(),
            Data::Quantized(tensor) => tensor.shape().dims(),
        };
        (dims[0], dims[1])
    }
}

fn matrix(dims: &[usize]) -> Result<[usize; 2]> {
    dims.try_into().map_err(|_| Error::msg(format!("a weight of shape {dims:?}: expected [d_out, d_in]")))
}

fn formats() -> String {
    Format::ALL.map(|format| format.name()).join(", ")
}

/// The error for a tensor of a type or on a device that the kernels don't read.
pub(crate) fn unsupported(what: &str, tensor: &Tensor, types: &str) -> Error {
    let (dtype, device) = (tensor.dtype().as_str(), tensor.device());
    Error::msg(format!("{what} of type {dtype} on {device:?}: expected {types} on the CPU"))
}
