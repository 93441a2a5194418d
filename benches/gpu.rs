//! A frozen projection alone and with an adapter on a GPU, forward and backward, at LLaMA-2-7B's shapes: the adapter's
//! cost.
//!
//!     cargo bench --features cuda --bench gpu [-- --tokens N --shrink N --calls N]
//!
//! Before a shape's times are printed, samples of the frozen products' results are compared with f64 sums. A time is
//! wall-clock time over many calls, with one wait at the end. Beside the adapter's time stands its floor: the time to
//! read x once forward, dy and x once backward, at the speed of a copy on the device. The frozen product is timed in
//! the device's fastest way, by our kernels alone, by them without Hopper's `wgmma` where there is one, and with W in
//! blocks of 4 bits, which are decoded first.
//!
//! If HYDRA_PYTHON names a Python with PyTorch, `gpu.py` follows: cuBLAS, and the adapter in PyTorch, on the same card.
//! `--shrink` divides all widths and `--calls` limits the calls of a round (20), to try the bench itself on an emulated
//! driver.

use half::{bf16, f16};
use hydra_kernels::isa::Isa;
use hydra_kernels::shape::HydraShape;
use hydra_kernels::{Format, RowOrder};
use hydra_ptx::launch::Instructions;
use hydra_runtime::backend::cuda::{Cuda, Driver, Gpu};
use hydra_runtime::backend::{
    Accumulate, AdapterArgs, AdapterSlot, AnyBuffer, AnyBufferMut, Backend, GateKind, Linear, LinearBackward,
    LinearOutput, Routing, StoredWeight,
};
use std::process::Command;
use std::time::Instant;

type Device = Cuda<Gpu>;
type Buffer = <Device as Backend>::Buffer;
type Activations = <Device as Backend>::Activations;

/// (name, d_out, d_in)
const SHAPES: [(&str, usize, usize); 3] = [("q,k,v,o", 4096, 4096), ("gate,up", 11008, 4096), ("down", 4096, 11008)];
/// (rank, heads)
const ADAPTERS: [(usize, usize); 4] = [(8, 3), (8, 4), (16, 3), (16, 4)];

/// The sizes of a run.
#[derive(Clone, Copy)]
struct Options {
    tokens: usize,
    /// Divides all widths.
    shrink: usize,
    /// Calls in a round.
    calls: u32,
}

impl Options {
    /// From the command line; cargo's own `--bench` is ignored.
    fn parse() -> Self {
        let mut options = Self { tokens: 4096, shrink: 1, calls: 20 };
        let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
        while let Some(name) = arguments.next() {
            let value = arguments.next().and_then(|value| value.parse().ok());
            match (name.as_str(), value) {
                ("--tokens", Some(tokens)) => options.tokens = tokens,
                ("--shrink", Some(shrink)) => options.shrink = shrink,
                ("--calls", Some(calls)) => options.calls = calls as u32,
                _ => panic!("{name}: expected --tokens N, --shrink N or --calls N"),
            }
        }
        options
    }

    /// A width of the 7B, divided, in whole blocks of a quantised weight.
    fn width(&self, width: usize) -> usize {
        (width / self.shrink).next_multiple_of(32)
    }
}

fn values(len: usize, seed: usize, size: f32) -> Vec<f32> {
    let hash = |i: usize| ((i ^ seed).wrapping_mul(2_654_435_761) >> 16 & 0xff) as f32 / 128.0 - 1.0;
    (0..len).map(|i| hash(i) * size).collect()
}

fn put(device: &Device, mut buffer: Buffer, values: &[f32]) -> Buffer {
    device.upload(&mut buffer, values).expect("an upload");
    buffer
}

fn put_activations(device: &Device, values: &[f32]) -> Activations {
    let mut activations = device.activations(values.len()).expect("memory");
    device.upload_activations(&mut activations, values).expect("an upload");
    activations
}

/// What a linear layer reads, [rows, width].
fn put_rows(device: &Device, width: usize, values: &[f32]) -> Activations {
    let mut activations = device.operand(values.len() / width, width).expect("memory");
    device.upload_activations(&mut activations, values).expect("an upload");
    activations
}

/// A device, and what its times are measured with.
struct Bench {
    device: Device,
    options: Options,
    probe: Buffer,
}

/// The times of a pass forward and of one backward, in seconds.
type Passes = [f64; 2];

impl Bench {
    fn new(device: Device, options: Options) -> Self {
        let probe = device.buffer(1).expect("memory");
        Self { device, options, probe }
    }

    /// Seconds of a call: the fastest of five rounds.
    fn seconds(&self, mut call: impl FnMut()) -> f64 {
        let wait = || self.device.download(&mut [0.0], &self.probe).expect("the work is done");
        let mut round = |calls: u32| {
            let start = Instant::now();
            (0..calls).for_each(|_| call());
            wait();
            start.elapsed().as_secs_f64() / f64::from(calls)
        };
        round(self.options.calls.div_ceil(7));
        (0..5).map(|_| round(self.options.calls)).fold(f64::INFINITY, f64::min)
    }

