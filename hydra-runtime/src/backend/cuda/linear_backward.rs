//! The gradient of a frozen linear layer and its adapter: which launches, in which order.

use super::buffer::size;
use super::driver::Driver;
use super::launcher::Cuda;
use super::linear::Adapter;
use super::state::{Area, State};
use crate::Result;
use crate::backend::{Accumulate, AnyBuffer, AnyBufferMut, LinearBackward};
use hydra_ptx::launch::{
    self, Form, GateGradient, LoraUpBackward, LoraUpParts, Matrix, Operand, Product, Ptr, SecondProduct, Values,
    WeightGrad,
};

/// dx = addend + dy W, once the operands are on the device.
struct Frozen {
    /// [tokens, d_in].
    dx: Values,
    /// Elements from a row of dx to the next.
    pitch: u32,
    /// dx itself where it is added to, else null.
    addend: Ptr,
    dy: Operand,
    /// W, decoded where that is faster.
    w: Matrix,
}

/// What is multiplied by [A; R] in the product with W: the gradient of `adapter_state`; with dropout, which A's part of dx
/// goes through, the router's columns alone, with zeros in A's; none if there is no router either.
fn second(gradient: &GateGradient, adapter: &launch::Adapter) -> Option<Operand> {
    if adapter.dropout.drops() { gradient.d_router_bf16 } else { Some(gradient.d_adapter_state_bf16) }
}

impl<D: Driver> Cuda<D> {
    pub(super) fn linear_gradient(&self, args: LinearBackward<'_, Self>) -> Result<()> {
        let LinearBackward { dx, dparams, tokens, dy, x, weight, adapter } = args;
        let (state, driver, weight) = (&mut *self.state(), &self.driver, weight.of(&self.driver));
        let dy = match dy {
            AnyBuffer::Buffer(dy) => &dy.0,
            AnyBuffer::Activations(dy) => &dy.0,
        };
        let dy = self.operand(&mut state.dy, dy, tokens, weight.rows)?;
        let frozen = match dx {
            None => None,
            Some((dx, accumulate)) => {
                let dx = match dx {
                    AnyBufferMut::Buffer(dx) => &dx.0,
                    AnyBufferMut::Activations(dx) => &dx.0,
                };
                let (dx, pitch) = dx.matrix(driver, tokens, weight.columns as usize);
                let addend = if accumulate == Accumulate::Add { dx.at } else { Ptr::NULL };
                let w = self.decoded(&mut state.decoded, weight, dy.rows)?;
                Some(Frozen { dx, pitch: size(pitch)?, addend, dy, w })
            }
        };
        let Some((args, adapter_state)) = adapter else {
            return frozen.map_or(Ok(()), |frozen| self.frozen_dx(&frozen, None));
        };
        let adapter = Adapter::new(self, state, args, tokens)?;
        let adapter_state = self.f32(adapter_state, tokens * adapter.shape.state_width());
        let rows = adapter.launched.stacked_rows;
        // Where the second product's operands lie if they can be multiplied together with the first one's.
        let joined = frozen.as_ref().and_then(|frozen| dy.behind(rows).zip(frozen.w.below(rows)));
        let (joined_rows, joined_weight) = joined.unzip();
        let dparams = dparams.map(|dparams| self.f32(dparams, args.slot.a.end.max(args.slot.b.end)));
        let db = dparams.map_or(Ptr::NULL, |dparams| dparams.f32(args.slot.b.start));
        let up = LoraUpBackward { dy, adapter_state, adapter: &adapter.launched };
        let gradient = self.gate_gradient(state, &adapter, &up, (db, joined_rows), args.balance)?;
        if let Some(dparams) = dparams {
            let x = self.operand(&mut state.x, &x.0, tokens, weight.columns)?;
            let (da, rows) = (dparams.f32(args.slot.a.start), gradient.d_adapter_state_bf16);
            self.weight_grad(&mut state.partial, &launch::da(da, x, rows, &adapter.launched))?;
        }
        frozen.map_or(Ok(()), |frozen| self.adapted_dx(state, &frozen, &adapter, (&gradient, joined_weight)))
    }

