//! The files that the binary carries; `assets/README.md` says how they were made.

use crate::run::folder::{Lock, claim, vacant};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;

/// The file that marks a demo's folder.
const MARK: &str = "hydra-demo.txt";

/// A file's path in the demo's folder, which is that in `assets/`, and its bytes.
macro_rules! assets {
    ($($path:literal)*) => {
        [$(($path, include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/", $path)).as_slice())),*]
    };
}

const FILES: [(&str, &[u8]); 13] = assets! {
    "model/config.json"
    "model/tokenizer.json"
    "model/model.safetensors"
    "corpus/train.jsonl"
    "corpus/test.jsonl"
    "mmlu/dev/arithmetic_dev.csv"
    "mmlu/dev/facts_dev.csv"
    "mmlu/dev/topics_dev.csv"
    "mmlu/dev/words_dev.csv"
    "mmlu/test/arithmetic_test.csv"
    "mmlu/test/facts_test.csv"
    "mmlu/test/topics_test.csv"
    "mmlu/test/words_test.csv"
};

/// Writes all of them into `out`, in place of an earlier demo with its `runs`. The lock keeps another demo from replacing this one.
pub fn write(out: &Path, runs: &[&str]) -> Result<Lock> {
    if !vacant(out)? && !out.join(MARK).is_file() {
        bail!("--out {} holds files that no demo wrote: give another folder", out.display());
    }
    let lock = claim(out)?;
    clear(out, runs)?;
    let mark = (MARK, b"Written by `hydra demo`, which replaces this folder when it runs again.\n".as_slice());
    for (path, bytes) in [mark].into_iter().chain(FILES) {
        let path = out.join(path);
        let at = || format!("can't write {}", path.display());
        fs::create_dir_all(path.parent().unwrap_or(out)).with_context(at)?;
        fs::write(&path, bytes).with_context(at)?;
    }
    Ok(lock)
}

/// Removes what an earlier demo wrote.
fn clear(out: &Path, runs: &[&str]) -> Result<()> {
    for folder in ["model", "corpus", "mmlu"].iter().chain(runs) {
        let folder = out.join(folder);
        if folder.is_dir() {
            fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
        }
    }
    Ok(())
}
