//! Forming a step: who runs, who is admitted, which swaps start.

use std::ops::Range;

use crate::config::SwapMode;
use crate::event::{Notice, Outbox};
use crate::meter::{Gate, Readiness};
use crate::plan::{SeqStep, StepPlan, SwapKind, SwapPlan};
use crate::policy::{AdmissionPolicy, NeedsSlot, Pick, QueueView};
use crate::queue::BASE;
use crate::requests::{NONE, Phase, PinnedSlot};
use crate::scheduler::{Chunk, Scheduler};
use crate::types::{AdapterId, Nanos, RequestId, SlotId};

impl Scheduler {
    /// Forms the next step into `plan`, if there is anything to compute. True: the driver submits it
    /// (after the swaps in [`StepPlan::loading`] where [`StepPlan::wait_for_swaps`] says so) and
    /// later tells [`Event::StepDone`](crate::Event::StepDone). False: nothing can run now; plan
    /// again after the next event.
    ///
    /// Swaps to start are appended to `out`; the driver starts them before the step.
    ///
    /// With a step in flight nothing is planned and the answer is false.
    pub fn plan(&mut self, now: Nanos, plan: &mut StepPlan, out: &mut Outbox) -> bool {
        if self.step.active {
            return false;
        }
        self.clock.advance(now);
        self.start_meters();
        plan.clear();
        plan.step = self.next_step;
        plan.formed = self.now();

        let mut budget = self.config.max_num_batched_tokens;
        let preempted = self.run_decodes(&mut budget, plan, out);
        if self.decodes.len() < self.running.len() {
            self.run_prefills(&mut budget, plan);
        }
        self.clock.gate = if preempted { Gate::Kv } else { self.admit(&mut budget, plan, out) };
        self.start_swaps(out);
        if self.host.is_some() {
            self.start_fetches(out);
        }
        self.clock.slot_available = self.slots.available();

        if self.decodes.len() + self.step.chunks.len() == 0 {
            return false;
        }
        if let Some(outline) = &mut plan.outline {
            self.decodes.outline(outline);
            let read = self.slots.read();
            (outline.adapters, outline.adapter_ranks) = (read.slots, read.ranks);
        }
        self.next_step += 1;
        self.step.active = true;
        self.step.formed = plan.formed;
        self.step.preempted = preempted;
        self.step.swaps_done = plan.formed;
        self.step.waits = plan.wait_for_swaps;
        self.step.loading.extend_from_slice(&plan.loading);
        true
    }

    /// Arrivals during the last step waited for its end and begin to be metered.
    fn start_meters(&mut self) {
        let now = self.now();
        while let Some((index, id)) = self.fresh.pop() {
            if self.requests.find(id) != Some(index) {
                continue;
            }
            let reading = self.queue.read_meter(self.requests[index].group, &self.clock);
            let request = &mut self.requests[index];
            request.parts.queue += now.saturating_sub(request.since);
            request.reading = reading;
        }
    }

    /// One token for each running request that is past its prompt, oldest admission first. When
    /// blocks run out, the latest admitted loses its own. True if anybody did.
    fn run_decodes(&mut self, budget: &mut usize, plan: &mut StepPlan, out: &mut Outbox) -> bool {
        let named = plan.outline.is_none();
        let mut preempted = false;
        if named || self.decodes.any_full() {
            let mut i = 0;
            while i < self.decodes.len() {
                let full = self.decodes.until_full_of(i) == 0;
                if full && self.kv.free() == 0 {
                    preempted = true;
                    // Admission order: the last is the latest. It may be this one.
                    if let Some(&victim) = self.running.last() {
                        self.preempt(victim, out);
                    }
                    continue;
                }
                let from = plan.blocks.len() as u32;
                let given = if full { self.give_block(i) } else { None };
                if named {
                    plan.blocks.extend(given);
                    let blocks = from..plan.blocks.len() as u32;
                    plan.seqs.push(self.next_token(i, blocks));
                }
                i += 1;
            }
            self.decodes.find_full();
        }
        if self.slots.any_loading() {
            self.wait_for_decodes(plan);
        }
        *budget -= self.decodes.len();
        preempted
    }

