//! The gradient of attention: a task is one key head of one segment, so that dq, dk and dv each have one writer; scores are
//! recomputed from `lse`. Gradients are written head-major and laid out row-major afterwards.

use super::super::Cpu;
use super::super::buffer::{Element, carve, floats};
use super::super::lanes::dot;
use super::super::product::pack;
use super::{Block, STRIP, hide, multiply};
use crate::Result;
use crate::backend::{AttentionShape, Store};
use crate::batch::Segment;
use hydra_kernels::gemm::{self, Panels, Rows};
use rayon::prelude::*;

/// Keys and queries in a block, of which two blocks of scores are held.
const BACKWARD: usize = 128;

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

/// One task of the backward pass: one key head of a segment; outputs are [group][len][head_dim], [len][head_dim] twice.
struct KeyTask<'a> {
    segment: Segment,
    kv_head: usize,
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
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
    let tokens: usize = segments.iter().map(|s| s.len).sum();
    let (d, group) = (shape.head_dim, shape.group());
    let workspace = &mut *cpu.workspace();
    let area = workspace.gradient.take::<f32>(tokens * (shape.q_width() + 2 * shape.kv_width()));
    let (dq_area, rest) = area.split_at_mut(tokens * shape.q_width());
    let (dk_area, dv_area) = rest.split_at_mut(tokens * shape.kv_width());
    {
        let (mut dq, mut dk, mut dv, mut tasks) = (&mut *dq_area, &mut *dk_area, &mut *dv_area, Vec::new());
        for kv_head in 0..shape.kv_heads {
            for &segment in segments {
                let (q_part, k_part, v_part);
                (q_part, dq) = dq.split_at_mut(group * segment.len * d);
                (k_part, dk) = dk.split_at_mut(segment.len * d);
                (v_part, dv) = dv.split_at_mut(segment.len * d);
                tasks.push(KeyTask { segment, kv_head, dq: q_part, dk: k_part, dv: v_part });
            }
        }
        tasks.sort_by_key(|task| std::cmp::Reverse(task.segment.len));
        cpu.pool.install(|| tasks.into_par_iter().try_for_each(|task| key_task(cpu, isa, task, shape, saved)))?;
    }
    for &segment in segments {
        to_rows(cpu, dq, dq_area, tokens, segment, shape.kv_heads, group, d);
        to_rows(cpu, dk, dk_area, tokens, segment, shape.kv_heads, 1, d);
        to_rows(cpu, dv, dv_area, tokens, segment, shape.kv_heads, 1, d);
    }
    Ok(())
}

/// [kv_heads][segment][group][len][d] → rows of width kv_heads · group · d.
#[allow(clippy::too_many_arguments)]
fn to_rows<E: Element>(
    cpu: &Cpu,
    out: &mut [E],
    area: &[f32],
    tokens: usize,
    segment: Segment,
    kv_heads: usize,
    group: usize,
    d: usize,
) {
    let width = kv_heads * group * d;
    let rows = &mut out[segment.start * width..][..segment.len * width];
    let chunk = cpu.row_chunk(segment.len);
    cpu.pool.install(|| {
        rows.par_chunks_mut(chunk * width).enumerate().for_each(|(i, rows)| {
            for (row, out) in rows.chunks_exact_mut(width).enumerate() {
                for (head, out) in out.chunks_exact_mut(d).enumerate() {
                    let (kv_head, q_head) = (head / group, head % group);
                    let start = (kv_head * tokens + segment.start) * group + q_head * segment.len;
                    let from = &area[(start + i * chunk + row) * d..][..d];
                    E::narrow(cpu.bf16_isa, out, from).expect("one length");
                }
            }
        })
    });
}

