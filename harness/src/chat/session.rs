//! A conversation, and how its next answer is made.

use super::command::Place;
use super::router::Colouring;
use crate::output;
use crate::serve::{Answer, Delta};
use anyhow::{Context, Result, bail};
use hydra_runtime::Error;
use hydra_runtime::backend::Backend;
use hydra_runtime::chat::{ChatTemplate, Message};
use hydra_runtime::generate::Sampling;
use hydra_runtime::hydra_kernels::random::mix;
use hydra_runtime::model::{AttachedAdapter, Model};
use hydra_runtime::serve::{Engine, EngineOptions, Event, Request};
use hydra_runtime::tokenizer::Tokenizer;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// How answers are drawn.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The most tokens of an answer; `None`: as many as there is room for.
    pub max_tokens: Option<usize>,
    /// How they are drawn; the seed is the first answer's.
    pub sampling: Sampling,
}

/// A conversation with a model.
pub struct Session<B: Backend> {
    engine: Engine<B>,
    tokenizer: Tokenizer,
    /// `None`: the model continues the text so far.
    template: Option<ChatTemplate>,
    ends: Vec<u32>,
    context: usize,
    adapters: Vec<(String, AttachedAdapter<B>)>,
    /// The adapter in use.
    current: Option<usize>,
    settings: Settings,
    system: String,
    messages: Vec<Message>,
    /// The adapter of each answer, by the number of its message.
    answered: Vec<(usize, Option<String>)>,
    /// Whose weights colour tokens, if they are coloured.
    router: Option<Place>,
}

impl<B: Backend> Session<B> {
    /// A conversation of up to `context` tokens that begins with the first adapter, if there is one.
    pub fn new(
        model: &Model<B>,
        adapters: Vec<(String, AttachedAdapter<B>)>,
        settings: Settings,
        engine: EngineOptions,
    ) -> Result<Self> {
        let (tokenizer, config) = (model.tokenizer()?.clone(), model.config());
        Ok(Self {
            engine: Engine::new(model, engine)?,
            template: tokenizer.chat_template().map(|_| ChatTemplate::of(&tokenizer)).transpose()?,
            ends: model.end_tokens()?,
            context: engine.context.unwrap_or(config.context),
            tokenizer,
            current: if adapters.is_empty() { None } else { Some(0) },
            adapters,
            settings,
            system: String::new(),
            messages: Vec::new(),
            answered: Vec::new(),
            router: None,
        })
    }

    /// Whether the model has a chat template.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// The adapter in use.
    pub fn adapter(&self) -> Option<&str> {
        self.current.map(|current| self.adapters[current].0.as_str())
    }

    /// The names of all adapters.
    pub fn adapters(&self) -> impl Iterator<Item = &str> {
        self.adapters.iter().map(|(name, _)| name.as_str())
    }

    /// Uses an adapter, or with "none" the model alone.
    pub fn choose(&mut self, name: &str) -> Result<()> {
        match self.adapters.iter().position(|(known, _)| known == name) {
            Some(at) => self.current = Some(at),
            None if name == "none" => self.current = None,
            None => {
                let known: Vec<&str> = self.adapters().chain(["none"]).collect();
                bail!("/adapter: expected one of {}, found {name:?}", known.join(", "))
            }
        }
        Ok(())
    }

    /// Sets the system prompt; empty: none.
    pub fn set_system(&mut self, text: String) -> Result<()> {
        if self.template.is_none() && !text.is_empty() {
            bail!("/system: the model has no chat template, and so no place for a system prompt");
        }
        self.system = text;
        Ok(())
    }

    /// Colours tokens by the weights of a place, or not at all.
    pub fn set_router(&mut self, router: Option<Place>) {
        self.router = router;
    }

    /// Forgets the conversation; the system prompt stays.
    pub fn reset(&mut self) {
        self.messages.clear();
        self.answered.clear();
    }

