//! `lora-hbm calibrate`: a profile of this machine, by micro-benchmarks.

mod endpoint;

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};

use self::endpoint::{EndpointArgs, EndpointSettings};
use super::engine_args::{EngineFlags, RunningEngineArgs};
use super::failure::Failure;
use super::profile::save;
use super::settings::{Context, OutputFormat};
use super::ui;
use crate::calibrate::{CalibrateOptions, Calibration, calibrate};
use crate::experiment::lenient;
use crate::profile::Profile;
use crate::report::files::{check_writable, write_atomic};

const DEFAULT_MODEL: &str = "facebook/opt-125m";

#[derive(Args, Debug, Serialize)]
pub struct CalibrateArgs {
    /// Base model, as in serve [default: facebook/opt-125m; with --endpoint the server's]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    #[command(flatten)]
    #[serde(skip)]
    engine: RunningEngineArgs,
    #[command(flatten)]
    #[serde(skip)]
    endpoint: EndpointArgs,
    /// The profile; its samples go beside it [default: profile.json]
    #[arg(short, long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    out: Option<PathBuf>,
    /// Seconds for timing steps; the rest takes a few more [default: 30]
    #[arg(long, value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds: Option<f64>,
    /// Longest prefill to time, tokens [default: 4096]
    #[arg(long, value_name = "TOKENS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    longest: Option<u32>,
    /// On a GPU, the share of the time in which it is busy at least while steps are timed, over 0.01 and up to 1: steps
    /// are timed after rests of different lengths, since one that was busy is slower [default: 0.25]
    #[arg(long, value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    duty: Option<f64>,
    /// Seed of the step compositions [default: 0]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct CalibrateSettings {
    #[serde(deserialize_with = "lenient::text")]
    model: Option<String>,
    out: PathBuf,
    seconds: f64,
    longest: u32,
    duty: f64,
    seed: u64,
}

impl Default for CalibrateSettings {
    fn default() -> Self {
        Self { model: None, out: "profile.json".into(), seconds: 30.0, longest: 4096, duty: 0.25, seed: 0 }
    }
}

pub fn run(args: &CalibrateArgs, ctx: &Context) -> Result<(), Failure> {
    let settings: CalibrateSettings = ctx.resolve("calibrate", args)?;
    let flags: EngineFlags = ctx.resolve("calibrate", &args.engine)?;
    if !(settings.seconds > 0.0 && settings.seconds.is_finite()) {
        return Err(Failure::usage(format!("--seconds is {}: it must be over 0", settings.seconds)));
    }
    if settings.longest < 16 {
        return Err(Failure::usage(format!("--longest is {}: it must be at least 16", settings.longest)));
    }
    if !(settings.duty > 0.01 && settings.duty <= 1.0) {
        return Err(Failure::usage(format!("--duty is {}: it must be over 0.01 and up to 1", settings.duty)));
    }
    check_writable(&settings.out).map_err(Failure::failed)?;
    let endpoint: EndpointSettings = ctx.resolve("calibrate", &args.endpoint)?;
    if let Some(url) = &endpoint.endpoint {
        return endpoint::run(url, &endpoint, (&args.endpoint.api, &flags), &settings, ctx);
    }
    let engine = flags.settings(settings.model.as_deref().unwrap_or(DEFAULT_MODEL), 1, 1)?;
    let options = CalibrateOptions {
        engine: engine.for_engine().map_err(Failure::usage)?,
        step_time: Duration::from_secs_f64(settings.seconds),
        longest: settings.longest,
        duty: settings.duty,
        seed: settings.seed,
    };
    let calibration = with_progress(&options)?;
    conclude(ctx, calibration.profile, &calibration.samples, &settings.out, print)
}

/// Writes the profile with its samples and says what it is.
fn conclude(
    ctx: &Context,
    profile: Profile,
    samples: &[impl Serialize],
    out: &Path,
    print: impl FnOnce(&Profile),
) -> Result<(), Failure> {
    let profile = write(profile, samples, out)?;
    match ctx.format {
        OutputFormat::Json => println!("{}", serde_json::to_string(&profile).map_err(Failure::failed)?),
        OutputFormat::Table => {
            print(&profile);
            println!("profile: {}", out.display());
        }
    }
    Ok(())
}

/// Calibrates with a bar.
pub(super) fn with_progress(options: &CalibrateOptions) -> Result<Calibration, Failure> {
    let bar = ui::bar(100, "calibrating");
    let calibration = calibrate(options, |what, share| {
        bar.set_message(format!("calibrating: {what}"));
        bar.set_position((share * 100.0) as u64);
    });
    bar.finish_and_clear();
    calibration.map_err(|e| Failure::Failed(e.into()))
}

/// Writes the samples, then the profile that names them.
pub(super) fn write(profile: Profile, raw: &[impl Serialize], out: &Path) -> Result<Profile, Failure> {
    let samples = out.with_extension("samples.jsonl");
    let mut lines = String::new();
    for sample in raw {
        lines += &serde_json::to_string(sample).map_err(Failure::failed)?;
        lines.push('\n');
    }
    write_atomic(&samples, lines.as_bytes()).map_err(Failure::failed)?;
    let name = samples.file_name().map(|n| n.to_string_lossy().into_owned());
    let profile = Profile { samples_file: name, ..profile }.signed();
    save(&profile, out)?;
    Ok(profile)
}

fn print(profile: &Profile) {
    let mut table = ui::table(&["cost", "value", "unit"]);
    for (feature, ns) in profile.step.features.iter().zip(&profile.step.coef_ns) {
        table.add_row([format!("step: {feature}"), format!("{:.3}", ns / 1e3), "µs".to_owned()]);
    }
    let mut row = |what: &str, value: f64, unit: &str| {
        table.add_row([what.to_owned(), format!("{value:.3}"), unit.to_owned()]);
    };
    row("swap: fixed", profile.swap.fixed_s * 1e6, "µs");
    row("swap: rate alone", profile.swap.bytes_per_s / 1e9, "GB/s");
    row("swap: rate beside a step", profile.swap.busy_bytes_per_s / 1e9, "GB/s");
    row("step beside a swap: slower by", profile.swap.step_slowdown * 100.0, "%");
    row("step that reads an adapter under way: more by", profile.swap.reading_s * 1e6, "µs");
    row("host: step to step", profile.host.loop_s * 1e6, "µs");
    row("host: front end", profile.host.front_s * 1e6, "µs");
    row("host: front end, a KB of prompt", profile.host.tokenize_s_per_byte * 1e9, "µs");
    row("host: front end, a prompt that is handed over", profile.host.handover_s * 1e6, "µs");
    row("host: delivery", profile.host.deliver_s * 1e6, "µs");
    println!("{table}");
    println!(
        "holdout: {} steps, error {:.1} % (mean of absolutes), {:+.1} % (bias)",
        profile.holdout.samples,
        profile.holdout.mean_abs_error * 100.0,
        profile.holdout.bias * 100.0
    );
}
