//! What the load commands share beside the workload: the server's address, the check before a run, and
//! the run itself with its progress bar.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::failure::Failure;
use super::ui;
use super::workload::WorkloadSettings;
use crate::loadgen::{Endpoint, EndpointError, Health, LoadOptions, LoadOutcome, PreparedRequest, run_load};
use crate::report::digest;
use crate::report::files::check_writable;
use crate::report::manifest::{Dataset, path_beside};
use crate::report::record::Status;
use crate::workload::tokenizer::{Tokenizer, TokenizerSource};

/// Which HTTP interface is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Api {
    /// The experiment's own `POST /generate`
    Generate,
    /// `POST /v1/completions`
    Openai,
}

/// How the server is reached.
#[derive(Args, Debug, Serialize)]
pub struct ClientArgs {
    /// Server address [default: http://localhost:8000]
    #[arg(short = 'e', long, value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoint: Option<String>,
    /// Seconds that a request may take [default: 120]
    #[arg(short = 't', long, value_name = "SECONDS", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout: Option<f64>,
    /// File that results are appended to
    #[arg(short = 'o', long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    out: Option<PathBuf>,
    /// Do not ask the server about itself before the run
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    skip_health_check: Option<bool>,
    /// HTTP interface [default: generate]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    api: Option<Api>,
}

/// [`ClientArgs`], resolved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClientSettings {
    /// Server address.
    pub endpoint: String,
    /// Seconds that a request may take.
    pub timeout: f64,
    /// Results.
    pub out: Option<PathBuf>,
    /// No check before the run.
    pub skip_health_check: bool,
    /// HTTP interface.
    pub api: Api,
}

impl Default for ClientSettings {
    fn default() -> Self {
        Self {
            endpoint: "http://localhost:8000".to_owned(),
            timeout: 120.0,
            out: None,
            skip_health_check: false,
            api: Api::Generate,
        }
    }
}

impl ClientSettings {
    /// Refuses what cannot be, and outputs that could not be written, before anything is sent.
    pub fn check(&self, outputs: &[Option<&Path>]) -> Result<(), Failure> {
        if self.api == Api::Openai {
            return Err(Failure::usage("--api=openai is not in this version: use --api=generate"));
        }
        if !(self.timeout.is_finite() && self.timeout > 0.0 && self.timeout <= 1e6) {
            return Err(Failure::usage(format!(
                "--timeout is {}: it must be a positive number of seconds",
                self.timeout
            )));
        }
        for path in outputs.iter().flatten() {
            check_writable(path).map_err(|e| Failure::Failed(e.into()))?;
        }
        Ok(())
    }

    /// The server. Its key, where it wants one, is `LORA_HBM_API_KEY`, as for `serve`.
    pub fn server(&self) -> Result<Endpoint, Failure> {
        let key = std::env::var("LORA_HBM_API_KEY").ok().filter(|k| !k.is_empty());
        Endpoint::new(&self.endpoint, key).map_err(|e| Failure::Usage(e.into()))
    }

    /// What the server says about itself, after a look at whether it is the one that was meant; none
    /// if it was not to be asked.
    pub async fn health(
        &self,
        server: &Endpoint,
        total_loras: u32,
        gpu_loras: Option<u32>,
    ) -> Result<Option<Health>, Failure> {
        if self.skip_health_check {
            return Ok(None);
        }
        let health = server.health().await.map_err(|e| Failure::Failed(hint(e)))?;
        if health.status != "ok" {
            return Err(Failure::failed(format!(
                "the server at {} says that it is '{}': wait until it is 'ok', or --skip-health-check",
                server.url(),
                health.status
            )));
        }
        let meant = [
            ("total_loras", health.config.total_loras, Some(total_loras)),
            ("gpu_loras", health.config.gpu_loras, gpu_loras),
        ];
        for (name, served, meant) in meant {
            if let (Some(served), Some(meant)) = (served, meant)
                && served != meant
            {
                return Err(Failure::failed(format!(
                    "the server at {} has {name} {served} and {meant} was given: give {served}, restart it, or \
                     --skip-health-check",
                    server.url()
                )));
            }
        }
        Ok(Some(health))
    }

    /// The run, with a progress bar; Ctrl-C ends it early.
    pub async fn run(&self, server: &Endpoint, requests: &[PreparedRequest]) -> LoadOutcome {
        let stop = CancellationToken::new();
        let on_interrupt = {
            let stop = stop.clone();
            tokio::spawn(async move {
                if tokio::signal::ctrl_c().await.is_ok() {
                    stop.cancel();
                }
            })
        };
        let options = LoadOptions { timeout: Duration::from_secs_f64(self.timeout), stop };
        let bar = ui::bar(requests.len() as u64, "requests");
        let outcome = run_load(server, requests, &options, |p| bar.set_position(p.ended as u64)).await;
        bar.finish_and_clear();
        on_interrupt.abort();
        outcome
    }
}

