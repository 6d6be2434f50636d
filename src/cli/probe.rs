//! `lora-hbm probe`: find an arrival rate for an experiment.

use std::path::Path;
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::client::{self, ClientArgs, ClientSettings, is_csv, ranks, verdict};
use super::failure::Failure;
use super::settings::{Context, OutputFormat};
use super::target::Target;
use super::workload::{Run, WorkloadArgs, WorkloadSettings, amount, check_rate};
use crate::experiment::lenient;
use crate::loadgen::rates::{self, RateSummary};
use crate::loadgen::{Health, prepare_for};
use crate::report::files;
use crate::report::manifest::{Manifest, stamped_beside};
use crate::workload::spec::Amount;

/// Arrivals a second where nothing says.
const DEFAULT_RATE: f64 = 1.0;

#[derive(Args, Debug, Serialize)]
pub struct ProbeArgs {
    #[command(flatten)]
    #[serde(skip)]
    workload: WorkloadArgs,
    #[command(flatten)]
    #[serde(skip)]
    client: ClientArgs,
    /// Adapters that the server has [default: 128]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    total_loras: Option<u32>,
    /// Rates to try one after the other, with commas between: 0.5,1,2
    #[arg(long, value_name = "RATES", allow_hyphen_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    arrival_rates: Option<String>,
    /// Seconds of arrivals at each rate [default: 60]
    #[arg(short = 'd', long, value_name = "SECONDS", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_seconds: Option<f64>,
    /// Seconds between one rate and the next [default: 5]
    #[arg(long, value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pause_seconds: Option<f64>,
}

/// The settings that are `probe`'s own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Settings {
    total_loras: u32,
    #[serde(deserialize_with = "lenient::joined")]
    arrival_rates: Option<String>,
    duration_seconds: f64,
    pause_seconds: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { total_loras: 128, arrival_rates: None, duration_seconds: 60.0, pause_seconds: 5.0 }
    }
}

/// Everything, checked.
struct Probe {
    workload: WorkloadSettings,
    client: ClientSettings,
    settings: Settings,
    /// None is the rate of the trace.
    rates: Vec<Option<f64>>,
    amount: Option<Amount>,
}

pub fn run(args: &ProbeArgs, ctx: &Context) -> Result<(), Failure> {
    let probe = Probe::resolve(args, ctx)?;
    let out = probe.client.out.as_deref();
    probe.client.check(&[out])?;
    if let Some(path) = out.filter(|p| is_csv(p)) {
        rates::check_csv(path).map_err(|e| Failure::Failed(e.into()))?;
    }
    let mut manifest = probe.manifest()?;
    let (summaries, ended) = client::runtime()?.block_on(probe.run(ctx))?;
    let text = ctx.format == OutputFormat::Table;
    if text && probe.rates.len() > 1 {
        print!("{}", rates::comparison(probe.workload.prompt_regime.as_str(), &summaries));
    }
    if !text {
        let summaries: Vec<Value> = summaries.iter().map(|s| Value::Object(s.json())).collect();
        println!("{}", json!({"metadata": probe.metadata(&summaries), "summaries": summaries}));
    }
    if let Some(out) = out {
        manifest.end(ended.is_ok());
        let path = stamped_beside(out, &manifest.started);
        manifest.write(&path).map_err(|e| Failure::Failed(e.into()))?;
        probe.save(out, &summaries)?;
        if text {
            println!("\nResults appended to: {}", out.display());
        }
    }
    ended
}

impl Probe {
    fn resolve(args: &ProbeArgs, ctx: &Context) -> Result<Self, Failure> {
        let workload: WorkloadSettings = ctx.resolve("probe", &args.workload)?;
        let client = ctx.resolve::<ClientSettings, _>("probe", &args.client)?.with_key(&args.client);
        let settings: Settings = ctx.resolve("probe", args)?;
        workload.check()?;
        if settings.total_loras == 0 {
            return Err(Failure::usage("--total-loras is 0: it must be at least 1"));
        }
        if !(0.0..=3600.0).contains(&settings.pause_seconds) {
            return Err(Failure::usage("--pause-seconds must be from 0 to 3600"));
        }
        let rates = match &settings.arrival_rates {
            Some(list) => parse_rates(list)?.into_iter().map(Some).collect(),
            None => vec![workload.arrival_rate],
        };
        let amount = amount(None, Some(settings.duration_seconds))?;
        Ok(Self { workload, client, settings, rates, amount })
    }

