//! `lora-hbm profile residuals`: which of a profile's costs misses what a run's decision log says, and by how much.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::load;
use crate::cli::failure::Failure;
use crate::cli::settings::{Context, OutputFormat};
use crate::cli::ui;
use crate::profile::Profile;
use crate::report::decision_log;
use crate::sim::{KindResidual, RangeResidual, Residual, ResidualReport, Residuals};

#[derive(Args, Debug, Serialize)]
pub(super) struct ResidualsArgs {
    /// A file, or the name of a shipped profile
    profile: String,
    /// Decision logs of `serve --decision-log`, or of a sweep with `[output] decisions`; several are taken together
    #[arg(required = true, value_name = "LOG")]
    logs: Vec<PathBuf>,
}

/// What is printed as JSON: the report, and of what it is.
#[derive(Serialize)]
struct Said<'a> {
    profile: &'a str,
    model: &'a str,
    sha256: &'a str,
    logs: &'a [PathBuf],
    #[serde(flatten)]
    report: &'a ResidualReport,
}

pub(super) fn run(args: &ResidualsArgs, ctx: &Context) -> Result<(), Failure> {
    let profile = load(&args.profile)?;
    let mut residuals = Residuals::new(&profile).map_err(|e| Failure::Failed(e.into()))?;
    for path in &args.logs {
        let (header, lines) = decision_log::read(path).map_err(|e| Failure::Failed(e.into()))?;
        let added = residuals.add(&header, &lines);
        added.map_err(|e| Failure::failed(format!("decision log {}: {e}", path.display())))?;
    }
    let report = residuals.report();
    if report.is_empty() {
        let logs: Vec<String> = args.logs.iter().map(|path| path.display().to_string()).collect();
        return Err(Failure::failed(format!(
            "nothing has ended in {}: name the log of a server that was sent requests",
            logs.join(", ")
        )));
    }
    match ctx.format {
        OutputFormat::Json => {
            let Profile { model, sha256, .. } = &profile;
            let said = Said { profile: &args.profile, model, sha256, logs: &args.logs, report: &report };
            println!("{}", serde_json::to_string(&said).map_err(Failure::failed)?);
        }
        OutputFormat::Table => print(&args.profile, &profile, &report),
    }
    Ok(())
}

fn print(name: &str, profile: &Profile, report: &ResidualReport) {
    println!("{name} ({}), predicted against measured", profile.model);
    for model in &report.other_models {
        println!(
            "warning: a log is of {model}, the profile of {}: what misses may be the model; name a profile of {model}",
            profile.model
        );
    }
    let mut table = ui::table(&["", "count", "measured", "share", "error", "median", "p10", "p90", "effect"]);
    for KindResidual { kind, share, residual } in report.kinds.iter().filter(|k| k.residual.count > 0) {
        let mut row = vec![kind.said().to_owned()];
        row.extend(cells(residual));
        row.insert(3, share.map_or_else(none, |share| format!("{:.1} %", share * 100.0)));
        table.add_row(row);
    }
    println!("{table}");
    if report.waited_s > 0.0 {
        println!("left out: {} that steps waited for adapters", ui::seconds(report.waited_s));
    }
    if let Some(KindResidual { kind, residual, .. }) = report.largest() {
        println!(
            "the largest effect: {}, {} too {} over {} measured",
            kind.said(),
            ui::seconds(residual.effect_s.abs()),
            if residual.effect_s > 0.0 { "much" } else { "little" },
            ui::seconds(residual.measured_s)
        );
    }
    let by_recent: Vec<_> = report.prompts_by_recent.iter().map(|r| ("", r)).collect();
    ranges("steps with prompts, by tokens a second in such steps of late", &by_recent);
    let decodes = report.decodes_by_load.iter().map(|r| ("decodes alone: ", r));
    let by_load: Vec<_> =
        decodes.chain(report.prompts_by_load.iter().map(|r| ("with prompts: ", r))).collect();
    ranges("steps, by sequences in them", &by_load);
}

/// A table of ranges, if there are any.
fn ranges(title: &str, rows: &[(&str, &RangeResidual)]) {
    if rows.is_empty() {
        return;
    }
    let mut table = ui::table(&[title, "count", "measured", "error", "median", "p10", "p90", "effect"]);
    for (what, RangeResidual { from, to, residual }) in rows {
        let range = if from == to { from.to_string() } else { format!("{from} to {to}") };
        let mut row = vec![format!("{what}{range}")];
        row.extend(cells(residual));
        table.add_row(row);
    }
    println!("{table}");
}

/// Count, measured time, errors and effect.
fn cells(residual: &Residual) -> Vec<String> {
    let error = |e: Option<f64>| e.map_or_else(none, |e| format!("{:+.1} %", e * 100.0));
    vec![
        residual.count.to_string(),
        ui::seconds(residual.measured_s),
        error(residual.error),
        error(residual.median_error),
        error(residual.p10_error),
        error(residual.p90_error),
        format!(
            "{}{}",
            if residual.effect_s < 0.0 { "-" } else { "+" },
            ui::seconds(residual.effect_s.abs())
        ),
    ]
}

fn none() -> String {
    "-".to_owned()
}