fn hint(error: EndpointError) -> anyhow::Error {
    let error = anyhow::Error::from(error);
    error.context("the server is not healthy (--skip-health-check goes on without asking)")
}

/// The tokenizer that prompts are counted with: the one that was named, else the server's if it can be
/// had here, else byte-level; with a sentence about it to show.
pub fn tokenizer(name: Option<&str>, health: Option<&Health>) -> Result<(Tokenizer, String), Failure> {
    let served = health.and_then(|h| h.config.tokenizer.as_deref());
    if let Some(name) = name {
        let tokenizer = Tokenizer::resolve(Some(name)).map_err(|e| Failure::Failed(e.into()))?;
        if let Some(served) = served
            && served != name
            && Tokenizer::source_of(served).as_ref() != Some(tokenizer.source())
        {
            tracing::warn!(
                "prompts are counted with {name} and the server's tokenizer is {served}: its counts may differ"
            );
        }
        return Ok((tokenizer, format!("tokenizer: {name}")));
    }
    let byte_level = TokenizerSource::ByteLevel.to_string();
    match served.filter(|s| *s != byte_level) {
        None => Ok((Tokenizer::byte_level(), format!("no --tokenizer: {byte_level} (embedded)"))),
        Some(served) => match Tokenizer::resolve(Some(served)) {
            Ok(tokenizer) => Ok((tokenizer, format!("no --tokenizer: the server's, {served}"))),
            Err(e) => {
                tracing::warn!(
                    "the server's tokenizer cannot be had here, so its token counts will differ: {e}"
                );
                Ok((Tokenizer::byte_level(), format!("no --tokenizer: {byte_level} (embedded)")))
            }
        },
    }
}

/// A runtime for one command.
pub fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}

/// Both numbers must be there and make sense together.
pub fn budget(total_loras: Option<u32>, gpu_loras: Option<u32>) -> Result<(u32, u32), Failure> {
    let needed = |name: &str, value: Option<u32>| {
        let value = value.ok_or_else(|| Failure::usage(format!("{name} is required")))?;
        if value == 0 {
            Err(Failure::usage(format!("{name} is 0: it must be at least 1")))
        } else {
            Ok(value)
        }
    };
    let (total, gpu) = (needed("--total-loras", total_loras)?, needed("--gpu-loras", gpu_loras)?);
    if gpu > total {
        return Err(Failure::usage(format!(
            "--gpu-loras ({gpu}) is greater than --total-loras ({total}): lower it"
        )));
    }
    Ok((total, gpu))
}

/// Ranks that the server's adapters cycle through, as far as it says.
pub fn ranks(health: &Health) -> Vec<u32> {
    match (&health.config.ranks, health.config.max_r) {
        (Some(ranks), _) if !ranks.is_empty() => ranks.clone(),
        (_, Some(rank)) => vec![rank],
        _ => Vec::new(),
    }
}

/// Whether the run is one to rely on.
pub fn verdict(outcome: &LoadOutcome) -> Result<(), Failure> {
    let ok = outcome.records.iter().filter(|r| r.status == Status::Ok).count();
    let total = outcome.records.len();
    if let Some(why) = &outcome.cut_short {
        return Err(Failure::failed(format!("{why}: {ok} of {total} requests ended well")));
    }
    if ok == 0 {
        let first = outcome.records.iter().find_map(|r| r.error.as_deref()).unwrap_or("no reason given");
        return Err(Failure::failed(format!("none of {total} requests ended well; the first: {first}")));
    }
    Ok(())
}

/// Whether results go to a CSV rather than to JSONL.
pub fn is_csv(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("csv"))
}

/// A results file collects many runs, so each run's manifest has its time in its name.
pub fn manifest_path(out: &Path, started: &str) -> PathBuf {
    let stamp: String = started.chars().filter(char::is_ascii_digit).take(14).collect();
    let stem = out.file_stem().unwrap_or_default().to_string_lossy();
    (0..)
        .map(|n| if n == 0 { format!("{stem}.{stamp}.csv") } else { format!("{stem}.{stamp}-{n}.csv") })
        .map(|name| path_beside(out.with_file_name(name)))
        .find(|path| !path.exists())
        .unwrap_or_else(|| path_beside(out))
}

/// What the workload is read from, for the manifest.
pub fn dataset(workload: &WorkloadSettings) -> Result<Option<Dataset>, Failure> {
    let Some(path) = workload.dataset.as_ref().or(workload.trace.as_ref()) else { return Ok(None) };
    let sha256 = digest::sha256_file(path).map_err(|e| Failure::Failed(e.into()))?;
    Ok(Some(Dataset { name: path.display().to_string(), sha256 }))
}