fn key_task<E: Element>(
    cpu: &Cpu,
    isa: E::Isa,
    task: KeyTask<'_>,
    shape: AttentionShape,
    saved: Saved<'_, E>,
) -> Result<()> {
    let (d, group, len) = (shape.head_dim, shape.group(), task.segment.len);
    let scale = 1.0 / (d as f32).sqrt();
    let blocks = len.div_ceil(BACKWARD);
    let by_d = gemm::panels_len::<E>(isa, BACKWARD, d); // a block's rows as the operand [rows, d]
    let by_rows = gemm::panels_len::<E>(isa, d, BACKWARD); // the same as [d, rows]
    let block = BACKWARD * BACKWARD;
    let panels = floats::<E>(group * 2 * blocks * by_d) + 2 * floats::<E>(by_rows) + floats::<E>(by_d);
    let scores = 2 * floats::<E>(block) + 2 * STRIP * BACKWARD;
    cpu.with_scratch(panels + scores + group * len, |scratch| {
        let (packed, rest) = carve::<E>(scratch, group * 2 * blocks * by_d);
        let (kt_panels, rest) = carve::<E>(rest, by_rows);
        let (vt_panels, rest) = carve::<E>(rest, by_rows);
        let (k_panels, rest) = carve::<E>(rest, by_d);
        let (p, rest) = carve::<E>(rest, block);
        let (ds, rest) = carve::<E>(rest, block);
        let (scores, rest) = rest.split_at_mut(STRIP * BACKWARD);
        let (dscores, deltas) = rest.split_at_mut(STRIP * BACKWARD);
        let start = task.segment.start;
        let q_block =
            |x, row, i| Block::new(E::values(x), shape.q_width(), start + row, (task.kv_head * group + i) * d);
        // The queries and dO of each head packed once, and Σ dO∘O of each row.
        for (i, (packed, delta)) in
            packed.chunks_exact_mut(2 * blocks * by_d).zip(deltas.chunks_exact_mut(len)).enumerate()
        {
            for (b, panels) in packed.chunks_exact_mut(2 * by_d).enumerate() {
                let (row, rows) = (b * BACKWARD, BACKWARD.min(len - b * BACKWARD));
                let (q_panels, do_panels) = panels.split_at_mut(by_d);
                pack(isa, q_panels, rows, d, q_block(saved.q, row, i).as_rows(), scale)?;
                pack(isa, do_panels, rows, d, q_block(saved.d_o, row, i).as_rows(), 1.0)?;
            }
            let head = (task.kv_head * group + i) * d;
            cpu.isa.vectorize(
                #[inline(always)]
                || {
                    for (row, delta) in delta.iter_mut().enumerate() {
                        let at = (start + row) * shape.q_width() + head;
                        *delta = dot(&saved.d_o[at..at + d], &saved.o[at..at + d]);
                    }
                },
            );
        }
        for (b, key) in (0..len).step_by(BACKWARD).enumerate() {
            let n = BACKWARD.min(len - key);
            let kv = |x| Block::new(E::values(x), shape.kv_width(), start + key, task.kv_head * d);
            let kt = pack(isa, kt_panels, d, n, kv(saved.k).as_columns(), scale)?;
            let vt = pack(isa, vt_panels, d, n, kv(saved.v).as_columns(), 1.0)?;
            let k = pack(isa, k_panels, n, d, kv(saved.k).as_rows(), scale)?;
            for (i, (packed, delta)) in packed.chunks_exact(2 * blocks * by_d).zip(deltas.chunks_exact(len)).enumerate()
            {
                for (qb, panels) in packed.chunks_exact(2 * by_d).enumerate().skip(b) {
                    let (row, rows) = (qb * BACKWARD, BACKWARD.min(len - qb * BACKWARD));
                    let used = gemm::panels_len::<E>(isa, rows, d);
                    let q_panels = Panels { data: &panels[..used], k: rows, n: d };
                    let do_panels = Panels { data: &panels[by_d..][..used], k: rows, n: d };
                    let (p, ds) = (&mut p[..rows * n], &mut ds[..rows * n]);
                    let q_head = task.kv_head * group + i;
                    for first in (0..rows).step_by(STRIP) {
                        let strip = STRIP.min(rows - first);
                        let (scores, dscores) = (&mut scores[..strip * n], &mut dscores[..strip * n]);
                        let (q, d_o) = (q_block(saved.q, row + first, i), q_block(saved.d_o, row + first, i));
                        multiply(isa, scores, strip, Store::Overwrite, q.rows(), kt)?;
                        multiply(isa, dscores, strip, Store::Overwrite, d_o.rows(), vt)?;
                        let lse = |r: usize| saved.lse[(start + row + first + r) * shape.heads + q_head];
                        let visible = |r: usize| (row + first + r + 1).saturating_sub(key).min(n);
                        cpu.isa.vectorize(
                            #[inline(always)]
                            || score_gradients::<E>(scores, dscores, n, &delta[row + first..], lse, visible),
                        );
                        let place = first * n..(first + strip) * n;
                        E::narrow(cpu.bf16_isa, &mut p[place.clone()], scores)?;
                        E::narrow(cpu.bf16_isa, &mut ds[place], dscores)?;
                    }
                    let (p, ds) = (E::values(p), E::values(ds));
                    let (dv, dk) = (&mut task.dv[key * d..], &mut task.dk[key * d..]);
                    // A key's first block of queries is the one on the diagonal; a query's first block of keys, the first of all.
                    let store = |first| if first { Store::Overwrite } else { Store::Accumulate };
                    let first_queries = (i, qb) == (0, b);
                    multiply(isa, dv, n, store(first_queries), Rows::transposed(p, n), do_panels)?;
                    multiply(isa, dk, n, store(first_queries), Rows::transposed(ds, n), q_panels)?;
                    let dq = &mut task.dq[(i * len + row) * d..];
                    multiply(isa, dq, rows, store(b == 0), Rows::row_major(ds, n), k)?;
                }
            }
        }
        Ok(())
    })
}

/// p: scores → probabilities; ds: dP → dS = P ∘ (dP − Σ dO∘O), the scale left out.
#[inline(always)]
fn score_gradients<E: Element>(
    p: &mut [f32],
    ds: &mut [f32],
    n: usize,
    delta: &[f32],
    lse: impl Fn(usize) -> f32,
    visible: impl Fn(usize) -> usize,
) {
    for (row, (p, ds)) in p.chunks_exact_mut(n).zip(ds.chunks_exact_mut(n)).enumerate() {
        let (lse, delta) = (lse(row), delta[row]);
        let seen = hide(p, visible(row));
        let (seen_ds, hidden_ds) = ds.split_at_mut(seen.len());
        hidden_ds.fill(0.0);
        for (p, ds) in seen.iter_mut().zip(seen_ds) {
            *p = E::exp(*p - lse);
            *ds = *p * (*ds - delta);
        }
    }
}
