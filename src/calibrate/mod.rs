//! From micro-benchmarks of a running executor to a [`Profile`].
//!
//! Steps of random compositions, swaps alone and beside steps, and single requests over HTTP are
//! timed; a non-negative fit turns them into costs. Nothing here looks at a run that it will predict.

mod black_box;
pub mod fit;
mod host;
mod steps;
mod swaps;

use std::time::Duration;

use lora_sched::{AdapterId, SlotId};
use nalgebra::{DMatrix, DVector};
use serde::Serialize;

pub use black_box::{
    BlackBoxCalibration, BlackBoxError, BlackBoxOptions, BlackBoxSample, calibrate_black_box,
};
pub use host::{HostError, HostSample, HostTimes};
pub use steps::{StepBench, StepLimits, StepSample};
pub use swaps::{SwapSample, SwapTimes};

use crate::engine::executor::{Executor as _, ExecutorError};
use crate::engine::setup::{EngineSettings, Loaded, SetupError};
use crate::profile::{
    AdapterCosts, CostModel, EngineFacts, Feature, Holdout, HostCosts, Kind, Profile, ProfileError,
    Quantiles, SCHEMA_VERSION, StepCosts, SwapCosts,
};
use crate::report::machine::{Machine, machine};
use crate::report::manifest::Tool;
use crate::report::stats;
use crate::workload::streams::stream;

/// What to calibrate and for how long.
#[derive(Clone, Debug)]
pub struct CalibrateOptions {
    /// The engine. Its slots and adapters are set by the calibration.
    pub engine: EngineSettings,
    /// Time for steps; the rest takes a few seconds more.
    pub step_time: Duration,
    /// Longest prefill to time, tokens.
    pub longest: u32,
    /// Of the random compositions.
    pub seed: u64,
}

/// A calibration that failed.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    /// The engine.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The device.
    #[error(transparent)]
    Executor(#[from] ExecutorError),
    /// The host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The fit came to nothing usable.
    #[error(transparent)]
    Profile(#[from] ProfileError),
}

/// A profile and the samples that it was made from.
#[derive(Clone, Debug)]
pub struct Calibration {
    /// The costs.
    pub profile: Profile,
    /// One JSON value a sample.
    pub samples: Vec<Sample>,
}

/// One raw sample.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Sample {
    /// A step; held out ones were not shown to the fit.
    Step {
        /// Whether the fit has seen it.
        held_out: bool,
        /// The step.
        #[serde(flatten)]
        sample: StepSample,
    },
    /// A swap.
    Swap(SwapSample),
    /// A step without and with swaps beside it.
    StepPair {
        /// Without.
        alone_ns: u64,
        /// With.
        beside_ns: u64,
    },
    /// A request.
    Host(HostSample),
    /// A host gap between two steps.
    Gap {
        /// Its length.
        ns: u64,
    },
}

/// Adapters beyond those that steps read, to be copied in turn: enough that none is still in a cache.
const SPARE_ADAPTERS: usize = 48;

