//! What a run starts from: records with their labels, and an adapter, new or from a file.

use super::choices::{Heads, Targets};
use super::schedule::TrainConfig;
use super::spec::RunSpec;
use crate::cluster::{self, Clustering};
use crate::data::records::{self, CATEGORY, Reading, Record};
use crate::hub;
use crate::memory;
use crate::options::{Count, Finite, NonNegative};
use anyhow::{Context, Result, bail};
use hydra_runtime::adapter::{Adapter, AdapterConfig, GateKind, HeadInit, Method};
use hydra_runtime::config::Config;
use std::path::Path;

/// The files that a run's options name, read.
pub struct Start<'a> {
    spec: &'a RunSpec,
    model: &'a Config,
    /// `--init-adapter`
    init: Option<Adapter>,
    /// The records' field that holds their label.
    pub field: String,
    /// `--data`
    pub records: Vec<Record>,
    /// `--eval-data`
    pub eval_records: Option<Vec<Record>>,
}

impl<'a> Start<'a> {
    /// Reads the files.
    pub fn read(spec: &'a RunSpec, model: &'a Config) -> Result<Self> {
        let init = spec.adapter.init_adapter.as_deref().map(|dir| Adapter::load(dir, model)).transpose()?;
        let field = label_field(spec, init.as_ref())?;
        let reading = Reading { label_field: &field, format: spec.data.encoding.data_format };
        // For their digests, too.
        spec.data.data.iter().chain(&spec.evaluation.eval_data).try_for_each(|path| records::readable_twice(path))?;
        let records = reading.read_all(&spec.data.data)?;
        let eval_data = spec.evaluation.eval_data.as_deref();
        let eval_records = eval_data.map(|path| reading.read(path)).transpose()?;
        Ok(Self { spec, model, init, field, records, eval_records })
    }

    /// The adapter that a run on `records` starts with, and the clusters that `--heads auto` counts.
    pub fn adapter(&self, records: &[Record]) -> Result<(Adapter, Option<Clustering>)> {
        let clustering = clusters(self.spec, records)?;
        let labels = records::labels(records);
        let adapter = match &self.init {
            Some(adapter) => from_file(self.spec, adapter.clone(), &labels)?,
            None => self.fresh(&labels, clustering.as_ref().map(|found| found.k))?,
        };
        let gate = adapter.config.gate;
        if self.spec.training.router_lr.is_some() && gate != GateKind::Router {
            bail!("--router-lr needs a router, and the gate is {}", gate.name());
        }
        Ok((adapter, clustering))
    }

    /// Fails if the options don't go together for a run on `records`; trains nothing.
    pub fn check(&self, records: &[Record]) -> Result<()> {
        self.adapter(records)?;
        TrainConfig::new(self.spec, records.len())?;
        Ok(())
    }

    /// A new adapter; `auto` is the number of clusters.
    fn fresh(&self, labels: &[String], auto: Option<usize>) -> Result<Adapter> {
        let Self { spec, model, field, .. } = self;
        let (method, gate, options) = (spec.method(), spec.gate(), &spec.adapter);
        if method == Method::Lora && options.gate.is_some() {
            bail!("--method lora takes no --gate: it has one head");
        }
        match options.heads {
            Some(Heads::Number(heads)) if method == Method::Lora && heads.get() > 1 => {
                bail!("--method lora has one head: leave --heads {heads} out");
            }
            _ => {}
        }
        if gate == GateKind::Label && labels.is_empty() {
            let files = records::names(&spec.data.data);
            bail!("{files}: the label gate needs records with a \"{field}\", and none has one; see --label-field");
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
            rank: options.rank.map_or(defaults.rank, Count::get),
            lora_heads: match options.heads {
                Some(Heads::Number(heads)) => heads.get(),
                Some(Heads::Auto) => auto.unwrap_or(heads),
                None => heads,
            },
            alpha: options.alpha.map_or(defaults.alpha, Finite::f32),
            dropout: options.dropout.map_or(defaults.dropout, NonNegative::f32),
            head_dropout: options.head_dropout.map_or(defaults.head_dropout, NonNegative::f32),
            head_init: options.head_init.map_or(defaults.head_init, HeadInit::from),
            temperature: options.router_temperature.map_or(defaults.temperature, NonNegative::f32),
            top_k: options.top_k.map(Count::get),
            load_balance: spec.training.load_balance.map_or(defaults.load_balance, NonNegative::f32),
            targets: options.targets.clone().map_or(defaults.targets, |Targets(targets)| targets),
            labels: labels.to_vec(),
            label_field: (field != CATEGORY).then(|| field.clone()),
            base_model: Some(base_model(spec.model())),
            ..defaults
        };
        config.check()?;
        // The adapter, what the trainer has of its size, and two copies while it is saved: `memory::of_training`.
        memory::require(
            config.parameters(model).saturating_mul(4 * 10),
            &format!("an adapter of rank {}", config.rank),
        )?;
        Ok(Adapter::init(model, config, spec.seed())?)
    }
}

