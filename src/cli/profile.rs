//! `lora-hbm profile`: look at a profile, hold it against a run, fit it anew, or make a what-if copy.

#[cfg(feature = "server")]
mod refit;
mod residuals;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use super::settings::{Context, OutputFormat};
use super::ui;
use crate::profile::{CostModel, Kind, Profile, Scale, ScaleError, StepShape};
use crate::report::files::{check_writable, write_atomic};

#[derive(Args, Debug, Serialize)]
pub struct ProfileArgs {
    #[command(subcommand)]
    #[serde(skip)]
    command: ProfileCommand,
}

#[derive(Subcommand, Debug)]
enum ProfileCommand {
    /// Refuse a bad profile with the reason; of a sound one, say what it costs and how well it fits
    Check(CheckArgs),
    /// Make a marked copy of a machine with other rates
    Scale(ScaleArgs),
    /// Hold a profile's costs against what a run's steps, copies and host gaps took: which misses, and by how much
    Residuals(residuals::ResidualsArgs),
    /// Fit a calibration's samples anew, with the terms that this program knows
    #[cfg(feature = "server")]
    Refit(refit::RefitArgs),
}

pub fn run(args: &ProfileArgs, ctx: &Context) -> Result<(), Failure> {
    match &args.command {
        ProfileCommand::Check(args) => check(args, ctx),
        ProfileCommand::Scale(args) => scale(args, ctx),
        ProfileCommand::Residuals(args) => residuals::run(args, ctx),
        #[cfg(feature = "server")]
        ProfileCommand::Refit(args) => refit::run(args, ctx),
    }
}

#[derive(Args, Debug, Serialize)]
struct CheckArgs {
    /// A file, or the name of a shipped profile
    profile: String,
}

#[derive(Args, Debug, Serialize)]
struct ScaleArgs {
    /// A file, or the name of a shipped profile
    #[serde(skip)]
    profile: String,
    /// Arithmetic, so many times as fast [default: 1]
    #[arg(long, value_name = "TIMES", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    compute: Option<f64>,
    /// Device memory, so many times as fast [default: 1]
    #[arg(long, value_name = "TIMES", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    bandwidth: Option<f64>,
    /// Copies from host memory, so many times as fast [default: 1]
    #[arg(long, value_name = "TIMES", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    copy: Option<f64>,
    /// The host's own work, so many times as fast [default: 1]
    #[arg(long, value_name = "TIMES", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    host_speed: Option<f64>,
    /// The profile to write
    #[arg(short, long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    out: Option<PathBuf>,
}

#[derive(Serialize, Deserialize)]
struct ScaleSettings {
    compute: f64,
    bandwidth: f64,
    copy: f64,
    host_speed: f64,
    out: Option<PathBuf>,
}

impl Default for ScaleSettings {
    fn default() -> Self {
        Self { compute: 1.0, bandwidth: 1.0, copy: 1.0, host_speed: 1.0, out: None }
    }
}

fn load(named: &str) -> Result<Profile, Failure> {
    Profile::named(named).map_err(|e| Failure::Failed(e.into()))
}

fn scale(args: &ScaleArgs, ctx: &Context) -> Result<(), Failure> {
    let settings: ScaleSettings = ctx.resolve("profile", args)?;
    let out = settings.out.ok_or_else(|| Failure::usage("--out is required: the profile to write"))?;
    let by = Scale {
        compute: settings.compute,
        bandwidth: settings.bandwidth,
        copy: settings.copy,
        host: settings.host_speed,
    };
    let scaled = load(&args.profile)?.scaled(by).map_err(|e| match e {
        ScaleError::Factor { .. } => Failure::Usage(e.into()),
        ScaleError::Feature(_) => Failure::Failed(e.into()),
    })?;
    check_writable(&out).map_err(Failure::failed)?;
    save(&scaled, &out)?;
    show(&out.display().to_string(), &scaled, ctx)
}

/// Writes a profile's file, whole or not at all.
pub(super) fn save(profile: &Profile, out: &Path) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(profile).map_err(Failure::failed)? + "\n";
    write_atomic(out, text.as_bytes()).map_err(Failure::failed)
}

fn check(args: &CheckArgs, ctx: &Context) -> Result<(), Failure> {
    let profile = load(&args.profile)?;
    show(&args.profile, &profile, ctx)
}

