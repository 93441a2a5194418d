//! The gradient of attention: a task is one key head of one segment, so that each value of dq, dk and dv has one writer. Scores
//! are recomputed from `lse`, a block of keys against a block of queries at a time.
//!
//! With P = exp(S − lse) and δ = Σ dO ∘ O per query, the gradient of the scores is dS = P ∘ (dO Vᵀ − δ), and
//!
//! ```text
//! dV = Pᵀ dO        dK = scale · dSᵀ Q        dQ = scale · dS K
//! ```
//!
//! Scores are computed transposed, keys by queries: Pᵀ and dSᵀ are then left operands as they are written, and only dQ reads
//! one by columns. dK and dV are summed over the query heads that share them.

use super::super::Cpu;
use super::super::buffer::{Element, carve, floats};
use super::super::exec::Exec;
use super::super::lanes::{LANES, dot};
use super::{Block, STRIP, in_keys, panels_around, score_scale, within};
use crate::Result;
use crate::backend::{Accumulate, AttentionBackward, AttentionShape};
use crate::batch::Segment;
use hydra_kernels::gemm::{self, MatRef, Panels, Values};
use std::ops::Range;

/// Keys and queries in a block.
const BLOCK: usize = 128;

/// What all tasks read: what the forward pass saved, and the gradient of its result.
#[derive(Clone, Copy)]
struct Saved<'a, E> {
    shape: AttentionShape,
    d_o: &'a [E],
    o: &'a [E],
    lse: &'a [f32],
    q: &'a [E],
    k: &'a [E],
    v: &'a [E],
    /// The keys that a query sees, its own included.
    window: usize,
}

impl<E> Saved<'_, E> {
    /// The first block of keys that queries of a block see. It never falls from one block of queries to the next.
    fn first_key_block(&self, query_block: usize) -> usize {
        (query_block * BLOCK + 1).saturating_sub(self.window) / BLOCK
    }
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

/// See [`crate::backend::Backend::attention_backward`].
pub(in super::super) fn backward<E: Element>(exec: Exec<'_, E>, args: AttentionBackward<'_, Cpu>) -> Result<()> {
    let AttentionBackward { dq, dk, dv, shape, segments, window, d_o, o, lse, q, k, v } = args;
    let (d_o, o) = (E::of(d_o)?, E::of(o)?);
    let saved = Saved { shape, d_o, o, lse, q: E::of(q)?, k: E::of(k)?, v: E::of(v)?, window: in_keys(window) };
    let mut tasks = key_tasks(shape, segments, [E::of_mut(dq)?, E::of_mut(dk)?, E::of_mut(dv)?]);
    tasks.sort_by_key(|task| std::cmp::Reverse(task.segment.len));
    exec.cpu.threads.each(tasks.into_iter(), |_, task| key_task(exec, task, saved))
}

/// Cuts the gradients by segment and key head.
fn key_tasks<'a, E>(
    shape: AttentionShape,
    segments: &[Segment],
    [mut dq, mut dk, mut dv]: [&'a mut [E]; 3],
) -> Vec<KeyTask<'a, E>> {
    let mut tasks = Vec::with_capacity(segments.len() * shape.kv_heads);
    for &segment in segments {
        let q_parts = by_head(&mut dq, segment.len, shape.q_width(), shape.kv_heads);
        let k_parts = by_head(&mut dk, segment.len, shape.kv_width(), shape.kv_heads);
        let v_parts = by_head(&mut dv, segment.len, shape.kv_width(), shape.kv_heads);
        for (kv_head, ((dq, dk), dv)) in q_parts.into_iter().zip(k_parts).zip(v_parts).enumerate() {
            tasks.push(KeyTask { segment, kv_head, dq, dk, dv });
        }
    }
    tasks
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