    /// A block for the `i`-th decode's next token; there is one.
    pub(crate) fn give_block(&mut self, i: usize) -> Option<u32> {
        let decode = self.decodes.at(i);
        self.requests[decode.index].add_blocks(1, self.config.block_size);
        self.decodes.grow(i, self.config.block_size);
        self.kv.grow(decode.place)
    }

    /// The `i`-th decode's share of the step.
    fn next_token(&self, i: usize, new_blocks: Range<u32>) -> SeqStep {
        let decode = self.decodes.at(i);
        let request = &self.requests[decode.index];
        SeqStep {
            id: request.id,
            place: decode.place,
            adapter: decode.slot.get().map(|slot| (AdapterId(request.group - 1), slot)),
            start: request.computed + self.decodes.steps_of(&decode),
            len: 1,
            decode: true,
            samples: true,
            new_blocks,
        }
    }

    /// A driver may end a step before the copies that it read have ended: the next one reads them still.
    fn wait_for_decodes(&mut self, plan: &mut StepPlan) {
        for i in 0..self.decodes.len() {
            if let Some(slot) = self.decodes.at(i).slot.get()
                && self.slots.is_loading(slot)
            {
                self.read_slot(slot, 0, plan);
            }
        }
    }

    /// The next chunks of prompts that are under way, oldest admission first.
    fn run_prefills(&mut self, budget: &mut usize, plan: &mut StepPlan) {
        for i in self.decodes.len()..self.running.len() {
            let index = self.running[i];
            let request = &self.requests[index];
            let rest = request.fed.saturating_sub(request.computed) as usize;
            let len = rest.min(*budget);
            if len > 0 {
                self.put_in_step(index, len, 0, plan);
                *budget -= len;
            }
        }
    }

    /// Admits waiting requests until something runs out, and says what.
    fn admit(&mut self, budget: &mut usize, plan: &mut StepPlan, out: &mut Outbox) -> Gate {
        loop {
            if self.running.len() == self.config.max_num_seqs || *budget == 0 {
                return Gate::Queue;
            }
            if self.queue.len() == 0 {
                return Gate::Open;
            }
            let view = self.view();
            let (index, load) = match self.config.policy.pick(&view) {
                Pick::Ready => (self.oldest(Readiness::Ready), false),
                Pick::Base => (self.queue.group(BASE).head(), false),
                Pick::Load => (self.oldest(Readiness::NeedsSlot), true),
                // Who has a slot takes none from anybody: were holders to wait behind a request
                // that lacks one, each would wait for the other.
                Pick::Stop => (self.landed_holder(), false),
            };
            let Some(index) = index else { return Gate::Open };
            let request = &self.requests[index];
            let known = request.known() as usize;
            let group = request.group;
            if self.config.blocks_for(known) > self.kv.free() {
                return Gate::Kv;
            }
            if !self.config.chunked_prefill && known > *budget {
                return Gate::Queue;
            }
            if load {
                if !self.load_for(index, out) {
                    return Gate::Open;
                }
                if self.queue.group(group).readiness == Readiness::Loading {
                    continue;
                }
            }
            self.start_running(index);
            let len = known.min(*budget);
            self.put_in_step(index, len, self.config.blocks_for(known), plan);
            *budget -= len;
        }
    }

    fn oldest(&self, readiness: Readiness) -> Option<u32> {
        let (_, group) = self.queue.oldest(readiness)?;
        self.queue.group(group).head()
    }

    fn landed_holder(&self) -> Option<u32> {
        let landed = |&h: &u32| self.queue.group(self.requests[h].group).readiness == Readiness::Ready;
        self.holders.iter().copied().filter(landed).min_by_key(|&h| self.requests[h].id)
    }

