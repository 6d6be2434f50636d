//! The event loop.
//!
//! One engine needs no heap: the next event is the least of the next input, the next completion and
//! the next plan. At one instant inputs come first, then a step's end, then swaps' ends, then the
//! plan; nothing else breaks ties, so a run depends on its inputs alone.

use std::collections::VecDeque;

use lora_sched::{
    AdapterId, AdapterSpec, Arrival, Event, EventError, FetchPlan, Nanos, Notice, Outbox, Parts, RequestId,
    Scheduler, StepPlan, SwapPlan,
};

use super::device::{Device, Done};

/// A request as the simulator takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimRequest {
    /// Its number in the trace.
    pub id: u64,
    /// When it reaches the server.
    pub received: Nanos,
    /// When it reaches the queue: later than `received` by the front end's time.
    pub queued: Nanos,
    /// The adapter; none is the base model.
    pub adapter: Option<u32>,
    /// Prompt length.
    pub prompt_tokens: u32,
    /// Output length.
    pub output_tokens: u32,
}

/// Something that comes from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// A request, at its `queued` time.
    Arrive(SimRequest),
    /// The client of the `n`-th arrival (counted from 0) has gone.
    Cancel {
        /// When.
        at: Nanos,
        /// Which.
        arrival: u64,
    },
    /// Something happens to an adapter.
    Adapter {
        /// When.
        at: Nanos,
        /// What.
        change: AdapterChange,
    },
}

/// What happens to an adapter from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdapterChange {
    /// A new one, under the next id.
    Add(AdapterSpec),
    /// No new requests for it.
    Remove(AdapterId),
    /// The user's pin.
    Pin(AdapterId, bool),
}

impl Input {
    /// When it comes.
    pub fn at(&self) -> Nanos {
        match self {
            Self::Arrive(request) => request.queued,
            Self::Cancel { at, .. } | Self::Adapter { at, .. } => *at,
        }
    }
}

/// What became of a request that ran to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The request.
    pub request: SimRequest,
    /// Which arrival it was, from 0.
    pub arrival: u64,
    /// When its first token was there.
    pub first: Nanos,
    /// When its last token was there.
    pub last: Nanos,
    /// Where the time from `received` to `first` went.
    pub parts: Parts,
}

/// Who is told what the simulator does. Requests' ids in plans count arrivals from 0.
pub trait Observer {
    /// Whether it must see each step and each sequence in it. Otherwise plans are outlines, and steps that
    /// only bring the same sequences a token further may be run through at once (`Device::skip`); nothing
    /// else comes out differently.
    const EVERY_STEP: bool = false;

    /// A request has ended, not cancelled.
    fn outcome(&mut self, _outcome: &Outcome) {}
    /// A step is formed. Without [`Observer::EVERY_STEP`] not each of them is told of, nor who decodes in it.
    fn step(&mut self, _plan: &StepPlan) {}
    /// A swap is started.
    fn swap(&mut self, _now: Nanos, _swap: &SwapPlan) {}
    /// A read from disk is started.
    fn fetch(&mut self, _now: Nanos, _fetch: &FetchPlan) {}
    /// An event has been taken or a plan formed, and this is how things stand.
    fn state(&mut self, _now: Nanos, _scheduler: &Scheduler) {}
}

/// Collects outcomes in order of their ends.
impl Observer for Vec<Outcome> {
    fn outcome(&mut self, outcome: &Outcome) {
        self.push(*outcome);
    }
}

/// Sums over a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Requests that ended, not cancelled.
    pub requests: u64,
    /// Requests that the scheduler refused.
    pub refused: u64,
    /// Steps.
    pub steps: u64,
    /// Events at which at least one swap started.
    pub swap_calls: u64,
    /// Swaps started.
    pub swaps: u64,
    /// Requests that lost their blocks and were computed anew.
    pub preemptions: u64,
    /// Time with a step in flight.
    pub busy: Nanos,
    /// The last event.
    pub end: Nanos,
}

