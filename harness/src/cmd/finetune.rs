//! `hydra finetune`: from options to a run in a folder.

pub mod manifest;
mod source;

use super::{not_negative, positive, seed, seq_len};
use crate::data::encode::{Encoded, Encoder};
use crate::data::records::{Record, names};
use crate::data::template::Template;
use crate::device::{ModelArgs, on_device};
use crate::heldout::HeldOut;
use crate::lock::{Lock, vacant};
use crate::report::Router;
use crate::session::{self, Held, Keeping, Recipe, Schedule, Trained};
use crate::{interrupt, output, report};
use anyhow::{Context, Result, bail};
use clap::Args;
use hydra_runtime::adapter::{Adapter, GateKind};
use hydra_runtime::backend::Backend;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::model::Model;
use hydra_runtime::tokenizer::Tokenizer;
use manifest::Manifest;
pub use source::{Heads, Source};
use std::collections::BTreeMap;
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
    /// The field of the records whose value has a head of its own under the label gate [default: category]
    #[arg(long, value_name = "FIELD")]
    label_field: Option<String>,
    /// Heads, or auto: as many as the training records have clusters, chosen as `hydra cluster` does from 2..16 [default: 4;
    /// the number of labels under the label gate; 1 for lora]
    #[arg(long, allow_negative_numbers = true, value_name = "N|auto")]
    heads: Option<Heads>,
    /// The adapter's output is scaled by alpha / rank [default: 32]
    #[arg(long, allow_negative_numbers = true, value_name = "A")]
    alpha: Option<f32>,
    /// Probability of dropping a value of the adapter's input [default: 0.05]
    #[arg(long, allow_negative_numbers = true, value_name = "P")]
    dropout: Option<f32>,
    /// Probability of dropping a value of the heads' mix, with a mask a head [default: 0]
    #[arg(long, allow_negative_numbers = true, value_name = "P")]
    head_dropout: Option<f32>,
    /// zero: B starts at zero; random: the heads start apart, their sum at zero [default: zero]
    #[arg(long, value_parser = ["zero", "random"])]
    head_init: Option<String>,
    /// The router's logits are divided by it [default: 1]
    #[arg(long, allow_negative_numbers = true, value_name = "T")]
    router_temperature: Option<f32>,
    /// Heads of a token that the router uses, those of its largest logits [default: all]
    #[arg(long, allow_negative_numbers = true, value_name = "K", value_parser = positive)]
    top_k: Option<usize>,
    /// The weight of a term in the loss that is least where a router uses its heads alike [default: 0]
    #[arg(long, allow_negative_numbers = true, value_name = "C")]
    load_balance: Option<f32>,
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
    /// The routers' highest learning rate [default: that of --lr]
    #[arg(long, allow_negative_numbers = true, value_name = "X", value_parser = not_negative)]
    router_lr: Option<f64>,
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
    #[arg(long, allow_negative_numbers = true, value_name = "S", default_value_t = 41, value_parser = seed)]
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
    pub router: Option<Router>,
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
    let prepared = Prepared::new(arguments, &checkpoint, &checkpoint.tokenizer()?, &device)?;
    let folder = prepared.open_folder()?;
    interrupt::listen()?;
    let model = Model::load(device, &checkpoint)?;
    prepared.train(&model, prepared.held(), &folder, true)
}

/// A command line of `finetune`, from its own name on.
#[derive(clap::Parser)]
struct Line {
    #[command(flatten)]
    arguments: Arguments,
}

/// What the words say; the first is the command's name.
pub fn parse(words: impl IntoIterator<Item = String>) -> Result<Arguments, clap::Error> {
    Ok(<Line as clap::Parser>::try_parse_from(words)?.arguments)
}

/// The names of all options, and whether each takes a value.
pub fn options() -> BTreeMap<String, bool> {
    let command = <Line as clap::CommandFactory>::command();
    let named = |option: &clap::Arg| Some((option.get_long()?.to_string(), option.get_action().takes_values()));
    command.get_arguments().filter_map(named).filter(|(name, _)| name != "help").collect()
}

/// Whether a run has been begun in this folder.
pub fn begun(out: &Path) -> bool {
    out.join(manifest::FILE).is_file()
}

/// A run's folder, which is this process's own for as long as it has this.
pub struct Folder {
    /// Whether there is a saved state to go on from.
    resume: bool,
    _lock: Lock,
}

/// A run of which everything is known and checked, before the model is loaded.
pub struct Prepared {
    arguments: Arguments,
    /// As it starts.
    pub adapter: Adapter,
    /// What it is trained on.
    pub data: Encoded,
    /// `--eval-data`.
    pub held_out: Option<Encoded>,
    /// How.
    pub recipe: Recipe,
    /// Trainable parameters.
    pub trainable: u64,
    /// Their share of all.
    pub share: f64,
    manifest: Manifest,
}

