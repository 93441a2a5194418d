//! Runs every operation of hydra-kernels on a thread with 256 KiB of stack, on every instruction set of the machine, and
//! on emulated AMX where it has none but has AVX-512 BF16. If they need more, the process is killed.
//!
//! Values do not matter here, so they are all the same; shapes reach each of the arrays that are kept on the stack.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[path = "../../kernels/amx.rs"]
mod amx;

use half::bf16;
use hydra_kernels::dropout::{Dropout, dropout, dropout_accumulate, dropout_in_place, dropout_unscaled};
use hydra_kernels::hydra::{
    AdapterGradients, BackwardArgs, ColumnGradients, Few, ForwardArgs, Gradients, HydraLayer, ThreadColumns, backward,
    backward_columns, backward_columns_scratch, backward_scratch, few_batch_scratch, few_output_scratch, forward,
    forward_columns, forward_columns_scratch, forward_scratch, recompute, recompute_scratch,
};
use hydra_kernels::q8;
use hydra_kernels::softmax::{log_sum_exp, softmax_backward_rows, softmax_rows};
use hydra_kernels::{
    Accumulate, AdapterRef, Bf16Isa, Dropouts, Element, Error, Format, Gate, HydraShape, Isa, MatRef, Panels, Q8Isa,
    Routing, RowOrder, Source, Term, Values, ValuesMut, Weight, Workspace, activate, balance_loss_grad, gemm, matvec,
    matvec_batch, mix, mix_backward, pack, panels_len, to_bf16,
};

/// What README.md promises.
const STACK: usize = 256 * 1024;

fn main() {
    let emulated = emulated_amx();
    let thread = std::thread::Builder::new().stack_size(STACK).spawn(move || {
        for isa in Isa::available() {
            rows(isa)?;
            gates(isa)?;
            few(isa)?;
            weights::<f32>(isa)?;
            products::<f32>(isa)?;
            operator::<f32>(isa)?;
        }
        for isa in Q8Isa::available() {
            eight_bits(isa)?;
        }
        if emulated.is_some() {
            handle_signals_elsewhere();
        }
        for isa in Bf16Isa::available().chain(emulated) {
            to_bf16(isa, &mut [bf16::ZERO; 100], &[0.5; 100])?;
            weights::<bf16>(isa)?;
            products::<bf16>(isa)?;
            operator::<bf16>(isa)?;
        }
        Ok::<(), Error>(())
    });
    let outcome = thread.expect("a thread starts").join();
    outcome.expect("no panic").expect("valid arguments");
    let isas = Isa::available().map(Isa::name).chain(Q8Isa::available().map(Q8Isa::name));
    let isas: Vec<_> = isas.chain(Bf16Isa::available().chain(emulated).map(Bf16Isa::name)).collect();
    println!("256 KiB of stack are enough for {}", isas.join(", "));
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn emulated_amx() -> Option<Bf16Isa> {
    None
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn handle_signals_elsewhere() {}

/// AMX, if it has to be emulated. The signals that do so are handled on the stack of [`handle_signals_elsewhere`].
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn emulated_amx() -> Option<Bf16Isa> {
    let isa = amx::emulated()?;
    // SAFETY: zeros are a valid `sigaction`, and the one that is set is the one that was read, but for a flag.
    let failed = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGILL, std::ptr::null(), &mut action);
        action.sa_flags |= libc::SA_ONSTACK;
        libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut())
    };
    assert_eq!(failed, 0, "sigaction(SIGILL)");
    Some(isa)
}

/// Gives this thread a stack for signals, so that its own is the kernels' alone.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn handle_signals_elsewhere() {
    let memory = vec![0u8; STACK].leak();
    let stack = libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: 0, ss_size: memory.len() };
    // SAFETY: the memory is never freed, and nothing else uses it.
    assert_eq!(unsafe { libc::sigaltstack(&stack, std::ptr::null_mut()) }, 0, "sigaltstack");
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

/// A router's gate, forward and backward.
fn gates(isa: Isa) -> Result<(), Error> {
    let shape = HydraShape { d_in: 70, d_out: 40, rank: 3, lora_heads: 4, per_head_a: false, router: true };
    let (gate, mut grad) = (Gate::Router(Routing::default()), vec![0.0; shape.lora_heads]);
    let (mut state, mut mixed) = (vec![0.5; 5 * shape.state_width()], vec![0.5; 5 * shape.mixed_width()]);
    let mut d_state = state.clone();
    activate(isa, &shape, &mut state, gate, &[])?;
    mix(isa, &shape, &mut mixed, &state)?;
    balance_loss_grad(&shape, &mut grad, &state, 0.1)?;
    mix_backward(isa, &shape, &mut d_state, &mixed, &state, gate, &grad)
}