/// The time of what does not come. A plain number: the loop compares three of them at each event.
const NEVER: Nanos = Nanos::MAX;

/// A request that is in the scheduler.
#[derive(Clone, Copy, Debug)]
struct Live {
    request: SimRequest,
    first: Nanos,
    parts: Parts,
}

struct Run<'a, D, O> {
    scheduler: &'a mut Scheduler,
    device: &'a mut D,
    observer: &'a mut O,
    now: Nanos,
    plan: StepPlan,
    out: Outbox,
    /// When the scheduler is asked for the next plan.
    plan_at: Nanos,
    /// Swaps that the formed step waits for before it is submitted.
    awaited: usize,
    submitted: Nanos,
    /// The arrivals from `first_live` on; ended ones are none.
    live: VecDeque<Option<Live>>,
    first_live: u64,
    totals: Totals,
}

/// Runs `inputs` (in order of time) through the scheduler to the end of the last request.
///
/// # Errors
///
/// A request that the scheduler refuses is counted and left out. Any other [`EventError`] means that
/// the device broke its contract.
pub fn run<D: Device, O: Observer>(
    scheduler: &mut Scheduler,
    device: &mut D,
    inputs: impl IntoIterator<Item = Input>,
    observer: &mut O,
) -> Result<Totals, EventError> {
    let mut run = Run {
        scheduler,
        device,
        observer,
        now: 0,
        plan: if O::EVERY_STEP { StepPlan::default() } else { StepPlan::outlined() },
        out: Outbox::default(),
        plan_at: NEVER,
        awaited: 0,
        submitted: 0,
        live: VecDeque::new(),
        first_live: 0,
        totals: Totals::default(),
    };
    let mut inputs = inputs.into_iter().peekable();
    loop {
        let input_at = inputs.peek().map_or(NEVER, Input::at);
        let (done_at, done) = run.device.next().unwrap_or((NEVER, Done::Step));
        let next = input_at.min(done_at).min(run.plan_at);
        if next == NEVER {
            break;
        }
        run.now = run.now.max(next);
        if input_at == next {
            if let Some(input) = inputs.next() {
                run.input(&input)?;
            }
        } else if done_at == next {
            run.complete(done)?;
        } else {
            run.form_step(input_at);
        }
        run.observer.state(run.now, run.scheduler);
    }
    run.totals.end = run.now;
    Ok(run.totals)
}