    /// Bytes that a copy on the device reads and writes in a second.
    fn bandwidth(&self) -> f64 {
        let len = (64 << 20) / self.options.shrink.pow(2);
        let buffer = || self.device.buffer(len).expect("memory");
        let (from, mut to) = (buffer(), buffer());
        8.0 * len as f64 / self.seconds(|| self.device.copy(&mut to, 0, &from, len).expect("a copy"))
    }

    /// The frozen product with this matrix, after a comparison of its results.
    fn frozen(&self, stored: &StoredWeight) -> Passes {
        let (device, tokens, weight) = (&self.device, self.options.tokens, stored.weight());
        let (d_out, d_in) = (weight.rows(), weight.cols());
        let mut w = vec![0.0; d_out * d_in];
        for (row, w) in w.chunks_exact_mut(d_in).enumerate() {
            weight.decode_row(Isa::detect(), row, 0, w);
        }
        let weight = &device.matrix(stored.clone()).expect("memory");
        let (host_x, host_dy) = (values(tokens * d_in, 1, 1.0), values(tokens * d_out, 2, 1.0));
        let (x, dy) = (&put_rows(device, d_in, &host_x), put_rows(device, d_out, &host_dy));
        let (mut y, mut dx) = (put_activations(device, &host_dy), put_activations(device, &host_x));
        let forward = self.seconds(|| {
            let output = LinearOutput::Activations { y: &mut y, residual: None };
            device.linear(Linear { output, tokens, x, weight, bias: None, adapter: None }).expect("a product");
        });
        let backward = self.seconds(|| {
            let dx = Some((AnyBufferMut::Activations(&mut dx), Accumulate::Overwrite));
            let dy = AnyBuffer::Activations(&dy);
            let args = LinearBackward { dx, dparams: None, tokens, dy, x, weight, adapter: None };
            device.linear_backward(args).expect("a product");
        });
        // A block's values are rounded for the product, too.
        let rounded = |x: f32| f64::from(bf16::from_f32(x));
        let mut got = vec![0.0; tokens * d_out];
        device.download_activations(&mut got, &y).expect("a product");
        check("y", &got, d_out, d_in, |t, o, c| rounded(host_x[t * d_in + c]) * rounded(w[o * d_in + c]));
        got.resize(tokens * d_in, 0.0);
        device.download_activations(&mut got, &dx).expect("a product");
        check("dx", &got, d_in, d_out, |t, c, o| rounded(host_dy[t * d_out + o]) * rounded(w[o * d_in + c]));
        [forward, backward]
    }

    /// The product with an adapter of this shape.
    fn adapted(&self, stored: &StoredWeight, rank: usize, lora_heads: usize) -> Passes {
        let (device, tokens) = (&self.device, self.options.tokens);
        let (d_out, d_in) = (stored.weight().rows(), stored.weight().cols());
        let weight = &device.matrix(stored.clone()).expect("memory");
        let (host_x, host_dy) = (values(tokens * d_in, 1, 1.0), values(tokens * d_out, 2, 1.0));
        let (x, dy) = (&put_rows(device, d_in, &host_x), put_rows(device, d_out, &host_dy));
        let (mut y, mut dx) = (put_activations(device, &host_dy), put_activations(device, &host_x));
        let shape = HydraShape { d_in, d_out, rank, lora_heads, per_head_a: false, router: true };
        let (a, b) = (shape.stacked_rows() * d_in, d_out * shape.mixed_width());
        let (gate, routing) = (GateKind::Router, Routing::default());
        let slot = AdapterSlot { shape, gate, routing, scale: 4.0, a: 0..a, b: a..a + b };
        let buffer = |len| device.buffer(len).expect("memory");
        let (params, mut dparams) = (put(device, buffer(a + b), &values(a + b, 4, 0.05)), buffer(a + b));
        let mut adapter_state = buffer(tokens * shape.state_width());
        let (dropout, head_dropout, balance) = (None, None, 0.0);
        let args = AdapterArgs { slot: &slot, params: &params, labels: &[], dropout, head_dropout, balance };
        let forward = self.seconds(|| {
            let adapter = Some((&args, &mut adapter_state));
            let output = LinearOutput::Activations { y: &mut y, residual: None };
            device.linear(Linear { output, tokens, x, weight, bias: None, adapter }).expect("a product");
        });
        let backward = self.seconds(|| {
            let dx = Some((AnyBufferMut::Activations(&mut dx), Accumulate::Overwrite));
            let (dy, dparams) = (AnyBuffer::Activations(&dy), Some(&mut dparams));
            let adapter = Some((&args, &adapter_state));
            let args = LinearBackward { dx, dparams, tokens, dy, x, weight, adapter };
            device.linear_backward(args).expect("a product");
        });
        [forward, backward]
    }
}

