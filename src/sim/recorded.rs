//! A decision log taken apart into what a replay feeds in and what it compares with.

use std::collections::{HashMap, HashSet};

use lora_sched::{AdapterId, AdapterSpec, Config, Nanos, UnknownChoice};

use super::clock::{AdapterChange, Input, SimRequest};
use crate::report::decision_log::{LogHeader, LogLine, LoggedSeq};

/// One step of the engine. Request ids count arrivals from 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedStep {
    /// What it computed, in plan order.
    pub seqs: Vec<LoggedSeq>,
    /// Slots that were loading when it was formed.
    pub loading: Vec<u32>,
    /// From the event that made it possible to the plan.
    pub gap: Nanos,
    /// From the plan (or the end of the swaps that it waited for) to its end.
    pub took: Nanos,
    /// Waits for layers, by slot.
    pub stalled: Vec<(u32, Nanos)>,
}

/// One swap of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordedSwap {
    /// The adapter.
    pub adapter: u32,
    /// Where to.
    pub slot: u32,
    /// Whose slot it was.
    pub evicted: Option<u32>,
    /// Whether it went ahead of demand.
    pub prefetch: bool,
    /// From the decision to its end.
    pub took: Nanos,
}

/// One read from disk of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordedFetch {
    /// The adapter.
    pub adapter: u32,
    /// Whose place in host memory it took.
    pub evicted: Option<u32>,
    /// From the decision to its end.
    pub took: Nanos,
    /// Whether it could not be read.
    pub failed: bool,
}

/// What an engine did.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// What its scheduler was made with.
    pub config: Config,
    /// Arrivals, cancels and changes to the adapters, in order of time.
    pub inputs: Vec<Input>,
    /// From the event that made a plan possible to the plan, of every plan in order: of steps, and of nothing
    /// while all that wait lack something.
    pub gaps: Vec<Nanos>,
    /// Steps in order.
    pub steps: Vec<RecordedStep>,
    /// Swaps in order of decision.
    pub swaps: Vec<RecordedSwap>,
    /// Reads from disk in order of decision.
    pub fetches: Vec<RecordedFetch>,
    /// TTFT of each arrival that got a first token.
    pub ttft: HashMap<u64, Nanos>,
    /// Requests that had not ended when the log did: what they had yet to do is not in it.
    pub under_way: usize,
    /// The log's last time.
    pub end: Nanos,
    /// When the engine last asked for a plan and had none.
    pub last_idle: Option<Nanos>,
}

/// A log that cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// A choice that this program does not know.
    #[error("the log's header: {0}")]
    Config(#[from] UnknownChoice),
    /// A line that refers to nothing.
    #[error("the log is not whole: {0}")]
    Broken(String),
}

