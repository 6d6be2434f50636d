//! Adapters come, go and are pinned while requests run.

use crate::config::AdapterSpec;
use crate::event::{EventError, Notice, Outbox};
use crate::host::HostState;
use crate::meter::Readiness;
use crate::plan::SwapKind;
use crate::scheduler::Scheduler;
use crate::types::AdapterId;

impl Scheduler {
    /// Adapters that new requests may name.
    pub fn adapters(&self) -> impl Iterator<Item = (AdapterId, AdapterSpec)> + '_ {
        let groups = self.queue.groups()[1..].iter().enumerate();
        groups.filter(|(_, g)| !g.removed).map(|(i, g)| (AdapterId(i as u32), g.spec))
    }

    /// The id that the next added adapter gets. Ids are never given again.
    pub fn next_adapter(&self) -> AdapterId {
        AdapterId(self.queue.groups().len() as u32 - 1)
    }

    /// Whether `held` of `total` adapters may be pinned by the user: the others need a slot.
    fn leaves_a_slot(&self, held: usize, total: usize) -> bool {
        held < self.config.gpu_loras || total <= self.config.gpu_loras
    }

    /// Adapters that requests need a slot for, now or later, and those among them that the user has pinned.
    /// One that is being drained counts: were all slots pinned, its last requests would wait for ever.
    pub(crate) fn count(&self) -> (usize, usize) {
        let there = self.queue.groups()[1..].iter().filter(|g| !g.removed || g.live > 0);
        there.fold((0, 0), |(total, held), g| (total + 1, held + usize::from(g.spec.pinned)))
    }

    pub(crate) fn add_adapter(&mut self, spec: AdapterSpec) -> Result<(), EventError> {
        let (total, held) = self.count();
        if !self.leaves_a_slot(held + usize::from(spec.pinned), total + 1) {
            return Err(EventError::AllPinned);
        }
        let group = self.queue.groups().len() as u32;
        self.queue.add_group(spec, Readiness::NeedsSlot);
        if let Some(host) = &mut self.host {
            host.grow(group);
            self.queue.group_mut(group).host = HostState::Disk;
            self.set_readiness_without_slot(group);
        }
        if spec.pinned {
            self.wanted.push(group);
        }
        Ok(())
    }

    pub(crate) fn remove_adapter(&mut self, adapter: AdapterId, out: &mut Outbox) -> Result<(), EventError> {
        let group = self.adapter_group(adapter)?;
        self.set_user_pin(group, false);
        self.queue.group_mut(group).removed = true;
        self.retire_if_drained(group, out);
        Ok(())
    }

    pub(crate) fn pin_adapter(&mut self, adapter: AdapterId, pinned: bool) -> Result<(), EventError> {
        let group = self.adapter_group(adapter)?;
        let (total, held) = self.count();
        let g = self.queue.group(group);
        if pinned && g.host == HostState::Failed {
            return Err(EventError::AdapterFailed(adapter));
        }
        if pinned && !g.spec.pinned && !self.leaves_a_slot(held + 1, total) {
            return Err(EventError::AllPinned);
        }
        self.set_user_pin(group, pinned);
        Ok(())
    }

    pub(crate) fn set_user_pin(&mut self, group: u32, pinned: bool) {
        let g = self.queue.group_mut(group);
        g.spec.pinned = pinned;
        match g.slot {
            Some(slot) => self.slots.set_user_pinned(slot, pinned),
            None if !pinned => self.wanted.retain(|&w| w != group),
            None if !self.wanted.contains(&group) => self.wanted.push(group),
            None => {}
        }
        self.settle_host(group);
    }

    /// Gives slots to adapters that the user has pinned: before any request, since a pin is for good and
    /// leaves at least one slot to all others. In every swap mode it starts as soon as a slot can be had:
    /// no step waits for it unless it has a request of the adapter. Slots come free by events, and the one
    /// that a plan takes from a preempted request has the end of that step for its next.
    pub(crate) fn start_pinned(&mut self, out: &mut Outbox) {
        while let Some(&group) = self.wanted.iter().find(|&&g| self.queue.group(g).host == HostState::Host) {
            let Some(taken) = self.slots.take() else { return };
            self.load(taken, group, SwapKind::Demand, out);
        }
    }

    /// A removed adapter that nobody uses any more gives up its slot and its place in host memory.
    pub(crate) fn retire_if_drained(&mut self, group: u32, out: &mut Outbox) {
        let g = self.queue.group(group);
        let slot = g.slot;
        // What is under way completes first.
        let under_way = g.host == HostState::Fetching || slot.is_some_and(|slot| self.slots.is_loading(slot));
        if !g.removed || g.live > 0 || under_way {
            return;
        }
        let adapter = AdapterId(group - 1);
        self.leave_host(group);
        let empty = slot.is_none_or(|slot| {
            self.unload(adapter);
            self.slots.retire(slot)
        });
        if empty {
            out.notices.push(Notice::AdapterGone(adapter));
        }
    }
}
