//! The engine as its callers see it: requests in, streams of output back.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lora_sched::{Config, ConfigError, EventError, Nanos, RequestId, Scheduler};

use super::adapters::{Directory, HostPool};
use super::channel::{Receiver, channel};
use super::clock::Clock;
use super::executor::{Executor, ExecutorError, Sampling, TokenId};
use super::fetcher::Fetcher;
use super::gauges::{EngineStats, Gauges, SwapStats};
use super::handle::GenerateHandle;
use super::output::{self, OpenGuard, OutQueue, OutState, StreamItem};
use super::request::{GenerateRequest, SubmitError};
use super::step_loop::{Active, LoopParts, Mailbox, StepLoop, Submission};
use crate::report::decision_log::DecisionLog;
use crate::workload::tokenizer::Tokenizer;

/// What an engine is made with, besides its executor and tokenizer.
#[derive(Debug)]
pub struct EngineConfig {
    /// The scheduler's configuration; adapters `0..gpu_loras` are preloaded.
    pub scheduler: Config,
    /// The adapters in host memory, those that the executor copies from; none where it computes nothing:
    /// the adapters are then named `lora-0` and so on.
    pub adapters: Option<Arc<HostPool>>,
    /// Token ids below this are the model's.
    pub vocab_size: usize,
    /// Tokens that end a sequence.
    pub eos: Vec<TokenId>,
    /// Seed of requests that bring none.
    pub seed: u64,
    /// Run steps of common shapes before the first request, so that it does not pay for what is done
    /// once (page faults, caches, lazily loaded code).
    pub warm_up: bool,
    /// Where decisions are logged.
    pub log: Option<DecisionLog>,
}

/// Why an engine cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An impossible configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The device failed.
    #[error(transparent)]
    Executor(#[from] ExecutorError),
    /// No thread could be had.
    #[error("cannot start the engine's threads: {0}")]
    Thread(#[from] std::io::Error),
}

/// When a request was received, and its stream of output.
type CallerEnd = (Nanos, Receiver<StreamItem>);

/// A running engine. Dropping it ends it at once; see [`Engine::drain`] for a gentle end.
#[derive(Debug)]
pub struct Engine {
    pub(super) shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Sees to it that the output thread ends after the step loop, however that ends.
struct LoopEnd(Arc<Shared>);

impl LoopEnd {
    fn failed(&self, message: String) {
        // Set once, by the step loop's thread alone.
        let _ = self.0.failure.set(message);
    }
}

impl Drop for LoopEnd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.failed("the step loop panicked".into());
        }
        self.0.mailbox.close();
        self.0.outputs.close();
    }
}

/// What the engine and its requests' handles share.
pub(super) struct Shared {
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) outputs: Arc<OutQueue>,
    pub(super) gauges: Arc<Gauges>,
    pub(super) directory: Arc<Directory>,
    pub(super) pool: Option<Arc<HostPool>>,
    pub(super) tokenizer: Tokenizer,
    pub(super) clock: Clock,
    pub(super) scheduler: Config,
    pub(super) vocab_size: usize,
    pub(super) has_logits: bool,
    pub(super) eos: Vec<TokenId>,
    pub(super) seed: u64,
    pub(super) open: Arc<AtomicU64>,
    pub(super) draining: AtomicBool,
    pub(super) failure: OnceLock<String>,
}

impl Shared {
    /// Why the engine takes no more requests, now that it has stopped.
    pub(super) fn why_stopped(&self) -> String {
        self.failure.get().cloned().unwrap_or_else(|| "shut down".into())
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("gauges", &self.gauges).finish_non_exhaustive()
    }
}

