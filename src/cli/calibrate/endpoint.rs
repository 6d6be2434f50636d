//! `lora-hbm calibrate --endpoint URL`: a profile of somebody's server, from its response times.

use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::{CalibrateSettings, conclude};
use crate::calibrate::{BlackBoxOptions, calibrate_black_box};
use crate::cli::client::{self, Api, ApiArgs, ClientSettings, ranks};
use crate::cli::engine_args::EngineFlags;
use crate::cli::failure::Failure;
use crate::cli::settings::Context;
use crate::cli::target::Target;
use crate::cli::ui;
use crate::experiment::{EngineSettings, lenient};
use crate::profile::Profile;

/// Where the server is, and what its operator knows of it.
#[derive(Args, Debug, Serialize)]
pub(super) struct EndpointArgs {
    /// Calibrate the server at this address by its response times, instead of this program's engine
    #[arg(short = 'e', long, value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoint: Option<String>,
    #[command(flatten)]
    #[serde(flatten)]
    pub(super) api: ApiArgs,
    /// With --endpoint: adapters that the server has
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    total_loras: Option<u32>,
    /// With --endpoint: its slots for adapters, such as vLLM's --max-loras
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_loras: Option<u32>,
    /// With --endpoint: tokenizer that makes prompts of exact lengths [default: the server's if it can be
    /// had here, else byte-level; lengths are the server's counts where it tells them]
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    tokenizer: Option<String>,
    /// With --endpoint: tokens that its KV cache holds [default: as many as can be asked for]
    #[arg(long, value_name = "TOKENS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_tokens: Option<u64>,
    /// With --endpoint: how often each point is timed [default: 5]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    repeats: Option<u32>,
    /// With --endpoint: seconds that a request may take [default: 120]
    #[arg(short = 't', long, value_name = "SECONDS", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout: Option<f64>,
    /// With --endpoint: do not ask the server about itself
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    skip_health_check: Option<bool>,
}

/// [`EndpointArgs`], resolved.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct EndpointSettings {
    /// None calibrates this program's engine.
    pub(super) endpoint: Option<String>,
    api: Api,
    #[serde(deserialize_with = "lenient::joined")]
    adapter_names: Option<String>,
    #[serde(deserialize_with = "lenient::text")]
    extra_body: Option<String>,
    #[serde(skip_serializing, deserialize_with = "lenient::text")]
    api_key: Option<String>,
    total_loras: Option<u32>,
    gpu_loras: Option<u32>,
    #[serde(deserialize_with = "lenient::text")]
    tokenizer: Option<String>,
    kv_tokens: Option<u64>,
    repeats: u32,
    timeout: f64,
    skip_health_check: bool,
}

impl Default for EndpointSettings {
    fn default() -> Self {
        let client = ClientSettings::default();
        Self {
            endpoint: None,
            api: client.api,
            adapter_names: None,
            extra_body: None,
            api_key: None,
            total_loras: None,
            gpu_loras: None,
            tokenizer: None,
            kv_tokens: None,
            repeats: 5,
            timeout: client.timeout,
            skip_health_check: false,
        }
    }
}

/// Calibrates the server at `url`.
pub(super) fn run(
    url: &str,
    endpoint: &EndpointSettings,
    (api, flags): (&ApiArgs, &EngineFlags),
    settings: &CalibrateSettings,
    ctx: &Context,
) -> Result<(), Failure> {
    if !(1..=1000).contains(&endpoint.repeats) {
        return Err(Failure::usage(format!("--repeats is {}: it must be from 1 to 1000", endpoint.repeats)));
    }
    let (total_loras, gpu_loras) = client::budget(endpoint.total_loras, endpoint.gpu_loras)?;
    let client = ClientSettings {
        endpoint: url.to_owned(),
        timeout: endpoint.timeout,
        out: None,
        skip_health_check: endpoint.skip_health_check,
        api: endpoint.api,
        adapter_names: endpoint.adapter_names.clone(),
        extra_body: endpoint.extra_body.clone(),
        api_key: api.key(endpoint.api_key.clone()),
    };
    client.check(&[Some(&settings.out)])?;
    let bar = ui::bar(100, "calibrating");
    let calibration = client::runtime()?.block_on(async {
        let target = Target::find(&client, total_loras, Some(gpu_loras)).await?;
        let options = options(target, (total_loras, gpu_loras), endpoint, flags, settings)?;
        calibrate_black_box(&options, |what, share| {
            bar.set_message(format!("calibrating: {what}"));
            bar.set_position((share * 100.0) as u64);
        })
        .await
        .map_err(|e| Failure::Failed(e.into()))
    });
    bar.finish_and_clear();
    let calibration = calibration?;
    conclude(ctx, calibration.profile, &calibration.samples, &settings.out, print)
}

