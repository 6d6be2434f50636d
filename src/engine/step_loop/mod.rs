//! The step loop: the thread that owns the scheduler and the executor.
//!
//! One turn: take what the executor has completed (tokens go out first), then what has arrived by then,
//! then plan, then submit. Every event gets its own time, so that a log of them replays in order.

mod active;
mod adapters;
mod mailbox;
mod record;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use lora_sched::{
    AdapterId, Ended, Event, EventError, Nanos, Notice, Outbox, RequestId, Scheduler, SlotId, StepPlan,
    SwapPlan,
};

pub(super) use active::{Active, Submission};
pub(super) use adapters::Change;
use adapters::OpenFetch;
pub(super) use mailbox::Mailbox;
use mailbox::{Message, numbered};
use record::Recorder;

use super::adapters::{Directory, HostPool};
use super::channel::Sender;
use super::clock::Clock;
use super::executor::{Completion, Executor, ExecutorError, StepFeed, TokenId};
use super::fetcher::Fetcher;
use super::gauges::Gauges;
use super::life::Reply;
use super::output::{OutItem, OutQueue, OutState};
use crate::report::decision_log::DecisionLog;

/// Why a step loop has ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// The device failed.
    #[error(transparent)]
    Executor(#[from] ExecutorError),
    /// The scheduler refused what the executor reported: one of the two is wrong.
    #[error("the scheduler does not take what the executor reports: {0}")]
    Scheduler(#[from] EventError),
    /// A completion of something that was not submitted.
    #[error("the executor completed {0}, which was not submitted")]
    Unexpected(String),
}

/// A step that has been planned.
#[derive(Clone, Copy, Debug)]
struct Flight {
    formed: Nanos,
    /// None while it waits for swaps.
    submitted: Option<Nanos>,
}

/// A swap that the executor has.
#[derive(Clone, Copy, Debug)]
struct OpenSwap {
    plan: SwapPlan,
    decided: Nanos,
    submitted: Nanos,
}

/// Everything that the loop's thread owns.
pub(super) struct StepLoop {
    scheduler: Scheduler,
    executor: Box<dyn Executor>,
    clock: Clock,
    mailbox: Arc<Mailbox>,
    outputs: Arc<OutQueue>,
    gauges: Arc<Gauges>,
    recorder: Recorder,
    /// Ends of sequence.
    eos: Vec<TokenId>,
    active: HashMap<RequestId, Active>,
    plan: StepPlan,
    feed: StepFeed,
    outbox: Outbox,
    flight: Option<Flight>,
    /// Slots that the planned step still waits for before it may be submitted.
    awaited: Vec<SlotId>,
    swaps: Vec<OpenSwap>,
    directory: Arc<Directory>,
    /// None where nothing is computed.
    pool: Option<Arc<HostPool>>,
    /// None where host memory holds all.
    fetcher: Option<Fetcher>,
    fetches: Vec<OpenFetch>,
    /// Who is to be told when an adapter has gone.
    leaving: Vec<(AdapterId, Sender<Reply>)>,
    /// What callers are told at the end of the turn.
    replies: Vec<(Sender<Reply>, Reply)>,
    stopped: Vec<u32>,
    items: Vec<OutItem>,
    inbox: Vec<Message>,
    last: Nanos,
}

/// What [`StepLoop::new`] is made of.
pub(super) struct LoopParts {
    pub(super) scheduler: Scheduler,
    pub(super) executor: Box<dyn Executor>,
    pub(super) clock: Clock,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) outputs: Arc<OutQueue>,
    pub(super) gauges: Arc<Gauges>,
    pub(super) directory: Arc<Directory>,
    pub(super) pool: Option<Arc<HostPool>>,
    pub(super) fetcher: Option<Fetcher>,
    pub(super) log: Option<DecisionLog>,
    pub(super) eos: Vec<TokenId>,
}

