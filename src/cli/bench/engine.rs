//! `lora-hbm bench engine` and `bench trace`: the engine's own speed.

use std::path::{Path, PathBuf};

use clap::Args;
use lora_sched::SwapMode;
use serde::{Deserialize, Serialize};

use crate::bench::{BenchError, EngineReport, StepGrid, Times, TraceRow, run_engine, run_swaps, run_trace};
use crate::cli::engine_args::{EngineFlags, RunningEngineArgs};
use crate::cli::failure::Failure;
use crate::cli::settings::{Context, OutputFormat};
use crate::cli::ui;
use crate::engine::setup::{self, HostMemory, Loaded};
use crate::experiment::lenient;
use crate::report::files::{check_writable, write_atomic};
use crate::report::manifest::{Manifest, path_beside};
use crate::workload::trace::Trace;

#[derive(Args, Debug, Serialize)]
struct Common {
    /// Base model, as in serve [default: facebook/opt-125m]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    /// Adapters in host memory [default: 128]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    total_loras: Option<u32>,
    /// Results as JSON; a manifest goes beside it [default: bench.json]
    #[arg(short, long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    out: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(super) struct EngineBenchArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    grid: GridArgs,
    #[command(flatten)]
    engine: RunningEngineArgs,
}

#[derive(Args, Debug, Serialize)]
struct GridArgs {
    /// Slots to run the whole grid with, one after the other on the same weights [default: 32]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_loras: Option<Vec<u32>>,
    /// Prompt lengths [default: 256,512,1024,2048,4096]
    #[arg(long, value_name = "TOKENS,…", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    prompts: Option<Vec<u32>>,
    /// Batch sizes of decodes [default: 1,4,16]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    batches: Option<Vec<u32>>,
    /// Contexts of decodes [default: 128,512,2048,4096]
    #[arg(long, value_name = "TOKENS,…", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    contexts: Option<Vec<u32>>,
    /// Distinct adapters in a batch [default: 0,1,16]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    adapters: Option<Vec<u32>>,
    /// Ranks to run the whole grid at, one after the other [default: that of --max-r]
    #[arg(long, value_name = "RANK,…", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    each_rank: Option<Vec<u32>>,
    /// Time copies in every swap mode, from pinned and pageable memory, at the middle one of the ranks
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    all_modes: bool,
    /// What scripts/bench_peft.py has measured on the same device, to be compared with
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    peft: Option<PathBuf>,
    /// Runs of each [default: 20]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    runs: Option<usize>,
    /// Time single prompts as they come to an idle device as well: after so many milliseconds of nothing; 0: do not
    /// [default: 100]
    #[arg(long, value_name = "MS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    rest: Option<f64>,
}

#[derive(Args, Debug)]
pub(super) struct TraceBenchArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    budgets: BudgetArgs,
    #[command(flatten)]
    engine: RunningEngineArgs,
    /// Traces, as `trace generate` writes them
    #[arg(required = true, value_name = "FILE")]
    traces: Vec<PathBuf>,
}

#[derive(Args, Debug, Serialize)]
struct BudgetArgs {
    /// Slots to try [default: 2,8,32,128]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    budgets: Option<Vec<u32>>,
}

#[derive(Serialize, Deserialize)]
#[serde(default)]
struct BenchSettings {
    #[serde(deserialize_with = "lenient::word")]
    model: String,
    total_loras: u32,
    out: PathBuf,
    #[serde(deserialize_with = "lenient::list")]
    gpu_loras: Vec<u32>,
    #[serde(deserialize_with = "lenient::list")]
    prompts: Vec<u32>,
    #[serde(deserialize_with = "lenient::list")]
    batches: Vec<u32>,
    #[serde(deserialize_with = "lenient::list")]
    contexts: Vec<u32>,
    #[serde(deserialize_with = "lenient::list")]
    adapters: Vec<u32>,
    #[serde(deserialize_with = "lenient::list")]
    each_rank: Vec<u32>,
    all_modes: bool,
    peft: Option<PathBuf>,
    runs: usize,
    rest: f64,
    #[serde(deserialize_with = "lenient::list")]
    budgets: Vec<u32>,
}

