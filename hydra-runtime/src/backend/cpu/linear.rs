//! A frozen linear layer and its Hydra adapter, forward and backward.
//!
//! ```text
//! hidden = [x Aᵀ | gate(x Rᵀ)]      y = x Wᵀ + scale · mixed Bᵀ
//! dmixed = scale · dy B             dhidden = [ddown | dlogits]
//! dx = dy W + dhidden [A; R]        dB += scale · dyᵀ mixed       d[A; R] += dhiddenᵀ x
//! ```
//!
//! The adapter's product is a second term of the frozen one: it is added while the tile of y is in registers. The skinny
//! products and the adapter's gradients are f32 in either precision.

use super::product::{Addend, Element, product};
use super::workspace::Area;
use super::{Cpu, Store, Weight};
use crate::Result;
use crate::backend::{AdapterArgs, GateKind, HydraShape};
use hydra_kernels::dropout::{self, Dropout};
use hydra_kernels::gate::{self, Gate};
use hydra_kernels::gemm::{self, PANEL_ALIGN, Panels, Rows, Source, Term};
use hydra_kernels::matvec;
use rayon::prelude::*;

/// Up to this many tokens the weights are read as they are stored, row by row; above, packing panels pays.
const FEW_TOKENS: usize = 4;

/// Weight that is worth waking a thread for: some 20 µs of reading.
const TASK_BYTES: usize = 128 * 1024;

type Args<'a> = AdapterArgs<'a, Cpu>;

#[allow(clippy::too_many_arguments)]
pub(super) fn forward<E: Element>(
    cpu: &Cpu,
    isa: E::Isa,
    y: &mut [f32],
    store: Store,
    tokens: usize,
    x: &[f32],
    weight: &Weight<'_>,
    adapter: Option<(&Args<'_>, &mut [f32])>,
) -> Result<()> {
    let (d_out, d_in) = (weight.rows(), weight.cols());
    let (y, x) = (&mut y[..tokens * d_out], &x[..tokens * d_in]);
    let dropping = adapter.as_ref().is_some_and(|(args, _)| args.dropout.is_some());
    if tokens <= FEW_TOKENS && !dropping {
        return forward_few(cpu, y, store, x, weight, adapter);
    }
    let workspace = &mut *cpu.workspace();
    let frozen = Addend {
        rows: E::operand(cpu, &mut workspace.rows, x)?,
        row_stride: d_in,
        k: d_in,
        source: &|first| Source::WeightRows { weight: *weight, first },
        scale: 1.0,
    };
    let Some((args, hidden)) = adapter else {
        return product(cpu, isa, y, d_out, store, (&frozen, &mut workspace.panels), None);
    };
    let shape = args.slot.shape(tokens);
    let (hidden, mixed) = (&mut hidden[..tokens * shape.hidden()], workspace.mixed.take(tokens * shape.mixed()));
    down(cpu, args, &shape, hidden, x, &mut workspace.adapter_panels, &mut workspace.dropped)?;
    let rows = cpu.row_chunk(tokens);
    cpu.pool.install(|| {
        let hidden = hidden.par_chunks_mut(rows * shape.hidden());
        hidden.zip(mixed.par_chunks_mut(rows * shape.mixed())).enumerate().try_for_each(|(i, (hidden, mixed))| {
            let shape = args.slot.shape(hidden.len() / shape.hidden());
            gate::activate(cpu.isa, &shape, hidden, gate_of(args, i * rows, shape.tokens))?;
            gate::mix(cpu.isa, &shape, mixed, hidden)
        })
    })?;
    let b = &args.params[args.slot.b.clone()];
    let heads = Addend {
        rows: E::operand(cpu, &mut workspace.small_rows, mixed)?,
        row_stride: shape.mixed(),
        k: shape.mixed(),
        source: &|first| Source::Dense { data: &b[first * shape.mixed()..], k_stride: 1, n_stride: shape.mixed() },
        scale: args.slot.scale,
    };
    let heads = (&heads, &mut workspace.adapter_panels);
    product(cpu, isa, y, d_out, store, (&frozen, &mut workspace.panels), Some(heads))
}

/// hidden's columns before the gate: x Aᵀ, and x Rᵀ if there is a router.
fn down(
    cpu: &Cpu,
    args: &Args<'_>,
    shape: &HydraShape,
    hidden: &mut [f32],
    x: &[f32],
    panels: &mut Area,
    dropped: &mut Area,
) -> Result<()> {
    let (d_in, width) = (shape.d_in, shape.hidden());
    let stacked = &args.params[args.slot.a.clone()];
    let rows = cpu.row_chunk(shape.tokens);
    for (first, end, x) in adapter_inputs(cpu, args, shape, x, dropped)? {
        let n = end - first;
        let panels = panels.take::<f32>(gemm::panels_len::<f32>(cpu.isa, d_in, n));
        let source = Source::Dense { data: &stacked[first * d_in..], k_stride: 1, n_stride: d_in };
        gemm::pack(cpu.isa, panels, d_in, n, source, 1.0)?;
        let panels = &*panels;
        cpu.pool.install(|| {
            hidden.par_chunks_mut(rows * width).zip(x.par_chunks(rows * d_in)).try_for_each(|(hidden, x)| {
                let a = Rows { data: x, row_stride: d_in, col_stride: 1 };
                let term = Term { a, b: Panels { data: panels, k: d_in, n } };
                let m = x.len() / d_in;
                gemm::gemm(cpu.isa, &mut hidden[first..], width, m, n, Store::Overwrite, &[term])
            })
        })?;
    }
    Ok(())
}

/// Rows `first .. end` of `[A; R]` and the input that they read: dropout is before A, never before the router.
fn adapter_inputs<'a>(
    cpu: &Cpu,
    args: &Args<'_>,
    shape: &HydraShape,
    x: &'a [f32],
    dropped: &'a mut Area,
) -> Result<impl Iterator<Item = (usize, usize, &'a [f32])>> {
    let (a_rows, stacked) = (shape.a_rows(), shape.stacked_rows());
    let parts = match args.dropout {
        None => [(0, stacked, x), (stacked, stacked, x)],
        Some(key) => {
            let out = dropped.take::<f32>(x.len());
            let rows = cpu.row_chunk(shape.tokens);
            cpu.pool.install(|| {
                let chunks = out.par_chunks_mut(rows * shape.d_in).zip(x.par_chunks(rows * shape.d_in));
                chunks.enumerate().try_for_each(|(i, (out, x))| {
                    let mask = Dropout { p: key.p, seed: key.seed, first_row: (i * rows) as u64 };
                    dropout::dropout(cpu.isa, out, x, shape.d_in, mask)
                })
            })?;
            [(0, a_rows, &*out), (a_rows, stacked, x)]
        }
    };
    Ok(parts.into_iter().filter(|(first, end, _)| first < end))
}

