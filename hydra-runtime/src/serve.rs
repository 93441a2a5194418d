//! Many generations at once: the engine of a server, without the server.
//!
//! [`Engine::submit`] queues a request, and [`Engine::step`] moves all of them on: each running generation by a token,
//! prompts by slices beside them. Requests join and leave between steps, and each may have an adapter of its own. The
//! engine has no threads but the backend's, no clock and no text: its caller owns the loop, the tokenizer and the stop
//! strings ([`StopStrings`](crate::generate::StopStrings)).
//!
//! ```no_run
//! use hydra_runtime::generate::Sampler;
//! use hydra_runtime::model::Model;
//! use hydra_runtime::serve::{Engine, EngineOptions, Event, Request};
//!
//! # fn main() -> hydra_runtime::Result<()> {
//! let model = Model::open("model.gguf")?;
//! let mut engine = Engine::new(&model, EngineOptions::default())?;
//! for text in ["Nine heads?\n", "Once upon a time"] {
//!     let prompt = model.tokenizer()?.encode_prompt(text)?;
//!     let end_tokens = model.end_tokens()?;
//!     engine.submit(Request { end_tokens, ..Request::new(prompt, Sampler::new(0.0, 1.0, 0)?) })?;
//! }
//! while !engine.is_idle() {
//!     for event in engine.step()? {
//!         match event {
//!             Event::Token { id, token, .. } => println!("{id:?}: {token}"),
//!             Event::Finished { id, finish } => println!("{id:?}: {finish:?}"),
//!             Event::Failed { id, error } => println!("{id:?}: {error}"),
//!             Event::Prompt { .. } => {}
//!         }
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # The same bits in any company
//!
//! A request's logits, and so a greedy request's tokens, have the same bits alone and in a full engine, beside other
//! adapters, and for any [`EngineOptions::prompt_tokens`] and [`EngineOptions::prefix_tokens`]. A row's arithmetic does
//! not depend on the rows beside it: tokens that were drawn always go through the model by products that read weights
//! as they are stored, prompts always by products of packed weights, and prompts are cut at multiples of [`SLICE`]
//! tokens. (The results differ in rounding from those of a
//! [`Generator`](crate::generate::Generator), which chooses between the two by the number of tokens.)
//!
//! # Batches
//!
//! A step takes all running generations through the model in one pass, and the slices of prompts in a second one. Each
//! pass reads each weight once; rows of different adapters share the frozen products. A GPU takes one sequence at a
//! time for now: the same results, without the speed of a batch.

mod engine;
mod gates;
mod logprob;
mod passes;
mod prefixes;
mod running;

pub use engine::Engine;
pub use passes::SLICE;

use crate::Error;
use crate::backend::{Backend, Device};
use crate::generate::{Finish, Sampler};
use crate::model::AttachedAdapter;
use crate::projection::Projection;

/// How an [`Engine`] is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Requests that run at once, at least 1; others wait.
    pub slots: usize,
    /// The most tokens of a request, prompt and answer, at most the model's context; `None`: the model's context. Keys
    /// and values for this many tokens are planned for each slot.
    pub context: Option<usize>,
    /// Tokens of prompts that a step takes beside the running generations: whole slices of [`SLICE`] tokens or a
    /// prompt's last one, at least one of them. A higher number gets through prompts faster, a lower one lets running
    /// generations wait less.
    pub prompt_tokens: usize,
    /// Tokens of prompts whose keys and values are kept, in blocks of [`SLICE`], for requests with the same adapter
    /// that begin in the same way: such a block goes through the model once. Those that were used last are kept. 0:
    /// none.
    pub prefix_tokens: usize,
}

impl Default for EngineOptions {
    /// 8 slots of the model's context, 256 tokens of prompts a step, no prefixes kept.
    fn default() -> Self {
        Self { slots: 8, context: None, prompt_tokens: 256, prefix_tokens: 0 }
    }
}

/// A request's name in its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(u64);

/// What is to be continued, and how.
pub struct Request<B: Backend = Device> {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Under the label gate every token gets the mean of the heads.
    pub adapter: Option<AttachedAdapter<B>>,
    /// The most tokens to draw; the context limits it, too. 0: only the prompt's log-probabilities.
    pub max_tokens: usize,
    /// How tokens are drawn.
    pub sampler: Sampler,
    /// Tokens that end the text, as [`Model::end_tokens`](crate::model::Model::end_tokens) lists the model's; without any it goes on
    /// to `max_tokens`. Such a token isn't reported, but [`Finish::EndOfText`].
    pub end_tokens: Vec<u32>,
    /// `Some(k)`: the log-probability of each token drawn, and the `k` likeliest in its place.
    pub top_logprobs: Option<usize>,
    /// Also those of the prompt's tokens, in [`Event::Prompt`].
    pub prompt_logprobs: bool,
    /// The router's gates with each token drawn.
    pub gates: bool,
}

impl<B: Backend> Request<B> {
    /// 256 tokens after a prompt: without an adapter, log-probabilities or gates, and without [`Request::end_tokens`].
    pub fn new(prompt: Vec<u32>, sampler: Sampler) -> Self {
        Self {
            prompt,
            adapter: None,
            max_tokens: 256,
            sampler,
            end_tokens: Vec::new(),
            top_logprobs: None,
            prompt_logprobs: false,
            gates: false,
        }
    }
}

/// What a step has done for a request.
#[derive(Debug)]
pub enum Event {
    /// The prompt is done, and its log-probabilities were asked for.
    Prompt {
        /// The request.
        id: RequestId,
        /// One for each token of the prompt; the first has none.
        logprobs: Vec<Option<TokenLogprob>>,
    },
    /// A token was drawn.
    Token {
        /// The request.
        id: RequestId,
        /// The token.
        token: u32,
        /// If asked for.
        logprob: Option<TokenLogprob>,
        /// If asked for, and the request has an adapter.
        gates: Option<TokenGates>,
    },
    /// The request has ended.
    Finished {
        /// The request.
        id: RequestId,
        /// Why: its end, as many tokens as asked for, or a full context.
        finish: Finish,
    },
    /// The request has ended with an error that concerns no other.
    Failed {
        /// The request.
        id: RequestId,
        /// Why.
        error: Error,
    },
}

impl Event {
    /// The request that it is about.
    pub fn id(&self) -> RequestId {
        match self {
            Event::Prompt { id, .. }
            | Event::Token { id, .. }
            | Event::Finished { id, .. }
            | Event::Failed { id, .. } => *id,
        }
    }
}

/// How likely a token was in its place, under the model's own distribution: before temperature and nucleus.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// The likeliest tokens in its place with theirs, the likeliest first, of equal ones the lower id.
    pub top: Vec<(u32, f32)>,
}

/// The gates of all adapted projections at the position after which a token was drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenGates {
    /// Layer and projection of each row.
    pub slots: Vec<(usize, Projection)>,
    /// Columns.
    pub lora_heads: usize,
    /// [slots, lora_heads]; a row adds up to 1.
    pub gates: Vec<f32>,
}

/// Counters since the engine was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Tokens of prompts that have gone through the model.
    pub prompt_tokens: u64,
    /// Tokens of prompts whose keys and values were still there.
    pub prefix_hit_tokens: u64,
    /// Tokens drawn.
    pub generated_tokens: u64,
    /// Steps that had something to do.
    pub steps: u64,
}
