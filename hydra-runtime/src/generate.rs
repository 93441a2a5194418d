//! Text after a prompt.
//!
//! [`Model::generate`] and [`Model::chat`] are the whole loop: they tokenise, draw, and end at the model's end of text or at a stop
//! string, and [`Sampling`] says how they draw. [`Generator`] and [`Sampler`] are its parts, for loops of one's own.

mod generator;
mod sampler;
mod sampling;
mod stop;

pub use generator::Generator;
pub use sampler::Sampler;
pub use sampling::Sampling;
pub use stop::StopStrings;

use crate::backend::{Backend, Device};
use crate::chat::{ChatTemplate, Message};
use crate::model::{AttachedAdapter, Model};
use crate::tokenizer::{TextStream, Tokenizer};
use crate::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// What is to be continued.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// A text, behind the beginning-of-text token if the tokenizer adds one.
    Text(String),
    /// Token ids as they are.
    Tokens(Vec<u32>),
    /// Turns of a conversation, put into the model's chat template.
    Chat(Vec<Message>),
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Vec<u32>> for Prompt {
    fn from(tokens: Vec<u32>) -> Self {
        Self::Tokens(tokens)
    }
}

impl From<&[u32]> for Prompt {
    fn from(tokens: &[u32]) -> Self {
        Self::Tokens(tokens.into())
    }
}

impl Prompt {
    /// The token ids that go into the model.
    pub fn tokens(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        match self {
            Self::Text(text) => tokenizer.encode_prompt(text),
            Self::Tokens(tokens) => Ok(tokens.clone()),
            Self::Chat(messages) => tokenizer.encode_prompt(&ChatTemplate::of(tokenizer)?.prompt(messages)?),
        }
    }
}

impl<B: Backend> Model<B> {
    /// Continues a prompt. Greedy, without an adapter and up to 256 tokens, unless the returned builder is told otherwise.
    ///
    /// ```no_run
    /// # fn main() -> hydra_runtime::Result<()> {
    /// let model = hydra_runtime::model::Model::open("model.gguf")?;
    /// let adapter = model.load_adapter("run")?;
    /// for text in model.generate("Once upon a time").adapter(&adapter).temperature(0.7).max_tokens(64).stream()? {
    ///     print!("{}", text?);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn generate(&self, prompt: impl Into<Prompt>) -> Generate<B> {
        Generate {
            model: self.clone(),
            prompt: prompt.into(),
            adapter: None,
            max_tokens: 256,
            sampling: Sampling::default(),
            stop: Vec::new(),
            cancel: None,
        }
    }

    /// Writes the assistant's next turn of a conversation, by the model's own chat template.
    pub fn chat(&self, messages: impl Into<Vec<Message>>) -> Generate<B> {
        self.generate(Prompt::Chat(messages.into()))
    }
}

/// What to generate, and how; made by [`Model::generate`].
#[must_use = "nothing is generated before `stream` or `text` is called"]
pub struct Generate<B: Backend = Device> {
    model: Model<B>,
    prompt: Prompt,
    adapter: Option<AttachedAdapter<B>>,
    max_tokens: usize,
    sampling: Sampling,
    stop: Vec<String>,
    cancel: Option<Arc<AtomicBool>>,
}

impl<B: Backend> Generate<B> {
    /// Uses this adapter.
    pub fn adapter(mut self, adapter: &AttachedAdapter<B>) -> Self {
        self.adapter = Some(adapter.clone());
        self
    }

    /// The most tokens to write; the model's context limits it, too.
    pub fn max_tokens(mut self, tokens: usize) -> Self {
        self.max_tokens = tokens;
        self
    }

    /// How tokens are drawn.
    pub fn sampling(mut self, sampling: Sampling) -> Self {
        self.sampling = sampling;
        self
    }

    /// [`Sampling::temperature`].
    pub fn temperature(mut self, temperature: f32) -> Self {
        self.sampling.temperature = temperature;
        self
    }

    /// [`Sampling::top_k`].
    pub fn top_k(mut self, top_k: usize) -> Self {
        self.sampling.top_k = top_k;
        self
    }

    /// [`Sampling::top_p`].
    pub fn top_p(mut self, top_p: f32) -> Self {
        self.sampling.top_p = top_p;
        self
    }

    /// [`Sampling::min_p`].
    pub fn min_p(mut self, min_p: f32) -> Self {
        self.sampling.min_p = min_p;
        self
    }

    /// [`Sampling::seed`].
    pub fn seed(mut self, seed: u64) -> Self {
        self.sampling.seed = seed;
        self
    }

