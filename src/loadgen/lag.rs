//! How late the client itself was: without it a slow client looks like a slow server.

use serde::{Deserialize, Serialize};

use crate::report::stats::{median, percentile, sorted};

/// Seconds from a request's scheduled time to its sending.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lag {
    /// Median.
    pub median_s: f64,
    /// 99th percentile.
    pub p99_s: f64,
    /// Largest.
    pub max_s: f64,
}

impl Lag {
    /// Of the requests that were sent; zero if none was.
    pub fn of(lags: &[f64]) -> Self {
        let lags = sorted(lags);
        Self {
            median_s: median(&lags).unwrap_or_default(),
            p99_s: percentile(&lags, 99.0).unwrap_or_default(),
            max_s: lags.last().copied().unwrap_or_default(),
        }
    }
}

impl std::fmt::Display for Lag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |s: f64| s * 1e3;
        write!(
            f,
            "median {:.2} ms, p99 {:.2} ms, max {:.2} ms",
            ms(self.median_s),
            ms(self.p99_s),
            ms(self.max_s)
        )
    }
}
