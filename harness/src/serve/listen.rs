//! Connections: they are accepted up to a number, have to send their head in time, and are drained at the end.

use super::connection::{Link, Links, Room, Watching};
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
use tokio::sync::oneshot;

/// One connection more takes the place of that which has waited longest for its client.
pub const ROOM: Room = Room { most: 1024, grace: Duration::from_secs(1) };
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
    Connection(std::io::Result<(TcpStream, Arc<Link>)>),
    Stop,
    EngineEnded(Result<()>),
}

/// Answers requests on connections for which there is room until a signal comes or the engine has failed; `stopping` is called
/// before the connections are drained.
pub async fn serve(
    listener: TcpListener,
    room: Room,
    router: Router,
    ends: Ends,
    stopping: impl FnOnce(),
) -> Result<()> {
    let Ends { mut stop, mut engine, drain } = ends;
    let (graceful, mut links) = (GracefulShutdown::new(), Links::new(room));
    loop {
        let next = {
            let mut accept = pin!(async {
                let (stream, _) = listener.accept().await?;
                Ok((stream, links.join().await))
            });
            let next = poll_fn(|cx| {
                if Pin::new(&mut stop).poll(cx).is_ready() {
                    return Poll::Ready(Next::Stop);
                }
                if let Poll::Ready(ended) = Pin::new(&mut engine).poll(cx) {
                    return Poll::Ready(Next::EngineEnded(ended.context("the engine's thread has panicked").flatten()));
                }
                accept.as_mut().poll(cx).map(Next::Connection)
            });
            next.await
        };
        match next {
            Next::Stop => break,
            Next::EngineEnded(ended) => return ended,
            Next::Connection(Err(error)) => {
                tracing::warn!("can't accept a connection: {error}");
                // The system may allow fewer connections than we do.
                links.make_room();
                tokio::time::sleep(PAUSE).await;
            }
            Next::Connection(Ok((stream, link))) => {
                // Tokens are small, and shall not wait for each other.
                let _ = stream.set_nodelay(true);
                let mut http = http1::Builder::new();
                http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME).max_buf_size(64 << 10);
                let service = Watching { inner: TowerToHyperService::new(router.clone()), link: link.clone() };
                let connection = graceful.watch(http.serve_connection(Patient::new(stream, READ_TIME), service));
                tokio::spawn(async move {
                    let (mut connection, mut leave) = (pin!(connection), pin!(link.leave.notified()));
                    let end = poll_fn(|cx| match connection.as_mut().poll(cx) {
                        Poll::Pending => leave.as_mut().poll(cx).map(|()| None),
                        ended => ended.map(Some),
                    });
                    match end.await {
                        Some(Ok(())) => {}
                        Some(Err(error)) => tracing::debug!("connection: {error}"),
                        None => tracing::debug!("connection: closed while it waited, for another one"),
                    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Bytes;
    use axum::routing::{get, post};
    use std::io::{ErrorKind, Read, Write};
    use std::net;
    use tokio::sync::Notify;

    /// A client that has sent this.
    fn client(address: net::SocketAddr, text: &str) -> net::TcpStream {
        let mut stream = net::TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        stream
    }

    /// What follows the head of the answer.
    fn answer(mut stream: &net::TcpStream, length: usize) -> String {
        let mut bytes = Vec::new();
        while !bytes.windows(4).any(|four| four == b"\r\n\r\n") {
            let mut one = [0];
            stream.read_exact(&mut one).unwrap();
            bytes.push(one[0]);
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).unwrap();
        String::from_utf8(body).unwrap()
    }

    #[test]
    fn who_waits_for_nothing_is_answered_whoever_else_is_connected() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (begin, begun) = std::sync::mpsc::channel();
            let go_on = Arc::new(Notify::new());
            let on = go_on.clone();
            let waits = move || async move {
                begin.send(()).unwrap();
                on.notified().await;
                "late"
            };
            let router = Router::new().route("/", get(async || "soon")).route("/late", get(waits));
            let router = router.route("/", post(async |body: Bytes| body));
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (stop, stopped) = oneshot::channel();
            let (_engine, engine) = oneshot::channel();
            let clients = std::thread::spawn(move || {
                let post = "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\n";
                let late = client(address, "GET /late HTTP/1.1\r\nHost: h\r\n\r\n");
                begun.recv().unwrap();
                let mut idle = Vec::new();
                for round in 0..3 {
                    // One that says nothing, one whose head or body isn't here whole, one that has its answer.
                    for text in ["", "GET / HTTP/1.1\r\nHo", post, &format!("{post}what")] {
                        idle.push(client(address, text));
                    }
                    assert_eq!(answer(idle.last().unwrap(), 4), "what", "round {round}");
                    assert_eq!(answer(&client(address, "GET / HTTP/1.1\r\nHost: h\r\n\r\n"), 4), "soon");
                }
                // The one that has waited longest is gone, and the one that is being answered is not.
                let end = idle[0].read(&mut [0]);
                assert!(end.map_or_else(|error| error.kind() == ErrorKind::ConnectionReset, |read| read == 0));
                go_on.notify_one();
                assert_eq!(answer(&late, 4), "late");
                stop.send(()).unwrap();
            });
            let ends = Ends { stop: stopped, engine, drain: Duration::from_secs(60) };
            let room = Room { most: 3, grace: Duration::ZERO };
            serve(listener, room, router, ends, || {}).await.unwrap();
            clients.join().unwrap();
        });
    }
}
