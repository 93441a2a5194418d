//! A frozen linear layer and its Hydra adapter, forward and backward: which launches, in which order. The mathematics is that of
//! `backend/cpu/linear.rs`.

use super::buffer::Memory;
use super::state::{Area, State};
use super::{Cuda, Driver, size};
use crate::Result;
use crate::backend::{
    Accumulate, AdapterArgs, AnyBuffer, AnyBufferMut, DropoutKey, GateKind, Linear, LinearBackward, LinearOutput,
};
use hydra_kernels::shape::HydraShape;
use hydra_ptx::launch::{self, Form, Heads, Mask, More, Outer, Output, Product, Ptr, Second, UpBackward, Values};
use hydra_ptx::sizes::{FEW_TOKENS, GATE_LABEL, GATE_ONE, GATE_ROUTER, GATE_UNIFORM, SHARED_MOST, few_shared};

type Args<'a, D> = AdapterArgs<'a, Cuda<D>>;

/// An adapter as launches take it.
struct Adapter {
    shape: HydraShape,
    heads: Heads,
    a: Ptr,
    b: Ptr,
    scale: f32,
    mask: Mask,
}

impl Adapter {
    fn new<D: Driver>(cuda: &Cuda<D>, state: &mut State<D>, args: &Args<'_, D>, tokens: usize) -> Result<Self> {
        let shape = args.slot.shape;
        let gate = match args.slot.gate {
            GateKind::Router => GATE_ROUTER,
            GateKind::Label => GATE_LABEL,
            GateKind::Uniform => GATE_UNIFORM,
            GateKind::One => GATE_ONE,
        };
        let labels = match args.slot.gate {
            GateKind::Label => state.ids.on_device(&cuda.driver, &args.labels[..tokens])?,
            _ => Ptr::NULL,
        };
        let heads = Heads {
            a_rows: size(shape.a_rows())?,
            stacked: size(shape.stacked_rows())?,
            heads: size(shape.lora_heads)?,
            rank: size(shape.rank)?,
            per_head: shape.per_head_a,
            gate,
            labels,
            sharpness: 1.0 / args.slot.routing.temperature,
            top_k: u32::try_from(args.slot.routing.top_k).unwrap_or(u32::MAX),
            mask: mask(args.head_dropout),
        };
        let params = cuda.f32(args.params, args.slot.a.end.max(args.slot.b.end));
        let (a, b) = (params.f32(args.slot.a.start), params.f32(args.slot.b.start));
        Ok(Self { shape, heads, a, b, scale: args.slot.scale, mask: mask(args.dropout) })
    }

    fn drops(&self) -> bool {
        self.mask.threshold > 0
    }

    fn drops_heads(&self) -> bool {
        self.heads.mask.threshold > 0
    }

    /// Whether the kernels for a few tokens do for it.
    fn takes_few(&self) -> bool {
        !self.drops() && !self.drops_heads() && few_shared(self.heads.stacked) <= SHARED_MOST
    }
}

fn mask(key: Option<DropoutKey>) -> Mask {
    key.map_or(Mask::default(), |key| {
        let dropout = key.mask(0);
        Mask { seed: key.seed, threshold: dropout.threshold(), scale: dropout.scale() }
    })
}

impl<D: Driver> Cuda<D> {
    pub(super) fn linear_forward(&self, args: Linear<'_, Cuda<D>>) -> Result<()> {
        let Linear { output, tokens, x, weight, adapter } = args;
        let (state, driver, weight) = (&mut *self.state(), &self.driver, weight.of(&self.driver));
        let count = size(tokens)?;
        let (y, residual) = match output {
            LinearOutput::Buffer { y, residual } => (&y.0, residual.map(|residual| &residual.0)),
            LinearOutput::Activations { y, residual } => (&y.0, residual.map(|residual| &residual.0)),
        };
        let place = |memory: &Memory<D>| memory.values(driver, tokens * weight.rows as usize);
        let (y, before) = (place(y), residual.map_or(Ptr::NULL, |residual| place(residual).at));
        let x = self.operand(&mut state.x, &x.0, tokens, weight.columns)?;
        let adapter = match adapter {
            None => None,
            Some((args, adapter_state)) => {
                let adapter = Adapter::new(self, state, args, tokens)?;
                let adapter_state = self.f32(adapter_state, tokens * adapter.shape.state_width());
                Some((adapter, adapter_state))
            }
        };
        if count <= FEW_TOKENS && adapter.as_ref().is_none_or(|(adapter, _)| adapter.takes_few()) {
            let more = match &adapter {
                None => None,
                Some((adapter, adapter_state)) => {
                    let &Adapter { heads, a, b, scale, .. } = adapter;
                    let mixed = state.small_rows.operand(driver, count, heads.mixed())?;
                    self.run(&launch::few_down(*adapter_state, mixed, count, x, weight.columns, a, &heads, scale))?;
                    Some(More { x: mixed, w: b, columns: heads.mixed() })
                }
            };
            let output = Output { y, pitch: weight.rows, before };
            return self.run(&launch::matvec(output, count, x, &weight, None, more));
        }
        let second = match &adapter {
            None => None,
            Some((adapter, adapter_state)) => {
                let &Adapter { heads, a, b, scale, mask, .. } = adapter;
                let mixed = state.small_rows.operand(driver, count, heads.mixed())?;
                let stacked = state.small.take(driver, 2 * launch::split_len(heads.stacked, weight.columns))?;
                self.run(&launch::split(stacked, a, heads.stacked, weight.columns))?;
                self.run(&launch::down(*adapter_state, mixed, count, x, weight.columns, stacked, &heads, scale, mask))?;
                let b_operand = state.small.operand(driver, weight.rows, heads.mixed())?;
                self.run(&launch::operand(b_operand, Values::f32(b), weight.rows, heads.mixed()))?;
                Some(Second { a: mixed, k: heads.mixed(), b: b_operand })
            }
        };
        let weight = self.decoded(&mut state.decoded, weight, count)?;
        self.multiply(&Product { c: y, before, m: count, form: Form::Rows, a: x, w: &weight, second })
    }

