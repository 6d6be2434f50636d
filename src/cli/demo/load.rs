//! What the demonstration asks of each budget's engine, so that it ends in time on any machine.
//!
//! A calibrated profile knows how long each run will take, so the choice is made by simulation: as many requests as
//! there is time for, at a load at which the budget matters, with shorter outputs where the machine is too slow.

use crate::cli::failure::Failure;
use crate::experiment::{Cell, Experiment, SimulateError, Simulator, SourceError, Sources, WorkloadSettings};
use crate::profile::Scale;
use crate::report::stats::{percentile, sorted};
use crate::workload::trace::Trace;

/// The budget matters where the smallest one's median TTFT is this many times the full one's.
const EFFECT: f64 = 2.2;
/// Requests of a run, at least: the median of fewer says little.
const LEAST: u64 = 50;
/// However slow the machine is.
const FEWEST: u64 = 20;
/// Traces to choose from at each rate.
const SEEDS: std::ops::Range<u64> = 0..12;
/// A machine's speed wanders by so much over a minute, on shared ones.
const WANDERS: [f64; 2] = [0.87, 1.15];
/// Where all that takes a percent longer makes a median or a p90 longer by so many, a run's result is the machine's
/// mood and not the budget's.
const MOST_SWAY: f64 = 1.6;
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
    /// Of the trace.
    pub seed: u64,
    /// The smallest budget's median TTFT over the full one's, by simulation.
    pub effect: f64,
    /// By how many percent a budget's median or p90 changes at most, by simulation, where all costs change by one.
    pub sway: f64,
    /// What all budgets' runs take, by simulation, seconds.
    pub expected_s: f64,
}

/// The lightest load at which the budget matters and the machine's mood does not, and of which enough requests fit
/// into `time_s`, all budgets together. Where there is none, what comes nearest.
pub fn choose(experiment: &Experiment, simulator: &Simulator, time_s: f64) -> Result<Load, Failure> {
    let other = |by: f64| {
        let by = 1.0 / by;
        simulator.scaled(Scale { compute: by, bandwidth: by, copy: by, host: by }).map_err(Failure::failed)
    };
    let others = [other(WANDERS[0])?, other(WANDERS[1])?];
    let mut runs = Runs { cells: experiment.cells(), simulator, others };
    if runs.cells.len() < 2 {
        return Err(Failure::failed("the demonstration needs more than one budget"));
    }
    // Of loads that do not have it all: first what ends in time, then where the budget matters, then what sways
    // least.
    let worth = |l: &Load| (l.expected_s <= time_s, l.effect.min(EFFECT), -l.sway, l.requests);
    let mut best = None::<Load>;
    for max_tokens in OUTPUTS {
        let most = runs.saturation_rate(max_tokens)?;
        for percent in (30..=95).step_by(5) {
            let mut steadiest = None::<Load>;
            for seed in SEEDS {
                let load = runs.fitting(most * f64::from(percent) / 100.0, max_tokens, seed, time_s)?;
                let has_it_all = load.requests >= LEAST
                    && load.effect >= EFFECT
                    && load.sway <= MOST_SWAY
                    && load.expected_s <= time_s;
                if has_it_all && steadiest.is_none_or(|b| load.sway < b.sway) {
                    steadiest = Some(load);
                }
                if best.is_none_or(|b| worth(&load) > worth(&b)) {
                    best = Some(load);
                }
            }
            if let Some(load) = steadiest {
                return Ok(load);
            }
        }
    }
    best.ok_or_else(|| Failure::failed("the demonstration has no load to choose from"))
}

impl Load {
    /// One that nothing is known of.
    fn new(rate: f64, requests: u64, max_tokens: u32, seed: u64) -> Self {
        Self { rate, requests, max_tokens, seed, effect: 0.0, sway: f64::INFINITY, expected_s: 0.0 }
    }
}

/// Each budget's median and p90 TTFT, seconds, and what all runs together take.
fn outcomes(simulator: &Simulator, cells: &[Cell], trace: &Trace) -> Result<(Vec<[f64; 2]>, f64), Failure> {
    let (mut runs, mut took_s) = (Vec::with_capacity(cells.len()), 0.0);
    for cell in cells {
        let simulated = simulator.run(&cell.engine, trace).map_err(failed)?;
        took_s += simulated.totals.end as f64 * 1e-9;
        let ttft: Vec<f64> = simulated.records.iter().filter_map(|r| r.ttft_s).collect();
        let ttft = sorted(&ttft);
        runs.push([50.0, 90.0].map(|p| percentile(&ttft, p).unwrap_or(0.0)));
    }
    Ok((runs, took_s))
}

struct Runs<'a> {
    cells: &'a [Cell],
    simulator: &'a Simulator,
    /// The machine in other moods.
    others: [Simulator; WANDERS.len()],
}