/// The operator for a handful of tokens, with weights of every format and activations of both types: as a pass of at most
/// four tokens, and as a batch of any number.
fn few(isa: Isa) -> Result<(), Error> {
    let (d_in, d_out, bytes) = (256, 37, vec![0; 37 * 256 * 4]);
    let shape = HydraShape { d_in, d_out, rank: 3, lora_heads: 4, per_head_a: false, router: true };
    let (a, b) = (vec![0.1; shape.stacked_rows() * d_in], vec![0.1; d_out * shape.mixed_width()]);
    let adapter = AdapterRef { shape, a: &a, b: &b, scale: 2.0, gate: Gate::Router(Routing::default()) };
    for format in Format::ALL {
        let layer = HydraLayer { weight: zeros(format, [d_out, d_in], &bytes)?, adapter: Some(adapter) };
        for tokens in [4, 6] {
            let (x, narrow_x) = (vec![0.5f32; tokens * d_in], vec![bf16::ONE; tokens * d_in]);
            let (residual, narrow_residual) = (vec![0.5f32; tokens * d_out], vec![bf16::ONE; tokens * d_out]);
            let both =
                [(Values::F32(&x), Values::F32(&residual)), (Values::Bf16(&narrow_x), Values::Bf16(&narrow_residual))];
            for (x, residual) in both {
                let args = ForwardArgs { residual: Some(residual), ..ForwardArgs::new(tokens, x) };
                let mut widened = vec![0.0; tokens * d_in];
                let (mut state, mut mixed) =
                    (vec![0.0; tokens * shape.state_width()], vec![0.0; tokens * shape.mixed_width()]);
                let mut y = vec![0.0; tokens * d_out];
                let mut memory = vec![0.0; few_batch_scratch(tokens, d_out).or(few_output_scratch(d_out)).0];
                let workspace = &mut Workspace::new(&mut memory);
                if tokens == 4 {
                    let few = Few::new(isa, layer, args, &mut widened)?;
                    few.adapter_rows(&mut state, &mut mixed)?;
                    few.output(1, 0..d_out, &mixed, &mut y[..d_out], workspace)?;
                } else {
                    let few = Few::batch(isa, layer, args, &mut widened)?;
                    few.adapter_rows(&mut state, &mut mixed)?;
                    few.products(0..d_out, &mut y)?;
                    few.add_adapter(0..d_out, &mixed, &mut y, workspace)?;
                }
            }
        }
    }
    Ok(())
}

/// Products of activations in eight bits with every block format: for one token, two and four, and for so many that
/// weights are unpacked, two panels at a time and one.
fn eight_bits(isa: Q8Isa) -> Result<(), Error> {
    let (n, k, bytes) = (37, 512, vec![0; 37 * 512 * 4]);
    let (x, mut memory) = (vec![0.5; 18 * k], vec![0.0; q8::product_scratch(k).0]);
    let mut quantized = vec![q8::Block::ZERO; 18 * q8::blocks(k)];
    q8::quantize(isa.widened(), &mut quantized, k, &x)?;
    for format in Format::ALL.into_iter().filter(|format| q8::serves(*format)) {
        let weight = zeros(format, [n, k], &bytes)?;
        for tokens in [1, 2, 4, 18] {
            let (mut y, x) = (vec![0.0; tokens * n], &quantized[..tokens * q8::blocks(k)]);
            q8::product(isa, &mut y, weight, 0..n, x, &mut Workspace::new(&mut memory))?;
        }
    }
    Ok(())
}

/// A [rows, cols] matrix of zeros in any format.
fn zeros(format: Format, [rows, cols]: [usize; 2], bytes: &[u8]) -> Result<Weight<'_>, Error> {
    let row_bytes = format.row_bytes(cols).ok_or(Error::Overflow)?;
    Weight::new(format, rows, cols, &bytes[..rows * row_bytes], RowOrder::Natural)
}

