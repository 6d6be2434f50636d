//! `lora-hbm validate`: simulated results held against measured ones.

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use super::settings::{Context, OutputFormat};
use super::ui;
use crate::report::results::read_rows;
use crate::report::validation::Validation;

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
    /// Largest error of a budget's median TTFT, per cent, unless the repeats spread more [default: 10]
    #[arg(long, value_name = "PERCENT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    median: Option<f64>,
    /// Largest error of a budget's 90th percentile, likewise [default: 20]
    #[arg(long, value_name = "PERCENT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    p90: Option<f64>,
    /// Least skill against the best constant over budgets [default: 0.8]
    #[arg(long, value_name = "SKILL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    skill: Option<f64>,
}

#[derive(Serialize, Deserialize)]
#[serde(default)]
struct ValidateSettings {
    measured: Option<PathBuf>,
    simulated: Option<PathBuf>,
    median: f64,
    p90: f64,
    skill: f64,
}

impl Default for ValidateSettings {
    fn default() -> Self {
        Self { measured: None, simulated: None, median: 10.0, p90: 20.0, skill: 0.8 }
    }
}

pub fn run(args: &ValidateArgs, ctx: &Context) -> Result<(), Failure> {
    let settings: ValidateSettings = ctx.resolve("validate", args)?;
    let measured = settings.measured.ok_or_else(|| Failure::usage("validate needs --measured"))?;
    let mut rows = read_rows(&measured).map_err(|e| Failure::Failed(e.into()))?;
    if let Some(simulated) = settings.simulated.filter(|s| *s != measured) {
        rows.extend(read_rows(&simulated).map_err(|e| Failure::Failed(e.into()))?);
    }
    let cells: std::collections::BTreeSet<_> =
        rows.iter().map(|r| (&r.prompt_regime, r.total_loras, &r.policy, &r.rank)).collect();
    if cells.len() > 1 {
        return Err(Failure::usage(format!(
            "the rows are of {} configurations (regime, total_loras, policy, rank): compare one at a time",
            cells.len()
        )));
    }
    let validation = Validation::of(&rows);
    if validation.budgets.is_empty() {
        return Err(Failure::failed("no budget has both measured and simulated rows"));
    }
    match ctx.format {
        OutputFormat::Json => println!("{}", serde_json::to_string(&validation).map_err(Failure::failed)?),
        OutputFormat::Table => print(&validation),
    }
    if validation.holds(settings.median, settings.p90, settings.skill) {
        return Ok(());
    }
    Err(Failure::Unmet(format!(
        "does not hold: median within {} % and p90 within {} % at every budget (or twice the repeats' spread), skill {}",
        settings.median, settings.p90, settings.skill
    )))
}

/// The table, and what it comes to.
pub(super) fn print(validation: &Validation) {
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
        "swaps: measured",
        "simulated",
    ]);
    for b in &validation.budgets {
        let error = |e: f64| format!("{e:+.1} %");
        let spread = |s: Option<f64>| s.map_or_else(|| "-".to_owned(), |s| format!("{s:.1} %"));
        table.add_row([
            b.gpu_loras.to_string(),
            b.runs.to_string(),
            ui::seconds(b.median.measured_s),
            ui::seconds(b.median.simulated_s),
            error(b.median.error_percent()),
            spread(b.median.spread_percent),
            ui::seconds(b.p90.measured_s),
            ui::seconds(b.p90.simulated_s),
            error(b.p90.error_percent()),
            spread(b.p90.spread_percent),
            format!("{:.1}", b.swaps.0),
            format!("{:.1}", b.swaps.1),
        ]);
    }
    println!("{table}");
    if let Some(effect) = validation.effect {
        println!("measured median TTFT at the smallest budget: {effect:.2} times that at the largest");
    }
    if let Some(skill) = validation.skill {
        println!("skill against the best constant over budgets: {skill:.3}");
    }
}
