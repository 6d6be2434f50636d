//! A Prometheus histogram: counts below fixed bounds, and a sum.

use std::fmt::Write;
use std::sync::{Mutex, PoisonError};

/// Upper bounds of times, in seconds: from a step of a small model to a long answer of a large one.
pub(super) const SECONDS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 25.0,
    50.0, 100.0, 250.0, 1000.0,
];
/// Upper bounds of numbers of tokens.
pub(super) const TOKENS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 50000.0];

#[derive(Debug)]
struct Values {
    /// One a bound, and one for what is above the last.
    counts: Vec<u64>,
    sum: f64,
}

/// Readable while it is written: bounds, sum and count always agree.
#[derive(Debug)]
pub(super) struct Histogram {
    bounds: &'static [f64],
    values: Mutex<Values>,
}

impl Histogram {
    /// With these upper bounds, in increasing order.
    pub(super) fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, values: Mutex::new(Values { counts: vec![0; bounds.len() + 1], sum: 0.0 }) }
    }

    pub(super) fn observe(&self, value: f64) {
        let at = self.bounds.partition_point(|&bound| bound < value);
        let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        values.counts[at] += 1;
        values.sum += value;
    }

    /// Appends its samples, each with `labels`.
    pub(super) fn render(&self, out: &mut String, name: &str, labels: &str) {
        let values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        let mut below = 0;
        // Writing into a string cannot fail.
        for (bound, count) in self.bounds.iter().zip(&values.counts) {
            below += count;
            let _ = writeln!(out, "{name}_bucket{{{labels},le=\"{bound:?}\"}} {below}");
        }
        let all: u64 = values.counts.iter().sum();
        let _ = writeln!(out, "{name}_bucket{{{labels},le=\"+Inf\"}} {all}");
        let _ = writeln!(out, "{name}_sum{{{labels}}} {}", values.sum);
        let _ = writeln!(out, "{name}_count{{{labels}}} {all}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_at_a_bound_is_below_it_and_one_above_all_is_counted() {
        let histogram = Histogram::new(&[1.0, 2.0]);
        [0.5, 1.0, 1.5, 7.0].into_iter().for_each(|v| histogram.observe(v));
        let mut out = String::new();
        histogram.render(&mut out, "h", "a=\"b\"");
        let expected = "h_bucket{a=\"b\",le=\"1.0\"} 2\nh_bucket{a=\"b\",le=\"2.0\"} 3\n\
                        h_bucket{a=\"b\",le=\"+Inf\"} 4\nh_sum{a=\"b\"} 10\nh_count{a=\"b\"} 4\n";
        assert_eq!(out, expected);
    }

    #[test]
    fn bounds_increase() {
        for bounds in [SECONDS, TOKENS] {
            assert!(bounds.windows(2).all(|w| w[0] < w[1]));
        }
    }
}