impl Recorded {
    /// Takes a log apart. Work that was under way when the log ended is left out: decisions are written when what they
    /// asked for has ended.
    pub fn new(header: &LogHeader, lines: &[LogLine]) -> Result<Self, RecordError> {
        let config = Config::try_from(&header.config)?;
        let arrivals = arrivals(lines);
        let number = |id: u64| {
            let found = arrivals.get(&id).copied();
            found.ok_or_else(|| RecordError::Broken(format!("request {id} has no arrival")))
        };

        let mut ttft = HashMap::new();
        let mut received = HashMap::new();
        let mut cancels = Vec::new();
        let mut stalls: HashMap<u64, Vec<(u32, Nanos)>> = HashMap::new();
        for line in lines {
            match line {
                LogLine::Arrive { id, received: at, refused: None, .. } => _ = received.insert(*id, *at),
                LogLine::Cancel { t, id } => cancels.push(Input::Cancel { at: *t, arrival: number(*id)? }),
                LogLine::StepDone { step, stalled, .. } => _ = stalls.insert(*step, stalled.clone()),
                LogLine::First { t, id, .. } => {
                    let from = received.get(id).copied().unwrap_or(*t);
                    ttft.insert(number(*id)?, t - from);
                }
                _ => {}
            }
        }
        let mut inputs = requests(lines);
        inputs.extend(cancels);
        inputs.extend(lines.iter().filter_map(adapter_change));
        inputs.sort_by_key(Input::at);

        let (gaps, gap_of) = gaps(lines);
        let mut steps = Vec::new();
        for line in lines {
            let LogLine::Step { step, formed, done, seqs, loading, waited, submitted, .. } = line else {
                continue;
            };
            if *step != steps.len() as u64 {
                return Err(RecordError::Broken(format!("step {step} follows step {}", steps.len())));
            }
            let from =
                if *waited { last_swap(lines, loading, *submitted).unwrap_or(*formed) } else { *formed };
            let renumber = |s: &LoggedSeq| Ok(LoggedSeq(number(s.0)?, s.1, s.2, s.3, s.4, s.5, s.6, s.7));
            steps.push(RecordedStep {
                seqs: seqs.iter().map(renumber).collect::<Result<_, RecordError>>()?,
                loading: loading.clone(),
                gap: gap_of.get(formed).copied().unwrap_or(0),
                took: done - from,
                stalled: stalls.remove(step).unwrap_or_default(),
            });
        }

        let mut swaps: Vec<(Nanos, RecordedSwap)> = Vec::new();
        for line in lines {
            if let LogLine::Swap { adapter, slot, evicted, prefetch, decided, done, .. } = *line {
                let swap = RecordedSwap { adapter, slot, evicted, prefetch, took: done - decided };
                swaps.push((decided, swap));
            }
        }
        swaps.sort_by_key(|s| s.0);
        let swaps = swaps.into_iter().map(|s| s.1).collect();
        let fetches = fetches(lines);
        let ended = lines.iter().filter(|line| matches!(line, LogLine::Ended { .. })).count();
        let under_way = arrivals.len().saturating_sub(ended);
        let end = lines.iter().map(time).max().unwrap_or(0);
        let idle = |line: &LogLine| matches!(line, LogLine::Idle { .. }).then(|| time(line));
        let last_idle = lines.iter().filter_map(idle).max();
        Ok(Self { config, inputs, gaps, steps, swaps, fetches, ttft, under_way, end, last_idle })
    }

    /// Whether there is no decision to compare with.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.swaps.is_empty() && self.fetches.is_empty()
    }
}

/// When a line was written: of a decision, when what it asked for had ended.
fn time(line: &LogLine) -> Nanos {
    match *line {
        LogLine::Arrive { t, .. }
        | LogLine::Cancel { t, .. }
        | LogLine::StepDone { t, .. }
        | LogLine::SwapDone { t, .. }
        | LogLine::AddAdapter { t, .. }
        | LogLine::RemoveAdapter { t, .. }
        | LogLine::PinAdapter { t, .. }
        | LogLine::FetchDone { t, .. }
        | LogLine::Idle { t }
        | LogLine::AdapterGone { t, .. }
        | LogLine::First { t, .. }
        | LogLine::Ended { t, .. }
        | LogLine::Preempted { t, .. } => t,
        LogLine::Step { done, .. } | LogLine::Swap { done, .. } | LogLine::Fetch { done, .. } => done,
    }
}

/// What a line says of an adapter from outside, if it does.
fn adapter_change(line: &LogLine) -> Option<Input> {
    let (at, change) = match *line {
        LogLine::AddAdapter { t, rank, bytes, .. } => (t, AdapterChange::Add(AdapterSpec::new(rank, bytes))),
        LogLine::RemoveAdapter { t, adapter } => (t, AdapterChange::Remove(AdapterId(adapter))),
        LogLine::PinAdapter { t, adapter, pinned } => (t, AdapterChange::Pin(AdapterId(adapter), pinned)),
        _ => return None,
    };
    Some(Input::Adapter { at, change })
}

