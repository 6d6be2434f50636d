//! The third executor: no device and no arithmetic. A step and a swap take as long as a cost function
//! says, in real time, and tokens are a function of the request and the position.
//!
//! Copies go one after another in the order of submission. A step that starts while slots of its load
//! (`layered`) ends no earlier than one layer's share of itself after the last of those copies.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use lora_sched::{AdapterId, Nanos, RequestId, SlotId, StepPlan, SwapPlan};

use super::clock::Clock;
use super::executor::{Completion, Executor, ExecutorError, StepFeed, StepResult, TokenId, Waker};

/// How long things take.
pub trait Costs: Send {
    /// A step alone that begins at `now`, in nanoseconds.
    fn step(&mut self, plan: &StepPlan, now: Nanos) -> Nanos;
    /// A swap, in nanoseconds.
    fn swap(&mut self, swap: &SwapPlan) -> Nanos;
}

impl<S, W> Costs for (S, W)
where
    S: FnMut(&StepPlan) -> Nanos + Send,
    W: FnMut(&SwapPlan) -> Nanos + Send,
{
    fn step(&mut self, plan: &StepPlan, _: Nanos) -> Nanos {
        self.0(plan)
    }

    fn swap(&mut self, swap: &SwapPlan) -> Nanos {
        self.1(swap)
    }
}

/// Which token a request has at a position (prompt tokens included in the count).
pub type Tokens = Box<dyn FnMut(RequestId, u32) -> TokenId + Send>;

/// Sleeps end up to this late; the rest of a wait is spent yielding.
const SLEEP_SLACK: Nanos = 100_000;

/// An executor that waits.
pub struct EmulatedExecutor {
    costs: Box<dyn Costs>,
    tokens: Tokens,
    /// Layers of the model, for `layered` swaps.
    layers: u64,
    clock: Clock,
    result: StepResult,
    /// When the last submitted copy ends.
    copies_end: Nanos,
    copy_end: HashMap<SlotId, Nanos>,
    timer: Arc<Timer>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for EmulatedExecutor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmulatedExecutor").field("layers", &self.layers).finish_non_exhaustive()
    }
}

impl EmulatedExecutor {
    /// An executor of `layers` layers (at least 1) with these costs and tokens.
    ///
    /// # Errors
    /// If its thread cannot be started.
    pub fn new(
        costs: impl Costs + 'static,
        tokens: impl FnMut(RequestId, u32) -> TokenId + Send + 'static,
        layers: u32,
    ) -> Result<Self, ExecutorError> {
        let timer = Arc::new(Timer::default());
        let clock = Clock::start();
        let inner = timer.clone();
        let thread = std::thread::Builder::new()
            .name("emulated-device".into())
            .spawn(move || inner.run(clock))
            .map_err(|e| error(format!("cannot start its thread: {e}")))?;
        Ok(Self {
            costs: Box::new(costs),
            tokens: Box::new(tokens),
            layers: u64::from(layers.max(1)),
            clock,
            result: StepResult::default(),
            copies_end: 0,
            copy_end: HashMap::new(),
            timer,
            thread: Some(thread),
        })
    }
}

fn error(message: String) -> ExecutorError {
    ExecutorError { device: "emulated", message }
}

impl Executor for EmulatedExecutor {
    fn submit_step(&mut self, plan: &StepPlan, _: &StepFeed) -> Result<(), ExecutorError> {
        let now = self.clock.now();
        let cost = self.costs.step(plan, now);
        let mut ended = now + cost;
        self.result.stalled.clear();
        if !plan.wait_for_swaps {
            let copy = |slot: &SlotId| (self.copy_end.get(slot).copied().unwrap_or(0), *slot);
            if let Some((copied, slot)) = plan.loading.iter().map(copy).max() {
                let least = copied + cost / self.layers;
                if least > ended {
                    self.result.stalled.push((slot, least - ended));
                    ended = least;
                }
            }
        }
        self.result.tokens.clear();
        for seq in &plan.seqs {
            let token = seq.samples.then(|| (self.tokens)(seq.id, seq.start + seq.len));
            self.result.tokens.push(token);
        }
        self.timer.push(ended, Completion::Step { step: plan.step, started: now, ended });
        Ok(())
    }

    fn submit_swap(&mut self, swap: &SwapPlan) -> Result<(), ExecutorError> {
        let started = self.copies_end.max(self.clock.now());
        let ended = started + self.costs.swap(swap);
        self.copies_end = ended;
        self.copy_end.insert(swap.slot, ended);
        let SwapPlan { adapter, slot, .. } = *swap;
        self.timer.push(ended, Completion::Swap { slot, adapter, started, ended });
        Ok(())
    }

    fn poll(&mut self) -> Result<Option<Completion>, ExecutorError> {
        Ok(self.timer.lock().done.pop_front())
    }

