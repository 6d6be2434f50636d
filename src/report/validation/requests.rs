//! Request by request: the same arrivals, measured and simulated.

use std::collections::HashMap;

use serde::Serialize;

use super::Compared;
use crate::report::record::{RequestRecord, Status};
use crate::report::stats::{ks_distance, mean, median, percentile, sorted, wasserstein};

/// Errors over the requests of one budget's runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RequestErrors {
    /// Pairs of the same request, measured and simulated, over all repeats.
    pub pairs: usize,
    /// Median over them of the relative difference of the TTFTs, per cent.
    pub median_percent: f64,
    /// Its 90th percentile.
    pub p90_percent: f64,
    /// Kolmogorov–Smirnov distance of the TTFTs' distributions, mean over repeats.
    pub ks: f64,
    /// Wasserstein distance, seconds, likewise.
    pub wasserstein_s: f64,
    /// Mean time for each output token after the first; none where outputs have one.
    pub tpot: Option<Compared>,
    /// The same between repeats of the engine: the least that a prediction could show.
    pub itself: Option<Itself>,
}

/// The engine against itself, over pairs of repeats on one trace.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Itself {
    /// As [`RequestErrors::median_percent`].
    pub median_percent: f64,
    /// As [`RequestErrors::p90_percent`].
    pub p90_percent: f64,
    /// As [`RequestErrors::ks`].
    pub ks: f64,
}

/// Pairs of runs on one trace, compared.
#[derive(Default)]
struct Pairs {
    errors: Vec<f64>,
    ks: Vec<f64>,
    wasserstein: Vec<f64>,
}

impl Pairs {
    /// `other` against `base`, which the errors are relative to.
    fn add(&mut self, base: &[RequestRecord], other: &[RequestRecord]) {
        let by_id: HashMap<u64, f64> = ttfts(other).collect();
        let both = ttfts(base).filter_map(|(id, ttft)| Some((ttft, *by_id.get(&id)?)));
        self.errors.extend(both.filter(|(base, _)| *base > 0.0).map(|(a, b)| (b / a - 1.0).abs() * 100.0));
        let values = |records| ttfts(records).map(|t| t.1).collect::<Vec<f64>>();
        let (a, b) = (values(base), values(other));
        self.ks.extend(ks_distance(&a, &b));
        self.wasserstein.extend(wasserstein(&a, &b));
    }

    fn quantiles(&self) -> Option<(f64, f64)> {
        let sorted = sorted(&self.errors);
        median(&sorted).zip(percentile(&sorted, 90.0))
    }
}

fn ttfts(records: &[RequestRecord]) -> impl Iterator<Item = (u64, f64)> {
    records.iter().filter(|r| r.status == Status::Ok).filter_map(|r| Some((r.id, r.ttft_s?)))
}

/// Mean time a token after the first over the requests with more than one.
fn tpot(records: &[RequestRecord]) -> Option<f64> {
    let of = |r: &RequestRecord| {
        let after_first = r.output_tokens.checked_sub(1).filter(|n| *n > 0)?;
        Some((r.last_s? - r.first_s?) / f64::from(after_first))
    };
    mean(&records.iter().filter_map(of).collect::<Vec<_>>())
}

impl RequestErrors {
    /// Of runs by trace: each trace's measured repeats and its simulation. None where no request is in
    /// both.
    pub fn of(traces: &[(Vec<Vec<RequestRecord>>, Vec<RequestRecord>)]) -> Option<Self> {
        let (mut predicted, mut repeated) = (Pairs::default(), Pairs::default());
        let tpot_of = |(repeats, simulated): &(Vec<Vec<RequestRecord>>, Vec<RequestRecord>)| {
            (repeats.iter().filter_map(|r| tpot(r)).collect(), tpot(simulated).into_iter().collect())
        };
        for (repeats, simulated) in traces {
            for (i, repeat) in repeats.iter().enumerate() {
                predicted.add(repeat, simulated);
                repeats[..i].iter().for_each(|before| repeated.add(before, repeat));
            }
        }
        let (median_percent, p90_percent) = predicted.quantiles()?;
        let itself = repeated.quantiles().zip(mean(&repeated.ks));
        Some(Self {
            pairs: predicted.errors.len(),
            median_percent,
            p90_percent,
            ks: mean(&predicted.ks)?,
            wasserstein_s: mean(&predicted.wasserstein)?,
            tpot: Compared::over(traces.iter().map(tpot_of)),
            itself: itself.map(|((median_percent, p90_percent), ks)| Itself {
                median_percent,
                p90_percent,
                ks,
            }),
        })
    }
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;

    use super::*;

    fn run(ttfts: &[f64]) -> Vec<RequestRecord> {
        let record = |(id, &ttft): (u64, &f64)| RequestRecord {
            id,
            adapter: None,
            rank: None,
            prompt_tokens: 10,
            output_tokens: 5,
            scheduled_s: 0.0,
            sent_s: 0.0,
            first_s: Some(ttft),
            last_s: Some(ttft + 0.4),
            ttft_s: Some(ttft),
            latency_s: Some(ttft + 0.4),
            status: Status::Ok,
            parts: None,
            error: None,
        };
        (0..).zip(ttfts).map(record).collect()
    }

    #[test]
    fn errors_are_between_the_same_requests() {
        let measured = run(&[1.0, 2.0, 4.0, 5.0]);
        // The same distribution but for one value, in another order.
        let simulated = run(&[2.0, 1.0, 4.0, 6.0]);
        let e = RequestErrors::of(&[(vec![measured], simulated)]).unwrap();
        // 100 %, 50 %, 0 %, 20 %.
        assert_eq!(e.pairs, 4);
        assert_relative_eq!(e.median_percent, 35.0, epsilon = 1e-9);
        assert_relative_eq!(e.p90_percent, 100.0, epsilon = 1e-9);
        assert_relative_eq!(e.ks, 0.25, epsilon = 1e-9);
        assert_relative_eq!(e.wasserstein_s, 0.25, epsilon = 1e-9);
        assert_relative_eq!(e.tpot.unwrap().error_percent, 0.0, epsilon = 1e-9);
        assert_eq!(e.itself, None);
    }

    #[test]
    fn repeats_give_the_floor() {
        let repeats = vec![run(&[1.0, 2.0]), run(&[1.1, 2.0]), run(&[1.0, 2.2])];
        let e = RequestErrors::of(&[(repeats, run(&[1.0, 2.0]))]).unwrap();
        let floor = e.itself.unwrap();
        assert!(floor.median_percent > 0.0 && floor.p90_percent > 9.0);
        assert_eq!(e.pairs, 6);
    }

    #[test]
    fn requests_of_other_traces_are_none() {
        assert_eq!(RequestErrors::of(&[(vec![run(&[1.0])], Vec::new())]), None);
        assert_eq!(RequestErrors::of(&[]), None);
    }
}
