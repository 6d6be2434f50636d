//! A small discrete-event driver with arbitrary durations that checks every decision as it is made.

mod changes;

use std::collections::{BTreeMap, BTreeSet};

use lora_sched::{
    AdapterId, AdapterSpec, Arrival, Config, Ended, Event, EventError, Evict, FetchPlan, HostState, Nanos,
    Notice, Outbox, Outline, Parts, Policy, RequestId, Scheduler, SeqStep, SlotId, SlotState, StepPlan,
    SwapKind, SwapMode, SwapPlan,
};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

pub use changes::{Change, changing_load};

/// Every adapter that comes later.
const ADDED: AdapterSpec = AdapterSpec { rank: 8, bytes: 500, pinned: false };

/// A configuration and everything that happens to it.
#[derive(Clone, Debug)]
pub struct Load {
    pub config: Config,
    /// Arrivals by time; `received` is when the event comes, less a front-end part.
    pub requests: Vec<Arrival>,
    /// Cancels by time.
    pub cancels: Vec<(Nanos, RequestId)>,
    /// Adapters that come, go and are pinned, by time.
    pub changes: Vec<(Nanos, Change)>,
    /// Every how many reads from disk fail; 0 is none.
    pub failing: usize,
    /// Durations of steps, swaps and reads, cycled through.
    pub durations: Vec<Nanos>,
    /// Front-end part of each arrival.
    pub front: Nanos,
    /// Host time between a step's end and the next plan.
    pub gap: Nanos,
}

impl Load {
    pub fn is_cancelled(&self, id: RequestId) -> bool {
        self.cancels.iter().any(|c| c.1 == id)
    }
}

fn config() -> impl Strategy<Value = Config> {
    (
        (1usize..12, any::<prop::sample::Index>(), 1usize..7, prop::sample::select(vec![1usize, 4, 8])),
        (8usize..64, 40usize..120, any::<bool>(), 0usize..4),
        (
            prop::sample::select(Policy::ALL),
            prop::sample::select(Evict::ALL),
            prop::sample::select(SwapMode::ALL),
            1u64..200_000,
            any::<bool>(),
            prop::option::of(0usize..6),
        ),
    )
        .prop_map(
            |(
                (total, slots, seqs, block),
                (batch, len, chunked, prefetch),
                (policy, evict, mode, age, pin, host),
            )| {
                let mut config = Config {
                    adapters: (0..total).map(|i| AdapterSpec::new(8 << (i % 3), 1000 << (i % 3))).collect(),
                    gpu_loras: 1 + slots.index(total),
                    host_loras: host.map(|more| 1 + slots.index(total) + more),
                    max_num_seqs: seqs,
                    max_num_batched_tokens: if chunked { batch } else { batch.max(len) },
                    max_model_len: len,
                    block_size: block,
                    // Little more than one request's worth, so that preemption happens.
                    kv_blocks: len.div_ceil(block) + seqs,
                    chunked_prefill: chunked,
                    policy,
                    evict,
                    swap_mode: mode,
                    prefetch: if mode == SwapMode::Blocking { 0 } else { prefetch },
                    max_skip_age: age,
                    max_queue: usize::MAX,
                };
                config.adapters[0].pinned = pin && config.gpu_loras > 1;
                config
            },
        )
}

pub fn load() -> impl Strategy<Value = Load> {
    let request = (0u64..40_000, prop::option::weighted(0.9, 0usize..64), 1u32..60, 1u32..30, 0u64..400_000);
    (
        config(),
        prop::collection::vec(request, 1..40),
        prop::collection::vec(1u64..30_000, 1..12),
        0u64..5_000,
        0u64..2_000,
    )
        .prop_map(|(config, raw, durations, front, gap)| {
            let (mut at, mut requests, mut cancels) = (front, Vec::new(), Vec::new());
            for (i, (delay, adapter, prompt, output, cancel)) in raw.into_iter().enumerate() {
                at += delay / 4;
                let id = RequestId(i as u64 * 2);
                let prompt = prompt.min(config.max_model_len as u32 - 1);
                requests.push(Arrival {
                    id,
                    adapter: adapter.map(|a| AdapterId((a % config.adapters.len()) as u32)),
                    received: at - front,
                    prompt_tokens: prompt,
                    max_tokens: output.min(config.max_model_len as u32 - prompt),
                });
                // A quarter is cancelled, at any time from its arrival on.
                if cancel < 100_000 {
                    cancels.push((at + cancel, id));
                }
            }
            cancels.sort();
            Load { config, requests, cancels, changes: Vec::new(), failing: 0, durations, front, gap }
        })
}

