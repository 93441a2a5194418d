//! The adapter's products, gates and gradients against `hydra_kernels::reference`.

use crate::support::*;
use hydra_kernels::dropout::Dropout;
use hydra_kernels::gate::{Gate, Routing};
use hydra_kernels::reference::{self, Gradients, Parameters};
use hydra_kernels::shape::HydraShape;
use hydra_ptx::launch::{
    Heads, Mask, Outer, Ptr, UpBackward, Values, da, db, down, dropped_add, few_down, gate_push, padded, split,
    split_len, up_backward,
};
use hydra_ptx::sizes::{GATE_LABEL, GATE_ONE, GATE_ROUTER, GATE_UNIFORM};
use hydra_ptx_device::emulator::Global;
use proptest::prelude::*;

/// Products of bf16, and sums of them.
const EXACT: f64 = 5e-5;
/// One side was rounded to bf16 before.
const ROUNDED: f64 = 4e-3;

struct Case {
    tokens: usize,
    shape: HydraShape,
    gate: u32,
    routing: Routing,
    load_balance: f32,
    head_dropout: f32,
    dropout: f32,
    seed: u64,
}

fn from_bf16(values: &[u16], pitch: usize, columns: usize) -> Vec<f32> {
    let widen = |&bits: &u16| half::bf16::from_bits(bits).to_f32();
    values.chunks(pitch).flat_map(|row| row[..columns].iter().map(widen)).collect()
}

/// Whether a token has two logits so near that rounding may choose between them.
fn ties(shape: &HydraShape, x: &[f64], a: &[f64]) -> bool {
    x.chunks(shape.d_in).any(|x| {
        let logit = |row: &[f64]| row.iter().zip(x).map(|(r, x)| r * x).sum::<f64>();
        let mut logits: Vec<f64> = a[shape.a_rows() * shape.d_in..].chunks(shape.d_in).map(logit).collect();
        logits.sort_by(f64::total_cmp);
        logits.windows(2).any(|pair| pair[1] - pair[0] < 5e-4)
    })
}

fn run_outer(outer: &Outer, seed: u64) {
    let parts = Global::new(&vec![f32::NAN; outer.parts()]);
    run(outer.sum(ptr(&parts)), seed);
    if outer.parts() > 0 {
        run(outer.total(ptr(&parts)), seed);
    }
}

