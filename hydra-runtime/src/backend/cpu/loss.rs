//! The output head and the cross-entropy in one pass over the vocabulary, by blocks, with a running softmax.
//!
//! With unnormalised weights e_v = exp(l_v − max), nll = max + ln Σ e − l_target and dx = scale · (Σ e_v w_v / Σ e − w_target):
//! the same recurrence as attention's, with the head's rows as keys and as values. Each block of logits is computed once and
//! used for the loss and for its gradient.

use super::Cpu;
use super::buffer::Element;
use super::exec::Exec;
use super::lanes::{exponentials, lanes, larger};
use super::q8::{head_rows as head_rows_in_eight_bits, quantized, unpacked};
use super::workspace::{Area, Workspace};
use crate::Result;
use crate::backend::{Accumulate, HeadLoss, Weight};
use hydra_kernels::gemm::{MatRef, PANEL_ALIGN, Panels, Source, Values};
use hydra_kernels::hydra::Operand;
use hydra_kernels::matvec;
use hydra_kernels::q8::{self, Block};

/// Tiles of rows in a task, at most. In f32 96 rows, so that their logits stay in L2; in bf16 256, so that AMX, which has a larger
/// L2, does enough with each panel that it reads from L3.
const fn most_tiles<E>() -> usize {
    if size_of::<E>() == size_of::<f32>() { 2 } else { 8 }
}

/// Values of the head in a block, which is packed in two forms: in bf16 each of them has 1.25 MiB.
const HEAD_VALUES: usize = 640 * 1024;

/// Ids in a block, at least: threads share the packing of its panels.
const FEWEST_IDS: usize = 256;

/// Running softmax of one row.
#[derive(Clone, Copy)]
struct State {
    max: f32,
    sum: f32,
    /// The target's logit.
    target: f32,
}

/// Some rows, and what has been summed up for them.
struct RowTask<'a> {
    states: &'a mut [State],
    targets: &'a [u32],
    /// Σ e_v w_v, [rows, d], if wanted.
    dx: Option<&'a mut [f32]>,
}

/// The rows of the head as the product with x reads them.
#[derive(Clone, Copy)]
enum Logits<'a, E> {
    Exact(Panels<'a, E>),
    /// With x in eight bits, all of its rows.
    Q8(q8::Panels<'a>, &'a [Block]),
}

impl<E> Logits<'_, E> {
    fn ids(&self) -> usize {
        match self {
            Logits::Exact(panels) => panels.n,
            Logits::Q8(panels, _) => panels.rows(),
        }
    }
}

/// Some ids' rows of the head, packed.
#[derive(Clone, Copy)]
struct HeadBlock<'a, E> {
    first_id: u32,
    /// For x headᵀ.
    to_logits: Logits<'a, E>,
    /// For weights · head, if there is a gradient.
    to_dx: Option<Panels<'a, E>>,
}

/// See [`crate::backend::Backend::head_loss`].
pub(super) fn head_loss<E: Element>(exec: Exec<'_, E>, args: HeadLoss<'_, Cpu>) -> Result<()> {
    let HeadLoss { nll, dx, x, lm_head, targets, scale } = args;
    let (cpu, head, x) = (exec.cpu, lm_head.weight(), x.values());
    let (d, vocab) = (head.cols(), head.rows());
    let Workspace { panels, adapter_panels, quantized: area, .. } = &mut *cpu.workspaces.take();
    // A gradient is that of exact products.
    let in_eight_bits = dx.is_none() && cpu.in_eight_bits(head);
    let x_len = targets.len() * d;
    let in_eight_bits = in_eight_bits.then(|| quantized(cpu, x.first(x_len), d, area)).transpose()?;
    let mut states = vec![State { max: f32::NEG_INFINITY, sum: 0.0, target: 0.0 }; targets.len()];
    let mut dx = dx.map(|dx| &mut dx[..targets.len() * d]);
    if let Some(dx) = &mut dx {
        dx.fill(0.0);
    }
    let share = cpu.row_share(targets.len(), most_tiles::<E>());
    // The same for any number of threads: sums run over these blocks.
    let ids = (HEAD_VALUES / d).max(FEWEST_IDS).next_multiple_of(PANEL_ALIGN);
    for first in (0..vocab).step_by(ids) {
        let rows = head.slice_rows(first, ids.min(vocab - first))?;
        let areas = [&mut *panels, &mut *adapter_panels];
        let block = head_block(exec, rows, first as u32, (in_eight_bits, dx.is_some()), areas)?;
        let tasks = row_tasks(&mut states, targets, dx.as_deref_mut(), share);
        cpu.threads
            .each(tasks.into_iter(), |i, task| add_block(exec, task, (x.skip(i * share * d), i * share), block))?;
    }
    for (nll, state) in nll.iter_mut().zip(&states) {
        *nll = state.max + state.sum.ln() - state.target;
    }
    let Some(dx) = dx else { return Ok(()) };
    let rows = dx.chunks_mut(share * d).zip(states.chunks(share)).zip(targets.chunks(share));
    cpu.threads.each(rows, |_, ((dx, states), targets)| {
        finish_gradient(cpu, dx, states, targets, (&head, scale))?;
        Ok(())
    })
}

