//! `lora-hbm validate`: simulated results held against measured ones.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use super::settings::{Context, OutputFormat};
use super::ui;
use crate::experiment::{Experiment, Sources, Target, cost_factor, lenient};
use crate::profile::Kind;
use crate::report::manifest;
use crate::report::record::RequestRecord;
use crate::report::requests::read_requests;
use crate::report::results::{ResultRow, Source, read_rows};
use crate::report::stats;
use crate::report::validation::{BudgetComparison, Compared, RequestErrors, Validation};

#[derive(Args, Debug, Serialize)]
pub struct ValidateArgs {
    /// Results CSV with the measured rows (required)
    #[arg(long, value_name = "CSV")]
    #[serde(skip_serializing_if = "Option::is_none")]
    measured: Option<PathBuf>,
    /// Results CSV with the simulated rows [default: the same]
    #[arg(long, value_name = "CSV")]
    #[serde(skip_serializing_if = "Option::is_none")]
    simulated: Option<PathBuf>,
    /// Folder of both runs' requests files: adds errors request by request, distances and TPOT
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    requests: Option<PathBuf>,
    /// Experiment file of both runs: with --profile, adds the factor on all costs that fits each cell best
    #[arg(long, value_name = "TOML")]
    #[serde(skip_serializing_if = "Option::is_none")]
    experiment: Option<PathBuf>,
    /// Profile that the simulation was made with, a file or the name of a shipped one
    #[arg(long, value_name = "PROFILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    profile: Option<String>,
    /// Draw requests, distributions and errors over load into this file's .svg and .png
    #[cfg(feature = "plot")]
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    plot: Option<PathBuf>,
    /// Largest error of a budget's median TTFT, per cent, unless the repeats spread more [default: 10]
    #[arg(long, value_name = "PERCENT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    median: Option<f64>,
    /// Largest error of a budget's 90th percentile, likewise [default: 20]
    #[arg(long, value_name = "PERCENT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    p90: Option<f64>,
    /// Least skill against the best constant over budgets, where the budget matters (the measured median at the smallest
    /// is 1.5 times that at the largest or more) [default: 0.8]
    #[arg(long, value_name = "SKILL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    skill: Option<f64>,
    /// Hold every unsaturated budget to the campaign's bounds too: median, mean, p99, swaps, and what
    /// the requests files add
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    strict: Option<bool>,
}

#[derive(Serialize, Deserialize)]
#[serde(default)]
struct ValidateSettings {
    measured: Option<PathBuf>,
    simulated: Option<PathBuf>,
    requests: Option<PathBuf>,
    experiment: Option<PathBuf>,
    #[serde(deserialize_with = "lenient::text")]
    profile: Option<String>,
    plot: Option<PathBuf>,
    median: f64,
    p90: f64,
    skill: f64,
    strict: bool,
}

impl Default for ValidateSettings {
    fn default() -> Self {
        Self {
            measured: None,
            simulated: None,
            requests: None,
            experiment: None,
            profile: None,
            plot: None,
            median: 10.0,
            p90: 20.0,
            skill: 0.8,
            strict: false,
        }
    }
}

pub fn run(args: &ValidateArgs, ctx: &Context) -> Result<(), Failure> {
    let settings: ValidateSettings = ctx.resolve("validate", args)?;
    let measured = settings.measured.clone().ok_or_else(|| Failure::usage("validate needs --measured"))?;
    let mut rows = read_rows(&measured).map_err(|e| Failure::Failed(e.into()))?;
    if let Some(simulated) = settings.simulated.clone().filter(|s| *s != measured) {
        // Each file is asked for its own kind: the other may be there too, of another profile or card.
        rows.retain(|r| r.source == Source::Measured);
        let others = read_rows(&simulated).map_err(|e| Failure::Failed(e.into()))?;
        rows.extend(others.into_iter().filter(|r| r.source == Source::Simulated));
    }
    if settings.experiment.is_some() != settings.profile.is_some() {
        return Err(Failure::usage("--experiment and --profile go together: give both for cost factors"));
    }
    let mut validations = Validation::each(&rows).map_err(|e| Failure::Usage(e.into()))?;
    if validations.is_empty() {
        return Err(Failure::failed(
            "no budget has both measured and simulated rows of the same settings and seed",
        ));
    }
    let mut budgets: Vec<&mut BudgetComparison> =
        validations.iter_mut().flat_map(|v| v.budgets.iter_mut()).collect();
    if let Some(folder) = &settings.requests {
        for budget in &mut budgets {
            budget.requests = requests(folder, budget, &rows)?;
        }
    }
    if let (Some(experiment), Some(profile)) = (&settings.experiment, &settings.profile) {
        add_factors(&mut budgets, experiment, profile, &rows)?;
    }
    #[cfg(feature = "plot")]
    if let Some(base) = &settings.plot {
        draw(base, &settings, &validations, &rows)?;
    }
    match ctx.format {
        OutputFormat::Json => println!("{}", serde_json::to_string(&validations).map_err(Failure::failed)?),
        OutputFormat::Table => {
            for validation in &validations {
                print(validation);
            }
            print_summary(&validations);
            if let Some(said) = black_box(&settings, &rows) {
                println!("{said}");
            }
        }
    }
    verdict(&settings, &validations)
}

