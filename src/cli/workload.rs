//! The WORKLOAD flags that `probe`, `measure`, `simulate` and `trace generate` share: what is sent.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use crate::experiment::lenient;
use crate::report::digest;
use crate::report::manifest::Dataset;
use crate::workload::arrivals::Arrivals;
use crate::workload::import;
use crate::workload::lengths;
use crate::workload::pool::PromptPool;
use crate::workload::popularity::Popularity;
use crate::workload::regime::Regime;
use crate::workload::replay::{Replay, replay_trace};
use crate::workload::spec::{Amount, WorkloadError, WorkloadSpec, generate_trace};
use crate::workload::trace::{NO_ADAPTERS, Trace};

/// A file of prompts or requests with its hash; none is the lengths that are built in.
pub(super) fn dataset(file: Option<&Path>) -> Result<Dataset, Failure> {
    let Some(path) = file else {
        let sha256 = digest::sha256(lengths::file().as_bytes());
        return Ok(Dataset { name: lengths::SOURCE.to_owned(), sha256 });
    };
    let sha256 = digest::sha256_file(path).map_err(|e| Failure::Failed(e.into()))?;
    Ok(Dataset { name: path.display().to_string(), sha256 })
}

/// Output tokens of a request where nothing says otherwise.
const MAX_TOKENS: u32 = 16;

/// What is sent: prompts, their arrivals, their adapters.
#[derive(Args, Debug, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub struct WorkloadArgs {
    /// ShareGPT JSON file with the prompts; without it real ShareGPT lengths, embedded, with made-up texts
    #[arg(long, value_name = "FILE", conflicts_with = "trace")]
    #[serde(skip_serializing_if = "Option::is_none")]
    dataset: Option<PathBuf>,
    /// Trace to send: this program's JSONL, Mooncake's JSONL or Azure's CSV
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    trace: Option<PathBuf>,
    /// Tokenizer that counts prompts: a tokenizer.json, its folder, or a name that fetch-data provides
    /// for [default: the server's if it can be had here, else byte-level]. Without effect where nothing is counted:
    /// in `simulate` without --dataset, and in `plan`
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    tokenizer: Option<String>,
    /// Prompt lengths: short (256-1024 tokens) or long (2048-4096) [default: short]
    #[arg(long, value_name = "short|long")]
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_regime: Option<Regime>,
    /// Arrivals a second; with a trace's own times, the mean rate that they are stretched to
    #[arg(short = 'r', long, value_name = "RATE", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    arrival_rate: Option<f64>,
    /// Output tokens of each request [default: 16, or the trace's]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    /// Seed of prompts, arrivals and adapters [default: 42]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    /// Arrival process: poisson, fixed, gamma:CV or trace [default: poisson, or the trace's times]
    #[arg(long, value_name = "PROCESS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    arrivals: Option<Arrivals>,
    /// Adapter popularity: uniform or zipf:S [default: uniform, or the trace's adapters]
    #[arg(long, value_name = "LAW")]
    #[serde(skip_serializing_if = "Option::is_none")]
    popularity: Option<Popularity>,
}

/// [`WorkloadArgs`], resolved. None is what the help calls the default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkloadSettings {
    /// ShareGPT file.
    pub dataset: Option<PathBuf>,
    /// Trace file.
    pub trace: Option<PathBuf>,
    /// Tokenizer's name.
    #[serde(deserialize_with = "lenient::text")]
    pub tokenizer: Option<String>,
    /// Prompt lengths.
    pub prompt_regime: Regime,
    /// Arrivals a second.
    pub arrival_rate: Option<f64>,
    /// Output tokens of a request.
    pub max_tokens: Option<u32>,
    /// Of every random stream.
    pub seed: u64,
    /// Arrival process.
    pub arrivals: Option<Arrivals>,
    /// Adapter popularity.
    pub popularity: Option<Popularity>,
}

impl Default for WorkloadSettings {
    fn default() -> Self {
        Self {
            dataset: None,
            trace: None,
            tokenizer: None,
            prompt_regime: Regime::Short,
            arrival_rate: None,
            max_tokens: None,
            seed: 42,
            arrivals: None,
            popularity: None,
        }
    }
}