impl Runs<'_> {
    fn trace(&mut self, cell: &Cell, load: &Load) -> Result<Trace, Failure> {
        let workload = WorkloadSettings {
            num_requests: Some(load.requests),
            max_tokens: Some(load.max_tokens),
            ..cell.workload.clone()
        };
        Sources::default()
            .trace(&cell.engine, &workload, Some(load.rate), load.seed)
            .map_err(|e: SourceError| Failure::Failed(e.into()))
    }

    /// The highest rate that the full budget sustains.
    fn saturation_rate(&mut self, max_tokens: u32) -> Result<f64, Failure> {
        let full = &self.cells[self.cells.len() - 1];
        let workload = WorkloadSettings { max_tokens: Some(max_tokens), ..full.workload.clone() };
        let burst = Sources::default().burst(&full.engine, &workload, SEEDS.start);
        let burst = burst.map_err(|e| Failure::Failed(e.into()))?;
        self.simulator.saturation_rate(&full.engine, &burst).map_err(failed)
    }

    /// As many requests at `rate` as there is time for.
    fn fitting(&mut self, rate: f64, max_tokens: u32, seed: u64, time_s: f64) -> Result<Load, Failure> {
        let requests = (rate * time_s / self.cells.len() as f64).floor().max(FEWEST as f64) as u64;
        let mut load = Load::new(rate, requests, max_tokens, seed);
        let mut shrunk = false;
        loop {
            self.simulate(&mut load)?;
            // Bursts may be over before their mean says so.
            if load.expected_s < 0.8 * time_s && !shrunk {
                let more = (load.requests as f64 * 0.95 * time_s / load.expected_s).floor() as u64;
                load.requests = more.clamp(load.requests + 1, 2 * load.requests);
                continue;
            }
            if load.expected_s <= time_s || load.requests == FEWEST {
                // Nobody asks how steady it is where the budget does not matter.
                if load.effect >= EFFECT {
                    load.sway = self.sway(&load)?;
                }
                return Ok(load);
            }
            // What comes after the last arrival does not shrink with the requests: again, until it fits.
            shrunk = true;
            let fewer = (load.requests as f64 * time_s / load.expected_s).floor() as u64;
            load.requests = fewer.min(load.requests - 1).max(FEWEST);
        }
    }

    /// Fills in what follows from the rest of a load.
    fn simulate(&mut self, load: &mut Load) -> Result<(), Failure> {
        // Budgets share the trace.
        let trace = self.trace(&self.cells[0], load)?;
        let (runs, took_s) = outcomes(self.simulator, self.cells, &trace)?;
        load.expected_s = took_s;
        load.effect = runs[0][0] / runs[runs.len() - 1][0];
        Ok(())
    }

    fn sway(&mut self, load: &Load) -> Result<f64, Failure> {
        let trace = self.trace(&self.cells[0], load)?;
        let (usual, _) = outcomes(self.simulator, self.cells, &trace)?;
        let mut most = 0.0f64;
        for (other, by) in self.others.iter().zip(WANDERS) {
            let (runs, _) = outcomes(other, self.cells, &trace)?;
            for (was, is) in usual.iter().flatten().zip(runs.iter().flatten()) {
                most = most.max(((is / was).ln() / by.ln()).abs());
            }
        }
        Ok(most)
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
        for slower in [0.25, 1.0, 8.0] {
            let (machine, load) = chosen(slower, 60.0);
            assert!(load.requests >= FEWEST && load.effect >= 2.0, "{slower} times as slow: {load:?}");
            // Over what is really run, from the experiment's own text.
            let full = experiment(&with_load(&load).unwrap()).unwrap();
            let mut all_s = 0.0;
            for cell in full.cells() {
                let rate = cell.workload.arrival_rate;
                let seed = full.replicate.seeds[0];
                let trace = Sources::default().trace(&cell.engine, &cell.workload, rate, seed).unwrap();
                assert_eq!(trace.requests.len() as u64, load.requests);
                all_s += machine.run(&cell.engine, &trace).unwrap().totals.end as f64 * 1e-9;
            }
            assert!(all_s <= 60.5 && all_s > 35.0, "{slower} times as slow: {all_s} s of {load:?}");
            outputs.push(load.max_tokens);
        }
        assert_eq!(outputs[..2], [256, 256], "a machine that can does all of it");
        assert!(outputs[2] < 256, "a slow one does with less: {outputs:?}");
    }

    #[test]
    fn the_budget_matters_at_the_load() {
        let (_, load) = chosen(1.0, 60.0);
        assert!(load.effect >= EFFECT && load.sway <= MOST_SWAY, "{load:?}");
    }

    #[test]
    fn where_nothing_fits_few_requests_are_asked() {
        let (_, load) = chosen(1000.0, 60.0);
        assert_eq!(load.requests, FEWEST);
    }
}
