//! One request while it runs: its prompt, and what is drawn after it.

use super::logprob::token_logprob;
use super::passes::{Logprobs, Outcome, SLICE, Slice};
use super::prefixes::{Parent, Prefixes};
use super::{Event, Request, RequestId, TokenGates, TokenLogprob};
use crate::Result;
use crate::adapter::device::DeviceAdapter;
use crate::backend::Backend;
use crate::generate::Finish;
use crate::model::KvCache;
use std::sync::Arc;

/// A request that has a slot.
pub(super) struct Running<B: Backend> {
    pub id: RequestId,
    /// Whose keys and values are the request's.
    pub slot: usize,
    /// Whether there is nothing left to do.
    pub done: bool,
    request: Request<B>,
    adapter: Option<Arc<DeviceAdapter<B>>>,
    /// Tokens of the prompt that have gone through the model.
    read: usize,
    /// The block of the prompt that ends at `kept`, the multiple of [`SLICE`] up to which blocks have been kept or
    /// restored; `None` once there was no room for one.
    block: Option<Parent>,
    kept: usize,
    /// The token drawn last, which has not gone through the model.
    next: Option<u32>,
    drawn: usize,
    /// The most tokens to draw, and why there are no more.
    most: (usize, Finish),
    /// Of the prompt's tokens up to the one after `read`.
    logprobs: Vec<Option<TokenLogprob>>,
}

impl<B: Backend> Running<B> {
    /// A request whose prompt is shorter than `context`, or as long if no token is to be drawn.
    pub fn new(
        id: RequestId,
        slot: usize,
        mut request: Request<B>,
        adapter: Option<Arc<DeviceAdapter<B>>>,
        context: usize,
    ) -> Self {
        request.sampler.read(&request.prompt);
        let room = context - request.prompt.len();
        let most =
            if room < request.max_tokens { (room, Finish::Context) } else { (request.max_tokens, Finish::MaxTokens) };
        let logprobs = if request.prompt_logprobs { vec![None] } else { Vec::new() };
        let block = Some(Parent::Start(adapter.as_ref().map_or(0, |adapter| Arc::as_ptr(adapter).addr())));
        let (read, kept, next, drawn) = (0, 0, None, 0);
        Self { id, slot, done: false, request, adapter, read, block, kept, next, drawn, most, logprobs }
    }

    /// Whether the prompt has not gone through the model.
    pub fn in_prompt(&self) -> bool {
        self.read < self.request.prompt.len()
    }

    /// Whether there is a token to go through the model before the next is drawn.
    pub fn generates(&self) -> bool {
        self.next.is_some()
    }

    /// Whether nothing is asked for.
    pub fn is_empty(&self) -> bool {
        self.request.max_tokens == 0 && !self.request.prompt_logprobs
    }

    /// Tokens of the prompt's next slice, `ahead` tokens from here.
    pub fn slice_len(&self, ahead: usize) -> usize {
        SLICE.min(self.request.prompt.len() - self.read - ahead)
    }

    /// Takes what others have computed of the prompt into the request's cache; returns the number of tokens. The last
    /// token always goes through the model, and so does a prompt whose log-probabilities are wanted.
    pub fn restore(&mut self, prefixes: &mut Prefixes<B>, cache: &mut KvCache<B>) -> Result<usize> {
        let before = self.read;
        while let Some(parent) = self.block.filter(|_| self.kept == self.read && !self.request.prompt_logprobs) {
            let end = self.read + SLICE;
            if end >= self.request.prompt.len() {
                break;
            }
            let Some(block) = prefixes.restore(parent, &self.request.prompt[self.read..end], cache)? else { break };
            (self.block, self.kept, self.read) = (Some(block), end, end);
        }
        Ok(self.read - before)
    }

