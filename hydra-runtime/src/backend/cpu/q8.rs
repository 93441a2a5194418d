//! Frozen products of activations in eight bits ([`Precision::Q8`]). Adapters, bias and residual are added in f32.

use super::buffer::{Element, chunks, convert};
use super::exec::Exec;
use super::parts::{Packed, PackedParts, Part, RowTask, add_bias, blocks, row_tasks};
use super::workspace::{Area, Workspace};
use super::{Cpu, Precision};
use crate::Result;
use crate::backend::Weight;
use hydra_kernels::gemm::{Accumulate, MatRef, Term, Values, ValuesMut, gemm};
use hydra_kernels::hydra::{adapter_rows_scratch, row_step};
use hydra_kernels::q8::{self, Block, PANEL_ROWS, PanelGroup, panel_groups};
use hydra_kernels::{Float, Scratch};
use std::ops::Range;

/// Rows of x that are worth a task of their own when they are quantized.
const QUANTIZED_ROWS: usize = 16;

impl Cpu {
    /// Whether products with this weight quantize their activations.
    pub(super) fn in_eight_bits(&self, weight: Weight<'_>) -> bool {
        self.precision == Precision::Q8 && q8::serves(weight.format()) && weight.cols() > 0
    }
}

/// `x` [tokens, cols] in eight bits, in `area`.
pub(super) fn quantized<'a>(cpu: &Cpu, x: Values<'_>, cols: usize, area: &'a mut Area) -> Result<&'a [Block]> {
    let (rows, width) = (x.len() / cols, q8::blocks(cols));
    let out = area.take::<Block>(rows * width)?;
    quantize(cpu, out, x, cols)?;
    Ok(out)
}

/// `out` [tokens, blocks] = `x` [tokens, cols] in eight bits.
fn quantize(cpu: &Cpu, out: &mut [Block], x: Values<'_>, cols: usize) -> Result<()> {
    let width = q8::blocks(cols);
    cpu.threads.each(out.chunks_mut(QUANTIZED_ROWS * width), |i, out| {
        let rows = out.len() / width;
        match x.skip(i * QUANTIZED_ROWS * cols).first(rows * cols) {
            Values::F32(x) => Ok(q8::quantize(cpu.isa, out, cols, x)?),
            x => cpu.with_scratch(rows * cols, |wide| {
                convert(cpu.bf16_isa, ValuesMut::F32(wide), x)?;
                Ok(q8::quantize(cpu.isa, out, cols, wide)?)
            }),
        }
    })
}

/// The rows `rows` of W, unpacked into `area` by all threads.
pub(super) fn unpacked<'a>(
    cpu: &Cpu,
    weight: Weight<'_>,
    rows: Range<usize>,
    area: &'a mut Area,
) -> Result<q8::Panels<'a>> {
    let cols = weight.cols();
    let out = area.take::<PanelGroup>(panel_groups(rows.len(), cols))?;
    let share = PANEL_ROWS * cpu.share(rows.len().div_ceil(PANEL_ROWS), usize::MAX);
    cpu.threads.each(out.chunks_mut(panel_groups(share, cols)), |i, out| {
        let first = rows.start + i * share;
        Ok(q8::unpack(cpu.isa, out, weight, first..rows.end.min(first + share))?)
    })?;
    Ok(q8::Panels::new(out, weight, rows.len())?)
}

