//! Two configurations told apart: differences over replicates, with intervals.

use std::collections::BTreeMap;

use serde::Serialize;
use statrs::distribution::{ContinuousCDF as _, StudentsT};

use super::results::ResultRow;
use super::settings::Mixture;
use super::stats::{Interval, mean, mean_interval, std_dev};

/// Confidence of the intervals.
const CONFIDENCE: f64 = 0.95;

/// A column's name, and its value in a row.
type Statistic = (&'static str, fn(&ResultRow) -> Option<f64>);

/// The statistics that are compared.
const STATISTICS: [Statistic; 6] = [
    ("ttft_median", |r| r.ttft_median),
    ("ttft_mean", |r| r.ttft_mean),
    ("ttft_p90", |r| r.ttft_p90),
    ("ttft_p99", |r| r.ttft_p99),
    ("latency_mean", |r| r.latency_mean),
    ("latency_p99", |r| r.latency_p99),
];

/// Results that cannot be compared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ComparisonError {
    /// Neither file has what the other has.
    #[error(
        "{a} and {b} share no setting of budget, workload and load, and have several each: compare one at a time"
    )]
    NothingShared {
        /// Settings in the first.
        a: usize,
        /// In the second.
        b: usize,
    },
    /// Two runs where one is expected.
    #[error(
        "the rows of {what} have seed {seed} more than once: merge the file, or compare one configuration at a time"
    )]
    Twice {
        /// The settings.
        what: String,
        /// The seed.
        seed: String,
    },
    /// Several configurations that look alike.
    #[error("{what}: {mixture}")]
    Alike {
        /// The settings.
        what: String,
        /// The rows.
        mixture: Mixture,
    },
    /// Nothing to make an interval of.
    #[error("{what} has {a} and {b} runs: an interval needs two on each side; simulate with --seeds 10")]
    TooFew {
        /// The settings.
        what: String,
        /// Runs of the first.
        a: usize,
        /// Of the second.
        b: usize,
    },
}

/// One statistic of two configurations.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Its column.
    pub statistic: &'static str,
    /// Means over runs, seconds.
    pub a_s: f64,
    /// Likewise.
    pub b_s: f64,
    /// `b − a`: 95 % interval of the mean, seconds.
    pub difference_s: Interval,
}

impl Difference {
    /// Whether the interval leaves zero out.
    pub fn told_apart(&self) -> bool {
        self.difference_s.low > 0.0 || self.difference_s.high < 0.0
    }
}

/// Two configurations under the same conditions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Budget and workload, in words.
    pub what: String,
    /// Pairs of runs on the same trace; 0 where the traces differ and the runs are taken as independent.
    pub pairs: usize,
    /// One a statistic that both have.
    pub differences: Vec<Difference>,
}

/// What two rows share that are compared.
fn conditions(row: &ResultRow) -> String {
    let text = |v: &Option<String>| v.clone().unwrap_or_default();
    let number = |v: Option<f64>| v.map_or_else(String::new, |v| v.to_string());
    let load = match row.rho {
        Some(rho) => format!("rho {rho}"),
        None => format!("rate {}", number(row.arrival_rate)),
    };
    format!(
        "{:>5} of {} adapters, {}, {load}, {} arrivals, {} popularity, {} output tokens",
        row.gpu_loras,
        row.total_loras,
        row.prompt_regime,
        text(&row.arrivals),
        text(&row.popularity),
        row.max_tokens.map_or_else(String::new, |n| n.to_string()),
    )
}

type Runs<'a> = BTreeMap<(Option<u64>, Option<u32>), &'a ResultRow>;

fn grouped(rows: &[ResultRow]) -> Result<BTreeMap<String, Runs<'_>>, ComparisonError> {
    let mut groups: BTreeMap<String, Runs<'_>> = BTreeMap::new();
    for row in rows {
        let what = conditions(row);
        let before = groups.entry(what.clone()).or_default().insert((row.seed, row.repeat), row);
        if before.is_some() {
            let seed = row.seed.map_or_else(|| "none".to_owned(), |s| s.to_string());
            return Err(ComparisonError::Twice { what, seed });
        }
    }
    for (what, runs) in &groups {
        let of_one = Mixture::refuse(runs.values().copied());
        of_one.map_err(|mixture| ComparisonError::Alike { what: what.trim().to_owned(), mixture })?;
    }
    Ok(groups)
}

/// Compares what two files have of the same conditions; of two files with one configuration each,
/// those, whatever they differ in. Runs on the same trace are paired, which cuts the variance of the
/// difference many times.
pub fn compare(a: &[ResultRow], b: &[ResultRow]) -> Result<Vec<Comparison>, ComparisonError> {
    let (a, b) = (grouped(a)?, grouped(b)?);
    let shared: Vec<_> = a.iter().filter_map(|(what, runs)| Some((what, runs, b.get(what)?))).collect();
    if !shared.is_empty() {
        return shared.into_iter().map(|(what, a, b)| one(what.trim(), a, b)).collect();
    }
    match (a.iter().next(), b.iter().next()) {
        (Some((what_a, runs_a)), Some((what_b, runs_b))) if a.len() == 1 && b.len() == 1 => {
            Ok(vec![one(&format!("{} | {}", what_a.trim(), what_b.trim()), runs_a, runs_b)?])
        }
        _ => Err(ComparisonError::NothingShared { a: a.len(), b: b.len() }),
    }
}

