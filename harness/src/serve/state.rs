//! What all connections share, and from a request's body to token ids.

use super::access::Access;
use super::adapters::Adapters;
use super::error::{ApiError, Result};
use super::metrics::Metrics;
use super::prepared::Prepared;
use super::request::{Chat, Common, Completion, Prompt};
use super::shape::Shape;
use super::tokens::TokenTexts;
use super::worker::Worker;
use hydra_runtime::chat::ChatTemplate;
use hydra_runtime::tokenizer::Tokenizer;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What a request may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sequences that are generated at once or wait.
    pub sequences: usize,
    /// Bytes of a request's body.
    pub body: usize,
    /// Time of a request, from its head to the end of its answer.
    pub time: Duration,
}

/// What all connections share.
pub struct Server {
    /// What a request may take.
    pub limits: Limits,
    /// Who may ask.
    pub access: Access,
    /// The model's and the adapters' names.
    pub adapters: Arc<Adapters>,
    /// The engine's thread.
    pub worker: Worker,
    /// The model's.
    pub tokenizer: Tokenizer,
    /// Single tokens.
    pub texts: TokenTexts,
    /// The model's, or why there is none.
    pub template: Result<ChatTemplate, String>,
    /// The most tokens of a request, prompt and answer.
    pub context: usize,
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// Tokens that end a text.
    pub ends: Vec<u32>,
    /// The counters.
    pub metrics: Metrics,
    /// Free places for sequences.
    pub places: Arc<Semaphore>,
    /// Whether it answers what it has and takes nothing more.
    pub stopping: AtomicBool,
    /// Whether the log shows prompts.
    pub log_prompts: bool,
}

impl Server {
    /// Places in the queue for this many sequences.
    pub fn take_places(&self, sequences: usize) -> Result<OwnedSemaphorePermit> {
        let most = self.limits.sequences;
        if sequences > most {
            let message = format!("the request asks for {sequences} sequences (prompts x n): expected at most {most}");
            return Err(ApiError::invalid(message));
        }
        let count = u32::try_from(sequences).unwrap_or(u32::MAX);
        let taken = self.places.clone().try_acquire_many_owned(count);
        taken.map_err(|_| ApiError::busy(self.metrics.mean_generation().as_secs_f64().ceil().clamp(1.0, 60.0) as u64))
    }

    /// `/v1/completions`, from its body.
    pub fn completion(&self, body: &[u8], received: Instant) -> Result<Prepared> {
        let Completion { common, prompts, echo, logprobs } = Completion::parse(body)?;
        let adapter = self.adapters.find(&common.model)?;
        let tokens = |prompt| match prompt {
            Prompt::Text(text) => {
                self.log(&text);
                Ok(self.tokenizer.encode_prompt(&text)?)
            }
            Prompt::Tokens(tokens) => Ok(tokens),
        };
        let prompts = prompts.into_iter().map(tokens).collect::<Result<Vec<_>>>()?;
        prompts.iter().try_for_each(|prompt| self.check("prompt", prompt, &common))?;
        Ok(Prepared { common, shape: Shape::Completion, adapter, prompts, echo, logprobs, received })
    }

    /// `/v1/chat/completions`, from its body.
    pub fn chat(&self, body: &[u8], received: Instant) -> Result<Prepared> {
        let Chat { common, messages, logprobs } = Chat::parse(body)?;
        let adapter = self.adapters.find(&common.model)?;
        let template = self
            .template
            .as_ref()
            .map_err(|why| ApiError::invalid(format!("{why}: use /v1/completions, whose prompt is taken as it is")))?;
        let text = template.prompt(&messages)?;
        self.log(&text);
        let prompts = vec![self.tokenizer.encode_prompt(&text)?];
        self.check("messages", &prompts[0], &common)?;
        Ok(Prepared { common, shape: Shape::Chat, adapter, prompts, echo: false, logprobs, received })
    }

    fn log(&self, prompt: &str) {
        if self.log_prompts {
            tracing::info!("prompt {prompt:?}");
        }
    }

    /// Fails if a prompt, which the field `param` gives, can't be continued as it is asked for.
    fn check(&self, param: &str, prompt: &[u32], common: &Common) -> Result<()> {
        common.sampling.check(self.vocab)?;
        let limit = self.context - usize::from(common.max_tokens != Some(0));
        if prompt.is_empty() {
            return Err(ApiError::field(param, "empty, and this model has no token to start from"));
        }
        if prompt.len() > limit {
            return Err(ApiError::too_long(param, prompt.len(), limit));
        }
        match prompt.iter().find(|&&token| token as usize >= self.vocab) {
            Some(token) => {
                let expected = format!("expected token ids below {}, found {token}", self.vocab);
                Err(ApiError::field(param, expected))
            }
            None => Ok(()),
        }
    }
}
