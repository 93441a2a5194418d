//! The adapter's products, gates and gradients against `hydra_kernels::reference`.

use crate::support::*;
use hydra_kernels::dropout::Dropout;
use hydra_kernels::gate::{Gate, Routing};
use hydra_kernels::reference::{self, Gradients, Parameters};
use hydra_kernels::shape::HydraShape;
use hydra_ptx::launch::{
    Adapter, LoraDown, LoraUpBackward, LoraUpInputs, Mask, Operand, Ptr, Values, WeightGrad, balance_loss_grad, da, db,
    dropped_dx, lora_down, lora_down_matvec, lora_up_backward, padded, split, split_len,
};
use hydra_ptx::sizes::{GATE_LABEL, GATE_ONE, GATE_ROUTER, GATE_UNIFORM};
use hydra_ptx_device::emulator::Global;
use proptest::prelude::*;

/// Products of bf16, and sums of them.
const EXACT: f64 = 5e-5;
/// Results of a product with one side rounded to bf16.
const ROUNDED: f64 = 4e-3;
/// α / rank.
const SCALE: f32 = 0.75;

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

/// The values of a bf16 operand, without padding.
fn from_bf16(values: &Global<u16>, columns: usize) -> Vec<f32> {
    let widen = |&bits: &u16| half::bf16::from_bits(bits).to_f32();
    values.values().chunks(pitch(columns)).flat_map(|row| row[..columns].iter().map(widen)).collect()
}

fn pitch(columns: usize) -> usize {
    padded(columns as u32) as usize
}

fn nan16(rows: usize, columns: usize) -> Global<u16> {
    Global::new(&vec![0x7fc0u16; rows * pitch(columns)])
}

fn nan32(len: usize) -> Global<f32> {
    Global::new(&vec![f32::NAN; len])
}

/// Whether a token has two logits so close that rounding may choose between them.
fn ties(shape: &HydraShape, x: &[f64], a: &[f64]) -> bool {
    x.chunks(shape.d_in).any(|x| {
        let logit = |row: &[f64]| row.iter().zip(x).map(|(r, x)| r * x).sum::<f64>();
        let mut logits: Vec<f64> = a[shape.a_rows() * shape.d_in..].chunks(shape.d_in).map(logit).collect();
        logits.sort_by(f64::total_cmp);
        logits.windows(2).any(|pair| pair[1] - pair[0] < 5e-4)
    })
}

/// Dropout on rows of `width` values, and the factor of each value.
fn dropout(p: f32, seed: u64, rows: usize, width: usize) -> (Mask, Vec<f64>) {
    let dropout = Dropout { p, seed, first_row: 0 };
    let keeps = |i: usize| dropout.keeps((i / width) as u64, i % width);
    let factor = |i: usize| if keeps(i) { f64::from(dropout.scale()) } else { 0.0 };
    let mask = Mask { seed, threshold: dropout.threshold(), scale: dropout.scale() };
    (mask, (0..rows * width).map(factor).collect())
}

/// A case's inputs, and what the reference computes from them, with a frozen weight of zeros.
struct Expected {
    tokens: usize,
    shape: HydraShape,
    routing: Routing,
    load_balance: f32,
    labels: Vec<u32>,
    mask: Mask,
    head_mask: Mask,
    /// The factors of x's dropout.
    factors: Vec<f64>,
    x: Vec<f32>,
    dy: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    adapter_state: Vec<f64>,
    d_adapter_state: Vec<f64>,
    /// gate ∘ lora_down, after dropout.
    mixed: Vec<f64>,
    dx: Vec<f64>,
    da: Vec<f64>,
    db: Vec<f64>,
}