fn one(what: &str, a: &Runs<'_>, b: &Runs<'_>) -> Result<Comparison, ComparisonError> {
    let pairs: Vec<_> = a.iter().filter_map(|(key, row)| Some((*row, *b.get(key)?))).collect();
    let paired = pairs.len() >= 2;
    if !paired && (a.len() < 2 || b.len() < 2) {
        return Err(ComparisonError::TooFew { what: what.to_owned(), a: a.len(), b: b.len() });
    }
    let difference = |(statistic, of): Statistic| {
        let (va, vb): (Vec<f64>, Vec<f64>) = if paired {
            pairs.iter().filter_map(|(a, b)| Some((of(a)?, of(b)?))).unzip()
        } else {
            (a.values().filter_map(|r| of(r)).collect(), b.values().filter_map(|r| of(r)).collect())
        };
        let difference_s = if paired {
            let differences: Vec<f64> = va.iter().zip(&vb).map(|(a, b)| b - a).collect();
            mean_interval(&differences, CONFIDENCE)?
        } else {
            welch(&va, &vb)?
        };
        Some(Difference { statistic, a_s: mean(&va)?, b_s: mean(&vb)?, difference_s })
    };
    Ok(Comparison {
        what: what.to_owned(),
        pairs: if paired { pairs.len() } else { 0 },
        differences: STATISTICS.into_iter().filter_map(difference).collect(),
    })
}

/// Welch's interval of the difference of two means of independent samples.
fn welch(a: &[f64], b: &[f64]) -> Option<Interval> {
    let part = |v: &[f64]| Some(std_dev(v)?.powi(2) / v.len() as f64);
    let (va, vb) = (part(a)?, part(b)?);
    let middle = mean(b)? - mean(a)?;
    if va + vb == 0.0 {
        return Some(Interval { low: middle, high: middle });
    }
    let freedom = (va + vb).powi(2) / (va.powi(2) / (a.len() - 1) as f64 + vb.powi(2) / (b.len() - 1) as f64);
    let t = StudentsT::new(0.0, 1.0, freedom).ok()?.inverse_cdf(0.5 + CONFIDENCE / 2.0);
    let half = t * (va + vb).sqrt();
    Some(Interval { low: middle - half, high: middle + half })
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;

    use super::*;
    use crate::report::results::{RunContext, Source};

    fn row(gpu_loras: u32, seed: u64, ttft: f64) -> ResultRow {
        let context = RunContext {
            seed: Some(seed),
            repeat: Some(0),
            arrival_rate: Some(2.0),
            ..RunContext::new(Source::Simulated, 128, gpu_loras, "short")
        };
        ResultRow { ttft_median: Some(ttft), ..ResultRow::from_records(&[], &context) }
    }

    /// Traces differ by seconds, the configurations by 10 ms on each.
    fn sides(offset: u64) -> (Vec<ResultRow>, Vec<ResultRow>) {
        let noise = |seed: u64| ((seed * 7919) % 13) as f64;
        let a = (0..8).map(|s| row(8, s, noise(s))).collect();
        let b = (0..8).map(|s| row(8, s + offset, noise(s) + 0.01 + 1e-4 * (s % 3) as f64)).collect();
        (a, b)
    }

    #[test]
    fn pairs_on_the_same_traces_tell_small_differences_apart() {
        let (a, b) = sides(0);
        let paired = &compare(&a, &b).unwrap()[0];
        assert_eq!((paired.pairs, paired.differences.len()), (8, 1));
        assert!(paired.differences[0].told_apart());
        assert_relative_eq!(paired.differences[0].difference_s.low, 0.01, epsilon = 2e-4);
        let (a, b) = sides(100);
        let independent = &compare(&a, &b).unwrap()[0];
        assert_eq!(independent.pairs, 0);
        assert!(!independent.differences[0].told_apart());
    }

    #[test]
    fn welch_s_interval_of_two_small_samples() {
        // Means 2 and 5; variances of the means 1/3 and 4/3: 25/9 / (1/18 + 8/9) = 2.941 degrees of
        // freedom, t = 3.2198.
        let i = welch(&[1.0, 2.0, 3.0], &[3.0, 5.0, 7.0]).unwrap();
        assert_relative_eq!(i.low + i.high, 6.0, epsilon = 1e-9);
        assert_relative_eq!((i.high - i.low) / 2.0, 3.2198 * (5.0f64 / 3.0).sqrt(), max_relative = 1e-3);
    }

    #[test]
    fn one_configuration_each_is_compared_whatever_differs() {
        let (a, _) = sides(0);
        let b: Vec<_> = (0..8).map(|s| row(32, s, 0.5)).collect();
        let found = compare(&a, &b).unwrap();
        assert!(found[0].what.contains("8 of 128") && found[0].what.contains("32 of 128"));
        let two: Vec<_> = b.iter().cloned().chain((0..8).map(|s| row(64, s, 0.5))).collect();
        assert!(compare(&a, &two).unwrap_err().to_string().contains("one at a time"));
    }

    #[test]
    fn rows_of_two_configurations_in_one_file_are_refused() {
        let (a, b) = sides(0);
        let of = |cell: &str, rows: &[ResultRow]| -> Vec<ResultRow> {
            rows.iter().map(|r| ResultRow { cell: Some(cell.to_owned()), ..r.clone() }).collect()
        };
        // No seed comes twice.
        let mixed = [of("a", &a[..4]), of("b", &a[4..])].concat();
        let error = compare(&mixed, &of("a", &b)).unwrap_err().to_string();
        assert!(error.contains("cells a and b"), "{error}");
        assert!(compare(&of("a", &a), &of("b", &b)).is_ok(), "one each is what is compared");
    }

    #[test]
    fn what_cannot_be_compared_is_refused_with_a_remedy() {
        let (a, b) = sides(0);
        let error = compare(&a[..1], &b[..1]).unwrap_err().to_string();
        assert!(error.contains("--seeds"), "{error}");
        let twice: Vec<_> = a.iter().chain(&a[..1]).cloned().collect();
        assert!(compare(&twice, &b).unwrap_err().to_string().contains("more than once"));
    }
}
