//! The stand-in's OpenAI-compatible side.

use std::convert::Infallible;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

use super::mock::Server;

/// How it behaves.
#[derive(Clone, Debug)]
pub struct OpenAi {
    /// Names of adapters that it lists and takes.
    pub adapters: Vec<String>,
    /// A first chunk without text comes at once, before the delay.
    pub empty_first: bool,
    /// It counts tokens where it is asked to.
    pub usage: bool,
    /// What comes instead of the rest after the first token.
    pub instead: Instead,
}

/// What comes instead of the rest of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instead {
    /// The rest.
    Nothing,
    /// An error and the end mark.
    Error,
    /// The end of the connection.
    End,
    /// Something that is no JSON.
    Garbage,
    /// Not even the first token: all chunks are empty.
    NoText,
    /// One JSON answer, as if no stream had been asked for.
    Whole,
}

impl Default for OpenAi {
    fn default() -> Self {
        Self {
            adapters: (0..128).map(|n| format!("lora-{n}")).collect(),
            empty_first: false,
            usage: true,
            instead: Instead::Nothing,
        }
    }
}

pub(super) async fn models(State(shared): Server) -> Json<Value> {
    let model = |id: &str, parent: Option<&str>| json!({"id": id, "object": "model", "created": 1, "owned_by": "me", "root": id, "parent": parent});
    let adapters = shared.behaviour.openai.adapters.iter().map(|a| model(a, Some("stand-in")));
    let data: Vec<Value> = std::iter::once(model("stand-in", None)).chain(adapters).collect();
    Json(json!({"object": "list", "data": data}))
}

fn chunk(text: &str, reason: Option<&str>) -> Value {
    json!({"id": "c", "object": "text_completion", "created": 1, "model": "m",
           "choices": [{"index": 0, "text": text, "logprobs": null, "finish_reason": reason}]})
}

fn event(data: &impl std::fmt::Display) -> String {
    format!("data: {data}\n\n")
}

/// The events of a stream of `tokens` tokens: those before the first one, and the others.
fn events(how: &OpenAi, tokens: u64, body: &Value) -> (String, Vec<String>) {
    let before = if how.empty_first { event(&chunk("", None)) } else { String::new() };
    let done = event(&"[DONE]");
    let first = event(&chunk(" w", (tokens == 1).then_some("length")));
    let rest = match how.instead {
        Instead::Error => {
            vec![first, event(&json!({"error": {"message": "out of luck", "code": 500}})), done]
        }
        Instead::End => vec![first],
        Instead::Garbage => vec![first, event(&"{oops")],
        Instead::NoText => vec![event(&chunk("", Some("length"))), done],
        Instead::Nothing | Instead::Whole => {
            let mut rest = vec![first];
            rest.extend((2..=tokens).map(|n| event(&chunk(" w", (n == tokens).then_some("length")))));
            if how.usage && body["stream_options"]["include_usage"] == true {
                let usage =
                    json!({"prompt_tokens": 300, "completion_tokens": tokens, "total_tokens": 300 + tokens});
                rest.push(event(&json!({"object": "text_completion", "choices": [], "usage": usage})));
            }
            rest.push(done);
            rest
        }
    };
    (before, rest)
}

pub(super) async fn completions(
    State(shared): Server,
    headers: HeaderMap,
    Json(body): Json<Value>,
) -> Response {
    let behaviour = shared.behaviour.clone();
    let key = headers.get("authorization").and_then(|v| v.to_str().ok()).map(str::to_owned);
    shared.saw(&body, key);
    let refuse = |status: axum::http::StatusCode, message: String| {
        (status, Json(json!({"error": {"message": message, "code": status.as_u16()}}))).into_response()
    };
    if let Some(status) = behaviour.refuse {
        return refuse(status, "not today".to_owned());
    }
    let model = body["model"].as_str().unwrap_or_default().to_owned();
    let how = behaviour.openai;
    if model != "stand-in" && !how.adapters.contains(&model) {
        return refuse(axum::http::StatusCode::NOT_FOUND, format!("the model `{model}` does not exist"));
    }
    if how.instead == Instead::Whole {
        return Json(json!({"object": "text_completion", "choices": [{"text": " w"}]})).into_response();
    }
    let tokens = body["max_tokens"].as_u64().unwrap_or(16);
    let (before, rest) = events(&how, tokens, &body);
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Bytes, Infallible>>(64);
    tokio::spawn(async move {
        if !before.is_empty() && sender.send(Ok(before.into())).await.is_err() {
            return;
        }
        tokio::time::sleep(behaviour.delay).await;
        for event in rest {
            // Two pieces, so that events cross the edges of chunks.
            let mut bytes = event.into_bytes();
            let tail = bytes.split_off(bytes.len() / 2);
            for piece in [bytes, tail] {
                if sender.send(Ok(piece.into())).await.is_err() {
                    return;
                }
            }
        }
    });
    let stream = Body::from_stream(tokio_stream::wrappers::ReceiverStream::new(receiver));
    ([("content-type", "text/event-stream; charset=utf-8")], stream).into_response()
}