/// Times an engine and fits its costs. `progress` is told what is under way and the share done.
pub fn calibrate(
    options: &CalibrateOptions,
    mut progress: impl FnMut(&str, f64),
) -> Result<Calibration, CalibrateError> {
    let mut settings = options.engine.clone();
    // Steps read one slot a sequence; one more is written by the swaps that are timed beside them.
    let reading = settings.max_num_seqs;
    settings.gpu_loras = reading + 1;
    settings.total_loras = reading + 1 + SPARE_ADAPTERS;
    progress("loading", 0.0);
    let loaded = Loaded::load(settings)?;
    let config = loaded.scheduler_config(reading + 1);
    let specs = loaded.pool().specs();

    let mut executor = loaded.executor(reading + 1, false)?;
    let resident: Vec<AdapterId> = (0..=reading as u32).map(AdapterId).collect();
    executor.preload(&resident)?;
    let limits = StepLimits::new(&config, loaded.spec().vocab_size, reading);
    let memory = loaded.memory_plan(reading + 1);
    let mut bench = StepBench::new(&mut executor, limits, stream(options.seed, "calibrate"));
    let steps = bench.sample(options.step_time, options.longest, |share| progress("steps", share))?;
    progress("swaps", 0.0);
    let source = swaps::SwapSource {
        slot: SlotId(reading as u32),
        adapters: (reading..specs.len()).map(|a| (AdapterId(a as u32), specs[a].bytes)).collect(),
    };
    let swap_times = swaps::time_swaps(&mut bench, &source, options.longest.min(512))?;
    drop(executor);

    progress("host", 0.0);
    let lengths: Vec<u32> = [16, 256, 1024].iter().map(|&n: &u32| n.min(options.longest).max(2)).collect();
    let host_times = host::time_host(&loaded, reading, &lengths)?;

    // Every fifth is held out: all kinds of compositions are among them.
    let held_out = |i: usize| i % 5 == 4;
    let (seen, unseen): (Vec<_>, Vec<_>) = steps.iter().enumerate().partition(|(i, _)| !held_out(*i));
    let seen: Vec<StepSample> = seen.into_iter().map(|s| *s.1).collect();
    let unseen: Vec<StepSample> = unseen.into_iter().map(|s| *s.1).collect();
    let on_gpu = loaded.shared_memory().is_some();
    let features = if on_gpu { gpu_features() } else { cpu_features() };
    let step = fit_steps(&seen, &features);

    let s = loaded.settings();
    let mut ranks: Vec<(u32, u64)> = specs.iter().map(|a| (a.rank, a.bytes)).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let mut profile = Profile {
        schema_version: SCHEMA_VERSION,
        kind: Kind::Engine,
        created: chrono::Local::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, false),
        tool: tool(),
        machine: serde_json::to_value(Machine { gpu: loaded.gpu(), ..machine() }).unwrap_or_default(),
        model: loaded.spec().name.clone(),
        adapter: AdapterCosts {
            ranks: ranks.iter().map(|r| r.0).collect(),
            bytes: ranks.iter().map(|r| r.1).collect(),
        },
        engine: EngineFacts {
            device: loaded.device_said(),
            dtype: loaded.dtype().to_string(),
            threads: s.threads as u32,
            layers: loaded.spec().layers as u32,
            block_size: s.block_size as u32,
            kv_block_bytes: memory.kv_block,
            weights_bytes: memory.weights,
            workspace_bytes: memory.workspace,
            memory_bytes: loaded.shared_memory(),
            kv_memory_bytes: match loaded.shared_memory() {
                Some(_) => s.kv_memory,
                None => Some(s.kv_memory.unwrap_or(crate::engine::setup::CPU_KV_MEMORY)),
            },
            max_model_len: config.max_model_len as u32,
            max_num_batched_tokens: config.max_num_batched_tokens as u32,
            max_num_seqs: config.max_num_seqs as u32,
        },
        step,
        swap: fit_swaps(&swap_times),
        host: fit_host(&host_times),
        residuals: Quantiles::default(),
        holdout: Holdout::default(),
        samples_file: None,
        sha256: String::new(),
    };
    let cost = CostModel::new(&profile)?;
    profile.residuals = quantiles(&errors(&cost, &seen));
    profile.holdout = holdout(&errors(&cost, &unseen));

    let mut samples: Vec<Sample> = Vec::new();
    samples
        .extend(steps.iter().enumerate().map(|(i, &sample)| Sample::Step { held_out: held_out(i), sample }));
    samples.extend(swap_times.samples.iter().copied().map(Sample::Swap));
    let pair = |&(alone_ns, beside_ns): &(u64, u64)| Sample::StepPair { alone_ns, beside_ns };
    samples.extend(swap_times.steps.iter().map(pair));
    samples.extend(host_times.requests.iter().copied().map(Sample::Host));
    samples.extend(host_times.gaps.iter().map(|&ns| Sample::Gap { ns }));
    Ok(Calibration { profile: profile.signed(), samples })
}

fn tool() -> String {
    let tool = Tool::this();
    format!("{} {} ({})", tool.name, tool.version, tool.commit)
}

/// The terms of a step's cost on the CPU. Ranges are narrow where matrix products change their tiling
/// and where keys and values outgrow a cache.
fn cpu_features() -> Vec<Feature> {
    let tokens = ranges(&[0, 2, 4, 16, 64, 256, 1024]).map(|(from, to)| Feature::Tokens { from, to });
    let context = ranges(&[0, 1024, 2048, 4096]).map(|(from, to)| Feature::DecodeContext { from, to });
    let others = [
        Feature::Prefills,
        Feature::PrefillPairs,
        Feature::Decodes,
        Feature::Adapters,
        Feature::LoraTokens,
        Feature::LoraTokenRanks,
    ];
    [Feature::Step].into_iter().chain(tokens).chain(context).chain(others).collect()
}

