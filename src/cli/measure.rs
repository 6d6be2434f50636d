//! `lora-hbm measure`: TTFT and latency of one configuration.

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::client::{self, Api, ClientArgs, ClientSettings, budget, is_csv, ranks, verdict};
use super::failure::Failure;
use super::settings::{Context, OutputFormat};
use super::target::Target;
use super::workload::{Run, Source, WorkloadArgs, WorkloadSettings, amount};
use crate::loadgen::bench::bench_keys;
use crate::loadgen::summary::print_summary;
use crate::loadgen::{Health, LoadOutcome, SwapStats, prepare_for, saturated};
use crate::report::files;
use crate::report::manifest::{Manifest, stamped_beside};
use crate::report::requests::append_requests;
use crate::report::results::{self, ResultRow, RunContext, append_rows, check_takes_rows, rank_column};
use crate::workload::spec::Amount;
use crate::workload::trace::Trace;

/// Arrivals a second where nothing says.
const DEFAULT_RATE: f64 = 2.0;
/// Requests where nothing says.
const DEFAULT_REQUESTS: u64 = 200;

#[derive(Args, Debug, Serialize)]
pub struct MeasureArgs {
    #[command(flatten)]
    #[serde(skip)]
    workload: WorkloadArgs,
    #[command(flatten)]
    #[serde(skip)]
    client: ClientArgs,
    /// Adapters that the server has
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    total_loras: Option<u32>,
    /// Adapters that it keeps in device memory
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_loras: Option<u32>,
    /// Requests to send [default: 200, or the whole trace]; goes before --duration-seconds
    #[arg(short = 'n', long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    num_requests: Option<u64>,
    /// Seconds of arrivals, instead of a number of requests
    #[arg(short = 'd', long, value_name = "SECONDS", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_seconds: Option<f64>,
    /// Show the server's swap statistics after the run
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    show_swap_stats: Option<bool>,
    /// JSONL file that every request is appended to
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    requests_out: Option<PathBuf>,
}

/// The settings that are `measure`'s own.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Settings {
    total_loras: Option<u32>,
    gpu_loras: Option<u32>,
    num_requests: Option<u64>,
    duration_seconds: Option<f64>,
    show_swap_stats: bool,
    requests_out: Option<PathBuf>,
}

/// Everything, checked.
struct Measure {
    workload: WorkloadSettings,
    client: ClientSettings,
    settings: Settings,
    total_loras: u32,
    gpu_loras: u32,
    amount: Option<Amount>,
}

/// What the run gave.
struct Measured {
    source: Source,
    trace: Trace,
    health: Option<Health>,
    outcome: LoadOutcome,
    swaps: Option<SwapStats>,
}

pub fn run(args: &MeasureArgs, ctx: &Context) -> Result<(), Failure> {
    let measure = Measure::resolve(args, ctx)?;
    let out = measure.client.out.as_deref();
    measure.client.check(&[out, measure.settings.requests_out.as_deref()])?;
    if let Some(path) = out.filter(|p| is_csv(p)) {
        check_takes_rows(path).map_err(|e| Failure::Failed(e.into()))?;
    }
    let mut manifest = measure.manifest()?;
    let measured = client::runtime()?.block_on(measure.run(ctx))?;
    manifest.seeds = vec![measured.trace.header.seed];

    if let Some(path) = &measure.settings.requests_out {
        append_requests(path, &measured.outcome.records).map_err(|e| Failure::Failed(e.into()))?;
    }
    let mut row = measure.row(&measured);
    if let Some(out) = out {
        manifest.end(measured.outcome.cut_short.is_none());
        let path = stamped_beside(out, &manifest.started);
        manifest.write(&path).map_err(|e| Failure::Failed(e.into()))?;
        row.manifest = path.file_name().map(|n| n.to_string_lossy().into_owned());
        if is_csv(out) {
            append_rows(out, std::slice::from_ref(&row)).map_err(|e| Failure::Failed(e.into()))?;
        } else {
            let line = format!("{}\n", measure.json(&row, &measured));
            files::append(out, line.as_bytes()).map_err(|e| Failure::Failed(e.into()))?;
        }
    }
    measure.print(&row, &measured, ctx);
    verdict(&measured.outcome)
}

impl Measure {
    fn resolve(args: &MeasureArgs, ctx: &Context) -> Result<Self, Failure> {
        let workload: WorkloadSettings = ctx.resolve("measure", &args.workload)?;
        let client = ctx.resolve::<ClientSettings, _>("measure", &args.client)?.with_key(&args.client);
        let settings: Settings = ctx.resolve("measure", args)?;
        workload.check()?;
        let (total_loras, gpu_loras) = budget(settings.total_loras, settings.gpu_loras)?;
        let amount = amount(settings.num_requests, settings.duration_seconds)?;
        Ok(Self { workload, client, settings, total_loras, gpu_loras, amount })
    }

