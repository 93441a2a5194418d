//! How answers are written: as OpenAI's completions or chat completions, whole or in pieces.

use super::answer::{Delta, Piece};
use super::error::Result;
use super::tokens::TokenTexts;
use hydra_runtime::generate::Finish;
use serde_json::{Map, Value, json};

/// The kind of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// `/v1/completions`
    Completion,
    /// `/v1/chat/completions`
    Chat,
}

impl Shape {
    /// What its ids begin with.
    pub fn id(self) -> &'static str {
        match self {
            Self::Completion => "cmpl",
            Self::Chat => "chatcmpl",
        }
    }

    fn object(self, chunk: bool) -> &'static str {
        match (self, chunk) {
            (Self::Completion, _) => "text_completion",
            (Self::Chat, false) => "chat.completion",
            (Self::Chat, true) => "chat.completion.chunk",
        }
    }
}

/// The tokens of a request.
#[derive(Clone, Copy, Default)]
pub struct Usage {
    /// Of its prompts, each counted once.
    pub prompt: usize,
    /// Of all choices.
    pub completion: usize,
}

/// What the pieces of an answer have in common.
pub struct Form {
    /// The kind.
    pub shape: Shape,
    /// The name that was asked for.
    pub model: String,
    /// "cmpl-..".
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// Whether the last piece says how many tokens there were.
    pub include_usage: bool,
    /// Whether log-probabilities are part of it.
    pub logprobs: bool,
    /// Whether gates are part of it.
    pub gates: bool,
}

impl Form {
    /// A whole answer; `answers` has an entry for each choice.
    pub fn whole(&self, texts: &TokenTexts, of: Usage, answers: &[Delta]) -> Result<Value> {
        let choices = answers.iter().enumerate().map(|(index, answer)| self.choice(texts, index, answer, true));
        let mut body = self.head(false, choices.collect::<Result<_>>()?);
        body["usage"] = usage(of);
        Ok(body)
    }

    /// What opens a stream of this many choices: a chat's roles.
    pub fn opening(&self, choices: usize) -> Vec<Value> {
        let open = |index| {
            let delta = json!({ "role": "assistant", "content": "" });
            let choice = json!({ "index": index, "delta": delta, "logprobs": null, "finish_reason": null });
            self.chunk_of(vec![choice])
        };
        match self.shape {
            Shape::Completion => Vec::new(),
            Shape::Chat => (0..choices).map(open).collect(),
        }
    }

    /// A piece of a stream; `first` if it is its choice's first one with tokens.
    pub fn chunk(&self, texts: &TokenTexts, index: usize, delta: &Delta, first: bool) -> Result<Value> {
        let mut choice = self.choice(texts, index, delta, first)?;
        if self.shape == Shape::Chat
            && let Some(message) = choice.as_object_mut().and_then(|choice| choice.shift_remove("message"))
        {
            choice["delta"] = match delta.text.is_empty() {
                true => json!({}),
                false => json!({ "content": message["content"] }),
            };
        }
        Ok(self.chunk_of(vec![choice]))
    }

    /// The last piece, if the request asked for it.
    pub fn closing(&self, of: Usage) -> Option<Value> {
        self.include_usage.then(|| {
            let mut body = self.chunk_of(Vec::new());
            body["usage"] = usage(of);
            body
        })
    }

    fn chunk_of(&self, choices: Vec<Value>) -> Value {
        let mut body = self.head(true, choices);
        if self.include_usage {
            body["usage"] = Value::Null;
        }
        body
    }

    fn head(&self, chunk: bool, choices: Vec<Value>) -> Value {
        let Self { id, created, model, .. } = self;
        let (object, fingerprint) = (self.shape.object(chunk), concat!("hydra-", env!("CARGO_PKG_VERSION")));
        json!({
            "id": id, "object": object, "created": created, "model": model, "system_fingerprint": fingerprint, "choices": choices,
        })
    }

