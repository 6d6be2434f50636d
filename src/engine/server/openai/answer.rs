//! What an answer looks like, whole or in events.

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::Serialize;
use serde_json::{Value, json};

use super::logprobs::Untold;
use super::request::Shape;
use super::stream::Events;
use crate::engine::Finish;
use crate::engine::server::error::ApiError;
use crate::engine::server::sequences::{Piece, Sequences, Timing};
use crate::engine::server::state::unix_seconds;

/// Which of the two endpoints answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Completion,
    Chat,
}

/// What an answer's parts have in common.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) kind: Kind,
    id: String,
    created: u64,
    model: String,
    pub(super) shape: Shape,
}

/// Tokens in and out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

impl Usage {
    pub(super) fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        Self { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens }
    }

    pub(super) fn of(sequences: &Sequences) -> Self {
        Self::new(sequences.prompt_tokens(), sequences.timing().output_tokens)
    }
}

/// One event.
#[derive(Serialize)]
struct Event<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [Choice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metrics: Option<Value>,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    #[serde(flatten)]
    said: Said<'a>,
    logprobs: Value,
    finish_reason: Option<&'static str>,
}

/// A piece of text, under the endpoint's name for it.
#[derive(Serialize)]
#[serde(untagged)]
enum Said<'a> {
    Text { text: &'a str },
    Delta { delta: Delta<'a> },
}

#[derive(Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    content: &'a str,
}

impl Answer {
    /// `request_id` becomes a part of its id.
    pub(super) fn new(kind: Kind, request_id: &str, model: String, shape: Shape) -> Self {
        let prefix = match kind {
            Kind::Completion => "cmpl",
            Kind::Chat => "chatcmpl",
        };
        Self { kind, id: format!("{prefix}-{request_id}"), created: unix_seconds(), model, shape }
    }

    /// Answers as the client wants it.
    pub(super) async fn respond(self, sequences: Sequences) -> Result<Response, ApiError> {
        if !self.shape.stream {
            return self.whole(sequences).await;
        }
        let mut response = Body::from_stream(Events::new(self, sequences)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        // Proxies that gather events before they pass them on make a stream pointless.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        Ok(response)
    }

    /// An event with a piece of a sequence's text. The `first` of a chat says whose turn it is, too: an
    /// event for that alone would be taken for the first token.
    pub(super) fn piece(&self, piece: &Piece, first: bool, logprobs: Value, usage: Option<Usage>) -> Bytes {
        let text = piece.text.as_str();
        let said = match self.kind {
            Kind::Completion => Said::Text { text },
            Kind::Chat => Said::Delta { delta: Delta { role: first.then_some("assistant"), content: text } },
        };
        let finish_reason = piece.finish.map(Finish::as_str);
        self.event(&[Choice { index: piece.choice, said, logprobs, finish_reason }], usage, None)
    }

    /// What an answer says of a sequence's log-probabilities that have gathered: null if nobody asked.
    pub(super) fn logprobs(&self, untold: &mut Untold, sequences: &Sequences) -> Value {
        if !self.shape.logprobs {
            return Value::Null;
        }
        untold.tell(self.kind, |token| sequences.text_of(token))
    }

    /// The event after the last piece.
    pub(super) fn tail(&self, sequences: &Sequences) -> Bytes {
        let usage = self.shape.include_usage.then(|| Usage::of(sequences));
        self.event(&[], usage, self.shape.metrics.then(|| metrics(&sequences.timing())))
    }

    fn event(&self, choices: &[Choice<'_>], usage: Option<Usage>, metrics: Option<Value>) -> Bytes {
        let object = match self.kind {
            Kind::Completion => "text_completion",
            Kind::Chat => "chat.completion.chunk",
        };
        let (id, model) = (&self.id, &self.model);
        let event = Event { id, object, created: self.created, model, choices, usage, metrics };
        let mut written = b"data: ".to_vec();
        // Strings and numbers, into memory: nothing that could fail.
        let _ = serde_json::to_writer(&mut written, &event);
        written.extend_from_slice(b"\n\n");
        written.into()
    }

    async fn whole(self, mut sequences: Sequences) -> Result<Response, ApiError> {
        let mut texts = vec![String::new(); sequences.len()];
        let mut reasons = vec![""; sequences.len()];
        let mut untold: Vec<Untold> = (0..sequences.len()).map(|_| Untold::default()).collect();
        while let Some(piece) = sequences.next().await {
            texts[piece.choice].push_str(&piece.text);
            untold[piece.choice].push(piece.logprobs);
            if let Some(error) = piece.broken {
                return Err(error);
            }
            if let Some(finish) = piece.finish {
                reasons[piece.choice] = finish.as_str();
            }
        }
        let choice = |(index, (text, reason)): (usize, (String, &str))| {
            let logprobs = self.logprobs(&mut untold[index], &sequences);
            match self.kind {
                Kind::Completion => {
                    json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})
                }
                Kind::Chat => json!({
                    "index": index,
                    "message": {"role": "assistant", "content": text},
                    "logprobs": logprobs,
                    "finish_reason": reason,
                }),
            }
        };
        let choices: Vec<Value> = texts.into_iter().zip(reasons).enumerate().map(choice).collect();
        let mut answer = json!({
            "id": self.id,
            "object": match self.kind {
                Kind::Completion => "text_completion",
                Kind::Chat => "chat.completion",
            },
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": Usage::of(&sequences),
        });
        if self.shape.metrics {
            answer["metrics"] = metrics(&sequences.timing());
        }
        Ok(axum::Json(answer).into_response())
    }
}

/// Where a request's time went, in milliseconds.
fn metrics(timing: &Timing) -> Value {
    let ms = |s: f64| s * 1e3;
    let p = timing.parts.unwrap_or_default();
    json!({
        "time_to_first_token_ms": timing.parts.map(|p| ms(p.total())),
        "front_time_ms": ms(p.front),
        "queue_time_ms": ms(p.queue),
        "kv_time_ms": ms(p.kv),
        "slot_time_ms": ms(p.slot),
        "swap_time_ms": ms(p.swap),
        "prefill_time_ms": ms(p.prefill),
        "deliver_time_ms": ms(p.deliver),
        "generation_time_ms": ms(timing.decode_s),
        "total_time_ms": ms(timing.total_s),
        "mean_itl_ms": timing.mean_inter_token_s.map(ms),
    })
}
