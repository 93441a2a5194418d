//! The adapter's products, gates and gradients against `hydra_kernels::reference`.

use crate::expected::{Case, Expected, SCALE};
use crate::support::*;
use hydra_kernels::gate::Routing;
use hydra_kernels::shape::HydraShape;
use hydra_ptx::launch::{
    Adapter, GateGradient, LoraDown, LoraUpBackward, LoraUpParts, Mask, Operand, Ptr, Values, balance_loss_grad, da,
    dropped_dx, is_padded, lora_down, lora_down_matvec, pad, pad_len, padded,
};
use hydra_ptx::sizes::{GATE_LABEL, GATE_ONE, GATE_ROUTER};
use hydra_ptx_device::emulator::Global;
use proptest::prelude::*;

/// Products of bf16, and sums of them.
const EXACT: f64 = 5e-5;
/// Results of a product with one side rounded to bf16.
const ROUNDED: f64 = 4e-3;
/// Elements from a row of an operand to the next.
fn pitch(columns: usize) -> usize {
    padded(columns as u32) as usize
}

fn nan32(len: usize) -> Global<f32> {
    Global::new(&vec![f32::NAN; len])
}

/// The inputs on the emulated device.
struct Inputs {
    x: Global<u16>,
    dy: Global<u16>,
    a: Global<f32>,
    padded_a: Global<f32>,
    b: Global<f32>,
    labels: Global<u32>,
    /// Columns behind each row of an operand.
    room: usize,
}

impl Inputs {
    fn new(expected: &Expected, seed: u64) -> Self {
        let Expected { shape, x, dy, a, b, labels, .. } = expected;
        let (rows, d_in) = (shape.stacked_rows() as u32, shape.d_in as u32);
        let (a, padded_a) = (Global::new(a), nan32(pad_len(rows, d_in)));
        let room = 8 * (seed % 3) as usize;
        run(pad(ptr(&padded_a), ptr(&a), rows, d_in), seed);
        Self {
            x: Global::new(&spaced(x, shape.d_in, room)),
            dy: Global::new(&spaced(dy, shape.d_out, room)),
            room,
            a,
            padded_a,
            b: Global::new(b),
            labels: Global::new(labels),
        }
    }

    /// The operand at `values`, with room behind its rows.
    fn operand(&self, values: &Global<u16>, rows: usize, columns: usize) -> Operand {
        let pitch = (pitch(columns) + self.room) as u32;
        Operand { at: ptr(values), rows: rows as u32, columns: columns as u32, pitch }
    }

    fn x(&self, expected: &Expected) -> Operand {
        self.operand(&self.x, expected.tokens, expected.shape.d_in)
    }

    fn dy(&self, expected: &Expected) -> Operand {
        self.operand(&self.dy, expected.tokens, expected.shape.d_out)
    }

    /// Memory for such an operand.
    fn nan16(&self, rows: usize, columns: usize) -> Global<u16> {
        Global::new(&spaced(&vec![f32::NAN; rows * columns], columns, self.room))
    }

    /// The values of such an operand, whose padding has to be zero, and what is behind it untouched.
    #[track_caller]
    fn values(&self, of: &Global<u16>, columns: usize) -> Vec<f32> {
        let mut all = Vec::new();
        for row in of.values().chunks(pitch(columns) + self.room) {
            let (values, behind) = row.split_at(columns);
            let (padding, room) = behind.split_at(pitch(columns) - columns);
            assert!(padding.iter().all(|&x| x == 0), "padding: {padding:?}");
            assert!(room.iter().all(|&x| x == 0x7fc0), "behind the row: {room:?}");
            all.extend(values.iter().map(|&bits| half::bf16::from_bits(bits).to_f32()));
        }
        all
    }

    fn adapter(&self, case: &Case, expected: &Expected) -> Adapter {
        let shape = case.shape;
        Adapter {
            a_rows: shape.a_rows() as u32,
            stacked_rows: shape.stacked_rows() as u32,
            lora_heads: shape.lora_heads as u32,
            rank: shape.rank as u32,
            per_head_a: shape.per_head_a,
            gate: case.gate,
            labels: ptr(&self.labels),
            inverse_temperature: 1.0 / expected.routing.temperature,
            top_k: u32::try_from(expected.routing.top_k).unwrap_or(u32::MAX),
            scale: SCALE,
            dropout: expected.mask,
            head_dropout: expected.head_mask,
        }
    }
}

