//! Simulated against measured results: errors, the measurements' own spread, naive predictors, skill.

mod adopt;
mod requests;

use std::collections::BTreeMap;

use serde::Serialize;

use super::results::{ResultRow, Source};
use super::stats::{kendall_tau, mean, median, repeat_spread, skill, sorted};

pub use requests::{Itself, RequestErrors};

/// Twice the spread counts for at most twice this, per cent.
const MOST_SPREAD: f64 = 10.0;
/// A budget is past the knee when its median is within this of the least, per cent.
const KNEE: f64 = 10.0;
/// Measured median at the smallest budget over that at the largest from which on the skill says something.
const EFFECT: f64 = 1.5;

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
        self.error_percent().abs() <= limit.max(2.0 * self.spread_percent.unwrap_or(0.0).min(MOST_SPREAD))
    }

    fn of(measured: &[f64], simulated: &[f64]) -> Option<Self> {
        Some(Self {
            measured_s: mean(measured)?,
            spread_percent: repeat_spread(measured),
            simulated_s: mean(simulated)?,
        })
    }
}

/// Errors of predictors that know nothing of queues, per cent and signed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Naive {
    /// One value for all budgets, the median of their measured medians: error of the median.
    pub constant_percent: Option<f64>,
    /// Service without queueing (front end, prefill, delivery, as simulated): error of the mean.
    pub service_percent: Option<f64>,
}

/// One budget.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BudgetComparison {
    /// The budget.
    pub gpu_loras: u32,
    /// Key of the experiment's cell.
    pub cell: Option<String>,
    /// Whether the load is beyond what the budget sustains, as measured, or else as simulated.
    pub saturated: bool,
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
    /// Median time from arrival to the last token.
    pub e2e_median: Option<Compared>,
    /// Swaps, measured (mean over runs) and simulated; none of a server that does not count them.
    pub swaps: (Option<f64>, Option<f64>),
    /// Spread of the measured swap counts, per cent.
    pub swap_spread_percent: Option<f64>,
    /// Beside the simulation's errors, those of naive predictors.
    pub naive: Naive,
    /// Errors request by request, where the requests are known.
    pub requests: Option<RequestErrors>,
    /// The factor on all costs with which the simulated mean TTFT is the measured one.
    pub cost_factor: Option<f64>,
}

impl BudgetComparison {
    /// What does not hold of the campaign's bounds: 3 % of median and mean, 5 % of p99 (or twice the
    /// spread); swap counts to 1 %, two, or the spread; per-request error and distance no more than
    /// half as much again as the engine's against itself.
    pub fn misses(&self) -> Vec<&'static str> {
        let mut misses = Vec::new();
        let mut hold = |what, holds: bool| {
            if !holds {
                misses.push(what);
            }
        };
        hold("median", self.median.within(3.0));
        hold("mean", self.mean.within(3.0));
        hold("p99", self.p99.within(5.0));
        if let (Some(measured), Some(simulated)) = self.swaps {
            let spread = self.swap_spread_percent.unwrap_or(0.0) / 100.0 * measured;
            hold("swaps", (measured - simulated).abs() <= (0.01 * measured).max(2.0).max(spread));
        }
        if let Some(requests) = &self.requests
            && let Some(itself) = &requests.itself
        {
            hold("per request", requests.p90_percent <= 1.5 * itself.p90_percent);
            hold("distance", requests.ks <= 1.5 * itself.ks);
        }
        misses
    }
}

/// A sweep over budgets.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Validation {
    /// What the rows have in common.
    pub what: String,
    /// Budgets with both measured and simulated rows, ascending.
    pub budgets: Vec<BudgetComparison>,
    /// 1 − MAE / MAE of the best constant, over the budgets' medians; none of fewer than two budgets.
    pub skill: Option<f64>,
    /// Measured median at the smallest budget over that at the largest.
    pub effect: Option<f64>,
    /// Kendall's τ of simulated and measured medians over pairs of budgets whose repeats do not
    /// overlap; none where no pair is told apart.
    pub tau: Option<f64>,
    /// The smallest budget whose median is within 10 % of the least: measured, simulated.
    pub knee: Option<(u32, u32)>,
}