    /// A sum over tokens, with `partial` for its parts.
    fn sum(&self, partial: &mut Area<D>, outer: &Outer) -> Result<()> {
        if outer.parts() == 0 {
            return self.run(&outer.sum(Ptr::NULL));
        }
        let parts = partial.f32(&self.driver, outer.parts())?;
        self.run(&outer.sum(parts))?;
        self.run(&outer.total(parts))
    }

    pub(super) fn linear_gradient(&self, args: LinearBackward<'_, Cuda<D>>) -> Result<()> {
        let LinearBackward { dx, dparams, tokens, dy, x, weight, adapter } = args;
        let (state, driver, weight) = (&mut *self.state(), &self.driver, weight.of(&self.driver));
        let (count, d_in, d_out) = (size(tokens)?, weight.columns, weight.rows);
        let dx = dx.map(|(dx, store)| {
            let dx = match dx {
                AnyBufferMut::Buffer(dx) => &dx.0,
                AnyBufferMut::Activations(dx) => &dx.0,
            };
            let dx = dx.values(driver, tokens * d_in as usize);
            (dx, if store == Accumulate::Add { dx.at } else { Ptr::NULL })
        });
        let dy = match dy {
            AnyBuffer::Buffer(dy) => &dy.0,
            AnyBuffer::Activations(dy) => &dy.0,
        };
        let dy = self.operand(&mut state.dy, dy, tokens, d_out)?;
        let Some((args, adapter_state)) = adapter else {
            let Some((dx, before)) = dx else { return Ok(()) };
            let (weight, form) = (self.decoded(&mut state.decoded, weight, count)?, Form::Columns);
            return self.multiply(&Product { c: dx, before, m: count, form, a: dy, w: &weight, second: None });
        };
        let adapter = Adapter::new(self, state, args, tokens)?;
        let &Adapter { ref shape, heads, a, b, scale, mask } = &adapter;
        let adapter_state = self.f32(adapter_state, tokens * shape.state_width());
        let mut out = UpBackward {
            d_adapter_state: state.d_adapter_state.f32(driver, tokens * shape.state_width())?,
            dhidden16: state.small_rows.operand(driver, count, heads.stacked)?,
            through: Ptr::NULL,
            mixed: state.mixed.operand(driver, count, heads.mixed())?,
            dmixed: state.dmixed.f32(driver, tokens * shape.mixed_width())?,
        };
        // With dropout only the router's part reaches dx undiminished.
        if adapter.drops() && shape.router {
            out.through = state.through.operand(driver, count, heads.stacked)?;
        }
        let mut push = Ptr::NULL;
        if args.balance != 0.0 && shape.router {
            push = state.push.f32(driver, shape.lora_heads)?;
            self.run(&launch::gate_push(push, adapter_state, count, &heads, args.balance))?;
        }
        let b_operand = state.small.operand(driver, d_out, heads.mixed())?;
        self.run(&launch::operand(b_operand, Values::f32(b), d_out, heads.mixed()))?;
        self.run(&launch::up_backward(&out, count, dy, d_out, b_operand, adapter_state, push, &heads, scale))?;
        if let Some(dparams) = dparams {
            let x = self.operand(&mut state.x, &x.0, tokens, d_in)?;
            let dparams = self.f32(dparams, args.slot.a.end.max(args.slot.b.end));
            let (da, db) = (dparams.f32(args.slot.a.start), dparams.f32(args.slot.b.start));
            self.sum(&mut state.partial, &launch::db(db, count, dy, d_out, out.mixed, &heads, scale))?;
            self.sum(&mut state.partial, &launch::da(da, count, x, d_in, out.dhidden16, &heads, mask))?;
        }
        let Some((dx, before)) = dx else { return Ok(()) };
        let second = if adapter.drops() && !shape.router {
            None
        } else {
            let stacked = state.small.operand(driver, heads.stacked, d_in)?;
            self.run(&launch::operand(stacked, Values::f32(a), heads.stacked, d_in))?;
            let a = if adapter.drops() { out.through } else { out.dhidden16 };
            Some(Second { a, k: heads.stacked, b: stacked })
        };
        let weight = self.decoded(&mut state.decoded, weight, count)?;
        self.multiply(&Product { c: dx, before, m: count, form: Form::Columns, a: dy, w: &weight, second })?;
        if adapter.drops() {
            self.run(&launch::dropped_add(dx, count, d_in, out.d_adapter_state, a, &heads, mask))?;
        }
        Ok(())
    }
}
