//! The operator on one thread: against the reference, the reference against its own differences, memory to the float.

use crate::memory::allocations;
use crate::support::{TestElement, assert_close, tolerance, values, wide};
use half::bf16;
use hydra_kernels::hydra::{
    AdapterGradients, BackwardArgs, ForwardArgs, Gradients, HydraLayer, backward, backward_scratch, forward,
    forward_scratch, recompute, recompute_scratch,
};
use hydra_kernels::reference::{self, Parameters};
use hydra_kernels::{
    Accumulate, AdapterRef, Dropout, Dropouts, Error, Gate, HydraShape, Routing, Values, ValuesMut, Weight, Workspace,
};
use proptest::prelude::*;

pub const SCALE: f32 = 2.0;

/// Values as f32 or as bf16.
#[derive(Clone, Debug, PartialEq)]
pub enum Stored {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl Stored {
    pub fn new(values: &[f32], narrow: bool) -> Self {
        if narrow {
            Stored::Bf16(values.iter().map(|&x| bf16::from_f32(x)).collect())
        } else {
            Stored::F32(values.to_vec())
        }
    }

    pub fn get(&self) -> Values<'_> {
        match self {
            Stored::F32(x) => Values::F32(x),
            Stored::Bf16(x) => Values::Bf16(x),
        }
    }

    pub fn get_mut(&mut self) -> ValuesMut<'_> {
        match self {
            Stored::F32(x) => ValuesMut::F32(x),
            Stored::Bf16(x) => ValuesMut::Bf16(x),
        }
    }

    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Stored::F32(x) => x.clone(),
            Stored::Bf16(x) => x.iter().map(|x| x.to_f32()).collect(),
        }
    }
}

/// One problem.
#[derive(Clone, Debug)]
pub struct Case {
    pub tokens: usize,
    pub shape: HydraShape,
    pub adapted: bool,
    pub gate: usize,
    pub routing: Routing,
    pub load_balance: f32,
    pub dropouts: Dropouts,
    /// x, y, dx, dy and the residual are bf16.
    pub narrow: bool,
    pub accumulate: Accumulate,
    pub labels: Vec<u32>,
    pub x: Vec<f32>,
    pub residual: Option<Vec<f32>>,
    pub w: Vec<f32>,
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub dy: Vec<f32>,
}

/// y, adapter_state, dx, da, db.
pub type Results = [Vec<f32>; 5];
const NAMES: [&str; 5] = ["y", "adapter_state", "dx", "da", "db"];

impl Case {
    /// The published operator: plain routing, and dropout on the input alone.
    pub fn new(tokens: usize, shape: HydraShape, gate: usize, p: Option<f32>, seed: u64) -> Case {
        let HydraShape { d_in, d_out, lora_heads, .. } = shape;
        Case {
            tokens,
            shape,
            adapted: true,
            gate,
            routing: Routing::default(),
            load_balance: 0.0,
            dropouts: Dropouts { input: p.map(|p| Dropout { p, seed, first_row: 3 }), mixed: None },
            narrow: false,
            accumulate: Accumulate::Add,
            labels: (0..tokens).map(|t| if t % 5 == 4 { u32::MAX } else { (t % (lora_heads + 1)) as u32 }).collect(),
            x: values(tokens * d_in, seed ^ 1),
            residual: None,
            w: values(d_out * d_in, seed ^ 2),
            a: values(shape.stacked_rows() * d_in, seed ^ 3),
            b: values(d_out * shape.mixed_width(), seed ^ 4),
            dy: values(tokens * d_out, seed ^ 5),
        }
    }

    pub fn gate(&self) -> Gate {
        match self.gate {
            _ if self.shape.router => Gate::Router(self.routing),
            0 => Gate::Label,
            1 => Gate::Uniform,
            _ => Gate::One,
        }
    }

