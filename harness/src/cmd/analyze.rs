//! `hydra analyze`: adapters from inside. Do the A of separately trained adapters, or of heads, converge while the B part (the
//! paper's Observation II)? And what does the router do?

mod gates;
mod matrices;
mod page;
mod similarity;
mod tsne;

use super::{positive, seed, seq_len, write_json};
use crate::data::encode::Encoder;
use crate::data::records;
use crate::data::template::Template;
use crate::device::{DeviceArgs, ModelArgs, on_device};
use crate::router::{self, Sample};
use crate::{output, report};
use anyhow::{Context, Result, bail};
use clap::Args;
use gates::Gates;
use hydra_runtime::adapter::{Adapter, GateKind, Method};
use hydra_runtime::backend::Backend;
use hydra_runtime::model::Model;
use matrices::{Kind, Matrix, head_name};
use serde::Serialize;
use similarity::{Compared, Prepared, compare};
use std::path::{Path, PathBuf};

/// The result's name in the folder.
const RESULT: &str = "analysis.json";

/// Options of `analyze`.
#[derive(Args)]
pub struct Arguments {
    /// Adapters' folders, of one model
    #[arg(value_name = "ADAPTER", required = true)]
    adapters: Vec<PathBuf>,
    /// Where to write analysis.json, plots and report.html; made if need be, earlier ones are replaced
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Names of the adapters, with commas between them [default: their folders' names]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    names: Option<Vec<String>>,
    /// Of t-SNE's start
    #[arg(long, allow_negative_numbers = true, value_name = "S", default_value_t = 0, value_parser = seed)]
    seed: u64,
    /// Of t-SNE: roughly the number of neighbours that count; a third of the points at most
    #[arg(long, allow_negative_numbers = true, value_name = "P", default_value_t = 30.0, value_parser = super::not_negative)]
    perplexity: f64,
    /// Records to watch routers on, by category; needs --model
    #[arg(long, value_name = "FILE.jsonl", requires = "model")]
    data: Option<PathBuf>,
    /// The adapters' model: a Hugging Face folder, a GGUF file, a folder with one, or org/name on the Hugging Face hub
    #[arg(long, value_name = "PATH", requires = "data")]
    model: Option<String>,
    /// The most records of a category to watch, in the file's order
    #[arg(long, allow_negative_numbers = true, value_name = "N", default_value_t = 32, value_parser = positive)]
    records: usize,
    /// plain, official, alpaca, chat, or a Jinja file
    #[arg(long, default_value = "plain")]
    template: String,
    /// Cut sequences at this many tokens [default: 1024, or the model's context]
    #[arg(long, allow_negative_numbers = true, value_name = "L", value_parser = positive)]
    seq_len: Option<usize>,
    #[command(flatten)]
    device: DeviceArgs,
}

/// `analysis.json`
#[derive(Serialize)]
struct Analysis {
    adapters: Vec<About>,
    /// Whether all started from the same seed; `None` where a folder doesn't say.
    same_seed: Option<bool>,
    tsne: tsne::Settings,
    a: Side,
    b: Side,
    /// One for each adapter with a router, if there are records to watch it on.
    router: Vec<Gates>,
}

/// An adapter.
#[derive(Serialize)]
struct About {
    name: String,
    path: PathBuf,
    method: &'static str,
    gate: &'static str,
    rank: usize,
    heads: usize,
    seed: Option<u64>,
    /// Mean over its matrices.
    effective_rank_a: f64,
    effective_rank_b: f64,
    /// Mean cosine of an A to what it was before training, where the folder says the seed; A's that have hardly moved are alike
    /// if they started alike.
    cosine_of_a_to_its_start: Option<f64>,
}

/// All A, or all B.
#[derive(Serialize)]
struct Side {
    /// Between different adapters.
    across_adapters: Compared,
    /// Between the heads of one adapter.
    across_heads: Compared,
    /// A point for each matrix.
    points: Vec<Point>,
}

/// A matrix.
#[derive(Serialize)]
struct Point {
    adapter: usize,
    layer: usize,
    projection: &'static str,
    head: Option<usize>,
    name: String,
    effective_rank: f64,
    /// In the t-SNE picture; `None` where there are too few for one.
    place: Option<(f64, f64)>,
}

/// Runs it.
pub fn run(arguments: Arguments) -> Result<()> {
    let names = names(&arguments)?;
    let adapters = arguments.adapters.iter().map(|path| Adapter::open(path)).collect::<Result<Vec<_>, _>>()?;
    matrices::check_alike(&adapters, &names)?;
    // Before the work, so that it isn't done in vain.
    let (out, new) = (&arguments.out, !arguments.out.exists());
    if out.join(report::FILE).exists() && !out.join(RESULT).exists() {
        bail!("--out {}: its {} is no earlier analysis's, and would be replaced", out.display(), report::FILE);
    }
    std::fs::create_dir_all(out).with_context(|| format!("can't make --out {}", out.display()))?;
    analyse(&arguments, &adapters, &names).inspect_err(|_| {
        if new {
            // Only if it is empty; that error is the one to report.
            let _ = std::fs::remove_dir(out);
        }
    })
}

fn analyse(arguments: &Arguments, adapters: &[Adapter], names: &[String]) -> Result<()> {
    let out = &arguments.out;
    let router = routers(arguments, adapters, names)?;
    let settings = tsne::Settings { seed: arguments.seed, perplexity: arguments.perplexity };
    let layers = adapters[0].layers.len();
    let mut sides = Vec::new();
    for kind in [Kind::A, Kind::B] {
        let matrices = matrices::all(adapters, kind);
        output::say(format_args!("{kind:?}: {} matrices", matrices.len()));
        sides.push(side(adapters, &matrices, layers, &settings)?);
    }
    let [a, b]: [Side; 2] = sides.try_into().ok().context("two kinds")?;
    let seeds: Vec<Option<u64>> = arguments.adapters.iter().map(|path| seed_of(path)).collect();
    let mean = |side: &Side, adapter: usize| {
        let own: Vec<f64> = side.points.iter().filter(|p| p.adapter == adapter).map(|p| p.effective_rank).collect();
        own.iter().sum::<f64>() / own.len() as f64
    };
    let about = |(i, adapter): (usize, &Adapter)| {
        Ok(About {
            name: names[i].clone(),
            path: arguments.adapters[i].clone(),
            method: adapter.config.method.name(),
            gate: adapter.config.gate.name(),
            rank: adapter.config.rank,
            heads: adapter.config.lora_heads,
            seed: seeds[i],
            effective_rank_a: mean(&a, i),
            effective_rank_b: mean(&b, i),
            cosine_of_a_to_its_start: seeds[i].map(|seed| cosine_to_start(adapter, seed)).transpose()?,
        })
    };
    let analysis = Analysis {
        adapters: adapters.iter().enumerate().map(about).collect::<Result<_>>()?,
        same_seed: seeds
            .iter()
            .copied()
            .collect::<Option<Vec<_>>>()
            .map(|all| all.windows(2).all(|pair| pair[0] == pair[1])),
        tsne: settings,
        a,
        b,
        router,
    };
    write_json(&out.join(RESULT), &analysis)?;
    page::write(out, &analysis)?;
    output::print(page::text(&analysis))?;
    output::print(format_args!("{}\n", out.display()))?;
    Ok(())
}

fn side(adapters: &[Adapter], matrices: &[Matrix], layers: usize, settings: &tsne::Settings) -> Result<Side> {
    let prepared: Vec<Prepared<'_>> = matrices.iter().map(Prepared::new).collect();
    let across_adapters = compare(&prepared, layers, |a, b| a.adapter != b.adapter);
    let across_heads = compare(&prepared, layers, |a, b| a.adapter == b.adapter);
    let places = tsne::places(matrices, settings)?;
    let point = |(i, matrix): (usize, &Matrix)| Point {
        adapter: matrix.adapter,
        layer: matrix.layer,
        projection: matrix.projection.name(),
        head: matrix.head,
        name: matrix.head.map_or("shared".to_string(), |head| head_name(&adapters[matrix.adapter], head)),
        effective_rank: prepared[i].effective_rank,
        place: places.as_ref().map(|places| places[i]),
    };
    Ok(Side { across_adapters, across_heads, points: matrices.iter().enumerate().map(point).collect() })
}

/// Given, or the last parts of the paths at which they differ.
fn names(arguments: &Arguments) -> Result<Vec<String>> {
    let paths = &arguments.adapters;
    if let Some(names) = &arguments.names {
        if names.len() != paths.len() {
            bail!("--names: {} for {} adapters", names.len(), paths.len());
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

/// As `run.json` beside the adapter has it.
fn seed_of(path: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(path.join(super::finetune::manifest::FILE)).ok()?;
    let run: serde_json::Value = serde_json::from_str(&text).ok()?;
    // An adapter that was started from another has no seed of its own.
    run["options"]["init-adapter"].is_null().then(|| run["options"]["seed"].as_u64())?
}

fn cosine_to_start(adapter: &Adapter, seed: u64) -> Result<f64> {
    let [now, start] = [adapter.clone(), adapter.start(seed)?].map(|adapter| matrices::all(&[adapter], Kind::A));
    let cosines = now.iter().zip(&start).map(|(now, start)| similarity::cosine(now, start));
    Ok(cosines.sum::<f64>() / now.len() as f64)
}

/// What the routers did with the records, where there are records.
fn routers(arguments: &Arguments, adapters: &[Adapter], names: &[String]) -> Result<Vec<Gates>> {
    let (Some(data), Some(model)) = (&arguments.data, &arguments.model) else { return Ok(Vec::new()) };
    if adapters.iter().all(|adapter| adapter.config.gate != GateKind::Router) {
        bail!("--data is for watching routers, and no adapter has one");
    }
    let options = ModelArgs { model: model.clone(), device: arguments.device.clone() };
    on_device!(options.device, device => watch(device, arguments, (data.as_path(), &options), adapters, names))
}

/// Watches each router on the records.
fn watch<B: Backend>(
    device: B,
    arguments: &Arguments,
    (data, options): (&Path, &ModelArgs),
    adapters: &[Adapter],
    names: &[String],
) -> Result<Vec<Gates>> {
    let records = records::read(data)?;
    let checkpoint = options.checkpoint()?;
    let config = checkpoint.config();
    for (adapter, name) in adapters.iter().zip(names) {
        adapter.fits(config).with_context(|| format!("{name} on --model {}", options.model))?;
    }
    let seq_len = seq_len(arguments.seq_len, config.context)?;
    let tokenizer = checkpoint.tokenizer()?;
    let template = Template::from_argument(&arguments.template, &tokenizer)?;
    let encoder = Encoder { tokenizer: &tokenizer, template: &template, seq_len };
    let encoded = encoder.encode(&records, &[]).with_context(|| data.display().to_string())?;
    let model = Model::load(device, &checkpoint)?;
    let mut all = Vec::new();
    for (adapter, name) in adapters.iter().zip(names) {
        if adapter.config.gate == GateKind::Router {
            output::say(format_args!("{name}: watching the router"));
            let watched = router::watch(&model, adapter, &Sample::first(&encoded, arguments.records))?;
            if !router::finite(&watched) {
                bail!("{name}: a router's weights are not finite; the model or the adapter has values that aren't");
            }
            all.push(Gates::new(name, adapter, &watched));
        }
    }
    Ok(all)
}

/// Whether heads have an A each.
fn split(method: &str) -> bool {
    method == Method::Split.name()
}
