//! One request while it runs: its prompt, and what is drawn after it.

use super::logprob::token_logprob;
use super::passes::{Outcome, SLICE, Slice, Wants};
use super::{Event, Request, RequestId, TokenLogprob};
use crate::Result;
use crate::adapter::device::DeviceAdapter;
use crate::backend::Backend;
use crate::generate::Finish;
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
        request: Request<B>,
        adapter: Option<Arc<DeviceAdapter<B>>>,
        context: usize,
    ) -> Self {
        let room = context - request.prompt.len();
        let most =
            if room < request.max_tokens { (room, Finish::Context) } else { (request.max_tokens, Finish::MaxTokens) };
        let logprobs = if request.prompt_logprobs { vec![None] } else { Vec::new() };
        Self { id, slot, done: false, request, adapter, read: 0, next: None, drawn: 0, most, logprobs }
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

    /// Tokens of the prompt's next slice.
    pub fn slice_len(&self) -> usize {
        SLICE.min(self.request.prompt.len() - self.read)
    }

    /// What goes through the model next: the prompt's next slice, or the token drawn last.
    pub fn slice(&self) -> Slice<'_, B> {
        let (request, adapter) = (&self.request, self.adapter.as_deref());
        let draws = Wants { last: true, all: false, gates: request.gates };
        match &self.next {
            Some(token) => Slice { tokens: std::slice::from_ref(token), adapter, wants: draws },
            None => {
                let end = self.read + self.slice_len();
                let last = end == request.prompt.len() && request.max_tokens > 0;
                let wants = Wants { last, all: request.prompt_logprobs, gates: request.gates && last };
                Slice { tokens: &request.prompt[self.read..end], adapter, wants }
            }
        }
    }

    /// Takes what [`Running::slice`] has become: draws the next token if the prompt is done.
    pub fn take(&mut self, outcome: &Outcome<'_>, events: &mut Vec<Event>) {
        if let Err(error) = self.advance(outcome, events) {
            self.done = true;
            events.push(Event::Failed { id: self.id, error });
        }
    }

    fn advance(&mut self, outcome: &Outcome<'_>, events: &mut Vec<Event>) -> Result<()> {
        if self.next.take().is_none() {
            let end = self.read + self.slice_len();
            self.add_logprobs(outcome)?;
            self.read = end;
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
        self.draw(outcome, events)
    }

    /// Adds the log-probabilities of the tokens that a slice's rows predict.
    fn add_logprobs(&mut self, outcome: &Outcome<'_>) -> Result<()> {
        if !self.request.prompt_logprobs {
            return Ok(());
        }
        let top = self.request.top_logprobs.unwrap_or(0);
        for (logits, &token) in outcome.rows().zip(&self.request.prompt[self.read + 1..]) {
            self.logprobs.push(Some(token_logprob(logits, token, top)?));
        }
        Ok(())
    }

    fn draw(&mut self, outcome: &Outcome<'_>, events: &mut Vec<Event>) -> Result<()> {
        let token = self.request.sampler.sample(outcome.last)?;
        if self.request.end_tokens.contains(&token) {
            self.finish(Finish::EndOfText, events);
            return Ok(());
        }
        let top = self.request.top_logprobs;
        let logprob = top.map(|top| token_logprob(outcome.last, token, top)).transpose()?;
        events.push(Event::Token { id: self.id, token, logprob, gates: outcome.gates.clone() });
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
