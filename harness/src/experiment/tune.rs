//! Learning rates, chosen in the same way for all runs: each run is trained with each rate on a part of the training records,
//! for a part of the budget and with one seed, and gets the rate with the smallest loss on the other part. The eval set plays no
//! part in it.

use super::kept::Task;
use super::plan::{Run, Tune};
use super::stage::{Corpus, Stage, raw_records, text_of};
use crate::data::order::Order;
use crate::options::{Count, NonNegative};
use crate::output;
use crate::run::folder;
use crate::run::spec::RunSpec;
use anyhow::{Result, bail};
use hydra_runtime::atomic::write_atomically;
use hydra_runtime::backend::Backend;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// One run's trials.
#[derive(Clone, Debug, Serialize)]
pub struct Tuned {
    /// The run.
    pub run: String,
    /// What was tried.
    pub trials: Vec<Trial>,
    /// The rate with the smallest loss; the smaller rate if two are equal.
    pub lr: f64,
    /// Whether it is the smallest or the largest of several, so that a better one may lie beyond.
    pub at_the_end: bool,
}

/// A learning rate, and the loss after training with it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Trial {
    /// The rate.
    pub lr: f64,
    /// The loss on the records that were set aside; `None` if training diverged.
    pub loss: Option<f64>,
}

/// How many of `records` training records are set aside to choose by. Fails if that is none or all of them.
fn apart(tune: &Tune, records: usize) -> Result<usize> {
    let apart = (tune.validation * records as f64).round() as usize;
    if apart == 0 || apart >= records {
        bail!("[tune]: validation {} of {records} records leaves one part empty", tune.validation);
    }
    Ok(apart)
}

/// The two parts of the training records, as files that are not written yet.
pub struct Parts {
    dir: PathBuf,
    /// What trials are trained on.
    train: Corpus,
    /// What rates are chosen by.
    validation: Corpus,
    texts: [Vec<u8>; 2],
}

impl Parts {
    /// Writes the files.
    pub fn write(&self) -> Result<()> {
        folder::make(&self.dir)?;
        for (corpus, text) in [&self.train, &self.validation].into_iter().zip(&self.texts) {
            write_atomically(&corpus.paths[0], text)?;
        }
        Ok(())
    }
}

/// Parts the training records; the files are to be in `dir`.
pub fn split(tune: &Tune, data: &[PathBuf], dir: &Path) -> Result<Parts> {
    let all = raw_records(data)?;
    let mut chosen = Order::new(all.len(), Some(tune.seed)).take(0, apart(tune, all.len())?);
    chosen.sort_unstable();
    let texts = [false, true].map(|apart| {
        let chosen = |i: &usize| chosen.binary_search(i).is_ok() == apart;
        text_of((0..all.len()).filter(chosen).map(|i| all[i].as_slice()))
    });
    let train = Corpus::planned(dir.join("train.jsonl"), &texts[0]);
    let validation = Corpus::planned(dir.join("validation.jsonl"), &texts[1]);
    Ok(Parts { dir: dir.into(), train, validation, texts })
}

/// The trials of a run, by ascending learning rate.
pub fn trials<'a>(tune: &Tune, run: &'a Run, parts: &'a Parts, dir: &Path) -> Vec<(f64, Task<'a>)> {
    let mut rates: Vec<f64> = tune.lr.iter().map(|lr| lr.get()).collect();
    rates.sort_by(f64::total_cmp);
    rates.dedup();
    let task = |lr: f64| {
        let mut spec = shortened(&run.spec, tune.fraction);
        spec.training.lr = Some(NonNegative::new(lr));
        let dir = dir.join(&run.folder).join(format!("lr-{lr:e}"));
        Task { spec, seed: tune.seed, data: &parts.train, eval_data: &parts.validation, ask: false, dir }
    };
    rates.into_iter().map(|lr| (lr, task(lr))).collect()
}

/// Tries each rate; an interrupt is the error [`crate::interrupt::Stopped`].
pub fn choose<B: Backend>(stage: &Stage<'_, B>, run: &Run, trials: &[(f64, Task<'_>)]) -> Result<Tuned> {
    let mut tried = Vec::new();
    for (lr, task) in trials {
        output::say(format_args!("\n{}: trying lr {lr:e}", run.name));
        let found = task.finish(stage)?.found;
        tried.push(Trial { lr: *lr, loss: found.eval_loss.map(|eval_loss| eval_loss.all.loss) });
    }
    let finite = tried.iter().filter_map(|trial| Some((trial.lr, trial.loss?)));
    let Some((lr, _)) = finite.reduce(|best, next| if next.1 < best.1 { next } else { best }) else {
        bail!("[tune]: {}: training diverged with each lr of the list; try smaller ones", run.name);
    };
    output::say(format_args!("{}: lr {lr:e} has the smallest loss", run.name));
    let at_the_end = tried.len() > 1 && (tried[0].lr == lr || tried[tried.len() - 1].lr == lr);
    Ok(Tuned { run: run.name.clone(), trials: tried, lr, at_the_end })
}

/// A run of a part of the steps or epochs.
fn shortened(spec: &RunSpec, fraction: f64) -> RunSpec {
    let mut spec = spec.clone();
    let training = &mut spec.training;
    match training.steps {
        Some(steps) => training.steps = Some(Count::new(((steps.get() as f64 * fraction).round() as usize).max(1))),
        None => {
            let epochs = training.epochs.map_or(1.0, NonNegative::get);
            training.epochs = Some(NonNegative::new(epochs * fraction));
        }
    }
    spec
}
