//! From a description of a workload to a trace.

use super::arrivals::{ArrivalTimes, Arrivals};
use super::pool::PromptPool;
use super::popularity::{AdapterDraw, Popularity};
use super::regime::Regime;
use super::trace::{SCHEMA, Trace, TraceHeader, TraceRequest};

/// More requests than this are a mistake in rate or duration.
pub const MOST_REQUESTS: u64 = 100_000_000;

/// More seconds than this, 32 years, are a mistake in the rate too: clocks count nanoseconds in 64 bits.
pub const MOST_SECONDS: f64 = 1e9;

/// How much of a workload.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    /// This many requests.
    Requests(u64),
    /// Arrivals before this many seconds.
    DurationS(f64),
}

/// A synthetic workload.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkloadSpec {
    /// Which lengths the pool was made of; for the record only.
    pub regime: Regime,
    /// The arrival process; not [`Arrivals::Trace`].
    pub arrivals: Arrivals,
    /// Mean arrivals a second.
    pub rate: f64,
    /// How adapters are drawn.
    pub popularity: Popularity,
    /// Adapters `0..total_loras`; 0 is the base model alone.
    pub total_loras: u32,
    /// How much of it.
    pub amount: Amount,
    /// Output tokens of every request.
    pub max_tokens: u32,
    /// Of every random stream.
    pub seed: u64,
    /// Adapter *i* has rank `ranks[i % len]`; empty where ranks are unknown.
    pub ranks: Vec<u32>,
}

/// A workload that cannot be.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum WorkloadError {
    /// Zero, negative or not a number.
    #[error("the arrival rate is {0}: it must be a positive number of requests a second")]
    Rate(f64),
    /// Zero, negative or not a number.
    #[error("the duration is {0} s: it must be a positive number of seconds")]
    Duration(f64),
    /// No requests asked for, or none come of it.
    #[error("the workload has no requests: {0}")]
    NoRequests(String),
    /// An amount beyond reason.
    #[error(
        "the workload would have {0} requests, more than {MOST_REQUESTS}: lower the rate or the duration"
    )]
    TooMany(u64),
    /// A rate at which requests take longer than any run.
    #[error(
        "at {rate:e} requests a second the workload lasts {seconds:.1e} s, more than {MOST_SECONDS:e}: raise the rate, or ask \
         for less"
    )]
    TooSlow {
        /// Requests a second.
        rate: f64,
        /// How long it would take.
        seconds: f64,
    },
    /// A trace whose own times last longer than any run.
    #[error(
        "the trace's last request arrives {0:.1e} s after its start, more than {MOST_SECONDS:e}: times count from the trace's \
         start, in seconds"
    )]
    TooLong(f64),
    /// No outputs.
    #[error("max_tokens is 0: every request must ask for at least one token")]
    NoOutput,
    /// A pool without prompts.
    #[error("no prompt of {source_name} is in the {regime} regime ({} to {} tokens)", regime.tokens().start(), regime.tokens().end())]
    EmptyPool {
        /// Where the prompts would have come from.
        source_name: String,
        /// What was asked for.
        regime: Regime,
    },
    /// The times of a trace where there is no trace.
    #[error("arrivals 'trace' need a trace to take the times from")]
    NoTrace,
    /// More requests than the trace has, at the trace's times.
    #[error(
        "{asked} requests were asked for and the trace has {there}: ask for fewer, or for other arrivals than the trace's"
    )]
    TraceTooShort {
        /// Asked for.
        asked: u64,
        /// In the trace.
        there: u64,
    },
    /// Times that cannot be stretched to a rate.
    #[error(
        "the trace has no mean rate (fewer than two requests, or all at once), so it cannot be stretched to one"
    )]
    NoRate,
    /// A trace for a larger system.
    #[error(
        "the trace asks for adapter {adapter} (request {request}) and there are {total_loras}: raise total_loras, or draw the adapters anew with a popularity"
    )]
    NoSuchAdapter {
        /// The adapter.
        adapter: u32,
        /// The request's id.
        request: u64,
        /// What there is.
        total_loras: u32,
    },
}

