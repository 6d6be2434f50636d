//! The results CSV: one row a run, the reference experiment's columns first.
//!
//! Rows are only ever appended, whole, and only under the header that this program writes; lines
//! that start with `#` are comments to every reader here.

mod file;

use serde::{Deserialize, Serialize};

use super::record::{PartsS, RequestRecord, Status};
use super::stats::{Summary, mean};

pub use file::{ResultsError, append_rows, check_takes_rows, read_rows, to_csv};

/// Where a row's numbers come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// An engine on the wall clock.
    Measured,
    /// The simulator on its virtual clock.
    Simulated,
}

impl Source {
    /// The word in the CSV.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Measured => "measured",
            Self::Simulated => "simulated",
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// One run. Times in seconds, rates in percent, tokens in tokens; what is not known is empty in the
/// file. The order of the fields is the order of the columns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResultRow {
    /// When the run started, local time, `YYYY-mm-dd HH:MM:SS`.
    pub run_timestamp: String,
    /// Adapters served.
    pub total_loras: u32,
    /// Adapter slots in device memory: the budget.
    pub gpu_loras: u32,
    /// Prompt lengths: `short`, `long`, or what the trace is called.
    pub prompt_regime: String,
    /// Requests a second, as asked for; empty where the trace's own times were kept.
    pub arrival_rate: Option<f64>,
    /// Requests asked for; empty where a duration was.
    pub num_requests: Option<u64>,
    /// Server's TTFT, from arrival to the first token delivered.
    pub ttft_median: Option<f64>,
    /// Server's TTFT.
    pub ttft_p99: Option<f64>,
    /// From the first scheduled arrival to the last byte.
    pub duration_seconds: Option<f64>,
    /// Requests that have ended.
    pub total_requests: u64,
    /// Those that ended well.
    pub successful: u64,
    /// Those that failed.
    pub errors: u64,
    /// Those that took too long.
    pub timeouts: u64,
    /// Successful over all, percent.
    pub success_rate: Option<f64>,
    /// Errors and time-outs over all, percent.
    pub error_rate: Option<f64>,
    /// Shortest prompt of a successful request.
    pub prompt_tokens_min: Option<u32>,
    /// Longest prompt of a successful request.
    pub prompt_tokens_max: Option<u32>,
    /// Mean prompt of the successful requests.
    pub prompt_tokens_mean: Option<f64>,
    /// Server's TTFT.
    pub ttft_min: Option<f64>,
    /// Server's TTFT.
    pub ttft_mean: Option<f64>,
    /// Server's TTFT.
    pub ttft_p90: Option<f64>,
    /// Server's TTFT.
    pub ttft_max: Option<f64>,
    /// From sent to last byte.
    pub latency_min: Option<f64>,
    /// From sent to last byte.
    pub latency_median: Option<f64>,
    /// From sent to last byte.
    pub latency_mean: Option<f64>,
    /// From sent to last byte.
    pub latency_p90: Option<f64>,
    /// From sent to last byte.
    pub latency_p99: Option<f64>,
    /// From sent to last byte.
    pub latency_max: Option<f64>,
    /// Measured or simulated.
    pub source: Source,
    /// The base model.
    pub model: Option<String>,
    /// The adapters' rank; several are joined by `+`, in the order in which adapters cycle through them.
    pub rank: Option<String>,
    /// Admission policy.
    pub policy: Option<String>,
    /// Eviction rule.
    pub evict: Option<String>,
    /// Swap mode.
    pub swap_mode: Option<String>,
    /// How adapters were drawn, as in the trace's header.
    pub popularity: Option<String>,
    /// Seed of the trace.
    pub seed: Option<u64>,
    /// Number of the repeat on the same trace, from 0.
    pub repeat: Option<u32>,
    /// Running sequences at once, at most.
    pub max_num_seqs: Option<u32>,
    /// Output tokens asked for.
    pub max_tokens: Option<u32>,
    /// Arrival process.
    pub arrivals: Option<String>,
    /// Arrival rate over the full budget's saturation rate.
    pub rho: Option<f64>,
    /// Adapters copied into a slot during the run, preloading left out.
    pub swap_count: Option<u64>,
    /// Mean TTFT part of the successful requests: HTTP and tokenising.
    pub ttft_front_mean: Option<f64>,
    /// Mean TTFT part: no sequence place or token budget, or the running step's end.
    pub ttft_queue_mean: Option<f64>,
    /// Mean TTFT part: no KV blocks.
    pub ttft_kv_mean: Option<f64>,
    /// Mean TTFT part: all slots pinned.
    pub ttft_slot_mean: Option<f64>,
    /// Mean TTFT part: its adapter being copied.
    pub ttft_swap_mean: Option<f64>,
    /// Mean TTFT part: its tokens in the running step.
    pub ttft_prefill_mean: Option<f64>,
    /// Mean TTFT part: first token to first byte out.
    pub ttft_deliver_mean: Option<f64>,
    /// Client's TTFT, from the scheduled time to the first byte.
    pub client_ttft_median: Option<f64>,
    /// Client's TTFT.
    pub client_ttft_p99: Option<f64>,
    /// Of a simulated run, whether the rate is above 0.95 of this budget's saturation rate. Of a measured one, whether
    /// the backlog grew from its second third to its last by more than 5 % of a third's arrivals
    /// (`src/loadgen/saturation.rs`): empty where there are too few requests to tell.
    pub saturated: Option<bool>,
    /// Key of the experiment's cell.
    pub cell: Option<String>,
    /// The run manifest's path from the CSV's folder, with `/` on every system.
    pub manifest: Option<String>,
    /// Settings of the cell that have no column of their own and are not the default, as
    /// [`settings::join`](super::settings::join) writes them; empty where they are unknown, as in files that are older
    /// than the column.
    pub settings: Option<String>,
}

