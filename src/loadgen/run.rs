//! One run: every request at its time, whatever became of the others.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::endpoint::{Endpoint, describe, refusal};
use super::lag::Lag;
use super::prepare::PreparedRequest;
use super::stream::{Message, Messages};
use crate::report::record::{RequestRecord, Status};

/// After this many connections refused in a row the server is gone and nothing more is sent.
const GONE_AFTER: u32 = 20;
/// From the call to the run's start, for threads to be there.
const LEAD: Duration = Duration::from_millis(20);
/// The sender wakes this often to see whether it should stop.
const NAP: Duration = Duration::from_millis(50);

/// How to run.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// From sending to the last byte, at most.
    pub timeout: Duration,
    /// Ends the run early: nothing more is sent and requests in flight are dropped.
    pub stop: CancellationToken,
}

impl Default for LoadOptions {
    /// The reference's 120 s.
    fn default() -> Self {
        Self { timeout: Duration::from_secs(120), stop: CancellationToken::new() }
    }
}

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Requests that have ended, well or not.
    pub ended: usize,
    /// All of them.
    pub total: usize,
}

/// What a run gave.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadOutcome {
    /// One a request, in the order of the requests; those that were never sent are errors.
    pub records: Vec<RequestRecord>,
    /// How late the client was, over the requests sent.
    pub lag: Lag,
    /// From the run's start to its last byte.
    pub wall_s: f64,
    /// Why the run ended early, if it did.
    pub cut_short: Option<String>,
}

/// Sends every request at its time and waits for all of them. Records' times are seconds from the
/// run's start.
pub async fn run_load(
    endpoint: &Endpoint,
    requests: &[PreparedRequest],
    options: &LoadOptions,
    mut progress: impl FnMut(Progress),
) -> LoadOutcome {
    let start = Instant::now() + LEAD;
    let (sender, mut ended) = mpsc::unbounded_channel();
    let shared = Arc::new(Shared {
        endpoint: endpoint.clone(),
        start,
        timeout: options.timeout,
        stop: options.stop.child_token(),
        refused_in_a_row: AtomicU32::new(0),
    });
    let dispatcher = {
        let shared = Arc::clone(&shared);
        let runtime = tokio::runtime::Handle::current();
        let requests = requests.to_vec();
        // A thread of its own: the kernel wakes it within some 0.1 ms of the time, tokio's timers
        // tick in milliseconds.
        std::thread::spawn(move || dispatch(&shared, &runtime, requests, &sender))
    };

    let mut slots: Vec<Option<RequestRecord>> = vec![None; requests.len()];
    let mut count = 0;
    while let Some((index, record)) = ended.recv().await {
        slots[index] = Some(record);
        count += 1;
        progress(Progress { ended: count, total: requests.len() });
    }
    // It has dropped its end of the channel, so it is done.
    let sent_all = dispatcher.join().is_ok();
    let wall_s = start.elapsed().as_secs_f64();

    let cut_short = if options.stop.is_cancelled() {
        Some("the run was interrupted".to_owned())
    } else if shared.gone() {
        Some(format!("the server at {} went away during the run", endpoint.url()))
    } else {
        (!sent_all).then(|| "the sending thread failed".to_owned())
    };
    let sent: Vec<RequestRecord> = slots.iter().flatten().cloned().collect();
    let reason = cut_short.clone().unwrap_or_else(|| "its task failed".to_owned());
    let records = slots
        .into_iter()
        .zip(requests)
        .map(|(slot, request)| {
            slot.unwrap_or_else(|| RequestRecord {
                error: Some(format!("not sent: {reason}")),
                ..blank(request, request.scheduled_s)
            })
        })
        .collect();
    LoadOutcome { records, lag: Lag::of(&sent), wall_s, cut_short }
}

/// What all requests of a run share.
struct Shared {
    endpoint: Endpoint,
    start: Instant,
    timeout: Duration,
    stop: CancellationToken,
    refused_in_a_row: AtomicU32,
}

impl Shared {
    fn gone(&self) -> bool {
        self.refused_in_a_row.load(Ordering::Relaxed) >= GONE_AFTER
    }

    fn now_s(&self) -> f64 {
        match Instant::now().checked_duration_since(self.start) {
            Some(since) => since.as_secs_f64(),
            None => -self.start.duration_since(Instant::now()).as_secs_f64(),
        }
    }
}

