//! The gradient of a frozen linear layer and its adapter: which launches, in which order.

use super::driver::Driver;
use super::launcher::Cuda;
use super::linear::Adapter;
use super::state::{Area, State};
use crate::Result;
use crate::backend::{Accumulate, AnyBuffer, AnyBufferMut, LinearBackward};
use hydra_ptx::launch::{
    self, Form, LoraUpBackward, LoraUpInputs, Matrix, Operand, Product, Ptr, SecondProduct, Values, WeightGrad,
};

/// dx = addend + dy W, once the operands are on the device.
struct Frozen {
    dx: Values,
    /// dx itself where it is added to, else null.
    addend: Ptr,
    dy: Operand,
    weight: Matrix,
}

/// The gradient behind the gate.
struct GateGradient {
    /// [tokens, a_rows + lora_heads].
    d_adapter_state: Ptr,
    /// Its columns for the rows of [A; R], as an operand.
    d_adapter_state_bf16: Ptr,
    /// The same with zeros in A's columns; null unless there are dropout and a router.
    d_router_bf16: Ptr,
    /// gate ∘ lora_down as an operand.
    mixed: Ptr,
}

impl<D: Driver> Cuda<D> {
    pub(super) fn linear_gradient(&self, args: LinearBackward<'_, Self>) -> Result<()> {
        let LinearBackward { dx, dparams, tokens, dy, x, weight, adapter } = args;
        let (state, driver, weight) = (&mut *self.state(), &self.driver, weight.of(&self.driver));
        let dx = dx.map(|(dx, accumulate)| {
            let dx = match dx {
                AnyBufferMut::Buffer(dx) => &dx.0,
                AnyBufferMut::Activations(dx) => &dx.0,
            };
            let dx = dx.values(driver, tokens * weight.columns as usize);
            (dx, if accumulate == Accumulate::Add { dx.at } else { Ptr::NULL })
        });
        let dy = match dy {
            AnyBuffer::Buffer(dy) => &dy.0,
            AnyBuffer::Activations(dy) => &dy.0,
        };
        let dy = self.operand(&mut state.dy, dy, tokens, weight.rows)?;
        let frozen = dx.map(|(dx, addend)| Frozen { dx, addend, dy, weight });
        let Some((args, adapter_state)) = adapter else {
            return frozen.map_or(Ok(()), |frozen| self.frozen_dx(state, &frozen, None));
        };
        let adapter = Adapter::new(self, state, args, tokens)?;
        let adapter_state = self.f32(adapter_state, tokens * adapter.shape.state_width());
        let gradient = self.gate_gradient(state, &adapter, adapter_state, dy, args.balance)?;
        if let Some(dparams) = dparams {
            let x = self.operand(&mut state.x, &x.0, tokens, weight.columns)?;
            let dparams = self.f32(dparams, args.slot.a.end.max(args.slot.b.end));
            let (da, db) = (dparams.f32(args.slot.a.start), dparams.f32(args.slot.b.start));
            let launched = &adapter.launched;
            self.weight_grad(&mut state.partial, &launch::db(db, dy, gradient.mixed, launched))?;
            self.weight_grad(&mut state.partial, &launch::da(da, x, gradient.d_adapter_state_bf16, launched))?;
        }
        frozen.map_or(Ok(()), |frozen| self.adapted_dx(state, &frozen, &adapter, &gradient))
    }

    /// The gradient of `adapter_state`, with the load-balancing loss of this coefficient.
    fn gate_gradient(
        &self,
        state: &mut State<D>,
        adapter: &Adapter,
        adapter_state: Ptr,
        dy: Operand,
        balance: f32,
    ) -> Result<GateGradient> {
        let (driver, &Adapter { ref shape, ref launched, b, .. }) = (&self.driver, adapter);
        let (tokens, rows, k) = (dy.rows, launched.stacked_rows, launched.mixed_width());
        let count = tokens as usize;
        let mut out = LoraUpBackward {
            d_adapter_state: state.d_adapter_state.f32(driver, count * shape.state_width())?,
            d_adapter_state_bf16: state.adapter_rows.operand(driver, tokens, rows)?.at,
            d_router_bf16: Ptr::NULL,
            mixed: state.mixed.operand(driver, tokens, k)?.at,
            d_mixed: state.d_mixed.f32(driver, count * shape.mixed_width())?,
        };
        if launched.dropout.drops() && shape.router {
            out.d_router_bf16 = state.d_router.operand(driver, tokens, rows)?.at;
        }
        let mut balance_loss_grad = Ptr::NULL;
        if balance != 0.0 && shape.router {
            balance_loss_grad = state.balance_loss_grad.f32(driver, shape.lora_heads)?;
            self.run(&launch::balance_loss_grad(balance_loss_grad, adapter_state, tokens, launched, balance))?;
        }
        let b = self.rounded(&mut state.adapter_weight, b, dy.columns, k)?.at;
        let inputs = LoraUpInputs { b, adapter_state, balance_loss_grad };
        self.run(&launch::lora_up_backward(&out, dy, &inputs, launched))?;
        let LoraUpBackward { d_adapter_state, d_adapter_state_bf16, d_router_bf16, mixed, .. } = out;
        Ok(GateGradient { d_adapter_state, d_adapter_state_bf16, d_router_bf16, mixed })
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

    /// dx with the adapter's part. With dropout, A's part of it is added last, after dropout; the router's is not
    /// dropped.
    fn adapted_dx(
        &self,
        state: &mut State<D>,
        frozen: &Frozen,
        adapter: &Adapter,
        gradient: &GateGradient,
    ) -> Result<()> {
        let &Adapter { ref shape, ref launched, a, .. } = adapter;
        let (tokens, d_in, k, drops) =
            (frozen.dy.rows, frozen.weight.columns, launched.stacked_rows, launched.dropout.drops());
        let second = if drops && !shape.router {
            None
        } else {
            let b = self.rounded(&mut state.adapter_weight, a, k, d_in)?.at;
            let a = if drops { gradient.d_router_bf16 } else { gradient.d_adapter_state_bf16 };
            Some(SecondProduct { a, k, b })
        };
        self.frozen_dx(state, frozen, second)?;
        if drops {
            let d_adapter_state = gradient.d_adapter_state;
            self.run(&launch::dropped_dx(frozen.dx, [tokens, d_in], d_adapter_state, a, launched))?;
        }
        Ok(())
    }

    fn frozen_dx(&self, state: &mut State<D>, frozen: &Frozen, second: Option<SecondProduct>) -> Result<()> {
        let &Frozen { dx, addend, dy, weight } = frozen;
        let w = &self.decoded(&mut state.decoded, weight, dy.rows)?;
        self.multiply(&Product { c: dx, addend, m: dy.rows, form: Form::Columns, a: dy.at, w, second })
    }
}
