//! Causal attention over packed segments, by blocks with a running softmax (Dao et al., arXiv 2205.14135; Dao, 2307.08691).
//!
//! Forward: a task is one block of queries of one segment, with all heads. The query heads that share a key head share its
//! packed blocks. Blocks of keys that lie before the window of all of a task's queries are not read. [`few`] is the same for a handful of queries; [`mod@backward`] has the gradient.

mod backward;
mod few;

pub(super) use backward::backward;

use super::Cpu;
use super::buffer::{Element, carve, floats};
use super::exec::Exec;
use super::lanes::{LANES, exponentials, lanes, larger};
use crate::Result;
use crate::backend::{Accumulate, Attention, AttentionRows, AttentionShape, CachedRows, RowKind};
use crate::batch::Segment;
use hydra_kernels::gemm::{self, K_ALIGN, MatRef, PANEL_ALIGN, Panels, Source, Values};
use hydra_kernels::isa::Bf16Isa;
use hydra_kernels::math;
use std::num::NonZeroUsize;
use std::ops::Range;

/// Bytes of a block of keys, or of values: both stay in L2.
const BLOCK_BYTES: usize = 128 * 1024;
/// Keys in a block, at most.
const MOST_KEYS: usize = 512;
/// Queries whose scores are computed together.
const STRIP: usize = 32;

/// Queries in a block: enough rows, over the heads of a group, to pay for packing the keys (some 400).
fn query_block(shape: AttentionShape) -> usize {
    (384 / shape.group()).next_multiple_of(64).max(64)
}

/// Keys in a block, whole panels, of heads of width `d`.
fn key_block<E>(d: usize) -> usize {
    (BLOCK_BYTES / (d * size_of::<E>()) / K_ALIGN * K_ALIGN).clamp(K_ALIGN, MOST_KEYS)
}

/// Factor of the scores.
fn score_scale(shape: AttentionShape) -> f32 {
    1.0 / (shape.head_dim as f32).sqrt()
}

/// The keys of a window; without one, more than there are.
fn in_keys(window: Option<NonZeroUsize>) -> usize {
    window.map_or(usize::MAX, NonZeroUsize::get)
}

/// A rectangle inside a row-major matrix.
#[derive(Clone, Copy)]
struct Block<'a> {
    data: Values<'a>,
    stride: usize,
}

impl<'a> Block<'a> {
    fn new(matrix: Values<'a>, stride: usize, row: usize, column: usize) -> Self {
        Self { data: matrix.skip(row * stride + column), stride }
    }

    fn rows(&self) -> MatRef<'a> {
        MatRef { data: self.data, row_stride: self.stride, col_stride: 1 }
    }

    /// As the operand B [k, n] whose columns are this block's rows.
    fn as_columns(&self) -> Source<'a> {
        Source::Dense { data: self.data, k_stride: 1, n_stride: self.stride }
    }

    /// As the operand B [k, n] itself.
    fn as_rows(&self) -> Source<'a> {
        Source::Dense { data: self.data, k_stride: self.stride, n_stride: 1 }
    }
}

/// Keys and values, [rows, kv_heads · head_dim]: `len` rows from `start` on are attended to.
#[derive(Clone, Copy)]
struct Past<'a, E> {
    k: &'a [E],
    v: &'a [E],
    start: usize,
    len: usize,
}

/// What all tasks of the forward pass read.
#[derive(Clone, Copy)]
struct Inputs<'a, E> {
    shape: AttentionShape,
    q: &'a [E],
    k: &'a [E],
    v: &'a [E],
    prefix: Option<Past<'a, E>>,
    /// The keys that a query sees, its own included.
    window: usize,
}

/// One task of the forward pass: a block of queries of a segment, and their results.
struct QueryTask<'a, E> {
    segment: Segment,
    /// The first query's row in the segment.
    first: usize,
    o: &'a mut [E],
    lse: &'a mut [f32],
}

