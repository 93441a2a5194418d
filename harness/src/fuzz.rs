//! The readers of files and requests that commands use, for `harness/fuzz`.

use crate::data::records::Reading;
use crate::eval::mmlu::questions::{self, Selection};
use crate::experiment::plan::Plan;
use crate::run::spec::RunSpec;
use crate::serve;
use anyhow::Result;
use std::path::Path;

/// The number of records in a file of JSON lines.
pub fn records(path: &Path) -> Result<usize> {
    let reading = Reading { label_field: "cluster", format: None };
    Ok(reading.read_with_remarks(path)?.0.len())
}

/// The number of subjects in a folder or file of MMLU's.
pub fn questions(path: &Path) -> Result<usize> {
    Ok(questions::read(path, &Selection { shots: 1, ..Selection::default() })?.len())
}

/// The number of runs of an experiment.
pub fn experiment(path: &Path) -> Result<usize> {
    Ok(Plan::read(path)?.runs.len())
}

/// The command line of the options in a file.
pub fn options(path: &Path) -> Result<Vec<String>> {
    Ok(RunSpec::read(path)?.command_line())
}

/// Whether a request's body is that of a completion, or of a chat.
pub fn request(body: &[u8]) -> [bool; 2] {
    serve::accepts(body)
}
