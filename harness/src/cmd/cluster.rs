//! `hydra cluster`: clusters of records, and copies of the files with each record's cluster.

mod found;
mod page;

use crate::cluster::{self, Range};
use crate::data::file::{JsonFile, bad_json};
use crate::data::format::Format;
use crate::data::records::{self, Reading};
use crate::data::table;
use crate::hub::locate_data;
use crate::interrupt;
use crate::options::Seed;
use crate::output;
use crate::report;
use anyhow::{Context, Result, bail};
use clap::Args;
use found::Found;
use hydra_runtime::atomic::NewFolder;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

/// The clustering, in the folder of the results.
const FILE: &str = "clusters.json";
/// The picture of the elbow.
const PLOT: &str = "elbow.svg";
/// The field that the copied records get.
const FIELD: &str = "cluster";

/// Options of `cluster`.
#[derive(Args)]
#[command(
    after_help = "Method: TF-IDF of instruction and context, projected onto its 64 strongest directions, then k-means (the best of 16 \
    starts for each k). The number chosen is the elbow of the inertia: the k at which two straight lines, fitted to 1..k and k..TO, \
    fit the curve best; repeated with 2k for TO until k stays (the L method). The silhouette is the mean over 2,000 records, for \
    comparison only. The same seed gives the same clusters. DIR gets clusters.json, elbow.svg, report.html, and copies of the files \
    whose records have a field \"cluster\", for `finetune --gate label --label-field cluster`."
)]
pub struct Arguments {
    /// Records to cluster, as for finetune
    #[arg(long, value_name = "FILE", num_args = 1.., required = true, help_heading = "Data")]
    data: Vec<PathBuf>,
    /// Format of the records, where their keys fit several [default: the one that the keys tell]
    #[arg(long, value_enum, value_name = "FORMAT", help_heading = "Data")]
    data_format: Option<Format>,
    /// Numbers of clusters to choose from, or one number
    #[arg(long, value_name = "FROM..TO|K", default_value = "2..16", help_heading = "Clustering")]
    k: Range,
    /// Random seed of the starts and samples
    #[arg(long, value_name = "SEED", default_value_t = Seed::new(41), help_heading = "Clustering")]
    seed: Seed,
    /// Folder for the results; must be new or empty [default: print only]
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    out: Option<PathBuf>,
}

/// Clusters, prints, and writes what --out asks for.
pub fn run(mut arguments: Arguments) -> Result<()> {
    arguments.data = locate_data(&arguments.data)?;
    let mut names = BTreeSet::from([FILE, PLOT, report::FILE].map(Into::into));
    for path in arguments.data.iter().filter(|_| arguments.out.is_some()) {
        records::readable_twice(path)?;
        let name = lines_name(path).with_context(|| format!("--data {}: not a file's name", path.display()))?;
        if !names.insert(name) {
            bail!("--data {}: --out would get two files with this name; rename one", path.display());
        }
    }
    let folder = arguments.out.as_deref().map(NewFolder::begin).transpose().context("--out")?;
    if let Some(folder) = &folder {
        interrupt::discard(folder.path())?;
    }
    let records = Reading::new(arguments.data_format).read_all(&arguments.data)?;
    let clustering = cluster::find(&records, arguments.k, arguments.seed.get())
        .with_context(|| format!("--data {}", records::names(&arguments.data)))?;
    let meeting = cluster::contingency(&records, &clustering);
    let agreement = cluster::adjusted_rand(&meeting.values().cloned().collect::<Vec<_>>());
    let (data, seed) = (&arguments.data, arguments.seed.get());
    let found = Found { data, seed, records: &records, clustering: &clustering, meeting, agreement };
    output::print(found.text())?;
    if let (Some(folder), Some(out)) = (folder, &arguments.out) {
        let write = || {
            output::write_json(&folder.path().join(FILE), &found.json())?;
            report::write_chart(&folder.path().join(PLOT), &page::elbow(&found))?;
            page::page(&found).write(folder.path())?;
            let mut first = 0;
            for path in &arguments.data {
                let copy = folder.path().join(lines_name(path).unwrap_or_default());
                first += label(path, &copy, &clustering.clusters[first..])?;
            }
            Ok(())
        };
        output::named(write(), folder.path(), out)?;
        folder.keep()?;
        output::print(format_args!("{}\n", out.display()))?;
    }
    Ok(())
}

/// The field [`FIELD`] of a record, as it is written there.
#[derive(Deserialize)]
struct Labelled<'l> {
    #[serde(borrow, default, deserialize_with = "even_null")]
    cluster: Option<&'l RawValue>,
}

fn even_null<'l, D: Deserializer<'l>>(value: D) -> Result<Option<&'l RawValue>, D::Error> {
    Deserialize::deserialize(value).map(Some)
}

/// The name of a file's copy, which is one of JSON lines: "train.jsonl" for "train.jsonl.gz", "train.csv" and "train.parquet".
fn lines_name(path: &Path) -> Option<OsString> {
    let unpacked = table::unpacked_name(Path::new(path.file_name()?));
    let is_table = table::has_extension(&unpacked, &["csv", "tsv", "parquet"]);
    Some(if is_table { unpacked.with_extension("jsonl") } else { unpacked }.into_os_string())
}

/// Copies a file of records, each with its cluster, and returns their number.
fn label(from: &Path, to: &Path, clusters: &[usize]) -> Result<usize> {
    let file = JsonFile::read(from)?;
    let mut text = Vec::with_capacity(file.bytes() + 16 * clusters.len());
    let mut count = 0;
    for ((number, line), cluster) in file.json_lines().zip(clusters) {
        let at = || format!("{}:{number}", from.display());
        let line = std::str::from_utf8(&line).with_context(at)?.trim_end();
        let Labelled { cluster: before } = serde_json::from_str(line).map_err(|e| bad_json(&e)).with_context(at)?;
        // The rest of the line stays byte for byte.
        let new = match before {
            // It borrows from the line.
            Some(before) => {
                let start = before.get().as_ptr().addr() - line.as_ptr().addr();
                format!("{}{cluster}{}", &line[..start], &line[start + before.get().len()..])
            }
            None => {
                format!("{}, \"{FIELD}\": {cluster}}}", line.strip_suffix('}').unwrap_or(line).trim_end())
            }
        };
        text.extend_from_slice(new.as_bytes());
        text.push(b'\n');
        count += 1;
    }
    fs::write(to, text).with_context(|| format!("can't write {}", to.display()))?;
    Ok(count)
}
