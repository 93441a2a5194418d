//! Stop strings: text ends before the first of them that is complete.

use crate::{Error, Result};

/// Cuts a text that comes in pieces before the stop string that is complete first, of several the longest; where the pieces end makes
/// no difference. What may be the beginning of a stop string is held back until that is decided.
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
        let held = self.held.as_str();
        // A search costs as much as the stop string is long, even in a text that is too short for it.
        let complete = self.strings.iter().filter(|stop| stop.len() <= held.len());
        if let Some((_, at)) = complete.filter_map(|stop| held.find(stop).map(|at| (at + stop.len(), at))).min() {
            self.finished = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let begun = |stop: &String| {
            let ends = (1..stop.len().min(held.len() + 1)).rev().filter(|&end| stop.is_char_boundary(end));
            ends.into_iter().find(|&end| held.ends_with(&stop[..end])).unwrap_or(0)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn cut<'a>(stop: &[&str], pieces: impl IntoIterator<Item = &'a str>) -> (String, bool) {
        let mut stop = StopStrings::new(stop.iter().map(|stop| stop.to_string()).collect()).unwrap();
        let shown: String = pieces.into_iter().map(|piece| stop.push(piece)).collect();
        (shown + &stop.finish(), stop.finished())
    }

    #[test]
    fn where_pieces_end_makes_no_difference() {
        for (stop, text, wanted) in [
            (&["abcd", "bc"] as &[&str], "xabcd", "xa"),
            (&["abc", "bc"], "xabcd", "x"),
            (&["bcd", "abcde"], "abcde", "a"),
            (&["é漢", "漢"], "aé漢b", "a"),
            (&["aab"], "aaab", "a"),
            (&["ab"], "aé", "aé"),
            (&["ab", "aé漢"], "a aé", "a aé"),
        ] {
            let found = wanted != text;
            assert_eq!(cut(stop, [text]), (wanted.into(), found), "{text:?} up to {stop:?}");
            let bytes = text.char_indices().map(|(at, c)| &text[at..at + c.len_utf8()]);
            assert_eq!(cut(stop, bytes), (wanted.into(), found), "{text:?} by characters up to {stop:?}");
            for (at, _) in text.char_indices() {
                assert_eq!(cut(stop, [&text[..at], &text[at..]]), (wanted.into(), found), "{text:?} at {at}");
            }
        }
    }
}
