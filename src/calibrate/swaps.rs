//! Times swaps alone and beside a step, and what a step loses by them.

use lora_sched::{AdapterId, Nanos, SlotId, SwapKind, SwapPlan};
use serde::{Deserialize, Serialize};

use super::median;
use super::steps::StepBench;
use crate::engine::executor::{Completion, Executor, ExecutorError};
use crate::profile::SwapCosts;

/// One timed swap.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SwapSample {
    /// Bytes copied.
    pub bytes: u64,
    /// From submission to completion, as the host sees it.
    pub ns: u64,
    /// From the first byte to the last, as the device sees it.
    pub copy_ns: u64,
    /// Whether a step ran meanwhile.
    pub beside_step: bool,
}

/// Adapters to copy in turn into a slot that no step reads.
#[derive(Clone, Debug)]
pub struct SwapSource {
    /// The slot.
    pub slot: SlotId,
    /// Adapters with their bytes.
    pub adapters: Vec<(AdapterId, u64)>,
}

/// What swaps and steps do to each other.
#[derive(Clone, Debug, Default)]
pub struct SwapTimes {
    /// Swaps alone and beside steps.
    pub samples: Vec<SwapSample>,
    /// Duration of the same step without and with copies beside it.
    pub steps: Vec<(Nanos, Nanos)>,
    /// Swaps of an engine that served.
    pub served: Vec<SwapSample>,
}

/// How often each is measured.
const SWAPS: usize = 40;
const STEPS: usize = 7;

/// Copies the adapters in turn: alone, then one after another while prefills of `tokens` tokens run.
pub fn time_swaps(
    bench: &mut StepBench<'_>,
    source: &SwapSource,
    tokens: u32,
) -> Result<SwapTimes, ExecutorError> {
    let mut times = SwapTimes::default();
    let mut next = (0..source.adapters.len()).cycle();
    let mut start = |executor: &mut dyn Executor| -> Result<(Nanos, u64), ExecutorError> {
        let (adapter, bytes) = source.adapters[next.next().unwrap_or(0)];
        let begun = executor.clock();
        let kind = SwapKind::Demand;
        executor.submit_swap(&SwapPlan { adapter, slot: source.slot, evicted: None, bytes, kind })?;
        Ok((begun, bytes))
    };

    for _ in 0..SWAPS {
        let executor = bench.executor();
        let (begun, bytes) = start(executor)?;
        let completion = executor.wait()?;
        let now = executor.clock();
        times.samples.extend(sample(&completion, begun, now, bytes, false));
    }

    for _ in 0..STEPS {
        let alone = bench.prefill(tokens, Some(0), |_, _| Ok(()))?;
        let (mut begun, mut bytes) = start(bench.executor())?;
        let mut under_way = true;
        let samples = &mut times.samples;
        let beside = bench.prefill(tokens, Some(0), |executor, completion| {
            samples.extend(sample(&completion, begun, executor.clock(), bytes, true));
            (begun, bytes) = start(executor)?;
            Ok(())
        })?;
        while under_way {
            under_way = !matches!(bench.executor().wait()?, Completion::Swap { .. });
        }
        if let (Some(alone), Some(beside)) = (alone, beside) {
            times.steps.push((alone.ns, beside.ns));
        }
    }
    Ok(times)
}

fn sample(
    completion: &Completion,
    begun: Nanos,
    now: Nanos,
    bytes: u64,
    beside_step: bool,
) -> Option<SwapSample> {
    let Completion::Swap { started, ended, .. } = completion else { return None };
    let ns = now.saturating_sub(begun);
    Some(SwapSample { bytes, ns, copy_ns: (ended - started).clamp(1, ns.max(1)), beside_step })
}

/// So many swaps of an engine that served tell what they take: then those that were timed apart are not asked. With
/// fewer, both are.
const ENOUGH: usize = 20;

/// What it costs more to read an adapter under way is another matter: steps tell of it.
pub(super) fn fit_swaps(times: &SwapTimes) -> SwapCosts {
    let served = |beside| times.served.iter().filter(move |s| s.beside_step == beside);
    let of = |beside| -> Vec<&SwapSample> {
        let served: Vec<_> = served(beside).collect();
        if served.len() >= ENOUGH {
            return served;
        }
        served.into_iter().chain(times.samples.iter().filter(|s| s.beside_step == beside)).collect()
    };
    let rate =
        |swaps: &[&SwapSample]| median(swaps.iter().map(|s| s.bytes as f64 / (s.copy_ns as f64 * 1e-9)));
    let fixed = |swaps: &[&SwapSample]| median(swaps.iter().map(|s| (s.ns - s.copy_ns) as f64 * 1e-9));
    let (alone, beside) = (of(false), of(true));
    let bytes_per_s = rate(&alone);
    let busy_bytes_per_s = if beside.is_empty() { bytes_per_s } else { rate(&beside) };
    // Serving copies beside steps, and all of such a swap is charged at the slower rate.
    let fixed_s = if served(true).count() >= ENOUGH {
        fixed(&beside) * (busy_bytes_per_s / bytes_per_s).min(1.0)
    } else {
        fixed(&alone)
    };
    let step_slowdown = (median(times.steps.iter().map(|p| p.1 as f64 / p.0 as f64)) - 1.0).max(0.0);
    SwapCosts { fixed_s, bytes_per_s, busy_bytes_per_s, step_slowdown, reading_s: 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Swaps of 1 MB, which take `fixed` ns besides the copy.
    fn swaps(count: usize, fixed: u64, copy_ns: u64, beside_step: bool) -> Vec<SwapSample> {
        vec![SwapSample { bytes: 1_000_000, ns: fixed + copy_ns, copy_ns, beside_step }; count]
    }

    fn close(found: f64, expected: f64) -> bool {
        (found / expected - 1.0).abs() < 1e-9
    }

    #[test]
    fn swaps_of_an_engine_that_served_count_instead_of_those_that_were_timed_apart() {
        let samples = [swaps(40, 30_000, 100_000, false), swaps(30, 35_000, 110_000, true)].concat();
        let steps = vec![(100, 102)];
        let apart = SwapTimes { samples, steps, served: Vec::new() };
        let costs = fit_swaps(&apart);
        assert!(close(costs.fixed_s, 30e-6) && close(costs.bytes_per_s, 1e10), "{costs:?}");
        assert!(close(costs.busy_bytes_per_s, 1e10 / 1.1), "{costs:?}");

        // The whole of a swap beside a step is charged at the slower rate: 80 µs in all.
        let served = SwapTimes { served: swaps(ENOUGH, 80_000, 125_000, true), ..apart.clone() };
        let costs = fit_swaps(&served);
        assert!(close(costs.bytes_per_s, 1e10) && close(costs.busy_bytes_per_s, 8e9), "{costs:?}");
        assert!(close(costs.fixed_s * 1e10 / 8e9, 80e-6) && close(costs.step_slowdown, 0.02), "{costs:?}");

        // Too few to stand alone: one of many changes no median.
        let few = SwapTimes { served: swaps(1, 80_000, 125_000, true), ..apart.clone() };
        assert_eq!(fit_swaps(&few), fit_swaps(&apart));
    }
}
