//! The copy thread: swaps, a layer at a time.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use lora_sched::{AdapterId, Nanos, SlotId, SwapKind, SwapMode};

use super::reports::Reports;
use super::slots::Slots;
use crate::engine::adapters::HostAdapter;
use crate::engine::executor::Completion;

/// A swap on its way.
pub(super) struct Copy {
    pub slot: SlotId,
    pub id: AdapterId,
    pub adapter: Arc<HostAdapter>,
    pub kind: SwapKind,
    next_layer: usize,
    started: Nanos,
}

impl Copy {
    pub fn new(slot: SlotId, id: AdapterId, adapter: Arc<HostAdapter>, kind: SwapKind) -> Self {
        Self { slot, id, adapter, kind, next_layer: 0, started: 0 }
    }
}

/// What the copy thread has to do. Between two layers it looks again, so that a demand passes a
/// prefetch that is under way; under `layered` demands take turns, because a step may wait for the
/// same layer of several of them.
pub(super) struct CopyQueue {
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

    /// The copy whose turn it is; none when the queue is closed and empty.
    fn next(&self) -> Option<Copy> {
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
    fn put_back(&self, copy: Copy) {
        let mut state = self.lock();
        match copy.kind {
            SwapKind::Demand if self.take_turns => state.demand.push_back(copy),
            SwapKind::Demand => state.demand.push_front(copy),
            SwapKind::Prefetch => state.prefetch.push_front(copy),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread's life.
pub(super) fn run(queue: &CopyQueue, slots: &Slots, reports: &Reports) {
    while let Some(mut copy) = queue.next() {
        if copy.next_layer == 0 {
            copy.started = reports.now();
        }
        slots.copy_layer(copy.slot, &copy.adapter, copy.next_layer);
        copy.next_layer += 1;
        if copy.next_layer < copy.adapter.layout.layers() {
            queue.put_back(copy);
        } else {
            reports.swap(Completion::Swap {
                slot: copy.slot,
                adapter: copy.id,
                started: copy.started,
                ended: reports.now(),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::adapters::HostPool;
    use crate::engine::model::preset;

    /// The order in which layers of (demand 0, demand 1, prefetch 2) are copied.
    fn order(mode: SwapMode) -> Vec<u32> {
        let spec = preset("tiny").unwrap();
        let pool = HostPool::generate(&spec, 1, 1, &[], 0).unwrap();
        let queue = CopyQueue::new(mode, 3);
        for (slot, kind) in [(2, SwapKind::Prefetch), (0, SwapKind::Demand), (1, SwapKind::Demand)] {
            queue.push(Copy::new(SlotId(slot), AdapterId(0), pool.get(AdapterId(0)).unwrap(), kind));
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
    fn demands_go_first_and_take_turns_only_when_layered() {
        assert_eq!(order(SwapMode::Layered), [0, 1, 0, 1, 0, 1, 2, 2, 2]);
        assert_eq!(order(SwapMode::Overlap), [0, 0, 0, 1, 1, 1, 2, 2, 2]);
    }
}
