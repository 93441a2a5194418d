//! How many bytes the backend's own memory ([`State`](super::state::State)) will take: the largest size of each area.

use super::driver::Driver;
use super::gpu::blas;
use super::loss;
use super::state::KEPT;
use crate::backend::{AttentionShape, HydraShape, Workload};
use crate::projection::Projection;
use hydra_ptx::launch;
use hydra_ptx::sizes::{DECODED_TOKENS, LOSS_STATE, SQUARES_PER_BLOCK, WIDE};

/// Bytes of f32 or u32.
const WORD: u128 = 4;
/// Bytes of bf16.
const HALF: u128 = 2;

/// Columns of an operand with its padding.
fn padded(columns: usize) -> u128 {
    columns.next_multiple_of(8) as u128
}

/// The largest size of each area, in bytes. The names are those of [`State`](super::state::State)'s.
#[derive(Default)]
struct Areas {
    x: u128,
    dy: u128,
    adapter_rows: u128,
    adapter_weight: u128,
    adapter_b: u128,
    d_router: u128,
    d_adapter_state: u128,
    balance_loss_grad: u128,
    decoded: u128,
    logits: u128,
    weights: u128,
    partial: u128,
    ids: u128,
}

/// What `area` takes that is now asked for so many bytes.
fn grow(area: &mut u128, bytes: u128) {
    *area = bytes.max(*area);
}

/// Bytes of a matrix whose rows have room behind them where that is faster.
fn spaced<D: Driver>(driver: &D, rows: usize, columns: usize) -> u128 {
    // Without an answer there will be no memory, either.
    let room = driver.room(rows, columns).unwrap_or(0);
    HALF * rows as u128 * (padded(columns) + room as u128)
}

impl Areas {
    fn add<D: Driver>(&mut self, driver: &D, work: &Workload<'_>) {
        for projection in Projection::ALL {
            let (d_out, d_in) = projection.dims(work.config);
            self.add_frozen(driver, work, [d_out, d_in]);
        }
        self.add_model(driver, work);
        // Rows that begin at multiples of 16 bytes are read where they are.
        let fours = |shape: &HydraShape| (shape.d_out * shape.mixed_width()).is_multiple_of(4);
        let aligned = |shape: &HydraShape| shape.d_in.is_multiple_of(8) && fours(shape);
        let aligned = work.adapters.iter().all(aligned);
        for shape in work.adapters {
            self.add_adapter(work, shape, aligned);
        }
    }

    /// For a layer's frozen weight [d_out, d_in].
    fn add_frozen<D: Driver>(&mut self, driver: &D, work: &Workload<'_>, [d_out, d_in]: [usize; 2]) {
        let &Workload { config, tokens, training, .. } = work;
        if !d_in.is_multiple_of(8) {
            grow(&mut self.x, spaced(driver, tokens, d_in));
        }
        // The gradient of the residual stream is f32.
        if training && (d_out == config.d_model || !d_out.is_multiple_of(8)) {
            grow(&mut self.dy, spaced(driver, tokens, d_out));
        }
        self.add_decoded(driver, tokens, [d_out, d_in]);
    }

    /// For a quantised matrix, which is decoded where many rows are multiplied.
    fn add_decoded<D: Driver>(&mut self, driver: &D, tokens: usize, [rows, columns]: [usize; 2]) {
        if tokens >= DECODED_TOKENS as usize {
            let room = driver.room(tokens, rows.min(columns)).unwrap_or(0);
            let below = if rows.is_multiple_of(8) { room } else { 0 };
            grow(&mut self.decoded, HALF * (rows + below) as u128 * (padded(columns) + room as u128));
        }
    }

