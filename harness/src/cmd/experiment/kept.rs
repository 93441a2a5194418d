//! One run with one seed: trained, measured, and kept.
//!
//! ```text
//! DIR/result.json      inputs and their hash, what was found; its presence says that all of this is finished
//! DIR/records.json     by record: loss and targets; by question: right or wrong
//! DIR/..               what finetune writes
//! ```
//! A finished one is taken up as it is. One that was interrupted goes on by `--resume`. One whose inputs are others than those
//! asked for is refused: results of two experiments never mix.

use super::plan::{Run, Settings, words};
use super::{Corpus, Stage, compact, digest};
use crate::cmd::finetune::manifest::{describe, weights};
use crate::cmd::finetune::{Prepared, begun};
use crate::data::encode::Encoder;
use crate::data::records;
use crate::data::template::Template;
use crate::device::ModelArgs;
use crate::heldout::{self, HeldOut};
use crate::mmlu::score::score;
use crate::mmlu::table::Report;
use crate::progress::Progress;
use crate::{interrupt, memory};
use anyhow::{Context, Result, bail};
use hydra_runtime::Error;
use hydra_runtime::adapter::Adapter;
use hydra_runtime::atomic::write_all_atomically;
use hydra_runtime::backend::Backend;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::evaluate::SequenceLoss;
use hydra_runtime::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

const RESULT: &str = "result.json";
const RECORDS: &str = "records.json";
/// An input that earlier versions did not write.
const WEIGHTS: &str = "model-fingerprint";

/// What is to be done.
pub struct Task<'a> {
    /// The run.
    pub run: &'a Run,
    /// Its settings here.
    pub settings: Settings,
    /// Its seed.
    pub seed: u64,
    /// To train on.
    pub data: &'a Corpus,
    /// To measure on.
    pub eval_data: &'a Corpus,
    /// Whether the questions are asked, where there are some.
    pub ask: bool,
    /// Its folder.
    pub dir: PathBuf,
}

/// What was found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Found {
    /// The command line, `hydra` left out; empty for the model without an adapter.
    pub command: Vec<String>,
    /// Trainable parameters.
    pub trainable: u64,
    /// Their share of all.
    pub share: f64,
    /// Highest learning rate.
    pub lr: Option<f64>,
    /// Steps.
    pub steps: usize,
    /// Tokens trained on.
    pub tokens: usize,
    /// Over the steps' wall-clock time.
    pub tokens_per_second: Option<f64>,
    /// Resident memory at most while training, weights included; of the last part of a run that was interrupted.
    pub peak_bytes: Option<u64>,
    /// Loss on the held-out records; `None` where training came to values that are not finite.
    pub held_out: Option<HeldOut>,
    /// Accuracy.
    pub mmlu: Option<Accuracy>,
    /// Why there is no loss.
    pub diverged: Option<String>,
}

/// Of one adapter.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Accuracy {
    /// Questions weighed alike.
    pub micro: f64,
    /// Subjects weighed alike.
    pub r#macro: f64,
    /// Asked.
    pub questions: usize,
}

/// By record and by question.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Details {
    /// Negative log-likelihood of each held-out record.
    pub nll: Vec<f64>,
    /// Its targets.
    pub targets: Vec<usize>,
    /// Its category.
    pub categories: Vec<Option<String>>,
    /// Each question's subject.
    pub subjects: Vec<String>,
    /// Whether its answer is right: 0 or 1.
    pub correct: Vec<u8>,
    /// Training loss by step.
    pub training: Vec<f64>,
}

#[derive(Serialize, Deserialize)]
struct File {
    hash: String,
    inputs: Map<String, Value>,
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
    /// Fails if the folder holds a finished run of other inputs. `None` if there is none.
    pub fn kept<B: Backend>(&self, stage: &Stage<'_, '_, B>) -> Result<Option<Finished>> {
        take_up(&self.dir, &self.inputs(stage)?)
    }

    fn inputs<B: Backend>(&self, stage: &Stage<'_, '_, B>) -> Result<Map<String, Value>> {
        let mut inputs = shared_inputs(stage, self.eval_data, self.ask);
        inputs.insert("data".into(), json!(self.data.digests()));
        inputs.insert("seed".into(), self.seed.into());
        // How often a run saves changes nothing that is kept.
        inputs.extend(self.settings.clone().into_iter().filter(|(key, _)| key != "save-every"));
        // Of files that settings name, what is in them counts.
        for (key, file) in [("template", ""), ("init-adapter", "adapter_model.safetensors")] {
            let path = self.settings.get(key).and_then(Value::as_str).map(|path| Path::new(path).join(file));
            if let Some(path) = path.filter(|path| path.is_file()) {
                inputs.insert(format!("{key}-file"), describe(&path)?["sha256"].take());
            }
        }
        Ok(inputs)
    }

