//! `lora-hbm plan`: which budget meets a service-level objective.

use clap::Args;
use serde::{Deserialize, Serialize};

use super::engine_args::{EngineArgs, EngineFlags};
use super::failure::Failure;
use super::settings::{Context, OutputFormat};
use super::simulate::{budgets, load_profile, without_room};
use super::ui;
use super::workload::{Run, Source, WorkloadArgs, WorkloadSettings};
use crate::experiment::{
    BudgetPlan, EngineSettings, Plan, PlanError, Planner, Simulator, Slo, Verdict, lenient,
};
use crate::workload::spec::Amount;

#[derive(Args, Debug, Serialize)]
pub struct PlanArgs {
    /// Profile of the machine and model: a file or the name of a shipped one (required)
    #[arg(long, value_name = "PROFILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    profile: Option<String>,
    /// What must hold, such as 'ttft_p99<500ms'; several with commas between (required)
    #[arg(long, value_name = "SLO")]
    #[serde(skip_serializing_if = "Option::is_none")]
    slo: Option<String>,
    /// Requests a second to plan for; without it the highest rate of each budget is found
    #[arg(long, value_name = "RATE", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    rate: Option<f64>,
    #[command(flatten)]
    #[serde(skip)]
    workload: WorkloadArgs,
    #[command(flatten)]
    #[serde(skip)]
    engine: EngineArgs,
    /// LoRA adapters there are [default: 128]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    total_loras: Option<u32>,
    /// Budgets, such as 2,8,32, or seed: 2, 4, 8 … up to the total [default: seed]
    #[arg(long, value_name = "LIST|seed")]
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_loras: Option<String>,
    /// Requests in each trace [default: 2000]
    #[arg(short = 'n', long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    num_requests: Option<u64>,
    /// Traces, over which the intervals are [default: 10]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    seeds: Option<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(default)]
struct PlanSettings {
    #[serde(deserialize_with = "lenient::text")]
    profile: Option<String>,
    #[serde(deserialize_with = "lenient::joined")]
    slo: Option<String>,
    rate: Option<f64>,
    total_loras: u32,
    #[serde(deserialize_with = "lenient::joined_word")]
    gpu_loras: String,
    num_requests: u64,
    seeds: u64,
}

impl Default for PlanSettings {
    fn default() -> Self {
        Self {
            profile: None,
            slo: None,
            rate: None,
            total_loras: 128,
            gpu_loras: "seed".to_owned(),
            num_requests: 2000,
            seeds: 10,
        }
    }
}

pub fn run(args: &PlanArgs, ctx: &Context) -> Result<(), Failure> {
    let settings: PlanSettings = ctx.resolve("plan", args)?;
    let workload: WorkloadSettings = ctx.resolve("plan", &args.workload)?;
    let flags: EngineFlags = ctx.resolve("plan", &args.engine)?;
    workload.check()?;
    if workload.trace.is_some() || workload.dataset.is_some() || workload.arrival_rate.is_some() {
        return Err(Failure::usage(
            "plan draws its own workloads at many rates: leave --trace, --dataset and --arrival-rate out \
             (the rate to plan for is --rate)",
        ));
    }
    let slo = settings.slo.as_deref().ok_or_else(|| Failure::usage("plan needs --slo 'ttft_p99<500ms'"))?;
    let slos: Vec<Slo> = slo
        .split(',')
        .map(|text| text.trim().parse())
        .collect::<Result<_, _>>()
        .map_err(|e: crate::experiment::NotAnSlo| Failure::Usage(e.into()))?;
    if let Some(rate) = settings.rate {
        super::workload::check_rate(rate)?;
    }
    if settings.seeds < 2 || settings.num_requests == 0 {
        return Err(Failure::usage(format!(
            "--seeds is {} and --num-requests {}: an interval needs at least 2 traces of at least 1 request",
            settings.seeds, settings.num_requests
        )));
    }
    let profile = load_profile("plan", settings.profile.as_deref())?;
    let budgets = budgets(&settings.gpu_loras, settings.total_loras)?;
    let mut engine = flags.settings(&profile.model, settings.total_loras, budgets[0])?;
    flags.fill(&profile, &mut engine);
    let (source, said) = workload.source_without_text()?;
    tracing::info!("{said}");
    let Source::Pool(pool) = source else {
        return Err(Failure::failed("a workload without a trace has a pool of prompts"));
    };
    let how = Run {
        total_loras: settings.total_loras,
        rate: settings.rate,
        default_rate: 1.0,
        amount: None,
        default_amount: Amount::Requests(settings.num_requests),
        ranks: engine.ranks(),
    };
    let simulator = Simulator::new(profile).map_err(|e| Failure::Failed(e.into()))?;
    let planner = Planner {
        simulator: &simulator,
        pool: &pool,
        workload: workload.spec(&how),
        engine,
        slos,
        requests: settings.num_requests,
        seeds: settings.seeds,
    };
    without_room(&simulator, &budgets, |gpu_loras| {
        Ok(EngineSettings { gpu_loras, ..planner.engine.clone() })
    })?;
    let bar = ui::bar(budgets.len() as u64, "planning");
    let plan = planner.plan(&budgets, settings.rate, || bar.inc(1));
    bar.finish_and_clear();
    let plan = plan.map_err(|e| match e {
        PlanError::Workload(e) => Failure::Usage(e.into()),
        PlanError::Simulate(e) => Failure::Failed(e.into()),
    })?;
    match ctx.format {
        OutputFormat::Json => println!("{}", serde_json::to_string(&plan).map_err(Failure::failed)?),
        OutputFormat::Table => print(&plan, &planner, settings.rate),
    }
    match settings.rate {
        Some(rate) if plan.smallest.is_none() => {
            Err(Failure::Unmet(format!("no budget meets {slo} at {rate} requests a second with confidence")))
        }
        None if plan.best.is_none() => Err(Failure::Unmet(format!("no budget meets {slo} at any rate"))),
        _ => Ok(()),
    }
}

fn print(plan: &Plan, planner: &Planner<'_>, rate: Option<f64>) {
    let metric = planner.slos[0].metric();
    let mut table = ui::table(&[
        "gpu_loras",
        metric,
        "95 % interval",
        "verdict",
        "highest rate",
        "saturates at",
        "binds",
    ]);
    for b in &plan.budgets {
        let verdict = match b.verdict {
            Some(Verdict::Holds) => "holds",
            Some(Verdict::Fails) => "fails",
            Some(Verdict::Undecided) => "undecided",
            Some(Verdict::Saturated) => "saturated",
            Some(Verdict::DoesNotFit) => "does not fit",
            None => "",
        };
        let seen = b.seen.first();
        table.add_row([
            b.gpu_loras.to_string(),
            seen.map_or_else(String::new, |s| ui::seconds(s.mean_s)),
            seen.map_or_else(String::new, |s| {
                format!("{} to {}", ui::seconds(s.interval_s.low), ui::seconds(s.interval_s.high))
            }),
            verdict.to_owned(),
            match (b.highest_rate, b.saturation_rate) {
                (Some(rate), _) => format!("{rate:.2}/s"),
                (None, Some(_)) => "none".to_owned(),
                (None, None) => String::new(),
            },
            b.saturation_rate.map_or_else(String::new, |r| format!("{r:.2}/s")),
            b.binds.map_or("", |b| b.as_str()).to_owned(),
        ]);
    }
    println!("{table}");
    let slos: Vec<String> = planner.slos.iter().map(ToString::to_string).collect();
    println!(
        "simulated: {} traces of {} requests a budget and rate; objective {}",
        planner.seeds,
        planner.requests,
        slos.join(", ")
    );
    if rate.is_some() {
        match plan.smallest {
            Some(budget) => println!("smallest budget that holds with confidence: {budget}"),
            None => println!("no budget holds with confidence"),
        }
    }
    if let Some(best) = plan.best {
        let alike: Vec<String> = alike(plan, best).map(|b| b.to_string()).collect();
        if alike.is_empty() {
            println!("best budget: {best}");
        } else {
            println!("best budget: {best}; within its interval: {}", alike.join(", "));
        }
    }
}

/// Budgets that do at the rate asked about as well as the best one may do.
fn alike(plan: &Plan, best: u32) -> impl Iterator<Item = u32> + '_ {
    let high = plan.budgets.iter().find(|b| b.gpu_loras == best).and_then(|b| b.seen.first());
    let high = high.map_or(f64::NEG_INFINITY, |s| s.interval_s.high);
    let sound = move |b: &&BudgetPlan| b.gpu_loras != best && b.verdict != Some(Verdict::Saturated);
    let within = move |b: &&BudgetPlan| b.seen.first().is_some_and(|s| s.mean_s <= high);
    plan.budgets.iter().filter(sound).filter(within).map(|b| b.gpu_loras)
}
