//! Runs every operation of hydra-kernels on a thread with 256 KiB of stack, on every instruction set of the machine. If
//! they need more, the process is killed.
//!
//! Values do not matter here, so they are all the same; shapes reach each of the arrays that are kept on the stack.

use half::bf16;
use hydra_kernels::dropout::{Dropout, dropout, dropout_accumulate, dropout_in_place, dropout_unscaled};
use hydra_kernels::hydra::{
    AdapterGradients, BackwardArgs, ForwardArgs, Gradients, HydraLayer, backward, backward_scratch, forward,
    forward_scratch, recompute, recompute_scratch,
};
use hydra_kernels::softmax::{log_sum_exp, softmax_backward_rows, softmax_rows};
use hydra_kernels::{
    Accumulate, AdapterRef, Bf16Isa, Dropouts, Element, Error, Format, Gate, HydraShape, Isa, MatRef, Panels, Routing,
    RowOrder, Source, Term, Values, ValuesMut, Weight, Workspace, gemm, matvec, pack, panels_len, to_bf16,
};

/// What README.md promises.
const STACK: usize = 256 * 1024;

fn main() {
    let thread = std::thread::Builder::new().stack_size(STACK).spawn(|| {
        for isa in Isa::available() {
            rows(isa)?;
            weights::<f32>(isa)?;
            products::<f32>(isa)?;
            operator::<f32>(isa)?;
        }
        for isa in Bf16Isa::available() {
            to_bf16(isa, &mut [bf16::ZERO; 100], &[0.5; 100])?;
            weights::<bf16>(isa)?;
            products::<bf16>(isa)?;
            operator::<bf16>(isa)?;
        }
        Ok::<(), Error>(())
    });
    let outcome = thread.expect("a thread starts").join();
    outcome.expect("no panic").expect("valid arguments");
    let isas: Vec<_> = Isa::available().map(Isa::name).chain(Bf16Isa::available().map(Bf16Isa::name)).collect();
    println!("256 KiB of stack are enough for {}", isas.join(", "));
}

/// Softmax and dropout.
fn rows(isa: Isa) -> Result<(), Error> {
    let (mut x, mut y, mask) = (vec![0.5; 300], vec![0.5; 300], Dropout { p: 0.5, seed: 1, first_row: 0 });
    softmax_rows(isa, &mut x, 100)?;
    softmax_backward_rows(isa, &mut y, &x, 100)?;
    log_sum_exp(isa, &x);
    dropout(isa, &mut y, &x, 100, mask)?;
    dropout_unscaled(isa, &mut y, &x, 100, mask)?;
    dropout_in_place(isa, &mut y, 100, mask)?;
    dropout_accumulate(isa, &mut y, &x, 100, mask)
}

/// A [rows, cols] matrix of zeros in any format.
fn zeros(format: Format, [rows, cols]: [usize; 2], bytes: &[u8]) -> Result<Weight<'_>, Error> {
    let row_bytes = format.row_bytes(cols).ok_or(Error::Overflow)?;
    Weight::new(format, rows, cols, &bytes[..rows * row_bytes], RowOrder::Natural)
}

/// Frozen weights of every format: decoded, packed in both directions, and multiplied by one token.
fn weights<E: Element>(isa: E::Isa) -> Result<(), Error> {
    let (n, k, bytes) = (37, 512, vec![0; 37 * 512 * 4]);
    let mut panels = vec![E::round(0.0); panels_len::<E>(isa, k, n).max(panels_len::<E>(isa, n, k))];
    let (mut row, mut y) = (vec![0.0; k], vec![0.0; n]);
    for format in Format::ALL {
        let weight = zeros(format, [n, k], &bytes)?;
        weight.decode_row(E::widened(isa), 1, 32, &mut row[32..]);
        matvec(E::widened(isa), &mut y, weight, 0, &row)?;
        pack(isa, &mut panels, k, n, Source::WeightRows { weight, first: 0 }, 2.0)?;
        pack(isa, &mut panels, n, k, Source::WeightCols { weight, first: 0 }, 2.0)?;
    }
    Ok(())
}

