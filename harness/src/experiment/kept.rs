//! One run with one seed: trained, measured, and kept.
//!
//! ```text
//! DIR/result.json      inputs and their hash, and what was found; written last, so that its presence means "finished"
//! DIR/records.json     by record: loss and targets; by question: right or wrong
//! DIR/..               what finetune writes
//! ```
//! A finished run is taken over as it is. An interrupted one is resumed. One with other inputs than those asked for is refused:
//! results of two experiments never mix.

use super::measure::{Accuracy, Details, Measured, measure};
use super::plan::settings;
use super::stage::{Corpus, Stage, compact};
use crate::data::encode::Encoder;
use crate::data::records::Reading;
use crate::data::template::Template;
use crate::device::ModelArgs;
use crate::eval::accuracy::report::Report;
use crate::eval::loss::EvalLoss;
use crate::options::{Count, Seed};
use crate::output::printable;
use crate::ranks::Ranks;
use crate::run::config::Settings;
use crate::run::folder::{self, Lock};
use crate::run::manifest::{describe, started, tensors, weights};
use crate::run::prepare::Prepared;
use crate::run::spec::RunSpec;
use crate::{interrupt, memory, sha256};
use anyhow::{Context, Result, bail};
use hydra_runtime::Error;
use hydra_runtime::atomic::write_all_atomically;
use hydra_runtime::backend::Backend;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const RESULT: &str = "result.json";
const RECORDS: &str = "records.json";
/// An input that earlier versions did not write.
const WEIGHTS: &str = "model-fingerprint";
/// An interrupted run resumes from its last save.
const SAVE_EVERY: usize = 50;

/// A run with one seed.
pub struct Task<'a> {
    /// Its options here.
    pub spec: RunSpec,
    /// Its seed.
    pub seed: u64,
    /// The training records.
    pub data: &'a Corpus,
    /// The eval set.
    pub eval_data: &'a Corpus,
    /// Whether the questions are asked, if there are any.
    pub ask: bool,
    /// Its folder.
    pub dir: PathBuf,
}

/// What was found.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Found {
    /// The command line without `hydra`; empty for the model without an adapter.
    pub command: Vec<String>,
    /// Trainable parameters.
    pub trainable: u64,
    /// Their share of all.
    pub share: f64,
    /// Peak learning rate.
    pub lr: Option<f64>,
    /// Steps.
    pub steps: usize,
    /// Tokens trained on.
    pub tokens: usize,
    /// Tokens over the steps' wall-clock time.
    pub tokens_per_second: Option<f64>,
    /// Peak resident memory while training, weights included; of the last part of a run that was interrupted.
    pub peak_bytes: Option<u64>,
    /// Loss on the eval set; `None` if training diverged.
    #[serde(rename = "held_out")]
    pub eval_loss: Option<EvalLoss>,
    /// Accuracy on MMLU.
    pub mmlu: Option<Accuracy>,
    /// Accuracy on the records of `[accuracy]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<Report>,
    /// Why there is no loss.
    pub diverged: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct File {
    hash: String,
    inputs: Settings,
    found: Found,
}

/// A finished task.
#[derive(Clone)]
pub struct Finished {
    /// Figures.
    pub found: Found,
    /// By record and question.
    pub details: Details,
}

