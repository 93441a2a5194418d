//! Gradients are the loss's slope, in bf16 nearly so, and training has the same bits on any number of threads.

use super::*;
use approx::relative_eq;
use hydra_kernels::Bf16Isa;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::HashMap;

/// State files are how a test reads the gradient of a step with dropout (the first moment after one step is a tenth of
/// it), and how it moves the parameters.
fn read_state(dir: &Path, name: &str) -> Vec<f32> {
    let bytes = std::fs::read(dir.join(STATE_FILE)).unwrap();
    bytemuck::pod_collect_to_vec(SafeTensors::deserialize(&bytes).unwrap().tensor(name).unwrap().data())
}

fn write_state(dir: &Path, params: &[f32]) {
    let zeros = vec![0f32; params.len()];
    let view = |values| TensorView::new(Dtype::F32, vec![params.len()], bytemuck::cast_slice(values)).unwrap();
    let views = [("params", view(params)), ("exp_avg", view(&zeros)), ("exp_avg_sq", view(&zeros))];
    let metadata = HashMap::from([("steps".to_string(), "0".to_string())]);
    std::fs::write(dir.join(STATE_FILE), safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

#[test]
fn gradients_are_the_slope_of_the_loss() {
    use Projection::*;
    let checkpoint = Checkpoint::open(case().join("model")).unwrap();
    let model = Model::load(cpu(Precision::F32), &checkpoint).unwrap();
    let sequences: Vec<_> = [9, 40, 70].iter().map(|&len| sequence(len, len as u32)).collect();
    let kinds = [
        (Method::Hydra, GateKind::Router, 3),
        (Method::Hydra, GateKind::Label, 3),
        (Method::Hydra, GateKind::Uniform, 2),
        (Method::Lora, GateKind::One, 1),
        (Method::Split, GateKind::Label, 3),
    ];
    let targets = [Projection::ALL.to_vec(), vec![Gate, Up, Down], vec![Down], vec![O], vec![V]];
    for (method, gate, lora_heads) in kinds {
        for (targets, dropout) in targets.iter().flat_map(|t| [(t, 0.0), (t, 0.3)]) {
            let config = AdapterConfig {
                method,
                gate,
                rank: 3,
                lora_heads,
                alpha: 6.0,
                dropout,
                targets: targets.clone(),
                labels: (0..lora_heads).map(|i| format!("label {i}")).collect(),
                ..Default::default()
            };
            let adapter = Adapter::init(model.config(), config, 5).unwrap();
            let options = TrainOptions {
                checkpointing: ActivationCheckpointing::Off,
                max_tokens: 80,
                clip: None,
                adam: AdamW::default(),
                seed: 8,
            };
            let dir = tempfile::tempdir().unwrap();
            // B is zero at first: a few steps, so that every gradient is exercised.
            let mut trainer = Trainer::new(&model, &adapter, options).unwrap();
            for _ in 0..5 {
                trainer.step(&sequences, 0.02).unwrap();
            }
            trainer.save_state(dir.path()).unwrap();
            let params = read_state(dir.path(), "params");
            let mut loss_at = |params: &[f32]| {
                write_state(dir.path(), params);
                trainer.load_state(dir.path()).unwrap();
                let loss = trainer.step(&sequences, 0.0).unwrap().loss;
                trainer.save_state(dir.path()).unwrap();
                (loss, read_state(dir.path(), "exp_avg"))
            };
            let gradient: Vec<f64> = loss_at(&params).1.iter().map(|&m| f64::from(m) * 10.0).collect();
            let square: f64 = gradient.iter().map(|g| g * g).sum();
            // Far enough for f32 to see, near enough for the slope: the loss moves by about 2e-3 each way.
            let step = 2e-3 / square;
            let moved = |sign: f64| -> Vec<f32> {
                params.iter().zip(&gradient).map(|(&p, g)| (f64::from(p) + sign * step * g) as f32).collect()
            };
            let slope = (loss_at(&moved(1.0)).0 - loss_at(&moved(-1.0)).0) / (2.0 * step);
            let case = format!("{method:?} {gate:?} {targets:?} dropout {dropout}");
            assert!(relative_eq!(slope, square, max_relative = 0.01), "{case}: slope {slope}, |gradient|² {square}");
        }
    }
}

/// Every parameter, layer by layer.
fn flat(adapter: &Adapter) -> Vec<f32> {
    let pairs = adapter.layers.iter().flatten().flatten();
    pairs.flat_map(|pair| pair.a.iter().chain(&pair.b).copied()).collect()
}

/// On every instruction set: what bf16 operands do to a gradient is rounding.
#[test]
fn gradients_in_bf16_point_where_those_in_f32_do() {
    ARCHITECTURES.into_iter().for_each(same_direction);
}

fn same_direction(name: &str) {
    let (checkpoint, adapter) = open(&case_of(name));
    let sequences = [sequence(150, 1), sequence(7, 2), sequence(290, 3)];
    let gradient = |options_cpu: CpuOptions| {
        let model = Model::load(Cpu::new(options_cpu).unwrap(), &checkpoint).unwrap();
        let mut trainer = Trainer::new(&model, &adapter, options(448)).unwrap();
        let (report, gradient) = trainer.gradients(&sequences).unwrap();
        (report.loss, flat(&gradient))
    };
    let (want_loss, want) = gradient(CpuOptions { threads: Some(2), ..CpuOptions::default() });
    for isa in Bf16Isa::available() {
        let precision = Precision::Bf16;
        let (loss, got) = gradient(CpuOptions {
            threads: Some(2),
            precision,
            bf16_isa: Some(isa),
            isa: None,
            ..CpuOptions::default()
        });
        assert_relative_eq!(loss, want_loss, max_relative = 2e-3);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let (length, want_length) = (dot(&got, &got).sqrt(), dot(&want, &want).sqrt());
        let cosine = dot(&got, &want) / (length * want_length);
        assert!(cosine > 0.9995, "{name} {isa:?}: cosine {cosine}");
        assert_relative_eq!(length, want_length, max_relative = 1e-2);
    }
}

/// Dropout, accumulation over passes and both ways to keep activations included.
#[test]
fn training_has_the_same_bits_on_any_number_of_threads() {
    ARCHITECTURES.into_iter().for_each(same_bits);
}

fn same_bits(name: &str) {
    let (checkpoint, mut adapter) = open(&case_of(name));
    adapter.config.dropout = 0.1;
    let sequences = [sequence(150, 1), sequence(7, 2), sequence(290, 3), sequence(33, 4)];
    for precision in [Precision::F32, Precision::Bf16] {
        let trained = |threads: usize, checkpointing: ActivationCheckpointing| {
            let options_cpu = CpuOptions { threads: Some(threads), precision, ..CpuOptions::default() };
            let model = Model::load(Cpu::new(options_cpu).unwrap(), &checkpoint).unwrap();
            let mut trainer = Trainer::new(&model, &adapter, TrainOptions { checkpointing, ..options(300) }).unwrap();
            for _ in 0..2 {
                trainer.step(&sequences, 1e-3).unwrap();
            }
            flat(&trainer.adapter().unwrap()).iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        };
        let one = trained(1, ActivationCheckpointing::Off);
        for threads in [2, 3, 5] {
            assert!(trained(threads, ActivationCheckpointing::Off) == one, "{name}, {precision:?}, {threads} threads");
        }
        assert!(trained(2, ActivationCheckpointing::EveryLayer) == one, "{name}, {precision:?}, recomputed");
    }
}
