//! `run.json`: every choice of a run, so that it can be repeated from it, and resumed only with the same choices.

use super::config::Settings;
use super::schedule::{TrainConfig, WARMUP};
use super::spec::RunSpec;
use crate::cluster::Clustering;
use crate::data::encode::Encoded;
use crate::data::records::{CATEGORY, readable_twice};
use crate::eval::accuracy::AccuracyArgs;
use crate::hub::locate_file;
use crate::options::{NonNegative, Seed};
use crate::{output, sha256};
use anyhow::{Context, Result, bail};
use hydra_runtime::adapter::{Adapter, GateKind};
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::train::{STATE_FILE, saved_run};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The file's name in the run's folder.
pub const FILE: &str = "run.json";

/// A fact: [`weights`].
const WEIGHTS: &str = "model_fingerprint";

/// The fingerprint of a model's weights, as text.
pub fn weights(checkpoint: &Checkpoint) -> String {
    format!("{:016x}", checkpoint.fingerprint())
}

/// Whether a run was started in this folder.
pub fn started(out: &Path) -> bool {
    out.join(FILE).is_file()
}

/// What the file holds.
#[derive(Serialize, Deserialize)]
pub struct Manifest {
    /// Name and version of this program.
    tool: Value,
    /// The run's options, for `finetune --config`, with the defaults that no other option decides.
    #[serde(default)]
    spec: Settings,
    /// What the result depends on, by the options' names: a resumed run must have the same.
    pub options: Map<String, Value>,
    /// Options that the result does not depend on.
    running: Map<String, Value>,
    /// What the options led to: files with sizes and digests, counts.
    pub facts: Map<String, Value>,
}

/// What a run is made of.
pub struct Parts<'a> {
    /// Its options.
    pub spec: &'a RunSpec,
    /// The frozen model.
    pub checkpoint: &'a Checkpoint,
    /// The adapter before the first step.
    pub adapter: &'a Adapter,
    /// How it is trained.
    pub config: &'a TrainConfig,
    /// The training set.
    pub data: &'a Encoded,
    /// The length at which sequences are cut, in tokens.
    pub seq_len: usize,
    /// The clusters that `--heads auto` found.
    pub clustering: Option<&'a Clustering>,
}

impl Manifest {
    /// Describes a run that is about to start.
    pub fn new(parts: &Parts<'_>) -> Result<Self> {
        let tool = json!({"name": "hydra", "version": env!("CARGO_PKG_VERSION")});
        let Parts { spec, config, .. } = parts;
        let eval_data = spec.evaluation.eval_data.as_ref().map(|path| describe(path)).transpose()?;
        let mut running = object(json!({
            "device": spec.device.name(), "threads": spec.device.threads, "recompute": config.recompute,
            "eval-data": eval_data, "eval-every": spec.evaluation.eval_every,
            "save-every": spec.output.save_every, "out": spec.output.out,
        }));
        if let Some(accuracy) = spec.evaluation.accuracy() {
            running.insert("accuracy".into(), serde_json::to_value(accuracy)?);
        }
        Ok(Self { tool, spec: filled(spec, config).settings(), options: options(parts)?, running, facts: facts(parts) })
    }

    /// What identifies the run in its trainer's state: what the result depends on, without what is off and without paths.
    pub fn identity(&self) -> Result<String> {
        let chosen = self.options.iter().filter(|(name, value)| *name != "model" && !value.is_null());
        let chosen: Map<_, _> = chosen.map(|(name, value)| (name.clone(), contents(value))).collect();
        Ok(serde_json::to_string(&chosen)?)
    }

    /// Writes the file.
    pub fn write(&self, out: &Path) -> Result<()> {
        output::write_json(&out.join(FILE), self)
    }

    /// What must be the same on every rank, by the options' names. Files may lie elsewhere; what is in them counts.
    pub fn shared(&self) -> impl Iterator<Item = (String, String)> {
        let running = ["recompute", "eval-data", "eval-every", "save-every"];
        let running = running.into_iter().map(|name| (name, self.running.get(name).unwrap_or(&Value::Null)));
        let options = self.options.iter().map(|(name, value)| (name.as_str(), value));
        let options = options.filter(|(name, _)| *name != "model").chain(running);
        let options = options.map(|(name, value)| (format!("--{name}"), contents(value).to_string()));
        let others = [("version of hydra", &self.tool["version"]), ("--model", &self.facts[WEIGHTS])];
        options.chain(others.map(|(name, value)| (name.to_string(), value.to_string())))
    }

