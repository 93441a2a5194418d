//! A frozen linear layer and its Hydra adapter, forward and backward.
//!
//! ```text
//! adapter_state = [x Aᵀ | gate(x Rᵀ)]      y = x Wᵀ + scale · mixed Bᵀ
//! dmixed = scale · dy B             d_adapter_state = [ddown | dlogits]
//! dx = dy W + d_adapter_state [A; R]        dB += scale · dyᵀ mixed       d[A; R] += dhiddenᵀ x
//! ```
//!
//! A task takes some rows through the skinny product, the gate and the frozen product while they are in its cache; the
//! adapter's product is a second term of the frozen one, added while the tile of y is in registers.

use super::buffer::{Element, carve, chunks, floats};
use super::gate::{mix_rows, push_of, unmix_rows};
use super::gradient::{Areas, adapter_gradients};
use super::product::{Onto, Operand, column_block, columns_of, pack, product};
use super::workspace::{Area, Workspace};
use super::{Accumulate, Cpu, Weight};
use crate::Result;
use crate::backend::{AdapterArgs, DropoutKey, HydraShape};
use half::bf16;
use hydra_kernels::dropout;
use hydra_kernels::gemm::{self, MatRef, Panels, Source, Term, Values, ValuesMut};
use hydra_kernels::matvec;

/// Up to this many tokens the weights are read as they are stored, row by row; above, packing panels pays.
const FEW_TOKENS: usize = 4;

/// Weight that is worth handing to another thread: some microseconds of reading.
const TASK_BYTES: usize = 32 * 1024;

pub(super) type Args<'a> = AdapterArgs<'a, Cpu>;

/// `count` rows from `first` on of a row-major matrix.
fn rows_of(x: Values<'_>, first: usize, width: usize) -> MatRef<'_> {
    MatRef::row_major(x.skip(first * width), width)
}

/// The stacked [A; R] and B, as the products read them.
#[derive(Clone, Copy)]
pub(super) struct Parameters<'a> {
    pub shape: HydraShape,
    pub scale: f32,
    stacked: &'a [f32],
    b: &'a [f32],
}

impl<'a> Parameters<'a> {
    fn of(args: &Args<'a>) -> Self {
        let params = args.params;
        let slot = args.slot;
        let (stacked, b) = (&params[slot.a.clone()], &params[slot.b.clone()]);
        Self { shape: slot.shape, scale: slot.scale, stacked, b }
    }

    /// Rows `first ..` of scale · [A; R], as columns: for x [A; R]ᵀ.
    fn stacked_columns<E: Element>(
        &self,
        isa: E::Isa,
        area: &'a mut Area,
        first: usize,
        end: usize,
        scale: f32,
    ) -> Result<Panels<'a, E>> {
        let (d_in, n) = (self.shape.d_in, end - first);
        let data = Values::F32(&self.stacked[first * d_in..]);
        let area = area.take(gemm::panels_len::<E>(isa, d_in, n));
        pack(isa, area, d_in, n, Source::Dense { data, k_stride: 1, n_stride: d_in }, scale)
    }

    /// scale · B: for dy B.
    fn lora_heads<E: Element>(&self, isa: E::Isa, area: &'a mut Area) -> Result<Panels<'a, E>> {
        let n = self.shape.mixed_width();
        let source = Source::Dense { data: Values::F32(self.b), k_stride: n, n_stride: 1 };
        let area = area.take(gemm::panels_len::<E>(isa, self.shape.d_out, n));
        pack(isa, area, self.shape.d_out, n, source, self.scale)
    }
}