/// The header line, without its line end.
pub const HEADER: &str = "run_timestamp,total_loras,gpu_loras,prompt_regime,arrival_rate,num_requests,ttft_median,ttft_p99,\
    duration_seconds,total_requests,successful,errors,timeouts,success_rate,error_rate,\
    prompt_tokens_min,prompt_tokens_max,prompt_tokens_mean,ttft_min,ttft_mean,ttft_p90,ttft_max,\
    latency_min,latency_median,latency_mean,latency_p90,latency_p99,latency_max,\
    source,model,rank,policy,evict,swap_mode,popularity,seed,repeat,max_num_seqs,max_tokens,arrivals,rho,\
    swap_count,ttft_front_mean,ttft_queue_mean,ttft_kv_mean,ttft_slot_mean,ttft_swap_mean,\
    ttft_prefill_mean,ttft_deliver_mean,client_ttft_median,client_ttft_p99,saturated,cell,manifest,settings";

/// What a row says besides what follows from its requests; unknown things stay none.
#[derive(Clone, Debug)]
pub struct RunContext {
    /// See [`ResultRow::run_timestamp`]; none is the present.
    pub run_timestamp: Option<String>,
    /// See [`ResultRow::total_loras`].
    pub total_loras: u32,
    /// See [`ResultRow::gpu_loras`].
    pub gpu_loras: u32,
    /// See [`ResultRow::prompt_regime`].
    pub prompt_regime: String,
    /// See [`ResultRow::arrival_rate`].
    pub arrival_rate: Option<f64>,
    /// See [`ResultRow::num_requests`].
    pub num_requests: Option<u64>,
    /// See [`ResultRow::duration_seconds`].
    pub duration_seconds: Option<f64>,
    /// See [`ResultRow::source`].
    pub source: Source,
    /// See [`ResultRow::model`].
    pub model: Option<String>,
    /// See [`ResultRow::rank`] and [`rank_column`].
    pub rank: Option<String>,
    /// See [`ResultRow::policy`].
    pub policy: Option<String>,
    /// See [`ResultRow::evict`].
    pub evict: Option<String>,
    /// See [`ResultRow::swap_mode`].
    pub swap_mode: Option<String>,
    /// See [`ResultRow::popularity`].
    pub popularity: Option<String>,
    /// See [`ResultRow::seed`].
    pub seed: Option<u64>,
    /// See [`ResultRow::repeat`].
    pub repeat: Option<u32>,
    /// See [`ResultRow::max_num_seqs`].
    pub max_num_seqs: Option<u32>,
    /// See [`ResultRow::max_tokens`].
    pub max_tokens: Option<u32>,
    /// See [`ResultRow::arrivals`].
    pub arrivals: Option<String>,
    /// See [`ResultRow::rho`].
    pub rho: Option<f64>,
    /// See [`ResultRow::swap_count`].
    pub swap_count: Option<u64>,
    /// See [`ResultRow::saturated`].
    pub saturated: Option<bool>,
    /// See [`ResultRow::cell`].
    pub cell: Option<String>,
    /// See [`ResultRow::manifest`].
    pub manifest: Option<String>,
    /// See [`ResultRow::settings`].
    pub settings: Option<String>,
}