impl Task<'_> {
    /// The result, if the run is finished. Fails if its folder holds a finished run with other inputs.
    pub fn kept<B: Backend>(&self, stage: &Stage<'_, B>) -> Result<Option<Finished>> {
        take_over(&self.dir, &self.inputs(stage)?)
    }

    fn inputs<B: Backend>(&self, stage: &Stage<'_, B>) -> Result<Settings> {
        let mut inputs = shared_inputs(stage, self.eval_data, self.ask);
        inputs.insert("data".into(), json!(self.data.digests()));
        inputs.insert("seed".into(), self.seed.into());
        // How often a run saves changes nothing that is kept.
        inputs.extend(settings(&self.spec).into_iter().filter(|(key, _)| key != "save-every"));
        // Of files that options name, the contents count.
        for key in ["template", "chat-template", "init-adapter"] {
            let Some(path) = inputs.get(key).and_then(Value::as_str).map(PathBuf::from) else { continue };
            let path = if key == "init-adapter" { tensors(&path)? } else { path };
            insert_digest(&mut inputs, &format!("{key}-file"), &path)?;
        }
        Ok(inputs)
    }

    /// All options of this fine-tune.
    pub fn finetune(&self, model: &ModelArgs) -> RunSpec {
        let mut spec = self.spec.clone();
        spec.model.model = Some(model.model.clone());
        spec.data.data = self.data.paths.clone();
        spec.evaluation.eval_data = self.eval_data.paths.first().cloned();
        spec.output.out = Some(self.dir.clone());
        spec.output.save_every.get_or_insert(Count::new(SAVE_EVERY));
        spec.training.seed = Some(Seed::new(self.seed));
        spec.device = model.device.clone();
        // Spelled out for who repeats it by hand on another device.
        spec.device.precision = Some(model.device.precision());
        spec
    }

    /// Fails if the records, as tokens, leave nothing to train or measure on: the same for all runs, which share template and
    /// length.
    pub fn check<B: Backend>(
        &self,
        model: &ModelArgs,
        checkpoint: &Checkpoint,
        tokenizer: &Tokenizer,
        device: &B,
    ) -> Result<()> {
        Prepared::new(self.finetune(model), checkpoint, tokenizer, device, &Ranks::alone()).map(drop)
    }

    /// Does what is left to do; an interrupt is the error [`interrupt::Stopped`], and a run that another process works on
    /// [`folder::Busy`].
    pub fn finish<B: Backend>(&self, stage: &Stage<'_, B>) -> Result<Finished> {
        let inputs = self.inputs(stage)?;
        if let Some(finished) = take_over(&self.dir, &inputs)? {
            return Ok(finished);
        }
        // Before the records are encoded, which takes longer than to see that.
        folder::make(&self.dir)?;
        drop(Lock::take(&self.dir)?);
        let spec = self.finetune(stage.options);
        let command = spec.command_line();
        let ranks = &Ranks::alone();
        let prepared = Prepared::new(spec, stage.checkpoint, &stage.tokenizer, stage.model.backend(), ranks)?;
        let dir = prepared.open_dir(started(&self.dir), ranks)?;
        // Another process may have finished it since.
        if let Some(finished) = take_over(&self.dir, &inputs)? {
            return Ok(finished);
        }
        memory::reset_peak();
        let eval_set = prepared.eval_set().filter(|_| self.spec.evaluation.eval_every.is_some());
        // Watching a router takes a forward pass over hundreds of records: too much for a trial.
        let trained = match prepared.train(&stage.model, eval_set, &dir, ranks, self.ask) {
            Ok(done) => done.trained,
            Err(error) if matches!(error.downcast_ref(), Some(Error::NotFinite { .. })) => {
                let found = Found { diverged: Some(format!("{error:#}")), ..found(&prepared, command) };
                return keep(&self.dir, inputs, Finished { found, details: Details::default() });
            }
            Err(error) => return Err(error),
        };
        let peak_bytes = memory::peak();
        interrupt::check()?;
        let seconds: f64 = trained.steps.iter().map(|step| step.tokens as f64 / step.tokens_per_second).sum();
        let tokens: usize = trained.steps.iter().map(|step| step.tokens).sum();
        let eval_data = prepared.eval_data.as_ref().context("a run without an eval set")?;
        let Measured { eval_loss, mmlu, accuracy, mut details } =
            measure(stage, Some(&trained.adapter), eval_data, self.ask)?;
        details.training = trained.steps.iter().map(|step| step.loss).collect();
        let loss = eval_loss.all.loss;
        let found = Found {
            tokens,
            tokens_per_second: Some(tokens as f64 / seconds),
            peak_bytes,
            diverged: (!loss.is_finite()).then(|| format!("the eval loss is {loss}")),
            eval_loss: loss.is_finite().then_some(eval_loss),
            mmlu,
            accuracy,
            ..found(&prepared, command)
        };
        keep(&self.dir, inputs, Finished { found, details })
    }
}

/// What is known of a run before it is measured.
fn found(prepared: &Prepared, command: Vec<String>) -> Found {
    Found {
        command,
        trainable: prepared.trainable,
        share: prepared.share,
        lr: Some(prepared.config.lr),
        steps: prepared.config.steps,
        ..Found::default()
    }
}

/// What is kept of [`base`]. Fails if it was made with other inputs.
pub fn kept_base<B: Backend>(
    stage: &Stage<'_, B>,
    eval_data: &Corpus,
    spec: &RunSpec,
    dir: &Path,
) -> Result<Option<Finished>> {
    take_over(dir, &base_inputs(stage, eval_data, spec)?)
}

fn base_inputs<B: Backend>(stage: &Stage<'_, B>, eval_data: &Corpus, spec: &RunSpec) -> Result<Settings> {
    let encoding = &spec.data.encoding;
    let mut inputs = shared_inputs(stage, eval_data, true);
    inputs.insert("template".into(), json!(encoding.template()));
    inputs.insert("seq-len".into(), json!(encoding.seq_len));
    insert_digest(&mut inputs, "template-file", Path::new(encoding.template()))?;
    if let Some(path) = &encoding.chat_template {
        insert_digest(&mut inputs, "chat-template-file", path)?;
    }
    if let Some(format) = encoding.data_format {
        inputs.insert("data-format".into(), json!(format));
    }
    Ok(inputs)
}

