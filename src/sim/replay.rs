//! Is the simulator the same machine as the engine?
//!
//! A replay takes arrivals as the engine's scheduler saw them, the measured duration of each step
//! and swap, and the measured host gap before each plan, and runs them on the simulator's own clock
//! in its own event order. Then every decision must be the engine's, and every TTFT too. Nothing is
//! excused and nothing resynchronised: events have times of their own in the log, so an arrival at a
//! step's end falls on the same side in both. A log that ends before its requests do, as a killed
//! server leaves it, is compared as far as it goes: what it does not tell of lasts beyond its end.

use std::collections::HashMap;

use lora_sched::{
    AdapterId, Config, ConfigError, EventError, FetchPlan, Nanos, Scheduler, SlotId, StepPlan, SwapKind,
    SwapPlan,
};

use super::clock::{Observer, Outcome, run};
use super::device::{Device, Done};
use super::recorded::{Recorded, RecordedFetch, RecordedStep, RecordedSwap};
use crate::report::decision_log::LoggedSeq;

/// A TTFT may differ by this share …
const TTFT_SHARE: f64 = 0.01;
/// … or by this much.
const TTFT_SLACK: Nanos = 50_000;

/// What a replay found.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct ReplayReport {
    /// Steps of the engine.
    pub steps: usize,
    /// Steps that the simulator decided alike.
    pub steps_alike: usize,
    /// Swaps of the engine.
    pub swaps: usize,
    /// Swaps that the simulator decided alike.
    pub swaps_alike: usize,
    /// Reads from disk of the engine.
    pub fetches: usize,
    /// Reads that the simulator decided alike.
    pub fetches_alike: usize,
    /// First tokens of the engine.
    pub first_tokens: usize,
    /// First tokens within 1 % or 50 µs.
    pub first_tokens_alike: usize,
    /// The largest difference of a TTFT, seconds.
    pub worst_ttft_difference_s: f64,
    /// Requests that had not ended when the log did; what they had yet to do is not compared.
    pub under_way: usize,
    /// The first decision that differs, in words.
    pub first_difference: Option<String>,
}

impl ReplayReport {
    /// Whether the simulator is the same machine.
    pub fn holds(&self) -> bool {
        self.first_difference.is_none()
            && self.steps == self.steps_alike
            && self.swaps == self.swaps_alike
            && self.fetches == self.fetches_alike
            && self.first_tokens == self.first_tokens_alike
    }
}

/// A replay that could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The configuration to replay with is impossible.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The simulator broke down.
    #[error("the replay broke down: {0}")]
    Event(#[from] EventError),
}

/// Replays a recording with `config`: the recording's own, or another as a negative control.
pub fn replay(recorded: &Recorded, config: Config) -> Result<ReplayReport, ReplayError> {
    let mut scheduler = Scheduler::new(config)?;
    let mut device = RecordedDevice::new(recorded);
    let mut decided = Decided::default();
    run(&mut scheduler, &mut device, recorded.inputs.iter().copied(), &mut decided)?;
    Ok(decided.compare(recorded))
}

/// Durations from a recording: of the n-th step, and of the n-th swap of an adapter. Where the
/// simulator does what is not recorded, the medians serve, but nothing of it ends before the log does: it
/// is what was under way then, or the engine did not do it.
struct RecordedDevice<'a> {
    gaps: std::slice::Iter<'a, Nanos>,
    steps: &'a [RecordedStep],
    swaps: HashMap<u32, std::collections::VecDeque<Nanos>>,
    fetches: HashMap<u32, std::collections::VecDeque<(Nanos, bool)>>,
    usual_step: Nanos,
    usual_swap: Nanos,
    usual_fetch: Nanos,
    /// The log's end: what is not recorded ends later.
    end: Nanos,
    planned: usize,
    step: Option<Nanos>,
    copies: Vec<(Nanos, SlotId)>,
    reads: Vec<(Nanos, AdapterId, bool)>,
    stalled: Vec<(SlotId, Nanos)>,
}

fn median(values: impl Iterator<Item = Nanos>) -> Nanos {
    let mut values: Vec<_> = values.collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(1)
}

