//! Runs that a TOML file names, each with several seeds, each kept in a folder of its own: what `compare` and `heterogeneity`
//! have in common.

pub mod kept;
pub mod plan;
pub mod scores;
pub mod tune;

use super::finetune::manifest::describe;
use crate::data::records::lines;
use crate::device::ModelArgs;
use crate::lock::{Lock, vacant};
use crate::mmlu::Scoring;
use crate::mmlu::questions::Subject;
use anyhow::{Context, Result};
use hydra_runtime::atomic::write_atomically;
use hydra_runtime::backend::Backend;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::model::Model;
use hydra_runtime::tokenizer::Tokenizer;
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// What all runs share; the model is loaded once.
pub struct Stage<'a, 'w, B: Backend> {
    /// The model's options.
    pub options: &'a ModelArgs,
    /// Its files.
    pub checkpoint: &'w Checkpoint,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Itself.
    pub model: Model<'w, B>,
    /// Multiple choice, if it is asked for.
    pub questions: Option<Questions>,
}

/// The questions that every run is asked.
pub struct Questions {
    /// By subject.
    pub subjects: Vec<Subject>,
    /// What counts.
    pub scoring: Scoring,
    /// Of the questions and of how they are put.
    pub digest: String,
}

/// Files of records.
#[derive(Clone)]
pub struct Corpus {
    /// Their paths.
    pub paths: Vec<PathBuf>,
    /// Paths, sizes, digests.
    pub described: Vec<Value>,
}

impl Corpus {
    /// Reads the files once, for their digests.
    pub fn new(paths: &[PathBuf]) -> Result<Self> {
        let described = paths.iter().map(|path| describe(path)).collect::<Result<_>>()?;
        Ok(Self { paths: paths.to_vec(), described })
    }

    /// What is in them, not where they are.
    pub fn digests(&self) -> Vec<&Value> {
        self.described.iter().map(|file| &file["sha256"]).collect()
    }
}

/// Each record's line, as it stands in the files.
pub fn raw_records(paths: &[PathBuf]) -> Result<Vec<Vec<u8>>> {
    let mut all = Vec::new();
    for path in paths {
        let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
        all.extend(lines(&bytes).map(|(_, line)| line.trim_ascii().to_vec()));
    }
    Ok(all)
}

/// A file of them.
pub fn write_records(path: &Path, records: &[&[u8]]) -> Result<()> {
    let text: Vec<u8> = records.iter().flat_map(|record| [record, b"\n".as_slice()].concat()).collect();
    Ok(write_atomically(path, &text)?)
}

/// In hexadecimal.
pub fn digest(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Fails if `out` can't be the folder of an experiment: new, empty, or an earlier one's, which `mark` in it tells. Whether it is
/// an earlier one's.
pub fn check_folder(out: &Path, mark: &str) -> Result<bool> {
    let begun = out.join(mark).is_file();
    if !begun && !vacant(out)? {
        let what = format!("nothing that this command has begun ({mark} is not in it)");
        anyhow::bail!("--out {} is not empty, and {what}", out.display());
    }
    Ok(begun)
}

/// Makes the folder, with the configuration as it is in it, which marks it; that may be the one there. Not before all is
/// checked: what is refused leaves nothing. It is this process's own for as long as the lock is held.
pub fn open_folder(out: &Path, mark: &str, config: &Path) -> Result<Lock> {
    let bytes = std::fs::read(config).with_context(|| config.display().to_string())?;
    std::fs::create_dir_all(out).with_context(|| format!("can't make --out {}", out.display()))?;
    let lock = Lock::take(out)?;
    write_atomically(&out.join(mark), &bytes)?;
    Ok(lock)
}

/// Writes JSON on one line: long lists of numbers.
pub fn compact(value: &impl Serialize) -> Result<String> {
    Ok(serde_json::to_string(value)? + "\n")
}
