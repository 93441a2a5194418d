//! A frozen projection alone and with Hydra on a GPU, forward and backward, at LLaMA-2-7B's shapes: what the adapter costs.
//!
//! Before a shape is timed, sampled elements of y are held to an f64 sum. Wall-clock time over many calls, with one wait at the
//! end. Needs `--features cuda` and a device: `cargo bench --features cuda --bench gpu`.

use half::bf16;
use hydra_kernels::shape::HydraShape;
use hydra_kernels::{Format, RowOrder, Weight};
use hydra_runtime::backend::cuda::{Cuda, Gpu};
use hydra_runtime::backend::{AdapterArgs, AdapterSlot, Backend, GateKind, Routing, Store};
use std::time::Instant;

type Device = Cuda<Gpu>;
type Buffer = <Device as Backend>::Buffer;

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

fn main() {
    let gpu = match Gpu::open(0) {
        Ok(gpu) => gpu,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    };
    let device = Cuda::new(gpu);
    println!("{}, {TOKENS} tokens", device.describe());
    println!(
        "{:<8} {:>4} {:>5}  {:>9} {:>9} {:>7}  {:>9} {:>9} {:>7}",
        "", "rank", "heads", "frozen", "hydra", "more", "frozen", "hydra", "more"
    );
    for (name, d_out, d_in) in SHAPES {
        let w: Vec<bf16> = values(d_out * d_in, 3, 0.05).into_iter().map(bf16::from_f32).collect();
        let bytes: Vec<u8> = w.iter().flat_map(|w| w.to_le_bytes()).collect();
        let weight = Weight::new(Format::Bf16, d_out, d_in, &bytes, RowOrder::Natural).expect("a weight");
        let matrix = device.matrix(weight).expect("memory");
        let (host_x, host_dy) = (values(TOKENS * d_in, 1, 1.0), values(TOKENS * d_out, 2, 1.0));
        let activation = |values: &[f32]| put(&device, device.activation(values.len()).expect("memory"), values);
        let (x, dy) = (activation(&host_x), activation(&host_dy));
        let (mut y, mut dx) = (activation(&host_dy), activation(&host_x));

        device.linear(&mut y, None, TOKENS, &x, &matrix, None).expect("a product");
        let mut got = vec![0.0; TOKENS * d_out];
        device.download(&mut got, &y).expect("a product");
        for i in (0..200).map(|i| i * 7919 * 13 % got.len()) {
            let (t, o) = (i / d_out, i % d_out);
            let term = |c| f64::from(bf16::from_f32(host_x[t * d_in + c])) * f64::from(w[o * d_in + c]);
            let want: f64 = (0..d_in).map(term).sum();
            // f32's sum over d_in, and the result's rounding to bf16.
            assert!(
                (f64::from(got[i]) - want).abs() < 1e-3 * (d_in as f64).sqrt() + want.abs() / 256.0,
                "y[{t}, {o}]: {}, wanted {want}",
                got[i]
            );
        }

        let probe = device.buffer(1).expect("memory");
        let forward = seconds(&device, &probe, || {
            device.linear(&mut y, None, TOKENS, &x, &matrix, None).expect("a product");
        });
        let backward = seconds(&device, &probe, || {
            let dx = Some((&mut dx, Store::Overwrite));
            device.linear_backward(dx, None, TOKENS, &dy, &x, &matrix, None).expect("a product");
        });
        for (rank, heads) in ADAPTERS {
            let shape = HydraShape { tokens: TOKENS, d_in, d_out, rank, heads, per_head_a: false, router: true };
            let (a, b) = (shape.stacked_rows() * d_in, d_out * shape.mixed());
            let (gate, routing) = (GateKind::Router, Routing::default());
            let slot = AdapterSlot { shape, gate, routing, scale: 4.0, a: 0..a, b: a..a + b };
            let buffer = || device.buffer(a + b).expect("memory");
            let (params, mut dparams) = (put(&device, buffer(), &values(a + b, 4, 0.05)), buffer());
            let mut hidden = device.buffer(TOKENS * shape.hidden()).expect("memory");
            let (dropout, head_dropout, balance) = (None, None, 0.0);
            let args = AdapterArgs { slot: &slot, params: &params, heads: &[], dropout, head_dropout, balance };
            let adapted_forward = seconds(&device, &probe, || {
                let adapter = Some((&args, &mut hidden));
                device.linear(&mut y, None, TOKENS, &x, &matrix, adapter).expect("a product");
            });
            let adapted_backward = seconds(&device, &probe, || {
                let (dx, adapter) = (Some((&mut dx, Store::Overwrite)), Some((&args, &hidden)));
                device.linear_backward(dx, Some(&mut dparams), TOKENS, &dy, &x, &matrix, adapter).expect("a product");
            });
            let more = |frozen: f64, adapted: f64| 100.0 * (adapted / frozen - 1.0);
            println!(
                "{name:<8} {rank:>4} {heads:>5}  {:>6.0} us {:>6.0} us {:>5.1} %  {:>6.0} us {:>6.0} us {:>5.1} %",
                1e6 * forward,
                1e6 * adapted_forward,
                more(forward, adapted_forward),
                1e6 * backward,
                1e6 * adapted_backward,
                more(backward, adapted_backward)
            );
        }
        let teraflops = |seconds: f64| 2e-12 * (TOKENS * d_in * d_out) as f64 / seconds;
        println!("{name:<8} the frozen product: {:.0} and {:.0} TFLOP/s", teraflops(forward), teraflops(backward));
    }
}
