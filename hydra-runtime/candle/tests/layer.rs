//! The layer against the same computation in candle's own operations, forward and backward.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::ops::softmax;
use hydra_candle::{FrozenWeight, HydraLinear};
use hydra_runtime::adapter::{Adapter, AdapterConfig, AdapterPair, GateKind, HeadInit, Method};
use hydra_runtime::backend::cpu::{Cpu, CpuOptions};
use hydra_runtime::projection::{ByProjection, Projection};
use std::sync::Arc;

const D_IN: usize = 64;
const D_OUT: usize = 48;
const RANK: usize = 3;

fn cpu() -> Arc<Cpu> {
    Arc::new(Cpu::new(CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap())
}

/// Values in ±0.5 that look random, the same each time.
fn values(len: usize, seed: u32) -> Vec<f32> {
    let value = |i: usize| (i as u32 + 1).wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(40_503));
    (0..len)
        .map(|i| ((value(i) ^ value(i) >> 15).wrapping_mul(2_246_822_519) >> 8) as f32 / (1 << 24) as f32 - 0.5)
        .collect()
}

fn config(method: Method, gate: GateKind, lora_heads: usize) -> AdapterConfig {
    let head_init = HeadInit::Zero;
    AdapterConfig { method, gate, lora_heads, rank: RANK, alpha: 6.0, head_init, ..AdapterConfig::default() }
}

fn pair(config: &AdapterConfig) -> AdapterPair {
    let heads = config.lora_heads;
    let a_rows = if config.method == Method::Split { heads * RANK } else { RANK };
    let rows = a_rows + if config.gate == GateKind::Router { heads } else { 0 };
    AdapterPair { d_in: D_IN, d_out: D_OUT, a: values(rows * D_IN, 1), b: values(D_OUT * heads * RANK, 2) }
}

/// The same layer in candle's operations.
fn plain(
    config: &AdapterConfig,
    weight: &Tensor,
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    labels: &[u32],
) -> Result<Tensor> {
    let (heads, tokens) = (config.lora_heads, x.dim(0)?);
    let per_head_a = config.method == Method::Split;
    let a_rows = if per_head_a { heads * RANK } else { RANK };
    let down = x.matmul(&a.narrow(0, 0, a_rows)?.t()?)?;
    let gate = match config.gate {
        GateKind::Router => softmax(&x.matmul(&a.narrow(0, a_rows, heads)?.t()?)?, 1)?,
        GateKind::Uniform => Tensor::full(1.0 / heads as f32, (tokens, heads), &Device::Cpu)?,
        GateKind::One => Tensor::ones((tokens, heads), DType::F32, &Device::Cpu)?,
        GateKind::Label => {
            let weight = |(t, e): (usize, usize)| if labels[t] as usize == e { 1.0f32 } else { 0.0 };
            let weights = (0..tokens).flat_map(|t| (0..heads).map(move |e| (t, e))).map(weight);
            Tensor::from_iter(weights.collect::<Vec<_>>(), &Device::Cpu)?.reshape((tokens, heads))?
        }
    };
    let mut y = x.matmul(&weight.t()?)?;
    for e in 0..heads {
        let lora_down = down.narrow(1, if per_head_a { e * RANK } else { 0 }, RANK)?;
        let up = lora_down.matmul(&b.narrow(1, e * RANK, RANK)?.t()?)?;
        y = (y + (up.broadcast_mul(&gate.narrow(1, e, 1)?)? * f64::from(config.scale()))?)?;
    }
    Ok(y)
}

fn assert_near(got: &Tensor, want: &Tensor, tolerance: f32) {
    assert_eq!(got.dims(), want.dims());
    let both = [got, want].map(|x| x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap());
    let largest = both[1].iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    assert!(largest > 0.0, "nothing to compare");
    for (got, want) in both[0].iter().zip(&both[1]) {
        assert!((got - want).abs() <= tolerance * largest, "{got} instead of {want}");
    }
}