impl Default for BenchSettings {
    fn default() -> Self {
        Self {
            model: "facebook/opt-125m".to_owned(),
            total_loras: 128,
            out: "bench.json".into(),
            gpu_loras: vec![32],
            prompts: vec![256, 512, 1024, 2048, 4096],
            batches: vec![1, 4, 16],
            contexts: vec![128, 512, 2048, 4096],
            adapters: vec![0, 1, 16],
            each_rank: Vec::new(),
            all_modes: false,
            peft: None,
            runs: 20,
            rest: 100.0,
            budgets: vec![2, 8, 32, 128],
        }
    }
}

/// A minute.
const MOST_REST_MS: f64 = 60_000.0;

fn failed(e: BenchError) -> Failure {
    match e {
        BenchError::Setup(e) if e.is_usage() => Failure::usage(e),
        e => Failure::Failed(e.into()),
    }
}

fn settings_of(
    flags: &EngineFlags,
    s: &BenchSettings,
    gpu_loras: u32,
) -> Result<setup::EngineSettings, Failure> {
    flags.settings(&s.model, s.total_loras, gpu_loras)?.for_engine().map_err(Failure::usage)
}

fn load(settings: setup::EngineSettings) -> Result<Loaded, Failure> {
    Loaded::load(settings).map_err(|e| failed(e.into()))
}

pub(super) fn engine(args: &EngineBenchArgs, ctx: &Context) -> Result<(), Failure> {
    let common: BenchSettings = ctx.resolve("bench", &args.common)?;
    let grid: BenchSettings = ctx.resolve("bench", &args.grid)?;
    let s = BenchSettings { model: common.model, total_loras: common.total_loras, out: common.out, ..grid };
    let flags: EngineFlags = ctx.resolve("bench", &args.engine)?;
    if !(0.0..=MOST_REST_MS).contains(&s.rest) {
        return Err(Failure::usage(format!("--rest is {}: it must be from 0 to {MOST_REST_MS} ms", s.rest)));
    }
    check_writable(&s.out).map_err(Failure::failed)?;
    let peft = s.peft.as_deref().map(read_json).transpose()?;
    let mut manifest = Manifest::begin("bench engine", &(&s, &flags), &[]).map_err(Failure::failed)?;
    let each: Vec<_> =
        s.gpu_loras.iter().map(|slots| settings_of(&flags, &s, *slots)).collect::<Result<_, _>>()?;
    let Some(base) = each.first() else {
        return Err(Failure::usage("--gpu-loras names no number of slots"));
    };
    let ranks: Vec<usize> = s.each_rank.iter().map(|r| *r as usize).collect();
    let ranks = if ranks.is_empty() { vec![base.max_r] } else { ranks };
    let steps_with = |slots: u32| StepGrid {
        prompts: s.prompts.clone(),
        batches: s.batches.clone(),
        contexts: s.contexts.clone(),
        adapters: s.adapters.iter().copied().filter(|a| *a <= slots).collect(),
        runs: s.runs,
        rest_s: s.rest * 1e-3,
    };
    let all = ranks.len() * s.gpu_loras.len();
    let bar = ui::spinner("bench");
    let mut reports = Vec::new();
    let document = |reports: &[EngineReport]| serde_json::json!({ "engine": reports, "peft": &peft });
    for &max_r in &ranks {
        let of_rank = if s.each_rank.is_empty() { base.ranks.clone() } else { Vec::new() };
        let settings = setup::EngineSettings { max_r, ranks: of_rank, ..base.clone() };
        let loaded = load(settings.clone())?;
        manifest.on_gpu(loaded.gpu());
        for &slots in &s.gpu_loras {
            let say = |what: &str| bar.set_message(format!("rank {max_r}, {slots} slots: {what}"));
            reports.push(run_engine(&loaded, slots as usize, &steps_with(slots), say).map_err(failed)?);
            // Each takes a minute: what is done is kept.
            write(&s.out, &document(&reports), &mut manifest, false)?;
        }
        // On the CPU all host memory is one.
        let memories = match loaded.shared_memory() {
            Some(_) => &[HostMemory::Pinned, HostMemory::Pageable][..],
            None => &[HostMemory::Pinned],
        };
        drop(loaded);
        let others = SwapMode::ALL
            .iter()
            .flat_map(|&mode| memories.iter().map(move |memory| (mode, *memory)))
            .filter(|other| *other != (settings.swap_mode, settings.host_memory))
            // How a mode copies does not depend on the rank: once is enough.
            .filter(|_| s.all_modes && max_r == ranks[ranks.len() / 2]);
        let Some(last) = reports.last_mut() else { continue };
        for (swap_mode, host_memory) in others {
            bar.set_message(format!("rank {max_r}: swaps, {swap_mode}, {host_memory}"));
            let loaded = load(setup::EngineSettings { swap_mode, host_memory, ..settings.clone() })?;
            let (slots, ceilings) = (last.gpu_loras, last.ceilings);
            let swaps = run_swaps(&loaded, slots, &steps_with(slots as u32), ceilings);
            last.swaps.extend(swaps.map_err(failed)?);
        }
        write(&s.out, &document(&reports), &mut manifest, reports.len() == all)?;
    }
    bar.finish_and_clear();
    match ctx.format {
        OutputFormat::Json => {
            println!("{}", serde_json::to_string(&document(&reports)).map_err(Failure::failed)?)
        }
        OutputFormat::Table => {
            reports.iter().for_each(print_engine);
            println!("results: {}", s.out.display());
        }
    }
    Ok(())
}

