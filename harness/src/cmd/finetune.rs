//! `hydra finetune`: from options to a run in a folder.

mod manifest;

use super::{not_negative, positive, seq_len, targets};
use crate::data::encode::{Encoded, Encoder};
use crate::data::records;
use crate::data::template::Template;
use crate::device::{ModelArgs, on_device, room};
use crate::heldout::HeldOut;
use crate::report::Routing;
use crate::session::{self, Held, Keeping, Recipe, Schedule, Trained};
use crate::{interrupt, output, report};
use anyhow::{Context, Result, bail};
use clap::Args;
use hydra_runtime::adapter::{Adapter, AdapterConfig, GateKind, Method};
use hydra_runtime::backend::Backend;
use hydra_runtime::config::Config;
use hydra_runtime::model::Model;
use manifest::Manifest;
use std::path::{Path, PathBuf};

/// Options of `finetune`. The defaults are the published settings.
#[derive(Args, Clone)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    /// Records: {instruction, context, response, category}, {instruction, input, output} or {prompt, completion} a line
    #[arg(long, value_name = "FILE.jsonl", num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// The run's folder, new or empty; --adapter takes it afterwards
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// hydra: one A, several B; lora: one of each; split: several of each [default: hydra]
    #[arg(long, value_parser = ["hydra", "lora", "split"])]
    method: Option<String>,
    /// What mixes the heads [default: router; label for split]
    #[arg(long, value_parser = ["router", "label", "uniform"])]
    gate: Option<String>,
    /// Rank of a head [default: 4]
    #[arg(long, allow_negative_numbers = true, value_name = "R", value_parser = positive)]
    rank: Option<usize>,
    /// Heads [default: 4; the number of categories under the label gate; 1 for lora]
    #[arg(long, allow_negative_numbers = true, value_name = "N", value_parser = positive)]
    heads: Option<usize>,
    /// The adapter's output is scaled by alpha / rank [default: 32]
    #[arg(long, allow_negative_numbers = true, value_name = "A")]
    alpha: Option<f32>,
    /// Probability of dropping a value of the adapter's input [default: 0.05]
    #[arg(long, allow_negative_numbers = true, value_name = "P")]
    dropout: Option<f32>,
    /// all, or some of q,k,v,o,gate,up,down [default: gate,up,down]
    #[arg(long, value_name = "LIST")]
    targets: Option<String>,
    /// Start from this adapter, of its method, gate, rank, heads, alpha and targets
    #[arg(long, value_name = "DIR")]
    init_adapter: Option<PathBuf>,
    /// plain, official, alpaca, chat, or a Jinja file over instruction, input and category
    #[arg(long, default_value = "plain")]
    template: String,
    /// Cut sequences at this many tokens [default: 1024, or the model's context]
    #[arg(long, allow_negative_numbers = true, value_name = "L", value_parser = positive)]
    seq_len: Option<usize>,
    /// Records that go through the model together [default: 1]
    #[arg(long, allow_negative_numbers = true, value_name = "RECORDS", value_parser = positive)]
    batch: Option<usize>,
    /// Batches a step [default: 8, or 1 where --batch is given]
    #[arg(long, allow_negative_numbers = true, value_name = "K", value_parser = positive)]
    grad_accum: Option<usize>,
    /// The highest learning rate
    #[arg(long, allow_negative_numbers = true, value_name = "X", default_value_t = 2e-4, value_parser = not_negative)]
    lr: f64,
    /// Its course after the warm-up
    #[arg(long, value_enum, default_value_t = Schedule::Cosine)]
    schedule: Schedule,
    /// Steps of warm-up, or below 1 their share of all
    #[arg(long, allow_negative_numbers = true, value_name = "S", default_value_t = 0.03, value_parser = not_negative)]
    warmup: f64,
    /// The largest gradient norm; 0 for any
    #[arg(long, allow_negative_numbers = true, value_name = "C", default_value_t = 1.0, value_parser = not_negative)]
    clip: f64,
    /// Stop after this many steps
    #[arg(long, allow_negative_numbers = true, value_name = "S", value_parser = positive, conflicts_with = "epochs")]
    steps: Option<usize>,
    /// How often each record is seen [default: 1]
    #[arg(long, allow_negative_numbers = true, value_name = "E", value_parser = not_negative)]
    epochs: Option<f64>,
    /// Of the adapter's start, the order of the records and the dropout
    #[arg(long, allow_negative_numbers = true, value_name = "S", default_value_t = 41)]
    seed: u64,
    /// Take records in the files' order
    #[arg(long)]
    no_shuffle: bool,
    /// Keep each layer's input only and compute the rest again: less memory, a third more time
    #[arg(long)]
    recompute: bool,
    /// Records to measure the loss on, before and after
    #[arg(long, value_name = "FILE.jsonl")]
    eval_data: Option<PathBuf>,
    /// And every so many steps
    #[arg(long, allow_negative_numbers = true, value_name = "S", value_parser = positive, requires = "eval_data")]
    eval_every: Option<usize>,
    /// Save every so many steps, beside at the end and on Ctrl-C
    #[arg(long, allow_negative_numbers = true, value_name = "S", value_parser = positive)]
    save_every: Option<usize>,
    /// Go on with the run in --out, whose options must be the same
    #[arg(long)]
    resume: bool,
}

