//! The engine's own speed: steps and swaps against what the device can do at best, and traces in-process.
//!
//! Everything is measured on an executor as the engine uses it, from submission to result, so that a figure
//! is what a request would wait for. Floors are computed from ceilings that the same run has measured.

mod floors;
mod steps;
mod swaps;
mod trace;

pub use crate::engine::device::Ceilings;
pub use floors::Floors;
pub use steps::{DecodeRow, PrefillRow, StepGrid};
pub use swaps::SwapRow;
pub use trace::{TraceRow, run_trace};

use serde::{Deserialize, Serialize};

use crate::calibrate::{StepBench, StepLimits};
use crate::engine::device::DeviceExecutor;
use crate::engine::executor::{Executor, ExecutorError};
use crate::engine::setup::{Loaded, SetupError};
use crate::report::stats::{percentile, sorted};
use lora_sched::{AdapterId, Config};

/// Times of one thing, milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Times {
    /// The median.
    pub median_ms: f64,
    /// A quarter is below it.
    pub p25_ms: f64,
    /// A quarter is above it.
    pub p75_ms: f64,
    /// How many there were.
    pub runs: usize,
}

impl Times {
    /// Of nanoseconds; none of none.
    pub fn of(ns: &[u64]) -> Option<Self> {
        let ms: Vec<f64> = ns.iter().map(|n| *n as f64 * 1e-6).collect();
        let ms = sorted(&ms);
        Some(Self {
            median_ms: percentile(&ms, 50.0)?,
            p25_ms: percentile(&ms, 25.0)?,
            p75_ms: percentile(&ms, 75.0)?,
            runs: ms.len(),
        })
    }
}

/// Why a bench has no result.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The engine could not be set up.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The device failed.
    #[error(transparent)]
    Executor(#[from] ExecutorError),
    /// A trace cannot be run.
    #[error("{0}")]
    Trace(String),
}

/// What steps and swaps take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EngineReport {
    /// The device, in words.
    pub device: String,
    /// The model.
    pub model: String,
    /// The adapters' ranks, which they cycle through.
    pub ranks: Vec<usize>,
    /// Slots.
    pub gpu_loras: usize,
    /// What the device can do; none where it was not measured.
    pub ceilings: Option<Ceilings>,
    /// Prompts.
    pub prefill: Vec<PrefillRow>,
    /// Steps of one token a sequence.
    pub decode: Vec<DecodeRow>,
    /// Copies of adapters.
    pub swaps: Vec<SwapRow>,
}

/// Runs the grid on an executor with `gpu_loras` slots of what is loaded. `progress` is told what is being
/// measured.
///
/// # Errors
/// If the executor cannot be made or fails.
pub fn run_engine(
    loaded: &Loaded,
    gpu_loras: usize,
    grid: &StepGrid,
    mut progress: impl FnMut(&str),
) -> Result<EngineReport, BenchError> {
    progress("ceilings");
    let ceilings = loaded.ceilings()?;
    let floors = Floors::new(loaded, ceilings);
    progress("executor");
    let mut executor = loaded.executor(gpu_loras, false)?;
    let config = loaded.scheduler_config(gpu_loras);
    let mut bench = step_bench(loaded, &mut executor, &config)?;
    let prefill = steps::prefill(&mut bench, grid, &floors, &mut progress)?;
    let decode = steps::decode(&mut bench, grid, &floors, &config, &mut progress)?;
    progress("swaps");
    let longest = grid.longest();
    let swaps = swaps::swaps(&mut bench, loaded, gpu_loras, grid.runs, longest, &floors)?;
    let settings = loaded.settings();
    Ok(EngineReport {
        device: loaded.device_said(),
        model: loaded.spec().name.clone(),
        ranks: if settings.ranks.is_empty() { vec![settings.max_r] } else { settings.ranks.clone() },
        gpu_loras,
        ceilings,
        prefill,
        decode,
        swaps,
    })
}

/// Copies alone, and beside steps, on an executor of what is loaded: for another mode or host memory.
///
/// # Errors
/// As [`run_engine`].
pub fn run_swaps(
    loaded: &Loaded,
    gpu_loras: usize,
    grid: &StepGrid,
    ceilings: Option<Ceilings>,
) -> Result<Vec<SwapRow>, BenchError> {
    let mut executor = loaded.executor(gpu_loras, false)?;
    let config = loaded.scheduler_config(gpu_loras);
    let mut bench = step_bench(loaded, &mut executor, &config)?;
    let floors = Floors::new(loaded, ceilings);
    swaps::swaps(&mut bench, loaded, gpu_loras, grid.runs, grid.longest(), &floors)
}

/// A bench over an executor whose slots are filled with the first adapters.
fn step_bench<'a>(
    loaded: &Loaded,
    executor: &'a mut DeviceExecutor,
    config: &Config,
) -> Result<StepBench<'a>, BenchError> {
    let resident: Vec<AdapterId> = (0..config.gpu_loras as u32).map(AdapterId).collect();
    executor.preload(&resident)?;
    let limits = StepLimits::new(config, loaded.spec().vocab_size, config.gpu_loras);
    let stream = crate::workload::streams::stream(loaded.settings().seed, "bench");
    Ok(StepBench::new(executor, limits, stream))
}