fn key_task<E: Element>(exec: Exec<'_, E>, task: KeyTask<'_, E>, saved: Saved<'_, E>) -> Result<()> {
    let KeyTask { segment, kv_head, mut dq, mut dk, mut dv } = task;
    let (shape, len) = (saved.shape, segment.len);
    let (d, blocks) = (shape.head_dim, len.div_ceil(BLOCK));
    exec.cpu.with_scratch(Scratch::len(exec, len, d), |scratch| {
        let mut scratch = Scratch::carve(exec, len, d, scratch);
        scratch.pack_keys(exec, saved, segment, kv_head)?;
        for i in 0..shape.group() {
            let q_head = kv_head * shape.group() + i;
            scratch.pack_queries(exec, saved, segment, q_head)?;
            scratch.query_statistics(exec, saved, segment, q_head);
            for key_block in 0..blocks {
                // Queries before a key don't see it, nor do those whose window begins behind it.
                for query_block in key_block..blocks {
                    let first_key_block = saved.first_key_block(query_block);
                    if first_key_block > key_block {
                        break;
                    }
                    let first =
                        First { of_keys: i == 0 && query_block == key_block, of_queries: key_block == first_key_block };
                    let pair = Pair { segment, kv_head, key_block, query_block, first };
                    scratch.score_gradients(exec, saved, pair)?;
                    scratch.accumulate(exec, saved.window, pair)?;
                }
            }
            for (out, sums) in dq.iter_mut().zip(scratch.dq.chunks_exact(d)) {
                exec.narrow(&mut out[i * d..][..d], sums)?;
            }
        }
        for (out, sums) in [(&mut dk, &*scratch.dk), (&mut dv, &*scratch.dv)] {
            for (out, sums) in out.iter_mut().zip(sums.chunks_exact(d)) {
                exec.narrow(out, sums)?;
            }
        }
        Ok(())
    })
}

/// A block of keys against a block of queries of one query head.
#[derive(Clone, Copy)]
struct Pair {
    segment: Segment,
    kv_head: usize,
    key_block: usize,
    query_block: usize,
    first: First,
}

impl Pair {
    /// The queries that see a key, counted from the first of their block of `queries`.
    fn queries_of(self, window: usize, key: usize, queries: usize) -> Range<usize> {
        let key = self.key_block * BLOCK + key;
        within(key..key.saturating_add(window), self.query_block * BLOCK, queries)
    }

    /// Whether all `queries` see all `keys`.
    fn all_seen(self, window: usize, keys: usize, queries: usize) -> bool {
        self.queries_of(window, keys - 1, queries).start == 0 && self.queries_of(window, 0, queries).end == queries
    }

    /// The keys that a query sees, counted from the first of their block of `keys`.
    fn keys_of(self, window: usize, query: usize, keys: usize) -> Range<usize> {
        let end = self.query_block * BLOCK + query + 1;
        within(end.saturating_sub(window)..end, self.key_block * BLOCK, keys)
    }
}

/// Whose sums a pair of blocks begins; it adds to the others.
#[derive(Clone, Copy)]
struct First {
    /// dK and dV of the block of keys: it meets the queries on the diagonal first, of the first head of its group.
    of_keys: bool,
    /// dQ of the block of queries: it meets the first keys that it sees first.
    of_queries: bool,
}

/// A task's memory. Panels are a block after the other: [rows, d] as the operand B, and its transpose [d, rows].
struct Scratch<'a, E> {
    d: usize,
    /// Rows of the segment.
    len: usize,
    /// Values of a block's panels, [rows, d].
    by_d: usize,
    /// Values of a block's panels, [d, rows].
    by_rows: usize,
    k: &'a mut [E],
    q: &'a mut [E],
    d_o: &'a mut [E],
    q_transposed: &'a mut [E],
    d_o_transposed: &'a mut [E],
    /// Pᵀ of a pair of blocks, [keys, queries].
    p: &'a mut [f32],
    /// dSᵀ of a pair of blocks, without the scale.
    ds: &'a mut [f32],
    /// One head's, [len, d].
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    /// One head's, `[len]`.
    lse: &'a mut [f32],
    /// Σ dO ∘ O of one head's rows, `[len]`.
    delta: &'a mut [f32],
}

impl<'a, E: Element> Scratch<'a, E> {
    fn panels(exec: Exec<'_, E>, d: usize) -> [usize; 2] {
        [gemm::panels_len::<E>(exec.isa, BLOCK, d), gemm::panels_len::<E>(exec.isa, d, BLOCK)]
    }

    /// Floats that it takes.
    fn len(exec: Exec<'_, E>, len: usize, d: usize) -> usize {
        let blocks = len.div_ceil(BLOCK);
        let [by_d, by_rows] = Self::panels(exec, d);
        let panels = 3 * floats::<E>(blocks * by_d) + 2 * floats::<E>(blocks * by_rows);
        panels + 2 * BLOCK * BLOCK + 3 * len * d + 2 * len
    }

