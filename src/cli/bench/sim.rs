//! `lora-hbm bench sim`: requests a second of the simulator, as `benches/simulator.rs` times them, with a profile's costs.

use std::time::Instant;

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::cli::engine_args::EngineFlags;
use crate::cli::failure::Failure;
use crate::cli::settings::{Context, OutputFormat};
use crate::cli::simulate::load_profile;
use crate::cli::ui;
use crate::experiment::{EngineSettings, SimulateError, Simulator, lenient};
use crate::report::results::{RunContext, Source};
use crate::report::stats;
use crate::workload::arrivals::Arrivals;
use crate::workload::pool::PromptPool;
use crate::workload::popularity::Popularity;
use crate::workload::regime::Regime;
use crate::workload::spec::{Amount, Requests, WorkloadError, WorkloadSpec};

const TOTAL_LORAS: u32 = 128;
const GPU_LORAS: u32 = 32;
/// Shares of the full budget's saturation rate: mostly idle, busy, and more than it can do.
const LOADS: [f64; 3] = [0.2, 0.8, 1.1];
/// Each load is run so often; the median time counts.
const RUNS: usize = 3;

#[derive(Args, Debug, Serialize)]
pub(super) struct SimBenchArgs {
    /// Profile of the machine and model: a file or the name of a shipped one (required)
    #[arg(long, value_name = "PROFILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    profile: Option<String>,
    /// Requests in a run [default: 100000]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    requests: Option<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(default)]
struct SimBenchSettings {
    #[serde(deserialize_with = "lenient::text")]
    profile: Option<String>,
    requests: u64,
}

impl Default for SimBenchSettings {
    fn default() -> Self {
        Self { profile: None, requests: 100_000 }
    }
}

/// One load's speed.
#[derive(Serialize)]
struct Speed {
    rho: f64,
    /// Arrivals a second, on the simulated clock.
    arrival_rate: f64,
    requests: u64,
    /// On the wall clock, the median of the runs.
    seconds: f64,
    requests_per_second: f64,
}

pub(super) fn run(args: &SimBenchArgs, ctx: &Context) -> Result<(), Failure> {
    let settings: SimBenchSettings = ctx.resolve("bench", args)?;
    if settings.requests == 0 {
        return Err(Failure::usage("--requests is 0: it must be at least 1"));
    }
    let profile = load_profile("bench sim", settings.profile.as_deref())?;
    let flags = EngineFlags::default();
    let mut engine = flags.settings(&profile.model, TOTAL_LORAS, GPU_LORAS)?;
    flags.fill(&profile, &mut engine);
    let simulator = Simulator::new(profile).map_err(|e| Failure::Failed(e.into()))?;
    let speeds = speeds(&simulator, &engine, settings.requests)?;
    match ctx.format {
        OutputFormat::Json => println!("{}", serde_json::to_string(&speeds).map_err(Failure::failed)?),
        OutputFormat::Table => print(&speeds),
    }
    Ok(())
}

fn speeds(simulator: &Simulator, engine: &EngineSettings, requests: u64) -> Result<Vec<Speed>, Failure> {
    let simulated = |e: SimulateError| Failure::Failed(e.into());
    let drawn = |e: WorkloadError| Failure::Failed(e.into());
    let pool = PromptPool::embedded(Regime::Short);
    let full = EngineSettings { gpu_loras: TOTAL_LORAS, ..engine.clone() };
    let saturation =
        simulator.saturation_rate_of(&full, &workload(1.0, requests, engine), &pool).map_err(simulated)?;
    let context = RunContext::new(Source::Simulated, TOTAL_LORAS, GPU_LORAS, Regime::Short.as_str());
    let bar = ui::bar((LOADS.len() * RUNS) as u64, "simulating");
    let mut speeds = Vec::new();
    for rho in LOADS {
        let spec = workload(rho * saturation, requests, engine);
        let mut times = Vec::new();
        for _ in 0..RUNS {
            let begun = Instant::now();
            let trace = Requests::new(&spec, &pool).map_err(drawn)?;
            simulator.stream(engine, trace, (requests as usize, 0), &context).map_err(simulated)?;
            times.push(begun.elapsed().as_secs_f64());
            bar.inc(1);
        }
        let seconds = stats::median(&stats::sorted(&times)).unwrap_or(f64::NAN);
        let requests_per_second = requests as f64 / seconds;
        speeds.push(Speed { rho, arrival_rate: spec.rate, requests, seconds, requests_per_second });
    }
    bar.finish_and_clear();
    Ok(speeds)
}

fn workload(rate: f64, requests: u64, engine: &EngineSettings) -> WorkloadSpec {
    WorkloadSpec {
        regime: Regime::Short,
        arrivals: Arrivals::Poisson,
        rate,
        popularity: Popularity::Uniform,
        total_loras: TOTAL_LORAS,
        amount: Amount::Requests(requests),
        max_tokens: 16,
        seed: 42,
        ranks: engine.ranks(),
    }
}

fn print(speeds: &[Speed]) {
    let mut table = ui::table(&["ρ", "arrivals a second", "requests", "took", "requests a second"]);
    for s in speeds {
        table.add_row([
            s.rho.to_string(),
            format!("{:.2}", s.arrival_rate),
            s.requests.to_string(),
            ui::seconds(s.seconds),
            format!("{:.0}", s.requests_per_second),
        ]);
    }
    println!("{table}");
}