/// Reads from disk in order of decision.
fn fetches(lines: &[LogLine]) -> Vec<RecordedFetch> {
    let mut failed = HashSet::new();
    let mut fetches = Vec::new();
    for line in lines {
        match *line {
            LogLine::FetchDone { t, failed: true, .. } => _ = failed.insert(t),
            LogLine::Fetch { adapter, evicted, decided, done, .. } => {
                let failed = failed.contains(&done);
                let fetch = RecordedFetch { adapter, evicted, took: done - decided, failed };
                fetches.push((decided, fetch));
            }
            _ => {}
        }
    }
    // Of those decided at once, the first asked for ends first: the disk's thread keeps to the order.
    fetches.sort_by_key(|f| f.0);
    fetches.into_iter().map(|f| f.1).collect()
}

/// Log id → number of the arrival, counted from 0 over those that were taken.
fn arrivals(lines: &[LogLine]) -> HashMap<u64, u64> {
    let taken = lines.iter().filter_map(|line| match line {
        LogLine::Arrive { id, refused: None, .. } => Some(*id),
        _ => None,
    });
    taken.zip(0..).collect()
}

/// The arrivals; who was stopped early has the output length that it came to.
fn requests(lines: &[LogLine]) -> Vec<Input> {
    let mut generated: HashMap<u64, u32> = HashMap::new();
    let mut stopped: HashMap<u64, u32> = HashMap::new();
    for line in lines {
        match line {
            LogLine::Step { seqs, .. } => {
                for seq in seqs.iter().filter(|s| s.6) {
                    *generated.entry(seq.0).or_default() += 1;
                }
            }
            LogLine::Ended { id, why: crate::report::decision_log::LoggedEnd::Stop, .. } => {
                _ = stopped.insert(*id, 0);
            }
            _ => {}
        }
    }
    for (id, length) in &mut stopped {
        *length = generated.get(id).copied().unwrap_or(0);
    }
    let mut number = 0;
    let mut inputs = Vec::new();
    for line in lines {
        if let LogLine::Arrive { t, id, adapter, received, prompt_tokens, max_tokens, refused: None } = line {
            inputs.push(Input::Arrive(SimRequest {
                id: number,
                received: *received,
                queued: *t,
                adapter: *adapter,
                prompt_tokens: *prompt_tokens,
                output_tokens: stopped.get(id).map_or(*max_tokens, |&length| length.max(1)),
            }));
            number += 1;
        }
    }
    inputs
}

