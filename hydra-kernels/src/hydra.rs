//! The whole operator, forward and backward, on one thread: for embedders, and the model of how engines compose it.
//!
//! With x [T, d_in], the stacked \[A; R\] [a_rows + N, d_in], B [d_out, N·r], s the scale, and D and H the dropout masks:
//!
//! ```text
//! adapter_state = [ D(x) Aᵀ | softmax(x Rᵀ) ]           y   = x Wᵀ + s · mixed Bᵀ          mixed = H(gate ∘ down)
//! dmixed = H(s · dy B)                           dB += s · dyᵀ mixed
//! [ddown | dlogits] from dmixed                  dA += ddownᵀ D(x)                  dR += dlogitsᵀ x
//!                                                dx += dy W + D(ddown A) + dlogits R
//! ```
//!
//! The products with W run in `E` (f32, or operands rounded to bf16), the adapter's and the router's always in f32. Dropout acts
//! on A's input, never on the router's, and, where it is asked for, on the mixed heads. What backward needs of forward is `adapter_state` alone. (An engine that wants the adapter's
//! product in the frozen one's tiles gives both to [`gemm`] as terms of one sum.)
//!
//! ```
//! use hydra_kernels::hydra::{AdapterRef, Dropouts, backward, backward_scratch, forward, forward_scratch};
//! use hydra_kernels::{Gate, HydraShape, Isa, Weight, Workspace, gate::Routing};
//!
//! // Two tokens, 4 → 3 columns; one A of rank 1, two B, a router. The memory is known when it is compiled.
//! const SHAPE: HydraShape =
//!     HydraShape { tokens: 2, d_in: 4, d_out: 3, rank: 1, lora_heads: 2, per_head_a: false, router: true };
//! const SCRATCH: usize = forward_scratch::<f32>(&SHAPE, false).or(backward_scratch::<f32>(&SHAPE, false)).0;
//! let (isa, mut memory) = (Isa::detect(), [0.0; SCRATCH]);
//! let weight = Weight::from_f32(3, 4, &[0.1; 12])?;
//! // [A; R] has 1 + 2 rows, B a column a head.
//! let adapter = AdapterRef { a: &[0.2; 3 * 4], b: &[0.5; 3 * 2], scale: 2.0 };
//! let (gate, dropouts) = (Gate::Router(Routing::default()), Dropouts::default());
//!
//! let (x, mut y, mut adapter_state) = ([1.0; 2 * 4], [0.0; 2 * 3], [0.0; 2 * 3]);
//! let mut workspace = Workspace::new(&mut memory);
//! forward::<f32>(isa, &SHAPE, &mut y, &mut adapter_state, &x, weight, adapter, gate, dropouts, &mut workspace)?;
//! assert!((y[0] - (0.4 + 2.0 * 0.8 * 0.5)).abs() < 1e-6);
//!
//! let (mut dx, mut da, mut db, dy) = ([0.0; 2 * 4], [0.0; 3 * 4], [0.0; 3 * 2], [1.0; 2 * 3]);
//! backward::<f32>(
//!     isa, &SHAPE, &mut dx, &mut da, &mut db, &dy, &x, weight, adapter, &adapter_state, gate, dropouts, &mut workspace,
//! )?;
//! assert!((db[0] - 2.0 * 2.0 * 0.5 * 0.8).abs() < 1e-6);
//! # Ok::<(), hydra_kernels::Error>(())
//! ```

use crate::dropout::{Dropout, dropout as mask, dropout_accumulate, dropout_in_place};
use crate::error::{Error, exact, product};
use crate::gate::{Gate, activate, mix, mix_backward, push};
use crate::gemm::{
    Accumulate, Element, MatRef, PANEL_ALIGN, Panels, Source, Term, Values, gemm, pack, panels_bound, panels_len,
};
use crate::isa::Isa;
use crate::quant::Weight;
use crate::shape::HydraShape;
use crate::workspace::{Scratch, Workspace};

