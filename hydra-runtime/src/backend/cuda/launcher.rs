//! The backend itself, and what its operations share: checked addresses, operands, and launches.

use super::buffer::{Activations, Buffer, Memory, size};
use super::driver::Driver;
use super::state::{Area, State};
use crate::Result;
use hydra_ptx::launch::{self, Launch, Operand, Product, Ptr};
use hydra_ptx::sizes::DECODED_TOKENS;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A GPU as a [`Backend`](crate::backend::Backend).
pub struct Cuda<D: Driver> {
    pub(super) driver: D,
    state: Mutex<State<D>>,
}

/// The backend's own memory, held by an operation.
pub(super) struct Held<'a, D: Driver> {
    state: MutexGuard<'a, State<D>>,
    _entered: D::Entered,
}

impl<D: Driver> Deref for Held<'_, D> {
    type Target = State<D>;

    fn deref(&self) -> &State<D> {
        &self.state
    }
}

impl<D: Driver> DerefMut for Held<'_, D> {
    fn deref_mut(&mut self) -> &mut State<D> {
        &mut self.state
    }
}

impl<D: Driver> Cuda<D> {
    /// The backend of a device.
    pub fn new(driver: D) -> Self {
        Self { driver, state: Mutex::default() }
    }

    /// The backend's own memory. An operation holds the lock until it has queued every launch that uses this memory,
    /// because other threads write to it, too.
    pub(super) fn state(&self) -> Held<'_, D> {
        // Whatever a panicking call left there is overwritten before it is read.
        Held { state: self.state.lock().unwrap_or_else(PoisonError::into_inner), _entered: self.driver.enter() }
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

    /// The address and pitch of activations, which must have at least `rows` rows of `width` values.
    #[track_caller]
    pub(super) fn rows(&self, activations: &Activations<D>, rows: usize, width: usize) -> Result<launch::Rows> {
        let (values, pitch) = activations.0.matrix(&self.driver, rows, width);
        Ok(launch::Rows { at: values.at, pitch: size(pitch)? })
    }

    /// The first `rows` rows of a matrix as an operand: as they are stored where that is one, else copied to `area`.
    #[track_caller]
    pub(super) fn operand(&self, area: &mut Area<D>, memory: &Memory<D>, rows: usize, columns: u32) -> Result<Operand> {
        let (values, pitch) = memory.matrix(&self.driver, rows, columns as usize);
        if values.bf16 && pitch.is_multiple_of(8) {
            return Ok(Operand { at: values.at, rows: size(rows)?, columns, pitch: size(pitch)? });
        }
        let room = self.driver.room(rows, columns as usize)?;
        let operand = area.spaced(&self.driver, size(rows)?, columns, room)?;
        self.run(&launch::operand(operand, values, operand.rows))?;
        Ok(operand)
    }

    /// Rounds a f32 matrix to the operand `to`, and writes rows of zeros behind it until there are `rows`.
    pub(super) fn round(&self, to: Operand, from: Ptr, rows: u32) -> Result<Operand> {
        self.run(&launch::operand(Operand { rows, ..to }, launch::Values::f32(from), to.rows))?;
        Ok(to)
    }

    /// A frozen matrix for products with `tokens` rows: as it is stored, or decoded to bf16 in `area`.
    pub(super) fn decoded(&self, area: &mut Area<D>, w: launch::Matrix, tokens: u32) -> Result<launch::Matrix> {
        if w.format == launch::Format::Bf16 || tokens < DECODED_TOKENS {
            return Ok(w);
        }
        let room = self.driver.room(tokens as usize, w.rows.min(w.columns) as usize)?;
        // Rows that pad the matrix would have to be zero.
        let below = if w.rows == launch::padded(w.rows) { size(room)? } else { 0 };
        let all = area.spaced(&self.driver, w.rows + below, w.columns, room)?;
        self.run(&launch::decode(all, &w))?;
        Ok(launch::Matrix { room: below, ..launch::Matrix::bf16(Operand { rows: w.rows, ..all }) })
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
