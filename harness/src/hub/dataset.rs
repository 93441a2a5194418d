//! From `--data org/name[:[config/]split]` to local files: a data set of the Hugging Face hub, downloaded into the hub's usual
//! cache.
//!
//! A file belongs to the split that its name or its folder names, and to the configuration that the other folders name:
//!
//! ```text
//! data/train-00000-of-00002.parquet    split train; so any name before the shard's number
//! train.jsonl.gz                       split train
//! all/test-00000-of-00001.parquet      split test of all
//! main/train/0000.parquet              split train of main
//! records.jsonl                        split train, if no file of the data set names a split
//! ```

use super::snapshot::Snapshot;
use super::{Kind as Repository, Name as Source};
use crate::output::printable;
use anyhow::{Context, Result, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Names of splits; the last three mean validation.
const SPLITS: [&str; 6] = ["train", "test", "validation", "valid", "val", "dev"];
/// Extensions of files that can be read; Parquet is taken where there are several, and a table where there is nothing else.
const PARQUET: &str = "parquet";
const JSON: [&str; 3] = ["jsonl", "json", "ndjson"];
const TABLE: [&str; 2] = ["csv", "tsv"];
const COMPRESSED: [&str; 2] = ["gz", "zst"];
/// The split without a name.
const TRAIN: &str = "train";

/// The local files of `--data`, in order: each path as it is, or the files of a data set on the hub.
pub fn locate_data(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        match hub_name(path) {
            Some(name) => files.extend(download(&name)?),
            None => files.push(path.clone()),
        }
    }
    Ok(files)
}

/// The same for an option that takes one file.
pub fn locate_file(path: &Path) -> Result<PathBuf> {
    let files = locate_data(&[path.to_path_buf()])?;
    match files.as_slice() {
        [file] => Ok(file.clone()),
        files => bail!("{}: expected a split of one file, found {}", path.display(), files.len()),
    }
}

/// `org/name`, and the split that is asked for.
struct Name {
    source: Source,
    config: Option<String>,
    split: Option<String>,
}

/// A path that is no file here, and looks like a name on the hub.
fn hub_name(path: &Path) -> Option<Name> {
    let text = path.to_str().filter(|_| !path.exists())?;
    let (source, split) = Source::parse_with_part(text)?;
    // A mistyped file is not looked for on the hub.
    if split.is_none() && Kind::of(text).is_some() {
        return None;
    }
    let (config, split) = match split.map(|split| split.split_once('/').map_or((None, split), |(c, s)| (Some(c), s))) {
        Some((config, split)) => (config.map(str::to_owned), Some(split.to_owned())),
        None => (None, None),
    };
    Some(Name { source, config, split })
}

fn download(name: &Name) -> Result<Vec<PathBuf>> {
    let snapshot = Snapshot::open(Repository::Dataset, &name.source)?;
    let chosen = name.choose(snapshot.files()).with_context(|| name.source.to_string())?;
    let files = chosen.iter().map(|file| snapshot.get(file)).collect::<Result<_>>()?;
    snapshot.keep();
    Ok(files)
}

/// How a file is written; the first of them that a data set has is taken.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Parquet,
    Json,
    Table,
}

impl Kind {
    fn of(name: &str) -> Option<Self> {
        let (stem, extension) = name.rsplit_once('.')?;
        match extension {
            PARQUET => Some(Self::Parquet),
            _ if JSON.contains(&extension) => Some(Self::Json),
            _ if TABLE.contains(&extension) => Some(Self::Table),
            _ if COMPRESSED.contains(&extension) => Self::of(stem).filter(|&kind| kind != Self::Parquet),
            _ => None,
        }
    }
}

/// A file of a data set.
struct Listed<'n> {
    name: &'n str,
    kind: Kind,
    config: String,
    /// As in the file's name.
    split: Option<&'n str>,
}

