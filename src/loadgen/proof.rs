//! The generator's own error: what it measures of a server that only waits, less that wait.

use std::time::Duration;

use serde::Serialize;

use super::endpoint::{Endpoint, EndpointError};
use super::fixed_delay::FixedDelay;
use super::lag::Lag;
use super::openai::Completions;
use super::prepare::{Dialect, PrepareError, prepare_for};
use super::run::{LoadOptions, LoadOutcome, Progress, run_load};
use crate::report::record::Status;
use crate::report::stats::Summary;
use crate::workload::arrivals::Arrivals;
use crate::workload::pool::PromptPool;
use crate::workload::regime::Regime;
use crate::workload::spec::{Amount, WorkloadError, WorkloadSpec, generate_trace};
use crate::workload::tokenizer::Tokenizer;

/// What to send.
#[derive(Clone, Debug, PartialEq)]
pub struct ProofOptions {
    /// Which interface is spoken.
    pub dialect: Dialect,
    /// Requests a second.
    pub rate: f64,
    /// How long.
    pub seconds: f64,
    /// When they come.
    pub arrivals: Arrivals,
    /// From a request's head to its first token.
    pub delay: Duration,
    /// Output tokens of a request.
    pub max_tokens: u32,
    /// Of arrivals and prompts.
    pub seed: u64,
}

impl Default for ProofOptions {
    fn default() -> Self {
        Self {
            dialect: Dialect::Completions(Completions::default()),
            rate: 500.0,
            seconds: 20.0,
            arrivals: Arrivals::Poisson,
            delay: Duration::from_millis(20),
            max_tokens: 16,
            seed: 42,
        }
    }
}

/// A proof that could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    /// The server.
    #[error("cannot start the fixed-delay server: {0}")]
    Server(#[from] std::io::Error),
    /// Its address.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The requests.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// Their bodies.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// Requests that failed.
    #[error("{failed} of {total} requests failed; the first: {first}")]
    Failed {
        /// How many.
        failed: usize,
        /// Of how many.
        total: usize,
        /// Why the first did.
        first: String,
    },
}

/// What the generator got wrong, in seconds over all requests.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Proof {
    /// Requests sent.
    pub requests: usize,
    /// Requests a second, as sent.
    pub rate: f64,
    /// The wait, by the server's clock.
    pub server: Summary,
    /// The client's TTFT from sending, less the server's wait.
    pub error: Summary,
    /// The client's TTFT from the scheduled time, less the server's wait: the error with the lag.
    pub error_from_schedule: Summary,
    /// Sent after scheduled.
    pub lag: Lag,
}

/// Starts a fixed-delay server, loads it, and compares its clock with the client's.
///
/// # Errors
/// If the server cannot be started, the workload is impossible, or any request fails.
pub async fn prove(options: &ProofOptions, progress: impl FnMut(Progress)) -> Result<Proof, ProofError> {
    let server = FixedDelay::start(options.delay)?;
    let endpoint = Endpoint::new(&server.url(), None)?;
    let spec = WorkloadSpec {
        regime: Regime::Short,
        arrivals: options.arrivals,
        rate: options.rate,
        popularity: crate::workload::popularity::Popularity::Uniform,
        total_loras: 16,
        amount: Amount::DurationS(options.seconds),
        max_tokens: options.max_tokens,
        seed: options.seed,
        ranks: Vec::new(),
    };
    let trace = generate_trace(&spec, &PromptPool::embedded(Regime::Short))?;
    let requests = prepare_for(&trace, &Tokenizer::byte_level(), &options.dialect)?;
    let outcome = run_load(&endpoint, &requests, &LoadOptions::default(), progress).await;
    drop(server);
    Proof::of(&outcome)
}

impl Proof {
    /// Of a run against a server that told its own wait with every first token.
    ///
    /// # Errors
    /// If a request failed: its error is not known.
    pub fn of(outcome: &LoadOutcome) -> Result<Self, ProofError> {
        let total = outcome.records.len();
        let failures: Vec<_> = outcome.records.iter().filter(|r| r.status != Status::Ok).collect();
        let failed = |failed, first: Option<&String>| ProofError::Failed {
            failed,
            total,
            first: first.cloned().unwrap_or_else(|| "no reason given".to_owned()),
        };
        if let Some(first) = failures.first() {
            return Err(failed(failures.len(), first.error.as_ref()));
        }
        let (mut server, mut error, mut from_schedule) = (Vec::new(), Vec::new(), Vec::new());
        for record in &outcome.records {
            let (Some(first_s), Some(waited)) = (record.first_s, record.ttft_s) else { continue };
            server.push(waited);
            error.push(first_s - record.sent_s - waited);
            from_schedule.push(first_s - record.scheduled_s - waited);
        }
        let summary = |values: &[f64]| Summary::of(values).ok_or_else(|| failed(total, None));
        let span = outcome.records.iter().map(|r| r.sent_s).fold(0.0, f64::max);
        Ok(Self {
            requests: total,
            rate: if span > 0.0 { total as f64 / span } else { 0.0 },
            server: summary(&server)?,
            error: summary(&error)?,
            error_from_schedule: summary(&from_schedule)?,
            lag: outcome.lag,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::report::record::RequestRecord;

    fn outcome(n: u64, status: Status) -> LoadOutcome {
        let record = |id: u64| RequestRecord {
            id,
            adapter: Some(0),
            rank: None,
            prompt_tokens: 9,
            output_tokens: 1,
            scheduled_s: id as f64,
            sent_s: id as f64 + 0.001,
            first_s: Some(id as f64 + 0.024),
            last_s: Some(id as f64 + 0.025),
            ttft_s: Some(0.020),
            latency_s: Some(0.024),
            status,
            parts: None,
            error: Some("why".to_owned()),
        };
        LoadOutcome {
            records: (0..n).map(record).collect(),
            token_times: Vec::new(),
            faults: BTreeMap::new(),
            lag: Lag::default(),
            wall_s: n as f64,
            cut_short: None,
        }
    }

    #[test]
    fn the_error_is_what_the_server_did_not_wait() {
        let proof = Proof::of(&outcome(11, Status::Ok)).unwrap();
        assert!((proof.error.median - 0.003).abs() < 1e-9, "{proof:?}");
        assert!((proof.error_from_schedule.p99 - 0.004).abs() < 1e-9, "{proof:?}");
        assert!((proof.server.median - 0.020).abs() < 1e-9, "{proof:?}");
    }

    #[test]
    fn a_failure_is_no_proof() {
        let error = Proof::of(&outcome(3, Status::Error)).unwrap_err().to_string();
        assert!(error.contains("3 of 3 requests failed; the first: why"), "{error}");
        assert!(Proof::of(&outcome(0, Status::Ok)).is_err());
    }
}