/// Columns of W (or of Wᵀ) that are packed together: eight panels of 32.
const CHUNK: usize = 8 * PANEL_ALIGN;

/// An adapter's parameters, row-major.
#[derive(Clone, Copy, Debug)]
pub struct AdapterRef<'a> {
    /// \[A; R\], [stacked_rows, d_in].
    pub a: &'a [f32],
    /// B, [d_out, lora_heads·rank]: head e owns columns e·rank .. (e+1)·rank.
    pub b: &'a [f32],
    /// alpha / rank.
    pub scale: f32,
}

/// The dropout masks of a training step; by default none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Dropouts {
    /// On A's input, [tokens, d_in].
    pub input: Option<Dropout>,
    /// On the mixed heads, [tokens, lora_heads·rank], so that each head has a mask of its own (R-LoRA, arXiv 2502.15455).
    pub lora_heads: Option<Dropout>,
}

/// What [`forward`] needs; `dropout` says whether there is a mask on the input.
pub const fn forward_scratch<E: Element>(shape: &HydraShape, dropout: bool) -> Scratch {
    let down = panels::<f32>(shape.d_in, shape.stacked_rows());
    let frozen = panels::<E>(shape.d_in, chunk(shape.d_out));
    let up = panels::<f32>(shape.mixed(), chunk(shape.d_out));
    Scratch::matrix::<f32>(shape.tokens, shape.mixed()).and(masked(shape, dropout)).and(down.or(frozen).or(up))
}

/// `y` [tokens, d_out] = x Wᵀ + s · mixed Bᵀ, and `adapter_state` [tokens, state_width] = [down | gate].
///
/// `x` [tokens, d_in], `weight` [d_out, d_in]. Scratch: [`forward_scratch`]. Writes nothing if it returns an error.
#[allow(clippy::too_many_arguments)]
pub fn forward<E: Element>(
    isa: E::Isa,
    shape: &HydraShape,
    y: &mut [f32],
    adapter_state: &mut [f32],
    x: &[f32],
    weight: Weight<'_>,
    adapter: AdapterRef<'_>,
    gate: Gate<'_>,
    dropouts: Dropouts,
    workspace: &mut Workspace<'_>,
) -> Result<(), Error> {
    check(shape, &weight, adapter, gate)?;
    exact("y", product(shape.tokens, shape.d_out)?, y.len())?;
    exact("adapter_state", product(shape.tokens, shape.state_width())?, adapter_state.len())?;
    exact("x", product(shape.tokens, shape.d_in)?, x.len())?;
    workspace.require(forward_scratch::<E>(shape, dropouts.input.is_some()))?;

    let mut workspace = workspace.reborrow();
    let plain = E::widened(isa);
    let &HydraShape { tokens, d_in, d_out, .. } = shape;
    let mixed = workspace.take::<f32>(tokens * shape.mixed())?;
    let masked = masked_input(plain, x, shape, dropouts.input, &mut workspace)?;

    let (a, r) = adapter.a.split_at(shape.a_rows() * d_in);
    let columns = |data, n| Matrix {
        source: Source::Dense { data: Values::F32(data), k_stride: 1, n_stride: d_in },
        k: d_in,
        n,
        scale: 1.0,
    };
    let width = shape.state_width();
    let down = columns(a, shape.a_rows());
    let down = [(MatRef::row_major(masked, d_in), down)];
    multiply::<f32, _>(plain, adapter_state, width, down, tokens, Accumulate::Overwrite, workspace.reborrow())?;
    if shape.router {
        let logits = &mut adapter_state[shape.a_rows().min(tokens * width)..];
        let router = [(MatRef::row_major(x, d_in), columns(r, shape.lora_heads))];
        multiply::<f32, _>(plain, logits, width, router, tokens, Accumulate::Overwrite, workspace.reborrow())?;
    }
    activate(plain, shape, adapter_state, gate)?;
    mix_heads(plain, shape, mixed, adapter_state, dropouts.lora_heads)?;

    for first in (0..d_out).step_by(CHUNK) {
        let n = CHUNK.min(d_out - first);
        let y = &mut y[first.min(tokens * d_out)..];
        let frozen = Matrix { source: Source::WeightRows { weight, first }, k: d_in, n, scale: 1.0 };
        let data = &adapter.b[first * shape.mixed()..];
        let source = Source::Dense { data: Values::F32(data), k_stride: 1, n_stride: shape.mixed() };
        let up = Matrix { source, k: shape.mixed(), n, scale: adapter.scale };
        let frozen = [(MatRef::row_major(x, d_in), frozen)];
        multiply::<E, _>(isa, &mut *y, d_out, frozen, tokens, Accumulate::Overwrite, workspace.reborrow())?;
        let up = [(MatRef::row_major(&*mixed, shape.mixed()), up)];
        multiply::<f32, _>(plain, y, d_out, up, tokens, Accumulate::Add, workspace.reborrow())?;
    }
    Ok(())
}

