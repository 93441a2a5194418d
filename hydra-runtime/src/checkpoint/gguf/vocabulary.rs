//! The tokenizer inside a GGUF file, from its `tokenizer.ggml.*` keys.

use super::container::{Container, Value};
use crate::error::printable;
use crate::tokenizer::{NamedTokens, Special, Tokenizer, bpe, limits, spm};
use crate::{Error, Result};
use std::collections::HashMap;
use tokenizers::AddedToken;

// llama.cpp's token types.
pub(super) const NORMAL: i64 = 1;
pub(super) const UNKNOWN: i64 = 2;
pub(super) const CONTROL: i64 = 3;
pub(super) const USER_DEFINED: i64 = 4;
pub(super) const UNUSED: i64 = 5;
pub(super) const BYTE: i64 = 6;

/// Special tokens' names in chat templates and in keys, but for the ends of a text.
pub(super) const NAMED: [(&str, &str); 2] = [("unk_token", "unknown"), ("pad_token", "padding")];

pub(super) fn tokenizer(file: &Container) -> Result<Tokenizer> {
    let Some(Value::Strings(tokens)) = file.metadata.get("tokenizer.ggml.tokens") else {
        return Err(file.refuse("tokenizer.ggml.tokens", "an array of strings"));
    };
    let mut ids = HashMap::new();
    for (id, &token) in tokens.iter().enumerate() {
        if let Some(before) = ids.insert(token, id) {
            return Err(Error::Tokenizer(format!("tokens {before} and {id} are both \"{}\"", printable(token))));
        }
    }
    let id = |key: &str| {
        let id = file.token(key)?;
        match id {
            Some(id) if id as usize >= tokens.len() => {
                Err(file.refuse(key, &format!("less than the {} tokens", tokens.len())))
            }
            id => Ok(id),
        }
    };
    let (bos, eos) = (id("tokenizer.ggml.bos_token_id")?, id("tokenizer.ggml.eos_token_id")?);
    let unknown = id("tokenizer.ggml.unknown_token_id")?;
    let mut named = NamedTokens::new();
    for (name, key) in NAMED {
        let id = id(&format!("tokenizer.ggml.{key}_token_id"))?;
        named.extend(id.map(|id| (name.into(), tokens[id as usize].into())));
    }
    let kinds = kinds(file, tokens.len(), [bos, eos, unknown])?;
    let (mut inner, adds_bos) = match file.string("tokenizer.ggml.model")? {
        Some("gpt2") => {
            let Some(Value::Strings(merges)) = file.metadata.get("tokenizer.ggml.merges") else {
                return Err(file.refuse("tokenizer.ggml.merges", "an array of strings"));
            };
            bpe::build(tokens, merges, file.string("tokenizer.ggml.pre")?.unwrap_or("default"))?
        }
        Some("llama") => {
            let scores = match file.metadata.get("tokenizer.ggml.scores") {
                Some(Value::Floats(scores)) if scores.len() == tokens.len() => scores,
                _ => return Err(file.refuse("tokenizer.ggml.scores", "a number for each token")),
            };
            // The unknown token is 0 in SentencePiece unless said otherwise.
            let unknown = unknown.or_else(|| kinds.first().filter(|&&kind| kind == UNKNOWN).map(|_| 0));
            let prefix = file.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
            (spm::build(tokens, scores, |id| kinds[id] == NORMAL, unknown, prefix)?, true)
        }
        _ => return Err(file.refuse("tokenizer.ggml.model", "\"gpt2\" or \"llama\"")),
    };
    let of_kind = |wanted: &'static [i64], special: bool| {
        let chosen = tokens.iter().zip(&kinds).filter(|(token, kind)| wanted.contains(kind) && !token.is_empty());
        chosen.map(|(token, _)| AddedToken::from(*token, special).normalized(false)).collect::<Vec<_>>()
    };
    let (special, others) = (of_kind(&[UNKNOWN, CONTROL], true), of_kind(&[USER_DEFINED], false));
    for tokens in [&special, &others] {
        limits::added(tokens.iter().map(|token| token.content.len())).map_err(Error::Tokenizer)?;
    }
    inner.add_special_tokens(&special);
    inner.add_tokens(&others);
    let adds_bos = file.boolean("tokenizer.ggml.add_bos_token")?.unwrap_or(adds_bos);
    let template = file.string("tokenizer.chat_template")?.map(str::to_owned);
    let special = Special { bos_to_add: bos.filter(|_| adds_bos), bos, eos };
    Ok(Tokenizer::new(inner, special, named, template))
}

/// Each token's type; without the key, the special ones are those that other keys name.
fn kinds(file: &Container, count: usize, special: [Option<u32>; 3]) -> Result<Vec<i64>> {
    match file.metadata.get("tokenizer.ggml.token_type") {
        Some(Value::Integers(kinds)) if kinds.len() == count => Ok(kinds.clone()),
        Some(_) => Err(file.refuse("tokenizer.ggml.token_type", &format!("{count} whole numbers"))),
        None => {
            let mut kinds = vec![NORMAL; count];
            for id in special.into_iter().flatten() {
                kinds[id as usize] = CONTROL;
            }
            Ok(kinds)
        }
    }
}