    pub fn layer(&self) -> HydraLayer<'_> {
        let adapter = AdapterRef { shape: self.shape, a: &self.a, b: &self.b, scale: SCALE, gate: self.gate() };
        let weight = Weight::from_f32(self.shape.d_out, self.shape.d_in, &self.w).unwrap();
        HydraLayer { weight, adapter: self.adapted.then_some(adapter) }
    }

    pub fn forward_args<'a>(&'a self, x: &'a Stored, residual: Option<&'a Stored>) -> ForwardArgs<'a> {
        ForwardArgs {
            residual: residual.map(Stored::get),
            labels: &self.labels,
            dropouts: self.dropouts,
            ..ForwardArgs::new(self.tokens, x.get())
        }
    }

    pub fn backward_args<'a>(&'a self, dy: &'a Stored, x: &'a Stored) -> BackwardArgs<'a> {
        BackwardArgs {
            labels: &self.labels,
            dropouts: self.dropouts,
            load_balance: self.load_balance,
            ..BackwardArgs::new(self.tokens, dy.get(), x.get())
        }
    }

    pub fn stored(&self, values: &[f32]) -> Stored {
        Stored::new(values, self.narrow)
    }

    pub fn state_len(&self) -> usize {
        if self.adapted { self.tokens * self.shape.state_width() } else { 0 }
    }

    /// What the masks multiply the input and the mixed heads with.
    fn masks(&self) -> [Vec<f64>; 2] {
        let factors = |dropout: Option<Dropout>, columns: usize| {
            let factor = |i: usize| match dropout {
                Some(d) if !d.keeps(d.first_row + (i / columns) as u64, i % columns) => 0.0,
                Some(d) => f64::from(d.scale()),
                None => 1.0,
            };
            (0..self.tokens * columns).map(factor).collect()
        };
        [factors(self.dropouts.input, self.shape.d_in), factors(self.dropouts.mixed, self.shape.mixed_width())]
    }

    fn with_parameters<R>(&self, a: &[f64], b: &[f64], body: impl FnOnce(&Parameters<'_>) -> R) -> R {
        let (weight, [mask, mixed_mask]) = (wide(&self.w), self.masks());
        body(&Parameters {
            weight: &weight,
            a,
            b,
            scale: f64::from(SCALE) * f64::from(u8::from(self.adapted)),
            gate: self.gate(),
            labels: &self.labels,
            load_balance: f64::from(self.load_balance) * f64::from(u8::from(self.adapted)),
            mask: &mask,
            mixed_mask: &mixed_mask,
        })
    }

    /// y without residual, and the adapter's state.
    fn reference(&self, x: &[f64], a: &[f64], b: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let mut y = vec![0.0; self.dy.len()];
        let mut adapter_state = vec![0.0; self.tokens * self.shape.state_width()];
        self.with_parameters(a, b, |parameters| {
            reference::forward(&self.shape, &mut y, &mut adapter_state, x, parameters);
        });
        (y, adapter_state)
    }

    /// dx, da, db
    fn reference_gradients(&self) -> [Vec<f64>; 3] {
        let (x, a, b) = (wide(&self.x), wide(&self.a), wide(&self.b));
        let adapter_state = self.reference(&x, &a, &b).1;
        let (mut dx, mut da, mut db) = (vec![0.0; x.len()], vec![0.0; a.len()], vec![0.0; b.len()]);
        let mut d_adapter_state = vec![0.0; adapter_state.len()];
        let gradients =
            reference::Gradients { dx: &mut dx, da: &mut da, db: &mut db, d_adapter_state: &mut d_adapter_state };
        self.with_parameters(&a, &b, |parameters| {
            reference::backward(&self.shape, gradients, &wide(&self.dy), &x, &adapter_state, parameters);
        });
        [dx, da, db]
    }

    /// What [`Case::run`] should give: gradients are added to ones, dx if it is added to.
    fn expected(&self) -> [Vec<f64>; 5] {
        let (mut y, adapter_state) = self.reference(&wide(&self.x), &wide(&self.a), &wide(&self.b));
        if let Some(residual) = &self.residual {
            y.iter_mut().zip(residual).for_each(|(y, r)| *y += f64::from(*r));
        }
        let [mut dx, mut da, mut db] = self.reference_gradients();
        if self.accumulate == Accumulate::Add {
            dx.iter_mut().for_each(|x| *x += 1.0);
        }
        da.iter_mut().chain(&mut db).for_each(|x| *x += 1.0);
        if self.adapted {
            [y, adapter_state, dx, da, db]
        } else {
            [y, vec![], dx, vec![1.0; da.len()], vec![1.0; db.len()]]
        }
    }

    /// The five results with `short` floats of memory less than each pass needs; `recomputed` as in `backward`.
    pub fn run<E: TestElement>(&self, isa: E::Isa, short: usize, recomputed: bool) -> Result<Results, Error> {
        let (shape, tokens, dropout) = (&self.layer().shape(), self.tokens, self.dropouts.input.is_some());
        let (x, dy) = (self.stored(&self.x), self.stored(&self.dy));
        let residual = self.residual.as_ref().map(|residual| self.stored(residual));
        let nan = |len: usize| vec![f32::NAN; len];
        let (mut y, mut adapter_state) = (self.stored(&nan(self.dy.len())), nan(self.state_len()));
        let mut dx = self.stored(&vec![if self.accumulate == Accumulate::Add { 1.0 } else { f32::NAN }; self.x.len()]);
        let [mut da, mut db] = [&self.a, &self.b].map(|like| vec![1.0; like.len()]);

        let mut memory = nan(forward_scratch::<E>(shape, tokens, dropout).0 - short);
        let mut outcome = Ok(());
        let args = self.forward_args(&x, residual.as_ref());
        let mut allocated = allocations(|| {
            let workspace = &mut Workspace::new(&mut memory);
            outcome = forward::<E>(isa, &self.layer(), &args, y.get_mut(), &mut adapter_state, workspace);
        });
        if outcome.is_err() {
            assert!(y.to_f32().iter().chain(&adapter_state).all(|x| x.is_nan()), "wrote before an error");
        }
        let mut memory = nan(backward_scratch::<E>(shape, tokens, dropout).0 - short);
        let args = self.backward_args(&dy, &x);
        let mut outcome_backward = Ok(());
        let before = (dx.to_f32(), da.clone(), db.clone());
        allocated += allocations(|| {
            let adapter = self.adapted.then_some(AdapterGradients { da: &mut da, db: &mut db });
            let gradients = Gradients { dx: Some((dx.get_mut(), self.accumulate)), adapter };
            let saved = (!recomputed).then_some(&adapter_state[..]);
            let workspace = &mut Workspace::new(&mut memory);
            outcome_backward = backward::<E>(isa, &self.layer(), &args, saved, gradients, workspace);
        });
        assert_eq!(allocated, 0, "allocations");
        if outcome_backward.is_err() {
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let after = [bits(&dx.to_f32()), bits(&da), bits(&db)];
            assert_eq!(after, [bits(&before.0), bits(&before.1), bits(&before.2)], "wrote before an error");
        }
        outcome.and(outcome_backward)?;
        Ok([y.to_f32(), adapter_state, dx.to_f32(), da, db])
    }

    fn check<E: TestElement>(&self) {
        let expected = self.expected();
        let tolerance = if self.narrow { tolerance::OPERATOR_BF16 } else { E::OPERATOR };
        for isa in E::isas() {
            let got = self.run::<E>(isa, 0, false).unwrap();
            for ((name, got), want) in NAMES.into_iter().zip(&got).zip(&expected) {
                let what = format!("{isa:?} {:?} {name}", self.shape);
                assert_close(&what, got, want, tolerance, self.size_of_terms(name, &expected));
            }
            let [.., dx, da, db] = self.run::<E>(isa, 0, true).unwrap();
            assert!([dx, da, db] == got[2..], "{isa:?} {:?}: a state that was computed again", self.shape);
        }
    }
}