/// What [`backward`] needs.
pub const fn backward_scratch<E: Element>(shape: &HydraShape, dropout: bool) -> Scratch {
    let frozen = panels::<E>(shape.d_out, chunk(shape.d_in));
    let b = panels::<f32>(shape.d_out, shape.mixed());
    let mixed = panels::<f32>(shape.tokens, shape.mixed());
    let x = panels::<f32>(shape.tokens, chunk(shape.d_in));
    // [A; R] is packed in its two halves.
    let a = panels::<f32>(shape.a_rows(), chunk(shape.d_in));
    let r = panels::<f32>(if shape.router { shape.lora_heads } else { 0 }, chunk(shape.d_in));
    Scratch::matrix::<f32>(shape.tokens, shape.mixed())
        .and(Scratch::matrix::<f32>(shape.tokens, shape.mixed()))
        .and(Scratch::matrix::<f32>(shape.tokens, shape.state_width()))
        .and(Scratch::floats(shape.lora_heads))
        .and(masked(shape, dropout))
        .and(frozen.or(a.and(r)).or(b).or(mixed).or(x))
}

/// Adds the gradients: `dx` [tokens, d_in], `da` [stacked_rows, d_in] and `db` [d_out, lora_heads·rank] += theirs.
///
/// `dy` [tokens, d_out]; `x`, `gate` and `dropouts` are forward's, `adapter_state` what it left.
/// Scratch: [`backward_scratch`]. Writes nothing if it returns an error.
#[allow(clippy::too_many_arguments)]
pub fn backward<E: Element>(
    isa: E::Isa,
    shape: &HydraShape,
    dx: &mut [f32],
    da: &mut [f32],
    db: &mut [f32],
    dy: &[f32],
    x: &[f32],
    weight: Weight<'_>,
    adapter: AdapterRef<'_>,
    adapter_state: &[f32],
    gate: Gate<'_>,
    dropouts: Dropouts,
    workspace: &mut Workspace<'_>,
) -> Result<(), Error> {
    check(shape, &weight, adapter, gate)?;
    exact("dx", product(shape.tokens, shape.d_in)?, dx.len())?;
    exact("da", adapter.a.len(), da.len())?;
    exact("db", adapter.b.len(), db.len())?;
    exact("dy", product(shape.tokens, shape.d_out)?, dy.len())?;
    exact("x", product(shape.tokens, shape.d_in)?, x.len())?;
    exact("adapter_state", product(shape.tokens, shape.state_width())?, adapter_state.len())?;
    workspace.require(backward_scratch::<E>(shape, dropouts.input.is_some()))?;

    let mut workspace = workspace.reborrow();
    let plain = E::widened(isa);
    let &HydraShape { tokens, d_in, d_out, .. } = shape;
    let (a_rows, width, mixed_width) = (shape.a_rows(), shape.state_width(), shape.mixed());
    let mixed = workspace.take::<f32>(tokens * mixed_width)?;
    let dmixed = workspace.take::<f32>(tokens * mixed_width)?;
    let d_adapter_state = workspace.take::<f32>(tokens * width)?;
    let pushes = workspace.take::<f32>(gate.pushes(shape))?;

    let source = Source::Dense { data: Values::F32(adapter.b), k_stride: mixed_width, n_stride: 1 };
    let b = Matrix { source, k: d_out, n: mixed_width, scale: adapter.scale };
    let dy_rows = MatRef::row_major(dy, d_out);
    multiply::<f32, _>(
        plain,
        dmixed,
        mixed_width,
        [(dy_rows, b)],
        tokens,
        Accumulate::Overwrite,
        workspace.reborrow(),
    )?;
    if let Some(lora_heads) = dropouts.lora_heads {
        dropout_in_place(plain, dmixed, mixed_width, lora_heads)?;
    }
    push(shape, pushes, adapter_state, gate)?;
    mix_backward(plain, shape, d_adapter_state, dmixed, adapter_state, gate, pushes)?;

    mix_heads(plain, shape, mixed, adapter_state, dropouts.lora_heads)?;
    let source = Source::Dense { data: Values::F32(mixed), k_stride: mixed_width, n_stride: 1 };
    let mixed = Matrix { source, k: tokens, n: mixed_width, scale: adapter.scale };
    let dy_columns = MatRef::transposed(dy, d_out);
    multiply::<f32, _>(plain, db, mixed_width, [(dy_columns, mixed)], d_out, Accumulate::Add, workspace.reborrow())?;

    // The two halves of the stacked matrix, each with its own input: [`Half`].
    let (da, dr) = da.split_at_mut(a_rows * d_in);
    let (a, r) = adapter.a.split_at(a_rows * d_in);
    let dlogits = &d_adapter_state[a_rows.min(tokens * width)..];
    let router_rows = if shape.router { shape.lora_heads } else { 0 };
    {
        let mut workspace = workspace.reborrow();
        let masked = masked_input(plain, x, shape, dropouts.input, &mut workspace)?;
        for (dw, rows, dh, input) in [(da, a_rows, &*d_adapter_state, masked), (dr, router_rows, dlogits, x)] {
            for first in (0..d_in).step_by(CHUNK) {
                let data = &input[first.min(input.len())..];
                let source = Source::Dense { data: Values::F32(data), k_stride: d_in, n_stride: 1 };
                let input = Matrix { source, k: tokens, n: CHUNK.min(d_in - first), scale: 1.0 };
                let dw = &mut dw[first.min(rows * d_in)..];
                let term = [(MatRef::transposed(dh, width), input)];
                multiply::<f32, _>(plain, dw, d_in, term, rows, Accumulate::Add, workspace.reborrow())?;
            }
        }
    }

    let rows_of = |data, rows, n| {
        let source = Source::Dense { data: Values::F32(data), k_stride: d_in, n_stride: 1 };
        Matrix { source, k: rows, n, scale: 1.0 }
    };
    if let Some(dropout) = dropouts.input {
        let mut workspace = workspace.reborrow();
        let dmasked = workspace.take::<f32>(tokens * d_in)?;
        for first in (0..d_in).step_by(CHUNK) {
            let n = CHUNK.min(d_in - first);
            let through_a = [(MatRef::row_major(&*d_adapter_state, width), rows_of(&a[first..], a_rows, n))];
            let out = &mut dmasked[first.min(tokens * d_in)..];
            multiply::<f32, _>(plain, out, d_in, through_a, tokens, Accumulate::Overwrite, workspace.reborrow())?;
        }
        dropout_accumulate(plain, dx, dmasked, d_in, dropout)?;
    }
    for first in (0..d_in).step_by(CHUNK) {
        let n = CHUNK.min(d_in - first);
        let frozen = Matrix { source: Source::WeightCols { weight, first }, k: d_out, n, scale: 1.0 };
        let through = [
            // What went through A has been added above if it was masked.
            (
                MatRef::row_major(&*d_adapter_state, width),
                rows_of(&a[first..], if dropouts.input.is_some() { 0 } else { a_rows }, n),
            ),
            (MatRef::row_major(dlogits, width), rows_of(&r[first.min(r.len())..], router_rows, n)),
        ];
        let dx = &mut dx[first.min(tokens * d_in)..];
        let frozen = [(MatRef::row_major(dy, d_out), frozen)];
        multiply::<E, _>(isa, &mut *dx, d_in, frozen, tokens, Accumulate::Add, workspace.reborrow())?;
        multiply::<f32, _>(plain, dx, d_in, through, tokens, Accumulate::Add, workspace.reborrow())?;
    }
    Ok(())
}

