//! `adapter_config.json`: HF PEFT's keys, the reference implementation's `lora_nums`, and `method`, `gate`, `labels` (which
//! label has which head) and `label_field` (where records have it, if not in their category).

use crate::error::printable;
use crate::json::{Object, shortest};
use crate::projection::Projection;
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::Path;

/// How A is shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// One A, a B per head.
    Hydra,
    /// One A, one B.
    Lora,
    /// An A and a B per head.
    Split,
}

/// What mixes the heads (the mathematics: `hydra_kernels::gate`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateKind {
    /// A learned softmax of each token's input.
    Router,
    /// The head of the record's category.
    Label,
    /// All heads alike.
    Uniform,
    /// The only head.
    One,
}

impl Method {
    /// All of them.
    pub const ALL: [Method; 3] = [Method::Hydra, Method::Lora, Method::Split];

    /// The name in files and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Method::Hydra => "hydra",
            Method::Lora => "lora",
            Method::Split => "split",
        }
    }

    /// From its name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.name() == name)
    }

    /// The gate that goes with it unless another is asked for.
    pub const fn default_gate(self) -> GateKind {
        match self {
            Method::Hydra => GateKind::Router,
            Method::Lora => GateKind::One,
            Method::Split => GateKind::Label,
        }
    }
}

impl GateKind {
    /// All of them.
    pub const ALL: [GateKind; 4] = [GateKind::Router, GateKind::Label, GateKind::Uniform, GateKind::One];

    /// The name in files and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            GateKind::Router => "router",
            GateKind::Label => "label",
            GateKind::Uniform => "uniform",
            GateKind::One => "one",
        }
    }

    /// From its name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|gate| gate.name() == name)
    }
}

/// An adapter's kind and sizes.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// How A is shared.
    pub method: Method,
    /// What mixes the heads.
    pub gate: GateKind,
    /// Rank of each head.
    pub rank: usize,
    /// Number of heads.
    pub heads: usize,
    /// The heads' sum is scaled by alpha / rank.
    pub alpha: f32,
    /// Probability of dropping a value of A's input in training.
    pub dropout: f32,
    /// The adapted projections, in canonical order.
    pub targets: Vec<Projection>,
    /// Categories; for the label gate, the one at position e has head e.
    pub labels: Vec<String>,
    /// The field of a record that holds its label, if it isn't the category.
    pub label_field: Option<String>,
    /// The model it was trained on.
    pub base_model: Option<String>,
    /// Further keys of `adapter_config.json`, kept as they came.
    pub extra: Map<String, Value>,
}

impl Default for AdapterConfig {
    /// The published settings.
    fn default() -> Self {
        Self {
            method: Method::Hydra,
            gate: GateKind::Router,
            rank: 4,
            heads: 4,
            alpha: 32.0,
            dropout: 0.05,
            targets: vec![Projection::Gate, Projection::Up, Projection::Down],
            labels: Vec::new(),
            label_field: None,
            base_model: None,
            extra: Map::new(),
        }
    }
}

/// Sizes beyond these are mistakes; they keep products inside 64 bits.
const MAX_RANK: usize = 1 << 16;
const MAX_HEADS: usize = 1 << 12;

impl AdapterConfig {
    /// Whether the settings go together; the text says which don't.
    pub(super) fn check(&self) -> Result<(), String> {
        let Self { rank, heads, alpha, dropout, .. } = *self;
        if !(1..=MAX_RANK).contains(&rank) {
            return Err(format!("rank {rank}, wanted 1 to {MAX_RANK}"));
        }
        if !(1..=MAX_HEADS).contains(&heads) {
            return Err(format!("{heads} heads, wanted 1 to {MAX_HEADS}"));
        }
        if !alpha.is_finite() {
            return Err(format!("alpha {alpha}, wanted a number"));
        }
        if !(0.0..1.0).contains(&dropout) {
            return Err(format!("dropout {dropout}, wanted 0 or more and less than 1"));
        }
        let (method, gate) = (self.method.name(), self.gate.name());
        if self.gate == GateKind::One && heads != 1 {
            return Err(format!("gate one with {heads} heads, wanted 1"));
        }
        if self.method == Method::Lora && self.gate != GateKind::One {
            return Err(format!("method {method} with gate {gate}, wanted one"));
        }
        if self.gate == GateKind::Label && self.labels.len() > heads {
            return Err(format!("{} labels for {heads} heads under the label gate", self.labels.len()));
        }
        if self.targets.is_empty() {
            return Err("no target projections".into());
        }
        if !self.targets.is_sorted_by(|a, b| a < b) {
            return Err("target projections twice or not in canonical order".into());
        }
        Ok(())
    }

