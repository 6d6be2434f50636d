//! `lora-hbm trace`: make, take in and look at traces.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use super::settings::Context;
use super::workload::{Run, WorkloadArgs, WorkloadSettings, amount};
use crate::experiment::lenient;
use crate::report::files::check_writable;
use crate::workload::spec::Amount;
use crate::workload::trace::Trace;

mod import_cmd;
mod show;

#[derive(Args, Debug, Serialize)]
pub struct TraceArgs {
    #[command(subcommand)]
    #[serde(skip)]
    command: TraceCommand,
}

#[derive(Subcommand, Debug)]
enum TraceCommand {
    /// Make a trace of a workload
    Generate(GenerateArgs),
    /// Make a trace of Azure's CSV or Mooncake's JSONL
    Import(import_cmd::ImportArgs),
    /// Say what is in a trace, or in a dataset
    Show(show::ShowArgs),
}

pub fn run(args: &TraceArgs, ctx: &Context) -> Result<(), Failure> {
    match &args.command {
        TraceCommand::Generate(args) => generate(args, ctx),
        TraceCommand::Import(args) => import_cmd::run(args, ctx),
        TraceCommand::Show(args) => show::run(args, ctx),
    }
}

#[derive(Args, Debug, Serialize)]
struct GenerateArgs {
    #[command(flatten)]
    #[serde(skip)]
    workload: WorkloadArgs,
    /// Adapters [default: 128]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    total_loras: Option<u32>,
    /// Ranks that the adapters cycle through, with commas between
    #[arg(long, value_name = "LIST")]
    #[serde(skip_serializing_if = "Option::is_none")]
    ranks: Option<String>,
    /// Requests [default: 200, or the whole trace]; goes before --duration-seconds
    #[arg(short = 'n', long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    num_requests: Option<u64>,
    /// Seconds of arrivals, instead of a number of requests
    #[arg(short = 'd', long, value_name = "SECONDS", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_seconds: Option<f64>,
    /// The trace to write
    #[arg(short = 'o', long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    out: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct GenerateSettings {
    total_loras: u32,
    #[serde(deserialize_with = "lenient::joined")]
    ranks: Option<String>,
    num_requests: Option<u64>,
    duration_seconds: Option<f64>,
    out: Option<PathBuf>,
}

impl Default for GenerateSettings {
    fn default() -> Self {
        Self { total_loras: 128, ranks: None, num_requests: None, duration_seconds: None, out: None }
    }
}

fn generate(args: &GenerateArgs, ctx: &Context) -> Result<(), Failure> {
    let workload: WorkloadSettings = ctx.resolve("trace", &args.workload)?;
    let settings: GenerateSettings = ctx.resolve("trace", args)?;
    workload.check()?;
    let out = output(settings.out.as_deref())?;
    let how = Run {
        total_loras: settings.total_loras,
        rate: None,
        default_rate: 2.0,
        amount: amount(settings.num_requests, settings.duration_seconds)?,
        default_amount: Amount::Requests(200),
        ranks: settings.ranks.as_deref().map(parse_ranks).transpose()?.unwrap_or_default(),
    };
    let source = read_source(&workload)?;
    let trace = workload.trace(&source, &how)?;
    write(&trace, out, ctx)
}

#[cfg(feature = "engine")]
fn read_source(workload: &WorkloadSettings) -> Result<super::workload::Source, Failure> {
    use crate::workload::tokenizer::Tokenizer;

    let tokenizer =
        Tokenizer::resolve(workload.tokenizer.as_deref()).map_err(|e| Failure::Failed(e.into()))?;
    let (source, said) = workload.source(&tokenizer)?;
    tracing::info!("{said}");
    Ok(source)
}

#[cfg(not(feature = "engine"))]
fn read_source(workload: &WorkloadSettings) -> Result<super::workload::Source, Failure> {
    let (source, said) = workload.source_without_text()?;
    tracing::info!("{said}");
    Ok(source)
}

fn parse_ranks(list: &str) -> Result<Vec<u32>, Failure> {
    list.split(',')
        .map(|text| match text.trim().parse() {
            Ok(rank) if rank > 0 => Ok(rank),
            _ => Err(Failure::usage(format!(
                "--ranks: '{text}' is not a rank; give numbers with commas, like 8,16,64"
            ))),
        })
        .collect()
}

/// The file to write, which must be there and writable.
fn output(out: Option<&Path>) -> Result<&Path, Failure> {
    let out = out.ok_or_else(|| Failure::usage("--out is required: the trace to write"))?;
    check_writable(out).map_err(|e| Failure::Failed(e.into()))?;
    Ok(out)
}

fn write(trace: &Trace, out: &Path, ctx: &Context) -> Result<(), Failure> {
    trace.write(out).map_err(|e| Failure::Failed(e.into()))?;
    show::print_trace(&out.display().to_string(), trace, ctx);
    Ok(())
}
