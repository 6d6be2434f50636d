//! What each step and copy of a run took, and what was beside it, from its decision log.

mod spans;

use std::collections::HashMap;

use lora_sched::{AdapterId, Nanos, PlaceId, RequestId, SeqStep, SlotId, StepPlan};

use crate::profile::{History, StepShape};
use crate::report::decision_log::{LogHeader, LogLine, LoggedSeq};
use spans::Spans;

/// A log that times cannot be taken from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}: this log is not whole; name one that `serve --decision-log` wrote")]
pub struct LogTimesError(String);

/// A step, as a run had it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepTime {
    /// Its composition.
    pub shape: StepShape,
    /// Sequences in it.
    pub running: u64,
    /// From submission to its end's being known, less [`stalled`](Self::stalled).
    pub took: Nanos,
    /// How long it waited for layers of adapters, which is no work of its own.
    pub stalled: Nanos,
    /// For how much of [`took`](Self::took) copies were under way.
    pub beside: Nanos,
    /// How long it waited for copies before it was submitted, if it did.
    pub held: Option<Nanos>,
    /// Whether it reads an adapter whose copy was under way when it was submitted.
    pub reading: bool,
}

/// Copies whose bytes moved at the same time, or one that had the copy engine alone: of several, none can be told from
/// the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyTime {
    /// Bytes of each of them.
    pub bytes: Vec<u64>,
    /// When the first of them was submitted.
    pub submitted: Nanos,
    /// When it was their turn: the later of their submission and the end of those before, since copies go one after
    /// another.
    pub turn: Nanos,
    /// When the first byte moved.
    pub started: Nanos,
    /// When the last byte had.
    pub ended: Nanos,
    /// When the last one's end was known.
    pub done: Nanos,
    /// For how long of their turn steps ran.
    pub beside: Nanos,
    /// The same between first and last byte.
    pub beside_bytes: Nanos,
}

/// Steps in their order, and copies in that of their first bytes. What was under way when the log ended is not there.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogTimes {
    /// The steps.
    pub steps: Vec<StepTime>,
    /// The copies.
    pub copies: Vec<CopyTime>,
}

impl LogTimes {
    /// Takes a log's lines.
    ///
    /// # Errors
    /// If a line's times do not follow one another, or a step computes nothing or names what no line tells of.
    pub fn new(header: &LogHeader, lines: &[LogLine]) -> Result<Self, LogTimesError> {
        let mut copies = copies(lines)?;
        let copying = Spans::of(copies.iter().map(|c| (c.started, c.ended)));
        let steps = steps(header, lines, &copying)?;
        let stepping = Spans::of(lines.iter().filter_map(|line| match *line {
            LogLine::Step { submitted, done, .. } => Some((submitted, done)),
            _ => None,
        }));
        let mut before = 0;
        for copy in &mut copies {
            copy.turn = copy.submitted.max(before).min(copy.done);
            copy.beside = stepping.within(copy.turn, copy.done);
            copy.beside_bytes = stepping.within(copy.started, copy.ended);
            before = before.max(copy.done);
        }
        Ok(Self { steps, copies })
    }
}

/// The rate of something that is slowed by `factor` where something else is beside it, which was there for `beside` of
/// the `took` time: 1 with nothing beside it. The share of the time is taken from the run, not the time itself: a step
/// that is predicted longer had more of it beside a copy.
pub fn rate_beside(beside: Nanos, took: Nanos, factor: f64) -> f64 {
    let share = if took == 0 { 0.0 } else { beside.min(took) as f64 / took as f64 };
    1.0 - share + share / factor
}

