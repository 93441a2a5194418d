//! How a run trains: which records each step takes, and at which learning rate.
//!
//! Step s (from 0) takes records s·k .. (s + 1)·k of the shuffled stream (`data/order.rs`), k = batch · grad_accum, at the rate
//!
//! ```text
//! lr · (s + 1) / w                              while s < w, the warm-up
//! lr · ½ (1 + cos(π p)), lr · (1 − p), or lr    then, with p = (s − w) / max(1, steps − w)
//! ```
//! What a step does depends on its number alone, so a resumed run continues bit for bit.

use super::choices::LrSchedule;
use super::spec::RunSpec;
use crate::data::encode::Encoded;
use crate::data::order::Order;
use crate::options::{Count, NonNegative};
use anyhow::{Context, Result, bail};
use hydra_runtime::backend::AdamW;
use hydra_runtime::batch::{self, Sequence};
use hydra_runtime::train::{ActivationCheckpointing, Rates, TrainOptions};

/// The default of `--warmup`: a share of all steps.
pub const WARMUP: f64 = 0.03;

/// The most records of a run's stream, which is held in memory.
const MOST_RECORDS: usize = 1 << 28;

/// How to train.
#[derive(Clone, Copy, Debug)]
pub struct TrainConfig {
    /// Records in one pass through the model.
    pub batch: usize,
    /// Batches per step.
    pub grad_accum: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Peak learning rate of the routers, if it differs.
    pub router_lr: Option<f64>,
    /// Learning-rate schedule after warm-up.
    pub schedule: LrSchedule,
    /// Warm-up steps.
    pub warmup: usize,
    /// Largest global gradient norm; 0 for no clipping.
    pub clip: f32,
    /// Number of steps.
    pub steps: usize,
    /// Records that the steps take from the stream; the last step may get fewer than the others.
    pub records: usize,
    /// Seed of data order and dropout.
    pub seed: u64,
    /// Whether the records are shuffled.
    pub shuffle: bool,
    /// Gradient checkpointing: less memory, more time.
    pub recompute: bool,
}

impl TrainConfig {
    /// The options of `spec` for a training set of `records`, defaults filled in: the published code's.
    pub fn new(spec: &RunSpec, records: usize) -> Result<Self> {
        let training = &spec.training;
        let batch = training.batch.map_or(1, Count::get);
        let grad_accum = training.grad_accum.map_or(if training.batch.is_none() { 8 } else { 1 }, Count::get);
        let Some(each) = batch.checked_mul(grad_accum) else { bail!("--batch times --grad-accum is too large") };
        let taken = match (training.steps, training.epochs) {
            (Some(steps), _) => steps.get().checked_mul(each).context("--steps is too large for such batches")?,
            (None, epochs) => whole_records(epochs.map_or(1.0, NonNegative::get) * records as f64),
        };
        if taken == 0 {
            bail!("--epochs 0: expected a number above 0, as there would be nothing to train");
        }
        if taken > MOST_RECORDS {
            bail!("a run over {taken} records: expected at most {MOST_RECORDS}; lower --steps or --epochs");
        }
        let steps = taken.div_ceil(each);
        let warmup = match training.warmup.map_or(WARMUP, NonNegative::get) {
            0.0 => 0,
            share if share < 1.0 => ((share * steps as f64).round_ties_even() as usize).max(1),
            warmup => warmup.round() as usize,
        };
        Ok(Self {
            batch,
            grad_accum,
            lr: training.lr.map_or(2e-4, NonNegative::get),
            router_lr: training.router_lr.map(NonNegative::get),
            schedule: training.schedule.unwrap_or(LrSchedule::Cosine),
            warmup,
            clip: training.clip.map_or(1.0, NonNegative::f32),
            steps,
            records: taken,
            seed: spec.seed(),
            shuffle: !spec.data.no_shuffle.unwrap_or(false),
            recompute: training.recompute.unwrap_or(false),
        })
    }

    /// The learning rates of step `s`, from 0.
    pub fn rates(&self, s: usize) -> Rates {
        let router = self.rate(s, self.router_lr.unwrap_or(self.lr));
        Rates { lr: self.rate(s, self.lr) as f32, router: router as f32 }
    }

