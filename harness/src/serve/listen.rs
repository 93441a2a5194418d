//! Connections: they are accepted up to a number, have to send their head in time, and are drained at the end.

use super::patient::Patient;
use anyhow::{Context, Result};
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::TokioTimer;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot};

/// The most connections at a time; others wait until one is closed.
const CONNECTIONS: usize = 1024;
/// The time for a request's head; also how long a connection may be idle.
const HEAD_TIME: Duration = Duration::from_secs(60);
/// The time for a client to read something of what waits for it.
const READ_TIME: Duration = Duration::from_secs(60);
/// The time before another try if the system has no more files or memory for a connection.
const PAUSE: Duration = Duration::from_millis(100);

/// What ends the server.
pub struct Ends {
    /// A signal.
    pub stop: oneshot::Receiver<()>,
    /// The engine's thread: it ends by itself only if it has failed.
    pub engine: oneshot::Receiver<Result<()>>,
    /// The time for the requests that are being answered when the signal comes.
    pub drain: Duration,
}

/// What came next.
enum Next {
    Connection(std::io::Result<TcpStream>),
    Stop,
    EngineEnded(Result<()>),
}

/// Answers requests until a signal comes or the engine has failed; `stopping` is called before the connections are drained.
pub async fn serve(listener: TcpListener, router: Router, ends: Ends, stopping: impl FnOnce()) -> Result<()> {
    let Ends { mut stop, mut engine, drain } = ends;
    let (graceful, places) = (GracefulShutdown::new(), Arc::new(Semaphore::new(CONNECTIONS)));
    loop {
        let place = places.clone().acquire_owned();
        let mut accept = pin!(async {
            let place = place.await;
            (listener.accept().await.map(|(stream, _)| stream), place)
        });
        let mut held = None;
        let next = poll_fn(|cx| {
            if Pin::new(&mut stop).poll(cx).is_ready() {
                return Poll::Ready(Next::Stop);
            }
            if let Poll::Ready(ended) = Pin::new(&mut engine).poll(cx) {
                return Poll::Ready(Next::EngineEnded(ended.context("the engine's thread has panicked").flatten()));
            }
            accept.as_mut().poll(cx).map(|(stream, place)| {
                held = place.ok();
                Next::Connection(stream)
            })
        });
        match next.await {
            Next::Stop => break,
            Next::EngineEnded(ended) => return ended,
            Next::Connection(Err(error)) => {
                tracing::warn!("can't accept a connection: {error}");
                tokio::time::sleep(PAUSE).await;
            }
            Next::Connection(Ok(stream)) => {
                // Tokens are small, and shall not wait for each other.
                let _ = stream.set_nodelay(true);
                let mut http = http1::Builder::new();
                http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME).max_buf_size(64 << 10);
                let connection =
                    http.serve_connection(Patient::new(stream, READ_TIME), TowerToHyperService::new(router.clone()));
                let connection = graceful.watch(connection);
                tokio::spawn(async move {
                    if let Err(error) = connection.await {
                        tracing::debug!("connection: {error}");
                    }
                    drop(held);
                });
            }
        }
    }
    drop(listener);
    stopping();
    if tokio::time::timeout(drain, graceful.shutdown()).await.is_err() {
        tracing::warn!("requests that were not answered after {} s are cut off", drain.as_secs());
    }
    Ok(())
}
