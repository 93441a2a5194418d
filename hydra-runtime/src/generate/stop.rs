//! Stop strings: text ends before the first of them.

use crate::{Error, Result};

/// Cuts a text that comes in pieces before the first stop string in it. What may be the beginning of a stop string is held back until
/// that is decided.
///
/// ```
/// use hydra_runtime::generate::StopStrings;
///
/// let mut stop = StopStrings::new(vec!["\n\n".into()])?;
/// assert_eq!(stop.push("Nine heads.\n"), "Nine heads.");
/// assert_eq!(stop.push("\nNext"), "");
/// assert!(stop.finished());
/// # Ok::<_, hydra_runtime::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    strings: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
    finished: bool,
}

impl StopStrings {
    /// Any number of stop strings. Fails if one of them is empty.
    pub fn new(strings: Vec<String>) -> Result<Self> {
        if strings.iter().any(String::is_empty) {
            return Err(Error::Invalid("an empty stop string".into()));
        }
        Ok(Self { strings, held: String::new(), finished: false })
    }

    /// Takes the text's next piece; returns what can't be part of a stop string. After a stop string it takes nothing more.
    pub fn push(&mut self, piece: &str) -> String {
        if self.finished {
            return String::new();
        }
        self.held += piece;
        if let Some(at) = self.strings.iter().filter_map(|stop| self.held.find(stop)).min() {
            self.finished = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let begun = |stop: &String| {
            let ends = stop.char_indices().map(|(i, _)| i).rev();
            ends.into_iter().find(|&i| self.held.ends_with(&stop[..i])).unwrap_or(0)
        };
        let kept = self.strings.iter().map(begun).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - kept);
        std::mem::replace(&mut self.held, rest)
    }

    /// Whether a stop string has appeared.
    pub fn finished(&self) -> bool {
        self.finished
    }

    /// The text has ended: returns what was held back. Nothing if a stop string has appeared.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}
