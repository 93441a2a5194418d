//! What a run starts from: records with their labels, and an adapter, new or from a file.

use super::{Arguments, recipe};
use crate::cluster::{self, Clustering};
use crate::cmd::{positive, targets};
use crate::data::records::{self, Record};
use crate::device::room;
use anyhow::{Context, Result, bail};
use hydra_runtime::adapter::{Adapter, AdapterConfig, GateKind, HeadInit, Method};
use hydra_runtime::config::Config;
use std::path::Path;
use std::str::FromStr;

/// `--heads`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heads {
    /// As many as there are clusters.
    Auto,
    /// So many.
    Number(usize),
}

impl FromStr for Heads {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            number => positive(number).map(Self::Number).map_err(|wanted| format!("{wanted}, or auto")),
        }
    }
}

/// What the options name, read.
pub struct Source<'a> {
    arguments: &'a Arguments,
    model: &'a Config,
    /// `--init-adapter`
    init: Option<Adapter>,
    /// Where records have their label.
    field: String,
    /// `--data`
    pub records: Vec<Record>,
    /// `--eval-data`
    pub held_out: Option<Vec<Record>>,
}

impl<'a> Source<'a> {
    /// Reads it.
    pub fn read(arguments: &'a Arguments, model: &'a Config) -> Result<Self> {
        let init = arguments.init_adapter.as_deref().map(|dir| Adapter::load(dir, model)).transpose()?;
        let field = label_field(arguments, init.as_ref())?;
        let records = records::read_all(&arguments.data, &field)?;
        let held_out = arguments.eval_data.as_deref().map(|path| records::read_labelled(path, &field)).transpose()?;
        Ok(Self { arguments, model, init, field, records, held_out })
    }

    /// The adapter that a run on `records` starts with, and the clusters that `--heads auto` counts.
    pub fn start(&self, records: &[Record]) -> Result<(Adapter, Option<Clustering>)> {
        let clustering = clusters(self.arguments, records)?;
        let labels = records::labels(records);
        let adapter = match &self.init {
            Some(adapter) => from_file(self.arguments, adapter.clone(), &labels)?,
            None => self.fresh(&labels, clustering.as_ref().map(|found| found.k))?,
        };
        let gate = adapter.config.gate;
        if self.arguments.router_lr.is_some() && gate != GateKind::Router {
            bail!("--router-lr goes with the router, and the gate is {}", gate.name());
        }
        Ok((adapter, clustering))
    }

    /// Fails if the options don't go together for a run on `records`; trains nothing.
    pub fn check(&self, records: &[Record]) -> Result<()> {
        self.start(records)?;
        recipe(self.arguments, records.len())?;
        Ok(())
    }

    /// A new adapter; `auto` is the number of heads that was found.
    fn fresh(&self, labels: &[String], auto: Option<usize>) -> Result<Adapter> {
        let Self { arguments, model, field, .. } = self;
        let (method, gate) = method_and_gate(arguments);
        if gate == GateKind::Label && labels.is_empty() {
            bail!(
                "the label gate goes by the records' \"{field}\", and none has one in --data {}",
                records::names(&arguments.data)
            );
        }
        let defaults = AdapterConfig::default();
        let heads = match (method, gate) {
            (Method::Lora, _) => 1,
            (_, GateKind::Label) => labels.len(),
            _ => defaults.lora_heads,
        };
        let config = AdapterConfig {
            method,
            gate,
            rank: arguments.rank.unwrap_or(defaults.rank),
            lora_heads: match arguments.heads {
                Some(Heads::Number(heads)) => heads,
                Some(Heads::Auto) => auto.unwrap_or(heads),
                None => heads,
            },
            alpha: arguments.alpha.unwrap_or(defaults.alpha),
            dropout: arguments.dropout.unwrap_or(defaults.dropout),
            head_dropout: arguments.head_dropout.unwrap_or(defaults.head_dropout),
            head_init: head_init(arguments).unwrap_or(defaults.head_init),
            temperature: arguments.router_temperature.unwrap_or(defaults.temperature),
            top_k: arguments.top_k,
            load_balance: arguments.load_balance.unwrap_or(defaults.load_balance),
            targets: arguments.targets.as_deref().map_or(Ok(defaults.targets), targets)?,
            labels: labels.to_vec(),
            label_field: (field != records::CATEGORY).then(|| field.clone()),
            base_model: Some(arguments.model.model.clone()),
            ..defaults
        };
        config.check()?;
        // Itself, in training, its gradient, two moments, the three before the latest step, and files of it, 4 bytes a value.
        room(config.parameters(model).saturating_mul(4 * 11), &format!("an adapter of rank {}", config.rank))?;
        Ok(Adapter::init(model, config, arguments.seed)?)
    }
}