    fn carve(exec: Exec<'_, E>, len: usize, d: usize, scratch: &'a mut [f32]) -> Self {
        let blocks = len.div_ceil(BLOCK);
        let [by_d, by_rows] = Self::panels(exec, d);
        let (k, rest) = carve::<E>(scratch, blocks * by_d);
        let (q, rest) = carve::<E>(rest, blocks * by_d);
        let (d_o, rest) = carve::<E>(rest, blocks * by_d);
        let (q_transposed, rest) = carve::<E>(rest, blocks * by_rows);
        let (d_o_transposed, rest) = carve::<E>(rest, blocks * by_rows);
        let (p, rest) = rest.split_at_mut(BLOCK * BLOCK);
        let (ds, rest) = rest.split_at_mut(BLOCK * BLOCK);
        let (dq, rest) = rest.split_at_mut(len * d);
        let (dk, rest) = rest.split_at_mut(len * d);
        let (dv, rest) = rest.split_at_mut(len * d);
        let (lse, rest) = rest.split_at_mut(len);
        let delta = &mut rest[..len];
        Self { d, len, by_d, by_rows, k, q, d_o, q_transposed, d_o_transposed, p, ds, dq, dk, dv, lse, delta }
    }

    /// Rows of a block.
    fn rows(&self, block: usize) -> usize {
        BLOCK.min(self.len - block * BLOCK)
    }

    fn pack_keys(&mut self, exec: Exec<'_, E>, saved: Saved<'_, E>, segment: Segment, kv_head: usize) -> Result<()> {
        let (d, shape) = (self.d, saved.shape);
        for block in 0..self.len.div_ceil(BLOCK) {
            let first = segment.start + block * BLOCK;
            let k = Block::new(E::values(saved.k), shape.kv_width(), first, kv_head * d);
            let n = self.rows(block);
            exec.pack(&mut self.k[block * self.by_d..], [n, d], k.as_rows(), score_scale(shape))?;
        }
        Ok(())
    }

    /// One head's queries and dO, in both forms.
    fn pack_queries(&mut self, exec: Exec<'_, E>, saved: Saved<'_, E>, segment: Segment, q_head: usize) -> Result<()> {
        let (d, shape, scale) = (self.d, saved.shape, score_scale(saved.shape));
        for block in 0..self.len.div_ceil(BLOCK) {
            let (n, first) = (self.rows(block), segment.start + block * BLOCK);
            let rows = |x| Block::new(E::values(x), shape.q_width(), first, q_head * d);
            let (q, d_o) = (rows(saved.q), rows(saved.d_o));
            let (by_d, by_rows) = (block * self.by_d, block * self.by_rows);
            exec.pack(&mut self.q[by_d..], [n, d], q.as_rows(), scale)?;
            exec.pack(&mut self.d_o[by_d..], [n, d], d_o.as_rows(), 1.0)?;
            exec.pack(&mut self.q_transposed[by_rows..], [d, n], q.as_columns(), scale)?;
            exec.pack(&mut self.d_o_transposed[by_rows..], [d, n], d_o.as_columns(), 1.0)?;
        }
        Ok(())
    }

    /// `delta` and `lse` of one head.
    fn query_statistics(&mut self, exec: Exec<'_, E>, saved: Saved<'_, E>, segment: Segment, q_head: usize) {
        let (d, shape) = (self.d, saved.shape);
        exec.cpu.isa.vectorize(
            #[inline(always)]
            || {
                for (row, (delta, lse)) in self.delta.iter_mut().zip(self.lse.iter_mut()).enumerate() {
                    let at = (segment.start + row) * shape.q_width() + q_head * d;
                    *delta = dot(&saved.d_o[at..at + d], &saved.o[at..at + d]);
                    *lse = saved.lse[(segment.start + row) * shape.n_heads + q_head];
                }
            },
        );
    }

    /// `p` and `ds` of a pair of blocks.
    fn score_gradients(&mut self, exec: Exec<'_, E>, saved: Saved<'_, E>, pair: Pair) -> Result<()> {
        let (d, shape) = (self.d, saved.shape);
        let (key, row) = (pair.key_block * BLOCK, pair.query_block * BLOCK);
        let (n, queries) = (self.rows(pair.key_block), self.rows(pair.query_block));
        let at = pair.query_block * self.by_rows;
        let q = Panels::new(&self.q_transposed[at..], d, queries);
        let d_o = Panels::new(&self.d_o_transposed[at..], d, queries);
        for first in (0..n).step_by(STRIP) {
            let strip = STRIP.min(n - first);
            let place = first * queries..(first + strip) * queries;
            let (scores, dscores) = (&mut self.p[place.clone()], &mut self.ds[place]);
            let rows = |x| {
                Block::new(E::values(x), shape.kv_width(), pair.segment.start + key + first, pair.kv_head * d).rows()
            };
            let visible = |strip_row: usize| pair.queries_of(saved.window, first + strip_row, queries);
            let seen = panels_around(visible(0).start..visible(strip - 1).end, queries);
            if !seen.is_empty() {
                let store = Accumulate::Overwrite;
                let (q, d_o) = (q.part(exec.isa, 0..d, seen.clone())?, d_o.part(exec.isa, 0..d, seen.clone())?);
                exec.multiply_strided(&mut scores[seen.start..], queries, strip, store, rows(saved.k), q)?;
                exec.multiply_strided(&mut dscores[seen.start..], queries, strip, store, rows(saved.v), d_o)?;
            }
            let (lse, delta) = (&self.lse[row..row + queries], &self.delta[row..row + queries]);
            exec.cpu.isa.vectorize(
                #[inline(always)]
                || softmax_gradients::<E>(scores, dscores, lse, delta, visible),
            );
            if saved.window == 1 {
                // The softmax over a single key is constant. Rounding would leave a gradient that AdamW makes into steps.
                dscores.fill(0.0);
            }
        }
        Ok(())
    }