/// From the event that made a plan possible to the plan, of each plan in order, and by the time of the plan. That
/// event is the first after the plan before that leaves no step in flight and some request there: the
/// simulator asks for a plan after such an event and after no other, so plans that the engine makes with
/// nothing to plan for are left out.
pub(super) fn gaps(lines: &[LogLine]) -> (Vec<Nanos>, HashMap<Nanos, Nanos>) {
    /// What happened, at one time in this order: a request's end is told before the event that it came of.
    #[derive(PartialEq, Eq, PartialOrd, Ord)]
    enum Mark {
        Ended,
        Arrived,
        Input,
        StepDone,
        Plan { formed: bool },
    }
    let mark = |line: &LogLine| match *line {
        LogLine::Ended { t, .. } => Some((t, Mark::Ended)),
        LogLine::Arrive { t, refused: None, .. } => Some((t, Mark::Arrived)),
        LogLine::Cancel { t, .. }
        | LogLine::SwapDone { t, .. }
        | LogLine::AddAdapter { t, .. }
        | LogLine::RemoveAdapter { t, .. }
        | LogLine::PinAdapter { t, .. }
        | LogLine::FetchDone { t, .. } => Some((t, Mark::Input)),
        LogLine::StepDone { t, .. } => Some((t, Mark::StepDone)),
        LogLine::Idle { t } => Some((t, Mark::Plan { formed: false })),
        LogLine::Step { formed, .. } => Some((formed, Mark::Plan { formed: true })),
        _ => None,
    };
    let mut marks: Vec<_> = lines.iter().filter_map(mark).collect();
    marks.sort();
    let times: HashSet<Nanos> = marks.iter().map(|m| m.0).collect();
    let (mut gaps, mut gap_of) = (Vec::new(), HashMap::new());
    let (mut there, mut in_flight, mut possible) = (0usize, false, None);
    for (t, mark) in marks {
        match mark {
            Mark::Ended => there = there.saturating_sub(1),
            Mark::Arrived => there += 1,
            Mark::Input => {}
            Mark::StepDone => in_flight = false,
            Mark::Plan { formed } => {
                if let Some(since) = possible.take() {
                    gaps.push(t - since);
                    gap_of.insert(t, t - since);
                }
                in_flight = formed;
                continue;
            }
        }
        if mark != Mark::Ended && !in_flight && there > 0 {
            possible = possible.or(Some(t));
        }
    }
    // The plan of a step that was under way when the log ended is not in it. What it decided beside may be: what was
    // decided at no event's time was decided by a plan.
    if let Some(since) = possible {
        let decided = lines.iter().filter_map(|line| match *line {
            LogLine::Swap { decided, .. } | LogLine::Fetch { decided, .. } => Some(decided),
            _ => None,
        });
        let planned = decided.filter(|t| *t > since && !times.contains(t)).min();
        gaps.extend(planned.map(|t| t - since));
    }
    (gaps, gap_of)
}

/// When the last swap into one of `slots` was known to be done, at `by` at the latest.
fn last_swap(lines: &[LogLine], slots: &[u32], by: Nanos) -> Option<Nanos> {
    let ends = lines.iter().filter_map(|line| match line {
        LogLine::SwapDone { t, slot } if *t <= by && slots.contains(slot) => Some(*t),
        _ => None,
    });
    ends.max()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::decision_log::LoggedEnd;

    fn arrive(t: Nanos, id: u64) -> LogLine {
        let (adapter, received, refused) = (Some(1), t, None);
        LogLine::Arrive { t, id, adapter, received, prompt_tokens: 1, max_tokens: 1, refused }
    }

    fn step(step: u64, formed: Nanos, done: Nanos) -> LogLine {
        let (submitted, started, ended) = (formed, formed, done);
        let (seqs, loading, waited) = (Vec::new(), Vec::new(), false);
        LogLine::Step { step, formed, submitted, started, ended, done, seqs, loading, waited }
    }

    fn step_done(t: Nanos, step: u64) -> LogLine {
        LogLine::StepDone { t, step, stopped: Vec::new(), stalled: Vec::new() }
    }

    #[test]
    fn a_gap_begins_with_the_event_that_left_something_to_plan_for() {
        let lines = [
            // Its adapter has to come first: the first plan is of nothing, and has a gap all the same.
            arrive(10, 0),
            LogLine::Idle { t: 13 },
            LogLine::SwapDone { t: 20, slot: 0 },
            step(0, 25, 40),
            // The engine falls idle, and something arrives before it has planned.
            step_done(40, 0),
            LogLine::Ended { t: 40, id: 0, why: LoggedEnd::Length },
            arrive(42, 1),
            arrive(44, 2),
            step(1, 49, 60),
            step_done(60, 1),
            step(2, 66, 70),
            step_done(70, 2),
            LogLine::Ended { t: 70, id: 1, why: LoggedEnd::Length },
            LogLine::Ended { t: 70, id: 2, why: LoggedEnd::Length },
            // Nothing is there, so nobody asks the simulator for a plan.
            LogLine::Idle { t: 72 },
        ];
        let (gaps, gap_of) = gaps(&lines);
        assert_eq!(gaps, [3, 5, 7, 6]);
        assert_eq!([25, 49, 66].map(|formed| gap_of[&formed]), [5, 7, 6]);
    }
}