/// Compares 200 elements of a product [tokens, columns] with f64 sums of `terms` terms.
fn check(what: &str, got: &[f32], columns: usize, terms: usize, term: impl Fn(usize, usize, usize) -> f64) {
    for i in (0..200).map(|i| i * 7919 * 13 % got.len()) {
        let (t, column) = (i / columns, i % columns);
        let want: f64 = (0..terms).map(|k| term(t, column, k)).sum();
        // f32's sum, and the result's rounding to bf16.
        let apart = (f64::from(got[i]) - want).abs();
        assert!(
            apart < 1e-3 * (terms as f64).sqrt() + want.abs() / 256.0,
            "{what}[{t}, {column}]: {}, wanted {want}",
            got[i]
        );
    }
}

/// The bytes of W [d_out, d_in] in this format.
fn stored(format: Format, d_out: usize, d_in: usize) -> Vec<u8> {
    let w = values(d_out * d_in, 3, 0.05);
    match format {
        Format::Bf16 => w.iter().flat_map(|&w| bf16::from_f32(w).to_le_bytes()).collect(),
        Format::Q4_1 => {
            let (scale, least) = (f16::from_f32(0.1 / 15.0).to_le_bytes(), f16::from_f32(-0.05).to_le_bytes());
            let quant = |w: f32| ((w + 0.05) * 150.0) as u8 & 15;
            let block = |w: &[f32]| {
                let quants = (0..16).map(|i| quant(w[i]) | quant(w[16 + i]) << 4);
                [scale, least].concat().into_iter().chain(quants).collect::<Vec<_>>()
            };
            w.chunks_exact(32).flat_map(block).collect()
        }
        _ => unreachable!("not timed"),
    }
}

/// PyTorch's part, if a Python is named.
fn torch(options: Options) {
    let Some(python) = std::env::var_os("HYDRA_PYTHON") else { return };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/gpu.py");
    let (tokens, shrink) = (options.tokens.to_string(), options.shrink.to_string());
    let status = Command::new(python).args([script, "--tokens", &tokens, "--shrink", &shrink]).status();
    assert!(status.is_ok_and(|status| status.success()), "HYDRA_PYTHON: {script} failed");
}

/// A shape's lines: the adapters, and the frozen product in several ways (`others`: name and device).
fn report(bench: &Bench, others: &[(&str, Bench)], bandwidth: f64, (name, d_out, d_in): (&str, usize, usize)) {
    let tokens = bench.options.tokens;
    let weight = |format| {
        let bytes = stored(format, d_out, d_in);
        StoredWeight::new(format, d_out, d_in, bytes, RowOrder::Natural).expect("a weight")
    };
    let plain = weight(Format::Bf16);
    let frozen = bench.frozen(&plain);
    for (rank, lora_heads) in ADAPTERS {
        let adapted = bench.adapted(&plain, rank, lora_heads);
        let columns = |pass: usize, bytes: usize| {
            let (more, floor) = (100.0 * (adapted[pass] / frozen[pass] - 1.0), bytes as f64 / bandwidth);
            let [frozen, adapted, floor] = [frozen[pass], adapted[pass], floor].map(|seconds| 1e6 * seconds);
            format!("{frozen:>6.0} us{adapted:>6.0} us{more:>7.1} %{floor:>6.0} us")
        };
        let (forward, backward) = (columns(0, 2 * tokens * d_in), columns(1, 2 * tokens * (d_in + d_out)));
        println!("{name:<8} {rank:>4} {lora_heads:>5}  {forward}  {backward}");
    }
    let speeds = |way: &str, passes: Passes| {
        let [forward, backward] = passes.map(|seconds| 2e-12 * (tokens * d_in * d_out) as f64 / seconds);
        println!("{name:<8} {way}: {forward:.0} and {backward:.0} TFLOP/s");
    };
    speeds("the frozen product", frozen);
    for (way, other) in others {
        speeds(way, other.frozen(&plain));
    }
    speeds("from Q4_1", bench.frozen(&weight(Format::Q4_1)));
}

fn main() {
    let options = Options::parse();
    let open = || match Gpu::open(0) {
        Ok(gpu) => gpu,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    };
    let gpu = open();
    let has_wgmma = gpu.instructions() == Instructions::Wgmma;
    let bench = |gpu| Bench::new(Cuda::new(gpu), options);
    let mut others = vec![("by our kernels", bench(open().without_library()))];
    if has_wgmma {
        others.push(("without wgmma", bench(open().without_library().without_wgmma())));
    }
    let bench = bench(gpu);
    let bandwidth = bench.bandwidth();
    let device = bench.device.describe();
    println!("{device}, {} tokens; a copy moves {:.2} TB/s", options.tokens, 1e-12 * bandwidth);
    let half = ["frozen", "hydra", "more", "floor"].map(|column| format!("{column:>9}")).concat();
    println!("{:<8} {:>4} {:>5}  {half}  {half}", "", "rank", "heads");
    for (name, d_out, d_in) in SHAPES {
        report(&bench, &others, bandwidth, (name, options.width(d_out), options.width(d_in)));
    }
    torch(options);
}
