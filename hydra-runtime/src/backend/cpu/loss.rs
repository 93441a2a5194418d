//! The head and the cross-entropy in one pass over the vocabulary, by blocks, with a running softmax.
//!
//! With unnormalised weights e_v = exp(l_v − max), nll = max + ln Σ e − l_target and dx = scale · (Σ e_v w_v / Σ e − w_target):
//! the same recurrence as attention's, with the head's rows as keys and as values. So each block of logits is computed once,
//! used for the loss and for its gradient, and forgotten.

use super::buffer::{Element, carve, floats};
use super::lanes::{exponentials, lanes, larger};
use super::product::Operand;
use super::{Cpu, Weight};
use crate::Result;
use crate::backend::Accumulate;
use hydra_kernels::gemm::{self, MatRef, PANEL_ALIGN, Panels, Source, Term, Values};
use hydra_kernels::isa::Bf16Isa;
use hydra_kernels::matvec;

/// Tiles of rows in a task, at most: with a block's logits beside them they stay in L2.
const TILES: usize = 8;

/// Values of the head in a block: its logits and both its packed forms share L2 with a task's rows.
const HEAD_VALUES: usize = 640 * 1024;

/// Running softmax of one row.
#[derive(Clone, Copy)]
struct State {
    max: f32,
    sum: f32,
    target: f32,
}

/// One task: some rows, their states, and their gradients if wanted.
struct RowTask<'a> {
    first: usize,
    states: &'a mut [State],
    dx: Option<&'a mut [f32]>,
}

#[allow(clippy::too_many_arguments)]
pub(super) fn head_loss<E: Element>(
    cpu: &Cpu,
    isa: E::Isa,
    nll: &mut [f32],
    dx: Option<&mut [f32]>,
    x: Values<'_>,
    head: &Weight<'_>,
    targets: &[u32],
    scale: f32,
) -> Result<()> {
    let (d, vocab) = (head.cols(), head.rows());
    let workspace = &mut *cpu.workspaces.take();
    let mut states = vec![State { max: f32::NEG_INFINITY, sum: 0.0, target: 0.0 }; targets.len()];
    let mut dx = dx.map(|dx| &mut dx[..targets.len() * d]);
    if let Some(dx) = &mut dx {
        dx.fill(0.0);
    }
    let share = cpu.row_share(targets.len(), TILES);
    let block = (HEAD_VALUES / d).max(PANEL_ALIGN * cpu.threads()).next_multiple_of(PANEL_ALIGN);
    for first in (0..vocab).step_by(block) {
        let rows = block.min(vocab - first);
        let part = head.slice_rows(first, rows)?;
        let as_columns = |column| Source::WeightRows { weight: part, first: column };
        let as_rows = |column| Source::WeightCols { weight: part, first: column };
        let to_logits = Operand { k: d, source: &as_columns, scale: 1.0 };
        let to_logits = to_logits.pack::<E>(cpu, isa, &mut workspace.panels, 0, rows)?;
        let to_dx = Operand { k: rows, source: &as_rows, scale: 1.0 };
        let to_dx = match dx {
            Some(_) => Some(to_dx.pack::<E>(cpu, isa, &mut workspace.adapter_panels, 0, d)?),
            None => None,
        };
        let mut dx_chunks = dx.as_mut().map(|dx| dx.chunks_mut(share * d));
        let tasks: Vec<_> = states
            .chunks_mut(share)
            .enumerate()
            .map(|(i, states)| {
                let dx = dx_chunks.as_mut().and_then(Iterator::next);
                RowTask { first: i * share, states, dx }
            })
            .collect();
        cpu.threads.each(tasks.into_iter(), |_, task| {
            let targets = &targets[task.first..][..task.states.len()];
            let x = MatRef::row_major(x.skip(task.first * d), d);
            block_task(cpu, isa, task, x, to_logits, to_dx, targets, first as u32)
        })?;
    }
    for (nll, state) in nll.iter_mut().zip(&states) {
        *nll = state.max + state.sum.ln() - state.target;
    }
    let Some(dx) = dx else { return Ok(()) };
    let rows = dx.chunks_mut(share * d).zip(states.chunks(share)).zip(targets.chunks(share));
    cpu.threads.each(rows, |_, ((dx, states), targets)| {
        cpu.with_scratch(d, |wanted| {
            for ((dx, state), &target) in dx.chunks_exact_mut(d).zip(states).zip(targets) {
                head.decode_row(cpu.isa, target as usize, 0, wanted);
                dx.iter_mut().zip(&*wanted).for_each(|(dx, w)| *dx = scale * (*dx / state.sum - *w));
            }
            Ok(())
        })
    })
}

