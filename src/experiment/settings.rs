//! What a cell is run with. Names and defaults are those of `serve` and `measure`.

use lora_sched::{Evict, Policy, SwapMode, UnknownChoice};
use serde::{Deserialize, Serialize};

use super::lenient;
use crate::workload::arrivals::Arrivals;
use crate::workload::popularity::Popularity;
use crate::workload::regime::Regime;

/// Adapters that there may be: each costs memory, and of more the simulator would only run out of it.
const MOST_ADAPTERS: u32 = 1_000_000;
/// Requests of a cell where neither it nor a trace says.
const NUM_REQUESTS: u64 = 200;
/// Likewise output tokens of a request.
const MAX_TOKENS: u32 = 16;

/// Settings of the engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EngineSettings {
    /// Preset, name or folder of the base model.
    pub model: String,
    /// Adapters served.
    pub total_loras: u32,
    /// Adapter slots; 0 is not set.
    pub gpu_loras: u32,
    /// Rank of generated adapters (`rank` for short).
    pub max_r: u32,
    /// Ranks that generated adapters cycle through, instead of `max_r`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ranks: Vec<u32>,
    /// Running sequences, at most.
    pub max_num_seqs: u32,
    /// Tokens in one step, at most.
    pub max_num_batched_tokens: u32,
    /// Tokens in one KV block.
    pub block_size: u32,
    /// Prompt and output tokens of one request, at most; none is the engine's default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<u32>,
    /// Prompts are computed in one step each, never in chunks.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub no_enable_chunked_prefill: bool,
    /// Admission policy.
    #[serde(with = "text")]
    pub policy: Policy,
    /// Eviction rule.
    #[serde(with = "text")]
    pub evict: Evict,
    /// Swap mode.
    #[serde(with = "text")]
    pub swap_mode: SwapMode,
    /// Swaps are started ahead for this many waiting requests.
    pub prefetch: u32,
    /// Seconds after which nothing goes past a waiting request.
    pub max_skip_age: f64,
    /// Memory for KV blocks as `--kv-memory` takes it; none is the engine's default.
    #[serde(deserialize_with = "lenient::text", skip_serializing_if = "Option::is_none")]
    pub kv_memory: Option<String>,
    /// Number type.
    pub dtype: String,
    /// Where it runs: auto, cpu or cuda.
    #[serde(skip_serializing_if = "is_auto")]
    pub device: String,
    /// Seed of dummy weights and generated adapters.
    pub seed: u64,
    /// Compute threads; none is all cores.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
}

/// The default: left out, so that runs keep the keys that they had before there was a choice.
fn is_auto(device: &str) -> bool {
    device == "auto"
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            model: "facebook/opt-125m".to_owned(),
            total_loras: 128,
            gpu_loras: 0,
            max_r: 8,
            ranks: Vec::new(),
            max_num_seqs: 16,
            max_num_batched_tokens: 4096,
            block_size: 16,
            max_model_len: None,
            no_enable_chunked_prefill: false,
            policy: Policy::Skip,
            evict: Evict::Lru,
            swap_mode: SwapMode::Layered,
            prefetch: 0,
            max_skip_age: 2.0,
            kv_memory: None,
            dtype: "auto".to_owned(),
            device: "auto".to_owned(),
            seed: 0,
            threads: None,
        }
    }
}

/// An admission policy by its name, or by the one that the reference has for its own.
pub fn policy(name: &str) -> Result<Policy, UnknownChoice> {
    if name == "credit" {
        tracing::warn!("policy 'credit' is the reference's: taken as 'skip'");
        return Ok(Policy::Skip);
    }
    name.parse()
}

impl EngineSettings {
    /// The ranks that adapters cycle through.
    pub fn ranks(&self) -> Vec<u32> {
        if self.ranks.is_empty() { vec![self.max_r] } else { self.ranks.clone() }
    }

    /// Says what is impossible about these settings, naming the setting.
    pub fn check(&self) -> Result<(), Impossible> {
        let positive = |setting, value: u32| {
            if value == 0 { Err(Impossible::new(setting, "must be at least 1")) } else { Ok(()) }
        };
        positive("total_loras", self.total_loras)?;
        if self.total_loras > MOST_ADAPTERS {
            let why = format!("is {}: more than {MOST_ADAPTERS} adapters are a mistake", self.total_loras);
            return Err(Impossible::new("total_loras", why));
        }
        positive("gpu_loras", self.gpu_loras)?;
        if self.gpu_loras > self.total_loras {
            let why = format!("({}) is greater than total_loras ({})", self.gpu_loras, self.total_loras);
            return Err(Impossible::new("gpu_loras", why));
        }
        let ranks = if self.ranks.is_empty() { "max_r" } else { "ranks" };
        for rank in self.ranks() {
            positive(ranks, rank)?;
        }
        positive("max_num_seqs", self.max_num_seqs)?;
        positive("max_num_batched_tokens", self.max_num_batched_tokens)?;
        positive("block_size", self.block_size)?;
        positive("max_model_len", self.max_model_len.unwrap_or(1))?;
        positive("threads", self.threads.unwrap_or(1))?;
        if !(self.max_skip_age >= 0.0 && self.max_skip_age.is_finite()) {
            let why = format!("must be zero or more seconds, not {}", self.max_skip_age);
            return Err(Impossible::new("max_skip_age", why));
        }
        Ok(())
    }
}

