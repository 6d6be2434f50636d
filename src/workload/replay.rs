//! A trace used again: cut, stretched, or with other arrivals and adapters.

use super::arrivals::{Arrivals, round_ns};
use super::popularity::{AdapterDraw, Popularity};
use super::spec::{Amount, MOST_SECONDS, WorkloadError, check_duration, check_seconds, rank_of, times};
use super::trace::{NO_ADAPTERS, Trace, TraceRequest};

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
    /// As in [`WorkloadSpec::ranks`](super::spec::WorkloadSpec::ranks); empty keeps the trace's.
    pub ranks: Vec<u32>,
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
    match (times.last(), replay.rate) {
        (None, _) => {
            Err(WorkloadError::NoRequests("none of the trace arrives in what was asked for".to_owned()))
        }
        (Some(&last), None) if last > MOST_SECONDS => Err(WorkloadError::TooLong(last)),
        (Some(&last), Some(rate)) => check_seconds(last, rate).map(|()| times),
        _ => Ok(times),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::pool::PromptPool;
    use crate::workload::regime::Regime;
    use crate::workload::spec::{WorkloadSpec, generate_trace};

    /// 200 requests at 2 a second.
    fn trace() -> Trace {
        let spec = WorkloadSpec {
            regime: Regime::Short,
            arrivals: Arrivals::Poisson,
            rate: 2.0,
            popularity: Popularity::Zipf { s: 1.0 },
            total_loras: 128,
            amount: Amount::Requests(200),
            max_tokens: 16,
            seed: 42,
            ranks: vec![8, 16],
        };
        generate_trace(&spec, &PromptPool::embedded(Regime::Short)).unwrap()
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
        let trace = trace();
        assert_eq!(replay_trace(&trace, &as_it_is()).unwrap(), trace);
    }

    #[test]
    fn a_trace_can_be_cut_stretched_and_drawn_anew() {
        let trace = trace();
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
        let trace = trace();
        let refused = |replay| replay_trace(&trace, &replay).unwrap_err().to_string();
        assert!(refused(Replay { total_loras: 8, ..as_it_is() }).contains("there are 8"));
        assert!(
            refused(Replay { amount: Some(Amount::Requests(201)), ..as_it_is() })
                .contains("the trace has 200")
        );
        assert!(refused(Replay { rate: Some(-1.0), ..as_it_is() }).contains("positive"));
        assert!(refused(Replay { rate: Some(1e-9), ..as_it_is() }).contains("at 1e-9 requests a second"));
        assert!(refused(Replay { arrivals: Arrivals::Poisson, ..as_it_is() }).contains("positive"));
        assert!(
            refused(Replay { amount: Some(Amount::DurationS(1e-9)), ..as_it_is() }).contains("no requests")
        );
    }

    #[test]
    fn a_trace_that_lasts_longer_than_any_run_is_refused() {
        let mut trace = trace();
        trace.requests[199].arrival_s = 1e10;
        let error = replay_trace(&trace, &as_it_is()).unwrap_err().to_string();
        assert!(error.contains("arrives 1.0e10 s after its start"), "{error}");
        let cut = Replay { amount: Some(Amount::Requests(199)), ..as_it_is() };
        assert!(replay_trace(&trace, &cut).is_ok());
    }

    #[test]
    fn a_trace_without_adapters_gets_them() {
        let mut trace = trace();
        trace.header.popularity = NO_ADAPTERS.to_owned();
        trace.requests.iter_mut().for_each(|r| r.adapter = None);
        let replayed = replay_trace(&trace, &as_it_is()).unwrap();
        assert!(replayed.requests.iter().all(|r| r.adapter.is_some()));
        assert_eq!(replayed.header.popularity, "uniform");
    }
}
