//! Simulated against measured results: errors, the measurements' own spread, naive predictors, skill.
//!
//! Whatever is compared is compared on one trace: rows are sorted by seed first, an error is each trace's, and the mean over
//! traces comes last. Between traces lies the traffic's chance, which neither the simulation nor the machine has to answer for.

mod adopt;
mod compared;
mod refused;
mod requests;

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::results::{ResultRow, Source};
use super::settings;
use super::stats::{kendall_tau, mean, median, skill, sorted};
use compared::{Traces, counted, neighbours, spread_of, traces};

pub use compared::{Compared, LeftOut};
pub use refused::ValidationError;
pub use requests::{Itself, RequestErrors};

/// A budget is past the knee when its median is within this of the least, per cent.
const KNEE: f64 = 10.0;
/// Measured median at the smallest budget over that at the largest from which on the skill says something.
const EFFECT: f64 = 1.5;

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
    /// Load as a share of the saturation rate, where the rows have one.
    pub rho: Option<f64>,
    /// Requests a second, mean over traces; none where a trace kept its own times.
    pub arrival_rate: Option<f64>,
    /// Traces that were both measured and simulated.
    pub traces: usize,
    /// Measured runs of them.
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
    /// Spread of the measured swap counts, as [`Compared::spread_percent`].
    pub swap_spread_percent: Option<f64>,
    /// As [`Compared::neighbours_percent`].
    pub swap_neighbours_percent: Option<f64>,
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
            let spread = counted(self.swap_spread_percent, self.swap_neighbours_percent) / 100.0 * measured;
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
    /// Traces that are left out of it.
    pub left_out: LeftOut,
    /// 1 − MAE / MAE of the best constant, over the budgets' medians; none of fewer than two budgets. This and what
    /// follows is of the traces that all budgets share, and none where they share none.
    pub skill: Option<f64>,
    /// Measured median at the smallest budget over that at the largest.
    pub effect: Option<f64>,
    /// Kendall's τ of simulated and measured medians over pairs of budgets that repeats tell apart: both have two or more
    /// on one trace, and they do not overlap. None where no pair is told apart.
    pub tau: Option<f64>,
    /// The smallest budget whose median is within 10 % of the least: measured, simulated.
    pub knee: Option<(u32, u32)>,
}

impl Validation {
    /// Compares rows of one sweep: of one configuration but for `gpu_loras`, source, seed and repeat.
    pub fn of(rows: &[ResultRow]) -> Result<Self, ValidationError> {
        Self::named(rows.first().map_or_else(String::new, what), rows)
    }

