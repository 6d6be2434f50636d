//! Service-level objectives: bounds on statistics of a results row.

use std::fmt;
use std::str::FromStr;

use crate::report::results::ResultRow;

/// A column's name, and its value in a row.
type Metric = (&'static str, fn(&ResultRow) -> Option<f64>);

/// The statistics that an objective may bound.
const METRICS: [Metric; 10] = [
    ("ttft_median", |r| r.ttft_median),
    ("ttft_mean", |r| r.ttft_mean),
    ("ttft_p90", |r| r.ttft_p90),
    ("ttft_p99", |r| r.ttft_p99),
    ("ttft_max", |r| r.ttft_max),
    ("latency_median", |r| r.latency_median),
    ("latency_mean", |r| r.latency_mean),
    ("latency_p90", |r| r.latency_p90),
    ("latency_p99", |r| r.latency_p99),
    ("latency_max", |r| r.latency_max),
];

/// One bound, as `ttft_p99<500ms`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slo {
    /// Index in the list of metrics.
    metric: usize,
    /// The bound, seconds.
    pub limit_s: f64,
}

impl Slo {
    /// The bounded statistic's column.
    pub fn metric(&self) -> &'static str {
        METRICS[self.metric].0
    }

    /// The statistic's value in a row, seconds.
    pub fn of(&self, row: &ResultRow) -> Option<f64> {
        METRICS[self.metric].1(row)
    }
}

impl fmt::Display for Slo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}<{}ms", self.metric(), (self.limit_s * 1e9).round() / 1e6)
    }
}

/// Text that is no objective.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is no objective: {why}; write a statistic, < and a time, such as ttft_p99<500ms")]
pub struct NotAnSlo {
    text: String,
    why: String,
}

impl FromStr for Slo {
    type Err = NotAnSlo;

    fn from_str(text: &str) -> Result<Self, NotAnSlo> {
        let error = |why: String| NotAnSlo { text: text.to_owned(), why };
        let (name, bound) = text.split_once('<').ok_or_else(|| error("there is no '<'".to_owned()))?;
        let (name, bound) = (name.trim(), bound.trim_start_matches('=').trim());
        // The reference's and everybody's names for the same thing.
        let column = name.replace("_p50", "_median").replace("e2e_", "latency_");
        let metric = METRICS.iter().position(|m| m.0 == column).ok_or_else(|| {
            let names: Vec<_> = METRICS.iter().map(|m| m.0).collect();
            error(format!("'{name}' is none of {}", names.join(", ")))
        })?;
        let digits = bound.trim_end_matches(|c: char| c.is_alphabetic()).trim_end();
        let unit = match bound[digits.len()..].trim() {
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            other => return Err(error(format!("the unit '{other}' is none of s, ms, us"))),
        };
        match digits.parse::<f64>() {
            Ok(n) if n.is_finite() && n > 0.0 => Ok(Self { metric, limit_s: n * unit }),
            _ => Err(error(format!("'{digits}' is not a positive number"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objectives_are_read_with_their_units() {
        let slo: Slo = "ttft_p99<500ms".parse().unwrap();
        assert_eq!(
            (slo.metric(), slo.limit_s, slo.to_string().as_str()),
            ("ttft_p99", 0.5, "ttft_p99<500ms")
        );
        assert_eq!("ttft_p50 <= 1.5 s".parse::<Slo>().unwrap().to_string(), "ttft_median<1500ms");
        assert_eq!("e2e_mean<250us".parse::<Slo>().unwrap().to_string(), "latency_mean<0.25ms");
    }

    #[test]
    fn what_is_none_is_named_with_a_remedy() {
        for (text, part) in [
            ("ttft_p99", "no '<'"),
            ("ttft_p98<1s", "'ttft_p98' is none of"),
            ("ttft_p99<500", "unit ''"),
            ("ttft_p99<500min", "unit 'min'"),
            ("ttft_p99<-1s", "'-1'"),
            ("ttft_p99<nans", "unit 'nans'"),
        ] {
            let message = text.parse::<Slo>().unwrap_err().to_string();
            assert!(message.contains(part) && message.contains("such as ttft_p99<500ms"), "{message}");
        }
    }
}