    /// Adds what a pair of blocks contributes to dq, dk and dv.
    fn accumulate(&mut self, exec: Exec<'_, E>, window: usize, pair: Pair) -> Result<()> {
        let d = self.d;
        let (key, row) = (pair.key_block * BLOCK, pair.query_block * BLOCK);
        let (n, queries) = (self.rows(pair.key_block), self.rows(pair.query_block));
        let (at_k, at_q) = (pair.key_block * self.by_d, pair.query_block * self.by_d);
        let k = Panels::new(&self.k[at_k..], n, d);
        let q = Panels::new(&self.q[at_q..], queries, d);
        let d_o = Panels::new(&self.d_o[at_q..], queries, d);
        let store = |first| if first { Accumulate::Overwrite } else { Accumulate::Add };
        let (of_keys, of_queries) = (store(pair.first.of_keys), store(pair.first.of_queries));
        let step = if pair.all_seen(window, n, queries) { BLOCK } else { STRIP };
        for first in (0..n).step_by(step) {
            let end = n.min(first + step);
            let seen = pair.queries_of(window, first, queries).start..pair.queries_of(window, end - 1, queries).end;
            let seen = panels_around(seen, queries);
            let (at, rows) = (first * queries + seen.start, (key + first) * d..(key + end) * d);
            for (out, x, b) in [(&mut self.dv, &self.p, d_o), (&mut self.dk, &self.ds, q)] {
                let a = MatRef::row_major(Values::F32(&x[at..n * queries]), queries);
                exec.multiply(&mut out[rows.clone()], end - first, of_keys, a, b.part(exec.isa, seen.clone(), 0..d)?)?;
            }
        }
        for first in (0..queries).step_by(step) {
            let end = queries.min(first + step);
            let seen = pair.keys_of(window, first, n).start..pair.keys_of(window, end - 1, n).end;
            let seen = panels_around(seen, n);
            let a = MatRef::transposed(Values::F32(&self.ds[seen.start * queries + first..n * queries]), queries);
            let out = &mut self.dq[(row + first) * d..(row + end) * d];
            exec.multiply(out, end - first, of_queries, a, k.part(exec.isa, seen, 0..d)?)?;
        }
        Ok(())
    }
}

/// Keys by queries: `p`: scores → probabilities; `ds`: dP → dS = P ∘ (dP − δ), without the scale. The queries `visible(row)` see
/// the key of a row.
#[inline(always)]
fn softmax_gradients<E: Element>(
    p: &mut [f32],
    ds: &mut [f32],
    lse: &[f32],
    delta: &[f32],
    visible: impl Fn(usize) -> Range<usize>,
) {
    let n = lse.len();
    for (row, (p, ds)) in p.chunks_exact_mut(n).zip(ds.chunks_exact_mut(n)).enumerate() {
        let Range { start, end } = visible(row);
        // Whole vectors around the visible queries; the other queries among them have probability exp(−∞). Beyond them, nothing
        // was computed.
        let (start, end) = if start < end { (start, end) } else { (0, 0) };
        let (first, last) = (start / LANES * LANES, end.next_multiple_of(LANES).min(n));
        p[..first].fill(0.0);
        ds[..first].fill(0.0);
        p[first..start].fill(f32::NEG_INFINITY);
        p[end..last].fill(f32::NEG_INFINITY);
        p[last..].fill(0.0);
        ds[last..].fill(0.0);
        let rows = p[first..last].iter_mut().zip(&mut ds[first..last]);
        for ((p, ds), (lse, delta)) in rows.zip(lse[first..last].iter().zip(&delta[first..last])) {
            *p = E::exp(*p - lse);
            *ds = *p * (*ds - delta);
        }
    }
}
