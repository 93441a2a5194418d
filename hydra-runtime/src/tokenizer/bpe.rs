//! Byte-level BPE from a GGUF vocabulary (`tokenizer.ggml.model = gpt2`).
//!
//! `tokenizer.ggml.pre` names how a text is cut into words before merging. The expressions are llama.cpp's
//! (`llama-vocab.cpp`), applied one after the other to the pieces that the one before left.

use super::refused;
use crate::{Error, Result};
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A way of cutting text into words.
struct Cut {
    expressions: &'static [&'static str],
    /// A word that is a token is taken whole, whatever the merges.
    ignore_merges: bool,
    /// A text begins with a BOS unless the file says otherwise.
    adds_bos: bool,
}

fn cut(pre: &str) -> Option<Cut> {
    let plain = |expressions| Cut { expressions, ignore_merges: false, adds_bos: false };
    Some(match pre {
        "default" => plain(&[
            r"[\p{P}\$\+<=>\^~\|]+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+",
            r"[0-9][0-9][0-9]",
        ]),
        "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" => plain(&[GPT2]),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" => {
            plain(&[DIGIT, GPT2])
        }
        "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "pixtral" => {
            Cut { expressions: &[LLAMA3], ignore_merges: true, adds_bos: true }
        }
        "dbrx" | "smaug-bpe" => plain(&[LLAMA3]),
        "qwen2" | "deepseek-r1-qwen" | "megrez" => plain(&[QWEN2]),
        "tekken" => Cut { expressions: &[TEKKEN], ignore_merges: true, adds_bos: true },
        _ => return None,
    })
}

/// llama.cpp's name for this way of cutting text into words, if it has one.
pub(crate) fn pre_tokenizer(expressions: &[String], ignore_merges: bool) -> Option<&'static str> {
    ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken", "default"]
        .into_iter()
        .find(|pre| cut(pre).is_some_and(|cut| cut.expressions == expressions && cut.ignore_merges == ignore_merges))
}

/// What `ByteLevel` cuts by, and single digits.
pub(crate) const BYTE_LEVEL: &str = GPT2;
pub(crate) const DIGIT: &str = r"\p{N}";

/// Builds the pipeline; also whether texts begin with a BOS by default. `merges` are "left right", best first.
pub(crate) fn build(tokens: &[&str], merges: &[&str], pre: &str) -> Result<(Tokenizer, bool)> {
    let Some(Cut { expressions, ignore_merges, adds_bos }) = cut(pre) else {
        let shown = crate::error::printable(pre);
        return Err(Error::Tokenizer(format!("tokenizer.ggml.pre is \"{shown}\", a pre-tokenizer that isn't known")));
    };
    let vocab = tokens.iter().zip(0u32..).map(|(token, id)| (token.to_string(), id)).collect();
    let pair = |merge: &&str| {
        // The left part isn't empty: the separator is the first space after its first byte.
        let at = merge.bytes().skip(1).position(|byte| byte == b' ').map(|at| at + 1);
        at.map(|at| (merge[..at].to_string(), merge[at + 1..].to_string())).ok_or_else(|| {
            Error::Tokenizer(format!("merge \"{}\", wanted two tokens and a space", crate::error::printable(merge)))
        })
    };
    let merges = merges.iter().map(pair).collect::<Result<Vec<_>>>()?;
    let model = BPE::builder().vocab_and_merges::<tokenizers::models::bpe::Vocab>(vocab, merges);
    let model = model.ignore_merges(ignore_merges).build().map_err(refused)?;
    let mut tokenizer = Tokenizer::new(model);
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    for expression in expressions {
        let pattern = SplitPattern::Regex(expression.to_string());
        steps.push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(refused)?.into());
    }
    steps.push(ByteLevel::new(false, true, false).into());
    tokenizer.with_pre_tokenizer(Some(Sequence::new(steps)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    Ok((tokenizer, adds_bos))
}
