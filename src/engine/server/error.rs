//! Every failure's status and body.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use lora_sched::EventError;
use serde_json::json;

use super::intake::Names;
use crate::engine::SubmitError;

/// A failed request: answered as `{"error":{"message","type","param","code"}}`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<&'static str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None }
    }

    /// 400: a value that cannot be.
    pub(super) fn bad(param: &'static str, message: impl Into<String>) -> Self {
        Self { param: Some(param), ..Self::new(StatusCode::BAD_REQUEST, "BadRequestError", message) }
    }

    /// 400: what no single value is to blame for.
    pub(super) fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequestError", message)
    }

    /// 401.
    pub(super) fn unauthorized() -> Self {
        let message = "a valid API key is needed: send 'Authorization: Bearer KEY'";
        Self::new(StatusCode::UNAUTHORIZED, "AuthenticationError", message)
    }

    /// 404: no such thing, named by `param` where there is one.
    pub(super) fn not_found(param: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { param, ..Self::new(StatusCode::NOT_FOUND, "NotFoundError", message) }
    }

    /// 405: `takes` are the methods that would do.
    pub(super) fn method_not_allowed(method: &str, path: &str, takes: &[&str]) -> Self {
        let message = format!("{path} does not take {method}: send {}", takes.join(" or "));
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowedError", message)
    }

    /// 408: a client that does not go on sending.
    pub(super) fn too_slow(why: impl std::fmt::Display) -> Self {
        let message = format!("the request's body did not arrive: {why}");
        Self::new(StatusCode::REQUEST_TIMEOUT, "RequestTimeoutError", message)
    }

    /// 409: not as things are.
    pub(super) fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "ConflictError", message)
    }

    /// 413.
    pub(super) fn too_large(limit: usize) -> Self {
        let message = format!("the request's body is over the limit of {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "RequestTooLargeError", message)
    }

    /// 415.
    pub(super) fn media_type(found: &str) -> Self {
        let message = format!("content type '{found}' is not understood: send 'application/json'");
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "UnsupportedMediaTypeError", message)
    }

    /// 500.
    pub(super) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError", message)
    }

    /// The engine stopped under a request: 500 with what failed, or 503 if it was told to stop.
    pub(super) fn stopped(failure: Option<String>) -> Self {
        match failure {
            Some(why) => Self::internal(format!("the engine has stopped: {why}")),
            None => Self::unavailable("the engine stopped before the output was complete"),
        }
    }

    /// 503: not now.
    pub(super) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailableError", message)
    }
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl ApiError {
    /// The body that tells of it.
    pub(super) fn body(&self) -> serde_json::Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.status.as_u16(),
        }})
    }
}

impl ApiError {
    /// A request that the engine does not take; `failure` is the engine's.
    pub(super) fn refused(
        error: SubmitError,
        Names { prompt, adapter }: Names,
        failure: Option<String>,
    ) -> Self {
        let message = error.to_string();
        match error {
            _ if error.is_overload() => Self::unavailable(message),
            SubmitError::Refused(EventError::UnknownAdapter(_)) => Self::not_found(Some(adapter), message),
            SubmitError::Refused(EventError::AdapterFailed(_)) => Self::internal(message),
            SubmitError::Refused(EventError::TooLong { tokens, max_model_len }) => Self::bad(
                prompt,
                format!(
                    "{prompt} and max_tokens together are {tokens} tokens and the model takes {max_model_len}: \
                     shorten the {prompt} or lower max_tokens"
                ),
            ),
            SubmitError::Refused(_) | SubmitError::NoSuchToken { .. } => Self::bad(prompt, message),
            SubmitError::NoLogits => Self::bad("logprobs", message),
            SubmitError::Draining | SubmitError::Stopped(_) => Self::stopped(failure),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_failed_is_500_and_one_that_was_stopped_is_503() {
        let names = Names { prompt: "prompt", adapter: "model" };
        for (failure, status) in [(Some("the device is broken".to_owned()), 500), (None, 503)] {
            let stopped = SubmitError::Stopped("why".into());
            for error in
                [ApiError::stopped(failure.clone()), ApiError::refused(stopped, names, failure.clone())]
            {
                assert!(failure.as_ref().is_none_or(|why| error.message.ends_with(why)), "{error}");
                let response = error.into_response();
                assert_eq!(response.status(), status);
                assert_eq!(response.headers().contains_key(header::RETRY_AFTER), status == 503);
            }
        }
    }
}