impl RunContext {
    /// A run about which only this much is known.
    pub fn new(source: Source, total_loras: u32, gpu_loras: u32, prompt_regime: &str) -> Self {
        Self {
            run_timestamp: None,
            total_loras,
            gpu_loras,
            prompt_regime: prompt_regime.to_owned(),
            arrival_rate: None,
            num_requests: None,
            duration_seconds: None,
            source,
            model: None,
            rank: None,
            policy: None,
            evict: None,
            swap_mode: None,
            popularity: None,
            seed: None,
            repeat: None,
            max_num_seqs: None,
            max_tokens: None,
            arrivals: None,
            rho: None,
            swap_count: None,
            saturated: None,
            cell: None,
            manifest: None,
            settings: None,
        }
    }
}

/// Which run of an experiment a row is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RunKey {
    /// Measured or simulated.
    pub source: Source,
    /// Key of the cell.
    pub cell: String,
    /// The trace's seed.
    pub seed: u64,
    /// Number of the repeat on that trace.
    pub repeat: u32,
}

impl RunKey {
    /// The name of its files: of requests, and of decisions, each in a folder of its own.
    pub fn file_name(&self) -> String {
        format!("{}-{}-seed{}-{}.jsonl", self.cell, self.source, self.seed, self.repeat)
    }
}

/// The present, as [`ResultRow::run_timestamp`] writes it.
pub fn timestamp() -> String {
    chrono::Local::now().format("%Y-%m-%d %H:%M:%S").to_string()
}

/// Ranks as [`ResultRow::rank`] writes them; none of no ranks.
pub fn rank_column(ranks: &[u32]) -> Option<String> {
    (!ranks.is_empty()).then(|| ranks.iter().map(u32::to_string).collect::<Vec<_>>().join("+"))
}

impl ResultRow {
    /// The run that it is about; none of a row outside any experiment.
    pub fn run_key(&self) -> Option<RunKey> {
        Some(RunKey { source: self.source, cell: self.cell.clone()?, seed: self.seed?, repeat: self.repeat? })
    }

