//! The linear operation with and without an adapter, forward and backward.

use crate::ops::Stored;
use crate::support::*;
use hydra_kernels::shape::HydraShape;
use hydra_ptx::sizes::{DECODED_TOKENS, WGMMA_M, WGMMA_MIN_TILES, WGMMA_N};
use hydra_runtime::backend::cuda::{Cuda, Driver, Gpu};
use hydra_runtime::backend::{
    Accumulate, AdapterArgs, AdapterSlot, AnyBuffer, AnyBufferMut, Backend, DropoutKey, GateKind, Linear,
    LinearBackward, LinearOutput, Routing,
};

/// A linear layer and its inputs.
struct Case {
    stored: Stored,
    tokens: usize,
    accumulate: Accumulate,
    slot: Option<AdapterSlot>,
    dropout: Option<DropoutKey>,
    head_dropout: Option<DropoutKey>,
    balance: f32,
    /// Whether dx is wanted.
    dx: bool,
    labels: Vec<u32>,
    x: Vec<f32>,
    /// The residual in the forward pass, dy in the backward pass.
    y: Vec<f32>,
    bias: Option<Vec<f32>>,
    /// What dx holds before.
    old_dx: Vec<f32>,
    /// Whether y and dx are activations, too.
    activations: bool,
    params: Vec<f32>,
}

/// A matrix of either kind.
enum Matrix<B: Backend> {
    Buffer(B::Buffer),
    Activations(B::Activations),
}

impl<B: Backend> Matrix<B> {
    fn put(b: &B, activations: bool, values: &[f32]) -> Self {
        if activations { Self::Activations(put_activations(b, values)) } else { Self::Buffer(put(b, values)) }
    }

    /// What a layer may leave room behind, if it is of the kind for that.
    fn put_rows(b: &B, activations: bool, width: usize, values: &[f32]) -> Self {
        if activations { Self::Activations(put_rows(b, width, values)) } else { Self::Buffer(put(b, values)) }
    }

    fn get(&self, b: &B, len: usize) -> Vec<f32> {
        match self {
            Self::Buffer(buffer) => get(b, buffer, len),
            Self::Activations(activations) => get_activations(b, activations, len),
        }
    }

    fn read(&self) -> AnyBuffer<'_, B> {
        match self {
            Self::Buffer(buffer) => AnyBuffer::Buffer(buffer),
            Self::Activations(activations) => AnyBuffer::Activations(activations),
        }
    }

    fn write(&mut self) -> AnyBufferMut<'_, B> {
        match self {
            Self::Buffer(buffer) => AnyBufferMut::Buffer(buffer),
            Self::Activations(activations) => AnyBufferMut::Activations(activations),
        }
    }
}

fn run<B: Backend>(b: &B, case: &Case) -> Results {
    let (weight, tokens) = (&b.matrix(case.stored.weight()).unwrap(), case.tokens);
    let stream = |values: &[f32]| Matrix::put(b, case.activations, values);
    let [d_out, d_in] = case.stored.sizes();
    let (x, params) = (&put_rows(b, d_in, &case.x), put(b, &case.params));
    let (mut y, residual) = (stream(&vec![f32::NAN; case.y.len()]), stream(&case.y));
    let adds = case.accumulate == Accumulate::Add;
    let args = case.slot.as_ref().map(|slot| AdapterArgs {
        slot,
        params: &params,
        labels: &case.labels,
        dropout: case.dropout,
        head_dropout: case.head_dropout,
        balance: case.balance,
    });
    let width = case.slot.as_ref().map_or(0, |slot| tokens * slot.shape.state_width());
    let mut adapter_state = b.buffer(width).unwrap();
    let output = match (&mut y, &residual) {
        (Matrix::Buffer(y), Matrix::Buffer(added)) => LinearOutput::Buffer { y, residual: adds.then_some(added) },
        (Matrix::Activations(y), Matrix::Activations(added)) => {
            LinearOutput::Activations { y, residual: adds.then_some(added) }
        }
        _ => unreachable!("both are streams"),
    };
    let adapter = args.as_ref().map(|args| (args, &mut adapter_state));
    let bias = case.bias.as_ref().map(|bias| put(b, bias));
    b.linear(Linear { output, tokens, x, weight, bias: bias.as_ref(), adapter }).unwrap();
    let mut results = vec![("y", y.get(b, case.y.len())), ("adapter_state", get(b, &adapter_state, width))];
    let rows = |width, values: &[f32]| Matrix::put_rows(b, case.activations, width, values);
    let (dy, mut dx, mut dparams) = (rows(d_out, &case.y), rows(d_in, &case.old_dx), put(b, &case.params));
    b.linear_backward(LinearBackward {
        dx: case.dx.then_some((dx.write(), case.accumulate)),
        dparams: Some(&mut dparams),
        tokens,
        dy: dy.read(),
        x,
        weight,
        adapter: args.as_ref().map(|args| (args, &adapter_state)),
    })
    .unwrap();
    results.push(("dx", dx.get(b, case.x.len())));
    results.push(("dparams", get(b, &dparams, case.params.len())));
    results
}

