//! The tier below the slots: which adapters are in host memory, and which are read from disk.
//!
//! An adapter is read ahead as soon as a request for it waits, while a place in host memory can be had:
//! a free one, else that of an adapter which is idle (not being copied into a slot, and nobody who waits
//! needs a copy of it), the one that has been idle longest. Should every place be needed, the place of
//! the adapter whose oldest request is the youngest goes to an adapter that an older request waits for:
//! otherwise younger requests could keep an older one out for ever, and first come, first served would
//! stand still. An adapter in a slot needs no host copy, so idle ones go first among those too.
//!
//! Every operation is O(log adapters), but for the last resort, which looks at all that are waited for.

use crate::event::{Ended, EventError, Notice, Outbox};
use crate::heap::IndexedHeap;
use crate::meter::Readiness;
use crate::plan::FetchPlan;
use crate::scheduler::Scheduler;
use crate::types::{AdapterId, RequestId};

/// Where an adapter's bytes are, slots aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostState {
    /// On disk only.
    Disk,
    /// On the way to host memory.
    Fetching,
    /// In host memory.
    Host,
    /// On disk, and they could not be read.
    Failed,
}

/// The places in host memory.
#[derive(Clone, Debug)]
pub(crate) struct HostPlaces {
    capacity: usize,
    /// Taken by adapters that are there or on the way.
    used: usize,
    /// Groups that may lose theirs, by when they became idle.
    idle: IndexedHeap<u64>,
    clock: u64,
}

impl HostPlaces {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { capacity, used: 0, idle: IndexedHeap::new(0), clock: 0 }
    }

    pub(crate) fn grow(&mut self, group: u32) {
        self.idle.grow(group as usize + 1);
    }

    pub(crate) fn used(&self) -> usize {
        self.used
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn is_idle(&self, group: u32) -> bool {
        self.idle.contains(group)
    }
}

impl Scheduler {
    /// Where an adapter's bytes are; none if there is no such adapter.
    pub fn host_state(&self, adapter: AdapterId) -> Option<HostState> {
        self.queue.groups().get(adapter.0 as usize + 1).map(|g| g.host)
    }

    /// Adapters in host memory or on their way to it; none where it holds all.
    pub fn host_used(&self) -> Option<usize> {
        self.host.as_ref().map(HostPlaces::used)
    }

    /// At the start: the first adapters are in host memory, the others on disk.
    pub(crate) fn fill_host(&mut self) {
        let Some(host) = &mut self.host else { return };
        let groups = self.queue.groups().len() as u32;
        host.used = host.capacity.min(groups as usize - 1);
        host.grow(groups);
        let there = host.used as u32;
        for group in 1..groups {
            if group > there {
                self.queue.group_mut(group).host = HostState::Disk;
                self.set_readiness_without_slot(group);
            }
            self.settle_host(group);
        }
    }

    /// What a group without a slot lacks.
    pub(crate) fn set_readiness_without_slot(&mut self, group: u32) {
        let readiness = match self.queue.group(group).host {
            HostState::Host => Readiness::NeedsSlot,
            HostState::Fetching => Readiness::Loading,
            HostState::Disk | HostState::Failed => Readiness::OnDisk,
        };
        self.queue.set_readiness(group, readiness, &self.clock);
    }

    /// Whether a group's host copy is neither being copied into a slot nor needed for one.
    pub(crate) fn host_idle(&self, group: u32) -> bool {
        let g = self.queue.group(group);
        g.host == HostState::Host
            && match g.slot {
                Some(slot) => !self.slots.is_loading(slot),
                None => g.waiting == 0 && !g.spec.pinned,
            }
    }

    /// Puts a group in or out of the idle ones, as its state says.
    pub(crate) fn settle_host(&mut self, group: u32) {
        if self.host.is_none() || group == crate::queue::BASE {
            return;
        }
        let idle = self.host_idle(group);
        let Some(host) = &mut self.host else { return };
        if !idle {
            host.idle.remove(group);
        } else if !host.idle.contains(group) {
            host.clock += 1;
            host.idle.set(group, host.clock);
        }
    }

    /// Gives up a group's place, if it has one.
    pub(crate) fn leave_host(&mut self, group: u32) {
        let Some(host) = &mut self.host else { return };
        host.idle.remove(group);
        if self.queue.group(group).host == HostState::Host {
            host.used -= 1;
            self.queue.group_mut(group).host = HostState::Disk;
            if self.queue.group(group).slot.is_none() {
                self.set_readiness_without_slot(group);
            }
        }
    }

    /// A place for an adapter that `asks` waits for (none: the user, who comes before everybody), and the
    /// group that lost it.
    fn take_host_place(&mut self, asks: Option<RequestId>) -> Option<Option<u32>> {
        let host = self.host.as_mut()?;
        if host.used < host.capacity {
            host.used += 1;
            return Some(None);
        }
        let idle = host.idle.peek().map(|(_, group)| group);
        let victim = idle.or_else(|| {
            let needed = self.queue.needing_slot().filter(|n| !self.queue.group(n.1).spec.pinned);
            needed.max().filter(|youngest| asks.is_none_or(|id| youngest.0 > id)).map(|n| n.1)
        })?;
        self.leave_host(victim);
        if let Some(host) = &mut self.host {
            host.used += 1;
        }
        Some(Some(victim))
    }

    /// Reads ahead what waiting requests, and the user's pins, will need. Where there is a disk.
    pub(crate) fn start_fetches(&mut self, out: &mut Outbox) {
        loop {
            let pinned = self.wanted.iter().copied().find(|&g| self.queue.group(g).host == HostState::Disk);
            let (asks, group) = match (pinned, self.queue.oldest(Readiness::OnDisk)) {
                (Some(group), _) => (None, group),
                (None, Some((id, group))) => (Some(id), group),
                (None, None) => return,
            };
            let Some(evicted) = self.take_host_place(asks) else { return };
            self.queue.group_mut(group).host = HostState::Fetching;
            self.set_readiness_without_slot(group);
            out.fetches.push(FetchPlan {
                adapter: AdapterId(group - 1),
                evicted: evicted.map(|group| AdapterId(group - 1)),
                bytes: self.queue.group(group).spec.bytes,
            });
        }
    }

    pub(crate) fn fetch_done(
        &mut self,
        adapter: AdapterId,
        failed: bool,
        out: &mut Outbox,
    ) -> Result<(), EventError> {
        let group = adapter.0 + 1;
        if self.host_state(adapter) != Some(HostState::Fetching) {
            return Err(EventError::NotFetching(adapter));
        }
        self.queue.group_mut(group).host = if failed { HostState::Failed } else { HostState::Host };
        if failed {
            if let Some(host) = &mut self.host {
                host.used -= 1;
            }
            self.set_user_pin(group, false);
            self.fail_waiting(group, out);
        }
        self.set_readiness_without_slot(group);
        self.settle_host(group);
        self.retire_if_drained(group, out);
        Ok(())
    }

    /// Ends every waiting request of an adapter that cannot be had.
    fn fail_waiting(&mut self, group: u32, out: &mut Outbox) {
        while let Some(index) = self.queue.group(group).head() {
            self.dequeue(index);
            let id = self.requests[index].id;
            self.requests.remove(index);
            self.queue.group_mut(group).live -= 1;
            out.notices.push(Notice::Ended { id, place: None, why: Ended::Failed });
        }
    }
}
