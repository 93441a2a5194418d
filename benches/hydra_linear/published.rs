//! The published order: heads one after the other, tensor by tensor, forward and by hand what its automatic
//! differentiation does.

use crate::{HEADS, Memory, Problem, RANK, SCALE};
use hydra_kernels::softmax::{softmax_backward_rows, softmax_rows};
use hydra_kernels::{Accumulate, HydraShape, Isa, MatRef, Panels, Source, Term, Values, gemm, pack, panels_len};

/// Columns that are packed together.
const CHUNK: usize = 256;

/// A row-major matrix of f32 [.., width], or some of its columns.
fn of(data: &[f32], width: usize) -> MatRef<'_> {
    MatRef::row_major(data, width)
}

/// The right operand [k, n] of a product.
struct Right<'a> {
    source: Source<'a>,
    k: usize,
    n: usize,
    scale: f32,
}

fn dense(data: &[f32], [k, k_stride]: [usize; 2], [n, n_stride]: [usize; 2], scale: f32) -> Right<'_> {
    Right { source: Source::Dense { data: Values::F32(data), k_stride, n_stride }, k, n, scale }
}

/// `c` [m, n], rows `stride` apart, = or += `a` [m, k] · `b`.
fn multiply(c: &mut [f32], stride: usize, m: usize, accumulate: Accumulate, a: MatRef<'_>, b: &Right<'_>) {
    let isa = Isa::detect();
    let mut panels = vec![0.0; panels_len::<f32>(isa, b.k, CHUNK.min(b.n))];
    for first in (0..b.n).step_by(CHUNK) {
        let n = CHUNK.min(b.n - first);
        let source = match b.source {
            Source::Dense { data, k_stride, n_stride } => {
                Source::Dense { data: data.skip(first * n_stride), k_stride, n_stride }
            }
            Source::WeightRows { weight, .. } => Source::WeightRows { weight, first },
            Source::WeightCols { weight, .. } => Source::WeightCols { weight, first },
        };
        pack(isa, &mut panels, b.k, n, source, b.scale).unwrap();
        let term = Term { a, b: Panels::new(&panels, b.k, n) };
        gemm(isa, &mut c[first..], stride, m, n, accumulate, &[term]).unwrap();
    }
}

/// What automatic differentiation keeps of the forward pass.
pub struct Saved {
    gate: Vec<f32>,
    /// Of each head: x Aᵀ and its projection, scaled.
    heads: Vec<[Vec<f32>; 2]>,
}

/// Writes `memory.y`.
pub fn forward(problem: &Problem, memory: &mut Memory) -> Saved {
    let Problem { tokens, shape: HydraShape { d_in, d_out, .. }, ref x, ref a, ref b, .. } = *problem;
    let (isa, x, (a, r)) = (Isa::detect(), of(x, d_in), a.split_at(RANK * d_in));
    let weight = Source::WeightRows { weight: problem.weight(), first: 0 };
    let weight = Right { source: weight, k: d_in, n: d_out, scale: 1.0 };
    multiply(&mut memory.y, d_out, tokens, Accumulate::Overwrite, x, &weight);
    let mut gate = vec![0.0; tokens * HEADS];
    multiply(&mut gate, HEADS, tokens, Accumulate::Overwrite, x, &dense(r, [d_in, 1], [HEADS, d_in], 1.0));
    softmax_rows(isa, &mut gate, HEADS).unwrap();
    let head = |head: usize| {
        let (mut lora_down, mut up) = (vec![0.0; tokens * RANK], vec![0.0; tokens * d_out]);
        let a = dense(a, [d_in, 1], [RANK, d_in], 1.0);
        multiply(&mut lora_down, RANK, tokens, Accumulate::Overwrite, x, &a);
        let b = dense(&b[head * RANK..], [RANK, 1], [d_out, HEADS * RANK], SCALE);
        multiply(&mut up, d_out, tokens, Accumulate::Overwrite, of(&lora_down, RANK), &b);
        for ((y, up), gate) in memory.y.chunks_mut(d_out).zip(up.chunks(d_out)).zip(gate.chunks(HEADS)) {
            y.iter_mut().zip(up).for_each(|(y, up)| *y += gate[head] * up);
        }
        [lora_down, up]
    };
    let heads = (0..HEADS).map(head).collect();
    Saved { gate, heads }
}

/// Overwrites `memory.dx` and adds to `memory.da` and `memory.db`.
pub fn backward(problem: &Problem, memory: &mut Memory, saved: &Saved) {
    let Problem { tokens, shape: HydraShape { d_in, d_out, .. }, ref x, ref dy, ref a, ref b, .. } = *problem;
    let (isa, (a, r)) = (Isa::detect(), a.split_at(RANK * d_in));
    let Memory { dx, da, db, .. } = memory;
    let (da, dr) = da.split_at_mut(RANK * d_in);
    let weight = Source::WeightCols { weight: problem.weight(), first: 0 };
    let weight = Right { source: weight, k: d_out, n: d_in, scale: 1.0 };
    multiply(dx, d_in, tokens, Accumulate::Overwrite, of(dy, d_out), &weight);
    let x = dense(x, [tokens, d_in], [d_in, 1], 1.0);
    let mut dlogits = vec![0.0; tokens * HEADS];
    for (head, [lora_down, up]) in saved.heads.iter().enumerate() {
        let (mut d_up, mut d_lora_down) = (dy.clone(), vec![0.0; tokens * RANK]);
        for (t, d_up) in d_up.chunks_mut(d_out).enumerate() {
            dlogits[t * HEADS + head] = d_up.iter().zip(&up[t * d_out..]).map(|(dy, up)| dy * up).sum();
            d_up.iter_mut().for_each(|d_up| *d_up *= saved.gate[t * HEADS + head]);
        }
        let b = dense(&b[head * RANK..], [d_out, HEADS * RANK], [RANK, 1], SCALE);
        multiply(&mut d_lora_down, RANK, tokens, Accumulate::Overwrite, of(&d_up, d_out), &b);
        let down = dense(lora_down, [tokens, RANK], [RANK, 1], SCALE);
        let d_up = MatRef::transposed(&d_up[..], d_out);
        multiply(&mut db[head * RANK..], HEADS * RANK, d_out, Accumulate::Add, d_up, &down);
        multiply(da, d_in, RANK, Accumulate::Add, MatRef::transposed(&d_lora_down[..], RANK), &x);
        let a = dense(a, [RANK, d_in], [d_in, 1], 1.0);
        multiply(dx, d_in, tokens, Accumulate::Add, of(&d_lora_down, RANK), &a);
    }
    softmax_backward_rows(isa, &mut dlogits, &saved.gate, HEADS).unwrap();
    multiply(dr, d_in, HEADS, Accumulate::Add, MatRef::transposed(&dlogits[..], HEADS), &x);
    let r = dense(r, [HEADS, d_in], [d_in, 1], 1.0);
    multiply(dx, d_in, tokens, Accumulate::Add, of(&dlogits, HEADS), &r);
}
