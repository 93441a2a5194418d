//! A frozen projection alone and with Hydra on a GPU, forward and backward, at LLaMA-2-7B's shapes: what the adapter
//! costs.
//!
//! Sampled elements of the frozen products' results are held to f64 sums before anything of a shape is printed.
//! Wall-clock time over many calls, with one wait at the end. Beside the adapter's time stands its floor: reading x
//! once forward, dy and x once backward, at the speed of a copy on the device. The frozen product is done in the way
//! that is fastest, and then by our kernels alone, and by them without Hopper's `wgmma` where there is that; and with W
//! in blocks of 4 bits, which are decoded first. Needs `--features cuda` and a device: `cargo bench --features cuda
//! --bench gpu`. If HYDRA_PYTHON names a Python with PyTorch, `gpu.py` follows: cuBLAS, and the adapter in PyTorch, on
//! the same card.

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
const TOKENS: usize = 4096;
/// (rank, heads)
const ADAPTERS: [(usize, usize); 4] = [(8, 3), (8, 4), (16, 3), (16, 4)];

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

/// Seconds of a call: the fastest of five rounds of twenty.
fn seconds(device: &Device, probe: &Buffer, mut call: impl FnMut()) -> f64 {
    let wait = || device.download(&mut [0.0], probe).expect("the work is done");
    let mut round = |calls: u32| {
        let start = Instant::now();
        (0..calls).for_each(|_| call());
        wait();
        start.elapsed().as_secs_f64() / f64::from(calls)
    };
    round(3);
    (0..5).map(|_| round(20)).fold(f64::INFINITY, f64::min)
}

/// Bytes that a copy on the device reads and writes in a second.
fn bandwidth(device: &Device) -> f64 {
    let len = 64 << 20;
    let (from, mut to) = (device.buffer(len).expect("memory"), device.buffer(len).expect("memory"));
    let probe = device.buffer(1).expect("memory");
    8.0 * len as f64 / seconds(device, &probe, || device.copy(&mut to, 0, &from, len).expect("a copy"))
}

/// Holds 200 elements of a product [TOKENS, columns] to f64 sums of `terms` terms.
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

/// Seconds of the frozen product with this matrix, forward and backward, after a look at its results.
fn frozen(device: &Device, stored: &StoredWeight, host_x: &[f32], host_dy: &[f32]) -> [f64; 2] {
    let weight = stored.weight();
    let (d_out, d_in) = (weight.rows(), weight.cols());
    let mut w = vec![0.0; d_out * d_in];
    for (row, w) in w.chunks_exact_mut(d_in).enumerate() {
        weight.decode_row(Isa::detect(), row, 0, w);
    }
    let (weight, probe) = (&device.matrix(stored.clone()).expect("memory"), device.buffer(1).expect("memory"));
    let (x, dy) = (&put_activations(device, host_x), put_activations(device, host_dy));
    let (mut y, mut dx) = (put_activations(device, host_dy), put_activations(device, host_x));
    let tokens = TOKENS;
    let mut forward = || {
        let output = LinearOutput::Activations { y: &mut y, residual: None };
        device.linear(Linear { output, tokens, x, weight, adapter: None }).expect("a product");
    };
    let mut backward = || {
        let dx = Some((AnyBufferMut::Activations(&mut dx), Accumulate::Overwrite));
        let dy = AnyBuffer::Activations(&dy);
        let args = LinearBackward { dx, dparams: None, tokens, dy, x, weight, adapter: None };
        device.linear_backward(args).expect("a product");
    };
    let seconds = [seconds(device, &probe, &mut forward), seconds(device, &probe, &mut backward)];
    // A block's values are rounded for the product, too.
    let rounded = |x: f32| f64::from(bf16::from_f32(x));
    let mut got = vec![0.0; TOKENS * d_out];
    device.download_activations(&mut got, &y).expect("a product");
    check("y", &got, d_out, d_in, |t, o, c| rounded(host_x[t * d_in + c]) * rounded(w[o * d_in + c]));
    got.resize(TOKENS * d_in, 0.0);
    device.download_activations(&mut got, &dx).expect("a product");
    check("dx", &got, d_in, d_out, |t, c, o| rounded(host_dy[t * d_out + o]) * rounded(w[o * d_in + c]));
    seconds
}

/// PyTorch's part, if a Python is named.
fn torch() {
    let Some(python) = std::env::var_os("HYDRA_PYTHON") else { return };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/gpu.py");
    let status = Command::new(python).args([script, "--tokens", &TOKENS.to_string()]).status();
    assert!(status.is_ok_and(|status| status.success()), "HYDRA_PYTHON: {script} failed");
}

