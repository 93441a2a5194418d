//! [`Backend::linear_rows`](crate::backend::Backend::linear_rows) while sequences are generated: one row of each.
//!
//! Weights are read as they are stored, each once for all rows, and rows of different adapters share the frozen
//! products. A row has the bits that it would have alone. (`operator::many` is the same for rows of prompts.)

use super::buffer::{Element, chunks, convert};
use super::exec::Exec;
use super::parts::{Part, TASK_BYTES, add_bias, mixed_of};
use super::q8::quantized;
use super::workspace::Workspace;
use crate::Result;
use hydra_kernels::Scratch;
use hydra_kernels::gemm::{Values, ValuesMut};
use hydra_kernels::hydra::{Few, ForwardArgs, HydraLayer, few_batch_scratch};
use hydra_kernels::q8::{product, product_scratch};
use std::ops::Range;

/// Columns of y that a thread computes at a time: their sums for all rows stay in its L1 or L2.
const COLUMNS: usize = 256;

/// A part whose mixed heads have been computed.
struct Adapted<'a> {
    few: Few<'a>,
    rows: Range<usize>,
    mixed: &'a [f32],
}

/// `y` [rows, d_out] of `x` [rows, d_in], the rows of all parts; the parts have the same weight.
pub(super) fn decode<E: Element>(
    exec: Exec<'_, E>,
    x: Values<'_>,
    parts: Vec<Part<'_>>,
    bias: Option<&[f32]>,
    y: ValuesMut<'_>,
) -> Result<()> {
    let (cpu, Some(weight)) = (exec.cpu, parts.first().map(|part| part.layer.weight)) else { return Ok(()) };
    let (d_in, d_out) = (weight.cols(), weight.rows());
    let Workspace { widened, mixed, quantized: area, .. } = &mut *cpu.workspaces.take();
    let x = match x {
        Values::F32(x) => x,
        Values::Bf16(_) => {
            let widened = widened.take::<f32>(x.len())?;
            convert(cpu.bf16_isa, ValuesMut::F32(widened), x)?;
            widened
        }
    };
    let in_eight_bits = cpu.in_eight_bits(weight).then(|| quantized(cpu, Values::F32(x), d_in, area)).transpose()?;
    let rows: usize = parts.iter().map(|part| part.args.tokens).sum();
    let mixed = mixed_of(&parts, mixed)?;
    let (mut tasks, mut adapted, mut first) = (Vec::new(), Vec::new(), 0);
    for (part, mixed) in parts.into_iter().zip(mixed) {
        let rows = first..first + part.args.tokens;
        let args = ForwardArgs { x: Values::F32(&x[rows.start * d_in..rows.end * d_in]), ..part.args };
        tasks.push((Few::batch(cpu.isa, part.layer, args, &mut [])?, part.adapter_state, mixed));
        first = rows.end;
    }
    cpu.threads.each(tasks.iter_mut(), |_, (few, adapter_state, mixed)| Ok(few.adapter_rows(adapter_state, mixed)?))?;
    let mut first = 0;
    for (few, _, mixed) in tasks {
        let rows = first..first + few.tokens();
        first = rows.end;
        adapted.push(Adapted { few, rows, mixed });
    }
    let frozen = HydraLayer { weight, adapter: None };
    let products = Few::batch(cpu.isa, frozen, ForwardArgs::new(rows, x), &mut [])?;

    let bytes = weight.format().row_bytes(d_in).unwrap_or(usize::MAX).saturating_mul(d_out);
    let share = d_out.div_ceil((bytes / TASK_BYTES).clamp(1, cpu.threads()));
    let scratch = Scratch::lines::<f32>(rows * COLUMNS).and(few_batch_scratch(rows, COLUMNS));
    let scratch = scratch.and(if in_eight_bits.is_some() { product_scratch(d_in) } else { Scratch(0) });
    cpu.threads.each(columns(y, d_out, share).into_iter(), |i, mut y| {
        let (first, end) = (i * share, d_out.min((i + 1) * share));
        for start in (first..end).step_by(COLUMNS) {
            let columns = start..end.min(start + COLUMNS);
            let n = columns.len();
            cpu.with_workspace(scratch, |workspace| {
                let sums = workspace.take_lines::<f32>(rows * n)?;
                match in_eight_bits {
                    Some(x) => product(cpu.q8_isa, sums, weight, columns.clone(), x, workspace)?,
                    None => products.products(columns.clone(), sums)?,
                }
                for Adapted { few, rows, mixed } in &adapted {
                    few.add_adapter(columns.clone(), mixed, &mut sums[rows.start * n..rows.end * n], workspace)?;
                }
                if let Some(bias) = bias {
                    add_bias(cpu, ValuesMut::F32(sums), &bias[columns]);
                }
                for (y, sums) in y.iter_mut().zip(sums.chunks_exact(n)) {
                    convert(cpu.bf16_isa, y.reborrow().skip(start - first).first(n), Values::F32(sums))?;
                }
                Ok::<_, crate::Error>(())
            })?;
        }
        Ok(())
    })
}

/// The columns of each task, `share` of them: a piece of each row of `y` [rows, d_out].
fn columns(y: ValuesMut<'_>, d_out: usize, share: usize) -> Vec<Vec<ValuesMut<'_>>> {
    let mut tasks: Vec<Vec<ValuesMut<'_>>> = (0..d_out.div_ceil(share)).map(|_| Vec::new()).collect();
    for row in chunks(y, d_out) {
        tasks.iter_mut().zip(chunks(row, share)).for_each(|(task, piece)| task.push(piece));
    }
    tasks
}
