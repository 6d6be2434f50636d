//! From a description of a workload to a trace.

use super::arrivals::{ArrivalTimes, Arrivals, round_ns};
use super::pool::PromptPool;
use super::popularity::{AdapterDraw, Popularity};
use super::regime::Regime;
use super::trace::{NO_ADAPTERS, SCHEMA, Trace, TraceHeader, TraceRequest};

/// More requests than this are a mistake in rate or duration.
pub const MOST_REQUESTS: u64 = 100_000_000;

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

/// What is changed about a trace when it is used again. `None` keeps what the trace has.
#[derive(Clone, Debug, PartialEq)]
pub struct Replay {
    /// [`Arrivals::Trace`] keeps the times.
    pub arrivals: Arrivals,
    /// With the trace's times: stretch them to this mean rate. With others: their rate, which must be there.
    pub rate: Option<f64>,
    /// Draw the adapters anew. A trace without adapters needs this.
    pub popularity: Option<Popularity>,
    /// Adapters that there are.
    pub total_loras: u32,
    /// The first part of the trace only. With other arrivals than the trace's it may be longer than
    /// the trace, whose requests then come over again.
    pub amount: Option<Amount>,
    /// Output tokens of every request.
    pub max_tokens: Option<u32>,
    /// Of the random streams that are drawn anew.
    pub seed: u64,
    /// As in [`WorkloadSpec::ranks`]; empty keeps the trace's.
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
    if spec.max_tokens == 0 {
        return Err(WorkloadError::NoOutput);
    }
    if spec.arrivals == Arrivals::Trace {
        return Err(WorkloadError::NoTrace);
    }
    if pool.prompts.is_empty() {
        return Err(WorkloadError::EmptyPool { source_name: pool.source.clone(), regime: spec.regime });
    }
    let times = times(spec.arrivals, spec.rate, spec.amount, spec.seed)?;
    let mut adapters = AdapterDraw::new(spec.popularity, spec.total_loras, spec.seed);
    let mut prompts = pool.order(spec.seed);
    let requests = times
        .into_iter()
        .zip(0..)
        .map(|(arrival_s, id)| {
            let prompt = &pool.prompts[prompts.next().unwrap_or(0)];
            let adapter = adapters.draw();
            TraceRequest {
                id,
                arrival_s,
                prompt_tokens: prompt.tokens,
                output_tokens: spec.max_tokens,
                adapter,
                rank: rank_of(adapter, &spec.ranks),
                prompt: prompt.text.clone(),
            }
        })
        .collect();
    let header = TraceHeader {
        schema: SCHEMA,
        source: format!(
            "{}; {} regime; {} arrivals at {}/s",
            pool.source, spec.regime, spec.arrivals, spec.rate
        ),
        seed: spec.seed,
        popularity: spec.popularity.to_string(),
    };
    Ok(Trace { header, requests })
}

/// `trace` with the changes that `replay` asks for.
pub fn replay_trace(trace: &Trace, replay: &Replay) -> Result<Trace, WorkloadError> {
    if replay.max_tokens == Some(0) {
        return Err(WorkloadError::NoOutput);
    }
    let times = replay_times(trace, replay)?;
    let there = trace.requests.len().max(1);
    let mut requests: Vec<TraceRequest> = times
        .into_iter()
        .enumerate()
        .map(|(i, arrival_s)| TraceRequest { id: i as u64, arrival_s, ..trace.requests[i % there].clone() })
        .collect();

    let mut header = trace.header.clone();
    let redraw = match replay.popularity {
        None if trace.header.popularity == NO_ADAPTERS => Some(Popularity::Uniform),
        asked => asked,
    };
    if let Some(popularity) = redraw {
        let mut adapters = AdapterDraw::new(popularity, replay.total_loras, replay.seed);
        requests.iter_mut().for_each(|r| r.adapter = adapters.draw());
        header.popularity = popularity.to_string();
        header.seed = replay.seed;
    }
    for request in &mut requests {
        if let Some(adapter) = request.adapter.filter(|&a| a >= replay.total_loras) {
            let (request, total_loras) = (request.id, replay.total_loras);
            return Err(WorkloadError::NoSuchAdapter { adapter, request, total_loras });
        }
        if !replay.ranks.is_empty() {
            request.rank = rank_of(request.adapter, &replay.ranks);
        }
        request.output_tokens = replay.max_tokens.unwrap_or(request.output_tokens);
    }
    match (replay.arrivals, replay.rate) {
        (Arrivals::Trace, None) => {}
        (Arrivals::Trace, Some(rate)) => header.source += &format!("; times stretched to {rate}/s"),
        (arrivals, rate) => {
            header.source += &format!("; {arrivals} arrivals at {}/s", rate.unwrap_or_default());
            header.seed = replay.seed;
        }
    }
    Ok(Trace { header, requests })
}

fn replay_times(trace: &Trace, replay: &Replay) -> Result<Vec<f64>, WorkloadError> {
    let there = trace.requests.len() as u64;
    if there == 0 {
        return Err(WorkloadError::NoRequests("the trace is empty".to_owned()));
    }
    if replay.arrivals != Arrivals::Trace {
        let rate = replay.rate.ok_or(WorkloadError::Rate(f64::NAN))?;
        let amount = replay.amount.unwrap_or(Amount::Requests(there));
        return times(replay.arrivals, rate, amount, replay.seed);
    }
    let stretch = match replay.rate {
        None => 1.0,
        Some(rate) if !(rate.is_finite() && rate > 0.0) => return Err(WorkloadError::Rate(rate)),
        Some(rate) => trace.mean_rate().ok_or(WorkloadError::NoRate)? / rate,
    };
    let mut times: Vec<f64> = trace.requests.iter().map(|r| round_ns(r.arrival_s * stretch)).collect();
    match replay.amount {
        None => {}
        Some(Amount::Requests(asked)) if asked > there => {
            return Err(WorkloadError::TraceTooShort { asked, there });
        }
        Some(Amount::Requests(asked)) => times.truncate(asked as usize),
        Some(Amount::DurationS(duration)) => {
            check_duration(duration)?;
            times.retain(|t| *t < duration);
        }
    }
    if times.is_empty() {
        return Err(WorkloadError::NoRequests("none of the trace arrives in what was asked for".to_owned()));
    }
    Ok(times)
}