fn check(case: &Case) {
    let (shape, seed) = (case.shape, case.seed);
    let (tokens, HydraShape { d_in, d_out, .. }) = (case.tokens, shape);
    let (a_rows, stacked, width, columns) =
        (shape.a_rows(), shape.stacked_rows(), shape.state_width(), shape.mixed_width());
    let mut random = Random::new(seed);
    // What is bf16 on the device.
    let [x, dy] = [d_in, d_out].map(|width| rounded(&random.values(tokens * width)));
    let (a, b) = (random.values(stacked * d_in), rounded(&random.values(d_out * columns)));
    let labels: Vec<u32> = (0..tokens).map(|_| random.bits() % (shape.lora_heads as u32 + 1)).collect();
    let dropout = Dropout { p: case.dropout, seed: 99, first_row: 0 };
    let mask = Mask { seed: 99, threshold: dropout.threshold(), scale: dropout.scale() };
    let scale = 0.75;

    // The reference, with a frozen weight of zeros.
    let factor = |i: usize| if dropout.keeps((i / d_in) as u64, i % d_in) { f64::from(dropout.scale()) } else { 0.0 };
    let (want_x, want_a, want_b, want_dy) = (f64s(&x), f64s(&a), f64s(&b), f64s(&dy));
    let (weight, factors) = (vec![0.0; d_out * d_in], (0..tokens * d_in).map(factor).collect::<Vec<_>>());
    let heads_dropout = Dropout { p: case.head_dropout, seed: 98, first_row: 0 };
    let heads_mask = Mask { seed: 98, threshold: heads_dropout.threshold(), scale: heads_dropout.scale() };
    let heads_factors: Vec<f64> = (0..tokens * columns)
        .map(|i| (heads_dropout.keeps((i / columns) as u64, i % columns), f64::from(heads_dropout.scale())))
        .map(|(keeps, scale)| if keeps { scale } else { 0.0 })
        .collect();
    let (mut routing, mut load_balance) = (case.routing, case.load_balance);
    if shape.router && ties(&shape, &want_x, &want_a) {
        routing.top_k = usize::MAX;
        load_balance = 0.0;
    }
    let gate = match case.gate {
        GATE_ROUTER => Gate::Router(routing),
        GATE_LABEL => Gate::Label,
        GATE_UNIFORM => Gate::Uniform,
        _ => Gate::One,
    };
    let parameters = Parameters {
        weight: &weight,
        a: &want_a,
        b: &want_b,
        scale: f64::from(scale),
        gate,
        labels: &labels,
        load_balance: f64::from(load_balance),
        mask: &factors,
        mixed_mask: &heads_factors,
    };
    let (mut want_y, mut want_hidden) = (vec![0.0; tokens * d_out], vec![0.0; tokens * width]);
    reference::forward(&shape, &mut want_y, &mut want_hidden, &want_x, &parameters);
    let (mut want_dx, mut want_da) = (vec![0.0; tokens * d_in], f64s(&a));
    let (mut want_db, mut want_dhidden) = (f64s(&b), vec![0.0; tokens * width]);
    let gradients =
        Gradients { dx: &mut want_dx, da: &mut want_da, db: &mut want_db, d_adapter_state: &mut want_dhidden };
    reference::backward(&shape, gradients, &want_dy, &want_x, &want_hidden, &parameters);
    let want_mixed: Vec<f64> = (0..tokens * columns)
        .map(|i| {
            let (adapter_state, column) = (&want_hidden[i / columns * width..], i % columns);
            let down = adapter_state[if shape.per_head_a { column } else { column % shape.rank }];
            adapter_state[a_rows + column / shape.rank] * down * heads_factors[i]
        })
        .collect();

    // The same by launches.
    let device = |values: &[f32], width| Global::new(&operand(values, width));
    let [device_x, device_dy] = [device(&x, d_in), device(&dy, d_out)];
    let (device_a, device_b) = (Global::new(&a), device(&b, columns));
    let split_a = Global::new(&vec![0x7fc0u16; split_len(stacked as u32, d_in as u32)]);
    run(split(ptr(&split_a), ptr(&device_a), stacked as u32, d_in as u32), seed);
    let device_labels = Global::new(&labels);
    let lora_heads = Heads {
        a_rows: a_rows as u32,
        stacked: stacked as u32,
        heads: shape.lora_heads as u32,
        rank: shape.rank as u32,
        per_head: shape.per_head_a,
        gate: case.gate,
        labels: ptr(&device_labels),
        sharpness: 1.0 / routing.temperature,
        top_k: u32::try_from(routing.top_k).unwrap_or(u32::MAX),
        mask: heads_mask,
    };
    let pitch = |columns: usize| padded(columns as u32) as usize;
    let nan16 = |columns: usize| Global::new(&vec![0x7fc0u16; tokens * pitch(columns)]);
    let nan32 = |len: usize| Global::new(&vec![f32::NAN; len]);
    let (adapter_state, mixed16) = (nan32(tokens * width), nan16(columns));
    let (count, d_in32, d_out32) = (tokens as u32, d_in as u32, d_out as u32);
    run(
        down(
            ptr(&adapter_state),
            ptr(&mixed16),
            count,
            ptr(&device_x),
            d_in32,
            ptr(&split_a),
            &lora_heads,
            scale,
            mask,
        ),
        seed,
    );
    assert_close("adapter_state", adapter_state.values(), &want_hidden, EXACT);
    let scaled: Vec<f64> = want_mixed.iter().map(|x| x * f64::from(scale)).collect();
    assert_close("mixed", &from_bf16(mixed16.values(), pitch(columns), columns), &scaled, ROUNDED);
    assert!(mixed16.values().chunks(pitch(columns)).all(|row| row[columns..].iter().all(|&x| x == 0)), "padding");

    if mask.threshold == 0 && heads_mask.threshold == 0 {
        let (again, mixed) = (nan32(tokens * width), nan16(columns));
        run(
            few_down(ptr(&again), ptr(&mixed), count, ptr(&device_x), d_in32, ptr(&device_a), &lora_heads, scale),
            seed,
        );
        assert_close("adapter_state of a few", again.values(), &want_hidden, EXACT);
        assert_close("mixed of a few", &from_bf16(mixed.values(), pitch(columns), columns), &scaled, ROUNDED);
    }

    let (mixed, dmixed) = (nan16(columns), nan32(tokens * columns));
    let (d_adapter_state, dhidden16, through) = (nan32(tokens * width), nan16(stacked), nan16(stacked));
    let out = UpBackward {
        d_adapter_state: ptr(&d_adapter_state),
        dhidden16: ptr(&dhidden16),
        through: ptr(&through),
        mixed: ptr(&mixed),
        dmixed: ptr(&dmixed),
    };
    let push = nan32(shape.lora_heads);
    let pushes = shape.router && load_balance > 0.0;
    if pushes {
        run(gate_push(ptr(&push), ptr(&adapter_state), count, &lora_heads, load_balance), seed);
    }
    let push = if pushes { ptr(&push) } else { Ptr::NULL };
    run(
        up_backward(
            &out,
            count,
            ptr(&device_dy),
            d_out32,
            ptr(&device_b),
            ptr(&adapter_state),
            push,
            &lora_heads,
            scale,
        ),
        seed,
    );
    assert_close("d_adapter_state", d_adapter_state.values(), &want_dhidden, EXACT);
    assert_close("mixed", &from_bf16(mixed.values(), pitch(columns), columns), &want_mixed, ROUNDED);
    let of = |i: usize| want_dhidden[i / stacked * width + i % stacked];
    let want: Vec<f64> = (0..tokens * stacked).map(of).collect();
    assert_close("d_adapter_state as bf16", &from_bf16(dhidden16.values(), pitch(stacked), stacked), &want, ROUNDED);
    let want: Vec<f64> = (0..tokens * stacked).map(|i| if i % stacked < a_rows { 0.0 } else { of(i) }).collect();
    assert_close("through", &from_bf16(through.values(), pitch(stacked), stacked), &want, ROUNDED);

    // Sums over tokens of what was rounded: exact but for their own rounding, however much cancels.
    let sums = |d_adapter_state: &[f64], mixed: &[f64]| {
        let (mut da, mut db) = (f64s(&a), f64s(&b));
        let (da_a, da_r) = da.split_at_mut(a_rows * d_in);
        let dropped = |t: usize, c: usize| want_x[t * d_in + c] * factors[t * d_in + c];
        reference::gemm(da_a, a_rows, tokens, d_in, |j, t| d_adapter_state[t * stacked + j], dropped);
        let (routed, plain) = (|j, t| d_adapter_state[t * stacked + a_rows + j], |t, c| want_x[t * d_in + c]);
        reference::gemm(da_r, stacked - a_rows, tokens, d_in, routed, plain);
        let scaled = |o: usize, t: usize| f64::from(scale) * want_dy[t * d_out + o];
        reference::gemm(&mut db, d_out, tokens, columns, scaled, |t, j| mixed[t * columns + j]);
        [da, db]
    };
    let same = |got: &[f64], want: &[f64]| got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-9);
    let exact = sums(&(0..tokens * stacked).map(of).collect::<Vec<_>>(), &want_mixed);
    assert!(same(&exact[0], &want_da) && same(&exact[1], &want_db), "the reference's sums");
    let there = |values: &Global<u16>, columns| f64s(&from_bf16(values.values(), pitch(columns), columns));
    let [want_da, want_db] = sums(&there(&dhidden16, stacked), &there(&mixed, columns));
    let (device_db, device_da) = (Global::new(&b), Global::new(&a));
    run_outer(&db(ptr(&device_db), count, ptr(&device_dy), d_out32, ptr(&mixed), &lora_heads, scale), seed);
    assert_close("db", device_db.values(), &want_db, EXACT);
    run_outer(&da(ptr(&device_da), count, ptr(&device_x), d_in32, ptr(&dhidden16), &lora_heads, mask), seed);
    assert_close("da", device_da.values(), &want_da, EXACT);

    if mask.threshold > 0 {
        let dx = Global::new(&x);
        run(
            dropped_add(Values::f32(ptr(&dx)), count, d_in32, ptr(&d_adapter_state), ptr(&device_a), &lora_heads, mask),
            seed,
        );
        let router = |t: usize, c: usize| {
            (a_rows..stacked).map(|row| want_dhidden[t * width + row] * want_a[row * d_in + c]).sum::<f64>()
        };
        let want: Vec<f64> =
            (0..tokens * d_in).map(|i| f64::from(x[i]) + want_dx[i] - router(i / d_in, i % d_in)).collect();
        assert_close("dx through dropout", dx.values(), &want, EXACT);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn random_adapters(tokens in 1usize..70, d_in in 1usize..80, d_out in 1usize..80, rank in 1usize..20, lora_heads in 1usize..6,
                       per_head_a: bool, gate in 0u32..4, drops: bool, drops_heads: bool,
                       routing in prop::option::of((0.4f32..3.0, 1usize..6, prop::sample::select(vec![0.0f32, 0.7]))), seed: u64) {
        let per_head_a = per_head_a && gate != GATE_ROUTER;
        let lora_heads = if gate == GATE_ONE { 1 } else { lora_heads };
        let shape = HydraShape { d_in, d_out, rank, lora_heads, per_head_a, router: gate == GATE_ROUTER };
        let (temperature, top_k, load_balance) = routing.unwrap_or((1.0, usize::MAX, 0.0));
        let routing = Routing { temperature, top_k };
        let p = |drops: bool| if drops { 0.3 } else { 0.0 };
        let (head_dropout, dropout) = (p(drops_heads), p(drops));
        check(&Case { tokens, shape, gate, routing, load_balance, head_dropout, dropout, seed });
    }
}

