//! Adapter slots: four states, pins, and who is evicted.

use crate::config::Evict;
use crate::evict::{EvictionRule, Rule, SlotUse};
use crate::heap::IndexedHeap;
use crate::types::{AdapterId, SlotId};

/// A slot's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// Holds nothing.
    Free,
    /// A copy into it is under way.
    Loading(AdapterId),
    /// Holds an adapter.
    Resident(AdapterId),
    /// Its adapter has been removed and the step in flight still reads it.
    Retiring(AdapterId),
}

impl SlotState {
    /// The adapter that the slot holds or is getting.
    pub fn adapter(self) -> Option<AdapterId> {
        match self {
            Self::Free => None,
            Self::Loading(a) | Self::Resident(a) | Self::Retiring(a) => Some(a),
        }
    }
}

/// One slot, as others see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotView {
    /// Its state.
    pub state: SlotState,
    /// Running requests, and requests that asked for the load, that hold it.
    pub pins: u32,
    /// Whether the step in flight reads it.
    pub in_step: bool,
    /// Whether the user has pinned its adapter.
    pub user_pinned: bool,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    /// With `in_step` where a prompt's part of the step in flight reads it.
    view: SlotView,
    usage: SlotUse,
    /// Decoding requests that pin it: each step reads it for them.
    decodes: u32,
}

/// The slots. Every operation is O(log slots) at most, but for prefetch's choice, which looks at all.
#[derive(Clone, Debug)]
pub(crate) struct Slots {
    slots: Vec<Slot>,
    /// Free slots, the lowest last.
    free: Vec<u32>,
    evictable: IndexedHeap<(u64, u64)>,
    rule: Rule,
    uses: u64,
    loads: u64,
    /// Slots that the step in flight reads for prompts.
    in_step: Vec<u32>,
    loading: usize,
    /// Slots that are read for decodes, and those that the step in flight reads for prompts alone.
    decoded: Read,
    prompted: Read,
}

/// How many slots, and the sum of their adapters' ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Read {
    pub(crate) slots: u64,
    pub(crate) ranks: u64,
}

impl Slots {
    pub(crate) fn new(count: usize, evict: Evict) -> Self {
        let empty = Slot {
            view: SlotView { state: SlotState::Free, pins: 0, in_step: false, user_pinned: false },
            usage: SlotUse { last_use: 0, loaded: 0, uses: 0, pending: 0, bytes: 0 },
            decodes: 0,
        };
        Self {
            slots: vec![empty; count],
            free: (0..count as u32).rev().collect(),
            evictable: IndexedHeap::new(count),
            rule: evict.into(),
            uses: 0,
            loads: 0,
            in_step: Vec::with_capacity(count),
            loading: 0,
            decoded: Read::default(),
            prompted: Read::default(),
        }
    }

