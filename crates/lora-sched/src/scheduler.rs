//! The state machine: events in, decisions out.
//!
//! This file takes events and keeps the books; `admit.rs` forms steps and starts swaps, `done.rs` takes their ends,
//! `adapters.rs` lets adapters come and go.

use crate::config::{Config, ConfigError, SwapMode};
use crate::decodes::Decodes;
use crate::event::{Arrival, Ended, Event, EventError, Notice, Outbox};
use crate::host::{HostPlaces, HostState};
use crate::kv::BlockPool;
use crate::meter::{GateClock, Readiness, Reading};
use crate::parts::Parts;
use crate::queue::{BASE, Queue};
use crate::requests::{NONE, Phase, PinnedSlot, Request, Requests};
use crate::slots::{AdapterUse, SlotState, SlotView, Slots};
use crate::types::{AdapterId, Nanos, PlaceId, RequestId, SlotId};

/// Continuous batching with adapter slots.
///
/// A driver calls [`handle`](Self::handle) for everything that happens and, whenever no step is in
/// flight, [`plan`](Self::plan). The same calls in the same order give the same decisions.
#[derive(Clone, Debug)]
pub struct Scheduler {
    pub(crate) config: Config,
    pub(crate) requests: Requests,
    pub(crate) queue: Queue,
    pub(crate) slots: Slots,
    /// None where host memory holds all adapters.
    pub(crate) host: Option<HostPlaces>,
    pub(crate) kv: BlockPool,
    pub(crate) clock: GateClock,
    /// Running requests in order of admission.
    pub(crate) running: Vec<u32>,
    /// The first of them: those that decode.
    pub(crate) decodes: Decodes,
    /// Places nobody runs in, the lowest last.
    pub(crate) places: Vec<PlaceId>,
    /// Waiting requests for which a demand load pins a slot.
    pub(crate) holders: Vec<u32>,
    /// Adapters that the user has pinned and that have no slot yet, in order of pinning.
    pub(crate) wanted: Vec<u32>,
    /// Arrivals during the step in flight: their meters start with the next plan.
    pub(crate) fresh: Vec<(u32, RequestId)>,
    pub(crate) step: StepInFlight,
    pub(crate) next_step: u64,
}

/// What the scheduler remembers of the submitted plan.
#[derive(Clone, Debug, Default)]
pub(crate) struct StepInFlight {
    pub(crate) active: bool,
    pub(crate) formed: Nanos,
    /// Its sequences behind the decodes.
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) loading: Vec<SlotId>,
    pub(crate) waits: bool,
    /// Whether its plan had to preempt, and so admitted nobody: the next one may.
    pub(crate) preempted: bool,
    /// When the last swap that the step waited for was done.
    pub(crate) swaps_done: Nanos,
}

/// A part of a prompt, or the whole.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunk {
    pub(crate) index: u32,
    pub(crate) len: u32,
    /// Whether it is the last one, after which a token is sampled.
    pub(crate) samples: bool,
}

