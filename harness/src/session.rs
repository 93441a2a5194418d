//! A training run: steps over a stream of records, with metrics, held-out losses, saves, and a way to stop and go on.
//!
//! Step s (from 0) takes records s·k .. (s + 1)·k of the stream (`data/order.rs`), k = batch · grad_accum, at the rate
//!
//! ```text
//! lr · (s + 1) / w                              while s < w, the warm-up
//! lr · ½ (1 + cos(π p)), lr · (1 − p), or lr    then, with p = (s − w) / max(1, steps − w)
//! ```
//! so what a step does depends on its number alone, and a resumed run continues bit for bit.

use crate::data::encode::Encoded;
use crate::data::order::Order;
use crate::data::records::bad_json;
use crate::device::room_on;
use crate::heldout::{self, HeldOut};
use crate::progress::Progress;
use crate::{interrupt, output};
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use hydra_runtime::Error;
use hydra_runtime::adapter::{Adapter, AdapterConfig};
use hydra_runtime::atomic::write_atomically;
use hydra_runtime::backend::{AdamW, Backend};
use hydra_runtime::config::Config;
use hydra_runtime::model::Model;
use hydra_runtime::train::{ActivationCheckpointing, Rates, TrainOptions, Trainer};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// A line per step.
pub const METRICS: &str = "metrics.jsonl";
/// A line per held-out measurement.
pub const EVALS: &str = "evals.jsonl";

/// The learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Stays
    Constant,
    /// Falls to 0 in a line
    Linear,
    /// Falls to 0 along half a cosine
    Cosine,
}

/// How to train.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    /// Records that go through the model together.
    pub batch: usize,
    /// Batches a step.
    pub grad_accum: usize,
    /// The highest learning rate.
    pub lr: f64,
    /// That of the routers, if it is another.
    pub router_lr: Option<f64>,
    /// Their course.
    pub schedule: Schedule,
    /// Steps of warm-up.
    pub warmup: usize,
    /// The largest gradient norm; 0 for any.
    pub clip: f32,
    /// Steps.
    pub steps: usize,
    /// Records of the stream that the steps take; the last step may be short of some.
    pub records: usize,
    /// Of order and dropout.
    pub seed: u64,
    /// Whether the order is shuffled.
    pub shuffle: bool,
    /// Less memory, more time.
    pub recompute: bool,
}

/// A line of [`METRICS`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct StepLine {
    /// From 1.
    pub step: usize,
    /// Mean over the step's target tokens, before the update.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Before clipping.
    pub grad_norm: f64,
    /// Tokens of the step.
    pub tokens: usize,
    /// Over the step's wall-clock time.
    pub tokens_per_second: f64,
}

/// A line of [`EVALS`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EvalLine {
    /// Steps taken before.
    pub step: usize,
    /// What was found.
    #[serde(flatten)]
    pub held_out: HeldOut,
}

/// What is held out, and when it is measured.
#[derive(Clone, Copy)]
pub struct Held<'a> {
    /// The records.
    pub data: &'a Encoded,
    /// Steps between measurements, beside before and after.
    pub every: Option<usize>,
}

/// Where a run is kept.
#[derive(Clone, Copy)]
pub struct Keeping<'a> {
    /// Its folder, which exists.
    pub out: &'a Path,
    /// Steps between saves.
    pub every: Option<usize>,
    /// Whether to go on from what is saved there.
    pub resume: bool,
}

/// A finished or interrupted run.
pub struct Trained {
    /// As it is after the last step.
    pub adapter: Adapter,
    /// All steps, earlier ones of a resumed run among them.
    pub steps: Vec<StepLine>,
    /// All measurements.
    pub evals: Vec<EvalLine>,
}

