//! The gradient of attention: a task is one key head of one segment, so that dq, dk and dv each have one writer; scores are
//! recomputed from `lse`, a block of keys against a block of queries.
//!
//! Scores are transposed, keys by queries: Pᵀ and dSᵀ are then left operands as they are written, and only dQ has to turn one
//! around. dK and dV are summed over the query heads that share them.

use super::super::Cpu;
use super::super::buffer::{Element, carve, floats};
use super::super::lanes::{LANES, dot};
use super::super::product::pack;
use super::{Block, STRIP, multiply};
use crate::Result;
use crate::backend::{Accumulate, AttentionShape};
use crate::batch::Segment;
use hydra_kernels::gemm::{self, MatRef, Panels};

/// Keys and queries in a block.
const BLOCK: usize = 128;

/// What the forward pass left, and the gradient of its result.
#[derive(Clone, Copy)]
pub(in super::super) struct Saved<'a, E> {
    pub d_o: &'a [E],
    pub o: &'a [E],
    pub lse: &'a [f32],
    pub q: &'a [E],
    pub k: &'a [E],
    pub v: &'a [E],
}

/// One task: one key head of a segment. Outputs are its part of each of the segment's rows.
struct KeyTask<'a, E> {
    segment: Segment,
    kv_head: usize,
    /// `group` heads wide.
    dq: Vec<&'a mut [E]>,
    dk: Vec<&'a mut [E]>,
    dv: Vec<&'a mut [E]>,
}

#[allow(clippy::too_many_arguments)]
pub(in super::super) fn backward<E: Element>(
    cpu: &Cpu,
    isa: E::Isa,
    dq: &mut [E],
    dk: &mut [E],
    dv: &mut [E],
    shape: AttentionShape,
    segments: &[Segment],
    saved: Saved<'_, E>,
) -> Result<()> {
    let mut tasks = Vec::with_capacity(segments.len() * shape.kv_heads);
    let (mut dq, mut dk, mut dv) = (dq, dk, dv);
    for &segment in segments {
        let n_heads = shape.kv_heads;
        let q_parts = by_head(&mut dq, segment.len, shape.q_width(), n_heads);
        let k_parts = by_head(&mut dk, segment.len, shape.kv_width(), n_heads);
        let v_parts = by_head(&mut dv, segment.len, shape.kv_width(), n_heads);
        for (kv_head, ((dq, dk), dv)) in q_parts.into_iter().zip(k_parts).zip(v_parts).enumerate() {
            tasks.push(KeyTask { segment, kv_head, dq, dk, dv });
        }
    }
    tasks.sort_by_key(|task| std::cmp::Reverse(task.segment.len));
    cpu.threads.each(tasks.into_iter(), |_, task| key_task(cpu, isa, task, shape, saved))
}

/// Takes `rows` rows off the front of a matrix, each in `n_heads` parts: by part, then by row.
fn by_head<'a, E>(matrix: &mut &'a mut [E], rows: usize, width: usize, n_heads: usize) -> Vec<Vec<&'a mut [E]>> {
    let (front, rest) = std::mem::take(matrix).split_at_mut(rows * width);
    *matrix = rest;
    let mut parts: Vec<_> = (0..n_heads).map(|_| Vec::with_capacity(rows)).collect();
    for row in front.chunks_exact_mut(width) {
        parts.iter_mut().zip(row.chunks_exact_mut(width / n_heads)).for_each(|(parts, part)| parts.push(part));
    }
    parts
}

