//! Row by row and value by value: norms, rotations, SwiGLU, the embedding, AdamW.
//!
//! An operation that is no more than one task runs on the calling thread: for a single token it ends before another thread has
//! woken.

use super::Cpu;
use super::buffer::Element;
use super::lanes::{dot, dot3, squares};
use crate::backend::AdamW;
use crate::backend::Weight;
use hydra_kernels::isa::Bf16Isa;

/// Values in a task of an operation without rows.
const CHUNK: usize = 16 * 1024;

/// Results that are kept in f32 and rounded together.
const BLOCK: usize = 256;

impl Cpu {
    pub(super) fn embed_rows(&self, out: &mut [f32], table: &Weight<'_>, tokens: &[u32]) {
        let (d, rows) = (table.cols(), self.row_chunk(tokens.len()));
        self.run(out.chunks_mut(rows * d).zip(tokens.chunks(rows)), |(out, tokens)| {
            for (out, &token) in out.chunks_exact_mut(d).zip(tokens) {
                table.decode_row(self.isa, token as usize, 0, out);
            }
        });
    }

    pub(super) fn rms_norm_rows<E: Element>(
        &self,
        y: &mut [E],
        inv_rms: &mut [f32],
        tokens: usize,
        x: &[f32],
        weight: &[f32],
        eps: f32,
    ) {
        let (d, rows) = (weight.len(), self.row_chunk(tokens));
        let (y, inv_rms) = (&mut y[..tokens * d], &mut inv_rms[..tokens]);
        let task = |((y, inv_rms), x): ((&mut [E], &mut [f32]), &[f32])| {
            self.isa.vectorize(
                #[inline(always)]
                || rms_norm(self.bf16_isa, y, inv_rms, x, weight, eps),
            );
        };
        self.run(y.chunks_mut(rows * d).zip(inv_rms.chunks_mut(rows)).zip(x.chunks(rows * d)), task);
    }

    pub(super) fn rms_norm_backward_rows(
        &self,
        dx: &mut [f32],
        tokens: usize,
        dy: &[f32],
        x: &[f32],
        inv_rms: &[f32],
        weight: &[f32],
    ) {
        let (d, rows) = (weight.len(), self.row_chunk(tokens));
        let outputs = dx[..tokens * d].chunks_mut(rows * d).zip(dy.chunks(rows * d));
        let inputs = x.chunks(rows * d).zip(inv_rms.chunks(rows));
        self.run(outputs.zip(inputs), |((dx, dy), (x, inv_rms))| {
            self.isa.vectorize(
                #[inline(always)]
                || rms_norm_backward(dx, dy, x, inv_rms, weight),
            );
        });
    }

    pub(super) fn head_norm_rows<E: Element>(&self, y: &mut [E], heads: usize, x: &[E], weight: &[f32], eps: f32) {
        let values = heads_chunk(weight.len());
        let y = &mut y[..heads * weight.len()];
        self.run(y.chunks_mut(values).zip(x.chunks(values)), |(y, x)| {
            self.isa.vectorize(
                #[inline(always)]
                || head_norm(self.bf16_isa, y, x, weight, eps),
            );
        });
    }

    pub(super) fn head_norm_backward_rows<E: Element>(
        &self,
        dx: &mut [E],
        heads: usize,
        x: &[E],
        weight: &[f32],
        eps: f32,
    ) {
        let values = heads_chunk(weight.len());
        let dx = &mut dx[..heads * weight.len()];
        self.run(dx.chunks_mut(values).zip(x.chunks(values)), |(dx, x)| {
            self.isa.vectorize(
                #[inline(always)]
                || head_norm_backward(self.bf16_isa, dx, x, weight, eps),
            );
        });
    }

    pub(super) fn rope_rows<E: Element>(
        &self,
        x: &mut [E],
        n_heads: usize,
        head_dim: usize,
        table: &[f32],
        positions: &[u32],
        inverse: bool,
    ) {
        let (width, rows) = (n_heads * head_dim, self.row_chunk(positions.len()));
        let x = &mut x[..positions.len() * width];
        let task = |(x, positions): (&mut [E], &[u32])| {
            self.isa.vectorize(
                #[inline(always)]
                || rope(x, width, head_dim, table, positions, inverse),
            );
        };
        self.run(x.chunks_mut(rows * width).zip(positions.chunks(rows)), task);
    }

    pub(super) fn swiglu_values<E: Element>(&self, out: &mut [E], gate: &[E], up: &[E]) {
        let task = |(out, (gate, up)): (&mut [E], (&[E], &[E]))| {
            self.isa.vectorize(
                #[inline(always)]
                || swiglu(self.bf16_isa, out, gate, up),
            );
        };
        self.run(out.chunks_mut(CHUNK).zip(gate.chunks(CHUNK).zip(up.chunks(CHUNK))), task);
    }