/// A trace of `spec` with prompts from `pool`. The same spec and pool give the same trace on every machine.
pub fn generate_trace(spec: &WorkloadSpec, pool: &PromptPool) -> Result<Trace, WorkloadError> {
    let requests: Vec<TraceRequest> = Requests::new(spec, pool)?.collect();
    refuse_none(requests.is_empty(), spec.rate)?;
    Ok(Trace { header: spec.header(pool), requests })
}

impl WorkloadSpec {
    /// What its trace says of itself.
    pub fn header(&self, pool: &PromptPool) -> TraceHeader {
        TraceHeader {
            schema: SCHEMA,
            source: format!(
                "{}; {} regime; {} arrivals at {}/s",
                pool.source, self.regime, self.arrivals, self.rate
            ),
            seed: self.seed,
            popularity: self.popularity.to_string(),
        }
    }
}

/// The requests of [`generate_trace`], one by one: a workload of any length takes no memory.
#[derive(Debug)]
pub struct Requests<'a> {
    spec: WorkloadSpec,
    pool: &'a PromptPool,
    times: Times,
    adapters: AdapterDraw,
    /// Which prompts, in order; over again when they are used up.
    order: Vec<u32>,
    /// Where in `order` the next request is.
    at: usize,
    next: u64,
}

impl<'a> Requests<'a> {
    /// The workload's requests. A duration may turn out to hold none.
    pub fn new(spec: &WorkloadSpec, pool: &'a PromptPool) -> Result<Self, WorkloadError> {
        if spec.max_tokens == 0 {
            return Err(WorkloadError::NoOutput);
        }
        if spec.arrivals == Arrivals::Trace {
            return Err(WorkloadError::NoTrace);
        }
        if pool.prompts.is_empty() {
            return Err(WorkloadError::EmptyPool { source_name: pool.source.clone(), regime: spec.regime });
        }
        Ok(Self {
            times: Times::new(spec.arrivals, spec.rate, spec.amount, spec.seed)?,
            adapters: AdapterDraw::new(spec.popularity, spec.total_loras, spec.seed),
            order: pool.order(spec.seed),
            at: 0,
            next: 0,
            spec: spec.clone(),
            pool,
        })
    }
}

impl Iterator for Requests<'_> {
    type Item = TraceRequest;

    fn next(&mut self) -> Option<TraceRequest> {
        let arrival_s = self.times.next()?;
        let id = self.next;
        self.next += 1;
        let prompt = &self.pool.prompts[self.order[self.at] as usize];
        self.at = if self.at + 1 == self.order.len() { 0 } else { self.at + 1 };
        let adapter = self.adapters.draw();
        Some(TraceRequest {
            id,
            arrival_s,
            prompt_tokens: prompt.tokens,
            output_tokens: self.spec.max_tokens,
            adapter,
            rank: rank_of(adapter, &self.spec.ranks),
            prompt: prompt.text.clone(),
        })
    }
}

/// Arrival times, as many as were asked for.
#[derive(Debug)]
struct Times {
    process: ArrivalTimes,
    left: u64,
    before_s: f64,
}

impl Times {
    fn new(arrivals: Arrivals, rate: f64, amount: Amount, seed: u64) -> Result<Self, WorkloadError> {
        let process = ArrivalTimes::new(arrivals, rate, seed).ok_or(WorkloadError::Rate(rate))?;
        let (left, before_s) = match amount {
            Amount::Requests(0) => {
                return Err(WorkloadError::NoRequests("0 requests were asked for".to_owned()));
            }
            Amount::Requests(n) if n > MOST_REQUESTS => return Err(WorkloadError::TooMany(n)),
            Amount::Requests(n) => {
                check_seconds(n as f64 / rate, rate)?;
                (n, f64::INFINITY)
            }
            Amount::DurationS(duration) => {
                check_duration(duration)?;
                check_seconds(duration, rate)?;
                let expected = duration * rate;
                if expected > MOST_REQUESTS as f64 {
                    return Err(WorkloadError::TooMany(expected as u64));
                }
                (u64::MAX, duration)
            }
        };
        Ok(Self { process, left, before_s })
    }
}