    /// Keeps the prompt's blocks that have gone through the model. Those that can't be kept, others will compute for
    /// themselves.
    pub fn keep(&mut self, prefixes: &mut Prefixes<B>, cache: &KvCache<B>) {
        while let Some(parent) = self.block.filter(|_| self.kept + SLICE <= self.read) {
            let tokens = &self.request.prompt[self.kept..self.kept + SLICE];
            self.block = prefixes.insert(parent, tokens, (cache, self.kept), self.adapter.as_ref()).unwrap_or(None);
            self.kept += SLICE;
        }
    }

    /// Whether the next slice is computed by `other` in the same step, so that it can be had from there in the next
    /// one.
    pub fn waits_for(&self, other: &Self, planned: usize) -> bool {
        let end = self.read + SLICE;
        let (own, others) = (&self.request.prompt, &other.request.prompt);
        self.block.is_some()
            && other.block.is_some()
            && !self.request.prompt_logprobs
            && self.adapter_address() == other.adapter_address()
            && end < own.len()
            && (other.read..other.read + planned).contains(&self.read)
            && end <= other.read + planned
            && own[..end] == others[..end]
    }

    /// Where the adapter lies: requests with the same adapter have the same address, those without 0.
    pub fn adapter_address(&self) -> usize {
        self.adapter.as_ref().map_or(0, |adapter| Arc::as_ptr(adapter).addr())
    }

    /// What goes through the model next: the token drawn last, or the next `len` tokens of the prompt.
    pub fn slice(&self, len: usize) -> Slice<'_, B> {
        let (request, slot, adapter) = (&self.request, self.slot, self.adapter.as_deref());
        if let Some(token) = &self.next {
            let tokens = std::slice::from_ref(token);
            return Slice { slot, tokens, adapter, draws: true, gates: request.gates, logprobs: None };
        }
        let (prompt, end) = (&request.prompt, self.read + len);
        let draws = end == prompt.len() && request.max_tokens > 0;
        let logprobs = request.prompt_logprobs.then(|| Logprobs {
            targets: &prompt[self.read + 1..prompt.len().min(end + 1)],
            top: request.top_logprobs.unwrap_or(0),
        });
        let tokens = &prompt[self.read..end];
        Slice { slot, tokens, adapter, draws, gates: request.gates && draws, logprobs }
    }

    /// Takes what [`Running::slice`] has become: draws the next token if the prompt is done. `logits` `[vocab]` are
    /// those after the slice's last row if it draws.
    pub fn take(&mut self, len: usize, outcome: Outcome, logits: &[f32], events: &mut Vec<Event>) {
        if let Err(error) = self.advance(len, outcome, logits, events) {
            self.done = true;
            events.push(Event::Failed { id: self.id, error });
        }
    }

    fn advance(&mut self, len: usize, outcome: Outcome, logits: &[f32], events: &mut Vec<Event>) -> Result<()> {
        if self.next.take().is_none() {
            self.logprobs.extend(outcome.logprobs?.into_iter().map(Some));
            self.read += len;
            if self.in_prompt() {
                return Ok(());
            }
            if self.request.prompt_logprobs {
                events.push(Event::Prompt { id: self.id, logprobs: std::mem::take(&mut self.logprobs) });
            }
        }
        if self.request.max_tokens == 0 {
            self.finish(Finish::MaxTokens, events);
            return Ok(());
        }
        self.draw(logits, outcome.gates, events)
    }

    fn draw(&mut self, logits: &[f32], gates: Option<TokenGates>, events: &mut Vec<Event>) -> Result<()> {
        let token = self.request.sampler.sample(logits)?;
        if self.request.end_tokens.contains(&token) {
            self.finish(Finish::EndOfText, events);
            return Ok(());
        }
        let logprob = self.request.top_logprobs.map(|top| token_logprob(logits, token, top)).transpose()?;
        events.push(Event::Token { id: self.id, token, logprob, gates });
        self.drawn += 1;
        if self.drawn == self.most.0 {
            self.finish(self.most.1, events);
        } else {
            self.next = Some(token);
        }
        Ok(())
    }

    /// Ends the request.
    pub fn finish(&mut self, finish: Finish, events: &mut Vec<Event>) {
        self.done = true;
        events.push(Event::Finished { id: self.id, finish });
    }
}
