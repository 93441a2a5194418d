//! Hydra forward and backward: against the reference, the reference against its own differences, memory to the float.

use crate::memory::allocations;
use crate::support::{Element, assert_close, tolerance, values, wide};
use half::bf16;
use hydra_kernels::hydra::{backward, backward_scratch, forward, forward_scratch};
use hydra_kernels::reference::{self, Gradients, Parameters};
use hydra_kernels::{AdapterRef, Dropout, Error, Gate, HydraShape, Weight, Workspace};
use proptest::prelude::*;

const SCALE: f32 = 2.0;

/// One problem.
#[derive(Debug)]
struct Case {
    shape: HydraShape,
    labels: Vec<u32>,
    gate: usize,
    dropout: Option<Dropout>,
    x: Vec<f32>,
    w: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    dy: Vec<f32>,
}

impl Case {
    fn new(shape: HydraShape, gate: usize, p: Option<f32>, seed: u64) -> Case {
        let HydraShape { tokens, d_in, d_out, heads, .. } = shape;
        Case {
            shape,
            labels: (0..tokens).map(|t| if t % 5 == 4 { u32::MAX } else { (t % (heads + 1)) as u32 }).collect(),
            gate,
            dropout: p.map(|p| Dropout { p, seed, first_row: 3 }),
            x: values(tokens * d_in, seed ^ 1),
            w: values(d_out * d_in, seed ^ 2),
            a: values(shape.stacked_rows() * d_in, seed ^ 3),
            b: values(d_out * shape.mixed(), seed ^ 4),
            dy: values(tokens * d_out, seed ^ 5),
        }
    }

