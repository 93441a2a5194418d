//! `run.json`: every choice of a run, so that it can be repeated from it, and taken up only with the same ones.

use super::Arguments;
use crate::cluster::Clustering;
use crate::cmd::write_json;
use crate::data::encode::Encoded;
use crate::data::records::{CATEGORY, readable_twice};
use crate::output;
use crate::session::Recipe;
use anyhow::{Context, Result, bail};
use hydra_runtime::adapter::{Adapter, GateKind};
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::train::STATE_FILE;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Its name in the run's folder.
pub const FILE: &str = "run.json";

/// A fact: [`weights`].
const WEIGHTS: &str = "model_fingerprint";

/// Of a model's weights, as text.
pub fn weights(checkpoint: &Checkpoint) -> String {
    format!("{:016x}", checkpoint.fingerprint())
}

/// What the file holds.
#[derive(Serialize, Deserialize)]
pub struct Manifest {
    /// Name and version of this program.
    tool: Value,
    /// Options by their names on the command line, defaults filled in: what the result depends on.
    pub options: Map<String, Value>,
    /// Options that the result does not depend on.
    running: Map<String, Value>,
    /// What the options led to: files with sizes and digests, counts.
    pub facts: Map<String, Value>,
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// `null` for what is off by default: runs of versions that hadn't the option can be taken up.
fn asked<T: PartialEq>(value: T, off: T) -> Option<T> {
    (value != off).then_some(value)
}

impl Manifest {
    /// Of a run that is about to start.
    pub fn new(
        arguments: &Arguments,
        checkpoint: &Checkpoint,
        adapter: &Adapter,
        recipe: &Recipe,
        data: &Encoded,
        seq_len: usize,
        clustering: Option<&Clustering>,
    ) -> Result<Self> {
        let config = &adapter.config;
        let label_field = (config.gate == GateKind::Label).then(|| config.label_field.as_deref().unwrap_or(CATEGORY));
        let clusters = clustering.map(|found| {
            let Clustering { k, reason, tried, sizes, terms, .. } = found;
            json!({"k": k, "reason": reason, "tried": tried, "sizes": sizes, "terms": terms})
        });
        let names: Vec<_> = config.targets.iter().map(|target| target.name()).collect();
        let digests = arguments.data.iter().map(|path| describe(path)).collect::<Result<Vec<_>>>()?;
        let init = arguments.init_adapter.as_ref().map(|dir| describe(&dir.join("adapter_model.safetensors")));
        let template = Path::new(&arguments.template);
        let template_file = template.is_file().then(|| describe(template)).transpose()?;
        let epochs = arguments.steps.is_none().then(|| arguments.epochs.unwrap_or(1.0));
        let options = object(json!({
            "model": arguments.model.model, "data": digests, "template": arguments.template,
            "template-file": template_file, "seq-len": seq_len,
            "method": config.method.name(), "gate": config.gate.name(), "label-field": label_field, "rank": config.rank, "heads": config.lora_heads,
            "alpha": config.alpha, "dropout": config.dropout, "targets": names, "init-adapter": init.transpose()?,
            "head-dropout": asked(config.head_dropout, 0.0), "head-init": asked(config.head_init.name(), "zero"),
            "router-temperature": asked(config.temperature, 1.0), "top-k": config.top_k,
            "load-balance": asked(config.load_balance, 0.0), "router-lr": recipe.router_lr,
            "batch": recipe.batch, "grad-accum": recipe.grad_accum, "lr": recipe.lr, "schedule": recipe.schedule,
            "warmup": arguments.warmup, "clip": recipe.clip, "steps": arguments.steps, "epochs": epochs,
            "seed": recipe.seed, "no-shuffle": !recipe.shuffle, "precision": arguments.model.device.precision(),
        }));
        let eval_data = arguments.eval_data.as_ref().map(|path| describe(path)).transpose()?;
        let running = object(json!({
            "device": arguments.model.device.device, "threads": arguments.model.device.threads,
            "recompute": recipe.recompute, "eval-data": eval_data, "eval-every": arguments.eval_every,
            "save-every": arguments.save_every, "out": arguments.out,
        }));
        let (trainable, frozen) = (adapter.parameters(), checkpoint.parameters());
        let facts = object(json!({
            "model_path": checkpoint.path(), "model_parameters": frozen, "model_bytes": checkpoint.bytes(), WEIGHTS: weights(checkpoint),
            "trainable_parameters": trainable, "trainable_share": trainable as f64 / (trainable + frozen) as f64,
            "labels": config.labels, "clusters": clusters, "records": data.sequences.len(), "records_cut": data.cut,
            "records_dropped": data.dropped, "steps": recipe.steps, "warmup_steps": recipe.warmup,
            "optimizer": {"name": "AdamW", "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
        }));
        let tool = json!({"name": "hydra", "version": env!("CARGO_PKG_VERSION")});
        Ok(Self { tool, options, running, facts })
    }

    /// Writes it.
    pub fn write(&self, out: &Path) -> Result<()> {
        write_json(&out.join(FILE), self)
    }

    /// For `--resume`: whether there is a saved state to take up. Fails, naming the option, if the run there has others.
    pub fn take_up(&self, out: &Path) -> Result<bool> {
        let path = out.join(FILE);
        let at = || path.display().to_string();
        let text = std::fs::read_to_string(&path).with_context(at)?;
        let earlier: Self = serde_json::from_str(&text).with_context(at)?;
        // Through text, so that both sides have numbers as they are written.
        let now: Map<String, Value> = serde_json::from_str(&serde_json::to_string(&self.options)?)?;
        let same = |name: &String, value: &Value| {
            contents(earlier.options.get(name).unwrap_or(&Value::Null)) == contents(value)
        };
        if let Some((name, value)) = now.iter().find(|(name, value)| !same(name, value)) {
            let before = earlier.options.get(name).unwrap_or(&Value::Null);
            bail!("--resume: --{name} is {value}, and was {before} in {}", path.display());
        }
        // Runs of versions that didn't write it can be taken up.
        if let Some(before) = earlier.facts.get(WEIGHTS).filter(|before| self.facts.get(WEIGHTS) != Some(before)) {
            bail!(
                "--resume: --model {} has other weights than when the run in {} began ({WEIGHTS} {before} there)",
                now["model"],
                path.display()
            );
        }
        if !out.join(STATE_FILE).is_file() {
            output::say(format_args!("nothing was saved in {} yet: the run starts from its beginning", out.display()));
            return Ok(false);
        }
        Ok(true)
    }
}

/// A value without the paths of files: what is in them counts, not where they are.
fn contents(value: &Value) -> Value {
    match value {
        Value::Array(all) => all.iter().map(contents).collect(),
        Value::Object(map) if map.contains_key("sha256") => map["sha256"].clone(),
        other => other.clone(),
    }
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
    let digest: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(json!({"path": path, "bytes": bytes, "sha256": digest}))
}
