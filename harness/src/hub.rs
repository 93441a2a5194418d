//! From `--model` to a local path: a file or folder as it is, or a model of the Hugging Face hub, downloaded into the hub's
//! usual cache. `--data` is in `hub/dataset.rs`.

mod cache;
mod dataset;
mod http;
mod snapshot;

pub use dataset::{locate_data, locate_file};

use anyhow::{Context, Result, bail};
use hydra_runtime::merge::COMPANIONS;
use serde::Deserialize;
use snapshot::Snapshot;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

/// The branch that counts where none is named.
const MAIN: &str = "main";
const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What a repository holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Model,
    Dataset,
}

impl Kind {
    /// In the hub's addresses and the cache's names.
    fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }

    /// What files' addresses begin with.
    fn prefix(self) -> &'static str {
        match self {
            Self::Model => "",
            Self::Dataset => "datasets/",
        }
    }

    fn singular(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Dataset => "file",
        }
    }

    /// What to copy by hand.
    fn files(self) -> &'static str {
        match self {
            Self::Model => "the model's folder (config.json, tokenizer.json, *.safetensors)",
            Self::Dataset => "the data set's files",
        }
    }
}

/// `org/name`, or `org/name@revision`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    repository: String,
    revision: String,
}

impl Name {
    /// `None` for what is no name on the hub.
    fn parse(text: &str) -> Option<Self> {
        let part = |part: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
        };
        let (repository, revision) = text.split_once('@').unwrap_or((text, MAIN));
        let named = repository.split_once('/').is_some_and(|(org, name)| part(org) && part(name));
        // Branches have slashes in their names, as refs/pr/1.
        (named && revision.split('/').all(part))
            .then(|| Self { repository: repository.into(), revision: revision.into() })
    }

    /// The same, and what follows a colon.
    fn parse_with_part(text: &str) -> Option<(Self, Option<&str>)> {
        let (name, part) = text.split_once(':').map_or((text, None), |(name, part)| (name, Some(part)));
        Some((Self::parse(name)?, part))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.revision.as_str() {
            MAIN => f.write_str(&self.repository),
            revision => write!(f, "{}@{revision}", self.repository),
        }
    }
}

/// The local path of a model.
pub fn locate(model: &str) -> Result<PathBuf> {
    let path = PathBuf::from(model);
    if path.exists() {
        return Ok(path);
    }
    match Name::parse_with_part(model) {
        Some((name, file)) => download(&name, file),
        None => bail!("{model}: no such model: expected a folder, a GGUF file, or org/name on the Hugging Face hub"),
    }
}

/// Whether this looks like `org/name` or `org/name@revision`: one slash, and the characters that the hub allows.
pub fn is_hub_name(name: &str) -> bool {
    Name::parse(name).is_some()
}

/// A model's name as other programs know it: without a revision and a file.
pub fn repository(model: &str) -> Option<String> {
    Name::parse_with_part(model).map(|(name, _)| name.repository)
}

/// Downloads the files of a checkpoint and returns their folder, or a GGUF file.
fn download(name: &Name, file: Option<&str>) -> Result<PathBuf> {
    let snapshot = Snapshot::open(Kind::Model, name)?;
    if let Some(file) = gguf(&snapshot, name, file)? {
        let path = snapshot.get(file)?;
        let whole = dataset::shard(file);
        for part in snapshot.files().iter().filter(|part| whole.is_some() && dataset::shard(part) == whole) {
            snapshot.get(part)?;
        }
        snapshot.keep();
        return Ok(path);
    }
    for needed in [CONFIG, TOKENIZER] {
        if !snapshot.has(needed) {
            bail!(
                "{name}: expected {needed} in it, found {}",
                dataset::some(snapshot.files().iter().map(String::as_str))
            );
        }
    }
    let config = snapshot.get(CONFIG)?;
    for own in COMPANIONS.into_iter().filter(|own| snapshot.has(own)) {
        snapshot.get(own)?;
    }
    // As a folder is read: one file, or else those that the index names.
    if snapshot.has(WEIGHTS) {
        snapshot.get(WEIGHTS)?;
    } else {
        for shard in shards(&snapshot.get(INDEX)?)? {
            snapshot.get(&shard)?;
        }
    }
    snapshot.keep();
    Ok(config.parent().unwrap_or(Path::new(".")).to_path_buf())
}

/// The GGUF file that is asked for, or the only one where there are no other weights.
fn gguf<'s>(snapshot: &'s Snapshot, name: &Name, asked: Option<&'s str>) -> Result<Option<&'s str>> {
    let ggufs = snapshot.files().iter().map(String::as_str).filter(|file| file.ends_with(".gguf"));
    // Of a split one the first part.
    let ggufs: Vec<&str> = ggufs.filter(|file| dataset::shard(file).is_none() || file.contains("-00001-of-")).collect();
    if let Some(asked) = asked {
        if !ggufs.contains(&asked) {
            bail!("{name}: expected one of its GGUF files {}, found {asked}", dataset::some(ggufs.into_iter()));
        }
        return Ok(Some(asked));
    }
    if snapshot.has(WEIGHTS) || snapshot.has(INDEX) {
        return Ok(None);
    }
    match ggufs.as_slice() {
        [one] => Ok(Some(one)),
        [] => {
            let found = dataset::some(snapshot.files().iter().map(String::as_str));
            bail!("{name}: expected {WEIGHTS}, {INDEX} or a GGUF file in it, found {found}")
        }
        _ => bail!(
            "{name}: several GGUF files: give one as {name}:FILE: expected one of {}",
            dataset::some(ggufs.into_iter())
        ),
    }
}

/// The files that an index names.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let at = || index.display().to_string();
    let text = std::fs::read(index).with_context(at)?;
    let index: Index = serde_json::from_slice(&text).with_context(at)?;
    Ok(index.weight_map.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_names() {
        for name in ["HuggingFaceTB/SmolLM2-135M", "a/b@v1.0", "a/b@refs/pr/1"] {
            assert_eq!(Name::parse(name).unwrap().to_string(), name);
        }
        for path in ["model", "./model", "/a/b", "a/b/c", "../x", "a/", "a b/c", "a/b@", "a/b@../c", "a@b/c"] {
            assert!(!is_hub_name(path), "{path}");
        }
        assert_eq!(repository("a/b@v1:c.gguf").as_deref(), Some("a/b"));
    }
}