fn dispatch(
    shared: &Arc<Shared>,
    runtime: &tokio::runtime::Handle,
    requests: Vec<PreparedRequest>,
    sender: &mpsc::UnboundedSender<(usize, RequestRecord)>,
) {
    for (index, request) in requests.into_iter().enumerate() {
        let due = shared.start + Duration::from_secs_f64(request.scheduled_s);
        loop {
            if shared.stop.is_cancelled() || shared.gone() {
                return;
            }
            match due.checked_duration_since(Instant::now()) {
                Some(wait) if !wait.is_zero() => std::thread::sleep(wait.min(NAP)),
                _ => break,
            }
        }
        let (shared, sender) = (Arc::clone(shared), sender.clone());
        runtime.spawn(async move {
            let record = send(&shared, &request).await;
            // The receiver is gone only if the whole run was dropped.
            let _ = sender.send((index, record));
        });
    }
}

/// A record of a request of which nothing has come yet.
fn blank(request: &PreparedRequest, sent_s: f64) -> RequestRecord {
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
    first_token_s: Option<f64>,
    last_s: Option<f64>,
    last: Message,
}

async fn send(shared: &Shared, request: &PreparedRequest) -> RequestRecord {
    let sent_s = shared.now_s();
    let mut seen = Seen::default();
    let ended = tokio::select! {
        ended = tokio::time::timeout(shared.timeout, receive(shared, request, &mut seen)) => ended,
        () = shared.stop.cancelled() => Ok(Err("the run was interrupted".to_owned())),
    };
    let mut record = blank(request, sent_s);
    record.first_s = seen.first_token_s.or(seen.first_byte_s);
    record.parts = seen.last.ttft_parts;
    // A server that does not tell its TTFT gets the client's, as in the reference.
    record.ttft_s = seen.last.ttft.or_else(|| Some(record.first_s? - sent_s));
    match ended {
        Ok(Ok(())) => {
            record.status = Status::Ok;
            record.output_tokens = seen.last.output_tokens.unwrap_or(request.max_tokens);
            record.last_s = seen.last_s;
            record.latency_s = seen.last_s.map(|last| last - sent_s);
        }
        Ok(Err(message)) => record.error = Some(message),
        Err(_) => {
            record.status = Status::Timeout;
            record.error = Some(format!("no end after {} s", shared.timeout.as_secs_f64()));
        }
    }
    record
}

async fn receive(shared: &Shared, request: &PreparedRequest, seen: &mut Seen) -> Result<(), String> {
    let response = shared.endpoint.generate_request(request.body.clone()).send().await;
    let mut response = match response {
        Ok(response) => response,
        Err(e) => {
            if e.is_connect() {
                shared.refused_in_a_row.fetch_add(1, Ordering::Relaxed);
            }
            return Err(describe(&e));
        }
    };
    shared.refused_in_a_row.store(0, Ordering::Relaxed);
    let status = response.status();
    if !status.is_success() {
        let body = response.bytes().await.unwrap_or_default();
        return Err(format!("HTTP {}: {}", status.as_u16(), refusal(&body)));
    }
    let mut messages = Messages::default();
    let mut failure = None;
    loop {
        let chunk = response.chunk().await.map_err(|e| describe(&e))?;
        let now_s = shared.now_s();
        let mut each = |message: Message| {
            if message.ttft.is_some() && seen.first_token_s.is_none() {
                seen.first_token_s = Some(now_s);
            }
            failure = failure.take().or_else(|| message.error.as_ref().map(ToString::to_string));
            seen.last = message;
        };
        let Some(chunk) = chunk else {
            messages.finish(&mut each).map_err(|e| format!("the stream ended within a message: {e}"))?;
            break;
        };
        messages.push(&chunk, &mut each).map_err(|e| format!("the stream is not what was expected: {e}"))?;
        seen.first_byte_s.get_or_insert(now_s);
        seen.last_s = Some(now_s);
    }
    if let Some(failure) = failure {
        return Err(format!("the server failed in the middle of the stream: {failure}"));
    }
    if seen.first_byte_s.is_none() {
        return Err("the stream was empty".to_owned());
    }
    if seen.last.finished == Some(false) {
        return Err("the stream ended before the output did".to_owned());
    }
    Ok(())
}
