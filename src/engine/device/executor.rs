//! The executor: a compute thread and a copy thread behind `submit` and `wait`.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use lora_sched::{AdapterId, Nanos, SlotId, StepPlan, SwapMode, SwapPlan};

use super::compute::Job;
use super::copies::{Copy, CopyQueue};
use super::reports::{Reported, Reports};
use crate::engine::adapters::{AdapterLayout, HostAdapter, HostPool};
use crate::engine::batch::{Batch, BatchLimits};
use crate::engine::executor::{Completion, Executor, ExecutorError, StepFeed, StepResult, Waker};
use crate::engine::watch::Watch;

/// The adapter slots of a device.
pub(in crate::engine) trait SlotMemory: Send + Sync {
    /// Slots.
    fn len(&self) -> usize;

    /// Says what is about to be copied; until its layers land the slot holds nothing to read.
    fn begin(&self, slot: SlotId, adapter: AdapterId, layout: &Arc<AdapterLayout>);

    /// Copies a whole adapter and waits for it.
    fn copy_whole(&self, slot: SlotId, adapter: &HostAdapter) -> Result<(), String>;
}

/// The life of a compute thread.
type ComputeLife = Box<dyn FnOnce(Receiver<Box<Job>>, &Reports) + Send>;
/// The life of a copy thread.
type CopyLife = Box<dyn FnOnce(&CopyQueue, &Reports) + Send>;

/// What an executor of one device is made of.
pub(in crate::engine) struct Parts {
    /// The device, for messages.
    pub device: &'static str,
    /// Size of the vocabulary.
    pub vocab: usize,
    /// The adapters, in the slabs that the device copies from.
    pub adapters: Arc<HostPool>,
    /// The slots.
    pub slots: Arc<dyn SlotMemory>,
    /// The largest step.
    pub limits: BatchLimits,
    /// The order of copies.
    pub swap_mode: SwapMode,
    /// Keep each step's logits.
    pub keep_logits: bool,
    /// Whether who waits for a completion keeps looking.
    pub watch: Watch,
    /// Runs steps.
    pub compute: ComputeLife,
    /// Runs copies.
    pub copy: CopyLife,
}

/// Steps and swaps on a device.
pub struct DeviceExecutor {
    device: &'static str,
    vocab: usize,
    adapters: Arc<HostPool>,
    slots: Arc<dyn SlotMemory>,
    reports: Arc<Reports>,
    copies: Arc<CopyQueue>,
    steps: Option<SyncSender<Box<Job>>>,
    threads: Vec<JoinHandle<()>>,
    /// Here while no step is in flight.
    job: Option<Box<Job>>,
    result: StepResult,
    /// `[slots]` whether the step in flight reads the slot.
    read_by_step: Vec<bool>,
    swaps_in_flight: usize,
    watch: Watch,
    /// Swaps submitted under one number were decided at once.
    decision: u64,
}

impl DeviceExecutor {
    /// Starts the threads.
    pub(in crate::engine) fn start(parts: Parts) -> std::io::Result<Self> {
        let Parts { device, vocab, adapters, slots, limits, swap_mode, watch, compute, copy, .. } = parts;
        let reports = Arc::new(Reports::new(slots.len()));
        let copies = Arc::new(CopyQueue::new(swap_mode, slots.len()));
        let kept = if parts.keep_logits { limits.max_num_seqs * vocab } else { 0 };
        let job = Job {
            step: 0,
            batch: Batch::new(limits),
            begins: Vec::with_capacity(limits.max_num_seqs),
            result: StepResult::default(),
            logits: Vec::with_capacity(kept),
            failure: None,
        };
        let (steps, inbox) = sync_channel(1);
        let threads = vec![
            std::thread::Builder::new().name("compute".into()).spawn({
                let reports = Arc::clone(&reports);
                move || compute(inbox, &reports)
            })?,
            std::thread::Builder::new().name("copy".into()).spawn({
                let (copies, reports) = (Arc::clone(&copies), Arc::clone(&reports));
                move || copy(&copies, &reports)
            })?,
        ];
        Ok(Self {
            device,
            vocab,
            read_by_step: vec![false; slots.len()],
            adapters,
            slots,
            reports,
            copies,
            steps: Some(steps),
            threads,
            job: Some(Box::new(job)),
            result: StepResult::default(),
            swaps_in_flight: 0,
            watch,
            decision: 0,
        })
    }

    /// The logits `[vocab]` from which the last completed step sampled for sequence `index` of its
    /// plan, before penalties and bans; none if it sampled nothing there or logits are not kept.
    pub fn logits(&self, index: usize) -> Option<&[f32]> {
        let job = self.job.as_ref()?;
        let row = job.batch.sample_plan.iter().position(|i| *i as usize == index)?;
        job.logits.get(row * self.vocab..(row + 1) * self.vocab)
    }

    fn is_busy(&self) -> bool {
        self.job.is_none() || self.swaps_in_flight > 0
    }

