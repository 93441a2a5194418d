//! Frozen weights on the device: bf16 or a block format that the kernels decode. Any other format is converted to bf16.

use super::driver::Driver;
use super::launcher::size;
use crate::Result;
use half::bf16;
use hydra_kernels::isa::Isa;
use hydra_kernels::quant::{Format, Weight};
use hydra_ptx::launch::{self, Ptr, padded};

/// A frozen matrix.
pub struct Matrix<D: Driver> {
    data: D::Memory,
    scales: Option<D::Memory>,
    format: launch::Format,
    rows: u32,
    columns: u32,
}

impl<D: Driver> Matrix<D> {
    /// Uploads `weight`, its rows in logical order.
    pub(super) fn upload(driver: &D, weight: Weight<'_>) -> Result<Self> {
        let (rows, columns) = (size(weight.rows())?, size(weight.cols())?);
        let put = |bytes: &[u8]| {
            let mut memory = driver.allocate(bytes.len().max(1))?;
            driver.upload(&mut memory, 0, bytes)?;
            Ok::<_, crate::Error>(memory)
        };
        let (format, scale_bytes) = match weight.format() {
            Format::Q8_0 => (launch::Format::Q8_0, 2),
            Format::Q4_0 => (launch::Format::Q4_0, 2),
            Format::Q4_1 => (launch::Format::Q4_1, 4),
            _ => {
                return Ok(Self {
                    data: put(&as_bf16(weight))?,
                    scales: None,
                    format: launch::Format::Bf16,
                    rows,
                    columns,
                });
            }
        };
        let block_bytes = weight.format().block_bytes();
        let blocks = weight.rows() * (weight.cols() / weight.format().block_len());
        let mut quants = Vec::with_capacity(blocks * (block_bytes - scale_bytes));
        let mut scales = Vec::with_capacity(blocks * scale_bytes);
        for row in 0..weight.rows() {
            for block in weight.stored(row).chunks_exact(block_bytes) {
                scales.extend_from_slice(&block[..scale_bytes]);
                quants.extend_from_slice(&block[scale_bytes..]);
            }
        }
        Ok(Self { data: put(&quants)?, scales: Some(put(&scales)?), format, rows, columns })
    }

    /// The matrix as launches take it.
    pub(super) fn of(&self, driver: &D) -> launch::Matrix {
        launch::Matrix {
            format: self.format,
            data: Ptr(driver.address(&self.data)),
            scales: self.scales.as_ref().map_or(Ptr::NULL, |scales| Ptr(driver.address(scales))),
            rows: self.rows,
            columns: self.columns,
        }
    }
}

/// The values as bf16, rows padded to a multiple of 8.
fn as_bf16(weight: Weight<'_>) -> Vec<u8> {
    let (columns, pitch) = (weight.cols(), padded(weight.cols() as u32) as usize);
    let isa = Isa::detect();
    let as_it_is = weight.format() == Format::Bf16;
    let mut bytes = Vec::with_capacity(2 * weight.rows() * pitch);
    let mut values = vec![0.0; columns];
    for row in 0..weight.rows() {
        if as_it_is {
            bytes.extend_from_slice(weight.stored(row));
        } else {
            weight.decode_row(isa, row, 0, &mut values);
            bytes.extend(values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()));
        }
        bytes.extend(std::iter::repeat_n(0, 2 * (pitch - columns)));
    }
    bytes
}
