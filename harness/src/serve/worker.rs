//! The engine's thread. It takes jobs from the connections over a channel, runs steps while there is work, and sends each job's
//! tokens back; it sleeps while there is none.

use super::error::ApiError;
use super::metrics::EngineGauges;
use anyhow::{Context, Result};
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::Backend;
use hydra_runtime::generate::{Finish, Sampler};
use hydra_runtime::model::{AttachedAdapter, Model};
use hydra_runtime::serve::{Engine, Event, Request, RequestId, TokenGates, TokenLogprob};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

/// One sequence to generate.
pub struct Job {
    /// Token ids.
    pub prompt: Vec<u32>,
    /// The adapter's name; `None`: the model alone.
    pub adapter: Option<String>,
    /// The most tokens to draw.
    pub max_tokens: usize,
    /// How they are drawn.
    pub sampler: Sampler,
    /// Tokens that end the sequence.
    pub end_tokens: Vec<u32>,
    /// The number of alternatives whose log-probabilities are reported with each token.
    pub top_logprobs: Option<usize>,
    /// Whether the prompt's log-probabilities are reported.
    pub prompt_logprobs: bool,
    /// Whether the router's gates are reported.
    pub gates: bool,
}

/// What has become of a job. After [`Update::Finished`] and [`Update::Failed`] nothing follows.
pub enum Update {
    /// Log-probabilities of the prompt's tokens.
    Prompt(Vec<Option<TokenLogprob>>),
    /// A token was drawn.
    Token { token: u32, logprob: Option<TokenLogprob>, gates: Option<TokenGates> },
    /// It has come to its end.
    Finished(Finish),
    /// It has failed.
    Failed(ApiError),
}

/// What connections ask of the thread.
enum Command {
    Submit { ticket: u64, job: Box<Job>, updates: Updates },
    Cancel(u64),
    Attach { name: String, adapter: Box<Adapter>, done: oneshot::Sender<Result<(), ApiError>> },
    Detach { name: String, done: oneshot::Sender<bool> },
}

/// Where a job's updates go.
pub struct Updates {
    /// The receiver's end is a connection; jobs of one request share it.
    channel: UnboundedSender<(usize, Update)>,
    /// The number among them.
    index: usize,
    /// The job's place in the queue, which is free again when the job has ended, whether or not its client reads.
    place: Option<OwnedSemaphorePermit>,
}

impl Updates {
    /// To a request's channel, for its job of this number.
    pub fn new(channel: &UnboundedSender<(usize, Update)>, index: usize, place: Option<OwnedSemaphorePermit>) -> Self {
        Self { channel: channel.clone(), index, place }
    }

    /// Sends the last one. The place is free before: who has the whole answer may ask again.
    fn finish(self, update: Update) {
        drop(self.place);
        let _ = self.channel.send((self.index, update));
    }

    /// Sends one; returns whether there still is a receiver.
    fn send(&self, update: Update) -> bool {
        self.channel.send((self.index, update)).is_ok()
    }
}

/// The connections' end.
#[derive(Clone)]
pub struct Worker {
    commands: Sender<Command>,
    tickets: Arc<std::sync::atomic::AtomicU64>,
}

/// A job in the thread; dropping it cancels the job.
pub struct Running {
    ticket: u64,
    commands: Sender<Command>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // If the thread has ended, there is nothing to cancel.
        let _ = self.commands.send(Command::Cancel(self.ticket));
    }
}

impl Worker {
    /// Starts the thread. The receiver gets what ended it: an error, or that all of the connections' ends are gone.
    pub fn start<B: Backend + Send + Sync + 'static>(
        model: Model<B>,
        engine: Engine<B>,
        gauges: Arc<EngineGauges>,
    ) -> Result<(Self, oneshot::Receiver<Result<()>>)> {
        let (commands, receiver) = channel();
        let (ended, end) = oneshot::channel();
        let work = move || {
            let mut thread =
                Thread { model, engine, gauges, adapters: BTreeMap::new(), jobs: HashMap::new(), ids: HashMap::new() };
            // Without a receiver the process is ending.
            let _ = ended.send(thread.run(&receiver));
        };
        std::thread::Builder::new().name("engine".into()).spawn(work).context("can't start the engine's thread")?;
        Ok((Self { commands, tickets: Arc::default() }, end))
    }

    /// Queues a job.
    pub fn submit(&self, job: Job, updates: Updates) -> Result<Running, ApiError> {
        let ticket = self.tickets.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let sent = self.commands.send(Command::Submit { ticket, job: Box::new(job), updates });
        sent.map_err(|_| ApiError::stopping())?;
        Ok(Running { ticket, commands: self.commands.clone() })
    }

    /// Makes an adapter available under a name.
    pub async fn attach(&self, name: String, adapter: Adapter) -> Result<(), ApiError> {
        let (done, answer) = oneshot::channel();
        let sent = self.commands.send(Command::Attach { name, adapter: Box::new(adapter), done });
        sent.map_err(|_| ApiError::stopping())?;
        answer.await.map_err(|_| ApiError::stopping())?
    }

    /// Removes an adapter; jobs that use it go on. Returns whether there was one.
    pub async fn detach(&self, name: String) -> Result<bool, ApiError> {
        let (done, answer) = oneshot::channel();
        let sent = self.commands.send(Command::Detach { name, done });
        sent.map_err(|_| ApiError::stopping())?;
        answer.await.map_err(|_| ApiError::stopping())
    }
}