    /// Reads the file at `path`; `tensors` are the names in the tensor file, for what the configuration leaves open.
    pub(super) fn read(path: &Path, tensors: &[&str]) -> Result<Self> {
        let mut file = Object::read(path)?;
        refuse_variants(&file)?;
        let method = match file.string("method")? {
            None => infer_method(&file, tensors),
            Some(name) => {
                Method::parse(name).ok_or_else(|| file.refuse("method", "\"hydra\", \"lora\" or \"split\""))?
            }
        };
        let gate = match file.string("gate")? {
            None => method.default_gate(),
            Some(name) => GateKind::parse(name)
                .ok_or_else(|| file.refuse("gate", "\"router\", \"label\", \"uniform\" or \"one\""))?,
        };
        let heads = match method {
            Method::Lora => 1,
            _ => file.size("lora_nums")?.ok_or_else(|| file.refuse("lora_nums", "the number of heads"))?,
        };
        let rank = file.size("r")?.ok_or_else(|| file.refuse("r", "the rank"))?;
        let alpha = file.number("lora_alpha")?.ok_or_else(|| file.refuse("lora_alpha", "a number"))? as f32;
        let config = Self {
            method,
            gate,
            rank,
            heads,
            alpha,
            dropout: file.number("lora_dropout")?.unwrap_or(0.0) as f32,
            targets: targets(&file, tensors)?,
            labels: file.strings("labels")?.unwrap_or_default(),
            label_field: file.string("label_field")?.map(str::to_owned),
            base_model: file.string("base_model_name_or_path")?.map(str::to_owned),
            extra: {
                let own =
                    ["gate", "r", "lora_alpha", "lora_dropout", "target_modules", "labels", "label_field", "method"];
                file.map.retain(|key, _| !own.contains(&key.as_str()) && key != "base_model_name_or_path");
                std::mem::take(&mut file.map)
            },
        };
        config.check().map_err(|message| file.error(message))?;
        Ok(config)
    }

    /// What [`AdapterConfig::read`] reads. A plain LoRA has no keys of ours but `method`, so that PEFT takes it as its own.
    pub(super) fn to_json(&self) -> Value {
        let mut map = self.extra.clone();
        for (key, value) in [("peft_type", "LORA"), ("task_type", "CAUSAL_LM"), ("bias", "none")] {
            map.entry(key).or_insert_with(|| value.into());
        }
        let targets: Vec<_> = self.targets.iter().map(|projection| projection.name()).collect();
        map.insert("method".into(), self.method.name().into());
        map.insert("r".into(), self.rank.into());
        map.insert("lora_alpha".into(), number(self.alpha));
        map.insert("lora_dropout".into(), shortest(self.dropout));
        map.insert("target_modules".into(), json!(targets));
        map.insert("base_model_name_or_path".into(), json!(self.base_model));
        if self.method != Method::Lora {
            map.insert("lora_nums".into(), self.heads.into());
            map.insert("gate".into(), self.gate.name().into());
        }
        if self.method != Method::Lora || !self.labels.is_empty() {
            map.insert("labels".into(), json!(self.labels));
        }
        if let Some(field) = &self.label_field {
            map.insert("label_field".into(), json!(field));
        }
        // In one order whatever serde_json's features in the program at hand: the same adapter, the same bytes.
        let mut json = Value::Object(map);
        json.sort_all_objects();
        json
    }
}

/// PEFT writes whole alphas as integers and rejects others where it wants them.
fn number(x: f32) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { (x as i64).into() } else { shortest(x) }
}

/// Adapters of PEFT that compute something else.
fn refuse_variants(file: &Object) -> Result<()> {
    if !matches!(file.string("peft_type")?, None | Some("LORA")) {
        return Err(file.refuse("peft_type", "\"LORA\""));
    }
    for key in ["use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"] {
        if file.boolean(key)?.unwrap_or(false) {
            return Err(file.refuse(key, "false"));
        }
    }
    if !matches!(file.string("bias")?, None | Some("none")) {
        return Err(file.refuse("bias", "\"none\""));
    }
    let empty = |value: &Value| match value {
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    let selective = ["modules_to_save", "layers_to_transform", "exclude_modules", "rank_pattern", "alpha_pattern"];
    for key in selective.into_iter().chain(["trainable_token_indices", "target_parameters", "layer_replication"]) {
        if file.get(key).is_some_and(|value| !empty(value)) {
            return Err(file.refuse(key, "none"));
        }
    }
    // These initialisations change the base model's weights, too.
    let start = file.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default();
    if ["pissa", "olora", "corda", "loftq"].iter().any(|name| start.starts_with(name)) {
        return Err(file.refuse("init_lora_weights", "one that leaves the base model as it is"));
    }
    Ok(())
}

fn infer_method(file: &Object, tensors: &[&str]) -> Method {
    let any = |part: &str| tensors.iter().any(|name| name.contains(part));
    if any(".lora_A0.") {
        Method::Split
    } else if any(".lora_route.") || any(".lora_B0.") || (file.get("lora_nums").is_some() && !any(".lora_B.")) {
        Method::Hydra
    } else {
        Method::Lora
    }
}

/// `target_modules`: names, "all-linear", or an expression (then the tensors tell).
fn targets(file: &Object, tensors: &[&str]) -> Result<Vec<Projection>> {
    let in_tensors = |p: &Projection| tensors.iter().any(|name| name.contains(&format!(".{}.", p.name())));
    let mut targets = match file.get("target_modules") {
        Some(Value::String(all)) if all == "all-linear" => Projection::ALL.to_vec(),
        None | Some(Value::String(_)) => Projection::ALL.into_iter().filter(in_tensors).collect(),
        Some(_) => {
            let names = file.strings("target_modules")?.unwrap_or_default();
            let parse = |name: &String| {
                let all = Projection::ALL.map(Projection::name).join(", ");
                let known = Projection::ALL.into_iter().find(|p| p.name() == name || p.hf_path() == name);
                known.ok_or_else(|| file.error(format!("target_modules has {}, wanted some of {all}", printable(name))))
            };
            names.iter().map(parse).collect::<Result<Vec<_>, Error>>()?
        }
    };
    targets.sort();
    targets.dedup();
    Ok(targets)
}
