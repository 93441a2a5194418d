//! Memory of the device, f32 or bf16, and its copies to and from the host's f32.

use super::driver::Driver;
use crate::Result;
use half::bf16;
use hydra_ptx::launch::{Ptr, Values};
use std::ops::Range;

/// f32 on the device.
pub struct Buffer<D: Driver>(pub(super) Memory<D>);

/// bf16 on the device.
pub struct Activations<D: Driver>(pub(super) Memory<D>);

impl<D: Driver> Buffer<D> {
    /// The number of values.
    pub(super) fn len(&self) -> usize {
        self.0.len
    }
}

/// Values on the device.
pub(super) struct Memory<D: Driver> {
    memory: D::Memory,
    len: usize,
    /// Whether they are bf16, else f32.
    bf16: bool,
}

impl<D: Driver> Memory<D> {
    pub(super) fn zeroed(driver: &D, len: usize, bf16: bool) -> Result<Self> {
        let bytes = if bf16 { size_of::<bf16>() } else { size_of::<f32>() };
        Ok(Self { memory: driver.allocate(bytes * len.max(1))?, len, bf16 })
    }

    /// Bytes of the first `len` values.
    ///
    /// # Panics
    /// If there are fewer.
    #[track_caller]
    fn bytes(&self, len: usize) -> usize {
        assert!(len <= self.len, "{len} values of a buffer of {}", self.len);
        if self.bf16 { size_of::<bf16>() * len } else { size_of::<f32>() * len }
    }

    /// The address, for a launch that uses `len` values.
    ///
    /// # Panics
    /// If there are fewer.
    #[track_caller]
    pub(super) fn values(&self, driver: &D, len: usize) -> Values {
        self.bytes(len);
        Values { at: Ptr(driver.address(&self.memory)), bf16: self.bf16 }
    }

    pub(super) fn upload(&mut self, driver: &D, from: &[f32]) -> Result<()> {
        self.bytes(from.len());
        if !self.bf16 {
            return driver.upload(&mut self.memory, 0, bytemuck::cast_slice(from));
        }
        let rounded: Vec<bf16> = from.iter().map(|&x| bf16::from_f32(x)).collect();
        driver.upload(&mut self.memory, 0, bytemuck::cast_slice(&rounded))
    }

    pub(super) fn download(&self, driver: &D, to: &mut [f32]) -> Result<()> {
        self.bytes(to.len());
        if !self.bf16 {
            return driver.download(bytemuck::cast_slice_mut(to), &self.memory);
        }
        let mut values = vec![bf16::ZERO; to.len()];
        driver.download(bytemuck::cast_slice_mut(&mut values), &self.memory)?;
        to.iter_mut().zip(values).for_each(|(to, x)| *to = x.to_f32());
        Ok(())
    }

    /// Copies some values of `from` to `start` and on.
    pub(super) fn copy(&mut self, driver: &D, start: usize, from: &Self, values: Range<usize>) -> Result<()> {
        let (at, bytes) = (self.bytes(start), from.bytes(values.start)..from.bytes(values.end));
        self.bytes(start + values.len());
        driver.copy(&mut self.memory, at, &from.memory, bytes)
    }

    pub(super) fn zero(&mut self, driver: &D, len: usize) -> Result<()> {
        let bytes = self.bytes(len);
        driver.zero(&mut self.memory, bytes)
    }
}
