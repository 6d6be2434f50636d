//! `lora-hbm sweep`: every cell of an experiment file, measured or simulated.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use super::settings::{Context, OutputFormat};
use super::{ui, workload};
use crate::experiment::{
    Experiment, Shard, Simulator, Sweep, SweepError, SweepProgress, WorkloadSettings, lenient,
};
use crate::report::cells::Cells;
use crate::report::files::check_writable;
use crate::report::machine::Gpu;
use crate::report::manifest::{Dataset, Manifest, unclaimed_beside};
use crate::report::results::{ResultRow, Source, check_takes_rows};

#[derive(Args, Debug, Serialize)]
pub struct SweepArgs {
    /// Experiment file
    #[serde(skip_serializing_if = "Option::is_none")]
    experiment: Option<PathBuf>,
    /// measured (on an engine in this process) or simulated (from a profile) (required)
    #[arg(long, value_name = "measured|simulated")]
    #[serde(skip_serializing_if = "Option::is_none")]
    mode: Option<String>,
    /// Profile, a file or the name of a shipped one: for --mode simulated, and for loads given as rho
    #[arg(long, value_name = "PROFILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    profile: Option<String>,
    /// Go on where an earlier run of this sweep stopped
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    resume: Option<bool>,
    /// Only the I-th of N parts of the cells, such as 1/4
    #[arg(long, value_name = "I/N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    shard: Option<String>,
    /// Results CSV [default: the experiment's, else its name]
    #[arg(short, long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    out: Option<PathBuf>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct SweepSettings {
    experiment: Option<PathBuf>,
    mode: Option<String>,
    #[serde(deserialize_with = "lenient::text")]
    profile: Option<String>,
    resume: bool,
    shard: Option<String>,
    out: Option<PathBuf>,
}

pub fn run(args: &SweepArgs, ctx: &Context) -> Result<(), Failure> {
    let settings: SweepSettings = ctx.resolve("sweep", args)?;
    let path =
        settings.experiment.as_deref().ok_or_else(|| Failure::usage("sweep needs an experiment file"))?;
    let measured = match settings.mode.as_deref() {
        Some("measured") => true,
        Some("simulated") => false,
        Some(other) => {
            return Err(Failure::usage(format!("--mode is '{other}': it must be measured or simulated")));
        }
        None => return Err(Failure::usage("sweep needs --mode measured or --mode simulated")),
    };
    let shard = settings.shard.as_deref().map(str::parse::<Shard>).transpose();
    let shard = shard.map_err(|e| Failure::Usage(e.into()))?;
    let experiment = Experiment::load(path).map_err(|e| Failure::Usage(e.into()))?;
    let simulator = settings.profile.as_deref().map(simulator).transpose()?;
    if !measured && simulator.is_none() {
        return Err(Failure::usage("--mode simulated needs --profile: make one with `lora-hbm calibrate`"));
    }
    let csv = settings
        .out
        .clone()
        .or_else(|| experiment.output.csv.clone())
        .unwrap_or_else(|| PathBuf::from(format!("{}.csv", experiment.name)));
    check_writable(&csv).map_err(Failure::failed)?;

    let mut manifest = Manifest::begin("sweep", &(&settings, &experiment), &experiment.replicate.seeds)
        .map_err(Failure::failed)?;
    if let Some(simulator) = &simulator {
        manifest.of_profile(simulator.profile());
    }
    manifest.dataset = prompts(&experiment)?;
    let mut sweep = Sweep {
        experiment: &experiment,
        simulator: simulator.as_ref(),
        shard,
        requests: experiment.output.requests.clone(),
        decisions: experiment.output.decisions.clone(),
        manifest: None,
        csv,
    };
    let source = if measured { Source::Measured } else { Source::Simulated };
    let rows = sweep.rows().map_err(failed)?;
    let there = rows.iter().filter(|r| r.source == source).count();
    if there > 0 && !settings.resume {
        return Err(Failure::usage(format!(
            "{} has {there} {source} rows already: go on with --resume, or name another file with --out",
            sweep.csv.display()
        )));
    }
    sweep.check_profile(source, &rows).map_err(|e| Failure::Usage(e.into()))?;
    if let Some(figure) = &experiment.output.plot {
        check_figure(figure)?;
    }
    if sweep.left(source, &rows).is_empty() {
        // Nothing is run: the manifests of the runs that made the rows stay as they are.
        if ctx.format == OutputFormat::Table {
            println!("nothing is left to do: {there} {source} rows in {}", sweep.csv.display());
        }
        return draw(&sweep, ctx);
    }
    #[cfg(feature = "server")]
    if measured {
        sweep.check_logs(&rows).map_err(|e| match e {
            SweepError::Logged(_) => Failure::Usage(e.into()),
            other => failed(other),
        })?;
    }
    check_takes_rows(&sweep.csv).map_err(Failure::failed)?;
    let manifest_path = unclaimed_beside(named_by(&sweep.csv, source, shard), &manifest.started, &rows);
    sweep.manifest = manifest_path.file_name().map(|n| n.to_string_lossy().into_owned());
    manifest.write(&manifest_path).map_err(Failure::failed)?;
    let rows = if measured {
        measure(&sweep, |gpu| {
            manifest.on_gpu(gpu);
            manifest.write(&manifest_path).map_err(Failure::failed)
        })?
    } else {
        simulate(&sweep)?
    };
    manifest.end(true);
    manifest.write(&manifest_path).map_err(Failure::failed)?;
    match ctx.format {
        OutputFormat::Json => {
            for row in &rows {
                println!("{}", serde_json::to_string(row).map_err(Failure::failed)?);
            }
        }
        OutputFormat::Table => {
            print(&rows);
            println!("{} rows in {}", rows.len(), sweep.csv.display());
        }
    }
    draw(&sweep, ctx)
}