#[test]
fn whole_tiles_and_one_more() {
    for (tokens, rank, lora_heads) in [(32, 8, 4), (33, 8, 3), (64, 32, 3)] {
        let shape = HydraShape { d_in: 64, d_out: 96, rank, lora_heads, per_head_a: false, router: true };
        let plain = Case {
            tokens,
            shape,
            gate: GATE_ROUTER,
            routing: Routing::default(),
            load_balance: 0.0,
            head_dropout: 0.0,
            dropout: 0.1,
            seed: 3,
        };
        check(&plain);
        check(&Case { routing: Routing { temperature: 0.8, top_k: 2 }, load_balance: 0.5, head_dropout: 0.2, ..plain });
    }
}

/// More tiles along k than there are stages; sums over tokens in shares that aren't all as long, or of several tiles.
#[test]
fn through_all_the_stages() {
    for (tokens, d_in, d_out, dropout) in [
        (300, 40, 33, 0.0),
        (257, 40, 33, 0.2),
        (40, 700, 650, 0.0),
        (40, 700, 650, 0.2),
        (300, 2100, 40, 0.1),
        (2, 2100, 40, 0.0),
    ] {
        let shape = HydraShape { d_in, d_out, rank: 4, lora_heads: 3, per_head_a: false, router: true };
        let (gate, routing) = (GATE_ROUTER, Routing::default());
        check(&Case { tokens, shape, gate, routing, load_balance: 0.0, head_dropout: 0.0, dropout, seed: 5 });
    }
}