impl Prepared {
    /// Reads and checks all that the options name.
    pub fn new<B: Backend>(
        arguments: Arguments,
        checkpoint: &Checkpoint,
        tokenizer: &Tokenizer,
        device: &B,
    ) -> Result<Self> {
        let config = checkpoint.config();
        let seq_len = seq_len(arguments.seq_len, config.context)?;
        let template = Template::from_argument(&arguments.template, tokenizer)?;
        let encoder = Encoder { tokenizer, template: &template, seq_len };

        let source = Source::read(&arguments, config)?;
        let records = &source.records;
        let (adapter, clustering) = source.start(records)?;
        if let Some(found) = &clustering {
            output::say(format_args!("{} heads: {}", found.k, found.reason));
            for (cluster, (size, terms)) in found.sizes.iter().zip(&found.terms).enumerate() {
                output::say(format_args!(
                    "  cluster {cluster}: {size} records, {}",
                    output::printable(&terms.join(" "))
                ));
            }
        }
        let labels = &adapter.config.labels;
        let encode = |what: &str, records: &[Record]| -> Result<Encoded> {
            let encoded = encoder.encode(records, labels).with_context(|| what.to_string())?;
            if let Some(remark) = encoded.remark(seq_len) {
                output::say(format_args!("{what}: {remark}"));
            }
            let strangers = encoded.sequences.iter().filter(|sequence| sequence.lora_head.is_none()).count();
            if strangers > 0 && adapter.config.gate == GateKind::Label {
                let of = encoded.sequences.len();
                output::say(format_args!(
                    "{what}: {strangers} of {of} records have no label that has a head, and take the mean of the heads"
                ));
            }
            Ok(encoded)
        };
        let data = encode(&format!("--data {}", names(&arguments.data)), records)?;
        let measured = arguments.eval_data.as_slice();
        let held_out = source.held_out.as_ref();
        let held_out =
            held_out.map(|records| encode(&format!("--eval-data {}", names(measured)), records)).transpose()?;

        let recipe = recipe(&arguments, data.sequences.len())?;
        recipe.check_room(device, config, &adapter.config, &data)?;
        let manifest = Manifest::new(&arguments, checkpoint, &adapter, &recipe, &data, seq_len, clustering.as_ref())?;
        let (trainable, frozen) = (adapter.parameters(), checkpoint.parameters());
        let share = trainable as f64 / (trainable + frozen) as f64;
        Ok(Self { arguments, adapter, data, held_out, recipe, trainable, share, manifest })
    }

    /// Makes the run's folder, unless another process is at work there, and writes down what was chosen.
    pub fn open_folder(&self) -> Result<Folder> {
        let out = &self.arguments.out;
        std::fs::create_dir_all(out).with_context(|| format!("can't make --out {}", out.display()))?;
        let lock = Lock::take(out)?;
        // Another may have begun and ended since it was looked at.
        refuse_to_write_over(&self.arguments)?;
        let resume = self.arguments.resume && self.manifest.take_up(out)?;
        self.manifest.write(out)?;
        Ok(Folder { resume, _lock: lock })
    }

    /// The held-out records, and when the options have them measured.
    pub fn held(&self) -> Option<Held<'_>> {
        self.held_out.as_ref().map(|data| Held { data, every: self.arguments.eval_every })
    }

    /// Trains in the folder that [`Prepared::open_folder`] made, and writes the report; the router is in it if `watch` says so.
    pub fn train<B: Backend>(
        &self,
        model: &Model<'_, B>,
        held: Option<Held<'_>>,
        folder: &Folder,
        watch: bool,
    ) -> Result<Done> {
        let Self { arguments, adapter, data, recipe, manifest, .. } = self;
        let (trainable, share) = (self.trainable, 100.0 * self.share);
        let count = data.sequences.len();
        output::say(format_args!(
            "{count} records, {} steps; {trainable} trainable parameters, {share:.3} % of all",
            recipe.steps
        ));
        let out = &arguments.out;
        let keeping = Keeping { out, every: arguments.save_every, resume: folder.resume };
        let trained = session::train(model, adapter, data, recipe, held, keeping)?;
        let held_out = self.held_out.as_ref().map(|held_out| (held_out, "held-out records"));
        let (watched, what) = held_out.unwrap_or((data, "training records"));
        let steps = trained.steps.len();
        let router = match watch {
            true => interrupt::unless_stopped(Router::watch(model, &trained.adapter, watched, what, steps))?.flatten(),
            false => None,
        };
        report::write_run(out, &manifest.options, &manifest.facts, &trained, &router)?;
        Ok(Done { trained, trainable, router })
    }
}

fn refuse_to_write_over(arguments: &Arguments) -> Result<()> {
    let out = &arguments.out;
    if !arguments.resume && !vacant(out)? {
        bail!("--out {} is not empty; --resume goes on with the run in it", out.display());
    }
    if arguments.resume && !begun(out) {
        bail!("--resume: there is no run in {}", out.display());
    }
    Ok(())
}

fn recipe(arguments: &Arguments, records: usize) -> Result<Recipe> {
    let Arguments { lr, router_lr, schedule, seed, .. } = *arguments;
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
    let records = taken;
    Ok(Recipe { batch, grad_accum, lr, router_lr, schedule, warmup, clip, steps, records, seed, shuffle, recompute })
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