    fn wait(&mut self) -> Result<Completion, ExecutorError> {
        let mut state = self.timer.lock();
        loop {
            if let Some(completion) = state.done.pop_front() {
                return Ok(completion);
            }
            if state.due.is_empty() {
                return Err(error("nothing is in flight".into()));
            }
            state = self.timer.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn step_result(&self) -> &StepResult {
        &self.result
    }

    fn set_waker(&mut self, waker: Waker) {
        self.timer.lock().waker = Some(waker);
    }

    fn clock(&self) -> Nanos {
        self.clock.now()
    }

    fn has_logits(&self) -> bool {
        false
    }

    fn preload(&mut self, _: &[AdapterId]) -> Result<(), ExecutorError> {
        Ok(())
    }
}

impl Drop for EmulatedExecutor {
    fn drop(&mut self) {
        self.timer.lock().stop = true;
        self.timer.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // The thread runs nothing that panics but the waker, whose panic is told on its own.
            let _ = thread.join();
        }
    }
}

/// Completions that are due at some time, in order of time, then of submission.
#[derive(Default)]
struct TimerState {
    due: BinaryHeap<Reverse<(Nanos, u64)>>,
    what: HashMap<u64, Completion>,
    next: u64,
    done: VecDeque<Completion>,
    waker: Option<Waker>,
    stop: bool,
}

#[derive(Default)]
struct Timer {
    state: Mutex<TimerState>,
    changed: Condvar,
}

impl Timer {
    fn lock(&self) -> MutexGuard<'_, TimerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, at: Nanos, what: Completion) {
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        state.due.push(Reverse((at, number)));
        state.what.insert(number, what);
        drop(state);
        self.changed.notify_all();
    }

    fn run(&self, clock: Clock) {
        let mut state = self.lock();
        while !state.stop {
            let Some(&Reverse((at, number))) = state.due.peek() else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = at.saturating_sub(clock.now());
            if left > SLEEP_SLACK {
                let sleep = Duration::from_nanos(left - SLEEP_SLACK);
                state = self.changed.wait_timeout(state, sleep).unwrap_or_else(PoisonError::into_inner).0;
            } else if left > 0 {
                drop(state);
                std::thread::yield_now();
                state = self.lock();
            } else {
                state.due.pop();
                let completion = state.what.remove(&number);
                state.done.extend(completion);
                let waker = state.waker.clone();
                drop(state);
                self.changed.notify_all();
                if let Some(waker) = waker {
                    waker();
                }
                state = self.lock();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lora_sched::{SeqStep, SwapKind};

    use super::*;

    const MS: Nanos = 1_000_000;

    fn plan(loading: Vec<SlotId>) -> StepPlan {
        let seq = SeqStep {
            id: RequestId(4),
            place: lora_sched::PlaceId(0),
            adapter: None,
            start: 0,
            len: 5,
            decode: false,
            samples: true,
            new_blocks: 0..0,
        };
        StepPlan { seqs: vec![seq], loading, ..StepPlan::default() }
    }

    fn swap(slot: u32) -> SwapPlan {
        let adapter = AdapterId(9);
        SwapPlan { adapter, slot: SlotId(slot), evicted: None, bytes: 1, kind: SwapKind::Demand }
    }

    #[test]
    fn a_layered_step_ends_a_layer_after_its_copy_and_says_how_long_it_waited() {
        let costs = (|_: &StepPlan| 2 * MS, |_: &SwapPlan| 100 * MS);
        let mut device = EmulatedExecutor::new(costs, |id, at| id.0 as u32 * 10 + at, 4).unwrap();
        device.submit_swap(&swap(0)).unwrap();
        device.submit_swap(&swap(1)).unwrap();
        device.submit_step(&plan(vec![SlotId(0), SlotId(1)]), &StepFeed::default()).unwrap();
        assert_eq!(device.step_result().tokens, [Some(45)]);
        let mut copies = Vec::new();
        for _ in 0..2 {
            match device.wait().unwrap() {
                Completion::Swap { started, ended, .. } => copies.push((started, ended)),
                other => panic!("{other:?} before the copies' ends"),
            }
        }
        assert_eq!(copies[1].0, copies[0].1, "one copy after the other");
        let Completion::Step { started, ended, .. } = device.wait().unwrap() else { panic!() };
        assert_eq!(ended, copies[1].1 + MS / 2);
        assert_eq!(device.step_result().stalled, [(SlotId(1), ended - started - 2 * MS)]);
        assert!(device.wait().is_err(), "nothing is in flight");
    }

    #[test]
    fn dropping_it_does_not_wait_for_what_is_in_flight() {
        let costs = (|_: &StepPlan| 3_600_000 * MS, |_: &SwapPlan| 0);
        let mut device = EmulatedExecutor::new(costs, |_, _| 0, 1).unwrap();
        device.submit_step(&plan(Vec::new()), &StepFeed::default()).unwrap();
        drop(device);
    }
}
