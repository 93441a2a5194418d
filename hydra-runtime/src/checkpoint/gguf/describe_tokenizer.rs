//! A tokenizer as GGUF's `tokenizer.ggml.*` keys, from which `vocabulary.rs` and llama.cpp make the same one: byte-level BPE
//! (`gpt2`), or SentencePiece's BPE with byte fallback (`llama`).

use super::vocabulary::{BYTE, CONTROL, NAMED, NORMAL, UNKNOWN, UNUSED, USER_DEFINED};
use super::writer::Header;
use crate::config::Config;
use crate::error::printable;
use crate::tokenizer::{Tokenizer, bpe};
use crate::{Error, Result};
use serde_json::Value;

/// Adds the keys. The vocabulary gets as many entries as the embedding has rows.
pub(crate) fn write(header: &mut Header, tokenizer: &Tokenizer, config: &Config) -> Result<()> {
    let json = tokenizer.to_json()?;
    let model = &json["model"];
    let kind = model["type"].as_str().unwrap_or_default();
    if kind != "BPE" {
        return Err(refuse(format!("a tokenizer of type {}: GGUF export knows BPE alone", printable(kind))));
    }
    let merges = merges(&model["merges"])?;
    let vocabulary = Vocabulary::of(&json, config.vocab)?;
    if model["byte_fallback"] == true {
        header.string("tokenizer.ggml.model", "llama");
        header.string("tokenizer.ggml.pre", "default");
        header.f32s("tokenizer.ggml.scores", &scores(&vocabulary.tokens, &merges));
        header.bool("tokenizer.ggml.add_space_prefix", adds_space(&json)?);
    } else {
        let expressions = expressions(&json["pre_tokenizer"])?;
        let pre = bpe::pre_tokenizer(&expressions, model["ignore_merges"] == true).ok_or_else(|| {
            refuse(
                "its pre-tokenizer is none of those that GGUF files name (gpt-2, smollm, llama-bpe, qwen2, tekken)"
                    .into(),
            )
        })?;
        header.string("tokenizer.ggml.model", "gpt2");
        header.string("tokenizer.ggml.pre", pre);
        header.strings("tokenizer.ggml.merges", &merges.iter().map(|(l, r)| format!("{l} {r}")).collect::<Vec<_>>());
    }
    header.strings("tokenizer.ggml.tokens", &vocabulary.tokens);
    header.i32s("tokenizer.ggml.token_type", &vocabulary.types);
    special_tokens(header, tokenizer, config, vocabulary.unknown);
    if let Some(template) = tokenizer.chat_template() {
        header.string("tokenizer.chat_template", template);
    }
    Ok(())
}

fn special_tokens(header: &mut Header, tokenizer: &Tokenizer, config: &Config, unknown: Option<u32>) {
    let bos = tokenizer.bos().or(config.bos);
    let eos = tokenizer.eos().into_iter().chain(config.eos.iter().copied());
    let mut ends: Vec<u32> = Vec::new();
    eos.for_each(|id| {
        if !ends.contains(&id) {
            ends.push(id)
        }
    });
    let names = ["eos", "eot", "eom"].into_iter().zip(ends);
    let text = |name: &str| tokenizer.token_id(tokenizer.named_tokens().get(name)?);
    let others = NAMED.iter().filter_map(|(name, key)| {
        let own = unknown.filter(|_| *key == "unknown");
        Some((*key, own.or_else(|| text(name))?))
    });
    let named = names.chain(bos.map(|id| ("bos", id))).chain(others);
    for (name, id) in named.filter(|&(_, id)| (id as usize) < config.vocab) {
        header.u32(format!("tokenizer.ggml.{name}_token_id"), id as usize);
    }
    header.bool("tokenizer.ggml.add_bos_token", tokenizer.bos_to_add().is_some());
}

/// Tokens by id, with llama.cpp's type of each.
struct Vocabulary {
    tokens: Vec<String>,
    types: Vec<i32>,
    unknown: Option<u32>,
}

