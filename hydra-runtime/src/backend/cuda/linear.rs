//! A frozen linear layer and its adapter, forward: which launches, in which order.

use super::buffer::{Memory, size};
use super::driver::Driver;
use super::launcher::Cuda;
use super::state::State;
use crate::Result;
use crate::backend::{AdapterArgs, DropoutKey, GateKind, Linear, LinearOutput};
use hydra_kernels::shape::HydraShape;
use hydra_ptx::launch::{
    self, Form, LoraDown, Mask, Matrix, MatrixRows, Operand, Output, Product, Ptr, SecondMatvec, SecondProduct, Values,
};
use hydra_ptx::sizes::{GATE_LABEL, GATE_ONE, GATE_ROUTER, GATE_UNIFORM, MATVEC_TOKENS};

/// An adapter's shape, gate and parameters on the device.
pub(super) struct Adapter {
    pub shape: HydraShape,
    pub launched: launch::Adapter,
    /// [A; R].
    pub a: Ptr,
    pub b: Ptr,
}

impl Adapter {
    pub(super) fn new<D: Driver>(
        cuda: &Cuda<D>,
        state: &mut State<D>,
        args: &AdapterArgs<'_, Cuda<D>>,
        tokens: usize,
    ) -> Result<Self> {
        let (slot, shape) = (args.slot, args.slot.shape);
        // Kernels number the values of these matrices, rows padded, in 32 bits.
        let matrices = [(shape.stacked_rows(), shape.d_in), (shape.d_out.max(tokens), shape.mixed_width())];
        for (rows, columns) in matrices {
            size(rows * columns.next_multiple_of(8))?;
        }
        let (gate, labels) = match slot.gate {
            GateKind::Router => (GATE_ROUTER, Ptr::NULL),
            GateKind::Label => (GATE_LABEL, state.ids.on_device(&cuda.driver, &args.labels[..tokens])?),
            GateKind::Uniform => (GATE_UNIFORM, Ptr::NULL),
            GateKind::One => (GATE_ONE, Ptr::NULL),
        };
        let launched = launch::Adapter {
            a_rows: size(shape.a_rows())?,
            stacked_rows: size(shape.stacked_rows())?,
            lora_heads: size(shape.lora_heads)?,
            rank: size(shape.rank)?,
            per_head_a: shape.per_head_a,
            gate,
            labels,
            inverse_temperature: 1.0 / slot.routing.temperature,
            top_k: u32::try_from(slot.routing.top_k).unwrap_or(u32::MAX),
            scale: slot.scale,
            dropout: mask(args.dropout),
            head_dropout: mask(args.head_dropout),
        };
        let params = cuda.f32(args.params, slot.a.end.max(slot.b.end));
        Ok(Self { shape, launched, a: params.f32(slot.a.start), b: params.f32(slot.b.start) })
    }
}

fn mask(key: Option<DropoutKey>) -> Mask {
    key.map_or(Mask::default(), |key| {
        let dropout = key.mask(0);
        Mask { seed: key.seed, threshold: dropout.threshold(), scale: dropout.scale() }
    })
}

/// The frozen product, once its operands are on the device.
struct Frozen {
    /// [tokens, d_out].
    y: Values,
    /// The residual, or null.
    addend: Ptr,
    x: Operand,
    weight: Matrix,
}

impl<D: Driver> Cuda<D> {
    pub(super) fn linear_forward(&self, args: Linear<'_, Self>) -> Result<()> {
        let Linear { output, tokens, x, weight, bias, adapter } = args;
        let (state, driver, weight) = (&mut *self.state(), &self.driver, weight.of(&self.driver));
        let (y, residual) = match output {
            LinearOutput::Buffer { y, residual } => (&y.0, residual.map(|residual| &residual.0)),
            LinearOutput::Activations { y, residual } => (&y.0, residual.map(|residual| &residual.0)),
        };
        let values = |memory: &Memory<D>| memory.values(driver, tokens * weight.rows as usize);
        let (y, addend) = (values(y), residual.map_or(Ptr::NULL, |residual| values(residual).at));
        let x = self.operand(&mut state.x, &x.0, tokens, weight.columns)?;
        let frozen = Frozen { y, addend, x, weight };
        let adapter = match adapter {
            None => None,
            Some((args, adapter_state)) => {
                let adapter = Adapter::new(self, state, args, tokens)?;
                let adapter_state = self.f32(adapter_state, tokens * adapter.shape.state_width());
                Some((adapter, adapter_state))
            }
        };
        let fits = |(adapter, _): &(Adapter, Ptr)| launch::fits_matvec(x.rows, &adapter.launched);
        if x.rows <= MATVEC_TOKENS && adapter.as_ref().is_none_or(fits) {
            self.linear_matvec(state, &frozen, adapter)?;
        } else {
            self.linear_product(state, &frozen, adapter)?;
        }
        match bias {
            None => Ok(()),
            Some(bias) => self.run(&launch::add_bias(y, x.rows, self.f32(bias, weight.rows as usize), weight.rows)),
        }
    }

    /// For a few tokens: every matrix is read once, in its stored form.
    fn linear_matvec(&self, state: &mut State<D>, frozen: &Frozen, adapter: Option<(Adapter, Ptr)>) -> Result<()> {
        let &Frozen { y, addend, x, ref weight } = frozen;
        let second = match adapter {
            None => None,
            Some((Adapter { launched, a, b, .. }, adapter_state)) => {
                let columns = launched.mixed_width();
                let mixed = state.adapter_rows.operand(&self.driver, x.rows, columns)?;
                self.run(&launch::lora_down_matvec(LoraDown { adapter_state, mixed }, x, a, &launched))?;
                Some(SecondMatvec { x: mixed, w: b })
            }
        };
        let output = Output { y, pitch: weight.rows, addend };
        self.run(&launch::matvec(output, x, weight, MatrixRows::All, second))
    }

    /// For many tokens: matrices become operands of matrix instructions.
    fn linear_product(&self, state: &mut State<D>, frozen: &Frozen, adapter: Option<(Adapter, Ptr)>) -> Result<()> {
        let &Frozen { y, addend, x, weight } = frozen;
        let w = &self.decoded(&mut state.decoded, weight, x.rows)?;
        let second = match adapter {
            None => None,
            Some((Adapter { launched, mut a, b, .. }, adapter_state)) => {
                let (rows, d_in, k) = (launched.stacked_rows, w.columns, launched.mixed_width());
                let (mixed, b_bf16) = match x.behind(k).zip(w.behind(k)) {
                    Some(joined) => joined,
                    None => (
                        state.adapter_rows.operand(&self.driver, x.rows, k)?,
                        state.adapter_b.operand(&self.driver, w.rows, k)?,
                    ),
                };
                if !launch::is_padded(a, d_in) {
                    let padded = state.adapter_weight.take(&self.driver, 4 * launch::pad_len(rows, d_in))?;
                    self.run(&launch::pad(padded, a, rows, d_in))?;
                    a = padded;
                }
                self.run(&launch::lora_down(LoraDown { adapter_state, mixed }, x, a, &launched, (b_bf16, b)))?;
                Some(SecondProduct { a: mixed, b: b_bf16 })
            }
        };
        self.multiply(&Product { c: y, c_pitch: w.rows, addend, form: Form::Rows, a: x, w, second })
    }
}
