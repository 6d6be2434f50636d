//! Copies of adapters into slots, alone and beside steps, and what they cost the steps.

use lora_sched::{AdapterId, SlotId, SwapKind, SwapPlan};
use serde::{Deserialize, Serialize};

use super::{BenchError, Floors, Times};
use crate::calibrate::StepBench;
use crate::engine::executor::{Completion, Executor, ExecutorError};
use crate::engine::setup::Loaded;

/// Tokens of the prompt, and sequences and their context of the decode, beside which copies run.
const PROMPT: u32 = 512;
const BATCH: u32 = 16;

/// What copies run beside.
struct Beside {
    prompt: u32,
    batch: u32,
    decode: bool,
}

/// Copies under one circumstance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SwapRow {
    /// The order of copies and steps.
    pub mode: String,
    /// Where the host copies lie.
    pub host_memory: String,
    /// alone; one, or one after another, while a prefill or a decode runs.
    pub beside: String,
    /// Bytes of one adapter.
    pub bytes: u64,
    /// From submission until whoever waits for it knows that it has landed.
    pub times: Times,
    /// Of that, from when the copy thread takes it up until it sees the last byte landed: without the hand-over between
    /// threads on either side.
    #[serde(default)]
    pub copied: Option<Times>,
    /// What the bus alone would take.
    pub floor_ms: Option<f64>,
    /// The step without copies beside it, and with.
    pub step: Option<(Times, Times)>,
}

/// Copies adapters in turn into the last slot, which no step reads.
struct Copies {
    slot: SlotId,
    adapters: Vec<(AdapterId, u64)>,
    next: usize,
    begun: u64,
    /// From submission to the word, and as the copy thread sees it.
    ns: Vec<u64>,
    copied: Vec<u64>,
}

impl Copies {
    fn start(&mut self, executor: &mut dyn Executor) -> Result<(), ExecutorError> {
        let (adapter, bytes) = self.adapters[self.next % self.adapters.len()];
        self.next += 1;
        self.begun = executor.clock();
        let kind = SwapKind::Demand;
        executor.submit_swap(&SwapPlan { adapter, slot: self.slot, evicted: None, bytes, kind })
    }

    /// Notes a completion that has come; whether it is a swap's.
    fn ended(&mut self, completion: &Completion, now: u64) -> bool {
        let Completion::Swap { started, ended, .. } = *completion else { return false };
        self.ns.push(now - self.begun);
        self.copied.push(ended.saturating_sub(started));
        true
    }
}

pub(super) fn swaps(
    bench: &mut StepBench<'_>,
    loaded: &Loaded,
    gpu_loras: usize,
    runs: usize,
    longest: u32,
    floors: &Floors,
) -> Result<Vec<SwapRow>, BenchError> {
    let specs = loaded.pool().specs();
    let Some(largest) = specs.iter().map(|s| s.bytes).max() else { return Ok(Vec::new()) };
    if gpu_loras < 2 {
        return Ok(Vec::new());
    }
    let adapters = (0..).map(AdapterId).zip(specs.iter().map(|s| s.bytes)).filter(|a| a.1 == largest);
    let mut copies = Copies {
        slot: SlotId(gpu_loras as u32 - 1),
        adapters: adapters.collect(),
        next: 0,
        begun: 0,
        ns: Vec::new(),
        copied: Vec::new(),
    };
    for _ in 0..runs + 2 {
        let executor = bench.executor();
        copies.start(executor)?;
        let completion = executor.wait()?;
        copies.ended(&completion, executor.clock());
    }
    let mut rows = Vec::new();
    let mut row = |beside: &str, (ns, copied): (&[u64], &[u64]), step| {
        let floor_ms = floors.swap_ms(largest);
        let times = Times::of(ns);
        rows.extend(times.map(|times| SwapRow {
            mode: loaded.settings().swap_mode.to_string(),
            host_memory: loaded.settings().host_memory.to_string(),
            beside: beside.to_owned(),
            bytes: largest,
            times,
            copied: Times::of(copied),
            floor_ms,
            step,
        }));
    };
    row("alone", (&copies.ns[2..], &copies.copied[2..]), None);

    for (decode, again) in [(false, false), (false, true), (true, false), (true, true)] {
        copies.ns.clear();
        copies.copied.clear();
        let (mut alone, mut beside) = (Vec::new(), Vec::new());
        let step = Beside {
            prompt: PROMPT.min(longest),
            batch: BATCH.min(loaded.settings().max_num_seqs as u32),
            decode,
        };
        if decode {
            for place in 0..step.batch {
                bench.bring_to(place, step.prompt, Some(0))?;
            }
        }
        for _ in 0..runs {
            alone.extend(step.run(bench, |_, _| Ok(()))?);
            copies.start(bench.executor())?;
            beside.extend(step.run(bench, |executor, completion| {
                copies.ended(&completion, executor.clock());
                if again { copies.start(executor) } else { Ok(()) }
            })?);
            if again || copies.ns.len() < beside.len() {
                let executor = bench.executor();
                while !copies.ended(&executor.wait()?, executor.clock()) {}
            }
        }
        let steps = Times::of(&alone).zip(Times::of(&beside));
        let what = match (decode, again) {
            (false, false) => "one, beside prefill",
            (false, true) => "all along a prefill",
            (true, false) => "one, beside decode",
            (true, true) => "all along a decode",
        };
        row(what, (&copies.ns, &copies.copied), steps);
    }
    Ok(rows)
}

impl Beside {
    fn run(
        &self,
        bench: &mut StepBench<'_>,
        beside: impl FnMut(&mut dyn Executor, Completion) -> Result<(), ExecutorError>,
    ) -> Result<Option<u64>, ExecutorError> {
        let sample = if self.decode {
            bench.decode(self.batch, beside)?
        } else {
            bench.prefill(self.prompt, Some(0), beside)?
        };
        Ok(sample.map(|s| s.ns))
    }
}