/// The terms on a GPU: decodes are bound by what they read and run as graphs, steps with prefills are
/// bound by arithmetic over rows that are rounded up.
fn gpu_features() -> Vec<Feature> {
    let tokens = ranges(&[0, 64, 128, 256, 512, 1024, 2048, 3072])
        .map(|(from, to)| Feature::PaddedTokens { from, to });
    let context = ranges(&[0, 512, 2048, 8192, 32_768]).map(|(from, to)| Feature::DecodeContext { from, to });
    let others = [
        // Up to 16 rows have kernels of their own, which take as long for one as for all of them.
        Feature::Tokens { from: 16, to: Some(17) },
        Feature::Mixed,
        Feature::Lora,
        Feature::MixedLora,
        Feature::Prefills,
        Feature::PrefillSpan,
        Feature::PrefillPairs,
        Feature::Decodes,
        Feature::Samples,
        Feature::Adapters,
        Feature::LoraTokens,
        Feature::LoraTokenRanks,
    ];
    [Feature::Step].into_iter().chain(tokens).chain(context).chain(others).collect()
}

/// Adjoining ranges; the last one has no end.
fn ranges(knots: &[u64]) -> impl Iterator<Item = (u64, Option<u64>)> + '_ {
    knots.iter().enumerate().map(|(i, &from)| (from, knots.get(i + 1).copied()))
}

/// Least relative squares: an error of 5 % is as bad at 1 ms as at 100 ms.
fn fit_steps(samples: &[StepSample], features: &[Feature]) -> StepCosts {
    let weight = |row: usize| 1.0 / samples[row].ns.max(1) as f64;
    let value = |row: usize, column: usize| features[column].of(&samples[row].shape) as f64 * weight(row);
    fit_costs(features, samples.len(), value)
}

/// The costs that give 1 in each row, none of them negative; `value(row, column)` is a feature's count in units of
/// the row's time.
fn fit_costs(features: &[Feature], rows: usize, value: impl FnMut(usize, usize) -> f64) -> StepCosts {
    let a = DMatrix::from_fn(rows, features.len(), value);
    let b = DVector::from_element(rows, 1.0);
    let costs = fit::nnls(&a, &b);
    StepCosts {
        features: features.iter().map(Feature::to_string).collect(),
        coef_ns: costs.iter().copied().collect(),
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    stats::median(&stats::sorted(&values.collect::<Vec<_>>())).unwrap_or(0.0)
}

fn fit_swaps(times: &SwapTimes) -> SwapCosts {
    let of = |beside: bool| times.samples.iter().filter(move |s| s.beside_step == beside);
    let rate = |beside| median(of(beside).map(|s| s.bytes as f64 / (s.copy_ns as f64 * 1e-9)));
    let alone = rate(false);
    let beside = if of(true).count() > 0 { rate(true) } else { alone };
    SwapCosts {
        fixed_s: median(of(false).map(|s| (s.ns - s.copy_ns) as f64 * 1e-9)),
        bytes_per_s: alone,
        busy_bytes_per_s: beside,
        step_slowdown: (median(times.steps.iter().map(|p| p.1 as f64 / p.0 as f64)) - 1.0).max(0.0),
    }
}

fn fit_host(times: &HostTimes) -> HostCosts {
    let rows = &times.requests;
    let a = DMatrix::from_fn(rows.len(), 2, |r, c| if c == 0 { 1.0 } else { rows[r].prompt_bytes as f64 });
    let b = DVector::from_fn(rows.len(), |r, _| rows[r].front_ns);
    let front = fit::nnls(&a, &b);
    let bytes: f64 = rows.iter().map(|r| r.prompt_bytes as f64).sum();
    let tokens: f64 = rows.iter().map(|r| f64::from(r.prompt_tokens)).sum();
    HostCosts {
        loop_s: median(times.gaps.iter().map(|&g| g as f64 * 1e-9)),
        front_s: front[0] * 1e-9,
        tokenize_s_per_byte: front[1] * 1e-9,
        deliver_s: median(rows.iter().map(|r| r.deliver_ns * 1e-9)),
        bytes_per_token: bytes / tokens.max(1.0),
    }
}

/// Relative errors of the model: (predicted − measured) / measured.
fn errors(cost: &CostModel, samples: &[StepSample]) -> Vec<f64> {
    samples.iter().map(|s| cost.step_ns(&s.shape) as f64 / s.ns.max(1) as f64 - 1.0).collect()
}

fn quantiles(errors: &[f64]) -> Quantiles {
    let sorted = stats::sorted(errors);
    let at = |p| stats::percentile(&sorted, p).unwrap_or(0.0);
    Quantiles { p05: at(5.0), p25: at(25.0), p50: at(50.0), p75: at(75.0), p95: at(95.0) }
}

fn holdout(errors: &[f64]) -> Holdout {
    let absolute: Vec<f64> = errors.iter().map(|e| e.abs()).collect();
    Holdout {
        samples: errors.len(),
        mean_abs_error: stats::mean(&absolute).unwrap_or(0.0),
        max_abs_error: absolute.iter().copied().fold(0.0, f64::max),
        bias: stats::mean(errors).unwrap_or(0.0),
    }
}
