//! One request: sent, its stream read, its record made.

use std::sync::atomic::Ordering;

use eventsource_stream::{EventStreamError, Eventsource as _};
use futures_util::StreamExt as _;
use reqwest::Response;
use reqwest::header::CONTENT_TYPE;

use super::endpoint::refusal;
use super::fault::Fault;
use super::openai;
use super::piece::Piece;
use super::prepare::{Interface, PreparedRequest};
use super::run::Shared;
use super::stream::{Message, Messages};
use crate::report::record::{PartsS, RequestRecord, Status};

/// What became of a request.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) record: RequestRecord,
    /// None if it ended well.
    pub(super) fault: Option<Fault>,
    /// When each message with text came.
    pub(super) token_times: Vec<f64>,
}

/// A record of a request of which nothing has come yet.
pub(super) fn blank(request: &PreparedRequest, sent_s: f64) -> RequestRecord {
    RequestRecord {
        id: request.id,
        adapter: request.adapter,
        rank: request.rank,
        prompt_tokens: request.prompt_tokens,
        output_tokens: 0,
        scheduled_s: request.scheduled_s,
        sent_s,
        first_s: None,
        last_s: None,
        ttft_s: None,
        latency_s: None,
        status: Status::Error,
        parts: None,
        error: None,
    }
}

/// What has come of a stream.
#[derive(Default)]
struct Seen {
    first_byte_s: Option<f64>,
    last_s: Option<f64>,
    /// The last word on whether the output is whole.
    finished: Option<bool>,
    ttft: Option<f64>,
    parts: Option<PartsS>,
    prompt_tokens: Option<u32>,
    output_tokens: Option<u32>,
    error: Option<String>,
    token_times: Vec<f64>,
}

impl Seen {
    fn bytes(&mut self, now_s: f64) {
        self.first_byte_s.get_or_insert(now_s);
        self.last_s = Some(now_s);
    }

    fn take(&mut self, piece: Piece, now_s: f64) {
        if piece.token {
            self.token_times.push(now_s);
        }
        self.finished = piece.finished.or(self.finished);
        self.ttft = piece.ttft.or(self.ttft);
        self.parts = piece.parts.or(self.parts);
        self.prompt_tokens = piece.prompt_tokens.or(self.prompt_tokens);
        self.output_tokens = piece.output_tokens.or(self.output_tokens);
        self.error = self.error.take().or(piece.error);
    }
}

/// Sends one request and reads its answer to the end, the time-out or the run's stop.
pub(super) async fn send(shared: &Shared, request: &PreparedRequest) -> Sent {
    let sent_s = shared.now_s();
    let mut seen = Seen::default();
    let ended = tokio::select! {
        ended = tokio::time::timeout(shared.timeout, receive(shared, request, &mut seen)) => {
            ended.unwrap_or_else(|_| Err(Fault::Timeout(shared.timeout.as_secs_f64().to_string())))
        }
        () = shared.stop.cancelled() => Err(Fault::Interrupted),
    };
    let mut record = blank(request, sent_s);
    let first_token_s = seen.token_times.first().copied();
    record.first_s = match request.interface {
        Interface::Generate => first_token_s.or(seen.first_byte_s),
        // Bytes without text are no token: a role, or an empty first chunk.
        Interface::Completions => first_token_s,
    };
    record.parts = seen.parts;
    // A server that does not tell its TTFT gets the client's, as in the reference.
    record.ttft_s = seen.ttft.or_else(|| Some(record.first_s? - sent_s));
    let fault = ended.err();
    match &fault {
        None => {
            record.status = Status::Ok;
            record.prompt_tokens = seen.prompt_tokens.unwrap_or(request.prompt_tokens);
            record.output_tokens = seen.output_tokens.unwrap_or(match request.interface {
                Interface::Generate => request.max_tokens,
                // Without usage: one token a message, as public clients count.
                Interface::Completions => seen.token_times.len() as u32,
            });
            record.last_s = seen.last_s;
            record.latency_s = seen.last_s.map(|last| last - sent_s);
        }
        Some(fault) => {
            if matches!(fault, Fault::Timeout(_)) {
                record.status = Status::Timeout;
            }
            record.error = Some(fault.to_string());
        }
    }
    Sent { record, fault, token_times: seen.token_times }
}

async fn receive(shared: &Shared, request: &PreparedRequest, seen: &mut Seen) -> Result<(), Fault> {
    let response = shared.endpoint.post(request.interface.path(), request.body.clone()).send().await;
    let response = response.map_err(|e| {
        let fault = Fault::from(e);
        if matches!(fault, Fault::Connect(_)) {
            shared.refused_in_a_row.fetch_add(1, Ordering::Relaxed);
        }
        fault
    })?;
    shared.refused_in_a_row.store(0, Ordering::Relaxed);
    let status = response.status();
    if !status.is_success() {
        let body = response.bytes().await.unwrap_or_default();
        return Err(Fault::Http { status: status.as_u16(), message: refusal(&body) });
    }
    match request.interface {
        Interface::Generate => objects(shared, response, seen).await?,
        Interface::Completions => events(shared, response, seen).await?,
    }
    if let Some(error) = seen.error.take() {
        return Err(Fault::MidStream(error));
    }
    let nothing = match request.interface {
        Interface::Generate => seen.first_byte_s.is_none(),
        Interface::Completions => seen.token_times.is_empty(),
    };
    if seen.finished == Some(false) {
        Err(Fault::Cut)
    } else if nothing {
        Err(Fault::Empty)
    } else {
        Ok(())
    }
}

/// Objects that end in NUL.
async fn objects(shared: &Shared, mut response: Response, seen: &mut Seen) -> Result<(), Fault> {
    let mut messages = Messages::default();
    loop {
        let chunk = response.chunk().await?;
        let now_s = shared.now_s();
        let each = |message: Message| seen.take(message.into(), now_s);
        let Some(chunk) = chunk else {
            return messages
                .finish(each)
                .map_err(|e| Fault::Shape(format!("the stream ended within a message: {e}")));
        };
        messages.push(&chunk, each).map_err(|e| Fault::Shape(e.to_string()))?;
        seen.bytes(now_s);
    }
}

/// Server-sent events.
async fn events(shared: &Shared, response: Response, seen: &mut Seen) -> Result<(), Fault> {
    let kind =
        response.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("no content-type");
    if !kind.starts_with("text/event-stream") {
        return Err(Fault::Shape(format!("{kind}, not text/event-stream")));
    }
    // Until a finish reason or the end mark says otherwise.
    seen.finished = Some(false);
    let mut events = response.bytes_stream().eventsource();
    while let Some(event) = events.next().await {
        let now_s = shared.now_s();
        let event = event.map_err(|e| match e {
            EventStreamError::Transport(e) => Fault::from(e),
            EventStreamError::Utf8(e) => Fault::Shape(e.to_string()),
            EventStreamError::Parser(e) => Fault::Shape(e.to_string()),
        })?;
        seen.bytes(now_s);
        if event.data == openai::DONE {
            seen.finished = Some(true);
            continue;
        }
        let piece = openai::read(&event.data).map_err(|e| Fault::Shape(format!("{e} in an event's data")))?;
        seen.take(piece, now_s);
    }
    Ok(())
}
