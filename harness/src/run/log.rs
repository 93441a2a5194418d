//! What a run logs: a line of JSON per step, and one per measurement of the eval loss.

use crate::data::file::bad_json;
use crate::eval::loss::EvalLoss;
use crate::ranks::Ranks;
use anyhow::{Context, Result, bail};
use hydra_runtime::atomic::write_atomically;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;

/// The file with a line per step.
pub const METRICS: &str = "metrics.jsonl";
/// The file with a line per measurement of the eval loss.
pub const EVALS: &str = "evals.jsonl";

/// A line of [`METRICS`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct StepLine {
    /// The step, from 1.
    pub step: usize,
    /// Mean loss over the step's target tokens, before the update.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Tokens of the step.
    pub tokens: usize,
    /// Tokens over the step's wall-clock time.
    pub tokens_per_second: f64,
}

/// A line of [`EVALS`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EvalLine {
    /// Steps taken before the measurement.
    pub step: usize,
    /// The loss on the eval set.
    #[serde(flatten)]
    pub loss: EvalLoss,
}

/// A file of JSON lines that grows.
pub struct Log<T> {
    /// The file.
    pub path: PathBuf,
    /// On rank 0, which alone writes.
    file: Option<File>,
    /// All lines.
    pub lines: Vec<T>,
}

impl<T: Serialize + DeserializeOwned> Log<T> {
    /// Opens `path` on rank 0, as [`Log::open`]; the other ranks have the same lines in memory.
    pub fn shared(ranks: &Ranks, path: PathBuf, keep: impl Fn(&T) -> bool) -> Result<Self>
    where
        T: Clone,
    {
        let mut own = None;
        let lines = ranks.by_first(|| {
            let opened = Self::open(path.clone(), keep)?;
            let lines = opened.lines.clone();
            own = Some(opened);
            Ok(lines)
        })?;
        Ok(own.unwrap_or(Self { path, file: None, lines }))
    }

    /// Opens `path` and takes over the lines of an earlier part of the run that `keep` accepts; the others are removed.
    pub fn open(path: PathBuf, keep: impl Fn(&T) -> bool) -> Result<Self> {
        let at = || path.display().to_string();
        let mut lines = Vec::new();
        if path.exists() {
            let text = std::fs::read_to_string(&path).with_context(at)?;
            let count = text.lines().count();
            for (i, line) in text.lines().enumerate() {
                match serde_json::from_str(line) {
                    Ok(line) => lines.push(line),
                    // A crash cut the last line short; its step is done again.
                    Err(_) if i + 1 == count => {}
                    Err(error) => {
                        bail!("{}:{}: {}; repair or remove the line", path.display(), i + 1, bad_json(&error))
                    }
                }
            }
            lines.retain(keep);
            let kept: Vec<String> = lines.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
            let text: String = kept.into_iter().map(|line| line + "\n").collect();
            write_atomically(&path, text.as_bytes())?;
        }
        let file = OpenOptions::new().create(true).append(true).open(&path).with_context(at)?;
        Ok(Self { path, file: Some(file), lines })
    }

    /// Appends a line.
    pub fn push(&mut self, line: T) -> Result<()> {
        if let Some(file) = &mut self.file {
            let text = serde_json::to_string(&line)? + "\n";
            file.write_all(text.as_bytes()).with_context(|| self.path.display().to_string())?;
        }
        self.lines.push(line);
        Ok(())
    }
}