/// Says so if any simulated row was made with a black-box profile.
fn black_box(settings: &ValidateSettings, rows: &[ResultRow]) -> Option<String> {
    let csv: Vec<PathBuf> =
        [&settings.measured, &settings.simulated].into_iter().flatten().cloned().collect();
    let simulated = rows.iter().filter(|r| r.source == Source::Simulated);
    let manifests = manifest::of_results(&csv, simulated.filter_map(|r| r.manifest.as_deref()));
    manifests.iter().any(|m| m.profile_kind == Some(Kind::BlackBox)).then(|| {
        "Simulated with a black-box profile: fitted to a server's response times, not to its steps."
            .to_owned()
    })
}

fn verdict(settings: &ValidateSettings, validations: &[Validation]) -> Result<(), Failure> {
    for validation in validations {
        let breaches = validation.breaches(settings.median, settings.p90, settings.skill);
        if !breaches.is_empty() {
            return Err(Failure::Unmet(format!(
                "does not hold of {}: median within {} % and p90 within {} % at every budget (or twice the repeats' \
                 spread), skill {} where the budget matters: {}",
                validation.what,
                settings.median,
                settings.p90,
                settings.skill,
                breaches.join(", ")
            )));
        }
    }
    let bounded = validations.iter().flat_map(|v| &v.budgets).filter(|b| !b.saturated);
    let misses: BTreeSet<&str> = bounded.flat_map(BudgetComparison::misses).collect();
    if settings.strict && !misses.is_empty() {
        let misses: Vec<&str> = misses.into_iter().collect();
        return Err(Failure::Unmet(format!("the campaign's bounds do not hold: {}", misses.join(", "))));
    }
    Ok(())
}

/// The rows of a budget's cell, by trace.
fn by_seed<'a>(rows: &'a [ResultRow], cell: &str) -> BTreeMap<u64, Vec<&'a ResultRow>> {
    let mut seeds: BTreeMap<u64, Vec<&ResultRow>> = BTreeMap::new();
    for row in rows.iter().filter(|r| r.cell.as_deref() == Some(cell)) {
        if let Some(seed) = row.seed {
            seeds.entry(seed).or_default().push(row);
        }
    }
    seeds
}

/// A trace's measured repeats and its simulation.
type OfTrace = (Vec<Vec<RequestRecord>>, Vec<RequestRecord>);

/// Errors of the requests whose files are in `folder`.
fn requests(
    folder: &Path,
    budget: &BudgetComparison,
    rows: &[ResultRow],
) -> Result<Option<RequestErrors>, Failure> {
    let errors = RequestErrors::of(&traces(folder, budget, rows)?);
    if errors.is_none() {
        tracing::warn!("{} has no requests files of budget {}", folder.display(), budget.gpu_loras);
    }
    Ok(errors)
}