#[allow(clippy::too_many_arguments)]
fn block_task<E: Element>(
    cpu: &Cpu,
    isa: E::Isa,
    task: RowTask<'_>,
    x: MatRef<'_>,
    to_logits: Panels<'_, E>,
    to_dx: Option<Panels<'_, E>>,
    targets: &[u32],
    first_id: u32,
) -> Result<()> {
    let (rows, n) = (task.states.len(), to_logits.n);
    let mut dx = task.dx;
    cpu.with_scratch(floats::<E>(rows * n) + rows * n, |scratch| {
        let (weights, logits) = carve::<E>(scratch, rows * n);
        gemm::gemm(isa, &mut *logits, n, rows, n, Accumulate::Overwrite, &[Term { a: x, b: to_logits }])?;
        cpu.isa.vectorize(
            #[inline(always)]
            || online_softmax(cpu.bf16_isa, weights, logits, n, task.states, dx.as_deref_mut(), targets, first_id),
        );
        if let (Some(dx), Some(b)) = (dx, to_dx) {
            let term = Term { a: MatRef::row_major(E::values(weights), n), b };
            gemm::gemm(isa, dx, b.n, rows, b.n, Accumulate::Add, &[term])?;
        }
        Ok(())
    })
}

/// Logits of a block of ids → unnormalised `weights`, if there is a gradient; the running state and what earlier blocks left in dx are rescaled.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn online_softmax<E: Element>(
    isa: Bf16Isa,
    weights: &mut [E],
    logits: &mut [f32],
    n: usize,
    states: &mut [State],
    mut dx: Option<&mut [f32]>,
    targets: &[u32],
    first_id: u32,
) {
    let rows = states.len();
    for (row, ((logits, state), &target)) in logits.chunks_exact_mut(n).zip(states).zip(targets).enumerate() {
        if let Some(&logit) = target.checked_sub(first_id).and_then(|i| logits.get(i as usize)) {
            state.target = logit;
        }
        let max = lanes(logits, state.max, larger);
        let shrink = E::exp(state.max - max);
        state.sum = state.sum * shrink + exponentials::<E>(logits, max);
        state.max = max;
        if let Some(dx) = &mut dx {
            let d = dx.len() / rows;
            if shrink != 1.0 {
                dx[row * d..][..d].iter_mut().for_each(|dx| *dx *= shrink);
            }
            E::narrow(isa, &mut weights[row * n..][..n], logits).expect("one length");
        }
    }
}

/// out [rows, ids]: the logits of some ids only.
pub(super) fn head_rows(
    cpu: &Cpu,
    out: &mut [f32],
    x: Values<'_>,
    rows: usize,
    head: &Weight<'_>,
    ids: &[u32],
) -> Result<()> {
    let d = head.cols();
    let mut wanted = vec![0.0; ids.len() * d];
    for (row, &id) in wanted.chunks_exact_mut(d).zip(ids) {
        head.decode_row(cpu.isa, id as usize, 0, row);
    }
    let wanted = Weight::from_f32(ids.len(), d, &wanted)?;
    let mut wide = vec![0.0; d];
    for (t, out) in out.chunks_exact_mut(ids.len()).take(rows).enumerate() {
        let x = match x {
            Values::F32(x) => &x[t * d..][..d],
            Values::Bf16(x) => {
                wide.iter_mut().zip(&x[t * d..]).for_each(|(wide, x)| *wide = x.to_f32());
                &wide
            }
        };
        matvec(cpu.isa, out, wanted, 0, x)?;
    }
    Ok(())
}
