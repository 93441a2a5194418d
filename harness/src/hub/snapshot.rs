//! One commit of a repository on the hub: which files it has, and each of them in the cache.
//!
//! The hub is asked once which commit a revision is at, and every file is that commit's, so that files never come from two versions.
//! If the hub doesn't answer, what the cache has of the revision is used.

use super::cache::{self, Shelf, check_inside, is_name};
use super::http::{Ask, Client, Failure, encoded};
use super::{Kind, Name};
use crate::data::limit::Limit;
use crate::output::{printable, warn};
use crate::progress::Progress;
use crate::sha256;
use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Times that a download goes on where it was cut off.
const CONTINUED: usize = 5;
/// What is read at a time.
const PIECE: usize = 1 << 16;
/// Of the hub's list of files, some 60 bytes each.
const LISTING: Limit = Limit { bytes: 64 << 20, why: "for its list of files, found more" };

/// A commit.
pub struct Snapshot {
    kind: Kind,
    name: Name,
    shelf: Shelf,
    source: Source,
    commit: String,
    files: Vec<String>,
}

/// Where files come from.
enum Source {
    Hub(Client),
    /// The cache alone, and why.
    Cache {
        why: String,
    },
}

/// What the hub says about a repository.
#[derive(Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// What the hub says about a file.
struct About {
    etag: String,
    size: Option<u64>,
}

impl Snapshot {
    /// Asks the hub for the commit of a revision, once in a process.
    pub fn open(kind: Kind, name: &Name) -> Result<Arc<Self>> {
        static OPENED: Mutex<BTreeMap<(Kind, Name), Arc<Snapshot>>> = Mutex::new(BTreeMap::new());
        let mut opened = OPENED.lock().map_err(|_| anyhow!("another thread failed"))?;
        let key = (kind, name.clone());
        if let Some(snapshot) = opened.get(&key) {
            return Ok(snapshot.clone());
        }
        let snapshot = Arc::new(Self::ask(kind, name)?);
        opened.insert(key, snapshot.clone());
        Ok(snapshot)
    }

    fn ask(kind: Kind, name: &Name) -> Result<Self> {
        let (what, shelf, name) = (kind.singular(), Shelf::of(kind, &name.repository)?, name.clone());
        let why = if cache::offline() {
            "HF_HUB_OFFLINE is set".to_string()
        } else {
            let client = Client::new();
            match listing(&client, kind, &name) {
                Ok(Info { sha: commit, siblings }) => {
                    if !is_name(&commit) {
                        bail!("{name}: the hub's answer names commit \"{}\"", printable(&commit));
                    }
                    let files: Vec<String> = siblings.into_iter().map(|file| file.rfilename).collect();
                    shelf.list(&commit, &files);
                    return Ok(Self { kind, name, shelf, source: Source::Hub(client), commit, files });
                }
                Err(Failure::Refused(why)) => {
                    bail!("{name}: no such {what} here, and the Hugging Face hub doesn't give one: {why}")
                }
                Err(Failure::Silent(why)) => format!("the Hugging Face hub doesn't answer: {why}"),
            }
        };
        let Some(commit) = shelf.commit(&name.revision) else {
            bail!(
                "{name}: no such {what} here or in the hub's cache, and {why}; without a network, copy {} to this machine and give \
                 the path",
                kind.files()
            );
        };
        let files = shelf.listed(&commit);
        Ok(Self { kind, name, shelf, source: Source::Cache { why }, commit, files })
    }

    /// The names of its files.
    pub fn files(&self) -> &[String] {
        &self.files
    }

    /// Whether it has a file.
    pub fn has(&self, file: &str) -> bool {
        self.files.iter().any(|own| own == file)
    }

    /// A file in the cache, downloaded if it isn't there.
    pub fn get(&self, file: &str) -> Result<PathBuf> {
        let at = || format!("{}: {}", self.name, printable(file));
        check_inside(file).with_context(at)?;
        let path = self.shelf.file(&self.commit, file);
        if path.exists() {
            return Ok(path);
        }
        match &self.source {
            Source::Hub(client) => self.download(client, file).with_context(at),
            Source::Cache { why } => bail!("{}: not in the hub's cache, and {why}", at()),
        }
    }

    /// All that is wanted is here: notes what the revision is at, for the day that the hub doesn't answer, or says that this is it.
    pub fn keep(&self) {
        match &self.source {
            Source::Hub(_) => self.shelf.refer(&self.name.revision, &self.commit),
            Source::Cache { why } => {
                let short = self.commit.get(..12).unwrap_or(&self.commit);
                warn(&format!("{}: {why}; using commit {short} in the hub's cache", self.name));
            }
        }
    }

    fn download(&self, client: &Client, file: &str) -> Result<PathBuf> {
        let Name { repository, .. } = &self.name;
        let path = format!("{}{repository}/resolve/{}/{}", self.kind.prefix(), self.commit, encoded(file, true));
        let address = client.address(&path);
        let about = about(client, &address)?;
        let blob = self.shelf.blob(&about.etag);
        fs::create_dir_all(blob.parent().unwrap_or(&blob)).with_context(|| self.shelf.path().display().to_string())?;
        let _lock = self.shelf.lock(&about.etag, file)?;
        // Another process may have been faster.
        if !blob.exists() {
            let part = blob.with_file_name(format!("{}.incomplete", about.etag));
            fetch(client, &address, &about, &part, file)?;
            check(&part, &about.etag)?;
            fs::rename(&part, &blob).with_context(|| blob.display().to_string())?;
        }
        self.shelf.link(&about.etag, &self.commit, file).with_context(|| self.shelf.path().display().to_string())
    }
}