/// Flags go before what the server says, and that before the defaults of `serve`.
fn options(
    target: Target,
    (total_loras, gpu_loras): (u32, u32),
    endpoint: &EndpointSettings,
    flags: &EngineFlags,
    settings: &CalibrateSettings,
) -> Result<BlackBoxOptions, Failure> {
    let (tokenizer, said) = client::tokenizer(endpoint.tokenizer.as_deref(), target.health.as_ref())?;
    tracing::info!("{said}");
    let health = target.health.as_ref();
    let says = health.map(|h| h.config.clone()).unwrap_or_default();
    let model = settings.model.clone().or(says.model).ok_or_else(|| {
        Failure::usage("the model's name is not known: give --model, or let the server be asked")
    })?;
    let mut engine: EngineSettings = flags.settings(&model, total_loras, gpu_loras)?;
    if let (false, Some(&[rank])) = (flags.has_ranks(), health.map(ranks).as_deref()) {
        engine.max_r = rank;
    }
    if let (false, Some(n)) = (flags.has_max_num_seqs(), says.max_num_seqs) {
        engine.max_num_seqs = n;
    }
    let max_model_len = engine.max_model_len.or(target.max_model_len).unwrap_or(settings.longest + 1024);
    // Two more for the first token and for a count that is off by one.
    let longest = settings.longest.min(max_model_len.saturating_sub(64));
    if longest < 16 {
        return Err(Failure::usage(format!("--max-model-len is {max_model_len}: it must be at least 80")));
    }
    if longest < settings.longest {
        tracing::info!(
            "the longest prompt is {longest} tokens: the server takes {max_model_len} with the output"
        );
    }
    Ok(BlackBoxOptions {
        endpoint: target.server,
        dialect: target.dialect,
        tokenizer,
        model,
        rank: engine.max_r,
        total_loras,
        gpu_loras,
        max_num_seqs: engine.max_num_seqs,
        max_num_batched_tokens: engine.max_num_batched_tokens,
        block_size: engine.block_size,
        max_model_len,
        kv_tokens: endpoint.kv_tokens,
        longest,
        repeats: endpoint.repeats,
        timeout: Duration::from_secs_f64(endpoint.timeout),
        seed: settings.seed,
    })
}

fn print(profile: &Profile) {
    let mut table = ui::table(&["cost, as seen from outside", "value", "unit"]);
    for (feature, ns) in profile.step.features.iter().zip(&profile.step.coef_ns) {
        table.add_row([format!("step: {feature}"), format!("{:.3}", ns / 1e3), "µs".to_owned()]);
    }
    for (what, seconds) in [("swap", profile.swap.fixed_s), ("HTTP, there and back", profile.host.front_s)] {
        table.add_row([what.to_owned(), format!("{:.3}", seconds * 1e3), "ms".to_owned()]);
    }
    println!("{table}");
    println!(
        "holdout: {} points, error {:.1} % (mean of absolutes), {:+.1} % (bias)",
        profile.holdout.samples,
        profile.holdout.mean_abs_error * 100.0,
        profile.holdout.bias * 100.0
    );
    println!("black box: nothing but response times was seen, and how steps mix was not");
}