/// The right operand of a product, not yet packed.
struct Matrix<'a> {
    source: Source<'a>,
    k: usize,
    n: usize,
    scale: f32,
}

/// `c` = or += Σ a [m, k] · b, each b packed into the workspace.
fn multiply<E: Element, const N: usize>(
    isa: E::Isa,
    c: &mut [f32],
    c_stride: usize,
    terms: [(MatRef<'_>, Matrix<'_>); N],
    m: usize,
    store: Accumulate,
    mut workspace: Workspace<'_>,
) -> Result<(), Error> {
    let n = terms[0].1.n;
    let mut packed = [Term { a: terms[0].0, b: Panels { data: &[], k: 0, n } }; N];
    for (term, (a, b)) in packed.iter_mut().zip(terms) {
        let panels = workspace.take::<E>(panels_len::<E>(isa, b.k, b.n))?;
        pack(isa, panels, b.k, b.n, b.source, b.scale)?;
        *term = Term { a, b: Panels { data: panels, k: b.k, n: b.n } };
    }
    gemm(isa, c, c_stride, m, n, store, &packed)
}

/// H(gate ∘ down).
fn mix_heads(
    isa: Isa,
    shape: &HydraShape,
    mixed: &mut [f32],
    adapter_state: &[f32],
    dropout: Option<Dropout>,
) -> Result<(), Error> {
    mix(isa, shape, mixed, adapter_state)?;
    dropout.map_or(Ok(()), |mask| dropout_in_place(isa, mixed, shape.mixed(), mask))
}