    /// The learning rate of step `s`, from 0, where the peak is `lr`.
    pub fn rate(&self, s: usize, lr: f64) -> f64 {
        let (steps, warmup) = (self.steps, self.warmup);
        if s < warmup {
            return lr * (s + 1) as f64 / warmup as f64;
        }
        let p = (s - warmup) as f64 / steps.saturating_sub(warmup).max(1) as f64;
        lr * match self.schedule {
            LrSchedule::Constant => 1.0,
            LrSchedule::Linear => 1.0 - p,
            LrSchedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * p).cos()),
        }
    }

    /// Indices of all records of the run, in the order in which the steps take them.
    pub fn stream(&self, data: &Encoded) -> Vec<usize> {
        Order::new(data.sequences.len(), self.shuffle.then_some(self.seed)).take(0, self.records)
    }

    /// The records of step `s`, out of the run's `stream`.
    pub fn sequences(&self, data: &Encoded, stream: &[usize], s: usize) -> Vec<Sequence> {
        self.of_step(stream, s).iter().map(|&i| data.sequences[i].clone()).collect()
    }

    fn of_step<'s>(&self, stream: &'s [usize], s: usize) -> &'s [usize] {
        let each = self.batch * self.grad_accum;
        &stream[(s * each).min(stream.len())..((s + 1) * each).min(stream.len())]
    }

    /// Passes of the step that has the most.
    pub fn passes(&self, stream: &[usize], data: &Encoded, options: &TrainOptions) -> Result<usize> {
        let passes = |s| {
            let lengths: Vec<_> = self.of_step(stream, s).iter().map(|&i| data.sequences[i].tokens.len()).collect();
            batch::groups(&lengths, options.max_tokens).map(|groups| groups.len())
        };
        let most = (0..self.steps).try_fold(1, |most, s| passes(s).map(|passes| passes.max(most)))?;
        Ok(most)
    }

    /// The trainer's settings: its passes have room for the run's largest batch.
    pub fn options(&self, stream: &[usize], data: &Encoded) -> TrainOptions {
        let tokens = |batch: &[usize]| batch.iter().map(|&i| data.sequences[i].tokens.len()).sum();
        let largest = |s| self.of_step(stream, s).chunks(self.batch).map(tokens).max().unwrap_or(0);
        TrainOptions {
            checkpointing: match self.recompute {
                true => ActivationCheckpointing::EveryLayer,
                false => ActivationCheckpointing::Off,
            },
            max_tokens: (0..self.steps).map(largest).max().unwrap_or(0),
            clip: (self.clip > 0.0).then_some(self.clip),
            adam: AdamW::default(),
            seed: self.seed,
        }
    }
}

/// A part of a record counts as one, unless it comes from rounding: 1.1 times 100 is 110.00000000000001.
fn whole_records(records: f64) -> usize {
    let nearest = records.round();
    let rounded = (records - nearest).abs() <= 1e-12 * records;
    (if rounded { nearest } else { records.ceil() }) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_are_whole_records() {
        let taken = |epochs: f64, records: usize| {
            let mut spec = RunSpec::default();
            spec.training.epochs = Some(NonNegative::new(epochs));
            TrainConfig::new(&spec, records).map(|config| config.records).ok()
        };
        for (epochs, records, wanted) in
            [(1.1, 100, 110), (0.07, 100, 7), (1.0, 3, 3), (0.5, 3, 2), (1.001, 100, 101), (1e-15, 7, 1)]
        {
            assert_eq!(taken(epochs, records), Some(wanted), "{epochs} of {records}");
        }
        // A record more where it was asked for, however many there are.
        assert_eq!(taken(1.1, 200_000_000), Some(220_000_000));
        assert_eq!(taken(1.100_000_001, 200_000_000), Some(220_000_001));
        assert!(taken(0.0, 7).is_none() && taken(1e30, 7).is_none());
    }

    fn config(schedule: LrSchedule) -> TrainConfig {
        TrainConfig {
            batch: 2,
            grad_accum: 2,
            lr: 1.0,
            router_lr: None,
            schedule,
            warmup: 2,
            clip: 0.0,
            steps: 6,
            records: 22,
            seed: 0,
            shuffle: false,
            recompute: false,
        }
    }

    #[test]
    fn rates() {
        let rates = |schedule| (0..6).map(|s| config(schedule).rate(s, 1.0)).collect::<Vec<_>>();
        assert_eq!(rates(LrSchedule::Constant), [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(rates(LrSchedule::Linear), [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]);
        let cosine = rates(LrSchedule::Cosine);
        assert_eq!(cosine[..3], [0.5, 1.0, 1.0]);
        assert!((cosine[4] - 0.5).abs() < 1e-12 && cosine[5] > 0.0);
    }

    #[test]
    fn the_last_step_may_get_fewer_records() {
        let stream: Vec<usize> = (0..22).collect();
        let config = config(LrSchedule::Constant);
        assert_eq!(config.of_step(&stream, 1), [4, 5, 6, 7]);
        assert_eq!(config.of_step(&stream, 5), [20, 21]);
    }
}