/// The requests of a budget by trace; a run without a file is left out, and a trace without both kinds of them.
fn traces(folder: &Path, budget: &BudgetComparison, rows: &[ResultRow]) -> Result<Vec<OfTrace>, Failure> {
    let Some(cell) = &budget.cell else {
        return Err(Failure::usage(
            "--requests needs rows of an experiment, which name their requests files; these have no cell",
        ));
    };
    let mut traces = Vec::new();
    for of_seed in by_seed(rows, cell).values() {
        let read = |source: Source| {
            let files = of_seed.iter().filter(|r| r.source == source).filter_map(|r| r.run_key());
            files
                .map(|key| folder.join(key.file_name()))
                .filter(|path| path.exists())
                .map(|path| read_requests(path).map_err(|e| Failure::Failed(e.into())))
                .collect::<Result<Vec<_>, _>>()
        };
        let measured = read(Source::Measured)?;
        if let Some(simulated) = read(Source::Simulated)?.pop().filter(|_| !measured.is_empty()) {
            traces.push((measured, simulated));
        }
    }
    Ok(traces)
}

/// The figure beside the table.
#[cfg(feature = "plot")]
fn draw(
    base: &Path,
    settings: &ValidateSettings,
    validations: &[Validation],
    rows: &[ResultRow],
) -> Result<(), Failure> {
    use crate::report::plot::{self, agreement};

    let budgets = || validations.iter().flat_map(|v| &v.budgets);
    // One axis has one unit.
    let has_rho = budgets().all(|b| b.rho.is_some());
    let load = |b: &BudgetComparison| if has_rho { b.rho } else { b.arrival_rate };
    let files: Vec<PathBuf> = settings.measured.iter().chain(&settings.simulated).cloned().collect();
    let mut pairs = Vec::new();
    if let Some(folder) = &settings.requests {
        for budget in budgets() {
            for (repeats, simulated) in traces(folder, budget, rows)? {
                let simulated: BTreeMap<u64, f64> =
                    simulated.iter().filter_map(|r| Some((r.id, r.ttft_s?))).collect();
                let both = repeats.iter().flatten().filter_map(|r| Some((r.ttft_s?, *simulated.get(&r.id)?)));
                pairs.extend(both);
            }
        }
    }
    let drawn = agreement::svg(&agreement::Agreement {
        pairs,
        residuals: budgets().filter_map(|b| Some((load(b)?, b.median.error_percent))).collect(),
        load: if has_rho { "load, rho" } else { "requests a second" }.to_owned(),
        title: "Simulated against measured TTFT".to_owned(),
        footer: plot::footer(&files, rows),
    })
    .map_err(|e| Failure::Failed(e.into()))?;
    let (svg, png) = plot::paths(base);
    let pixels = plot::png(&drawn).map_err(|e| Failure::Failed(e.into()))?;
    crate::report::files::write_atomic(&svg, drawn.as_bytes()).map_err(Failure::failed)?;
    crate::report::files::write_atomic(&png, &pixels).map_err(Failure::failed)?;
    tracing::info!("drawn: {} and {}", svg.display(), png.display());
    Ok(())
}

fn add_factors(
    budgets: &mut [&mut BudgetComparison],
    experiment: &Path,
    profile: &str,
    rows: &[ResultRow],
) -> Result<(), Failure> {
    let experiment = Experiment::load(experiment).map_err(|e| Failure::Usage(e.into()))?;
    let simulator = super::sweep::simulator(profile)?;
    let mut sources = Sources::default();
    for budget in budgets {
        let cell = experiment.cells().iter().find(|c| Some(c.key()) == budget.cell.as_deref());
        let Some(cell) = cell else {
            return Err(Failure::usage(format!(
                "budget {} is of a cell that {} does not have: name the experiment that the rows were made with",
                budget.gpu_loras, experiment.name
            )));
        };
        let mut targets = Vec::new();
        for (seed, rows) in by_seed(rows, cell.key()) {
            let measured = || rows.iter().filter(|r| r.source == Source::Measured);
            let means: Vec<f64> = measured().filter_map(|r| r.ttft_mean).collect();
            if let Some(ttft_mean_s) = stats::mean(&means) {
                let rate = measured().find_map(|r| r.arrival_rate);
                targets.push(Target { seed, rate, ttft_mean_s });
            }
        }
        let factor = cost_factor(&simulator, cell, &targets, &mut sources);
        budget.cost_factor = factor.map_err(|e| Failure::Failed(e.into()))?;
    }
    Ok(())
}

