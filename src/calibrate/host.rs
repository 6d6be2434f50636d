//! Times the host around steps: one request at a time over HTTP, to an engine with nothing else to do.

use std::sync::PoisonError;

use nalgebra::{DMatrix, DVector};
use serde::{Deserialize, Serialize};

use super::{fit, median};
use crate::engine::server::LocalServer;
use crate::engine::setup::{Loaded, SetupError};
use crate::loadgen::{Endpoint, EndpointError, LoadOptions, PrepareError, prepare, run_load};
use crate::profile::HostCosts;
use crate::report::decision_log::DecisionLog;
use crate::report::record::Status;
use crate::sim::{LogTimesError, Recorded};
use crate::workload::trace::{SCHEMA, Trace, TraceHeader, TraceRequest};

/// One request's host times, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostSample {
    /// Prompt length.
    pub prompt_tokens: u32,
    /// Prompt text.
    pub prompt_bytes: u64,
    /// Receipt to queue.
    pub front_ns: f64,
    /// First token to first byte.
    pub deliver_ns: f64,
}

/// What the host takes.
#[derive(Clone, Debug, Default)]
pub struct HostTimes {
    /// One a request.
    pub requests: Vec<HostSample>,
    /// From a step's result to the next plan, in nanoseconds.
    pub gaps: Vec<u64>,
}

/// A host that could not be timed.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The engine.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The server.
    #[error(transparent)]
    Server(#[from] crate::engine::server::LocalError),
    /// The client.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The prompts.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// What the engine logged.
    #[error(transparent)]
    Log(#[from] LogTimesError),
    /// A request that failed.
    #[error("a calibration request failed: {0}")]
    Request(String),
}

/// How often each length is asked for.
const REPEATS: u64 = 6;
const OUTPUT_TOKENS: u32 = 8;

/// Starts a server on a free port of this machine and asks it for prompts of `lengths` tokens.
pub fn time_host(loaded: &Loaded, gpu_loras: usize, lengths: &[u32]) -> Result<HostTimes, HostError> {
    let (log, lines) = DecisionLog::in_memory();
    let server = LocalServer::start(loaded, gpu_loras, Some(log))?;
    let requests = (0..REPEATS).flat_map(|_| lengths.iter().copied()).zip(0..);
    let trace = Trace {
        header: TraceHeader {
            schema: SCHEMA,
            source: "calibration".to_owned(),
            seed: 0,
            popularity: "uniform".to_owned(),
        },
        requests: requests
            .map(|(prompt_tokens, id)| TraceRequest {
                id,
                arrival_s: 0.0,
                prompt_tokens,
                output_tokens: OUTPUT_TOKENS,
                adapter: Some(id as u32 % gpu_loras as u32),
                rank: None,
                prompt: None,
            })
            .collect(),
    };
    let prepared = prepare(&trace, loaded.tokenizer())?;
    let endpoint = Endpoint::new(&server.url(), None)?;
    let mut times = HostTimes::default();
    for request in &prepared {
        let one = std::slice::from_ref(request);
        let outcome = server.block_on(run_load(&endpoint, one, &LoadOptions::default(), |_| {}));
        for record in outcome.records {
            let parts = match (record.status, record.parts) {
                (Status::Ok, Some(parts)) => parts,
                _ => {
                    return Err(HostError::Request(
                        record.error.unwrap_or_else(|| "no TTFT parts".to_owned()),
                    ));
                }
            };
            times.requests.push(HostSample {
                prompt_tokens: record.prompt_tokens,
                prompt_bytes: request.body.len() as u64,
                front_ns: parts.front * 1e9,
                deliver_ns: parts.deliver * 1e9,
            });
        }
    }
    let header = loaded.log_header(gpu_loras);
    server.stop();
    let lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
    let recorded = Recorded::new(&header, &lines).map_err(|e| HostError::Request(e.to_string()))?;
    // Between two decodes nothing but the host stands.
    times.gaps = recorded
        .steps
        .windows(2)
        .filter(|pair| pair[1].seqs.iter().all(|s| s.5))
        .map(|pair| pair[1].gap)
        .collect();
    Ok(times)
}

/// The front end by its prompts' bytes; of everything else the median.
pub(super) fn fit_host(times: &HostTimes) -> HostCosts {
    let rows = &times.requests;
    let a = DMatrix::from_fn(rows.len(), 2, |r, c| if c == 0 { 1.0 } else { rows[r].prompt_bytes as f64 });
    let b = DVector::from_fn(rows.len(), |r, _| rows[r].front_ns);
    let front = fit::nnls(&a, &b);
    let bytes: f64 = rows.iter().map(|r| r.prompt_bytes as f64).sum();
    let tokens: f64 = rows.iter().map(|r| f64::from(r.prompt_tokens)).sum();
    HostCosts {
        loop_s: median(times.gaps.iter().map(|&g| g as f64 * 1e-9)),
        front_s: front[0] * 1e-9,
        tokenize_s_per_byte: front[1] * 1e-9,
        deliver_s: median(rows.iter().map(|r| r.deliver_ns * 1e-9)),
        bytes_per_token: bytes / tokens.max(1.0),
    }
}
