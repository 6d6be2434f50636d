//! The invariants, checked from scratch: for tests and for engines in debug builds.

use crate::config::SwapMode;
use crate::host::HostState;
use crate::meter::Readiness;
use crate::requests::Phase;
use crate::scheduler::Scheduler;
use crate::slots::{Read, SlotState};
use crate::types::SlotId;

macro_rules! hold {
    ($condition:expr, $($message:tt)*) => {
        if !$condition {
            return Err(format!($($message)*));
        }
    };
}

impl Scheduler {
    /// Checks every invariant in time linear in the scheduler's size. The error says which is broken.
    pub fn audit(&self) -> Result<(), String> {
        self.audit_blocks()?;
        self.audit_decodes()?;
        self.audit_slots()?;
        self.audit_host()?;
        self.audit_queue()
    }

    fn audit_blocks(&self) -> Result<(), String> {
        let mut seen = vec![false; self.kv.total()];
        let mut held = 0;
        for block in self.kv.tables().iter().flatten() {
            hold!(!std::mem::replace(&mut seen[*block as usize], true), "block {block} is held twice");
            held += 1;
        }
        hold!(held + self.kv.free() == self.kv.total(), "{held} held and {} free blocks", self.kv.free());

        let mut place_taken = vec![false; self.config.max_num_seqs];
        for &index in &self.running {
            let request = &self.requests[index];
            let Some(place) = request.phase.place() else {
                return Err(format!("request {} is in the running list and waits", request.id));
            };
            let computed = self.computed(index);
            hold!(
                !std::mem::replace(&mut place_taken[place.0 as usize], true),
                "place {place} is taken twice"
            );
            let needed = self.config.blocks_for(computed as usize);
            hold!(self.kv.held(place) >= needed, "request {} has too few blocks", request.id);
            let capacity = self.kv.held(place) * self.config.block_size;
            hold!(
                capacity.min(u32::MAX as usize) == request.capacity as usize,
                "request {} miscounts its blocks",
                request.id
            );
        }
        for &place in &self.places {
            hold!(
                !std::mem::replace(&mut place_taken[place.0 as usize], true),
                "place {place} is free and taken"
            );
            hold!(self.kv.held(place) == 0, "the free place {place} holds blocks");
        }
        hold!(place_taken.iter().all(|&t| t), "a place is lost");
        Ok(())
    }

    /// Tokens in the KV cache.
    fn computed(&self, index: u32) -> u32 {
        let steps = self.decodes.iter().find(|d| d.index == index).map_or(0, |d| self.decodes.steps_of(d));
        self.requests[index].computed + steps
    }

    fn audit_decodes(&self) -> Result<(), String> {
        let decoding = |index: &u32| matches!(self.requests[*index].phase, Phase::Decoding { .. });
        let first = self.running.iter().take_while(|&i| decoding(i));
        hold!(first.eq(self.decodes.iter().map(|d| &d.index)), "the decodes are not the first that run");
        let behind = &self.running[self.decodes.len()..];
        hold!(!behind.iter().any(decoding), "a request decodes before one that was admitted earlier");
        let rank = |index| self.queue.group(self.requests[index].group).spec.rank;
        self.decodes.audit(|decode| {
            let request = &self.requests[decode.index];
            let full = u64::from(request.capacity - request.computed);
            let end = u64::from(request.max_tokens - request.generated);
            (u64::from(self.computed(decode.index)), decode.slot.get().map(|_| rank(decode.index)), end, full)
        })?;
        let mut read = Read::default();
        for slot in (0..self.config.gpu_loras as u32).map(SlotId) {
            let pinning: Vec<_> = self.decodes.iter().filter(|d| d.slot.get() == Some(slot)).collect();
            hold!(pinning.len() == self.slots.decodes(slot) as usize, "slot {slot} miscounts its decodes");
            if let Some(decode) = pinning.first() {
                read = Read { slots: read.slots + 1, ranks: read.ranks + u64::from(rank(decode.index)) };
            }
        }
        hold!(read == self.slots.decoded(), "decodes read {read:?}, not {:?}", self.slots.decoded());
        Ok(())
    }

