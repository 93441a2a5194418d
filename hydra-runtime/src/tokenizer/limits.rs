//! What a `tokenizer.json` may ask for: a file from a stranger can describe a pipeline that doubles a text forty times.
//!
//! Each step can lengthen a text by a known factor at most, so the product over all steps bounds the memory that a text
//! takes. It is 12 for LLaMA 2 (Prepend, Replace), 2 for LLaMA 3 (ByteLevel) and 6 for Qwen (NFC, ByteLevel).

mod lookaround;
mod model;
mod pattern;

use crate::error::printable;
use model::Model;
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashMap;
use tokenizers::{NormalizedString, Normalizer, Tokenizer};

/// The most steps of a normalizer, a pre-tokenizer, a post-processor or a decoder; real ones have up to 10.
const MOST_STEPS: usize = 64;
/// The most by which they may lengthen a text.
const MOST_GROWTH: f64 = 1024.0;
/// The most bytes of the special tokens around a text; there are up to three of up to 17 bytes.
const MOST_SPECIAL: f64 = (1 << 16) as f64;
/// The most added tokens: reading them takes the square of their number where each continues the one before, some 6 seconds
/// for as many. Gemma 3 has 6,400, Llasa 66,000 (65,536 sounds and those of LLaMA 3).
const MOST_ADDED: usize = 70_000;
/// The most bytes of the added tokens after the normalizer, which those of them that are "normalized" pass when the file is
/// read; each takes up to 60 of memory.
const MOST_ADDED_BYTES: f64 = (1 << 22) as f64;
/// Of so many patterns or less, the aho-corasick crate makes an automaton in a time that grows with the squares of their lengths.
const FEW_ADDED: usize = 100;
/// The most of the sum of these squares: 0.04 seconds for one token of as many equal bytes, some 4 when every byte occurs. It is
/// 5,000 for Qwen, 20,000 for Phi-2, and may be some millions where a normalizer has a large table.
const MOST_SQUARES: f64 = (1 << 24) as f64;
/// The most bytes of a token; real ones have up to 256. Decoding gives them all back, whatever the ids.
const MOST_TOKEN: usize = 1000;

/// What of `tokenizer.json` is looked at.
#[derive(Deserialize)]
pub(super) struct Pipeline {
    model: Option<Model>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    decoder: Option<Value>,
    #[serde(default)]
    added_tokens: Vec<Added>,
}

#[derive(Deserialize)]
struct Added {
    #[serde(default)]
    content: String,
    #[serde(default)]
    normalized: bool,
}

impl Pipeline {
    /// What is wrong with a pipeline that would take too much memory, or that the crate would panic on.
    pub fn check(&self) -> Result<(), String> {
        self.model.as_ref().map_or(Ok(()), Model::check)?;
        let mut growth = 1.0;
        let parts = [
            ("normalizer", &self.normalizer),
            ("pre_tokenizer", &self.pre_tokenizer),
            ("post_processor", &self.post_processor),
        ];
        for (name, part) in parts {
            growth = at_most(name, growth * grown(name, part.as_ref())?)?;
            if name == "normalizer" {
                self.check_added(growth)?;
            }
        }
        self.check_special()?;
        at_most("decoder", grown("decoder", self.decoder.as_ref())?)?;
        match self.post_processor.as_ref().and_then(undeclared) {
            Some(token) => Err(format!("post_processor has {token}, which its special_tokens don't")),
            None => Ok(()),
        }
    }

    /// What the post-processor puts in, which later steps of it may repeat.
    fn check_special(&self) -> Result<(), String> {
        let mut steps = Vec::new();
        self.post_processor.iter().for_each(|part| list(part, &mut steps));
        let bytes =
            steps.into_iter().map(special).sum::<f64>() * grown("post_processor", self.post_processor.as_ref())?;
        if bytes > MOST_SPECIAL {
            return Err(format!("post_processor may put in {bytes:.0} bytes: expected at most {MOST_SPECIAL}"));
        }
        Ok(())
    }

    /// `growth` is the normalizer's.
    fn check_added(&self, growth: f64) -> Result<(), String> {
        added(self.added_tokens.iter().map(|token| token.content.len()))?;
        // The two kinds have an automaton each.
        for (normalized, growth) in [(false, 1.0), (true, growth)] {
            let tokens = self.added_tokens.iter().filter(|token| token.normalized == normalized);
            let lengths: Vec<f64> = tokens.map(|token| growth * token.content.len() as f64).collect();
            let bytes: f64 = lengths.iter().sum();
            if bytes > MOST_ADDED_BYTES {
                return Err(format!("added_tokens may have {bytes:.0} bytes: expected at most {MOST_ADDED_BYTES}"));
            }
            few(&lengths)?;
        }
        Ok(())
    }
}