/// What came of a run.
#[derive(Debug, Default)]
pub struct Run {
    pub ended: BTreeMap<RequestId, Ended>,
    pub first_token: BTreeMap<RequestId, (Nanos, Parts)>,
    pub started: Vec<RequestId>,
    pub decisions: Vec<(StepPlan, Vec<SwapPlan>)>,
    pub swaps: usize,
    pub fetches: usize,
    pub fetches_failed: usize,
    /// Requests that were not taken: their adapter was not there, or cannot be read.
    pub refused: BTreeSet<RequestId>,
    pub removed: BTreeSet<AdapterId>,
    pub gone: BTreeSet<AdapterId>,
    pub pinned: usize,
    pub prefetched: usize,
    pub preempted: usize,
    pub chunks: usize,
    pub kv_used_at_end: usize,
    pub pins_at_end: u32,
}

/// What an executor knows of a running sequence.
#[derive(Debug)]
struct Sequence {
    computed: u32,
    blocks: usize,
}

pub struct Driver<'a> {
    load: &'a Load,
    scheduler: Scheduler,
    now: Nanos,
    plan: StepPlan,
    out: Outbox,
    /// When the step ends; none while it waits for its swaps.
    step_end: Option<Nanos>,
    step_waits: bool,
    swaps: BTreeMap<SlotId, Nanos>,
    fetches: BTreeMap<AdapterId, Nanos>,
    sequences: BTreeMap<RequestId, Sequence>,
    generated: BTreeMap<RequestId, u32>,
    /// Requests that a demand load was started for may pass an aged one.
    may_pass: BTreeSet<AdapterId>,
    /// Pinned while running.
    run_pinned: BTreeSet<AdapterId>,
    drawn: usize,
    age_bound: bool,
    run: Run,
}

impl<'a> Driver<'a> {
    pub fn new(load: &'a Load) -> Self {
        Self {
            load,
            scheduler: Scheduler::new(load.config.clone()).unwrap(),
            now: 0,
            plan: StepPlan::default(),
            out: Outbox::default(),
            step_end: None,
            step_waits: false,
            swaps: BTreeMap::new(),
            fetches: BTreeMap::new(),
            sequences: BTreeMap::new(),
            generated: BTreeMap::new(),
            may_pass: BTreeSet::new(),
            run_pinned: BTreeSet::new(),
            drawn: 0,
            age_bound: false,
            run: Run::default(),
        }
    }

    pub fn checking_age_bound(mut self) -> Self {
        self.age_bound = true;
        self
    }

    fn duration(&mut self) -> Nanos {
        self.drawn += 1;
        self.load.durations[self.drawn % self.load.durations.len()]
    }

    pub fn run(mut self) -> Result<Run, TestCaseError> {
        let (mut arrivals, mut cancels) =
            (self.load.requests.iter().peekable(), self.load.cancels.iter().peekable());
        let mut changes = self.load.changes.iter().peekable();
        loop {
            let arrival = arrivals.peek().map(|a| a.received + self.load.front);
            let cancel = cancels.peek().map(|c| c.0);
            let swap = self.swaps.iter().map(|(&slot, &end)| (end, slot)).min();
            let fetch = self.fetches.iter().map(|(&adapter, &end)| (end, adapter)).min();
            let change = changes.peek().map(|c| c.0);
            let next = [arrival, cancel, swap.map(|s| s.0), self.step_end, fetch.map(|f| f.0), change];
            let next = next.into_iter().flatten().min();
            let Some(next) = next else { break };
            self.now = self.now.max(next);
            let before: Vec<_> = self.scheduler.slots().collect();
            if arrival == Some(next) {
                let arrival = *arrivals.next().unwrap();
                self.handle(Event::Arrive(arrival), &before)?;
            } else if self.step_end == Some(next) {
                self.step_done(&before)?;
            } else if let Some((_, slot)) = swap.filter(|s| s.0 == next) {
                self.swaps.remove(&slot);
                self.handle(Event::SwapDone(slot), &before)?;
            } else if let Some((_, adapter)) = fetch.filter(|f| f.0 == next) {
                self.fetches.remove(&adapter);
                let failing = self.load.failing;
                let failed = failing > 0 && self.run.fetches.is_multiple_of(failing);
                self.run.fetches_failed += usize::from(failed);
                self.handle(Event::FetchDone { adapter, failed }, &before)?;
            } else if change == Some(next) {
                self.change(changes.next().unwrap().1, &before)?;
            } else {
                let (_, id) = *cancels.next().unwrap();
                self.handle(Event::Cancel(id), &before)?;
            }
            self.submit_waiting_step();
            if !self.scheduler.step_in_flight() {
                self.form_step()?;
            }
        }
        prop_assert!(self.scheduler.is_idle(), "requests are left with nothing under way");
        for (id, spec) in self.scheduler.adapters() {
            let state = self.scheduler.host_state(id);
            prop_assert!(
                !spec.pinned || !self.run_pinned.contains(&id) || self.scheduler.slot_of(id).is_some(),
                "{id} is pinned and {state:?}"
            );
        }
        self.run.kv_used_at_end = self.scheduler.kv_used();
        self.run.pins_at_end = self.scheduler.slots().map(|s| s.pins).sum();
        Ok(self.run)
    }

