//! `hydra analyze`: options to an analysis.

mod page;

use crate::analyze::analysis::Analysis;
use crate::analyze::gates::Gates;
use crate::analyze::{matrices, tsne};
use crate::data::encode::Encoder;
use crate::data::options::EncodingArgs;
use crate::data::records::Reading;
use crate::data::template::Template;
use crate::device::{DeviceArgs, MODEL_HELP, on_device, open_model};
use crate::eval::router::{self, Sample};
use crate::hub::locate_file;
use crate::options::{Count, NonNegative, Seed};
use crate::output::{self, printable};
use crate::report;
use crate::run::folder;
use anyhow::{Context, Result, bail};
use clap::Args;
use hydra_runtime::adapter::{Adapter, GateKind};
use hydra_runtime::backend::Backend;
use hydra_runtime::model::Model;
use std::path::{Path, PathBuf};

/// The result's name in the folder.
const RESULT: &str = "analysis.json";

/// Options of `analyze`.
#[derive(Args)]
pub struct Arguments {
    /// Folders of adapters of one model
    #[arg(value_name = "ADAPTER", required = true)]
    adapters: Vec<PathBuf>,
    /// Names of the adapters, comma-separated [default: their folders' names]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    names: Option<Vec<String>>,
    /// The adapters' model, to watch routers on --data
    #[arg(long, value_name = "PATH", requires = "data", help_heading = "Model", long_help = MODEL_HELP)]
    model: Option<String>,
    /// Records to watch routers on, by category; needs --model
    #[arg(long, value_name = "FILE", requires = "model", help_heading = "Data")]
    data: Option<PathBuf>,
    /// The most records of a category to watch, in the file's order
    #[arg(long, value_name = "N", default_value_t = Count::new(32), help_heading = "Data")]
    records: Count,
    #[command(flatten, next_help_heading = "Data")]
    encoding: EncodingArgs,
    /// Random seed of t-SNE
    #[arg(long, value_name = "SEED", default_value_t = Seed::new(0), help_heading = "t-SNE")]
    seed: Seed,
    /// Perplexity of t-SNE: roughly the number of neighbours that count; at most a third of the points
    #[arg(long, value_name = "P", default_value_t = NonNegative::new(30.0), help_heading = "t-SNE")]
    perplexity: NonNegative,
    /// Folder for analysis.json, plots and the report; those of an earlier analysis are replaced
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    out: PathBuf,
    #[command(flatten, next_help_heading = "Device")]
    device: DeviceArgs,
}

/// Compares the adapters, and writes what was found.
pub fn run(arguments: Arguments) -> Result<()> {
    let names = names(&arguments)?;
    let adapters = arguments.adapters.iter().map(Adapter::open).collect::<Result<Vec<_>, _>>()?;
    matrices::check_alike(&adapters, &names)?;
    // Before the work, so that it isn't done in vain.
    let (out, new) = (&arguments.out, !arguments.out.exists());
    if out.join(report::FILE).exists() && !out.join(RESULT).exists() {
        let (out, file) = (out.display(), report::FILE);
        bail!("--out {out}: its {file} is not an earlier analysis's and would be replaced; give another folder");
    }
    folder::make(out).context("--out")?;
    analyze(&arguments, &adapters, &names).inspect_err(|_| {
        if new {
            // Succeeds only if it is empty; the first error is the one to report.
            let _ = std::fs::remove_dir(out);
        }
    })
}

fn analyze(arguments: &Arguments, adapters: &[Adapter], names: &[String]) -> Result<()> {
    let out = &arguments.out;
    let router = routers(arguments, adapters, names)?;
    let settings = tsne::Settings { seed: arguments.seed.get(), perplexity: arguments.perplexity.get() };
    let analysis = Analysis::new(adapters, names, &arguments.adapters, settings, router)?;
    output::write_json(&out.join(RESULT), &analysis)?;
    page::write(out, &analysis)?;
    output::print(page::text(&analysis))?;
    output::print(format_args!("{}\n", out.display()))?;
    Ok(())
}

/// The names that were given, or the last parts of the paths in which they differ.
fn names(arguments: &Arguments) -> Result<Vec<String>> {
    let paths = &arguments.adapters;
    if let Some(names) = &arguments.names {
        if names.len() != paths.len() {
            bail!("--names: expected {} names, one for each adapter, found {}", paths.len(), names.len());
        }
        if let Some(twice) = (1..names.len()).find(|&i| names[..i].contains(&names[i])) {
            bail!("--names: expected different names, found \"{}\" twice", printable(&names[twice]));
        }
        return Ok(names.clone());
    }
    let tail = |path: &PathBuf, parts: usize| {
        let all: Vec<_> = path.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
        all[all.len().saturating_sub(parts)..].join("/")
    };
    let longest = paths.iter().map(|path| path.components().count()).max().unwrap_or(1);
    for parts in 1..=longest {
        let names: Vec<String> = paths.iter().map(|path| tail(path, parts)).collect();
        if (1..names.len()).all(|i| !names[..i].contains(&names[i])) {
            return Ok(names);
        }
    }
    bail!("an adapter is given twice")
}

/// What the routers do with the records, if there are records.
fn routers(arguments: &Arguments, adapters: &[Adapter], names: &[String]) -> Result<Vec<Gates>> {
    let (Some(data), Some(model)) = (&arguments.data, &arguments.model) else { return Ok(Vec::new()) };
    if adapters.iter().all(|adapter| adapter.config.gate != GateKind::Router) {
        bail!("--data is for watching routers, and no adapter has one");
    }
    on_device!(arguments.device, device => watch(device, arguments, (data.as_path(), model), adapters, names))
}

/// Watches each router on the records.
fn watch<B: Backend>(
    device: B,
    arguments: &Arguments,
    (data, model): (&Path, &str),
    adapters: &[Adapter],
    names: &[String],
) -> Result<Vec<Gates>> {
    let records = Reading::new(arguments.encoding.data_format).read(&locate_file(data)?)?;
    let checkpoint = open_model(model)?;
    let config = checkpoint.config();
    for (adapter, name) in adapters.iter().zip(names) {
        adapter.fits(config).with_context(|| format!("{name} on --model {model}"))?;
    }
    let tokenizer = checkpoint.tokenizer()?;
    let template = Template::new(&arguments.encoding, &tokenizer)?;
    let seq_len = arguments.encoding.seq_len(config.context)?;
    let encoder = Encoder { template: &template, seq_len };
    let encoded = encoder.encode(&records, &[]).with_context(|| data.display().to_string())?;
    let model = Model::load(device, &checkpoint)?;
    let mut all = Vec::new();
    for (adapter, name) in adapters.iter().zip(names) {
        if adapter.config.gate == GateKind::Router {
            output::say(format_args!("{name}: watching the router"));
            let watched = router::watch(&model, adapter, &Sample::first(&encoded, arguments.records.get()))?;
            if !router::finite(&watched) {
                bail!(
                    "{name}: the router's weights are not finite; the model or the adapter has values that are not finite"
                );
            }
            all.push(Gates::new(name, adapter, &watched));
        }
    }
    Ok(all)
}
