//! What the demonstration asks of each budget's engine, so that it ends in time on any machine.
//!
//! A calibrated profile knows how long each run will take, so the choice is made by simulation: as many requests as
//! there is time for, at a load at which the budget matters, with shorter outputs where the machine is too slow.

use crate::cli::failure::Failure;
use crate::experiment::{Cell, Experiment, SimulateError, Simulator, SourceError, Sources, WorkloadSettings};
use crate::report::stats::{median, sorted};

/// The budget matters where the smallest one's median TTFT is this many times the full one's.
const EFFECT: f64 = 2.2;
/// Requests of a run, at least: the median of fewer says little.
const LEAST: u64 = 50;
/// However slow the machine is.
const FEWEST: u64 = 20;
/// Output tokens to choose from.
const OUTPUTS: [u32; 5] = [256, 128, 64, 32, 16];

/// What is asked of each budget.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// Requests a second.
    pub rate: f64,
    /// How many.
    pub requests: u64,
    /// Output tokens of each.
    pub max_tokens: u32,
    /// The smallest budget's median TTFT over the full one's, by simulation.
    pub effect: f64,
    /// What all budgets' runs take, by simulation, seconds.
    pub expected_s: f64,
}

/// The lightest load at which the budget matters and of which enough requests fit into `time_s`, all budgets
/// together. Where there is none, what comes nearest.
pub fn choose(experiment: &Experiment, simulator: &Simulator, time_s: f64) -> Result<Load, Failure> {
    let mut runs = Runs { cells: experiment.cells(), simulator, seed: experiment.replicate.seeds[0] };
    if runs.cells.len() < 2 {
        return Err(Failure::failed("the demonstration needs more than one budget"));
    }
    // Of loads that do not have it all: first what ends in time, then where the budget matters, then what has most
    // requests.
    let worth = |l: &Load| (l.expected_s <= time_s, l.effect.min(EFFECT), l.requests);
    let mut best = None::<Load>;
    for max_tokens in OUTPUTS {
        let most = runs.saturation_rate(max_tokens)?;
        for percent in (30..=95).step_by(5) {
            let load = runs.fitting(most * f64::from(percent) / 100.0, max_tokens, time_s)?;
            if load.requests >= LEAST && load.effect >= EFFECT && load.expected_s <= time_s {
                return Ok(load);
            }
            if best.is_none_or(|b| worth(&load) > worth(&b)) {
                best = Some(load);
            }
        }
    }
    best.ok_or_else(|| Failure::failed("the demonstration has no load to choose from"))
}

struct Runs<'a> {
    cells: &'a [Cell],
    simulator: &'a Simulator,
    seed: u64,
}

impl Runs<'_> {
    fn trace(&mut self, cell: &Cell, load: &Load) -> Result<crate::workload::trace::Trace, Failure> {
        let workload = WorkloadSettings {
            num_requests: Some(load.requests),
            max_tokens: Some(load.max_tokens),
            ..cell.workload.clone()
        };
        Sources::default()
            .trace(&cell.engine, &workload, Some(load.rate), self.seed)
            .map_err(|e: SourceError| Failure::Failed(e.into()))
    }

    /// The highest rate that the full budget sustains.
    fn saturation_rate(&mut self, max_tokens: u32) -> Result<f64, Failure> {
        let full = &self.cells[self.cells.len() - 1];
        let workload = WorkloadSettings { max_tokens: Some(max_tokens), ..full.workload.clone() };
        let burst = Sources::default().burst(&full.engine, &workload, self.seed);
        let burst = burst.map_err(|e| Failure::Failed(e.into()))?;
        self.simulator.saturation_rate(&full.engine, &burst).map_err(failed)
    }

    /// As many requests at `rate` as there is time for.
    fn fitting(&mut self, rate: f64, max_tokens: u32, time_s: f64) -> Result<Load, Failure> {
        let requests = (rate * time_s / self.cells.len() as f64).floor().max(FEWEST as f64) as u64;
        let mut load = Load { rate, requests, max_tokens, effect: 0.0, expected_s: 0.0 };
        loop {
            self.simulate(&mut load)?;
            if load.expected_s <= time_s || load.requests == FEWEST {
                return Ok(load);
            }
            // What comes after the last arrival does not shrink with the requests: again, until it fits.
            let fewer = (load.requests as f64 * time_s / load.expected_s).floor() as u64;
            load.requests = fewer.min(load.requests - 1).max(FEWEST);
        }
    }

    /// Fills in what follows from the rest of a load.
    fn simulate(&mut self, load: &mut Load) -> Result<(), Failure> {
        let mut medians = Vec::with_capacity(self.cells.len());
        load.expected_s = 0.0;
        // Budgets share the trace.
        let trace = self.trace(&self.cells[0], load)?;
        for cell in self.cells {
            let simulated = self.simulator.run(&cell.engine, &trace).map_err(failed)?;
            load.expected_s += simulated.totals.end as f64 * 1e-9;
            let ttft: Vec<f64> = simulated.records.iter().filter_map(|r| r.ttft_s).collect();
            medians.push(median(&sorted(&ttft)).unwrap_or(0.0));
        }
        load.effect = medians[0] / medians[medians.len() - 1];
        Ok(())
    }
}

fn failed(e: SimulateError) -> Failure {
    Failure::Failed(e.into())
}

#[cfg(test)]
mod tests {
    use super::super::{EXPERIMENT, experiment, with_load};
    use super::*;
    use crate::profile::Scale;
    use crate::profile::tests::round;

    /// A machine so many times as slow, and what was chosen for it.
    fn chosen(slower: f64, time_s: f64) -> (Simulator, Load) {
        let by = 1.0 / slower;
        let machine = Simulator::new(round()).unwrap();
        let machine = machine.scaled(Scale { compute: by, bandwidth: by, copy: by, host: by }).unwrap();
        let load = choose(&experiment(EXPERIMENT).unwrap(), &machine, time_s).unwrap();
        (machine, load)
    }

    #[test]
    fn the_demonstration_ends_in_time_on_any_machine() {
        let mut outputs = Vec::new();
        for slower in [0.25, 1.0, 3.0, 6.0, 10.0] {
            let (machine, load) = chosen(slower, 60.0);
            assert!(load.requests >= FEWEST && load.effect >= 2.0, "{slower} times as slow: {load:?}");
            // Over what is really run, from the experiment's own text.
            let full = experiment(&with_load(&load).unwrap()).unwrap();
            let mut all_s = 0.0;
            for cell in full.cells() {
                let rate = cell.workload.arrival_rate;
                let trace = Sources::default().trace(&cell.engine, &cell.workload, rate, 7).unwrap();
                assert_eq!(trace.requests.len() as u64, load.requests);
                all_s += machine.run(&cell.engine, &trace).unwrap().totals.end as f64 * 1e-9;
            }
            assert!(all_s <= 60.5 && all_s > 35.0, "{slower} times as slow: {all_s} s of {load:?}");
            outputs.push(load.max_tokens);
        }
        assert_eq!(outputs[..2], [256, 256], "a machine that can does all of it");
        assert!(outputs[4] < 256, "a slow one does with less: {outputs:?}");
    }

    #[test]
    fn the_budget_matters_at_the_load() {
        let (_, load) = chosen(1.0, 60.0);
        assert!(load.effect >= EFFECT, "{load:?}");
    }

    #[test]
    fn where_nothing_fits_few_requests_are_asked() {
        let (_, load) = chosen(1000.0, 60.0);
        assert_eq!(load.requests, FEWEST);
    }
}
