//! The single factor on all costs that explains an error.
//!
//! Queueing amplifies an error of the costs by about 1 / (1 − ρ): what a calibration can be held to is
//! the factor on its costs with which the simulation would have been right.

use super::Cell;
use super::simulate::{SimulateError, Simulator};
use super::source::{SourceError, Sources};
use crate::profile::Scale;
use crate::report::stats::mean;

/// The factor is sought between this and its inverse.
const MOST: f64 = 2.0;
/// Halvings of that range on a logarithmic scale: to 2·10⁻⁶.
const HALVINGS: u32 = 20;

/// A trace of a cell, and what was measured on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// The trace's seed.
    pub seed: u64,
    /// Its rate, requests a second; none for the trace's own times.
    pub rate: Option<f64>,
    /// Mean TTFT, seconds.
    pub ttft_mean_s: f64,
}

/// A factor that cannot be sought.
#[derive(Debug, thiserror::Error)]
pub enum FactorError {
    /// The trace.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The simulation.
    #[error(transparent)]
    Simulate(#[from] SimulateError),
}

/// The factor on all costs with which the simulated mean TTFT over the targets' traces is the measured
/// one. None if it lies outside of a half to two.
pub fn cost_factor(
    simulator: &Simulator,
    cell: &Cell,
    targets: &[Target],
    sources: &mut Sources,
) -> Result<Option<f64>, FactorError> {
    let traces = targets
        .iter()
        .map(|t| sources.trace(&cell.engine, &cell.workload, t.rate, t.seed))
        .collect::<Result<Vec<_>, _>>()?;
    let Some(measured) = mean(&targets.iter().map(|t| t.ttft_mean_s).collect::<Vec<_>>()) else {
        return Ok(None);
    };
    let simulated = |factor: f64| -> Result<f64, SimulateError> {
        let speed = 1.0 / factor;
        let by = Scale { compute: speed, bandwidth: speed, copy: speed, host: speed };
        let scaled = simulator.scaled(by)?;
        let mut ttfts = Vec::new();
        for trace in &traces {
            let run = scaled.run(&cell.engine, trace)?;
            let counted = run.records.iter().filter(|r| r.id >= cell.workload.warm_up);
            ttfts.extend(mean(&counted.filter_map(|r| r.ttft_s).collect::<Vec<_>>()));
        }
        Ok(mean(&ttfts).unwrap_or(f64::NAN))
    };
    let (mut low, mut high) = (1.0 / MOST, MOST);
    if !(simulated(low)? <= measured && measured <= simulated(high)?) {
        return Ok(None);
    }
    for _ in 0..HALVINGS {
        let middle = (low * high).sqrt();
        if simulated(middle)? < measured { low = middle } else { high = middle }
    }
    Ok(Some((low * high).sqrt()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::Experiment;
    use crate::profile::tests::round;

    #[test]
    fn the_factor_that_made_the_measurement_is_found() {
        let text = "[engine]\nmodel = \"tiny\"\ngpu_loras = 8\n[workload]\narrival_rate = 30.0";
        let experiment = Experiment::parse(text, "test.toml").unwrap();
        let cell = &experiment.cells()[0];
        let simulator = Simulator::new(round()).unwrap();
        let mut sources = Sources::default();
        let truth = 1.07;
        let speed = 1.0 / truth;
        let machine =
            simulator.scaled(Scale { compute: speed, bandwidth: speed, copy: speed, host: speed }).unwrap();
        let targets = [1, 2].map(|seed| {
            let trace = sources.trace(&cell.engine, &cell.workload, Some(30.0), seed).unwrap();
            let records = machine.run(&cell.engine, &trace).unwrap().records;
            let ttfts: Vec<f64> = records.iter().filter_map(|r| r.ttft_s).collect();
            Target { seed, rate: Some(30.0), ttft_mean_s: mean(&ttfts).unwrap() }
        });
        let found = cost_factor(&simulator, cell, &targets, &mut sources).unwrap().unwrap();
        assert!((found / truth - 1.0).abs() < 1e-3, "{found}");
        let far = [Target { ttft_mean_s: 1e6, ..targets[0] }];
        assert_eq!(cost_factor(&simulator, cell, &far, &mut sources).unwrap(), None);
    }
}