/// An error if added tokens of these lengths are too many or too long, wherever they are from.
pub(crate) fn added(lengths: impl ExactSizeIterator<Item = usize>) -> Result<(), String> {
    let count = lengths.len();
    if count > MOST_ADDED {
        return Err(format!("{count} added_tokens: expected at most {MOST_ADDED}"));
    }
    let longest = lengths.max().unwrap_or_default();
    if longest > MOST_TOKEN {
        return Err(format!("an added token of {longest} bytes: expected at most {MOST_TOKEN}"));
    }
    Ok(())
}

/// An error if an automaton for tokens of these lengths takes too long to make.
fn few(lengths: &[f64]) -> Result<(), String> {
    let squares: f64 = lengths.iter().map(|length| length * length).sum();
    if lengths.len() <= FEW_ADDED && squares > MOST_SQUARES {
        let (found, most) = (squares.sqrt(), MOST_SQUARES.sqrt());
        return Err(format!("added_tokens as slow as one of {found:.0} bytes: expected at most {most:.0}"));
    }
    Ok(())
}

/// An error if an added token is white space and takes that beside it in: in a long run of it, each one takes in all. Called
/// when the tokenizer is there, which tells what the normalizer makes of a token.
pub(super) fn check_space(tokenizer: &Tokenizer) -> Result<(), String> {
    for token in tokenizer.get_added_tokens_decoder().values().filter(|token| token.lstrip || token.rstrip) {
        let mut text = NormalizedString::from(token.content.as_str());
        if let Some(normalizer) = tokenizer.get_normalizer().filter(|_| token.normalized) {
            normalizer.normalize(&mut text).map_err(|e| e.to_string())?;
        }
        if text.get().trim().is_empty() {
            let shown = printable(&token.content);
            return Err(format!("added token \"{shown}\" is white space: expected lstrip and rstrip to be false"));
        }
    }
    Ok(())
}

fn at_most(name: &str, growth: f64) -> Result<f64, String> {
    if growth > MOST_GROWTH {
        return Err(format!("{name} may lengthen a text {growth:.0} times: expected at most {MOST_GROWTH} times"));
    }
    Ok(growth)
}

/// By how much a part of the pipeline may lengthen a text.
fn grown(name: &str, part: Option<&Value>) -> Result<f64, String> {
    let mut steps = Vec::new();
    part.into_iter().for_each(|part| list(part, &mut steps));
    if steps.len() > MOST_STEPS {
        return Err(format!("{name} has {} steps: expected at most {MOST_STEPS}", steps.len()));
    }
    steps.iter().try_for_each(|step| pattern::check(name, &step["pattern"]))?;
    // Each of these has nothing left to do when it comes again.
    let mut seen = Vec::new();
    let factors = steps.into_iter().map(|step| match step["type"].as_str() {
        Some(kind @ ("Lowercase" | "NFC" | "NFD" | "NFKC" | "NFKD")) if seen.contains(&kind) => 1.0,
        kind => {
            seen.extend(kind);
            factor(step)
        }
    });
    Ok(factors.product())
}

/// A step and those in it. JSON's own limit on nesting holds here, too.
fn list<'a>(step: &'a Value, steps: &mut Vec<&'a Value>) {
    steps.push(step);
    for inner in ["normalizers", "pretokenizers", "processors", "decoders"] {
        step[inner].as_array().into_iter().flatten().for_each(|step| list(step, steps));
    }
}

/// By how much a step may lengthen a text: bytes behind it to bytes before it, at most.
fn factor(step: &Value) -> f64 {
    let length = |value: &Value| value.as_str().map_or(0, str::len) as f64;
    match step["type"].as_str() {
        Some("Replace") => match &step["pattern"]["String"] {
            Value::String(pattern) if !pattern.is_empty() => (length(&step["content"]) / pattern.len() as f64).max(1.0),
            // An expression may match everywhere.
            _ => 1.0 + length(&step["content"]),
        },
        Some("Prepend") => 1.0 + length(&step["prepend"]),
        Some("Precompiled") => longest_replacement(step["precompiled_charsmap"].as_str().unwrap_or_default()).max(1.0),
        // A byte becomes a character of up to two.
        Some("ByteLevel") => 2.0,
        // The longest decompositions of Unicode.
        Some("NFC" | "NFD") => 3.0,
        Some("NFKC" | "NFKD") => 12.0,
        // Lowercase: "İ"; Bert puts spaces around Chinese characters.
        Some("Lowercase") => 1.5,
        Some("BertNormalizer") => 3.0,
        // A space becomes "▁", and one more is put before each word.
        Some("Metaspace") => 4.0,
        Some("WordPiece" | "BPEDecoder") => 2.0,
        Some("TemplateProcessing") => {
            let pieces = step["single"].as_array().into_iter().flatten();
            (pieces.filter(|piece| piece.get("Sequence").is_some()).count() as f64).max(1.0)
        }
        Some(_) => 1.0,
        // The format of old versions, where the fields say what a step is.
        None => 12.0 + length(&step["content"]) + length(&step["prepend"]),
    }
}