/// Runs the forward pass, by both kernels where both can, and returns `adapter_state`.
fn forward(inputs: &Inputs, adapter: &Adapter, expected: &Expected, seed: u64) -> Global<f32> {
    let (tokens, shape) = (expected.tokens, &expected.shape);
    let (width, columns) = (shape.state_width(), shape.mixed_width());
    let scaled: Vec<f64> = expected.mixed.iter().map(|x| x * f64::from(SCALE)).collect();
    let (adapter_state, mixed) = (nan32(tokens * width), inputs.nan16(tokens, columns));
    let out = LoraDown { adapter_state: ptr(&adapter_state), mixed: inputs.operand(&mixed, tokens, columns) };
    let in_place = is_padded(ptr(&inputs.a), shape.d_in as u32);
    let a = if in_place { ptr(&inputs.a) } else { ptr(&inputs.padded_a) };
    // B is aligned or not, and its values are not rounded yet.
    let (first, b) = ((seed / 8 % 5) as usize, Random::new(seed).values(shape.d_out * columns));
    let memory = Global::new(&[vec![f32::NAN; first], b.clone()].concat());
    let b_bf16 = inputs.nan16(shape.d_out, columns);
    let b_operand = (inputs.operand(&b_bf16, shape.d_out, columns), ptr(&memory).f32(first));
    run(lora_down(out, inputs.x(expected), a, adapter, b_operand), seed);
    assert_eq!(inputs.values(&b_bf16, columns), rounded(&b), "B");
    assert_close("adapter_state", adapter_state.values(), &expected.adapter_state, EXACT);
    assert_close("mixed", &inputs.values(&mixed, columns), &scaled, ROUNDED);
    if !adapter.dropout.drops() && !adapter.head_dropout.drops() {
        let (again, mixed) = (nan32(tokens * width), inputs.nan16(tokens, columns));
        let out = LoraDown { adapter_state: ptr(&again), mixed: inputs.operand(&mixed, tokens, columns) };
        run(lora_down_matvec(out, inputs.x(expected), ptr(&inputs.a), adapter), seed);
        assert_close("adapter_state by matvec", again.values(), &expected.adapter_state, EXACT);
        assert_close("mixed by matvec", &inputs.values(&mixed, columns), &scaled, ROUNDED);
    }
    adapter_state
}

/// What the gate's gradient leaves for the products behind it.
struct Gradient {
    d_adapter_state: Global<f32>,
    d_adapter_state_bf16: Global<u16>,
}

/// dB and the gradient of `adapter_state`. dB isn't touched where its parts aren't wanted.
fn up_gradient(
    inputs: &Inputs,
    adapter: &Adapter,
    adapter_state: &Global<f32>,
    expected: &Expected,
    seed: u64,
) -> Gradient {
    let (tokens, shape, balance) = (expected.tokens, &expected.shape, expected.load_balance);
    let rows = shape.stacked_rows();
    let up = LoraUpBackward { dy: inputs.dy(expected), adapter_state: ptr(adapter_state), adapter };
    let (d_mixed, db_parts) = (nan32(up.d_mixed_len()), nan32(up.db_len()));
    let (d_adapter_state, db) = (nan32(tokens * shape.state_width()), Global::new(&expected.b));
    let (d_adapter_state_bf16, d_router) = (inputs.nan16(tokens, rows), inputs.nan16(tokens, rows));
    let out = GateGradient {
        d_adapter_state: ptr(&d_adapter_state),
        d_adapter_state_bf16: inputs.operand(&d_adapter_state_bf16, tokens, rows),
        d_router_bf16: Some(inputs.operand(&d_router, tokens, rows)),
        db: ptr(&db),
    };
    let (per_head, mut balance_grad) = (nan32(shape.lora_heads), Ptr::NULL);
    if shape.router && balance > 0.0 {
        balance_grad = ptr(&per_head);
        run(balance_loss_grad(balance_grad, ptr(adapter_state), tokens as u32, adapter, balance), seed);
    }
    for (db_parts, want) in [(Ptr::NULL, f64s(&expected.b)), (ptr(&db_parts), db_of(adapter_state, adapter, expected))]
    {
        let parts = LoraUpParts { d_mixed: ptr(&d_mixed), db: db_parts };
        run(up.products(parts, ptr(&inputs.b)), seed);
        run(up.gate(&out, parts, balance_grad), seed);
        assert_close("db", db.values(), &want, EXACT);
        assert_close("d_adapter_state", d_adapter_state.values(), &expected.d_adapter_state, EXACT);
        let bf16 = inputs.values(&d_adapter_state_bf16, rows);
        assert_close("d_adapter_state as bf16", &bf16, &expected.stacked_gradient(false), ROUNDED);
        assert_close("d_router", &inputs.values(&d_router, rows), &expected.stacked_gradient(true), ROUNDED);
    }
    Gradient { d_adapter_state, d_adapter_state_bf16 }
}

