//! Times the host around steps: requests over HTTP that come one by one, to an engine with nothing else to do.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use nalgebra::{DMatrix, DVector};
use serde::{Deserialize, Serialize};

use super::{fit, median};
use crate::engine::server::{HANDED_OVER_BYTES, LocalServer};
use crate::engine::setup::{Loaded, SetupError};
use crate::loadgen::{
    Endpoint, EndpointError, LoadOptions, PrepareError, PreparedRequest, prepare, run_load,
};
use crate::profile::HostCosts;
use crate::report::decision_log::DecisionLog;
use crate::report::record::{PartsS, RequestRecord, Status};
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

/// How often each length is asked for, after a first time that does not count.
const REPEATS: u64 = 6;
const OUTPUT_TOKENS: u32 = 8;
/// From one request to the next, as a multiple of how long it took the first time, and in seconds at least: they come to a
/// host that waits, as under a light load, where threads have gone to sleep and caches have cooled.
const PAUSE: f64 = 1.5;
const LEAST_PAUSE: f64 = 0.1;

/// Starts a server on a free port of this machine and asks it for prompts of `lengths` tokens.
pub fn time_host(loaded: &Loaded, gpu_loras: usize, lengths: &[u32]) -> Result<HostTimes, HostError> {
    let (log, lines) = DecisionLog::in_memory();
    let server = LocalServer::start(loaded, gpu_loras, Some(log))?;
    let requests = (0..=REPEATS).flat_map(|_| lengths.iter().copied()).zip(0..);
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
    let mut prepared = prepare(&trace, loaded.tokenizer())?;
    let endpoint = Endpoint::new(&server.url(), None)?;
    let ask = |requests: &[PreparedRequest]| -> Result<Vec<(RequestRecord, PartsS)>, HostError> {
        let outcome = server.block_on(run_load(&endpoint, requests, &LoadOptions::default(), |_| {}));
        outcome.records.into_iter().map(answered).collect()
    };
    let (first, rest) = prepared.split_at_mut(lengths.len());
    let mut took = Vec::with_capacity(first.len());
    for request in first.iter() {
        took.extend(ask(std::slice::from_ref(request))?.iter().filter_map(|(record, _)| record.latency_s));
    }
    let mut at = 0.0;
    for (request, took) in rest.iter_mut().zip(took.iter().cycle()) {
        request.scheduled_s = at;
        at += LEAST_PAUSE.max(PAUSE * took);
    }
    let answers = ask(rest)?;
    // Ids are places in the trace.
    let sample = |(record, parts): &(RequestRecord, PartsS)| HostSample {
        prompt_tokens: record.prompt_tokens,
        prompt_bytes: prepared[record.id as usize].prompt_bytes,
        front_ns: parts.front * 1e9,
        deliver_ns: parts.deliver * 1e9,
    };
    let requests = answers.iter().map(sample).collect();
    let header = loaded.log_header(gpu_loras);
    server.stop();
    let lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
    let recorded = Recorded::new(&header, &lines).map_err(|e| HostError::Request(e.to_string()))?;
    // Between two decodes nothing but the host stands.
    let decodes = recorded.steps.windows(2).filter(|pair| pair[1].seqs.iter().all(|s| s.5));
    Ok(HostTimes { requests, gaps: decodes.map(|pair| pair[1].gap).collect() })
}

/// A request that went well, and where its TTFT went.
fn answered(mut record: RequestRecord) -> Result<(RequestRecord, PartsS), HostError> {
    match (record.status, record.parts.take()) {
        (Status::Ok, Some(parts)) => Ok((record, parts)),
        _ => Err(HostError::Request(record.error.unwrap_or_else(|| "no TTFT parts".to_owned()))),
    }
}

/// The front end by its prompts' bytes, and whether they are handed over; of everything the median.
pub(super) fn fit_host(times: &HostTimes) -> HostCosts {
    let rows = &times.requests;
    let mut lengths: BTreeMap<u32, Vec<&HostSample>> = BTreeMap::new();
    for row in rows {
        lengths.entry(row.prompt_tokens).or_default().push(row);
    }
    let of_length = |of: fn(&HostSample) -> f64| -> Vec<f64> {
        lengths.values().map(|rows| median(rows.iter().map(|r| of(r)))).collect()
    };
    let (sizes, fronts) = (of_length(|r| r.prompt_bytes as f64), of_length(|r| r.front_ns));
    let a = DMatrix::from_fn(sizes.len(), 3, |r, c| match c {
        0 => 1.0,
        1 => sizes[r],
        _ => f64::from(u8::from(sizes[r] >= HANDED_OVER_BYTES as f64)),
    });
    let front = fit::nnls(&a, &DVector::from_vec(fronts));
    let bytes: f64 = rows.iter().map(|r| r.prompt_bytes as f64).sum();
    let tokens: f64 = rows.iter().map(|r| f64::from(r.prompt_tokens)).sum();
    HostCosts {
        loop_s: median(times.gaps.iter().map(|&g| g as f64 * 1e-9)),
        front_s: front[0] * 1e-9,
        tokenize_s_per_byte: front[1] * 1e-9,
        handover_s: front[2] * 1e-9,
        handover_bytes: HANDED_OVER_BYTES as f64,
        deliver_s: median(rows.iter().map(|r| r.deliver_ns * 1e-9)),
        bytes_per_token: bytes / tokens.max(1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(lengths: &[u64], front_us: impl Fn(u64) -> f64) -> HostTimes {
        let sample = |bytes: u64, front_us: f64| HostSample {
            prompt_tokens: bytes as u32 / 4,
            prompt_bytes: bytes,
            front_ns: front_us * 1e3,
            deliver_ns: 5e4,
        };
        // The first request of a length finds everything cold.
        let of_length = |bytes: u64| {
            let warm = front_us(bytes);
            [warm + 500.0, warm, warm - 1.0, warm + 1.0, warm].map(|us| sample(bytes, us))
        };
        HostTimes {
            requests: lengths.iter().flat_map(|l| of_length(*l)).collect(),
            gaps: vec![9_000, 10_000, 11_000],
        }
    }

    #[test]
    fn a_prompt_that_changes_threads_does_not_make_all_bytes_dearer() {
        let handed_over = |bytes| if bytes >= HANDED_OVER_BYTES as u64 { 80.0 } else { 0.0 };
        let front_us = |bytes| 120.0 + 0.01 * bytes as f64 + handed_over(bytes);
        let costs = fit_host(&times(&[64, 256, 768, 1792, 4096], front_us));
        let near =
            |value: f64, us: f64| assert!((value * 1e6 - us).abs() < 0.01 * us, "{value} s, not {us} µs");
        near(costs.front_s, 120.0);
        near(costs.tokenize_s_per_byte, 0.01);
        near(costs.handover_s, 80.0);
        near(costs.loop_s, 10.0);
        near(costs.deliver_s, 50.0);
        assert_eq!((costs.handover_bytes, costs.bytes_per_token), (HANDED_OVER_BYTES as f64, 4.0));
    }

    #[test]
    fn without_a_prompt_that_changes_threads_it_costs_nothing() {
        let costs = fit_host(&times(&[64, 256], |bytes| 100.0 + 0.1 * bytes as f64));
        assert_eq!(costs.handover_s, 0.0);
        assert!((costs.front_s * 1e6 - 100.0).abs() < 1.0, "{costs:?}");
    }
}
