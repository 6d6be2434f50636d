//! When requests arrive.

use std::fmt;
use std::str::FromStr;

use rand::distr::Distribution;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Exp1, Gamma};
use serde::{Deserialize, Serialize};

use super::streams::stream;

/// How gaps between arrivals are drawn. As text: `poisson`, `fixed`, `gamma:CV`, `trace`.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Arrivals {
    /// Exponential gaps.
    #[default]
    Poisson,
    /// Equal gaps, the first arrival at 0.
    Fixed,
    /// Gamma gaps with this coefficient of variation; 1 is Poisson, more is burstier.
    Gamma {
        /// Standard deviation of a gap over its mean.
        cv: f64,
    },
    /// The times of the trace that is replayed.
    Trace,
}

impl fmt::Display for Arrivals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Poisson => f.write_str("poisson"),
            Self::Fixed => f.write_str("fixed"),
            Self::Gamma { cv } => write!(f, "gamma:{cv}"),
            Self::Trace => f.write_str("trace"),
        }
    }
}

impl FromStr for Arrivals {
    type Err = UnknownArrivals;

    fn from_str(text: &str) -> Result<Self, UnknownArrivals> {
        match text {
            "poisson" => return Ok(Self::Poisson),
            "fixed" => return Ok(Self::Fixed),
            "trace" => return Ok(Self::Trace),
            _ => {}
        }
        match text.strip_prefix("gamma:").map(str::parse::<f64>) {
            // Outside this range the gamma distribution is a point or all its mass is at zero.
            Some(Ok(cv)) if (0.01..=100.0).contains(&cv) => Ok(Self::Gamma { cv }),
            _ => Err(UnknownArrivals(text.to_owned())),
        }
    }
}

impl From<Arrivals> for String {
    fn from(arrivals: Arrivals) -> Self {
        arrivals.to_string()
    }
}

impl TryFrom<String> for Arrivals {
    type Error = UnknownArrivals;

    fn try_from(text: String) -> Result<Self, UnknownArrivals> {
        text.parse()
    }
}

/// Text that names no arrival process.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown arrivals '{0}': use poisson, fixed, gamma:CV (CV, the gaps' coefficient of variation, from 0.01 to 100), \
     or trace (the times of --trace)"
)]
pub struct UnknownArrivals(String);

/// Arrival times in seconds, without end. Times are whole nanoseconds, so that they are written and
/// read back without change.
#[derive(Clone, Debug)]
pub struct ArrivalTimes {
    gaps: Gaps,
    rng: ChaCha8Rng,
    /// Unrounded.
    now_s: f64,
}

#[derive(Clone, Debug)]
enum Gaps {
    Fixed { rate: f64, next: u64 },
    Exponential { rate: f64 },
    Gamma(Gamma<f64>),
}

impl ArrivalTimes {
    /// Arrivals at `rate` a second. None where no such process exists: the rate is not a positive
    /// number, or the times are a trace's.
    pub fn new(arrivals: Arrivals, rate: f64, seed: u64) -> Option<Self> {
        if !(rate.is_finite() && rate > 0.0) {
            return None;
        }
        let gaps = match arrivals {
            Arrivals::Poisson => Gaps::Exponential { rate },
            Arrivals::Fixed => Gaps::Fixed { rate, next: 0 },
            Arrivals::Gamma { cv } => {
                let shape = 1.0 / (cv * cv);
                Gaps::Gamma(Gamma::new(shape, 1.0 / (rate * shape)).ok()?)
            }
            Arrivals::Trace => return None,
        };
        Some(Self { gaps, rng: stream(seed, "arrivals"), now_s: 0.0 })
    }
}

impl Iterator for ArrivalTimes {
    type Item = f64;

    fn next(&mut self) -> Option<f64> {
        match &mut self.gaps {
            Gaps::Fixed { rate, next } => {
                self.now_s = *next as f64 / *rate;
                *next += 1;
            }
            Gaps::Exponential { rate } => {
                let gap: f64 = Exp1.sample(&mut self.rng);
                self.now_s += gap / *rate;
            }
            Gaps::Gamma(gamma) => self.now_s += gamma.sample(&mut self.rng),
        }
        Some(round_ns(self.now_s))
    }
}

/// `seconds` rounded to whole nanoseconds.
pub fn round_ns(seconds: f64) -> f64 {
    (seconds * 1e9).round() / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mean and coefficient of variation of 100,000 gaps.
    fn gaps(arrivals: Arrivals, rate: f64) -> (f64, f64) {
        let times: Vec<f64> = ArrivalTimes::new(arrivals, rate, 3).unwrap().take(100_001).collect();
        let gaps: Vec<f64> = times.windows(2).map(|w| w[1] - w[0]).collect();
        assert!(gaps.iter().all(|g| *g >= 0.0));
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        (mean, variance.sqrt() / mean)
    }

    #[test]
    fn gaps_have_the_rate_and_the_variation_asked_for() {
        // 100,000 gaps: the mean's standard error is cv/316 of it.
        for (arrivals, cv) in
            [(Arrivals::Poisson, 1.0), (Arrivals::Gamma { cv: 2.0 }, 2.0), (Arrivals::Gamma { cv: 0.5 }, 0.5)]
        {
            let (mean, seen) = gaps(arrivals, 4.0);
            assert!((mean * 4.0 - 1.0).abs() < 4.0 * cv / 316.0, "{arrivals}: mean {mean}");
            assert!((seen / cv - 1.0).abs() < 0.05, "{arrivals}: cv {seen}");
        }
        let (mean, cv) = gaps(Arrivals::Fixed, 4.0);
        assert!((mean - 0.25).abs() < 1e-9 && cv < 1e-6);
    }

    #[test]
    fn fixed_arrivals_start_at_once_and_do_not_drift() {
        let times: Vec<f64> = ArrivalTimes::new(Arrivals::Fixed, 3.0, 0).unwrap().take(3001).collect();
        assert_eq!((times[0], times[3], times[3000]), (0.0, 1.0, 1000.0));
    }

    #[test]
    fn impossible_rates_have_no_process() {
        for rate in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(ArrivalTimes::new(Arrivals::Poisson, rate, 0).is_none());
        }
        assert!(ArrivalTimes::new(Arrivals::Trace, 1.0, 0).is_none());
    }

    #[test]
    fn names_are_read_back_and_others_refused() {
        for text in ["poisson", "fixed", "gamma:2", "gamma:0.5", "trace"] {
            assert_eq!(text.parse::<Arrivals>().unwrap().to_string(), text);
        }
        for text in ["", "Poisson", "gamma", "gamma:", "gamma:0", "gamma:-1", "gamma:nan", "gamma:1e9", "x"] {
            let error = text.parse::<Arrivals>().unwrap_err().to_string();
            assert!(error.contains(&format!("'{text}'")) && error.contains("gamma:CV"), "{error}");
        }
    }
}