impl Expected {
    fn new(case: &Case) -> Self {
        let (tokens, shape) = (case.tokens, case.shape);
        let HydraShape { d_in, d_out, .. } = shape;
        let (width, columns) = (shape.state_width(), shape.mixed_width());
        let mut random = Random::new(case.seed);
        // x, dy and B are bf16 on the device.
        let [x, dy] = [d_in, d_out].map(|width| rounded(&random.values(tokens * width)));
        let (a, b) = (random.values(shape.stacked_rows() * d_in), rounded(&random.values(d_out * columns)));
        let labels: Vec<u32> = (0..tokens).map(|_| random.bits() % (shape.lora_heads as u32 + 1)).collect();
        let (mask, factors) = dropout(case.dropout, 99, tokens, d_in);
        let (head_mask, head_factors) = dropout(case.head_dropout, 98, tokens, columns);
        let (mut routing, mut load_balance) = (case.routing, case.load_balance);
        if shape.router && ties(&shape, &f64s(&x), &f64s(&a)) {
            (routing.top_k, load_balance) = (usize::MAX, 0.0);
        }
        let gate = match case.gate {
            GATE_ROUTER => Gate::Router(routing),
            GATE_LABEL => Gate::Label,
            GATE_UNIFORM => Gate::Uniform,
            _ => Gate::One,
        };
        let (weight, a64, b64) = (vec![0.0; d_out * d_in], f64s(&a), f64s(&b));
        let parameters = Parameters {
            weight: &weight,
            a: &a64,
            b: &b64,
            scale: f64::from(SCALE),
            gate,
            labels: &labels,
            load_balance: f64::from(load_balance),
            mask: &factors,
            mixed_mask: &head_factors,
        };
        let (mut y, mut adapter_state) = (vec![0.0; tokens * d_out], vec![0.0; tokens * width]);
        reference::forward(&shape, &mut y, &mut adapter_state, &f64s(&x), &parameters);
        // Gradients of parameters are added to what is there: here, to the parameters' own values.
        let (mut dx, mut da, mut db) = (vec![0.0; tokens * d_in], a64.clone(), b64.clone());
        let mut d_adapter_state = vec![0.0; tokens * width];
        let gradients = Gradients { dx: &mut dx, da: &mut da, db: &mut db, d_adapter_state: &mut d_adapter_state };
        reference::backward(&shape, gradients, &f64s(&dy), &f64s(&x), &adapter_state, &parameters);
        let mixed = |i: usize| {
            let (row, column) = (&adapter_state[i / columns * width..], i % columns);
            let lora_down = row[if shape.per_head_a { column } else { column % shape.rank }];
            row[shape.a_rows() + column / shape.rank] * lora_down * head_factors[i]
        };
        let mixed = (0..tokens * columns).map(mixed).collect();
        let this = Self {
            tokens,
            shape,
            routing,
            load_balance,
            labels: labels.clone(),
            mask,
            head_mask,
            factors: factors.clone(),
            x,
            dy,
            a,
            b,
            adapter_state,
            d_adapter_state,
            mixed,
            dx,
            da,
            db,
        };
        this.check_sums();
        this
    }

    /// The columns of `d_adapter_state` for the rows of [A; R], with zeros in A's columns if only the router's are
    /// wanted.
    fn stacked_gradient(&self, router_only: bool) -> Vec<f64> {
        let (rows, width) = (self.shape.stacked_rows(), self.shape.state_width());
        let value = |i: usize| match router_only && i % rows < self.shape.a_rows() {
            true => 0.0,
            false => self.d_adapter_state[i / rows * width + i % rows],
        };
        (0..self.tokens * rows).map(value).collect()
    }

    /// The weight gradients as sums over tokens of the values that are given here.
    fn weight_grads(&self, d_adapter_state: &[f64], mixed: &[f64]) -> [Vec<f64>; 2] {
        let (tokens, HydraShape { d_in, d_out, .. }) = (self.tokens, self.shape);
        let (rows, a_rows, columns) = (self.shape.stacked_rows(), self.shape.a_rows(), self.shape.mixed_width());
        let (mut da, mut db) = (f64s(&self.a), f64s(&self.b));
        let (da_a, da_r) = da.split_at_mut(a_rows * d_in);
        let plain = |t: usize, c: usize| f64::from(self.x[t * d_in + c]);
        let dropped = |t: usize, c: usize| plain(t, c) * self.factors[t * d_in + c];
        reference::gemm(da_a, a_rows, tokens, d_in, |j, t| d_adapter_state[t * rows + j], dropped);
        let d_logits = |j: usize, t: usize| d_adapter_state[t * rows + a_rows + j];
        reference::gemm(da_r, rows - a_rows, tokens, d_in, d_logits, plain);
        let scaled = |o: usize, t: usize| f64::from(SCALE) * f64::from(self.dy[t * d_out + o]);
        reference::gemm(&mut db, d_out, tokens, columns, scaled, |t, j| mixed[t * columns + j]);
        [da, db]
    }