impl StepLoop {
    pub(super) fn new(parts: LoopParts) -> Self {
        let LoopParts { scheduler, executor, clock, mailbox, outputs, gauges, directory, pool, .. } = parts;
        let LoopParts { fetcher, log, eos, .. } = parts;
        Self {
            scheduler,
            executor,
            clock,
            mailbox,
            outputs,
            gauges,
            recorder: Recorder::new(log),
            eos,
            active: HashMap::new(),
            plan: StepPlan::default(),
            feed: StepFeed::default(),
            outbox: Outbox::default(),
            flight: None,
            awaited: Vec::new(),
            swaps: Vec::new(),
            directory,
            pool,
            fetcher,
            fetches: Vec::new(),
            leaving: Vec::new(),
            replies: Vec::new(),
            stopped: Vec::new(),
            items: Vec::new(),
            inbox: Vec::new(),
            last: 0,
        }
    }

    /// Runs until the mailbox says stop or something fails, which `failed` is told of; requests still there are aborted.
    pub(super) fn run(mut self, failed: impl FnOnce(LoopError)) {
        // Who is aborted, or comes from now on, is to find the reason, however long it takes to give the device back.
        if let Err(e) = self.turns() {
            failed(e);
        }
        for message in self.mailbox.close() {
            if let Message::Submit(first, together) = message {
                self.items.extend(numbered(first, together).map(|(id, s)| OutItem::Open(id, s.out)));
            }
        }
        self.recorder.flush();
        self.items.push(OutItem::AbortAll);
        self.outputs.push(&mut self.items);
    }

    fn turns(&mut self) -> Result<(), LoopError> {
        let mut inbox = std::mem::take(&mut self.inbox);
        self.publish();
        while self.mailbox.wait(&mut inbox, self.executor.is_watched()) {
            while let Some(completion) = self.executor.poll()? {
                match completion {
                    Completion::Step { step, started, ended } => self.step_done(step, started, ended)?,
                    Completion::Swap { slot, started, ended, .. } => self.swap_done(slot, started, ended)?,
                }
            }
            self.mailbox.take(&mut inbox);
            for message in inbox.drain(..) {
                self.message(message)?;
            }
            if self.flight.is_none() {
                self.plan()?;
            }
            self.publish();
            self.outputs.push(&mut self.items);
            self.recorder.flush();
            self.reply();
        }
        Ok(())
    }

    /// The next event's time: the clock's, but later than the last one's.
    fn tick(&mut self) -> Nanos {
        self.last = self.clock.now().max(self.last + 1);
        self.last
    }

    fn message(&mut self, message: Message) -> Result<(), LoopError> {
        let t = self.tick();
        match message {
            // Each of them is an event with a time of its own.
            Message::Submit(first, together) => return self.submitted(first, together),
            Message::Cancel(id) | Message::StopFound(id) => {
                // A cancel may cross the request's own end.
                let Some(active) = self.active.get_mut(&id) else { return Ok(()) };
                active.stop_found |= !active.cancelled && matches!(message, Message::StopFound(_));
                active.cancelled = true;
                self.recorder.cancel(t, id);
                self.scheduler.handle(t, Event::Cancel(id), &mut self.outbox)?;
            }
            Message::Change(change) => self.change(t, change),
            Message::Fetched(fetched) => self.fetched(t, fetched)?,
        }
        self.settle(t)
    }

    /// Takes requests into the queue: all of them, or none where it has no room for all.
    fn submitted(&mut self, first: RequestId, together: Vec<Submission>) -> Result<(), LoopError> {
        let max_queue = self.scheduler.config().max_queue;
        // One alone is the scheduler's to refuse, which the log then tells of.
        if together.len() > 1 && self.scheduler.waiting().saturating_add(together.len()) > max_queue {
            for Submission { out, .. } in together {
                self.refuse(out, EventError::QueueFull { max_queue });
            }
            return Ok(());
        }
        for (id, submission) in numbered(first, together) {
            let t = self.tick();
            self.arrive(t, id, submission);
            self.settle(t)?;
        }
        Ok(())
    }

    fn arrive(&mut self, t: Nanos, id: RequestId, submission: Submission) {
        let Submission { active, out } = submission;
        let arrival = active.arrival(id, t);
        let hit = arrival.adapter.is_some_and(|a| self.scheduler.slot_of(a).is_some());
        let taken = self.scheduler.handle(t, Event::Arrive(arrival), &mut self.outbox);
        self.recorder.arrive(t, &arrival, taken.as_ref().err());
        if let Err(error) = taken {
            return self.refuse(out, error);
        }
        self.gauges.accepted.fetch_add(1, Relaxed);
        self.gauges.prompt_tokens.fetch_add(arrival.prompt_tokens.into(), Relaxed);
        if let Some(adapter) = arrival.adapter {
            self.directory.arrived(adapter, t, hit);
        }
        self.active.insert(id, active);
        self.items.push(OutItem::Open(id, out));
    }