#[allow(clippy::too_many_arguments)]
pub(super) fn forward<E: Element>(
    cpu: &Cpu,
    isa: E::Isa,
    y: ValuesMut<'_>,
    residual: Option<Values<'_>>,
    tokens: usize,
    x: Values<'_>,
    weight: &Weight<'_>,
    adapter: Option<(&Args<'_>, &mut [f32])>,
) -> Result<()> {
    let (d_out, d_in) = (weight.rows(), weight.cols());
    let mut y = y.first(tokens * d_out);
    let dropping = adapter.as_ref().is_some_and(|(args, _)| args.dropout.is_some());
    let dropping_heads = adapter.as_ref().is_some_and(|(args, _)| args.head_dropout.is_some());
    if tokens <= FEW_TOKENS && !dropping && !dropping_heads {
        return forward_few(cpu, y, residual, tokens, x, weight, adapter);
    }
    let workspace = &mut *cpu.workspaces.take();
    let frozen = Operand { k: d_in, source: &|first| Source::WeightRows { weight: *weight, first }, scale: 1.0 };
    let rows = cpu.row_chunk(tokens);
    let (block, onto) = (column_block(cpu, d_in), Onto::from(residual));
    let Some((args, adapter_state)) = adapter else {
        return product::<E>(cpu, isa, y, d_out, onto, x, frozen, &mut workspace.panels);
    };
    let parameters = Parameters::of(args);
    let shape = parameters.shape;
    let adapter_state = &mut adapter_state[..tokens * shape.state_width()];
    let mixed = workspace.mixed.take::<f32>(tokens * shape.mixed_width());
    let Workspace { skinny_panels, router_panels, .. } = workspace;
    let a_end = if dropping { shape.a_rows() } else { shape.stacked_rows() };
    let kept = args.dropout.map_or(1.0, |key| key.mask(0).scale());
    let down = parameters.stacked_columns::<E>(isa, skinny_panels, 0, a_end, kept)?;
    let router = parameters.stacked_columns::<E>(isa, router_panels, a_end, shape.stacked_rows(), 1.0)?;
    let n = shape.mixed_width();
    let lora_heads = Operand {
        k: n,
        source: &|first| Source::Dense { data: Values::F32(&parameters.b[first * n..]), k_stride: 1, n_stride: n },
        scale: parameters.scale,
    };
    for first in (0..d_out).step_by(block) {
        let columns = block.min(d_out - first);
        let w = frozen.pack::<E>(cpu, isa, &mut workspace.panels, first, columns)?;
        let b = lora_heads.pack::<E>(cpu, isa, &mut workspace.adapter_panels, first, columns)?;
        let adapters = adapter_state.chunks_mut(rows * shape.state_width()).zip(mixed.chunks_mut(rows * n));
        let tasks = chunks(y.reborrow(), rows * d_out).into_iter().zip(adapters);
        cpu.threads.each(tasks, |i, (y, (adapter_state, mixed))| {
            if first == 0 {
                before_gate(cpu, isa, args, x, i * rows, adapter_state, &down, &router)?;
                mix_rows(cpu, args, i * rows, mixed, adapter_state)?;
            }
            let frozen = Term { a: rows_of(x, i * rows, d_in), b: w };
            let lora_heads = Term { a: MatRef::row_major(&*mixed, n), b };
            columns_of(cpu, isa, y, d_out, first, onto.rows(i * rows, d_out), &[frozen, lora_heads])
        })?;
    }
    Ok(())
}

/// Some rows of adapter_state before the gate: D(x) Aᵀ, and x Rᵀ if there is a router.
#[allow(clippy::too_many_arguments)]
fn before_gate<E: Element>(
    cpu: &Cpu,
    isa: E::Isa,
    args: &Args<'_>,
    x: Values<'_>,
    first_row: usize,
    adapter_state: &mut [f32],
    down: &Panels<'_, E>,
    router: &Panels<'_, E>,
) -> Result<()> {
    let (d_in, width) = (args.slot.shape.d_in, args.slot.shape.state_width());
    let m = adapter_state.len() / width;
    let product = |adapter_state: &mut [f32], a: MatRef<'_>, b: &Panels<'_, E>| {
        gemm::gemm(isa, adapter_state, width, m, b.n, Accumulate::Overwrite, &[Term { a, b: *b }])
    };
    let rows = rows_of(x, first_row, d_in);
    match args.dropout {
        None => product(adapter_state, rows, down)?,
        Some(key) => {
            cpu.with_scratch(floats::<E>(m * d_in), |scratch| {
                let (dropped, _) = carve::<E>(scratch, m * d_in);
                drop_rows(cpu, key, dropped, x, first_row, d_in)?;
                product(adapter_state, MatRef::row_major(E::values(dropped), d_in), down)?;
                Ok::<_, crate::Error>(())
            })?;
            if router.n > 0 {
                product(&mut adapter_state[down.n..], rows, router)?;
            }
        }
    }
    Ok(())
}

/// `out` = mask ∘ x, as many rows of x from `first_row` on as `out` has; the product that reads it has 1 / (1 − p).
pub(super) fn drop_rows<E: Element>(
    cpu: &Cpu,
    key: DropoutKey,
    out: &mut [E],
    x: Values<'_>,
    first_row: usize,
    d_in: usize,
) -> Result<()> {
    let x = &E::slice(x)?[first_row * d_in..][..out.len()];
    Ok(dropout::dropout_unscaled(cpu.isa, out, x, d_in, key.mask(first_row))?)
}

/// The same for a handful of tokens: memory-bound, so the weights are read straight from their stored form.
fn forward_few(
    cpu: &Cpu,
    mut y: ValuesMut<'_>,
    residual: Option<Values<'_>>,
    tokens: usize,
    x: Values<'_>,
    weight: &Weight<'_>,
    mut adapter: Option<(&Args<'_>, &mut [f32])>,
) -> Result<()> {
    let (d_out, d_in) = (weight.rows(), weight.cols());
    let (mut wide_x, mut wide_y) = (Vec::new(), Vec::new());
    for t in 0..tokens {
        let x = match x {
            Values::F32(x) => &x[t * d_in..][..d_in],
            Values::Bf16(x) => {
                wide_x.clear();
                wide_x.extend(x[t * d_in..][..d_in].iter().map(|x| x.to_f32()));
                &wide_x
            }
        };
        let workspace = &mut *cpu.workspaces.take();
        let mut lora_heads = None;
        if let Some((args, adapter_state)) = &mut adapter {
            let Parameters { shape, stacked, b, scale } = Parameters::of(args);
            let adapter_state = &mut adapter_state[t * shape.state_width()..][..shape.state_width()];
            let stacked = Weight::from_f32(shape.stacked_rows(), d_in, stacked)?;
            matvec(cpu.isa, &mut adapter_state[..shape.stacked_rows()], stacked, 0, x)?;
            let mixed = workspace.mixed.take::<f32>(shape.mixed_width());
            mix_rows(cpu, args, t, mixed, adapter_state)?;
            mixed.iter_mut().for_each(|value| *value *= scale);
            lora_heads = Some((Weight::from_f32(d_out, shape.mixed_width(), b)?, &*mixed));
        }
        let bytes = weight.format().row_bytes(d_in).unwrap_or(usize::MAX).saturating_mul(d_out);
        let rows = d_out.div_ceil((bytes / TASK_BYTES).clamp(1, cpu.threads()));
        let part = |first: usize, y: &mut [f32]| {
            matvec(cpu.isa, y, *weight, first, x)?;
            let Some((b, mixed)) = lora_heads else { return Ok(()) };
            cpu.with_scratch(y.len(), |product| {
                matvec(cpu.isa, product, b, first, mixed)?;
                add(y, product.iter().copied());
                Ok(())
            })
        };
        let residual = residual.map(|residual| residual.skip(t * d_out));
        match &mut y {
            ValuesMut::F32(y) => {
                let y = &mut y[t * d_out..][..d_out];
                cpu.in_parts(y, rows, part)?;
                if let Some(residual) = residual {
                    add(y, f32::slice(residual)?.iter().copied());
                }
            }
            ValuesMut::Bf16(y) => {
                wide_y.resize(d_out, 0.0);
                cpu.in_parts(&mut wide_y, rows, part)?;
                if let Some(residual) = residual {
                    add(&mut wide_y, bf16::slice(residual)?.iter().map(|x| x.to_f32()));
                }
                gemm::to_bf16(cpu.bf16_isa, &mut y[t * d_out..][..d_out], &wide_y)?;
            }
        }
    }
    Ok(())
}

fn add(y: &mut [f32], x: impl Iterator<Item = f32>) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
}

#[allow(clippy::too_many_arguments)]
pub(super) fn backward<E: Element>(
    cpu: &Cpu,
    isa: E::Isa,
    dx: Option<(ValuesMut<'_>, Accumulate)>,
    dparams: Option<&mut [f32]>,
    tokens: usize,
    dy: Values<'_>,
    x: Values<'_>,
    weight: &Weight<'_>,
    adapter: Option<(&Args<'_>, &[f32])>,
) -> Result<()> {
    let (d_out, d_in) = (weight.rows(), weight.cols());
    let rows = cpu.row_chunk(tokens);
    let block = column_block(cpu, d_out);
    let workspace = &mut *cpu.workspaces.take();
    let frozen = Operand { k: d_out, source: &|first| Source::WeightCols { weight: *weight, first }, scale: 1.0 };
    let Some((args, adapter_state)) = adapter else {
        let Some((dx, store)) = dx else { return Ok(()) };
        let dx = dx.first(tokens * d_in);
        return product::<E>(cpu, isa, dx, d_in, store.into(), dy, frozen, &mut workspace.panels);
    };
    let parameters = Parameters::of(args);
    let shape = parameters.shape;
    let (n, width) = (shape.mixed_width(), shape.state_width());
    let adapter_state = &adapter_state[..tokens * width];
    let push = push_of(args, tokens, adapter_state)?;
    let Workspace { mixed, d_adapter_state, dropped, gradient, .. } = workspace;
    let areas = Areas { dropped, gradient };
    let (mixed, d_adapter_state) = (mixed.take::<f32>(tokens * n), d_adapter_state.take::<f32>(tokens * width));
    let lora_heads = parameters.lora_heads::<E>(isa, &mut workspace.skinny_panels)?;
    // dmixed, and by way of it d_adapter_state; and mixed once more, which dB needs.
    let through_gate = |first_row: usize, mixed: &mut [f32], d_adapter_state: &mut [f32]| {
        let (adapter_state, m) = (&adapter_state[first_row * width..][..d_adapter_state.len()], mixed.len() / n);
        let term = Term { a: rows_of(dy, first_row, d_out), b: lora_heads };
        gemm::gemm(isa, &mut *mixed, n, m, n, Accumulate::Overwrite, &[term])?;
        unmix_rows(cpu, args, first_row, d_adapter_state, mixed, adapter_state, &push)
    };
    let Some((dx, store)) = dx else {
        let tasks = mixed.chunks_mut(rows * n).zip(d_adapter_state.chunks_mut(rows * width));
        cpu.threads.each(tasks, |i, (mixed, d_adapter_state)| through_gate(i * rows, mixed, d_adapter_state))?;
        return adapter_gradients::<E>(cpu, isa, args, tokens, dparams, dy, x, mixed, d_adapter_state, areas);
    };
    // With dropout only the router's part reaches dx undiminished.
    let first_row = if args.dropout.is_some() { shape.a_rows() } else { 0 };
    let stacked = Operand {
        k: shape.stacked_rows() - first_row,
        source: &|first| {
            let data = Values::F32(&parameters.stacked[first_row * d_in + first..]);
            Source::Dense { data, k_stride: d_in, n_stride: 1 }
        },
        scale: 1.0,
    };
    let masked = Operand {
        k: first_row,
        source: &|first| Source::Dense { data: Values::F32(&parameters.stacked[first..]), k_stride: d_in, n_stride: 1 },
        scale: 1.0,
    };
    let masked = masked.pack::<E>(cpu, isa, &mut workspace.router_panels, 0, if first_row > 0 { d_in } else { 0 })?;
    let mut dx = dx.first(tokens * d_in);
    for first in (0..d_in).step_by(block) {
        let columns = block.min(d_in - first);
        let w = frozen.pack::<E>(cpu, isa, &mut workspace.panels, first, columns)?;
        let a = stacked.pack::<E>(cpu, isa, &mut workspace.adapter_panels, first, columns)?;
        let adapters = mixed.chunks_mut(rows * n).zip(d_adapter_state.chunks_mut(rows * width));
        let tasks = chunks(dx.reborrow(), rows * d_in).into_iter().zip(adapters);
        cpu.threads.each(tasks, |i, (mut dx, (mixed, d_adapter_state))| {
            if first == 0 {
                through_gate(i * rows, mixed, d_adapter_state)?;
            }
            let frozen = Term { a: rows_of(dy, i * rows, d_out), b: w };
            let through = Term { a: MatRef::row_major(&d_adapter_state[first_row..], width), b: a };
            columns_of(cpu, isa, dx.reborrow(), d_in, first, store.into(), &[frozen, through])?;
            match args.dropout {
                Some(key) if first + columns == d_in => {
                    add_masked(cpu, isa, key, dx, i * rows, d_adapter_state, width, masked)
                }
                _ => Ok(()),
            }
        })?;
    }
    adapter_gradients::<E>(cpu, isa, args, tokens, dparams, dy, x, mixed, d_adapter_state, areas)
}

/// dx += mask ∘ (ddown A) / (1 − p): what reached the dropped input.
#[allow(clippy::too_many_arguments)]
fn add_masked<E: Element>(
    cpu: &Cpu,
    isa: E::Isa,
    key: DropoutKey,
    dx: ValuesMut<'_>,
    first_row: usize,
    d_adapter_state: &[f32],
    width: usize,
    a: Panels<'_, E>,
) -> Result<()> {
    let (d_in, m) = (a.n, d_adapter_state.len() / width);
    let mask = key.mask(first_row);
    cpu.with_scratch(m * d_in, |sums| {
        let term = Term { a: MatRef::row_major(d_adapter_state, width), b: a };
        gemm::gemm(isa, &mut *sums, d_in, m, d_in, Accumulate::Overwrite, &[term])?;
        match dx {
            ValuesMut::F32(dx) => dropout::dropout_accumulate(cpu.isa, dx, sums, d_in, mask)?,
            ValuesMut::Bf16(dx) => dropout::dropout_accumulate(cpu.isa, dx, sums, d_in, mask)?,
        }
        Ok(())
    })
}