/// See [`crate::backend::Backend::attention`].
pub(super) fn forward<E: Element>(exec: Exec<'_, E>, args: Attention<'_, Cpu>) -> Result<()> {
    let Attention { o, lse, shape, segments, window, q, k, v, prefix } = args;
    let prefix = match prefix {
        Some(prefix) => Some(Past { k: E::of(prefix.k)?, v: E::of(prefix.v)?, start: 0, len: prefix.len }),
        None => None,
    };
    let inputs = Inputs { shape, q: E::of(q)?, k: E::of(k)?, v: E::of(v)?, prefix, window: in_keys(window) };
    let mut tasks = query_tasks(shape, segments, E::of_mut(o)?, lse);
    // The longest first: the later a block, the more keys it sees.
    tasks.sort_by_key(|task| std::cmp::Reverse(task.first));
    exec.cpu.threads.each(tasks.into_iter(), |_, task| query_task(exec, task, inputs))
}

/// See [`crate::backend::Backend::attention_rows`].
pub(super) fn rows<E: Element>(exec: Exec<'_, E>, args: AttentionRows<'_, Cpu>) -> Result<()> {
    let AttentionRows { o, lse, shape, window, q, kind, sequences, .. } = args;
    let (o, q, window) = (E::of_mut(o)?, E::of(q)?, in_keys(window));
    if kind == RowKind::Decode {
        let pasts = sequences.iter().map(|sequence| cached(sequence, sequence.len + 1)).collect::<Result<Vec<_>>>()?;
        return few::decode(exec.cpu, shape, (o, lse), q, &pasts, window);
    }
    let segments: Vec<_> = sequences.iter().map(|sequence| sequence.rows).collect();
    let mut tasks = Vec::new();
    for task in query_tasks(shape, &segments, o, lse) {
        let sequence = sequences.iter().find(|sequence| sequence.rows == task.segment);
        let sequence = sequence.expect("a task is of one of the segments");
        let seen = cached(sequence, sequence.len + task.first + task.lse.len() / shape.n_heads)?;
        tasks.push((task, [Some((seen, sequence.len)), None]));
    }
    tasks.sort_by_key(|(_, pasts)| std::cmp::Reverse(pasts[0].map(|(past, _)| past.len)));
    let inputs = Queries { shape, q, window };
    exec.cpu.threads.each(tasks.into_iter(), |_, (task, pasts)| blocked(exec, task, inputs, pasts))
}

/// The first `len` tokens of a sequence.
fn cached<'a, E: Element>(sequence: &CachedRows<'a, Cpu>, len: usize) -> Result<Past<'a, E>> {
    Ok(Past { k: E::of(sequence.k)?, v: E::of(sequence.v)?, start: 0, len })
}

/// Cuts the segments into blocks of queries.
fn query_tasks<'a, E>(
    shape: AttentionShape,
    segments: &[Segment],
    mut o: &'a mut [E],
    mut lse: &'a mut [f32],
) -> Vec<QueryTask<'a, E>> {
    let (block, mut tasks) = (query_block(shape), Vec::new());
    for &segment in segments {
        for first in (0..segment.len).step_by(block) {
            let rows = block.min(segment.len - first);
            let (o_rows, lse_rows);
            (o_rows, o) = o.split_at_mut(rows * shape.q_width());
            (lse_rows, lse) = lse.split_at_mut(rows * shape.n_heads);
            tasks.push(QueryTask { segment, first, o: o_rows, lse: lse_rows });
        }
    }
    tasks
}

fn query_task<E: Element>(exec: Exec<'_, E>, task: QueryTask<'_, E>, inputs: Inputs<'_, E>) -> Result<()> {
    let Inputs { shape, q, k, v, prefix, window } = inputs;
    let rows = task.lse.len() / shape.n_heads;
    let own = Past { k, v, start: task.segment.start, len: task.first + rows };
    if task.segment.len <= few::FEW {
        return few::few(exec.cpu, task, inputs, own);
    }
    let pasts = [prefix.map(|past| (past, past.len)), Some((own, 0))];
    blocked(exec, task, Queries { shape, q, window }, pasts)
}

