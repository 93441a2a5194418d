//! Hydra forward and backward: against the reference, the reference against its own differences, memory to the float.

use crate::memory::allocations;
use crate::support::{TestElement, assert_close, tolerance, values, wide};
use half::bf16;
use hydra_kernels::hydra::{backward, backward_scratch, forward, forward_scratch};
use hydra_kernels::reference::{self, Gradients, Parameters};
use hydra_kernels::{AdapterRef, Dropout, Dropouts, Error, Gate, HydraShape, Routing, Weight, Workspace};
use proptest::prelude::*;

const SCALE: f32 = 2.0;

/// One problem.
#[derive(Debug)]
struct Case {
    shape: HydraShape,
    labels: Vec<u32>,
    gate: usize,
    routing: Routing,
    dropouts: Dropouts,
    x: Vec<f32>,
    w: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    dy: Vec<f32>,
}

impl Case {
    /// The published operator: plain routing, and dropout on the input alone.
    fn new(shape: HydraShape, gate: usize, p: Option<f32>, seed: u64) -> Case {
        let HydraShape { tokens, d_in, d_out, lora_heads, .. } = shape;
        Case {
            shape,
            labels: (0..tokens).map(|t| if t % 5 == 4 { u32::MAX } else { (t % (lora_heads + 1)) as u32 }).collect(),
            gate,
            routing: Routing::default(),
            dropouts: Dropouts { input: p.map(|p| Dropout { p, seed, first_row: 3 }), lora_heads: None },
            x: values(tokens * d_in, seed ^ 1),
            w: values(d_out * d_in, seed ^ 2),
            a: values(shape.stacked_rows() * d_in, seed ^ 3),
            b: values(d_out * shape.mixed(), seed ^ 4),
            dy: values(tokens * d_out, seed ^ 5),
        }
    }

