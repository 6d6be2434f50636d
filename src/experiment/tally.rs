//! The statistics of a simulated run of any length, kept while it runs.
//!
//! Memory is eight bytes a request, for the exact quantiles of the TTFT. Latencies, of which the
//! results have quantiles too, are kept one by one only up to a million; a longer run counts them
//! in bins of a relative width under 0.1 %.

use lora_sched::Nanos;

use crate::report::results::{ResultRow, RunContext};
use crate::sim::{Observer, Outcome};

/// Collects what a row says.
#[derive(Debug)]
pub struct Tally {
    /// Requests of lower numbers are left out.
    first: u64,
    deliver: Nanos,
    /// From receipt to the first token, delivery left out.
    ttft: Vec<Nanos>,
    latency: Latencies,
    prompt: (u32, u32, u64),
    /// Front, queue, kv, slot, swap, prefill.
    parts: [u128; 6],
}

impl Tally {
    /// For a run of about `requests`, of which the first `warm_up` are left out; tokens are delivered
    /// after `deliver`.
    pub fn new(requests: usize, warm_up: u64, deliver: Nanos) -> Self {
        Self {
            first: warm_up,
            deliver,
            ttft: Vec::with_capacity(requests),
            latency: Latencies::default(),
            prompt: (u32::MAX, 0, 0),
            parts: [0; 6],
        }
    }

    /// Requests so far.
    pub fn requests(&self) -> u64 {
        self.ttft.len() as u64
    }

    /// The row of the run. Quantiles are the reference's, as everywhere in results.
    pub fn row(mut self, context: &RunContext) -> ResultRow {
        let n = self.ttft.len();
        let mut row = ResultRow::from_records(&[], context);
        row.total_requests = n as u64;
        row.successful = n as u64;
        if n == 0 {
            return row;
        }
        (row.success_rate, row.error_rate) = (Some(100.0), Some(0.0));
        row.prompt_tokens_min = Some(self.prompt.0);
        row.prompt_tokens_max = Some(self.prompt.1);
        let mean = |sum: u128| sum as f64 / n as f64 * 1e-9;
        row.prompt_tokens_mean = Some(self.prompt.2 as f64 / n as f64);

        let deliver = self.deliver;
        let s = |ns: Nanos| Some((ns + deliver) as f64 * 1e-9);
        row.ttft_mean = Some(mean(self.ttft.iter().map(|&t| u128::from(t + deliver)).sum()));
        let ends = (self.ttft.iter().min().copied(), self.ttft.iter().max().copied());
        (row.ttft_min, row.ttft_max) = (ends.0.and_then(s), ends.1.and_then(s));
        row.ttft_p99 = s(select(&mut self.ttft, 99));
        row.ttft_p90 = s(select(&mut self.ttft, 90));
        row.ttft_median = Some(median(&mut self.ttft) * 1e-9 + deliver as f64 * 1e-9);
        (row.client_ttft_median, row.client_ttft_p99) = (row.ttft_median, row.ttft_p99);

        row.latency_min = s(self.latency.min);
        row.latency_max = s(self.latency.max);
        row.latency_mean = Some(mean(self.latency.sum + u128::from(deliver) * n as u128));
        row.latency_median = Some((self.latency.median() + deliver as f64) * 1e-9);
        row.latency_p90 = s(self.latency.percentile(90));
        row.latency_p99 = s(self.latency.percentile(99));

        let [front, queue, kv, slot, swap, prefill] = self.parts.map(mean);
        row.ttft_front_mean = Some(front);
        row.ttft_queue_mean = Some(queue);
        row.ttft_kv_mean = Some(kv);
        row.ttft_slot_mean = Some(slot);
        row.ttft_swap_mean = Some(swap);
        row.ttft_prefill_mean = Some(prefill);
        row.ttft_deliver_mean = Some(deliver as f64 * 1e-9);
        row
    }
}

impl Observer for Tally {
    fn outcome(&mut self, outcome: &Outcome) {
        let Outcome { request, first, last, parts, .. } = outcome;
        if request.id < self.first {
            return;
        }
        self.ttft.push(first - request.received);
        self.latency.push(last - request.received);
        let (least, most, sum) = &mut self.prompt;
        *least = (*least).min(request.prompt_tokens);
        *most = (*most).max(request.prompt_tokens);
        *sum += u64::from(request.prompt_tokens);
        let parts = [parts.front, parts.queue, parts.kv, parts.slot, parts.swap, parts.prefill];
        for (sum, part) in self.parts.iter_mut().zip(parts) {
            *sum += u128::from(part);
        }
    }
}