    /// finetune's command line for it.
    pub fn words(&self, model: &str) -> Vec<String> {
        let text = |path: &Path| path.display().to_string();
        let data: Vec<String> = self.data.paths.iter().map(|path| text(path)).collect();
        words(model, &data, &text(&self.eval_data.paths[0]), &text(&self.dir), &self.settings, self.seed)
    }

    /// Fails if the records, as tokens, are none to train or measure on: the same for all runs, whose template and length are one.
    pub fn check<B: Backend>(
        &self,
        model: &ModelArgs,
        checkpoint: &Checkpoint,
        tokenizer: &Tokenizer,
        device: &B,
    ) -> Result<()> {
        let arguments = self.run.arguments(&self.words(&model.model))?;
        Prepared::new(arguments, checkpoint, tokenizer, device).map(drop)
    }

    /// Does what is left to do, or ends with [`interrupt::Stopped`].
    pub fn finish<B: Backend>(&self, stage: &Stage<'_, '_, B>) -> Result<Finished> {
        let inputs = self.inputs(stage)?;
        if let Some(finished) = take_up(&self.dir, &inputs)? {
            return Ok(finished);
        }
        let mut command = self.words(&stage.options.model);
        command.extend(stage.options.device.words());
        let mut line = command.clone();
        if begun(&self.dir) {
            line.push("--resume".into());
        }
        let arguments = self.run.arguments(&line)?;
        let measured = self.settings.contains_key("eval-every");
        let prepared = Prepared::new(arguments, stage.checkpoint, &stage.tokenizer, stage.model.backend())?;
        let folder = prepared.open_folder()?;
        memory::reset_peak();
        let held = prepared.held().filter(|_| measured);
        // Watching a router takes a forward pass over hundreds of records: too much for a trial.
        let trained = match prepared.train(&stage.model, held, &folder, self.ask) {
            Ok(done) => done.trained,
            Err(error) if matches!(error.downcast_ref(), Some(Error::NotFinite { .. })) => {
                let found = Found { diverged: Some(format!("{error:#}")), ..self.found(&prepared, command) };
                return keep(&self.dir, inputs, Finished { found, details: Details::default() });
            }
            Err(error) => return Err(error),
        };
        let peak_bytes = memory::peak();
        interrupt::check()?;
        let seconds: f64 = trained.steps.iter().map(|step| step.tokens as f64 / step.tokens_per_second).sum();
        let tokens: usize = trained.steps.iter().map(|step| step.tokens).sum();
        let held_out = prepared.held_out.as_ref().context("a run without held-out records")?;
        let (held, mmlu, mut details) = measure(stage, Some(&trained.adapter), held_out, self.ask)?;
        details.training = trained.steps.iter().map(|step| step.loss).collect();
        let finite = held.all.loss.is_finite();
        let found = Found {
            tokens,
            tokens_per_second: Some(tokens as f64 / seconds),
            peak_bytes,
            diverged: (!finite).then(|| format!("the held-out loss is {}", held.all.loss)),
            held_out: finite.then_some(held),
            mmlu,
            ..self.found(&prepared, command)
        };
        keep(&self.dir, inputs, Finished { found, details })
    }

    fn found(&self, prepared: &Prepared, command: Vec<String>) -> Found {
        Found {
            command,
            trainable: prepared.trainable,
            share: prepared.share,
            lr: Some(prepared.recipe.lr),
            steps: prepared.recipe.steps,
            tokens: 0,
            tokens_per_second: None,
            peak_bytes: None,
            held_out: None,
            mmlu: None,
            diverged: None,
        }
    }
}

/// The model without an adapter, on records as the runs of these settings have them; kept in `dir`.
pub fn base<B: Backend>(
    stage: &Stage<'_, '_, B>,
    eval_data: &Corpus,
    settings: &Settings,
    dir: &Path,
) -> Result<Finished> {
    let template = settings.get("template").and_then(Value::as_str).unwrap_or("plain");
    let seq_len = settings.get("seq-len").and_then(Value::as_u64).map(|n| n as usize);
    let mut inputs = shared_inputs(stage, eval_data, true);
    inputs.extend([("template".to_string(), json!(template)), ("seq-len".to_string(), json!(seq_len))]);
    if let Some(finished) = take_up(dir, &inputs)? {
        return Ok(finished);
    }
    let seq_len = crate::cmd::seq_len(seq_len, stage.checkpoint.config().context)?;
    let template = Template::from_argument(template, &stage.tokenizer)?;
    let encoder = Encoder { tokenizer: &stage.tokenizer, template: &template, seq_len };
    let path = &eval_data.paths[0];
    let data = encoder.encode(&records::read(path)?, &[]).with_context(|| path.display().to_string())?;
    let (held_out, mmlu, details) = measure(stage, None, &data, true)?;
    if !held_out.all.loss.is_finite() {
        bail!("{}: the model's loss is {}; it has values that are not finite", path.display(), held_out.all.loss);
    }
    let found = Found {
        command: Vec::new(),
        trainable: 0,
        share: 0.0,
        lr: None,
        steps: 0,
        tokens: 0,
        tokens_per_second: None,
        peak_bytes: None,
        held_out: Some(held_out),
        mmlu,
        diverged: None,
    };
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    keep(dir, inputs, Finished { found, details })
}