    /// Writes the conversation as JSON.
    pub fn save(&self, path: &Path) -> Result<()> {
        let entry = |(i, message): (usize, &Message)| {
            let mut entry = json!({ "role": message.role, "content": message.content });
            if let Some((_, adapter)) = self.answered.iter().find(|(at, _)| *at == i) {
                entry["adapter"] = json!(adapter);
            }
            entry
        };
        let system = (!self.system.is_empty()).then(|| json!({ "role": "system", "content": self.system }));
        let messages: Vec<Value> = system.into_iter().chain(self.messages.iter().enumerate().map(entry)).collect();
        output::write_json(path, &json!({ "messages": messages }))
    }

    /// Answers a message, and prints the answer as it comes. It ends early when `stop` is set; what there is then belongs to the
    /// conversation. After an error the conversation is what it was.
    pub fn answer(&mut self, text: String, stop: &AtomicBool) -> Result<()> {
        self.messages.push(Message::user(text));
        match self.generate(stop) {
            Ok(answer) => {
                self.answered.push((self.messages.len(), self.adapter().map(str::to_owned)));
                self.messages.push(Message::assistant(answer));
                Ok(())
            }
            Err(error) => {
                self.messages.pop();
                Err(error)
            }
        }
    }

    fn prompt(&self) -> Result<Vec<u32>> {
        let text = match &self.template {
            Some(template) => {
                let system = (!self.system.is_empty()).then(|| Message::system(self.system.as_str()));
                let messages: Vec<Message> = system.into_iter().chain(self.messages.iter().cloned()).collect();
                template.prompt(&messages)?
            }
            None => self.messages.iter().map(|message| message.content.as_str()).collect(),
        };
        Ok(self.tokenizer.encode_prompt(&text)?)
    }

    fn generate(&mut self, stop: &AtomicBool) -> Result<String> {
        let Settings { max_tokens, mut sampling } = self.settings;
        let turn = self.answered.len() as u64;
        if turn > 0 {
            sampling.seed = mix(sampling.seed ^ mix(turn));
        }
        let request = Request {
            prompt: self.prompt()?,
            adapter: self.current.map(|current| self.adapters[current].1.clone()),
            max_tokens: max_tokens.unwrap_or(self.context),
            sampler: sampling.sampler()?,
            end_tokens: self.ends.clone(),
            top_logprobs: None,
            prompt_logprobs: false,
            gates: self.router.is_some(),
        };
        let id = self.engine.submit(request).map_err(|error| match error {
            Error::SequenceTooLong { tokens, limit } => {
                anyhow::anyhow!("the conversation has {tokens} tokens, and {limit} fit: /reset forgets it")
            }
            other => other.into(),
        })?;
        let (mut answer, mut text) = (Answer::new(self.tokenizer.stream(), Vec::new(), Vec::new())?, String::new());
        let mut colouring = self.router.map(Colouring::new);
        while !answer.is_finished() {
            if stop.load(Ordering::SeqCst) {
                self.engine.cancel(id);
                break;
            }
            for event in self.engine.step()? {
                let delta = match event {
                    Event::Token { id: of, token, logprob, gates } if of == id => answer.push(token, logprob, gates)?,
                    Event::Finished { id: of, finish } if of == id => answer.end(finish)?,
                    Event::Failed { id: of, error } if of == id => return Err(error).context("no answer"),
                    _ => continue,
                };
                show(&delta, colouring.as_mut())?;
                text += &delta.text;
            }
        }
        output::print("\n")?;
        if let Some(colouring) = colouring {
            output::print(format_args!("{}\n", colouring.legend()))?;
        }
        Ok(text)
    }
}

fn show(delta: &Delta, colouring: Option<&mut Colouring>) -> Result<()> {
    match colouring {
        Some(colouring) => output::print(colouring.paint(delta))?,
        None => output::print(&delta.text)?,
    };
    Ok(())
}
