//! How answers are written: as OpenAI's completions or chat completions, whole or in pieces.

use super::answer::{Delta, Piece};
use super::error::Result;
use super::flow::{Flow, Usage, reason};
use super::tokens::TokenTexts;
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

    /// A whole answer; `answers` has an entry for each choice.
    pub fn whole(self, flow: &Flow, answers: &[Delta]) -> Result<Value> {
        let choices = answers.iter().enumerate().map(|(index, answer)| self.choice(flow, index, answer, true));
        let choices = choices.collect::<Result<Vec<_>>>()?;
        let mut body = self.head(flow, self.object(false), choices);
        body["usage"] = usage(flow.usage());
        Ok(body)
    }

    /// What opens a stream: a chat's roles.
    pub fn opening(self, flow: &Flow) -> Vec<Value> {
        let open = |index| {
            let delta = json!({ "role": "assistant", "content": "" });
            let choice = json!({ "index": index, "delta": delta, "logprobs": null, "finish_reason": null });
            self.chunk_of(flow, vec![choice])
        };
        match self {
            Self::Completion => Vec::new(),
            Self::Chat => (0..flow.choices()).map(open).collect(),
        }
    }

    /// A piece of a stream.
    pub fn chunk(self, flow: &Flow, index: usize, delta: &Delta, first: bool) -> Result<Value> {
        let mut choice = self.choice(flow, index, delta, first)?;
        if self == Self::Chat
            && let Some(message) = choice.as_object_mut().and_then(|choice| choice.shift_remove("message"))
        {
            choice["delta"] = match delta.text.is_empty() {
                true => json!({}),
                false => json!({ "content": message["content"] }),
            };
        }
        Ok(self.chunk_of(flow, vec![choice]))
    }

    /// The last piece, if the request asked for it.
    pub fn closing(self, flow: &Flow) -> Option<Value> {
        flow.include_usage.then(|| {
            let mut body = self.chunk_of(flow, Vec::new());
            body["usage"] = usage(flow.usage());
            body
        })
    }

    fn chunk_of(self, flow: &Flow, choices: Vec<Value>) -> Value {
        let mut body = self.head(flow, self.object(true), choices);
        if flow.include_usage {
            body["usage"] = Value::Null;
        }
        body
    }

    fn object(self, chunk: bool) -> &'static str {
        match (self, chunk) {
            (Self::Completion, _) => "text_completion",
            (Self::Chat, false) => "chat.completion",
            (Self::Chat, true) => "chat.completion.chunk",
        }
    }

    fn head(self, flow: &Flow, object: &str, choices: Vec<Value>) -> Value {
        let Flow { id, created, model, .. } = flow;
        let fingerprint = concat!("hydra-", env!("CARGO_PKG_VERSION"));
        json!({
            "id": id, "object": object, "created": created, "model": model, "system_fingerprint": fingerprint, "choices": choices,
        })
    }

    fn choice(self, flow: &Flow, index: usize, delta: &Delta, with_places: bool) -> Result<Value> {
        let (texts, pieces) = (&flow.server.texts, &delta.pieces);
        let finish = delta.finish.map(reason);
        let logprobs = match (flow.logprobs, self) {
            (false, _) => Value::Null,
            (true, Self::Completion) => completion_logprobs(texts, pieces)?,
            (true, Self::Chat) => chat_logprobs(texts, pieces)?,
        };
        let mut choice = match self {
            Self::Completion => {
                json!({ "index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": finish })
            }
            Self::Chat => {
                let message = json!({ "role": "assistant", "content": delta.text, "refusal": null });
                json!({ "index": index, "message": message, "logprobs": logprobs, "finish_reason": finish })
            }
        };
        if flow.gates && !pieces.is_empty() {
            choice["hydra"] = gates(texts, pieces, with_places)?;
        }
        Ok(choice)
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
