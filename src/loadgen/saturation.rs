//! Whether requests came faster than they were served.
//!
//! A client does not know the rate at which a server saturates; it sees whether the number of
//! requests in flight grows. The time of arrivals is cut in thirds: the first is warm-up, and if the
//! mean number in flight rises from the second to the last by more than 5 % of a third's arrivals,
//! then at least that share of the arrivals was not served in time, and the rate is above 0.95 of
//! what the server can do. Growth within twice the Poisson spread of the number in flight is taken for chance.

use crate::report::record::{RequestRecord, Status};

/// Fewer requests than this tell nothing.
const FEWEST: usize = 30;
/// Growth of the backlog as a share of a third's arrivals.
const SHARE: f64 = 0.05;

/// Whether the server fell behind; none if there are too few requests, or too short a run, to tell.
/// Failed requests are left out; one that timed out counts as in flight to the end.
pub fn saturated(records: &[RequestRecord]) -> Option<bool> {
    let in_flight: Vec<(f64, f64)> = records
        .iter()
        .filter_map(|r| match r.status {
            Status::Ok => Some((r.scheduled_s, r.last_s?)),
            Status::Timeout => Some((r.scheduled_s, f64::INFINITY)),
            Status::Error => None,
        })
        .collect();
    if in_flight.len() < FEWEST {
        return None;
    }
    let end = in_flight.iter().map(|r| r.0).fold(0.0, f64::max);
    if end <= 0.0 {
        return None;
    }
    let third = end / 3.0;
    let mean_in = |from: f64, to: f64| {
        let time: f64 = in_flight.iter().map(|r| (r.1.min(to) - r.0.max(from)).max(0.0)).sum();
        time / (to - from)
    };
    let (middle, last) = (mean_in(third, 2.0 * third), mean_in(2.0 * third, end));
    let arrivals = in_flight.iter().filter(|r| r.0 > 2.0 * third).count() as f64;
    let chance = 2.0 * middle.max(1.0).sqrt();
    Some(last - middle > (SHARE * arrivals).max(chance))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::arrivals::{ArrivalTimes, Arrivals};

    /// One server, first come first served, `service` seconds each, Poisson arrivals at 1 a second.
    fn queue(n: usize, service: f64, seed: u64) -> Vec<RequestRecord> {
        let mut free = 0.0f64;
        ArrivalTimes::new(Arrivals::Poisson, 1.0, seed)
            .unwrap()
            .take(n)
            .enumerate()
            .map(|(id, at)| {
                free = free.max(at) + service;
                RequestRecord {
                    id: id as u64,
                    adapter: None,
                    rank: None,
                    prompt_tokens: 1,
                    output_tokens: 1,
                    scheduled_s: at,
                    sent_s: at,
                    first_s: Some(free),
                    last_s: Some(free),
                    ttft_s: Some(free - at),
                    latency_s: Some(free - at),
                    status: Status::Ok,
                    parts: None,
                    error: None,
                }
            })
            .collect()
    }

    fn share_saturated(service: f64) -> f64 {
        let runs: Vec<bool> = (0..40).map(|seed| saturated(&queue(400, service, seed)).unwrap()).collect();
        runs.iter().filter(|s| **s).count() as f64 / runs.len() as f64
    }

    #[test]
    fn overload_is_told_from_load() {
        assert_eq!(share_saturated(0.2), 0.0);
        assert!(share_saturated(0.7) <= 0.1, "{}", share_saturated(0.7));
        assert!(share_saturated(1.25) >= 0.95, "{}", share_saturated(1.25));
        assert_eq!(share_saturated(2.0), 1.0);
    }

    #[test]
    fn long_answers_alone_are_no_saturation() {
        // Infinitely many servers of 30 s: 30 in flight, and no queue.
        let mut records = queue(400, 0.0, 1);
        records.iter_mut().for_each(|r| r.last_s = Some(r.scheduled_s + 30.0));
        assert_eq!(saturated(&records), Some(false));
    }

    #[test]
    fn a_server_that_only_times_out_is_saturated_and_a_short_run_says_nothing() {
        let mut records = queue(90, 0.0, 1);
        records.iter_mut().for_each(|r| r.status = Status::Timeout);
        assert_eq!(saturated(&records), Some(true));
        assert_eq!(saturated(&records[..20]), None);
        records.iter_mut().for_each(|r| r.status = Status::Error);
        assert_eq!(saturated(&records), None);
    }
}
