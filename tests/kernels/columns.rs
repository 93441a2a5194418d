//! Threads' shares of the operator by columns: the same bits as on one thread, memory to the float, and bad ranges.

use crate::memory::allocations;
use crate::operator::{Case, Results};
use crate::support::TestElement;
use half::bf16;
use hydra_kernels::hydra::{
    ColumnGradients, ThreadColumns, backward_columns, backward_columns_scratch, forward_columns,
    forward_columns_scratch,
};
use hydra_kernels::{Accumulate, Dropout, Dropouts, Error, HydraShape, PANEL_ALIGN, Scratch, Workspace};

/// Puts `part` [rows, columns] into the columns of `whole` from `first` on.
fn place(whole: &mut [f32], width: usize, first: usize, part: &[f32], columns: usize) {
    for (row, part) in whole.chunks_mut(width).zip(part.chunks(columns.max(1))) {
        row[first..first + columns].copy_from_slice(part);
    }
}

/// Calls `run` with exactly as much memory as is needed; with a float less it has to fail first. Nothing is allocated.
fn with_memory(need: Scratch, mut run: impl FnMut(&mut Workspace<'_>) -> Result<(), Error>) {
    let (mut memory, mut outcomes) = (vec![f32::NAN; need.0], [Ok(()); 2]);
    let allocated = allocations(|| {
        if need.0 > 0 {
            outcomes[0] = run(&mut Workspace::new(&mut memory[1..]));
        }
        outcomes[1] = run(&mut Workspace::new(&mut memory));
    });
    assert_eq!(allocated, 0, "allocations");
    assert!(need.0 == 0 || matches!(outcomes[0], Err(Error::Workspace { .. })), "{:?}", outcomes[0]);
    outcomes[1].unwrap();
}

/// The results of `nth` threads, put together.
fn run<E: TestElement>(case: &Case, isa: E::Isa, nth: usize) -> Results {
    let (layer, tokens) = (case.layer(), case.tokens);
    let (shape, mixed_width) = (layer.shape(), layer.shape().mixed_width());
    let (x, dy, dropout) = (case.stored(&case.x), case.stored(&case.dy), case.dropouts.input.is_some());
    let [mut y, mut dx] = [&case.dy, &case.x].map(|like| vec![f32::NAN; like.len()]);
    let (mut da, mut db) = (vec![1.0; case.a.len()], vec![1.0; case.b.len()]);
    let mut adapter_state = vec![f32::NAN; case.state_len()];
    let shares: Vec<_> = (0..nth).map(|ith| ThreadColumns::new(&shape, ith, nth)).collect();
    for ThreadColumns { y: columns, .. } in &shares {
        let mut part = case.stored(&vec![f32::NAN; tokens * columns.len()]);
        let mut state = vec![f32::NAN; adapter_state.len()];
        let args = case.forward_args(&x, None);
        with_memory(forward_columns_scratch::<E>(&shape, tokens, columns.len(), dropout), |memory| {
            forward_columns::<E>(isa, &layer, &args, columns.clone(), (part.get_mut(), &mut state), memory)
        });
        place(&mut y, shape.d_out, columns.start, &part.to_f32(), columns.len());
        assert!(columns.start == 0 || state == adapter_state, "each thread has the same state");
        adapter_state = state;
    }
    let args = case.backward_args(&dy, &x);
    for share in &shares {
        let ThreadColumns { x: columns, y: rows } = share;
        let mut dx_part = case.stored(&vec![f32::NAN; tokens * columns.len()]);
        let mut da_part = vec![1.0; shape.stacked_rows() * columns.len()];
        let need = backward_columns_scratch::<E>(&shape, tokens, columns.len(), dropout && case.adapted);
        with_memory(need, |memory| {
            let db_part = &mut db[rows.start * mixed_width..rows.end * mixed_width];
            let adapter = case.adapted.then_some([&mut da_part[..], db_part]);
            let gradients = ColumnGradients { dx: Some(dx_part.get_mut()), adapter };
            backward_columns::<E>(isa, &layer, &args, &adapter_state, share, gradients, memory)
        });
        place(&mut dx, shape.d_in, columns.start, &dx_part.to_f32(), columns.len());
        place(&mut da, shape.d_in, columns.start, &da_part, columns.len());
    }
    [y, adapter_state, dx, da, db]
}

fn check<E: TestElement>(case: &Case) {
    let case = Case { accumulate: Accumulate::Overwrite, ..case.clone() };
    for isa in E::isas() {
        let want = case.run::<E>(isa, 0, false).unwrap();
        for nth in [1, 2, 3, 9] {
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let got = run::<E>(&case, isa, nth);
            for ((name, got), want) in ["y", "adapter_state", "dx", "da", "db"].into_iter().zip(&got).zip(&want) {
                assert!(bits(got) == bits(want), "{isa:?}, {nth} threads: {name} of {:?}", case.shape);
            }
        }
    }
}

#[test]
fn threads_have_the_bits_of_one() {
    let hydra = HydraShape { d_in: 70, d_out: 133, rank: 3, lora_heads: 4, per_head_a: false, router: true };
    for narrow in [false, true] {
        let plain = Case { narrow, load_balance: 0.5, ..Case::new(45, hydra, 0, None, 3) };
        check::<f32>(&plain);
        check::<bf16>(&plain);
        let dropouts = Dropouts {
            input: Some(Dropout { p: 0.2, seed: 5, first_row: 1 }),
            mixed: Some(Dropout { p: 0.1, seed: 6, first_row: 2 }),
        };
        let dropped = Case { dropouts, ..plain.clone() };
        check::<f32>(&dropped);
        check::<bf16>(&dropped);
        check::<f32>(&Case { adapted: false, ..dropped });
        let split = HydraShape { per_head_a: true, router: false, ..hydra };
        check::<bf16>(&Case { narrow, ..Case::new(45, split, 0, Some(0.3), 3) });
        // A token or a few, whose weights are read without packing.
        check::<f32>(&Case { narrow, ..Case::new(1, hydra, 0, None, 3) });
        check::<bf16>(&Case { narrow, ..Case::new(4, hydra, 0, None, 3) });
    }
    // Sums in f32 beside a bf16 result, and more tokens than are summed together.
    let deep = HydraShape { d_in: 65, d_out: 2100, ..hydra };
    check::<bf16>(&Case { narrow: true, ..Case::new(9, deep, 0, None, 3) });
    check::<f32>(&Case::new(1100, HydraShape { d_in: 9, d_out: 7, ..hydra }, 0, Some(0.1), 3));
}

#[test]
fn shares_cover_all_columns_in_whole_panels() {
    for columns in [0, 1, 31, 32, 33, 576, 577, 4096] {
        let shape = HydraShape::frozen(columns, columns);
        for nth in [1, 2, 3, 19, 1000] {
            let mut end = 0;
            for ith in 0..nth {
                let ThreadColumns { x, y } = ThreadColumns::new(&shape, ith, nth);
                assert!(x == y && x.start == end && (x.end == columns || x.end % PANEL_ALIGN == 0), "{x:?}");
                assert!(x.len() <= columns.div_ceil(PANEL_ALIGN).div_ceil(nth) * PANEL_ALIGN, "{x:?}");
                end = x.end;
            }
            assert_eq!(end, columns);
        }
        assert!(ThreadColumns::new(&shape, 2, 2).x.is_empty());
        assert!(ThreadColumns::new(&shape, 0, 0).x.is_empty());
    }
}

#[test]
fn ranges_that_do_not_fit_are_refused() {
    let hydra = HydraShape { d_in: 70, d_out: 133, rank: 3, lora_heads: 4, per_head_a: false, router: true };
    let case = Case::new(5, hydra, 0, None, 3);
    let (layer, x, dy, isa) = (case.layer(), case.stored(&case.x), case.stored(&case.dy), hydra_kernels::Isa::detect());
    let mut memory = vec![0.0; 1 << 20];
    let memory = &mut Workspace::new(&mut memory);
    let mut state = vec![0.0; case.state_len()];
    let mut y = vec![0.0; 5 * 32];
    let (args, residual) = (case.forward_args(&x, None), case.stored(&case.dy));
    let mut forward = |args, columns| {
        forward_columns::<f32>(isa, &layer, args, columns, (&mut y[..], &mut state), memory).unwrap_err()
    };
    assert!(matches!(forward(&args, 128..160), Error::Range { .. }));
    assert!(matches!(forward(&args, 0..64), Error::Length { operand: "y", .. }));
    assert!(matches!(forward(&case.forward_args(&x, Some(&residual)), 0..32), Error::Shape(_)));
    let args = case.backward_args(&dy, &x);
    let mut backward = |x, y, dx: usize, da: usize| {
        let (mut dx, mut da, mut db) = (vec![0.0; dx], vec![0.0; da], vec![0.0; 32 * 12]);
        let gradients = ColumnGradients { dx: Some((&mut dx[..]).into()), adapter: Some([&mut da, &mut db]) };
        backward_columns::<f32>(isa, &layer, &args, &state, &ThreadColumns { x, y }, gradients, memory).unwrap_err()
    };
    assert!(matches!(backward(8..40, 0..32, 5 * 32, 7 * 32), Error::Block { .. }));
    assert!(matches!(backward(64..96, 0..32, 5 * 32, 7 * 32), Error::Range { .. }));
    assert!(matches!(backward(0..32, 120..152, 5 * 32, 7 * 32), Error::Range { .. }));
    assert!(matches!(backward(0..32, 0..32, 5 * 31, 7 * 32), Error::Length { operand: "dx", .. }));
    assert!(matches!(backward(0..32, 0..32, 5 * 32, 7 * 31), Error::Length { operand: "da", .. }));
}
