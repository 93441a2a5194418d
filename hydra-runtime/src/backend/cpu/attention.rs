//! Causal attention over packed segments, by blocks with a running softmax (Dao et al., arXiv 2205.14135; Dao, 2307.08691).
//!
//! Forward: a task is one block of queries of one segment, with all heads. The query heads that share a key head share its
//! packed blocks. `few` is the same for a handful of queries, `backward` has the gradient.

mod backward;
mod few;

pub(super) use backward::{Saved, backward};

use super::Cpu;
use super::buffer::{Element, carve, floats};
use super::lanes::{LANES, exponentials, lanes, larger};
use super::product::pack;
use crate::Result;
use crate::backend::{Accumulate, AttentionShape};
use crate::batch::Segment;
use hydra_kernels::gemm::{self, MatRef, Panels, Source, Term, Values};
use hydra_kernels::isa::Bf16Isa;
use hydra_kernels::math;

/// Keys in a block.
const KEYS: usize = 256;
/// Queries whose scores are computed together: with a block of keys they stay in L1.
const STRIP: usize = 32;

/// Queries in a block: enough rows, over the heads of a group, to pay for packing the keys (some 400).
fn query_block(shape: AttentionShape) -> usize {
    (384 / shape.group()).next_multiple_of(64).max(64)
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

fn multiply<E: Element>(
    isa: E::Isa,
    c: &mut [f32],
    m: usize,
    store: Accumulate,
    a: MatRef<'_>,
    b: Panels<'_, E>,
) -> Result<()> {
    Ok(gemm::gemm(isa, c, b.n, m, b.n, store, &[Term { a, b }])?)
}

/// Keys and values, [rows, kv_heads · head_dim]: `len` rows from `start` on are attended to.
#[derive(Clone, Copy)]
struct Past<'a, E> {
    k: &'a [E],
    v: &'a [E],
    start: usize,
    len: usize,
}

/// One task of the forward pass: rows `first .. first + rows` of a segment.
struct QueryTask<'a, E> {
    segment: Segment,
    first: usize,
    o: &'a mut [E],
    lse: &'a mut [f32],
}

#[allow(clippy::too_many_arguments)]
pub(super) fn forward<E: Element>(
    cpu: &Cpu,
    isa: E::Isa,
    o: &mut [E],
    lse: &mut [f32],
    shape: AttentionShape,
    segments: &[Segment],
    q: &[E],
    k: &[E],
    v: &[E],
    prefix: Option<(&[E], &[E], usize)>,
) -> Result<()> {
    let block = query_block(shape);
    let (mut o, mut lse, mut tasks) = (o, lse, Vec::new());
    for &segment in segments {
        for first in (0..segment.len).step_by(block) {
            let rows = block.min(segment.len - first);
            let (o_rows, lse_rows);
            (o_rows, o) = o.split_at_mut(rows * shape.q_width());
            (lse_rows, lse) = lse.split_at_mut(rows * shape.n_heads);
            tasks.push(QueryTask { segment, first, o: o_rows, lse: lse_rows });
        }
    }
    // The longest first: the later a block, the more keys it sees.
    tasks.sort_by_key(|task| std::cmp::Reverse(task.first));
    cpu.threads.each(tasks.into_iter(), |_, task| query_task(cpu, isa, task, shape, q, k, v, prefix))
}