/// For many tokens: each thread computes some rows of `y`, which belong to one part each. All parts have the same
/// weight.
pub(super) fn many<E: Element>(
    exec: Exec<'_, E>,
    parts: Vec<Part<'_>>,
    bias: Option<&[f32]>,
    mut y: ValuesMut<'_>,
) -> Result<()> {
    let (cpu, Some(weight)) = (exec.cpu, parts.first().map(|part| part.layer.weight)) else { return Ok(()) };
    let (d_in, d_out, width) = (weight.cols(), weight.rows(), q8::blocks(weight.cols()));
    let tokens: usize = parts.iter().map(|part| part.args.tokens).sum();
    let Workspace { panels, parts: areas, mixed, quantized, .. } = &mut *cpu.workspaces.take();
    let quantized = quantized.take::<Block>(tokens * width)?;
    let mut rest = &mut *quantized;
    for part in &parts {
        let (own, others) = rest.split_at_mut(part.args.tokens * width);
        quantize(cpu, own, part.args.x, d_in)?;
        rest = others;
    }
    let rows = cpu.row_chunk(tokens);
    let PackedParts { packed, mut states, mut lora_up } = PackedParts::new(exec, parts, areas, mixed)?;
    let quantized = &*quantized;
    for columns in blocks(cpu, d_out, d_in) {
        let w = unpacked(cpu, weight, columns.clone(), panels)?;
        let mut adapters = Vec::with_capacity(packed.len());
        for (part, lora_up) in packed.iter().zip(&mut lora_up) {
            adapters.push(exec.pack_shared(part.forward.block(columns.clone())?.adapter, lora_up)?);
        }
        cpu.threads.each(row_tasks(&mut states, rows, y.reborrow(), d_out).into_iter(), |_, task| {
            let RowTask { part, rows, first, y, adapter_state, mixed } = task;
            let (Packed { forward, args, stacked }, lora_up) = (&packed[part], adapters[part]);
            let (shape, m, n) = (forward.shape(), rows.len(), columns.len());
            let adapter_scratch = adapter_rows_scratch::<E>(&shape, m, args.dropouts.input.is_some());
            let step = row_step::<f32>();
            // Results in f32 are summed where they belong; others in memory of their own, and then rounded.
            let own = if matches!(y, ValuesMut::F32(_)) { 0 } else { step * n };
            cpu.with_workspace(adapter_scratch.or(Scratch::lines::<f32>(own)), |workspace| {
                if columns.start == 0 {
                    forward.adapter_rows(rows.clone(), stacked, adapter_state, mixed, workspace)?;
                }
                let own = workspace.take_lines::<f32>(own)?;
                for (i, mut y) in chunks(y, step * d_out).into_iter().enumerate() {
                    let (start, end) = (i * step, m.min((i + 1) * step));
                    let (sums, stride) = match y.reborrow() {
                        ValuesMut::F32(y) => (&mut y[columns.start..], d_out),
                        ValuesMut::Bf16(_) => (&mut own[..(end - start) * n], n),
                    };
                    let x = &quantized[(first + start) * width..(first + end) * width];
                    q8::multiply(cpu.q8_isa, sums, stride, w, x)?;
                    if lora_up.k > 0 {
                        let a = MatRef::row_major(&mixed[start * lora_up.k..end * lora_up.k], lora_up.k);
                        let term = Term { a, b: lora_up };
                        gemm(exec.isa, &mut *sums, stride, end - start, n, Accumulate::Add, &[term])?;
                    }
                    let residual = args.residual.map(|residual| residual.skip((rows.start + start) * d_out));
                    let bias = bias.map(|bias| &bias[columns.clone()]);
                    for (row, sums) in sums.chunks_mut(stride).take(end - start).enumerate() {
                        let residual = residual.map(|residual| residual.skip(row * d_out + columns.start).first(n));
                        add(cpu, &mut sums[..n], bias, residual);
                    }
                    if let ValuesMut::Bf16(_) = y {
                        for (y, sums) in chunks(y, d_out).into_iter().zip(own.chunks_exact(n)) {
                            convert(cpu.bf16_isa, y.skip(columns.start).first(n), Values::F32(sums))?;
                        }
                    }
                }
                Ok(())
            })
        })?;
    }
    Ok(())
}

/// Adds a bias and a residual to a row of sums.
fn add(cpu: &Cpu, sums: &mut [f32], bias: Option<&[f32]>, residual: Option<Values<'_>>) {
    #[inline(always)]
    fn add<T: Float>(sums: &mut [f32], residual: &[T]) {
        sums.iter_mut().zip(residual).for_each(|(sum, residual)| *sum += residual.widen());
    }
    if let Some(bias) = bias {
        add_bias(cpu, ValuesMut::F32(sums), bias);
    }
    cpu.isa.vectorize(
        #[inline(always)]
        || match residual {
            Some(Values::F32(residual)) => add(sums, residual),
            Some(Values::Bf16(residual)) => add(sums, residual),
            None => {}
        },
    );
}

/// `out` [tokens, ids] = `x` [tokens, d] times the rows `ids` of the head.
pub(super) fn head_rows(cpu: &Cpu, out: &mut [f32], x: Values<'_>, head: Weight<'_>, ids: &[u32]) -> Result<()> {
    let (d, rows) = (head.cols(), out.len() / ids.len().max(1));
    let workspace = &mut *cpu.workspaces.take();
    let x = quantized(cpu, x.first(rows * d), d, &mut workspace.quantized)?;
    let mut column = vec![0.0; rows];
    cpu.with_workspace(q8::product_scratch(d), |workspace| {
        for (i, &id) in ids.iter().enumerate() {
            q8::product(cpu.q8_isa, &mut column, head, id as usize..id as usize + 1, x, workspace)?;
            out.iter_mut().skip(i).step_by(ids.len()).zip(&column).for_each(|(out, value)| *out = *value);
        }
        Ok(())
    })
}
