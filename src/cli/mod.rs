//! The command line: one file a subcommand, parsing kept apart from resolved settings.
//!
//! Every subcommand has a `…Args` struct (what clap parses; every flag optional, so that a default
//! never hides a configuration file's value) and a settings struct with the defaults; see
//! [`settings`] for how the two meet.

pub mod failure;
pub mod settings;
pub mod ui;

mod bench;
#[cfg(feature = "server")]
mod calibrate;
#[cfg(feature = "server")]
mod client;
mod compare;
mod completions;
#[cfg(feature = "server")]
mod demo;
mod engine_args;
#[cfg(feature = "engine")]
mod fetch_data;
#[cfg(feature = "server")]
mod measure;
mod merge;
mod plan;
#[cfg(feature = "plot")]
mod plot;
#[cfg(feature = "server")]
mod probe;
mod profile;
mod replay;
#[cfg(feature = "plot")]
mod report;
#[cfg(feature = "server")]
mod serve;
mod simulate;
#[cfg(feature = "server")]
mod smoke_test;
mod sweep;
#[cfg(feature = "server")]
mod target;
mod trace;
mod validate;
pub mod workload;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use failure::Failure;
use settings::Context;

/// How many LoRA adapters should stay in GPU memory?
#[derive(Parser, Debug)]
#[command(name = "lora-hbm", version, about, long_about = None, propagate_version = true)]
pub struct Cli {
    #[command(flatten)]
    global: settings::GlobalArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Serve a base model with LoRA adapters over HTTP
    #[cfg(feature = "server")]
    Serve(Box<serve::ServeArgs>),
    /// Check that a server answers, swaps and counts as it should
    #[cfg(feature = "server")]
    SmokeTest(smoke_test::SmokeTestArgs),
    /// Find an arrival rate that a server bears
    #[cfg(feature = "server")]
    Probe(probe::ProbeArgs),
    /// Measure TTFT and latency of one configuration
    #[cfg(feature = "server")]
    Measure(measure::MeasureArgs),
    /// Time this machine's steps, swaps and host: a profile
    #[cfg(feature = "server")]
    Calibrate(calibrate::CalibrateArgs),
    /// Time the engine's own steps and swaps, traces in-process, or the simulator
    Bench(bench::BenchArgs),
    /// Predict TTFT at every gpu_loras from a profile
    Simulate(Box<simulate::SimulateArgs>),
    /// Find the budget that meets a service-level objective
    Plan(Box<plan::PlanArgs>),
    /// Tell two configurations apart, with an interval
    Compare(compare::CompareArgs),
    /// Check a profile, hold it against a run, or make a what-if copy of it
    Profile(profile::ProfileArgs),
    /// Run an experiment file: measured on an engine, or simulated from a profile
    Sweep(sweep::SweepArgs),
    /// Hold simulated results against measured ones
    Validate(validate::ValidateArgs),
    /// Check that the simulator decides as the engine did
    Replay(replay::ReplayArgs),
    /// Make, take in and look at traces
    Trace(trace::TraceArgs),
    /// Get ShareGPT's text and the Llama-2 tokenizer into the data folder
    #[cfg(feature = "engine")]
    FetchData(fetch_data::FetchDataArgs),
    /// Draw median and p99 TTFT over gpu_loras from results CSVs
    #[cfg(feature = "plot")]
    Plot(plot::PlotArgs),
    /// Put figure, tables and how results were made on one HTML page
    #[cfg(feature = "plot")]
    Report(report::ReportArgs),
    /// Join results CSVs, each run once
    Merge(merge::MergeArgs),
    /// The whole experiment in small, on this machine's CPU, in under two minutes
    #[cfg(feature = "server")]
    Demo(demo::DemoArgs),
    /// Print a shell's completion script
    Completions(completions::CompletionsArgs),
}

impl Command {
    fn run(&self, ctx: &Context) -> Result<(), Failure> {
        match self {
            #[cfg(feature = "server")]
            Self::Serve(args) => serve::run(args, ctx),
            #[cfg(feature = "server")]
            Self::SmokeTest(args) => smoke_test::run(args, ctx),
            #[cfg(feature = "server")]
            Self::Probe(args) => probe::run(args, ctx),
            #[cfg(feature = "server")]
            Self::Measure(args) => measure::run(args, ctx),
            #[cfg(feature = "server")]
            Self::Calibrate(args) => calibrate::run(args, ctx),
            Self::Bench(args) => bench::run(args, ctx),
            Self::Simulate(args) => simulate::run(args, ctx),
            Self::Plan(args) => plan::run(args, ctx),
            Self::Compare(args) => compare::run(args, ctx),
            Self::Profile(args) => profile::run(args, ctx),
            Self::Sweep(args) => sweep::run(args, ctx),
            Self::Validate(args) => validate::run(args, ctx),
            Self::Replay(args) => replay::run(args, ctx),
            Self::Trace(args) => trace::run(args, ctx),
            #[cfg(feature = "engine")]
            Self::FetchData(args) => fetch_data::run(args, ctx),
            #[cfg(feature = "plot")]
            Self::Plot(args) => plot::run(args, ctx),
            #[cfg(feature = "plot")]
            Self::Report(args) => report::run(args, ctx),
            Self::Merge(args) => merge::run(args, ctx),
            #[cfg(feature = "server")]
            Self::Demo(args) => demo::run(args, ctx),
            Self::Completions(args) => completions::run(args, ctx),
        }
    }
}

/// Parses, runs, and gives the exit status: 0 done, 1 failed, 2 usage, 3 a condition does not hold.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = Cli::parse_from(args.into_iter().map(long_style));
    let ctx = match Context::new(&cli.global) {
        Ok(ctx) => ctx,
        Err(failure) => return failure.report(),
    };
    match cli.command.run(&ctx) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

/// The reference's `-pp` and `-tp` are long options with one dash, which clap would read as `-p p`.
fn long_style(arg: OsString) -> OsString {
    let Some(text) = arg.to_str() else { return arg };
    for (short, long) in [("-pp", "--pipeline-parallel-size"), ("-tp", "--tensor-parallel-size")] {
        match text.strip_prefix(short) {
            Some("") => return long.into(),
            Some(rest) if rest.starts_with('=') => return format!("{long}{rest}").into(),
            _ => {}
        }
    }
    arg
}
