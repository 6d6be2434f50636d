//! The executor: a compute thread and a copy thread behind `submit` and `wait`.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use lora_sched::{AdapterId, Nanos, SlotId, StepPlan, SwapMode, SwapPlan};

use super::backend::CpuBackend;
use super::compute::{Compute, Job};
use super::copier::{self, Copy, CopyQueue};
use super::memory::MemoryPlan;
use super::reports::{Reported, Reports};
use super::slots::Slots;
use crate::engine::adapters::HostPool;
use crate::engine::backend::BackendShape;
use crate::engine::batch::{Batch, BatchLimits};
use crate::engine::executor::{Completion, Executor, ExecutorError, StepFeed, StepResult, Waker};
use crate::engine::model::{Decoder, Family, ModelSpec, WeightError, Weights};

/// What a CPU executor is made with.
pub struct CpuOptions {
    /// The model's shape.
    pub spec: ModelSpec,
    /// Its weights.
    pub weights: Weights,
    /// The adapters; slots are sized for the pool's largest rank.
    pub adapters: Arc<HostPool>,
    /// Slots.
    pub gpu_loras: usize,
    /// The largest step.
    pub limits: BatchLimits,
    /// The order of copies.
    pub swap_mode: SwapMode,
    /// Threads of a step's matrix products; 0 is one less than the machine has, so that the copy
    /// thread, the server and the step loop have one.
    pub threads: usize,
    /// Which token ids may be sampled, `[vocab]`; none allows all.
    pub allowed_tokens: Option<Vec<bool>>,
    /// Keep each step's logits for [`CpuExecutor::logits`]: for tests and calibration.
    pub keep_logits: bool,
}

/// An executor that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CpuStartError {
    /// The weights.
    #[error(transparent)]
    Weights(#[from] WeightError),
    /// A size that does not fit the model.
    #[error("{0}")]
    Options(String),
    /// A thread could not be started.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// Steps and swaps on the CPU.
pub struct CpuExecutor {
    vocab: usize,
    adapters: Arc<HostPool>,
    slots: Arc<Slots>,
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
    memory: MemoryPlan,
}

impl CpuExecutor {
    /// Allocates everything, loads the weights and starts the threads.
    pub fn new(options: CpuOptions) -> Result<Self, CpuStartError> {
        check(&options)?;
        let CpuOptions { spec, weights, adapters, gpu_loras, limits, .. } = options;
        let memory = MemoryPlan::cpu(&spec, &limits, adapters.max_rank(), gpu_loras);
        let vocab = spec.vocab_size;
        let slots = Arc::new(Slots::new(&spec, adapters.max_rank(), gpu_loras));
        let reports = Arc::new(Reports::new(gpu_loras));
        let copies = Arc::new(CopyQueue::new(options.swap_mode, gpu_loras));
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get() - 1).max(1),
            n => n,
        };
        let mut backend = CpuBackend::new(
            BackendShape { spec: spec.clone(), limits },
            Arc::clone(&slots),
            adapters.max_rank(),
            threads,
            options.allowed_tokens,
        );
        let decoder = Decoder::load(&mut backend, &spec, &weights, &limits)?;
        let kept = if options.keep_logits { limits.max_num_seqs * vocab } else { 0 };
        let job = Job {
            step: 0,
            batch: Batch::new(limits),
            begins: Vec::with_capacity(limits.max_num_seqs),
            result: StepResult::default(),
            logits: Vec::with_capacity(kept),
            failure: None,
        };

        let (steps, inbox) = sync_channel(1);
        let pool = product_threads(threads)?;
        let compute = Compute { backend, decoder, vocab, keep_logits: options.keep_logits };
        let handles = vec![
            std::thread::Builder::new().name("compute".into()).spawn({
                let reports = Arc::clone(&reports);
                move || match pool {
                    // Products use the pool that they are called in.
                    Some(pool) => pool.install(move || compute.run(&inbox, &reports)),
                    None => compute.run(&inbox, &reports),
                }
            })?,
            std::thread::Builder::new().name("copy".into()).spawn({
                let (copies, slots, reports) =
                    (Arc::clone(&copies), Arc::clone(&slots), Arc::clone(&reports));
                move || copier::run(&copies, &slots, &reports)
            })?,
        ];
        Ok(Self {
            vocab,
            read_by_step: vec![false; slots.len()],
            adapters,
            slots,
            reports,
            copies,
            steps: Some(steps),
            threads: handles,
            job: Some(Box::new(job)),
            result: StepResult::default(),
            swaps_in_flight: 0,
            memory,
        })
    }

    /// What its memory went to.
    pub fn memory(&self) -> &MemoryPlan {
        &self.memory
    }

    /// The logits `[vocab]` from which the last completed step sampled for sequence `index` of its
    /// plan, before penalties and bans; none if it sampled nothing there or logits are not kept.
    pub fn logits(&self, index: usize) -> Option<&[f32]> {
        let job = self.job.as_ref()?;
        let row = job.batch.sample_plan.iter().position(|i| *i as usize == index)?;
        job.logits.get(row * self.vocab..(row + 1) * self.vocab)
    }

    fn take(&mut self, state: &mut Reported) -> Result<Option<Completion>, ExecutorError> {
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
            Some(message) => Err(error(message)),
            None => Ok(Some(Completion::Step { step, started, ended })),
        }
    }
}