fn steps(header: &LogHeader, lines: &[LogLine], copying: &Spans) -> Result<Vec<StepTime>, LogTimesError> {
    let stalls = stalls(lines);
    let mut ranks: HashMap<u32, u32> = (0..).zip(header.config.adapters.iter().map(|a| a.0)).collect();
    // Kept for costs that do not look back as well: how busy the device was is shown either way.
    let mut history = History::default();
    let mut plan = StepPlan::default();
    let mut steps = Vec::new();
    for line in lines {
        if let LogLine::AddAdapter { adapter, rank, .. } = *line {
            ranks.insert(adapter, rank);
        }
        let LogLine::Step { step, formed, submitted, done, seqs, loading, waited, .. } = line else {
            continue;
        };
        in_order(&[*formed, *submitted, *done], || format!("step {step}"))?;
        plan.seqs.clear();
        for seq in seqs {
            let seq = planned(seq).filter(|s| s.adapter.is_none_or(|(a, _)| ranks.contains_key(&a.0)));
            plan.seqs.push(seq.ok_or_else(|| unheard_of(*step))?);
        }
        let rank = |adapter: u32| ranks.get(&adapter).copied().unwrap_or(0);
        let shape = StepShape::of(&plan, *submitted, rank, &mut history);
        let stalled = stalls.get(step).copied().unwrap_or(0).min(done - submitted);
        let empty = shape.prefills == 0 && shape.decodes == 0;
        if empty && stalled == 0 && !waited {
            return Err(LogTimesError(format!("step {step} computes nothing")));
        }
        steps.push(StepTime {
            shape,
            running: seqs.len() as u64,
            took: done - submitted - stalled,
            stalled,
            // As long as a step waits for a copy, one is under way.
            beside: copying.within(*submitted, *done).saturating_sub(stalled),
            held: waited.then(|| submitted - formed),
            // What a step waited for before has landed.
            reading: !loading.is_empty() && !waited,
        });
    }
    Ok(steps)
}

/// Copies in order of their first bytes; those whose bytes moved at the same time are one. What depends on others is
/// filled in later.
fn copies(lines: &[LogLine]) -> Result<Vec<CopyTime>, LogTimesError> {
    let mut copies = Vec::new();
    for line in lines {
        if let LogLine::Swap { adapter, bytes, submitted, started, ended, done, .. } = *line {
            in_order(&[submitted, started, ended, done], || format!("a swap of adapter {adapter}"))?;
            let (bytes, turn, beside, beside_bytes) = (vec![bytes], submitted, 0, 0);
            copies.push(CopyTime { bytes, submitted, turn, started, ended, done, beside, beside_bytes });
        }
    }
    copies.sort_by_key(|c| (c.started, c.ended));
    let mut runs: Vec<CopyTime> = Vec::new();
    for copy in copies {
        match runs.last_mut() {
            Some(run) if copy.started < run.ended => {
                run.submitted = run.submitted.min(copy.submitted);
                run.ended = run.ended.max(copy.ended);
                run.done = run.done.max(copy.done);
                run.bytes.extend(copy.bytes);
            }
            _ => runs.push(copy),
        }
    }
    Ok(runs)
}

/// How long each step waited for layers. Several slots are waited for at the same time: the longest wait is what the
/// step lost.
fn stalls(lines: &[LogLine]) -> HashMap<u64, Nanos> {
    let longest = |line: &LogLine| match line {
        LogLine::StepDone { step, stalled, .. } => {
            stalled.iter().map(|s| s.1).max().map(|longest| (*step, longest))
        }
        _ => None,
    };
    lines.iter().filter_map(longest).collect()
}

/// A sequence as the plan had it; none where an adapter has no slot.
fn planned(
    &LoggedSeq(id, adapter, slot, start, len, decode, samples, blocks): &LoggedSeq,
) -> Option<SeqStep> {
    if adapter.is_some() != slot.is_some() {
        return None;
    }
    Some(SeqStep {
        id: RequestId(id),
        place: PlaceId(0),
        adapter: adapter.map(AdapterId).zip(slot.map(SlotId)),
        start,
        len,
        decode,
        samples,
        new_blocks: 0..blocks,
    })
}

fn unheard_of(step: u64) -> LogTimesError {
    LogTimesError(format!("step {step} names an adapter that neither the header nor a line tells of"))
}

/// Refuses times that go back; `what` is named then.
pub(super) fn in_order(times: &[Nanos], what: impl FnOnce() -> String) -> Result<(), LogTimesError> {
    if times.is_sorted() {
        return Ok(());
    }
    Err(LogTimesError(format!("{} has times that do not follow one another", what())))
}