impl<'a> RecordedDevice<'a> {
    fn new(recorded: &'a Recorded) -> Self {
        let mut swaps: HashMap<_, std::collections::VecDeque<_>> = HashMap::new();
        for swap in &recorded.swaps {
            swaps.entry(swap.adapter).or_default().push_back(swap.took);
        }
        let mut fetches: HashMap<_, std::collections::VecDeque<_>> = HashMap::new();
        for fetch in &recorded.fetches {
            fetches.entry(fetch.adapter).or_default().push_back((fetch.took, fetch.failed));
        }
        Self {
            gaps: recorded.gaps.iter(),
            steps: &recorded.steps,
            swaps,
            fetches,
            usual_step: median(recorded.steps.iter().map(|s| s.took)),
            usual_swap: median(recorded.swaps.iter().map(|s| s.took)),
            usual_fetch: median(recorded.fetches.iter().map(|f| f.took)),
            end: recorded.end,
            planned: 0,
            step: None,
            copies: Vec::new(),
            reads: Vec::new(),
            stalled: Vec::new(),
        }
    }

    /// When something ends that began at `now` and took so long, or, where that is not recorded, `usual`.
    fn ends(&self, now: Nanos, took: Option<Nanos>, usual: Nanos) -> Nanos {
        took.map_or_else(|| (now + usual).max(self.end + 1), |took| now + took)
    }
}

impl Device for RecordedDevice<'_> {
    fn gap(&mut self) -> Nanos {
        self.gaps.next().copied().unwrap_or(0)
    }

    fn submit_step(&mut self, now: Nanos, _: &StepPlan) {
        let step = self.steps.get(self.planned);
        self.step = Some(self.ends(now, step.map(|s| s.took), self.usual_step));
        self.stalled.clear();
        let stalled = step.map_or(&[][..], |s| &s.stalled[..]);
        self.stalled.extend(stalled.iter().map(|&(slot, ns)| (SlotId(slot), ns)));
        self.planned += 1;
    }

    fn submit_swap(&mut self, now: Nanos, swap: &SwapPlan) {
        let took = self.swaps.get_mut(&swap.adapter.0).and_then(|q| q.pop_front());
        self.copies.push((self.ends(now, took, self.usual_swap), swap.slot));
    }

    fn submit_fetch(&mut self, now: Nanos, fetch: &FetchPlan) {
        let recorded = self.fetches.get_mut(&fetch.adapter.0).and_then(|q| q.pop_front());
        let (took, failed) = recorded.unzip();
        let end = self.ends(now, took, self.usual_fetch);
        self.reads.push((end, fetch.adapter, failed.unwrap_or(false)));
    }

    fn next(&mut self) -> Option<(Nanos, Done)> {
        let copy = self.copies.iter().min().map(|&(at, slot)| (at, Done::Swap(slot)));
        let read =
            self.reads.iter().min().map(|&(at, adapter, failed)| (at, Done::Fetch { adapter, failed }));
        self.step.map(|at| (at, Done::Step)).into_iter().chain(copy).chain(read).min()
    }

    fn complete(&mut self, _: Nanos, done: Done) {
        match done {
            Done::Step => self.step = None,
            Done::Swap(slot) => self.copies.retain(|c| c.1 != slot),
            Done::Fetch { adapter, .. } => self.reads.retain(|r| r.1 != adapter),
        }
    }

    fn stalled(&self) -> &[(SlotId, Nanos)] {
        &self.stalled
    }
}

/// A step that the simulator formed: its sequences, and the slots that were loading.
type DecidedStep = (Vec<LoggedSeq>, Vec<u32>);

/// What the simulator decided.
#[derive(Default)]
struct Decided {
    steps: Vec<DecidedStep>,
    /// When each of them was formed.
    formed: Vec<Nanos>,
    swaps: Vec<RecordedSwap>,
    fetches: Vec<(u32, Option<u32>)>,
    ttft: HashMap<u64, Nanos>,
}

impl Observer for Decided {
    const EVERY_STEP: bool = true;

    fn outcome(&mut self, outcome: &Outcome) {
        self.ttft.insert(outcome.arrival, outcome.first - outcome.request.received);
    }

