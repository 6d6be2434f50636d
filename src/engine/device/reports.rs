//! What the threads report, and the clock that they stamp it with.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use lora_sched::Nanos;

use super::compute::Job;
use crate::engine::executor::{Completion, Waker};

/// The meeting point of the executor and its threads.
pub(in crate::engine) struct Reports {
    epoch: Instant,
    state: Mutex<Reported>,
    signal: Condvar,
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
        Self { epoch: Instant::now(), state: Mutex::new(state), signal: Condvar::new() }
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
        drop(state);
        self.signal.notify_all();
        if let Some(waker) = waker {
            waker();
        }
    }

    /// What is there to be polled.
    pub fn lock(&self) -> MutexGuard<'_, Reported> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps until something more is reported.
    pub fn sleep<'a>(&self, state: MutexGuard<'a, Reported>) -> MutexGuard<'a, Reported> {
        self.signal.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}