impl<'n> Listed<'n> {
    /// `None` for what holds no records.
    fn of(name: &'n str) -> Option<Self> {
        let kind = Kind::of(name)?;
        let parts: Vec<&str> = name.split('/').collect();
        let (file, folders) = parts.split_last()?;
        // Also what would leave the cache's folder.
        if parts.iter().any(|part| part.is_empty() || part.starts_with('.')) || *file == "dataset_infos.json" {
            return None;
        }
        let named = |part: &'n str| {
            let mut words = part.split(|c: char| !c.is_ascii_alphanumeric());
            words.find_map(|word| SPLITS.into_iter().find(|&split| split == word))
        };
        let folder = folders.iter().rev().find_map(|folder| SPLITS.into_iter().find(|split| split == folder));
        let other = folders.iter().filter(|&&folder| folder != "data" && !SPLITS.contains(&folder));
        let config = other.copied().collect::<Vec<_>>().join("/");
        Some(Self { name, kind, config, split: shard(file).map(|(split, _)| split).or_else(|| named(file)).or(folder) })
    }
}

/// The split in "SPLIT-00000-of-00002.parquet", as Hugging Face's `datasets` writes it, and the number of its files.
pub(super) fn shard(file: &str) -> Option<(&str, usize)> {
    let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten();
    let (before, after) = file.rsplit_once("-of-")?;
    let (split, shard) = before.rsplit_once('-')?;
    number(shard)?;
    let shards = number(after.split_once('.').map_or(after, |(shards, _)| shards))?;
    (!split.is_empty()).then_some((split, shards))
}

/// Fails if a file is missing of those that belong together: a cache may have some of them.
fn complete(names: &[&str]) -> Result<()> {
    let mut found = BTreeMap::new();
    for (split, shards) in names.iter().filter_map(|name| shard(name)) {
        *found.entry((split, shards)).or_insert(0) += 1;
    }
    match found.into_iter().find(|((_, shards), found)| found < shards) {
        Some(((split, shards), found)) => bail!("{}: expected {shards} files, found {found}", printable(split)),
        None => Ok(()),
    }
}

/// One name for each split.
fn canonical(split: &str) -> &str {
    if matches!(split, "valid" | "val" | "dev") { "validation" } else { split }
}

impl Name {
    /// The files of the split that is asked for, sorted.
    fn choose<'n>(&self, listed: &'n [String]) -> Result<Vec<&'n str>> {
        let mut files: Vec<Listed<'_>> = listed.iter().filter_map(|name| Listed::of(name)).collect();
        let Some(kind) = files.iter().map(|file| file.kind).min() else {
            bail!("expected Parquet, JSON or CSV files, found {}", some(listed.iter().map(String::as_str)));
        };
        files.retain(|file| file.kind == kind);
        let configs: BTreeSet<String> = files.iter().map(|file| file.config.clone()).collect();
        match &self.config {
            Some(config) => files.retain(|file| file.config == *config),
            None if configs.contains("") => files.retain(|file| file.config.is_empty()),
            None if configs.contains("default") => files.retain(|file| file.config == "default"),
            None if configs.len() > 1 => {
                let source = &self.source;
                bail!(
                    "several configurations: give one as {source}:CONFIG/SPLIT: expected one of {}",
                    some(configs.iter().map(String::as_str))
                )
            }
            None => {}
        }
        if files.is_empty() {
            let config = self.config.as_deref().unwrap_or_default();
            bail!("expected one of the configurations {}, found {config}", some(configs.iter().map(String::as_str)));
        }
        let asked = self.split.as_deref().unwrap_or(TRAIN);
        if files.iter().any(|file| file.split.is_some()) || asked != TRAIN {
            let splits: BTreeSet<&str> = files.iter().map(|file| file.split.unwrap_or(TRAIN)).collect();
            let matches = |own: &str| own == asked || canonical(own) == canonical(asked);
            files.retain(|file| matches(file.split.unwrap_or(TRAIN)));
            if files.is_empty() {
                bail!("expected one of the splits {}, found {asked}", some(splits.into_iter()));
            }
        }
        let mut names: Vec<&str> = files.into_iter().map(|file| file.name).collect();
        names.sort_unstable();
        complete(&names)?;
        Ok(names)
    }
}

