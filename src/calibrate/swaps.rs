//! Times swaps alone and beside a step, and what a step loses by them.

use lora_sched::{AdapterId, Nanos, SlotId, SwapKind, SwapPlan};
use serde::{Deserialize, Serialize};

use super::steps::StepBench;
use crate::engine::executor::{Completion, Executor, ExecutorError};

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