/// The queries of all tasks.
#[derive(Clone, Copy)]
struct Queries<'a, E> {
    shape: AttentionShape,
    q: &'a [E],
    /// The keys that a query sees, its own included.
    window: usize,
}

/// A task by blocks of keys: those of each of `pasts`, and where the segment's first query stands among them.
fn blocked<E: Element>(
    exec: Exec<'_, E>,
    mut task: QueryTask<'_, E>,
    inputs: Queries<'_, E>,
    pasts: [Option<(Past<'_, E>, usize)>; 2],
) -> Result<()> {
    let shape = inputs.shape;
    let rows = task.lse.len() / shape.n_heads;
    let per_head = Sums::len(rows, shape.head_dim);
    exec.cpu.with_scratch(Blocks::len(exec, shape.head_dim) + shape.group() * per_head, |scratch| {
        let (mut blocks, heads) = Blocks::carve(exec, shape.head_dim, scratch);
        for kv_head in 0..shape.kv_heads {
            heads.chunks_exact_mut(per_head).for_each(|head| Sums::of(head, rows).clear());
            for (past, first_query) in pasts.into_iter().flatten() {
                attend(exec, &task, inputs, Keys { past, first_query, kv_head }, &mut blocks, heads)?;
            }
            for (i, head) in heads.chunks_exact_mut(per_head).enumerate() {
                finish(exec, &mut task, shape, kv_head * shape.group() + i, Sums::of(head, rows));
            }
        }
        Ok(())
    })
}

/// A block of keys and values, packed, and a strip of its scores.
struct Blocks<'a, E> {
    k: &'a mut [E],
    v: &'a mut [E],
    /// Unnormalised probabilities, [STRIP, keys], as [`Element::operand`] wants them.
    p: &'a mut [E],
    /// [STRIP, keys].
    scores: &'a mut [f32],
}

impl<'a, E: Element> Blocks<'a, E> {
    /// Values of both packed blocks.
    fn panels(exec: Exec<'_, E>, d: usize) -> [usize; 2] {
        let keys = key_block::<E>(d);
        [gemm::panels_len::<E>(exec.isa, d, keys), gemm::panels_len::<E>(exec.isa, keys, d)]
    }

    /// Floats of scratch that all of it takes.
    fn len(exec: Exec<'_, E>, d: usize) -> usize {
        let [k, v] = Self::panels(exec, d).map(floats::<E>);
        let strip = STRIP * key_block::<E>(d);
        k + v + floats::<E>(E::operand_room(strip)) + strip
    }

    /// Takes it off the front of `scratch`.
    fn carve(exec: Exec<'_, E>, d: usize, scratch: &'a mut [f32]) -> (Self, &'a mut [f32]) {
        let [k_len, v_len] = Self::panels(exec, d);
        let (k, rest) = carve::<E>(scratch, k_len);
        let (v, rest) = carve::<E>(rest, v_len);
        let strip = STRIP * key_block::<E>(d);
        let (p, rest) = carve::<E>(rest, E::operand_room(strip));
        let (scores, rest) = rest.split_at_mut(strip);
        (Self { k, v, p, scores }, rest)
    }
}

/// Running sums of one head over the keys that some queries have seen.
struct Sums<'a> {
    /// Σ p v, [rows, d].
    o: &'a mut [f32],
    /// The largest score, `[rows]`.
    max: &'a mut [f32],
    /// Σ p, `[rows]`.
    sum: &'a mut [f32],
}

impl<'a> Sums<'a> {
    /// Floats of scratch for a head.
    fn len(rows: usize, d: usize) -> usize {
        rows * d + 2 * rows
    }

    /// The parts of a head's scratch.
    fn of(head: &'a mut [f32], rows: usize) -> Self {
        let (o, state) = head.split_at_mut(head.len() - 2 * rows);
        let (max, sum) = state.split_at_mut(rows);
        Self { o, max, sum }
    }

