//! What the log of an engine that served tells of costs.

use serde::{Deserialize, Serialize};

use crate::calibrate::median;
use crate::calibrate::steps::StepSample;
use crate::calibrate::swaps::SwapSample;
use crate::profile::{CostModel, StepShape};
use crate::sim::{CopyTime, LogTimes, StepTime, rate_beside};

/// A step that read an adapter whose copy was under way when it was submitted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReadingSample {
    /// Its composition.
    pub shape: StepShape,
    /// From submission to result, less what it waited for layers.
    pub ns: u64,
    /// For how much of that copies were under way.
    pub beside_ns: u64,
}

/// What an engine took that served.
#[derive(Clone, Debug, Default)]
pub struct ServedTimes {
    /// Steps with no copy beside them.
    pub steps: Vec<StepSample>,
    /// Steps that read an adapter under way.
    pub readings: Vec<ReadingSample>,
    /// Copies that had the copy engine to themselves.
    pub swaps: Vec<SwapSample>,
}

/// The share of a copy's time that a step must have run, for the copy to count as one beside a step.
const BESIDE: f64 = 0.9;

impl ServedTimes {
    /// Adds what one engine's log says.
    pub(super) fn take(&mut self, times: &LogTimes) {
        for &StepTime { shape, took, stalled, beside, held, reading, .. } in &times.steps {
            if reading {
                self.readings.push(ReadingSample { shape, ns: took, beside_ns: beside });
            } else if held.is_none() && stalled == 0 && beside == 0 {
                self.steps.push(StepSample { shape, ns: took });
            }
        }
        self.swaps.extend(times.copies.iter().filter_map(swap));
    }
}

/// A copy that waited for no other and shared with none, and that a step ran beside for nearly all of its time or for
/// none of it: of any other it is not known what it would have taken.
fn swap(copy: &CopyTime) -> Option<SwapSample> {
    let (&[bytes], true) = (copy.bytes.as_slice(), copy.turn == copy.submitted) else { return None };
    let copy_ns = copy.ended - copy.started;
    let beside_step = copy.beside_bytes as f64 >= BESIDE * copy_ns as f64;
    let sample = SwapSample { bytes, ns: copy.done - copy.turn, copy_ns, beside_step };
    (copy_ns > 0 && (beside_step || copy.beside == 0)).then_some(sample)
}

/// What a step takes more that reads an adapter under way, in seconds: of what was measured, the median of what neither
/// its composition nor the copies beside it account for. 0 if there is nothing to tell it by.
pub(crate) fn fit_reading(cost: &CostModel, readings: &[ReadingSample]) -> f64 {
    let slowdown = 1.0 + cost.step_slowdown;
    let more = readings
        .iter()
        .map(|r| r.ns as f64 * rate_beside(r.beside_ns, r.ns, slowdown) - cost.step_ns(&r.shape) as f64);
    (median(more) * 1e-9).max(0.0)
}

#[cfg(test)]
mod tests {
    use lora_sched::Nanos;

    use super::*;
    use crate::calibrate::{Sample, refit};
    use crate::profile::tests::round;

    const US: Nanos = 1_000;

    fn step(took: Nanos, beside: Nanos) -> StepTime {
        let shape = StepShape { tokens: 10, prefills: 1, ..StepShape::default() };
        StepTime { shape, running: 1, took, stalled: 0, beside, held: None, reading: false }
    }

    #[test]
    fn a_step_is_a_sample_where_nothing_was_beside_it() {
        let reading = StepTime { reading: true, stalled: 5, ..step(30, 20) };
        let steps = vec![
            step(10, 0),
            step(11, 1),
            StepTime { held: Some(3), ..step(12, 0) },
            StepTime { stalled: 2, ..step(13, 0) },
            reading,
        ];
        let mut served = ServedTimes::default();
        served.take(&LogTimes { steps, copies: Vec::new() });
        assert_eq!(served.steps, [StepSample { shape: reading.shape, ns: 10 }]);
        assert_eq!(served.readings, [ReadingSample { shape: reading.shape, ns: 30, beside_ns: 20 }]);
    }

    #[test]
    fn a_copy_is_a_sample_where_it_had_the_engine_and_steps_to_itself_or_not_at_all() {
        let (submitted, turn, started, ended, done) = (100, 100, 120, 220, 240);
        let copy =
            CopyTime { bytes: vec![7], submitted, turn, started, ended, done, beside: 0, beside_bytes: 0 };
        let of = |beside_step| Some(SwapSample { bytes: 7, ns: 140, copy_ns: 100, beside_step });
        assert_eq!(swap(&copy), of(false));
        assert_eq!(swap(&CopyTime { beside: 130, beside_bytes: 95, ..copy.clone() }), of(true));
        assert_eq!(swap(&CopyTime { beside: 130, beside_bytes: 60, ..copy.clone() }), None);
        assert_eq!(swap(&CopyTime { beside: 10, ..copy.clone() }), None);
        assert_eq!(swap(&CopyTime { turn: 110, ..copy.clone() }), None);
        assert_eq!(swap(&CopyTime { bytes: vec![7, 7], ..copy }), None);
    }

    #[test]
    fn what_reading_an_adapter_under_way_costs_is_what_composition_and_copies_leave() {
        let mut profile = round();
        profile.swap.step_slowdown = 0.5;
        let cost = CostModel::new(&profile.signed()).unwrap();
        // 1.2 ms and 0.3 ms of work, of which 0.4 ms took half as long again.
        let reading = |ns, beside_ns| ReadingSample { shape: step(0, 0).shape, ns, beside_ns };
        let right = [reading(1_700 * US, 600 * US), reading(1_500 * US, 0), reading(9_000 * US, 0)];
        assert!((fit_reading(&cost, &right) - 300e-6).abs() < 1e-12, "{}", fit_reading(&cost, &right));
        assert_eq!(fit_reading(&cost, &[reading(1_000 * US, 0)]), 0.0);
        assert_eq!(fit_reading(&cost, &[]), 0.0);
    }

    #[test]
    fn samples_read_back_and_a_refit_without_them_leaves_the_cost_alone() {
        let StepTime { shape, .. } = step(0, 0);
        let reading = ReadingSample { shape, ns: 1_500 * US, beside_ns: 7 };
        let swap = SwapSample { bytes: 7, ns: 140, copy_ns: 100, beside_step: true };
        for sample in [Sample::Reading(reading), Sample::ServedSwap(swap)] {
            let line = serde_json::to_string(&sample).unwrap();
            assert_eq!(serde_json::from_str::<Sample>(&line).unwrap(), sample, "{line}");
        }
        let steps = [(false, StepSample { shape, ns: 1_200 * US })];
        let mut profile = round();
        profile.swap.reading_s = 0.25;
        let profile = profile.signed();
        assert_eq!(refit(profile.clone(), &steps, &[]).unwrap().swap.reading_s, 0.25);
        let fitted = refit(profile, &steps, &[ReadingSample { beside_ns: 0, ..reading }]).unwrap();
        assert!((fitted.swap.reading_s - 300e-6).abs() < 1e-7, "{:?}", fitted.swap);
    }
}