    /// A summary for each rate, and whether all of them could be tried.
    async fn run(&self, ctx: &Context) -> Result<(Vec<RateSummary>, Result<(), Failure>), Failure> {
        let Target { server, health, dialect, .. } =
            Target::find(&self.client, self.settings.total_loras, None).await?;
        let (tokenizer, said) = client::tokenizer(self.workload.tokenizer.as_deref(), health.as_ref())?;
        tracing::info!("{said}");
        let (source, said) = self.workload.source(&tokenizer)?;
        tracing::info!("{said}");
        let regime = self.workload.regime_column(&source);
        let mut summaries = Vec::new();
        for (i, &rate) in self.rates.iter().enumerate() {
            let trace = self.workload.trace(&source, &self.how(rate, health.as_ref()))?;
            let requests =
                prepare_for(&trace, &tokenizer, &dialect).map_err(|e| Failure::Failed(e.into()))?;
            let rate = rate.or(trace.mean_rate()).unwrap_or(DEFAULT_RATE);
            tracing::info!(
                "{} requests in {:.1} s at {rate:.3}/s ({})",
                requests.len(),
                trace.duration_s(),
                trace.header.source
            );
            let outcome = self.client.run(&server, &requests).await;
            let summary = RateSummary::of(&outcome, rate, &regime, self.settings.total_loras);
            if ctx.format == OutputFormat::Table {
                summary.print();
            }
            summaries.push(summary);
            if outcome.cut_short.is_some() {
                return Ok((summaries, verdict(&outcome)));
            }
            if i + 1 < self.rates.len() && self.settings.pause_seconds > 0.0 {
                tracing::info!("pausing {} s before the next rate", self.settings.pause_seconds);
                tokio::time::sleep(Duration::from_secs_f64(self.settings.pause_seconds)).await;
            }
        }
        Ok((summaries, Ok(())))
    }

    fn how(&self, rate: Option<f64>, health: Option<&Health>) -> Run {
        Run {
            total_loras: self.settings.total_loras,
            rate,
            default_rate: DEFAULT_RATE,
            amount: self.amount,
            default_amount: Amount::DurationS(self.settings.duration_seconds),
            ranks: health.map(ranks).unwrap_or_default(),
        }
    }

    fn manifest(&self) -> Result<Manifest, Failure> {
        let config = json!({"workload": self.workload, "client": self.client, "probe": self.settings});
        let mut manifest = Manifest::begin("probe", &config, &[self.workload.seed])
            .map_err(|e| Failure::Failed(e.into()))?;
        manifest.dataset = Some(self.workload.prompts()?);
        Ok(manifest)
    }

    fn metadata(&self, summaries: &[Value]) -> Map<String, Value> {
        let tested: Vec<&Value> = summaries.iter().filter_map(|s| s.get("arrival_rate")).collect();
        let metadata = json!({
            "type": "metadata",
            "run_timestamp": summaries.first().and_then(|s| s.get("run_timestamp")),
            "prompt_regime": self.workload.prompt_regime,
            "total_loras": self.settings.total_loras,
            "duration_seconds": self.settings.duration_seconds,
            "endpoint": self.client.endpoint,
            "dataset": self.workload.dataset,
            "trace": self.workload.trace,
            "tokenizer": self.workload.tokenizer,
            "max_tokens": self.workload.max_tokens,
            "seed": self.workload.seed,
            "arrivals": self.workload.arrivals,
            "popularity": self.workload.popularity,
            "arrival_rates_tested": tested,
        });
        match metadata {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    }

    /// Appends in one write, after a line that tells this run from the ones before.
    fn save(&self, out: &Path, summaries: &[RateSummary]) -> Result<(), Failure> {
        let there = files::is_begun(out);
        let text = if is_csv(out) {
            rates::csv(summaries, there)
        } else {
            let lines: Vec<Value> = summaries.iter().map(|s| Value::Object(s.json())).collect();
            rates::jsonl(&self.metadata(&lines), &lines, there)
        };
        files::append(out, text.as_bytes()).map_err(|e| Failure::Failed(e.into()))
    }
}

fn parse_rates(list: &str) -> Result<Vec<f64>, Failure> {
    let wrong = |text: &str| {
        Failure::usage(format!(
            "--arrival-rates: '{text}' is not a rate; give numbers with commas, like 0.5,1,2"
        ))
    };
    list.split(',')
        .map(|text| {
            let rate: f64 = text.trim().parse().map_err(|_| wrong(text))?;
            check_rate(rate)?;
            Ok(rate)
        })
        .collect()
}
