//! The backend's own memory: operands, intermediate results, and arrays of ids.

use super::buffer::{pitch, size};
use super::driver::Driver;
use crate::Result;
use hydra_ptx::launch::{Operand, Ptr};

/// Memory that grows to the largest size that was asked for.
pub(super) struct Area<D: Driver>(Option<(D::Memory, usize)>);

impl<D: Driver> Default for Area<D> {
    fn default() -> Self {
        Self(None)
    }
}

impl<D: Driver> Area<D> {
    fn memory(&mut self, driver: &D, bytes: usize) -> Result<&mut D::Memory> {
        if self.0.as_ref().is_none_or(|(_, size)| *size < bytes) {
            // The old memory is freed first, because both may not fit at once.
            self.0 = None;
            self.0 = Some((driver.allocate(bytes.max(1))?, bytes));
        }
        Ok(&mut self.0.as_mut().expect("just allocated").0)
    }

    /// The address of `bytes` bytes with unspecified contents.
    pub fn take(&mut self, driver: &D, bytes: usize) -> Result<Ptr> {
        let memory = self.memory(driver, bytes)?;
        Ok(Ptr(driver.address(memory)))
    }

    /// The address of `len` f32.
    pub fn f32(&mut self, driver: &D, len: usize) -> Result<Ptr> {
        self.take(driver, 4 * len)
    }

    /// An operand [rows, columns] with unspecified contents.
    pub fn operand(&mut self, driver: &D, rows: u32, columns: u32) -> Result<Operand> {
        self.spaced(driver, rows, columns, 0)
    }

    /// An operand [rows, columns] with unspecified contents and so many free columns behind each row.
    pub fn spaced(&mut self, driver: &D, rows: u32, columns: u32, room: usize) -> Result<Operand> {
        let pitch = size(pitch(columns as usize, room))?;
        let at = self.take(driver, 2 * rows as usize * pitch as usize)?;
        Ok(Operand { at, rows, columns, pitch })
    }

    /// Copies the first bytes to the host.
    pub fn download(&self, driver: &D, to: &mut [u8]) -> Result<()> {
        let (memory, _) = self.0.as_ref().expect("taken before");
        driver.download(to, memory)
    }
}

/// The number of arrays of ids that are kept. A pass has six (tokens, positions, labels, blocks of rows, target rows,
/// targets), and each layer asks for some of them.
pub(super) const KEPT: usize = 8;

/// Arrays of ids on the device. The latest ones are kept, and are not uploaded again.
pub(super) struct Ids<D: Driver> {
    /// [`KEPT`] arrays of `capacity` ids.
    area: Area<D>,
    capacity: usize,
    kept: [Vec<u32>; KEPT],
    next: usize,
}

impl<D: Driver> Default for Ids<D> {
    fn default() -> Self {
        Self { area: Area::default(), capacity: 0, kept: Default::default(), next: 0 }
    }
}

impl<D: Driver> Ids<D> {
    /// The address of `ids`, which is valid until [`KEPT`] other arrays have been asked for.
    pub fn on_device(&mut self, driver: &D, ids: &[u32]) -> Result<Ptr> {
        if ids.len() > self.capacity {
            // Arrays begin at multiples of 256 bytes. The larger memory is a new one, so all arrays have to be uploaded
            // again.
            self.capacity = ids.len().next_multiple_of(64);
            self.kept.iter_mut().for_each(Vec::clear);
        }
        let bytes = size_of::<u32>() * self.capacity;
        let memory = self.area.memory(driver, KEPT * bytes)?;
        let place = match self.kept.iter().position(|kept| kept == ids) {
            Some(place) => place,
            None => {
                let place = self.next;
                self.next = (place + 1) % KEPT;
                let kept = &mut self.kept[place];
                // The old array is gone even if the upload fails.
                kept.clear();
                driver.upload(memory, bytes * place, bytemuck::cast_slice(ids))?;
                kept.extend_from_slice(ids);
                place
            }
        };
        Ok(Ptr(driver.address(memory) + (bytes * place) as u64))
    }
}

/// One area for each value that is alive at the same time as the others.
pub(super) struct State<D: Driver> {
    /// x as an operand.
    pub x: Area<D>,
    /// dy as an operand.
    pub dy: Area<D>,
    /// `mixed` (forward) or `adapter_state`'s gradient (backward) as an operand.
    pub adapter_rows: Area<D>,
    /// [A; R] with padded rows.
    pub adapter_weight: Area<D>,
    /// B or [A; R] as an operand.
    pub adapter_b: Area<D>,
    /// `adapter_state`'s gradient without A's columns, as an operand.
    pub d_router: Area<D>,
    /// `adapter_state`'s gradient.
    pub d_adapter_state: Area<D>,
    /// What the load-balancing loss adds to each token's d gate, `[lora_heads]`.
    pub balance_loss_grad: Area<D>,
    /// A quantised matrix, decoded.
    pub decoded: Area<D>,
    /// A block of logits.
    pub logits: Area<D>,
    /// The block's unnormalised probabilities, as an operand.
    pub weights: Area<D>,
    /// The running softmax, attention's delta, and parts of sums.
    pub partial: Area<D>,
    /// What the host downloads.
    pub result: Area<D>,
    /// Tokens, positions and the like.
    pub ids: Ids<D>,
}

impl<D: Driver> Default for State<D> {
    fn default() -> Self {
        Self {
            x: Area::default(),
            dy: Area::default(),
            adapter_rows: Area::default(),
            adapter_weight: Area::default(),
            adapter_b: Area::default(),
            d_router: Area::default(),
            d_adapter_state: Area::default(),
            balance_loss_grad: Area::default(),
            decoded: Area::default(),
            logits: Area::default(),
            weights: Area::default(),
            partial: Area::default(),
            result: Area::default(),
            ids: Ids::default(),
        }
    }
}