    fn step(&mut self, plan: &StepPlan) {
        let seqs = plan.seqs.iter().map(LoggedSeq::from).collect();
        self.steps.push((seqs, plan.loading.iter().map(|s| s.0).collect()));
    }

    fn swap(&mut self, _: Nanos, swap: &SwapPlan) {
        self.swaps.push(RecordedSwap {
            adapter: swap.adapter.0,
            slot: swap.slot.0,
            evicted: swap.evicted.map(|a| a.0),
            prefetch: swap.kind == SwapKind::Prefetch,
            took: 0,
        });
    }

    fn fetch(&mut self, _: Nanos, fetch: &FetchPlan) {
        self.fetches.push((fetch.adapter.0, fetch.evicted.map(|a| a.0)));
    }

    fn state(&mut self, now: Nanos, _: &Scheduler) {
        self.formed.resize(self.steps.len(), now);
    }
}

impl Decided {
    fn compare(mut self, recorded: &Recorded) -> ReplayReport {
        let mut report = ReplayReport {
            steps: recorded.steps.len(),
            swaps: recorded.swaps.len(),
            fetches: recorded.fetches.len(),
            first_tokens: recorded.ttft.len(),
            under_way: recorded.under_way,
            ..ReplayReport::default()
        };
        // What had not ended may have been decided before what had. If the engine did not decide it, it did something
        // else with the slot, which the simulator keeps for it until the log's end.
        keep_told(&mut self.swaps, |s| s.adapter, recorded.swaps.iter().map(|s| s.adapter));
        keep_told(&mut self.fetches, |f| f.0, recorded.fetches.iter().map(|f| f.adapter));
        for (i, theirs) in recorded.steps.iter().enumerate() {
            match self.steps.get(i) {
                Some((seqs, loading)) if *seqs == theirs.seqs && *loading == theirs.loading => {
                    report.steps_alike += 1;
                }
                ours => note(&mut report, || format!("step {i}: {}", step_difference(theirs, ours))),
            }
        }
        for (i, theirs) in recorded.swaps.iter().enumerate() {
            match self.swaps.get(i) {
                Some(ours) if RecordedSwap { took: theirs.took, ..*ours } == *theirs => {
                    report.swaps_alike += 1;
                }
                ours => note(&mut report, || {
                    let ours = ours.map_or("did none".to_owned(), swap_in_words);
                    format!("swap {i}: the engine {}, the simulator {ours}", swap_in_words(theirs))
                }),
            }
        }
        for (i, theirs) in recorded.fetches.iter().enumerate() {
            let RecordedFetch { adapter, evicted, .. } = *theirs;
            match self.fetches.get(i) {
                Some(&ours) if ours == (adapter, evicted) => report.fetches_alike += 1,
                ours => note(&mut report, || {
                    let words = |(adapter, evicted)| format!("read adapter {adapter}{}", instead(evicted));
                    let ours = ours.copied().map_or("did none".to_owned(), words);
                    format!("read {i}: the engine {}, the simulator {ours}", words((adapter, evicted)))
                }),
            }
        }
        for (arrival, &theirs) in &recorded.ttft {
            // A request cancelled after its first token has no outcome in the simulator.
            let Some(&ours) = self.ttft.get(arrival) else {
                report.first_tokens -= 1;
                continue;
            };
            let difference = ours.abs_diff(theirs);
            report.worst_ttft_difference_s = report.worst_ttft_difference_s.max(difference as f64 / 1e9);
            if difference <= TTFT_SLACK.max((theirs as f64 * TTFT_SHARE) as Nanos) {
                report.first_tokens_alike += 1;
            }
        }
        let theirs = recorded.steps.len();
        // The step after the last one may have been under way, unless the engine was idle after that.
        let told = |formed: &&Nanos| recorded.last_idle.is_some_and(|idle| **formed <= idle);
        let ours = self.formed.iter().filter(told).count();
        if ours > theirs {
            note(&mut report, || format!("the engine ran {theirs} steps, the simulator {ours}"));
        }
        report
    }
}