/// Frozen weights of every format: decoded, packed in both directions, and multiplied by one token and by several.
fn weights<E: Element>(isa: E::Isa) -> Result<(), Error> {
    let (n, k, bytes) = (37, 512, vec![0; 37 * 512 * 4]);
    let mut panels = vec![E::round(0.0); panels_len::<E>(isa, k, n).max(panels_len::<E>(isa, n, k))];
    let (mut row, mut y) = (vec![0.0; k], vec![0.0; n]);
    let (rows, mut batch) = (vec![0.5; 7 * k], vec![0.0; 7 * n]);
    for format in Format::ALL {
        let weight = zeros(format, [n, k], &bytes)?;
        weight.decode_row(E::widened(isa), 1, 32, &mut row[32..]);
        matvec(E::widened(isa), &mut y, weight, 0, &row)?;
        matvec_batch(E::widened(isa), &mut batch, 7, weight, 0, &rows)?;
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

/// The operator with dropout, for few and for more tokens, with activations in f32 and in bf16, layers so wide or deep
/// that a product takes several passes, and one of each format.
fn operator<E: Element>(isa: E::Isa) -> Result<(), Error> {
    let plain = [(2, 70, 40), (5, 70, 40), (5, 800, 100), (5, 40, 2100)].map(|sizes| (Format::F32, sizes));
    for (format, (tokens, d_in, d_out)) in plain.into_iter().chain(Format::ALL.map(|format| (format, (5, 256, 40)))) {
        let shape = HydraShape { d_in, d_out, rank: 3, lora_heads: 4, per_head_a: false, router: true };
        let bytes = vec![0; d_out * d_in * 4];
        let weight = zeros(format, [d_out, d_in], &bytes)?;
        let wide = (vec![0.5f32; tokens * d_in], vec![0.5f32; tokens * d_out]);
        pass::<E>(isa, shape, weight, tokens, [Values::F32(&wide.0), Values::F32(&wide.1)])?;
        // How weights are decoded does not depend on the activations' type.
        if format.block_len() > 1 {
            continue;
        }
        let narrow = (vec![bf16::ONE; tokens * d_in], vec![bf16::ONE; tokens * d_out]);
        pass::<E>(isa, shape, weight, tokens, [Values::Bf16(&narrow.0), Values::Bf16(&narrow.1)])?;
    }
    Ok(())
}

/// Forward, recomputation and backward; then forward and backward by the columns of each of two threads.
fn pass<E: Element>(
    isa: E::Isa,
    shape: HydraShape,
    weight: Weight<'_>,
    tokens: usize,
    [x, dy]: [Values<'_>; 2],
) -> Result<(), Error> {
    let HydraShape { d_in, d_out, .. } = shape;
    let (a, b) = (vec![0.1; shape.stacked_rows() * d_in], vec![0.1; d_out * shape.mixed_width()]);
    let adapter = AdapterRef { shape, a: &a, b: &b, scale: 2.0, gate: Gate::Router(Routing::default()) };
    let layer = HydraLayer { weight, adapter: Some(adapter) };
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
        for ith in 0..2 {
            let share = ThreadColumns::new(&shape, ith, 2);
            let (of_x, of_y) = (share.x.len(), share.y.len());
            let needs = [
                forward_columns_scratch::<E>(&shape, tokens, of_y, dropout),
                backward_columns_scratch::<E>(&shape, tokens, of_x, dropout),
            ];
            let mut memory = vec![0.0; needs[0].or(needs[1]).0];
            let workspace = &mut Workspace::new(&mut memory);
            let args = ForwardArgs { dropouts, ..ForwardArgs::new(tokens, x) };
            let out = if is_f32 { ValuesMut::F32(&mut y) } else { ValuesMut::Bf16(&mut narrow_y) };
            let out = out.first(tokens * of_y);
            forward_columns::<E>(isa, &layer, &args, share.y.clone(), (out, &mut adapter_state[..]), workspace)?;
            let args = BackwardArgs { dropouts, load_balance: 0.1, ..BackwardArgs::new(tokens, dy, x) };
            let out = if is_f32 { ValuesMut::F32(&mut dx) } else { ValuesMut::Bf16(&mut narrow_dx) };
            let adapter = [&mut da[..shape.stacked_rows() * of_x], &mut db[..of_y * shape.mixed_width()]];
            let gradients = ColumnGradients { dx: Some(out.first(tokens * of_x)), adapter: Some(adapter) };
            backward_columns::<E>(isa, &layer, &args, &adapter_state, &share, gradients, workspace)?;
        }
    }
    Ok(())
}
