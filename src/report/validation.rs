//! Simulated against measured results: errors, the measurements' own spread, and skill.

use serde::Serialize;

use super::results::{ResultRow, Source};
use super::stats::{mean, repeat_spread, skill};

/// One statistic at one budget.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Compared {
    /// Mean over the measured repeats, seconds.
    pub measured_s: f64,
    /// Median pairwise difference of the repeats, per cent of their mean; none of one run.
    pub spread_percent: Option<f64>,
    /// Mean over the simulated runs, seconds.
    pub simulated_s: f64,
}

impl Compared {
    /// Signed error of the simulation, per cent.
    pub fn error_percent(&self) -> f64 {
        (self.simulated_s / self.measured_s - 1.0) * 100.0
    }

    /// Whether the error is within `limit` per cent or twice the repeats' spread, which counts for at
    /// most 10 per cent.
    pub fn within(&self, limit: f64) -> bool {
        self.error_percent().abs() <= limit.max(2.0 * self.spread_percent.unwrap_or(0.0).min(10.0))
    }

    fn of(measured: &[f64], simulated: &[f64]) -> Option<Self> {
        Some(Self {
            measured_s: mean(measured)?,
            spread_percent: repeat_spread(measured),
            simulated_s: mean(simulated)?,
        })
    }
}

/// One budget.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct BudgetComparison {
    /// The budget.
    pub gpu_loras: u32,
    /// Measured runs.
    pub runs: usize,
    /// Median TTFT.
    pub median: Compared,
    /// 90th percentile.
    pub p90: Compared,
    /// 99th percentile.
    pub p99: Compared,
    /// Mean.
    pub mean: Compared,
    /// Swaps, measured (mean over runs) and simulated.
    pub swaps: (f64, f64),
}

/// A sweep over budgets.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Validation {
    /// Budgets with both measured and simulated rows, ascending.
    pub budgets: Vec<BudgetComparison>,
    /// 1 − MAE / MAE of the best constant, over the budgets' medians; none of fewer than two budgets.
    pub skill: Option<f64>,
    /// Measured median at the smallest budget over that at the largest.
    pub effect: Option<f64>,
}

impl Validation {
    /// Compares rows of one sweep: of one configuration but for `gpu_loras`, source, seed and repeat.
    pub fn of(rows: &[ResultRow]) -> Self {
        let mut budgets: Vec<u32> = rows.iter().map(|r| r.gpu_loras).collect();
        budgets.sort_unstable();
        budgets.dedup();
        let budgets: Vec<BudgetComparison> = budgets.into_iter().filter_map(|b| compare(rows, b)).collect();
        let simulated: Vec<f64> = budgets.iter().map(|b| b.median.simulated_s).collect();
        let measured: Vec<f64> = budgets.iter().map(|b| b.median.measured_s).collect();
        let effect = measured.first().zip(measured.last()).map(|(small, full)| small / full);
        Self { skill: skill(&simulated, &measured), budgets, effect }
    }

    /// Whether medians are within `median` per cent and 90th percentiles within `p90` at every budget
    /// (or twice the spread), and the skill is at least `skill`.
    pub fn holds(&self, median: f64, p90: f64, skill: f64) -> bool {
        !self.budgets.is_empty()
            && self.budgets.iter().all(|b| b.median.within(median) && b.p90.within(p90))
            && self.skill.is_none_or(|s| s >= skill)
    }
}

fn compare(rows: &[ResultRow], gpu_loras: u32) -> Option<BudgetComparison> {
    let values = |source: Source, of: fn(&ResultRow) -> Option<f64>| -> Vec<f64> {
        rows.iter().filter(|r| r.gpu_loras == gpu_loras && r.source == source).filter_map(of).collect()
    };
    let both = |of: fn(&ResultRow) -> Option<f64>| {
        Compared::of(&values(Source::Measured, of), &values(Source::Simulated, of))
    };
    let swaps = |source| mean(&values(source, |r| r.swap_count.map(|n| n as f64))).unwrap_or(0.0);
    Some(BudgetComparison {
        gpu_loras,
        runs: values(Source::Measured, |r| r.ttft_median).len(),
        median: both(|r| r.ttft_median)?,
        p90: both(|r| r.ttft_p90)?,
        p99: both(|r| r.ttft_p99)?,
        mean: both(|r| r.ttft_mean)?,
        swaps: (swaps(Source::Measured), swaps(Source::Simulated)),
    })
}