    fn choice(&self, texts: &TokenTexts, index: usize, delta: &Delta, with_places: bool) -> Result<Value> {
        let pieces = &delta.pieces;
        let finish = delta.finish.map(reason);
        let logprobs = match (self.logprobs, self.shape) {
            (false, _) => Value::Null,
            (true, Shape::Completion) => completion_logprobs(texts, pieces)?,
            (true, Shape::Chat) => chat_logprobs(texts, pieces)?,
        };
        let mut choice = match self.shape {
            Shape::Completion => {
                json!({ "index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": finish })
            }
            Shape::Chat => {
                let message = json!({ "role": "assistant", "content": delta.text, "refusal": null });
                json!({ "index": index, "message": message, "logprobs": logprobs, "finish_reason": finish })
            }
        };
        if self.gates && !pieces.is_empty() {
            choice["hydra"] = gates(texts, pieces, with_places)?;
        }
        Ok(choice)
    }
}

/// OpenAI's word for why an answer has ended.
fn reason(finish: Finish) -> &'static str {
    match finish {
        Finish::EndOfText | Finish::Stop => "stop",
        Finish::MaxTokens | Finish::Context => "length",
    }
}

fn usage(usage: Usage) -> Value {
    let Usage { prompt, completion } = usage;
    json!({ "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion })
}

/// JSON has no -∞: as OpenAI's API, it is -9999 there.
fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

/// `{"tokens", "token_logprobs", "top_logprobs", "text_offset"}`: a prompt's first token has none, which is `null`.
fn completion_logprobs(texts: &TokenTexts, pieces: &[Piece]) -> Result<Value> {
    let (mut tokens, mut values, mut top, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for piece in pieces {
        let text = texts.get(piece.token)?.text.clone();
        values.push(piece.logprob.as_ref().map(|own| finite(own.logprob)));
        top.push(match &piece.logprob {
            None => None,
            Some(own) => {
                let mut map = Map::new();
                // Several tokens may have one text: the likeliest stands for it.
                for &(token, logprob) in own.top.iter().chain([&(own.token, own.logprob)]) {
                    map.entry(texts.get(token)?.text.clone()).or_insert_with(|| json!(finite(logprob)));
                }
                Some(map)
            }
        });
        tokens.push(text);
        offsets.push(piece.offset);
    }
    Ok(json!({ "tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets }))
}

/// `{"content": [{"token", "logprob", "bytes", "top_logprobs"}]}`
fn chat_logprobs(texts: &TokenTexts, pieces: &[Piece]) -> Result<Value> {
    let entry = |token, logprob| {
        let text = texts.get(token)?;
        Ok(json!({ "token": text.text, "logprob": finite(logprob), "bytes": text.bytes }))
    };
    let mut content = Vec::new();
    for own in pieces.iter().filter_map(|piece| piece.logprob.as_ref()) {
        let mut one = entry(own.token, own.logprob)?;
        let top = own.top.iter().map(|&(token, logprob)| entry(token, logprob));
        one["top_logprobs"] = Value::Array(top.collect::<Result<_>>()?);
        content.push(one);
    }
    Ok(json!({ "content": content, "refusal": null }))
}

/// Our extension: each token's text, its place in the choice's text and its gates, `[places, heads]` row by row; the places once for each choice.
fn gates(texts: &TokenTexts, pieces: &[Piece], with_places: bool) -> Result<Value> {
    let rounded = |gate: &f32| (f64::from(*gate) * 1e4).round() / 1e4;
    let mut tokens = Vec::new();
    for piece in pieces {
        let gates = piece.gates.as_ref().map(|gates| gates.gates.iter().map(rounded).collect::<Vec<_>>());
        let text = &texts.get(piece.token)?.text;
        tokens.push(json!({ "id": piece.token, "text": text, "offset": piece.offset, "gates": gates }));
    }
    let mut value = json!({ "tokens": tokens });
    if with_places && let Some(gates) = pieces.iter().find_map(|piece| piece.gates.as_ref()) {
        let places =
            gates.slots.iter().map(|(layer, projection)| json!({ "layer": layer, "projection": projection.name() }));
        value["places"] = places.collect();
        value["heads"] = gates.lora_heads.into();
    }
    Ok(value)
}
