//! `lora-hbm profile refit`: step costs fitted anew to the samples of one or several calibrations.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::{load, save, show};
use crate::calibrate::{ReadingSample, Sample, StepSample, refit};
use crate::cli::calibrate;
use crate::cli::failure::Failure;
use crate::cli::settings::Context;
use crate::profile::{Kind, Profile, ProfileError};
use crate::report::files::{check_writable, read_text};

#[derive(Args, Debug, Serialize)]
pub(super) struct RefitArgs {
    /// A profile file of `calibrate`, with its samples beside it
    #[serde(skip)]
    profile: PathBuf,
    /// More calibrations of the same machine, made at other times: the steps are fitted together, with what they take
    /// more to read an adapter under way; the other costs of swaps and those of the host are the first one's
    #[serde(skip)]
    others: Vec<PathBuf>,
    /// The profile to write. Of one calibration it names the same samples, so keep it beside them; of several, all their
    /// samples are written beside it
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
    let (profile, mut samples) = read(&args.profile)?;
    for path in &args.others {
        let (other, more) = read(path)?;
        expect_same(&profile, &other, path)?;
        samples.extend(more);
    }
    let steps: Vec<(bool, StepSample)> = samples.iter().filter_map(step).collect();
    let readings: Vec<ReadingSample> = samples.iter().filter_map(reading).collect();
    if !steps.iter().any(|(held_out, _)| !held_out) {
        return Err(Failure::failed("the samples have no step to fit: calibrate anew"));
    }
    check_writable(&out).map_err(Failure::failed)?;
    let mut refitted =
        refit(profile, &steps, &readings).map_err(|e: ProfileError| Failure::Failed(e.into()))?;
    if args.others.is_empty() {
        save(&refitted, &out)?;
    } else {
        refitted = calibrate::write(refitted, &samples, &out)?;
    }
    show(&out.display().to_string(), &refitted, ctx)
}

/// A profile and its raw samples.
fn read(path: &Path) -> Result<(Profile, Vec<Sample>), Failure> {
    let named = path.display().to_string();
    let profile = load(&named)?;
    let samples = match (&profile.kind, &profile.samples_file) {
        (Kind::Engine, Some(name)) => path.with_file_name(name),
        _ => {
            return Err(Failure::usage(format!(
                "{named} names no samples of this program's engine: only what `calibrate` has measured can be fitted"
            )));
        }
    };
    let text = read_text(&samples).map_err(Failure::failed)?;
    let sample = |(i, line)| {
        serde_json::from_str(line)
            .map_err(|e| Failure::failed(format!("{}: line {} is no sample: {e}", samples.display(), i + 1)))
    };
    Ok((profile, text.lines().enumerate().map(sample).collect::<Result<_, _>>()?))
}

fn step(sample: &Sample) -> Option<(bool, StepSample)> {
    match sample {
        Sample::Step { held_out, sample } => Some((*held_out, *sample)),
        _ => None,
    }
}

fn reading(sample: &Sample) -> Option<ReadingSample> {
    match sample {
        Sample::Reading(sample) => Some(*sample),
        _ => None,
    }
}

/// Refuses to mix machines, models and limits.
fn expect_same(first: &Profile, other: &Profile, path: &Path) -> Result<(), Failure> {
    let what = if first.model != other.model {
        "model"
    } else if first.adapter != other.adapter {
        "adapters"
    } else if first.engine != other.engine {
        "engine"
    } else if first.machine != other.machine {
        "machine"
    } else {
        return Ok(());
    };
    Err(Failure::usage(format!(
        "{} is of another {what} than the first profile: only calibrations of one engine on one machine can be fitted \
         together",
        path.display()
    )))
}
