//! The training loop: steps, metrics, eval losses, saves, and a way to stop and to continue.

use super::folder::RunDir;
use super::log::{EVALS, EvalLine, Log, METRICS, StepLine};
use super::schedule::TrainConfig;
use crate::data::encode::Encoded;
use crate::eval::loss;
use crate::memory::{self, mib};
use crate::progress::Progress;
use crate::{interrupt, output};
use anyhow::{Result, bail};
use hydra_runtime::Error;
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::Backend;
use hydra_runtime::model::Model;
use hydra_runtime::train::{TrainOptions, Trainer};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

/// The records whose loss is measured, and when.
#[derive(Clone, Copy)]
pub struct EvalSet<'a> {
    /// The records.
    pub data: &'a Encoded,
    /// Steps between measurements, besides those before the first step and after the last.
    pub every: Option<usize>,
}

/// A finished or interrupted run.
pub struct Trained {
    /// The adapter after the last step.
    pub adapter: Adapter,
    /// All steps, including those of earlier parts of a resumed run.
    pub steps: Vec<StepLine>,
    /// All measurements of the eval loss.
    pub evals: Vec<EvalLine>,
}

/// Trains `adapter` on `model`, and keeps all of it in `dir`. If a step fails, the last good adapter is saved first.
pub fn train<B: Backend>(
    model: &Model<B>,
    adapter: &Adapter,
    data: &Encoded,
    config: &TrainConfig,
    eval_set: Option<EvalSet<'_>>,
    dir: &RunDir,
) -> Result<Trained> {
    let stream = config.stream(data);
    let options = config.options(&stream, data);
    let eval_tokens = eval_set.map(|set| loss::pass_tokens(&set.data.sequences));
    let bytes = memory::of_training(model.backend(), model.config(), &adapter.config, &options, eval_tokens)?;
    output::say(format_args!(
        "at most {} tokens per pass; training needs {:.1} MiB besides the weights",
        options.max_tokens,
        mib(bytes)
    ));
    let trainer = trainer(model, adapter, options, config.steps, dir)?;
    let first = trainer.steps() as usize;
    let steps = Log::open(dir.path.join(METRICS), |line: &StepLine| line.step <= first)?;
    if steps.lines.len() < first {
        let there = steps.lines.len();
        output::say(format_args!("{}: {there} of {first} steps are logged there", steps.path.display()));
    }
    let evals = Log::open(dir.path.join(EVALS), |line: &EvalLine| line.step <= first)?;
    let progress = Progress::new("step", config.steps as u64, first as u64);
    let mut run = Run { model, trainer, config, eval_set, dir, steps, evals, progress, saved: first };
    for s in first..=config.steps {
        if run.save_if_due(s)?.is_break() || run.evaluate_if_due(s)?.is_break() {
            break;
        }
        if s < config.steps {
            run.step(s, &config.sequences(data, &stream, s))?;
        }
    }
    Ok(Trained { adapter: run.trainer.adapter()?, steps: run.steps.lines, evals: run.evals.lines })
}

/// A trainer, in the state that is saved in `dir` if the run resumes.
fn trainer<B: Backend>(
    model: &Model<B>,
    adapter: &Adapter,
    options: TrainOptions,
    steps: usize,
    dir: &RunDir,
) -> Result<Trainer<B>> {
    let mut trainer = Trainer::new(model, adapter, options)?;
    if dir.resume {
        trainer.load_state(&dir.path)?;
    }
    let taken = trainer.steps() as usize;
    if taken > steps {
        bail!("{}: already trained for {taken} steps; --steps {steps} is less than that", dir.path.display());
    }
    Ok(trainer)
}

/// A run under way.
struct Run<'r, B: Backend> {
    model: &'r Model<B>,
    trainer: Trainer<B>,
    config: &'r TrainConfig,
    eval_set: Option<EvalSet<'r>>,
    dir: &'r RunDir,
    steps: Log<StepLine>,
    evals: Log<EvalLine>,
    progress: Progress,
    /// The step of the last save.
    saved: usize,
}

impl<B: Backend> Run<'_, B> {
    /// Saves before step `s`, if it is time or the run ends here.
    fn save_if_due(&mut self, s: usize) -> Result<ControlFlow<()>> {
        let due = self.dir.save_every.is_some_and(|every| s > self.saved && s.is_multiple_of(every));
        if due || s == self.config.steps || interrupt::requested() {
            save(&self.trainer, &self.dir.path)?;
            self.saved = s;
        }
        Ok(if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    /// Measures the eval loss before step `s`, if it is time; stops if that is interrupted.
    fn evaluate_if_due(&mut self, s: usize) -> Result<ControlFlow<()>> {
        let Some(eval_set) = self.eval_set else { return Ok(ControlFlow::Continue(())) };
        let due = s == 0 || s == self.config.steps || eval_set.every.is_some_and(|every| s.is_multiple_of(every));
        if !due || self.evals.lines.last().is_some_and(|line| line.step >= s) {
            return Ok(ControlFlow::Continue(()));
        }
        let measured = loss::measure(self.model, Some(&self.trainer.adapter()?), eval_set.data, |_| {});
        let Some(loss) = interrupt::unless_stopped(measured)? else {
            save(&self.trainer, &self.dir.path)?;
            return Ok(ControlFlow::Break(()));
        };
        let value = loss.all.loss;
        if !value.is_finite() && s == 0 {
            bail!(
                "the eval loss is {value} before the first step: the model or the adapter has values that are not finite"
            );
        }
        if !value.is_finite() {
            let error = Error::NotFinite { what: "eval loss", value, step: s as u64 };
            self.trainer.undo();
            return Err(self.stop(s, error)?);
        }
        self.progress.line(&format!("step {s}: eval loss {value:.4}"));
        self.evals.push(EvalLine { step: s, loss })?;
        Ok(ControlFlow::Continue(()))
    }

    /// Takes step `s`, from 0.
    fn step(&mut self, s: usize, sequences: &[hydra_runtime::batch::Sequence]) -> Result<()> {
        let started = Instant::now();
        let report = match self.trainer.step(sequences, self.config.rates(s)) {
            Ok(report) => report,
            Err(error) => return Err(self.stop(s + 1, error)?),
        };
        let tokens_per_second = report.tokens as f64 / started.elapsed().as_secs_f64().max(1e-9);
        let (loss, lr) = (report.loss, self.config.rate(s, self.config.lr));
        let (grad_norm, tokens) = (report.grad_norm, report.tokens);
        self.steps.push(StepLine { step: s + 1, loss, lr, grad_norm, tokens, tokens_per_second })?;
        self.progress.update(s as u64 + 1, &format!("loss {loss:.4}  {tokens_per_second:.0} tokens/s"));
        Ok(())
    }

    /// Saves what there is, and says why the run ends at step `at`.
    fn stop(&self, at: usize, error: Error) -> Result<anyhow::Error> {
        save(&self.trainer, &self.dir.path)?;
        let (steps, path) = (self.trainer.steps(), self.dir.path.display());
        Ok(anyhow::Error::new(error)
            .context(format!("stopped at step {at}; {path} has the adapter after {steps} steps")))
    }
}

fn save<B: Backend>(trainer: &Trainer<B>, dir: &Path) -> Result<()> {
    trainer.adapter()?.save(dir)?;
    Ok(trainer.save_state(dir)?)
}