    fn clear(self) {
        self.o.fill(0.0);
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
    }

    /// Of some rows.
    fn rows(&mut self, rows: Range<usize>) -> Sums<'_> {
        let d = self.o.len() / self.max.len();
        let o = &mut self.o[rows.start * d..rows.end * d];
        Sums { o, max: &mut self.max[rows.clone()], sum: &mut self.sum[rows] }
    }
}

/// The keys that a task's queries attend to at a time.
#[derive(Clone, Copy)]
struct Keys<'a, E> {
    past: Past<'a, E>,
    /// Where the segment's first query stands among these keys: at its own, or behind the prefix.
    first_query: usize,
    kv_head: usize,
}

impl<E> Keys<'_, E> {
    /// The keys that the query of row `row` of its segment sees, without those before the first one.
    fn seen(&self, window: usize, row: usize) -> Range<usize> {
        let end = self.first_query + row + 1;
        end.saturating_sub(window)..end
    }
}

/// The part of `range` that lies in the block of `n` from `first` on, counted from `first`.
fn within(range: Range<usize>, first: usize, n: usize) -> Range<usize> {
    let inside = |at: usize| at.saturating_sub(first).min(n);
    inside(range.start)..inside(range.end)
}

/// The whole panels, and steps along k, that hold the columns or rows `range` of `n`; none if it is empty.
fn panels_around(range: Range<usize>, n: usize) -> Range<usize> {
    const { assert!(PANEL_ALIGN == K_ALIGN) };
    if range.is_empty() { 0..0 } else { range.start / K_ALIGN * K_ALIGN..range.end.next_multiple_of(K_ALIGN).min(n) }
}

/// Adds what the task's queries see in `keys` to the sums of a group's heads.
fn attend<E: Element>(
    exec: Exec<'_, E>,
    task: &QueryTask<'_, E>,
    inputs: Queries<'_, E>,
    keys: Keys<'_, E>,
    blocks: &mut Blocks<'_, E>,
    heads: &mut [f32],
) -> Result<()> {
    let (shape, window, Keys { past, kv_head, .. }) = (inputs.shape, inputs.window, keys);
    let (d, rows) = (shape.head_dim, task.lse.len() / shape.n_heads);
    // The first query looks back the farthest.
    let most_keys = key_block::<E>(d);
    let first_block = keys.seen(window, task.first).start / most_keys * most_keys;
    for key in (first_block..past.len).step_by(most_keys) {
        let n = most_keys.min(past.len - key);
        let block = |x| Block::new(E::values(x), shape.kv_width(), past.start + key, kv_head * d);
        let k = exec.pack(blocks.k, [d, n], block(past.k).as_columns(), score_scale(shape))?;
        let v = exec.pack(blocks.v, [n, d], block(past.v).as_rows(), 1.0)?;
        for (i, head) in heads.chunks_exact_mut(Sums::len(rows, d)).enumerate() {
            let (q_head, mut sums) = (kv_head * shape.group() + i, Sums::of(head, rows));
            for row in (0..rows).step_by(STRIP) {
                let (end, in_segment) = (rows.min(row + STRIP), task.first + row);
                let q = Block::new(E::values(inputs.q), shape.q_width(), task.segment.start + in_segment, q_head * d);
                let visible = |i: usize| within(keys.seen(window, in_segment + i), key, n);
                let seen = panels_around(visible(0).start..visible(end - row - 1).end, n);
                if seen.is_empty() {
                    continue;
                }
                let len = (end - row) * seen.len();
                let strip = Strip {
                    q: q.rows(),
                    k: k.part(exec.isa, 0..d, seen.clone())?,
                    v: v.part(exec.isa, seen.clone(), 0..d)?,
                    p: &mut blocks.p[..E::operand_room(len)],
                    scores: &mut blocks.scores[..len],
                };
                attend_strip(exec, strip, sums.rows(row..end), |i| within(visible(i), seen.start, seen.len()))?;
            }
        }
    }
    Ok(())
}