/// What traces are made from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Prompts to draw from.
    Pool(PromptPool),
    /// A trace to send again.
    Trace {
        /// The trace.
        trace: Trace,
        /// What its file is called.
        name: String,
    },
}

impl WorkloadSettings {
    /// Refuses what cannot be, before anything is read or sent.
    pub fn check(&self) -> Result<(), Failure> {
        if self.dataset.is_some() && self.trace.is_some() {
            return Err(Failure::usage("--dataset and --trace exclude each other: give one of them"));
        }
        if self.arrivals == Some(Arrivals::Trace) && self.trace.is_none() {
            return Err(Failure::usage("--arrivals=trace takes the times of a trace: give one with --trace"));
        }
        if let Some(rate) = self.arrival_rate {
            check_rate(rate)?;
        }
        if self.max_tokens == Some(0) {
            return Err(Failure::Usage(WorkloadError::NoOutput.into()));
        }
        Ok(())
    }

    /// Where prompts come from, read; with a sentence about it to show.
    #[cfg(feature = "engine")]
    pub fn source(
        &self,
        tokenizer: &crate::workload::tokenizer::Tokenizer,
    ) -> Result<(Source, String), Failure> {
        use crate::workload::prompts::sharegpt_pool;

        let Some(path) = &self.dataset else { return self.source_without_text() };
        let bytes = path.metadata().map_or(0, |m| m.len());
        let bar = super::ui::bar(bytes >> 20, "reading the dataset (MB)");
        let read = sharegpt_pool(path, self.prompt_regime, tokenizer, |at| bar.set_position(at >> 20));
        bar.finish_and_clear();
        let (pool, report) = read.map_err(|e| Failure::Failed(e.into()))?;
        if let Some(dropped) = report.said() {
            tracing::warn!("{}: {dropped}", path.display());
        }
        let said = format!(
            "{} prompts of {} in the {} regime",
            pool.prompts.len(),
            report.with_human_turn,
            self.prompt_regime
        );
        Ok((Source::Pool(pool), said))
    }

    /// What requests come from, for the manifest.
    pub fn prompts(&self) -> Result<Dataset, Failure> {
        dataset(self.dataset.as_deref().or(self.trace.as_deref()))
    }

    /// As `source`, for what needs no tokenizer: a trace or the embedded lengths.
    pub fn source_without_text(&self) -> Result<(Source, String), Failure> {
        if let Some(path) = &self.dataset {
            return Err(Failure::usage(format!(
                "--dataset {} holds texts, which are not counted here: make a trace of it with `lora-hbm trace generate`",
                path.display()
            )));
        }
        let Some(path) = &self.trace else {
            let pool = PromptPool::embedded(self.prompt_regime);
            let said = format!(
                "no --dataset: {} real prompt lengths of the {} regime ({})",
                pool.prompts.len(),
                self.prompt_regime,
                pool.source
            );
            return Ok((Source::Pool(pool), said));
        };
        let (trace, skipped) = import::read_any(path)?;
        let mut said = format!("{} requests of {}", trace.requests.len(), path.display());
        if skipped > 0 {
            said += &format!(" ({skipped} without prompt or output left out)");
        }
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok((Source::Trace { trace, name }, said))
    }

    /// The trace to send. `rate` goes before `--arrival-rate` and `default_rate` after it; `amount` is
    /// what was asked for and `default_amount` what holds for prompts without a trace's end.
    pub fn trace(&self, source: &Source, how: &Run) -> Result<Trace, Failure> {
        let asked = how.rate.or(self.arrival_rate);
        let made = match source {
            Source::Pool(pool) => generate_trace(&self.spec(how), pool),
            Source::Trace { trace, .. } => {
                let arrivals = self.arrivals.unwrap_or(Arrivals::Trace);
                let default_rate = (arrivals != Arrivals::Trace).then_some(how.default_rate);
                let replay = Replay {
                    arrivals,
                    rate: asked.or(default_rate),
                    popularity: self.popularity,
                    total_loras: how.total_loras,
                    amount: how.amount,
                    max_tokens: self.max_tokens,
                    seed: self.seed,
                    ranks: how.ranks.clone(),
                };
                replay_trace(trace, &replay)
            }
        };
        made.map_err(|e| match e {
            WorkloadError::EmptyPool { .. } => Failure::Failed(e.into()),
            _ => Failure::Usage(e.into()),
        })
    }