/// dB of what the device rounds, because sums of rounded values are exact but for their own rounding, however much
/// cancels.
fn db_of(adapter_state: &Global<f32>, adapter: &Adapter, expected: &Expected) -> Vec<f64> {
    let (state, shape, width) = (adapter_state.values(), &expected.shape, expected.shape.state_width());
    let columns = shape.mixed_width();
    let mixed = |i: usize| {
        let (row, column) = (&state[i / columns * width..], i % columns);
        let lora_down = row[if shape.per_head_a { column } else { column % shape.rank }];
        let value = row[shape.a_rows() + column / shape.rank] * lora_down;
        match (adapter.head_dropout.drops(), expected.head_factors[i] == 0.0) {
            (false, _) => value,
            (true, false) => value * adapter.head_dropout.scale,
            (true, true) => 0.0,
        }
    };
    let mixed: Vec<f32> = (0..expected.tokens * columns).map(mixed).collect();
    let [_, db] = expected.weight_grads(&expected.stacked_gradient(false), &f64s(&rounded(&mixed)));
    db
}

/// d[A; R] of what the device rounded.
fn weight_grad(inputs: &Inputs, adapter: &Adapter, gradient: &Gradient, expected: &Expected, seed: u64) {
    let rows = expected.shape.stacked_rows();
    let d_adapter_state = f64s(&inputs.values(&gradient.d_adapter_state_bf16, rows));
    let [want, _] = expected.weight_grads(&d_adapter_state, &expected.mixed);
    let got = Global::new(&expected.a);
    let narrow = inputs.operand(&gradient.d_adapter_state_bf16, expected.tokens, rows);
    let grad = da(ptr(&got), inputs.x(expected), narrow, adapter);
    let parts = nan32(grad.parts_len());
    run(grad.sum(ptr(&parts)), seed);
    if grad.parts_len() > 0 {
        run(grad.total(ptr(&parts)), seed);
    }
    assert_close("da", got.values(), &want, EXACT);
}

/// A's part of dx, after dropout, is added to what dx was.
fn dx_after_dropout(inputs: &Inputs, adapter: &Adapter, gradient: &Gradient, expected: &Expected, seed: u64) {
    let (tokens, d_in) = (expected.tokens, expected.shape.d_in);
    let (rows, a_rows, width) = (expected.shape.stacked_rows(), expected.shape.a_rows(), expected.shape.state_width());
    // Two columns behind each row stay as they are.
    let pitch = d_in + 2;
    let dx = Global::new(&expected.x.chunks(d_in).flat_map(|row| [row, &[7.0; 2]].concat()).collect::<Vec<_>>());
    let (size, d_adapter_state) = ([tokens as u32, d_in as u32], ptr(&gradient.d_adapter_state));
    run(dropped_dx((Values::f32(ptr(&dx)), pitch as u32), size, d_adapter_state, ptr(&inputs.a), adapter), seed);
    let router = |t: usize, c: usize| {
        let term = |row: usize| expected.d_adapter_state[t * width + row] * f64::from(expected.a[row * d_in + c]);
        (a_rows..rows).map(term).sum::<f64>()
    };
    let want = |i: usize| f64::from(expected.x[i]) + expected.dx[i] - router(i / d_in, i % d_in);
    let want: Vec<f64> = (0..tokens * d_in).map(want).collect();
    let rows = dx.values().chunks(pitch);
    let got: Vec<f32> = rows.clone().flat_map(|row| row[..d_in].to_vec()).collect();
    assert_close("dx after dropout", &got, &want, EXACT);
    assert!(rows.into_iter().all(|row| row[d_in..] == [7.0; 2]), "behind the rows");
}

