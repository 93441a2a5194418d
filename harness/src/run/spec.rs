//! The options of a run, each declared once: for the command line of `finetune` (clap), and for TOML and run.json (serde).
//!
//! Every option may be absent, so that a command line can be laid over a file. Defaults are filled in where an option is used;
//! the help names them, and a test compares the two.

use super::choices::{GateName, HeadInitName, Heads, LrSchedule, MethodName, Targets};
use crate::data::options::EncodingArgs;
use crate::device::{DeviceArgs, MODEL_HELP};
use crate::eval::accuracy::AccuracyArgs;
use crate::eval::accuracy::metric::Metric;
use crate::options::{Count, Finite, NonNegative, Seed, Usage, one_or_many};
use clap::Args;
use hydra_runtime::adapter::{GateKind, Method};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A run: what is trained, on which records, and where the result goes.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunSpec {
    /// The frozen model.
    #[command(flatten, next_help_heading = "Model")]
    #[serde(flatten)]
    pub model: ModelSpec,
    /// The training records.
    #[command(flatten, next_help_heading = "Data")]
    #[serde(flatten)]
    pub data: DataSpec,
    /// The adapter.
    #[command(flatten, next_help_heading = "Adapter")]
    #[serde(flatten)]
    pub adapter: AdapterSpec,
    /// Optimisation.
    #[command(flatten, next_help_heading = "Training")]
    #[serde(flatten)]
    pub training: TrainingSpec,
    /// The eval set.
    #[command(flatten, next_help_heading = "Evaluation")]
    #[serde(flatten)]
    pub evaluation: EvaluationSpec,
    /// The run's folder.
    #[command(flatten, next_help_heading = "Output")]
    #[serde(flatten)]
    pub output: OutputSpec,
    /// Where and how precisely to compute.
    #[command(flatten, next_help_heading = "Device")]
    #[serde(flatten)]
    pub device: DeviceArgs,
}

/// The frozen model.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct ModelSpec {
    #[arg(long, value_name = "PATH", help = MODEL_HELP, required_unless_present = "config",
        value_parser = clap::builder::NonEmptyStringValueParser::new())]
    #[allow(missing_docs)]
    pub model: Option<String>,
}

/// The training records, and how they become tokens.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct DataSpec {
    /// Training records: files of JSON lines, a JSON array, CSV, TSV or Parquet, also in .gz and .zst, or org/name[:split] on the hub
    ///
    /// {"instruction", "context", "response"}, {"instruction", "input", "output"}, {"prompt", "completion"}, {"messages"},
    /// {"conversations"} or {"text"}; each may have a "category".
    #[arg(long, value_name = "FILE", num_args = 1.., required_unless_present = "config")]
    #[serde(deserialize_with = "one_or_many")]
    pub data: Vec<PathBuf>,
    #[allow(missing_docs)]
    #[command(flatten)]
    #[serde(flatten)]
    pub encoding: EncodingArgs,
    /// Take records in the files' order instead of shuffling them
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        hide_possible_values = true)]
    pub no_shuffle: Option<bool>,
}

/// The adapter: kind, sizes, and how it starts.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct AdapterSpec {
    /// Kind of adapter [default: hydra]
    #[arg(long, value_enum)]
    pub method: Option<MethodName>,
    /// How the heads are mixed [default: router; label for split]
    #[arg(long, value_enum)]
    pub gate: Option<GateName>,
    /// LoRA rank of each head [default: 4]
    #[arg(long, value_name = "R")]
    pub rank: Option<Count>,
    /// Number of B heads, or auto [default: 4; the number of labels under the label gate; 1 for lora]
    ///
    /// auto takes as many heads as the training records have clusters, from 2 to 16, as `hydra cluster` finds them.
    #[arg(long, value_name = "N|auto")]
    pub heads: Option<Heads>,
    /// LoRA alpha: the adapter's output is scaled by alpha / rank [default: 32]
    #[arg(long, value_name = "A")]
    pub alpha: Option<Finite>,
    /// Dropout probability on the adapter's input [default: 0.05]
    #[arg(long, value_name = "P")]
    pub dropout: Option<NonNegative>,
    /// Dropout probability on the mixed heads, with a mask for each head (R-LoRA) [default: 0]
    #[arg(long, value_name = "P")]
    pub head_dropout: Option<NonNegative>,
    /// Initialisation of the B heads [default: zero]
    #[arg(long, value_enum)]
    pub head_init: Option<HeadInitName>,
    /// Softmax temperature of the router [default: 1]
    #[arg(long, value_name = "T")]
    pub router_temperature: Option<NonNegative>,
    /// Route each token to its K heads with the largest logits [default: all heads]
    #[arg(long, value_name = "K")]
    pub top_k: Option<Count>,
    /// Projections to adapt: all, or some of q,k,v,o,gate,up,down [default: gate,up,down]
    #[arg(long, value_name = "LIST")]
    pub targets: Option<Targets>,
    /// Field of the records that selects the head under the label gate [default: category]
    #[arg(long, value_name = "FIELD")]
    pub label_field: Option<String>,
    /// Start from this adapter instead of a new one
    ///
    /// Method, gate, rank, heads, alpha and targets are the adapter's own; an option that differs is an error.
    #[arg(long, value_name = "DIR")]
    pub init_adapter: Option<PathBuf>,
}

