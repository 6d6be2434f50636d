//! Statistics of one sample: quantiles, summaries and intervals. What compares two samples is in
//! `compare.rs`, re-exported here.
//!
//! Two rules for quantiles live side by side on purpose. [`percentile`] and [`median`] are the
//! reference experiment's, so that its columns can be compared number for number;
//! [`quantile_interval`] bounds the quantile of the distribution that the sample came from.

mod compare;

use serde::{Deserialize, Serialize};
use statrs::distribution::{Binomial, ContinuousCDF as _, DiscreteCDF as _, StudentsT};

pub use compare::{
    kendall_tau, ks_distance, mean_absolute, median_pairwise_difference, repeat_spread, signed_errors, skill,
    wasserstein,
};

/// A copy of `values` in ascending order.
pub fn sorted(values: &[f64]) -> Vec<f64> {
    let mut copy = values.to_vec();
    copy.sort_by(f64::total_cmp);
    copy
}

/// `sorted[floor(n * p / 100)]`, clamped to the last; none of an empty sample. `p` is in percent.
pub fn percentile(sorted: &[f64], p: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let index = (sorted.len() as f64 * p / 100.0).floor().max(0.0) as usize;
    Some(sorted[index.min(last)])
}

/// The middle value of a sorted sample, or the mean of the two in the middle; none of an empty one.
pub fn median(sorted: &[f64]) -> Option<f64> {
    let n = sorted.len();
    match n {
        0 => None,
        _ if n % 2 == 1 => Some(sorted[n / 2]),
        _ => Some((sorted[n / 2 - 1] + sorted[n / 2]) / 2.0),
    }
}

/// The arithmetic mean; none of an empty sample.
pub fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// The sample standard deviation (divisor n − 1); none under two values.
pub fn std_dev(values: &[f64]) -> Option<f64> {
    let m = mean(values)?;
    let n = values.len();
    (n > 1).then(|| (values.iter().map(|x| (x - m).powi(2)).sum::<f64>() / (n - 1) as f64).sqrt())
}

/// A sample in seven numbers, in the sample's unit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Values.
    pub count: usize,
    /// Least.
    pub min: f64,
    /// [`median`].
    pub median: f64,
    /// [`mean`].
    pub mean: f64,
    /// [`percentile`] 90.
    pub p90: f64,
    /// [`percentile`] 99.
    pub p99: f64,
    /// Greatest.
    pub max: f64,
}

impl Summary {
    /// Of a sample in any order; none of an empty one.
    pub fn of(values: &[f64]) -> Option<Self> {
        let sorted = sorted(values);
        Some(Self {
            count: sorted.len(),
            min: *sorted.first()?,
            median: median(&sorted)?,
            mean: mean(&sorted)?,
            p90: percentile(&sorted, 90.0)?,
            p99: percentile(&sorted, 99.0)?,
            max: *sorted.last()?,
        })
    }
}

/// A two-sided interval, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// Student's t interval of the mean over independent replicates, `confidence` in (0, 1). None under
/// two values, which say nothing about their own spread.
pub fn mean_interval(values: &[f64], confidence: f64) -> Option<Interval> {
    let (m, s) = (mean(values)?, std_dev(values)?);
    let n = values.len() as f64;
    let t = StudentsT::new(0.0, 1.0, n - 1.0).ok()?.inverse_cdf(0.5 + confidence / 2.0);
    let half = t * s / n.sqrt();
    Some(Interval { low: m - half, high: m + half })
}

/// Bounds of a quantile from order statistics alone. An end that the sample is too small to bound at
/// the level asked for is none: 200 values have no upper bound for a p99.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantileInterval {
    /// Lower end.
    pub low: Option<f64>,
    /// Upper end.
    pub high: Option<f64>,
}