    fn audit_slots(&self) -> Result<(), String> {
        let mut pins = vec![0u32; self.config.gpu_loras];
        let pinned_by = self.running.iter().chain(&self.holders);
        for group in pinned_by.map(|&index| self.requests[index].group).filter(|&g| g > 0) {
            let Some(slot) = self.queue.group(group).slot else {
                return Err(format!("group {group} has pins and no slot"));
            };
            pins[slot.0 as usize] += 1;
        }
        let mut free = 0;
        for (i, view) in self.slots().enumerate() {
            let slot = SlotId(i as u32);
            hold!(view.pins == pins[i], "slot {slot} counts {} pins of {}", view.pins, pins[i]);
            let owner = view.state.adapter().map(|a| self.queue.group(a.0 + 1).slot);
            match view.state {
                SlotState::Free => free += 1,
                SlotState::Retiring(_) => hold!(view.in_step, "slot {slot} retires for no step"),
                SlotState::Loading(_) | SlotState::Resident(_) => {
                    hold!(owner == Some(Some(slot)), "slot {slot} and its adapter disagree");
                }
            }
            let evictable = matches!(view.state, SlotState::Resident(_))
                && view.pins == 0
                && !view.in_step
                && !view.user_pinned;
            hold!(self.slots.is_evictable(slot) == evictable, "slot {slot} is evictable: {}", !evictable);
        }
        hold!(self.slots.free_count() == free, "the free slots are miscounted");
        Ok(())
    }

    fn audit_host(&self) -> Result<(), String> {
        let groups = self.queue.groups().iter().enumerate().skip(1);
        let mut used = 0;
        let mut user_pinned = 0;
        for (group, g) in groups {
            let group = group as u32;
            user_pinned += usize::from(g.spec.pinned);
            hold!(!(g.spec.pinned && g.removed), "group {group} is removed and pinned");
            let wanted = self.wanted.contains(&group);
            hold!(!wanted || (g.spec.pinned && g.slot.is_none()), "group {group} is wanted for nothing");
            if let Some(slot) = g.slot {
                hold!(
                    self.slots.is_user_pinned(slot) == g.spec.pinned,
                    "slot {slot} does not know whether the user pinned it"
                );
            }
            used += usize::from(matches!(g.host, HostState::Host | HostState::Fetching));
            let Some(host) = &self.host else {
                hold!(g.host == HostState::Host, "group {group} is {:?} and there is no disk", g.host);
                continue;
            };
            hold!(
                host.is_idle(group) == self.host_idle(group),
                "group {group} is idle in host memory, or not"
            );
            hold!(g.host != HostState::Fetching || g.slot.is_none(), "group {group} is read and in a slot");
        }
        let (total, _) = self.count();
        hold!(
            user_pinned < self.config.gpu_loras.max(1) || total <= self.config.gpu_loras,
            "{user_pinned} pinned adapters leave no slot"
        );
        if let Some(host) = &self.host {
            hold!(host.used() == used, "{used} places in host memory are taken, not {}", host.used());
            hold!(used <= host.capacity(), "{used} places in host memory of {}", host.capacity());
        }
        Ok(())
    }

    fn audit_queue(&self) -> Result<(), String> {
        let waiting: Vec<_> = self.requests.iter().filter(|(_, r)| r.phase == Phase::Waiting).collect();
        hold!(waiting.len() == self.queue.len(), "the queue's length is wrong");
        hold!(waiting.len() + self.running.len() == self.requests.len(), "a request is nowhere");
        let mut ready = 0;
        for (group, g) in self.queue.groups().iter().enumerate() {
            let mut own = waiting.iter().filter(|(_, r)| r.group == group as u32);
            hold!(own.clone().count() == g.waiting as usize, "group {group} miscounts its waiting");
            let head = own.next();
            hold!(head.map(|w| w.0) == g.head(), "group {group} has the wrong head");
            hold!(head.map(|w| w.1.id) == g.head_id(), "group {group} has the wrong head's id");
            let second = own.next().map(|w| w.1.id);
            hold!(
                second.is_none() || second == head.map(|w| w.1.next_id_in_group),
                "group {group} has the wrong successor's id"
            );
            if g.readiness == Readiness::Ready {
                ready += g.waiting as usize;
            }
            let loading = g.slot.is_some_and(|s| self.slots.is_loading(s));
            let expected = match (group, g.slot) {
                (0, _) => Readiness::Ready,
                (_, None) => match g.host {
                    HostState::Host => Readiness::NeedsSlot,
                    HostState::Fetching => Readiness::Loading,
                    HostState::Disk | HostState::Failed => Readiness::OnDisk,
                },
                (_, Some(_)) if loading && self.config.swap_mode == SwapMode::Overlap => Readiness::Loading,
                (_, Some(_)) => Readiness::Ready,
            };
            hold!(g.readiness == expected, "group {group} is {:?}, not {expected:?}", g.readiness);
        }
        hold!(ready == self.queue.ready_len(), "the ready requests are miscounted");
        for readiness in [Readiness::Ready, Readiness::NeedsSlot, Readiness::Loading, Readiness::OnDisk] {
            let groups = self.queue.groups();
            let heads = groups.iter().filter(|g| g.readiness == readiness).filter_map(|g| g.head());
            let oldest = heads.map(|h| self.requests[h].id).min();
            hold!(self.queue.oldest(readiness).map(|o| o.0) == oldest, "the oldest {readiness:?} is wrong");
        }
        Ok(())
    }
}
