//! `POST /generate`.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State as Shared};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt};
use lora_sched::{AdapterId, Nanos};

use super::body;
use super::error::ApiError;
use super::frames::{Frames, Summary};
use super::params::GenerateBody;
use super::state::{InFlight, State};
use crate::engine::clock::Clock;
use crate::engine::{Delta, Engine, Finish, GenerateHandle, GenerateRequest};
use crate::report::record::PartsS;

/// When a request's head had been read; put there by the listener.
#[derive(Clone, Copy, Debug)]
pub(super) struct Received(pub(super) Instant);

/// Prompts of at least this many bytes are tokenised on a blocking thread: under a tenth of a
/// millisecond of work is not worth the two hand-overs.
const INLINE_BYTES: usize = 1024;

pub(super) async fn generate(
    Shared(state): Shared<Arc<State>>,
    request: Request,
) -> Result<Response, ApiError> {
    let received = request.extensions().get::<Received>().map_or_else(Instant::now, |r| r.0);
    let guard = InFlight::new(&state);
    let (engine, _) = state.serving()?;
    body::expect_json(request.headers())?;
    let bytes = body::read(request.into_body()).await?;
    let body = GenerateBody::parse(&bytes)?;
    let adapter = adapter(&body, engine)?;
    let (body, prompt) = tokenize(body, engine).await?;
    let prompt_tokens = prompt.len();

    let clock = engine.clock();
    let received = clock.at(received);
    let mut handles = Vec::with_capacity(body.n);
    for i in 0..body.n {
        let mut params = body.params.clone();
        // Sequences of one request differ in their random streams alone.
        params.seed = params.seed.map(|s| s.wrapping_add(i as u64));
        let prompt = prompt.clone();
        handles.push(engine.submit(GenerateRequest { prompt, adapter, params, received: Some(received) })?);
    }
    for handle in &mut handles {
        handle.admitted().await?;
    }

    let output = Output {
        frames: Frames::new(&body.prompt, handles.len()),
        summary: Summary {
            model_id: body.model_id,
            completion_s: 0.0,
            parts: None,
            prompt_tokens,
            output_tokens: 0,
            finish_reasons: vec![""; handles.len()],
        },
        open: handles.len(),
        turn: 0,
        handles,
        aborted: false,
        failure: None,
        received,
        clock,
        _guard: guard,
    };
    if body.stream {
        let mut response = Body::from_stream(output.messages()).into_response();
        let json = HeaderValue::from_static("application/octet-stream");
        response.headers_mut().insert(header::CONTENT_TYPE, json);
        return Ok(response);
    }
    output.whole().await
}

fn adapter(body: &GenerateBody, engine: &Engine) -> Result<Option<AdapterId>, ApiError> {
    let Some(id) = body.model_id else { return Ok(None) };
    let found = u32::try_from(id).ok().map(AdapterId).filter(|&n| engine.has_adapter(n));
    let missing = || format!("there is no adapter {id}: GET /adapters lists those that are there");
    found.map(Some).ok_or_else(|| ApiError::not_found(Some("model_id"), missing()))
}

/// The prompt's ids.
async fn tokenize(body: GenerateBody, engine: &Arc<Engine>) -> Result<(GenerateBody, Vec<u32>), ApiError> {
    let encode = |body: GenerateBody, engine: &Engine| match engine.tokenizer().encode(&body.prompt) {
        Ok(ids) => Ok((body, ids)),
        Err(e) => Err(ApiError::bad("prompt", e.to_string())),
    };
    let (body, ids) = if body.prompt.len() < INLINE_BYTES {
        encode(body, engine)?
    } else {
        let engine = engine.clone();
        tokio::task::spawn_blocking(move || encode(body, &engine))
            .await
            .map_err(|e| ApiError::internal(format!("tokenising failed: {e}")))??
    };
    if ids.is_empty() {
        return Err(ApiError::bad("prompt", "prompt has no tokens"));
    }
    Ok((body, ids))
}

/// The sequences of one request on their way to the client. Dropping it cancels what is not at its end.
struct Output {
    handles: Vec<GenerateHandle>,
    frames: Frames,
    summary: Summary,
    /// Sequences that are not at their end.
    open: usize,
    /// Which sequence is asked first, so that none waits for the others.
    turn: usize,
    aborted: bool,
    /// What was wrong with the adapter, if the output ends for that.
    failure: Option<String>,
    received: Nanos,
    clock: Clock,
    _guard: InFlight,
}

impl Output {
    /// The next piece of any sequence.
    fn poll_delta(&mut self, cx: &mut Context<'_>) -> Poll<Option<()>> {
        if self.open == 0 {
            return Poll::Ready(None);
        }
        let n = self.handles.len();
        for k in 0..n {
            let i = (self.turn + k) % n;
            if let Poll::Ready(Some(delta)) = self.handles[i].poll_next(cx) {
                self.turn = (i + 1) % n;
                self.take(i, &delta);
                return Poll::Ready(Some(()));
            }
        }
        Poll::Pending
    }

    fn take(&mut self, i: usize, delta: &Delta) {
        self.frames.push(i, &delta.text);
        self.summary.output_tokens += usize::from(delta.token.is_some());
        if let Some(first) = delta.first
            && self.summary.parts.is_none()
        {
            let parts: PartsS = first.parts_until(self.clock.now());
            self.frames.set_ttft(parts.total());
            self.summary.parts = Some(parts);
        }
        if let Some(finish) = delta.finish {
            self.open -= 1;
            self.summary.finish_reasons[i] = finish.as_str();
            self.aborted |= finish == Finish::Abort;
            self.failure = self.failure.take().or_else(|| delta.failure.clone());
        }
        if self.open == 0 {
            self.summary.completion_s = (self.clock.now() - self.received) as f64 * 1e-9;
        }
    }

    /// The messages of a streamed answer. An engine that stops breaks the stream off: a client must not
    /// take what it has for the whole.
    fn messages(self) -> impl Stream<Item = std::io::Result<Bytes>> {
        Messages(self).fuse()
    }

    async fn whole(mut self) -> Result<Response, ApiError> {
        while std::future::poll_fn(|cx| self.poll_delta(cx)).await.is_some() {}
        if let Some(why) = self.failure {
            return Err(ApiError::internal(why));
        }
        if self.aborted {
            return Err(ApiError::unavailable("the engine stopped before the output was complete"));
        }
        let mut response = self.frames.whole(&self.summary).into_response();
        let json = HeaderValue::from_static("application/json");
        response.headers_mut().insert(header::CONTENT_TYPE, json);
        Ok(response)
    }
}

struct Messages(Output);

impl Stream for Messages {
    type Item = std::io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.0.poll_delta(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Ready(Some(())) if self.0.aborted => {
                self.0.open = 0;
                let why = self.0.failure.take().unwrap_or_else(|| "the engine stopped".into());
                Poll::Ready(Some(Err(std::io::Error::other(why))))
            }
            Poll::Ready(Some(())) => {
                let last = (self.0.open == 0).then_some(&self.0.summary);
                Poll::Ready(Some(Ok(self.0.frames.message(last).into())))
            }
        }
    }
}
