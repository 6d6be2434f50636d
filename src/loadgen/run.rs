//! One run: every request at its time, whatever became of the others.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::endpoint::Endpoint;
use super::lag::Lag;
use super::prepare::PreparedRequest;
use super::send::{Sent, blank, send};
use crate::report::record::RequestRecord;

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
    /// When text came, of each request: seconds from the run's start, one a message with text.
    pub token_times: Vec<Vec<f64>>,
    /// Requests that failed, counted by kind; those never sent are of a kind of their own.
    pub faults: BTreeMap<String, u64>,
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

    let mut slots: Vec<Option<Sent>> = requests.iter().map(|_| None).collect();
    let mut count = 0;
    while let Some((index, sent)) = ended.recv().await {
        slots[index] = Some(sent);
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
    let reason = cut_short.clone().unwrap_or_else(|| "its task failed".to_owned());
    let lags: Vec<f64> = slots.iter().flatten().map(|s| s.record.sent_s - s.record.scheduled_s).collect();
    let mut outcome = LoadOutcome {
        records: Vec::with_capacity(requests.len()),
        token_times: Vec::with_capacity(requests.len()),
        faults: BTreeMap::new(),
        lag: Lag::of(&lags),
        wall_s,
        cut_short,
    };
    for (slot, request) in slots.into_iter().zip(requests) {
        let (record, fault, times) = match slot {
            Some(Sent { record, fault, token_times }) => (record, fault.map(|f| f.kind()), token_times),
            None => {
                let error = Some(format!("not sent: {reason}"));
                let record = RequestRecord { error, ..blank(request, request.scheduled_s) };
                (record, Some("not sent".to_owned()), Vec::new())
            }
        };
        if let Some(kind) = fault {
            *outcome.faults.entry(kind).or_default() += 1;
        }
        outcome.records.push(record);
        outcome.token_times.push(times);
    }
    outcome
}

/// What all requests of a run share.
pub(super) struct Shared {
    pub(super) endpoint: Endpoint,
    start: Instant,
    pub(super) timeout: Duration,
    pub(super) stop: CancellationToken,
    pub(super) refused_in_a_row: AtomicU32,
}

impl Shared {
    fn gone(&self) -> bool {
        self.refused_in_a_row.load(Ordering::Relaxed) >= GONE_AFTER
    }

    /// Seconds from the run's start.
    pub(super) fn now_s(&self) -> f64 {
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
    sender: &mpsc::UnboundedSender<(usize, Sent)>,
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
            let sent = send(&shared, &request).await;
            // The receiver is gone only if the whole run was dropped.
            let _ = sender.send((index, sent));
        });
    }
}
