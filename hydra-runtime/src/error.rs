//! What can go wrong, each in one line that says where, what was wanted and what was found.

use safetensors::SafeTensorError;
use std::fmt;
use std::path::{Path, PathBuf};

/// The result of anything here that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something was refused.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Its answer.
        source: std::io::Error,
    },
    /// A file that isn't what it should be.
    Format {
        /// The file.
        path: PathBuf,
        /// The byte at which reading it stopped, where there is one.
        offset: Option<u64>,
        /// What was wanted and what was found.
        message: String,
    },
    /// Tensors that don't fit the model: all of them, by name.
    Tensors {
        /// The file or folder.
        path: PathBuf,
        /// Wanted and not there.
        missing: Vec<String>,
        /// There and not wanted.
        surplus: Vec<String>,
        /// Of another shape or type, or with values that aren't finite: "name is .., wanted ..".
        wrong: Vec<String>,
    },
    /// A configuration that can't be run.
    Config {
        /// The file it came from.
        path: PathBuf,
        /// The key, what was wanted and what was found.
        message: String,
    },
    /// A tokenizer that can't be built, doesn't fit the model, or refused a text.
    Tokenizer(String),
    /// The kernels refused a shape: no caller's doing, but for one who calls a backend's operations.
    Kernel(hydra_kernels::Error),
    /// A wrong argument that no other variant names.
    Invalid(String),
    /// Memory that could not be had.
    OutOfMemory {
        /// Bytes asked for.
        bytes: u64,
        /// What the device has free and what it is used for, in words, where that is known.
        free: Option<String>,
    },
    /// A sequence that is longer than one pass, or than the model's context.
    SequenceTooLong {
        /// Its tokens.
        tokens: usize,
        /// The most that fit.
        limit: usize,
    },
    /// Tokens that don't fit the key-value cache any more.
    CacheFull {
        /// Tokens in the cache.
        len: usize,
        /// Tokens that were to be added.
        more: usize,
        /// Tokens that it has room for.
        capacity: usize,
    },
    /// Training sequences without a single target.
    NoTarget,
    /// A token id outside the vocabulary.
    TokenOutOfRange {
        /// The id.
        token: u32,
        /// Entries of the vocabulary.
        vocab: usize,
    },
    /// An adapter that does not fit its configuration, the model, the trainer, or what it is asked for.
    WrongAdapter(String),
    /// A learning rate that is negative, infinite or not a number.
    LearningRate(f32),
    /// A logit that is infinite or not a number: the model or the adapter has values that are not finite.
    LogitNotFinite(f32),
    /// A template that can't be compiled or rendered.
    Template(String),
    /// The work was cancelled by its flag.
    Cancelled,
    /// A device that isn't there, can't do what is asked, or has failed.
    Device(String),
    /// Training went out of bounds.
    NotFinite {
        /// "loss", "gradient norm", or "sum of the adapter's squares" after the step.
        what: &'static str,
        /// Infinite or not a number.
        value: f64,
        /// The step, counted from 1.
        step: u64,
    },
}

/// Names listed before the rest is only counted.
const LISTED: usize = 8;