impl Recipe {
    /// The learning rate of step `s`, from 0, where the highest is `lr`.
    pub fn rate(&self, s: usize, lr: f64) -> f64 {
        let (steps, warmup) = (self.steps, self.warmup);
        if s < warmup {
            return lr * (s + 1) as f64 / warmup as f64;
        }
        let p = (s - warmup) as f64 / steps.saturating_sub(warmup).max(1) as f64;
        lr * match self.schedule {
            Schedule::Constant => 1.0,
            Schedule::Linear => 1.0 - p,
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * p).cos()),
        }
    }

    /// All records of the run, in order.
    fn stream(&self, data: &Encoded) -> Vec<usize> {
        Order::new(data.sequences.len(), self.shuffle.then_some(self.seed)).take(0, self.records)
    }

    /// Fails if training on `data` takes more memory than there is.
    pub fn check_room<B: Backend>(
        &self,
        backend: &B,
        config: &Config,
        adapter: &AdapterConfig,
        data: &Encoded,
    ) -> Result<()> {
        let options = self.options(&self.stream(data), data);
        room_on(backend, Trainer::plan_bytes(backend, config, adapter, &options)?, "training")
    }

    /// The records of step `s` in `stream`.
    fn of_step<'s>(&self, stream: &'s [usize], s: usize) -> &'s [usize] {
        let each = self.batch * self.grad_accum;
        &stream[(s * each).min(stream.len())..((s + 1) * each).min(stream.len())]
    }

    /// The trainer's settings: its passes have room for the run's largest batch.
    fn options(&self, stream: &[usize], data: &Encoded) -> TrainOptions {
        let tokens = |batch: &[usize]| batch.iter().map(|&i| data.sequences[i].tokens.len()).sum();
        let largest = |s| self.of_step(stream, s).chunks(self.batch).map(tokens).max().unwrap_or(0);
        TrainOptions {
            checkpointing: if self.recompute {
                ActivationCheckpointing::EveryLayer
            } else {
                ActivationCheckpointing::Off
            },
            max_tokens: (0..self.steps).map(largest).max().unwrap_or(0),
            clip: (self.clip > 0.0).then_some(self.clip),
            adam: AdamW::default(),
            seed: self.seed,
        }
    }
}

/// Trains `adapter` on `model`. On an error in a step the last good adapter is saved first.
pub fn train<B: Backend>(
    model: &Model<'_, B>,
    adapter: &Adapter,
    data: &Encoded,
    recipe: &Recipe,
    held: Option<Held<'_>>,
    keeping: Keeping<'_>,
) -> Result<Trained> {
    let stream = recipe.stream(data);
    let options = recipe.options(&stream, data);
    let bytes = Trainer::plan_bytes(model.backend(), model.config(), &adapter.config, &options)?;
    output::say(format_args!(
        "{} tokens in a pass at most; training takes {:.1} MiB beside the weights",
        options.max_tokens,
        mib(bytes)
    ));
    let mut trainer = Trainer::new(model, adapter, options)?;
    if keeping.resume {
        trainer.load_state(keeping.out)?;
    }
    let first = trainer.steps() as usize;
    if first > recipe.steps {
        bail!("{}: {first} steps were taken there, the run has {}", keeping.out.display(), recipe.steps);
    }
    let mut steps: Log<StepLine> = Log::open(keeping.out.join(METRICS), |line: &StepLine| line.step <= first)?;
    if steps.lines.len() < first {
        output::say(format_args!("{}: {} of {first} steps are there", steps.path.display(), steps.lines.len()));
    }
    let mut evals: Log<EvalLine> = Log::open(keeping.out.join(EVALS), |line: &EvalLine| line.step <= first)?;
    let mut progress = Progress::new("step", recipe.steps as u64, first as u64);
    let mut saved = first;
    for s in first..=recipe.steps {
        let due = keeping.every.is_some_and(|every| s > saved && s % every == 0);
        if due || s == recipe.steps || interrupt::requested() {
            save(&trainer, keeping.out)?;
            saved = s;
        }
        if interrupt::requested() {
            break;
        }
        if let Some(held) = held {
            let due = s == 0 || s == recipe.steps || held.every.is_some_and(|every| s % every == 0);
            if due && evals.lines.last().is_none_or(|line| line.step < s) {
                let measured = heldout::measure(model, Some(&trainer.adapter()?), held.data, |_| {});
                let Some(held_out) = interrupt::unless_stopped(measured)? else {
                    save(&trainer, keeping.out)?;
                    break;
                };
                let value = held_out.all.loss;
                if !value.is_finite() && s == 0 {
                    bail!(
                        "the held-out loss is {value} before the first step; the model or the adapter has values that are not finite"
                    );
                }
                if !value.is_finite() {
                    let error = Error::NotFinite { what: "held-out loss", value, step: s as u64 };
                    trainer.undo();
                    return Err(stop(&trainer, keeping.out, s, error)?);
                }
                progress.line(&format!("step {s}: held-out loss {:.4}", held_out.all.loss));
                evals.push(EvalLine { step: s, held_out })?;
            }
        }
        if s == recipe.steps {
            break;
        }
        let sequences: Vec<_> = recipe.of_step(&stream, s).iter().map(|&i| data.sequences[i].clone()).collect();
        let lr = recipe.rate(s, recipe.lr);
        let router = recipe.rate(s, recipe.router_lr.unwrap_or(recipe.lr));
        let (rates, started) = (Rates { lr: lr as f32, router: router as f32 }, Instant::now());
        let report = match trainer.step(&sequences, rates) {
            Ok(report) => report,
            Err(error) => {
                return Err(stop(&trainer, keeping.out, s + 1, error)?);
            }
        };
        let tokens_per_second = report.tokens as f64 / started.elapsed().as_secs_f64().max(1e-9);
        let (loss, grad_norm, tokens) = (report.loss, report.grad_norm, report.tokens);
        steps.push(StepLine { step: s + 1, loss, lr, grad_norm, tokens, tokens_per_second })?;
        progress.update(s as u64 + 1, &format!("loss {loss:.4}  {tokens_per_second:.0} tokens/s"));
    }
    Ok(Trained { adapter: trainer.adapter()?, steps: steps.lines, evals: evals.lines })
}