/// The distribution-free interval of the quantile `q` (0 to 1), `confidence` in (0, 1), of which each
/// tail gets half. The number of values below the true quantile is binomial, so the ends are the
/// order statistics where its tails fall under that; it holds for independent values, which the
/// requests of one run under load are not: then it is too narrow, and replicates are the better way.
pub fn quantile_interval(sorted: &[f64], q: f64, confidence: f64) -> QuantileInterval {
    let n = sorted.len();
    let tail = (1.0 - confidence) / 2.0;
    let Ok(below) = Binomial::new(q, n as u64) else { return QuantileInterval { low: None, high: None } };
    // P(X_(k) > quantile) = P(fewer than k values are at or below it) = cdf(k - 1), k from 1.
    let mut low = None;
    for k in 1..=n {
        if below.cdf(k as u64 - 1) > tail {
            break;
        }
        low = Some(sorted[k - 1]);
    }
    // P(X_(k) < quantile) = P(at least k values are below it) = sf(k - 1).
    let mut high = None;
    for k in (1..=n).rev() {
        if below.sf(k as u64 - 1) > tail {
            break;
        }
        high = Some(sorted[k - 1]);
    }
    QuantileInterval { low, high }
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn percentile_is_the_references_rule() {
        let v: Vec<f64> = (1..=200).map(f64::from).collect();
        // floor(200 * 99 / 100) = 198, counted from zero.
        assert_eq!(percentile(&v, 99.0), Some(199.0));
        assert_eq!(percentile(&v, 50.0), Some(101.0));
        assert_eq!(percentile(&v, 0.0), Some(1.0));
        assert_eq!(percentile(&v, 100.0), Some(200.0));
        assert_eq!(percentile(&[7.0], 99.0), Some(7.0));
        assert_eq!(percentile(&[], 50.0), None);
    }

    #[test]
    fn median_averages_the_two_in_the_middle() {
        assert_eq!(median(&[1.0, 2.0, 4.0]), Some(2.0));
        assert_eq!(median(&[1.0, 2.0, 4.0, 9.0]), Some(3.0));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn summary_of_ten_values() {
        let v = [10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0];
        let s = Summary::of(&v).unwrap();
        assert_eq!((s.count, s.min, s.median, s.mean), (10, 1.0, 5.5, 5.5));
        assert_eq!((s.p90, s.p99, s.max), (10.0, 10.0, 10.0));
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn mean_interval_of_five_values() {
        // Mean 3, s = sqrt(2.5), t(0.975, 4) = 2.776445: half-width 1.963243.
        let i = mean_interval(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.95).unwrap();
        assert_relative_eq!(i.low, 3.0 - 1.963_243, epsilon = 1e-5);
        assert_relative_eq!(i.high, 3.0 + 1.963_243, epsilon = 1e-5);
        assert_eq!(mean_interval(&[1.0], 0.95), None);
    }

    #[test]
    fn quantile_interval_of_ten_values() {
        // Bin(10, 1/2): P(B <= 1) = 11/1024 = 0.0107, P(B <= 2) = 0.0547: the second from each end.
        let v: Vec<f64> = (1..=10).map(f64::from).collect();
        assert_eq!(quantile_interval(&v, 0.5, 0.95), QuantileInterval { low: Some(2.0), high: Some(9.0) });
    }

    #[test]
    fn a_small_sample_does_not_bound_a_p99() {
        let v: Vec<f64> = (1..=200).map(f64::from).collect();
        let i = quantile_interval(&v, 0.99, 0.95);
        // 0.99^200 = 0.134: with that chance the quantile is above every value.
        assert_eq!(i.high, None);
        assert!(i.low.unwrap() < 199.0);
        let v: Vec<f64> = (1..=2000).map(f64::from).collect();
        let i = quantile_interval(&v, 0.99, 0.95);
        assert!(i.low.unwrap() < 1980.0 && i.high.unwrap() > 1981.0, "{i:?}");
    }

    proptest! {
        #[test]
        fn percentiles_are_ordered_members(v in prop::collection::vec(-1e6f64..1e6, 1..80), a in 0.0f64..100.0, b in 0.0f64..100.0) {
            let v = sorted(&v);
            let (a, b) = (a.min(b), a.max(b));
            let (x, y) = (percentile(&v, a).unwrap(), percentile(&v, b).unwrap());
            prop_assert!(x <= y && v.contains(&x) && v.contains(&y));
        }

        #[test]
        fn quantile_intervals_contain_the_sample_quantile(v in prop::collection::vec(0f64..1e3, 6..80)) {
            let v = sorted(&v);
            let i = quantile_interval(&v, 0.5, 0.95);
            let m = median(&v).unwrap();
            prop_assert!(i.low.unwrap() <= m && m <= i.high.unwrap());
        }

        #[test]
        fn a_mean_interval_is_centred_on_the_mean(v in prop::collection::vec(0f64..1e3, 2..40)) {
            let i = mean_interval(&v, 0.95).unwrap();
            let m = mean(&v).unwrap();
            prop_assert!((i.low + i.high - 2.0 * m).abs() <= 1e-9 * (1.0 + m.abs()));
        }
    }
}