    fn handle(&mut self, event: Event<'_>, before: &[lora_sched::SlotView]) -> Result<(), TestCaseError> {
        self.out.clear();
        let taken = self.scheduler.handle(self.now, event, &mut self.out);
        if let (Event::Arrive(arrival), Err(EventError::UnknownAdapter(_) | EventError::AdapterFailed(_))) =
            (event, &taken)
        {
            prop_assert!(!self.load.changes.is_empty(), "{event:?}: {taken:?}");
            self.run.refused.insert(arrival.id);
        } else {
            taken.map_err(|e| TestCaseError::fail(format!("{event:?}: {e}")))?;
        }
        let landed = if let Event::SwapDone(slot) = event { Some(slot) } else { None };
        self.take_out(before, landed)
    }

    fn take_out(
        &mut self,
        before: &[lora_sched::SlotView],
        landed: Option<SlotId>,
    ) -> Result<(), TestCaseError> {
        self.scheduler.audit().map_err(TestCaseError::fail)?;
        for i in 0..self.out.notices.len() {
            match self.out.notices[i] {
                Notice::FirstToken { id, parts } => {
                    prop_assert!(self.run.first_token.insert(id, (self.now, parts)).is_none());
                }
                Notice::Ended { id, why, .. } => {
                    prop_assert!(self.run.ended.insert(id, why).is_none(), "{id} ended twice");
                    self.sequences.remove(&id);
                }
                Notice::Preempted { id, .. } => {
                    self.run.preempted += 1;
                    prop_assert!(self.sequences.remove(&id).is_some());
                }
                Notice::AdapterGone(adapter) => {
                    prop_assert!(self.run.removed.contains(&adapter), "{adapter} went unasked");
                    prop_assert!(self.run.gone.insert(adapter), "{adapter} went twice");
                    prop_assert_eq!(self.scheduler.slot_of(adapter), None);
                    prop_assert!(!self.fetches.contains_key(&adapter), "{adapter} is still being read");
                }
            }
        }
        for i in 0..self.out.swaps.len() {
            let swap = self.out.swaps[i];
            let slot = &before[swap.slot.0 as usize];
            self.run.swaps += 1;
            let there = self.scheduler.host_state(swap.adapter);
            prop_assert_eq!(there, Some(HostState::Host), "{:?}", swap);
            self.run.prefetched += usize::from(swap.kind == SwapKind::Prefetch);
            prop_assert_eq!(slot.state.adapter(), swap.evicted.or(slot.state.adapter()), "{:?}", swap);
            let loading = matches!(slot.state, SlotState::Loading(_)) && landed != Some(swap.slot);
            prop_assert!(!loading, "{swap:?} overwrites a load");
            // A request that ended in this very event may have held it until now.
            let in_step = self.scheduler.step_in_flight()
                && self.plan.seqs.iter().any(|s| s.adapter.is_some_and(|a| a.1 == swap.slot))
                && !self.plan.loading.contains(&swap.slot);
            prop_assert!(!in_step, "{swap:?} writes a slot that the step reads");
            let kept = self.scheduler.adapters().any(|(id, spec)| Some(id) == swap.evicted && spec.pinned);
            prop_assert!(!kept, "{swap:?} evicts an adapter that the user pinned");
            let end = self.now + self.duration();
            prop_assert!(self.swaps.insert(swap.slot, end).is_none());
            self.may_pass.insert(swap.adapter);
        }
        for i in 0..self.out.fetches.len() {
            self.start_fetch(self.out.fetches[i])?;
        }
        Ok(())
    }