/// Packs `rows` of the head, whose first is `first_id`'s.
fn head_block<'a, E: Element>(
    exec: Exec<'_, E>,
    rows: Weight<'_>,
    first_id: u32,
    (x, gradient): (Option<&'a [Block]>, bool),
    [panels, gradient_panels]: [&'a mut Area; 2],
) -> Result<HeadBlock<'a, E>> {
    let (isa, ids, d) = (exec.isa, rows.rows(), rows.cols());
    let as_columns = Source::WeightRows { weight: rows, first: 0 };
    let to_logits = match x {
        Some(x) => Logits::Q8(unpacked(exec.cpu, rows, 0..ids, panels)?, x),
        None => Logits::Exact(exec.pack_shared(Operand::new(isa, [d, ids], as_columns, 1.0), panels)?),
    };
    let as_rows = Source::WeightCols { weight: rows, first: 0 };
    let to_dx = match gradient {
        true => Some(exec.pack_shared(Operand::new(isa, [ids, d], as_rows, 1.0), gradient_panels)?),
        false => None,
    };
    Ok(HeadBlock { first_id, to_logits, to_dx })
}

/// Tasks of `share` rows each.
fn row_tasks<'a>(
    states: &'a mut [State],
    targets: &'a [u32],
    dx: Option<&'a mut [f32]>,
    share: usize,
) -> Vec<RowTask<'a>> {
    let d = dx.as_ref().map_or(0, |dx| dx.len() / targets.len().max(1));
    let mut dx_chunks = dx.map(|dx| dx.chunks_mut(share * d));
    let rows = states.chunks_mut(share).zip(targets.chunks(share));
    rows.map(|(states, targets)| RowTask { states, targets, dx: dx_chunks.as_mut().and_then(Iterator::next) }).collect()
}

/// Adds a block of ids to the sums of some rows: `x` from row `first` on.
fn add_block<E: Element>(
    exec: Exec<'_, E>,
    mut task: RowTask<'_>,
    (x, first): (Values<'_>, usize),
    block: HeadBlock<'_, E>,
) -> Result<()> {
    let (rows, n) = (task.states.len(), block.to_logits.ids());
    exec.cpu.with_scratch(rows * n, |logits| {
        match block.to_logits {
            Logits::Exact(panels) => {
                exec.multiply(&mut *logits, rows, Accumulate::Overwrite, MatRef::row_major(x, panels.k), panels)?;
            }
            Logits::Q8(panels, x) => {
                let width = q8::blocks(panels.cols());
                q8::multiply(exec.cpu.q8_isa, &mut *logits, n, panels, &x[first * width..(first + rows) * width])?;
            }
        }
        exec.cpu.isa.vectorize(
            #[inline(always)]
            || online_softmax::<E>(logits, &mut task, block.first_id),
        );
        if let (Some(dx), Some(to_dx)) = (task.dx, block.to_dx) {
            exec.multiply(dx, rows, Accumulate::Add, MatRef::row_major(Values::F32(logits), n), to_dx)?;
        }
        Ok(())
    })
}

/// Updates the running softmax with a block's `logits` [rows, ids], which become the unnormalised weights. If there is a gradient,
/// rescales what earlier blocks left in dx.
#[inline(always)]
fn online_softmax<E: Element>(logits: &mut [f32], task: &mut RowTask<'_>, first_id: u32) {
    let rows = task.states.len();
    let n = logits.len() / rows;
    let states = task.states.iter_mut().zip(task.targets);
    for (row, (logits, (state, &target))) in logits.chunks_exact_mut(n).zip(states).enumerate() {
        if let Some(&logit) = target.checked_sub(first_id).and_then(|i| logits.get(i as usize)) {
            state.target = logit;
        }
        let max = lanes(logits, state.max, larger);
        let shrink = E::exp(state.max - max);
        state.sum = state.sum * shrink + exponentials::<E>(logits, max);
        state.max = max;
        if let Some(dx) = &mut task.dx {
            let d = dx.len() / rows;
            if shrink != 1.0 {
                dx[row * d..][..d].iter_mut().for_each(|dx| *dx *= shrink);
            }
        }
    }
}

/// dx [rows, d] = scale · (dx / Σ e − w_target).
fn finish_gradient(
    cpu: &Cpu,
    dx: &mut [f32],
    states: &[State],
    targets: &[u32],
    (head, scale): (&Weight<'_>, f32),
) -> Result<()> {
    let d = head.cols();
    cpu.with_scratch(d, |wanted| {
        for ((dx, state), &target) in dx.chunks_exact_mut(d).zip(states).zip(targets) {
            head.decode_row(cpu.isa, target as usize, 0, wanted);
            dx.iter_mut().zip(&*wanted).for_each(|(dx, w)| *dx = scale * (*dx / state.sum - *w));
        }
        Ok(())
    })
}

/// See [`crate::backend::Backend::head_rows`].
pub(super) fn head_rows(
    cpu: &Cpu,
    out: &mut [f32],
    x: Values<'_>,
    rows: usize,
    head: &Weight<'_>,
    ids: &[u32],
) -> Result<()> {
    let d = head.cols();
    if cpu.in_eight_bits(*head) {
        return head_rows_in_eight_bits(cpu, &mut out[..rows * ids.len()], x, *head, ids);
    }
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
