//! What the threads report, and the clock that they stamp it with.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use lora_sched::Nanos;

use super::compute::Job;
use crate::engine::executor::{Completion, Waker};
use crate::engine::watch::{Signal, Watch};

/// The meeting point of the executor and its threads.
pub(in crate::engine) struct Reports {
    epoch: Instant,
    state: Mutex<Reported>,
    signal: Signal,
}

pub(in crate::engine) struct Reported {
    pub swaps: VecDeque<Completion>,
    pub step: Option<(Box<Job>, Nanos, Nanos)>,
    /// Why the copy thread has stopped.
    pub failure: Option<String>,
    pub waker: Option<Waker>,
}

impl Reports {
    pub fn new(slots: usize) -> Self {
        let state =
            Reported { swaps: VecDeque::with_capacity(slots), step: None, failure: None, waker: None };
        Self { epoch: Instant::now(), state: Mutex::new(state), signal: Signal::default() }
    }

    /// Nanoseconds since the executor was made.
    pub fn now(&self) -> Nanos {
        self.epoch.elapsed().as_nanos() as Nanos
    }

    /// A swap has ended.
    pub fn swap(&self, completion: Completion) {
        let mut state = self.lock();
        state.swaps.push_back(completion);
        self.tell(state);
    }

    /// A step has ended.
    pub fn step(&self, job: Box<Job>, started: Nanos, ended: Nanos) {
        let mut state = self.lock();
        state.step = Some((job, started, ended));
        self.tell(state);
    }

    /// Swaps go on no more.
    #[cfg(feature = "cuda")]
    pub fn fail(&self, message: String) {
        let mut state = self.lock();
        state.failure = Some(message);
        self.tell(state);
    }

    fn tell(&self, state: MutexGuard<'_, Reported>) {
        let waker = state.waker.clone();
        self.signal.tell(state);
        if let Some(waker) = waker {
            waker();
        }
    }

    /// What is there to be polled.
    pub fn lock(&self) -> MutexGuard<'_, Reported> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something more is reported.
    pub fn await_more<'a>(
        &'a self,
        state: MutexGuard<'a, Reported>,
        watch: Watch,
    ) -> MutexGuard<'a, Reported> {
        self.signal.wait(&self.state, state, watch.looks())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lora_sched::{AdapterId, SlotId};

    #[test]
    fn every_report_ends_a_wait_looked_for_or_asleep() {
        for watch in [Watch::Sleep, Watch::Look] {
            let reports = Reports::new(4);
            let swap = |slot| Completion::Swap {
                slot: SlotId(slot),
                adapter: AdapterId(slot),
                started: 0,
                ended: 1,
            };
            std::thread::scope(|threads| {
                threads.spawn(|| (0..100).for_each(|slot| reports.swap(swap(slot))));
                let mut slots = Vec::new();
                let mut state = reports.lock();
                while slots.len() < 100 {
                    match state.swaps.pop_front() {
                        Some(Completion::Swap { slot, .. }) => slots.push(slot.0),
                        Some(other) => panic!("{watch:?}: {other:?}"),
                        None => state = reports.await_more(state, watch),
                    }
                }
                drop(state);
                assert_eq!(slots, (0..100).collect::<Vec<_>>(), "{watch:?}");
            });
        }
    }
}
