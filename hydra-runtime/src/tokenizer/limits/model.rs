//! The texts of a tokenizer's model: its vocabulary, and what it puts around parts of words.

use super::MOST_TOKEN;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, de};
use std::fmt;

/// The most bytes of a piece of a Unigram model, whose time for a text grows with their square; real ones have up to 64. The
/// crate frees them by recursion, one byte a level.
const MOST_PIECE: usize = 256;
/// The most bytes of all pieces of a Unigram model, each byte of which may take 350 of memory; XLM-R has 3 MB.
const MOST_PIECES: usize = 8 << 20;
/// The most bytes of what a model puts before or behind each part of a word: "##", "</w>".
const MOST_AFFIX: usize = 64;
/// The most characters of a word for WordPiece, whose time grows with their square; BERT says 100.
const MOST_WORD: f64 = 256.0;

/// What of the model is looked at.
#[derive(Deserialize)]
pub(super) struct Model {
    #[serde(default)]
    vocab: Texts,
    #[serde(default)]
    continuing_subword_prefix: Texts,
    #[serde(default)]
    end_of_word_suffix: Texts,
    max_input_chars_per_word: Option<f64>,
}

impl Model {
    /// An error if its texts are too long.
    pub fn check(&self) -> Result<(), String> {
        let longest = if self.vocab.list { MOST_PIECE } else { MOST_TOKEN };
        if self.vocab.longest > longest {
            return Err(format!("model has a token of {} bytes: expected at most {longest}", self.vocab.longest));
        }
        if self.vocab.list && self.vocab.all > MOST_PIECES {
            return Err(format!("model has pieces of {} bytes: expected at most {MOST_PIECES}", self.vocab.all));
        }
        let affixes = [
            ("continuing_subword_prefix", &self.continuing_subword_prefix),
            ("end_of_word_suffix", &self.end_of_word_suffix),
        ];
        for (name, text) in affixes {
            if text.longest > MOST_AFFIX {
                return Err(format!("{name} of {} bytes: expected at most {MOST_AFFIX}", text.longest));
            }
        }
        match self.max_input_chars_per_word {
            Some(most) if most > MOST_WORD => {
                Err(format!("max_input_chars_per_word is {most}: expected at most {MOST_WORD}"))
            }
            _ => Ok(()),
        }
    }
}

/// The texts in a value, which isn't kept: a vocabulary may be large.
#[derive(Default)]
struct Texts {
    longest: usize,
    all: usize,
    /// Whether the value is a list, as only the vocabulary of a Unigram model is.
    list: bool,
}

impl Texts {
    fn add(&mut self, inner: Texts) {
        self.longest = self.longest.max(inner.longest);
        self.all += inner.all;
    }
}

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(value: D) -> Result<Self, D::Error> {
        value.deserialize_any(Measure)
    }
}

struct Measure;

impl<'de> Visitor<'de> for Measure {
    type Value = Texts;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Texts, E> {
        Ok(Texts { longest: text.len(), all: text.len(), list: false })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<Texts, A::Error> {
        let mut texts = Texts { list: true, ..Texts::default() };
        while let Some(inner) = values.next_element()? {
            texts.add(inner);
        }
        Ok(texts)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut values: A) -> Result<Texts, A::Error> {
        let mut texts = Texts::default();
        while let Some((key, inner)) = values.next_entry::<Texts, Texts>()? {
            texts.add(key);
            texts.add(inner);
        }
        Ok(texts)
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<Texts, E> {
        Ok(Texts::default())
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<Texts, E> {
        Ok(Texts::default())
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<Texts, E> {
        Ok(Texts::default())
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<Texts, E> {
        Ok(Texts::default())
    }

    fn visit_unit<E: de::Error>(self) -> Result<Texts, E> {
        Ok(Texts::default())
    }
}