/// A run that is over.
pub struct Done {
    /// Its adapter, steps and measurements.
    pub trained: Trained,
    /// Trainable parameters.
    pub trainable: u64,
    /// What the router does, where there is one.
    pub routing: Option<Routing>,
}

/// Runs it.
pub fn run(arguments: Arguments) -> Result<()> {
    let out = arguments.out.clone();
    let Done { trained, .. } = execute(arguments)?;
    if let [first, .., last] = trained.evals.as_slice() {
        output::print(before_and_after(&first.held_out, &last.held_out) + "\n")?;
    }
    let stopped = if interrupt::requested() { ": stopped, --resume goes on" } else { "" };
    output::print(format_args!("{}{stopped}\n", out.display()))?;
    Ok(())
}

/// Trains, saves, and writes the report.
pub fn execute(arguments: Arguments) -> Result<Done> {
    refuse_to_write_over(&arguments)?;
    on_device!(arguments.model.device, device => execute_on(device, arguments))
}

fn execute_on<B: Backend>(device: B, arguments: Arguments) -> Result<Done> {
    let checkpoint = arguments.model.checkpoint()?;
    let config = checkpoint.config();
    let seq_len = seq_len(arguments.seq_len, config.context)?;
    let tokenizer = checkpoint.tokenizer()?;
    let template = Template::from_argument(&arguments.template, &tokenizer)?;
    let encoder = Encoder { tokenizer: &tokenizer, template: &template, seq_len };

    let mut records = Vec::new();
    for path in &arguments.data {
        records.extend(records::read(path)?);
    }
    let adapter = start(&arguments, config, &records::categories(&records))?;
    let labels = &adapter.config.labels;
    let encode = |what: &str, records: &[records::Record]| -> Result<Encoded> {
        let encoded = encoder.encode(records, labels).with_context(|| what.to_string())?;
        if let Some(remark) = encoded.remark(seq_len) {
            eprintln!("{what}: {remark}");
        }
        Ok(encoded)
    };
    let data = encode("--data", &records)?;
    let eval_records = arguments.eval_data.as_deref().map(records::read).transpose()?;
    let held_out = eval_records.map(|records| encode("--eval-data", &records)).transpose()?;

    let recipe = recipe(&arguments, data.sequences.len())?;
    recipe.check_room(&device, config, &adapter.config, &data)?;
    let manifest = Manifest::new(&arguments, &checkpoint, &adapter, &recipe, &data, seq_len)?;
    let out = &arguments.out;
    std::fs::create_dir_all(out).with_context(|| format!("can't make --out {}", out.display()))?;
    let resume = arguments.resume && manifest.take_up(out)?;
    manifest.write(out)?;

    let (trainable, frozen) = (adapter.parameters(), checkpoint.parameters());
    let share = 100.0 * trainable as f64 / (trainable + frozen) as f64;
    let count = data.sequences.len();
    eprintln!("{count} records, {} steps; {trainable} trainable parameters, {share:.3} % of all", recipe.steps);
    interrupt::listen()?;
    let model = Model::load(device, &checkpoint)?;
    let held = held_out.as_ref().map(|data| Held { data, every: arguments.eval_every });
    let keeping = Keeping { out, every: arguments.save_every, resume };
    let trained = session::train(&model, &adapter, &data, &recipe, held, keeping)?;
    let routing = report::routing(&model, &trained.adapter, held_out.as_ref().unwrap_or(&data))?;
    report::write_run(out, &manifest.options, &manifest.facts, &trained, &routing)?;
    Ok(Done { trained, trainable, routing })
}

fn refuse_to_write_over(arguments: &Arguments) -> Result<()> {
    let out = &arguments.out;
    let taken = match std::fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) => return Err(error).with_context(|| format!("--out {}", out.display())),
    };
    if taken && !arguments.resume {
        bail!("--out {} is not empty; --resume goes on with the run in it", out.display());
    }
    if arguments.resume && !out.join(manifest::FILE).is_file() {
        bail!("--resume: there is no run in {}", out.display());
    }
    Ok(())
}

