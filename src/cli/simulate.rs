//! `lora-hbm simulate`: TTFT at every budget, from a profile.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::engine_args::{EngineArgs, EngineFlags};
use super::failure::Failure;
use super::settings::{Context, OutputFormat};
use super::ui;
use super::workload::{Run, Source, WorkloadArgs, WorkloadSettings, amount};
use crate::experiment::{Cell, EngineSettings, Simulator, is_saturated, lenient, seed_budgets};
use crate::profile::{Kind, Profile};
use crate::report::binds::Binds;
use crate::report::files::{check_writable, is_begun};
use crate::report::manifest::{Manifest, unclaimed_beside};
use crate::report::results::{ResultRow, RunContext, append_rows, check_takes_rows, read_rows};
use crate::workload::arrivals::Arrivals;
use crate::workload::spec::{Amount, Requests};

/// Arrivals a second where nothing says otherwise.
const DEFAULT_RATE: f64 = 2.0;

#[derive(Args, Debug, Serialize)]
pub struct SimulateArgs {
    /// Profile of the machine and model: a file or the name of a shipped one (required)
    #[arg(long, value_name = "PROFILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    profile: Option<String>,
    #[command(flatten)]
    #[serde(skip)]
    workload: WorkloadArgs,
    #[command(flatten)]
    #[serde(skip)]
    engine: EngineArgs,
    /// Base model that the profile must be of [default: the profile's]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    /// LoRA adapters there are [default: 128]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    total_loras: Option<u32>,
    /// Budgets, such as 2,8,32, or seed: 2, 4, 8 … up to the total [default: seed]
    #[arg(long, value_name = "LIST|seed")]
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_loras: Option<String>,
    /// Requests in the trace [default: 200, or the whole trace]
    #[arg(short = 'n', long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    num_requests: Option<u64>,
    /// Requests at the start that are left out of the results [default: 0]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    warm_up: Option<u64>,
    /// Traces, of seeds --seed, --seed + 1 …; more than one needs something that is drawn [default: 1]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    seeds: Option<u64>,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    jobs: Option<usize>,
    /// Results CSV to append to
    #[arg(short, long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    out: Option<PathBuf>,
}

#[derive(Serialize, Deserialize)]
#[serde(default)]
struct SimulateSettings {
    #[serde(deserialize_with = "lenient::text")]
    profile: Option<String>,
    #[serde(deserialize_with = "lenient::text")]
    model: Option<String>,
    total_loras: u32,
    #[serde(deserialize_with = "lenient::joined_word")]
    gpu_loras: String,
    num_requests: Option<u64>,
    warm_up: u64,
    seeds: u64,
    jobs: usize,
    out: Option<PathBuf>,
}

impl Default for SimulateSettings {
    fn default() -> Self {
        Self {
            profile: None,
            model: None,
            total_loras: 128,
            gpu_loras: "seed".to_owned(),
            num_requests: None,
            warm_up: 0,
            seeds: 1,
            jobs: 0,
            out: None,
        }
    }
}

/// What the whole run needs.
struct Simulation {
    simulator: Simulator,
    workload: WorkloadSettings,
    source: Source,
    flags: EngineFlags,
    settings: SimulateSettings,
}

