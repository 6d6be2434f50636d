//! Prompts and decodes.

use std::time::Duration;

use lora_sched::Config;
use serde::{Deserialize, Serialize};

use super::{BenchError, Floors, Times};
use crate::calibrate::{StepBench, StepSample};
use crate::engine::executor::ExecutorError;

/// What is measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepGrid {
    /// Prompt lengths.
    pub prompts: Vec<u32>,
    /// Batch sizes of decodes.
    pub batches: Vec<u32>,
    /// Contexts of decodes.
    pub contexts: Vec<u32>,
    /// Distinct adapters in a batch.
    pub adapters: Vec<u32>,
    /// Runs of each.
    pub runs: usize,
    /// Before each run of a prompt as it comes to an idle device, seconds; 0 times none of these.
    pub rest_s: f64,
}

impl StepGrid {
    /// The longest prompt; 1 if there is none.
    pub fn longest(&self) -> u32 {
        self.prompts.iter().copied().max().unwrap_or(1).max(1)
    }
}

/// One prompt, or several in one step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrefillRow {
    /// Tokens of all prompts.
    pub tokens: u32,
    /// Prompts.
    pub prompts: u32,
    /// Distinct adapters.
    pub adapters: u32,
    /// From submission to result, one run right after another.
    pub times: Times,
    /// The same of one prompt that comes to a device with nothing to do for [`StepGrid::rest_s`]: one that is always
    /// busy runs at a lower clock.
    #[serde(default)]
    pub rested: Option<Times>,
    /// What the arithmetic alone would take from idle: as long as large products for as many operations.
    #[serde(default)]
    pub rested_floor_ms: Option<f64>,
    /// What the arithmetic alone would take at the best rate of a large product.
    pub floor_ms: Option<f64>,
    /// What it would take at the rate that large products keep up.
    #[serde(default)]
    pub sustained_floor_ms: Option<f64>,
}

/// One token more of each sequence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecodeRow {
    /// Sequences.
    pub batch: u32,
    /// Tokens in each one's context.
    pub context: u32,
    /// Distinct adapters.
    pub adapters: u32,
    /// From submission to result.
    pub times: Times,
    /// What the reading alone would take.
    pub floor_ms: Option<f64>,
}

/// Slots of `count` sequences that share `adapters` of them; none without adapters.
fn slots(count: u32, adapters: u32) -> Vec<Option<u32>> {
    (0..count).map(|i| (adapters > 0).then(|| i % adapters)).collect()
}

/// Runs before those that count.
const WARM_UP: usize = 2;

/// Times of `runs` runs of a step, after `ahead` that do not count; none if it does not fit.
fn timed(
    ahead: usize,
    runs: usize,
    run: &mut impl FnMut() -> Result<Option<StepSample>, ExecutorError>,
) -> Result<Option<Times>, BenchError> {
    let mut ns = Vec::with_capacity(runs);
    for i in 0..ahead + runs {
        let Some(sample) = run()? else { break };
        if i >= ahead {
            ns.push(sample.ns);
        }
    }
    Ok(Times::of(&ns))
}

pub(super) fn prefill(
    bench: &mut StepBench<'_>,
    grid: &StepGrid,
    floors: &Floors,
    progress: &mut impl FnMut(&str),
) -> Result<Vec<PrefillRow>, BenchError> {
    let mut rows = Vec::new();
    // Several adapters need as many prompts; what they cost shows beside as many of one adapter.
    let of = |&adapters: &u32| match adapters {
        0 | 1 => vec![(1, adapters)],
        several => vec![(several, 1), (several, several)],
    };
    let mixtures: Vec<(u32, u32)> = grid.adapters.iter().flat_map(of).collect();
    for &tokens in &grid.prompts {
        for &(prompts, adapters) in &mixtures {
            if tokens % prompts != 0 {
                continue;
            }
            progress(&format!("prefill: {tokens} tokens, {prompts} prompts, {adapters} adapters"));
            let slots = slots(prompts, adapters);
            let mut run = || bench.prefills(tokens / prompts, &slots);
            let Some(times) = timed(WARM_UP, grid.runs, &mut run)? else { continue };
            // Attention of shorter prompts is less work: the floor is that of one prompt alone.
            let alone = prompts == 1;
            let rest = Duration::from_secs_f64(grid.rest_s);
            let mut after_rest = || {
                std::thread::sleep(rest);
                run()
            };
            let rested = if alone && !rest.is_zero() { timed(1, grid.runs, &mut after_rest)? } else { None };
            let floor_ms = alone.then(|| floors.prefill_ms(tokens)).flatten();
            let sustained_floor_ms = alone.then(|| floors.prefill_sustained_ms(tokens)).flatten();
            let rested_floor_ms = rested.and_then(|_| floors.prefill_from_idle_ms(tokens));
            rows.push(PrefillRow {
                tokens,
                prompts,
                adapters,
                times,
                rested,
                rested_floor_ms,
                floor_ms,
                sustained_floor_ms,
            });
        }
    }
    Ok(rows)
}

pub(super) fn decode(
    bench: &mut StepBench<'_>,
    grid: &StepGrid,
    floors: &Floors,
    config: &Config,
    progress: &mut impl FnMut(&str),
) -> Result<Vec<DecodeRow>, BenchError> {
    let mut rows = Vec::new();
    for &context in &grid.contexts {
        for &batch in &grid.batches {
            for &adapters in grid.adapters.iter().filter(|a| **a <= batch) {
                progress(&format!("decode: {batch} at {context}, {adapters} adapters"));
                let mut fits = true;
                for (place, slot) in (0..).zip(slots(batch, adapters)) {
                    // The steps that are timed end at `context`, all in the same blocks.
                    let begin = context.saturating_sub((WARM_UP + grid.runs) as u32).max(1);
                    fits = fits && bench.bring_to(place, begin, slot)?;
                }
                if !fits {
                    continue;
                }
                let mut run = || bench.decode(batch, |_, _| Ok(()));
                let Some(times) = timed(WARM_UP, grid.runs, &mut run)? else { continue };
                let bytes = config.adapters[..adapters as usize].iter().map(|a| a.bytes).sum();
                let floor_ms = floors.decode_ms(batch, context, bytes);
                rows.push(DecodeRow { batch, context, adapters, times, floor_ms });
            }
        }
    }
    Ok(rows)
}
