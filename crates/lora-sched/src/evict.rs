//! Which resident adapter gives up its slot: one rule a type.
//!
//! A slot is evictable when it is resident, unpinned and read by no submitted step. Evictable slots
//! stand in a heap by `(key, last use)`; the least goes first (`Slots::victim`).

use crate::config::Evict;

/// What a rule may look at.
#[derive(Clone, Copy, Debug)]
pub struct SlotUse {
    /// Rises with every use of any slot: the order of last uses.
    pub last_use: u64,
    /// Rises with every load of any slot: the order of loads.
    pub loaded: u64,
    /// Requests that this adapter has had since the start.
    pub uses: u64,
    /// Waiting requests for this adapter.
    pub pending: u64,
    /// Bytes that a swap of it copies.
    pub bytes: u64,
}

/// An eviction rule.
pub trait EvictionRule {
    /// The slot's key from now on; the least key goes first, ties by last use. Asked when a slot
    /// becomes evictable, and when its pending count changes.
    fn key(&self, slot: &SlotUse) -> u64;

    /// A slot with this key has been evicted.
    fn evicted(&mut self, _key: u64) {}
}

/// Least recently used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lru;

impl EvictionRule for Lru {
    fn key(&self, slot: &SlotUse) -> u64 {
        slot.last_use
    }
}

/// Least frequently used over all requests since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lfu;

impl EvictionRule for Lfu {
    fn key(&self, slot: &SlotUse) -> u64 {
        slot.uses
    }
}

/// Fewest waiting requests.
#[derive(Clone, Copy, Debug, Default)]
pub struct FewestPending;

impl EvictionRule for FewestPending {
    fn key(&self, slot: &SlotUse) -> u64 {
        slot.pending
    }
}

/// Longest resident.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fifo;

impl EvictionRule for Fifo {
    fn key(&self, slot: &SlotUse) -> u64 {
        slot.loaded
    }
}

/// GreedyDual-Size-Frequency (Cherkasova, 1998): `clock + uses × cost / size`, where the clock is
/// the key of the last victim, so that what is not used ages. Every slot has one size; the cost of
/// losing an adapter is the bytes to copy it back.
#[derive(Clone, Copy, Debug, Default)]
pub struct GreedyDual {
    clock: u64,
}

impl EvictionRule for GreedyDual {
    fn key(&self, slot: &SlotUse) -> u64 {
        self.clock.saturating_add(slot.uses.saturating_mul(slot.bytes))
    }

    fn evicted(&mut self, key: u64) {
        self.clock = self.clock.max(key);
    }
}

/// The rule that a configuration names.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rule {
    Lru(Lru),
    Lfu(Lfu),
    FewestPending(FewestPending),
    Cost(GreedyDual),
    Fifo(Fifo),
}

impl From<Evict> for Rule {
    fn from(evict: Evict) -> Self {
        match evict {
            Evict::Lru => Rule::Lru(Lru),
            Evict::Lfu => Rule::Lfu(Lfu),
            Evict::FewestPending => Rule::FewestPending(FewestPending),
            Evict::Cost => Rule::Cost(GreedyDual::default()),
            Evict::Fifo => Rule::Fifo(Fifo),
        }
    }
}

impl EvictionRule for Rule {
    fn key(&self, slot: &SlotUse) -> u64 {
        match self {
            Rule::Lru(r) => r.key(slot),
            Rule::Lfu(r) => r.key(slot),
            Rule::FewestPending(r) => r.key(slot),
            Rule::Cost(r) => r.key(slot),
            Rule::Fifo(r) => r.key(slot),
        }
    }

    fn evicted(&mut self, key: u64) {
        match self {
            Rule::Lru(r) => r.evicted(key),
            Rule::Lfu(r) => r.evicted(key),
            Rule::FewestPending(r) => r.evicted(key),
            Rule::Cost(r) => r.evicted(key),
            Rule::Fifo(r) => r.evicted(key),
        }
    }
}