pub fn run(args: &SimulateArgs, ctx: &Context) -> Result<(), Failure> {
    let settings: SimulateSettings = ctx.resolve("simulate", args)?;
    let workload: WorkloadSettings = ctx.resolve("simulate", &args.workload)?;
    let flags: EngineFlags = ctx.resolve("simulate", &args.engine)?;
    workload.check()?;
    amount(settings.num_requests, None)?;
    let profile = load_profile("simulate", settings.profile.as_deref())?;
    if let Some(model) = &settings.model {
        profile.expect_model(model).map_err(|e| Failure::Failed(e.into()))?;
    }
    let budgets = budgets(&settings.gpu_loras, settings.total_loras)?;
    if settings.seeds == 0 {
        return Err(Failure::usage("--seeds is 0: it must be at least 1"));
    }
    if let Some(out) = &settings.out {
        check_writable(out).map_err(|e| Failure::Failed(e.into()))?;
        check_takes_rows(out).map_err(|e| Failure::Failed(e.into()))?;
    }
    let (source, said) = source(&workload)?;
    tracing::info!("{said}");
    if settings.seeds > 1 && !workload.draws(&source) {
        return Err(Failure::usage(format!(
            "--seeds is {}, and times, lengths and adapters are all the trace's: every seed would be the same run. Leave \
             --seeds out, or draw anew with --arrivals or --popularity",
            settings.seeds
        )));
    }
    let mut manifest =
        Manifest::begin("simulate", &(&settings, &workload, &flags), &[]).map_err(Failure::failed)?;
    manifest.of_profile(&profile);
    manifest.dataset = Some(workload.prompts()?);
    let simulator = Simulator::new(profile).map_err(|e| Failure::Failed(e.into()))?;
    let simulation = Simulation { simulator, workload, source, flags, settings };
    let no_room = without_room(&simulation.simulator, &budgets, |budget| simulation.engine(budget))?;

    let fitting = || budgets.iter().copied().filter(|b| !no_room.iter().any(|n| n.gpu_loras == *b));
    let work: Vec<(u64, u32)> =
        (0..simulation.settings.seeds).flat_map(|seed| fitting().map(move |b| (seed, b))).collect();
    let pool = rayon::ThreadPoolBuilder::new()
        // No more threads than there are runs.
        .num_threads(simulation.settings.jobs.min(work.len()))
        .build()
        .map_err(Failure::failed)?;
    let started = Instant::now();
    let bar = ui::bar(work.len() as u64, "simulating");
    let rows = pool.install(|| {
        let row = |&(seed, budget): &(u64, u32)| {
            let row = simulation.row(seed, budget);
            bar.inc(1);
            row
        };
        work.par_iter().map(row).collect::<Result<Vec<_>, _>>()
    });
    bar.finish_and_clear();
    let rows = rows?;

    let took = started.elapsed().as_secs_f64();
    manifest.seeds = rows.iter().filter_map(|r| r.seed).collect();
    manifest.seeds.dedup();
    if let Some(out) = &simulation.settings.out {
        manifest.end(true);
        // Rows that are there already keep the manifest that they name.
        let there = if is_begun(out) { read_rows(out).map_err(Failure::failed)? } else { Vec::new() };
        let path = unclaimed_beside(out, &manifest.started, &there);
        manifest.write(&path).map_err(Failure::failed)?;
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
        let named: Vec<ResultRow> =
            rows.iter().map(|row| ResultRow { manifest: name.clone(), ..row.clone() }).collect();
        append_rows(out, &named).map_err(|e| Failure::Failed(e.into()))?;
    }
    match ctx.format {
        OutputFormat::Json => {
            for row in &rows {
                println!("{}", serde_json::to_string(row).map_err(Failure::failed)?);
            }
            for budget in &no_room {
                println!("{}", serde_json::to_string(budget).map_err(Failure::failed)?);
            }
        }
        OutputFormat::Table => {
            print(&rows, &budgets);
            let requests: u64 = rows.iter().map(|r| r.total_requests).sum();
            println!(
                "{requests} requests in {}: {:.0} a second on {} threads",
                ui::seconds(took),
                requests as f64 / took,
                pool.current_num_threads()
            );
        }
    }
    Ok(())
}

#[cfg(feature = "engine")]
fn source(workload: &WorkloadSettings) -> Result<(Source, String), Failure> {
    if workload.dataset.is_none() {
        return workload.source_without_text();
    }
    let (tokenizer, _) =
        crate::workload::tokenizer::Tokenizer::resolve_or_byte_level(workload.tokenizer.as_deref())
            .map_err(|e| Failure::Failed(e.into()))?;
    workload.source(&tokenizer)
}

#[cfg(not(feature = "engine"))]
fn source(workload: &WorkloadSettings) -> Result<(Source, String), Failure> {
    workload.source_without_text()
}