    /// [`Expected::weight_grads`] of exact values are the reference's.
    fn check_sums(&self) {
        let same = |got: &[f64], want: &[f64]| got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-9);
        let [da, db] = self.weight_grads(&self.stacked_gradient(false), &self.mixed);
        assert!(same(&da, &self.da) && same(&db, &self.db), "the reference's sums");
    }
}

/// The inputs on the emulated device.
struct Inputs {
    x: Global<u16>,
    dy: Global<u16>,
    a: Global<f32>,
    split_a: Global<u16>,
    b: Global<u16>,
    labels: Global<u32>,
}

impl Inputs {
    fn new(expected: &Expected, seed: u64) -> Self {
        let Expected { shape, x, dy, a, b, labels, .. } = expected;
        let (rows, d_in) = (shape.stacked_rows() as u32, shape.d_in as u32);
        let (a, split_a) = (Global::new(a), Global::new(&vec![0x7fc0u16; split_len(rows, d_in)]));
        run(split(ptr(&split_a), ptr(&a), rows, d_in), seed);
        Self {
            x: Global::new(&operand(x, shape.d_in)),
            dy: Global::new(&operand(dy, shape.d_out)),
            a,
            split_a,
            b: Global::new(&operand(b, shape.mixed_width())),
            labels: Global::new(labels),
        }
    }

    fn x(&self, expected: &Expected) -> Operand {
        Operand { at: ptr(&self.x), rows: expected.tokens as u32, columns: expected.shape.d_in as u32 }
    }

