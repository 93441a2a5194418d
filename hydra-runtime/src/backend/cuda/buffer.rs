//! Memory of the device, f32 or bf16, and its copies to and from the host's f32.

use super::driver::Driver;
use crate::{Error, Result};
use half::bf16;
use hydra_ptx::launch::{Ptr, Values};
use std::ops::Range;

/// A size in the kernels' type.
pub(super) fn size(n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| Error::Invalid(format!("a size of {n}: the device takes less than 2^32")))
}

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

/// Values on the device, one after the other or in rows.
pub(super) struct Memory<D: Driver> {
    memory: D::Memory,
    len: usize,
    /// Whether they are bf16, else f32.
    bf16: bool,
    /// Of values in rows with room behind them.
    rows: Option<Spaced>,
}

/// Rows of values with room behind each.
#[derive(Clone, Copy)]
struct Spaced {
    width: usize,
    pitch: usize,
}

/// Bytes of a bf16 value, or of f32.
fn value_bytes(bf16: bool) -> usize {
    if bf16 { size_of::<bf16>() } else { size_of::<f32>() }
}

/// The elements from a row of bf16 to the next, where there is `room` behind each.
pub(super) fn pitch(width: usize, room: usize) -> usize {
    width.next_multiple_of(8) + room
}

impl<D: Driver> Memory<D> {
    pub(super) fn zeroed(driver: &D, len: usize, bf16: bool) -> Result<Self> {
        Ok(Self { memory: driver.allocate(value_bytes(bf16) * len.max(1))?, len, bf16, rows: None })
    }

    /// Activations [rows, width] with so many free columns behind each row.
    pub(super) fn spaced(driver: &D, rows: usize, width: usize, room: usize) -> Result<Self> {
        let pitch = pitch(width, room);
        let memory = driver.allocate(size_of::<bf16>() * (rows * pitch).max(1))?;
        Ok(Self { memory, len: rows * width, bf16: true, rows: Some(Spaced { width, pitch }) })
    }

    /// Values in a row, if they lie in rows with room behind them.
    pub(super) fn width(&self) -> Option<usize> {
        self.rows.map(|rows| rows.width)
    }

    /// Bytes of the first `len` values, which lie one after the other.
    ///
    /// # Panics
    /// If there are fewer, or they lie in rows.
    #[track_caller]
    fn bytes(&self, len: usize) -> usize {
        self.check(len);
        assert!(self.rows.is_none(), "rows with room behind them");
        value_bytes(self.bf16) * len
    }

    #[track_caller]
    fn check(&self, len: usize) {
        assert!(len <= self.len, "{len} values of a buffer of {}", self.len);
    }

    /// How the values lie; those that have no rows are taken as rows of `width`.
    fn spacing(&self, width: usize) -> Spaced {
        self.rows.unwrap_or(Spaced { width, pitch: width })
    }

    /// The address, for a launch that uses `len` values, which lie one after the other.
    ///
    /// # Panics
    /// If there are fewer, or they lie in rows.
    #[track_caller]
    pub(super) fn values(&self, driver: &D, len: usize) -> Values {
        self.bytes(len);
        Values { at: Ptr(driver.address(&self.memory)), bf16: self.bf16 }
    }

    /// The values and their pitch, for a launch that uses them as a matrix [rows, width].
    ///
    /// # Panics
    /// If there are fewer, or their rows have another width.
    #[track_caller]
    pub(super) fn matrix(&self, driver: &D, rows: usize, width: usize) -> (Values, usize) {
        self.check(rows * width);
        let Spaced { width: own, pitch } = self.spacing(width);
        assert_eq!(own, width, "the width of a row");
        (Values { at: Ptr(driver.address(&self.memory)), bf16: self.bf16 }, pitch)
    }

    pub(super) fn upload(&mut self, driver: &D, from: &[f32]) -> Result<()> {
        self.check(from.len());
        if !self.bf16 {
            return driver.upload(&mut self.memory, 0, bytemuck::cast_slice(from));
        }
        let Spaced { width, pitch } = self.spacing(from.len());
        for (row, from) in from.chunks(width.max(1)).enumerate() {
            let rounded: Vec<bf16> = from.iter().map(|&x| bf16::from_f32(x)).collect();
            driver.upload(&mut self.memory, size_of::<bf16>() * row * pitch, bytemuck::cast_slice(&rounded))?;
        }
        Ok(())
    }

    pub(super) fn download(&self, driver: &D, to: &mut [f32]) -> Result<()> {
        self.check(to.len());
        if !self.bf16 {
            return driver.download(bytemuck::cast_slice_mut(to), &self.memory);
        }
        let Spaced { width, pitch } = self.spacing(to.len());
        let mut values = vec![bf16::ZERO; to.len().div_ceil(width.max(1)) * pitch];
        driver.download(bytemuck::cast_slice_mut(&mut values), &self.memory)?;
        for (to, values) in to.chunks_mut(width.max(1)).zip(values.chunks(pitch.max(1))) {
            to.iter_mut().zip(values).for_each(|(to, x)| *to = x.to_f32());
        }
        Ok(())
    }

    /// Copies some values of `from` to `start` and on.
    pub(super) fn copy(&mut self, driver: &D, start: usize, from: &Self, values: Range<usize>) -> Result<()> {
        let (at, bytes) = (self.bytes(start), from.bytes(values.start)..from.bytes(values.end));
        self.bytes(start + values.len());
        driver.copy(&mut self.memory, at, &from.memory, bytes)
    }

    /// Sets the first `rows` rows of `width` values to zero.
    pub(super) fn zero(&mut self, driver: &D, rows: usize, width: usize) -> Result<()> {
        let (_, pitch) = self.matrix(driver, rows, width);
        driver.zero(&mut self.memory, value_bytes(self.bf16) * rows * pitch)
    }
}