fn gate_of<'a>(args: &Args<'a>, first_row: usize, tokens: usize) -> Gate<'a> {
    match args.slot.gate {
        GateKind::Router => Gate::Router,
        GateKind::Label => Gate::Label(&args.heads[first_row..first_row + tokens]),
        GateKind::Uniform => Gate::Uniform,
        GateKind::One => Gate::One,
    }
}

/// The same for a handful of tokens: memory-bound, so the weights are read straight from their stored form.
fn forward_few(
    cpu: &Cpu,
    y: &mut [f32],
    store: Store,
    x: &[f32],
    weight: &Weight<'_>,
    mut adapter: Option<(&Args<'_>, &mut [f32])>,
) -> Result<()> {
    let (d_out, d_in) = (weight.rows(), weight.cols());
    for (t, (y, x)) in y.chunks_exact_mut(d_out).zip(x.chunks_exact(d_in)).enumerate() {
        let workspace = &mut *cpu.workspace();
        let mut heads = None;
        if let Some((args, hidden)) = &mut adapter {
            let shape = args.slot.shape(1);
            let hidden = &mut hidden[t * shape.hidden()..][..shape.hidden()];
            let stacked = Weight::from_f32(shape.stacked_rows(), d_in, &args.params[args.slot.a.clone()])?;
            matvec(cpu.isa, &mut hidden[..shape.stacked_rows()], stacked, 0, x)?;
            gate::activate(cpu.isa, &shape, hidden, gate_of(args, t, 1))?;
            let mixed = workspace.mixed.take::<f32>(shape.mixed());
            gate::mix(cpu.isa, &shape, mixed, hidden)?;
            mixed.iter_mut().for_each(|value| *value *= args.slot.scale);
            let b = Weight::from_f32(d_out, shape.mixed(), &args.params[args.slot.b.clone()])?;
            heads = Some((b, &*mixed));
        }
        let bytes = weight.format().row_bytes(d_in).unwrap_or(usize::MAX).saturating_mul(d_out);
        let rows = d_out.div_ceil((bytes / TASK_BYTES).clamp(1, cpu.threads));
        cpu.in_parts(y, rows, |first, y| {
            cpu.with_scratch(y.len(), |product| {
                match store {
                    Store::Overwrite => matvec(cpu.isa, y, *weight, first, x)?,
                    Store::Accumulate => {
                        matvec(cpu.isa, product, *weight, first, x)?;
                        add(y, product);
                    }
                }
                if let Some((b, mixed)) = heads {
                    matvec(cpu.isa, product, b, first, mixed)?;
                    add(y, product);
                }
                Ok(())
            })
        })?;
    }
    Ok(())
}

fn add(y: &mut [f32], x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
}

#[allow(clippy::too_many_arguments)]
pub(super) fn backward<E: Element>(
    cpu: &Cpu,
    isa: E::Isa,
    dx: Option<(&mut [f32], Store)>,
    dparams: Option<&mut [f32]>,
    tokens: usize,
    dy: &[f32],
    x: &[f32],
    weight: &Weight<'_>,
    adapter: Option<(&Args<'_>, &[f32])>,
) -> Result<()> {
    let (d_out, d_in) = (weight.rows(), weight.cols());
    let (dy, x) = (&dy[..tokens * d_out], &x[..tokens * d_in]);
    let workspace = &mut *cpu.workspace();
    let mut inner = None;
    if let Some((args, hidden)) = adapter {
        let shape = args.slot.shape(tokens);
        let hidden = &hidden[..tokens * shape.hidden()];
        let mixed = workspace.mixed.take::<f32>(tokens * shape.mixed());
        let dhidden = workspace.dhidden.take::<f32>(hidden.len());
        through_gate(cpu, args, &shape, mixed, dhidden, dy, hidden, &mut workspace.adapter_panels)?;
        if let Some(dparams) = dparams {
            let db = &mut dparams[args.slot.b.clone()];
            db_product(cpu, &shape, db, dy, mixed, args.slot.scale)?;
            let da = &mut dparams[args.slot.a.clone()];
            for (first, end, x) in adapter_inputs(cpu, args, &shape, x, &mut workspace.dropped)? {
                da_product(
                    cpu,
                    &shape,
                    &mut da[first * d_in..end * d_in],
                    x,
                    &dhidden[first..],
                    &mut workspace.gradient,
                )?;
            }
        }
        inner = Some((args, shape, &*dhidden));
    }
    let Some((dx, store)) = dx else { return Ok(()) };
    let dx = &mut dx[..tokens * d_in];
    let frozen = Addend {
        rows: E::operand(cpu, &mut workspace.rows, dy)?,
        row_stride: d_out,
        k: d_out,
        source: &|first| Source::WeightCols { weight: *weight, first },
        scale: 1.0,
    };
    let frozen = (&frozen, &mut workspace.panels);
    let Some((args, shape, dhidden)) = inner else {
        return product(cpu, isa, dx, d_in, store, frozen, None);
    };
    // With dropout only the router's part reaches dx undiminished.
    let first = if args.dropout.is_some() { shape.a_rows() } else { 0 };
    let stacked = &args.params[args.slot.a.clone()];
    let through = Addend {
        rows: &E::operand(cpu, &mut workspace.small_rows, dhidden)?[first..],
        row_stride: shape.hidden(),
        k: shape.stacked_rows() - first,
        source: &|column| Source::Dense { data: &stacked[first * d_in + column..], k_stride: d_in, n_stride: 1 },
        scale: 1.0,
    };
    if through.k == 0 {
        product(cpu, isa, dx, d_in, store, frozen, None)?;
    } else {
        product(cpu, isa, dx, d_in, store, frozen, Some((&through, &mut workspace.adapter_panels)))?;
    }
    let Some(key) = args.dropout else { return Ok(()) };
    let dropped = workspace.dropped.take::<f32>(dx.len());
    let down = Addend {
        rows: dhidden,
        row_stride: shape.hidden(),
        k: shape.a_rows(),
        source: &|column| Source::Dense { data: &stacked[column..], k_stride: d_in, n_stride: 1 },
        scale: 1.0,
    };
    product(cpu, cpu.isa, dropped, d_in, Store::Overwrite, (&down, &mut workspace.panels), None)?;
    let rows = cpu.row_chunk(tokens);
    cpu.pool.install(|| {
        let chunks = dx.par_chunks_mut(rows * d_in).zip(dropped.par_chunks(rows * d_in));
        chunks.enumerate().try_for_each(|(i, (dx, dropped))| {
            let mask = Dropout { p: key.p, seed: key.seed, first_row: (i * rows) as u64 };
            dropout::dropout_accumulate(cpu.isa, dx, dropped, d_in, mask)
        })
    })?;
    Ok(())
}

/// dhidden from dy, by way of dmixed = scale · dy B; and mixed once more, which dB needs.
#[allow(clippy::too_many_arguments)]
fn through_gate(
    cpu: &Cpu,
    args: &Args<'_>,
    shape: &HydraShape,
    mixed: &mut [f32],
    dhidden: &mut [f32],
    dy: &[f32],
    hidden: &[f32],
    panels: &mut Area,
) -> Result<()> {
    let (d_out, n, width) = (shape.d_out, shape.mixed(), shape.hidden());
    let panels = panels.take::<f32>(gemm::panels_len::<f32>(cpu.isa, d_out, n));
    let source = Source::Dense { data: &args.params[args.slot.b.clone()], k_stride: n, n_stride: 1 };
    gemm::pack(cpu.isa, panels, d_out, n, source, args.slot.scale)?;
    let panels = &*panels;
    let rows = cpu.row_chunk(shape.tokens);
    cpu.pool.install(|| {
        let outputs = mixed.par_chunks_mut(rows * n).zip(dhidden.par_chunks_mut(rows * width));
        let inputs = dy.par_chunks(rows * d_out).zip(hidden.par_chunks(rows * width));
        outputs.zip(inputs).enumerate().try_for_each(|(i, ((mixed, dhidden), (dy, hidden)))| {
            let shape = args.slot.shape(hidden.len() / width);
            let a = Rows { data: dy, row_stride: d_out, col_stride: 1 };
            let term = Term { a, b: Panels { data: panels, k: d_out, n } };
            gemm::gemm(cpu.isa, mixed, n, shape.tokens, n, Store::Overwrite, &[term])?;
            gate::mix_backward(cpu.isa, &shape, dhidden, mixed, hidden, gate_of(args, i * rows, shape.tokens))?;
            gate::mix(cpu.isa, &shape, mixed, hidden)?;
            Ok::<_, crate::Error>(())
        })
    })
}

/// dB [d_out, mixed] += scale · dyᵀ mixed, a block of dB's rows a task.
fn db_product(cpu: &Cpu, shape: &HydraShape, db: &mut [f32], dy: &[f32], mixed: &[f32], scale: f32) -> Result<()> {
    let width = shape.mixed();
    cpu.pool.install(|| {
        db.par_chunks_mut(PANEL_ALIGN * width).enumerate().try_for_each(|(i, db)| {
            let rows = db.len() / width;
            let coefficients = Rows { data: mixed, row_stride: 1, col_stride: width };
            let columns = Columns { data: dy, stride: shape.d_out, first: i * PANEL_ALIGN, count: rows };
            transposed_product(cpu, shape.tokens, coefficients, width, columns, scale, |transposed| {
                for (row, db) in db.chunks_exact_mut(width).enumerate() {
                    db.iter_mut().enumerate().for_each(|(j, db)| *db += transposed[j * rows + row]);
                }
            })
        })
    })
}

/// Some rows of d[A; R] += dhiddenᵀ x, a block of columns a task, then added up.
fn da_product(
    cpu: &Cpu,
    shape: &HydraShape,
    da: &mut [f32],
    x: &[f32],
    dhidden: &[f32],
    gradient: &mut Area,
) -> Result<()> {
    let d_in = shape.d_in;
    let height = da.len() / d_in;
    let gradient = gradient.take::<f32>(height * d_in);
    cpu.pool.install(|| {
        gradient.par_chunks_mut(PANEL_ALIGN * height).enumerate().try_for_each(|(i, block)| {
            let coefficients = Rows { data: dhidden, row_stride: 1, col_stride: shape.hidden() };
            let count = block.len() / height;
            let columns = Columns { data: x, stride: d_in, first: i * PANEL_ALIGN, count };
            let write = |product: &[f32]| block.copy_from_slice(product);
            transposed_product(cpu, shape.tokens, coefficients, height, columns, 1.0, write)
        })
    })?;
    for (i, block) in gradient.chunks(PANEL_ALIGN * height).enumerate() {
        let columns = block.len() / height;
        for (da, block) in da.chunks_exact_mut(d_in).zip(block.chunks_exact(columns)) {
            add(&mut da[i * PANEL_ALIGN..][..columns], block);
        }
    }
    Ok(())
}

/// `count` columns of a row-major matrix, from `first` on.
struct Columns<'a> {
    data: &'a [f32],
    stride: usize,
    first: usize,
    count: usize,
}

/// Hands `write` scale · coefficients · columns, [height, count]; the sum is over tokens.
fn transposed_product(
    cpu: &Cpu,
    tokens: usize,
    coefficients: Rows<'_, f32>,
    height: usize,
    columns: Columns<'_>,
    scale: f32,
    write: impl FnOnce(&[f32]),
) -> Result<()> {
    let n = columns.count;
    let panels_len = gemm::panels_len::<f32>(cpu.isa, tokens, n);
    cpu.with_scratch(panels_len + height * n, |scratch| {
        let (panels, out) = scratch.split_at_mut(panels_len);
        let source = Source::Dense { data: &columns.data[columns.first..], k_stride: columns.stride, n_stride: 1 };
        gemm::pack(cpu.isa, panels, tokens, n, source, scale)?;
        let term = Term { a: coefficients, b: Panels { data: panels, k: tokens, n } };
        gemm::gemm(cpu.isa, out, n, height, n, Store::Overwrite, &[term])?;
        write(out);
        Ok(())
    })
}