    fn view(&self) -> QueueView {
        let id = |readiness| self.queue.oldest(readiness).map(|(id, _)| id);
        QueueView {
            ready: id(Readiness::Ready),
            base: self.queue.group(BASE).head().map(|index| self.requests[index].id),
            needs_slot: self.oldest(Readiness::NeedsSlot).map(|index| {
                let request = &self.requests[index];
                NeedsSlot {
                    id: request.id,
                    blocked: !self.slots.available() || !self.may_hold_another(),
                    aged: self.now().saturating_sub(request.arrived) > self.config.max_skip_age,
                }
            }),
            loading: id(Readiness::Loading).into_iter().chain(id(Readiness::OnDisk)).min(),
        }
    }

    /// A load pins a slot for a request that could start: there must be a place for it to come. In
    /// the modes in which it starts at once, admission itself has seen to that.
    fn may_hold_another(&self) -> bool {
        self.config.swap_mode != SwapMode::Overlap
            || self.running.len() + self.holders.len() < self.config.max_num_seqs
    }

    /// Starts a demand load of the request's adapter. In `overlap` mode the load pins the slot until
    /// the request starts. False if no slot can be had.
    fn load_for(&mut self, index: u32, out: &mut Outbox) -> bool {
        let group = self.requests[index].group;
        let Some(taken) = self.slots.take() else { return false };
        self.load(taken, group, SwapKind::Demand, out);
        if self.config.swap_mode == SwapMode::Overlap {
            self.hold(index);
        }
        true
    }

    fn hold(&mut self, index: u32) {
        self.requests[index].holds_slot = true;
        self.holders.push(index);
        self.pin(self.requests[index].group);
    }

    pub(crate) fn load(
        &mut self,
        (slot, evicted): (SlotId, Option<AdapterId>),
        group: u32,
        kind: SwapKind,
        out: &mut Outbox,
    ) {
        if let Some(evicted) = evicted {
            self.unload(evicted);
        }
        let adapter = AdapterId(group - 1);
        self.begin_load(slot, adapter);
        let bytes = self.queue.group(group).spec.bytes;
        out.swaps.push(SwapPlan { adapter, slot, evicted, bytes, kind });
    }

    /// Starts swaps that need not wait for a plan: for requests that could be in the next step if
    /// their adapters were there, then prefetches.
    pub(crate) fn start_swaps(&mut self, out: &mut Outbox) {
        if self.config.swap_mode == SwapMode::Blocking || self.queue.len() == 0 {
            return;
        }
        while self.clock.gate != Gate::Kv
            && self.slots.available()
            && let Some(index) = self.oldest(Readiness::NeedsSlot)
            && self.places_ahead() > 0
        {
            if self.config.blocks_for(self.requests[index].known() as usize) > self.kv.free() {
                break;
            }
            let group = self.requests[index].group;
            let Some(taken) = self.slots.take() else { break };
            self.load(taken, group, SwapKind::Demand, out);
            self.hold(index);
        }
        if self.config.prefetch > 0 {
            self.prefetch(out);
        }
    }

    /// Places left when everybody has started who lacks at most the end of a copy.
    fn places_ahead(&self) -> usize {
        let loading = |&&h: &&u32| self.queue.group(self.requests[h].group).readiness == Readiness::Loading;
        let ahead = self.running.len() + self.queue.ready_len() + self.holders.iter().filter(loading).count();
        self.config.max_num_seqs.saturating_sub(ahead)
    }

    fn prefetch(&mut self, out: &mut Outbox) {
        let mut next = self.queue.head();
        for _ in 0..self.config.prefetch {
            let Some(index) = next else { return };
            let group = self.requests[index].group;
            if self.queue.group(group).readiness == Readiness::NeedsSlot {
                let Some(taken) = self.slots.take_for_prefetch() else { return };
                self.load(taken, group, SwapKind::Prefetch, out);
            }
            next = Some(self.requests[index].next).filter(|&n| n != NONE);
        }
    }