fn shared_inputs<B: Backend>(stage: &Stage<'_, '_, B>, eval_data: &Corpus, ask: bool) -> Map<String, Value> {
    let questions = stage.questions.as_ref().filter(|_| ask).map(|questions| &questions.digest);
    let model = json!({"path": stage.options.model, "parameters": stage.checkpoint.parameters(), "bytes": stage.checkpoint.bytes()});
    let inputs = [
        ("hydra", json!(env!("CARGO_PKG_VERSION"))),
        ("model", model),
        (WEIGHTS, json!(weights(stage.checkpoint))),
        ("precision", json!(stage.options.device.precision())),
        ("eval-data", json!(eval_data.digests())),
        ("mmlu", json!(questions)),
    ];
    inputs.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
}

fn measure<B: Backend>(
    stage: &Stage<'_, '_, B>,
    adapter: Option<&Adapter>,
    data: &crate::data::encode::Encoded,
    ask: bool,
) -> Result<(HeldOut, Option<Accuracy>, Details)> {
    let mut progress = Progress::new("records", data.sequences.len() as u64, 0);
    let losses = heldout::losses(&stage.model, adapter, data, |done| progress.update(done as u64, "held out"))?;
    drop(progress);
    let held_out = HeldOut::of(&losses, &data.categories);
    if !held_out.all.loss.is_finite() {
        // Its questions have no answers, and JSON has no numbers for its records.
        return Ok((held_out, None, Details::default()));
    }
    let mut details = Details {
        nll: losses.iter().map(|loss: &SequenceLoss| loss.nll).collect(),
        targets: losses.iter().map(|loss| loss.targets).collect(),
        categories: data.categories.clone(),
        ..Details::default()
    };
    let mut accuracy = None;
    if let Some(questions) = stage.questions.as_ref().filter(|_| ask) {
        let outcome = score(&stage.model, adapter, &stage.tokenizer, &questions.subjects, questions.scoring)?;
        let report = Report::new(&outcome, 0, questions.scoring);
        let (micro, r#macro) = (report.accuracy_micro, report.accuracy_macro);
        accuracy = Some(Accuracy { micro, r#macro, questions: report.questions });
        details.subjects = outcome.predictions.iter().map(|p| p.subject.clone()).collect();
        details.correct = outcome.predictions.iter().map(|p| u8::from(p.answer == p.prediction)).collect();
    }
    Ok((held_out, accuracy, details))
}

fn keep(dir: &Path, inputs: Map<String, Value>, finished: Finished) -> Result<Finished> {
    let file = File { hash: hash(&inputs)?, inputs, found: finished.found };
    let result = serde_json::to_string_pretty(&file)? + "\n";
    let details = compact(&finished.details)?;
    write_all_atomically(&[(dir.join(RECORDS), details.as_bytes()), (dir.join(RESULT), result.as_bytes())])?;
    Ok(Finished { found: file.found, details: finished.details })
}

fn hash(inputs: &Map<String, Value>) -> Result<String> {
    let mut inputs = Value::Object(inputs.clone());
    inputs.sort_all_objects();
    Ok(digest(&serde_json::to_string(&inputs)?))
}

/// What `dir` keeps, if it is finished.
fn take_up(dir: &Path, inputs: &Map<String, Value>) -> Result<Option<Finished>> {
    let path = dir.join(RESULT);
    if !path.is_file() {
        return Ok(None);
    }
    let file: File = read(&path)?;
    let mut inputs = inputs.clone();
    if !file.inputs.contains_key(WEIGHTS) {
        inputs.remove(WEIGHTS);
    }
    if file.hash != hash(&inputs)? {
        let keys = inputs.keys().chain(file.inputs.keys());
        let text = |map: &Map<String, Value>, key| map.get(key).map_or("not given".to_string(), Value::to_string);
        let mut differing =
            keys.map(|key| (key, text(&file.inputs, key), text(&inputs, key))).filter(|(_, was, is)| was != is);
        let (key, was, is) = differing
            .next()
            .map_or(("hash".into(), String::new(), String::new()), |(key, was, is)| (key.clone(), was, is));
        bail!(
            "{}: made with another configuration: {key} was {was} and is {is} now; remove that folder to have it made again, or give \
             another --out",
            path.display()
        );
    }
    Ok(Some(Finished { found: file.found, details: read(&dir.join(RECORDS))? }))
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let at = || path.display().to_string();
    let text = std::fs::read_to_string(path).with_context(at)?;
    serde_json::from_str(&text).with_context(at)
}
