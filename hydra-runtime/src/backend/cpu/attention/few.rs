//! Attention of a handful of queries, as in generation: keys and values are read where they lie, each row once for all heads
//! that share it. Packing them first, as the blocked form does, would take longer than the products.

use super::super::Cpu;
use super::super::buffer::Element;
use super::super::lanes::{exponentials, lanes, larger};
use super::{Inputs, Past, QueryTask, score_scale};
use crate::Result;
use crate::backend::AttentionShape;
use hydra_kernels::gemm::Values;
use hydra_kernels::{Format, Isa, RowOrder, Weight, matvec_batch};

/// The most queries of a segment that are a handful.
pub(super) const FEW: usize = 4;

/// Values of a head's keys from which on heads are handed to other threads, which takes as long as a hundred reads from L3.
const TASK: usize = 4 * 1024;

/// The rows of `task`, which are the end of their segment.
pub(super) fn few<E: Element>(
    cpu: &Cpu,
    task: QueryTask<'_, E>,
    inputs: Inputs<'_, E>,
    own: Past<'_, E>,
) -> Result<()> {
    let shape = inputs.shape;
    let (d, group, width) = (shape.head_dim, shape.group(), shape.q_width());
    let rows = task.o.chunks_exact_mut(width).zip(task.lse.chunks_exact_mut(shape.n_heads)).enumerate();
    for (row, (o, lse)) in rows {
        let q = &inputs.q[(task.segment.start + task.first + row) * width..][..width];
        let own = Past { len: task.first + row + 1, ..own };
        let prefix = inputs.prefix.unwrap_or(Past { len: 0, ..own });
        let past = [prefix.last(inputs.window.saturating_sub(own.len)), own.last(inputs.window)];
        let keys = past[0].len + past[1].len;
        let head = |kv_head: usize, (o, lse): (&mut [E], &mut [f32])| {
            cpu.with_scratch(group * (keys + 2 * d), |scratch| {
                let group = Group { shape, kv_head, q: &q[kv_head * group * d..][..group * d], past };
                attend(cpu.isa, o, lse, scratch, group)
            })
        };
        let heads = o.chunks_exact_mut(group * d).zip(lse.chunks_exact_mut(group));
        if keys * d < TASK {
            heads.enumerate().try_for_each(|(kv_head, part)| head(kv_head, part))?;
        } else {
            cpu.threads.each(heads, head)?;
        }
    }
    Ok(())
}

/// One query of each of several sequences, `q` [rows, q_width], each with its own keys and values.
pub(super) fn decode<E: Element>(
    cpu: &Cpu,
    shape: AttentionShape,
    (o, lse): (&mut [E], &mut [f32]),
    q: &[E],
    pasts: &[Past<'_, E>],
    window: usize,
) -> Result<()> {
    let (part, width) = (shape.group() * shape.head_dim, shape.q_width());
    let pasts: Vec<_> = pasts.iter().map(|past| [past.last(window), past.last(0)]).collect();
    let query = |i: usize, (o, lse): (&mut [E], &mut [f32])| {
        let (row, kv_head) = (i / shape.kv_heads, i % shape.kv_heads);
        let past = pasts[row];
        cpu.with_scratch(shape.group() * (past[0].len + 2 * shape.head_dim), |scratch| {
            let group = Group { shape, kv_head, q: &q[row * width + kv_head * part..][..part], past };
            attend(cpu.isa, o, lse, scratch, group)
        })
    };
    let heads = o[..pasts.len() * width].chunks_exact_mut(part).zip(lse.chunks_exact_mut(shape.group()));
    if pasts.iter().map(|past| past[0].len).sum::<usize>() * shape.head_dim < TASK {
        heads.enumerate().try_for_each(|(i, head)| query(i, head))
    } else {
        cpu.threads.each(heads, query)
    }
}

impl<E> Past<'_, E> {
    /// The last `len` rows at most.
    fn last(&self, len: usize) -> Self {
        let len = self.len.min(len);
        Self { k: self.k, v: self.v, start: self.start + self.len - len, len }
    }
}

/// One query of the heads that share a key head.
#[derive(Clone, Copy)]
struct Group<'a, E> {
    shape: AttentionShape,
    kv_head: usize,
    /// [group, d].
    q: &'a [E],
    /// The prefix, then the query's own segment.
    past: [Past<'a, E>; 2],
}

/// The key head's columns of the values that are attended to.
#[inline(always)]
fn values<'a, E>(group: Group<'_, E>, past: Past<'a, E>) -> impl Iterator<Item = &'a [E]> {
    let (width, d) = (group.shape.kv_width(), group.shape.head_dim);
    let rows = past.v[past.start * width..].chunks_exact(width).take(past.len);
    rows.map(move |row| &row[group.kv_head * d..][..d])
}

/// The key head's columns of the keys that are attended to, as a matrix [keys, d].
fn keys<'a, E: Element>(group: Group<'a, E>, past: Past<'a, E>) -> Result<Weight<'a>> {
    let (width, d) = (group.shape.kv_width(), group.shape.head_dim);
    let (format, bytes) = match E::values(&past.k[past.start * width..][..past.len * width]) {
        Values::F32(k) => (Format::F32, bytemuck::cast_slice(k)),
        Values::Bf16(k) => (Format::Bf16, bytemuck::cast_slice(k)),
    };
    Ok(Weight::new(format, past.len, width, bytes, RowOrder::Natural)?.slice_columns(group.kv_head * d, d)?)
}

/// `o` [group, d] and `lse` `[group]`. `scratch` is [group, keys + 2 d].
fn attend<E: Element>(isa: Isa, o: &mut [E], lse: &mut [f32], scratch: &mut [f32], group: Group<'_, E>) -> Result<()> {
    let (heads, d) = (lse.len(), group.shape.head_dim);
    let (q, rest) = scratch.split_at_mut(heads * d);
    let (sums, scores) = rest.split_at_mut(heads * d);
    let scale = score_scale(group.shape);
    q.iter_mut().zip(group.q).for_each(|(scaled, q)| *scaled = q.widen() * scale);
    // The scores of the prefix, [group, keys], then those of the query's own segment.
    let lens = group.past.map(|past| past.len);
    let (first, second) = scores.split_at_mut(heads * lens[0]);
    let mut scores = [first, second];
    for (scores, past) in scores.iter_mut().zip(group.past) {
        matvec_batch(isa, scores, heads, keys(group, past)?, 0, q)?;
    }
    isa.vectorize(
        #[inline(always)]
        || {
            for (head, lse) in lse.iter_mut().enumerate() {
                let [first, second] = &mut scores;
                let mut parts = [&mut first[head * lens[0]..][..lens[0]], &mut second[head * lens[1]..][..lens[1]]];
                let max = parts.iter().fold(f32::NEG_INFINITY, |max, part| lanes(part, max, larger));
                let sum = parts.iter_mut().map(|part| exponentials::<E>(part, max)).sum::<f32>();
                parts.iter_mut().flat_map(|part| part.iter_mut()).for_each(|p| *p /= sum);
                *lse = max + sum.ln();
            }
            sums.fill(0.0);
            for (scores, past) in scores.iter().zip(group.past) {
                for (key, v) in values(group, past).enumerate() {
                    for (scores, sums) in scores.chunks_exact(past.len).zip(sums.chunks_exact_mut(d)) {
                        let p = scores[key];
                        sums.iter_mut().zip(v).for_each(|(sum, v)| *sum += p * v.widen());
                    }
                }
            }
            o.iter_mut().zip(&*sums).for_each(|(o, sum)| *o = E::round(*sum));
        },
    );
    Ok(())
}
