//! The executor of the CPU.

use std::sync::Arc;

use lora_sched::SwapMode;

use super::backend::CpuBackend;
use super::copier;
use super::slots::Slots;
use crate::engine::adapters::HostPool;
use crate::engine::backend::BackendShape;
use crate::engine::batch::BatchLimits;
use crate::engine::device::{Compute, DeviceExecutor, LoadedModel, Parts, check_options};
use crate::engine::model::{Decoder, ModelSpec, WeightError, Weights};
use crate::engine::watch::Watch;

/// What a CPU executor is made with.
pub struct CpuOptions {
    /// The model's shape.
    pub spec: ModelSpec,
    /// Its weights.
    pub weights: Weights,
    /// Where the loaded weights are kept for the next executor, or are from the last one.
    pub loaded: LoadedModel<CpuBackend>,
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
    /// Keep each step's logits for [`DeviceExecutor::logits`]: for tests and calibration.
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

/// Allocates everything, loads the weights and starts the threads.
///
/// # Errors
/// If the weights cannot be read, a size does not fit the model, or a thread cannot be started.
pub fn cpu_executor(options: CpuOptions) -> Result<DeviceExecutor, CpuStartError> {
    check(&options)?;
    let CpuOptions { spec, weights, adapters, gpu_loras, limits, swap_mode, keep_logits, .. } = options;
    let vocab = spec.vocab_size;
    let slots = Arc::new(Slots::new(&spec, adapters.max_rank(), gpu_loras));
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
    let model = options.loaded.get(&mut backend, &spec, &weights)?;
    let decoder = Decoder::new(&mut backend, model, &spec, &limits)
        .map_err(|e| CpuStartError::Options(e.to_string()))?;
    let pool = product_threads(threads)?;
    // Products need all cores.
    let watch = Watch::Sleep;
    let compute = Compute { backend, decoder, vocab, keep_logits, watch };
    Ok(DeviceExecutor::start(Parts {
        device: "cpu",
        vocab,
        adapters,
        limits,
        swap_mode,
        keep_logits,
        watch,
        compute: Box::new(move |inbox, reports| match pool {
            // Products use the pool that they are called in.
            Some(pool) => pool.install(move || compute.run(inbox, reports)),
            None => compute.run(inbox, reports),
        }),
        copy: {
            let slots = Arc::clone(&slots);
            Box::new(move |queue, reports| copier::run(queue, &slots, reports))
        },
        slots,
    })?)
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
    check_options(spec, limits, options.allowed_tokens.as_deref()).map_err(CpuStartError::Options)
}
