//! Frozen weights on the device: bf16 or a block format that the kernels decode. Any other format is converted to bf16.

use super::buffer::{pitch, size};
use super::driver::Driver;
use crate::Result;
use half::bf16;
use hydra_kernels::isa::Isa;
use hydra_kernels::quant::{Format, Weight};
use hydra_ptx::launch::{self, Ptr};

/// A frozen matrix.
pub struct Matrix<D: Driver> {
    data: D::Memory,
    scales: Option<D::Memory>,
    format: launch::Format,
    rows: u32,
    columns: u32,
    pitch: u32,
    /// Free rows below.
    room: u32,
}

/// The number of tokens for which it is decided whether a matrix has room for an adapter.
const MANY_TOKENS: usize = 4096;
/// Rows that are converted and uploaded together.
const UPLOADED_ROWS: usize = 256;

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
            _ => return Self::upload_bf16(driver, weight),
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
        let (data, scales) = (put(&quants)?, Some(put(&scales)?));
        Ok(Self { data, scales, format, rows, columns, pitch: columns, room: 0 })
    }

    /// Uploads `weight` as bf16: its rows padded with zeros to a multiple of 8, and room for an adapter where that is
    /// of use.
    fn upload_bf16(driver: &D, weight: Weight<'_>) -> Result<Self> {
        let (rows, columns) = (weight.rows(), weight.cols());
        let room = driver.room(MANY_TOKENS, rows.min(columns))?;
        let pitch = pitch(columns, room);
        let below = if room > 0 { rows.next_multiple_of(8) - rows + room } else { 0 };
        let mut data = driver.allocate((size_of::<bf16>() * (rows + below) * pitch).max(1))?;
        let mut values = vec![0.0; columns];
        let mut bytes = Vec::new();
        let isa = Isa::detect();
        for first in (0..rows).step_by(UPLOADED_ROWS) {
            bytes.clear();
            for row in first..rows.min(first + UPLOADED_ROWS) {
                if weight.format() == Format::Bf16 {
                    bytes.extend_from_slice(weight.stored(row));
                } else {
                    weight.decode_row(isa, row, 0, &mut values);
                    bytes.extend(values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()));
                }
                bytes.resize(bytes.len() + size_of::<bf16>() * (pitch - columns), 0);
            }
            driver.upload(&mut data, size_of::<bf16>() * first * pitch, &bytes)?;
        }
        let (format, room) = (launch::Format::Bf16, size(room)?);
        Ok(Self { data, scales: None, format, rows: size(rows)?, columns: size(columns)?, pitch: size(pitch)?, room })
    }

    /// The matrix as launches take it.
    pub(super) fn of(&self, driver: &D) -> launch::Matrix {
        launch::Matrix {
            format: self.format,
            data: Ptr(driver.address(&self.data)),
            scales: self.scales.as_ref().map_or(Ptr::NULL, |scales| Ptr(driver.address(scales))),
            rows: self.rows,
            columns: self.columns,
            pitch: self.pitch,
            room: self.room,
        }
    }
}