/// The profile that a subcommand cannot do without. A what-if copy is said to be one.
pub(super) fn load_profile(subcommand: &str, named: Option<&str>) -> Result<Profile, Failure> {
    let named = named.ok_or_else(|| {
        Failure::usage(format!(
            "{subcommand} needs --profile: make one with `lora-hbm calibrate --model MODEL -o profile.json`"
        ))
    })?;
    let profile = Profile::named(named).map_err(|e| Failure::Failed(e.into()))?;
    match profile.kind {
        Kind::Engine => {}
        Kind::BlackBox => tracing::warn!("{named} is a black box: fitted to a server's response times"),
        Kind::Scaled => {
            tracing::warn!("{named} is a what-if copy of another profile: nothing of it was measured");
        }
    }
    Ok(profile)
}

/// A budget that there is no memory for.
#[derive(Debug, Serialize)]
pub(super) struct NoRoom {
    gpu_loras: u32,
    does_not_fit: String,
}

/// Those of `budgets` that the profile's memory has no room for, which is an answer: each is told of once. That none fits
/// is an error. Says as well where the profile is used beyond what was calibrated.
pub(super) fn without_room(
    simulator: &Simulator,
    budgets: &[u32],
    engine: impl Fn(u32) -> Result<EngineSettings, Failure>,
) -> Result<Vec<NoRoom>, Failure> {
    if let Some(beyond) =
        budgets.first().map(|&b| engine(b)).transpose()?.and_then(|e| simulator.extrapolated(&e))
    {
        tracing::warn!("{beyond}");
    }
    let mut none = Vec::new();
    for &gpu_loras in budgets {
        match simulator.config(&engine(gpu_loras)?) {
            Ok(_) => {}
            Err(e) if e.is_of_the_budget() => none.push(NoRoom { gpu_loras, does_not_fit: e.to_string() }),
            Err(e) => return Err(Failure::Failed(e.into())),
        }
    }
    if none.len() == budgets.len() {
        let least = none.into_iter().min_by_key(|n| n.gpu_loras);
        return Err(Failure::failed(least.map_or_else(String::new, |n| n.does_not_fit)));
    }
    none.iter().for_each(|n| tracing::warn!("{}", n.does_not_fit));
    Ok(none)
}

/// `2,8,32`, or `seed` for the reference's budgets.
pub(super) fn budgets(text: &str, total: u32) -> Result<Vec<u32>, Failure> {
    if total == 0 {
        return Err(Failure::usage("--total-loras is 0: it must be at least 1"));
    }
    if text == "seed" {
        return Ok(seed_budgets(total));
    }
    let mut budgets = Vec::new();
    for item in text.split(',') {
        let budget: u32 = item.trim().parse().map_err(|_| {
            Failure::usage(format!(
                "--gpu-loras: '{item}' is not a number; give a list such as 2,8,32, or seed"
            ))
        })?;
        if budget == 0 || budget > total {
            return Err(Failure::usage(format!(
                "--gpu-loras: a budget of {budget} lies outside of 1 to {total} (--total-loras)"
            )));
        }
        budgets.push(budget);
    }
    Ok(budgets)
}

impl Simulation {
    fn engine(&self, gpu_loras: u32) -> Result<EngineSettings, Failure> {
        let profile = self.simulator.profile();
        let mut engine = self.flags.settings(&profile.model, self.settings.total_loras, gpu_loras)?;
        self.flags.fill(profile, &mut engine);
        Ok(engine)
    }