/// Optimisation.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct TrainingSpec {
    /// Records in one forward and backward pass [default: 1]
    #[arg(long, value_name = "N")]
    pub batch: Option<Count>,
    /// Gradient accumulation: batches per step [default: 8; 1 if --batch is given]
    #[arg(long, value_name = "N")]
    pub grad_accum: Option<Count>,
    /// Number of steps [default: as --epochs says]
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    pub steps: Option<Count>,
    /// Passes over the training records; may be a fraction [default: 1]
    #[arg(long, value_name = "E")]
    pub epochs: Option<NonNegative>,
    /// Peak learning rate of AdamW [default: 0.0002]
    #[arg(long, value_name = "LR")]
    pub lr: Option<NonNegative>,
    /// Peak learning rate of the routers [default: that of --lr]
    #[arg(long, value_name = "LR")]
    pub router_lr: Option<NonNegative>,
    /// Learning-rate schedule after warm-up: constant, linear decay, cosine decay [default: cosine]
    #[arg(long, value_enum)]
    pub schedule: Option<LrSchedule>,
    /// Warm-up steps, or their share of all steps if less than 1 [default: 0.03]
    #[arg(long, value_name = "N")]
    pub warmup: Option<NonNegative>,
    /// Clip gradients to this global norm (0 = off) [default: 1]
    #[arg(long, value_name = "NORM")]
    pub clip: Option<NonNegative>,
    /// Coefficient of the load-balancing loss (Switch Transformer, eq. 4) [default: 0]
    #[arg(long, value_name = "C")]
    pub load_balance: Option<NonNegative>,
    /// Random seed for initialisation, data order and dropout [default: 41]
    #[arg(long, value_name = "SEED")]
    pub seed: Option<Seed>,
    /// Gradient checkpointing: keep each layer's input only; less memory, a third more time
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        hide_possible_values = true)]
    pub recompute: Option<bool>,
}

/// The eval set.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct EvaluationSpec {
    /// Eval set: records to measure the loss on, before and after training
    #[arg(long, value_name = "FILE")]
    pub eval_data: Option<PathBuf>,
    /// Measure the eval loss every N steps as well
    #[arg(long, value_name = "N")]
    pub eval_every: Option<Count>,
    /// Records to answer before and after training, as for eval accuracy, whose options --accuracy-.. are
    #[arg(long, value_name = "FILE")]
    pub accuracy_data: Option<PathBuf>,
    /// What counts as the right answer [default: choice for questions with choices, else exact]
    #[arg(long, value_enum)]
    pub accuracy_metric: Option<Metric>,
    /// Compare only what follows the last TEXT in an answer
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub accuracy_after: Option<String>,
    /// The most records per category
    #[arg(long, value_name = "N")]
    pub accuracy_limit: Option<Count>,
    /// Maximum number of tokens of an answer [default: 256]
    #[arg(long, value_name = "N")]
    pub accuracy_max_tokens: Option<Count>,
    /// End an answer before this text; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    #[serde(deserialize_with = "one_or_many")]
    pub accuracy_stop: Vec<String>,
}

impl EvaluationSpec {
    /// Which records to answer, if any.
    pub fn accuracy(&self) -> Option<AccuracyArgs> {
        Some(AccuracyArgs {
            data: self.accuracy_data.clone()?,
            metric: self.accuracy_metric,
            after: self.accuracy_after.clone(),
            limit: self.accuracy_limit,
            max_tokens: self.accuracy_max_tokens,
            stop: self.accuracy_stop.clone(),
            batch: None,
        })
    }

    /// Whether there are options of answers without records to answer.
    fn answers_nothing(&self) -> bool {
        let some = self.accuracy_metric.is_some() || self.accuracy_after.is_some() || !self.accuracy_stop.is_empty();
        let some = some || self.accuracy_limit.is_some() || self.accuracy_max_tokens.is_some();
        some && self.accuracy_data.is_none()
    }
}

/// The run's folder.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct OutputSpec {
    /// Folder for the adapter, metrics and report; must be new or empty, unless --resume is given
    #[arg(long, value_name = "DIR", required_unless_present = "config")]
    pub out: Option<PathBuf>,
    /// Save every N steps, besides at the end and on Ctrl-C
    #[arg(long, value_name = "N")]
    pub save_every: Option<Count>,
}

impl RunSpec {
    /// Fails if a run can't be made of these options: one that is always needed is missing, or two exclude each other.
    pub fn check(&self) -> Result<(), Usage> {
        let missing =
            |name| Err(Usage(format!("--{name} is missing: give it on the command line or in the file of --config")));
        let training = &self.training;
        match self {
            _ if self.model.model.is_none() => missing("model"),
            _ if self.data.data.is_empty() => missing("data"),
            _ if self.output.out.is_none() => missing("out"),
            _ if training.steps.is_some() && training.epochs.is_some() => {
                Err(Usage("--steps and --epochs exclude each other".into()))
            }
            _ if self.evaluation.eval_every.is_some() && self.evaluation.eval_data.is_none() => {
                Err(Usage("--eval-every needs --eval-data".into()))
            }
            _ if self.evaluation.answers_nothing() => Err(Usage("--accuracy-.. options need --accuracy-data".into())),
            _ => Ok(()),
        }
    }

    /// The model, as it was named; of a checked spec.
    pub fn model(&self) -> &str {
        self.model.model.as_deref().unwrap_or_default()
    }

    /// The run's folder; of a checked spec.
    pub fn out(&self) -> &Path {
        self.output.out.as_deref().unwrap_or(Path::new(""))
    }

    /// The random seed.
    pub fn seed(&self) -> u64 {
        self.training.seed.map_or(41, Seed::get)
    }

    /// The kind of adapter.
    pub fn method(&self) -> Method {
        self.adapter.method.map_or(Method::Hydra, Method::from)
    }

    /// How the heads are mixed.
    pub fn gate(&self) -> GateKind {
        self.adapter.gate.map_or(self.method().default_gate(), GateKind::from)
    }
}