    /// For `--resume`: whether there is a saved state to continue from. Fails, naming the option, if the run there has others.
    pub fn resumes(&self, out: &Path) -> Result<bool> {
        let path = out.join(FILE);
        let at = || path.display().to_string();
        let text = std::fs::read_to_string(&path).with_context(at)?;
        let earlier: Self = serde_json::from_str(&text).with_context(at)?;
        // Through text, so that both sides have numbers as they are written.
        let now: Map<String, Value> = serde_json::from_str(&serde_json::to_string(&self.options)?)?;
        let options = now.iter().map(|(name, value)| (name.as_str(), earlier.options.get(name), value));
        // A run's losses on an eval set are compared with each other; one that has measured none may begin to.
        let measured = earlier.running.get("eval-data").filter(|data| !data.is_null());
        let eval_data = measured.map(|before| ("eval-data", Some(before), &self.running["eval-data"]));
        let differs = |(_, before, value): &(_, Option<&Value>, &Value)| {
            contents(before.unwrap_or(&Value::Null)) != contents(value)
        };
        if let Some((name, before, value)) = options.chain(eval_data).find(differs) {
            let before = before.unwrap_or(&Value::Null);
            let [before, value] = [before, value].map(|value| output::printable(&value.to_string()));
            bail!(
                "{}: --resume needs the options of the run: expected --{name} {before}, found {value}",
                path.display()
            );
        }
        // Earlier versions wrote no fingerprint; their runs can be resumed.
        if let Some(before) = earlier.facts.get(WEIGHTS).filter(|before| self.facts.get(WEIGHTS) != Some(before)) {
            bail!(
                "{}: --model {} has other weights than when the run started: expected {WEIGHTS} {}, found {}",
                path.display(),
                now["model"],
                output::printable(&before.to_string()),
                self.facts[WEIGHTS],
            );
        }
        let state = out.join(STATE_FILE);
        // Earlier versions wrote none.
        if let Some(run) = saved_run(out)? {
            let at = || state.display().to_string();
            let saved: Map<String, Value> = serde_json::from_str(&run).with_context(at)?;
            let own: Map<String, Value> = serde_json::from_str(&self.identity()?)?;
            if let Some(name) = own.keys().chain(saved.keys()).find(|name| own.get(*name) != saved.get(*name)) {
                let [own, saved] = [&own, &saved].map(|run| run.get(name).unwrap_or(&Value::Null).to_string());
                bail!(
                    "{}: the state of another run: expected --{name} {own}, found {}",
                    at(),
                    output::printable(&saved)
                );
            }
        }
        if !state.exists() {
            let saved = Adapter::files(out).is_ok();
            let what = if saved { "no trainer_state.safetensors beside its adapter" } else { "nothing saved yet" };
            output::say(format_args!("{}: {what}; the run starts from the beginning", out.display()));
            return Ok(false);
        }
        Ok(true)
    }
}

/// The options with their defaults, so that a later version repeats the run with the same. A default that depends on other options
/// is left out: `--config FILE --batch 8` takes 8 records a step, as `--batch 8` does.
fn filled(spec: &RunSpec, config: &TrainConfig) -> RunSpec {
    let mut spec = spec.clone();
    let training = &mut spec.training;
    if training.steps.is_none() {
        training.epochs.get_or_insert(NonNegative::new(1.0));
    }
    training.lr.get_or_insert(NonNegative::new(config.lr));
    training.schedule.get_or_insert(config.schedule);
    training.warmup.get_or_insert(NonNegative::new(WARMUP));
    training.clip.get_or_insert(NonNegative::new(config.clip.into()));
    training.seed.get_or_insert(Seed::new(config.seed));
    let device = spec.device.name().to_string();
    spec.device.device.get_or_insert(device);
    spec
}

/// What the result depends on, defaults filled in, with digests of all files.
fn options(parts: &Parts<'_>) -> Result<Map<String, Value>> {
    let Parts { spec, config: train, seq_len, .. } = parts;
    let config = &parts.adapter.config;
    let label_field = (config.gate == GateKind::Label).then(|| config.label_field.as_deref().unwrap_or(CATEGORY));
    let targets: Vec<_> = config.targets.iter().map(|target| target.name()).collect();
    let data = spec.data.data.iter().map(|path| describe(path)).collect::<Result<Vec<_>>>()?;
    // A folder, or a LoRA in one GGUF file.
    let init = spec.adapter.init_adapter.as_deref().map(|path| describe(&tensors(path)?));
    let template = spec.data.encoding.template();
    let chat_template = spec.data.encoding.chat_template.as_deref().map(describe).transpose()?;
    let template_file = Path::new(template).is_file().then(|| describe(Path::new(template))).transpose()?;
    let epochs = spec.training.steps.is_none().then(|| spec.training.epochs.map_or(1.0, NonNegative::get));
    Ok(object(json!({
        "model": spec.model(), "data": data, "template": template, "template-file": template_file, "seq-len": seq_len,
        "chat-template": chat_template, "data-format": spec.data.encoding.data_format,
        "method": config.method.name(), "gate": config.gate.name(), "label-field": label_field,
        "rank": config.rank, "heads": config.lora_heads, "alpha": config.alpha, "dropout": config.dropout,
        "targets": targets, "init-adapter": init.transpose()?,
        "head-dropout": unless(config.head_dropout, 0.0), "head-init": unless(config.head_init.name(), "zero"),
        "router-temperature": unless(config.temperature, 1.0), "top-k": config.top_k,
        "load-balance": unless(config.load_balance, 0.0), "router-lr": train.router_lr,
        "batch": train.batch, "grad-accum": train.grad_accum, "lr": train.lr, "schedule": train.schedule,
        "warmup": spec.training.warmup.map_or(WARMUP, NonNegative::get), "clip": train.clip,
        "steps": spec.training.steps, "epochs": epochs, "seed": train.seed, "no-shuffle": !train.shuffle,
        "precision": spec.device.precision(),
    })))
}

