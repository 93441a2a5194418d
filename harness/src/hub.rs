//! From `--model` to a local path: a file or folder as it is, or a model of the Hugging Face hub, downloaded into the hub's
//! usual cache. `--data` is in `hub/dataset.rs`.

mod dataset;

pub use dataset::{locate_data, locate_file};

use anyhow::{Context, Result, bail};
use hf_hub::Cache;
use hf_hub::api::sync::{Api, ApiBuilder, ApiRepo};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The local path of a model.
pub fn locate(model: &str) -> Result<PathBuf> {
    let path = PathBuf::from(model);
    if path.exists() {
        return Ok(path);
    }
    if !is_hub_name(model) {
        bail!("{model}: no such model: expected a folder, a GGUF file, or org/name on the Hugging Face hub");
    }
    let advice = "no such folder here, and the Hugging Face hub doesn't answer; without a network, copy the model's folder \
                  (config.json, tokenizer.json, *.safetensors) to this machine and give its path";
    download(model).with_context(|| format!("{model}: {advice}"))
}

/// The folder of the hub's cache. (hf-hub's own function panics where there is no home directory.)
fn cache_folder(hf_home: Option<String>, home: Option<PathBuf>) -> Result<PathBuf> {
    let folder = hf_home.map(PathBuf::from).or_else(|| Some(home?.join(".cache/huggingface")));
    Ok(folder.context("no place for the hub's cache: set HF_HOME or HOME")?.join("hub"))
}

/// Whether this looks like `org/name`: one slash, and the characters that the hub allows.
pub fn is_hub_name(model: &str) -> bool {
    let part = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
    };
    model.split_once('/').is_some_and(|(org, name)| part(org) && part(name))
}

/// The hub, or the one that `HF_ENDPOINT` names.
fn api() -> Result<Api> {
    let cache = cache_folder(std::env::var("HF_HOME").ok(), std::env::home_dir())?;
    let mut builder = ApiBuilder::from_cache(Cache::new(cache));
    if let Ok(endpoint) = std::env::var("HF_ENDPOINT") {
        builder = builder.with_endpoint(endpoint);
    }
    Ok(builder.build()?)
}

/// Downloads the files of a checkpoint and returns their folder.
fn download(model: &str) -> Result<PathBuf> {
    let repo = api()?.model(model.to_string());
    let listed: BTreeSet<String> = repo.info()?.siblings.into_iter().map(|file| file.rfilename).collect();
    let fetch = |repo: &ApiRepo, name: &str| repo.get(name).with_context(|| name.to_string());
    let config = fetch(&repo, "config.json")?;
    fetch(&repo, "tokenizer.json")?;
    for optional in ["tokenizer_config.json", "chat_template.jinja"] {
        if listed.contains(optional) {
            fetch(&repo, optional)?;
        }
    }
    let index = "model.safetensors.index.json";
    if listed.contains(index) {
        fetch(&repo, index)?;
        for shard in listed.iter().filter(|name| name.ends_with(".safetensors") && !name.contains('/')) {
            fetch(&repo, shard)?;
        }
    } else {
        fetch(&repo, "model.safetensors")?;
    }
    Ok(config.parent().unwrap_or(Path::new(".")).to_path_buf())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_has_a_folder_or_an_error() {
        let cache =
            |hf_home: Option<&str>, home: Option<&str>| cache_folder(hf_home.map(Into::into), home.map(Into::into));
        assert_eq!(cache(Some("/hf"), None).unwrap(), Path::new("/hf/hub"));
        assert_eq!(cache(None, Some("/home/a")).unwrap(), Path::new("/home/a/.cache/huggingface/hub"));
        assert!(cache(None, None).unwrap_err().to_string().contains("HF_HOME"));
    }

    #[test]
    fn hub_names() {
        assert!(is_hub_name("HuggingFaceTB/SmolLM2-135M"));
        for path in ["model", "./model", "/a/b", "a/b/c", "../x", "a/", "a b/c"] {
            assert!(!is_hub_name(path), "{path}");
        }
    }
}