    /// A place in host memory is not taken from a copy under way.
    fn start_fetch(&mut self, fetch: FetchPlan) -> Result<(), TestCaseError> {
        self.run.fetches += 1;
        let limit = self.load.config.host_loras.unwrap_or(0);
        prop_assert!(
            self.scheduler.host_used() <= Some(limit),
            "{fetch:?}: more than {limit} in host memory"
        );
        if let Some(evicted) = fetch.evicted {
            let slot = self.scheduler.slot_of(evicted);
            let copied = slot.is_some_and(|s| self.swaps.contains_key(&s));
            prop_assert!(!copied, "{fetch:?} takes what is being copied");
            prop_assert!(!self.fetches.contains_key(&evicted), "{fetch:?} takes what is being read");
        }
        let end = self.now + self.duration();
        prop_assert!(self.fetches.insert(fetch.adapter, end).is_none(), "{fetch:?} is read twice");
        Ok(())
    }

    fn change(&mut self, change: Change, before: &[lora_sched::SlotView]) -> Result<(), TestCaseError> {
        let event = match change {
            Change::Add => Event::AddAdapter(ADDED),
            Change::Remove(adapter) => Event::RemoveAdapter(AdapterId(adapter)),
            Change::Pin(adapter, pinned) => Event::PinAdapter(AdapterId(adapter), pinned),
        };
        self.out.clear();
        // A trial, since what is refused must change nothing.
        let mut trial = self.scheduler.clone();
        if trial.handle(self.now, event, &mut Outbox::default()).is_err() {
            let slots: Vec<_> = trial.slots().collect();
            prop_assert_eq!(&slots[..], before, "a refused {:?} changes slots", event);
            return Ok(());
        }
        match change {
            Change::Add => {}
            Change::Remove(adapter) => {
                self.run.removed.insert(AdapterId(adapter));
                self.run_pinned.remove(&AdapterId(adapter));
            }
            Change::Pin(adapter, true) => {
                self.run.pinned += 1;
                self.run_pinned.insert(AdapterId(adapter));
            }
            Change::Pin(adapter, false) => _ = self.run_pinned.remove(&AdapterId(adapter)),
        }
        self.handle(event, before)
    }

    fn form_step(&mut self) -> Result<(), TestCaseError> {
        self.out.clear();
        let before: Vec<_> = self.scheduler.slots().collect();
        let aged = if self.age_bound { self.scheduler.aged() } else { None };
        let mut plan = std::mem::take(&mut self.plan);
        // Now and then: a copy of everything costs more than a plan.
        let mut twin = self.run.decisions.len().is_multiple_of(16).then(|| self.scheduler.clone());
        let formed = self.scheduler.plan(self.now, &mut plan, &mut self.out);
        self.plan = plan;
        if let Some(twin) = &mut twin {
            self.check_outline(twin, formed)?;
        }
        for swap in &self.out.swaps {
            prop_assert_eq!(before[swap.slot.0 as usize].pins, 0, "{:?} evicts a pinned adapter", swap);
        }
        // Preemption at the start of a plan can free the slot of an aged request, so ask again after it.
        let aged = aged.filter(|_| self.scheduler.aged() == aged);
        self.take_out(&before, None)?;
        if !formed {
            prop_assert!(self.plan.seqs.is_empty());
            prop_assert!(
                self.scheduler.waiting() == 0 || !self.swaps.is_empty() || !self.fetches.is_empty(),
                "requests wait for nothing"
            );
            return Ok(());
        }
        self.check_plan(aged)?;
        self.run.decisions.push((self.plan.clone(), self.out.swaps.clone()));
        self.step_waits = true;
        self.submit_waiting_step();
        Ok(())
    }

    /// An outline sums up what it does not name and names the rest alike; and the scheduler, of which `twin` is a copy
    /// from before the plan, is left as by the plan with names.
    fn check_outline(&self, twin: &mut Scheduler, formed: bool) -> Result<(), TestCaseError> {
        let (mut outline, mut out) = (StepPlan::outlined(), Outbox::default());
        prop_assert_eq!(twin.plan(self.now, &mut outline, &mut out), formed);
        prop_assert_eq!(format!("{twin:?} {out:?}"), format!("{:?} {:?}", self.scheduler, self.out));
        if !formed {
            return Ok(());
        }
        let (decodes, prompts): (Vec<_>, Vec<_>) = self.plan.seqs.iter().partition(|s| s.decode);
        // Of those that come later, too.
        let rank = |a: AdapterId| {
            u64::from(self.load.config.adapters.get(a.0 as usize).map_or(ADDED.rank, |spec| spec.rank))
        };
        let with_adapter = || decodes.iter().filter_map(|s| s.adapter.map(|a| a.0));
        let distinct: BTreeSet<_> = self.plan.seqs.iter().filter_map(|s| s.adapter.map(|a| a.0)).collect();
        let expected = Outline {
            decodes: decodes.len() as u64,
            decode_context: decodes.iter().map(|s| u64::from(s.start) + 1).sum(),
            lora_decodes: with_adapter().count() as u64,
            lora_decode_ranks: with_adapter().map(rank).sum(),
            adapters: distinct.len() as u64,
            adapter_ranks: distinct.iter().map(|a| rank(*a)).sum(),
        };
        prop_assert_eq!(outline.outline, Some(expected));
        let unplaced = |s: &SeqStep| SeqStep { new_blocks: 0..0, ..s.clone() };
        prop_assert_eq!(
            outline.seqs.iter().map(unplaced).collect::<Vec<_>>(),
            prompts.into_iter().map(unplaced).collect::<Vec<_>>()
        );
        prop_assert_eq!(
            (&outline.loading, outline.wait_for_swaps),
            (&self.plan.loading, self.plan.wait_for_swaps)
        );
        prop_assert_eq!(outline.tokens(), self.plan.tokens());
        Ok(())
    }

