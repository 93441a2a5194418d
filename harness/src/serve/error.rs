//! Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}` with the status that its clients expect.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hydra_runtime::Error;
use serde_json::{Value, json};

/// Why a request was refused, or has failed.
#[derive(Clone, Debug)]
pub struct ApiError {
    /// The HTTP status.
    pub status: StatusCode,
    /// OpenAI's "type": `invalid_request_error` and others.
    kind: &'static str,
    /// What is wrong: what was expected, what was found.
    pub message: String,
    /// The field of the request that is wrong.
    param: Option<String>,
    /// What programs compare: "model_not_found".
    code: Option<&'static str>,
    /// Seconds after which another try may succeed.
    retry_after: Option<u64>,
}

/// The result of handling a request.
pub type Result<T, E = ApiError> = std::result::Result<T, E>;

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// 400: the request can't be understood, or asks for what can't be done.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 400: a field has a wrong value.
    pub fn field(param: impl Into<String>, problem: impl std::fmt::Display) -> Self {
        let param = param.into();
        Self { param: Some(param.clone()), ..Self::invalid(format!("{param}: {problem}")) }
    }

    /// 400: a field asks for what this server can't do.
    pub fn unsupported(param: &str, why: &str) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::field(param, why) }
    }

    /// 400: a prompt, which the field `param` gives, without room for an answer.
    pub fn too_long(param: &str, tokens: usize, limit: usize) -> Self {
        let message = format!("the prompt has {tokens} tokens: expected at most {limit}, so that an answer fits in");
        Self { code: Some("context_length_exceeded"), param: Some(param.into()), ..Self::invalid(message) }
    }

    /// 401: no key, or a wrong one.
    pub fn unauthorized() -> Self {
        let message = "expected the header \"Authorization: Bearer KEY\" with the key that the server was started with";
        Self { code: Some("invalid_api_key"), ..Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message) }
    }

    /// 403: what the server was not started for.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    /// 404: no such model or adapter.
    pub fn no_model(name: &str) -> Self {
        Self::not_listed("model", "the model or one of the adapters", name)
    }

    /// 404: no such adapter to unload.
    pub fn no_adapter(name: &str) -> Self {
        Self::not_listed("lora_name", "one of the adapters", name)
    }

    fn not_listed(param: &str, expected: &str, name: &str) -> Self {
        let found = hydra_runtime::printable(name);
        let problem = format!("expected {expected} that GET /v1/models lists, found {found:?}");
        Self { status: StatusCode::NOT_FOUND, code: Some("model_not_found"), ..Self::field(param, problem) }
    }

    /// 404: no such place.
    pub fn no_path(path: &str) -> Self {
        let message = format!("no such path: {}", hydra_runtime::printable(path));
        Self { code: Some("unknown_url"), ..Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message) }
    }

    /// 405: another method.
    pub fn no_method() -> Self {
        let message = "this path does not take that method";
        let error = Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message);
        Self { code: Some("method_not_allowed"), ..error }
    }

    /// 408: the client, or the answer, took too long.
    pub fn timeout(message: impl Into<String>) -> Self {
        Self { code: Some("timeout"), ..Self::new(StatusCode::REQUEST_TIMEOUT, "timeout_error", message) }
    }

    /// 413: a body above the limit.
    pub fn too_large(limit: usize) -> Self {
        let message = format!("the request's body is too large: expected at most {limit} bytes");
        let error = Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message);
        Self { code: Some("request_too_large"), ..error }
    }

    /// 415: a body of another type.
    pub fn not_json() -> Self {
        let message = "expected the header \"Content-Type: application/json\"";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", message)
    }

    /// 429: the queue is full; `seconds` until that may have changed.
    pub fn busy(seconds: u64) -> Self {
        let message = format!("the server is busy and its queue is full: try again in {seconds} s");
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        Self { code: Some("rate_limit_exceeded"), retry_after: Some(seconds), ..error }
    }

    /// 500: the request was right, and has failed.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// 503: the server ends.
    pub fn stopping() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", "the server is stopping")
    }

    /// The body.
    pub fn json(&self) -> Value {
        let Self { kind, message, param, code, .. } = self;
        json!({ "error": { "message": message, "type": kind, "param": param, "code": code } })
    }
}

impl From<Error> for ApiError {
    /// What the runtime refused: the request's fault where only a request can be wrong.
    fn from(error: Error) -> Self {
        match error {
            Error::SequenceTooLong { tokens, limit } => Self::too_long("prompt", tokens, limit),
            Error::Invalid(_) | Error::TokenOutOfRange { .. } | Error::Template(_) | Error::Tokenizer(_) => {
                Self::invalid(error.to_string())
            }
            _ => Self::internal(error.to_string()),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.json().to_string()).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::REQUEST_TIMEOUT {
            // OpenAI's clients repeat after a 408; here the same request would take as long again.
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