    /// The statistics of `records` beside what `run` knows. Times are those of successful requests
    /// only, as in the reference experiment.
    pub fn from_records(records: &[RequestRecord], run: &RunContext) -> Self {
        let count = |status| records.iter().filter(|r| r.status == status).count() as u64;
        let (total, successful) = (records.len() as u64, count(Status::Ok));
        let (errors, timeouts) = (count(Status::Error), count(Status::Timeout));
        let percent = |n: u64| (total > 0).then(|| n as f64 / total as f64 * 100.0);
        let ok = || records.iter().filter(|r| r.status == Status::Ok);
        let summary =
            |of: fn(&RequestRecord) -> Option<f64>| Summary::of(&ok().filter_map(of).collect::<Vec<_>>());
        let prompts = Summary::of(&ok().map(|r| f64::from(r.prompt_tokens)).collect::<Vec<_>>());
        let ttft = summary(|r| r.ttft_s);
        let client = summary(|r| r.first_s.map(|first| first - r.scheduled_s));
        let latency = summary(|r| r.latency_s);
        let parts: Vec<_> = ok().filter_map(|r| r.parts).collect();
        let part = |of: fn(&PartsS) -> f64| mean(&parts.iter().map(of).collect::<Vec<_>>());
        Self {
            run_timestamp: run.run_timestamp.clone().unwrap_or_else(timestamp),
            total_loras: run.total_loras,
            gpu_loras: run.gpu_loras,
            prompt_regime: run.prompt_regime.clone(),
            arrival_rate: run.arrival_rate,
            num_requests: run.num_requests,
            ttft_median: ttft.map(|s| s.median),
            ttft_p99: ttft.map(|s| s.p99),
            duration_seconds: run.duration_seconds,
            total_requests: total,
            successful,
            errors,
            timeouts,
            success_rate: percent(successful),
            error_rate: percent(errors + timeouts),
            prompt_tokens_min: prompts.map(|s| s.min as u32),
            prompt_tokens_max: prompts.map(|s| s.max as u32),
            prompt_tokens_mean: prompts.map(|s| s.mean),
            ttft_min: ttft.map(|s| s.min),
            ttft_mean: ttft.map(|s| s.mean),
            ttft_p90: ttft.map(|s| s.p90),
            ttft_max: ttft.map(|s| s.max),
            latency_min: latency.map(|s| s.min),
            latency_median: latency.map(|s| s.median),
            latency_mean: latency.map(|s| s.mean),
            latency_p90: latency.map(|s| s.p90),
            latency_p99: latency.map(|s| s.p99),
            latency_max: latency.map(|s| s.max),
            source: run.source,
            model: run.model.clone(),
            rank: run.rank.clone(),
            policy: run.policy.clone(),
            evict: run.evict.clone(),
            swap_mode: run.swap_mode.clone(),
            popularity: run.popularity.clone(),
            seed: run.seed,
            repeat: run.repeat,
            max_num_seqs: run.max_num_seqs,
            max_tokens: run.max_tokens,
            arrivals: run.arrivals.clone(),
            rho: run.rho,
            swap_count: run.swap_count,
            ttft_front_mean: part(|p| p.front),
            ttft_queue_mean: part(|p| p.queue),
            ttft_kv_mean: part(|p| p.kv),
            ttft_slot_mean: part(|p| p.slot),
            ttft_swap_mean: part(|p| p.swap),
            ttft_prefill_mean: part(|p| p.prefill),
            ttft_deliver_mean: part(|p| p.deliver),
            client_ttft_median: client.map(|s| s.median),
            client_ttft_p99: client.map(|s| s.p99),
            saturated: run.saturated,
            cell: run.cell.clone(),
            manifest: run.manifest.clone(),
            settings: run.settings.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;

    use super::*;

    fn record(id: u64, ttft: f64, status: Status) -> RequestRecord {
        RequestRecord {
            id,
            adapter: Some(0),
            rank: Some(8),
            prompt_tokens: 256 + id as u32,
            output_tokens: 16,
            scheduled_s: id as f64,
            sent_s: id as f64 + 0.001,
            first_s: Some(id as f64 + ttft + 0.002),
            last_s: Some(id as f64 + ttft + 0.1),
            ttft_s: Some(ttft),
            latency_s: Some(ttft + 0.099),
            status,
            parts: Some(PartsS { queue: ttft / 4.0, prefill: ttft * 3.0 / 4.0, ..PartsS::default() }),
            error: None,
        }
    }

    #[test]
    fn statistics_are_those_of_successful_requests() {
        let mut records: Vec<_> = (0..4).map(|i| record(i, 0.1 * (i + 1) as f64, Status::Ok)).collect();
        records.push(record(4, 50.0, Status::Error));
        records.push(record(5, 50.0, Status::Timeout));
        let mut run = RunContext::new(Source::Measured, 128, 2, "short");
        run.rank = rank_column(&[8, 64]);
        let row = ResultRow::from_records(&records, &run);
        assert_eq!((row.total_requests, row.successful, row.errors, row.timeouts), (6, 4, 1, 1));
        assert_relative_eq!(row.error_rate.unwrap(), 100.0 / 3.0, epsilon = 1e-9);
        assert_relative_eq!(row.ttft_median.unwrap(), 0.25, epsilon = 1e-9);
        assert_relative_eq!(row.ttft_p99.unwrap(), 0.4, epsilon = 1e-9);
        assert_relative_eq!(row.client_ttft_median.unwrap(), 0.252, epsilon = 1e-9);
        assert_relative_eq!(row.ttft_queue_mean.unwrap(), 0.0625, epsilon = 1e-9);
        assert_eq!((row.prompt_tokens_min, row.prompt_tokens_max), (Some(256), Some(259)));
        assert_eq!(row.rank.as_deref(), Some("8+64"));
        assert_eq!(row.swap_count, None);
        assert_eq!(row.run_timestamp.len(), "2026-01-15 10:30:00".len());
    }

    #[test]
    fn a_run_without_requests_has_empty_statistics() {
        let row = ResultRow::from_records(&[], &RunContext::new(Source::Simulated, 4, 2, "long"));
        assert_eq!((row.total_requests, row.success_rate, row.ttft_median), (0, None, None));
    }
}
