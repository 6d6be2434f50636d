//! One statistic, measured and simulated on the same traces.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::report::results::{ResultRow, Source};
use crate::report::stats::{mean, repeat_spread};

/// Twice the spread counts for at most twice this, per cent.
const MOST_SPREAD: f64 = 10.0;

/// A budget's rows of one trace.
#[derive(Clone, Debug, Default)]
pub(super) struct OfTrace<'a> {
    pub(super) measured: Vec<&'a ResultRow>,
    pub(super) simulated: Vec<&'a ResultRow>,
}

/// A budget's rows by their trace's seed. Rows that do not name one are of one trace, the one without a name.
pub(super) type Traces<'a> = BTreeMap<Option<u64>, OfTrace<'a>>;

/// How many traces have rows of one side alone, and say nothing of an error: they are left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// Seeds with measured rows alone.
    pub measured: usize,
    /// Seeds with simulated rows alone.
    pub simulated: usize,
}

/// The rows of each budget that has both kinds, by trace; traces with one kind are counted and left out.
pub(super) fn traces(rows: &[ResultRow]) -> (BTreeMap<u32, Traces<'_>>, LeftOut) {
    let mut budgets: BTreeMap<u32, Traces<'_>> = BTreeMap::new();
    for row in rows {
        let of_trace = budgets.entry(row.gpu_loras).or_default().entry(row.seed).or_default();
        match row.source {
            Source::Measured => of_trace.measured.push(row),
            Source::Simulated => of_trace.simulated.push(row),
        }
    }
    let (mut measured, mut simulated) = (BTreeSet::new(), BTreeSet::new());
    budgets.retain(|_, traces| {
        let measured_alone = |t: &OfTrace<'_>| t.simulated.is_empty();
        let simulated_alone = |t: &OfTrace<'_>| t.measured.is_empty();
        // A budget of one kind alone is no part of the comparison, and neither are its traces.
        if traces.values().all(measured_alone) || traces.values().all(simulated_alone) {
            return false;
        }
        measured.extend(traces.iter().filter(|(_, t)| measured_alone(t)).map(|(seed, _)| *seed));
        simulated.extend(traces.iter().filter(|(_, t)| simulated_alone(t)).map(|(seed, _)| *seed));
        traces.retain(|_, t| !measured_alone(t) && !simulated_alone(t));
        true
    });
    (budgets, LeftOut { measured: measured.len(), simulated: simulated.len() })
}

/// One statistic at one budget.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Compared {
    /// Mean over traces of the mean over a trace's measured repeats, seconds.
    pub measured_s: f64,
    /// Median pairwise difference of one trace's repeats, per cent of their mean; mean over the traces that were run twice or
    /// more, none without any. Traces differ from each other for other reasons than the machine's.
    pub spread_percent: Option<f64>,
    /// Of a budget without repeats: the larger spread of the nearest budgets below and above that have some.
    pub neighbours_percent: Option<f64>,
    /// Mean over traces of the simulation, seconds.
    pub simulated_s: f64,
    /// Signed error of the simulation, per cent: mean over traces of the error on each.
    pub error_percent: f64,
}

impl Compared {
    /// The spread that an error is held against, per cent: the budget's own or else its neighbours', at most 10.
    pub fn spread(&self) -> f64 {
        counted(self.spread_percent, self.neighbours_percent)
    }

    /// Whether the error is within `limit` per cent or twice the repeats' spread.
    pub fn within(&self, limit: f64) -> bool {
        self.error_percent.abs() <= limit.max(2.0 * self.spread())
    }

    /// Of a statistic's values by trace, measured and simulated; a trace that lacks one or the other is left out.
    pub(super) fn over(traces: impl IntoIterator<Item = (Vec<f64>, Vec<f64>)>) -> Option<Self> {
        let (mut measured, mut simulated, mut errors) = (Vec::new(), Vec::new(), Vec::new());
        let mut spreads = Vec::new();
        for (repeats, predicted) in traces {
            if let Some((m, s)) = mean(&repeats).zip(mean(&predicted)) {
                measured.push(m);
                simulated.push(s);
                errors.push((s / m - 1.0) * 100.0);
                spreads.extend(spread_of(&repeats));
            }
        }
        Some(Self {
            measured_s: mean(&measured)?,
            spread_percent: mean(&spreads),
            neighbours_percent: None,
            simulated_s: mean(&simulated)?,
            error_percent: mean(&errors)?,
        })
    }
}

/// What counts of a budget's own spread, or else of its neighbours'.
pub(super) fn counted(own: Option<f64>, neighbours: Option<f64>) -> f64 {
    own.or(neighbours).unwrap_or(0.0).min(MOST_SPREAD)
}

/// [`repeat_spread`] of one trace's repeats, which is nothing where they are all zero, as swaps are with a slot for every
/// adapter.
pub(super) fn spread_of(repeats: &[f64]) -> Option<f64> {
    repeat_spread(repeats).or((repeats.len() > 1).then_some(0.0))
}

/// For each budget without a spread of its own, the larger of the nearest ones below and above.
pub(super) fn neighbours(own: &[Option<f64>]) -> Vec<Option<f64>> {
    let borrowed = |(i, spread): (usize, &Option<f64>)| match spread {
        Some(_) => None,
        None => {
            let below = own[..i].iter().rev().find_map(|s| *s);
            let above = own[i..].iter().find_map(|s| *s);
            [below, above].into_iter().flatten().reduce(f64::max)
        }
    };
    own.iter().enumerate().map(borrowed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_without_repeats_takes_the_larger_spread_beside_it() {
        let own = [Some(1.0), None, None, Some(3.0), None];
        assert_eq!(neighbours(&own), [None, Some(3.0), Some(3.0), None, Some(3.0)]);
        assert_eq!(neighbours(&[None, None]), [None, None]);
        assert_eq!(neighbours(&[None, Some(0.0)]), [Some(0.0), None]);
    }

    #[test]
    fn the_error_is_each_traces_and_the_spread_that_of_repeats_alone() {
        // Two traces, the second ten times as slow; one is run twice.
        let of_traces = [(vec![0.9, 1.1], vec![1.1]), (vec![10.0], vec![9.0]), (vec![5.0], Vec::new())];
        let compared = Compared::over(of_traces).unwrap();
        assert!((compared.error_percent - 0.0).abs() < 1e-9, "{compared:?}");
        assert!((compared.spread_percent.unwrap() - 20.0).abs() < 1e-9, "{compared:?}");
        assert!((compared.measured_s - 5.5).abs() < 1e-9 && (compared.simulated_s - 5.05).abs() < 1e-9);
        assert_eq!(compared.spread(), 10.0);
        assert_eq!(Compared::over([(vec![1.0], Vec::new())]), None);
    }
}
