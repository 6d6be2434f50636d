//! `POST /generate`.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::extract::{Request, State as Shared};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt};
use lora_sched::AdapterId;

use super::error::ApiError;
use super::frames::{Frames, Summary};
use super::intake::{Ask, Intake, Names, Prompt, none_empty, tokenize};
use super::params::GenerateBody;
use super::sequences::{Piece, Sequences};
use super::state::State;
use crate::engine::Engine;

pub(super) async fn generate(
    Shared(state): Shared<Arc<State>>,
    request: Request,
) -> Result<Response, ApiError> {
    let intake = Intake::read(&state, request).await?;
    let (engine, _) = intake.engine()?;
    let GenerateBody { prompt, model_id, stream, n, params } = GenerateBody::parse(&intake.body)?;
    let adapter = adapter(model_id, engine)?;
    let names = Names { prompt: "prompt", adapter: "model_id" };
    intake.takes(1, n, names)?;
    let prompts =
        tokenize(vec![Prompt::Text { text: prompt.clone(), special: true }], engine, "prompt").await?;
    none_empty(&prompts, "prompt")?;
    let sequences = intake.submit(Ask { prompts, n, adapter, params, names }).await?;
    let output = Output {
        frames: Frames::new(&prompt, sequences.len()),
        model_id,
        finish_reasons: vec![""; sequences.len()],
        sequences,
        broken: None,
    };
    if stream {
        let mut response = Body::from_stream(Messages(output).fuse()).into_response();
        let json = HeaderValue::from_static("application/octet-stream");
        response.headers_mut().insert(header::CONTENT_TYPE, json);
        return Ok(response);
    }
    output.whole().await
}

fn adapter(model_id: Option<i64>, engine: &Engine) -> Result<Option<AdapterId>, ApiError> {
    let Some(id) = model_id else { return Ok(None) };
    let found = u32::try_from(id).ok().map(AdapterId).filter(|&n| engine.has_adapter(n));
    let missing = || format!("there is no adapter {id}: GET /adapters lists those that are there");
    found.map(Some).ok_or_else(|| ApiError::not_found(Some("model_id"), missing()))
}

/// The request's sequences and what of them has been told.
struct Output {
    sequences: Sequences,
    frames: Frames,
    model_id: Option<i64>,
    /// One for each sequence.
    finish_reasons: Vec<&'static str>,
    /// Why it ends before its end.
    broken: Option<ApiError>,
}

impl Output {
    fn take(&mut self, piece: Piece) {
        self.frames.push(piece.choice, &piece.text);
        if let Some(parts) = self.sequences.parts() {
            self.frames.set_ttft(parts.total());
        }
        if let Some(finish) = piece.finish {
            self.finish_reasons[piece.choice] = finish.as_str();
        }
        self.broken = self.broken.take().or(piece.broken);
    }

    fn summary(&self) -> Summary {
        let timing = self.sequences.timing();
        Summary {
            model_id: self.model_id,
            completion_s: timing.total_s,
            parts: timing.parts,
            prompt_tokens: self.sequences.prompt_tokens(),
            output_tokens: timing.output_tokens,
            finish_reasons: self.finish_reasons.clone(),
        }
    }

    async fn whole(mut self) -> Result<Response, ApiError> {
        while let Some(piece) = self.sequences.next().await {
            self.take(piece);
        }
        if let Some(error) = self.broken {
            return Err(error);
        }
        let mut response = self.frames.whole(&self.summary()).into_response();
        let json = HeaderValue::from_static("application/json");
        response.headers_mut().insert(header::CONTENT_TYPE, json);
        Ok(response)
    }
}

/// The messages of a streamed answer. What breaks an output off breaks the stream off: a client must not take what
/// it has for the whole.
struct Messages(Output);

impl Stream for Messages {
    type Item = std::io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let out = &mut self.0;
        if out.broken.is_some() {
            return Poll::Ready(None);
        }
        match out.sequences.poll_next(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Ready(Some(piece)) => {
                out.take(piece);
                if let Some(error) = &out.broken {
                    return Poll::Ready(Some(Err(std::io::Error::other(error.to_string()))));
                }
                let last = (out.sequences.open() == 0).then(|| out.summary());
                Poll::Ready(Some(Ok(out.frames.message(last.as_ref()).into())))
            }
        }
    }
}