/// Refuses a figure that could not be drawn, before anything is run.
#[cfg(feature = "plot")]
fn check_figure(figure: &Path) -> Result<(), Failure> {
    let (svg, png) = crate::report::plot::paths(figure);
    [svg, png].iter().try_for_each(|path| check_writable(path).map_err(Failure::failed))
}

#[cfg(not(feature = "plot"))]
fn check_figure(_: &Path) -> Result<(), Failure> {
    Err(Failure::usage(
        "[output] plot wants a figure, and this program was built without the feature 'plot': remove the key",
    ))
}

/// The experiment's figure, of all the rows that its CSV has by now.
#[cfg(feature = "plot")]
fn draw(sweep: &Sweep<'_>, ctx: &Context) -> Result<(), Failure> {
    let Some(figure) = &sweep.experiment.output.plot else { return Ok(()) };
    let folder = sweep.requests.as_deref().filter(|folder| folder.is_dir());
    let (svg, png) = super::plot::draw(std::slice::from_ref(&sweep.csv), folder, figure)?;
    if ctx.format == OutputFormat::Table {
        println!("plot: {} and {}", svg.display(), png.display());
    }
    Ok(())
}

#[cfg(not(feature = "plot"))]
fn draw(_: &Sweep<'_>, _: &Context) -> Result<(), Failure> {
    Ok(())
}

pub(super) fn simulator(named: &str) -> Result<Simulator, Failure> {
    let profile = super::simulate::load_profile("sweep", Some(named))?;
    Simulator::new(profile).map_err(|e| Failure::Failed(e.into()))
}

/// What a run's manifest is named after. Measured and simulated rows of one CSV are made by two runs, and each shard by
/// one of its own, at the same time perhaps.
fn named_by(csv: &Path, source: Source, shard: Option<Shard>) -> PathBuf {
    csv.with_extension(match shard {
        None => format!("{source}.csv"),
        Some(shard) => format!("{source}.{}.csv", shard.to_string().replace('/', "of")),
    })
}

fn failed(e: SweepError) -> Failure {
    Failure::Failed(e.into())
}

/// `on` is told the GPU, if one is used, before the first run: a sweep that is cut short has it in its manifest.
#[cfg(feature = "server")]
fn measure(
    sweep: &Sweep<'_>,
    on: impl FnOnce(Option<Gpu>) -> Result<(), Failure>,
) -> Result<Vec<ResultRow>, Failure> {
    let mut engines = crate::experiment::Engines::default();
    if let Some(cell) = sweep.first_to_measure().map_err(failed)? {
        on(engines.loaded(&cell.engine).map_err(SweepError::from).map_err(failed)?.gpu())?;
    }
    let bar = ui::bar(0, "measuring");
    let rows = sweep.measure(&mut engines, |p| show(&bar, &p));
    bar.finish_and_clear();
    rows.map_err(failed)
}

#[cfg(not(feature = "server"))]
fn measure(
    _sweep: &Sweep<'_>,
    _on: impl FnOnce(Option<Gpu>) -> Result<(), Failure>,
) -> Result<Vec<ResultRow>, Failure> {
    Err(Failure::usage(
        "this program was built without an engine: build it with the feature 'server' to measure",
    ))
}

fn simulate(sweep: &Sweep<'_>) -> Result<Vec<ResultRow>, Failure> {
    let beyond = |simulator: &Simulator| {
        let most = sweep.experiment.cells().iter().max_by_key(|cell| cell.engine.max_num_seqs);
        most.and_then(|cell| simulator.extrapolated(&cell.engine))
    };
    if let Some(beyond) = sweep.simulator.and_then(beyond) {
        tracing::warn!("{beyond}");
    }
    let bar = ui::bar(0, "simulating");
    let rows = sweep.simulate(|p| show(&bar, &p));
    bar.finish_and_clear();
    rows.map_err(failed)
}

/// Runs as the unit, the share of the run under way included.
pub(super) fn show(bar: &indicatif::ProgressBar, p: &SweepProgress<'_>) {
    const PARTS: u64 = 100;
    if let Some(run) = p.run {
        bar.set_message(format!(
            "gpu_loras {}, seed {}, repeat {}",
            run.cell.engine.gpu_loras, run.seed, run.repeat
        ));
    }
    bar.set_length(p.total as u64 * PARTS);
    let share = p.requests.0 as u64 * PARTS / (p.requests.1.max(1) as u64);
    bar.set_position(p.done as u64 * PARTS + share);
}

/// What the cells' requests come from, if it is one thing.
fn prompts(experiment: &Experiment) -> Result<Option<Dataset>, Failure> {
    let file = |w: &WorkloadSettings| w.dataset.as_ref().or(w.trace.as_ref()).map(PathBuf::from);
    let files: BTreeSet<_> = experiment.cells().iter().map(|cell| file(&cell.workload)).collect();
    match files.first() {
        Some(one) if files.len() == 1 => Ok(Some(workload::dataset(one.as_deref())?)),
        _ => Ok(None),
    }
}

/// One line a cell.
fn print(rows: &[ResultRow]) {
    let Cells { header, lines } = Cells::of(rows);
    let mut table = ui::table(&header.iter().map(String::as_str).collect::<Vec<_>>());
    lines.into_iter().for_each(|line| {
        table.add_row(line);
    });
    println!("{table}");
}