    async fn run(&self, ctx: &Context) -> Result<Measured, Failure> {
        let Target { server, health, dialect, .. } =
            Target::find(&self.client, self.total_loras, Some(self.gpu_loras)).await?;
        let (tokenizer, said) = client::tokenizer(self.workload.tokenizer.as_deref(), health.as_ref())?;
        tracing::info!("{said}");
        let (source, said) = self.workload.source(&tokenizer)?;
        tracing::info!("{said}");
        let trace = self.workload.trace(&source, &self.how(health.as_ref()))?;
        let requests = prepare_for(&trace, &tokenizer, &dialect).map_err(|e| Failure::Failed(e.into()))?;
        if !ctx.quiet && ctx.format == OutputFormat::Table {
            self.announce(&trace, &source);
        }
        if let Err(e) = server.reset_swap_stats().await {
            let said = format!("swap statistics could not be reset, so they are left out: {e}");
            match self.client.api {
                Api::Generate => tracing::warn!("{said}"),
                // Only this experiment's servers have them.
                Api::Openai => tracing::debug!("{said}"),
            }
        }
        let before = server.swap_stats().await.ok();
        let outcome = self.client.run(&server, &requests).await;
        let swaps = match (before, server.swap_stats().await) {
            // Counted from before the run, in case that the reset did not take.
            (Some(before), Ok(mut after)) => {
                after.runtime.swap_calls = after.runtime.swap_calls.saturating_sub(before.runtime.swap_calls);
                after.runtime.swap_count = after.runtime.swap_count.saturating_sub(before.runtime.swap_count);
                Some(after)
            }
            _ => None,
        };
        Ok(Measured { source, trace, health, outcome, swaps })
    }

    fn how(&self, health: Option<&Health>) -> Run {
        Run {
            total_loras: self.total_loras,
            rate: None,
            default_rate: DEFAULT_RATE,
            amount: self.amount,
            default_amount: Amount::Requests(DEFAULT_REQUESTS),
            ranks: health.map(ranks).unwrap_or_default(),
        }
    }

    fn announce(&self, trace: &Trace, source: &Source) {
        let line = "=".repeat(60);
        let tokens: f64 = trace.requests.iter().map(|r| f64::from(r.prompt_tokens)).sum();
        println!("\n{line}\nTTFT/Latency Measurement\n{line}");
        println!("  Endpoint: {}", self.client.endpoint);
        println!("  Total LoRAs: {}", self.total_loras);
        println!("  GPU LoRAs: {}", self.gpu_loras);
        println!("  Prompt regime: {}", self.workload.regime_column(source));
        println!("  Arrivals: {}", trace.header.source);
        println!("  Mode: {} requests over {:.1} s", trace.requests.len(), trace.duration_s());
        println!("  Avg prompt tokens: {:.1}", tokens / trace.requests.len() as f64);
        println!("  Timeout: {}s\n{line}\n", self.client.timeout);
    }

    fn row(&self, measured: &Measured) -> ResultRow {
        let Measured { source, trace, health, outcome, swaps } = measured;
        let config = health.as_ref().map(|h| h.config.clone()).unwrap_or_default();
        let regime = self.workload.regime_column(source);
        let replays = self.workload.replays_times(source);
        let by_time = matches!(self.amount, Some(Amount::DurationS(_)));
        let run = RunContext {
            arrival_rate: (!replays).then_some(self.workload.arrival_rate.unwrap_or(DEFAULT_RATE)),
            num_requests: (!by_time).then_some(trace.requests.len() as u64),
            duration_seconds: Some(outcome.wall_s),
            model: config.model.clone(),
            rank: health.as_ref().and_then(|h| rank_column(&ranks(h))),
            policy: config.policy,
            evict: config.evict,
            swap_mode: config.swap_mode,
            popularity: Some(trace.header.popularity.clone()),
            seed: Some(trace.header.seed),
            max_num_seqs: config.max_num_seqs,
            max_tokens: trace.common_output_tokens(),
            arrivals: Some(self.workload.arrivals_column(source)),
            swap_count: swaps.map(|s| s.runtime.swap_count),
            saturated: saturated(&outcome.records),
            ..RunContext::new(results::Source::Measured, self.total_loras, self.gpu_loras, &regime)
        };
        ResultRow::from_records(&outcome.records, &run)
    }

    fn manifest(&self) -> Result<Manifest, Failure> {
        let config = json!({"workload": self.workload, "client": self.client, "measure": self.settings});
        let mut manifest = Manifest::begin("measure", &config, &[self.workload.seed])
            .map_err(|e| Failure::Failed(e.into()))?;
        manifest.dataset = Some(self.workload.prompts()?);
        Ok(manifest)
    }

    /// The row with the keys of `vllm bench serve` beside its own.
    fn json(&self, row: &ResultRow, measured: &Measured) -> Value {
        let mut json = json!(row);
        if let Value::Object(map) = &mut json {
            map.insert("type".to_owned(), "measurement".into());
            map.insert("client_lag".to_owned(), json!(measured.outcome.lag));
            map.insert("swap_stats".to_owned(), json!(measured.swaps));
            map.insert("errors_by_kind".to_owned(), json!(measured.outcome.faults));
            map.insert("cut_short".to_owned(), json!(measured.outcome.cut_short));
            map.extend(bench_keys(&measured.outcome));
        }
        json
    }

    fn print(&self, row: &ResultRow, measured: &Measured, ctx: &Context) {
        if ctx.format == OutputFormat::Json {
            println!("{}", self.json(row, measured));
            return;
        }
        let title = format!("RESULTS: total_loras={}, gpu_loras={}", self.total_loras, self.gpu_loras);
        print_summary(&title, row, &measured.outcome.lag, &measured.outcome.faults);
        println!("{}\n", "=".repeat(60));
        if self.settings.show_swap_stats {
            match &measured.swaps {
                Some(swaps) => {
                    println!("LoRA Swap Statistics:");
                    println!("  Init:    {}", json!(swaps.init));
                    println!("  Runtime: {}", json!(swaps.runtime));
                }
                None => println!("LoRA Swap Statistics: the server did not give them"),
            }
        }
        if let Some(out) = &self.client.out {
            println!("Results appended to: {}", out.display());
        }
    }
}