fn times(arrivals: Arrivals, rate: f64, amount: Amount, seed: u64) -> Result<Vec<f64>, WorkloadError> {
    let process = ArrivalTimes::new(arrivals, rate, seed).ok_or(WorkloadError::Rate(rate))?;
    let times: Vec<f64> = match amount {
        Amount::Requests(0) => {
            return Err(WorkloadError::NoRequests("0 requests were asked for".to_owned()));
        }
        Amount::Requests(n) if n > MOST_REQUESTS => return Err(WorkloadError::TooMany(n)),
        Amount::Requests(n) => process.take(n as usize).collect(),
        Amount::DurationS(duration) => {
            check_duration(duration)?;
            let expected = duration * rate;
            if expected > MOST_REQUESTS as f64 {
                return Err(WorkloadError::TooMany(expected as u64));
            }
            process.take_while(|t| *t < duration).collect()
        }
    };
    if times.is_empty() {
        return Err(WorkloadError::NoRequests(format!("no arrival at {rate}/s falls in the duration")));
    }
    Ok(times)
}

fn check_duration(duration: f64) -> Result<(), WorkloadError> {
    if duration.is_finite() && duration > 0.0 { Ok(()) } else { Err(WorkloadError::Duration(duration)) }
}

fn rank_of(adapter: Option<u32>, ranks: &[u32]) -> Option<u32> {
    let adapter = adapter? as usize;
    (!ranks.is_empty()).then(|| ranks[adapter % ranks.len()])
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
        assert!(refused(WorkloadSpec { max_tokens: 0, ..spec() }).contains("at least one token"));
        assert!(refused(WorkloadSpec { arrivals: Arrivals::Trace, ..spec() }).contains("need a trace"));
        let empty = PromptPool { source: "nothing".to_owned(), prompts: Vec::new() };
        let error = generate_trace(&spec(), &empty).unwrap_err().to_string();
        assert!(error.contains("nothing") && error.contains("256 to 1024"), "{error}");
    }

    fn as_it_is() -> Replay {
        Replay {
            arrivals: Arrivals::Trace,
            rate: None,
            popularity: None,
            total_loras: 128,
            amount: None,
            max_tokens: None,
            seed: 1,
            ranks: Vec::new(),
        }
    }

    #[test]
    fn a_trace_replayed_as_it_is_stays_the_same() {
        let trace = generate(&spec());
        assert_eq!(replay_trace(&trace, &as_it_is()).unwrap(), trace);
    }

    #[test]
    fn a_trace_can_be_cut_stretched_and_drawn_anew() {
        let trace = generate(&spec());
        let cut = replay_trace(&trace, &Replay { amount: Some(Amount::Requests(7)), ..as_it_is() }).unwrap();
        assert_eq!(cut.requests[..], trace.requests[..7]);
        let stretched = replay_trace(&trace, &Replay { rate: Some(8.0), ..as_it_is() }).unwrap();
        assert!((stretched.mean_rate().unwrap() - 8.0).abs() < 1e-6);
        let anew = Replay {
            arrivals: Arrivals::Fixed,
            rate: Some(1.0),
            amount: Some(Amount::Requests(250)),
            ..as_it_is()
        };
        let anew = replay_trace(&trace, &anew).unwrap();
        assert_eq!((anew.requests.len(), anew.requests[249].arrival_s), (250, 249.0));
        assert_eq!(anew.requests[200].prompt_tokens, trace.requests[0].prompt_tokens);
        let fewer = Replay {
            popularity: Some(Popularity::Uniform),
            total_loras: 4,
            max_tokens: Some(3),
            ..as_it_is()
        };
        let fewer = replay_trace(&trace, &fewer).unwrap();
        assert!(fewer.adapters() == 4 && fewer.requests[0].output_tokens == 3);
    }

    #[test]
    fn a_trace_that_does_not_fit_is_refused() {
        let trace = generate(&spec());
        let refused = |replay| replay_trace(&trace, &replay).unwrap_err().to_string();
        assert!(refused(Replay { total_loras: 8, ..as_it_is() }).contains("there are 8"));
        assert!(
            refused(Replay { amount: Some(Amount::Requests(201)), ..as_it_is() })
                .contains("the trace has 200")
        );
        assert!(refused(Replay { rate: Some(-1.0), ..as_it_is() }).contains("positive"));
        assert!(refused(Replay { arrivals: Arrivals::Poisson, ..as_it_is() }).contains("positive"));
        assert!(
            refused(Replay { amount: Some(Amount::DurationS(1e-9)), ..as_it_is() }).contains("no requests")
        );
    }

    #[test]
    fn a_trace_without_adapters_gets_them() {
        let mut trace = generate(&spec());
        trace.header.popularity = NO_ADAPTERS.to_owned();
        trace.requests.iter_mut().for_each(|r| r.adapter = None);
        let replayed = replay_trace(&trace, &as_it_is()).unwrap();
        assert!(replayed.requests.iter().all(|r| r.adapter.is_some()));
        assert_eq!(replayed.header.popularity, "uniform");
    }
}
