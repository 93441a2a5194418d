//! The hub's cache, as Hugging Face's own programs lay it out and lock it:
//!
//! ```text
//! models--ORG--NAME/refs/REVISION               the commit that a branch or tag was at
//! models--ORG--NAME/snapshots/COMMIT/FILE       a link to its bytes
//! models--ORG--NAME/blobs/ETAG                  a file's bytes; ETAG.incomplete while they are downloaded
//! models--ORG--NAME/.hydra/COMMIT.json          ours: the names of all files of a commit
//! .locks/models--ORG--NAME/ETAG.lock            held by who downloads it
//! ```

use super::Kind;
use crate::output;
use anyhow::{Context, Result, bail};
use hydra_runtime::atomic::write_atomically;
use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// What an environment variable says, if it says something.
pub fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Whether the hub is not to be asked.
pub fn offline() -> bool {
    let says =
        |name| variable(name).is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str()));
    says("HF_HUB_OFFLINE") || says("TRANSFORMERS_OFFLINE")
}

/// The token, from the environment or where `hf auth login` puts it.
pub fn token() -> Option<String> {
    let file = || {
        let path = variable("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(home()?.join("token")));
        fs::read_to_string(path?).ok()
    };
    let token = variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN")).or_else(file)?;
    Some(token.trim().to_string()).filter(|token| !token.is_empty())
}

/// Hugging Face's folder.
fn home() -> Option<PathBuf> {
    home_of(variable("HF_HOME"), variable("XDG_CACHE_HOME"), std::env::home_dir())
}

fn home_of(hf_home: Option<String>, cache: Option<String>, home: Option<PathBuf>) -> Option<PathBuf> {
    let in_cache = |cache: PathBuf| cache.join("huggingface");
    hf_home.map(PathBuf::from).or_else(|| cache.map(PathBuf::from).or_else(|| Some(home?.join(".cache"))).map(in_cache))
}

/// What the cache has of one repository.
pub struct Shelf {
    cache: PathBuf,
    /// Its folder's name there.
    name: String,
}

impl Shelf {
    pub fn of(kind: Kind, repository: &str) -> Result<Self> {
        let own = variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE")).map(PathBuf::from);
        let cache = own.or_else(|| Some(home()?.join("hub")));
        let cache = std::path::absolute(cache.context("no place for the hub's cache: set HF_HOME or HOME")?)?;
        Ok(Self { cache, name: format!("{}--{}", kind.plural(), repository.replace('/', "--")) })
    }

    pub fn path(&self) -> PathBuf {
        self.cache.join(&self.name)
    }

    fn reference(&self, revision: &str) -> PathBuf {
        self.path().join("refs").join(revision)
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.path().join("snapshots").join(commit)
    }

    fn listing(&self, commit: &str) -> PathBuf {
        self.path().join(".hydra").join(format!("{commit}.json"))
    }

    /// A file of a commit; there once it is complete.
    pub fn file(&self, commit: &str, name: &str) -> PathBuf {
        self.snapshot(commit).join(name)
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.path().join("blobs").join(etag)
    }

    /// The commit that a revision was at when it was last downloaded.
    pub fn commit(&self, revision: &str) -> Option<String> {
        let noted = fs::read_to_string(self.reference(revision)).ok();
        let commit = noted.as_deref().map_or(revision, str::trim).to_string();
        (is_name(&commit) && self.snapshot(&commit).is_dir()).then_some(commit)
    }

    /// The names of a commit's files: all of them, if we have asked for them before, or those that are here.
    pub fn listed(&self, commit: &str) -> Vec<String> {
        let kept = fs::read(self.listing(commit)).ok().and_then(|text| serde_json::from_slice(&text).ok());
        kept.unwrap_or_else(|| {
            let (root, mut names) = (self.snapshot(commit), Vec::new());
            let mut folders = vec![root.clone()];
            while let Some(folder) = folders.pop() {
                for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                    let path = entry.path();
                    match entry.file_type() {
                        Ok(kind) if kind.is_dir() => folders.push(path),
                        _ => names.extend(path.strip_prefix(&root).ok().and_then(Path::to_str).map(str::to_owned)),
                    }
                }
            }
            names
        })
    }

    /// Notes what a commit has. A cache that can't be written to is as good.
    pub fn list(&self, commit: &str, names: &[String]) {
        if let Ok(text) = serde_json::to_vec(names) {
            note(&self.listing(commit), &text);
        }
    }

    /// Notes the commit that a revision is at.
    pub fn refer(&self, revision: &str, commit: &str) {
        if revision != commit {
            note(&self.reference(revision), commit.as_bytes());
        }
    }

    /// Waits until no other process downloads what has this tag; holds that until it is dropped.
    pub fn lock(&self, etag: &str, name: &str) -> Result<File> {
        let path = self.cache.join(".locks").join(&self.name).join(format!("{etag}.lock"));
        let lock = || {
            fs::create_dir_all(path.parent().unwrap_or(&self.cache))?;
            let file = File::options().create(true).write(true).truncate(false).open(&path)?;
            match file.try_lock() {
                Err(TryLockError::WouldBlock) => {
                    output::say(format_args!("waiting for another process, which downloads {name}"));
                    file.lock()?;
                }
                // Some file systems have no locks.
                Err(TryLockError::Error(_)) | Ok(()) => {}
            }
            Ok::<_, std::io::Error>(file)
        };
        lock().with_context(|| path.display().to_string())
    }

    /// Puts a commit's file where it is looked for.
    pub fn link(&self, etag: &str, commit: &str, name: &str) -> std::io::Result<PathBuf> {
        let (blob, path) = (self.blob(etag), self.file(commit, name));
        fs::create_dir_all(path.parent().unwrap_or(&path))?;
        // A link whose bytes were removed.
        if fs::symlink_metadata(&path).is_ok() && !path.exists() {
            fs::remove_file(&path)?;
        }
        let up = "../".repeat(2 + name.split('/').count() - 1);
        let made = symlink(&format!("{up}blobs/{etag}"), &path).or_else(|error| match error.kind() {
            ErrorKind::AlreadyExists => Ok(()),
            // Not every file system has links.
            _ => fs::hard_link(&blob, &path).or_else(|_| fs::copy(&blob, &path).map(drop)),
        });
        made.map(|()| path)
    }
}

