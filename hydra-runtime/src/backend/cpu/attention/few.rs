//! A handful of queries, as a generation has them: keys and values are read where they lie, each row once for the heads that
//! share it. To pack them first, as the blocked form does, would take longer than the products.

use super::super::Cpu;
use super::super::buffer::Element;
use super::super::lanes::{dot, exponentials, lanes, larger};
use super::{Past, QueryTask};
use crate::Result;
use crate::backend::AttentionShape;

/// The most queries of a segment that are a handful.
pub(super) const FEW: usize = 4;

/// Values of a head's keys from which on heads are handed to other threads; at a quarter of it that was a loss.
const TASK: usize = 16 * 1024;

/// The rows of `task`, which are the end of their segment.
pub(super) fn few<E: Element>(
    cpu: &Cpu,
    task: QueryTask<'_, E>,
    shape: AttentionShape,
    q: &[E],
    own: Past<'_, E>,
    prefix: Option<Past<'_, E>>,
) -> Result<()> {
    let (d, group, width) = (shape.head_dim, shape.group(), shape.q_width());
    let rows = task.o.chunks_exact_mut(width).zip(task.lse.chunks_exact_mut(shape.n_heads)).enumerate();
    for (row, (o, lse)) in rows {
        let q = &q[(task.segment.start + task.first + row) * width..][..width];
        let own = Past { len: task.first + row + 1, ..own };
        let past = [prefix.unwrap_or(Past { len: 0, ..own }), own];
        let keys = past[0].len + past[1].len;
        let head = |kv_head: usize, (o, lse): (&mut [E], &mut [f32])| {
            cpu.with_scratch(group * (keys + 2 * d), |scratch| {
                let q = &q[kv_head * group * d..][..group * d];
                let columns = kv_head * d..(kv_head + 1) * d;
                cpu.isa.vectorize(
                    #[inline(always)]
                    || attend(o, lse, scratch, keys, q, d, past, shape.kv_width(), columns),
                );
                Ok(())
            })
        };
        let mut heads = o.chunks_exact_mut(group * d).zip(lse.chunks_exact_mut(group));
        if keys * d < TASK {
            heads.enumerate().try_for_each(|(kv_head, part)| head(kv_head, part))?;
        } else {
            cpu.threads.each(heads.by_ref(), head)?;
        }
    }
    Ok(())
}

/// One query of the heads that share a key head: `o`, `q` [group, d], `lse` [group]; `columns` of a row of keys or values are
/// that head's.
#[allow(clippy::too_many_arguments)]
#[inline(always)]
fn attend<E: Element>(
    o: &mut [E],
    lse: &mut [f32],
    scratch: &mut [f32],
    keys: usize,
    q: &[E],
    d: usize,
    past: [Past<'_, E>; 2],
    width: usize,
    columns: core::ops::Range<usize>,
) {
    let group = lse.len();
    let (scores, rest) = scratch.split_at_mut(group * keys);
    let (scaled, sums) = rest.split_at_mut(group * d);
    let scale = 1.0 / (d as f32).sqrt();
    scaled.iter_mut().zip(q).for_each(|(scaled, q)| *scaled = q.widen() * scale);
    let mut at = 0;
    for Past { k, start, len, .. } in past {
        for row in k[start * width..].chunks_exact(width).take(len) {
            let row = &row[columns.clone()];
            for (scores, q) in scores.chunks_exact_mut(keys).zip(scaled.chunks_exact(d)) {
                scores[at] = dot(q, row);
            }
            at += 1;
        }
    }
    for (lse, scores) in lse.iter_mut().zip(scores.chunks_exact_mut(keys)) {
        let max = lanes(scores, f32::NEG_INFINITY, larger);
        let sum = exponentials::<E>(scores, max);
        scores.iter_mut().for_each(|p| *p /= sum);
        *lse = max + sum.ln();
    }
    sums.fill(0.0);
    at = 0;
    for Past { v, start, len, .. } in past {
        for row in v[start * width..].chunks_exact(width).take(len) {
            let row = &row[columns.clone()];
            for (scores, sums) in scores.chunks_exact(keys).zip(sums.chunks_exact_mut(d)) {
                let p = scores[at];
                sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += p * v.widen());
            }
            at += 1;
        }
    }
    o.iter_mut().zip(&*sums).for_each(|(o, sum)| *o = E::round(*sum));
}
