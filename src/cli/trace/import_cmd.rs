//! `lora-hbm trace import`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::super::failure::Failure;
use super::super::settings::Context;
use super::super::workload::amount;
use crate::workload::arrivals::Arrivals;
use crate::workload::import::{self, Format, Timestamps};
use crate::workload::popularity::Popularity;
use crate::workload::replay::{Replay, replay_trace};

#[derive(Args, Debug, Serialize)]
pub struct ImportArgs {
    /// Azure's CSV or Mooncake's JSONL
    #[serde(skip)]
    file: PathBuf,
    /// Its format [default: told by its first line]
    #[arg(long, value_enum)]
    #[serde(skip)]
    kind: Option<Kind>,
    /// The unit of JSONL's timestamps [default: ms]
    #[arg(long, value_enum, value_name = "UNIT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    timestamps: Option<Unit>,
    /// Draw adapters for the requests; without it a trace that has none gets them when it is used
    #[arg(long, value_name = "LAW")]
    #[serde(skip_serializing_if = "Option::is_none")]
    popularity: Option<Popularity>,
    /// Adapters to draw from [default: 128]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    total_loras: Option<u32>,
    /// Seed of the drawing [default: 42]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    /// Only the first requests
    #[arg(short = 'n', long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    num_requests: Option<u64>,
    /// Only the first seconds
    #[arg(short = 'd', long, value_name = "SECONDS", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_seconds: Option<f64>,
    /// The trace to write
    #[arg(short = 'o', long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    out: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Azure's LLM inference traces: CSV
    Azure,
    /// Mooncake's traces: JSONL
    Mooncake,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Unit {
    /// Milliseconds, as in Mooncake's traces
    Ms,
    /// Seconds, as in vLLM's timed traces
    S,
}

impl From<Unit> for Timestamps {
    fn from(unit: Unit) -> Self {
        match unit {
            Unit::Ms => Self::Ms,
            Unit::S => Self::S,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Settings {
    timestamps: Unit,
    popularity: Option<Popularity>,
    total_loras: u32,
    seed: u64,
    num_requests: Option<u64>,
    duration_seconds: Option<f64>,
    out: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            timestamps: Unit::Ms,
            popularity: None,
            total_loras: 128,
            seed: 42,
            num_requests: None,
            duration_seconds: None,
            out: None,
        }
    }
}

pub fn run(args: &ImportArgs, ctx: &Context) -> Result<(), Failure> {
    let settings: Settings = ctx.resolve("trace", args)?;
    let amount = amount(settings.num_requests, settings.duration_seconds)?;
    let out = super::output(settings.out.as_deref())?;
    let failed = |e: import::ImportError| Failure::Failed(e.into());
    let format = match args.kind {
        Some(Kind::Azure) => Format::Azure,
        Some(Kind::Mooncake) => Format::Mooncake,
        None => import::sniff(&args.file).map_err(failed)?,
    };
    if format == Format::Azure && args.timestamps.is_some() {
        return Err(Failure::usage(
            "--timestamps is for JSONL: times of Azure's CSV are dates; leave it out",
        ));
    }
    let imported = import::import(&args.file, format, settings.timestamps.into()).map_err(failed)?;
    if let Some(said) = imported.numbered_said() {
        tracing::info!("{said}");
    }
    if imported.skipped_empty > 0 {
        tracing::warn!("{} requests without prompt or output tokens were left out", imported.skipped_empty);
    }
    let mut trace = imported.trace;
    if amount.is_some() || settings.popularity.is_some() {
        let popularity = trace.header.popularity.clone();
        let adapters: Vec<Option<u32>> = trace.requests.iter().map(|r| r.adapter).collect();
        let replay = Replay {
            arrivals: Arrivals::Trace,
            rate: None,
            popularity: settings.popularity,
            total_loras: settings.total_loras.max(trace.adapters()),
            amount,
            max_tokens: None,
            seed: settings.seed,
            ranks: Vec::new(),
        };
        trace = replay_trace(&trace, &replay).map_err(|e| Failure::Usage(e.into()))?;
        if settings.popularity.is_none() {
            // A cut alone leaves the adapters, or their absence, as they are.
            trace.requests.iter_mut().zip(adapters).for_each(|(r, adapter)| r.adapter = adapter);
            trace.header.popularity = popularity;
            trace.header.seed = 0;
        }
    }
    super::write(&trace, out, ctx)
}