/// A setting that no engine can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{setting} {why}")]
pub struct Impossible {
    /// Its name in an experiment file; the flag has dashes.
    pub setting: &'static str,
    /// What is wrong with it: the rest of a sentence that begins with its name.
    pub why: String,
}

impl Impossible {
    fn new(setting: &'static str, why: impl Into<String>) -> Self {
        Self { setting, why: why.into() }
    }
}

/// Settings of the workload, but for the trace's seed, which replicates vary.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkloadSettings {
    /// Prompt lengths.
    pub regime: Regime,
    /// Requests a second. Neither this nor `rho`: 2, or with `arrivals = "trace"` the trace's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arrival_rate: Option<f64>,
    /// Load as a share of the full budget's saturation rate, which the sweep finds first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rho: Option<f64>,
    /// Requests; none is the whole trace, or 200 where there is no trace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_requests: Option<u64>,
    /// Of them, the first so many are left out of results: the run starts with nothing in it.
    #[serde(skip_serializing_if = "is_zero")]
    pub warm_up: u64,
    /// Output tokens of each; none is the trace's own, or 16 where there is no trace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// How adapters are drawn; none keeps the trace's, or is uniform where there is no trace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub popularity: Option<Popularity>,
    /// How arrivals are spaced.
    pub arrivals: Arrivals,
    /// Prompts' file; none is the embedded table of lengths.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dataset: Option<String>,
    /// Trace file, instead of a dataset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
    /// Tokenizer's name, file or folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
}

impl Default for WorkloadSettings {
    fn default() -> Self {
        Self {
            regime: Regime::Short,
            arrival_rate: None,
            rho: None,
            num_requests: None,
            warm_up: 0,
            max_tokens: None,
            popularity: None,
            arrivals: Arrivals::Poisson,
            dataset: None,
            trace: None,
            tokenizer: None,
        }
    }
}

impl WorkloadSettings {
    /// Sets the defaults of what is not given and no trace has, so that a cell says all that it is run with.
    pub(super) fn fill(&mut self) {
        if self.rho.is_none() && self.arrivals != Arrivals::Trace {
            self.arrival_rate.get_or_insert(2.0);
        }
        if self.trace.is_none() {
            self.num_requests = Some(self.requests());
            self.max_tokens = Some(self.output_tokens());
            self.popularity = Some(self.popularity.unwrap_or_default());
        }
    }

    /// Requests where there is no trace to have them.
    pub(super) fn requests(&self) -> u64 {
        self.num_requests.unwrap_or(NUM_REQUESTS)
    }

    /// Output tokens of each where there is no trace to say.
    pub(super) fn output_tokens(&self) -> u32 {
        self.max_tokens.unwrap_or(MAX_TOKENS)
    }

    /// Says what is impossible about these settings, naming the setting.
    pub(super) fn check(&self) -> Result<(), String> {
        let positive = |name: &str, value: Option<f64>| match value {
            Some(v) if !(v > 0.0 && v.is_finite()) => Err(format!("{name} must be greater than 0, not {v}")),
            _ => Ok(()),
        };
        positive("arrival_rate", self.arrival_rate)?;
        positive("rho", self.rho)?;
        if self.arrival_rate.is_some() && self.rho.is_some() {
            return Err("arrival_rate and rho both say how fast requests come: give one".to_owned());
        }
        if self.num_requests == Some(0) || self.max_tokens == Some(0) {
            return Err("num_requests and max_tokens must be at least 1".to_owned());
        }
        // How long a trace is shows when it is read.
        if let Some(requests) = self.num_requests.filter(|&n| self.warm_up >= n) {
            return Err(format!(
                "warm_up ({}) leaves none of num_requests ({requests}): lower it or raise num_requests",
                self.warm_up
            ));
        }
        if self.dataset.is_some() && self.trace.is_some() {
            return Err("dataset and trace both say where requests come from: give one".to_owned());
        }
        if self.arrivals == Arrivals::Trace && self.trace.is_none() {
            return Err("arrivals = \"trace\" takes the times of a trace: set trace".to_owned());
        }
        Ok(())
    }
}

/// A warm-up of nothing has no place in a cell's key, which is older than it.
fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// Choices of the scheduler as the words that users type: that crate knows no serde.
mod text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize as _, Deserializer, Serializer, de};

    pub fn serialize<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'de, T: FromStr<Err: Display>, D: Deserializer<'de>>(d: D) -> Result<T, D::Error> {
        String::deserialize(d)?.parse().map_err(de::Error::custom)
    }
}
