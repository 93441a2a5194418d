//! What all runs of an experiment share: the model, the questions, the files of records, and the folder.

use crate::data::file::JsonFile;
use crate::data::options::EncodingArgs;
use crate::data::records::CATEGORY;
use crate::device::ModelArgs;
use crate::eval::accuracy::{AccuracyArgs, Answers};
use crate::eval::mmlu::Scoring;
use crate::eval::mmlu::questions::Subject;
use crate::hub::locate_file;
use crate::run::folder::{self, Lock, claim, vacant};
use crate::run::manifest::{describe, inputs};
use crate::sha256;
use anyhow::{Context, Result};
use hydra_runtime::adapter::Adapter;
use hydra_runtime::atomic::write_atomically;
use hydra_runtime::backend::Backend;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::model::Model;
use hydra_runtime::tokenizer::Tokenizer;
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// What all runs share. The model is loaded once.
pub struct Stage<'a, B: Backend> {
    /// Model and device.
    pub options: &'a ModelArgs,
    /// The model's files.
    pub checkpoint: &'a Checkpoint,
    /// The model's tokenizer.
    pub tokenizer: Tokenizer,
    /// The model.
    pub model: Model<B>,
    /// MMLU's questions, if they are asked.
    pub questions: Option<Questions>,
    /// Records whose answers are compared, if any.
    pub asked: Option<Asked>,
}

/// Records that every run answers.
pub struct Asked {
    /// The records, by the field that holds the label of a record's head.
    by_field: BTreeMap<String, Answers>,
    /// The options, and the digest of the file: what the result depends on.
    pub inputs: Value,
}

impl Asked {
    /// Reads the records of `[accuracy]`; `encoding` is that of the runs, and `fields` are those of their labels.
    pub fn read(options: &AccuracyArgs, encoding: &EncodingArgs, fields: &BTreeSet<String>) -> Result<Self> {
        let options = AccuracyArgs { data: locate_file(&options.data)?, ..options.clone() };
        let read = |field: &str| Ok((field.to_string(), Answers::read(&options, encoding, field)?));
        // The model without an adapter has no labels, and any field will do.
        let fields = fields.iter().map(String::as_str).chain([CATEGORY]);
        let by_field = fields.map(read).collect::<Result<_>>()?;
        Ok(Self { by_field, inputs: inputs(&options)? })
    }

    /// Fails if a record can't be asked: call it before the work.
    pub fn check(&self, tokenizer: &Tokenizer, context: usize) -> Result<()> {
        self.by_field.values().try_for_each(|answers| answers.check(tokenizer, context))
    }

    /// The records with the labels of an adapter's heads.
    pub fn answers(&self, adapter: Option<&Adapter>) -> Result<&Answers> {
        let field = adapter.and_then(|adapter| adapter.config.label_field.as_deref()).unwrap_or(CATEGORY);
        self.by_field.get(field).with_context(|| format!("[accuracy]: the records were read without \"{field}\""))
    }
}

/// The questions that every run is asked.
pub struct Questions {
    /// By subject.
    pub subjects: Vec<Subject>,
    /// What counts as the answer.
    pub scoring: Scoring,
    /// Digest of the questions and of how they are asked.
    pub digest: String,
}

/// Files of records.
#[derive(Clone)]
pub struct Corpus {
    /// Their paths.
    pub paths: Vec<PathBuf>,
    /// Their paths, sizes and digests.
    pub described: Vec<Value>,
}

impl Corpus {
    /// Reads the files once, for their digests.
    pub fn new(paths: &[PathBuf]) -> Result<Self> {
        let described = paths.iter().map(|path| describe(path)).collect::<Result<_>>()?;
        Ok(Self { paths: paths.to_vec(), described })
    }

    /// A file that is going to be written with `text`.
    pub fn planned(path: PathBuf, text: &[u8]) -> Self {
        let digest = sha256::hex(Sha256::new_with_prefix(text));
        let described = vec![json!({"path": path, "bytes": text.len(), "sha256": digest})];
        Self { paths: vec![path], described }
    }

    /// Digests of their contents, wherever they are.
    pub fn digests(&self) -> Vec<&Value> {
        self.described.iter().map(|file| &file["sha256"]).collect()
    }
}

/// Each record as a line of JSON, as it is in the files.
pub fn raw_records(paths: &[PathBuf]) -> Result<Vec<Vec<u8>>> {
    let mut all = Vec::new();
    for path in paths {
        all.extend(JsonFile::read(path)?.json_lines().map(|(_, line)| line.into_owned()));
    }
    Ok(all)
}

/// The text of a file of records.
pub fn text_of<'r>(records: impl IntoIterator<Item = &'r [u8]>) -> Vec<u8> {
    let mut text = Vec::new();
    for record in records {
        text.extend_from_slice(record);
        text.push(b'\n');
    }
    text
}

/// Fails if `out` can't be the folder of an experiment: new, empty, or an earlier one's, which has `config_copy` in it. Whether
/// it is an earlier one's.
pub fn check_folder(out: &Path, config_copy: &str) -> Result<bool> {
    let started = out.join(config_copy).is_file();
    if !started && !vacant(out)? {
        anyhow::bail!("--out {} holds files but no {config_copy}: give another folder", out.display());
    }
    Ok(started)
}

/// Makes and locks the folder and copies the configuration into it, which marks it; the configuration may be that copy. Call it
/// after all checks, so that what is refused leaves nothing. With `shared`, other processes may do their parts in it meanwhile, all by
/// the same configuration.
pub fn open_folder(out: &Path, config_copy: &str, config: &Path, shared: bool) -> Result<Lock> {
    let bytes = std::fs::read(config).with_context(|| config.display().to_string())?;
    let copy = out.join(config_copy);
    if !shared {
        let lock = claim(out)?;
        write_atomically(&copy, &bytes)?;
        return Ok(lock);
    }
    folder::make(out)?;
    let lock = Lock::share(out)?;
    match std::fs::read(&copy) {
        Ok(there) if there != bytes => {
            let (config, copy) = (config.display(), copy.display());
            anyhow::bail!(
                "{config}: expected what {copy} has: all parts of an experiment are done by one configuration"
            );
        }
        Ok(_) => {}
        Err(_) => write_atomically(&copy, &bytes)?,
    }
    Ok(lock)
}

/// JSON on one line, for long lists of numbers.
pub fn compact(value: &impl Serialize) -> Result<String> {
    Ok(serde_json::to_string(value)? + "\n")
}