fn main() {
    let open = || match Gpu::open(0) {
        Ok(gpu) => gpu,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    };
    let gpu = open();
    let kernels = Cuda::new(open().without_library());
    let plain =
        (gpu.instructions() == Instructions::Wgmma).then(|| Cuda::new(open().without_library().without_wgmma()));
    let device = Cuda::new(gpu);
    let bandwidth = bandwidth(&device);
    println!("{}, {TOKENS} tokens; a copy moves {:.2} TB/s", device.describe(), 1e-12 * bandwidth);
    let half = ["frozen", "hydra", "more", "floor"].map(|column| format!("{column:>9}")).concat();
    println!("{:<8} {:>4} {:>5}  {half}  {half}", "", "rank", "heads");
    for (name, d_out, d_in) in SHAPES {
        let [bytes, blocks] = [Format::Bf16, Format::Q4_1].map(|format| stored(format, d_out, d_in));
        let stored = StoredWeight::new(Format::Bf16, d_out, d_in, bytes, RowOrder::Natural).expect("a weight");
        let weight = &device.matrix(stored.clone()).expect("memory");
        let (host_x, host_dy) = (values(TOKENS * d_in, 1, 1.0), values(TOKENS * d_out, 2, 1.0));
        let (x, dy) = (&put_activations(&device, &host_x), put_activations(&device, &host_dy));
        let (mut y, mut dx) = (put_activations(&device, &host_dy), put_activations(&device, &host_x));
        let tokens = TOKENS;

        let probe = device.buffer(1).expect("memory");
        let [forward, backward] = frozen(&device, &stored, &host_x, &host_dy);
        for (rank, lora_heads) in ADAPTERS {
            let shape = HydraShape { d_in, d_out, rank, lora_heads, per_head_a: false, router: true };
            let (a, b) = (shape.stacked_rows() * d_in, d_out * shape.mixed_width());
            let (gate, routing) = (GateKind::Router, Routing::default());
            let slot = AdapterSlot { shape, gate, routing, scale: 4.0, a: 0..a, b: a..a + b };
            let buffer = || device.buffer(a + b).expect("memory");
            let (params, mut dparams) = (put(&device, buffer(), &values(a + b, 4, 0.05)), buffer());
            let mut adapter_state = device.buffer(TOKENS * shape.state_width()).expect("memory");
            let (dropout, head_dropout, balance) = (None, None, 0.0);
            let args = AdapterArgs { slot: &slot, params: &params, labels: &[], dropout, head_dropout, balance };
            let adapted_forward = seconds(&device, &probe, || {
                let adapter = Some((&args, &mut adapter_state));
                let output = LinearOutput::Activations { y: &mut y, residual: None };
                device.linear(Linear { output, tokens, x, weight, adapter }).expect("a product");
            });
            let adapted_backward = seconds(&device, &probe, || {
                let dx = Some((AnyBufferMut::Activations(&mut dx), Accumulate::Overwrite));
                let (dy, dparams) = (AnyBuffer::Activations(&dy), Some(&mut dparams));
                let adapter = Some((&args, &adapter_state));
                let args = LinearBackward { dx, dparams, tokens, dy, x, weight, adapter };
                device.linear_backward(args).expect("a product");
            });
            let columns = |frozen: f64, adapted: f64, bytes: usize| {
                let (more, floor) = (100.0 * (adapted / frozen - 1.0), bytes as f64 / bandwidth);
                format!("{:>6.0} us{:>6.0} us{more:>7.1} %{:>6.0} us", 1e6 * frozen, 1e6 * adapted, 1e6 * floor)
            };
            println!(
                "{name:<8} {rank:>4} {lora_heads:>5}  {}  {}",
                columns(forward, adapted_forward, 2 * TOKENS * d_in),
                columns(backward, adapted_backward, 2 * TOKENS * (d_in + d_out))
            );
        }
        let teraflops = |seconds: f64| 2e-12 * (TOKENS * d_in * d_out) as f64 / seconds;
        println!("{name:<8} the frozen product: {:.0} and {:.0} TFLOP/s", teraflops(forward), teraflops(backward));
        let [forward, backward] = frozen(&kernels, &stored, &host_x, &host_dy);
        println!("{name:<8} by our kernels: {:.0} and {:.0} TFLOP/s", teraflops(forward), teraflops(backward));
        if let Some(plain) = &plain {
            let [forward, backward] = frozen(plain, &stored, &host_x, &host_dy);
            println!("{name:<8} without wgmma: {:.0} and {:.0} TFLOP/s", teraflops(forward), teraflops(backward));
        }
        let blocks = StoredWeight::new(Format::Q4_1, d_out, d_in, blocks, RowOrder::Natural).expect("a weight");
        let [forward, backward] = frozen(&device, &blocks, &host_x, &host_dy);
        println!("{name:<8} from Q4_1: {:.0} and {:.0} TFLOP/s", teraflops(forward), teraflops(backward));
    }
    torch();
}