impl<D: Device, O: Observer> Run<'_, D, O> {
    fn input(&mut self, input: &Input) -> Result<(), EventError> {
        match *input {
            Input::Arrive(request) => {
                let id = RequestId(self.first_live + self.live.len() as u64);
                let arrival = Arrival {
                    id,
                    adapter: request.adapter.map(AdapterId),
                    received: request.received,
                    prompt_tokens: request.prompt_tokens,
                    max_tokens: request.output_tokens,
                };
                let taken = self.scheduler.handle(self.now, Event::Arrive(arrival), &mut self.out);
                let live = match taken {
                    Ok(()) => Some(Live { request, first: 0, parts: Parts::default() }),
                    Err(_) => {
                        self.totals.refused += 1;
                        None
                    }
                };
                self.live.push_back(live);
            }
            Input::Cancel { arrival, .. } => {
                self.scheduler.handle(self.now, Event::Cancel(RequestId(arrival)), &mut self.out)?;
            }
            Input::Adapter { change, .. } => {
                let event = match change {
                    AdapterChange::Add(spec) => Event::AddAdapter(spec),
                    AdapterChange::Remove(adapter) => Event::RemoveAdapter(adapter),
                    AdapterChange::Pin(adapter, pinned) => Event::PinAdapter(adapter, pinned),
                };
                self.scheduler.handle(self.now, event, &mut self.out)?;
            }
        }
        self.after_event();
        Ok(())
    }

    fn complete(&mut self, done: Done) -> Result<(), EventError> {
        self.device.complete(self.now, done);
        match done {
            Done::Step => {
                self.totals.busy += self.now - self.submitted;
                let event = Event::StepDone { stopped: &[], stalled: self.device.stalled() };
                self.scheduler.handle(self.now, event, &mut self.out)?;
            }
            Done::Fetch { adapter, failed } => {
                self.scheduler.handle(self.now, Event::FetchDone { adapter, failed }, &mut self.out)?;
            }
            Done::Swap(slot) => {
                self.scheduler.handle(self.now, Event::SwapDone(slot), &mut self.out)?;
                if self.awaited > 0 && self.plan.loading.contains(&slot) {
                    self.awaited -= 1;
                    if self.awaited == 0 {
                        self.submit_step();
                    }
                }
            }
        }
        self.after_event();
        Ok(())
    }

    fn form_step(&mut self, input_at: Nanos) {
        self.plan_at = NEVER;
        let formed = self.scheduler.plan(self.now, &mut self.plan, &mut self.out);
        self.submit_swaps();
        if formed {
            self.totals.steps += 1;
            self.observer.step(&self.plan);
            self.awaited = if self.plan.wait_for_swaps { self.plan.loading.len() } else { 0 };
            if self.awaited == 0 {
                self.submit_step();
                if !O::EVERY_STEP && self.device.may_skip(input_at) {
                    self.skip(input_at);
                }
            }
        }
        self.take_notices();
    }

    fn submit_step(&mut self) {
        self.submitted = self.now;
        self.device.submit_step(self.now, &self.plan);
    }

    /// Runs through the steps that are sure to follow the one in flight before the next input.
    fn skip(&mut self, input_at: Nanos) {
        let Some(run) = self.scheduler.steady() else { return };
        let skipped = self.device.skip(run.steps, input_at, run.until);
        if skipped.steps > 0 {
            self.scheduler.skip(skipped.steps, skipped.formed);
            self.totals.steps += skipped.steps;
            self.totals.busy += skipped.busy;
            self.now = skipped.formed;
            self.submitted = skipped.formed;
        }
    }

    fn submit_swaps(&mut self) {
        if self.out.swaps.is_empty() && self.out.fetches.is_empty() {
            return;
        }
        self.totals.swap_calls += u64::from(!self.out.swaps.is_empty());
        self.totals.swaps += self.out.swaps.len() as u64;
        for swap in self.out.swaps.drain(..) {
            self.observer.swap(self.now, &swap);
            self.device.submit_swap(self.now, &swap);
        }
        for fetch in self.out.fetches.drain(..) {
            self.observer.fetch(self.now, &fetch);
            self.device.submit_fetch(self.now, &fetch);
        }
    }

    fn after_event(&mut self) {
        self.submit_swaps();
        self.take_notices();
        if !self.scheduler.step_in_flight() && self.plan_at == NEVER && !self.scheduler.is_idle() {
            self.plan_at = self.now + self.device.gap();
        }
    }

    fn take_notices(&mut self) {
        if self.out.notices.is_empty() && !matches!(self.live.front(), Some(None)) {
            return;
        }
        let now = self.now;
        for notice in self.out.notices.drain(..) {
            match notice {
                Notice::FirstToken { id, parts } => {
                    if let Some(Some(live)) = self.live.get_mut((id.0 - self.first_live) as usize) {
                        live.first = now;
                        live.parts = parts;
                    }
                }
                Notice::Ended { id, why, .. } => {
                    let entry = self.live.get_mut((id.0 - self.first_live) as usize);
                    if let Some(Live { request, first, parts }) = entry.and_then(Option::take)
                        && !matches!(why, lora_sched::Ended::Cancelled | lora_sched::Ended::Failed)
                    {
                        self.totals.requests += 1;
                        self.observer.outcome(&Outcome { request, arrival: id.0, first, last: now, parts });
                    }
                }
                Notice::Preempted { .. } => self.totals.preemptions += 1,
                Notice::AdapterGone(_) => {}
            }
        }
        while let Some(None) = self.live.front() {
            self.live.pop_front();
            self.first_live += 1;
        }
    }
}