    /// The workload that is drawn from a pool of prompts; rate and amount as in [`Self::trace`].
    pub fn spec(&self, how: &Run) -> WorkloadSpec {
        WorkloadSpec {
            regime: self.prompt_regime,
            arrivals: self.arrivals.unwrap_or_default(),
            rate: how.rate.or(self.arrival_rate).unwrap_or(how.default_rate),
            popularity: self.popularity.unwrap_or_default(),
            total_loras: how.total_loras,
            amount: how.amount.unwrap_or(how.default_amount),
            max_tokens: self.max_tokens.unwrap_or(MAX_TOKENS),
            seed: self.seed,
            ranks: how.ranks.clone(),
        }
    }

    /// What results call the prompts: the regime, or the trace's name.
    pub fn regime_column(&self, source: &Source) -> String {
        match source {
            Source::Pool(_) => self.prompt_regime.to_string(),
            Source::Trace { name, .. } => name.clone(),
        }
    }

    /// Whether requests come at the trace's own times, which have no rate that could be named.
    pub fn replays_times(&self, source: &Source) -> bool {
        self.arrival_rate.is_none() && self.takes_times(source)
    }

    /// Whether another seed is another run: something is drawn, be it times, lengths or adapters.
    pub fn draws(&self, source: &Source) -> bool {
        match source {
            Source::Pool(_) => true,
            Source::Trace { trace, .. } => {
                let has_adapters = self.popularity.is_none() && trace.header.popularity != NO_ADAPTERS;
                !(has_adapters && self.takes_times(source))
            }
        }
    }

    /// Whether arrivals are the trace's, stretched to another rate perhaps.
    fn takes_times(&self, source: &Source) -> bool {
        matches!(source, Source::Trace { .. }) && self.arrivals.unwrap_or(Arrivals::Trace) == Arrivals::Trace
    }

    /// What results call the arrivals.
    pub fn arrivals_column(&self, source: &Source) -> String {
        let default =
            if matches!(source, Source::Trace { .. }) { Arrivals::Trace } else { Arrivals::Poisson };
        self.arrivals.unwrap_or(default).to_string()
    }
}

/// How much of a workload, at what rate, for how many adapters.
#[derive(Clone, Debug)]
pub struct Run {
    /// Adapters served.
    pub total_loras: u32,
    /// This run's rate, where several are tried.
    pub rate: Option<f64>,
    /// Rate where nothing says one.
    pub default_rate: f64,
    /// What was asked for.
    pub amount: Option<Amount>,
    /// How much of a synthetic workload where nothing says.
    pub default_amount: Amount,
    /// Ranks that the adapters cycle through; empty where they are unknown.
    pub ranks: Vec<u32>,
}

/// A rate must be a positive number.
pub fn check_rate(rate: f64) -> Result<(), Failure> {
    if rate.is_finite() && rate > 0.0 {
        Ok(())
    } else {
        Err(Failure::Usage(WorkloadError::Rate(rate).into()))
    }
}

/// `--num-requests` and `--duration-seconds` as one; if both are given the number holds.
pub fn amount(num_requests: Option<u64>, duration_seconds: Option<f64>) -> Result<Option<Amount>, Failure> {
    match (num_requests, duration_seconds) {
        (Some(0), _) => Err(Failure::usage("--num-requests is 0: it must be at least 1")),
        (Some(n), _) => Ok(Some(Amount::Requests(n))),
        (None, Some(s)) if s.is_finite() && s > 0.0 => Ok(Some(Amount::DurationS(s))),
        (None, Some(s)) => Err(Failure::Usage(WorkloadError::Duration(s).into())),
        (None, None) => Ok(None),
    }
}
