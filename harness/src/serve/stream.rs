//! An answer as server-sent events: `data: {..}` for each piece, and `data: [DONE]` at the end.

use super::error::ApiError;
use super::flow::Flow;
use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use http_body::Frame;
use serde_json::Value;
use std::collections::{BTreeSet, VecDeque};
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

/// The body of a streamed answer. hyper drops it when the client has gone.
struct Events {
    flow: Flow,
    ready: VecDeque<Bytes>,
    /// Choices that have had a piece.
    begun: BTreeSet<usize>,
    done: bool,
}

/// A response that streams an answer.
pub fn response(flow: Flow) -> Response {
    let ready = flow.form.opening(flow.choices()).iter().map(event).collect();
    let mut response = Body::new(Events { flow, ready, begun: BTreeSet::new(), done: false }).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx collects what a server sends unless it is told not to.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

fn event(value: &Value) -> Bytes {
    format!("data: {value}\n\n").into()
}

impl Events {
    /// Closes the stream, after an error or at the end.
    fn close(&mut self, last: Option<Value>) {
        self.ready.extend(last.as_ref().map(event));
        self.ready.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
        self.done = true;
    }

    fn fail(&mut self, error: &ApiError) {
        self.close(Some(error.json()));
    }
}

impl http_body::Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        loop {
            if let Some(bytes) = this.ready.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(bytes))));
            }
            if this.done {
                return Poll::Ready(None);
            }
            match this.flow.poll_next(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Ok((index, delta)))) => {
                    let first = !delta.pieces.is_empty() && this.begun.insert(index);
                    match this.flow.form.chunk(&this.flow.server.texts, index, &delta, first) {
                        Ok(chunk) => this.ready.push_back(event(&chunk)),
                        Err(error) => this.fail(&error),
                    }
                }
                Poll::Ready(Some(Err(error))) => this.fail(&error),
                Poll::Ready(None) => {
                    let last = this.flow.form.closing(this.flow.usage());
                    this.close(last);
                }
            }
        }
    }
}