/// What the options led to.
fn facts(parts: &Parts<'_>) -> Map<String, Value> {
    let Parts { checkpoint, adapter, config, data, clustering, .. } = parts;
    let clusters = clustering.map(|found| {
        let Clustering { k, reason, tried, sizes, terms, .. } = found;
        json!({"k": k, "reason": reason, "tried": tried, "sizes": sizes, "terms": terms})
    });
    let (trainable, frozen) = (adapter.parameters(), checkpoint.parameters());
    object(json!({
        "model_path": checkpoint.path(), "model_parameters": frozen, "model_bytes": checkpoint.bytes(),
        WEIGHTS: weights(checkpoint), "trainable_parameters": trainable,
        "trainable_share": trainable as f64 / (trainable + frozen) as f64,
        "labels": adapter.config.labels, "clusters": clusters, "records": data.sequences.len(),
        "records_cut": data.cut, "records_dropped": data.dropped, "steps": config.steps, "warmup_steps": config.warmup,
        "optimizer": {"name": "AdamW", "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
    }))
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// `null` for what is off by default, so that runs of versions without the option can be resumed.
fn unless<T: PartialEq>(value: T, off: T) -> Option<T> {
    (value != off).then_some(value)
}

/// A value without the paths of files: what is in them counts, not where they are.
fn contents(value: &Value) -> Value {
    match value {
        Value::Array(all) => all.iter().map(contents).collect(),
        Value::Object(map) if map.contains_key("sha256") => map["sha256"].clone(),
        other => other.clone(),
    }
}

/// What answers depend on: the options, with the digest of the records in their place.
pub fn inputs(options: &AccuracyArgs) -> Result<Value> {
    let mut inputs = serde_json::to_value(options)?;
    inputs["data"] = describe(&locate_file(&options.data)?)?["sha256"].take();
    Ok(inputs)
}

/// The file with an adapter's tensors: that of its folder, or the adapter itself where it is one file.
pub fn tensors(adapter: &Path) -> Result<PathBuf> {
    if adapter.is_file() {
        return Ok(adapter.into());
    }
    let [_, tensors] = Adapter::files(adapter)?;
    Ok(tensors)
}

/// A file's path, size and digest.
pub fn describe(path: &Path) -> Result<Value> {
    readable_twice(path)?;
    let at = || path.display().to_string();
    let mut file = File::open(path).with_context(at)?;
    let (mut hash, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 16]);
    loop {
        let read = file.read(&mut buffer).with_context(at)?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
        bytes += read;
    }
    Ok(json!({"path": path, "bytes": bytes, "sha256": sha256::hex(hash)}))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::choices::Targets;
    use clap::Args;
    use hydra_runtime::adapter::AdapterConfig;

    /// What the help names as a default is what an empty command line gets.
    #[test]
    fn defaults_are_those_of_the_help() {
        let spec = RunSpec::default();
        let config = TrainConfig::new(&spec, 100).unwrap();
        let adapter = AdapterConfig::default();
        let mut settings = filled(&spec, &config).settings();
        // Those that depend on other options.
        settings.extend(object(json!({
            "template": spec.data.encoding.template(), "seq-len": spec.data.encoding.seq_len(1 << 20).unwrap(),
            "batch": config.batch, "grad-accum": config.grad_accum, "precision": spec.device.precision(),
            "method": adapter.method.name(), "gate": adapter.gate.name(), "rank": adapter.rank,
            "heads": adapter.lora_heads, "alpha": adapter.alpha, "dropout": adapter.dropout.to_string(),
            "targets": Targets(adapter.targets),
        })));
        let command = RunSpec::augment_args(clap::Command::new("finetune"));
        let mut checked = 0;
        for option in command.get_arguments() {
            let (name, help) = (option.get_long().unwrap(), option.get_help().unwrap().to_string());
            let Some((_, rest)) = help.split_once("[default: ") else { continue };
            let default = rest.split([']', ';', ',']).next().unwrap();
            if let Some(value) = settings.get(name).filter(|_| name != "targets") {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                let text = text.trim_end_matches(".0");
                assert_eq!(default.split(' ').next().unwrap(), text, "--{name}");
                checked += 1;
            }
        }
        assert_eq!((checked, settings["targets"].as_str()), (18, Some("gate,up,down")));
    }
}
