//! `hydra eval loss`: the mean loss on the targets of a file's records.

use super::{positive, seq_len, write_json};
use crate::data::encode::Encoder;
use crate::data::records;
use crate::data::template::Template;
use crate::device::{ModelArgs, on_device};
use crate::heldout;
use crate::output::{self, writable};
use crate::progress::Progress;
use anyhow::{Context, Result, bail};
use clap::Args;
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::Backend;
use hydra_runtime::model::Model;
use std::path::PathBuf;

/// Options of `eval loss`.
#[derive(Args)]
#[command(
    after_help = "An adapter with the label gate takes each record's head from the field that it was trained by; a record \
    whose label is none of the adapter's gets the mean of the heads."
)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    /// An adapter's folder
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Records, as for finetune
    #[arg(long, value_name = "FILE.jsonl")]
    data: PathBuf,
    /// plain, official, alpaca, chat, or a Jinja file
    #[arg(long, default_value = "plain")]
    template: String,
    /// Cut sequences at this many tokens [default: 1024, or the model's context]
    #[arg(long, allow_negative_numbers = true, value_name = "L", value_parser = positive)]
    seq_len: Option<usize>,
    /// Write the result there
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs it.
pub fn run(arguments: Arguments) -> Result<()> {
    writable(arguments.json.as_ref())?;
    on_device!(arguments.model.device, device => run_on(device, arguments))
}

fn run_on<B: Backend>(device: B, arguments: Arguments) -> Result<()> {
    let checkpoint = arguments.model.checkpoint()?;
    let config = checkpoint.config();
    let seq_len = seq_len(arguments.seq_len, config.context)?;
    let adapter = arguments.adapter.map(|dir| Adapter::load(&dir, config)).transpose()?;
    let tokenizer = checkpoint.tokenizer()?;
    let template = Template::from_argument(&arguments.template, &tokenizer)?;
    let field = adapter.as_ref().and_then(|adapter| adapter.config.label_field.as_deref()).unwrap_or(records::CATEGORY);
    let records = records::read_labelled(&arguments.data, field)?;
    let labels = adapter.as_ref().map_or(&[][..], |adapter| &adapter.config.labels);
    let encoder = Encoder { tokenizer: &tokenizer, template: &template, seq_len };
    let encoded = encoder.encode(&records, labels).with_context(|| arguments.data.display().to_string())?;
    if let Some(remark) = encoded.remark(seq_len) {
        output::say(remark);
    }
    let model = Model::load(device, &checkpoint)?;
    let mut progress = Progress::new("records", encoded.sequences.len() as u64, 0);
    let found = heldout::measure(&model, adapter.as_ref(), &encoded, |done| progress.update(done as u64, ""))?;
    drop(progress);
    if !found.all.loss.is_finite() {
        bail!(
            "{}: the loss is {}; the model or the adapter has values that are not finite",
            arguments.data.display(),
            found.all.loss
        );
    }
    // Both are tried, whatever becomes of the other.
    let json = arguments.json.map_or(Ok(()), |path| write_json(&path, &found));
    output::print(found.table())?;
    json
}
