//! `hydra serve`: a model and its adapters over HTTP, with the OpenAI API.
//!
//! Connections run on a tokio runtime of one thread; the engine runs on a thread of its own, and both talk over channels:
//!
//! ```text
//! listen ──▶ http ──▶ request, state ──▶ flow ──jobs──▶ worker ──▶ hydra_runtime::serve::Engine
//!                     (read, tokenize)    │   ◀─tokens──
//!                                         └──▶ answer (text, stop strings) ──▶ shape ──▶ whole, or stream
//! ```
//!
//! Whoever goes away drops its flow, and that cancels its jobs before the engine's next step.

mod access;
mod adapters;
mod answer;
mod connection;
mod error;
mod fields;
mod flow;
mod http;
mod listen;
mod metrics;
mod page;
mod patient;
mod prepared;
mod request;
mod sampling;
mod shape;
mod state;
mod stream;
mod tokens;
mod worker;

pub use access::Key;
pub use adapters::{MOST_ADAPTERS, check_name};
pub use answer::{Answer, Delta, Piece};
pub use state::Limits;

use crate::{interrupt, output};
use access::Access;
use adapters::Adapters;
use anyhow::{Context, Result, bail};
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::Backend;
use hydra_runtime::chat::ChatTemplate;
use hydra_runtime::model::Model;
use hydra_runtime::serve::{Engine, EngineOptions};
use metrics::Metrics;
use state::Server;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokens::TokenTexts;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};
use worker::Worker;

/// Threads that tokenize prompts and read adapters; the engine needs the cores.
const BLOCKING_THREADS: usize = 2;

/// How a server is set up.
pub struct Options {
    /// Where it listens: a name or an address, and a port (0: any free one).
    pub host: String,
    /// The port.
    pub port: u16,
    /// What requests call the model.
    pub name: String,
    /// The key that requests have to show.
    pub key: Option<Key>,
    /// Names, besides this machine's, under which it is reached.
    pub hosts: Vec<String>,
    /// The folder that requests may load adapters from.
    pub adapter_dir: Option<PathBuf>,
    /// The engine's.
    pub engine: EngineOptions,
    /// What a request may take.
    pub limits: Limits,
    /// The time for requests that are being answered when the server is stopped.
    pub drain: Duration,
    /// Whether the log shows prompts.
    pub log_prompts: bool,
}

/// Serves until a signal comes. The address is printed on stdout, in one line, once connections are accepted.
pub fn run<B: Backend>(model: Model<B>, adapters: Vec<(String, Adapter)>, options: Options) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(BLOCKING_THREADS).build();
    let runtime = runtime.context("can't start the server's threads")?;
    let served = runtime.block_on(serve(model, adapters, options));
    // A request that is still being read is not waited for.
    runtime.shutdown_background();
    served
}

async fn serve<B: Backend>(model: Model<B>, adapters: Vec<(String, Adapter)>, options: Options) -> Result<()> {
    let Options { host, port, name, key, hosts, adapter_dir, engine, limits, drain, log_prompts } = options;
    // A taken port is found before a thread is started.
    let listener =
        TcpListener::bind((host.as_str(), port)).await.with_context(|| format!("can't listen on {host}:{port}"))?;
    let address = listener.local_addr().context("the server's address")?;
    let root = match adapter_dir {
        Some(dir) => Some(dir.canonicalize().with_context(|| format!("--adapter-dir {}", dir.display()))?),
        None => None,
    };
    let (config, tokenizer, ends) = (model.config().clone(), model.tokenizer()?.clone(), model.end_tokens()?);
    let context = engine.context.unwrap_or(config.context);
    let (metrics, engine) = (Metrics::default(), Engine::new(&model, engine)?);
    let (worker, engine) = Worker::start(model, engine, metrics.engine.clone())?;
    let template = ChatTemplate::of(&tokenizer).map_err(|error| error.to_string());
    let served = Adapters::new(name, config.clone(), template.is_ok(), context, root, worker.clone());
    for (name, adapter) in adapters {
        let added = served.add(name.clone(), adapter).await;
        if let Err(error) = added {
            bail!("--adapter {name}: {}", error.message);
        }
    }
    let server = Arc::new(Server {
        access: Access::new(key, address.ip(), hosts),
        adapters: served,
        worker,
        texts: TokenTexts::new(tokenizer.clone())?,
        template,
        context,
        vocab: config.vocab,
        ends,
        tokenizer,
        metrics,
        places: Arc::new(Semaphore::new(limits.sequences)),
        limits,
        stopping: false.into(),
        log_prompts,
    });
    let (stop, stopped) = oneshot::channel();
    // If nobody receives it, the server has ended already.
    interrupt::on_stop(move || {
        let _ = stop.send(());
    })?;
    announce(address)?;
    let (router, ends) = (http::router(server.clone()), listen::Ends { stop: stopped, engine, drain });
    listen::serve(listener, listen::ROOM, router, ends, || {
        server.stopping.store(true, Ordering::Relaxed);
        output::say("stopping: requests that are being answered are finished; another signal ends the server at once");
    })
    .await
}

/// Whether a body is one of `/v1/completions`, or of `/v1/chat/completions`: for `harness/fuzz`.
pub fn accepts(body: &[u8]) -> [bool; 2] {
    [request::Completion::parse(body).is_ok(), request::Chat::parse(body).is_ok()]
}

fn announce(address: SocketAddr) -> Result<()> {
    output::print(format_args!("listening on http://{address}\n"))?;
    Ok(())
}
