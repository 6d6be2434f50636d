//! `lora-hbm profile refit`: step costs fitted anew to a calibration's samples.

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::{load, show};
use crate::calibrate::{Sample, StepSample, refit};
use crate::cli::failure::Failure;
use crate::cli::settings::Context;
use crate::profile::{Kind, ProfileError};
use crate::report::files::{check_writable, read_text, write_atomic};

#[derive(Args, Debug, Serialize)]
pub(super) struct RefitArgs {
    /// A profile file of `calibrate`, with its samples beside it
    #[serde(skip)]
    profile: PathBuf,
    /// The profile to write; it names the same samples, so keep it beside them
    #[arg(short, long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    out: Option<PathBuf>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct RefitSettings {
    out: Option<PathBuf>,
}

pub(super) fn run(args: &RefitArgs, ctx: &Context) -> Result<(), Failure> {
    let settings: RefitSettings = ctx.resolve("profile", args)?;
    let out = settings.out.ok_or_else(|| Failure::usage("--out is required: the profile to write"))?;
    let named = args.profile.display().to_string();
    let profile = load(&named)?;
    let samples = match (&profile.kind, &profile.samples_file) {
        (Kind::Engine, Some(name)) => args.profile.with_file_name(name),
        _ => {
            return Err(Failure::usage(format!(
                "{named} names no samples of this program's engine: only what `calibrate` has measured can be fitted"
            )));
        }
    };
    let text = read_text(&samples).map_err(Failure::failed)?;
    let mut steps: Vec<(bool, StepSample)> = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let sample = serde_json::from_str(line).map_err(|e| {
            Failure::failed(format!("{}: line {} is no sample: {e}", samples.display(), i + 1))
        })?;
        if let Sample::Step { held_out, sample } = sample {
            steps.push((held_out, sample));
        }
    }
    if !steps.iter().any(|(held_out, _)| !held_out) {
        return Err(Failure::failed(format!("{} has no step to fit: calibrate anew", samples.display())));
    }
    check_writable(&out).map_err(Failure::failed)?;
    let refitted = refit(profile, &steps).map_err(|e: ProfileError| Failure::Failed(e.into()))?;
    let text = serde_json::to_string_pretty(&refitted).map_err(Failure::failed)? + "\n";
    write_atomic(&out, text.as_bytes()).map_err(Failure::failed)?;
    show(&out.display().to_string(), &refitted, ctx)
}