    /// As others see them, while a step is in flight or not.
    pub(crate) fn views(&self, step: bool) -> impl ExactSizeIterator<Item = SlotView> + '_ {
        let in_step = move |s: &Slot| s.view.in_step || (step && s.decodes > 0);
        self.slots.iter().map(move |s| SlotView { in_step: in_step(s), ..s.view })
    }

    /// None if there is no such slot.
    pub(crate) fn state(&self, slot: SlotId) -> Option<SlotState> {
        self.slots.get(slot.0 as usize).map(|s| s.view.state)
    }

    /// Whether the user has pinned its adapter.
    pub(crate) fn is_user_pinned(&self, slot: SlotId) -> bool {
        self.slots[slot.0 as usize].view.user_pinned
    }

    pub(crate) fn is_loading(&self, slot: SlotId) -> bool {
        matches!(self.slots[slot.0 as usize].view.state, SlotState::Loading(_))
    }

    /// Whether a copy is under way.
    pub(crate) fn any_loading(&self) -> bool {
        self.loading > 0
    }

    /// Whether [`Self::take`] would give one.
    pub(crate) fn available(&self) -> bool {
        !self.free.is_empty() || !self.evictable.is_empty()
    }

    pub(crate) fn is_evictable(&self, slot: SlotId) -> bool {
        self.evictable.contains(slot.0)
    }

    /// A slot to load into: a free one, else the victim's. Gives the adapter that lost it.
    pub(crate) fn take(&mut self) -> Option<(SlotId, Option<AdapterId>)> {
        if let Some(slot) = self.free.pop() {
            return Some((SlotId(slot), None));
        }
        self.victim().map(|(key, slot)| self.evict(key, slot))
    }

    /// Who is evicted next: the evictable slot that the rule's key puts first.
    fn victim(&self) -> Option<((u64, u64), u32)> {
        self.evictable.peek()
    }

    /// As [`Self::take`], but nobody's slot who is waited for: a prefetch must not undo a swap.
    pub(crate) fn take_for_prefetch(&mut self) -> Option<(SlotId, Option<AdapterId>)> {
        if let Some(slot) = self.free.pop() {
            return Some((SlotId(slot), None));
        }
        let unwanted = |&(_, slot): &((u64, u64), u32)| self.slots[slot as usize].usage.pending == 0;
        let (key, slot) = self.evictable.iter().filter(unwanted).min()?;
        Some(self.evict(key, slot))
    }

    fn evict(&mut self, key: (u64, u64), slot: u32) -> (SlotId, Option<AdapterId>) {
        self.evictable.remove(slot);
        self.rule.evicted(key.0);
        (SlotId(slot), self.slots[slot as usize].view.state.adapter())
    }

    /// A copy of `adapter` into a slot from [`Self::take`] begins.
    pub(crate) fn begin_load(&mut self, slot: SlotId, adapter: AdapterId, usage: AdapterUse) {
        self.loads += 1;
        self.uses += 1;
        self.loading += 1;
        let s = &mut self.slots[slot.0 as usize];
        s.view = SlotView {
            state: SlotState::Loading(adapter),
            pins: 0,
            in_step: false,
            user_pinned: usage.user_pinned,
        };
        s.usage = SlotUse {
            last_use: self.uses,
            loaded: self.loads,
            uses: usage.uses,
            pending: usage.pending,
            bytes: usage.bytes,
        };
    }

    /// The copy has ended.
    pub(crate) fn end_load(&mut self, slot: SlotId) {
        let view = &mut self.slots[slot.0 as usize].view;
        if let SlotState::Loading(adapter) = view.state {
            view.state = SlotState::Resident(adapter);
            self.loading -= 1;
        }
        self.settle(slot);
    }

    pub(crate) fn pin(&mut self, slot: SlotId) {
        self.uses += 1;
        let s = &mut self.slots[slot.0 as usize];
        s.view.pins += 1;
        s.usage.last_use = self.uses;
        self.evictable.remove(slot.0);
    }

    pub(crate) fn unpin(&mut self, slot: SlotId) {
        self.uses += 1;
        let s = &mut self.slots[slot.0 as usize];
        s.view.pins -= 1;
        s.usage.last_use = self.uses;
        self.settle(slot);
    }

    /// What the rule looks at has changed.
    pub(crate) fn set_usage(&mut self, slot: SlotId, uses: u64, pending: u64) {
        let usage = &mut self.slots[slot.0 as usize].usage;
        usage.uses = uses;
        usage.pending = pending;
        if self.evictable.contains(slot.0) {
            self.settle(slot);
        }
    }

    pub(crate) fn set_user_pinned(&mut self, slot: SlotId, pinned: bool) {
        self.slots[slot.0 as usize].view.user_pinned = pinned;
        self.settle(slot);
    }

    /// Puts the slot in or out of the evictable ones, as its state says.
    fn settle(&mut self, slot: SlotId) {
        let s = &self.slots[slot.0 as usize];
        let view = &s.view;
        let evictable = matches!(view.state, SlotState::Resident(_))
            && view.pins == 0
            && !view.in_step
            && !view.user_pinned;
        if evictable {
            self.evictable.set(slot.0, (self.rule.key(&s.usage), s.usage.last_use));
        } else {
            self.evictable.remove(slot.0);
        }
    }

    /// A request that pins the slot of its adapter, which has this rank, begins to decode.
    pub(crate) fn begin_decoding(&mut self, slot: SlotId, rank: u32) {
        let s = &mut self.slots[slot.0 as usize];
        s.decodes += 1;
        if s.decodes == 1 {
            self.decoded.slots += 1;
            self.decoded.ranks += u64::from(rank);
        }
    }

    /// It has ended, or lost its blocks.
    pub(crate) fn end_decoding(&mut self, slot: SlotId, rank: u32) {
        let s = &mut self.slots[slot.0 as usize];
        s.decodes -= 1;
        if s.decodes == 0 {
            self.decoded.slots -= 1;
            self.decoded.ranks -= u64::from(rank);
        }
    }

    /// Decoding requests that pin it.
    pub(crate) fn decodes(&self, slot: SlotId) -> u32 {
        self.slots[slot.0 as usize].decodes
    }

    /// The step about to be submitted reads this slot, which holds an adapter of `rank`, for other than decodes.
    /// True the first time.
    #[inline]
    pub(crate) fn read_in_step(&mut self, slot: SlotId, rank: u32) -> bool {
        let s = &mut self.slots[slot.0 as usize];
        let first = !s.view.in_step;
        if first {
            s.view.in_step = true;
            self.in_step.push(slot.0);
            if s.decodes == 0 {
                self.prompted.slots += 1;
                self.prompted.ranks += u64::from(rank);
            }
        }
        first
    }

    /// What the step about to be submitted reads.
    pub(crate) fn read(&self) -> Read {
        Read {
            slots: self.decoded.slots + self.prompted.slots,
            ranks: self.decoded.ranks + self.prompted.ranks,
        }
    }

    /// What decodes read.
    pub(crate) fn decoded(&self) -> Read {
        self.decoded
    }

    /// The step has ended. Gives the retiring slots, which are free now, to `retired`.
    pub(crate) fn step_done(&mut self, mut retired: impl FnMut(AdapterId)) {
        self.prompted = Read::default();
        while let Some(slot) = self.in_step.pop() {
            let view = &mut self.slots[slot as usize].view;
            view.in_step = false;
            if let SlotState::Retiring(adapter) = view.state {
                view.state = SlotState::Free;
                view.user_pinned = false;
                self.free.push(slot);
                retired(adapter);
            } else if view.pins == 0 {
                self.settle(SlotId(slot));
            }
        }
    }

    /// Gives up a removed adapter's unpinned, loaded slot. True if it is free at once, false if the
    /// step in flight must end first.
    pub(crate) fn retire(&mut self, slot: SlotId) -> bool {
        self.evictable.remove(slot.0);
        let view = &mut self.slots[slot.0 as usize].view;
        let adapter = view.state.adapter();
        match adapter {
            Some(adapter) if view.in_step => {
                view.state = SlotState::Retiring(adapter);
                false
            }
            _ => {
                view.state = SlotState::Free;
                view.user_pinned = false;
                self.free.push(slot.0);
                true
            }
        }
    }

    pub(crate) fn free_count(&self) -> usize {
        self.free.len()
    }
}

/// What a slot's usage starts from when an adapter is loaded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdapterUse {
    pub(crate) uses: u64,
    pub(crate) pending: u64,
    pub(crate) bytes: u64,
    pub(crate) user_pinned: bool,
}