/// The `p`-th percentile by the reference's rule.
fn select(values: &mut [Nanos], p: usize) -> Nanos {
    let at = (values.len() * p / 100).min(values.len() - 1);
    *values.select_nth_unstable(at).1
}

fn median(values: &mut [Nanos]) -> f64 {
    let n = values.len();
    let upper = *values.select_nth_unstable(n / 2).1;
    if n % 2 == 1 {
        return upper as f64;
    }
    let lower = values[..n / 2].iter().max().copied().unwrap_or(upper);
    (lower as f64 + upper as f64) / 2.0
}

/// Latencies kept one by one, at most.
const EXACT: usize = 1 << 20;
/// Bins between a power of two and the next.
const BINS: usize = 1 << 10;

#[derive(Debug)]
struct Latencies {
    exact: Vec<Nanos>,
    /// Counts by power of two and part of it; empty while all are kept.
    bins: Vec<u64>,
    count: u64,
    min: Nanos,
    max: Nanos,
    sum: u128,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { exact: Vec::new(), bins: Vec::new(), count: 0, min: Nanos::MAX, max: 0, sum: 0 }
    }
}

impl Latencies {
    fn push(&mut self, value: Nanos) {
        self.count += 1;
        self.min = self.min.min(value);
        self.max = self.max.max(value);
        self.sum += u128::from(value);
        if self.bins.is_empty() {
            self.exact.push(value);
            if self.exact.len() == EXACT {
                self.bins = vec![0; (u64::BITS as usize + 1) * BINS];
                let exact = std::mem::take(&mut self.exact);
                exact.into_iter().for_each(|v| self.bins[bin(v)] += 1);
            }
        } else {
            self.bins[bin(value)] += 1;
        }
    }

    fn percentile(&mut self, p: usize) -> Nanos {
        if self.bins.is_empty() {
            return select(&mut self.exact, p);
        }
        self.at((self.count * p as u64 / 100).min(self.count - 1))
    }

    fn median(&mut self) -> f64 {
        if self.bins.is_empty() {
            return median(&mut self.exact);
        }
        (self.at((self.count - 1) / 2) as f64 + self.at(self.count / 2) as f64) / 2.0
    }

    /// The middle of the bin in which the value lies that has `below` before it.
    fn at(&self, below: u64) -> Nanos {
        let mut seen = 0;
        let holds = |count: &u64| {
            seen += count;
            seen > below
        };
        let bin = self.bins.iter().position(holds).unwrap_or(self.bins.len() - 1);
        middle(bin).clamp(self.min, self.max)
    }
}

/// The bin of a value: the values under `BINS` have one each.
fn bin(value: Nanos) -> usize {
    let octave = (u64::BITS - value.leading_zeros()).saturating_sub(BINS.trailing_zeros() + 1) as usize;
    octave * BINS + (value >> octave) as usize
}

fn middle(bin: usize) -> Nanos {
    if bin < 2 * BINS {
        return bin as Nanos;
    }
    let octave = bin / BINS - 1;
    let low = ((bin - octave * BINS) as u64) << octave;
    low + (1 << octave) / 2
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_bin_s_middle_is_within_a_thousandth_of_its_values(value in 0u64..u64::MAX / 2) {
            let middle = middle(bin(value));
            prop_assert!(middle.abs_diff(value) as f64 <= value as f64 * 0.001, "{value} in a bin around {middle}");
        }
    }

    #[test]
    fn long_runs_have_the_quantiles_of_short_ones_to_a_thousandth() {
        let mut latencies = Latencies::default();
        let mut all: Vec<f64> = Vec::new();
        for i in 0..(EXACT as u64 + 1000) {
            let value = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
            latencies.push(value);
            all.push(value as f64);
        }
        let sorted = crate::report::stats::sorted(&all);
        for p in [90, 99] {
            let exact = crate::report::stats::percentile(&sorted, p as f64).unwrap();
            assert_relative_eq!(latencies.percentile(p) as f64, exact, max_relative = 1e-3);
        }
        let exact = crate::report::stats::median(&sorted).unwrap();
        assert_relative_eq!(latencies.median(), exact, max_relative = 1e-3);
    }
}
