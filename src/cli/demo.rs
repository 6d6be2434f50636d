//! `lora-hbm demo`: the whole experiment in small, on the CPU, in under two minutes.

mod load;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use super::settings::Context;
use super::{calibrate, sweep, ui, validate, workload};
use crate::calibrate::CalibrateOptions;
use crate::experiment::{Cell, Engines, Experiment, Simulator, Sweep};
use crate::report::files::FileError;
use crate::report::manifest::Manifest;
use crate::report::validation::Validation;

/// The experiment, embedded so that the program needs no files.
const EXPERIMENT: &str = include_str!("../../configs/experiments/demo.toml");
/// How long it takes, on any machine, seconds: well within what is promised.
const TOTAL_S: f64 = 80.0;
/// What simulating, validating and drawing take, seconds.
const AFTER_S: f64 = 1.0;
/// The runs get this long at least, even where calibration has taken everything, seconds.
const LEAST_RUNS_S: f64 = 20.0;

#[derive(Args, Debug, Serialize)]
pub struct DemoArgs {
    /// Folder for everything that it writes [default: demo-results/ and the time]
    #[arg(short, long, value_name = "FOLDER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    out: Option<PathBuf>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct DemoSettings {
    out: Option<PathBuf>,
}

pub fn run(args: &DemoArgs, ctx: &Context) -> Result<(), Failure> {
    let begun = Instant::now();
    let settings: DemoSettings = ctx.resolve("demo", args)?;
    let folder = settings.out.unwrap_or_else(|| {
        Path::new("demo-results").join(chrono::Local::now().format("%Y-%m-%d-%H%M%S").to_string())
    });
    std::fs::create_dir_all(&folder).map_err(|e| Failure::Failed(FileError::write(&folder, e).into()))?;

    let plain = experiment(EXPERIMENT)?;
    println!(
        "How many of {} LoRA adapters should stay in memory? A tiny Llama on this machine's CPU, real ShareGPT \
         prompt lengths.",
        plain.cells()[0].engine.total_loras
    );
    println!("\n1. Calibrate: time this machine's steps and swaps, with nothing else running.");
    let simulator = calibrated(&plain.cells()[0], &folder)?;
    println!("\n2. Choose a load at which the budget matters, by simulation.");
    let mut engines = Engines::default();
    let failed_run = |e: crate::experiment::MeasureError| Failure::Failed(e.into());
    let start_s = engines.start_s(&plain.cells()[0].engine).map_err(failed_run)?;
    let spent_s = begun.elapsed().as_secs_f64() + AFTER_S + start_s * plain.cells().len() as f64;
    let chosen = load::choose(&plain, &simulator, (TOTAL_S - spent_s).max(LEAST_RUNS_S))?;
    println!(
        "   {:.1} requests a second, {} of {} output tokens at each budget: the smallest budget's median TTFT should \
         be {:.1} times the full one's",
        chosen.rate, chosen.requests, chosen.max_tokens, chosen.effect
    );
    let experiment = experiment(&with_load(&chosen)?)?;
    println!("\n3. Measure: an engine, its HTTP server and a client, one budget after another.");
    let mut manifest =
        Manifest::begin("demo", &experiment, &experiment.replicate.seeds).map_err(Failure::failed)?;
    manifest.of_profile(simulator.profile());
    manifest.dataset = Some(workload::dataset(None)?);
    let manifest_path = folder.join("results.manifest.json");
    manifest.write(&manifest_path).map_err(Failure::failed)?;
    let run = Sweep {
        experiment: &experiment,
        simulator: Some(&simulator),
        shard: None,
        csv: folder.join("results.csv"),
        requests: Some(folder.join("requests")),
        decisions: None,
        manifest: Some("results.manifest.json".to_owned()),
    };
    let failed = |e: crate::experiment::SweepError| Failure::Failed(e.into());
    let bar = ui::bar(0, "measuring");
    let mut rows = run.measure(&mut engines, |p| sweep::show(&bar, &p)).map_err(failed)?;
    bar.finish_and_clear();
    println!("\n4. Simulate: the same scheduler on a virtual clock, the same requests.");
    let simulating = Instant::now();
    rows.extend(run.simulate(|_| {}).map_err(failed)?);
    println!(
        "   {} budgets in {}",
        experiment.cells().len(),
        ui::seconds(simulating.elapsed().as_secs_f64())
    );
    manifest.end(true);
    manifest.write(&manifest_path).map_err(Failure::failed)?;

    println!();
    validate::print(&Validation::of(&rows).map_err(|e| Failure::Failed(e.into()))?);
    println!(
        "(errors of one run each; the mean of several runs is `lora-hbm sweep configs/experiments/demo-validate.toml`)"
    );
    draw(&run)?;
    println!("\ndone in {:.0} s; everything is in {}", begun.elapsed().as_secs_f64(), folder.display());
    Ok(())
}

fn experiment(text: &str) -> Result<Experiment, Failure> {
    Experiment::parse(text, "demo.toml").map_err(|e| Failure::Failed(e.into()))
}

fn calibrated(cell: &Cell, folder: &Path) -> Result<Simulator, Failure> {
    let options = CalibrateOptions {
        engine: cell.engine.for_engine().map_err(Failure::failed)?,
        step_time: Duration::from_secs(12),
        longest: 2048,
        duty: 1.0,
        seed: 0,
    };
    let calibration = calibrate::with_progress(&options)?;
    let profile = calibrate::write(calibration.profile, &calibration.samples, &folder.join("profile.json"))?;
    println!(
        "   step cost off by {:.1} % on {} held-out steps",
        profile.holdout.mean_abs_error * 100.0,
        profile.holdout.samples
    );
    Simulator::new(profile).map_err(|e| Failure::Failed(e.into()))
}

/// The experiment's text with its load filled in.
fn with_load(load: &load::Load) -> Result<String, Failure> {
    let mut table: toml::Table = EXPERIMENT.parse().map_err(Failure::failed)?;
    if let Some(toml::Value::Table(workload)) = table.get_mut("workload") {
        // Three digits are enough, and make the results' rate readable.
        workload.insert("arrival_rate".to_owned(), ((load.rate * 1000.0).round() / 1000.0).into());
        workload.insert("num_requests".to_owned(), (load.requests as i64).into());
        workload.insert("max_tokens".to_owned(), i64::from(load.max_tokens).into());
    }
    toml::to_string(&table).map_err(Failure::failed)
}

#[cfg(feature = "plot")]
fn draw(run: &Sweep<'_>) -> Result<(), Failure> {
    let (svg, png) = super::plot::draw(
        std::slice::from_ref(&run.csv),
        run.requests.as_deref(),
        &run.csv.with_file_name("ttft"),
    )?;
    println!("\nplot: {}\n      {}", svg.display(), png.display());
    Ok(())
}

#[cfg(not(feature = "plot"))]
fn draw(_: &Sweep<'_>) -> Result<(), Failure> {
    println!("\nno plot: this program was built without the feature 'plot'");
    Ok(())
}