impl Validation {
    /// Compares rows of one sweep: of one configuration but for `gpu_loras`, source, seed and repeat.
    pub fn of(rows: &[ResultRow]) -> Self {
        let mut of_budget: BTreeMap<u32, Vec<&ResultRow>> = BTreeMap::new();
        for row in rows {
            of_budget.entry(row.gpu_loras).or_default().push(row);
        }
        let mut budgets: Vec<BudgetComparison> =
            of_budget.iter().filter_map(|(&b, rows)| compare(rows, b)).collect();
        let simulated: Vec<f64> = budgets.iter().map(|b| b.median.simulated_s).collect();
        let measured: Vec<f64> = budgets.iter().map(|b| b.median.measured_s).collect();
        if let Some(constant) = median(&sorted(&measured)) {
            for (budget, measured) in budgets.iter_mut().zip(&measured) {
                budget.naive.constant_percent = Some((constant / measured - 1.0) * 100.0);
            }
        }
        let range = |b: &BudgetComparison| {
            let of = of_budget[&b.gpu_loras].iter().filter(|r| r.source == Source::Measured);
            let medians: Vec<f64> = of.filter_map(|r| r.ttft_median).collect();
            let ends = sorted(&medians);
            (ends.first().copied().unwrap_or(f64::NAN), ends.last().copied().unwrap_or(f64::NAN))
        };
        let ranges: Vec<(f64, f64)> = budgets.iter().map(range).collect();
        let apart = |i: usize, j: usize| ranges[i].1 < ranges[j].0 || ranges[j].1 < ranges[i].0;
        let knee = |medians: &[f64]| {
            let least = medians.iter().copied().fold(f64::INFINITY, f64::min);
            let past = medians.iter().position(|m| *m <= least * (1.0 + KNEE / 100.0))?;
            Some(budgets[past].gpu_loras)
        };
        Self {
            what: rows.first().map_or_else(String::new, what),
            skill: skill(&simulated, &measured),
            effect: measured.first().zip(measured.last()).map(|(small, full)| small / full),
            tau: kendall_tau(&simulated, &measured, apart),
            knee: knee(&measured).zip(knee(&simulated)),
            budgets,
        }
    }

    /// One validation for each configuration, in order of their descriptions.
    pub fn each(rows: &[ResultRow]) -> Vec<Self> {
        let mut rows = rows.to_vec();
        adopt::adopt_settings(&mut rows);
        let mut groups: BTreeMap<String, Vec<ResultRow>> = BTreeMap::new();
        for row in rows {
            groups.entry(what(&row)).or_default().push(row);
        }
        groups.values().map(|rows| Self::of(rows)).filter(|v| !v.budgets.is_empty()).collect()
    }

    /// What the budgets come to together, a line each.
    pub fn said(&self) -> Vec<String> {
        let effect = self.effect.map(|effect| {
            format!("measured median TTFT at the smallest budget: {effect:.2} times that at the largest")
        });
        let skill =
            self.skill.map(|skill| format!("skill against the best constant over budgets: {skill:.3}"));
        let tau = self
            .tau
            .map(|tau| format!("Kendall's tau over the pairs of budgets that repeats tell apart: {tau:.2}"));
        let knee = self.knee.map(|(measured, simulated)| {
            format!(
                "within 10 % of the least median from budget {measured} on; simulated, from {simulated} on"
            )
        });
        [effect, skill, tau, knee].into_iter().flatten().collect()
    }

    /// What does not hold of medians within `median` per cent and 90th percentiles within `p90` at every budget (or
    /// twice the spread), and of a skill of at least `skill` where the budget matters: where the measured median at
    /// the smallest is half as much again as at the largest. Over medians that are nearly alike any constant is right.
    pub fn breaches(&self, median: f64, p90: f64, skill: f64) -> Vec<String> {
        let mut breaches = Vec::new();
        for b in &self.budgets {
            for (name, compared, limit) in [("median", &b.median, median), ("p90", &b.p90, p90)] {
                if !compared.within(limit) {
                    breaches.push(format!(
                        "{name} at {} slots {:+.1} %",
                        b.gpu_loras,
                        compared.error_percent()
                    ));
                }
            }
        }
        let matters = self.effect.is_some_and(|effect| effect >= EFFECT);
        breaches.extend(self.skill.filter(|s| matters && *s < skill).map(|s| format!("skill {s:.3}")));
        breaches
    }
}