/// The method and the gate that were asked for.
fn method_and_gate(arguments: &Arguments) -> (Method, GateKind) {
    let method = arguments.method.as_deref().and_then(Method::parse).unwrap_or(Method::Hydra);
    (method, arguments.gate.as_deref().and_then(GateKind::parse).unwrap_or(method.default_gate()))
}

fn head_init(arguments: &Arguments) -> Option<HeadInit> {
    arguments.head_init.as_deref().and_then(HeadInit::parse)
}

/// Where records have their label.
fn label_field(arguments: &Arguments, init: Option<&Adapter>) -> Result<String> {
    let gate = init.map_or(method_and_gate(arguments).1, |adapter| adapter.config.gate);
    match &arguments.label_field {
        Some(_) if gate != GateKind::Label => {
            bail!("--label-field goes with the label gate, and the gate is {}", gate.name())
        }
        Some(field) => Ok(field.clone()),
        None => {
            let own = init.and_then(|adapter| adapter.config.label_field.clone());
            Ok(own.unwrap_or_else(|| records::CATEGORY.into()))
        }
    }
}

/// The clusters that `--heads auto` counts.
fn clusters(arguments: &Arguments, records: &[Record]) -> Result<Option<Clustering>> {
    if arguments.heads != Some(Heads::Auto) {
        return Ok(None);
    }
    if let Some(dir) = &arguments.init_adapter {
        bail!("--heads auto: --init-adapter {} has its number of heads", dir.display());
    }
    match method_and_gate(arguments) {
        (Method::Lora, _) => bail!("--heads auto: a lora has one head"),
        (_, GateKind::Label) => bail!(
            "--heads auto: under the label gate each label has a head; `hydra cluster --out DIR` writes the records with their \
             cluster, and --label-field cluster trains by it"
        ),
        _ => {}
    }
    cluster::find(records, cluster::Range::default(), arguments.seed).map(Some).context("--heads auto")
}

/// An adapter's file says what it is; options that say otherwise are refused. Dropout and load balance are training's own.
fn from_file(arguments: &Arguments, mut adapter: Adapter, labels: &[String]) -> Result<Adapter> {
    let dir = arguments.init_adapter.as_deref().unwrap_or(Path::new(""));
    let config = &mut adapter.config;
    let asked = arguments.targets.as_deref().map(targets).transpose()?;
    let own_field = config.label_field.as_deref().unwrap_or(records::CATEGORY);
    let differs = [
        ("method", arguments.method.as_deref().is_some_and(|name| name != config.method.name())),
        ("gate", arguments.gate.as_deref().is_some_and(|name| name != config.gate.name())),
        ("rank", arguments.rank.is_some_and(|rank| rank != config.rank)),
        ("heads", arguments.heads.is_some_and(|heads| heads != Heads::Number(config.lora_heads))),
        ("alpha", arguments.alpha.is_some_and(|alpha| alpha != config.alpha)),
        ("head-init", head_init(arguments).is_some_and(|init| init != config.head_init)),
        ("router-temperature", arguments.router_temperature.is_some_and(|t| t != config.temperature)),
        ("top-k", arguments.top_k.is_some_and(|top_k| Some(top_k) != config.top_k)),
        ("targets", asked.is_some_and(|targets| targets != config.targets)),
        ("label-field", arguments.label_field.as_deref().is_some_and(|field| field != own_field)),
    ];
    if let Some((name, _)) = differs.iter().find(|(_, differs)| *differs) {
        bail!("--{name} is another than that of --init-adapter {}", dir.display());
    }
    if let Some(dropout) = arguments.dropout {
        config.dropout = dropout;
    }
    config.head_dropout = arguments.head_dropout.unwrap_or(config.head_dropout);
    config.load_balance = arguments.load_balance.unwrap_or(config.load_balance);
    if config.labels.is_empty() {
        config.labels = labels.to_vec();
    }
    if config.gate == GateKind::Label && config.labels.len() > config.lora_heads {
        bail!("{} labels for the {} heads of --init-adapter {}", config.labels.len(), config.lora_heads, dir.display());
    }
    config.check()?;
    Ok(adapter)
}