fn read_json(path: &Path) -> Result<serde_json::Value, Failure> {
    let failed = |e: &dyn std::fmt::Display| Failure::failed(format!("{}: {e}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|e| failed(&e))?;
    serde_json::from_str(&text).map_err(|e| failed(&e))
}

pub(super) fn traces(args: &TraceBenchArgs, ctx: &Context) -> Result<(), Failure> {
    let common: BenchSettings = ctx.resolve("bench", &args.common)?;
    let budgets: BenchSettings = ctx.resolve("bench", &args.budgets)?;
    let s =
        BenchSettings { model: common.model, total_loras: common.total_loras, out: common.out, ..budgets };
    let flags: EngineFlags = ctx.resolve("bench", &args.engine)?;
    check_writable(&s.out).map_err(Failure::failed)?;
    let mut manifest = Manifest::begin("bench trace", &(&s, &flags), &[]).map_err(Failure::failed)?;
    let largest = s.budgets.iter().copied().max().unwrap_or(1).max(1);
    let loaded = load(settings_of(&flags, &s, largest)?)?;
    manifest.on_gpu(loaded.gpu());
    let mut rows = Vec::new();
    let bar = ui::bar((args.traces.len() * s.budgets.len()) as u64, "traces");
    for path in &args.traces {
        let trace = Trace::read(path).map_err(Failure::failed)?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        for &budget in &s.budgets {
            rows.push(run_trace(&loaded, budget as usize, &name, &trace).map_err(failed)?);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    write(&s.out, &rows, &mut manifest, true)?;
    match ctx.format {
        OutputFormat::Json => println!("{}", serde_json::to_string(&rows).map_err(Failure::failed)?),
        OutputFormat::Table => print_traces(&rows, &s.out),
    }
    Ok(())
}

fn write(
    out: &Path,
    report: &impl Serialize,
    manifest: &mut Manifest,
    complete: bool,
) -> Result<(), Failure> {
    let mut text = serde_json::to_vec_pretty(report).map_err(Failure::failed)?;
    text.push(b'\n');
    write_atomic(out, &text).map_err(Failure::failed)?;
    manifest.end(complete);
    manifest.write(path_beside(out)).map_err(Failure::failed)
}

fn cells(times: &Times, floor_ms: Option<f64>) -> [String; 4] {
    [
        format!("{:.3}", times.median_ms),
        format!("{:.3}–{:.3}", times.p25_ms, times.p75_ms),
        floor_ms.map_or("–".into(), |f| format!("{f:.3}")),
        floor_ms.map_or("–".into(), |f| format!("{:.2}", times.median_ms / f)),
    ]
}

fn print_engine(report: &EngineReport) {
    let EngineReport { model, ranks, gpu_loras, device, .. } = report;
    println!("{model}, {gpu_loras} slots, adapters of rank {ranks:?}, on {device}");
    if let Some(c) = report.ceilings {
        println!(
            "ceilings: {:.0} TFLOP/s in a large bf16 product{}, {:.2} TB/s read, {:.1} GB/s from pinned memory, {:.1} GB/s from pageable",
            c.gemm_flops * 1e-12,
            // A product after another for as long as a long prompt takes, about.
            c.from_idle_within(0.1).map_or(String::new(), |burst| format!(
                ", {:.0} over {:.0} ms from idle",
                burst.operations / burst.seconds * 1e-12,
                burst.seconds * 1e3
            )) + &c.gemm_sustained_flops.map_or(String::new(), |f| format!(", {:.0} sustained", f * 1e-12)),
            c.read_bytes_s * 1e-12,
            c.pinned_bytes_s * 1e-9,
            c.pageable_bytes_s * 1e-9
        );
    }
    let mut table = ui::table(&[
        "prefill: tokens",
        "prompts",
        "adapters",
        "ms",
        "quartiles",
        "floor",
        "× floor",
        "sustained",
        "× sustained",
        "from idle",
        "floor from idle",
        "× from idle",
    ]);
    for r in &report.prefill {
        let of = [r.tokens, r.prompts, r.adapters].map(|n| n.to_string());
        let [_, _, sustained, ratio] = cells(&r.times, r.sustained_floor_ms);
        let [idle, _, idle_floor, of_idle] = r
            .rested
            .as_ref()
            .map_or_else(|| std::array::from_fn(|_| "–".into()), |t| cells(t, r.rested_floor_ms));
        table.add_row(
            of.into_iter()
                .chain(cells(&r.times, r.floor_ms))
                .chain([sustained, ratio, idle, idle_floor, of_idle]),
        );
    }
    println!("{table}");
    let decode = report.decode.iter().map(|r| ([r.batch, r.context, r.adapters], &r.times, r.floor_ms));
    print_steps(["decode: batch", "context", "adapters"], decode);
    let mut table = ui::table(&[
        "swap",
        "host memory",
        "beside",
        "MB",
        "ms",
        "quartiles",
        "floor",
        "× floor",
        "copy itself, ms",
        "× floor",
        "step alone, ms",
        "beside, ms",
    ]);
    for r in &report.swaps {
        let [ms, quartiles, floor, ratio] = cells(&r.times, r.floor_ms);
        let (alone, beside) = match &r.step {
            Some((alone, beside)) => (format!("{:.3}", alone.median_ms), format!("{:.3}", beside.median_ms)),
            None => ("–".into(), "–".into()),
        };
        let megabytes = format!("{:.1}", r.bytes as f64 * 1e-6);
        let names = [r.mode.clone(), r.host_memory.clone(), r.beside.clone()];
        let [mode, memory, beside_what] = names;
        let [copied, _, _, of_copied] =
            r.copied.as_ref().map_or_else(|| std::array::from_fn(|_| "–".into()), |t| cells(t, r.floor_ms));
        let swap = [mode, memory, beside_what, megabytes, ms, quartiles, floor, ratio];
        table.add_row(swap.into_iter().chain([copied, of_copied, alone, beside]));
    }
    println!("{table}");
}

/// A table of steps: what each was made of, and its times.
fn print_steps<'a>(composition: [&str; 3], rows: impl Iterator<Item = ([u32; 3], &'a Times, Option<f64>)>) {
    let [first, second, third] = composition;
    let mut table = ui::table(&[first, second, third, "ms", "quartiles", "floor", "× floor"]);
    for (made_of, times, floor_ms) in rows {
        table.add_row(made_of.map(|n| n.to_string()).into_iter().chain(cells(times, floor_ms)));
    }
    println!("{table}");
}

fn print_traces(rows: &[TraceRow], out: &Path) {
    let mut table = ui::table(&[
        "trace",
        "gpu_loras",
        "requests",
        "rps",
        "TTFT p50, ms",
        "mean",
        "p99",
        "ITL p50, ms",
        "p99",
        "all done, s",
        "swaps",
    ]);
    for r in rows {
        table.add_row([
            r.trace.clone(),
            r.gpu_loras.to_string(),
            r.requests.to_string(),
            r.rate.map_or("–".into(), |rate| format!("{rate:.1}")),
            format!("{:.1}", r.ttft_p50_ms),
            format!("{:.1}", r.ttft_mean_ms),
            format!("{:.1}", r.ttft_p99_ms),
            r.itl_p50_ms.map_or("–".into(), |ms| format!("{ms:.1}")),
            r.itl_p99_ms.map_or("–".into(), |ms| format!("{ms:.1}")),
            format!("{:.2}", r.makespan_s),
            r.swaps.to_string(),
        ]);
    }
    println!("{table}");
    println!("results: {}", out.display());
}
