//! What the load commands share beside the workload: the server's address, the check before a run, and
//! the run itself with its progress bar.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;

use super::failure::Failure;
use super::ui;
use crate::experiment::lenient;
use crate::loadgen::{Endpoint, Health, LoadOptions, LoadOutcome, PreparedRequest, run_load};
use crate::report::files::check_writable;
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
    #[command(flatten)]
    #[serde(flatten)]
    api: ApiArgs,
}

/// Which interface is spoken, and what it needs.
#[derive(Args, Debug, Serialize)]
pub struct ApiArgs {
    /// HTTP interface [default: generate]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    api: Option<Api>,
    /// With --api=openai, what adapters are called: a pattern with {} for the number, or names with
    /// commas [default: lora-{}, else the adapters that the server lists]
    #[arg(long, value_name = "NAMES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter_names: Option<String>,
    /// With --api=openai, members added to each request's body; null takes one away
    #[arg(long, value_name = "JSON")]
    #[serde(skip_serializing_if = "Option::is_none")]
    extra_body: Option<String>,
    /// The server's API key; better in LORA_HBM_API_KEY, where others do not see it
    #[arg(long, value_name = "KEY")]
    #[serde(skip)]
    api_key: Option<String>,
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
    /// Names of adapters; none is the default pattern or what the server lists.
    #[serde(deserialize_with = "lenient::joined")]
    pub adapter_names: Option<String>,
    /// Members of bodies, as JSON.
    #[serde(deserialize_with = "lenient::text")]
    pub extra_body: Option<String>,
    /// Key for the `Authorization` header. Never written down.
    #[serde(default, skip_serializing, deserialize_with = "lenient::text")]
    pub api_key: Option<String>,
}

impl Default for ClientSettings {
    fn default() -> Self {
        Self {
            endpoint: "http://localhost:8000".to_owned(),
            timeout: 120.0,
            out: None,
            skip_health_check: false,
            api: Api::Generate,
            adapter_names: None,
            extra_body: None,
            api_key: None,
        }
    }
}

impl ClientSettings {
    /// Refuses what cannot be, and outputs that could not be written, before anything is sent.
    pub fn check(&self, outputs: &[Option<&Path>]) -> Result<(), Failure> {
        for (flag, given) in
            [("--adapter-names", self.adapter_names.is_some()), ("--extra-body", self.extra_body.is_some())]
        {
            if given && self.api != Api::Openai {
                return Err(Failure::usage(format!("{flag} goes with --api=openai: give that too")));
            }
        }
        self.extra()?;
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

    /// With the key of the flags, else of the environment, else of the settings file.
    pub fn with_key(mut self, args: &ClientArgs) -> Self {
        self.api_key = args.api.key(self.api_key);
        self
    }

    /// The server.
    pub fn server(&self) -> Result<Endpoint, Failure> {
        Endpoint::new(&self.endpoint, self.api_key.clone()).map_err(|e| Failure::Usage(e.into()))
    }

    /// `--extra-body`, read.
    pub fn extra(&self) -> Result<Map<String, Value>, Failure> {
        let Some(text) = &self.extra_body else { return Ok(Map::new()) };
        serde_json::from_str(text)
            .map_err(|e| Failure::usage(format!("--extra-body '{text}' is not a JSON object: {e}")))
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

impl ApiArgs {
    /// `--api-key`, else `LORA_HBM_API_KEY`, as for `serve`, else what was `resolved`. Settings from the environment
    /// are read as what they look like; a key is always text.
    pub fn key(&self, resolved: Option<String>) -> Option<String> {
        let key = self.api_key.clone().or_else(|| std::env::var("LORA_HBM_API_KEY").ok()).or(resolved);
        key.filter(|k| !k.is_empty())
    }
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
