//! Whose fault each nanosecond of waiting is, for any number of waiting requests at O(1) an event.
//!
//! The cause that holds for a waiting request follows from two things: the *gate*, which is the same
//! for everybody (did the last plan end for want of places or tokens, for want of KV blocks, or did
//! it admit all that it could?), and, when the gate is open, the state of the request's adapter
//! (needs a slot, is being copied, or is ready). Both are piecewise constant, so it is enough to
//! integrate time under each gate once, and per adapter to add up what passed in each of its states.
//! A request takes a reading when its wait begins and another when it ends; the difference is its parts.

use crate::parts::Parts;
use crate::types::Nanos;

/// Why the last plan admitted nobody further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gate {
    /// No sequence place or token budget left.
    Queue,
    /// No KV blocks for the next in line.
    Kv,
    /// Nothing but slots and swaps.
    Open,
}

/// Time under each gate since the start.
#[derive(Clone, Debug)]
pub(crate) struct GateClock {
    now: Nanos,
    pub(crate) gate: Gate,
    /// Whether a slot is free or evictable.
    pub(crate) slot_available: bool,
    queue: Nanos,
    kv: Nanos,
    open_without_slot: Nanos,
    open_with_slot: Nanos,
}

impl GateClock {
    pub(crate) fn new() -> Self {
        Self {
            now: 0,
            gate: Gate::Open,
            slot_available: true,
            queue: 0,
            kv: 0,
            open_without_slot: 0,
            open_with_slot: 0,
        }
    }

    /// Lets time pass under the present gate. Time that goes back counts as standing still.
    pub(crate) fn advance(&mut self, now: Nanos) {
        let passed = now.saturating_sub(self.now);
        self.now = self.now.max(now);
        match (self.gate, self.slot_available) {
            (Gate::Queue, _) => self.queue += passed,
            (Gate::Kv, _) => self.kv += passed,
            (Gate::Open, false) => self.open_without_slot += passed,
            (Gate::Open, true) => self.open_with_slot += passed,
        }
    }

    pub(crate) fn now(&self) -> Nanos {
        self.now
    }
}

/// What stands between an adapter's waiting requests and a plan, slots considered alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Readiness {
    /// Its requests can be admitted.
    Ready,
    /// It has no slot.
    NeedsSlot,
    /// It is being copied and the swap mode makes requests wait for that, or it is being read into host
    /// memory.
    Loading,
    /// It is neither in a slot nor in host memory, and is not being read.
    OnDisk,
}

/// One adapter's share of open-gate time, by its state.
#[derive(Clone, Debug, Default)]
pub(crate) struct AdapterMeter {
    seen_without_slot: Nanos,
    seen_with_slot: Nanos,
    queue: Nanos,
    slot: Nanos,
    swap: Nanos,
}

impl AdapterMeter {
    /// Books the open-gate time since the last call to the state that held meanwhile.
    pub(crate) fn sync(&mut self, clock: &GateClock, state: Readiness) {
        let without = clock.open_without_slot - self.seen_without_slot;
        let with = clock.open_with_slot - self.seen_with_slot;
        self.seen_without_slot = clock.open_without_slot;
        self.seen_with_slot = clock.open_with_slot;
        match state {
            Readiness::Ready => self.queue += without + with,
            Readiness::NeedsSlot => {
                self.slot += without;
                // A slot could be had: only the next plan is missing.
                self.queue += with;
            }
            // More of the way to a slot; waiting for a place in host memory, too, is mended by more of it.
            Readiness::Loading | Readiness::OnDisk => self.swap += without + with,
        }
    }

    /// The reading; [`Self::sync`] first.
    pub(crate) fn read(&self, clock: &GateClock) -> Reading {
        Reading { queue: clock.queue + self.queue, kv: clock.kv, slot: self.slot, swap: self.swap }
    }
}

/// Meter readings at one instant.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Reading {
    queue: Nanos,
    kv: Nanos,
    slot: Nanos,
    swap: Nanos,
}

impl Reading {
    /// Adds what passed between `start` and this reading to `parts`.
    pub(crate) fn add_since(&self, start: &Reading, parts: &mut Parts) {
        parts.queue += self.queue - start.queue;
        parts.kv += self.kv - start.kv;
        parts.slot += self.slot - start.slot;
        parts.swap += self.swap - start.swap;
    }
}