impl Scheduler {
    /// A scheduler with adapters `0..gpu_loras` resident and nothing waiting.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        config.validate()?;
        let mut scheduler = Self {
            requests: Requests::default(),
            // Only prefetching looks at requests in order of arrival whatever they lack.
            queue: Queue::new(&config.adapters, config.prefetch > 0),
            slots: Slots::new(config.gpu_loras, config.evict),
            host: config.host_loras.map(HostPlaces::new),
            kv: BlockPool::new(config.kv_blocks, config.max_num_seqs),
            clock: GateClock::new(),
            running: Vec::with_capacity(config.max_num_seqs),
            decodes: Decodes::new(config.max_num_seqs),
            places: (0..config.max_num_seqs as u32).rev().map(PlaceId).collect(),
            holders: Vec::new(),
            wanted: Vec::new(),
            fresh: Vec::new(),
            step: StepInFlight::default(),
            next_step: 0,
            config,
        };
        scheduler.fill_host();
        for adapter in 0..scheduler.config.gpu_loras as u32 {
            if let Some((slot, _)) = scheduler.slots.take() {
                scheduler.begin_load(slot, AdapterId(adapter));
                scheduler.end_load(slot);
            }
        }
        Ok(scheduler)
    }

    /// What it was made with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Whether a plan is being executed.
    pub fn step_in_flight(&self) -> bool {
        self.step.active
    }

    /// Waiting requests.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Running requests.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Whether no request is waiting or running.
    pub fn is_idle(&self) -> bool {
        self.requests.len() == 0
    }

    /// Sequence places in use, counted apart from the running requests that should hold them.
    pub fn places_used(&self) -> usize {
        self.config.max_num_seqs - self.places.len()
    }

    /// KV blocks in use.
    pub fn kv_used(&self) -> usize {
        self.kv.total() - self.kv.free()
    }

    /// KV blocks there are.
    pub fn kv_total(&self) -> usize {
        self.kv.total()
    }

    /// The slots, in order.
    pub fn slots(&self) -> impl ExactSizeIterator<Item = SlotView> + '_ {
        self.slots.views(self.step.active)
    }

    /// The slot that an adapter has, or is being copied into.
    pub fn slot_of(&self, adapter: AdapterId) -> Option<SlotId> {
        self.queue.groups().get(adapter.0 as usize + 1).and_then(|g| g.slot)
    }

    /// Waiting requests of an adapter.
    pub fn waiting_for(&self, adapter: AdapterId) -> usize {
        self.queue.groups().get(adapter.0 as usize + 1).map_or(0, |g| g.waiting as usize)
    }

    /// Takes an event. Swaps to start and news are appended to `out`. An event in error changes nothing.
    pub fn handle(&mut self, now: Nanos, event: Event<'_>, out: &mut Outbox) -> Result<(), EventError> {
        self.clock.advance(now);
        match event {
            Event::Arrive(arrival) => self.arrive(arrival)?,
            Event::Cancel(id) => self.cancel(id, out),
            Event::StepDone { stopped, stalled } => self.step_done(stopped, stalled, out)?,
            Event::SwapDone(slot) => self.swap_done(slot, out)?,
            Event::AddAdapter(spec) => self.add_adapter(spec)?,
            Event::RemoveAdapter(adapter) => self.remove_adapter(adapter, out)?,
            Event::PinAdapter(adapter, pinned) => self.pin_adapter(adapter, pinned)?,
            Event::FetchDone { adapter, failed } => self.fetch_done(adapter, failed, out)?,
        }
        if !self.wanted.is_empty() {
            self.start_pinned(out);
        }
        // While a step runs, slots that can be had are used at once; without one the driver plans.
        if self.step.active {
            self.start_swaps(out);
        }
        if self.host.is_some() {
            self.start_fetches(out);
        }
        self.clock.slot_available = self.slots.available();
        Ok(())
    }

    pub(crate) fn now(&self) -> Nanos {
        self.clock.now()
    }

    pub(crate) fn adapter_group(&self, adapter: AdapterId) -> Result<u32, EventError> {
        match self.queue.groups().get(adapter.0 as usize + 1) {
            Some(group) if !group.removed => Ok(adapter.0 + 1),
            _ => Err(EventError::UnknownAdapter(adapter)),
        }
    }

    fn arrive(&mut self, arrival: Arrival) -> Result<(), EventError> {
        let group = match arrival.adapter {
            Some(adapter) => self.adapter_group(adapter)?,
            None => BASE,
        };
        if self.queue.group(group).host == HostState::Failed {
            return Err(EventError::AdapterFailed(AdapterId(group - 1)));
        }
        if arrival.prompt_tokens == 0 || arrival.max_tokens == 0 {
            return Err(EventError::Empty(arrival.id));
        }
        let tokens = arrival.prompt_tokens as usize + arrival.max_tokens as usize;
        if tokens > self.config.max_model_len {
            return Err(EventError::TooLong { tokens, max_model_len: self.config.max_model_len });
        }
        if self.queue.len() >= self.config.max_queue {
            return Err(EventError::QueueFull { max_queue: self.config.max_queue });
        }
        if arrival.id.0 < self.requests.next_id() {
            return Err(EventError::IdOrder { id: arrival.id, at_least: RequestId(self.requests.next_id()) });
        }

        let now = self.now();
        let reading =
            if self.step.active { Reading::default() } else { self.queue.read_meter(group, &self.clock) };
        let index = self.requests.insert(Request {
            id: arrival.id,
            group,
            prompt: arrival.prompt_tokens,
            max_tokens: arrival.max_tokens,
            generated: 0,
            computed: 0,
            fed: 0,
            phase: Phase::Waiting,
            capacity: 0,
            slot: PinnedSlot::new(None),
            arrived: now,
            holds_slot: false,
            parts: Parts { front: now.saturating_sub(arrival.received), ..Parts::default() },
            since: now,
            reading,
            prev_in_group: NONE,
            next_in_group: NONE,
            next_id_in_group: RequestId(0),
            prev: NONE,
            next: NONE,
        });
        if self.step.active {
            self.fresh.push((index, arrival.id));
        }
        let g = self.queue.group_mut(group);
        g.uses += 1;
        g.live += 1;
        self.enqueue(index);
        Ok(())
    }

    fn cancel(&mut self, id: RequestId, out: &mut Outbox) {
        let Some(index) = self.requests.find(id) else { return };
        match &mut self.requests[index].phase {
            Phase::Prefilling { in_step: true, cancelled, .. } => *cancelled = true,
            Phase::Decoding { cancelled, .. } if self.step.active => {
                *cancelled = true;
                self.decodes.cancelled = true;
            }
            Phase::Prefilling { .. } | Phase::Decoding { .. } => self.end(index, Ended::Cancelled, out),
            Phase::Waiting => {
                self.dequeue(index);
                if self.requests[index].holds_slot {
                    self.drop_hold(index);
                    self.unpin(self.requests[index].group);
                }
                let group = self.requests[index].group;
                self.requests.remove(index);
                self.queue.group_mut(group).live -= 1;
                out.notices.push(Notice::Ended { id, place: None, why: Ended::Cancelled });
                self.retire_if_drained(group, out);
            }
        }
    }

    fn swap_done(&mut self, slot: SlotId, out: &mut Outbox) -> Result<(), EventError> {
        let Some(SlotState::Loading(adapter)) = self.slots.state(slot) else {
            return Err(EventError::NotLoading(slot));
        };
        self.end_load(slot);
        if self.step.active && self.step.loading.contains(&slot) {
            self.step.swaps_done = self.now();
        }
        self.retire_if_drained(adapter.0 + 1, out);
        Ok(())
    }

    pub(crate) fn pin(&mut self, group: u32) {
        if let Some(slot) = self.queue.group(group).slot {
            self.slots.pin(slot);
        }
    }

    pub(crate) fn unpin(&mut self, group: u32) {
        if let Some(slot) = self.queue.group(group).slot {
            self.slots.unpin(slot);
        }
    }

    /// The demand load's pin is the request's no more (it has started, or gone).
    pub(crate) fn drop_hold(&mut self, index: u32) {
        self.requests[index].holds_slot = false;
        self.holders.retain(|&h| h != index);
    }

    pub(crate) fn enqueue(&mut self, index: u32) {
        self.queue.push(index, &mut self.requests);
        self.tell_slot(self.requests[index].group);
    }

    pub(crate) fn dequeue(&mut self, index: u32) {
        self.queue.remove(index, &mut self.requests);
        self.tell_slot(self.requests[index].group);
    }

    /// Eviction rules look at an adapter's use and demand.
    fn tell_slot(&mut self, group: u32) {
        self.settle_host(group);
        let g = self.queue.group(group);
        if let Some(slot) = g.slot {
            self.slots.set_usage(slot, g.uses, u64::from(g.waiting));
        }
    }

    pub(crate) fn begin_load(&mut self, slot: SlotId, adapter: AdapterId) {
        let group = adapter.0 + 1;
        let g = self.queue.group_mut(group);
        g.slot = Some(slot);
        let usage = AdapterUse {
            uses: g.uses,
            pending: u64::from(g.waiting),
            bytes: g.spec.bytes,
            user_pinned: g.spec.pinned,
        };
        self.slots.begin_load(slot, adapter, usage);
        let readiness = match self.config.swap_mode {
            SwapMode::Overlap => Readiness::Loading,
            // The request can be in a step at once; the step does the waiting.
            SwapMode::Blocking | SwapMode::Layered => Readiness::Ready,
        };
        self.queue.set_readiness(group, readiness, &self.clock);
        self.wanted.retain(|&w| w != group);
        self.settle_host(group);
    }

    fn end_load(&mut self, slot: SlotId) {
        let adapter = self.slots.state(slot).and_then(SlotState::adapter);
        self.slots.end_load(slot);
        if let Some(adapter) = adapter {
            self.queue.set_readiness(adapter.0 + 1, Readiness::Ready, &self.clock);
            self.settle_host(adapter.0 + 1);
        }
    }

    /// An adapter has lost its slot.
    pub(crate) fn unload(&mut self, adapter: AdapterId) {
        let group = adapter.0 + 1;
        self.queue.group_mut(group).slot = None;
        self.set_readiness_without_slot(group);
        self.settle_host(group);
    }
}
