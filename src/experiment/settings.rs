//! What a cell is run with. Names and defaults are those of `serve` and `measure`.

use lora_sched::{Evict, Policy, SwapMode, UnknownChoice};
use serde::{Deserialize, Serialize};

use super::lenient;
use crate::workload::arrivals::Arrivals;
use crate::workload::popularity::Popularity;
use crate::workload::regime::Regime;

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
    pub(super) fn check(&self) -> Result<(), String> {
        let positive = |name: &str, value: u32| {
            if value == 0 { Err(format!("{name} must be at least 1")) } else { Ok(()) }
        };
        positive("total_loras", self.total_loras)?;
        if self.gpu_loras == 0 {
            return Err(
                "gpu_loras must be at least 1: set it in [engine] or list its values in [axes]".to_owned()
            );
        }
        if self.gpu_loras > self.total_loras {
            return Err(format!(
                "gpu_loras ({}) is greater than total_loras ({}): leave the combination out by an [[exclude]] table \
                 with both settings",
                self.gpu_loras, self.total_loras
            ));
        }
        for rank in self.ranks() {
            positive("max_r and every one of ranks", rank)?;
        }
        positive("max_num_seqs", self.max_num_seqs)?;
        positive("max_num_batched_tokens", self.max_num_batched_tokens)?;
        positive("block_size", self.block_size)?;
        positive("max_model_len", self.max_model_len.unwrap_or(1))?;
        positive("threads", self.threads.unwrap_or(1))?;
        if !(self.max_skip_age >= 0.0 && self.max_skip_age.is_finite()) {
            return Err(format!("max_skip_age must be zero or more seconds, not {}", self.max_skip_age));
        }
        Ok(())
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
    /// Requests.
    pub num_requests: u64,
    /// Of them, the first so many are left out of results: the run starts with nothing in it.
    #[serde(skip_serializing_if = "is_zero")]
    pub warm_up: u64,
    /// Output tokens of each.
    pub max_tokens: u32,
    /// How adapters are drawn.
    pub popularity: Popularity,
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
            num_requests: 200,
            warm_up: 0,
            max_tokens: 16,
            popularity: Popularity::Uniform,
            arrivals: Arrivals::Poisson,
            dataset: None,
            trace: None,
            tokenizer: None,
        }
    }
}

impl WorkloadSettings {
    /// Sets the default rate where none is given, so that a cell says all that it is run with.
    pub(super) fn fill(&mut self) {
        if self.rho.is_none() && self.arrivals != Arrivals::Trace {
            self.arrival_rate.get_or_insert(2.0);
        }
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
        if self.num_requests == 0 || self.max_tokens == 0 {
            return Err("num_requests and max_tokens must be at least 1".to_owned());
        }
        if self.warm_up >= self.num_requests {
            return Err(format!(
                "warm_up ({}) leaves none of num_requests ({}): lower it or raise num_requests",
                self.warm_up, self.num_requests
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