impl Iterator for Times {
    type Item = f64;

    fn next(&mut self) -> Option<f64> {
        self.left = self.left.checked_sub(1)?;
        self.process.next().filter(|&at| at < self.before_s)
    }
}

/// As a trace needs them: all at once, and at least one.
pub(super) fn times(
    arrivals: Arrivals,
    rate: f64,
    amount: Amount,
    seed: u64,
) -> Result<Vec<f64>, WorkloadError> {
    let times: Vec<f64> = Times::new(arrivals, rate, amount, seed)?.collect();
    refuse_none(times.is_empty(), rate)?;
    Ok(times)
}

fn refuse_none(none: bool, rate: f64) -> Result<(), WorkloadError> {
    if none {
        return Err(WorkloadError::NoRequests(format!("no arrival at {rate}/s falls in the duration")));
    }
    Ok(())
}

/// Refuses what lasts longer than any run.
pub(super) fn check_seconds(seconds: f64, rate: f64) -> Result<(), WorkloadError> {
    if seconds <= MOST_SECONDS { Ok(()) } else { Err(WorkloadError::TooSlow { rate, seconds }) }
}

pub(super) fn check_duration(duration: f64) -> Result<(), WorkloadError> {
    if duration.is_finite() && duration > 0.0 { Ok(()) } else { Err(WorkloadError::Duration(duration)) }
}

pub(super) fn rank_of(adapter: Option<u32>, ranks: &[u32]) -> Option<u32> {
    let adapter = adapter? as usize;
    match ranks {
        [] => None,
        [only] => Some(*only),
        _ => Some(ranks[adapter % ranks.len()]),
    }
}

#[cfg(test)]
mod tests {
    use sha2::{Digest as _, Sha256};

    use super::*;

    fn spec() -> WorkloadSpec {
        WorkloadSpec {
            regime: Regime::Short,
            arrivals: Arrivals::Poisson,
            rate: 2.0,
            popularity: Popularity::Zipf { s: 1.0 },
            total_loras: 128,
            amount: Amount::Requests(200),
            max_tokens: 16,
            seed: 42,
            ranks: vec![8, 16],
        }
    }

    fn generate(spec: &WorkloadSpec) -> Trace {
        generate_trace(spec, &PromptPool::embedded(spec.regime)).unwrap()
    }

    /// A change of any random stream, of a distribution's algorithm or of the embedded lengths
    /// changes every published result: it must not happen by an update of a dependency.
    #[test]
    fn a_generated_trace_never_changes() {
        let hash = |spec: &WorkloadSpec| {
            let lines =
                generate(spec).requests.iter().map(|r| serde_json::to_string(r).unwrap()).collect::<Vec<_>>();
            Sha256::digest(lines.join("\n")).iter().map(|b| format!("{b:02x}")).collect::<String>()
        };
        assert_eq!(hash(&spec()), "b33bdc796c5f28b7e328aa4d6f47d33a5700ca4ee4740afa7c4dc9503857a698");
        let gamma = WorkloadSpec { arrivals: Arrivals::Gamma { cv: 2.0 }, regime: Regime::Long, ..spec() };
        assert_eq!(hash(&gamma), "870bb770a5c2e260b669df446e5e76a825be2099f19240409149d2d4b6ab6605");
    }

