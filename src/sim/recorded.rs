//! A decision log taken apart into what a replay feeds in and what it compares with.

use std::collections::HashMap;

use lora_sched::{Config, Nanos, UnknownChoice};

use super::clock::{Input, SimRequest};
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

/// What an engine did.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// What its scheduler was made with.
    pub config: Config,
    /// Arrivals and cancels in order of time.
    pub inputs: Vec<Input>,
    /// Steps in order.
    pub steps: Vec<RecordedStep>,
    /// Swaps in order of decision.
    pub swaps: Vec<RecordedSwap>,
    /// TTFT of each arrival that got a first token.
    pub ttft: HashMap<u64, Nanos>,
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
    /// Takes a log apart. Work that was under way when the log ended is left out.
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
        inputs.sort_by_key(Input::at);

        let triggers = triggers(lines);
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
                gap: formed - triggers.get(formed).copied().unwrap_or(*formed),
                took: done - from,
                stalled: stalls.remove(step).unwrap_or_default(),
            });
        }

        let mut swaps: Vec<(Nanos, usize, RecordedSwap)> = Vec::new();
        for line in lines {
            if let LogLine::Swap { adapter, slot, evicted, prefetch, decided, done, .. } = *line {
                let swap = RecordedSwap { adapter, slot, evicted, prefetch, took: done - decided };
                swaps.push((decided, swaps.len(), swap));
            }
        }
        swaps.sort_by_key(|s| (s.0, s.1));
        let swaps = swaps.into_iter().map(|s| s.2).collect();
        Ok(Self { config, inputs, steps, swaps, ttft })
    }
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

/// For the plan at each time, the event that made it possible: the first one after the plan before
/// it that left no step in flight.
fn triggers(lines: &[LogLine]) -> HashMap<Nanos, Nanos> {
    #[derive(PartialEq, Eq, PartialOrd, Ord)]
    enum Mark {
        Input,
        StepDone,
        Plan { formed: bool },
    }
    let mut marks = Vec::new();
    for line in lines {
        match *line {
            LogLine::Arrive { t, .. } | LogLine::Cancel { t, .. } | LogLine::SwapDone { t, .. } => {
                marks.push((t, Mark::Input));
            }
            LogLine::StepDone { t, .. } => marks.push((t, Mark::StepDone)),
            LogLine::Idle { t } => marks.push((t, Mark::Plan { formed: false })),
            LogLine::Step { formed, .. } => marks.push((formed, Mark::Plan { formed: true })),
            _ => {}
        }
    }
    marks.sort();
    let (mut in_flight, mut first, mut triggers) = (false, None, HashMap::new());
    for (t, mark) in marks {
        match mark {
            Mark::Input if in_flight => {}
            Mark::Input => first = first.or(Some(t)),
            Mark::StepDone => {
                in_flight = false;
                first = first.or(Some(t));
            }
            Mark::Plan { formed } => {
                if formed {
                    triggers.insert(t, first.unwrap_or(t));
                }
                in_flight = formed;
                first = None;
            }
        }
    }
    triggers
}

/// When the last swap into one of `slots` was known to be done, at `by` at the latest.
fn last_swap(lines: &[LogLine], slots: &[u32], by: Nanos) -> Option<Nanos> {
    let ends = lines.iter().filter_map(|line| match line {
        LogLine::SwapDone { t, slot } if *t <= by && slots.contains(slot) => Some(*t),
        _ => None,
    });
    ends.max()
}
