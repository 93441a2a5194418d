//! The backend itself, and what its operations share: checked addresses, operands, and launches.

use super::buffer::{Activations, Buffer, Memory};
use super::driver::Driver;
use super::state::{Area, State};
use crate::{Error, Result};
use hydra_ptx::launch::{self, Launch, Operand, Product, Ptr};
use hydra_ptx::sizes::DECODED_TOKENS;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A GPU as a [`Backend`](crate::backend::Backend).
pub struct Cuda<D: Driver> {
    pub(super) driver: D,
    state: Mutex<State<D>>,
}

/// A size in the kernels' type.
pub(super) fn size(n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| Error::Invalid(format!("a size of {n}: the device takes less than 2^32")))
}

impl<D: Driver> Cuda<D> {
    /// The backend of a device.
    pub fn new(driver: D) -> Self {
        Self { driver, state: Mutex::default() }
    }

    /// The backend's own memory. An operation holds the lock until it has queued every launch that uses this memory,
    /// because other threads write to it, too.
    pub(super) fn state(&self) -> MutexGuard<'_, State<D>> {
        // Whatever a panicking call left there is overwritten before it is read.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address of a buffer, which must have at least `len` values.
    #[track_caller]
    pub(super) fn f32(&self, buffer: &Buffer<D>, len: usize) -> Ptr {
        buffer.0.values(&self.driver, len).at
    }

    /// The address of activations, which must have at least `len` values.
    #[track_caller]
    pub(super) fn bf16(&self, activations: &Activations<D>, len: usize) -> Ptr {
        activations.0.values(&self.driver, len).at
    }

    /// The first `rows` rows of a matrix as an operand: as they are stored where that is one, else copied to `area`.
    #[track_caller]
    pub(super) fn operand(&self, area: &mut Area<D>, memory: &Memory<D>, rows: usize, columns: u32) -> Result<Operand> {
        let values = memory.values(&self.driver, rows * columns as usize);
        let rows = size(rows)?;
        if values.bf16 && columns == launch::padded(columns) {
            return Ok(Operand { at: values.at, rows, columns });
        }
        let operand = area.operand(&self.driver, rows, columns)?;
        self.run(&launch::operand(operand, values))?;
        Ok(operand)
    }

    /// A f32 matrix as an operand in `area`.
    pub(super) fn rounded(&self, area: &mut Area<D>, from: Ptr, rows: u32, columns: u32) -> Result<Operand> {
        let operand = area.operand(&self.driver, rows, columns)?;
        self.run(&launch::operand(operand, launch::Values::f32(from)))?;
        Ok(operand)
    }

    /// A frozen matrix for products with `tokens` rows: as it is stored, or decoded to bf16 in `area`.
    pub(super) fn decoded(&self, area: &mut Area<D>, w: launch::Matrix, tokens: u32) -> Result<launch::Matrix> {
        if w.format == launch::Format::Bf16 || tokens < DECODED_TOKENS {
            return Ok(w);
        }
        let data = area.operand(&self.driver, w.rows, w.columns)?.at;
        self.run(&launch::decode(data, &w))?;
        Ok(launch::Matrix { format: launch::Format::Bf16, data, scales: Ptr::NULL, ..w })
    }

    /// Queues a launch.
    pub(super) fn run(&self, launch: &Launch) -> Result<()> {
        if launch.is_empty() {
            return Ok(());
        }
        // SAFETY: callers have checked their buffers' lengths (`Memory::values`), and `&mut` guarantees that nobody
        // else uses what is written; areas and matrices have the sizes that were asked for, and work is done in order.
        unsafe { self.driver.launch(launch) }
    }

    /// Queues a product with a frozen matrix, in the device's fastest way.
    pub(super) fn multiply(&self, product: &Product<'_>) -> Result<()> {
        if product.is_empty() {
            return Ok(());
        }
        // SAFETY: as in `run`.
        unsafe { self.driver.multiply(product) }
    }
}