/// A strip of queries and a block of keys and values.
struct Strip<'a, E> {
    q: MatRef<'a>,
    k: Panels<'a, E>,
    v: Panels<'a, E>,
    /// The probabilities as [`Element::operand`] wants them.
    p: &'a mut [E],
    /// [queries, keys].
    scores: &'a mut [f32],
}

/// Adds what the queries see in the block: the keys `visible(row)` of each row.
fn attend_strip<E: Element>(
    exec: Exec<'_, E>,
    strip: Strip<'_, E>,
    mut sums: Sums<'_>,
    visible: impl Fn(usize) -> Range<usize>,
) -> Result<()> {
    let Strip { q, k, v, p, scores } = strip;
    let rows = sums.max.len();
    exec.multiply(&mut *scores, rows, Accumulate::Overwrite, q, k)?;
    exec.cpu.isa.vectorize(
        #[inline(always)]
        || online_softmax(exec.cpu.bf16_isa, p, scores, &mut sums, visible),
    );
    exec.multiply(sums.o, rows, Accumulate::Add, MatRef::row_major(E::operand(p, scores), k.n), v)
}

/// Turns scores [rows, keys] into unnormalised probabilities and adds them to `sums`, after rescaling what earlier blocks left
/// there. `p` gets them as [`Element::operand`] wants them.
#[inline(always)]
fn online_softmax<E: Element>(
    isa: Bf16Isa,
    p: &mut [E],
    scores: &mut [f32],
    sums: &mut Sums<'_>,
    visible: impl Fn(usize) -> Range<usize>,
) {
    let Sums { o, max, sum } = sums;
    let (n, d) = (scores.len() / max.len(), o.len() / max.len());
    let rounded = E::operand_room(n);
    for (row, scores) in scores.chunks_exact_mut(n).enumerate() {
        let seen = hide(scores, visible(row));
        if !seen.is_empty() {
            let new_max = lanes(seen, max[row], larger);
            let shrink = E::exp(max[row] - new_max);
            sum[row] = sum[row] * shrink + exponentials::<E>(seen, new_max);
            max[row] = new_max;
            if shrink != 1.0 {
                o[row * d..][..d].iter_mut().for_each(|o| *o *= shrink);
            }
        }
        E::narrow(isa, &mut p[row * rounded..][..rounded], &scores[..rounded]).expect("one length");
    }
}

/// The `visible` scores of a row, and enough masked ones (−∞) around them to fill vectors; the rest become zeros.
#[inline(always)]
fn hide(scores: &mut [f32], visible: Range<usize>) -> &mut [f32] {
    let Range { start, end } = if visible.is_empty() { 0..0 } else { visible };
    let (first, last) = (start / LANES * LANES, end.next_multiple_of(LANES).min(scores.len()));
    scores[..first].fill(0.0);
    scores[last..].fill(0.0);
    let seen = &mut scores[first..last];
    seen[..start - first].fill(f32::NEG_INFINITY);
    seen[end - first..].fill(f32::NEG_INFINITY);
    seen
}

/// Writes one head's result: Σ p v / Σ p, and the logarithm of its denominator.
fn finish<E: Element>(
    exec: Exec<'_, E>,
    task: &mut QueryTask<'_, E>,
    shape: AttentionShape,
    q_head: usize,
    sums: Sums<'_>,
) {
    let (d, Sums { o, max, sum }) = (shape.head_dim, sums);
    exec.cpu.isa.vectorize(
        #[inline(always)]
        || {
            for ((out, o), sum) in task.o.chunks_exact_mut(shape.q_width()).zip(o.chunks_exact(d)).zip(&*sum) {
                let (out, part) = (&mut out[q_head * d..][..d], 1.0 / sum);
                out.iter_mut().zip(o).for_each(|(out, o)| *out = E::round(o * part));
            }
        },
    );
    for ((lse, max), sum) in task.lse.chunks_exact_mut(shape.n_heads).zip(max).zip(sum) {
        lse[q_head] = *max + math::ln(*sum);
    }
}
