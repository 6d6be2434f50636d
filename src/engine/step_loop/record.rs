//! What the loop writes into the decision log; nothing is built where there is no log.

use lora_sched::{
    AdapterId, AdapterSpec, Arrival, Ended, EventError, FetchPlan, Nanos, Parts, RequestId, SlotId, StepPlan,
    SwapKind, SwapPlan,
};

use crate::report::decision_log::{DecisionLog, LogLine, LoggedSeq};

/// The log, if there is one, and the lines of this turn.
pub(super) struct Recorder {
    log: Option<DecisionLog>,
    lines: Vec<LogLine>,
}

impl Recorder {
    pub(super) fn new(log: Option<DecisionLog>) -> Self {
        Self { log, lines: Vec::new() }
    }

    /// Hands the turn's lines over: after the next step is submitted, since it may wake a thread.
    pub(super) fn flush(&mut self) {
        if let Some(log) = &mut self.log {
            log.append(&mut self.lines);
        }
    }

    fn push(&mut self, line: impl FnOnce() -> LogLine) {
        if self.log.is_some() {
            self.lines.push(line());
        }
    }

    pub(super) fn arrive(&mut self, t: Nanos, a: &Arrival, refused: Option<&EventError>) {
        self.push(|| LogLine::Arrive {
            t,
            id: a.id.0,
            adapter: a.adapter.map(|a| a.0),
            received: a.received,
            prompt_tokens: a.prompt_tokens,
            max_tokens: a.max_tokens,
            refused: refused.map(ToString::to_string),
        });
    }

    pub(super) fn cancel(&mut self, t: Nanos, id: RequestId) {
        self.push(|| LogLine::Cancel { t, id: id.0 });
    }

    pub(super) fn step_done(&mut self, t: Nanos, step: u64, stopped: &[u32], stalled: &[(SlotId, Nanos)]) {
        self.push(|| LogLine::StepDone {
            t,
            step,
            stopped: stopped.to_vec(),
            stalled: stalled.iter().map(|&(slot, ns)| (slot.0, ns)).collect(),
        });
    }

    /// `times`: formed, submitted, started, ended, done.
    pub(super) fn step(&mut self, plan: &StepPlan, times: [Nanos; 5]) {
        let [formed, submitted, started, ended, done] = times;
        self.push(|| LogLine::Step {
            step: plan.step,
            formed,
            submitted,
            started,
            ended,
            done,
            seqs: plan.seqs.iter().map(LoggedSeq::from).collect(),
            loading: plan.loading.iter().map(|s| s.0).collect(),
            waited: plan.wait_for_swaps,
        });
    }

    /// `times`: decided, submitted, started, ended.
    pub(super) fn swap_done(&mut self, t: Nanos, swap: &SwapPlan, times: [Nanos; 4]) {
        let [decided, submitted, started, ended] = times;
        self.push(|| LogLine::SwapDone { t, slot: swap.slot.0 });
        self.push(|| LogLine::Swap {
            adapter: swap.adapter.0,
            slot: swap.slot.0,
            evicted: swap.evicted.map(|a| a.0),
            bytes: swap.bytes,
            prefetch: swap.kind == SwapKind::Prefetch,
            decided,
            submitted,
            started,
            ended,
            done: t,
        });
    }

    pub(super) fn add_adapter(&mut self, t: Nanos, adapter: AdapterId, spec: AdapterSpec) {
        let AdapterSpec { rank, bytes, .. } = spec;
        self.push(|| LogLine::AddAdapter { t, adapter: adapter.0, rank, bytes });
    }

    pub(super) fn remove_adapter(&mut self, t: Nanos, adapter: AdapterId) {
        self.push(|| LogLine::RemoveAdapter { t, adapter: adapter.0 });
    }

    pub(super) fn pin_adapter(&mut self, t: Nanos, adapter: AdapterId, pinned: bool) {
        self.push(|| LogLine::PinAdapter { t, adapter: adapter.0, pinned });
    }

    pub(super) fn adapter_gone(&mut self, t: Nanos, adapter: AdapterId) {
        self.push(|| LogLine::AdapterGone { t, adapter: adapter.0 });
    }

    /// `times`: decided, submitted, started, ended.
    pub(super) fn fetch_done(&mut self, t: Nanos, fetch: &FetchPlan, failed: bool, times: [Nanos; 4]) {
        let [decided, submitted, started, ended] = times;
        self.push(|| LogLine::FetchDone { t, adapter: fetch.adapter.0, failed });
        self.push(|| LogLine::Fetch {
            adapter: fetch.adapter.0,
            evicted: fetch.evicted.map(|a| a.0),
            bytes: fetch.bytes,
            decided,
            submitted,
            started,
            ended,
            done: t,
        });
    }

    pub(super) fn idle(&mut self, t: Nanos) {
        self.push(|| LogLine::Idle { t });
    }

    pub(super) fn first(&mut self, t: Nanos, id: RequestId, p: &Parts) {
        let parts = [p.front, p.queue, p.kv, p.slot, p.swap, p.prefill];
        self.push(|| LogLine::First { t, id: id.0, parts });
    }

    pub(super) fn ended(&mut self, t: Nanos, id: RequestId, why: Ended) {
        self.push(|| LogLine::Ended { t, id: id.0, why: why.into() });
    }

    pub(super) fn preempted(&mut self, t: Nanos, id: RequestId) {
        self.push(|| LogLine::Preempted { t, id: id.0 });
    }
}