fn draw(random: &mut Random, size: usize, adapted: bool) -> Case {
    let width = |random: &mut Random| match random.within(0, 3) {
        0 => 32 * random.within(1, 4 * size),
        1 => 256,
        _ => random.within(1, 140 * size),
    };
    let widths = [width(random), width(random)];
    let tokens = if random.coin() { random.within(1, 5) } else { random.within(1, 140 * size) };
    case(random, tokens, widths, adapted)
}

fn case(random: &mut Random, tokens: usize, [d_in, d_out]: [usize; 2], adapted: bool) -> Case {
    let gate = [GateKind::Router, GateKind::Label, GateKind::Uniform, GateKind::One][random.within(0, 3)];
    let router = gate == GateKind::Router;
    let lora_heads = if gate == GateKind::One { 1 } else { random.within(1, 5) };
    let shape = HydraShape {
        d_in,
        d_out,
        rank: random.within(1, 12),
        lora_heads,
        per_head_a: !router && random.coin(),
        router,
    };
    let (a_len, b_len) = (shape.stacked_rows() * d_in, d_out * shape.mixed_width());
    // Not at the start, and not aligned.
    let first = random.within(0, 5);
    let slot = AdapterSlot {
        shape,
        gate,
        routing: Routing {
            temperature: if random.coin() { 1.0 } else { 0.6 },
            // Among many tokens, some have two nearly equal logits, and rounding decides which one is kept.
            top_k: if random.coin() || tokens > 5 { usize::MAX } else { random.within(1, 5) },
        },
        scale: 0.7,
        a: first..first + a_len,
        b: first + a_len..first + a_len + b_len,
    };
    Case {
        stored: Stored::draw(random, d_out, d_in),
        tokens,
        accumulate: if random.coin() { Accumulate::Add } else { Accumulate::Overwrite },
        dropout: (adapted && random.coin()).then_some(DropoutKey { p: 0.3, seed: 5 }),
        // With many tokens, rounding also decides which gate is a token's largest.
        balance: if tokens <= 5 && random.coin() { 0.8 } else { 0.0 },
        head_dropout: (adapted && random.coin()).then_some(DropoutKey { p: 0.2, seed: 6 }),
        dx: random.within(0, 4) > 0,
        labels: random.ids(tokens, lora_heads + 1),
        x: random.rounded(tokens * d_in),
        y: random.rounded(tokens * d_out),
        old_dx: random.rounded(tokens * d_in),
        activations: random.coin(),
        params: random.values(if adapted { slot.b.end + 3 } else { 1 }),
        bias: random.coin().then(|| random.values(d_out)),
        slot: adapted.then_some(slot),
    }
}

fn check<D: Driver>(cuda: &Cuda<D>, case: &Case) {
    let name = format!(
        "{} tokens {} activations {} {:?} {:?} dropout {:?}",
        case.stored.name(),
        case.tokens,
        case.activations,
        case.accumulate,
        case.slot,
        case.dropout
    );
    assert_same(&name, run(cuda, case), run(&cpu(), case), BF16);
}

pub fn frozen<D: Driver>(cuda: &Cuda<D>, random: &mut Random, size: usize) {
    check(cuda, &draw(random, size, false));
}

pub fn adapted<D: Driver>(cuda: &Cuda<D>, random: &mut Random, size: usize) {
    check(cuda, &draw(random, size, true));
}