impl Case {
    /// The size of a result's terms, which may cancel: [`values`] draws from ±1, and the gradients of A and B are sums
    /// over tokens, of B's with the adapter's state.
    fn size_of_terms(&self, name: &str, [_, adapter_state, ..]: &[Vec<f64>; 5]) -> f64 {
        let over_tokens = (self.tokens as f64).sqrt().max(1.0);
        match name {
            "da" => over_tokens,
            "db" => adapter_state.iter().fold(1.0, |largest: f64, x| largest.max(x.abs())) * over_tokens,
            _ => 1.0,
        }
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let sizes = (0..20usize, 1..70usize, prop::sample::select(vec![1, 5, 31, 33, 257, 300]), 1..6usize, 1..5usize);
    let settings = (any::<bool>(), any::<bool>(), 0..3usize, prop::option::of(0.0..0.6f32), any::<u64>());
    let plain =
        (sizes, settings).prop_map(|((tokens, d_in, d_out, rank, lora_heads), (per_head_a, router, gate, p, seed))| {
            Case::new(tokens, HydraShape { d_in, d_out, rank, lora_heads, per_head_a, router }, gate, p, seed)
        });
    let routing = prop::option::of((0.3..4.0f32, 1..6usize, prop::sample::select(vec![0.0, 0.5, 3.0])));
    let rest = (0..8u8, any::<bool>(), any::<bool>(), any::<bool>());
    (plain, routing, prop::option::of(0.0..0.6f32), rest).prop_map(|(plain, routing, p, rest)| {
        let (temperature, top_k, load_balance) = routing.unwrap_or((1.0, usize::MAX, 0.0));
        let mixed = p.map(|p| Dropout { p, seed: 77, first_row: 2 });
        let (adapted, narrow, overwrite, residual) = rest;
        Case {
            adapted: adapted > 0,
            narrow,
            accumulate: if overwrite { Accumulate::Overwrite } else { Accumulate::Add },
            residual: residual.then(|| values(plain.dy.len(), 6)),
            routing: Routing { temperature, top_k },
            load_balance,
            dropouts: Dropouts { mixed, ..plain.dropouts },
            ..plain
        }
    })
}

proptest! {
    #![proptest_config(crate::support::cases(48))]

    #[test]
    fn operator_follows_the_reference(case in cases()) {
        case.check::<f32>();
        case.check::<bf16>();
    }
}

pub fn hydra(d_in: usize, d_out: usize) -> HydraShape {
    HydraShape { d_in, d_out, rank: 3, lora_heads: 4, per_head_a: false, router: true }
}

/// More columns than a block has, both ways, with sums that are kept in f32 beside a bf16 result.
#[test]
fn operator_beyond_one_block_of_columns() {
    for narrow in [false, true] {
        for (d_in, d_out) in [(2100, 530), (530, 2100)] {
            let case = Case::new(9, hydra(d_in, d_out), 0, narrow.then_some(0.1), 5);
            Case { narrow, accumulate: Accumulate::Overwrite, ..case }.check::<bf16>();
        }
    }
    Case::new(7, hydra(2100, 530), 0, Some(0.1), 5).check::<f32>();
}

/// More tokens than a range of rows has, and than are summed together.
#[test]
fn operator_beyond_one_block_of_rows() {
    let case = Case::new(1100, hydra(7, 9), 0, Some(0.1), 5);
    case.check::<f32>();
    Case { narrow: true, ..case }.check::<bf16>();
}

#[test]
fn gradients_that_are_not_asked_for() {
    let case = Case::new(9, hydra(20, 30), 0, Some(0.2), 3);
    let isa = hydra_kernels::Isa::detect();
    let [_, adapter_state, dx, da, db] = case.run::<f32>(isa, 0, false).unwrap();
    let (x, dy) = (case.stored(&case.x), case.stored(&case.dy));
    let args = case.backward_args(&dy, &x);
    let mut memory = vec![f32::NAN; backward_scratch::<f32>(&case.shape, case.tokens, true).0];
    let mut run = |gradients: Gradients<'_>| {
        let workspace = &mut Workspace::new(&mut memory);
        backward::<f32>(isa, &case.layer(), &args, Some(&adapter_state), gradients, workspace).unwrap();
    };
    let mut only_dx = vec![1.0; dx.len()];
    run(Gradients { dx: Some((ValuesMut::F32(&mut only_dx), Accumulate::Add)), adapter: None });
    assert_eq!(only_dx, dx);
    let (mut only_da, mut only_db) = (vec![1.0; da.len()], vec![1.0; db.len()]);
    run(Gradients { dx: None, adapter: Some(AdapterGradients { da: &mut only_da, db: &mut only_db }) });
    assert_eq!((only_da, only_db), (da, db));
}