/// D(x), or x itself without dropout.
fn masked_input<'a>(
    isa: Isa,
    x: &'a [f32],
    shape: &HydraShape,
    dropout: Option<Dropout>,
    workspace: &mut Workspace<'a>,
) -> Result<&'a [f32], Error> {
    let Some(dropout) = dropout else { return Ok(x) };
    let masked = workspace.take::<f32>(x.len())?;
    mask(isa, masked, x, shape.d_in, dropout)?;
    Ok(masked)
}

const fn masked(shape: &HydraShape, dropout: bool) -> Scratch {
    Scratch::matrix::<f32>(if dropout { shape.tokens } else { 0 }, shape.d_in)
}

const fn panels<E>(k: usize, n: usize) -> Scratch {
    Scratch::matrix::<E>(1, panels_bound(k, n))
}

const fn chunk(n: usize) -> usize {
    if n < CHUNK { n } else { CHUNK }
}

fn check(shape: &HydraShape, weight: &Weight<'_>, adapter: AdapterRef<'_>, gate: Gate<'_>) -> Result<(), Error> {
    shape.validate()?;
    exact("rows of weight", shape.d_out, weight.rows())?;
    exact("columns of weight", shape.d_in, weight.cols())?;
    exact("a", product(shape.stacked_rows(), shape.d_in)?, adapter.a.len())?;
    exact("b", product(shape.d_out, shape.mixed())?, adapter.b.len())?;
    gate.validate(shape)
}
