//! The engine: which requests run, and what a step does for each.

use super::passes::{Passes, plan_bytes};
use super::prefixes::Prefixes;
use super::running::Running;
use super::{EngineOptions, Event, Request, RequestId, Stats};
use crate::adapter::device::DeviceAdapter;
use crate::backend::{Backend, Device, RowKind};
use crate::config::Config;
use crate::generate::Finish;
use crate::model::{KvCache, Model};
use crate::{Error, Result};
use std::collections::VecDeque;
use std::sync::Arc;

/// Many generations at once; see [the module](super). It owns all that it needs: it may move to another thread, or into
/// any struct.
pub struct Engine<B: Backend = Device> {
    model: Model<B>,
    options: EngineOptions,
    /// The most tokens of a request.
    context: usize,
    passes: Passes<B>,
    prefixes: Prefixes<B>,
    /// One for each slot.
    caches: Vec<KvCache<B>>,
    /// Slots that are free.
    free: Vec<usize>,
    queue: VecDeque<Queued<B>>,
    /// In the order in which they got their slots.
    running: Vec<Running<B>>,
    /// What an interrupted step has done already.
    events: Vec<Event>,
    submitted: u64,
    stats: Stats,
}

/// A request that waits for a slot.
struct Queued<B: Backend> {
    id: RequestId,
    request: Request<B>,
    adapter: Option<Arc<DeviceAdapter<B>>>,
}

impl EngineOptions {
    /// The most tokens of a request. Fails if an option is out of range.
    fn context(&self, config: &Config) -> Result<usize> {
        if self.slots == 0 {
            return Err(Error::Invalid("an engine with 0 slots: expected at least 1".into()));
        }
        match self.context {
            Some(context) if context < 2 || context > config.context => Err(Error::Invalid(format!(
                "an engine with a context of {context} tokens: expected 2 to the model's {}",
                config.context
            ))),
            context => Ok(context.unwrap_or(config.context)),
        }
    }
}

impl<B: Backend> Engine<B> {
    /// Bytes that an engine takes beside the weights and the adapters, `u64::MAX` at most: keys and values of all slots
    /// and prefixes, activations, logits. The states of adapters come on top: some floats for each row of a step.
    pub fn plan_bytes(backend: &B, config: &Config, options: &EngineOptions) -> Result<u64> {
        plan_bytes(backend, config, options, options.context(config)?)
    }

    /// An engine without requests. All memory is allocated here, but for adapters' states and prefixes.
    ///
    /// # Errors
    /// If an option is out of range or memory does not suffice.
    pub fn new(model: &Model<B>, options: EngineOptions) -> Result<Self> {
        let context = options.context(model.config())?;
        let caches = (0..options.slots).map(|_| KvCache::new(&model.0, context));
        Ok(Self {
            passes: Passes::new(model, &options, context)?,
            prefixes: Prefixes::new(model, options.prefix_tokens),
            model: model.clone(),
            options,
            context,
            caches: caches.collect::<Result<_>>()?,
            free: (0..options.slots).rev().collect(),
            queue: VecDeque::new(),
            running: Vec::new(),
            events: Vec::new(),
            submitted: 0,
            stats: Stats::default(),
        })
    }