/// The model without an adapter, on records as the runs of these options have them; kept in `dir`.
pub fn base<B: Backend>(stage: &Stage<'_, B>, eval_data: &Corpus, spec: &RunSpec, dir: &Path) -> Result<Finished> {
    let (inputs, encoding) = (base_inputs(stage, eval_data, spec)?, &spec.data.encoding);
    if let Some(finished) = take_over(dir, &inputs)? {
        return Ok(finished);
    }
    folder::make(dir)?;
    let _lock = Lock::take(dir)?;
    if let Some(finished) = take_over(dir, &inputs)? {
        return Ok(finished);
    }
    let seq_len = encoding.seq_len(stage.checkpoint.config().context)?;
    let template = Template::new(encoding, &stage.tokenizer)?;
    let encoder = Encoder { template: &template, seq_len };
    let path = &eval_data.paths[0];
    let data = encoder
        .encode(&Reading::new(encoding.data_format).read(path)?, &[])
        .with_context(|| path.display().to_string())?;
    let Measured { eval_loss, mmlu, accuracy, details } = measure(stage, None, &data, true)?;
    if !eval_loss.all.loss.is_finite() {
        let loss = eval_loss.all.loss;
        bail!("{}: the model's loss is {loss}: the model has values that are not finite", path.display());
    }
    let found = Found { eval_loss: Some(eval_loss), mmlu, accuracy, ..Found::default() };
    keep(dir, inputs, Finished { found, details })
}

fn shared_inputs<B: Backend>(stage: &Stage<'_, B>, eval_data: &Corpus, ask: bool) -> Settings {
    let questions = stage.questions.as_ref().filter(|_| ask).map(|questions| &questions.digest);
    let (parameters, bytes) = (stage.checkpoint.parameters(), stage.checkpoint.bytes());
    let inputs = [
        ("hydra", json!(env!("CARGO_PKG_VERSION"))),
        ("model", json!({"path": stage.options.model, "parameters": parameters, "bytes": bytes})),
        (WEIGHTS, json!(weights(stage.checkpoint))),
        ("precision", json!(stage.options.device.precision())),
        ("eval-data", json!(eval_data.digests())),
        ("mmlu", json!(questions)),
    ];
    let mut inputs: Settings = inputs.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
    if let Some(asked) = stage.asked.as_ref().filter(|_| ask) {
        inputs.insert("accuracy".into(), asked.inputs.clone());
    }
    inputs
}

/// The digest of a file, if there is one: a template may be a name.
fn insert_digest(inputs: &mut Settings, key: &str, path: &Path) -> Result<()> {
    if path.is_file() {
        inputs.insert(key.into(), describe(path)?["sha256"].take());
    }
    Ok(())
}

fn keep(dir: &Path, inputs: Settings, finished: Finished) -> Result<Finished> {
    let file = File { hash: hash(&inputs)?, inputs, found: finished.found };
    let result = serde_json::to_string_pretty(&file)? + "\n";
    let details = compact(&finished.details)?;
    write_all_atomically(&[(dir.join(RECORDS), details.as_bytes()), (dir.join(RESULT), result.as_bytes())])?;
    Ok(Finished { found: file.found, details: finished.details })
}

fn hash(inputs: &Settings) -> Result<String> {
    let mut inputs = Value::Object(inputs.clone());
    inputs.sort_all_objects();
    Ok(sha256::of_text(&serde_json::to_string(&inputs)?))
}

/// What `dir` keeps, if it is finished. Fails if it was made with other inputs.
fn take_over(dir: &Path, inputs: &Settings) -> Result<Option<Finished>> {
    let path = dir.join(RESULT);
    if !path.is_file() {
        return Ok(None);
    }
    let file: File = read(&path)?;
    let keys =
        inputs.keys().chain(file.inputs.keys()).filter(|key| *key != WEIGHTS || file.inputs.contains_key(WEIGHTS));
    let value = |inputs: &Settings, key: &String| inputs.get(key).map(comparable);
    if let Some(key) = keys.into_iter().find(|key| value(&file.inputs, key) != value(inputs, key)) {
        let text =
            |inputs: &Settings| inputs.get(key).map_or("nothing".to_string(), |value| printable(&value.to_string()));
        let (was, is) = (text(&file.inputs), text(inputs));
        bail!(
            "{}: made with other options: {key} was {was} and is {is} now; remove that folder to repeat the run, or give another --out",
            path.display()
        );
    }
    Ok(Some(Finished { found: file.found, details: read(&dir.join(RECORDS))? }))
}

/// A value whose numbers are equal if they are the same: 32 and 32.0 are.
fn comparable(value: &Value) -> Value {
    match value {
        Value::Number(number) => match number.as_f64() {
            // Whole numbers that f64 holds exactly.
            Some(x) if number.is_f64() && x.fract() == 0.0 && x.abs() < 2f64.powi(53) => Value::from(x as i64),
            _ => value.clone(),
        },
        Value::Array(values) => values.iter().map(comparable).collect(),
        Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), comparable(value))).collect(),
        other => other.clone(),
    }
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let at = || path.display().to_string();
    folder::no_pipe(path)?;
    let text = std::fs::read_to_string(path).with_context(at)?;
    serde_json::from_str(&text).with_context(at)
}
