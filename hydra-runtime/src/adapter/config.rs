//! `adapter_config.json`: HF PEFT's keys, the reference implementation's `lora_nums`, and `method`, `gate`, `labels` (which
//! label has which head) and `label_field` (where records have it, if not in their category); and, only where they are asked
//! for, the options that others have added to multi-head adapters: `router_temperature`, `router_top_k`, `head_dropout`,
//! `head_init` and `load_balance`.

use super::kind::{HeadInit, Method};
use super::modules::{self, Placed};
use super::pad::Own;
use crate::backend::GateKind;
use crate::json::{Object, shortest};
use crate::projection::Projection;
use crate::{Error, Result};
use hydra_kernels::gate::Routing;
use serde_json::{Map, Value, json};
use std::path::Path;

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
    pub lora_heads: usize,
    /// The heads' sum is scaled by alpha / rank.
    pub alpha: f32,
    /// Whether the scale is alpha / √rank (rsLoRA, arXiv 2312.03732) instead of alpha / rank.
    pub rslora: bool,
    /// Probability of dropping a value of A's input in training.
    pub dropout: f32,
    /// Probability of dropping a value of the mixed heads in training (R-LoRA, arXiv 2502.15455).
    pub head_dropout: f32,
    /// How the heads' B start (R-LoRA's, but for its offset of the base weights).
    pub head_init: HeadInit,
    /// The router's logits are divided by it.
    pub temperature: f32,
    /// Only so many of a token's largest logits take part; `None` for all.
    pub top_k: Option<usize>,
    /// The weight of the load-balance term in training ([`hydra_kernels::gate`]).
    pub load_balance: f32,
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
    /// The published settings: HydraLoRA with a router, rank 4, four heads, alpha 32, dropout 0.05, on gate, up and down.
    fn default() -> Self {
        Self {
            method: Method::Hydra,
            gate: GateKind::Router,
            rank: 4,
            lora_heads: 4,
            alpha: 32.0,
            rslora: false,
            dropout: 0.05,
            head_dropout: 0.0,
            head_init: HeadInit::Zero,
            temperature: 1.0,
            top_k: None,
            load_balance: 0.0,
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

/// Keys that every file has, and what they say where nothing else came from elsewhere.
const GIVEN: [(&str, &str); 3] = [("peft_type", "LORA"), ("task_type", "CAUSAL_LM"), ("bias", "none")];

/// Settings of PEFT's that change what is computed, or where, and have to be false or empty; and why.
const UNREAD: [(&str, &str); 12] = [
    ("use_dora", "DoRA scales the rows of the frozen weight"),
    ("lora_bias", "a bias beside B isn't read"),
    ("use_qalora", "QA-LoRA's A takes means of the input"),
    ("modules_to_save", "modules that were trained whole aren't read; merge them into the base model"),
    ("trainable_token_indices", "rows of the embedding that were trained aren't read; merge them into the base model"),
    ("target_parameters", "LoRAs on parameters beside the linear layers aren't read"),
    ("layer_replication", "the model's layers aren't repeated"),
    ("alora_invocation_tokens", "a LoRA that acts only behind certain tokens isn't read"),
    ("arrow_config", "Arrow's routing between adapters isn't computed"),
    ("kasa_config", "KaSA's singular values aren't read"),
    ("monteclora_config", "MonteCLoRA's samples aren't read"),
    ("use_bdlora", "block-diagonal matrices aren't read"),
];

/// Keys that say where adapters are, and of which rank and alpha: they are read, and an adapter of one rank needs none.
const PLACES: [&str; 5] = ["rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "exclude_modules"];

/// Keys that a file has only where the options are asked for.
const OPTIONS: [&str; 5] = ["router_temperature", "router_top_k", "head_dropout", "head_init", "load_balance"];

impl AdapterConfig {
    /// How the router's logits become weights.
    pub fn routing(&self) -> Routing {
        Routing { temperature: self.temperature, top_k: self.top_k.unwrap_or(usize::MAX) }
    }

    /// What the adapter's output is multiplied by: alpha / rank, or alpha / √rank for rsLoRA.
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f32;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// What its parameters mean, in one line: adapters that differ in it can't take each other's.
    pub(crate) fn function(&self) -> String {
        let Self { method, gate, rank, lora_heads, alpha, rslora, targets, .. } = self;
        let alpha = format!("{alpha}{}", if *rslora { " (rsLoRA)" } else { "" });
        let targets: Vec<_> = targets.iter().map(|projection| projection.name()).collect();
        let (method, gate, targets) = (method.name(), gate.name(), targets.join(" "));
        format!("method {method}, gate {gate}, rank {rank}, heads {lora_heads}, alpha {alpha}, targets {targets}")
    }

    /// The same heads under another gate that is no router: without what only a router has, and without a start.
    pub(crate) fn without_router(&self, gate: GateKind) -> Self {
        let Self { temperature, top_k, load_balance, head_init, .. } = Self::default();
        Self { gate, temperature, top_k, load_balance, head_init, ..self.clone() }
    }

    /// Fails, saying which, if settings don't go together.
    pub fn check(&self) -> Result<()> {
        self.explain().map_err(Error::Invalid)
    }

    fn explain(&self) -> Result<(), String> {
        let Self { rank, lora_heads, alpha, dropout, .. } = *self;
        if !(1..=MAX_RANK).contains(&rank) {
            return Err(format!("rank {rank}: expected 1 to {MAX_RANK}"));
        }
        if !(1..=MAX_HEADS).contains(&lora_heads) {
            return Err(format!("{lora_heads} heads: expected 1 to {MAX_HEADS}"));
        }
        if !alpha.is_finite() {
            return Err(format!("alpha {alpha}: expected a finite number"));
        }
        if !(0.0..1.0).contains(&dropout) {
            return Err(format!("dropout {dropout}: expected at least 0 and less than 1"));
        }
        let (method, gate) = (self.method.name(), self.gate.name());
        if self.method == Method::Lora && lora_heads != 1 {
            return Err(format!("method {method} has one head, found {lora_heads}"));
        }
        if self.gate == GateKind::One && lora_heads != 1 {
            return Err(format!("gate one needs one head, found {lora_heads}"));
        }
        if self.method == Method::Lora && self.gate != GateKind::One {
            return Err(format!("method {method} takes no gate, found {gate}"));
        }
        if self.gate == GateKind::Label && self.labels.len() > lora_heads {
            return Err(format!(
                "the label gate needs a head for each label: expected {} heads, found {lora_heads}",
                self.labels.len()
            ));
        }
        self.check_options()?;
        if self.targets.is_empty() {
            return Err("no target projections".into());
        }
        if !self.targets.is_sorted_by(|a, b| a < b) {
            return Err("target projections: expected each once and in canonical order".into());
        }
        Ok(())
    }

    fn check_options(&self) -> Result<(), String> {
        let Self { lora_heads, head_dropout, temperature, top_k, load_balance, .. } = *self;
        let gate = self.gate.name();
        let of_router = [
            ("router temperature", temperature != 1.0),
            ("top-k", top_k.is_some()),
            ("load balance", load_balance != 0.0),
        ];
        if let Some((name, _)) = of_router.iter().find(|(_, set)| *set && self.gate != GateKind::Router) {
            return Err(format!("{name} needs a router, and the gate is {gate}"));
        }
        if !(0.0..1.0).contains(&head_dropout) {
            return Err(format!("head dropout {head_dropout}: expected at least 0 and less than 1"));
        }
        if !(temperature > 0.0 && temperature.is_normal()) {
            return Err(format!("router temperature {temperature}: expected a number above 0"));
        }
        if let Some(top_k) = top_k.filter(|top_k| !(1..=lora_heads).contains(top_k)) {
            return Err(format!("top-k {top_k}: expected 1 to {lora_heads}, the number of heads"));
        }
        if !(load_balance.is_finite() && load_balance >= 0.0) {
            return Err(format!("load balance {load_balance}: expected a number from 0"));
        }
        if self.head_init == HeadInit::Random {
            // Anywhere else the heads would not cancel at the start, and the model would change.
            let expected =
                "expected several heads with one A, all with the same weight at the start: gate router or uniform";
            let found = match (self.method, self.gate) {
                _ if lora_heads == 1 => "one head".to_string(),
                (Method::Split, _) => "an A per head".to_string(),
                (_, GateKind::Label) => format!("gate {gate}"),
                _ if top_k.is_some_and(|top_k| top_k < lora_heads) => "top-k".to_string(),
                _ => return Ok(()),
            };
            return Err(format!("head init random with {found}: {expected}"));
        }
        Ok(())
    }

    /// Reads the file at `path`, for a model of this many layers; `tensors` are the names in the tensor file, for what the
    /// configuration leaves open. The second says which pairs there are, and how they differ.
    pub(super) fn read(path: &Path, tensors: &[&str], layers: usize) -> Result<(Self, Placed)> {
        let mut file = Object::read(path)?;
        refuse_variants(&file)?;
        let method = match file.string("method")? {
            None => infer_method(&file, tensors),
            Some(name) => {
                Method::parse(name).ok_or_else(|| file.refuse("method", "\"hydra\", \"lora\" or \"split\""))?
            }
        };
        let gate = match file.string("gate")? {
            None if tensors.iter().any(|name| name.contains(".lora_route.")) => GateKind::Router,
            // HydraLoRA's and LoRAMoE's programs always write a router: without one, what weighs the heads is elsewhere.
            None if method != Method::Lora && file.get("method").is_none() && file.get("labels").is_none() => {
                let wanted = "\"router\", \"label\" or \"uniform\": there are several B and no lora_route, which leaves open how \
                              they are weighed";
                return Err(file.refuse("gate", wanted));
            }
            None => method.default_gate(),
            Some(name) => GateKind::parse(name)
                .ok_or_else(|| file.refuse("gate", "\"router\", \"label\", \"uniform\" or \"one\""))?,
        };
        let lora_heads = match method {
            Method::Lora => 1,
            _ => file.size("lora_nums")?.ok_or_else(|| file.refuse("lora_nums", "the number of heads"))?,
        };
        let rank = file.size("r")?.ok_or_else(|| file.refuse("r", "the rank"))?;
        let alpha = file.number("lora_alpha")?.ok_or_else(|| file.refuse("lora_alpha", "a number"))? as f32;
        let placed = modules::placed(&file, tensors, layers, Own { rank, alpha })?;
        let config = Self {
            method,
            gate,
            rank,
            lora_heads,
            alpha,
            rslora: file.boolean("use_rslora")?.unwrap_or(false),
            dropout: file.number("lora_dropout")?.unwrap_or(0.0) as f32,
            head_dropout: file.number("head_dropout")?.unwrap_or(0.0) as f32,
            head_init: match file.string("head_init")? {
                None => HeadInit::Zero,
                Some(name) => {
                    HeadInit::parse(name).ok_or_else(|| file.refuse("head_init", "\"zero\" or \"random\""))?
                }
            },
            temperature: file.number("router_temperature")?.unwrap_or(1.0) as f32,
            top_k: file.size("router_top_k")?,
            load_balance: file.number("load_balance")?.unwrap_or(0.0) as f32,
            targets: Vec::new(),
            labels: file.strings("labels")?.unwrap_or_default(),
            label_field: file.string("label_field")?.map(str::to_owned),
            base_model: file.string("base_model_name_or_path")?.map(str::to_owned),
            extra: {
                let own = [
                    "gate",
                    "r",
                    "lora_alpha",
                    "use_rslora",
                    "lora_dropout",
                    "target_modules",
                    "labels",
                    "label_field",
                    "method",
                ];
                let lora_heads = (method != Method::Lora).then_some(&"lora_nums");
                let own =
                    own.iter().chain(&OPTIONS).chain(&PLACES).chain(&["base_model_name_or_path"]).chain(lora_heads);
                let given = |key: &str, value: &Value| GIVEN.iter().any(|&(own, says)| own == key && says == value);
                file.map.retain(|key, value| !own.clone().any(|own| own == key) && !given(key, value));
                std::mem::take(&mut file.map)
            },
        };
        let config = config.of_all(&placed);
        config.explain().map_err(|message| file.error(message))?;
        Ok((config, placed))
    }

    /// What [`AdapterConfig::read`] reads. A plain LoRA has PEFT's keys alone, because PEFT warns of others.
    pub(super) fn to_json(&self) -> Value {
        let mut map = self.extra.clone();
        for (key, value) in GIVEN {
            map.entry(key).or_insert_with(|| value.into());
        }
        let targets: Vec<_> = self.targets.iter().map(|projection| projection.name()).collect();
        map.insert("r".into(), self.rank.into());
        map.insert("lora_alpha".into(), number(self.alpha));
        map.insert("lora_dropout".into(), shortest(self.dropout));
        map.insert("target_modules".into(), json!(targets));
        map.insert("base_model_name_or_path".into(), json!(self.base_model));
        if self.rslora {
            map.insert("use_rslora".into(), true.into());
        }
        if self.method != Method::Lora {
            map.insert("method".into(), self.method.name().into());
            map.insert("lora_nums".into(), self.lora_heads.into());
            map.insert("gate".into(), self.gate.name().into());
            map.insert("labels".into(), json!(self.labels));
        }
        let asked = [
            (self.temperature != 1.0).then(|| shortest(self.temperature)),
            self.top_k.map(Value::from),
            (self.head_dropout != 0.0).then(|| shortest(self.head_dropout)),
            (self.head_init != HeadInit::Zero).then(|| self.head_init.name().into()),
            (self.load_balance != 0.0).then(|| shortest(self.load_balance)),
        ];
        map.extend(OPTIONS.into_iter().zip(asked).filter_map(|(key, value)| Some((key.to_string(), value?))));
        if let Some(field) = self.label_field.as_ref().filter(|_| self.method != Method::Lora) {
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
    let empty = |value: &Value| match value {
        Value::Bool(on) => !on,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    for (key, why) in UNREAD {
        if let Some(value) = file.get(key).filter(|value| !empty(value)) {
            let wanted = if value.is_boolean() { "false" } else { "none" };
            return Err(file.refuse(key, &format!("{wanted}: {why}")));
        }
    }
    if !matches!(file.string("bias")?, None | Some("none")) {
        return Err(file.refuse("bias", "\"none\": the model's biases that were trained aren't read"));
    }
    // These initialisations change the base model's weights, too. PEFT takes some names in any case.
    let start = file.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default().to_ascii_lowercase();
    if ["pissa", "olora", "corda", "loftq", "lora_ga"].iter().any(|name| start.starts_with(name)) {
        let how = "save_pretrained with path_initial_model_for_weight_conversion makes one of PiSSA, OLoRA and CorDA";
        return Err(file.refuse("init_lora_weights", &format!("one that leaves the base model as it is: {how}")));
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