/// The adapter to start from.
fn start(arguments: &Arguments, model: &Config, categories: &[String]) -> Result<Adapter> {
    if let Some(dir) = &arguments.init_adapter {
        return from_file(arguments, dir, model, categories);
    }
    let method = arguments.method.as_deref().and_then(Method::parse).unwrap_or(Method::Hydra);
    let gate = arguments.gate.as_deref().and_then(GateKind::parse).unwrap_or(method.default_gate());
    if gate == GateKind::Label && categories.is_empty() {
        bail!("the label gate goes by the records' categories, and none has one");
    }
    let defaults = AdapterConfig::default();
    let heads = match (method, gate) {
        (Method::Lora, _) => 1,
        (_, GateKind::Label) => categories.len(),
        _ => defaults.heads,
    };
    let config = AdapterConfig {
        method,
        gate,
        rank: arguments.rank.unwrap_or(defaults.rank),
        heads: arguments.heads.unwrap_or(heads),
        alpha: arguments.alpha.unwrap_or(defaults.alpha),
        dropout: arguments.dropout.unwrap_or(defaults.dropout),
        targets: arguments.targets.as_deref().map_or(Ok(defaults.targets), targets)?,
        labels: categories.to_vec(),
        base_model: Some(arguments.model.model.clone()),
        ..defaults
    };
    // Itself, in training, its gradient, two moments, two copies of the last three, and a file of it, 4 bytes a value.
    room(config.parameters(model).saturating_mul(4 * 11), &format!("an adapter of rank {}", config.rank))?;
    Ok(Adapter::init(model, config, arguments.seed)?)
}

/// An adapter's file says what it is; options that say otherwise are refused. Dropout is training's own.
fn from_file(arguments: &Arguments, dir: &Path, model: &Config, categories: &[String]) -> Result<Adapter> {
    let mut adapter = Adapter::load(dir, model)?;
    let config = &mut adapter.config;
    let asked = arguments.targets.as_deref().map(targets).transpose()?;
    let differs = [
        ("method", arguments.method.as_deref().is_some_and(|name| name != config.method.name())),
        ("gate", arguments.gate.as_deref().is_some_and(|name| name != config.gate.name())),
        ("rank", arguments.rank.is_some_and(|rank| rank != config.rank)),
        ("heads", arguments.heads.is_some_and(|heads| heads != config.heads)),
        ("alpha", arguments.alpha.is_some_and(|alpha| alpha != config.alpha)),
        ("targets", asked.is_some_and(|targets| targets != config.targets)),
    ];
    if let Some((name, _)) = differs.iter().find(|(_, differs)| *differs) {
        bail!("--{name} is another than that of --init-adapter {}", dir.display());
    }
    if let Some(dropout) = arguments.dropout {
        config.dropout = dropout;
    }
    if config.labels.is_empty() {
        config.labels = categories.to_vec();
    }
    if config.gate == GateKind::Label && config.labels.len() > config.heads {
        bail!("{} categories for the {} heads of --init-adapter {}", config.labels.len(), config.heads, dir.display());
    }
    if !(0.0..1.0).contains(&config.dropout) {
        bail!("--dropout {}: wanted 0 or more and less than 1", config.dropout);
    }
    Ok(adapter)
}

fn recipe(arguments: &Arguments, records: usize) -> Result<Recipe> {
    let Arguments { lr, schedule, seed, .. } = *arguments;
    // The published setting is single records, eight a step.
    let batch = arguments.batch.unwrap_or(1);
    let grad_accum = arguments.grad_accum.unwrap_or(if arguments.batch.is_none() { 8 } else { 1 });
    let Some(each) = batch.checked_mul(grad_accum) else { bail!("--batch times --grad-accum is too large") };
    let taken = match (arguments.steps, arguments.epochs) {
        (Some(steps), _) => steps.checked_mul(each).context("--steps is too large for such batches")?,
        (None, epochs) => (epochs.unwrap_or(1.0) * records as f64).ceil() as usize,
    };
    if taken == 0 {
        bail!("--epochs 0: nothing to do");
    }
    if taken > MOST_RECORDS {
        bail!("a run over {taken} records; wanted {MOST_RECORDS} at most");
    }
    let steps = taken.div_ceil(each);
    let warmup = match arguments.warmup {
        0.0 => 0,
        share if share < 1.0 => ((share * steps as f64).round_ties_even() as usize).max(1),
        warmup => warmup.round() as usize,
    };
    let (clip, shuffle, recompute) = (arguments.clip as f32, !arguments.no_shuffle, arguments.recompute);
    Ok(Recipe { batch, grad_accum, lr, schedule, warmup, clip, steps, records: taken, seed, shuffle, recompute })
}

/// The order of a run's records is held in memory.
const MOST_RECORDS: usize = 1 << 28;

fn before_and_after(before: &HeldOut, after: &HeldOut) -> String {
    let mut text = format!("{:<28} {:>8} {:>9} {:>9}", "held-out loss", "records", "before", "after");
    let rows = before.categories.iter().filter_map(|(name, b)| Some((name.as_str(), *b, *after.categories.get(name)?)));
    for (name, before, after) in rows.chain([("all", before.all, after.all)]) {
        let name = output::printable(name);
        text += &format!("\n{name:<28} {:>8} {:>9.4} {:>9.4}", before.records, before.loss, after.loss);
    }
    text
}