    #[test]
    fn requests_are_of_the_regime_and_the_adapters() {
        let trace = generate(&spec());
        assert_eq!(trace.requests.len(), 200);
        for (request, id) in trace.requests.iter().zip(0..) {
            assert_eq!(request.id, id);
            assert!((256..=1024).contains(&request.prompt_tokens));
            let adapter = request.adapter.unwrap();
            assert!(adapter < 128);
            assert_eq!(request.rank, Some([8, 16][adapter as usize % 2]));
            assert_eq!(request.output_tokens, 16);
        }
        assert!(trace.header.popularity == "zipf:1" && trace.header.source.contains("Apache-2.0"));
    }

    #[test]
    fn a_change_of_one_thing_leaves_the_others_alone() {
        let base = generate(&spec());
        let uniform = generate(&WorkloadSpec { popularity: Popularity::Uniform, ..spec() });
        let faster = generate(&WorkloadSpec { rate: 4.0, ..spec() });
        let more = generate(&WorkloadSpec { amount: Amount::Requests(300), ..spec() });
        let same = |f: fn(&TraceRequest) -> f64, other: &Trace| {
            base.requests.iter().zip(&other.requests).all(|(a, b)| f(a) == f(b))
        };
        for other in [&uniform, &faster, &more] {
            assert!(same(|r| r.prompt_tokens.into(), other));
        }
        assert!(same(|r| r.arrival_s, &uniform) && same(|r| r.arrival_s, &more));
        assert!(same(|r| r.adapter.unwrap().into(), &faster));
        assert!(!same(|r| r.arrival_s, &faster) && !same(|r| r.adapter.unwrap().into(), &uniform));
    }

    #[test]
    fn a_duration_ends_before_it() {
        let trace =
            generate(&WorkloadSpec { amount: Amount::DurationS(30.0), arrivals: Arrivals::Fixed, ..spec() });
        assert_eq!((trace.requests.len(), trace.duration_s()), (60, 29.5));
    }

    #[test]
    fn too_few_prompts_come_over_again() {
        let pool = PromptPool {
            source: "test".to_owned(),
            prompts: PromptPool::embedded(Regime::Short).prompts[..3].to_vec(),
        };
        let trace = generate_trace(&spec(), &pool).unwrap();
        assert_eq!(trace.requests[0].prompt_tokens, trace.requests[3].prompt_tokens);
    }

    #[test]
    fn impossible_workloads_are_refused() {
        let refused = |spec: WorkloadSpec| {
            generate_trace(&spec, &PromptPool::embedded(Regime::Short)).unwrap_err().to_string()
        };
        for rate in [0.0, -2.0, f64::NAN, f64::INFINITY] {
            assert!(refused(WorkloadSpec { rate, ..spec() }).contains("positive number of requests"));
        }
        for duration in [0.0, -1.0, f64::NAN] {
            let amount = Amount::DurationS(duration);
            assert!(refused(WorkloadSpec { amount, ..spec() }).contains("positive number of seconds"));
        }
        assert!(refused(WorkloadSpec { amount: Amount::Requests(0), ..spec() }).contains("no requests"));
        assert!(refused(WorkloadSpec { amount: Amount::DurationS(1e12), ..spec() }).contains("more than"));
        assert!(refused(WorkloadSpec { amount: Amount::DurationS(9e8), ..spec() }).contains("more than"));
        for rate in [1e-9, 1e-300] {
            assert!(
                refused(WorkloadSpec { rate, ..spec() }).contains(&format!("at {rate:e} requests a second"))
            );
        }
        assert!(refused(WorkloadSpec { max_tokens: 0, ..spec() }).contains("at least one token"));
        assert!(refused(WorkloadSpec { arrivals: Arrivals::Trace, ..spec() }).contains("need a trace"));
        let empty = PromptPool { source: "nothing".to_owned(), prompts: Vec::new() };
        let error = generate_trace(&spec(), &empty).unwrap_err().to_string();
        assert!(error.contains("nothing") && error.contains("256 to 1024"), "{error}");
    }
}