    fn row(&self, seed: u64, budget: u32) -> Result<ResultRow, Failure> {
        let failed = |e: crate::experiment::SimulateError| Failure::Failed(e.into());
        let workload = WorkloadSettings { seed: self.workload.seed + seed, ..self.workload.clone() };
        let engine = self.engine(budget)?;
        let how = Run {
            total_loras: self.settings.total_loras,
            rate: None,
            default_rate: DEFAULT_RATE,
            amount: amount(self.settings.num_requests, None)?,
            default_amount: Amount::Requests(200),
            ranks: engine.ranks(),
        };
        let warm_up = self.settings.warm_up;
        let cell =
            Cell::new(engine.clone(), crate::experiment::WorkloadSettings { warm_up, ..Default::default() });
        let replays = workload.replays_times(&self.source);
        let context = RunContext {
            prompt_regime: workload.regime_column(&self.source),
            arrivals: Some(workload.arrivals_column(&self.source)),
            arrival_rate: (!replays).then_some(workload.arrival_rate.unwrap_or(DEFAULT_RATE)),
            rho: None,
            cell: None,
            ..cell.run_context(crate::report::results::Source::Simulated, workload.seed, 0)
        };
        let simulator = &self.simulator;
        let (mut row, rate, saturation) = match &self.source {
            // Made as they are simulated: a workload of any length.
            Source::Pool(pool) => {
                let spec = workload.spec(&how);
                let requests = Requests::new(&spec, pool).map_err(|e| Failure::Usage(e.into()))?;
                let expected = match spec.amount {
                    Amount::Requests(n) => n as usize,
                    Amount::DurationS(_) => 0,
                };
                let context = RunContext {
                    popularity: Some(spec.popularity.to_string()),
                    max_tokens: Some(spec.max_tokens),
                    ..context
                };
                let row =
                    simulator.stream(&engine, requests, (expected, warm_up), &context).map_err(failed)?;
                let saturation = simulator.saturation_rate_of(&engine, &spec, pool).map_err(failed)?;
                (row, Some(spec.rate), Some(saturation))
            }
            Source::Trace { .. } => {
                let trace = workload.trace(&self.source, &how)?;
                // As `measure` writes them, so that the two are rows of one workload.
                let context = RunContext {
                    popularity: Some(trace.header.popularity.clone()),
                    max_tokens: trace.common_output_tokens(),
                    seed: Some(trace.header.seed),
                    ..context
                };
                let requests = trace.requests.iter().cloned();
                let row = simulator.stream(&engine, requests, (trace.requests.len(), warm_up), &context);
                let row = row.map_err(failed)?;
                let rate = context.arrival_rate.or(trace.mean_rate());
                // As many as it takes, whatever the number of requests is; they all come at once.
                let burst = WorkloadSettings {
                    arrivals: Some(Arrivals::Fixed),
                    arrival_rate: Some(1.0),
                    ..workload.clone()
                };
                let how = Run { amount: Some(Amount::Requests(Simulator::burst(&engine))), ..how };
                let burst = burst.trace(&self.source, &how).ok();
                // What a number of requests cuts off may be none that this engine takes: then nothing is known.
                let saturation = burst.and_then(|burst| simulator.saturation_rate(&engine, &burst).ok());
                (row, rate, saturation)
            }
        };
        row.num_requests = Some(row.total_requests);
        if row.total_requests == 0 {
            return Err(Failure::usage(format!("--warm-up {warm_up} leaves no request to count: lower it")));
        }
        row.saturated = rate.zip(saturation).map(|(rate, saturation)| is_saturated(rate, saturation));
        Ok(row)
    }
}

fn print(rows: &[ResultRow], budgets: &[u32]) {
    let mut table = ui::table(&["gpu_loras", "TTFT median", "mean", "p90", "p99", "swaps", "waits for", ""]);
    for &budget in budgets {
        let of_budget: Vec<&ResultRow> = rows.iter().filter(|r| r.gpu_loras == budget).collect();
        if of_budget.is_empty() {
            let mut line = vec![String::new(); 8];
            (line[0], line[7]) = (budget.to_string(), "does not fit".to_owned());
            table.add_row(line);
            continue;
        }
        let mean = |of: fn(&ResultRow) -> Option<f64>| {
            let values: Vec<f64> = of_budget.iter().filter_map(|r| of(r)).collect();
            crate::report::stats::mean(&values)
        };
        let time = |of| mean(of).map_or_else(String::new, ui::seconds);
        let binds = Binds::of(of_budget.iter().copied());
        let saturated = of_budget.iter().any(|r| r.saturated == Some(true));
        table.add_row([
            budget.to_string(),
            time(|r| r.ttft_median),
            time(|r| r.ttft_mean),
            time(|r| r.ttft_p90),
            time(|r| r.ttft_p99),
            mean(|r| r.swap_count.map(|n| n as f64)).map_or_else(String::new, |n| format!("{n:.0}")),
            binds.map_or("", Binds::as_str).to_owned(),
            if saturated { "saturated" } else { "" }.to_owned(),
        ]);
    }
    println!("{table}");
}