impl Engine {
    /// Preloads adapters `0..gpu_loras` and starts the step loop and the output thread.
    ///
    /// # Errors
    /// If the configuration is impossible or the executor fails.
    pub fn start(
        config: EngineConfig,
        mut executor: Box<dyn Executor>,
        tokenizer: Tokenizer,
    ) -> Result<Self, StartError> {
        let EngineConfig { scheduler: config, adapters: pool, vocab_size, eos, seed, warm_up, log } = config;
        let scheduler = Scheduler::new(config.clone())?;
        let preload: Vec<_> = (0..config.gpu_loras as u32).map(lora_sched::AdapterId).collect();
        executor.preload(&preload)?;
        if warm_up {
            super::warm_up::run(executor.as_mut(), &config, vocab_size)?;
        }
        let gauges = Arc::new(Gauges::default());
        gauges.preloaded(config.gpu_loras);
        gauges.adapters.store(config.adapters.len() as u64, Ordering::Relaxed);

        let clock = Clock::of(executor.as_ref());
        let named = (0u32..).zip(&config.adapters).map(|(i, &spec)| {
            let name = pool.as_ref().and_then(|p| p.name(lora_sched::AdapterId(i)));
            let name = name.unwrap_or_else(|| format!("lora-{i}"));
            let root = pool.as_ref().and_then(|p| p.root(lora_sched::AdapterId(i)));
            (name.clone(), root.unwrap_or(name), spec)
        });
        let directory = Arc::new(Directory::new(named, config.host_loras));
        // Whoever asks before the loop's first turn finds what was preloaded.
        directory.publish(scheduler.slots());
        let shared = Arc::new(Shared {
            mailbox: Arc::new(Mailbox::default()),
            outputs: Arc::new(OutQueue::default()),
            gauges,
            directory,
            pool,
            tokenizer,
            clock,
            scheduler: config,
            vocab_size,
            has_logits: executor.has_logits(),
            eos: eos.clone(),
            seed,
            open: Arc::new(AtomicU64::new(0)),
            draining: AtomicBool::new(false),
            failure: OnceLock::new(),
        });
        let mailbox = shared.mailbox.clone();
        executor.set_waker(Arc::new(move || mailbox.wake()));
        let (fetcher, disk) = match &shared.pool {
            Some(pool) if shared.scheduler.host_loras.is_some() => {
                let (fetcher, life) = Fetcher::new(pool.clone(), shared.mailbox.clone(), clock);
                (Some(fetcher), Some(life))
            }
            _ => (None, None),
        };
        let step_loop = StepLoop::new(LoopParts {
            scheduler,
            executor,
            clock,
            mailbox: shared.mailbox.clone(),
            outputs: shared.outputs.clone(),
            gauges: shared.gauges.clone(),
            directory: shared.directory.clone(),
            pool: shared.pool.clone(),
            fetcher,
            log,
            eos,
        });
        let engine = Self { shared, threads: Mutex::new(Vec::with_capacity(2)) };
        if let Some(life) = disk {
            engine.spawn("disk", life)?;
        }
        let shared = engine.shared.clone();
        engine.spawn("output", move || output::run(&shared.outputs, &shared.mailbox, clock))?;
        let shared = engine.shared.clone();
        let end = LoopEnd(shared);
        engine.spawn("step-loop", move || {
            step_loop.run(|e| {
                tracing::error!("the engine stops: {e}");
                end.failed(e.to_string());
            });
        })?;
        Ok(engine)
    }

