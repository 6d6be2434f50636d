//! `lora-hbm bench loadgen`: how far the load generator's own clock is off.

use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::cli::client::{Api, runtime};
use crate::cli::failure::Failure;
use crate::cli::settings::{Context, OutputFormat};
use crate::cli::ui;
use crate::cli::workload::check_rate;
use crate::loadgen::proof::{Proof, ProofError, ProofOptions, prove};
use crate::loadgen::{Completions, Dialect};
use crate::report::stats::Summary;
use crate::workload::arrivals::Arrivals;
use crate::workload::spec::WorkloadError;

/// The error that is allowed at the median and at p99, in milliseconds.
const ALLOWED_MS: [f64; 2] = [1.0, 2.0];

#[derive(Args, Debug, Serialize)]
pub(super) struct LoadgenBenchArgs {
    /// HTTP interface [default: openai]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    api: Option<Api>,
    /// Requests a second [default: 500]
    #[arg(short = 'r', long, value_name = "RATE", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    arrival_rate: Option<f64>,
    /// Seconds of arrivals [default: 20]
    #[arg(short = 'd', long, value_name = "SECONDS", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_seconds: Option<f64>,
    /// Arrival process: poisson, fixed or gamma:CV [default: poisson]
    #[arg(long, value_name = "PROCESS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    arrivals: Option<Arrivals>,
    /// Milliseconds that the server waits before a first token [default: 20]
    #[arg(long, value_name = "MS", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    delay_ms: Option<f64>,
    /// Output tokens of a request [default: 16]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
}

#[derive(Serialize, Deserialize)]
#[serde(default)]
struct LoadgenSettings {
    api: Api,
    arrival_rate: f64,
    duration_seconds: f64,
    arrivals: Arrivals,
    delay_ms: f64,
    max_tokens: u32,
}

impl Default for LoadgenSettings {
    fn default() -> Self {
        let default = ProofOptions::default();
        Self {
            api: Api::Openai,
            arrival_rate: default.rate,
            duration_seconds: default.seconds,
            arrivals: default.arrivals,
            delay_ms: default.delay.as_secs_f64() * 1e3,
            max_tokens: default.max_tokens,
        }
    }
}

pub(super) fn run(args: &LoadgenBenchArgs, ctx: &Context) -> Result<(), Failure> {
    let s: LoadgenSettings = ctx.resolve("bench", args)?;
    check_rate(s.arrival_rate)?;
    if !(s.duration_seconds > 0.0 && s.duration_seconds <= 3600.0) {
        return Err(Failure::usage(format!(
            "--duration-seconds is {}: it must be over 0 and at most 3600",
            s.duration_seconds
        )));
    }
    if !(0.0..=60_000.0).contains(&s.delay_ms) {
        return Err(Failure::usage(format!("--delay-ms is {}: it must be from 0 to 60000", s.delay_ms)));
    }
    let options = ProofOptions {
        dialect: match s.api {
            Api::Generate => Dialect::Generate,
            Api::Openai => Dialect::Completions(Completions::default()),
        },
        rate: s.arrival_rate,
        seconds: s.duration_seconds,
        arrivals: s.arrivals,
        delay: Duration::from_secs_f64(s.delay_ms * 1e-3),
        max_tokens: s.max_tokens,
        ..ProofOptions::default()
    };
    let bar = ui::bar((s.arrival_rate * s.duration_seconds) as u64, "requests");
    let proof = runtime()?.block_on(prove(&options, |p| bar.set_position(p.ended as u64)));
    bar.finish_and_clear();
    let proof = proof.map_err(|e| match e {
        ProofError::Workload(WorkloadError::EmptyPool { .. }) => Failure::Failed(e.into()),
        ProofError::Workload(_) => Failure::Usage(e.into()),
        e => Failure::Failed(e.into()),
    })?;
    match ctx.format {
        OutputFormat::Json => println!("{}", serde_json::to_string(&proof).map_err(Failure::failed)?),
        OutputFormat::Table => print(&proof),
    }
    verdict(&proof)
}

fn print(proof: &Proof) {
    let mut table = ui::table(&["milliseconds", "median", "p90", "p99", "max"]);
    let mut row = |what: &str, s: &Summary| {
        let cells = [s.median, s.p90, s.p99, s.max].map(|s| format!("{:.3}", s * 1e3));
        let [median, p90, p99, max] = cells;
        table.add_row([what.to_owned(), median, p90, p99, max]);
    };
    row("the server's wait, by its own clock", &proof.server);
    row("client's TTFT from sending, less that", &proof.error);
    row("client's TTFT from the schedule, less that", &proof.error_from_schedule);
    println!("{table}");
    println!("{} requests, {:.0} a second; lag: {}", proof.requests, proof.rate, proof.lag);
}

fn verdict(proof: &Proof) -> Result<(), Failure> {
    let error = &proof.error_from_schedule;
    let [median, p99] = [error.median * 1e3, error.p99 * 1e3];
    if median < ALLOWED_MS[0] && p99 < ALLOWED_MS[1] {
        return Ok(());
    }
    Err(Failure::Unmet(format!(
        "the generator's error from the schedule is {median:.3} ms at the median and {p99:.3} ms at p99, and {} and {} ms \
         are allowed: leave it more of the machine",
        ALLOWED_MS[0], ALLOWED_MS[1]
    )))
}
