//! How an answer is compared with the right one.
//!
//! Texts are compared in lower case, with one space between words, without a full stop at the end, dollar signs, or commas
//! between digits: "1,200." is "1200".

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// `--metric`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// Generate an answer: it must be the right one
    Exact,
    /// Generate an answer: it must contain the right one
    Contains,
    /// Take the choice with the highest log-likelihood
    Choice,
    /// Generate an answer: F1 of its words against those of the right one, as SQuAD
    F1,
}

impl Metric {
    /// The score of a generated text, from 0 to 1. `after` cuts both texts: what follows its last occurrence counts.
    pub fn score(self, text: &str, right: &str, after: Option<&str>) -> f64 {
        let behind = |text: &str| {
            let place = after.and_then(|mark| Some(text.rfind(mark)? + mark.len()));
            normal(&text[place.unwrap_or(0)..])
        };
        let (text, right) = (behind(text), behind(right));
        match self {
            Self::Exact | Self::Choice => f64::from(text == right),
            // Every text contains an empty one.
            Self::Contains if right.is_empty() => f64::from(text.is_empty()),
            Self::Contains => f64::from(text.contains(&right)),
            Self::F1 => f1(&text, &right),
        }
    }
}

fn normal(text: &str) -> String {
    let lower = text.to_lowercase();
    let mut plain = String::with_capacity(lower.len());
    let mut rest = lower.chars().peekable();
    while let Some(c) = rest.next() {
        let between =
            c == ',' && plain.ends_with(|c: char| c.is_ascii_digit()) && rest.peek().is_some_and(char::is_ascii_digit);
        if c != '$' && !between {
            plain.push(c);
        }
    }
    let words: Vec<&str> = plain.split_whitespace().collect();
    words.join(" ").trim_end_matches(['.', ' ']).to_string()
}

/// F1 of two bags of words, without punctuation and articles.
fn f1(text: &str, right: &str) -> f64 {
    let words = |text: &str| {
        let plain: String = text.chars().filter(|c| !c.is_ascii_punctuation()).collect();
        let words = plain.split_whitespace().filter(|word| !matches!(*word, "a" | "an" | "the"));
        words.map(str::to_owned).collect::<Vec<_>>()
    };
    let (text, right) = (words(text), words(right));
    if text.is_empty() || right.is_empty() {
        return f64::from(text == right);
    }
    let mut left = HashMap::<&str, usize>::new();
    right.iter().for_each(|word| *left.entry(word).or_default() += 1);
    let shared = text.iter().filter(|word| {
        let left = left.get_mut(word.as_str()).filter(|left| **left > 0);
        left.map(|left| *left -= 1).is_some()
    });
    2.0 * shared.count() as f64 / (text.len() + right.len()) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores() {
        let score = |metric: Metric, text: &str, right: &str| metric.score(text, right, None);
        assert_eq!(score(Metric::Exact, " It is  $1,200.\n", "it is 1200"), 1.0);
        assert_eq!(score(Metric::Exact, "1, 200", "1200"), 0.0);
        assert_eq!(score(Metric::Exact, "five .", "five"), 1.0);
        assert_eq!(score(Metric::Contains, "The answer is (B).", "(b)"), 1.0);
        assert_eq!(score(Metric::Contains, "(A)", "(B)"), 0.0);
        for nothing in ["", "$", "."] {
            assert_eq!((score(Metric::Contains, "x", nothing), score(Metric::Contains, "", nothing)), (0.0, 1.0));
        }
        assert_eq!(score(Metric::F1, "The red, red fish", "a red fish"), 0.8);
        assert_eq!(score(Metric::F1, "", "the"), 1.0);
        assert_eq!(score(Metric::F1, "x", "y"), 0.0);
        let after = |text: &str, right: &str| Metric::Exact.score(text, right, Some("####"));
        assert_eq!(after("2 + 2 = 4\n#### 4", "so\n#### 4"), 1.0);
        assert_eq!(after("4", "so\n#### 4"), 1.0);
        assert_eq!(after("#### 4\n#### 5", "#### 4"), 0.0);
    }
}