impl Vocabulary {
    fn of(json: &Value, rows: usize) -> Result<Self> {
        let model = &json["model"];
        let mut vocabulary = Self {
            // convert_hf_to_gguf's name for rows that no token has.
            tokens: (0..rows).map(|id| format!("[PAD{id}]")).collect(),
            types: vec![UNUSED as i32; rows],
            unknown: None,
        };
        for (token, id) in model["vocab"].as_object().into_iter().flatten() {
            let byte = model["byte_fallback"] == true && token.len() == 6 && token.starts_with("<0x");
            vocabulary.put(id, token, if byte { BYTE } else { NORMAL })?;
        }
        // Those beyond the embedding can't be used: llama.cpp wants as many tokens as there are rows.
        let has_row = |added: &&Value| added["id"].as_u64().is_none_or(|id| id < rows as u64);
        for added in json["added_tokens"].as_array().into_iter().flatten().filter(has_row) {
            let kind = if added["special"] == true { CONTROL } else { USER_DEFINED };
            vocabulary.put(&added["id"], added["content"].as_str().unwrap_or_default(), kind)?;
        }
        if let Some(unknown) = model["unk_token"].as_str() {
            let at = vocabulary.tokens.iter().position(|token| token == unknown);
            let at =
                at.ok_or_else(|| refuse(format!("unknown token {} is not in the vocabulary", printable(unknown))))?;
            vocabulary.types[at] = UNKNOWN as i32;
            vocabulary.unknown = Some(at as u32);
        }
        Ok(vocabulary)
    }

    fn put(&mut self, id: &Value, token: &str, kind: i64) -> Result<()> {
        let rows = self.tokens.len();
        let at = id.as_u64().and_then(|id| usize::try_from(id).ok()).filter(|&id| id < rows);
        let at =
            at.ok_or_else(|| refuse(format!("token {} has id {id}: expected less than {rows}", printable(token))))?;
        (self.tokens[at], self.types[at]) = (token.into(), kind as i32);
        Ok(())
    }
}

/// Merges as files have had them at different times: "left right", or a pair.
fn merges(list: &Value) -> Result<Vec<(&str, &str)>> {
    fn one(merge: &Value) -> Option<(&str, &str)> {
        match merge {
            Value::String(text) => text.split_once(' '),
            pair => Some((pair[0].as_str()?, pair[1].as_str()?)),
        }
    }
    let all = list.as_array().into_iter().flatten();
    all.map(|merge| one(merge).ok_or_else(|| refuse("a merge that is no pair of tokens".into()))).collect()
}

/// Scores by which SentencePiece joins in the order of the merges: the place of the first merge that makes the token, negated.
fn scores(tokens: &[String], merges: &[(&str, &str)]) -> Vec<f32> {
    let mut first = std::collections::HashMap::new();
    for (place, (left, right)) in merges.iter().enumerate() {
        first.entry([*left, *right].concat()).or_insert(place);
    }
    tokens.iter().map(|token| -(first.get(token).copied().unwrap_or(merges.len()) as f32)).collect()
}

/// Whether a text gets a space in front, as SentencePiece's dummy prefix.
fn adds_space(json: &Value) -> Result<bool> {
    let steps = |key: &str, list: &str| match &json[key] {
        Value::Null => Vec::new(),
        step if step["type"] == "Sequence" => step[list].as_array().cloned().unwrap_or_default(),
        step => vec![step.clone()],
    };
    let normalizers = steps("normalizer", "normalizers");
    if let Some(metaspace) = steps("pre_tokenizer", "pretokenizers").iter().find(|step| step["type"] == "Metaspace") {
        return Ok(metaspace["prepend_scheme"] != "never");
    }
    let replaces = |step: &Value| step["type"] == "Replace" && step["content"] == "▁";
    if !normalizers.iter().any(replaces) {
        return Err(refuse("byte fallback without SentencePiece's \"▁\" for spaces".into()));
    }
    Ok(normalizers.iter().any(|step| step["type"] == "Prepend"))
}

/// The expressions by which a byte-level tokenizer cuts text into words, one after the other.
fn expressions(pre: &Value) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let steps = match pre["pretokenizers"].as_array() {
        Some(steps) if pre["type"] == "Sequence" => steps.as_slice(),
        _ => std::slice::from_ref(pre),
    };
    for step in steps {
        let kind = step["type"].as_str().unwrap_or("none");
        let isolated = step["behavior"] == "Isolated" && step["invert"] == false;
        match (kind, step["pattern"]["Regex"].as_str()) {
            ("Split", Some(expression)) if isolated => found.push(expression.to_string()),
            ("Digits", _) if step["individual_digits"] == true => found.push(bpe::DIGIT.into()),
            ("ByteLevel", _) if step["add_prefix_space"] == false => {
                found.extend((step["use_regex"] != false).then(|| bpe::BYTE_LEVEL.to_string()));
            }
            _ => {
                return Err(refuse(format!(
                    "its pre-tokenizer has a step {}, which GGUF files can't say",
                    printable(kind)
                )));
            }
        }
    }
    Ok(found)
}

fn refuse(message: String) -> Error {
    Error::Tokenizer(format!("not to be written to a GGUF file: {message}"))
}
