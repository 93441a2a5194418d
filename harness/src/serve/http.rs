//! The paths and their handlers.

use super::error::{ApiError, Result};
use super::flow::Flow;
use super::prepared::Prepared;
use super::state::Server;
use super::{page, stream};
use axum::Router;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use http_body::Body as _;
use serde_json::{Value, json};
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// The paths that are counted each for itself.
const PATHS: [&str; 9] = [
    "/",
    "/health",
    "/metrics",
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
];

/// Paths that need no key: they say nothing about the model.
const OPEN: [&str; 2] = ["/", "/health"];

/// All that the server answers.
pub fn router(server: Arc<Server>) -> Router {
    Router::new()
        .route("/", get(page::page))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/embeddings", any(embeddings))
        .route("/v1/load_lora_adapter", post(load_adapter))
        .route("/v1/unload_lora_adapter", post(unload_adapter))
        .fallback(|uri: Uri| async move { ApiError::no_path(uri.path()) })
        .method_not_allowed_fallback(|| async { ApiError::no_method() })
        .layer(from_fn_with_state(server.clone(), guard))
        .with_state(server)
}

/// Lets a request in, and writes down what became of it.
async fn guard(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let (method, uri, received) = (request.method().clone(), request.uri().clone(), Instant::now());
    let (path, headers) = (uri.path(), request.headers());
    let key = if OPEN.contains(&path) { Ok(()) } else { server.access.check_key(headers) };
    let response = match server.access.check_host(headers).and(key) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    let (status, seconds) = (response.status().as_u16(), received.elapsed().as_secs_f64());
    let known = PATHS.into_iter().find(|known| *known == path);
    server
        .metrics
        .answered(known.unwrap_or(if path.starts_with("/v1/models/") { "/v1/models" } else { "other" }), status);
    tracing::info!(%method, path = hydra_runtime::printable(path), status, seconds, "request");
    response
}

fn reply(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], value.to_string()).into_response()
}

async fn health(State(server): State<Arc<Server>>) -> Response {
    match server.stopping.load(Ordering::Relaxed) {
        false => reply(&json!({ "status": "ok" })),
        true => (StatusCode::SERVICE_UNAVAILABLE, reply(&json!({ "status": "stopping" }))).into_response(),
    }
}

async fn metrics(State(server): State<Arc<Server>>) -> Response {
    let kind = HeaderValue::from_static("text/plain; version=0.0.4");
    ([(header::CONTENT_TYPE, kind)], server.metrics.page(server.adapters.count())).into_response()
}

async fn models(State(server): State<Arc<Server>>) -> Response {
    reply(&server.adapters.list())
}

async fn model(
    State(server): State<Arc<Server>>,
    uri: Uri,
    name: Result<Path<String>, PathRejection>,
) -> Result<Response> {
    // It may be no UTF-8.
    let Path(name) = name.map_err(|_| ApiError::no_path(uri.path()))?;
    Ok(reply(&server.adapters.describe(&name)?))
}

async fn embeddings() -> ApiError {
    ApiError::invalid("this server has no embeddings: it generates text, with /v1/completions and /v1/chat/completions")
}

async fn completions(State(server): State<Arc<Server>>, headers: HeaderMap, body: Body) -> Result<Response> {
    generate(server, headers, body, Server::completion).await
}

async fn chat(State(server): State<Arc<Server>>, headers: HeaderMap, body: Body) -> Result<Response> {
    generate(server, headers, body, Server::chat).await
}

/// Reads a request, and answers it whole or in pieces. hyper drops this future when the client has gone, and the jobs with it.
async fn generate(
    server: Arc<Server>,
    headers: HeaderMap,
    body: Body,
    prepare: fn(&Server, &[u8], Instant) -> Result<Prepared>,
) -> Result<Response> {
    let received = Instant::now();
    let body = read(&server, &headers, body).await?;
    // Tokenizing a long text takes a while; other connections go on meanwhile.
    let preparing = server.clone();
    let prepared = tokio::task::spawn_blocking(move || prepare(&preparing, &body, received)).await;
    let prepared = prepared.map_err(|_| ApiError::internal("reading the request has failed"))??;
    let streamed = prepared.common.stream;
    let flow = Flow::start(&server, prepared)?;
    match streamed {
        true => Ok(stream::response(flow)),
        false => Ok(reply(&flow.collect().await?)),
    }
}

async fn load_adapter(State(server): State<Arc<Server>>, headers: HeaderMap, body: Body) -> Result<Response> {
    let body = read(&server, &headers, body).await?;
    Ok(server.adapters.load(&body).await?.into_response())
}

async fn unload_adapter(State(server): State<Arc<Server>>, headers: HeaderMap, body: Body) -> Result<Response> {
    let body = read(&server, &headers, body).await?;
    Ok(server.adapters.unload(&body).await?.into_response())
}

/// A body of JSON within the limits of size and time. The type has to be JSON's: a browser sends that to another site only with
/// its consent.
async fn read(server: &Server, headers: &HeaderMap, body: Body) -> Result<Vec<u8>> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if !kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json") {
        return Err(ApiError::not_json());
    }
    let limit = server.limits.body;
    if body.size_hint().lower() > limit as u64 {
        return Err(ApiError::too_large(limit));
    }
    let whole = async {
        let (mut body, mut bytes) = (pin!(body), Vec::new());
        while let Some(frame) = poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
            let frame = frame.map_err(|_| ApiError::invalid("the request's body ends too early"))?;
            if let Ok(data) = frame.into_data() {
                if bytes.len() + data.len() > limit {
                    return Err(ApiError::too_large(limit));
                }
                bytes.extend_from_slice(&data);
            }
        }
        Ok(bytes)
    };
    let late = || ApiError::timeout("the request's body did not arrive in time");
    tokio::time::timeout(server.limits.time, whole).await.map_err(|_| late())?
}