/// The configuration but for the budget, in words.
fn what(row: &ResultRow) -> String {
    let text = |name: &str, v: &Option<String>| v.as_ref().map(|v| format!("{name} {v}"));
    let load = match (row.rho, row.arrival_rate) {
        (Some(rho), _) => Some(format!("rho {rho}")),
        (None, rate) => rate.map(|r| format!("{r}/s")),
    };
    [
        row.model.clone(),
        Some(format!("{} adapters", row.total_loras)),
        Some(row.prompt_regime.clone()),
        text("rank", &row.rank),
        text("popularity", &row.popularity),
        text("arrivals", &row.arrivals),
        load,
        row.max_num_seqs.map(|n| format!("{n} sequences")),
        row.max_tokens.map(|n| format!("{n} output tokens")),
        text("policy", &row.policy),
        text("evict", &row.evict),
        text("swaps", &row.swap_mode),
    ]
    .into_iter()
    .flatten()
    .collect::<Vec<_>>()
    .join(", ")
}

fn compare(rows: &[&ResultRow], gpu_loras: u32) -> Option<BudgetComparison> {
    let values = |source: Source, of: fn(&ResultRow) -> Option<f64>| -> Vec<f64> {
        rows.iter().filter(|r| r.source == source).filter_map(|r| of(r)).collect()
    };
    let both = |of: fn(&ResultRow) -> Option<f64>| {
        Compared::of(&values(Source::Measured, of), &values(Source::Simulated, of))
    };
    let swap_count: fn(&ResultRow) -> Option<f64> = |r| r.swap_count.map(|n| n as f64);
    let swaps = |source| mean(&values(source, swap_count));
    let saturated = |source| rows.iter().filter(|r| r.source == source).find_map(|r| r.saturated);
    let service = |r: &ResultRow| Some(r.ttft_front_mean? + r.ttft_prefill_mean? + r.ttft_deliver_mean?);
    let of_mean = both(|r| r.ttft_mean)?;
    let service = mean(&values(Source::Simulated, service));
    Some(BudgetComparison {
        gpu_loras,
        cell: rows.iter().find_map(|r| r.cell.clone()),
        saturated: saturated(Source::Measured).or(saturated(Source::Simulated)).unwrap_or(false),
        runs: values(Source::Measured, |r| r.ttft_median).len(),
        median: both(|r| r.ttft_median)?,
        p90: both(|r| r.ttft_p90)?,
        p99: both(|r| r.ttft_p99)?,
        mean: of_mean,
        e2e_median: both(|r| r.latency_median),
        swaps: (swaps(Source::Measured), swaps(Source::Simulated)),
        swap_spread_percent: repeat_spread(&values(Source::Measured, swap_count)),
        naive: Naive {
            constant_percent: None,
            service_percent: service.map(|s| (s / of_mean.measured_s - 1.0) * 100.0),
        },
        requests: None,
        cost_factor: None,
    })
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;

    use super::*;
    use crate::report::results::RunContext;

    fn row(source: Source, gpu_loras: u32, repeat: u32, median: f64, swaps: u64) -> ResultRow {
        let context = RunContext {
            repeat: Some(repeat),
            swap_count: Some(swaps),
            arrival_rate: Some(2.0),
            ..RunContext::new(source, 128, gpu_loras, "short")
        };
        ResultRow {
            ttft_median: Some(median),
            ttft_mean: Some(median),
            ttft_p90: Some(2.0 * median),
            ttft_p99: Some(3.0 * median),
            ttft_front_mean: Some(0.01),
            ttft_prefill_mean: Some(0.03),
            ttft_deliver_mean: Some(0.01),
            ..ResultRow::from_records(&[], &context)
        }
    }

    /// Medians 0.4, 0.2, 0.1, 0.1 at 2, 8, 32, 128; two repeats, 1 % apart.
    fn rows(simulated: [f64; 4]) -> Vec<ResultRow> {
        let measured = [0.4, 0.2, 0.1, 0.1];
        let budgets = [2, 8, 32, 128];
        let mut rows = Vec::new();
        for ((budget, m), s) in budgets.into_iter().zip(measured).zip(simulated) {
            rows.push(row(Source::Measured, budget, 0, m * 0.995, 100));
            rows.push(row(Source::Measured, budget, 1, m * 1.005, 100));
            rows.push(row(Source::Simulated, budget, 0, s, 101));
        }
        rows
    }

    #[test]
    fn a_good_simulation_has_small_errors_the_order_the_knee_and_skill() {
        let v = Validation::of(&rows([0.408, 0.198, 0.101, 0.1]));
        assert_relative_eq!(v.budgets[0].median.error_percent(), 2.0, epsilon = 1e-9);
        assert!(v.budgets.iter().all(|b| b.misses().is_empty()), "{v:?}");
        assert_eq!((v.tau, v.knee), (Some(1.0), Some((32, 32))));
        assert!(v.skill.unwrap() > 0.9 && v.breaches(5.0, 8.0, 0.8).is_empty());
        // Of the six pairs, 32 and 128 are not told apart by repeats.
        assert_relative_eq!(v.budgets[0].naive.constant_percent.unwrap(), -62.5, epsilon = 1e-9);
        assert_relative_eq!(v.budgets[0].naive.service_percent.unwrap(), -87.5, epsilon = 1e-9);
    }

    #[test]
    fn a_bad_one_misses_each_of_them() {
        let mut rows = rows([0.2, 0.4, 0.05, 0.2]);
        rows.iter_mut().filter(|r| r.source == Source::Simulated).for_each(|r| r.swap_count = Some(110));
        let v = Validation::of(&rows);
        assert_eq!(v.budgets[0].misses(), ["median", "mean", "p99", "swaps"]);
        // A server that does not count its swaps is not held to any number of them.
        rows.iter_mut().filter(|r| r.source == Source::Measured).for_each(|r| r.swap_count = None);
        let uncounted = Validation::of(&rows);
        assert_eq!(uncounted.budgets[0].swaps, (None, Some(110.0)));
        assert_eq!(uncounted.budgets[0].misses(), ["median", "mean", "p99"]);
        assert_eq!(v.knee, Some((32, 32)));
        assert!(v.tau.unwrap() < 1.0 && v.skill.unwrap() < 0.8);
        let breaches = v.breaches(10.0, 20.0, 0.8);
        assert_eq!((breaches.len(), breaches[0].as_str()), (9, "median at 2 slots -50.0 %"));
        assert!(breaches[8].starts_with("skill -"), "{breaches:?}");
    }

    #[test]
    fn configurations_are_validated_apart() {
        let mut all = rows([0.4, 0.2, 0.1, 0.1]);
        let mut long = rows([0.8, 0.4, 0.2, 0.2]);
        long.iter_mut().for_each(|r| r.prompt_regime = "long".to_owned());
        all.extend(long);
        let each = Validation::each(&all);
        assert_eq!(each.len(), 2);
        assert!(each[0].what.contains("long") && !each[0].breaches(10.0, 20.0, 0.8).is_empty());
        assert!(each[1].what.contains("short") && each[1].breaches(10.0, 20.0, 0.8).is_empty());
    }

    #[test]
    fn where_the_budget_hardly_matters_no_skill_is_asked_for() {
        let alike = |simulated: [f64; 2], smallest: f64| {
            let mut rows = Vec::new();
            for ((budget, m), s) in [2, 128].into_iter().zip([smallest, 0.1]).zip(simulated) {
                rows.push(row(Source::Measured, budget, 0, m, 100));
                rows.push(row(Source::Simulated, budget, 0, s, 101));
            }
            Validation::of(&rows)
        };
        let v = alike([0.1, 0.105], 0.104);
        assert!(v.skill.unwrap() < 0.0 && v.breaches(10.0, 20.0, 0.8).is_empty(), "{v:?}");
        let v = alike([0.145, 0.13], 0.16);
        assert_eq!(v.breaches(90.0, 90.0, 0.8).len(), 1, "{v:?}");
    }
}
