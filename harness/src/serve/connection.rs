//! What a connection is doing: being answered, or waiting for its client. Where there is no place for another connection, the one
//! that has waited longest gives way, so that no number of idle or slow clients keeps others out.

use axum::body::{Body, Bytes};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use hyper::service::Service;
use hyper::{Request, Response};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// The time for a connection to go.
const PAUSE: Duration = Duration::from_millis(100);

/// One connection.
pub struct Link {
    /// Whether a request is here whole, and its answer isn't all on its way.
    answering: AtomicBool,
    /// When it began to wait: it was opened, a request's head came, or an answer ended.
    since: Mutex<Instant>,
    /// Asks it to go.
    pub leave: Notify,
    _place: OwnedSemaphorePermit,
}

impl Link {
    /// How long it has waited for its client, if it does.
    fn waiting(&self) -> Option<Duration> {
        let since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        (!self.answering.load(Ordering::Relaxed)).then(|| since.elapsed())
    }

    fn set(&self, answering: bool) {
        self.answering.store(answering, Ordering::Relaxed);
        *self.since.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

/// How many connections there may be.
#[derive(Clone, Copy)]
pub struct Room {
    /// At a time.
    pub most: usize,
    /// How long one may wait for its client before it has to give way.
    pub grace: Duration,
}

/// All connections.
pub struct Links {
    places: Arc<Semaphore>,
    grace: Duration,
    open: Vec<Weak<Link>>,
}

impl Links {
    /// None so far.
    pub fn new(Room { most, grace }: Room) -> Self {
        Self { places: Arc::new(Semaphore::new(most)), grace, open: Vec::new() }
    }

    /// A place for one more, as soon as there is one.
    pub async fn join(&mut self) -> Arc<Link> {
        let place = loop {
            if let Ok(place) = self.places.clone().try_acquire_owned() {
                break place;
            }
            self.make_room();
            // If all are being answered, or have only begun to wait, there will be one soon.
            if let Ok(Ok(place)) = timeout(PAUSE, self.places.clone().acquire_owned()).await {
                break place;
            }
        };
        self.open.retain(|link| link.strong_count() > 0);
        let (answering, since) = (false.into(), Instant::now().into());
        let link = Arc::new(Link { answering, since, leave: Notify::new(), _place: place });
        self.open.push(Arc::downgrade(&link));
        link
    }

    /// Asks the one that has waited longest for its client to go.
    pub fn make_room(&self) {
        let longest = self.open.iter().filter_map(Weak::upgrade).max_by_key(|link| link.waiting());
        if let Some(link) = longest.filter(|link| link.waiting().is_some_and(|waiting| waiting >= self.grace)) {
            link.leave.notify_one();
        }
    }
}

/// A service whose requests and answers say what their connection is doing.
pub struct Watching<S> {
    /// What answers.
    pub inner: S,
    /// The connection.
    pub link: Arc<Link>,
}

impl<S> Service<Request<Incoming>> for Watching<S>
where
    S: Service<Request<Watched<Incoming>>, Response = Response<Body>, Future: Send + 'static>,
{
    type Response = Response<Watched<Body>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        self.link.set(false);
        let link = self.link.clone();
        let answer = self.inner.call(request.map(|body| Watched { body, link: link.clone(), answering: true }));
        Box::pin(async move { Ok(answer.await?.map(|body| Watched { body, link, answering: false })) })
    }
}

/// A body: a request's is dropped when all of it has been read, and an answer's when all of it has been sent.
pub struct Watched<B> {
    body: B,
    link: Arc<Link>,
    /// Whether the connection is being answered after it.
    answering: bool,
}

impl<B> Drop for Watched<B> {
    fn drop(&mut self) {
        self.link.set(self.answering);
    }
}

impl<B: http_body::Body<Data = Bytes> + Unpin> http_body::Body for Watched<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