    fn error(&self, message: impl Into<String>) -> ExecutorError {
        ExecutorError { device: self.device, message: message.into() }
    }

    fn take(&mut self, state: &mut Reported) -> Result<Option<Completion>, ExecutorError> {
        if let Some(message) = &state.failure {
            return Err(self.error(message));
        }
        if let Some(swap) = state.swaps.pop_front() {
            self.swaps_in_flight -= 1;
            return Ok(Some(swap));
        }
        let Some((mut job, started, ended)) = state.step.take() else { return Ok(None) };
        let step = job.step;
        std::mem::swap(&mut self.result, &mut job.result);
        let failure = job.failure.take();
        self.job = Some(job);
        self.read_by_step.fill(false);
        match failure {
            Some(message) => Err(self.error(message)),
            None => Ok(Some(Completion::Step { step, started, ended })),
        }
    }
}

impl Executor for DeviceExecutor {
    fn submit_step(&mut self, plan: &StepPlan, feed: &StepFeed) -> Result<(), ExecutorError> {
        let Some(mut job) = self.job.take() else { return Err(self.error("a step is in flight already")) };
        job.step = plan.step;
        if let Err(e) = job.batch.build(plan, feed) {
            self.job = Some(job);
            return Err(self.error(e.to_string()));
        }
        job.begins.clear();
        job.begins.extend(feed.begins.iter().map(|(place, how)| (place.0, how.clone())));
        job.result.tokens.clear();
        job.result.tokens.resize(plan.seqs.len(), None);
        job.result.logprobs.clear();
        job.result.stalled.clear();
        job.logits.clear();
        let (slots, batch) = (self.slots.len(), &job.batch);
        let named = batch.segments.iter().map(|segment| segment.slot).chain(batch.loading.iter().copied());
        if let Some(slot) = named.clone().find(|slot| slot.0 as usize >= slots) {
            self.job = Some(job);
            return Err(self.error(format!("slot {slot} of {slots}")));
        }
        for slot in named {
            self.read_by_step[slot.0 as usize] = true;
        }
        let steps = self.steps.as_ref().ok_or_else(|| self.error("the executor is shutting down"))?;
        steps.send(job).map_err(|_| self.error("the compute thread has ended"))
    }

    fn plan_swaps(&mut self) {
        self.decision += 1;
    }

    fn submit_swap(&mut self, swap: &SwapPlan) -> Result<(), ExecutorError> {
        match self.read_by_step.get(swap.slot.0 as usize) {
            None => return Err(self.error(format!("slot {} of {}", swap.slot, self.slots.len()))),
            Some(true) => {
                return Err(self.error(format!("swap into slot {}, which the running step reads", swap.slot)));
            }
            Some(false) => {}
        }
        let adapter = self
            .adapters
            .get(swap.adapter)
            .ok_or_else(|| self.error(format!("adapter {} is not in host memory", swap.adapter)))?;
        self.slots.begin(swap.slot, swap.adapter, &adapter.layout);
        self.swaps_in_flight += 1;
        self.copies.push(Copy::new(swap, adapter, self.decision));
        Ok(())
    }

    fn poll(&mut self) -> Result<Option<Completion>, ExecutorError> {
        let reports = Arc::clone(&self.reports);
        let mut state = reports.lock();
        self.take(&mut state)
    }

    fn wait(&mut self) -> Result<Completion, ExecutorError> {
        let reports = Arc::clone(&self.reports);
        let mut state = reports.lock();
        loop {
            if let Some(completion) = self.take(&mut state)? {
                return Ok(completion);
            }
            if !self.is_busy() {
                return Err(self.error("nothing is in flight"));
            }
            state = reports.await_more(state, self.watch);
        }
    }

    fn step_result(&self) -> &StepResult {
        &self.result
    }

    fn is_watched(&self) -> bool {
        self.watch.looks() && self.is_busy()
    }

    fn set_waker(&mut self, waker: Waker) {
        self.reports.lock().waker = Some(waker);
    }

    fn clock(&self) -> Nanos {
        self.reports.now()
    }

    fn preload(&mut self, adapters: &[AdapterId]) -> Result<(), ExecutorError> {
        if adapters.len() > self.slots.len() {
            return Err(self.error(format!("{} adapters for {} slots", adapters.len(), self.slots.len())));
        }
        for (slot, id) in (0..).map(SlotId).zip(adapters) {
            let adapter = self
                .adapters
                .get(*id)
                .ok_or_else(|| self.error(format!("adapter {id} is not in host memory")))?;
            self.slots.begin(slot, *id, &adapter.layout);
            self.slots.copy_whole(slot, &adapter).map_err(|e| self.error(e))?;
        }
        Ok(())
    }
}

impl Drop for DeviceExecutor {
    fn drop(&mut self) {
        // Submitted work is finished first: a step may be waiting for layers of a swap.
        self.steps = None;
        self.copies.close();
        for thread in self.threads.drain(..) {
            // A panic was reported when it happened; there is nobody left to tell.
            drop(thread.join());
        }
    }
}