    fn gate(&self) -> Gate<'_> {
        match self.gate {
            _ if self.shape.router => Gate::Router(self.routing),
            0 => Gate::Label(&self.labels),
            1 => Gate::Uniform,
            _ => Gate::One,
        }
    }

    /// What the masks multiply the input and the mixed heads with.
    fn masks(&self) -> [Vec<f64>; 2] {
        let factors = |dropout: Option<Dropout>, columns: usize| {
            let factor = |i: usize| match dropout {
                Some(d) if !d.keeps(d.first_row + (i / columns) as u64, i % columns) => 0.0,
                Some(d) => f64::from(d.scale()),
                None => 1.0,
            };
            (0..self.shape.tokens * columns).map(factor).collect()
        };
        [factors(self.dropouts.input, self.shape.d_in), factors(self.dropouts.lora_heads, self.shape.mixed())]
    }

    fn reference(&self, x: &[f64], a: &[f64], b: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let (weight, [mask, heads_mask]) = (wide(&self.w), self.masks());
        let (mask, heads_mask, scale) = (&mask, &heads_mask, f64::from(SCALE));
        let parameters = Parameters { weight: &weight, a, b, scale, gate: self.gate(), mask, heads_mask };
        let mut y = vec![0.0; self.dy.len()];
        let mut adapter_state = vec![0.0; self.shape.tokens * self.shape.state_width()];
        reference::forward(&self.shape, &mut y, &mut adapter_state, x, &parameters);
        (y, adapter_state)
    }

    /// dx, da, db
    fn reference_gradients(&self) -> [Vec<f64>; 3] {
        let (x, a, b) = (wide(&self.x), wide(&self.a), wide(&self.b));
        let (weight, [mask, heads_mask]) = (wide(&self.w), self.masks());
        let adapter_state = self.reference(&x, &a, &b).1;
        let (mask, heads_mask, scale) = (&mask, &heads_mask, f64::from(SCALE));
        let parameters = Parameters { weight: &weight, a: &a, b: &b, scale, gate: self.gate(), mask, heads_mask };
        let (mut dx, mut da, mut db) = (vec![0.0; x.len()], vec![0.0; a.len()], vec![0.0; b.len()]);
        let mut d_adapter_state = vec![0.0; adapter_state.len()];
        let gradients = Gradients { dx: &mut dx, da: &mut da, db: &mut db, d_adapter_state: &mut d_adapter_state };
        reference::backward(&self.shape, gradients, &wide(&self.dy), &x, &adapter_state, &parameters);
        [dx, da, db]
    }

    /// y, adapter_state, dx, da, db, with `short` floats less than each needs.
    fn run<E: TestElement>(&self, isa: E::Isa, short: usize) -> Result<[Vec<f32>; 5], Error> {
        let shape = &self.shape;
        let weight = Weight::from_f32(shape.d_out, shape.d_in, &self.w)?;
        let adapter = AdapterRef { a: &self.a, b: &self.b, scale: SCALE };
        let mut y = vec![f32::NAN; self.dy.len()];
        let mut adapter_state = vec![f32::NAN; shape.tokens * shape.state_width()];
        let mut grads = [&self.x, &self.a, &self.b].map(|like| vec![1.0; like.len()]);
        let dropped = self.dropouts.input.is_some();
        let mut memory = vec![f32::NAN; forward_scratch::<E>(shape, dropped).0.saturating_sub(short)];
        let mut outcome = Ok(());
        let allocated = allocations(|| {
            let workspace = &mut Workspace::new(&mut memory);
            outcome = forward::<E>(
                isa,
                shape,
                &mut y,
                &mut adapter_state,
                &self.x,
                weight,
                adapter,
                self.gate(),
                self.dropouts,
                workspace,
            );
        });
        if let Err(error) = outcome {
            assert!(y.iter().chain(&adapter_state).all(|x| x.is_nan()), "wrote before an error");
            let mut memory = vec![f32::NAN; backward_scratch::<E>(shape, dropped).0 - short];
            let [dx, da, db] = &mut grads;
            let workspace = &mut Workspace::new(&mut memory);
            backward::<E>(
                isa,
                shape,
                dx,
                da,
                db,
                &self.dy,
                &self.x,
                weight,
                adapter,
                &adapter_state,
                self.gate(),
                self.dropouts,
                workspace,
            )
            .unwrap_err();
            assert!(grads.iter().flatten().all(|&x| x == 1.0), "wrote before an error");
            return Err(error);
        }
        let mut memory = vec![f32::NAN; backward_scratch::<E>(shape, dropped).0];
        let [dx, da, db] = &mut grads;
        let allocated = allocated
            + allocations(|| {
                let workspace = &mut Workspace::new(&mut memory);
                outcome = backward::<E>(
                    isa,
                    shape,
                    dx,
                    da,
                    db,
                    &self.dy,
                    &self.x,
                    weight,
                    adapter,
                    &adapter_state,
                    self.gate(),
                    self.dropouts,
                    workspace,
                );
            });
        outcome?;
        assert_eq!(allocated, 0, "allocations");
        let [dx, da, db] = grads;
        Ok([y, adapter_state, dx, da, db])
    }

    fn check<E: TestElement>(&self) {
        let (y, adapter_state) = self.reference(&wide(&self.x), &wide(&self.a), &wide(&self.b));
        let gradients = self.reference_gradients().map(|g| g.into_iter().map(|g| g + 1.0).collect::<Vec<_>>());
        let [dx, da, db] = gradients;
        for isa in E::isas() {
            let got = self.run::<E>(isa, 0).unwrap();
            for ((name, got), want) in
                ["y", "adapter_state", "dx", "da", "db"].into_iter().zip(&got).zip([&y, &adapter_state, &dx, &da, &db])
            {
                assert_close(&format!("{isa:?} {:?} {name}", self.shape), got, want, E::OPERATOR);
            }
        }
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let sizes = (0..20usize, 1..70usize, prop::sample::select(vec![0, 1, 5, 31, 33, 257, 300]), 1..6usize, 1..5usize);
    let settings = (any::<bool>(), any::<bool>(), 0..3usize, prop::option::of(0.0..0.6f32), any::<u64>());
    let plain =
        (sizes, settings).prop_map(|((tokens, d_in, d_out, rank, lora_heads), (per_head_a, router, gate, p, seed))| {
            Case::new(HydraShape { tokens, d_in, d_out, rank, lora_heads, per_head_a, router }, gate, p, seed)
        });
    let routing = prop::option::of((0.3..4.0f32, 1..6usize, prop::sample::select(vec![0.0, 0.5, 3.0])));
    (plain, routing, prop::option::of(0.0..0.6f32)).prop_map(|(plain, routing, p)| {
        let routing = routing.map(|(temperature, top_k, balance)| Routing { temperature, top_k, balance });
        let lora_heads = p.map(|p| Dropout { p, seed: 77, first_row: 2 });
        let dropouts = Dropouts { lora_heads, ..plain.dropouts };
        Case { routing: routing.unwrap_or_default(), dropouts, ..plain }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn operator_follows_the_reference(case in cases()) {
        case.check::<f32>();
        case.check::<bf16>();
    }
}

/// Wider than one chunk of columns, deeper than one block of k.
#[test]
fn operator_beyond_one_block() {
    let shape =
        HydraShape { tokens: 40, d_in: 401, d_out: 290, rank: 3, lora_heads: 4, per_head_a: false, router: true };
    Case::new(shape, 0, Some(0.1), 5).check::<f32>();
    Case::new(shape, 0, None, 5).check::<bf16>();
}

#[test]
fn reference_gradients_are_differences() {
    let plain = Routing::default();
    let all = Routing { temperature: 1.7, top_k: 2, balance: 0.8 };
    for (router, per_head_a, gate, routing) in [
        (true, false, 0, plain),
        (true, true, 0, plain),
        (false, true, 0, plain),
        (false, false, 1, plain),
        (false, false, 2, plain),
        (true, false, 0, Routing { temperature: 0.6, ..plain }),
        (true, false, 0, Routing { top_k: 2, ..plain }),
        (true, false, 0, Routing { balance: 2.5, ..plain }),
        (true, false, 0, all),
        (true, true, 0, all),
    ] {
        let shape = HydraShape { tokens: 3, d_in: 4, d_out: 5, rank: 2, lora_heads: 3, per_head_a, router };
        let mut case = Case::new(shape, gate, Some(0.25), 8);
        case.dropouts.lora_heads = Some(Dropout { p: 0.3, seed: 6, first_row: 1 });
        case.routing = routing;
        let inputs = [wide(&case.x), wide(&case.a), wide(&case.b)];
        let dy = wide(&case.dy);
        let at = case.reference(&inputs[0], &inputs[1], &inputs[2]).1;
        let loss = |inputs: &[Vec<f64>; 3]| -> f64 {
            let (y, adapter_state) = case.reference(&inputs[0], &inputs[1], &inputs[2]);
            let added = reference::balance(&shape, &adapter_state, &at, case.gate());
            y.iter().zip(&dy).map(|(y, dy)| y * dy).sum::<f64>() + added
        };
        for (which, gradient) in case.reference_gradients().into_iter().enumerate() {
            for (i, want) in gradient.into_iter().enumerate() {
                let step = |by: f64| {
                    let mut moved = inputs.clone();
                    moved[which][i] += by;
                    loss(&moved)
                };
                let difference = (step(1e-5) - step(-1e-5)) / 2e-5;
                assert!((difference - want).abs() <= tolerance::DIFFERENCES * want.abs().max(1.0), "{which} {i}");
            }
        }
    }
}

#[test]
fn one_float_less_is_an_error() {
    for p in [None, Some(0.1)] {
        let shape =
            HydraShape { tokens: 5, d_in: 40, d_out: 33, rank: 4, lora_heads: 3, per_head_a: false, router: true };
        let case = Case::new(shape, 0, p, 1);
        assert!(matches!(case.run::<f32>(hydra_kernels::Isa::detect(), 1), Err(Error::Workspace { .. })));
        assert!(matches!(case.run::<bf16>(hydra_kernels::Bf16Isa::detect(), 1), Err(Error::Workspace { .. })));
    }
}

#[test]
fn absurd_shapes_are_refused() {
    let good = HydraShape { tokens: 1, d_in: 1, d_out: 1, rank: 1, lora_heads: 1, per_head_a: false, router: false };
    assert_eq!(good.validate(), Ok(()));
    for bad in [
        HydraShape { rank: 0, ..good },
        HydraShape { lora_heads: 0, ..good },
        HydraShape { tokens: usize::MAX, ..good },
        HydraShape { d_in: usize::MAX / 8, d_out: 16, ..good },
        HydraShape { rank: usize::MAX, lora_heads: 2, ..good },
        HydraShape { rank: 1 << 40, lora_heads: 1 << 40, per_head_a: true, ..good },
    ] {
        assert!(bad.validate().is_err(), "{bad:?}");
        assert!(forward_scratch::<f32>(&bad, true).0 >= forward_scratch::<f32>(&HydraShape { ..bad }, false).0);
    }
    let case = Case::new(good, 2, None, 1);
    let mut adapter_state = vec![0.0; 2];
    let isa = hydra_kernels::Isa::detect();
    assert!(hydra_kernels::activate(isa, &case.shape, &mut adapter_state, Gate::Router(Routing::default())).is_err());
    assert!(hydra_kernels::activate(isa, &case.shape, &mut adapter_state, Gate::Label(&[])).is_err());
    assert!(hydra_kernels::activate(isa, &case.shape, &mut adapter_state[..1], Gate::One).is_err());
}

/// One token's gate.
fn gate_of(logits: &[f32], routing: Routing) -> Vec<f32> {
    let lora_heads = logits.len();
    let shape = HydraShape { tokens: 1, d_in: 1, d_out: 1, rank: 1, lora_heads, per_head_a: false, router: true };
    let mut first: Option<Vec<f32>> = None;
    for isa in hydra_kernels::Isa::available() {
        let mut adapter_state = [&[7.0], logits].concat();
        hydra_kernels::activate(isa, &shape, &mut adapter_state, Gate::Router(routing)).unwrap();
        assert_eq!(adapter_state[0], 7.0);
        let gate = adapter_state.split_off(1);
        let bits = |gate: &[f32]| gate.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(first.get_or_insert(gate.clone())), bits(&gate), "{isa:?}");
    }
    first.unwrap()
}

#[test]
fn top_k_keeps_the_largest_and_of_equals_the_first() {
    let top = |top_k| Routing { top_k, ..Routing::default() };
    assert_eq!(gate_of(&[1.0, 3.0, 3.0, 2.0], top(1)), [0.0, 1.0, 0.0, 0.0]);
    assert_eq!(gate_of(&[1.0, 3.0, 3.0, 2.0], top(2)), [0.0, 0.5, 0.5, 0.0]);
    assert_eq!(gate_of(&[5.0, 5.0, 5.0, 5.0], top(2)), [0.5, 0.5, 0.0, 0.0]);
    assert_eq!(gate_of(&[0.0, -0.0, 0.0], top(1)), [1.0, 0.0, 0.0]);
    assert_eq!(gate_of(&[f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY], top(2)), [0.0, 1.0, 0.0]);
    let all = gate_of(&[1.0, 3.0, 2.5, 2.0], Routing::default());
    assert_eq!(gate_of(&[1.0, 3.0, 2.5, 2.0], top(4)), all);
    assert_eq!(gate_of(&[1.0, 3.0, 2.5, 2.0], top(9)), all);
    // What is not a number stays to be seen.
    for top_k in 1..4 {
        assert!(gate_of(&[1.0, f32::NAN, 2.0], top(top_k)).iter().all(|x| x.is_nan()));
    }
    // Halved logits.
    let dull = Routing { temperature: 2.0, ..Routing::default() };
    assert_eq!(gate_of(&[2.0, 6.0, 5.0, 4.0], dull), all);
}

#[test]
fn the_balance_term_is_least_where_heads_are_used_alike() {
    let shape = HydraShape { tokens: 3, d_in: 1, d_out: 1, rank: 1, lora_heads: 3, per_head_a: false, router: true };
    let gate = Gate::Router(Routing { balance: 2.0, ..Routing::default() });
    let even = [0.0, 0.8, 0.1, 0.1, 0.0, 0.1, 0.8, 0.1, 0.0, 0.1, 0.1, 0.8];
    assert!((reference::balance(&shape, &even, &even, gate) - 2.0).abs() < 1e-12);
    let one = [0.0, 0.8, 0.1, 0.1].repeat(3);
    assert!((reference::balance(&shape, &one, &one, gate) - 2.0 * 3.0 * 0.8).abs() < 1e-12);
    // Two tokens of three, and a tie that counts for the lower index.
    let adapter_state = [0.0, 0.5, 0.5, 0.0, 0.0, 0.1, 0.2, 0.7, 0.0, 0.4, 0.3, 0.3];
    let mut push = [f32::NAN; 3];
    hydra_kernels::push(&shape, &mut push, &adapter_state, gate).unwrap();
    let unit = 2.0 * 3.0 / 9.0f32;
    assert!(push.iter().zip([2.0 * unit, 0.0, unit]).all(|(got, want)| (got - want).abs() < 1e-6), "{push:?}");
    assert!(hydra_kernels::push(&shape, &mut push[..2], &adapter_state, gate).is_err());
    assert!(hydra_kernels::push(&shape, &mut push, &adapter_state, Gate::Router(Routing::default())).is_err());
}

#[test]
fn routing_that_means_nothing_is_refused() {
    let shape = HydraShape { tokens: 1, d_in: 1, d_out: 1, rank: 1, lora_heads: 2, per_head_a: false, router: true };
    let good = Routing::default();
    let bad = [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-40].map(|temperature| Routing { temperature, ..good });
    for routing in bad.into_iter().chain([Routing { top_k: 0, ..good }, Routing { balance: f32::NAN, ..good }]) {
        let mut adapter_state = [1.0; 3];
        let gate = Gate::Router(routing);
        assert!(
            hydra_kernels::activate(hydra_kernels::Isa::detect(), &shape, &mut adapter_state, gate).is_err(),
            "{routing:?}"
        );
        assert_eq!(adapter_state, [1.0; 3]);
    }
}
