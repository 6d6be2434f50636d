//! `lora-hbm bench`: the program's own speed, and the load generator's own error.

#[cfg(feature = "server")]
mod engine;
#[cfg(feature = "server")]
mod loadgen;
mod sim;

use clap::{Args, Subcommand};

use super::failure::Failure;
use super::settings::Context;

#[derive(Args, Debug)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Steps and swaps against what the device can do at best
    #[cfg(feature = "server")]
    Engine(engine::EngineBenchArgs),
    /// Traces in-process, without HTTP and tokenising
    #[cfg(feature = "server")]
    Trace(engine::TraceBenchArgs),
    /// The load generator's own error, against a server that only waits; exit status 3 if it is too large
    #[cfg(feature = "server")]
    Loadgen(loadgen::LoadgenBenchArgs),
    /// Requests a second of the simulator, on one core: 128 adapters, 32 slots, short prompts, 16 output tokens
    Sim(sim::SimBenchArgs),
}

pub fn run(args: &BenchArgs, ctx: &Context) -> Result<(), Failure> {
    match &args.what {
        #[cfg(feature = "server")]
        What::Engine(args) => engine::engine(args, ctx),
        #[cfg(feature = "server")]
        What::Trace(args) => engine::traces(args, ctx),
        #[cfg(feature = "server")]
        What::Loadgen(args) => loadgen::run(args, ctx),
        What::Sim(args) => sim::run(args, ctx),
    }
}