/// The first names of a list.
pub(super) fn some<'n>(names: impl Iterator<Item = &'n str>) -> String {
    let names: Vec<&str> = names.collect();
    if names.is_empty() { "none".into() } else { printable(&names.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(asked: &str, listed: &[&str]) -> Result<Vec<String>, String> {
        let name = hub_name(Path::new(asked)).expect("a name");
        let listed: Vec<String> = listed.iter().map(|name| name.to_string()).collect();
        let chosen = name.choose(&listed).map_err(|error| error.to_string())?;
        Ok(chosen.into_iter().map(str::to_owned).collect())
    }

    #[test]
    fn files_of_a_split() {
        let listed = [
            "README.md",
            "dataset_infos.json",
            "data/train-00001-of-00002.parquet",
            "data/train-00000-of-00002.parquet",
            "data/test_sft-00000-of-00001.parquet",
            "data/val.parquet",
            "train.jsonl",
            "../train.parquet",
        ];
        let train = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"];
        assert_eq!(choose("o/n", &listed).unwrap(), train);
        assert_eq!(choose("o/n:test_sft", &listed).unwrap(), ["data/test_sft-00000-of-00001.parquet"]);
        assert_eq!(choose("o/n:validation", &listed).unwrap(), ["data/val.parquet"]);
        let error = choose("o/n:other", &listed).unwrap_err();
        assert_eq!(error, "expected one of the splits test_sft, train, val, found other");
        assert_eq!(choose("o/n", &["databricks-dolly-15k.jsonl"]).unwrap(), ["databricks-dolly-15k.jsonl"]);
        assert!(choose("o/n:test", &["databricks-dolly-15k.jsonl"]).unwrap_err().contains("splits train, found test"));
        let cut = choose("o/n", &["data/train-00001-of-00002.jsonl"]).unwrap_err();
        assert_eq!(cut, "data/train: expected 2 files, found 1");
        let tables = ["README.md", "test.csv", "train.csv.gz"];
        assert_eq!(choose("o/n", &tables).unwrap(), ["train.csv.gz"]);
        assert_eq!(choose("o/n", &[&tables[..], &["train.json"]].concat()).unwrap(), ["train.json"]);
        let other = choose("o/n", &["README.md", "train.txt"]).unwrap_err();
        assert_eq!(other, "expected Parquet, JSON or CSV files, found README.md, train.txt");
    }

    #[test]
    fn configurations() {
        let listed = ["all/test-00000-of-00001.parquet", "all/dev-0.parquet", "anatomy/test-00000-of-00001.parquet"];
        assert_eq!(choose("o/n:all/test", &listed).unwrap(), ["all/test-00000-of-00001.parquet"]);
        assert_eq!(choose("o/n:all/dev", &listed).unwrap(), ["all/dev-0.parquet"]);
        let error = choose("o/n:test", &listed).unwrap_err();
        assert!(error.contains("o/n:CONFIG/SPLIT") && error.ends_with("expected one of all, anatomy"), "{error}");
        assert!(choose("o/n:law/test", &listed).unwrap_err().ends_with("anatomy, found law"));
        assert_eq!(choose("o/n", &["main/train/0.parquet", "main/test/0.parquet"]).unwrap(), ["main/train/0.parquet"]);
    }

    #[test]
    fn names_and_paths() {
        for path in ["train.jsonl", "data/train.jsonl", "data/train.json.gz", "/a/b", "a/b/c", "src/hub.rs/x"] {
            assert!(hub_name(Path::new(path)).is_none(), "{path}");
        }
        assert!(hub_name(Path::new("HuggingFaceH4/ultrachat_200k:train_sft")).is_some());
    }
}