/// The thread's own.
struct Thread<B: Backend> {
    model: Model<B>,
    engine: Engine<B>,
    gauges: Arc<EngineGauges>,
    adapters: BTreeMap<String, AttachedAdapter<B>>,
    /// Jobs in the engine, each with its ticket.
    jobs: HashMap<RequestId, (u64, Updates)>,
    /// The same by their tickets.
    ids: HashMap<u64, RequestId>,
}

impl<B: Backend> Thread<B> {
    fn run(&mut self, commands: &Receiver<Command>) -> Result<()> {
        loop {
            if self.engine.is_idle() {
                match commands.recv() {
                    Ok(command) => self.obey(command),
                    Err(_) => return Ok(()),
                }
            }
            while let Ok(command) = commands.try_recv() {
                self.obey(command);
            }
            let events = match self.engine.step() {
                Ok(events) => events,
                Err(error) => {
                    let failed = ApiError::internal(error.to_string());
                    for (_, updates) in self.jobs.values() {
                        updates.send(Update::Failed(failed.clone()));
                    }
                    return Err(error).context("the engine has failed");
                }
            };
            self.gauges.set(self.engine.running(), self.engine.queued(), &self.engine.stats());
            events.into_iter().for_each(|event| self.report(event));
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit { ticket, job, updates } => match self.submit(*job) {
                Ok(id) => {
                    self.jobs.insert(id, (ticket, updates));
                    self.ids.insert(ticket, id);
                }
                Err(error) => {
                    updates.send(Update::Failed(error));
                }
            },
            Command::Cancel(ticket) => {
                if let Some(id) = self.ids.remove(&ticket) {
                    self.jobs.remove(&id);
                    self.engine.cancel(id);
                }
            }
            Command::Attach { name, adapter, done } => {
                let attached = self.model.attach(&adapter).map(|adapter| drop(self.adapters.insert(name, adapter)));
                let _ = done.send(attached.map_err(ApiError::from));
            }
            Command::Detach { name, done } => {
                let _ = done.send(self.adapters.remove(&name).is_some());
            }
        }
    }

    fn submit(&mut self, job: Job) -> Result<RequestId, ApiError> {
        let Job { prompt, adapter, max_tokens, sampler, end_tokens, top_logprobs, prompt_logprobs, gates } = job;
        let adapter = match adapter {
            // It may have been unloaded since the request was read.
            Some(name) => Some(self.adapters.get(&name).ok_or_else(|| ApiError::no_model(&name))?.clone()),
            None => None,
        };
        let request =
            Request { prompt, adapter, max_tokens, sampler, end_tokens, top_logprobs, prompt_logprobs, gates };
        Ok(self.engine.submit(request)?)
    }

    /// Sends an event to the job's connection; if that has gone, the job ends.
    fn report(&mut self, event: Event) {
        let (id, update, last) = match event {
            Event::Prompt { id, logprobs } => (id, Update::Prompt(logprobs), false),
            Event::Token { id, token, logprob, gates } => (id, Update::Token { token, logprob, gates }, false),
            Event::Finished { id, finish } => (id, Update::Finished(finish), true),
            Event::Failed { id, error } => (id, Update::Failed(error.into()), true),
        };
        let Some((ticket, updates)) = self.jobs.remove(&id) else { return };
        if last {
            self.ids.remove(&ticket);
            updates.finish(update);
        } else if updates.send(update) {
            self.jobs.insert(id, (ticket, updates));
        } else {
            self.ids.remove(&ticket);
            self.engine.cancel(id);
        }
    }
}