/// The model as the adapter's file names it, for other programs in other folders: a local path is absolute.
fn base_model(model: &str) -> String {
    match std::path::absolute(model) {
        Ok(path) if path.exists() => path.display().to_string(),
        _ => hub::repository(model).unwrap_or_else(|| model.to_string()),
    }
}

/// The records' field that holds their label.
fn label_field(spec: &RunSpec, init: Option<&Adapter>) -> Result<String> {
    let gate = init.map_or(spec.gate(), |adapter| adapter.config.gate);
    match &spec.adapter.label_field {
        Some(_) if gate != GateKind::Label => {
            bail!("--label-field needs the label gate, and the gate is {}", gate.name())
        }
        Some(field) => Ok(field.clone()),
        None => {
            let own = init.and_then(|adapter| adapter.config.label_field.clone());
            Ok(own.unwrap_or_else(|| CATEGORY.into()))
        }
    }
}

/// The clusters that `--heads auto` counts.
fn clusters(spec: &RunSpec, records: &[Record]) -> Result<Option<Clustering>> {
    if spec.adapter.heads != Some(Heads::Auto) {
        return Ok(None);
    }
    if let Some(dir) = &spec.adapter.init_adapter {
        bail!("--heads auto: --init-adapter {} already has its number of heads", dir.display());
    }
    match (spec.method(), spec.gate()) {
        (Method::Lora, _) => bail!("--heads auto: --method lora has one head"),
        (_, GateKind::Label) => bail!(
            "--heads auto: under the label gate each label has a head; to train a head for each cluster, run `hydra cluster --out DIR` \
             and train on its files with --label-field cluster"
        ),
        _ => {}
    }
    cluster::find(records, cluster::Range::default(), spec.seed()).map(Some).context("--heads auto")
}

/// An adapter's file says what it is; options that differ are refused. Dropout and load balance belong to training.
fn from_file(spec: &RunSpec, mut adapter: Adapter, labels: &[String]) -> Result<Adapter> {
    let options = &spec.adapter;
    let dir = options.init_adapter.as_deref().unwrap_or(Path::new(""));
    let config = &mut adapter.config;
    let own_field = config.label_field.as_deref().unwrap_or(CATEGORY);
    let differs = [
        ("method", options.method.is_some_and(|method| Method::from(method) != config.method)),
        ("gate", options.gate.is_some_and(|gate| GateKind::from(gate) != config.gate)),
        ("rank", options.rank.is_some_and(|rank| rank.get() != config.rank)),
        ("heads", options.heads.is_some_and(|heads| heads != Heads::Number(Count::new(config.lora_heads)))),
        ("alpha", options.alpha.is_some_and(|alpha| alpha.f32() != config.alpha)),
        ("head-init", options.head_init.is_some_and(|init| HeadInit::from(init) != config.head_init)),
        ("router-temperature", options.router_temperature.is_some_and(|t| t.f32() != config.temperature)),
        ("top-k", options.top_k.is_some_and(|top_k| Some(top_k.get()) != config.top_k)),
        ("targets", options.targets.as_ref().is_some_and(|Targets(targets)| *targets != config.targets)),
        ("label-field", options.label_field.as_deref().is_some_and(|field| field != own_field)),
    ];
    if let Some((name, _)) = differs.iter().find(|(_, differs)| *differs) {
        bail!("--{name} differs from that of --init-adapter {}; leave it out", dir.display());
    }
    config.dropout = options.dropout.map_or(config.dropout, NonNegative::f32);
    config.head_dropout = options.head_dropout.map_or(config.head_dropout, NonNegative::f32);
    config.load_balance = spec.training.load_balance.map_or(config.load_balance, NonNegative::f32);
    if config.labels.is_empty() {
        config.labels = labels.to_vec();
    }
    if config.gate == GateKind::Label && config.labels.len() > config.lora_heads {
        let (labels, heads) = (config.labels.len(), config.lora_heads);
        bail!("--init-adapter {}: expected at most {heads} labels, one for each head, found {labels}", dir.display());
    }
    config.check()?;
    Ok(adapter)
}
