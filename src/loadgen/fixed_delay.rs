//! A server that does nothing but wait: what a client measures of it beyond that wait is the client's
//! own error.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use axum::serve::ListenerExt as _;
use futures_util::stream;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::openai;
use super::prepare::Interface;

/// Bodies longer than this are refused.
const MOST_BODY: usize = 16 << 20;
/// Output tokens of a request, at most.
const MOST_TOKENS: u32 = 1 << 16;

/// A running server with one thread of its own. Dropping it stops it.
#[derive(Debug)]
pub struct FixedDelay {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl FixedDelay {
    /// Serves `POST /v1/completions` and `POST /generate` on a free port of 127.0.0.1. The first token
    /// of a stream leaves once `delay` has passed since the request's head came, and carries the time
    /// that really passed by this server's clock; the others follow at once.
    ///
    /// # Errors
    /// If no port or no thread can be had.
    pub fn start(delay: Duration) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel();
        let (started, ready) = mpsc::channel();
        let thread = std::thread::Builder::new().name("fixed-delay".to_owned()).spawn(move || {
            runtime.block_on(async move {
                let app = Router::new()
                    .route(Interface::Completions.path(), post(completions))
                    .route(Interface::Generate.path(), post(generate))
                    .with_state(delay);
                let listener = match tokio::net::TcpListener::from_std(listener) {
                    Ok(listener) => listener,
                    Err(e) => return tracing::error!("the fixed-delay server cannot listen: {e}"),
                };
                let listener = listener.tap_io(|stream| {
                    // Where it cannot be set, small pieces wait for acknowledgements: that would show.
                    let _ = stream.set_nodelay(true);
                });
                let _ = started.send(());
                tokio::select! {
                    _ = axum::serve(listener, app) => {}
                    _ = stopped => {}
                }
            });
            // Connections go down with the runtime.
            runtime.shutdown_background();
        })?;
        // An error would mean that the thread has ended already; requests will tell.
        let _ = ready.recv();
        Ok(Self { address, stop: Some(stop), thread: Some(thread) })
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for FixedDelay {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What is read of a body.
#[derive(Deserialize)]
struct Asked {
    #[serde(default = "default_tokens")]
    max_tokens: u32,
}

fn default_tokens() -> u32 {
    16
}

async fn completions(State(delay): State<Duration>, request: Request) -> Response {
    answer(request, delay, Interface::Completions).await
}

async fn generate(State(delay): State<Duration>, request: Request) -> Response {
    answer(request, delay, Interface::Generate).await
}

async fn answer(request: Request, delay: Duration, interface: Interface) -> Response {
    let came = Instant::now();
    let refuse = |message: String| {
        let body =
            json!({"error": {"message": message, "type": "BadRequestError", "param": null, "code": 400}});
        (axum::http::StatusCode::BAD_REQUEST, axum::Json(body)).into_response()
    };
    let body = match to_bytes(request.into_body(), MOST_BODY).await {
        Ok(body) => body,
        Err(e) => return refuse(e.to_string()),
    };
    let tokens = match serde_json::from_slice::<Asked>(&body) {
        Ok(asked) => asked.max_tokens.clamp(1, MOST_TOKENS),
        Err(e) => return refuse(e.to_string()),
    };
    let pieces = stream::unfold(0, move |n| async move {
        if n > tokens {
            return None;
        }
        let mut waited = None;
        if n == 0 {
            tokio::time::sleep_until((came + delay).into()).await;
            waited = Some(came.elapsed());
        }
        let piece = match interface {
            Interface::Generate => object(n, tokens, waited)?,
            Interface::Completions => event(n, tokens, waited),
        };
        Some((Ok::<_, Infallible>(Bytes::from(piece)), n + 1))
    });
    let kind = match interface {
        Interface::Generate => "application/octet-stream",
        Interface::Completions => "text/event-stream",
    };
    ([(CONTENT_TYPE, kind)], Body::from_stream(pieces)).into_response()
}

/// Token `n`'s event, with the wait by the server's clock; after the last one the end mark.
fn event(n: u32, tokens: u32, waited: Option<Duration>) -> String {
    if n == tokens {
        let usage = json!({"choices": [], "usage": {"completion_tokens": tokens}});
        return format!("data: {usage}\n\ndata: {}\n\n", openai::DONE);
    }
    let reason = if n + 1 == tokens { json!("length") } else { Value::Null };
    let mut chunk = json!({"object": "text_completion", "choices": [{"index": 0, "text": " w", "finish_reason": reason}]});
    if let Some(waited) = waited {
        chunk["metrics"] = json!({"time_to_first_token_ms": waited.as_secs_f64() * 1e3});
    }
    format!("data: {chunk}\n\n")
}

/// Token `n`'s object; none after the last one.
fn object(n: u32, tokens: u32, waited: Option<Duration>) -> Option<String> {
    if n == tokens {
        return None;
    }
    let mut message = json!({"text": [" w"], "finished": n + 1 == tokens});
    // The client keeps the last one that it was told.
    if let Some(waited) = waited {
        message["ttft"] = json!(waited.as_secs_f64());
    }
    Some(format!("{message}\0"))
}