#[allow(clippy::too_many_arguments)]
fn query_task<E: Element>(
    cpu: &Cpu,
    isa: E::Isa,
    task: QueryTask<'_, E>,
    shape: AttentionShape,
    q: &[E],
    k: &[E],
    v: &[E],
    prefix: Option<(&[E], &[E], usize)>,
) -> Result<()> {
    let d = shape.head_dim;
    let rows = task.lse.len() / shape.n_heads;
    let own = Past { k, v, start: task.segment.start, len: task.first + rows };
    let prefix = prefix.map(|(k, v, len)| Past { k, v, start: 0, len });
    if task.segment.len <= few::FEW {
        return few::few(cpu, task, shape, q, own, prefix);
    }
    let k_len = gemm::panels_len::<E>(isa, d, KEYS);
    let v_len = gemm::panels_len::<E>(isa, KEYS, d);
    let per_head = rows * d + 2 * rows;
    let blocks = floats::<E>(k_len) + floats::<E>(v_len) + floats::<E>(STRIP * KEYS) + STRIP * KEYS;
    cpu.with_scratch(blocks + shape.group() * per_head, |scratch| {
        let (k_panels, rest) = carve::<E>(scratch, k_len);
        let (v_panels, rest) = carve::<E>(rest, v_len);
        let (p, rest) = carve::<E>(rest, STRIP * KEYS);
        let (scores, n_heads) = rest.split_at_mut(STRIP * KEYS);
        for kv_head in 0..shape.kv_heads {
            for head in n_heads.chunks_exact_mut(per_head) {
                head[..rows * d].fill(0.0);
                head[rows * d..][..rows].fill(f32::NEG_INFINITY);
                head[rows * d + rows..].fill(0.0);
            }
            let sources = [(false, prefix), (true, Some(own))];
            for (is_own, Past { k, v, start, len }) in sources.into_iter().filter_map(|(own, past)| Some((own, past?)))
            {
                for key in (0..len).step_by(KEYS) {
                    let n = KEYS.min(len - key);
                    let kv = |x| Block::new(E::values(x), shape.kv_width(), start + key, kv_head * d);
                    let scale = 1.0 / (d as f32).sqrt();
                    let k_panels = pack(isa, k_panels, d, n, kv(k).as_columns(), scale)?;
                    let v_panels = pack(isa, v_panels, n, d, kv(v).as_rows(), 1.0)?;
                    for (i, head) in n_heads.chunks_exact_mut(per_head).enumerate() {
                        let q_head = kv_head * shape.group() + i;
                        let (o, state) = head.split_at_mut(rows * d);
                        let (max, sum) = state.split_at_mut(rows);
                        for row in (0..rows).step_by(STRIP) {
                            let strip = row..rows.min(row + STRIP);
                            let first = task.segment.start + task.first + row;
                            let q = Block::new(E::values(q), shape.q_width(), first, q_head * d);
                            let (scores, p) = (&mut scores[..strip.len() * n], &mut p[..strip.len() * n]);
                            multiply(isa, scores, strip.len(), Accumulate::Overwrite, q.rows(), k_panels)?;
                            // Row i of the block may see keys up to its own place in the segment.
                            let seen = |i: usize| {
                                if is_own { (task.first + row + i + 1).saturating_sub(key).min(n) } else { n }
                            };
                            let o = &mut o[row * d..strip.end * d];
                            let (max, sum) = (&mut max[strip.clone()], &mut sum[strip.clone()]);
                            cpu.isa.vectorize(
                                #[inline(always)]
                                || online_softmax(cpu.bf16_isa, p, scores, n, d, o, max, sum, seen),
                            );
                            multiply(
                                isa,
                                o,
                                strip.len(),
                                Accumulate::Add,
                                MatRef::row_major(E::values(p), n),
                                v_panels,
                            )?;
                        }
                    }
                }
            }
            for (i, head) in n_heads.chunks_exact(per_head).enumerate() {
                let q_head = kv_head * shape.group() + i;
                let (o, state) = head.split_at(rows * d);
                let (max, sum) = state.split_at(rows);
                cpu.isa.vectorize(
                    #[inline(always)]
                    || {
                        for ((out, o), sum) in task.o.chunks_exact_mut(shape.q_width()).zip(o.chunks_exact(d)).zip(sum)
                        {
                            let (out, part) = (&mut out[q_head * d..][..d], 1.0 / sum);
                            out.iter_mut().zip(o).for_each(|(out, o)| *out = E::round(o * part));
                        }
                    },
                );
                for ((lse, max), sum) in task.lse.chunks_exact_mut(shape.n_heads).zip(max).zip(sum) {
                    lse[q_head] = max + math::ln(*sum);
                }
            }
        }
        Ok(())
    })
}

/// Turns a block of scores [rows, n] into unnormalised probabilities `p`, and rescales what earlier blocks left in `o` and `sum`.
#[allow(clippy::too_many_arguments)]
#[inline(always)]
fn online_softmax<E: Element>(
    isa: Bf16Isa,
    p: &mut [E],
    scores: &mut [f32],
    n: usize,
    d: usize,
    o: &mut [f32],
    max: &mut [f32],
    sum: &mut [f32],
    visible: impl Fn(usize) -> usize,
) {
    for (row, (p, scores)) in p.chunks_exact_mut(n).zip(scores.chunks_exact_mut(n)).enumerate() {
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
        E::narrow(isa, p, scores).expect("one length");
    }
}

/// The first `visible` scores of a row, and enough masked ones (−∞) to fill a vector; the rest are zeros.
#[inline(always)]
fn hide(scores: &mut [f32], visible: usize) -> &mut [f32] {
    let padded = visible.next_multiple_of(LANES).min(scores.len());
    let (seen, masked) = scores.split_at_mut(padded);
    seen[visible..].fill(f32::NEG_INFINITY);
    masked.fill(0.0);
    seen
}