/// A step with one prompt.
fn prefill(tokens: u64) -> StepShape {
    StepShape {
        tokens,
        prefills: 1,
        prefill_pairs: tokens * (tokens + 1) / 2,
        prefill_span: tokens,
        samples: 1,
        ..StepShape::default()
    }
}

/// A step of decodes at a mean context.
fn decode(sequences: u64, context: u64) -> StepShape {
    StepShape {
        tokens: sequences,
        decodes: sequences,
        decode_context: sequences * context,
        samples: sequences,
        ..StepShape::default()
    }
}

fn show(name: &str, profile: &Profile, ctx: &Context) -> Result<(), Failure> {
    let cost = CostModel::new(profile).map_err(|e| Failure::Failed(e.into()))?;
    let steps = [
        ("prefill of 128", prefill(128)),
        ("prefill of 512", prefill(512)),
        ("prefill of 1024", prefill(1024)),
        ("prefill of 4096", prefill(4096)),
        ("1 decode at 512", decode(1, 512)),
        ("16 decodes at 512", decode(16, 512)),
        ("64 decodes at 512", decode(64, 512)),
    ];
    let seconds = |ns: u64| ns as f64 * 1e-9;
    let is_measured = profile.kind != Kind::Scaled;
    if ctx.format == OutputFormat::Json {
        let times: serde_json::Map<String, serde_json::Value> = steps
            .iter()
            .map(|(what, shape)| ((*what).to_owned(), seconds(cost.step_ns(shape)).into()))
            .collect();
        let report = serde_json::json!({
            "profile": name, "kind": profile.kind, "model": profile.model, "machine": profile.machine,
            "ranks": profile.adapter.ranks, "step_s": times, "holdout": is_measured.then_some(&profile.holdout),
            "residuals": is_measured.then_some(&profile.residuals), "sha256": profile.sha256,
        });
        println!("{report}");
        return Ok(());
    }
    let kind = match profile.kind {
        Kind::Engine => "measured on this program's engine",
        Kind::BlackBox => "fitted to a server's response times",
        Kind::Scaled => "a what-if copy: not measured",
    };
    println!("{name}: {} on {}, {kind}, {}", profile.model, profile.engine.device, profile.created);
    let mut table = ui::table(&["step or swap", "time"]);
    for (what, shape) in steps {
        table.add_row([what.to_owned(), ui::seconds(seconds(cost.step_ns(&shape)))]);
    }
    for (rank, &bytes) in profile.adapter.ranks.iter().zip(&profile.adapter.bytes) {
        let time = ui::seconds(seconds(cost.swap_ns(bytes)));
        table.add_row([format!("swap of rank {rank} ({:.1} MB)", bytes as f64 * 1e-6), time]);
    }
    if profile.swap.reading_s > 0.0 {
        table.add_row([
            "reading an adapter under way: more by".to_owned(),
            ui::seconds(profile.swap.reading_s),
        ]);
    }
    println!("{table}");
    let h = &profile.holdout;
    if !is_measured {
        // The residuals in it are the original's.
        println!("no sample was taken of such a machine: how well the costs fit is not known");
    } else if h.samples == 0 {
        println!("no samples were held out: how well the costs fit is not known");
    } else {
        println!(
            "{} steps held out: mean error {:.1} %, largest {:.1} %, bias {:+.1} %",
            h.samples,
            h.mean_abs_error * 100.0,
            h.max_abs_error * 100.0,
            h.bias * 100.0
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use lora_sched::{PlaceId, RequestId, SeqStep, StepPlan};

    use super::*;
    use crate::profile::History;

    /// Shapes that are made by hand are those that the simulator makes of the same steps.
    #[test]
    fn steps_are_the_simulators() {
        let shape = |count: u32, start: u32, len: u32, decode: bool| {
            let seq = |place: u32| SeqStep {
                id: RequestId(u64::from(place)),
                place: PlaceId(place),
                adapter: None,
                start,
                len,
                decode,
                samples: true,
                new_blocks: 0..0,
            };
            let plan = StepPlan { seqs: (0..count).map(seq).collect(), ..StepPlan::default() };
            StepShape::of(&plan, 0, |_| 0, &mut History::default())
        };
        assert_eq!(prefill(4096), shape(1, 0, 4096, false));
        assert_eq!(decode(16, 512), shape(16, 511, 1, true));
    }
}
