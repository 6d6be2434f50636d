//! From micro-benchmarks of a running executor to a [`Profile`].
//!
//! Steps of random compositions, swaps alone and beside steps, and single requests over HTTP are
//! timed, on a GPU also the engine while it serves; a non-negative fit turns them into costs. Nothing
//! here looks at a run that it will predict.

mod black_box;
pub mod fit;
mod host;
mod rooms;
mod served;
mod steps;
mod swaps;
mod terms;

use std::time::Duration;

use lora_sched::AdapterId;
use nalgebra::{DMatrix, DVector};
use serde::{Deserialize, Serialize};

pub use black_box::{
    BlackBoxCalibration, BlackBoxError, BlackBoxOptions, BlackBoxSample, calibrate_black_box,
};
pub use host::{HostError, HostSample, HostTimes};
pub use served::ReadingSample;
pub use steps::{StepBench, StepLimits, StepSample, Survey};
pub use swaps::{SwapSample, SwapTimes};

use host::fit_host;
use served::{Traffic, fit_reading, time_served};
use swaps::fit_swaps;

use crate::engine::executor::{Executor as _, ExecutorError};
use crate::engine::setup::{EngineSettings, Loaded, SetupError};
use crate::profile::{
    AdapterCosts, CostModel, EngineFacts, Holdout, Kind, Profile, ProfileError, Quantiles, SCHEMA_VERSION,
    StepCosts, Term,
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
    /// See [`Survey::duty`].
    pub duty: f64,
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
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
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
    /// A swap of an engine that served.
    ServedSwap(SwapSample),
    /// A step of one that read an adapter under way.
    Reading(ReadingSample),
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

/// Times an engine and fits its costs. `progress` is told what is under way and the share done.
pub fn calibrate(
    options: &CalibrateOptions,
    mut progress: impl FnMut(&str, f64),
) -> Result<Calibration, CalibrateError> {
    let mut settings = options.engine.clone();
    // One slot a sequence for steps to read; one more is written by the swaps that are timed beside them.
    let most = settings.max_num_seqs + 1;
    settings.gpu_loras = 1;
    settings.total_loras = most + rooms::spare_adapters(most);
    progress("loading", 0.0);
    let loaded = Loaded::load(settings)?;
    let on_gpu = loaded.shared_memory().is_some();
    let rooms = rooms::rooms(&loaded, most);
    let (mut steps, mut swap_times) = (Vec::new(), SwapTimes::default());
    for (i, &slots) in rooms.iter().enumerate() {
        progress("loading", i as f64 / rooms.len() as f64);
        let mut executor = loaded.executor(slots, false)?;
        let resident: Vec<AdapterId> = (0..slots as u32).map(AdapterId).collect();
        executor.preload(&resident)?;
        let (config, reading) = (loaded.scheduler_config(slots), slots - 1);
        let limits = StepLimits::new(&config, loaded.spec().vocab_size, reading);
        let name = if i == 0 { "calibrate".to_owned() } else { format!("calibrate {i}") };
        let mut bench = StepBench::new(&mut executor, limits, stream(options.seed, &name));
        let time = options.step_time / rooms.len() as u32;
        let mut show = |share: f64| progress("steps", (i as f64 + share) / rooms.len() as f64);
        let longest = options.longest;
        if on_gpu {
            let time = time.mul_f64(1.0 - TRAFFIC);
            let survey = Survey { time, longest, duty: options.duty, grid: i == 0 };
            steps.extend(bench.survey(survey, &mut show)?);
        } else {
            steps.extend(bench.sample(time, longest, show)?);
        }
        if i + 1 == rooms.len() {
            progress("swaps", 0.0);
            let source = rooms::swap_source(&loaded, slots);
            swap_times = swaps::time_swaps(&mut bench, &source, options.longest.min(512))?;
        }
    }

    let mut readings = Vec::new();
    if on_gpu {
        progress("traffic", 0.0);
        let time = options.step_time.mul_f64(TRAFFIC);
        let traffic = Traffic { time, longest: options.longest, seed: options.seed };
        let served = time_served(&loaded, rooms[0], traffic, |share| progress("traffic", share))?;
        steps.extend(served.steps);
        swap_times.served = served.swaps;
        readings = served.readings;
    }

    progress("host", 0.0);
    let lengths: Vec<u32> =
        [16, 64, 192, 448, 1024].iter().map(|&n: &u32| n.min(options.longest).max(2)).collect();
    let fewest = rooms.iter().copied().min().unwrap_or(most) - 1;
    let host_times = host::time_host(&loaded, fewest.max(1), &lengths)?;

    // Every fifth is held out: all kinds of compositions are among them.
    let steps: Vec<(bool, StepSample)> =
        steps.into_iter().enumerate().map(|(i, s)| (i % 5 == 4, s)).collect();

    let s = loaded.settings();
    let (specs, config) = (loaded.pool().specs(), loaded.scheduler_config(rooms[0]));
    let memory = loaded.memory_plan(rooms[0]);
    let mut ranks: Vec<(u32, u64)> = specs.iter().map(|a| (a.rank, a.bytes)).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let profile = Profile {
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
        step: StepCosts { features: Vec::new(), coef_ns: Vec::new() },
        swap: fit_swaps(&swap_times),
        host: fit_host(&host_times),
        residuals: Quantiles::default(),
        holdout: Holdout::default(),
        samples_file: None,
        sha256: String::new(),
    };
    let mut samples: Vec<Sample> =
        steps.iter().map(|&(held_out, sample)| Sample::Step { held_out, sample }).collect();
    samples.extend(swap_times.samples.iter().copied().map(Sample::Swap));
    let pair = |&(alone_ns, beside_ns): &(u64, u64)| Sample::StepPair { alone_ns, beside_ns };
    samples.extend(swap_times.steps.iter().map(pair));
    samples.extend(swap_times.served.iter().copied().map(Sample::ServedSwap));
    samples.extend(readings.iter().copied().map(Sample::Reading));
    samples.extend(host_times.requests.iter().copied().map(Sample::Host));
    samples.extend(host_times.gaps.iter().map(|&ns| Sample::Gap { ns }));
    Ok(Calibration { profile: refit(profile, &steps, &readings)?, samples })
}

/// A profile with its step costs fitted to these steps, of which the held-out ones are not shown to the fit but
/// judge it, and what it costs more to read an adapter under way to `readings`; with none of these it stays as it is.
pub fn refit(
    mut profile: Profile,
    steps: &[(bool, StepSample)],
    readings: &[ReadingSample],
) -> Result<Profile, ProfileError> {
    let of = |held: bool| steps.iter().filter(|s| s.0 == held).map(|s| s.1).collect::<Vec<_>>();
    let (seen, unseen) = (of(false), of(true));
    let on_gpu = profile.engine.memory_bytes.is_some();
    profile.step = fit_steps(&seen, &if on_gpu { terms::gpu_terms() } else { terms::cpu_terms() });
    let cost = CostModel::new(&profile)?;
    profile.residuals = quantiles(&errors(&cost, &seen));
    profile.holdout = holdout(&errors(&cost, &unseen));
    if !readings.is_empty() {
        profile.swap.reading_s = fit_reading(&cost, readings);
    }
    profile.tool = tool();
    Ok(profile.signed())
}

fn tool() -> String {
    let tool = Tool::this();
    format!("{} {} ({})", tool.name, tool.version, tool.commit)
}

fn fit_steps(samples: &[StepSample], terms: &[Term]) -> StepCosts {
    let counts = DMatrix::from_fn(samples.len(), terms.len(), |row, column| {
        terms[column].of(&samples[row].shape) as f64
    });
    let measured = DVector::from_fn(samples.len(), |row, _| samples[row].ns as f64);
    fit_costs(terms, &counts, &measured)
}

/// The costs, none of them negative, with which the `counts` of the terms come nearest to the `measured` nanoseconds,
/// by least relative squares: an error of 5 % is as bad at 1 ms as at 100 ms.
///
/// Relative to what is expected, not to what was measured: where a machine's speed wanders, errors relative to the
/// measured time weigh its fast moods more, and the costs come out below the mean by twice the square of the noise (a
/// tenth at 20 to 25 %). What requests wait for is a sum of steps, so it is the mean that counts. The first round has
/// nothing else to be relative to; a few rounds settle it.
///
/// A step that took several times what is expected was interrupted, by something that is no cost of its own, and counts
/// no more: most samples are single steps, and few may be all that a term has.
fn fit_costs(terms: &[Term], counts: &DMatrix<f64>, measured: &DVector<f64>) -> StepCosts {
    let mut expected = measured.map(|ns| ns.max(1.0));
    let mut costs = DVector::zeros(terms.len());
    for _ in 0..ROUNDS {
        let rows: Vec<usize> =
            (0..counts.nrows()).filter(|&row| measured[row] <= INTERRUPTED * expected[row]).collect();
        let relative = DMatrix::from_fn(rows.len(), counts.ncols(), |row, column| {
            counts[(rows[row], column)] / expected[rows[row]]
        });
        let taken = DVector::from_fn(rows.len(), |row, _| measured[rows[row]] / expected[rows[row]]);
        costs = fit::nnls(&relative, &taken);
        // A step that the terms make too little of must not outweigh all others.
        expected = (counts * &costs).zip_map(measured, |expected, ns| expected.max(ns / 4.0).max(1.0));
    }
    StepCosts {
        features: terms.iter().map(Term::to_string).collect(),
        coef_ns: costs.iter().copied().collect(),
    }
}

/// On a GPU, the share of the time for steps that goes to the engine as it serves, not to steps as they were chosen: what
/// both have, serving decides, and the chosen ones are for what it rarely has.
const TRAFFIC: f64 = 0.6;

/// Rounds of [`fit_costs`].
const ROUNDS: usize = 4;
/// Times what is expected.
const INTERRUPTED: f64 = 3.0;

fn median(values: impl Iterator<Item = f64>) -> f64 {
    stats::median(&stats::sorted(&values.collect::<Vec<_>>())).unwrap_or(0.0)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::{Feature, StepShape, rounded_rows};

    /// What an H100 took before its prefills were graphs, timed without rests.
    fn earlier() -> (Profile, Vec<(bool, StepSample)>) {
        let text = include_str!("../../tests/fixtures/calibration/h100-llama2-7b.samples.jsonl");
        let samples = text.lines().map(|line| serde_json::from_str(line).unwrap());
        let step = |sample| match sample {
            Sample::Step { held_out, sample } => Some((held_out, sample)),
            _ => None,
        };
        let profile = include_str!("../../tests/fixtures/calibration/h100-llama2-7b.json");
        (Profile::parse("earlier", profile).unwrap(), samples.filter_map(step).collect())
    }

    #[test]
    fn the_terms_fit_what_an_h100_took() {
        let (profile, steps) = earlier();
        let fitted = refit(profile, &steps, &[]).unwrap();
        assert!(fitted.holdout.samples > 100);
        // Without terms of their own for the two kinds of steps it was 4.8 %; the terms' last parts brought 3.5 to 2.9.
        assert!(fitted.holdout.mean_abs_error < 0.033, "{:?}", fitted.holdout);
        assert!(fitted.holdout.bias.abs() < 0.01, "{:?}", fitted.holdout);
    }

    #[test]
    fn the_mean_of_a_machine_whose_speed_wanders_is_fitted() {
        let sample = |(i, tokens): (usize, u64)| StepSample {
            shape: StepShape { tokens, decodes: tokens, decode_context: 10 * tokens, ..StepShape::default() },
            // Half of them take 1.6 times as long.
            ns: (1_000_000 + 50_000 * tokens) * if i % 2 == 0 { 10 } else { 16 } / 10,
        };
        let samples: Vec<StepSample> =
            (0..400).zip([1, 1, 2, 2, 4, 4, 16, 16].into_iter().cycle()).map(sample).collect();
        let terms = [Term::from(Feature::Step), Term::from(Feature::Tokens { from: 0, to: None })];
        let costs = fit_steps(&samples, &terms).coef_ns;
        for (found, mean) in costs.iter().zip([1_300_000.0, 65_000.0]) {
            assert!((found / mean - 1.0).abs() < 0.01, "{costs:?}");
        }
    }

    #[test]
    fn what_a_busy_device_takes_longer_for_is_found() {
        let (profile, mut steps) = earlier();
        // 6 ns a row for each hundred tokens a second above 20,000.
        let longer =
            |shape: &StepShape| 6 * rounded_rows(shape.tokens as usize) as u64 * (shape.recent - 200);
        for (i, (_, sample)) in steps.iter_mut().filter(|s| s.1.shape.prefills > 0).enumerate() {
            sample.shape.recent = 200 + i as u64 % 3 * 100;
            sample.ns += longer(&sample.shape);
        }
        let cost = CostModel::new(&refit(profile, &steps, &[]).unwrap()).unwrap();
        let at = |recent| StepShape { recent, tokens: 640, prefills: 1, ..StepShape::default() };
        let found = cost.step_ns(&at(350)) - cost.step_ns(&at(200));
        let put_in = longer(&at(350));
        assert!(found.abs_diff(put_in) < put_in / 5, "{found} ns, put in were {put_in}");
    }

    #[test]
    fn more_of_anything_never_costs_less() {
        let (profile, steps) = earlier();
        let cost = CostModel::new(&refit(profile, &steps, &[]).unwrap()).unwrap();
        let prefill = |tokens: u64| StepShape {
            tokens,
            prefills: 1,
            prefill_pairs: tokens * (tokens + 1) / 2,
            prefill_span: tokens,
            samples: 1,
            adapters: 1,
            adapter_ranks: 16,
            lora_tokens: tokens,
            lora_token_ranks: 16 * tokens,
            ..StepShape::default()
        };
        let decode = |decodes: u64, context: u64| StepShape {
            tokens: decodes,
            decodes,
            decode_context: decodes * context,
            samples: decodes,
            ..StepShape::default()
        };
        for n in 1..4096 {
            assert!(cost.step_ns(&prefill(n)) <= cost.step_ns(&prefill(n + 1)), "prefills of {n}");
            assert!(cost.step_ns(&decode(16, n)) <= cost.step_ns(&decode(16, n + 1)), "contexts of {n}");
        }
        for n in 1..16 {
            assert!(cost.step_ns(&decode(n, 512)) <= cost.step_ns(&decode(n + 1, 512)), "{n} decodes");
        }
    }
}