    /// Ends before this text, which is not part of the result. May be called several times: the first to appear ends.
    pub fn stop(mut self, text: impl Into<String>) -> Self {
        self.stop.push(text.into());
        self
    }

    /// Ends with [`Error::Cancelled`] soon after `flag` is set.
    pub fn cancel(mut self, flag: Arc<AtomicBool>) -> Self {
        self.cancel = Some(flag);
        self
    }

    /// Reads the prompt and begins.
    ///
    /// # Errors
    /// If an option is out of range, the prompt is empty, longer than the model's context ([`Error::SequenceTooLong`]) or can't be
    /// tokenised, or memory does not suffice.
    pub fn stream(self) -> Result<Generated<B>> {
        let Self { model, prompt, adapter, max_tokens, stop, cancel, .. } = self;
        let stop = StopStrings::new(stop)?;
        let mut sampler = self.sampling.sampler()?;
        let tokenizer = model.tokenizer()?;
        let answers = matches!(prompt, Prompt::Chat(_));
        let prompt = prompt.tokens(tokenizer)?;
        let context = model.config().context;
        if prompt.len() >= context {
            return Err(Error::SequenceTooLong { tokens: prompt.len(), limit: context - 1 });
        }
        let room = context.min(prompt.len().saturating_add(max_tokens));
        let mut generator = Generator::attached(&model, adapter.as_ref(), room)?;
        if let Some(flag) = cancel {
            generator = generator.with_cancel(flag);
        }
        generator.feed(&prompt)?;
        sampler.read(&prompt);
        let ends = model.end_tokens()?;
        let finish = (max_tokens == 0).then_some(Finish::MaxTokens);
        Ok(Generated {
            text: Some(if answers { tokenizer.stream() } else { tokenizer.stream_after(&prompt) }),
            generator,
            sampler,
            ends,
            stop,
            tokens: Vec::new(),
            most: room - prompt.len(),
            max_tokens,
            finish,
        })
    }

    /// The whole text.
    pub fn text(self) -> Result<String> {
        self.stream()?.collect()
    }
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it.
    EndOfText,
    /// A stop string appeared.
    Stop,
    /// It has as many tokens as were asked for.
    MaxTokens,
    /// The model's context is full.
    Context,
}

/// Text as it is generated: an iterator over pieces that are whole characters, none of them empty. Text that may be the beginning of
/// a stop string is held back until that is decided.
pub struct Generated<B: Backend = Device> {
    generator: Generator<B>,
    sampler: Sampler,
    /// `None` once it has been finished.
    text: Option<TextStream>,
    /// The tokens that end a text.
    ends: Vec<u32>,
    stop: StopStrings,
    tokens: Vec<u32>,
    /// The most tokens: what was asked for, or what the context has room for.
    most: usize,
    max_tokens: usize,
    finish: Option<Finish>,
}

impl<B: Backend> Generated<B> {
    /// The tokens so far, without the one that ended the text.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Why the text has ended; `None` while it goes on, and after an error.
    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// Draws tokens until there is text to return, or the end.
    fn advance(&mut self) -> Result<Option<String>> {
        while self.finish.is_none() {
            let token = self.sampler.sample(self.generator.logits())?;
            if self.ends.contains(&token) {
                self.finish = Some(Finish::EndOfText);
                break;
            }
            self.tokens.push(token);
            let new = self.text.as_mut().map_or(Ok(String::new()), |text| text.push(token))?;
            let ready = self.stop.push(&new);
            if self.stop.finished() {
                self.finish = Some(Finish::Stop);
            } else if self.tokens.len() == self.most {
                self.finish = Some(if self.most == self.max_tokens { Finish::MaxTokens } else { Finish::Context });
            } else {
                self.generator.feed(&[token])?;
            }
            if !ready.is_empty() {
                return Ok(Some(ready));
            }
        }
        let rest = self.text.take().map_or(Ok(String::new()), TextStream::finish)?;
        if self.finish == Some(Finish::Stop) {
            return Ok(None);
        }
        let mut last = self.stop.push(&rest);
        if self.stop.finished() {
            self.finish = Some(Finish::Stop);
        }
        last += &self.stop.finish();
        Ok(Some(last).filter(|last| !last.is_empty()))
    }
}

impl<B: Backend> Iterator for Generated<B> {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Result<String>> {
        self.text.as_ref()?;
        let next = self.advance();
        if next.is_err() {
            self.text = None;
        }
        next.transpose()
    }
}
