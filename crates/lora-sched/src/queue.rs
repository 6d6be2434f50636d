//! The waiting queue, indexed by adapter.
//!
//! Each group (the base model, or one adapter) has its own list, oldest first; the groups with waiting
//! requests stand in one of four heaps by what they lack, keyed by their oldest request. So the
//! oldest request of each kind is found in O(1) and every change costs O(log groups), whatever the
//! queue's length. A second list holds all waiting requests in order, for prefetch.

use crate::config::AdapterSpec;
use crate::heap::IndexedHeap;
use crate::host::HostState;
use crate::meter::{AdapterMeter, GateClock, Readiness, Reading};
use crate::requests::{NONE, Requests};
use crate::types::{RequestId, SlotId};

/// The base model's group.
pub(crate) const BASE: u32 = 0;

/// The base model, or one adapter.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub(crate) spec: AdapterSpec,
    pub(crate) slot: Option<SlotId>,
    pub(crate) host: HostState,
    pub(crate) removed: bool,
    /// Requests since the start.
    pub(crate) uses: u64,
    pub(crate) waiting: u32,
    /// Waiting and running.
    pub(crate) live: u32,
    pub(crate) readiness: Readiness,
    head: u32,
    /// Id of `head`, if there is one: in a long queue the request itself is far from the processor.
    head_id: RequestId,
    tail: u32,
    meter: AdapterMeter,
}

impl Group {
    pub(crate) fn head(&self) -> Option<u32> {
        (self.head != NONE).then_some(self.head)
    }

