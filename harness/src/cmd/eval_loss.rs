//! `hydra eval loss`: the mean loss on the targets of a file's records.

use crate::data::encode::{Encoded, Encoder};
use crate::data::options::EncodingArgs;
use crate::data::records::{self, Reading};
use crate::data::template::Template;
use crate::device::{ModelArgs, on_device};
use crate::eval::loss;
use crate::hub::locate_file;
use crate::output::{self, writable};
use crate::progress::Progress;
use crate::ranks::{self, Ranks, digest_of, fact};
use crate::run::manifest::weights;
use anyhow::{Context, Result, anyhow};
use clap::Args;
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::Backend;
use hydra_runtime::checkpoint::Checkpoint;
use std::path::{Path, PathBuf};

/// Options of `eval loss`.
#[derive(Args)]
#[command(
    after_help = "Under an adapter's label gate, a record's label selects the head: it is in the field that the adapter was \
    trained by. A record with an unknown label gets the mean of the heads."
)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArgs,
    /// Adapter: its folder, or a LoRA in a GGUF file [default: the model alone]
    #[arg(long, value_name = "PATH", help_heading = "Adapter")]
    adapter: Option<PathBuf>,
    /// Records to measure the loss on, as for finetune
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    data: PathBuf,
    #[command(flatten, next_help_heading = "Data")]
    encoding: EncodingArgs,
    /// Write the result to a JSON file as well
    #[arg(long, value_name = "FILE.json", help_heading = "Output")]
    json: Option<PathBuf>,
}

/// Measures the loss and shows it by category; on rank 0, with the work of all.
pub fn run(arguments: Arguments) -> Result<()> {
    ranks::share(|ranks| {
        let model = Path::new(&arguments.model.model);
        let inputs = [Some(model), Some(&*arguments.data), arguments.adapter.as_deref()];
        ranks.on_first(|| writable(&[("--json", arguments.json.as_ref())], &inputs))?;
        on_device!(arguments.model.device, ranks, device => run_on(device, arguments, ranks))
    })
}

/// What is measured.
struct Ready {
    checkpoint: Checkpoint,
    adapter: Option<Adapter>,
    data: Encoded,
}

impl Ready {
    fn read(arguments: &Arguments) -> Result<Self> {
        let checkpoint = arguments.model.checkpoint()?;
        let config = checkpoint.config();
        let seq_len = arguments.encoding.seq_len(config.context)?;
        let adapter = arguments.adapter.as_ref().map(|dir| Adapter::load(dir, config)).transpose()?;
        let tokenizer = checkpoint.tokenizer()?;
        let template = Template::new(&arguments.encoding, &tokenizer)?;
        let field = adapter.as_ref().and_then(|adapter| adapter.config.label_field.as_deref());
        let label_field = field.unwrap_or(records::CATEGORY);
        let reading = Reading { label_field, format: arguments.encoding.data_format };
        let records = reading.read(&locate_file(&arguments.data)?)?;
        let labels = adapter.as_ref().map_or(&[][..], |adapter| &adapter.config.labels);
        let encoder = Encoder { template: &template, seq_len };
        let data = encoder.encode(&records, labels).with_context(|| arguments.data.display().to_string())?;
        if let Some(remark) = data.remark(seq_len) {
            output::say(remark);
        }
        Ok(Self { checkpoint, adapter, data })
    }
}

fn run_on<B: Backend>(device: B, arguments: Arguments, ranks: &Ranks) -> Result<()> {
    let Ready { checkpoint, adapter, data } = ranks.agree(Ready::read(&arguments))?;
    let model = ranks.load(device, &checkpoint, || {
        let (model, adapter) = (weights(&checkpoint), digest_of(adapter.as_ref()));
        Ok(vec![fact("--model", model), fact("--adapter", adapter), fact("--data", data.digest())])
    })?;
    let mut progress = Progress::new("records", data.sequences.len() as u64, 0);
    let found = loss::measure(&model, adapter.as_ref(), &data, ranks, |done| progress.update(done as u64, ""))?;
    drop(progress);
    let value = found.all.loss;
    if !value.is_finite() {
        let data = arguments.data.display();
        return Err(ranks
            .common(anyhow!("{data}: the loss is {value}: the model or the adapter has values that are not finite")));
    }
    if !ranks.is_first() {
        return Ok(());
    }
    // One is written even if the other fails.
    let json = arguments.json.map_or(Ok(()), |path| output::write_json(&path, &found));
    output::print(found.table())?;
    json
}
