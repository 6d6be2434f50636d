//! A trace through the engine in-process: no HTTP, no tokenising.

use std::time::{Duration, Instant};

use lora_sched::AdapterId;
use serde::{Deserialize, Serialize};

use super::BenchError;
use crate::engine::setup::Loaded;
use crate::engine::{GenerateParams, GenerateRequest};
use crate::report::stats::{mean, percentile, sorted};
use crate::workload::trace::Trace;

/// A trace at one budget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TraceRow {
    /// The trace.
    pub trace: String,
    /// Slots.
    pub gpu_loras: usize,
    /// Requests.
    pub requests: usize,
    /// Arrivals a second.
    pub rate: Option<f64>,
    /// Time to first token, milliseconds: median …
    pub ttft_p50_ms: f64,
    /// … mean …
    pub ttft_mean_ms: f64,
    /// … and 99th percentile.
    pub ttft_p99_ms: f64,
    /// Between two tokens of a sequence, milliseconds: median …
    #[serde(default)]
    pub itl_p50_ms: Option<f64>,
    /// … and 99th percentile; none where every request has one token.
    #[serde(default)]
    pub itl_p99_ms: Option<f64>,
    /// The most tokens of a step.
    #[serde(default)]
    pub max_num_batched_tokens: usize,
    /// From the first arrival's time zero to the last token.
    pub makespan_s: f64,
    /// Copies of adapters while it ran.
    pub swaps: u64,
}

/// Replays `trace` on a fresh engine with `gpu_loras` slots: each request at its time, greedy, to its full
/// length.
///
/// # Errors
/// If the engine cannot be started, a request does not fit it, or it fails.
pub fn run_trace(
    loaded: &Loaded,
    gpu_loras: usize,
    name: &str,
    trace: &Trace,
) -> Result<TraceRow, BenchError> {
    let engine = loaded.start(gpu_loras, None)?;
    let vocab = loaded.spec().vocab_size as u32;
    let refused = |e: crate::engine::SubmitError| BenchError::Trace(format!("{name}: {e}"));
    engine.reset_swap_stats();
    let begin = Instant::now();
    let mut handles = Vec::with_capacity(trace.requests.len());
    for request in &trace.requests {
        let due = Duration::from_secs_f64(request.arrival_s);
        // The operating system wakes a sleeper late: the last stretch is waited for awake.
        while let Some(left) = due.checked_sub(begin.elapsed()).filter(|left| !left.is_zero()) {
            match left.checked_sub(Duration::from_millis(1)) {
                Some(sleep) => std::thread::sleep(sleep),
                // Spinning could keep a thread that was woken here from its core.
                None => std::thread::yield_now(),
            }
        }
        let prompt = (0..request.prompt_tokens).map(|i| (request.id as u32 * 31 + i * 7) % vocab).collect();
        let params = GenerateParams {
            max_tokens: request.output_tokens,
            ignore_eos: true,
            temperature: 0.0,
            ..GenerateParams::default()
        };
        let adapter = request.adapter.map(AdapterId);
        handles.push(
            engine.submit(GenerateRequest { prompt, adapter, params, received: None }).map_err(refused)?,
        );
    }
    let (mut ttft, mut gaps) = (Vec::with_capacity(handles.len()), Vec::new());
    for handle in handles {
        let done = handle.wait().map_err(refused)?;
        let first = done.first.ok_or_else(|| BenchError::Trace(format!("{name}: a request gave nothing")))?;
        ttft.push((first.at - done.received) as f64 * 1e-6);
        gaps.extend(done.handed.windows(2).map(|pair| (pair[1] - pair[0]) as f64 * 1e-6));
    }
    let makespan_s = begin.elapsed().as_secs_f64();
    let swaps = engine.swap_stats();
    engine.shutdown();
    let none = || BenchError::Trace(format!("{name} has no requests"));
    let ttft_mean_ms = mean(&ttft).ok_or_else(none)?;
    let (ttft, gaps) = (sorted(&ttft), sorted(&gaps));
    let at = |p| percentile(&ttft, p).ok_or_else(none);
    Ok(TraceRow {
        trace: name.to_owned(),
        gpu_loras,
        requests: ttft.len(),
        rate: trace.mean_rate(),
        ttft_p50_ms: at(50.0)?,
        ttft_mean_ms,
        ttft_p99_ms: at(99.0)?,
        itl_p50_ms: percentile(&gaps, 50.0),
        itl_p99_ms: percentile(&gaps, 99.0),
        max_num_batched_tokens: loaded.settings().max_num_batched_tokens,
        makespan_s,
        swaps: swaps.runtime.swap_count,
    })
}