    /// The gradient of `adapter_state`, with the load-balancing loss of this coefficient; and `db`, unless it is null. What
    /// [`second`] returns is written to `joined`, or, if that is none, to memory of the backend's.
    fn gate_gradient(
        &self,
        state: &mut State<D>,
        adapter: &Adapter,
        up: &LoraUpBackward<'_>,
        (db, joined): (Ptr, Option<Operand>),
        balance: f32,
    ) -> Result<GateGradient> {
        let (driver, &Adapter { ref shape, ref launched, b, .. }) = (&self.driver, adapter);
        let (tokens, rows) = (up.dy.rows, launched.stacked_rows);
        let drops = launched.dropout.drops();
        let place = |area: &mut Area<D>, is_second: bool| match joined.filter(|_| is_second) {
            Some(joined) => Ok(joined),
            None => area.operand(driver, tokens, rows),
        };
        let out = GateGradient {
            d_adapter_state: state.d_adapter_state.f32(driver, tokens as usize * shape.state_width())?,
            d_adapter_state_bf16: place(&mut state.adapter_rows, !drops)?,
            d_router_bf16: if drops && shape.router { Some(place(&mut state.d_router, true)?) } else { None },
            db,
        };
        let mut balance_loss_grad = Ptr::NULL;
        if balance != 0.0 && shape.router {
            balance_loss_grad = state.balance_loss_grad.f32(driver, shape.lora_heads)?;
            self.run(&launch::balance_loss_grad(balance_loss_grad, up.adapter_state, tokens, launched, balance))?;
        }
        let (d_mixed_len, db_len) = (up.d_mixed_len(), if db == Ptr::NULL { 0 } else { up.db_len() });
        let d_mixed = state.partial.f32(driver, d_mixed_len + db_len)?;
        let parts = LoraUpParts { d_mixed, db: if db == Ptr::NULL { db } else { d_mixed.f32(d_mixed_len) } };
        self.run(&up.products(parts, b))?;
        self.run(&up.gate(&out, parts, balance_loss_grad))?;
        Ok(out)
    }

    /// A weight gradient, with `partial` for its parts.
    fn weight_grad(&self, partial: &mut Area<D>, grad: &WeightGrad) -> Result<()> {
        if grad.parts_len() == 0 {
            return self.run(&grad.sum(Ptr::NULL));
        }
        let parts = partial.f32(&self.driver, grad.parts_len())?;
        self.run(&grad.sum(parts))?;
        self.run(&grad.total(parts))
    }

    /// dx with the adapter's part. [A; R] is written to `joined` as an operand, or, if that is none, to memory of the
    /// backend's. With dropout, A's part of dx is added last, after dropout; the router's is not dropped.
    fn adapted_dx(
        &self,
        state: &mut State<D>,
        frozen: &Frozen,
        adapter: &Adapter,
        (gradient, joined): (&GateGradient, Option<Operand>),
    ) -> Result<()> {
        let &Adapter { ref launched, a, .. } = adapter;
        let (tokens, d_in, rows) = (frozen.dy.rows, frozen.w.columns, launched.stacked_rows);
        let second = match second(gradient, launched) {
            None => None,
            Some(d_adapter_state) => {
                let b = match joined {
                    Some(joined) => self.round(joined, a, launch::padded(rows))?,
                    None => self.round(state.adapter_b.operand(&self.driver, rows, d_in)?, a, rows)?,
                };
                Some(SecondProduct { a: d_adapter_state, b })
            }
        };
        self.frozen_dx(frozen, second)?;
        if launched.dropout.drops() {
            let (d_adapter_state, dx) = (gradient.d_adapter_state, (frozen.dx, frozen.pitch));
            self.run(&launch::dropped_dx(dx, [tokens, d_in], d_adapter_state, a, launched))?;
        }
        Ok(())
    }

    fn frozen_dx(&self, frozen: &Frozen, second: Option<SecondProduct>) -> Result<()> {
        let &Frozen { dx: c, pitch: c_pitch, addend, dy: a, ref w } = frozen;
        self.multiply(&Product { c, c_pitch, addend, form: Form::Columns, a, w, second })
    }
}
