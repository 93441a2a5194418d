//! Memory that the backend keeps for itself: room for operands and intermediate results, and arrays of ids.

use super::Driver;
use crate::Result;
use hydra_ptx::launch::{Ptr, padded};

/// Memory that grows to the largest size asked for.
pub(super) struct Area<D: Driver>(Option<(D::Memory, usize)>);

impl<D: Driver> Default for Area<D> {
    fn default() -> Self {
        Self(None)
    }
}

impl<D: Driver> Area<D> {
    fn memory(&mut self, driver: &D, bytes: usize) -> Result<&mut D::Memory> {
        if self.0.as_ref().is_none_or(|(_, size)| *size < bytes) {
            // The old one first: they need not fit side by side.
            self.0 = None;
            self.0 = Some((driver.allocate(bytes.max(1))?, bytes));
        }
        Ok(&mut self.0.as_mut().expect("just allocated").0)
    }

    /// `bytes` bytes; what they hold is not specified.
    pub fn take(&mut self, driver: &D, bytes: usize) -> Result<Ptr> {
        let memory = self.memory(driver, bytes)?;
        Ok(Ptr(driver.address(memory)))
    }

    /// Room for `len` f32.
    pub fn f32(&mut self, driver: &D, len: usize) -> Result<Ptr> {
        self.take(driver, 4 * len)
    }

    /// Room for an operand [rows, columns].
    pub fn operand(&mut self, driver: &D, rows: u32, columns: u32) -> Result<Ptr> {
        self.take(driver, 2 * rows as usize * padded(columns) as usize)
    }

    /// The first bytes, on the host.
    pub fn download(&self, driver: &D, to: &mut [u8]) -> Result<()> {
        let (memory, _) = self.0.as_ref().expect("something was computed there");
        driver.download(to, memory)
    }
}

/// Arrays of ids kept at the same time: a pass has tokens, positions, heads, blocks of rows, target rows and targets, and
/// asks for each once a layer.
const KEPT: usize = 8;

/// Ids on the device. What was uploaded a little while ago is still there.
pub(super) struct Ids<D: Driver> {
    /// [`KEPT`] arrays, each with room for `room` ids.
    area: Area<D>,
    room: usize,
    kept: [Vec<u32>; KEPT],
    next: usize,
}

impl<D: Driver> Default for Ids<D> {
    fn default() -> Self {
        Self { area: Area::default(), room: 0, kept: Default::default(), next: 0 }
    }
}

impl<D: Driver> Ids<D> {
    /// Where `ids` are, until others are asked for.
    pub fn on_device(&mut self, driver: &D, ids: &[u32]) -> Result<Ptr> {
        if ids.len() > self.room {
            // So that arrays begin at multiples of 256 bytes. They are all uploaded again.
            self.room = ids.len().next_multiple_of(64);
            self.kept.iter_mut().for_each(Vec::clear);
        }
        let bytes = size_of::<u32>() * self.room;
        let memory = self.area.memory(driver, KEPT * bytes)?;
        let place = match self.kept.iter().position(|kept| kept == ids) {
            Some(place) => place,
            None => {
                let place = self.next;
                self.next = (place + 1) % KEPT;
                let kept = &mut self.kept[place];
                // Not valid under the old name, whatever happens now.
                kept.clear();
                driver.upload(memory, bytes * place, bytemuck::cast_slice(ids))?;
                kept.extend_from_slice(ids);
                place
            }
        };
        Ok(Ptr(driver.address(memory) + (bytes * place) as u64))
    }
}

/// One area for each thing that is alive at the same time.
pub(super) struct State<D: Driver> {
    /// x as an operand, where it isn't one.
    pub x: Area<D>,
    /// dy, the same.
    pub dy: Area<D>,
    /// The mixed heads, or `adapter_state`'s gradient, as an operand.
    pub small_rows: Area<D>,
    /// B or [A; R] as an operand.
    pub small: Area<D>,
    /// `adapter_state`'s gradient without A's part, as an operand.
    pub through: Area<D>,
    /// The mixed heads as an operand, in the backward pass.
    pub mixed: Area<D>,
    /// Their gradient.
    pub dmixed: Area<D>,
    /// `adapter_state`'s gradient.
    pub d_adapter_state: Area<D>,
    /// What a load-balance term adds to dgate, [heads].
    pub push: Area<D>,
    /// A frozen matrix in blocks, as bf16.
    pub decoded: Area<D>,
    /// A block of logits.
    pub logits: Area<D>,
    /// The same as bf16 weights.
    pub weights: Area<D>,
    /// Running softmax, partial sums, attention's delta.
    pub partial: Area<D>,
    /// What the host reads.
    pub result: Area<D>,
    /// Tokens, positions and the like.
    pub ids: Ids<D>,
}

impl<D: Driver> Default for State<D> {
    fn default() -> Self {
        Self {
            x: Area::default(),
            dy: Area::default(),
            small_rows: Area::default(),
            small: Area::default(),
            through: Area::default(),
            mixed: Area::default(),
            dmixed: Area::default(),
            d_adapter_state: Area::default(),
            push: Area::default(),
            decoded: Area::default(),
            logits: Area::default(),
            weights: Area::default(),
            partial: Area::default(),
            result: Area::default(),
            ids: Ids::default(),
        }
    }
}
