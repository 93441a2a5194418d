//! A request's answer on its way: the jobs of all its choices in the engine, and what has come of each.

use super::answer::{Answer, Delta};
use super::error::{ApiError, Result};
use super::prepared::Prepared;
use super::shape::{Form, Shape, Usage};
use super::state::Server;
use super::worker::{Job, Running, Update, Updates};
use hydra_runtime::hydra_kernels::random::mix;
use serde_json::Value;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::hash::{BuildHasher, RandomState};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::Sleep;

/// One choice.
struct Choice {
    answer: Answer,
    /// Dropping it ends the job.
    running: Option<Running>,
    /// The prompt, if it will be repeated with its log-probabilities.
    echo: Option<Vec<u32>>,
}

/// An answer on its way. Dropping it, as hyper does when the client has gone, ends the jobs before the engine's next step.
pub struct Flow {
    /// Where it belongs.
    pub server: Arc<Server>,
    /// How it is written.
    pub form: Form,
    choices: Vec<Choice>,
    updates: UnboundedReceiver<(usize, Update)>,
    /// What is there before anything is computed.
    ready: VecDeque<(usize, Delta)>,
    /// Choices that have not ended.
    open: usize,
    prompt_tokens: usize,
    deadline: Pin<Box<Sleep>>,
    received: Instant,
    begun: bool,
    failed: bool,
}

impl Flow {
    /// Queues a request's jobs. Fails if the queue has no places for them.
    pub fn start(server: &Arc<Server>, request: Prepared) -> Result<Self> {
        let Prepared { common, shape, adapter, prompts, echo, logprobs, received } = request;
        let sequences = prompts.len() * common.n;
        let mut places = server.take_places(sequences)?;
        let (channel, updates) = unbounded_channel();
        let given = common.sampling.seed;
        let seed = given.unwrap_or_else(|| RandomState::new().hash_one(()));
        let prompt_tokens = prompts.iter().map(Vec::len).sum();
        let (mut choices, mut ready) = (Vec::with_capacity(sequences), VecDeque::new());
        for index in 0..sequences {
            let prompt = &prompts[index / common.n];
            // With a seed of the client's, a prompt is answered alike wherever it stands in the request.
            let number = if given.is_some() { index % common.n } else { index } as u64;
            let seed = if number == 0 { seed } else { mix(seed ^ mix(number)) };
            let (ends, unreported) = match (shape, logprobs) {
                // The log-probability of the token that ends a completion is part of it, as of any other.
                (Shape::Completion, Some(_)) => (server.ends.clone(), Vec::new()),
                _ => (Vec::new(), server.ends.clone()),
            };
            let stream = match shape {
                Shape::Completion if !echo => server.tokenizer.stream_after(prompt),
                _ => server.tokenizer.stream(),
            };
            let mut answer = Answer::new(stream, common.stop.clone(), ends)?;
            let echo_later = echo && logprobs.is_some();
            if echo && !echo_later {
                ready.push_back((index, answer.echo(prompt, Vec::new())?));
            }
            let room = server.context - prompt.len();
            let job = Job {
                prompt: prompt.clone(),
                adapter: adapter.clone(),
                max_tokens: common.max_tokens.map_or(room, |most| most.min(room)),
                sampler: common.sampling.sampler(seed)?,
                end_tokens: unreported,
                top_logprobs: logprobs,
                prompt_logprobs: echo_later,
                gates: common.gates,
            };
            let updates = Updates::new(&channel, index, places.split(1));
            let running = Some(server.worker.submit(job, updates)?);
            choices.push(Choice { answer, running, echo: echo_later.then(|| prompt.clone()) });
        }
        Ok(Self {
            server: server.clone(),
            form: Form {
                shape,
                model: common.model,
                id: format!("{}-{:016x}", shape.id(), RandomState::new().hash_one(seed)),
                created: super::adapters::now(),
                include_usage: common.include_usage,
                logprobs: logprobs.is_some(),
                gates: common.gates,
            },
            choices,
            updates,
            ready,
            open: sequences,
            prompt_tokens,
            deadline: Box::pin(tokio::time::sleep(server.limits.time.saturating_sub(received.elapsed()))),
            received,
            begun: false,
            failed: false,
        })
    }

    /// How many choices it has.
    pub fn choices(&self) -> usize {
        self.choices.len()
    }

    /// Its tokens so far.
    pub fn usage(&self) -> Usage {
        let completion = self.choices.iter().map(|choice| choice.answer.tokens).sum();
        Usage { prompt: self.prompt_tokens, completion }
    }

    /// What comes next of which choice; `None` at the end. After an error nothing follows.
    pub fn poll_next(&mut self, cx: &mut Context) -> Poll<Option<Result<(usize, Delta)>>> {
        if let Some(delta) = self.ready.pop_front() {
            return Poll::Ready(Some(Ok(delta)));
        }
        while self.open > 0 && !self.failed {
            if self.deadline.as_mut().poll(cx).is_ready() {
                let seconds = self.server.limits.time.as_secs();
                return self.fail(ApiError::timeout(format!("the answer was not complete after {seconds} s")));
            }
            match self.updates.poll_recv(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => return self.fail(ApiError::stopping()),
                Poll::Ready(Some((index, update))) => match self.take(index, update) {
                    Ok(delta) if delta.is_empty() => {}
                    Ok(delta) => return Poll::Ready(Some(Ok((index, delta)))),
                    Err(error) => return self.fail(error),
                },
            }
        }
        Poll::Ready(None)
    }

    fn fail(&mut self, error: ApiError) -> Poll<Option<Result<(usize, Delta)>>> {
        self.failed = true;
        self.choices.iter_mut().for_each(|choice| choice.running = None);
        tracing::warn!(id = self.form.id, "failed: {}", error.message);
        Poll::Ready(Some(Err(error)))
    }

    fn take(&mut self, index: usize, update: Update) -> Result<Delta> {
        let choice = &mut self.choices[index];
        if choice.answer.is_finished() {
            return Ok(Delta::default());
        }
        let delta = match update {
            Update::Prompt(logprobs) => match choice.echo.take() {
                Some(prompt) => choice.answer.echo(&prompt, logprobs)?,
                None => Delta::default(),
            },
            Update::Token { token, logprob, gates } => {
                if !self.begun {
                    self.begun = true;
                    self.server.metrics.first_token(self.received.elapsed());
                }
                choice.answer.push(token, logprob, gates)?
            }
            Update::Finished(finish) => choice.answer.end(finish)?,
            Update::Failed(error) => return Err(error),
        };
        if choice.answer.is_finished() {
            choice.running = None;
            self.open -= 1;
        }
        Ok(delta)
    }

    /// The whole answer.
    pub async fn collect(mut self) -> Result<Value> {
        let mut answers: Vec<Delta> = (0..self.choices()).map(|_| Delta::default()).collect();
        while let Some(next) = poll_fn(|cx| self.poll_next(cx)).await {
            let (index, delta) = next?;
            answers[index].append(delta);
        }
        self.form.whole(&self.server.texts, self.usage(), &answers)
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        let metrics = &self.server.metrics;
        let outcome = match (self.failed, self.open) {
            (true, _) => "failed",
            (false, 0) => {
                metrics.generated(self.received.elapsed());
                "done"
            }
            _ => {
                metrics.disconnected();
                "disconnected"
            }
        };
        let Usage { prompt, completion } = self.usage();
        let seconds = self.received.elapsed().as_secs_f64();
        let (id, model) = (&self.form.id, &self.form.model);
        tracing::info!(%id, %model, prompt, completion, seconds, outcome, "generation");
    }
}