    /// Moves a waiting request to a place; its adapter is pinned from now on.
    fn start_running(&mut self, index: u32) {
        let Some(place) = self.places.pop() else {
            debug_assert!(false, "admission checked that a place is free");
            return;
        };
        self.dequeue(index);
        let group = self.requests[index].group;
        if self.requests[index].holds_slot {
            self.drop_hold(index);
        } else {
            self.pin(group);
        }
        let reading = self.queue.read_meter(group, &self.clock);
        let slot = self.queue.group(group).slot;
        let now = self.now();
        let request = &mut self.requests[index];
        request.slot = PinnedSlot::new(slot);
        request.capacity = 0;
        if request.before_first_token() {
            reading.add_since(&request.reading, &mut request.parts);
        }
        request.since = now;
        request.computed = 0;
        request.fed = request.known();
        request.phase = Phase::Prefilling { place, in_step: false, cancelled: false };
        self.running.push(index);
    }

    /// Takes a running request's place, blocks and pin; it waits again where its id puts it.
    fn preempt(&mut self, index: u32, out: &mut Outbox) {
        let now = self.now();
        let Some(place) = self.stop_running(index) else { return };
        let group = self.requests[index].group;
        self.unpin(group);
        let reading = self.queue.read_meter(group, &self.clock);
        let request = &mut self.requests[index];
        if request.before_first_token() {
            request.parts.queue += now.saturating_sub(request.since);
        }
        request.reading = reading;
        request.phase = Phase::Waiting;
        request.computed = 0;
        out.notices.push(Notice::Preempted { id: request.id, place });
        self.enqueue(index);
    }

    /// Adds `len` tokens of a running request's prompt to the step, with `blocks` new blocks for it.
    fn put_in_step(&mut self, index: u32, len: usize, blocks: usize, plan: &mut StepPlan) {
        let now = self.now();
        let request = &mut self.requests[index];
        let slot = request.slot.get();
        if request.before_first_token() {
            request.parts.queue += now.saturating_sub(request.since);
            request.since = now;
        }
        let Phase::Prefilling { place, in_step, .. } = &mut request.phase else { return };
        let place = *place;
        *in_step = true;
        let from = plan.blocks.len() as u32;
        if blocks > 0 {
            request.add_blocks(blocks, self.config.block_size);
            let given = self.kv.allocate(place, blocks);
            if plan.outline.is_none() {
                plan.blocks.extend_from_slice(given);
            }
        }
        let group = request.group;
        let adapter = slot.map(|slot| (AdapterId(group - 1), slot));
        let samples = request.computed + len as u32 == request.known();
        plan.seqs.push(SeqStep {
            id: request.id,
            place,
            adapter,
            start: request.computed,
            len: len as u32,
            decode: false,
            samples,
            new_blocks: from..plan.blocks.len() as u32,
        });
        self.step.chunks.push(Chunk { index, len: len as u32, samples });
        if let Some(slot) = slot {
            self.read_slot(slot, self.queue.group(group).spec.rank, plan);
        }
    }

    /// The step reads this slot, which may still be loading; it holds an adapter of `rank`.
    #[inline]
    fn read_slot(&mut self, slot: SlotId, rank: u32, plan: &mut StepPlan) {
        if self.slots.read_in_step(slot, rank) && self.slots.is_loading(slot) {
            plan.loading.push(slot);
            plan.wait_for_swaps = self.config.swap_mode == SwapMode::Blocking;
        }
    }

    /// The oldest waiting request that lacks a slot, if it has waited longer than the age bound.
    pub fn aged(&self) -> Option<RequestId> {
        self.view().needs_slot.filter(|n| n.aged).map(|n| n.id)
    }
}