    fn refuse(&mut self, out: Box<OutState>, error: EventError) {
        // What cannot be served at any time is no sign of overload.
        if matches!(error, EventError::QueueFull { .. }) {
            self.gauges.refused.fetch_add(1, Relaxed);
        }
        self.items.push(OutItem::Refuse(out, error));
    }

    fn step_done(&mut self, step: u64, started: Nanos, ended: Nanos) -> Result<(), LoopError> {
        let Some(Flight { formed, submitted: Some(submitted) }) = self.flight.take() else {
            return Err(LoopError::Unexpected(format!("step {step}")));
        };
        let result = self.executor.step_result();
        self.stopped.clear();
        let mut generated = 0;
        for (i, seq) in self.plan.seqs.iter().enumerate() {
            let Some(token) = result.tokens.get(i).copied().flatten() else { continue };
            let Some(active) = self.active.get_mut(&seq.id).filter(|a| !a.cancelled) else { continue };
            generated += 1;
            let ends = active.push(token, &self.eos);
            if ends {
                self.stopped.push(i as u32);
            }
            // A handful at most, and none where nobody asks.
            let told = result.logprobs.iter().find(|(of, _)| *of == i as u32);
            let logprobs = told.map(|(_, logprobs)| logprobs.clone());
            self.items.push(OutItem::Token { id: seq.id, token, silent: ends, logprobs });
        }
        let t = self.clock.now().max(self.last + 1);
        self.last = t;
        let event = Event::StepDone { stopped: &self.stopped, stalled: &result.stalled };
        self.scheduler.handle(t, event, &mut self.outbox)?;
        self.recorder.step_done(t, step, &self.stopped, &result.stalled);
        let (started, ended) = between(submitted, started, ended, t);
        self.recorder.step(&self.plan, [formed, submitted, started, ended, t]);
        self.gauges.steps.fetch_add(1, Relaxed);
        self.gauges.generation_tokens.fetch_add(generated, Relaxed);
        self.settle(t)?;
        // Who has its answer sees an engine that has given it.
        if self.items.iter().any(|item| matches!(item, OutItem::Ended { .. })) {
            self.publish();
        }
        self.outputs.push(&mut self.items);
        Ok(())
    }

    fn swap_done(&mut self, slot: SlotId, started: Nanos, ended: Nanos) -> Result<(), LoopError> {
        let t = self.tick();
        let Some(at) = self.swaps.iter().position(|s| s.plan.slot == slot) else {
            return Err(LoopError::Unexpected(format!("a swap into slot {slot}")));
        };
        let OpenSwap { plan, decided, submitted } = self.swaps.remove(at);
        self.scheduler.handle(t, Event::SwapDone(slot), &mut self.outbox)?;
        let (started, ended) = between(submitted, started, ended, t);
        self.recorder.swap_done(t, &plan, [decided, submitted, started, ended]);
        self.gauges.swap_ended(&plan, t - submitted);
        self.directory.swapped(plan.adapter);
        self.directory.publish(self.scheduler.slots());
        self.settle(t)?;
        self.awaited.retain(|&s| s != slot);
        self.submit_if_ready()
    }

    /// Forms the next step and starts it.
    fn plan(&mut self) -> Result<(), LoopError> {
        let t = self.tick();
        self.plan.clear();
        let formed = self.scheduler.plan(t, &mut self.plan, &mut self.outbox);
        self.settle(t)?;
        if !formed {
            debug_assert_eq!(self.scheduler.audit(), Ok(()));
            self.recorder.idle(t);
            return Ok(());
        }
        self.flight = Some(Flight { formed: t, submitted: None });
        self.awaited.clear();
        if self.plan.wait_for_swaps {
            self.awaited.extend_from_slice(&self.plan.loading);
        }
        self.submit_if_ready()
    }

