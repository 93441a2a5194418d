//! `hydra cluster`: how many kinds of records a corpus has, and which is of which kind.

use crate::cluster::{self, Clustering, Range};
use crate::data::records::{self, Record};
use crate::interrupt;
use crate::options::Seed;
use crate::output::{self, printable};
use crate::report::{self, Curve, curves, section, table};
use anyhow::{Context, Result, bail};
use clap::Args;
use hydra_runtime::atomic::NewFolder;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The clustering's name in its folder.
const FILE: &str = "clusters.json";
/// The elbow's.
const PLOT: &str = "elbow.svg";
/// The field that records get.
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
    #[arg(long, value_name = "FILE.jsonl", num_args = 1.., required = true, help_heading = "Data")]
    data: Vec<PathBuf>,
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

/// Runs it.
pub fn run(arguments: Arguments) -> Result<()> {
    let mut names = BTreeSet::from([FILE, PLOT, report::FILE].map(Into::into));
    for path in arguments.data.iter().filter(|_| arguments.out.is_some()) {
        records::readable_twice(path)?;
        let name = path.file_name().with_context(|| format!("--data {}: not a file's name", path.display()))?;
        if !names.insert(name.to_os_string()) {
            bail!("--data {}: --out would have two files of this name", path.display());
        }
    }
    let folder = arguments.out.as_deref().map(NewFolder::begin).transpose().context("--out")?;
    if let Some(folder) = &folder {
        interrupt::discard(folder.path())?;
    }
    let records = records::read_all(&arguments.data, records::CATEGORY)?;
    let clustering = cluster::find(&records, arguments.k, arguments.seed.get())
        .with_context(|| format!("--data {}", records::names(&arguments.data)))?;
    let meeting = cluster::contingency(&records, &clustering);
    let agreement = cluster::adjusted_rand(&meeting.values().cloned().collect::<Vec<_>>());
    let found = Found { arguments: &arguments, records: &records, clustering: &clustering, meeting, agreement };
    output::print(found.text())?;
    if let (Some(folder), Some(out)) = (folder, &arguments.out) {
        output::write_json(&folder.path().join(FILE), &found.json())?;
        report::write_svg(&folder.path().join(PLOT), &found.elbow())?;
        report::write(folder.path(), "Hydra clusters", &found.page())?;
        let mut first = 0;
        for path in &arguments.data {
            first +=
                label(path, &folder.path().join(path.file_name().unwrap_or_default()), &clustering.clusters[first..])?;
        }
        folder.keep()?;
        output::print(format_args!("{}\n", out.display()))?;
    }
    Ok(())
}

/// A record as far as [`label`] looks at it; the field is [`FIELD`].
#[derive(Deserialize)]
struct Labelled<'l> {
    #[serde(borrow, default, deserialize_with = "even_null")]
    cluster: Option<&'l RawValue>,
}

fn even_null<'l, D: Deserializer<'l>>(value: D) -> Result<Option<&'l RawValue>, D::Error> {
    Deserialize::deserialize(value).map(Some)
}