fn check(case: &Case) {
    let (expected, seed) = (Expected::new(case), case.seed);
    let inputs = Inputs::new(&expected, seed);
    let adapter = inputs.adapter(case, &expected);
    let adapter_state = forward(&inputs, &adapter, &expected, seed);
    let gradient = up_gradient(&inputs, &adapter, &adapter_state, &expected, seed);
    weight_grad(&inputs, &adapter, &gradient, &expected, seed);
    if adapter.dropout.drops() {
        dx_after_dropout(&inputs, &adapter, &gradient, &expected, seed);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn random_adapters(
        (tokens, d_in, d_out) in (1usize..70, 1usize..80, 1usize..80), rank in 1usize..20, lora_heads in 1usize..6,
        per_head_a: bool, gate in 0u32..4, (drops, drops_heads) in any::<(bool, bool)>(),
        routing in prop::option::of((0.4f32..3.0, 1usize..6, prop::sample::select(vec![0.0f32, 0.7]))), seed: u64,
    ) {
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

/// Columns, rows of [A; R] and tokens at and beside the ends of the first product's tiles; rows of both kinds in a tile;
/// more rows, and wider ones in the gate's gradient, than shared memory has room for.
#[test]
fn edges_of_the_first_product() {
    for (tokens, d_in, rank, lora_heads, router) in [
        (1, 64, 8, 4, true),
        (3, 512, 12, 4, true),
        (31, 520, 13, 4, true),
        (33, 1028, 16, 1, false),
        (2, 1031, 28, 4, true),
        (5, 57, 30, 3, true),
        (1, 1096, 60, 5, true),
        (3, 8, 60, 8, false),
        (2, 8, 75, 8, false),
        (1, 8, 30, 60, true),
    ] {
        let shape = HydraShape { d_in, d_out: 24, rank, lora_heads, per_head_a: !router, router };
        let (gate, routing) = (if router { GATE_ROUTER } else { GATE_LABEL }, Routing::default());
        for dropout in [0.0, 0.3] {
            check(&Case { tokens, shape, gate, routing, load_balance: 0.0, head_dropout: 0.0, dropout, seed: 7 });
        }
    }
}

/// More tiles than there are stages; tokens in groups of different lengths, and columns of several blocks, of more than
/// are added at once.
#[test]
fn through_all_the_stages() {
    for (tokens, d_in, d_out, dropout) in [
        (300, 40, 33, 0.0),
        (257, 40, 33, 0.2),
        (40, 700, 650, 0.0),
        (40, 700, 650, 0.2),
        (300, 2100, 40, 0.1),
        (2, 2100, 40, 0.0),
        (2, 40, 4700, 0.0),
    ] {
        let shape = HydraShape { d_in, d_out, rank: 4, lora_heads: 3, per_head_a: false, router: true };
        let (gate, routing) = (GATE_ROUTER, Routing::default());
        check(&Case { tokens, shape, gate, routing, load_balance: 0.0, head_dropout: 0.0, dropout, seed: 5 });
    }
}

/// Rectangles of dy and x that end in the middle of a tile on both sides, or with it; more columns of `mixed` and rows
/// of [A; R] than a block has.
#[test]
fn rectangles_and_their_edges() {
    for (tokens, d_in, d_out, rank, lora_heads) in [
        (257, 300, 520, 11, 4),
        (1, 257, 255, 3, 2),
        (128, 256, 256, 8, 4),
        (129, 264, 248, 16, 2),
        (31, 9, 520, 33, 1),
    ] {
        let shape = HydraShape { d_in, d_out, rank, lora_heads, per_head_a: true, router: false };
        let plain = Case {
            tokens,
            shape,
            gate: GATE_LABEL,
            routing: Routing::default(),
            load_balance: 0.0,
            head_dropout: 0.0,
            dropout: 0.0,
            seed: 7,
        };
        check(&plain);
        check(&Case { head_dropout: 0.2, dropout: 0.1, ..plain });
        let shape = HydraShape { per_head_a: false, router: true, ..shape };
        check(&Case { shape, gate: GATE_ROUTER, dropout: 0.1, ..plain });
    }
}

/// Ranks and heads that leave no tile whole, with sizes that are multiples of nothing: rows of [A; R] and of the gate's
/// gradient in the device's memory, and more columns of `mixed` than tokens or columns of x.
#[test]
fn wide_and_narrow_adapters() {
    for (tokens, d_in, d_out, rank, lora_heads, per_head_a) in [
        (1, 37, 41, 256, 16, false),
        (33, 19, 23, 200, 7, false),
        (5, 17, 9, 1, 3, false),
        (7, 1, 1, 200, 1, false),
        (3, 7, 9, 1, 16, true),
        (2, 9, 7, 256, 2, true),
    ] {
        let shape = HydraShape { d_in, d_out, rank, lora_heads, per_head_a, router: !per_head_a };
        let (gate, routing) = (if per_head_a { GATE_LABEL } else { GATE_ROUTER }, Routing::default());
        for dropout in [0.0, 0.3] {
            check(&Case { tokens, shape, gate, routing, load_balance: 0.0, head_dropout: dropout, dropout, seed: 11 });
        }
    }
}

/// From the least normal temperature to the largest number, at which the inverse of one is subnormal.
#[test]
fn every_finite_temperature() {
    for temperature in [f32::MIN_POSITIVE, 1e-37, 1e-20, 1e20, f32::MAX] {
        for (tokens, lora_heads, top_k) in [(3, 1, 1), (35, 5, usize::MAX), (35, 5, 2)] {
            let shape = HydraShape { d_in: 40, d_out: 24, rank: 4, lora_heads, per_head_a: false, router: true };
            let (gate, routing) = (GATE_ROUTER, Routing { temperature, top_k });
            let (head_dropout, dropout) = (0.0, 0.0);
            check(&Case { tokens, shape, gate, routing, load_balance: 0.0, head_dropout, dropout, seed: 7 });
        }
    }
}

/// As the CPU's: no head where no logit is larger than −∞, NaN where one is NaN or +∞.
#[test]
fn gates_of_logits_that_are_no_numbers() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    for (logits, want) in [
        ([-inf, -inf, -inf], [0.0; 3]),
        ([-inf, 0.5, -inf], [0.0, 1.0, 0.0]),
        ([-inf, nan, -inf], [nan; 3]),
        ([0.5, inf, 0.0], [nan; 3]),
        ([-3e38, 3e38, 0.0], [0.0, 1.0, 0.0]),
    ] {
        let a = Global::new(&[&[1.0][..], &logits].concat());
        let (x, state, mixed) = (Global::new(&operand(&[1.0], 1)), nan32(4), Global::new(&[0u16; 8]));
        let adapter = Adapter {
            a_rows: 1,
            stacked_rows: 4,
            lora_heads: 3,
            rank: 1,
            per_head_a: false,
            gate: GATE_ROUTER,
            labels: Ptr::NULL,
            inverse_temperature: 2.0,
            top_k: u32::MAX,
            scale: 1.0,
            dropout: Mask::default(),
            head_dropout: Mask::default(),
        };
        let out = LoraDown { adapter_state: ptr(&state), mixed: Operand::new(ptr(&mixed), 1, 3) };
        run(lora_down_matvec(out, Operand::new(ptr(&x), 1, 1), ptr(&a), &adapter), 1);
        let got = &state.values()[1..];
        let same = |(got, want): (&f32, &f32)| got == want || (got.is_nan() && want.is_nan());
        assert!(got.iter().zip(&want).all(same), "{logits:?}: {got:?}");
    }
}