/// Leaves out what was decided of an adapter more often than a log tells of.
fn keep_told<T>(decided: &mut Vec<T>, adapter: impl Fn(&T) -> u32, told: impl Iterator<Item = u32>) {
    let mut left: HashMap<u32, usize> = HashMap::new();
    told.for_each(|adapter| *left.entry(adapter).or_default() += 1);
    decided.retain(|one| match left.get_mut(&adapter(one)) {
        Some(left) if *left > 0 => {
            *left -= 1;
            true
        }
        _ => false,
    });
}

fn note(report: &mut ReplayReport, what: impl FnOnce() -> String) {
    if report.first_difference.is_none() {
        report.first_difference = Some(what());
    }
}

/// Says in what two steps differ.
fn step_difference(theirs: &RecordedStep, ours: Option<&DecidedStep>) -> String {
    let ran = describe(&theirs.seqs);
    let Some((seqs, loading)) = ours else { return format!("the engine ran {ran}, the simulator none") };
    let simulated = describe(seqs);
    if ran != simulated {
        return format!("the engine ran {ran}, the simulator {simulated}");
    }
    let mut differences = Vec::new();
    for (theirs, ours) in theirs.seqs.iter().zip(seqs).filter(|(theirs, ours)| theirs != ours) {
        let pairs = words_of(theirs).into_iter().zip(words_of(ours));
        let (engine, simulator): (Vec<_>, Vec<_>) = pairs.filter(|(a, b)| a != b).unzip();
        let (engine, simulator) = (engine.join(" and "), simulator.join(" and "));
        differences.push(format!("request {}: the engine {engine}, the simulator {simulator}", theirs.0));
    }
    if theirs.loading != *loading {
        differences.push(format!(
            "slots still loading: the engine's {:?}, the simulator's {loading:?}",
            theirs.loading
        ));
    }
    format!("both ran {ran}; {}", differences.join("; "))
}

/// What [`describe`] does not say of a sequence, each in words.
fn words_of(seq: &LoggedSeq) -> [String; 5] {
    let LoggedSeq(_, adapter, slot, _, _, decode, samples, blocks) = *seq;
    let or_none = |n: Option<u32>| n.map_or("none".to_owned(), |n| n.to_string());
    [
        format!("adapter {}", or_none(adapter)),
        format!("slot {}", or_none(slot)),
        (if decode { "a decode" } else { "a prefill" }).to_owned(),
        (if samples { "a token" } else { "no token" }).to_owned(),
        format!("{blocks} new blocks"),
    ]
}

fn swap_in_words(swap: &RecordedSwap) -> String {
    let RecordedSwap { adapter, slot, evicted, prefetch, .. } = *swap;
    let ahead = if prefetch { ", ahead of demand" } else { "" };
    format!("copied adapter {adapter} into slot {slot}{}{ahead}", instead(evicted))
}

fn instead(evicted: Option<u32>) -> String {
    evicted.map_or_else(String::new, |adapter| format!(" in place of {adapter}"))
}

/// Which tokens of which requests: request[tokens before + tokens computed].
fn describe(seqs: &[LoggedSeq]) -> String {
    let each = seqs.iter().map(|s| format!("{}[{}+{}]", s.0, s.3, s.4));
    each.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_said() {
        let seq = LoggedSeq(7, Some(3), Some(1), 0, 20, false, true, 2);
        let theirs = RecordedStep { seqs: vec![seq], loading: vec![1], gap: 0, took: 1, stalled: Vec::new() };
        let said = |seq, loading: &[u32]| step_difference(&theirs, Some(&(vec![seq], loading.to_vec())));
        assert_eq!(
            said(LoggedSeq(7, Some(3), Some(2), 0, 20, false, true, 2), &[2]),
            "both ran 7[0+20]; request 7: the engine slot 1, the simulator slot 2; \
             slots still loading: the engine's [1], the simulator's [2]"
        );
        assert_eq!(
            said(LoggedSeq(7, Some(3), Some(1), 0, 20, false, false, 3), &[1]),
            "both ran 7[0+20]; request 7: the engine a token and 2 new blocks, the simulator no token and 3 new blocks"
        );
        assert_eq!(
            said(LoggedSeq(7, Some(3), Some(1), 0, 16, false, true, 2), &[1]),
            "the engine ran 7[0+20], the simulator 7[0+16]"
        );
        assert_eq!(step_difference(&theirs, None), "the engine ran 7[0+20], the simulator none");
    }
}