/// Operands at all strides and of both types; results in f32 and in bf16, in one pass over k and in several.
fn products<E: Element>(isa: E::Isa) -> Result<(), Error> {
    let (m, n) = (3, 100);
    for k in [40, 800, 2800] {
        let (a, mut c, mut narrow) = (vec![0.5; m * k], vec![0.0; m * n], vec![bf16::ZERO; m * n]);
        let narrow_a = vec![bf16::ONE; m * k];
        let b = vec![0.5; k * n];
        let mut panels = vec![E::round(0.0); panels_len::<E>(isa, k, n)];
        for (k_stride, n_stride) in [(n, 1), (1, k)] {
            pack(isa, &mut panels, k, n, Source::Dense { data: Values::F32(&b), k_stride, n_stride }, 1.0)?;
        }
        let b = Panels::new(&panels[..], k, n);
        let operands = [MatRef::row_major(&a[..], k), MatRef::transposed(&a[..], m)];
        let narrow_operands = [MatRef::row_major(&narrow_a[..], k), MatRef::transposed(&narrow_a[..], m)];
        for a in operands.into_iter().chain(narrow_operands) {
            for accumulate in [Accumulate::Overwrite, Accumulate::Add] {
                gemm(isa, &mut c[..], n, m, n, accumulate, &[Term { a, b }])?;
                gemm(isa, &mut narrow[..], n, m, n, accumulate, &[Term { a, b }])?;
            }
        }
    }
    Ok(())
}

/// The operator with dropout, for few and for more tokens, with activations in f32 and in bf16, and layers so wide or
/// deep that a product takes several passes.
fn operator<E: Element>(isa: E::Isa) -> Result<(), Error> {
    for (tokens, d_in, d_out) in [(2, 70, 40), (5, 70, 40), (5, 800, 100), (5, 40, 2100)] {
        let shape = HydraShape { d_in, d_out, rank: 3, lora_heads: 4, per_head_a: false, router: true };
        let wide = (vec![0.5f32; tokens * d_in], vec![0.5f32; tokens * d_out]);
        pass::<E>(isa, shape, tokens, [Values::F32(&wide.0), Values::F32(&wide.1)])?;
        let narrow = (vec![bf16::ONE; tokens * d_in], vec![bf16::ONE; tokens * d_out]);
        pass::<E>(isa, shape, tokens, [Values::Bf16(&narrow.0), Values::Bf16(&narrow.1)])?;
    }
    Ok(())
}

/// Forward, recomputation and backward.
fn pass<E: Element>(isa: E::Isa, shape: HydraShape, tokens: usize, [x, dy]: [Values<'_>; 2]) -> Result<(), Error> {
    let HydraShape { d_in, d_out, .. } = shape;
    let (w, a, b) =
        (vec![0.1; d_out * d_in], vec![0.1; shape.stacked_rows() * d_in], vec![0.1; d_out * shape.mixed_width()]);
    let adapter = AdapterRef { shape, a: &a, b: &b, scale: 2.0, gate: Gate::Router(Routing::default()) };
    let layer = HydraLayer { weight: Weight::from_f32(d_out, d_in, &w)?, adapter: Some(adapter) };
    let mut adapter_state = vec![0.0; tokens * shape.state_width()];
    let (mut y, mut narrow_y) = (vec![0.0; tokens * d_out], vec![bf16::ZERO; tokens * d_out]);
    let (mut dx, mut narrow_dx) = (vec![0.0; tokens * d_in], vec![bf16::ZERO; tokens * d_in]);
    let (mut da, mut db) = (vec![0.0; a.len()], vec![0.0; b.len()]);
    let is_f32 = matches!(x, Values::F32(_));
    let mask = Some(Dropout { p: 0.1, seed: 1, first_row: 0 });
    for dropouts in [Dropouts::default(), Dropouts { input: mask, mixed: mask }] {
        let dropout = dropouts.input.is_some();
        let needs = [
            forward_scratch::<E>(&shape, tokens, dropout),
            recompute_scratch::<E>(&shape, tokens, dropout),
            backward_scratch::<E>(&shape, tokens, dropout),
        ];
        let mut memory = vec![0.0; needs.iter().map(|need| need.0).max().unwrap_or(0)];
        let workspace = &mut Workspace::new(&mut memory);
        let args = ForwardArgs { dropouts, ..ForwardArgs::new(tokens, x) };
        let out = if is_f32 { ValuesMut::F32(&mut y) } else { ValuesMut::Bf16(&mut narrow_y) };
        forward::<E>(isa, &layer, &args, out, &mut adapter_state, workspace)?;
        recompute::<E>(isa, &layer, &args, &mut adapter_state, workspace)?;
        let args = BackwardArgs { dropouts, load_balance: 0.1, ..BackwardArgs::new(tokens, dy, x) };
        for accumulate in [Accumulate::Overwrite, Accumulate::Add] {
            let out = if is_f32 { ValuesMut::F32(&mut dx) } else { ValuesMut::Bf16(&mut narrow_dx) };
            let adapter = Some(AdapterGradients { da: &mut da, db: &mut db });
            let gradients = Gradients { dx: Some((out, accumulate)), adapter };
            backward::<E>(isa, &layer, &args, Some(&adapter_state), gradients, workspace)?;
        }
    }
    Ok(())
}