    fn dy(&self, expected: &Expected) -> Operand {
        Operand { at: ptr(&self.dy), rows: expected.tokens as u32, columns: expected.shape.d_out as u32 }
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
    let (adapter_state, mixed) = (nan32(tokens * width), nan16(tokens, columns));
    let out = LoraDown { adapter_state: ptr(&adapter_state), mixed: ptr(&mixed) };
    run(lora_down(out, inputs.x(expected), ptr(&inputs.split_a), adapter), seed);
    assert_close("adapter_state", adapter_state.values(), &expected.adapter_state, EXACT);
    assert_close("mixed", &from_bf16(&mixed, columns), &scaled, ROUNDED);
    assert!(mixed.values().chunks(pitch(columns)).all(|row| row[columns..].iter().all(|&x| x == 0)), "padding");
    if !adapter.dropout.drops() && !adapter.head_dropout.drops() {
        let (again, mixed) = (nan32(tokens * width), nan16(tokens, columns));
        let out = LoraDown { adapter_state: ptr(&again), mixed: ptr(&mixed) };
        run(lora_down_matvec(out, inputs.x(expected), ptr(&inputs.a), adapter), seed);
        assert_close("adapter_state by matvec", again.values(), &expected.adapter_state, EXACT);
        assert_close("mixed by matvec", &from_bf16(&mixed, columns), &scaled, ROUNDED);
    }
    adapter_state
}

/// What the gate's gradient leaves for the products behind it.
struct GateGradient {
    d_adapter_state: Global<f32>,
    d_adapter_state_bf16: Global<u16>,
    mixed: Global<u16>,
}

fn gate_gradient(
    inputs: &Inputs,
    adapter: &Adapter,
    adapter_state: &Global<f32>,
    expected: &Expected,
    seed: u64,
) -> GateGradient {
    let (tokens, shape, balance) = (expected.tokens, &expected.shape, expected.load_balance);
    let (rows, columns) = (shape.stacked_rows(), shape.mixed_width());
    let (mixed, d_mixed) = (nan16(tokens, columns), nan32(tokens * columns));
    let d_adapter_state = nan32(tokens * shape.state_width());
    let (d_adapter_state_bf16, d_router) = (nan16(tokens, rows), nan16(tokens, rows));
    let out = LoraUpBackward {
        d_adapter_state: ptr(&d_adapter_state),
        d_adapter_state_bf16: ptr(&d_adapter_state_bf16),
        d_router_bf16: ptr(&d_router),
        mixed: ptr(&mixed),
        d_mixed: ptr(&d_mixed),
    };
    let (per_head, mut balance_grad) = (nan32(shape.lora_heads), Ptr::NULL);
    if shape.router && balance > 0.0 {
        balance_grad = ptr(&per_head);
        run(balance_loss_grad(balance_grad, ptr(adapter_state), tokens as u32, adapter, balance), seed);
    }
    let b = ptr(&inputs.b);
    let saved = LoraUpInputs { b, adapter_state: ptr(adapter_state), balance_loss_grad: balance_grad };
    run(lora_up_backward(&out, inputs.dy(expected), &saved, adapter), seed);
    assert_close("d_adapter_state", d_adapter_state.values(), &expected.d_adapter_state, EXACT);
    assert_close("mixed", &from_bf16(&mixed, columns), &expected.mixed, ROUNDED);
    let bf16 = from_bf16(&d_adapter_state_bf16, rows);
    assert_close("d_adapter_state as bf16", &bf16, &expected.stacked_gradient(false), ROUNDED);
    assert_close("d_router", &from_bf16(&d_router, rows), &expected.stacked_gradient(true), ROUNDED);
    GateGradient { d_adapter_state, d_adapter_state_bf16, mixed }
}

fn run_weight_grad(grad: &WeightGrad, seed: u64) {
    let parts = nan32(grad.parts_len());
    run(grad.sum(ptr(&parts)), seed);
    if grad.parts_len() > 0 {
        run(grad.total(ptr(&parts)), seed);
    }
}

/// Sums of rounded values are exact but for their own rounding, however much cancels: so they are compared with sums of
/// what the device rounded.
fn weight_grads(inputs: &Inputs, adapter: &Adapter, gradient: &GateGradient, expected: &Expected, seed: u64) {
    let shape = &expected.shape;
    let rounded = |values: &Global<u16>, columns| f64s(&from_bf16(values, columns));
    let [want_da, want_db] = expected.weight_grads(
        &rounded(&gradient.d_adapter_state_bf16, shape.stacked_rows()),
        &rounded(&gradient.mixed, shape.mixed_width()),
    );
    let (got_da, got_db) = (Global::new(&expected.a), Global::new(&expected.b));
    run_weight_grad(&db(ptr(&got_db), inputs.dy(expected), ptr(&gradient.mixed), adapter), seed);
    assert_close("db", got_db.values(), &want_db, EXACT);
    run_weight_grad(&da(ptr(&got_da), inputs.x(expected), ptr(&gradient.d_adapter_state_bf16), adapter), seed);
    assert_close("da", got_da.values(), &want_da, EXACT);
}

/// A's part of dx, after dropout, is added to what dx was.
fn dx_after_dropout(inputs: &Inputs, adapter: &Adapter, gradient: &GateGradient, expected: &Expected, seed: u64) {
    let (tokens, d_in) = (expected.tokens, expected.shape.d_in);
    let (rows, a_rows, width) = (expected.shape.stacked_rows(), expected.shape.a_rows(), expected.shape.state_width());
    let dx = Global::new(&expected.x);
    let (size, d_adapter_state) = ([tokens as u32, d_in as u32], ptr(&gradient.d_adapter_state));
    run(dropped_dx(Values::f32(ptr(&dx)), size, d_adapter_state, ptr(&inputs.a), adapter), seed);
    let router = |t: usize, c: usize| {
        let term = |row: usize| expected.d_adapter_state[t * width + row] * f64::from(expected.a[row * d_in + c]);
        (a_rows..rows).map(term).sum::<f64>()
    };
    let want = |i: usize| f64::from(expected.x[i]) + expected.dx[i] - router(i / d_in, i % d_in);
    let want: Vec<f64> = (0..tokens * d_in).map(want).collect();
    assert_close("dx after dropout", dx.values(), &want, EXACT);
}

fn check(case: &Case) {
    let (expected, seed) = (Expected::new(case), case.seed);
    let inputs = Inputs::new(&expected, seed);
    let adapter = inputs.adapter(case, &expected);
    let adapter_state = forward(&inputs, &adapter, &expected, seed);
    let gradient = gate_gradient(&inputs, &adapter, &adapter_state, &expected, seed);
    weight_grads(&inputs, &adapter, &gradient, &expected, seed);
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

/// More tiles along k than there are stages; weight gradients in parts of different lengths, or of several tiles.
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