#[cfg(unix)]
fn symlink(to: &str, path: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(to, path)
}

#[cfg(not(unix))]
fn symlink(_: &str, _: &Path) -> std::io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

/// Writes a small file unless it says that already.
fn note(path: &Path, text: &[u8]) {
    if fs::read(path).is_ok_and(|there| there == text) {
        return;
    }
    if path.parent().is_some_and(|folder| fs::create_dir_all(folder).is_ok()) {
        let _ = write_atomically(path, text);
    }
}

/// Whether this can be a file's name, and nothing else.
pub fn is_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0', ':'])
}

/// Fails for a name that leads out of its folder.
pub fn check_inside(name: &str) -> Result<()> {
    if name.split('/').any(|part| matches!(part, "" | "." | "..") || part.contains(['\\', '\0', ':'])) {
        bail!("\"{}\": expected the name of a file", output::printable(name));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_home_is_where_the_environment_says() {
        let home = |hf: Option<&str>, cache: Option<&str>, home: Option<&str>| {
            home_of(hf.map(Into::into), cache.map(Into::into), home.map(Into::into))
        };
        assert_eq!(home(Some("/hf"), Some("/c"), None).unwrap(), Path::new("/hf"));
        assert_eq!(home(None, Some("/c"), Some("/home/a")).unwrap(), Path::new("/c/huggingface"));
        assert_eq!(home(None, None, Some("/home/a")).unwrap(), Path::new("/home/a/.cache/huggingface"));
        assert!(home(None, None, None).is_none());
    }

    #[test]
    fn names_that_stay_inside() {
        assert!(check_inside("a b/ü.json").is_ok() && is_name("0123abc"));
        for name in ["../a", "a/../b", "/a", "a//b", "a\\b", "c:a", ""] {
            assert!(check_inside(name).is_err(), "{name}");
        }
        assert!(!is_name("..") && !is_name("a/b"));
    }
}