    /// [`Self::head`]'s id.
    pub(crate) fn head_id(&self) -> Option<RequestId> {
        (self.head != NONE).then_some(self.head_id)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Queue {
    groups: Vec<Group>,
    ready: IndexedHeap<RequestId>,
    needs_slot: IndexedHeap<RequestId>,
    loading: IndexedHeap<RequestId>,
    on_disk: IndexedHeap<RequestId>,
    head: u32,
    tail: u32,
    /// Whether the list of all is kept.
    in_order: bool,
    len: usize,
    ready_len: usize,
}

impl Queue {
    /// With `in_order`, a list of all waiting requests is kept beside those of the groups.
    pub(crate) fn new(adapters: &[AdapterSpec], in_order: bool) -> Self {
        let groups = adapters.len() + 1;
        let mut queue = Self {
            groups: Vec::with_capacity(groups),
            ready: IndexedHeap::new(groups),
            needs_slot: IndexedHeap::new(groups),
            loading: IndexedHeap::new(groups),
            on_disk: IndexedHeap::new(groups),
            head: NONE,
            tail: NONE,
            in_order,
            len: 0,
            ready_len: 0,
        };
        queue.add_group(AdapterSpec::new(0, 0), Readiness::Ready);
        for &spec in adapters {
            queue.add_group(spec, Readiness::NeedsSlot);
        }
        queue
    }

    pub(crate) fn add_group(&mut self, spec: AdapterSpec, readiness: Readiness) {
        self.groups.push(Group {
            spec,
            slot: None,
            host: HostState::Host,
            removed: false,
            uses: 0,
            waiting: 0,
            live: 0,
            readiness,
            head: NONE,
            head_id: RequestId(0),
            tail: NONE,
            meter: AdapterMeter::default(),
        });
        for heap in [&mut self.ready, &mut self.needs_slot, &mut self.loading, &mut self.on_disk] {
            heap.grow(self.groups.len());
        }
    }

    pub(crate) fn group(&self, group: u32) -> &Group {
        &self.groups[group as usize]
    }

    pub(crate) fn group_mut(&mut self, group: u32) -> &mut Group {
        &mut self.groups[group as usize]
    }

    pub(crate) fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Waiting requests.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Waiting requests that lack neither slot nor swap.
    pub(crate) fn ready_len(&self) -> usize {
        self.ready_len
    }

    /// The oldest waiting request of a kind, with its group.
    pub(crate) fn oldest(&self, readiness: Readiness) -> Option<(RequestId, u32)> {
        match readiness {
            Readiness::Ready => self.ready.peek(),
            Readiness::NeedsSlot => self.needs_slot.peek(),
            Readiness::Loading => self.loading.peek(),
            Readiness::OnDisk => self.on_disk.peek(),
        }
    }

    /// The groups that lack a slot, with the oldest waiting request of each, in no order.
    pub(crate) fn needing_slot(&self) -> impl Iterator<Item = (RequestId, u32)> + '_ {
        self.needs_slot.iter()
    }

    /// The oldest waiting request of all; none where the list of all is not kept.
    pub(crate) fn head(&self) -> Option<u32> {
        (self.head != NONE).then_some(self.head)
    }

    fn heap(&mut self, readiness: Readiness) -> &mut IndexedHeap<RequestId> {
        match readiness {
            Readiness::Ready => &mut self.ready,
            Readiness::NeedsSlot => &mut self.needs_slot,
            Readiness::Loading => &mut self.loading,
            Readiness::OnDisk => &mut self.on_disk,
        }
    }

    /// Tells the heaps what the group's oldest request is now.
    fn rekey(&mut self, group: u32) {
        let g = &self.groups[group as usize];
        let (readiness, head, id) = (g.readiness, g.head(), g.head_id);
        match head {
            Some(_) => self.heap(readiness).set(group, id),
            None => self.heap(readiness).remove(group),
        }
    }

    /// What the group lacks has changed.
    pub(crate) fn set_readiness(&mut self, group: u32, readiness: Readiness, clock: &GateClock) {
        let g = &mut self.groups[group as usize];
        if g.readiness == readiness {
            return;
        }
        g.meter.sync(clock, g.readiness);
        let before = std::mem::replace(&mut g.readiness, readiness);
        let waiting = g.waiting as usize;
        if before == Readiness::Ready {
            self.ready_len -= waiting;
        }
        if readiness == Readiness::Ready {
            self.ready_len += waiting;
        }
        self.heap(before).remove(group);
        self.rekey(group);
    }

    /// The group's meter, read now.
    pub(crate) fn read_meter(&mut self, group: u32, clock: &GateClock) -> Reading {
        let g = &mut self.groups[group as usize];
        g.meter.sync(clock, g.readiness);
        g.meter.read(clock)
    }

    /// Puts a request in line by its id. Arrivals go to the end in O(1); a preempted request looks
    /// for its place from the front, where it belongs.
    pub(crate) fn push(&mut self, index: u32, requests: &mut Requests) {
        if self.in_order {
            self.push_in_order(index, requests);
        }
        self.push_in_group(index, requests);
    }

    fn push_in_order(&mut self, index: u32, requests: &mut Requests) {
        let id = requests[index].id;
        let appended = self.tail == NONE || requests[self.tail].id < id;
        let mut after = if appended { self.tail } else { NONE };
        if !appended {
            let mut next = self.head;
            while next != NONE && requests[next].id < id {
                after = next;
                next = requests[next].next;
            }
        }
        let next = if after == NONE { self.head } else { requests[after].next };
        requests[index].prev = after;
        requests[index].next = next;
        match after {
            NONE => self.head = index,
            after => requests[after].next = index,
        }
        match next {
            NONE => self.tail = index,
            next => requests[next].prev = index,
        }
    }

    fn push_in_group(&mut self, index: u32, requests: &mut Requests) {
        let id = requests[index].id;
        let group = requests[index].group;
        // Within a group, admission is in order of id, so a preempted request is older than all
        // that wait or than all but those preempted before it: again the place is near the front.
        let g = &mut self.groups[group as usize];
        let mut after = NONE;
        if g.tail != NONE && requests[g.tail].id < id {
            after = g.tail;
        } else {
            let mut next = g.head;
            while next != NONE && requests[next].id < id {
                after = next;
                next = requests[next].next_in_group;
            }
        }
        let next = if after == NONE { g.head } else { requests[after].next_in_group };
        requests[index].prev_in_group = after;
        requests[index].next_in_group = next;
        match after {
            NONE => (g.head, g.head_id) = (index, id),
            after => {
                requests[after].next_in_group = index;
                requests[after].next_id_in_group = id;
            }
        }
        match next {
            NONE => g.tail = index,
            next => {
                requests[index].next_id_in_group = requests[next].id;
                requests[next].prev_in_group = index;
            }
        }
        g.waiting += 1;
        self.len += 1;
        let first = g.head == index;
        if g.readiness == Readiness::Ready {
            self.ready_len += 1;
        }
        if first {
            self.rekey(group);
        }
    }

    /// Takes a request out of line.
    pub(crate) fn remove(&mut self, index: u32, requests: &mut Requests) {
        let group = requests[index].group;
        if self.in_order {
            let (prev, next) = (requests[index].prev, requests[index].next);
            match prev {
                NONE => self.head = next,
                prev => requests[prev].next = next,
            }
            match next {
                NONE => self.tail = prev,
                next => requests[next].prev = prev,
            }
        }
        let (prev, next) = (requests[index].prev_in_group, requests[index].next_in_group);
        let next_id = requests[index].next_id_in_group;
        let g = &mut self.groups[group as usize];
        match prev {
            NONE => (g.head, g.head_id) = (next, next_id),
            prev => {
                requests[prev].next_in_group = next;
                requests[prev].next_id_in_group = next_id;
            }
        }
        match next {
            NONE => g.tail = prev,
            next => requests[next].prev_in_group = prev,
        }
        g.waiting -= 1;
        self.len -= 1;
        if g.readiness == Readiness::Ready {
            self.ready_len -= 1;
        }
        if prev == NONE {
            self.rekey(group);
        }
    }
}