#[test]
fn reference_gradients_are_differences() {
    let plain = Routing::default();
    let all = Routing { temperature: 1.7, top_k: 2 };
    for (router, per_head_a, gate, routing, load_balance) in [
        (true, false, 0, plain, 0.0),
        (true, true, 0, plain, 0.0),
        (false, true, 0, plain, 0.0),
        (false, false, 1, plain, 0.0),
        (false, false, 2, plain, 0.0),
        (true, false, 0, Routing { temperature: 0.6, ..plain }, 0.0),
        (true, false, 0, Routing { top_k: 2, ..plain }, 0.0),
        (true, false, 0, plain, 2.5),
        (true, false, 0, all, 0.8),
        (true, true, 0, all, 0.8),
    ] {
        let shape = HydraShape { d_in: 4, d_out: 5, rank: 2, lora_heads: 3, per_head_a, router };
        let mut case = Case::new(3, shape, gate, Some(0.25), 8);
        case.dropouts.mixed = Some(Dropout { p: 0.3, seed: 6, first_row: 1 });
        (case.routing, case.load_balance) = (routing, load_balance);
        let inputs = [wide(&case.x), wide(&case.a), wide(&case.b)];
        let dy = wide(&case.dy);
        let at = case.reference(&inputs[0], &inputs[1], &inputs[2]).1;
        let loss = |inputs: &[Vec<f64>; 3]| -> f64 {
            let (y, adapter_state) = case.reference(&inputs[0], &inputs[1], &inputs[2]);
            let added = reference::balance_loss(&shape, &adapter_state, &at, f64::from(load_balance));
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

/// A state that is computed again has the bits of the forward pass's, for few tokens, too.
#[test]
fn recomputed_states_are_the_same() {
    for tokens in [0, 1, 3, 4, 5, 60] {
        for p in [None, Some(0.3)] {
            let mut case = Case::new(tokens, hydra(40, 33), 0, p, 1);
            case.narrow = tokens % 2 == 1;
            for isa in hydra_kernels::Bf16Isa::available() {
                let want = case.run::<bf16>(isa, 0, false).unwrap()[1].clone();
                let x = case.stored(&case.x);
                let need = recompute_scratch::<bf16>(&case.shape, tokens, p.is_some()).0;
                for short in [0, 1] {
                    let (mut memory, mut got) = (vec![f32::NAN; need - short.min(need)], vec![f32::NAN; want.len()]);
                    let workspace = &mut Workspace::new(&mut memory);
                    let args = case.forward_args(&x, None);
                    let outcome = recompute::<bf16>(isa, &case.layer(), &args, &mut got, workspace);
                    if short == 0 {
                        outcome.unwrap();
                        assert_eq!(got, want, "{tokens}");
                    } else if need > 0 {
                        assert!(outcome.is_err() && got.iter().all(|x| x.is_nan()));
                    }
                }
            }
        }
    }
}
