//! What is read into memory as a whole: a device or a pipe may have no end, and a file may be larger than the memory.

use crate::memory::{self, mib};
use anyhow::{Result, bail};
use std::fs::{File, Metadata};
use std::io::Read;
use std::path::Path;

/// The most bytes that are taken, and where that number is from.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    /// The number.
    pub bytes: u64,
    /// What follows it in an error.
    pub why: &'static str,
}

/// Of a configuration, a template or a key.
const OF_SETTINGS: Limit = Limit { bytes: 64 << 20, why: "for a file of settings, found more" };
/// Of what has no size before it ends.
const OF_STREAM: Limit =
    Limit { bytes: 1 << 30, why: "of text from what is no regular file, found more; write it to a file first" };

impl Limit {
    /// For a file's text, in memory. What is made of it takes as much again.
    pub fn of(file: &Metadata) -> Self {
        let free = memory::free().map_or(u64::MAX, |free| free / 2);
        let memory = Self { bytes: free, why: "of text, half of the free memory, found more" };
        if file.is_file() { memory } else { memory.or(OF_STREAM) }
    }

    /// The lower one.
    pub fn or(self, other: Self) -> Self {
        if other.bytes < self.bytes { other } else { self }
    }

    /// Fails for more bytes.
    pub fn check(self, bytes: u64) -> Result<()> {
        if bytes > self.bytes {
            bail!("expected at most {} MiB {}", self.bytes >> 20, self.why);
        }
        Ok(())
    }

    /// The rest of a reader.
    pub fn read(self, reader: impl Read) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        reader.take(self.bytes.saturating_add(1)).read_to_end(&mut bytes)?;
        self.check(bytes.len() as u64)?;
        Ok(bytes)
    }
}

/// A text of settings.
pub fn settings(path: &Path) -> Result<String> {
    let mut text = String::new();
    File::open(path)?.take(OF_SETTINGS.bytes + 1).read_to_string(&mut text)?;
    OF_SETTINGS.check(text.len() as u64)?;
    Ok(text)
}

/// Texts of less are tokenized in any memory.
const LARGE: u64 = 1 << 20;
/// What tokenizing takes for each byte of a text; with BPE, 170 were measured.
const TOKENIZING: u64 = 192;

/// Fails if a text of so many bytes can't be tokenized in the free memory.
pub fn tokenizing(bytes: usize) -> Result<()> {
    let bytes = bytes as u64;
    match bytes >= LARGE {
        true => memory::require(TOKENIZING * bytes, &format!("a text of {:.1} MiB", mib(bytes))),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_end() {
        let limit = Limit { bytes: 3 << 20, why: "of it" }.or(OF_STREAM).or(OF_SETTINGS);
        let error = limit.read(std::io::repeat(b'a')).unwrap_err().to_string();
        assert_eq!(error, "expected at most 3 MiB of it");
        assert_eq!(limit.read(&[b'a'; 3 << 20][..]).unwrap().len(), 3 << 20);
        assert_eq!(limit.read(&b"a"[..]).unwrap(), b"a");
    }
}
