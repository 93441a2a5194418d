//! The operator's phases: over odd ranges, in any order, on two threads, the same bits as on one.

use crate::operator::{Case, Results, Stored};
use crate::support::TestElement;
use half::bf16;
use hydra_kernels::hydra::{
    Backward, Few, Forward, ForwardArgs, HydraLayer, Operand, adapter_rows_scratch, db_columns_scratch,
    dropped_dx_rows_scratch, dx_rows_scratch, few_batch_scratch, few_output_scratch, output_rows_scratch,
    stacked_columns_scratch,
};
use hydra_kernels::{
    Accumulate, Dropout, Dropouts, Error, HydraShape, Isa, PANEL_ALIGN, Scratch, Source, Values, ValuesMut, Weight,
    Workspace,
};
use std::ops::Range;

/// `0..total` cut unevenly; `unit` divides where the ranges begin.
fn cut(total: usize, unit: usize) -> Vec<Range<usize>> {
    let mut ends: Vec<usize> =
        [1, 3, 4, 11, 12, 29, 70].map(|end| end * unit).into_iter().filter(|&e| e < total).collect();
    ends.push(total);
    let starts = std::iter::once(0).chain(ends.clone());
    starts.zip(ends.clone()).map(|(start, end)| start..end).collect()
}

/// The parts of `data` that belong to `ranges`, which cover it in units of `width` values.
fn parts<'a, T>(mut data: &'a mut [T], ranges: &[Range<usize>], width: usize) -> Vec<&'a mut [T]> {
    let mut parts = Vec::new();
    for range in ranges {
        let (part, rest) = data.split_at_mut((range.len() * width).min(data.len()));
        parts.push(part);
        data = rest;
    }
    parts
}

/// The same of values of either type.
fn stored_parts<'a>(data: &'a mut Stored, ranges: &[Range<usize>], width: usize) -> Vec<ValuesMut<'a>> {
    match data {
        Stored::F32(data) => parts(data, ranges, width).into_iter().map(ValuesMut::F32).collect(),
        Stored::Bf16(data) => parts(data, ranges, width).into_iter().map(ValuesMut::Bf16).collect(),
    }
}

/// Strides and first rows so far out that their sums overflow.
#[test]
fn operands_far_outside_their_source_are_refused() {
    let (isa, data) = (Isa::detect(), [1.0; 64]);
    let weight = Weight::from_f32(1, 64, &data).unwrap();
    let source = |n_stride| Source::Dense { data: Values::F32(&data), k_stride: 1, n_stride };
    let refused = |source, columns: Range<usize>| {
        let operand = Operand::<f32>::new(isa, [1, 64], source, 1.0);
        let mut out = vec![7.0; operand.panels_len(columns.len())];
        operand.pack(columns, &mut out).is_err() && out.iter().all(|&x| x == 7.0)
    };
    assert!(!refused(source(1), 32..64));
    assert!(refused(source(1 << (usize::BITS - 5)), 32..33));
    for first in [usize::MAX, usize::MAX - 31, usize::MAX - 32] {
        assert!(refused(Source::WeightRows { weight, first }, 32..33), "{first}");
        assert!(refused(Source::WeightCols { weight, first }, 32..33), "{first}");
    }
}

/// Runs the tasks on two threads: one has the odd ones, last first.
fn on_two_threads<T: Send>(tasks: impl IntoIterator<Item = T>, run: impl Fn(T) -> Result<(), Error> + Sync) {
    let (mut odd, mut even) = (Vec::new(), Vec::new());
    for (i, task) in tasks.into_iter().enumerate() {
        if i % 2 == 1 { odd.push(task) } else { even.push(task) }
    }
    std::thread::scope(|scope| {
        let run = &run;
        scope.spawn(move || odd.into_iter().rev().for_each(|task| run(task).unwrap()));
        even.into_iter().for_each(|task| run(task).unwrap());
    });
}