/// The table of one configuration, and what it comes to.
pub(super) fn print(validation: &Validation) {
    println!("{}", validation.what);
    let mut table = ui::table(&[
        "gpu_loras",
        "runs",
        "median: measured",
        "simulated",
        "error",
        "spread",
        "p90: measured",
        "simulated",
        "error",
        "spread",
        "p99 error",
        "mean error",
        "swaps: measured",
        "simulated",
        "misses",
    ]);
    let error = |e: f64| format!("{e:+.1} %");
    // Of neighbouring budgets where it has no repeats of its own.
    let spread = |c: &Compared| match (c.spread_percent, c.neighbours_percent) {
        (Some(own), _) => format!("{own:.1} %"),
        (None, Some(theirs)) => format!("({theirs:.1} %)"),
        (None, None) => "-".to_owned(),
    };
    let count = |n: Option<f64>| n.map_or_else(|| "-".to_owned(), |n| format!("{n:.1}"));
    for b in &validation.budgets {
        let misses = if b.saturated { "saturated".to_owned() } else { b.misses().join(", ") };
        table.add_row([
            b.gpu_loras.to_string(),
            b.runs.to_string(),
            ui::seconds(b.median.measured_s),
            ui::seconds(b.median.simulated_s),
            error(b.median.error_percent),
            spread(&b.median),
            ui::seconds(b.p90.measured_s),
            ui::seconds(b.p90.simulated_s),
            error(b.p90.error_percent),
            spread(&b.p90),
            error(b.p99.error_percent),
            error(b.mean.error_percent),
            count(b.swaps.0),
            count(b.swaps.1),
            misses,
        ]);
    }
    println!("{table}");
    print_beside(validation);
    validation.said().iter().for_each(|said| println!("{said}"));
}

/// Naive predictors, and what requests files and a profile add.
fn print_beside(validation: &Validation) {
    let mut table = ui::table(&[
        "gpu_loras",
        "constant: median",
        "no queueing: mean",
        "E2E median",
        "cost factor",
        "a request: median",
        "p90",
        "itself",
        "KS",
        "itself",
        "Wasserstein",
        "TPOT error",
    ]);
    let percent = |e: Option<f64>| e.map_or_else(|| "-".to_owned(), |e| format!("{e:+.1} %"));
    for b in &validation.budgets {
        let of = |f: fn(&RequestErrors) -> String| b.requests.as_ref().map_or_else(|| "-".to_owned(), f);
        let unknown = || "-".to_owned();
        table.add_row([
            b.gpu_loras.to_string(),
            percent(b.naive.constant_percent),
            percent(b.naive.service_percent),
            percent(b.e2e_median.map(|c| c.error_percent)),
            b.cost_factor.map_or_else(unknown, |f| format!("{f:.4}")),
            of(|r| format!("{:.1} %", r.median_percent)),
            of(|r| format!("{:.1} %", r.p90_percent)),
            of(|r| r.itself.map_or_else(|| "-".to_owned(), |i| format!("{:.1} %", i.p90_percent))),
            of(|r| format!("{:.3}", r.ks)),
            of(|r| r.itself.map_or_else(|| "-".to_owned(), |i| format!("{:.3}", i.ks))),
            of(|r| ui::seconds(r.wasserstein_s)),
            of(|r| r.tpot.map_or_else(|| "-".to_owned(), |t| format!("{:+.1} %", t.error_percent))),
        ]);
    }
    println!("{table}");
}

/// Typical and worst over all cells that are not saturated: overload flatters.
fn print_summary(validations: &[Validation]) {
    let open = |b: &&BudgetComparison| !b.saturated;
    let cells: Vec<&BudgetComparison> = validations.iter().flat_map(|v| &v.budgets).filter(open).collect();
    let errors: Vec<f64> = cells.iter().map(|b| b.median.error_percent.abs()).collect();
    let worst =
        cells.iter().max_by(|a, b| a.median.error_percent.abs().total_cmp(&b.median.error_percent.abs()));
    if let (Some(typical), Some(worst)) = (stats::median(&stats::sorted(&errors)), worst) {
        println!(
            "{} unsaturated cells: the median's error is typically {typical:.1} %, at worst {:+.1} % (budget {})",
            cells.len(),
            worst.median.error_percent,
            worst.gpu_loras
        );
    }
}