/// Copies a file of records, each with its cluster; returns how many there are.
fn label(from: &Path, to: &Path, clusters: &[usize]) -> Result<usize> {
    let at = || from.display().to_string();
    let bytes = fs::read(from).with_context(at)?;
    let mut text = Vec::with_capacity(bytes.len() + 16 * clusters.len());
    let mut count = 0;
    for ((_, line), cluster) in records::lines(&bytes).zip(clusters) {
        let line = std::str::from_utf8(line).with_context(at)?.trim_end();
        let Labelled { cluster: before } = serde_json::from_str(line).with_context(at)?;
        // The rest of the line stays as it is, to the last digit of its numbers.
        let new = match before {
            // A part of the line.
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

/// All there is to tell.
struct Found<'a> {
    arguments: &'a Arguments,
    records: &'a [Record],
    clustering: &'a Clustering,
    meeting: BTreeMap<String, Vec<usize>>,
    agreement: Option<f64>,
}

impl Found<'_> {
    fn json(&self) -> Value {
        let Clustering { k, reason, tried, sizes, terms, nearest, .. } = self.clustering;
        let chosen = tried.iter().find(|one| one.k == *k);
        json!({
            "k": k, "reason": reason, "sizes": sizes, "terms": terms, "nearest": nearest,
            "silhouette": chosen.and_then(|one| one.silhouette), "inertia": chosen.map(|one| one.inertia), "tried": tried,
            "adjusted_rand_index": self.agreement, "categories": self.meeting,
            "records": self.records.len(), "records_without_terms": self.clustering.without_terms,
            "vocabulary": self.clustering.vocabulary, "dimensions": self.clustering.dimensions,
            "silhouette_sample": self.clustering.sample, "seed": self.arguments.seed, "data": self.arguments.data,
        })
    }

    /// A row per number that was tried, and per cluster.
    fn text(&self) -> String {
        let Clustering { k, reason, tried, sizes, terms, without_terms, .. } = self.clustering;
        let mut text = format!("{:>4} {:>12} {:>11}\n", "k", "inertia", "silhouette");
        for one in tried {
            let silhouette = one.silhouette.map_or("-".into(), |s| format!("{s:.4}"));
            let mark = if one.k == *k { "  <" } else { "" };
            text += &format!("{:>4} {:>12.2} {silhouette:>11}{mark}\n", one.k, one.inertia);
        }
        text += &format!("{k} clusters: {reason}\n");
        for (cluster, (size, terms)) in sizes.iter().zip(terms).enumerate() {
            text += &format!("{cluster:>4} {size:>8}  {}\n", printable(&terms.join(" ")));
        }
        if *without_terms > 0 {
            text += &format!("{without_terms} records have none of the terms that are counted\n");
        }
        if let Some(agreement) = self.agreement {
            text += &format!("agreement with the categories (adjusted Rand index): {agreement:.3}\n");
        }
        text
    }

    /// The inertia by number of clusters, with the two lines that make the elbow.
    fn elbow(&self) -> String {
        let tried = &self.clustering.tried;
        let points = tried.iter().map(|one| (one.k as f64, one.inertia)).collect();
        let mut lines = vec![Curve { name: "inertia".into(), points }];
        if let Some([to, from]) = self.clustering.lines() {
            lines.push(Curve { name: format!("line to {}", self.clustering.k), points: to });
            lines.push(Curve { name: format!("line from {}", self.clustering.k), points: from });
        }
        curves(&lines)
    }

    fn page(&self) -> String {
        let Clustering { k, reason, tried, sizes, terms, nearest, .. } = self.clustering;
        let mut body = format!("<p>{} records in {k} clusters: {}.</p>", self.records.len(), report::escape(reason));
        if tried.len() > 1 {
            body += &section("Inertia by number of clusters", &self.elbow());
            let points = tried.iter().filter_map(|one| Some((one.k as f64, one.silhouette?))).collect();
            let silhouette = curves(&[Curve { name: "mean silhouette".into(), points }]);
            body += &section("Silhouette by number of clusters", &silhouette);
        }
        let rows = sizes.iter().zip(terms).enumerate();
        let rows: Vec<_> =
            rows.map(|(c, (size, terms))| vec![c.to_string(), size.to_string(), terms.join(" ")]).collect();
        body += &section("Clusters", &table(&["cluster", "records", "terms that tell it"], &rows));
        let near = nearest.iter().enumerate().flat_map(|(c, near)| near.iter().map(move |near| (c, near)));
        let row = |(c, near): (usize, &cluster::Near)| {
            vec![c.to_string(), near.record.to_string(), format!("{:.3}", near.distance), near.instruction.clone()]
        };
        let head = ["cluster", "record", "distance", "instruction"];
        body += &section("Nearest to the centroids", &table(&head, &near.map(row).collect::<Vec<_>>()));
        if let Some(agreement) = self.agreement {
            let names: Vec<String> = (0..*k).map(|c| format!("cluster {c}")).collect();
            let head: Vec<&str> = ["category"].into_iter().chain(names.iter().map(String::as_str)).collect();
            let row = |(name, counts): (&String, &Vec<usize>)| {
                [name.clone()].into_iter().chain(counts.iter().map(usize::to_string)).collect()
            };
            let rows: Vec<_> = self.meeting.iter().map(row).collect();
            let said = format!("<p>Adjusted Rand index: {agreement:.3} (1: the same; 0: unrelated).</p>");
            body += &section("Clusters and categories", &(said + &table(&head, &rows)));
        }
        body
    }
}