    fn spawn(&self, name: &str, body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        let thread = std::thread::Builder::new().name(name.into()).spawn(body)?;
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    /// Puts a request into the queue. Whether the scheduler takes it (the queue may be full) is told by
    /// the handle: [`GenerateHandle::admitted`].
    ///
    /// # Errors
    /// If the request is impossible, or the engine takes none any more.
    pub fn submit(&self, request: GenerateRequest) -> Result<GenerateHandle, SubmitError> {
        let (submission, end) = self.prepare(request)?;
        let id = self.put(vec![submission])?;
        Ok(self.handle(id, end))
    }

    /// Puts requests into the queue together: it takes all of them or, where it has no room for all, none. They are
    /// numbered upwards in their order; each one's handle tells whether it was taken.
    ///
    /// # Errors
    /// If one of the requests is impossible, or the engine takes none any more.
    pub fn submit_all(&self, requests: Vec<GenerateRequest>) -> Result<Vec<GenerateHandle>, SubmitError> {
        let prepared = requests.into_iter().map(|request| self.prepare(request));
        let (submissions, ends): (Vec<_>, Vec<_>) =
            prepared.collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
        let first = self.put(submissions)?;
        let ids = (first.0..).map(RequestId);
        Ok(ids.zip(ends).map(|(id, end)| self.handle(id, end)).collect())
    }

    fn put(&self, submissions: Vec<Submission>) -> Result<RequestId, SubmitError> {
        let shared = &self.shared;
        if let Some(message) = shared.failure.get() {
            return Err(SubmitError::Stopped(message.clone()));
        }
        if shared.draining.load(Ordering::SeqCst) {
            return Err(SubmitError::Draining);
        }
        shared.mailbox.submit(submissions).map_err(|_| SubmitError::Stopped(shared.why_stopped()))
    }

    fn handle(&self, id: RequestId, (received, receiver): CallerEnd) -> GenerateHandle {
        GenerateHandle { id, received, receiver, shared: self.shared.clone(), admitted: false, done: false }
    }

    /// What the step loop gets of a request and what its caller keeps.
    fn prepare(&self, request: GenerateRequest) -> Result<(Submission, CallerEnd), SubmitError> {
        let shared = &self.shared;
        self.check(&request)?;
        let GenerateRequest { prompt, adapter, params, received } = request;
        let received = received.unwrap_or_else(|| shared.clock.now());
        let decode = shared.tokenizer.decode_stream_after(&prompt);
        let (sender, receiver) = channel();
        let open = OpenGuard::new(&shared.open);
        let out = OutState::new(sender, decode, params.stop, params.min_tokens, open);
        let mut banned: Vec<TokenId> = Vec::new();
        if params.min_tokens > 0 {
            banned.extend(&shared.eos);
            banned.extend(params.stop_token_ids.iter());
        }
        let sampling = Sampling {
            temperature: params.temperature,
            top_p: params.top_p,
            top_k: params.top_k,
            seed: 0,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            generated: Vec::new(),
            banned_before_min: banned,
            min_tokens: params.min_tokens,
            logprobs: params.logprobs,
        };
        let active = Active {
            prompt,
            output: Vec::new(),
            adapter,
            received,
            max_tokens: params.max_tokens,
            sampling,
            seed: params.seed,
            engine_seed: shared.seed,
            ignore_eos: params.ignore_eos,
            stop_token_ids: params.stop_token_ids,
            cancelled: false,
            stop_found: false,
        };
        Ok((Submission { active, out: Box::new(out) }, (received, receiver)))
    }

    /// Refuses a prompt of so many tokens that leaves no room for `max_tokens`.
    pub(super) fn fits(&self, prompt: usize, max_tokens: u32) -> Result<(), SubmitError> {
        let max_model_len = self.shared.scheduler.max_model_len;
        match prompt.saturating_add(max_tokens as usize) {
            tokens if tokens > max_model_len => {
                Err(SubmitError::Refused(EventError::TooLong { tokens, max_model_len }))
            }
            _ => Ok(()),
        }
    }

    /// What can be told without asking the scheduler.
    fn check(&self, request: &GenerateRequest) -> Result<(), SubmitError> {
        self.fits(request.prompt.len(), request.params.max_tokens)?;
        if let Some(adapter) = request.adapter
            && !self.shared.directory.serves(adapter)
        {
            return Err(SubmitError::Refused(EventError::UnknownAdapter(adapter)));
        }
        if request.params.logprobs.is_some() && !self.shared.has_logits {
            return Err(SubmitError::NoLogits);
        }
        let vocab = self.shared.vocab_size;
        match request.prompt.iter().find(|&&id| id as usize >= vocab) {
            Some(&id) => Err(SubmitError::NoSuchToken { id, vocab }),
            None => Ok(()),
        }
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.shared.tokenizer
    }

    /// The clock that every time of this engine is on.
    pub fn clock(&self) -> Clock {
        self.shared.clock
    }

    /// The scheduler's configuration.
    pub fn scheduler_config(&self) -> &Config {
        &self.shared.scheduler
    }

    /// A snapshot of its state.
    pub fn stats(&self) -> EngineStats {
        self.shared.gauges.stats(self.shared.directory.slots())
    }

    /// Copies of adapters before and since serving began.
    pub fn swap_stats(&self) -> SwapStats {
        self.shared.gauges.swap_stats()
    }

    /// Sets the runtime swap counters to zero.
    pub fn reset_swap_stats(&self) {
        self.shared.gauges.reset_swap_stats();
    }

    /// Why it has stopped, if it has.
    pub fn failure(&self) -> Option<String> {
        self.shared.failure.get().cloned()
    }

    /// Requests that are not at their end.
    pub fn open_requests(&self) -> u64 {
        self.shared.open.load(Ordering::SeqCst)
    }

    /// Takes no more requests.
    pub fn stop_accepting(&self) {
        self.shared.draining.store(true, Ordering::SeqCst);
    }

    /// Takes no more requests and waits for those there are; `false` if `limit` came first.
    pub fn drain(&self, limit: Duration) -> bool {
        self.stop_accepting();
        let until = Instant::now() + limit;
        while self.open_requests() > 0 && self.failure().is_none() {
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    /// Ends it: requests still open are aborted, threads joined, the decision log written out.
    pub fn shutdown(&self) {
        self.stop_accepting();
        self.shared.mailbox.stop();
        for thread in self.threads.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // A thread that panicked has left its message in `failure`.
            let _ = thread.join();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shutdown();
    }
}