    /// For what is no layer: attention, the loss, the optimiser.
    fn add_model<D: Driver>(&mut self, driver: &D, work: &Workload<'_>) {
        let &Workload { config, tokens, adapters, training } = work;
        if !config.d_model.is_multiple_of(8) {
            grow(&mut self.x, spaced(driver, tokens, config.d_model));
        }
        let (ids, logits) = loss::most(tokens, config.vocab);
        self.add_decoded(driver, tokens, [ids, config.d_model]);
        grow(&mut self.logits, WORD * logits);
        // Blocks but for the last one are whole tiles.
        grow(&mut self.weights, HALF * (logits + tokens as u128 * (padded(ids) - ids as u128)));
        let rows = tokens as u128;
        grow(&mut self.partial, WORD * rows * LOSS_STATE as u128);
        // Three numbers for each of attention's blocks: a segment of one token has a block of its own.
        grow(&mut self.ids, KEPT as u128 * WORD * (3 * tokens).next_multiple_of(64) as u128);
        if training {
            let of_layer = |shape: &HydraShape| {
                let (rows, columns) = (shape.stacked_rows() as u128, shape.mixed_width() as u128);
                rows * shape.d_in as u128 + columns * shape.d_out as u128
            };
            let parameters = config.layers as u128 * adapters.iter().map(of_layer).sum::<u128>();
            grow(&mut self.partial, 2 * WORD * parameters.div_ceil(SQUARES_PER_BLOCK.into()));
            grow(&mut self.partial, WORD * rows * AttentionShape::of(config).n_heads as u128);
        }
    }

    /// For a layer's adapter.
    fn add_adapter(&mut self, work: &Workload<'_>, shape: &HydraShape, aligned: bool) {
        let &Workload { tokens, training, .. } = work;
        let &HydraShape { d_in, d_out, .. } = shape;
        let (rows, stacked, columns) = (tokens as u128, shape.stacked_rows(), shape.mixed_width());
        grow(&mut self.adapter_rows, HALF * rows * padded(columns));
        grow(&mut self.adapter_b, HALF * d_out as u128 * padded(columns));
        if !aligned {
            grow(&mut self.adapter_weight, WORD * stacked as u128 * padded(d_in));
        }
        if !training {
            return;
        }
        grow(&mut self.adapter_rows, HALF * rows * padded(stacked));
        grow(&mut self.adapter_b, HALF * stacked as u128 * padded(d_in));
        if shape.router {
            grow(&mut self.d_router, HALF * rows * padded(stacked));
            grow(&mut self.balance_loss_grad, WORD * shape.lora_heads as u128);
        }
        grow(&mut self.d_adapter_state, WORD * rows * shape.state_width() as u128);
        let parts = |d: usize, narrow: usize| launch::most_parts(tokens, d, narrow) as u128;
        let d_mixed = d_out.div_ceil(WIDE as usize) as u128 * rows;
        let db = parts(d_out, columns) * d_out as u128;
        grow(&mut self.partial, WORD * padded(columns) * (d_mixed + db));
        let da = parts(d_in, stacked);
        grow(&mut self.partial, if da > 1 { WORD * da * padded(d_in) * stacked as u128 } else { 0 });
    }

    /// The sum; each area begins at a multiple of 256.
    fn bytes(self) -> u128 {
        let Self { x, dy, adapter_rows, adapter_weight, adapter_b, d_router, d_adapter_state, .. } = self;
        let Self { balance_loss_grad, decoded, logits, weights, partial, ids, .. } = self;
        let narrow = [adapter_rows, adapter_weight, adapter_b, d_router, d_adapter_state, balance_loss_grad];
        // What the host downloads is small.
        let result = 1;
        let others = [x, dy, decoded, logits, weights, partial, ids, result];
        narrow.into_iter().chain(others).map(|bytes| bytes.next_multiple_of(256)).sum()
    }
}

/// Bytes of the backend's own memory after all of this work, `u64::MAX` at most.
pub(super) fn bytes<D: Driver>(driver: &D, work: &[Workload<'_>]) -> u64 {
    let mut areas = Areas::default();
    work.iter().for_each(|work| areas.add(driver, work));
    let is_large = |work: &Workload<'_>| {
        let widest = work.config.d_ffn.max(work.config.d_model);
        driver.room(work.tokens, widest).is_ok_and(|room| room > 0)
    };
    let library = if work.iter().any(is_large) { blas::WORKSPACE } else { 0 };
    u64::try_from(areas.bytes() + library as u128).unwrap_or(u64::MAX)
}
