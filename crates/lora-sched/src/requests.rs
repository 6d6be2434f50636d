//! The requests in the scheduler: a slab, found by id in O(1).

use std::collections::VecDeque;

use crate::meter::Reading;
use crate::parts::Parts;
use crate::types::{Nanos, PlaceId, RequestId, SlotId};

/// No request, in links and in the id ring.
pub(crate) const NONE: u32 = u32::MAX;

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Waiting,
    /// It runs and its prompt, or what it has to compute anew, is not in the KV cache.
    Prefilling {
        place: PlaceId,
        /// Whether the step in flight has tokens of it.
        in_step: bool,
        /// Cancelled while in the step: gone when it ends.
        cancelled: bool,
    },
    /// It runs and is in every step; what these have brought is counted by [`Decodes`](crate::decodes::Decodes).
    Decoding {
        place: PlaceId,
        /// As above.
        cancelled: bool,
    },
}

impl Phase {
    /// While it runs: its sequence place.
    pub(crate) fn place(self) -> Option<PlaceId> {
        match self {
            Self::Waiting => None,
            Self::Prefilling { place, .. } | Self::Decoding { place, .. } => Some(place),
        }
    }
}

/// One request.
///
/// Laid out as written, on cache lines of its own: what admission and the end touch is on the first one. That has
/// its place in its group's list too: what is written there when a request becomes the oldest brings the line
/// from memory by the time that the request is admitted.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(crate) struct Request {
    pub(crate) phase: Phase,
    /// Tokens in the KV cache; while it decodes, when that began.
    pub(crate) computed: u32,
    /// Tokens that the driver feeds: those known when it was last admitted.
    pub(crate) fed: u32,
    /// Output tokens; while it decodes, when that began.
    pub(crate) generated: u32,
    pub(crate) max_tokens: u32,
    pub(crate) prompt: u32,
    /// Index of its group: 0 is the base model, adapter `a` is `a + 1`.
    pub(crate) group: u32,
    /// While it runs: its adapter's slot, which it pins.
    pub(crate) slot: PinnedSlot,
    /// While it runs: tokens that its blocks hold, or the most that can be told.
    pub(crate) capacity: u32,
    pub(crate) id: RequestId,
    /// Id of `next_in_group`, if there is one: who comes next is known without a look at it.
    pub(crate) next_id_in_group: RequestId,
    pub(crate) prev_in_group: u32,
    pub(crate) next_in_group: u32,

    /// When it entered the queue.
    pub(crate) arrived: Nanos,
    /// Since when the present cause is being counted where no meter does it: a fresh arrival's
    /// queueing for the running step's end, a running request's time between its chunks.
    pub(crate) since: Nanos,
    /// Meter readings when its metered wait began.
    pub(crate) reading: Reading,
    pub(crate) prev: u32,
    pub(crate) next: u32,

    pub(crate) parts: Parts,
    /// A demand load of its adapter pins the slot for it until it starts.
    pub(crate) holds_slot: bool,
}

/// A slot or none, in four bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PinnedSlot(u32);

impl PinnedSlot {
    pub(crate) fn new(slot: Option<SlotId>) -> Self {
        Self(slot.map_or(NONE, |slot| slot.0))
    }

    pub(crate) fn get(self) -> Option<SlotId> {
        (self.0 != NONE).then_some(SlotId(self.0))
    }
}

impl Request {
    /// Takes `blocks` of `size` tokens into its capacity.
    pub(crate) fn add_blocks(&mut self, blocks: usize, size: usize) {
        let tokens = u32::try_from(blocks * size).unwrap_or(u32::MAX);
        self.capacity = self.capacity.saturating_add(tokens);
    }

    /// Prompt and output so far.
    pub(crate) fn known(&self) -> u32 {
        self.prompt + self.generated
    }

    /// Whether its TTFT is still running.
    pub(crate) fn before_first_token(&self) -> bool {
        self.generated == 0
    }
}

/// All requests that have not ended.
#[derive(Clone, Debug, Default)]
pub(crate) struct Requests {
    slab: Vec<Request>,
    vacant: Vec<u32>,
    /// Slab index of each id from `first_id` on. Ids rise, so a ring replaces a hash map.
    ring: VecDeque<u32>,
    first_id: u64,
    live: usize,
}

impl Requests {
    /// The least id that the next request may have.
    pub(crate) fn next_id(&self) -> u64 {
        self.first_id + self.ring.len() as u64
    }

    pub(crate) fn len(&self) -> usize {
        self.live
    }

    /// Adds a request whose id is at least [`Self::next_id`].
    pub(crate) fn insert(&mut self, request: Request) -> u32 {
        let id = request.id.0;
        if self.live == 0 {
            self.ring.clear();
            self.first_id = id;
        }
        while self.next_id() < id {
            self.ring.push_back(NONE);
        }
        let index = match self.vacant.pop() {
            Some(index) => {
                self.slab[index as usize] = request;
                index
            }
            None => {
                self.slab.push(request);
                (self.slab.len() - 1) as u32
            }
        };
        self.ring.push_back(index);
        self.live += 1;
        index
    }

    /// The index of a request that has not ended.
    pub(crate) fn find(&self, id: RequestId) -> Option<u32> {
        let at = id.0.checked_sub(self.first_id)?;
        self.ring.get(usize::try_from(at).ok()?).copied().filter(|&index| index != NONE)
    }

    pub(crate) fn remove(&mut self, index: u32) {
        let at = (self[index].id.0 - self.first_id) as usize;
        self.ring[at] = NONE;
        self.vacant.push(index);
        self.live -= 1;
        // The last entry stays, so that ids keep rising over an empty ring.
        while self.ring.len() > 1 && self.ring[0] == NONE {
            self.ring.pop_front();
            self.first_id += 1;
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Request)> + '_ {
        self.ring.iter().filter(|&&index| index != NONE).map(|&index| (index, &self[index]))
    }
}

impl std::ops::Index<u32> for Requests {
    type Output = Request;

    fn index(&self, index: u32) -> &Request {
        &self.slab[index as usize]
    }
}

impl std::ops::IndexMut<u32> for Requests {
    fn index_mut(&mut self, index: u32) -> &mut Request {
        &mut self.slab[index as usize]
    }
}