    fn named(what: String, rows: &[ResultRow]) -> Result<Self, ValidationError> {
        refused::refuse(&what, rows)?;
        let (of_budget, left_out) = traces(rows);
        let (mut budgets, of_budget): (Vec<BudgetComparison>, Vec<Traces<'_>>) = of_budget
            .into_iter()
            .filter_map(|(budget, traces)| Some((compare(&traces, budget)?, traces)))
            .unzip();
        take_neighbours(&mut budgets);
        // Over budgets, too, only what is of the same traces can be compared.
        let shared = of_budget.iter().map(|traces| traces.keys().copied().collect::<BTreeSet<_>>());
        let shared = shared.reduce(|a, b| &a & &b).unwrap_or_default();
        let medians = |source| -> Vec<f64> {
            of_budget.iter().filter_map(|traces| median_of(traces, &shared, source)).collect()
        };
        let (measured, simulated) = (medians(Source::Measured), medians(Source::Simulated));
        let whole = measured.len() == budgets.len() && simulated.len() == budgets.len();
        let (measured, simulated) = if whole { (measured, simulated) } else { (Vec::new(), Vec::new()) };
        if let Some(constant) = median(&sorted(&measured)) {
            for (budget, measured) in budgets.iter_mut().zip(&measured) {
                budget.naive.constant_percent = Some((constant / measured - 1.0) * 100.0);
            }
        }
        let knee = |medians: &[f64]| {
            let least = medians.iter().copied().fold(f64::INFINITY, f64::min);
            let past = medians.iter().position(|m| *m <= least * (1.0 + KNEE / 100.0))?;
            Some(budgets[past].gpu_loras)
        };
        Ok(Self {
            what,
            left_out,
            skill: skill(&simulated, &measured),
            effect: measured.first().zip(measured.last()).map(|(small, full)| small / full),
            tau: kendall_tau(&simulated, &measured, |i, j| told_apart(&of_budget[i], &of_budget[j])),
            knee: knee(&measured).zip(knee(&simulated)),
            budgets,
        })
    }

    /// One validation for each configuration, in order of their descriptions.
    pub fn each(rows: &[ResultRow]) -> Result<Vec<Self>, ValidationError> {
        let mut rows = rows.to_vec();
        adopt::adopt_settings(&mut rows);
        let mut groups: BTreeMap<(String, Option<u64>, Option<String>), Vec<ResultRow>> = BTreeMap::new();
        for row in rows {
            groups.entry((what(&row), row.num_requests, row.settings.clone())).or_default().push(row);
        }
        let several = |of: fn(&ResultRow) -> Option<String>| {
            groups.values().map(|rows| of(&rows[0])).collect::<BTreeSet<_>>().len() > 1
        };
        let requests = several(|r| r.num_requests.map(|n| n.to_string()));
        let settings = several(|r| r.settings.clone());
        let named = groups.iter().map(|((what, n, set), rows)| {
            let n = n.filter(|_| requests).map(|n| format!("{n} requests"));
            let set = set.as_deref().filter(|_| settings).map(in_words);
            let what = [Some(what.clone()), n, set].into_iter().flatten().collect::<Vec<_>>().join(", ");
            Self::named(what, rows)
        });
        let all = named.collect::<Result<Vec<_>, _>>()?;
        Ok(all.into_iter().filter(|v| !v.budgets.is_empty()).collect())
    }

    /// What the budgets come to together, a line each.
    pub fn said(&self) -> Vec<String> {
        let effect = self.effect.map(|effect| {
            format!("measured median TTFT at the smallest budget: {effect:.2} times that at the largest")
        });
        let skill =
            self.skill.map(|skill| format!("skill against the best constant over budgets: {skill:.3}"));
        let tau = match self.tau {
            Some(tau) => {
                Some(format!("Kendall's tau over the pairs of budgets that repeats tell apart: {tau:.2}"))
            }
            None => (self.budgets.len() > 1).then(|| {
                "no Kendall's tau: no two budgets are told apart by two or more measured runs of one trace at each"
                    .to_owned()
            }),
        };
        let only = |side: &str, seeds: usize| {
            (seeds > 0).then(|| format!("left out: {seeds} seeds with {side} rows alone"))
        };
        let left_out = [only("measured", self.left_out.measured), only("simulated", self.left_out.simulated)];
        let knee = self.knee.map(|(measured, simulated)| {
            format!(
                "within 10 % of the least median from budget {measured} on; simulated, from {simulated} on"
            )
        });
        [effect, skill, tau, knee].into_iter().chain(left_out).flatten().collect()
    }

    /// What does not hold of medians within `median` per cent and 90th percentiles within `p90` at every budget (or
    /// twice the spread), and of a skill of at least `skill` where the budget matters: where the measured median at
    /// the smallest is half as much again as at the largest. Over medians that are nearly alike any constant is right.
    pub fn breaches(&self, median: f64, p90: f64, skill: f64) -> Vec<String> {
        let mut breaches = Vec::new();
        for b in &self.budgets {
            for (name, compared, limit) in [("median", &b.median, median), ("p90", &b.p90, p90)] {
                if !compared.within(limit) {
                    breaches
                        .push(format!("{name} at {} slots {:+.1} %", b.gpu_loras, compared.error_percent));
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

/// A row's settings that have no column, in words.
fn in_words(text: &str) -> String {
    let set = settings::split(text);
    if set.is_empty() {
        return "other settings by default".to_owned();
    }
    set.iter().map(|(key, value)| format!("{key} {value}")).collect::<Vec<_>>().join(", ")
}

/// A statistic's values in rows.
fn values(rows: &[&ResultRow], of: fn(&ResultRow) -> Option<f64>) -> Vec<f64> {
    rows.iter().filter_map(|r| of(r)).collect()
}

/// Mean over these traces of a budget's median.
fn median_of(traces: &Traces<'_>, seeds: &BTreeSet<Option<u64>>, source: Source) -> Option<f64> {
    let of_trace = |seed| {
        let of_trace = traces.get(seed)?;
        let rows = if source == Source::Measured { &of_trace.measured } else { &of_trace.simulated };
        mean(&values(rows, |r| r.ttft_median))
    };
    mean(&seeds.iter().filter_map(of_trace).collect::<Vec<_>>())
}

/// Whether the measured medians of two budgets differ by more than repeats do: on every trace that both have run twice or
/// more, and at least on one, all of the one's are below all of the other's.
fn told_apart(a: &Traces<'_>, b: &Traces<'_>) -> bool {
    let range = |traces: &Traces<'_>, seed| {
        let ends = sorted(&values(&traces.get(seed)?.measured, |r| r.ttft_median));
        (ends.len() > 1).then(|| (ends[0], ends[ends.len() - 1]))
    };
    let order = |(a, b): ((f64, f64), (f64, f64))| {
        if a.1 < b.0 {
            Ordering::Less
        } else if b.1 < a.0 {
            Ordering::Greater
        } else {
            Ordering::Equal
        }
    };
    let orders: BTreeSet<Ordering> =
        a.keys().filter_map(|seed| Some(order((range(a, seed)?, range(b, seed)?)))).collect();
    orders.len() == 1 && !orders.contains(&Ordering::Equal)
}

/// Gives budgets without repeats the spread of those beside them.
fn take_neighbours(budgets: &mut [BudgetComparison]) {
    let statistics: [fn(&mut BudgetComparison) -> Option<&mut Compared>; 5] = [
        |b| Some(&mut b.median),
        |b| Some(&mut b.p90),
        |b| Some(&mut b.p99),
        |b| Some(&mut b.mean),
        |b| b.e2e_median.as_mut(),
    ];
    for of in statistics {
        let own: Vec<_> = budgets.iter_mut().map(|b| of(b).and_then(|c| c.spread_percent)).collect();
        for (budget, spread) in budgets.iter_mut().zip(neighbours(&own)) {
            if let Some(compared) = of(budget) {
                compared.neighbours_percent = spread;
            }
        }
    }
    let own: Vec<_> = budgets.iter().map(|b| b.swap_spread_percent).collect();
    for (budget, spread) in budgets.iter_mut().zip(neighbours(&own)) {
        budget.swap_neighbours_percent = spread;
    }
}

/// One budget, over traces that were measured and simulated.
fn compare(traces: &Traces<'_>, gpu_loras: u32) -> Option<BudgetComparison> {
    let both = |of: fn(&ResultRow) -> Option<f64>| {
        Compared::over(traces.values().map(|t| (values(&t.measured, of), values(&t.simulated, of))))
    };
    let measured = || traces.values().flat_map(|t| &t.measured);
    let simulated = || traces.values().flat_map(|t| &t.simulated);
    let all = || measured().chain(simulated());
    let swap_count: fn(&ResultRow) -> Option<f64> = |r| r.swap_count.map(|n| n as f64);
    let swaps = |of: Vec<&Vec<&ResultRow>>| {
        mean(&of.into_iter().filter_map(|rows| mean(&values(rows, swap_count))).collect::<Vec<_>>())
    };
    let swap_spreads: Vec<f64> =
        traces.values().filter_map(|t| spread_of(&values(&t.measured, swap_count))).collect();
    let saturated = measured().find_map(|r| r.saturated).or_else(|| simulated().find_map(|r| r.saturated));
    let service = |r: &ResultRow| Some(r.ttft_front_mean? + r.ttft_prefill_mean? + r.ttft_deliver_mean?);
    let service = Compared::over(
        traces.values().map(|t| (values(&t.measured, |r| r.ttft_mean), values(&t.simulated, service))),
    );
    let rates = traces.values().filter_map(|t| mean(&values(&t.measured, |r| r.arrival_rate)));
    Some(BudgetComparison {
        gpu_loras,
        cell: all().find_map(|r| r.cell.clone()),
        saturated: saturated.unwrap_or(false),
        rho: all().find_map(|r| r.rho),
        arrival_rate: mean(&rates.collect::<Vec<_>>()),
        traces: traces.len(),
        runs: measured().filter(|r| r.ttft_median.is_some()).count(),
        median: both(|r| r.ttft_median)?,
        p90: both(|r| r.ttft_p90)?,
        p99: both(|r| r.ttft_p99)?,
        mean: both(|r| r.ttft_mean)?,
        e2e_median: both(|r| r.latency_median),
        swaps: (
            swaps(traces.values().map(|t| &t.measured).collect()),
            swaps(traces.values().map(|t| &t.simulated).collect()),
        ),
        swap_spread_percent: mean(&swap_spreads),
        swap_neighbours_percent: None,
        naive: Naive { constant_percent: None, service_percent: service.map(|s| s.error_percent) },
        requests: None,
        cost_factor: None,
    })
}

#[cfg(test)]
mod tests;