/// Saves what there is and says why a run ends at step `at`.
fn stop<B: Backend>(trainer: &Trainer<'_, '_, B>, out: &Path, at: usize, error: Error) -> Result<anyhow::Error> {
    save(trainer, out)?;
    let kept = format!("stopped at step {at}; the adapter after {} steps is in {}", trainer.steps(), out.display());
    Ok(anyhow::Error::new(error).context(kept))
}

fn save<B: Backend>(trainer: &Trainer<'_, '_, B>, out: &Path) -> Result<()> {
    trainer.adapter()?.save(out)?;
    Ok(trainer.save_state(out)?)
}

/// A file of JSON lines that grows, and its lines.
struct Log<T> {
    path: PathBuf,
    file: File,
    lines: Vec<T>,
}

impl<T: Serialize + DeserializeOwned> Log<T> {
    /// Takes over the lines of an earlier part of the run that `keep` picks; the file has no others afterwards.
    fn open(path: PathBuf, keep: impl Fn(&T) -> bool) -> Result<Self> {
        let at = || path.display().to_string();
        let mut lines = Vec::new();
        if path.exists() {
            let text = std::fs::read_to_string(&path).with_context(at)?;
            let count = text.lines().count();
            for (i, line) in text.lines().enumerate() {
                match serde_json::from_str(line) {
                    Ok(line) => lines.push(line),
                    // A crash has torn it: it is one of those to do again.
                    Err(_) if i + 1 == count => {}
                    Err(error) => {
                        let number = i + 1;
                        bail!("{}:{number}: {}; put it right, or take it out", path.display(), bad_json(&error));
                    }
                }
            }
            lines.retain(keep);
            let kept: Vec<String> = lines.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
            let text: String = kept.into_iter().map(|line| line + "\n").collect();
            write_atomically(&path, text.as_bytes())?;
        }
        let file = OpenOptions::new().create(true).append(true).open(&path).with_context(at)?;
        Ok(Self { path, file, lines })
    }

    fn push(&mut self, line: T) -> Result<()> {
        let text = serde_json::to_string(&line)? + "\n";
        self.file.write_all(text.as_bytes()).with_context(|| self.path.display().to_string())?;
        self.lines.push(line);
        Ok(())
    }
}

/// For people.
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(schedule: Schedule) -> Recipe {
        Recipe {
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
        let rates = |schedule| (0..6).map(|s| recipe(schedule).rate(s, 1.0)).collect::<Vec<_>>();
        assert_eq!(rates(Schedule::Constant), [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(rates(Schedule::Linear), [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]);
        let cosine = rates(Schedule::Cosine);
        assert_eq!(cosine[..3], [0.5, 1.0, 1.0]);
        assert!((cosine[4] - 0.5).abs() < 1e-12 && cosine[5] > 0.0);
    }

    #[test]
    fn the_last_step_may_be_short() {
        let stream: Vec<usize> = (0..22).collect();
        let recipe = recipe(Schedule::Constant);
        assert_eq!(recipe.of_step(&stream, 1), [4, 5, 6, 7]);
        assert_eq!(recipe.of_step(&stream, 5), [20, 21]);
    }
}