    pub(super) fn swiglu_backward_values<E: Element>(&self, dgate: &mut [E], dup: &mut [E], gate: &[E], up: &[E]) {
        let gradients = dgate.chunks_mut(CHUNK).zip(dup.chunks_mut(CHUNK));
        self.run(gradients.zip(gate.chunks(CHUNK).zip(up.chunks(CHUNK))), |((dgate, dup), (gate, up))| {
            self.isa.vectorize(
                #[inline(always)]
                || swiglu_backward(self.bf16_isa, dgate, dup, gate, up),
            )
        });
    }

    pub(super) fn copy_values<E: Element>(&self, to: &mut [E], from: &[E]) {
        self.run(to.chunks_mut(CHUNK).zip(from.chunks(CHUNK)), |(to, from)| to.copy_from_slice(from));
    }

    pub(super) fn zero_values<E: Element>(&self, x: &mut [E]) {
        self.run(x.chunks_mut(CHUNK), |x| x.fill(E::default()));
    }

    /// `y` += `x`, of one length.
    pub(super) fn add_values(&self, y: &mut [f32], x: &[f32]) {
        self.run(y.chunks_mut(CHUNK).zip(x.chunks(CHUNK)), |(y, x)| {
            self.isa.vectorize(
                #[inline(always)]
                || y.iter_mut().zip(x).for_each(|(y, x)| *y += x),
            );
        });
    }

    pub(super) fn sum_of_squares_values(&self, x: &[f32]) -> f64 {
        let sum = |x: &[f32]| {
            self.isa.vectorize(
                #[inline(always)]
                || squares(x),
            )
        };
        let mut parts = vec![0.0; x.len().div_ceil(CHUNK)];
        self.run(parts.iter_mut().zip(x.chunks(CHUNK)), |(part, x)| *part = sum(x));
        parts.into_iter().sum()
    }

    /// One update of the parameters and of both moments.
    pub(super) fn adamw_values(&self, state: [&mut [f32]; 3], grads: &[f32], update: AdamWUpdate) {
        let [params, m, v] = state.map(|part| part.chunks_mut(CHUNK));
        let AdamWUpdate { adam, lr, step, root, grad_scale } = update;
        self.run(params.zip(m).zip(v).zip(grads.chunks(CHUNK)), |(((params, m), v), grads)| {
            self.isa.vectorize(
                #[inline(always)]
                || {
                    for (((p, m), v), &g) in params.iter_mut().zip(m).zip(v).zip(grads) {
                        let g = g * grad_scale;
                        *m = adam.beta1 * *m + (1.0 - adam.beta1) * g;
                        *v = adam.beta2 * *v + (1.0 - adam.beta2) * g * g;
                        *p = *p * (1.0 - lr * adam.weight_decay) - step * *m / (v.sqrt() / root + adam.eps);
                    }
                },
            );
        });
    }
}

/// What one step of AdamW does to parameters of one learning rate.
#[derive(Clone, Copy)]
pub(super) struct AdamWUpdate {
    adam: AdamW,
    lr: f32,
    /// The learning rate, corrected for the first moment's start at zero.
    step: f32,
    /// √ of the second moment's correction.
    root: f32,
    grad_scale: f32,
}

impl AdamWUpdate {
    /// Step `t`, counted from 1.
    pub fn new(adam: AdamW, t: u64, lr: f32, grad_scale: f32) -> Self {
        // Powers in f64: beta2^t is close to 1 for the first thousand steps.
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(t as f64);
        let step = (f64::from(lr) / correction(adam.beta1)) as f32;
        Self { adam, lr, step, root: correction(adam.beta2).sqrt() as f32, grad_scale }
    }
}

/// `out` = the values that `fill(first, block)` writes, rounded a block at a time.
#[inline(always)]
fn rounded<E: Element>(isa: Bf16Isa, out: &mut [E], mut fill: impl FnMut(usize, &mut [f32])) {
    for (i, out) in out.chunks_mut(BLOCK).enumerate() {
        let mut block = [0.0; BLOCK];
        let block = &mut block[..out.len()];
        fill(i * BLOCK, block);
        E::narrow(isa, out, block).expect("one length");
    }
}