/// The special tokens that a template puts in, in bytes: those of their texts, and 4 an id.
fn special(step: &Value) -> f64 {
    let pieces = step["single"].as_array().into_iter().flatten();
    let bytes = |id: &str| {
        let token = &step["special_tokens"][id];
        let texts = token["tokens"].as_array().into_iter().flatten().filter_map(Value::as_str);
        texts.map(str::len).sum::<usize>() + 4 * token["ids"].as_array().map_or(0, Vec::len)
    };
    // Each is measured once: there may be many places, and many ids.
    let mut known = HashMap::new();
    let ids = pieces.filter_map(|piece| piece["SpecialToken"]["id"].as_str());
    ids.map(|id| *known.entry(id).or_insert_with(|| bytes(id)) as f64).sum()
}

/// The length of the longest text that a SentencePiece normalizer puts in a character's place. Its table, in base 64: the
/// length of a trie, the trie, and the texts, each ending in a zero byte.
fn longest_replacement(charsmap: &str) -> f64 {
    let bytes = from_base64(charsmap);
    let Some((length, rest)) = bytes.split_first_chunk::<4>() else { return 0.0 };
    let texts = rest.get(u32::from_le_bytes(*length) as usize..).unwrap_or(rest);
    texts.split(|&byte| byte == 0).map(<[u8]>::len).max().unwrap_or_default() as f64
}

/// What isn't base 64 is left out.
fn from_base64(text: &str) -> Vec<u8> {
    let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut value = [None; 256];
    digits.iter().zip(0u32..).for_each(|(&digit, n)| value[digit as usize] = Some(n));
    let (mut bytes, mut pending, mut bits) = (Vec::with_capacity(text.len() / 4 * 3), 0u32, 0);
    for digit in text.bytes().filter_map(|byte| value[byte as usize]) {
        (pending, bits) = (pending << 6 | digit, bits + 6);
        if bits >= 8 {
            bits -= 8;
            bytes.push((pending >> bits) as u8);
        }
    }
    bytes
}

/// A special token in a template of this post-processor that it doesn't declare.
fn undeclared(processor: &Value) -> Option<String> {
    let inside = processor["processors"].as_array().into_iter().flatten().find_map(undeclared);
    let templates = ["single", "pair"].map(|name| processor[name].as_array());
    let mut wanted = templates.into_iter().flatten().flatten().filter_map(|piece| piece["SpecialToken"]["id"].as_str());
    let declared = |id: &str| processor["special_tokens"].get(id).is_some();
    inside.or_else(|| wanted.find(|id| !declared(id)).map(printable))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn growth(normalizer: Value) -> f64 {
        grown("normalizer", Some(&normalizer)).unwrap()
    }

    #[test]
    fn growth_of_known_pipelines() {
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let llama2 = json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]});
        assert_eq!(growth(llama2), 12.0);
        let qwen =
            json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "ByteLevel"}, {"type": "NFC"}]});
        assert_eq!(growth(qwen), 6.0);
        assert_eq!(growth(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "ab"})), 3.0);
        assert_eq!(growth(json!({"content": "ab"})), 14.0);
    }

    #[test]
    fn a_precompiled_table_says_what_it_puts_in() {
        assert_eq!(from_base64("aHlkcmE="), b"hydra");
        // A trie of 4 bytes, "ab" and "c".
        assert_eq!(growth(json!({"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAABhYgBjAA=="})), 2.0);
        assert_eq!(growth(json!({"type": "Precompiled", "precompiled_charsmap": "BA"})), 1.0);
    }

    #[test]
    fn templates_may_repeat_the_text() {
        let sequence = json!({"Sequence": {"id": "A", "type_id": 0}});
        let twice = json!({"type": "TemplateProcessing", "single": [sequence, sequence]});
        assert_eq!(growth(json!({"type": "Sequence", "processors": [twice, twice]})), 4.0);
    }
}