fn listing(client: &Client, kind: Kind, name: &Name) -> Result<Info, Failure> {
    let path = format!("api/{}/{}/revision/{}", kind.plural(), name.repository, encoded(&name.revision, false));
    let response = client.get(&client.address(&path), Ask::From(0))?;
    let text = LISTING.read(response.into_reader()).map_err(|error| Failure::Silent(printable(&error.to_string())))?;
    serde_json::from_slice(&text)
        .map_err(|error| Failure::Silent(format!("its list of files can't be read: {}", printable(&error.to_string()))))
}

fn said(failure: Failure) -> anyhow::Error {
    match failure {
        Failure::Silent(why) => anyhow!("the Hugging Face hub doesn't answer: {why}"),
        Failure::Refused(why) => anyhow!("the Hugging Face hub says {why}"),
    }
}

fn about(client: &Client, address: &str) -> Result<About> {
    let response = client.get(address, Ask::Headers).map_err(said)?;
    let first = |names: [&str; 2]| names.into_iter().find_map(|name| response.header(name));
    let etag = first(["X-Linked-ETag", "ETag"]).context("the hub's answer has no ETag")?;
    let etag = etag.trim_start_matches("W/").trim_matches('"').to_string();
    if !is_name(&etag) {
        bail!("the hub's answer has ETag \"{}\"", printable(&etag));
    }
    // Of an answer that sends on, the length is its own.
    let own = if response.status() < 300 { "Content-Length" } else { "X-Linked-Size" };
    let size = first(["X-Linked-Size", own]).and_then(|size| size.parse().ok());
    Ok(About { etag, size })
}

/// Fills `part` with the whole file; goes on where it ends.
fn fetch(client: &Client, address: &str, about: &About, part: &Path, file: &str) -> Result<()> {
    let at = || part.display().to_string();
    let mut out = OpenOptions::new().create(true).append(true).open(part).with_context(at)?;
    let mut left = CONTINUED;
    loop {
        let mut start = out.metadata().with_context(at)?.len();
        // Without a size nobody knows what is missing; one that is too long is another file's.
        if about.size.is_none_or(|size| start > size) {
            out.set_len(0).with_context(at)?;
            start = 0;
        }
        if about.size == Some(start) {
            break;
        }
        let response = client.get(address, Ask::From(start)).map_err(said)?;
        let range = format!("bytes {start}-");
        if start > 0 && !response.header("Content-Range").is_some_and(|found| found.starts_with(&range)) {
            out.set_len(0).with_context(at)?;
            start = 0;
        }
        let cut = copy(response.into_reader(), &mut out, start, about.size, file).with_context(at)?;
        let end = out.metadata().with_context(at)?.len();
        match (about.size, cut) {
            (None, None) => break,
            (Some(size), _) if end == size => break,
            (size, cut) if left == 0 || end == start => {
                let cut = cut.map_or_else(String::new, |why| format!(": {}", printable(&why.to_string())));
                let size = size.map_or_else(|| "more".into(), |size| size.to_string());
                bail!("the download ends after {end} bytes, expected {size}{cut}; the next try goes on from there");
            }
            _ => left -= 1,
        }
    }
    out.sync_all().with_context(at)
}

/// Copies an answer; returns what cut it off. Fails if it can't be written.
fn copy(
    mut from: impl Read,
    to: &mut File,
    start: u64,
    size: Option<u64>,
    file: &str,
) -> std::io::Result<Option<std::io::Error>> {
    let (mut piece, mut done) = (vec![0; PIECE], start);
    let mut progress = size.map(|size| Progress::new("bytes", size, start));
    loop {
        match from.read(&mut piece) {
            Ok(0) => return Ok(None),
            Ok(read) => {
                to.write_all(&piece[..read])?;
                done += read as u64;
                if let Some(progress) = &mut progress {
                    progress.update(done, file);
                }
            }
            Err(error) => return Ok(Some(error)),
        }
    }
}

/// Fails, and removes the file, if it isn't the one that its tag names: that of a large file is its SHA-256. That of a small one is
/// git's SHA-1, which isn't computed here: of those, the size is checked.
fn check(part: &Path, etag: &str) -> Result<()> {
    if etag.len() != 64 || !etag.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(());
    }
    let (mut file, mut hash, mut piece) = (File::open(part)?, Sha256::new(), vec![0; PIECE]);
    loop {
        match file.read(&mut piece)? {
            0 => break,
            read => hash.update(&piece[..read]),
        }
    }
    let found = sha256::hex(hash);
    if found != etag.to_lowercase() {
        fs::remove_file(part)?;
        bail!("damaged on its way: expected SHA-256 {etag}, found {found}; try again");
    }
    Ok(())
}
