//! Learning rates, chosen alike for all runs: each is tried with each rate on a part of the training records and for a part of
//! the budget, with one seed, and has the rate whose loss on the other part is least. The held-out records play no part in it.

use super::kept::Task;
use super::plan::{Run, Settings, Tune};
use super::{Corpus, Stage, raw_records, write_records};
use crate::data::order::Order;
use anyhow::{Context, Result, bail};
use hydra_runtime::backend::Backend;
use serde::Serialize;
use std::path::Path;

/// One run's trials.
#[derive(Clone, Debug, Serialize)]
pub struct Tuned {
    /// The run.
    pub run: String,
    /// What was tried.
    pub trials: Vec<Trial>,
    /// The rate with the least loss, the smallest of equals.
    pub lr: f64,
    /// Whether it is the smallest or the largest of several: a better one may lie beyond.
    pub at_the_end: bool,
}

/// A rate and the loss that it led to.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Trial {
    /// The rate.
    pub lr: f64,
    /// On the records kept apart; `None` where training came to values that are not finite.
    pub loss: Option<f64>,
}

/// How many of so many training records are kept apart to choose by. Fails if there would be none, or no others.
pub fn apart(tune: &Tune, records: usize) -> Result<usize> {
    let apart = (tune.validation * records as f64).round() as usize;
    if apart == 0 || apart >= records {
        bail!("[tune]: validation {} of {records} records leaves one part without any", tune.validation);
    }
    Ok(apart)
}

/// The two parts of the training records, as files in `dir`.
pub fn split(tune: &Tune, data: &[std::path::PathBuf], dir: &Path) -> Result<(Corpus, Corpus)> {
    let all = raw_records(data)?;
    let mut chosen = Order::new(all.len(), Some(tune.seed)).take(0, apart(tune, all.len())?);
    chosen.sort_unstable();
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let (train_path, validation_path) = (dir.join("train.jsonl"), dir.join("validation.jsonl"));
    let part = |apart: bool| -> Vec<&[u8]> {
        let chosen = |i: &usize| chosen.binary_search(i).is_ok() == apart;
        (0..all.len()).filter(chosen).map(|i| all[i].as_slice()).collect()
    };
    write_records(&train_path, &part(false))?;
    write_records(&validation_path, &part(true))?;
    Ok((Corpus::new(&[train_path])?, Corpus::new(&[validation_path])?))
}

/// The trials of a run.
pub fn trials<'a>(tune: &Tune, run: &'a Run, parts: &'a (Corpus, Corpus), dir: &Path) -> Vec<(f64, Task<'a>)> {
    let mut rates = tune.lr.clone();
    rates.sort_by(f64::total_cmp);
    rates.dedup();
    let task = |lr: f64| {
        let mut settings = shortened(&run.settings, tune.fraction);
        settings.insert("lr".into(), lr.into());
        let dir = dir.join(&run.folder).join(format!("lr-{lr:e}"));
        Task { run, settings, seed: tune.seed, data: &parts.0, eval_data: &parts.1, ask: false, dir }
    };
    rates.into_iter().map(|lr| (lr, task(lr))).collect()
}

/// Tries each rate, or ends with [`crate::interrupt::Stopped`].
pub fn choose<B: Backend>(
    stage: &Stage<'_, '_, B>,
    run: &Run,
    trials: &[(f64, Task<'_>)],
    mut say: impl FnMut(&str),
) -> Result<Tuned> {
    let mut tried = Vec::new();
    for (lr, task) in trials {
        say(&format!("{}: trying lr {lr:e}", run.name));
        let found = task.finish(stage)?.found;
        tried.push(Trial { lr: *lr, loss: found.held_out.map(|held_out| held_out.all.loss) });
    }
    let finite = tried.iter().filter_map(|trial| Some((trial.lr, trial.loss?)));
    let Some((lr, _)) = finite.reduce(|best, next| if next.1 < best.1 { next } else { best }) else {
        bail!("[tune]: {}: no lr of the list led to a finite loss", run.name);
    };
    let at_the_end = tried.len() > 1 && (tried[0].lr == lr || tried[tried.len() - 1].lr == lr);
    Ok(Tuned { run: run.name.clone(), trials: tried, lr, at_the_end })
}

/// Settings with a part of their steps or epochs.
fn shortened(settings: &Settings, fraction: f64) -> Settings {
    let mut settings = settings.clone();
    if let Some(steps) = settings.get("steps").and_then(serde_json::Value::as_f64) {
        settings.insert("steps".into(), (((steps * fraction).round() as u64).max(1)).into());
    } else {
        let epochs = settings.get("epochs").and_then(serde_json::Value::as_f64).unwrap_or(1.0);
        settings.insert("epochs".into(), (epochs * fraction).into());
    }
    settings
}
