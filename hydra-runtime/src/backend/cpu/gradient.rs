//! The adapter's own gradients: products over all tokens.
//!
//! ```text
//! dB += scale · dyᵀ mixed       dA += ddownᵀ D(x)       dR += dlogitsᵀ x
//! ```
//!
//! Each is computed transposed, [few rows, tokens] · [tokens, a block of columns], a block a task; sums over tokens run in
//! blocks of a fixed length, so that they do not depend on the number of threads.

use super::Cpu;
use super::buffer::{Element, carve, floats};
use super::linear::{Args, drop_rows};
use super::workspace::Area;
use crate::Result;
use hydra_kernels::gemm::{self, Accumulate, MatRef, Panels, Source, Term, Values};

/// Tokens whose rows are packed together.
const TOKENS: usize = 1024;

/// Most panels of columns in a task: with that many tokens a quarter of L2.
const PANELS: usize = 8;

/// What the products need beside their operands.
pub(super) struct Areas<'a> {
    pub dropped: &'a mut Area,
    pub gradient: &'a mut Area,
}

/// Adds the gradients to `dparams`; see the module's heading.
#[allow(clippy::too_many_arguments)]
pub(super) fn adapter_gradients<E: Element>(
    cpu: &Cpu,
    isa: E::Isa,
    args: &Args<'_>,
    tokens: usize,
    dparams: Option<&mut [f32]>,
    dy: Values<'_>,
    x: Values<'_>,
    mixed: &[f32],
    d_adapter_state: &[f32],
    Areas { dropped, gradient }: Areas<'_>,
) -> Result<()> {
    let Some(dparams) = dparams else { return Ok(()) };
    let shape = args.slot.shape;
    let (n, width, d_in) = (shape.mixed_width(), shape.state_width(), shape.d_in);
    let (block, scale) = (cpu.column_share(shape.d_out, PANELS), args.slot.scale);
    let rows = MatRef::transposed(mixed, n);
    let db = &mut dparams[args.slot.b.clone()];
    cpu.threads.each(db.chunks_mut(block * n), |i, db| {
        let columns = Columns { x: dy, d: shape.d_out, first: i * block, count: db.len() / n };
        product::<E>(cpu, isa, rows, n, tokens, columns, |sums| {
            // dB's rows are the product's columns.
            for (column, db) in db.chunks_exact_mut(n).enumerate() {
                db.iter_mut().enumerate().for_each(|(j, db)| *db += scale * sums[j * columns.count + column]);
            }
        })
    })?;
    let da = &mut dparams[args.slot.a.clone()];
    let block = cpu.column_share(d_in, PANELS);
    let mut add_rows = |from: usize, end: usize, x: Values<'_>, scale: f32| {
        let height = end - from;
        let rows = MatRef::transposed(&d_adapter_state[from..], width);
        let sums = gradient.take::<f32>(height * d_in);
        cpu.threads.each(sums.chunks_mut(height * block), |i, out| {
            let columns = Columns { x, d: d_in, first: i * block, count: out.len() / height };
            product::<E>(cpu, isa, rows, height, tokens, columns, |sums| out.copy_from_slice(sums))
        })?;
        for (i, sums) in sums.chunks(height * block).enumerate() {
            let columns = sums.len() / height;
            for (da, sums) in da[from * d_in..].chunks_exact_mut(d_in).zip(sums.chunks_exact(columns)) {
                da[i * block..][..columns].iter_mut().zip(sums).for_each(|(da, sum)| *da += scale * sum);
            }
        }
        Ok::<_, crate::Error>(())
    };
    let (a_rows, stacked) = (shape.a_rows(), shape.stacked_rows());
    let Some(key) = args.dropout else { return add_rows(0, stacked, x, 1.0) };
    // The mask comes before A, never before the router.
    let dropped = dropped.take::<E>(tokens * d_in);
    let rows = cpu.row_chunk(tokens);
    cpu.threads.each(dropped.chunks_mut(rows * d_in), |i, out| drop_rows(cpu, key, out, x, i * rows, d_in))?;
    add_rows(0, a_rows, E::values(dropped), key.mask(0).scale())?;
    if a_rows < stacked {
        add_rows(a_rows, stacked, x, 1.0)?;
    }
    Ok(())
}

/// Columns `first .. first + count` of a row-major matrix `d` wide.
#[derive(Clone, Copy)]
struct Columns<'a> {
    x: Values<'a>,
    d: usize,
    first: usize,
    count: usize,
}

/// Hands `write` `rows` [height, tokens] · columns, [height, count].
#[allow(clippy::too_many_arguments)]
fn product<E: Element>(
    cpu: &Cpu,
    isa: E::Isa,
    rows: MatRef<'_>,
    height: usize,
    tokens: usize,
    columns: Columns<'_>,
    write: impl FnOnce(&[f32]),
) -> Result<()> {
    let n = columns.count;
    let panels_len = gemm::panels_len::<E>(isa, TOKENS.min(tokens), n);
    cpu.with_scratch(floats::<E>(panels_len) + height * n, |scratch| {
        let (panels, sums) = carve::<E>(scratch, panels_len);
        sums.fill(0.0);
        for t in (0..tokens).step_by(TOKENS) {
            let k = TOKENS.min(tokens - t);
            let data = columns.x.skip(t * columns.d + columns.first);
            gemm::pack(isa, panels, k, n, Source::Dense { data, k_stride: columns.d, n_stride: 1 }, 1.0)?;
            let a = MatRef { data: rows.data.skip(t * rows.col_stride), ..rows };
            let term = Term { a, b: Panels { data: &*panels, k, n } };
            gemm::gemm(isa, &mut *sums, n, height, n, Accumulate::Add, &[term])?;
        }
        write(sums);
        Ok(())
    })
}