    fn submit_waiting_step(&mut self) {
        let held_up =
            self.plan.wait_for_swaps && self.plan.loading.iter().any(|s| self.swaps.contains_key(s));
        if self.step_waits && !held_up {
            self.step_waits = false;
            self.step_end = Some(self.now + self.duration() + self.load.gap);
        }
    }

    fn check_plan(&mut self, aged: Option<RequestId>) -> Result<(), TestCaseError> {
        let config = &self.load.config;
        prop_assert!(self.plan.tokens() <= config.max_num_batched_tokens);
        prop_assert!(self.plan.seqs.len() <= config.max_num_seqs);
        prop_assert!(config.swap_mode != SwapMode::Overlap || self.plan.loading.is_empty());
        let ids: BTreeSet<_> = self.plan.seqs.iter().map(|s| s.id).collect();
        prop_assert_eq!(ids.len(), self.plan.seqs.len(), "a sequence is twice in the step");
        for seq in &self.plan.seqs {
            let request = self.load.requests.iter().find(|r| r.id == seq.id).unwrap();
            let known = request.prompt_tokens + self.generated.get(&seq.id).copied().unwrap_or(0);
            let new = self.plan.new_blocks(seq).len();
            prop_assert!(seq.len > 0);
            if seq.start == 0 {
                prop_assert!(!self.sequences.contains_key(&seq.id), "{} starts twice", seq.id);
                self.sequences.insert(seq.id, Sequence { computed: 0, blocks: 0 });
                if !self.run.started.contains(&seq.id) {
                    self.run.started.push(seq.id);
                }
                let needs_slot = request.adapter.is_some_and(|a| !self.may_pass.contains(&a));
                if let Some(aged) = aged.filter(|_| needs_slot) {
                    prop_assert!(seq.id <= aged, "{} went past the aged {aged}", seq.id);
                }
            }
            let state = self.sequences.get_mut(&seq.id).unwrap();
            prop_assert_eq!(state.computed, seq.start, "tokens are skipped or computed twice");
            state.blocks += new;
            state.computed += seq.len;
            prop_assert!(state.blocks * config.block_size >= state.computed as usize, "too few blocks");
            prop_assert!(state.computed <= known);
            prop_assert_eq!(seq.samples, state.computed == known);
            prop_assert!(!seq.decode || (seq.len == 1 && seq.samples));
            prop_assert_eq!(seq.adapter.map(|a| a.0), request.adapter);
            self.run.chunks += usize::from(!seq.samples);
            if config.chunked_prefill || seq.decode {
                continue;
            }
            prop_assert!(seq.samples, "a prompt is cut though chunking is off");
        }
        Ok(())
    }

    fn step_done(&mut self, before: &[lora_sched::SlotView]) -> Result<(), TestCaseError> {
        self.step_end = None;
        for seq in self.plan.seqs.iter().filter(|s| s.samples) {
            *self.generated.entry(seq.id).or_default() += 1;
        }
        // Every seventh sampled token ends its sequence.
        let stops = |(i, s): (usize, &lora_sched::SeqStep)| {
            (s.samples && (s.id.0 + s.start as u64) % 7 == 3).then_some(i as u32)
        };
        let stopped: Vec<u32> = self.plan.seqs.iter().enumerate().filter_map(stops).collect();
        let stall = self.duration() / 2;
        let stalled: Vec<_> = match self.load.config.swap_mode {
            SwapMode::Layered => self.plan.loading.iter().map(|&s| (s, stall)).collect(),
            _ => Vec::new(),
        };
        self.handle(Event::StepDone { stopped: &stopped, stalled: &stalled }, before)
    }
}
