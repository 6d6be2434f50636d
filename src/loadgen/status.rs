//! The reference's verdict on an arrival rate.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A rate's status, by the first rule that holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RateStatus {
    /// More than 1 % of the requests failed or timed out, or none ended well.
    #[serde(rename = "TOO HIGH")]
    TooHigh,
    /// The TTFT's p99 is more than five times its median.
    #[serde(rename = "UNSTABLE")]
    Unstable,
    /// The TTFT's p99 is more than 10 s.
    #[serde(rename = "SLOW")]
    Slow,
    /// None of these. It says nothing about saturation: an overloaded system whose queue grows
    /// evenly is `OK` by these rules.
    #[serde(rename = "OK")]
    Ok,
}

impl RateStatus {
    /// From the error rate in percent and the TTFT's median and p99 in seconds.
    pub fn of(error_rate: f64, ttft_median: Option<f64>, ttft_p99: Option<f64>) -> Self {
        let (Some(median), Some(p99)) = (ttft_median, ttft_p99) else { return Self::TooHigh };
        if error_rate > 1.0 {
            Self::TooHigh
        } else if p99 > 5.0 * median {
            Self::Unstable
        } else if p99 > 10.0 {
            Self::Slow
        } else {
            Self::Ok
        }
    }

    /// As the tables show it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TooHigh => "TOO HIGH",
            Self::Unstable => "UNSTABLE",
            Self::Slow => "SLOW",
            Self::Ok => "OK",
        }
    }
}

impl fmt::Display for RateStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_hold_in_their_order_and_only_above_their_bounds() {
        let status = |errors, median, p99| RateStatus::of(errors, Some(median), Some(p99)).as_str();
        assert_eq!(status(0.0, 0.1, 0.4), "OK");
        assert_eq!(status(1.0, 1.0, 5.0), "OK");
        assert_eq!(status(1.1, 1.0, 50.0), "TOO HIGH");
        assert_eq!(status(1.0, 1.0, 50.0), "UNSTABLE");
        assert_eq!(status(0.0, 3.0, 10.1), "SLOW");
        assert_eq!(status(0.0, 3.0, 10.0), "OK");
        assert_eq!(RateStatus::of(0.0, None, None), RateStatus::TooHigh);
    }
}