/// Missing tensors after which no others are looked for.
pub(crate) const MOST_MISSING: usize = 1000;

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Io { path, source } => write!(f, "{}: {source}", path.display()),
            Error::Format { path, offset: Some(offset), message } => {
                write!(f, "{}: byte {offset}: {message}", path.display())
            }
            Error::Format { path, offset: None, message } | Error::Config { path, message } => {
                write!(f, "{}: {message}", path.display())
            }
            Error::Tensors { path, missing, surplus, wrong } => {
                write!(f, "{}: tensors don't fit", path.display())?;
                for (what, names) in [("missing", missing), ("surplus", surplus), ("wrong", wrong)] {
                    if !names.is_empty() {
                        let listed = &names[..names.len().min(LISTED)];
                        let at_least = if what == "missing" && names.len() >= MOST_MISSING { "at least " } else { "" };
                        write!(f, "; {at_least}{} {what}: {}", names.len(), listed.join(", "))?;
                        if names.len() > LISTED {
                            write!(f, " and {at_least}{} more", names.len() - LISTED)?;
                        }
                    }
                }
                Ok(())
            }
            Error::Tokenizer(message) => write!(f, "tokenizer: {message}"),
            Error::Kernel(error) => error.fmt(f),
            Error::Invalid(message) | Error::Device(message) | Error::WrongAdapter(message) => f.write_str(message),
            Error::OutOfMemory { bytes, free } => {
                write!(f, "out of memory: {:.1} MiB asked for", *bytes as f64 / f64::from(1 << 20))?;
                free.as_ref().map_or(Ok(()), |free| write!(f, ", {free}"))
            }
            Error::SequenceTooLong { tokens, limit } => {
                write!(f, "a sequence of {tokens} tokens is too long: expected at most {limit}")
            }
            Error::CacheFull { len, more, capacity } => {
                write!(f, "the key-value cache is full: {more} tokens after {len}, in a cache for {capacity}")
            }
            Error::NoTarget => f.write_str("no target to learn in any of the sequences"),
            Error::TokenOutOfRange { token, vocab } => {
                write!(f, "token {token} is outside the vocabulary: expected an id below {vocab}")
            }
            Error::LearningRate(rate) => write!(f, "learning rate {rate}: expected a finite number from 0 on"),
            Error::LogitNotFinite(logit) => {
                write!(f, "a logit is {logit}: the model or the adapter has values that are not finite")
            }
            Error::Template(message) => f.write_str(message),
            Error::Cancelled => f.write_str("cancelled"),
            Error::NotFinite { what, value, step } => {
                let why = match (*what, step) {
                    // Nothing has been changed before them.
                    ("loss" | "gradient norm", 1) => {
                        "the model or the adapter has values that are too large or not finite"
                    }
                    _ => "a lower learning rate or clipping may help",
                };
                write!(f, "step {step}: the {what} is {value}; {why}")
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io { source, .. } => Some(source),
            Error::Kernel(error) => Some(error),
            _ => None,
        }
    }
}

impl From<hydra_kernels::Error> for Error {
    fn from(error: hydra_kernels::Error) -> Self {
        Error::Kernel(error)
    }
}

/// `bytes` that the machine does not have.
pub(crate) fn out_of_memory(bytes: usize) -> Error {
    Error::OutOfMemory { bytes: bytes as u64, free: None }
}

/// Why a file isn't one of tensors.
pub(crate) fn not_safetensors(error: &SafeTensorError) -> String {
    match error {
        SafeTensorError::MetadataIncompleteBuffer => {
            "its tensors don't end where the file ends; is it truncated?".into()
        }
        SafeTensorError::HeaderTooSmall | SafeTensorError::InvalidHeaderLength => {
            "the header is cut off; is it truncated?".into()
        }
        other => format!("not a safetensors file: {}", printable(&other.to_string())),
    }
}

/// Why a file of tensors couldn't be written.
pub(crate) fn not_written(path: &Path, error: SafeTensorError) -> Error {
    match error {
        SafeTensorError::IoError(source) => Error::Io { path: path.into(), source },
        other => Error::Invalid(format!("can't write {}: {other}", path.display())),
    }
}

/// The most characters of a value that an error quotes.
const QUOTED: usize = 80;

/// A value from a file, to be quoted on one line: control characters are escaped, and what exceeds 80 characters is cut off.
pub fn printable(value: &str) -> String {
    let (mut line, mut length) = (String::new(), 0);
    for c in value.chars() {
        let shown = if matches!(c, '"' | '\'' | '\\') { c.to_string() } else { c.escape_debug().to_string() };
        length += shown.chars().count();
        if length > QUOTED {
            line.push('…');
            break;
        }
        line += &shown;
    }
    line
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn quoted_values_are_short_and_on_one_line() {
        assert_eq!(printable("ü 漢 \"a\\b'\n\u{1b}[31m"), "ü 漢 \"a\\b'\\n\\u{1b}[31m");
        assert_eq!(printable(&"x".repeat(80)), "x".repeat(80));
        assert_eq!(printable(&"x".repeat(81)), "x".repeat(80) + "…");
        assert_eq!(printable(&"\u{1b}".repeat(99)), "\\u{1b}".repeat(13) + "…");
    }
}