/// No tokens: nothing happens.
pub fn nothing<D: Driver>(cuda: &Cuda<D>, random: &mut Random, _: usize) {
    let adapted = random.coin();
    let case = case(random, 0, [40, 24], adapted);
    let before = case.params.clone();
    let results = run(cuda, &Case { dx: true, ..case });
    for (name, values) in results {
        assert_eq!(values, if name == "dparams" { before.clone() } else { vec![] }, "{name}");
    }
}

/// With enough tokens that a quantised matrix is decoded first.
pub fn decoded<D: Driver>(cuda: &Cuda<D>, random: &mut Random, size: usize) {
    let tokens = DECODED_TOKENS as usize + random.within(0, 40);
    let widths = [32 * random.within(1, 2 * size), 32 * random.within(1, 2 * size)];
    let adapted = random.coin();
    check(cuda, &Case { dx: true, ..case(random, tokens, widths, adapted) });
}

/// One tile wide and many tiles high: the cheapest of the products that a device may leave to a library, so that an
/// emulator can compute them in both ways. Those in place are computed in the way that was faster before.
pub fn tall<D: Driver>(cuda: &Cuda<D>) {
    let (random, tokens) = (&mut Random::new(3), WGMMA_MIN_TILES as usize * WGMMA_M as usize);
    for accumulate in [Accumulate::Overwrite, Accumulate::Add] {
        let case = case(random, tokens, [40, 24], true);
        check(cuda, &Case { accumulate, dx: true, dropout: None, head_dropout: None, activations: true, ..case });
    }
}

/// No gradient arrives in the first rows, nor in the last ones, as where a model answers in the middle of a pass; in the
/// first pass in none. The library that is emulated has an algorithm that is wrong in the others.
pub fn silent_ends<D: Driver>(cuda: &Cuda<D>) {
    let (random, tokens) = (&mut Random::new(5), WGMMA_MIN_TILES as usize * WGMMA_M as usize);
    let drawn = case(random, tokens, [40, 24], false);
    let mut case = Case { accumulate: Accumulate::Overwrite, dx: true, activations: true, bias: None, ..drawn };
    for answered in [0..0, 1000..tokens - 1000] {
        for (row, dy) in case.y.chunks_exact_mut(24).enumerate() {
            dy.copy_from_slice(&if answered.contains(&row) { random.rounded(24) } else { vec![0.0; 24] });
        }
        check(cuda, &case);
    }
}

/// While there is no memory for a library's workspace, products do without it.
pub fn tall_without_memory(cuda: &Cuda<Gpu>) {
    // A device that gives memory in large pieces doesn't give the last of it.
    let mut filling = Vec::new();
    for mebibytes in [1 << 12, 1 << 8, 1 << 4, 1] {
        let (room, len) = (24u64 << 20, mebibytes << 18);
        while cuda.free_bytes().unwrap().unwrap() >= room + 4 * len as u64 {
            match cuda.buffer(len) {
                Ok(buffer) => filling.push(buffer),
                Err(_) => break,
            }
        }
    }
    let random = &mut Random::new(6);
    let drawn = case(random, WGMMA_MIN_TILES as usize * WGMMA_M as usize, [16, 8], false);
    let case = Case { accumulate: Accumulate::Overwrite, dx: true, ..drawn };
    check(cuda, &case);
    drop(filling);
    check(cuda, &case);
}

/// So large that a device multiplies an adapter's operands together with the frozen ones, if it has a library for that.
pub fn joined<D: Driver>(cuda: &Cuda<D>) {
    let random = &mut Random::new(4);
    for seed in 0..8 {
        let mut case = case(random, 2800 + 13 * seed, [[600, 700], [700, 600], [520, 1031]][seed % 3], true);
        case.stored = Stored::bf16(random, case.y.len() / case.tokens, case.x.len() / case.tokens);
        check(cuda, &Case { dx: true, ..case });
    }
}

/// So many results that a device with faster instructions for them uses them: of the forward pass, or of the backward
/// pass. With an adapter where `size` says that it is a device, on which that takes no minute.
pub fn large<D: Driver>(cuda: &Cuda<D>, random: &mut Random, size: usize) {
    let tokens = WGMMA_MIN_TILES as usize / 8 * WGMMA_M as usize + random.within(1, 90);
    let widths = [random.within(30, 64), 8 * WGMMA_N as usize + random.within(1, 90)];
    for widths in [widths, [widths[1], widths[0]]] {
        check(cuda, &Case { dx: true, ..case(random, tokens, widths, size > 1) });
    }
}
