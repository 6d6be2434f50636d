//! Swaps that wait for a copy engine, and whose turn it is.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use lora_sched::{AdapterId, Nanos, SlotId, SwapKind, SwapMode, SwapPlan};

use crate::engine::adapters::HostAdapter;
use crate::engine::executor::Completion;

/// A swap on its way.
#[derive(Clone, Debug)]
pub(in crate::engine) struct Copy {
    pub slot: SlotId,
    pub id: AdapterId,
    pub adapter: Arc<HostAdapter>,
    pub kind: SwapKind,
    /// Layers below it have been copied, or are being.
    pub next_layer: usize,
    /// When the first one was begun.
    pub started: Nanos,
    /// Which copies were decided at once: a number that grows.
    pub together: u64,
}

impl Copy {
    pub fn new(swap: &SwapPlan, adapter: Arc<HostAdapter>, together: u64) -> Self {
        let SwapPlan { slot, adapter: id, kind, .. } = *swap;
        Self { slot, id, adapter, kind, next_layer: 0, started: 0, together }
    }

    /// The layers to copy next, `at_once` at most.
    pub fn layers(&self, at_once: usize) -> std::ops::Range<usize> {
        self.next_layer..self.adapter.layout.layers().min(self.next_layer + at_once)
    }

    /// Whether every layer has been copied, or is being.
    pub fn is_done(&self) -> bool {
        self.next_layer >= self.adapter.layout.layers()
    }

    /// What to report once the last layer is there.
    pub fn completion(&self, ended: Nanos) -> Completion {
        Completion::Swap { slot: self.slot, adapter: self.id, started: self.started, ended }
    }
}

/// What the copy thread has to do. Between two pieces it looks again, so that a demand passes a
/// prefetch that is under way; under `layered` demands that were decided at once take turns, because
/// a step may wait for the same layer of several of them. Later ones come after them.
pub(in crate::engine) struct CopyQueue {
    state: Mutex<State>,
    signal: Condvar,
    take_turns: bool,
}

#[derive(Default)]
struct State {
    demand: VecDeque<Copy>,
    prefetch: VecDeque<Copy>,
    closed: bool,
}

impl CopyQueue {
    pub fn new(mode: SwapMode, slots: usize) -> Self {
        let state = State {
            demand: VecDeque::with_capacity(slots),
            prefetch: VecDeque::with_capacity(slots),
            closed: false,
        };
        Self { state: Mutex::new(state), signal: Condvar::new(), take_turns: mode == SwapMode::Layered }
    }

    pub fn push(&self, copy: Copy) {
        let mut state = self.lock();
        match copy.kind {
            SwapKind::Demand => state.demand.push_back(copy),
            SwapKind::Prefetch => state.prefetch.push_back(copy),
        }
        self.signal.notify_one();
    }

    /// Lets the thread end once it has nothing left to copy.
    pub fn close(&self) {
        self.lock().closed = true;
        self.signal.notify_one();
    }

    /// The copy whose turn it is, if there is one now.
    #[cfg(feature = "cuda")]
    pub fn try_next(&self) -> Option<Copy> {
        let mut state = self.lock();
        state.demand.pop_front().or_else(|| state.prefetch.pop_front())
    }

    /// The demand whose turn it is, if there is one now.
    #[cfg(feature = "cuda")]
    pub fn try_next_demand(&self) -> Option<Copy> {
        self.lock().demand.pop_front()
    }

    /// The copy whose turn it is; none when the queue is closed and empty.
    pub fn next(&self) -> Option<Copy> {
        let mut state = self.lock();
        loop {
            if let Some(copy) = state.demand.pop_front().or_else(|| state.prefetch.pop_front()) {
                return Some(copy);
            }
            if state.closed {
                return None;
            }
            state = self.signal.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives back a copy that has layers left.
    pub fn put_back(&self, copy: Copy) {
        let mut state = self.lock();
        match copy.kind {
            SwapKind::Demand if self.take_turns => {
                let later = state.demand.iter().position(|c| c.together > copy.together);
                let at = later.unwrap_or(state.demand.len());
                state.demand.insert(at, copy);
            }
            SwapKind::Demand => state.demand.push_front(copy),
            SwapKind::Prefetch => state.prefetch.push_front(copy),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::adapters::HostPool;
    use crate::engine::model::preset;

    /// The order in which layers of (demand 0, demand 1, prefetch 2, a later demand 3) are copied.
    fn order(mode: SwapMode) -> Vec<u32> {
        let spec = preset("tiny").unwrap();
        let pool = HostPool::generate(&spec, 1, 1, &[], 0).unwrap();
        let queue = CopyQueue::new(mode, 4);
        let demand = SwapKind::Demand;
        for (slot, kind, together) in
            [(2, SwapKind::Prefetch, 0), (0, demand, 0), (1, demand, 0), (3, demand, 1)]
        {
            let swap = SwapPlan { slot: SlotId(slot), adapter: AdapterId(0), kind, bytes: 0, evicted: None };
            queue.push(Copy::new(&swap, pool.get(AdapterId(0)).unwrap(), together));
        }
        queue.close();
        let mut order = Vec::new();
        while let Some(mut copy) = queue.next() {
            order.push(copy.slot.0);
            copy.next_layer += 1;
            if copy.next_layer < spec.layers {
                queue.put_back(copy);
            }
        }
        order
    }

    #[test]
    fn demands_go_first_and_take_turns_only_when_layered_and_together() {
        assert_eq!(order(SwapMode::Layered), [0, 1, 0, 1, 0, 1, 3, 3, 3, 2, 2, 2]);
        assert_eq!(order(SwapMode::Overlap), [0, 0, 0, 1, 1, 1, 3, 3, 3, 2, 2, 2]);
    }
}