    fn gate(&self) -> Gate<'_> {
        match self.gate {
            _ if self.shape.router => Gate::Router,
            0 => Gate::Label(&self.labels),
            1 => Gate::Uniform,
            _ => Gate::One,
        }
    }

    fn mask(&self) -> Vec<f64> {
        let d_in = self.shape.d_in;
        (0..self.x.len())
            .map(|i| match self.dropout {
                Some(d) if !d.keeps(d.first_row + (i / d_in) as u64, i % d_in) => 0.0,
                Some(d) => f64::from(d.scale()),
                None => 1.0,
            })
            .collect()
    }

    fn reference(&self, x: &[f64], a: &[f64], b: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let (weight, mask) = (wide(&self.w), self.mask());
        let parameters = Parameters { weight: &weight, a, b, scale: f64::from(SCALE), gate: self.gate(), mask: &mask };
        let mut y = vec![0.0; self.dy.len()];
        let mut hidden = vec![0.0; self.shape.tokens * self.shape.hidden()];
        reference::forward(&self.shape, &mut y, &mut hidden, x, &parameters);
        (y, hidden)
    }

    /// dx, da, db
    fn reference_gradients(&self) -> [Vec<f64>; 3] {
        let (x, a, b) = (wide(&self.x), wide(&self.a), wide(&self.b));
        let (weight, mask) = (wide(&self.w), self.mask());
        let hidden = self.reference(&x, &a, &b).1;
        let parameters =
            Parameters { weight: &weight, a: &a, b: &b, scale: f64::from(SCALE), gate: self.gate(), mask: &mask };
        let (mut dx, mut da, mut db) = (vec![0.0; x.len()], vec![0.0; a.len()], vec![0.0; b.len()]);
        let mut dhidden = vec![0.0; hidden.len()];
        let gradients = Gradients { dx: &mut dx, da: &mut da, db: &mut db, dhidden: &mut dhidden };
        reference::backward(&self.shape, gradients, &wide(&self.dy), &x, &hidden, &parameters);
        [dx, da, db]
    }

    /// y, hidden, dx, da, db, with `short` floats less than each needs.
    fn run<E: Element>(&self, isa: E::Isa, short: usize) -> Result<[Vec<f32>; 5], Error> {
        let shape = &self.shape;
        let weight = Weight::from_f32(shape.d_out, shape.d_in, &self.w)?;
        let adapter = AdapterRef { a: &self.a, b: &self.b, scale: SCALE };
        let mut y = vec![f32::NAN; self.dy.len()];
        let mut hidden = vec![f32::NAN; shape.tokens * shape.hidden()];
        let mut grads = [&self.x, &self.a, &self.b].map(|like| vec![1.0; like.len()]);
        let dropped = self.dropout.is_some();
        let mut memory = vec![f32::NAN; forward_scratch::<E>(shape, dropped).0.saturating_sub(short)];
        let mut outcome = Ok(());
        let allocated = allocations(|| {
            let workspace = &mut Workspace::new(&mut memory);
            outcome = forward::<E>(
                isa,
                shape,
                &mut y,
                &mut hidden,
                &self.x,
                weight,
                adapter,
                self.gate(),
                self.dropout,
                workspace,
            );
        });
        if let Err(error) = outcome {
            assert!(y.iter().chain(&hidden).all(|x| x.is_nan()), "wrote before an error");
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
                &hidden,
                self.gate(),
                self.dropout,
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
                    &hidden,
                    self.gate(),
                    self.dropout,
                    workspace,
                );
            });
        outcome?;
        assert_eq!(allocated, 0, "allocations");
        let [dx, da, db] = grads;
        Ok([y, hidden, dx, da, db])
    }

    fn check<E: Element>(&self) {
        let (y, hidden) = self.reference(&wide(&self.x), &wide(&self.a), &wide(&self.b));
        let gradients = self.reference_gradients().map(|g| g.into_iter().map(|g| g + 1.0).collect::<Vec<_>>());
        let [dx, da, db] = gradients;
        for isa in E::isas() {
            let got = self.run::<E>(isa, 0).unwrap();
            for ((name, got), want) in
                ["y", "hidden", "dx", "da", "db"].into_iter().zip(&got).zip([&y, &hidden, &dx, &da, &db])
            {
                assert_close(&format!("{isa:?} {:?} {name}", self.shape), got, want, E::OPERATOR);
            }
        }
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let sizes = (0..20usize, 1..70usize, prop::sample::select(vec![0, 1, 5, 31, 33, 257, 300]), 1..6usize, 1..5usize);
    let settings = (any::<bool>(), any::<bool>(), 0..3usize, prop::option::of(0.0..0.6f32), any::<u64>());
    (sizes, settings).prop_map(|((tokens, d_in, d_out, rank, heads), (per_head_a, router, gate, p, seed))| {
        Case::new(HydraShape { tokens, d_in, d_out, rank, heads, per_head_a, router }, gate, p, seed)
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
    let shape = HydraShape { tokens: 40, d_in: 401, d_out: 290, rank: 3, heads: 4, per_head_a: false, router: true };
    Case::new(shape, 0, Some(0.1), 5).check::<f32>();
    Case::new(shape, 0, None, 5).check::<bf16>();
}

#[test]
fn reference_gradients_are_differences() {
    for (router, per_head_a, gate) in
        [(true, false, 0), (true, true, 0), (false, true, 0), (false, false, 1), (false, false, 2)]
    {
        let shape = HydraShape { tokens: 3, d_in: 4, d_out: 5, rank: 2, heads: 3, per_head_a, router };
        let case = Case::new(shape, gate, Some(0.25), 8);
        let inputs = [wide(&case.x), wide(&case.a), wide(&case.b)];
        let dy = wide(&case.dy);
        let loss = |inputs: &[Vec<f64>; 3]| -> f64 {
            let (y, _) = case.reference(&inputs[0], &inputs[1], &inputs[2]);
            y.iter().zip(&dy).map(|(y, dy)| y * dy).sum()
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
        let shape = HydraShape { tokens: 5, d_in: 40, d_out: 33, rank: 4, heads: 3, per_head_a: false, router: true };
        let case = Case::new(shape, 0, p, 1);
        assert!(matches!(case.run::<f32>(hydra_kernels::Isa::detect(), 1), Err(Error::Workspace { .. })));
        assert!(matches!(case.run::<bf16>(hydra_kernels::Bf16Isa::detect(), 1), Err(Error::Workspace { .. })));
    }
}

#[test]
fn absurd_shapes_are_refused() {
    let good = HydraShape { tokens: 1, d_in: 1, d_out: 1, rank: 1, heads: 1, per_head_a: false, router: false };
    assert_eq!(good.validate(), Ok(()));
    for bad in [
        HydraShape { rank: 0, ..good },
        HydraShape { heads: 0, ..good },
        HydraShape { tokens: usize::MAX, ..good },
        HydraShape { d_in: usize::MAX / 8, d_out: 16, ..good },
        HydraShape { rank: usize::MAX, heads: 2, ..good },
        HydraShape { rank: 1 << 40, heads: 1 << 40, per_head_a: true, ..good },
    ] {
        assert!(bad.validate().is_err(), "{bad:?}");
        assert!(forward_scratch::<f32>(&bad, true).0 >= forward_scratch::<f32>(&HydraShape { ..bad }, false).0);
    }
    let case = Case::new(good, 2, None, 1);
    let mut hidden = vec![0.0; 2];
    let isa = hydra_kernels::Isa::detect();
    assert!(hydra_kernels::activate(isa, &case.shape, &mut hidden, Gate::Router).is_err());
    assert!(hydra_kernels::activate(isa, &case.shape, &mut hidden, Gate::Label(&[])).is_err());
    assert!(hydra_kernels::activate(isa, &case.shape, &mut hidden[..1], Gate::One).is_err());
}
