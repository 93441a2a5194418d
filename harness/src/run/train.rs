//! The training loop: steps, metrics, eval losses, saves, and a way to stop and to continue.

use super::folder::RunDir;
use super::log::{EVALS, EvalLine, Log, METRICS, StepLine};
use super::schedule::TrainConfig;
use crate::data::encode::Encoded;
use crate::eval::loss;
use crate::memory::{self, mib};
use crate::progress::Progress;
use crate::ranks::Ranks;
use crate::{interrupt, output};
use anyhow::{Result, anyhow, bail};
use hydra_runtime::Error;
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::Backend;
use hydra_runtime::config::Config;
use hydra_runtime::model::Model;
use hydra_runtime::train::{TrainOptions, Trainer};
use std::ops::ControlFlow;
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

/// What a run trains.
#[derive(Clone, Copy)]
pub struct Training<'a> {
    /// The adapter before the first step.
    pub adapter: &'a Adapter,
    /// The training set.
    pub data: &'a Encoded,
    /// How to train.
    pub config: &'a TrainConfig,
    /// The eval set, if there is one.
    pub eval_set: Option<EvalSet<'a>>,
}

/// What follows from the options and the data of a run.
pub struct Plan {
    /// Indices of the run's records.
    stream: Vec<usize>,
    /// The trainer's options.
    options: TrainOptions,
    /// Passes of the step that has the most.
    passes: usize,
}

impl Training<'_> {
    /// The plan of the run.
    pub fn plan(&self) -> Result<Plan> {
        let stream = self.config.stream(self.data);
        let options = self.config.options(&stream, self.data);
        let passes = self.config.passes(&stream, self.data, &options)?;
        Ok(Plan { stream, options, passes })
    }

    /// The most bytes that training takes besides the weights.
    pub fn bytes<B: Backend>(&self, plan: &Plan, device: &B, model: &Config, ranks: &Ranks) -> Result<u64> {
        let &Plan { ref options, passes, .. } = plan;
        let eval_tokens = self.eval_set.map(|set| loss::pass_tokens(&set.data.sequences));
        let (adapter, shared) = (&self.adapter.config, ranks.size() > 1);
        memory::of_training(device, model, &memory::Training { adapter, options, passes, shared, eval_tokens })
    }
}

/// Trains an adapter on `model`, and keeps all of it in `dir`. If a step fails, the last good adapter is saved first.
pub fn train<B: Backend>(model: &Model<B>, training: Training<'_>, dir: &RunDir, ranks: &Ranks) -> Result<Trained> {
    let plan = training.plan()?;
    let bytes = training.bytes(&plan, model.backend(), model.config(), ranks)?;
    let Plan { stream, options, passes } = plan;
    let Training { data, config, eval_set, .. } = training;
    output::say(format_args!(
        "at most {} tokens per pass; training needs {:.1} MiB besides the weights",
        options.max_tokens,
        mib(bytes)
    ));
    if ranks.size() > 1 {
        describe_share(ranks.size(), passes);
    }
    let mut trainer = ranks.agree(trainer(model, &training, (options, passes), dir, ranks))?;
    trainer.share_state()?;
    let first = trainer.steps() as usize;
    let steps = Log::shared(ranks, dir.path.join(METRICS), |line: &StepLine| line.step <= first)?;
    if steps.lines.len() < first {
        let there = steps.lines.len();
        output::say(format_args!("{}: {there} of {first} steps are logged there", steps.path.display()));
    }
    let evals = Log::shared(ranks, dir.path.join(EVALS), |line: &EvalLine| line.step <= first)?;
    let progress = Progress::new("step", config.steps as u64, first as u64);
    let mut run = Run { model, trainer, config, eval_set, dir, ranks, steps, evals, progress, saved: first };
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

/// Says how many passes there are to share.
fn describe_share(ranks: usize, passes: usize) {
    output::say(format_args!("{ranks} ranks, at most {passes} passes per step"));
    if passes < ranks {
        output::warn(&format!(
            "{} of {ranks} ranks have nothing to do, as no step has more than {passes} passes; a larger --grad-accum gives more",
            ranks - passes
        ));
    }
}

/// A trainer, in the state that is saved in `dir` if the run resumes and this is rank 0.
fn trainer<B: Backend>(
    model: &Model<B>,
    training: &Training<'_>,
    (options, passes): (TrainOptions, usize),
    dir: &RunDir,
    ranks: &Ranks,
) -> Result<Trainer<B>> {
    let trainer = Trainer::new(model, training.adapter, options)?.with_passes(passes)?;
    let (mut trainer, steps) = (trainer.with_ranks(ranks.messages()).with_run(&*dir.run), training.config.steps);
    if dir.resume && ranks.is_first() {
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
    ranks: &'r Ranks,
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
        let stop = self.ranks.any(interrupt::requested())?;
        if stop && !interrupt::requested() {
            interrupt::request_elsewhere();
        }
        if due || s == self.config.steps || stop {
            self.save()?;
            self.saved = s;
        }
        Ok(if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    /// Measures the eval loss before step `s`, if it is time; stops if that is interrupted.
    fn evaluate_if_due(&mut self, s: usize) -> Result<ControlFlow<()>> {
        let Some(eval_set) = self.eval_set else { return Ok(ControlFlow::Continue(())) };
        let due = s == 0 || s == self.config.steps || eval_set.every.is_some_and(|every| s.is_multiple_of(every));
        if !due || self.evals.lines.last().is_some_and(|line| line.step >= s) {
            return Ok(ControlFlow::Continue(()));
        }
        let measured = loss::measure(self.model, Some(&self.trainer.adapter()?), eval_set.data, self.ranks, |_| {});
        let Some(loss) = interrupt::unless_stopped(measured)? else {
            self.save()?;
            return Ok(ControlFlow::Break(()));
        };
        let value = loss.all.loss;
        if !value.is_finite() && s == 0 {
            return Err(self.ranks.common(anyhow!(
                "the eval loss is {value} before the first step: the model or the adapter has values that are not finite"
            )));
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
        self.save()?;
        let (steps, path) = (self.trainer.steps(), self.dir.path.display());
        let known = matches!(error, Error::NotFinite { .. });
        let error = anyhow::Error::new(error)
            .context(format!("stopped at step {at}; {path} has the adapter after {steps} steps"));
        Ok(if known { self.ranks.common(error) } else { error })
    }

    /// On rank 0.
    fn save(&self) -> Result<()> {
        if self.ranks.is_first() {
            self.trainer.adapter()?.save(&self.dir.path)?;
            self.trainer.save_state(&self.dir.path)?;
        }
        Ok(())
    }
}