fn key_task<E: Element>(
    cpu: &Cpu,
    isa: E::Isa,
    mut task: KeyTask<'_, E>,
    shape: AttentionShape,
    saved: Saved<'_, E>,
) -> Result<()> {
    let (d, group, len, start) = (shape.head_dim, shape.group(), task.segment.len, task.segment.start);
    let scale = 1.0 / (d as f32).sqrt();
    let blocks = len.div_ceil(BLOCK);
    let by_d = gemm::panels_len::<E>(isa, BLOCK, d); // a block's rows as the operand [rows, d]
    let by_rows = gemm::panels_len::<E>(isa, d, BLOCK); // the same as [d, rows]
    let panels = 3 * floats::<E>(blocks * by_d) + 2 * floats::<E>(blocks * by_rows);
    let scores = 2 * floats::<E>(BLOCK * BLOCK) + 2 * STRIP * BLOCK;
    cpu.with_scratch(panels + scores + 3 * len * d + 2 * len, |scratch| {
        let (k_panels, rest) = carve::<E>(scratch, blocks * by_d);
        let (q_panels, rest) = carve::<E>(rest, blocks * by_d);
        let (do_panels, rest) = carve::<E>(rest, blocks * by_d);
        let (qt_panels, rest) = carve::<E>(rest, blocks * by_rows);
        let (dot_panels, rest) = carve::<E>(rest, blocks * by_rows);
        let (p, rest) = carve::<E>(rest, BLOCK * BLOCK);
        let (ds, rest) = carve::<E>(rest, BLOCK * BLOCK);
        let (scores, rest) = rest.split_at_mut(STRIP * BLOCK);
        let (dscores, rest) = rest.split_at_mut(STRIP * BLOCK);
        let (dq, rest) = rest.split_at_mut(len * d);
        let (dk, rest) = rest.split_at_mut(len * d);
        let (dv, rest) = rest.split_at_mut(len * d);
        let (lse, rest) = rest.split_at_mut(len);
        let delta = &mut rest[..len];
        let kv_block = |x, row| Block::new(E::values(x), shape.kv_width(), start + row, task.kv_head * d);
        let rows_of = |block: usize| BLOCK.min(len - block * BLOCK);
        for block in 0..blocks {
            let k = kv_block(saved.k, block * BLOCK).as_rows();
            pack(isa, &mut k_panels[block * by_d..], rows_of(block), d, k, scale)?;
        }
        for i in 0..group {
            let q_head = task.kv_head * group + i;
            // Both forms of the head's queries and dO packed once.
            for block in 0..blocks {
                let (n, q_block) =
                    (rows_of(block), |x| Block::new(E::values(x), shape.q_width(), start + block * BLOCK, q_head * d));
                let (q, d_o) = (q_block(saved.q), q_block(saved.d_o));
                pack(isa, &mut q_panels[block * by_d..], n, d, q.as_rows(), scale)?;
                pack(isa, &mut do_panels[block * by_d..], n, d, d_o.as_rows(), 1.0)?;
                pack(isa, &mut qt_panels[block * by_rows..], d, n, q.as_columns(), scale)?;
                pack(isa, &mut dot_panels[block * by_rows..], d, n, d_o.as_columns(), 1.0)?;
            }
            cpu.isa.vectorize(
                #[inline(always)]
                || {
                    for (row, (delta, lse)) in delta.iter_mut().zip(lse.iter_mut()).enumerate() {
                        let at = (start + row) * shape.q_width() + q_head * d;
                        *delta = dot(&saved.d_o[at..at + d], &saved.o[at..at + d]);
                        *lse = saved.lse[(start + row) * shape.n_heads + q_head];
                    }
                },
            );
            for b in 0..blocks {
                let (key, n) = (b * BLOCK, rows_of(b));
                let k = Panels { data: &k_panels[b * by_d..], k: n, n: d };
                for qb in b..blocks {
                    let (row, rows) = (qb * BLOCK, rows_of(qb));
                    let by_columns = |panels| Panels { data: panels, k: d, n: rows };
                    let (qt, dot) = (by_columns(&qt_panels[qb * by_rows..]), by_columns(&dot_panels[qb * by_rows..]));
                    let by_rows = |panels| Panels { data: panels, k: rows, n: d };
                    let (q, d_o) = (by_rows(&q_panels[qb * by_d..]), by_rows(&do_panels[qb * by_d..]));
                    let (p, ds) = (&mut p[..n * rows], &mut ds[..n * rows]);
                    for first in (0..n).step_by(STRIP) {
                        let strip = STRIP.min(n - first);
                        let (scores, dscores) = (&mut scores[..strip * rows], &mut dscores[..strip * rows]);
                        let (k, v) = (kv_block(saved.k, key + first), kv_block(saved.v, key + first));
                        multiply(isa, scores, strip, Accumulate::Overwrite, k.rows(), qt)?;
                        multiply(isa, dscores, strip, Accumulate::Overwrite, v.rows(), dot)?;
                        // Queries before a key don't see it.
                        let masked = |strip_row: usize| (key + first + strip_row).saturating_sub(row).min(rows);
                        let (lse, delta) = (&lse[row..row + rows], &delta[row..row + rows]);
                        cpu.isa.vectorize(
                            #[inline(always)]
                            || score_gradients::<E>(scores, dscores, lse, delta, masked),
                        );
                        let place = first * rows..(first + strip) * rows;
                        E::narrow(cpu.bf16_isa, &mut p[place.clone()], scores)?;
                        E::narrow(cpu.bf16_isa, &mut ds[place], dscores)?;
                    }
                    let (p, ds) = (E::values(p), E::values(ds));
                    // A key's first block of queries is the one on the diagonal; a query's first block of keys, the first of all.
                    let store = |first| if first { Accumulate::Overwrite } else { Accumulate::Add };
                    let first_queries = store((i, qb) == (0, b));
                    multiply(isa, &mut dv[key * d..], n, first_queries, MatRef::row_major(p, rows), d_o)?;
                    multiply(isa, &mut dk[key * d..], n, first_queries, MatRef::row_major(ds, rows), q)?;
                    multiply(isa, &mut dq[row * d..], rows, store(b == 0), MatRef::transposed(ds, rows), k)?;
                }
            }
            for (out, dq) in task.dq.iter_mut().zip(dq.chunks_exact(d)) {
                E::narrow(cpu.bf16_isa, &mut out[i * d..][..d], dq)?;
            }
        }
        for (out, sums) in [(&mut task.dk, &*dk), (&mut task.dv, &*dv)] {
            for (out, sums) in out.iter_mut().zip(sums.chunks_exact(d)) {
                E::narrow(cpu.bf16_isa, out, sums)?;
            }
        }
        Ok(())
    })
}

/// Keys by queries: p: scores → probabilities; ds: dP → dS = P ∘ (dP − Σ dO∘O), the scale left out. The first `masked(row)`
/// queries don't see the key of a row.
#[inline(always)]
fn score_gradients<E: Element>(
    p: &mut [f32],
    ds: &mut [f32],
    lse: &[f32],
    delta: &[f32],
    masked: impl Fn(usize) -> usize,
) {
    let n = lse.len();
    for (row, (p, ds)) in p.chunks_exact_mut(n).zip(ds.chunks_exact_mut(n)).enumerate() {
        let masked = masked(row);
        let begin = masked / LANES * LANES;
        p[..begin].fill(0.0);
        ds[..begin].fill(0.0);
        p[begin..masked].fill(f32::NEG_INFINITY);
        let rows = p[begin..].iter_mut().zip(&mut ds[begin..]);
        for ((p, ds), (lse, delta)) in rows.zip(lse[begin..].iter().zip(&delta[begin..])) {
            *p = E::exp(*p - lse);
            *ds = *p * (*ds - delta);
        }
    }
}