    /// Submits the planned step once every swap that it waits for has ended.
    fn submit_if_ready(&mut self) -> Result<(), LoopError> {
        if !matches!(self.flight, Some(Flight { submitted: None, .. })) || !self.awaited.is_empty() {
            return Ok(());
        }
        self.feed.clear();
        for seq in &self.plan.seqs {
            // A request cancelled while its step waited for a swap still has its share of the step,
            // so its bookkeeping lives until the scheduler says that it has ended.
            let Some(active) = self.active.get(&seq.id) else {
                return Err(LoopError::Unexpected(format!("a plan of ended request {}", seq.id)));
            };
            active.feed(seq, &mut self.feed);
        }
        let submitted = self.clock.now();
        self.executor.submit_step(&self.plan, &self.feed)?;
        if let Some(flight) = &mut self.flight {
            flight.submitted = Some(submitted);
        }
        Ok(())
    }

    /// Acts on what the scheduler put out: starts swaps, passes news on.
    fn settle(&mut self, t: Nanos) -> Result<(), LoopError> {
        if !self.outbox.swaps.is_empty() {
            self.executor.plan_swaps();
        }
        for plan in &self.outbox.swaps {
            self.swaps.push(OpenSwap { plan: *plan, decided: t, submitted: self.clock.now() });
            self.executor.submit_swap(plan)?;
        }
        if !self.outbox.swaps.is_empty() {
            self.gauges.swaps_begun(self.outbox.swaps.len() as u64);
            self.directory.publish(self.scheduler.slots());
        }
        self.start_fetches(t)?;
        let notices = std::mem::take(&mut self.outbox.notices);
        for notice in &notices {
            match *notice {
                Notice::FirstToken { id, parts } => {
                    self.recorder.first(t, id, &parts);
                    self.gauges.first_token(&parts);
                    self.items.push(OutItem::First { id, parts, at: t });
                }
                Notice::Ended { id, why, .. } => {
                    self.recorder.ended(t, id, why);
                    let ended = self.active.remove(&id);
                    let count = match why {
                        Ended::Cancelled if ended.as_ref().is_some_and(|a| a.stop_found) => {
                            &self.gauges.finished_stop
                        }
                        Ended::Stop => &self.gauges.finished_stop,
                        Ended::Length => &self.gauges.finished_length,
                        Ended::Cancelled => &self.gauges.cancelled,
                        Ended::Failed => &self.gauges.failed,
                    };
                    count.fetch_add(1, Relaxed);
                    self.items.push(match why {
                        Ended::Failed => {
                            let adapter = ended.and_then(|a| a.adapter);
                            let why = adapter.and_then(|a| self.directory.failure(a));
                            OutItem::Failed {
                                id,
                                why: why.unwrap_or_else(|| "its adapter is not there".into()),
                            }
                        }
                        why => OutItem::Ended { id, why },
                    });
                }
                Notice::Preempted { id, .. } => {
                    self.recorder.preempted(t, id);
                    self.gauges.preempted.fetch_add(1, Relaxed);
                }
                Notice::AdapterGone(adapter) => self.adapter_gone(t, adapter),
            }
        }
        self.outbox.notices = notices;
        self.outbox.clear();
        Ok(())
    }

    fn publish(&self) {
        self.gauges.waiting.store(self.scheduler.waiting() as u64, Relaxed);
        self.gauges.running.store(self.scheduler.running() as u64, Relaxed);
        self.gauges.kv_used.store(self.scheduler.kv_used() as u64, Relaxed);
        self.gauges.kv_total.store(self.scheduler.kv_total() as u64, Relaxed);
        self.gauges.places_used.store(self.scheduler.places_used() as u64, Relaxed);
        self.gauges.pins.store(self.scheduler.slots().map(|s| u64::from(s.pins)).sum(), Relaxed);
        self.gauges.swaps_open.store(self.swaps.len() as u64, Relaxed);
        self.gauges.tracked.store(self.active.len() as u64, Relaxed);
        self.directory.publish(self.scheduler.slots());
    }
}

/// Times of the device, which the two clocks' offset may put some nanoseconds outside what the loop saw.
fn between(submitted: Nanos, started: Nanos, ended: Nanos, done: Nanos) -> (Nanos, Nanos) {
    (started.clamp(submitted, done), ended.clamp(submitted, done))
}