/// Calls `run` with exactly as much memory as is needed; with a float less it has to fail first.
fn with_memory(need: Scratch, mut run: impl FnMut(&mut Workspace<'_>) -> Result<(), Error>) -> Result<(), Error> {
    let mut memory = vec![f32::NAN; need.0];
    if need.0 > 0 {
        assert!(run(&mut Workspace::new(&mut memory[1..])).is_err());
    }
    run(&mut Workspace::new(&mut memory))
}

/// Packs an operand a panel at a time, on two threads.
fn packed<E: TestElement>(operand: Operand<'_, E>) -> Vec<E> {
    let mut data = vec![E::from(f32::NAN); operand.panels_len(operand.columns())];
    let ranges: Vec<_> = (0..operand.columns().div_ceil(PANEL_ALIGN))
        .map(|i| i * PANEL_ALIGN..operand.columns().min((i + 1) * PANEL_ALIGN))
        .collect();
    let mut rest = &mut data[..];
    let mut tasks = Vec::new();
    for range in ranges {
        let (part, after) = rest.split_at_mut(operand.panels_len(range.len()));
        tasks.push((range, part));
        rest = after;
    }
    on_two_threads(tasks, |(range, part)| operand.pack(range, part));
    data
}

fn forward<E: TestElement>(case: &Case, isa: E::Isa, x: &Stored, residual: Option<&Stored>) -> (Stored, Vec<f32>) {
    let (layer, tokens) = (case.layer(), case.tokens);
    let shape = layer.shape();
    let (width, mixed_width, d_out) = (shape.state_width(), shape.mixed_width(), shape.d_out);
    let forward = Forward::<E>::new(isa, layer, case.forward_args(x, residual)).unwrap();
    let mut y = case.stored(&vec![f32::NAN; case.dy.len()]);
    let (mut adapter_state, mut mixed) = (vec![f32::NAN; tokens * width], vec![f32::NAN; tokens * mixed_width]);
    let [a, router] = forward.stacked();
    let (a_panels, router_panels) = (packed(a), packed(router));
    let stacked = [a.panels(&a_panels).unwrap(), router.panels(&router_panels).unwrap()];
    let rows = cut(tokens, 1);
    let tasks = parts(&mut adapter_state, &rows, width).into_iter().zip(parts(&mut mixed, &rows, mixed_width));
    on_two_threads(rows.iter().zip(tasks), |(rows, (adapter_state, mixed))| {
        let need = adapter_rows_scratch::<E>(&shape, rows.len(), case.dropouts.input.is_some() && case.adapted);
        with_memory(need, |memory| forward.adapter_rows(rows.clone(), &stacked, adapter_state, mixed, memory))
    });
    for columns in cut(d_out, 32).into_iter().rev() {
        let block = forward.block(columns.clone()).unwrap();
        let (frozen, adapter) = (packed(block.frozen), packed(block.adapter));
        let block = block.packed(&frozen, &adapter).unwrap();
        on_two_threads(rows.iter().zip(stored_parts(&mut y, &rows, d_out)), |(rows, mut y)| {
            let mixed = &mixed[rows.start * mixed_width..rows.end * mixed_width];
            let need = match (case.narrow, residual) {
                (true, None) => output_rows_scratch::<bf16>(&shape, rows.len(), columns.len()),
                _ => Scratch(0),
            };
            with_memory(need, |memory| forward.output_rows(rows.clone(), &block, mixed, y.reborrow(), memory))
        });
    }
    (y, adapter_state)
}

fn backward<E: TestElement>(case: &Case, isa: E::Isa, x: &Stored, adapter_state: &[f32]) -> [Vec<f32>; 3] {
    let (layer, tokens, dy) = (case.layer(), case.tokens, case.stored(&case.dy));
    let shape = layer.shape();
    let (width, mixed_width, d_in) = (shape.state_width(), shape.mixed_width(), shape.d_in);
    let backward = Backward::<E>::new(isa, layer, case.backward_args(&dy, x), adapter_state).unwrap();
    let mut balance = vec![f32::NAN; backward.balance_loss_grad_len()];
    backward.balance_loss_grad(&mut balance).unwrap();
    let lora_up = packed(backward.lora_up());
    let lora_up = backward.lora_up().panels(&lora_up).unwrap();
    let rows = cut(tokens, 1);
    let (mut d_adapter_state, mut mixed) = (vec![f32::NAN; tokens * width], vec![f32::NAN; tokens * mixed_width]);
    let tasks = parts(&mut d_adapter_state, &rows, width).into_iter().zip(parts(&mut mixed, &rows, mixed_width));
    on_two_threads(rows.iter().zip(tasks), |(rows, (d_adapter_state, mixed))| {
        backward.state_rows(rows.clone(), &lora_up, &balance, d_adapter_state, mixed)
    });
    let of = |rows: &Range<usize>| &d_adapter_state[rows.start * width..rows.end * width];

    let mut dx = case.stored(&vec![if case.accumulate == Accumulate::Add { 1.0 } else { f32::NAN }; case.x.len()]);
    for columns in cut(d_in, 32).into_iter().rev() {
        let block = backward.block(columns.clone()).unwrap();
        let (frozen, adapter) = (packed(block.frozen), packed(block.adapter));
        let block = block.packed(&frozen, &adapter).unwrap();
        on_two_threads(rows.iter().zip(stored_parts(&mut dx, &rows, d_in)), |(rows, mut dx)| {
            let need = match (case.narrow, case.accumulate) {
                (true, Accumulate::Overwrite) => dx_rows_scratch::<bf16>(&shape, rows.len(), columns.len()),
                _ => Scratch(0),
            };
            with_memory(need, |memory| {
                backward.dx_rows(rows.clone(), &block, of(rows), (dx.reborrow(), case.accumulate), memory)
            })
        });
    }
    let dropping = case.dropouts.input.is_some() && case.adapted;
    let dropped_a = packed(backward.dropped_a());
    let dropped_a = backward.dropped_a().panels(&dropped_a).unwrap();
    on_two_threads(rows.iter().zip(stored_parts(&mut dx, &rows, d_in)), |(rows, mut dx)| {
        let need = if dropping { dropped_dx_rows_scratch(&shape, rows.len()) } else { Scratch(0) };
        with_memory(need, |memory| backward.dropped_dx_rows(rows.clone(), &dropped_a, of(rows), dx.reborrow(), memory))
    });

    let (mut da, mut db) = (vec![1.0; case.a.len()], vec![1.0; case.b.len()]);
    if !case.adapted {
        return [dx.to_f32(), da, db];
    }
    let columns = cut(shape.d_out, 1);
    on_two_threads(columns.iter().zip(parts(&mut db, &columns, mixed_width)), |(columns, db)| {
        let need = db_columns_scratch::<E>(&shape, tokens, columns.len());
        with_memory(need, |memory| backward.db_columns(columns.clone(), &mixed, db, memory))
    });
    let mut dropped = vec![E::from(f32::NAN); if dropping { tokens * d_in } else { 0 }];
    on_two_threads(rows.iter().zip(parts(&mut dropped, &rows, d_in)), |(rows, dropped)| {
        backward.dropped_rows(rows.clone(), dropped)
    });
    for part in backward.stacked_parts() {
        let columns = cut(d_in, 1);
        let mut sums: Vec<_> = columns.iter().map(|columns| vec![f32::NAN; part.rows() * columns.len()]).collect();
        on_two_threads(columns.iter().zip(&mut sums), |(columns, sums)| {
            // An upper bound: only the panels' own length is required.
            let mut memory = vec![f32::NAN; stacked_columns_scratch::<E>(tokens, columns.len()).0];
            let memory = &mut Workspace::new(&mut memory);
            backward.stacked_columns(&part, columns.clone(), &d_adapter_state, &dropped, sums, memory)
        });
        for (columns, sums) in columns.into_iter().zip(sums) {
            part.add_to(&mut da, d_in, columns, &sums).unwrap();
        }
    }
    [dx.to_f32(), da, db]
}

fn check<E: TestElement>(case: &Case) {
    for isa in E::isas() {
        let want: Results = case.run::<E>(isa, 0, false).unwrap();
        let x = case.stored(&case.x);
        let residual = case.residual.as_ref().map(|residual| case.stored(residual));
        let (y, adapter_state) = forward::<E>(case, isa, &x, residual.as_ref());
        let [dx, da, db] = backward::<E>(case, isa, &x, &adapter_state);
        let bits = |results: &Results| results.clone().map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
        let got = bits(&[y.to_f32(), adapter_state, dx, da, db]);
        for ((name, got), want) in ["y", "adapter_state", "dx", "da", "db"].into_iter().zip(&got).zip(bits(&want)) {
            assert!(*got == want, "{isa:?} {name} {:?}", case.shape);
        }
    }
}

#[test]
fn phases_may_be_cut_and_shared_out() {
    let hydra = HydraShape { d_in: 70, d_out: 133, rank: 3, lora_heads: 4, per_head_a: false, router: true };
    for narrow in [false, true] {
        let plain = Case { narrow, ..Case::new(45, hydra, 0, None, 3) };
        check::<f32>(&plain);
        check::<bf16>(&plain);
        let dropped = Case {
            narrow,
            accumulate: Accumulate::Overwrite,
            load_balance: 0.5,
            residual: Some(crate::support::values(45 * 133, 9)),
            dropouts: Dropouts {
                input: Some(Dropout { p: 0.2, seed: 5, first_row: 1 }),
                mixed: Some(Dropout { p: 0.1, seed: 6, first_row: 2 }),
            },
            ..plain.clone()
        };
        check::<f32>(&dropped);
        check::<bf16>(&dropped);
        check::<bf16>(&Case { adapted: false, ..dropped });
        let split = HydraShape { per_head_a: true, router: false, ..hydra };
        check::<bf16>(&Case { narrow, ..Case::new(45, split, 0, Some(0.3), 3) });
    }
}

/// Sums in f32 beside a bf16 result, and more tokens than are summed together.
#[test]
fn phases_of_deep_and_of_tall_products() {
    let hydra = HydraShape { d_in: 2100, d_out: 65, rank: 3, lora_heads: 2, per_head_a: false, router: true };
    let deep = Case { narrow: true, accumulate: Accumulate::Overwrite, ..Case::new(9, hydra, 0, Some(0.1), 3) };
    check::<bf16>(&deep);
    let wide = HydraShape { d_in: 65, d_out: 2100, ..hydra };
    check::<bf16>(&Case { narrow: true, accumulate: Accumulate::Overwrite, ..Case::new(9, wide, 0, None, 3) });
    let tall = HydraShape { d_in: 9, d_out: 7, ..hydra };
    check::<f32>(&Case::new(1100, tall, 0, Some(0.1), 3));
}

#[test]
fn a_few_tokens_by_columns() {
    let hydra = HydraShape { d_in: 70, d_out: 133, rank: 3, lora_heads: 4, per_head_a: false, router: true };
    for (tokens, adapted, narrow) in [(1, true, false), (4, true, true), (3, false, false), (2, false, true)] {
        let mut case = Case { adapted, narrow, ..Case::new(tokens, hydra, 0, None, 3) };
        case.residual = (tokens > 2).then(|| crate::support::values(tokens * 133, 9));
        for isa in Isa::available() {
            let want = case.run::<f32>(isa, 0, false).unwrap();
            let (x, residual) = (case.stored(&case.x), case.residual.as_ref().map(|r| case.stored(r)));
            let (args, mut widened) = (case.forward_args(&x, residual.as_ref()), vec![f32::NAN; case.x.len()]);
            let few = Few::new(isa, case.layer(), args, &mut widened).unwrap();
            let shape = case.layer().shape();
            let mut adapter_state = vec![f32::NAN; case.state_len()];
            let mut mixed = vec![f32::NAN; tokens * shape.mixed_width()];
            few.adapter_rows(&mut adapter_state, &mut mixed).unwrap();
            let mut y = vec![f32::NAN; tokens * 133];
            for (token, y) in y.chunks_mut(133).enumerate() {
                let columns = cut(133, 1);
                on_two_threads(columns.iter().zip(parts(y, &columns, 1)), |(columns, y)| {
                    let need = few_output_scratch(columns.len());
                    with_memory(need, |memory| few.output(token, columns.clone(), &mixed, y, memory))
                });
            }
            assert_eq!(case.stored(&y).to_f32(), want[0]);
            assert_eq!(adapter_state, want[1]);
            // All at once: the frozen products of all tokens, and then the adapter's part of some and of the others.
            let mut y = vec![f32::NAN; tokens * 133];
            let products = HydraLayer { adapter: None, ..case.layer() };
            let x = x.to_f32();
            let all = Few::batch(isa, products, ForwardArgs::new(tokens, x.as_slice()), &mut []).unwrap();
            for columns in [0..50, 50..133] {
                let (n, width) = (columns.len(), shape.mixed_width());
                let mut block = vec![f32::NAN; tokens * n];
                all.products(columns.clone(), &mut block).unwrap();
                for rows in [0..1, 1..tokens] {
                    let args = ForwardArgs {
                        residual: args.residual.map(|residual| residual.skip(rows.start * 133).first(rows.len() * 133)),
                        ..ForwardArgs::new(rows.len(), &x[rows.start * 70..rows.end * 70])
                    };
                    let part = Few::batch(isa, case.layer(), args, &mut []).unwrap();
                    let (mixed, block) =
                        (&mixed[rows.start * width..rows.end * width], &mut block[rows.start * n..rows.end * n]);
                    with_memory(few_batch_scratch(rows.len(), n), |memory| {
                        part.add_adapter(columns.clone(), mixed, block, memory)
                    })
                    .unwrap();
                }
                for (y, block) in y.chunks_mut(133).zip(block.chunks(n)) {
                    y[columns.clone()].copy_from_slice(block);
                }
            }
            assert_eq!(case.stored(&y).to_f32(), want[0]);
        }
    }
    let case = Case::new(5, hydra, 0, None, 3);
    let x = case.stored(&case.x);
    assert!(Few::new(Isa::detect(), case.layer(), case.forward_args(&x, None), &mut []).is_err());
}