fn error(message: impl Into<String>) -> ExecutorError {
    ExecutorError { device: "cpu", message: message.into() }
}

/// The threads that matrix products are spread over; none where one thread does it all.
fn product_threads(threads: usize) -> std::io::Result<Option<rayon::ThreadPool>> {
    if threads == 1 {
        return Ok(None);
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("product-{i}"))
        .build()
        .map(Some)
        .map_err(std::io::Error::other)
}

fn check(options: &CpuOptions) -> Result<(), CpuStartError> {
    let (spec, limits) = (&options.spec, &options.limits);
    let fail = |what: String| Err(CpuStartError::Options(what));
    if limits.block_size == 0 || !limits.block_size.is_multiple_of(8) {
        return fail(format!("block size {} is not a multiple of 8: use 8, 16 or 32", limits.block_size));
    }
    if spec.family == Family::Opt && limits.max_model_len > spec.max_positions {
        return fail(format!(
            "max_model_len {} is over {}'s {} learned positions: lower it",
            limits.max_model_len, spec.name, spec.max_positions
        ));
    }
    match &options.allowed_tokens {
        Some(mask) if mask.len() != spec.vocab_size => {
            fail(format!("a mask of {} tokens for a vocabulary of {}", mask.len(), spec.vocab_size))
        }
        Some(mask) if !mask.contains(&true) => fail("no token may be sampled".into()),
        _ => Ok(()),
    }
}

impl Executor for CpuExecutor {
    fn submit_step(&mut self, plan: &StepPlan, feed: &StepFeed) -> Result<(), ExecutorError> {
        let mut job = self.job.take().ok_or_else(|| error("a step is in flight already"))?;
        job.step = plan.step;
        if let Err(e) = job.batch.build(plan, feed) {
            self.job = Some(job);
            return Err(error(e.to_string()));
        }
        job.begins.clear();
        job.begins.extend(feed.begins.iter().map(|(place, how)| (place.0, how.clone())));
        job.result.tokens.clear();
        job.result.tokens.resize(plan.seqs.len(), None);
        job.result.stalled.clear();
        job.logits.clear();
        let (slots, batch) = (self.slots.len(), &job.batch);
        let named = batch.segments.iter().map(|segment| segment.slot).chain(batch.loading.iter().copied());
        if let Some(slot) = named.clone().find(|slot| slot.0 as usize >= slots) {
            self.job = Some(job);
            return Err(error(format!("slot {slot} of {slots}")));
        }
        for slot in named {
            self.read_by_step[slot.0 as usize] = true;
        }
        let steps = self.steps.as_ref().ok_or_else(|| error("the executor is shutting down"))?;
        steps.send(job).map_err(|_| error("the compute thread has ended"))
    }

    fn submit_swap(&mut self, swap: &SwapPlan) -> Result<(), ExecutorError> {
        match self.read_by_step.get(swap.slot.0 as usize) {
            None => return Err(error(format!("slot {} of {}", swap.slot, self.slots.len()))),
            Some(true) => {
                return Err(error(format!("swap into slot {}, which the running step reads", swap.slot)));
            }
            Some(false) => {}
        }
        let adapter = self
            .adapters
            .get(swap.adapter)
            .ok_or_else(|| error(format!("adapter {} is not in host memory", swap.adapter)))?;
        self.slots.begin(swap.slot, swap.adapter, &adapter.layout);
        self.swaps_in_flight += 1;
        self.copies.push(Copy::new(swap.slot, swap.adapter, adapter, swap.kind));
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
            if self.job.is_some() && self.swaps_in_flight == 0 {
                return Err(error("nothing is in flight"));
            }
            state = reports.sleep(state);
        }
    }

    fn step_result(&self) -> &StepResult {
        &self.result
    }

    fn set_waker(&mut self, waker: Waker) {
        self.reports.lock().waker = Some(waker);
    }

    fn clock(&self) -> Nanos {
        self.reports.now()
    }

    fn preload(&mut self, adapters: &[AdapterId]) -> Result<(), ExecutorError> {
        if adapters.len() > self.slots.len() {
            return Err(error(format!("{} adapters for {} slots", adapters.len(), self.slots.len())));
        }
        for (slot, id) in (0..).map(SlotId).zip(adapters) {
            let adapter =
                self.adapters.get(*id).ok_or_else(|| error(format!("adapter {id} is not in host memory")))?;
            self.slots.begin(slot, *id, &adapter.layout);
            for layer in 0..adapter.layout.layers() {
                self.slots.copy_layer(slot, &adapter, layer);
            }
        }
        Ok(())
    }
}

impl Drop for CpuExecutor {
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