/// 1/√(mean of x² + eps).
#[inline(always)]
fn inverse_rms<X: Element>(x: &[X], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// `y` = x · scale ∘ weight.
#[inline(always)]
fn scaled<E: Element, X: Element>(isa: Bf16Isa, y: &mut [E], x: &[X], scale: f32, weight: &[f32]) {
    rounded(
        isa,
        y,
        #[inline(always)]
        |first, block| {
            for ((y, x), w) in block.iter_mut().zip(&x[first..]).zip(&weight[first..]) {
                *y = x.widen() * scale * w;
            }
        },
    );
}

#[inline(always)]
fn rms_norm<E: Element>(isa: Bf16Isa, y: &mut [E], inv_rms: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let d = weight.len();
    for ((y, inv_rms), x) in y.chunks_exact_mut(d).zip(inv_rms).zip(x.chunks_exact(d)) {
        *inv_rms = inverse_rms(x, eps);
        scaled(isa, y, x, *inv_rms, weight);
    }
}

#[inline(always)]
fn rms_norm_backward(dx: &mut [f32], dy: &[f32], x: &[f32], inv_rms: &[f32], weight: &[f32]) {
    let d = weight.len();
    let rows = dx.chunks_exact_mut(d).zip(dy.chunks_exact(d)).zip(x.chunks_exact(d)).zip(inv_rms);
    for (((dx, dy), x), &inv_rms) in rows {
        let mean = dot3(dy, x, weight) / d as f32;
        let along = inv_rms * inv_rms * mean;
        for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(weight) {
            *dx += inv_rms * (dy * w - x * along);
        }
    }
}

/// Values in a task of an operation on heads of `head_dim`: whole heads.
fn heads_chunk(head_dim: usize) -> usize {
    head_dim * (CHUNK / head_dim).max(1)
}

#[inline(always)]
fn head_norm<E: Element>(isa: Bf16Isa, y: &mut [E], x: &[E], weight: &[f32], eps: f32) {
    let d = weight.len();
    for (y, x) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
        scaled(isa, y, x, inverse_rms(x, eps), weight);
    }
}

/// `dx` holds the gradient of the result on entry.
#[inline(always)]
fn head_norm_backward<E: Element>(isa: Bf16Isa, dx: &mut [E], x: &[E], weight: &[f32], eps: f32) {
    let d = weight.len();
    for (dx, x) in dx.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
        let scale = inverse_rms(x, eps);
        let along = scale * scale * (dot3(dx, x, weight) / d as f32);
        for ((dx, x), weight) in dx.chunks_mut(BLOCK).zip(x.chunks(BLOCK)).zip(weight.chunks(BLOCK)) {
            let mut block = [0.0; BLOCK];
            let block = &mut block[..dx.len()];
            for (((new, dy), x), w) in block.iter_mut().zip(&*dx).zip(x).zip(weight) {
                *new = scale * (dy.widen() * w - x.widen() * along);
            }
            E::narrow(isa, dx, block).expect("one length");
        }
    }
}

/// Rotates each pair (x[i], x[i + d/2]) by its angle; see `Backend::rope`.
#[inline(always)]
fn rope<E: Element>(x: &mut [E], width: usize, head_dim: usize, table: &[f32], positions: &[u32], inverse: bool) {
    let half = head_dim / 2;
    let sign = if inverse { -1.0 } else { 1.0 };
    for (x, &position) in x.chunks_exact_mut(width).zip(positions) {
        let (cos, sin) = table[position as usize * head_dim..][..head_dim].split_at(half);
        for head in x.chunks_exact_mut(head_dim) {
            let (left, right) = head.split_at_mut(half);
            for (((left, right), c), s) in left.iter_mut().zip(right).zip(cos).zip(sin) {
                let (l, r, s) = (left.widen(), right.widen(), s * sign);
                (*left, *right) = (E::round(l * c - r * s), E::round(r * c + l * s));
            }
        }
    }
}

#[inline(always)]
fn sigmoid<E: Element>(x: f32) -> f32 {
    1.0 / (1.0 + E::exp(-x))
}

#[inline(always)]
fn swiglu<E: Element>(isa: Bf16Isa, out: &mut [E], gate: &[E], up: &[E]) {
    rounded(
        isa,
        out,
        #[inline(always)]
        |first, block| {
            for ((out, g), u) in block.iter_mut().zip(&gate[first..]).zip(&up[first..]) {
                let g = g.widen();
                *out = g * sigmoid::<E>(g) * u.widen();
            }
        },
    );
}

#[inline(always)]
fn swiglu_backward<E: Element>(isa: Bf16Isa, dgate: &mut [E], dup: &mut [E], gate: &[E], up: &[E]) {
    let values = gate.chunks(BLOCK).zip(up.chunks(BLOCK));
    for ((dgate, dup), (gate, up)) in dgate.chunks_mut(BLOCK).zip(dup.chunks_mut(BLOCK)).zip(values) {
        let mut gradients = [[0.0; BLOCK]; 2];
        let [new_dgate, new_dup] = gradients.each_mut().map(|gradient| &mut gradient[..gate.len()]);
        for i in 0..gate.len() {
            let (d, g, u) = (dgate[i].widen(), gate[i].widen(), up[i].widen());
            let sigmoid = sigmoid::<E>(g);
            new_dup[i] = d * g * sigmoid;
            new_dgate[i] = d * u * sigmoid * (1.0 + g * (1.0 - sigmoid));
        }
        E::narrow(isa, dgate, new_dgate).expect("one length");
        E::narrow(isa, dup, new_dup).expect("one length");
    }
}
