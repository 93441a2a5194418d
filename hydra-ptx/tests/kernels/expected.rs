//! A case of an adapter: random inputs, and what `hydra_kernels::reference` computes from them.

use crate::support::*;
use hydra_kernels::dropout::Dropout;
use hydra_kernels::gate::{Gate, Routing};
use hydra_kernels::reference::{self, Gradients, Parameters};
use hydra_kernels::shape::HydraShape;
use hydra_ptx::launch::Mask;
use hydra_ptx::sizes::{GATE_LABEL, GATE_ROUTER, GATE_UNIFORM};

/// α / rank.
pub const SCALE: f32 = 0.75;

pub struct Case {
    pub tokens: usize,
    pub shape: HydraShape,
    pub gate: u32,
    pub routing: Routing,
    pub load_balance: f32,
    pub head_dropout: f32,
    pub dropout: f32,
    pub seed: u64,
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
pub struct Expected {
    pub tokens: usize,
    pub shape: HydraShape,
    pub routing: Routing,
    pub load_balance: f32,
    pub labels: Vec<u32>,
    pub mask: Mask,
    pub head_mask: Mask,
    /// The factors of x's dropout.
    pub factors: Vec<f64>,
    /// Those of the heads'.
    pub head_factors: Vec<f64>,
    pub x: Vec<f32>,
    pub dy: Vec<f32>,
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub adapter_state: Vec<f64>,
    pub d_adapter_state: Vec<f64>,
    /// gate ∘ lora_down, after dropout.
    pub mixed: Vec<f64>,
    pub dx: Vec<f64>,
    pub da: Vec<f64>,
    pub db: Vec<f64>,
}

impl Expected {
    pub fn new(case: &Case) -> Self {
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
            head_factors: head_factors.clone(),
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
    pub fn stacked_gradient(&self, router_only: bool) -> Vec<f64> {
        let (rows, width) = (self.shape.stacked_rows(), self.shape.state_width());
        let value = |i: usize| match router_only && i % rows < self.shape.a_rows() {
            true => 0.0,
            false => self.d_adapter_state[i / rows * width + i % rows],
        };
        (0..self.tokens * rows).map(value).collect()
    }

    /// The weight gradients as sums over tokens of the values that are given here.
    pub fn weight_grads(&self, d_adapter_state: &[f64], mixed: &[f64]) -> [Vec<f64>; 2] {
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
    pub fn check_sums(&self) {
        let same = |got: &[f64], want: &[f64]| got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-9);
        let [da, db] = self.weight_grads(&self.stacked_gradient(false), &self.mixed);
        assert!(same(&da, &self.da) && same(&db, &self.db), "the reference's sums");
    }
}