    /// Queues a request. It begins when a slot is free.
    ///
    /// # Errors
    /// If the prompt is empty, has an id outside the vocabulary ([`Error::TokenOutOfRange`]) or leaves no room for a
    /// token ([`Error::SequenceTooLong`]), or the adapter is another model's ([`Error::WrongAdapter`]).
    pub fn submit(&mut self, request: Request<B>) -> Result<RequestId> {
        let (tokens, vocab) = (request.prompt.len(), self.model.config().vocab);
        let limit = if request.max_tokens == 0 { self.context } else { self.context - 1 };
        if tokens == 0 {
            return Err(Error::Invalid("a request with an empty prompt: expected at least one token".into()));
        }
        if tokens > limit {
            return Err(Error::SequenceTooLong { tokens, limit });
        }
        if let Some(&token) = request.prompt.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::TokenOutOfRange { token, vocab });
        }
        let adapter = request.adapter.as_ref().map(|adapter| adapter.parameters(&self.model)).transpose()?;
        if let Some(adapter) = &adapter {
            self.passes.reserve(adapter)?;
        }
        let id = RequestId(self.submitted);
        self.submitted += 1;
        self.queue.push_back(Queued { id, request, adapter });
        Ok(id)
    }

    /// Ends a request without an event, whatever state it is in; its slot is free for the next step. Events of it that
    /// a failed step has left are dropped. Unknown ids are ignored.
    pub fn cancel(&mut self, id: RequestId) {
        self.queue.retain(|queued| queued.id != id);
        self.events.retain(|event| event.id() != id);
        self.running.iter_mut().filter(|running| running.id == id).for_each(|running| running.done = true);
        self.retire();
    }

    /// Moves all requests on: every running generation gets a token, waiting prompts get their slices. Returns nothing
    /// when there is nothing to do.
    ///
    /// # Errors
    /// If the device fails. What the step had done until then is kept, and its events come with the next step.
    pub fn step(&mut self) -> Result<Vec<Event>> {
        self.admit();
        if !self.running.is_empty() {
            self.stats.steps += 1;
            let _bound = self.model.backend().bind_caller();
            self.generate()?;
            self.read_prompts()?;
        }
        Ok(std::mem::take(&mut self.events))
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.queue.is_empty() && self.events.is_empty()
    }

    /// Requests that have a slot.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Requests that wait for a slot.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Counters since the engine was made.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Gives free slots to waiting requests, the first come first.
    fn admit(&mut self) {
        while self.running.len() < self.options.slots && !self.queue.is_empty() {
            let (Some(Queued { id, request, adapter }), Some(slot)) = (self.queue.pop_front(), self.free.pop()) else {
                break;
            };
            self.caches[slot].len = 0;
            let mut running = Running::new(id, slot, request, adapter, self.context);
            if running.is_empty() {
                running.finish(Finish::MaxTokens, &mut self.events);
            }
            self.running.push(running);
            self.retire();
        }
    }

    /// Draws the next token of each running generation.
    fn generate(&mut self) -> Result<()> {
        let plan = (0..self.running.len()).filter(|&i| self.running[i].generates()).map(|i| (i, 1)).collect();
        self.advance(plan, RowKind::Decode)
    }

    /// Takes slices of prompts through the model, those of the oldest request first.
    fn read_prompts(&mut self) -> Result<()> {
        if self.prefixes.is_enabled() {
            for running in self.running.iter_mut().filter(|running| running.in_prompt()) {
                let restored = running.restore(&mut self.prefixes, &mut self.caches[running.slot])?;
                self.stats.prefix_hit_tokens += restored as u64;
            }
        }
        let plan = self.plan_prompts();
        self.advance(plan, RowKind::Prompt)
    }

    /// The requests whose prompts go on, each with a number of tokens.
    fn plan_prompts(&self) -> Vec<(usize, usize)> {
        let (mut plan, mut left): (Vec<(usize, usize)>, _) = (Vec::new(), self.options.prompt_tokens);
        let batches = self.model.backend().batches();
        for (i, running) in self.running.iter().enumerate().filter(|(_, running)| running.in_prompt()) {
            let computed = |&(other, planned): &(usize, usize)| running.waits_for(&self.running[other], planned);
            if self.prefixes.is_enabled() && plan.iter().any(computed) {
                continue;
            }
            let mut ahead = 0;
            loop {
                let len = running.slice_len(ahead);
                if len == 0 {
                    break;
                }
                if len > left && !plan.is_empty() {
                    return plan;
                }
                match plan.last_mut() {
                    Some((last, planned)) if batches && *last == i => *planned += len,
                    _ => plan.push((i, len)),
                }
                (left, ahead) = (left.saturating_sub(len), ahead + len);
            }
        }
        plan
    }

    /// Takes the next tokens of some requests through the model, all in one pass if the backend batches.
    fn advance(&mut self, mut plan: Vec<(usize, usize)>, kind: RowKind) -> Result<()> {
        let batches = self.model.backend().batches();
        if batches {
            // Rows of one adapter lie together.
            plan.sort_by_key(|&(i, _)| self.running[i].adapter_address());
        }
        for plan in plan.chunks(if batches { plan.len().max(1) } else { 1 }) {
            // Of one that doesn't, several slices of a request may be planned, of which one has failed.
            if plan.iter().all(|&(i, _)| self.running[i].done) {
                continue;
            }
            let slices: Vec<_> = plan.iter().map(|&(i, len)| self.running[i].slice(len)).collect();
            let outcomes = self.passes.run(&mut self.caches, &slices, kind)?;
            for (&(i, len), outcome) in plan.iter().zip(outcomes) {
                if kind == RowKind::Prompt {
                    self.stats.prompt_tokens += len as u64;
                }
                let (running, before) = (&mut self.running[i], self.events.len());
                let logits = outcome.drawn.map_or(&[][..], |row| self.passes.logits(row));
                running.take(len, outcome, logits, &mut self.events);
                if self.prefixes.is_enabled() {
                    running.keep(&mut self.prefixes, &self.caches[running.slot]);
                }
                let drawn = self.events[before..].iter().filter(|event| matches!(event, Event::Token { .. }));
                self.stats.generated_tokens += drawn.count() as u64;
            }
        }
        self.retire();
        Ok(())
    }

    /// Takes the slots of requests that have ended.
    fn retire(&mut self) {
        let free = &mut self.free;
        self.running.retain(|running| {
            if running.done {
                free.push(running.slot);
            }
            !running.done
        });
    }
}