/// y and the gradients of x, [A; R] and B, of the layer and of candle's operations.
fn compare(config: &AdapterConfig, frozen: FrozenWeight, weight: &Tensor, tokens: usize, dtype: DType, tolerance: f32) {
    let pair = pair(config);
    let layer = HydraLinear::new(cpu(), frozen, config, &pair).unwrap();
    let labels: Vec<u32> = (0..tokens as u32).map(|t| t % config.lora_heads as u32).collect();
    let x = Tensor::from_vec(values(tokens * D_IN, 3), (tokens, D_IN), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    let x = Var::from_tensor(&x).unwrap();
    let y = layer.forward_labels(&x, &labels).unwrap();
    assert_eq!(y.dtype(), dtype);
    // Two layers' worth of use, so that gradients come from a function that isn't linear.
    let loss = |y: &Tensor| y.to_dtype(DType::F32)?.sqr()?.sum_all();
    let gradients = loss(&y).unwrap().backward().unwrap();

    let exact = Var::from_tensor(&x.to_dtype(DType::F32).unwrap()).unwrap();
    let [a, b] = layer.vars().map(|var| Var::from_tensor(&var.copy().unwrap()).unwrap());
    let want = plain(config, weight, &exact, &a, &b, &labels).unwrap();
    let expected = loss(&want).unwrap().backward().unwrap();
    assert_near(&y, &want, tolerance);
    assert_near(gradients.get(&x).unwrap(), expected.get(&exact).unwrap(), tolerance);
    for (got, want) in layer.vars().iter().zip([&a, &b]) {
        assert_near(gradients.get(got).unwrap(), expected.get(want).unwrap(), tolerance);
    }
    // For inference nothing is kept.
    let frozen = layer.frozen().forward_labels(&x.detach(), &labels).unwrap();
    assert!(!frozen.track_op());
    assert_near(&frozen, &y, 0.0);
}

fn weight() -> Tensor {
    Tensor::from_vec(values(D_OUT * D_IN, 4), (D_OUT, D_IN), &Device::Cpu).unwrap()
}

const KINDS: [(Method, GateKind, usize); 5] = [
    (Method::Hydra, GateKind::Router, 4),
    (Method::Hydra, GateKind::Uniform, 3),
    (Method::Hydra, GateKind::Label, 3),
    (Method::Split, GateKind::Uniform, 2),
    (Method::Lora, GateKind::One, 1),
];

#[test]
fn gradients_are_those_of_candles_own_operations() {
    for (method, gate, heads) in KINDS {
        for tokens in [1, 3, 37, 300] {
            let weight = weight();
            compare(
                &config(method, gate, heads),
                weight.clone().try_into().unwrap(),
                &weight,
                tokens,
                DType::F32,
                1e-4,
            );
        }
    }
}

#[test]
fn activations_in_bf16() {
    let weight = weight();
    compare(
        &config(Method::Hydra, GateKind::Router, 4),
        weight.clone().try_into().unwrap(),
        &weight,
        37,
        DType::BF16,
        0.02,
    );
}

#[test]
fn weights_in_every_format() {
    let config = config(Method::Hydra, GateKind::Router, 4);
    for dtype in [DType::BF16, DType::F16] {
        let stored = weight().to_dtype(dtype).unwrap();
        compare(
            &config,
            stored.clone().try_into().unwrap(),
            &stored.to_dtype(DType::F32).unwrap(),
            37,
            DType::F32,
            1e-4,
        );
    }
    for dtype in [GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q5_0, GgmlDType::Q5_1] {
        let stored = Arc::new(QTensor::quantize(&weight(), dtype).unwrap());
        let decoded = stored.dequantize(&Device::Cpu).unwrap();
        compare(&config, stored.try_into().unwrap(), &decoded, 37, DType::F32, 1e-4);
    }
}

/// Batches, views and transposed inputs; the bias.
#[test]
fn shapes_of_x() {
    let config = config(Method::Hydra, GateKind::Router, 4);
    let bias = Tensor::from_vec(values(D_OUT, 5), D_OUT, &Device::Cpu).unwrap();
    let layer = HydraLinear::new(cpu(), weight().try_into().unwrap(), &config, &pair(&config)).unwrap();
    let flat = Tensor::from_vec(values(6 * D_IN, 3), (6, D_IN), &Device::Cpu).unwrap();
    let want = layer.forward(&flat).unwrap();
    let batch = flat.reshape((2, 3, D_IN)).unwrap();
    assert_near(&layer.forward(&batch).unwrap().reshape((6, D_OUT)).unwrap(), &want, 0.0);
    let transposed = flat.t().unwrap().contiguous().unwrap().t().unwrap();
    assert_near(&layer.forward(&transposed).unwrap(), &want, 0.0);
    let view = flat.narrow(0, 2, 3).unwrap();
    // Three tokens take the path for few tokens, whose sums have another order.
    assert_near(&layer.forward(&view).unwrap(), &want.narrow(0, 2, 3).unwrap(), 1e-5);
    assert_eq!(layer.forward(&flat.narrow(0, 0, 0).unwrap()).unwrap().dims(), [0, D_OUT]);
    let biased = layer.with_bias(bias.clone()).unwrap().forward(&flat).unwrap();
    assert_near(&biased, &want.broadcast_add(&bias).unwrap(), 1e-6);
}

/// Plain gradient descent on the parameters lowers the loss, and the trained values go back into a pair.
#[test]
fn training() {
    let config = config(Method::Hydra, GateKind::Router, 4);
    let start = pair(&config);
    let layer = HydraLinear::new(cpu(), weight().try_into().unwrap(), &config, &start).unwrap();
    let x = Tensor::from_vec(values(20 * D_IN, 3), (20, D_IN), &Device::Cpu).unwrap();
    let target = Tensor::from_vec(values(20 * D_OUT, 6), (20, D_OUT), &Device::Cpu).unwrap();
    let mut losses = Vec::new();
    for _ in 0..20 {
        let loss = (layer.forward(&x).unwrap() - &target).unwrap().sqr().unwrap().mean_all().unwrap();
        losses.push(loss.to_scalar::<f32>().unwrap());
        let gradients = loss.backward().unwrap();
        for var in layer.vars() {
            let step = (gradients.get(&var).unwrap() * 2.0).unwrap();
            var.set(&(var.as_tensor() - step).unwrap()).unwrap();
        }
    }
    assert!(losses[19] < 0.8 * losses[0], "{losses:?}");
    let trained = layer.pair().unwrap();
    assert!(trained != start && (trained.a.len(), trained.b.len()) == (start.a.len(), start.b.len()));
}

#[test]
fn what_does_not_fit_is_said() {
    let config = config(Method::Hydra, GateKind::Router, 4);
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    let layer = HydraLinear::new(cpu(), weight().try_into().unwrap(), &config, &pair(&config)).unwrap();
    let zeros = |shape: (usize, usize), dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    assert!(message(layer.forward(&zeros((2, 63), DType::F32))).contains("x of shape [2, 63]: expected 64 columns"));
    assert!(message(layer.forward(&zeros((2, 64), DType::F64))).contains("expected f32 or bf16 on the CPU"));
    let other = HydraLinear::new(cpu(), zeros((48, 63), DType::F32).try_into().unwrap(), &config, &pair(&config));
    assert!(other.map(|_| ()).unwrap_err().to_string().contains("the adapter is for [48, 64], the weight is [48, 63]"));
    assert!(FrozenWeight::try_from(Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap()).is_err());
    assert!(FrozenWeight::try_from(zeros((4, 4), DType::U32)).is_err());
    assert!(layer.with_bias(Tensor::zeros(47, DType::F32, &Device::Cpu).unwrap()).is_err());
    let label = AdapterConfig { gate: GateKind::Label, ..config.clone() };
    let layer = HydraLinear::new(cpu(), weight().try_into().unwrap(), &label, &pair(&label)).unwrap();
    let x = zeros((2, 64), DType::F32);
    assert!(message(layer.forward(&x)).contains("labels"));
    assert!(message(layer.forward_labels(&x, &[0, 1, 2])).contains("labels"));
    let message = message(layer.forward_labels(&x, &[3, 4]));
    assert!(message.contains("a label for head 4: the adapter has 4 heads"), "{message}");
    layer.forward_labels(&x, &[3, u32::MAX]).unwrap();
}

/// Of an adapter: its layers, its sizes, its numbers.
#[test]
fn adapters_that_do_not_fit_are_refused() {
    let config = config(Method::Hydra, GateKind::Router, 4);
    let weight: FrozenWeight = weight().try_into().unwrap();
    let message = |result: Result<HydraLinear>| result.map(|_| ()).unwrap_err().to_string();
    let adapter = Adapter { config: config.clone(), layers: vec![ByProjection::default()] };
    for layer in [0, 1] {
        let found = message(HydraLinear::from_adapter(cpu(), weight.clone(), &adapter, layer, Projection::Q));
        assert!(found.contains(&format!("the adapter has no q_proj in layer {layer}")), "{found}");
    }
    let changes: [fn(&mut AdapterPair); 3] =
        [|pair| pair.a.truncate(3), |pair| pair.b.push(0.0), |pair| pair.a.clear()];
    for change in changes {
        let mut pair = pair(&config);
        change(&mut pair);
        message(HydraLinear::new(cpu(), weight.clone(), &config, &pair));
    }
    let x = Tensor::zeros((2, D_IN), DType::F32, &Device::Cpu).unwrap();
    for temperature in [0.0, -1.0, f32::NAN] {
        let config = AdapterConfig { temperature, ..config.clone() };
        let layer = HydraLinear::new(cpu(), weight.clone(), &config, &pair(&config)).unwrap();
        let message = layer.forward(&x).unwrap_err().to_string();
        assert!(message.contains("temperature"), "{message}");
    }
}

/// NaN in a row of x or of the weight is found in what depends on it, and nowhere else.
#[test]
fn numbers_that_are_not() {
    let config = config(Method::Hydra, GateKind::Router, 4);
    let rows = |y: &Tensor| y.to_vec2::<f32>().unwrap();
    let (w, x) = (values(D_OUT * D_IN, 4), values(20 * D_IN, 3));
    let layer = |weight: Vec<f32>| {
        let weight = Tensor::from_vec(weight, (D_OUT, D_IN), &Device::Cpu).unwrap();
        HydraLinear::new(cpu(), weight.try_into().unwrap(), &config, &pair(&config)).unwrap()
    };
    let forward = |layer: &HydraLinear, x: Vec<f32>| {
        let x = Var::from_vec(x, (20, D_IN), &Device::Cpu).unwrap();
        let y = layer.forward(&x).unwrap();
        let gradients = y.sum_all().unwrap().backward().unwrap();
        (rows(&y), rows(gradients.get(&x).unwrap()))
    };
    let (plain, plain_dx) = forward(&layer(w.clone()), x.clone());
    let mut bad_x = x.clone();
    bad_x[7 * D_IN + 5] = f32::NAN;
    let (y, dx) = forward(&layer(w.clone()), bad_x);
    let mut bad_w = w;
    bad_w[11 * D_IN + 5] = f32::NAN;
    let (y_w, dx_w) = forward(&layer(bad_w), x);
    for t in 0..20 {
        if t == 7 {
            assert!(y[t].iter().all(|y| y.is_nan()));
        } else {
            assert_eq!((&y[t], &dx[t]), (&plain[t], &plain_dx[t]));
        }
        for o in 0..D_OUT {
            assert!(if o == 11 { y_w[t][o].is_nan() } else { y_w[t][o] == plain[t][o] });
        }
        assert!(dx_w[t].iter().enumerate().all(|(i, dx)| dx.is_nan() == (i == 5)));
    }
}
