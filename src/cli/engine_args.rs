//! The engine flags that `calibrate`, `bench`, `simulate` and `plan` share with `serve`.

use clap::Args;
use lora_sched::{Evict, SwapMode};
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use crate::experiment::{EngineSettings, lenient, parse_size, policy};
use crate::profile::{Kind, Profile};

/// What is served and how it is scheduled; names, defaults and meanings are `serve`'s.
#[derive(Args, Debug, Default, Serialize)]
pub struct EngineArgs {
    /// Running sequences, at most [default: 16]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_num_seqs: Option<u32>,
    /// Tokens in one step, at most [default: 4096]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_num_batched_tokens: Option<u32>,
    /// Tokens in one KV block: 8, 16 or 32 [default: 16]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    block_size: Option<u32>,
    /// Prompt and output tokens of one request, at most [default: the model's]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_model_len: Option<u32>,
    /// Compute a prompt in one step, never in chunks
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    no_enable_chunked_prefill: Option<bool>,
    /// Rank of the adapters [default: 8]
    #[arg(long, value_name = "RANK")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_r: Option<u32>,
    /// Ranks that the adapters cycle through, instead of --max-r
    #[arg(long, value_name = "RANK,…", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    ranks: Option<Vec<u32>>,
    /// Who is admitted when only a slot is missing: skip, fcfs, affinity [default: skip]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<String>,
    /// Whose slot is taken: lru, lfu, fewest-pending, cost, fifo [default: lru]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    evict: Option<String>,
    /// How a swap and its step are ordered: blocking, overlap, layered [default: layered]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    swap_mode: Option<String>,
    /// Start swaps ahead for this many waiting requests [default: 0]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    prefetch: Option<u32>,
    /// Seconds after which nothing goes past a request that waits for a slot [default: 2]
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_skip_age: Option<f64>,
    /// KV cache, in GiB or with a unit (512MiB) [default: the engine's]
    #[arg(long, value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_memory: Option<String>,
}

/// Those of an engine that runs, and where it does.
#[cfg(feature = "server")]
#[derive(Args, Debug, Default, Serialize)]
pub struct RunningEngineArgs {
    #[command(flatten)]
    #[serde(flatten)]
    engine: EngineArgs,
    /// Where it runs: auto, cpu, cuda [default: auto]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    /// Compute threads [default: one less than the cores]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    threads: Option<u32>,
}

/// [`EngineArgs`], resolved; where the engine runs, if it does.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EngineFlags {
    max_num_seqs: Option<u32>,
    max_num_batched_tokens: Option<u32>,
    block_size: Option<u32>,
    max_model_len: Option<u32>,
    no_enable_chunked_prefill: bool,
    max_r: Option<u32>,
    #[serde(deserialize_with = "lenient::some_list")]
    ranks: Option<Vec<u32>>,
    policy: Option<String>,
    evict: Option<String>,
    swap_mode: Option<String>,
    prefetch: Option<u32>,
    max_skip_age: Option<f64>,
    #[serde(deserialize_with = "lenient::text")]
    kv_memory: Option<String>,
    device: Option<String>,
    threads: Option<u32>,
}

impl EngineFlags {
    /// The settings of an engine of `model`, the defaults where a flag is absent. What no engine can have is refused here,
    /// so that every command that has these flags refuses it.
    pub fn settings(&self, model: &str, total_loras: u32, gpu_loras: u32) -> Result<EngineSettings, Failure> {
        let default = EngineSettings::default();
        // Read again by whoever needs the bytes: refused here, where it was given.
        self.kv_memory.as_deref().map(parse_size).transpose().map_err(|e| Failure::Usage(e.into()))?;
        let policy = self.policy.as_deref().map(policy).transpose().map_err(|e| Failure::Usage(e.into()))?;
        let settings = EngineSettings {
            model: model.to_owned(),
            total_loras,
            gpu_loras,
            max_r: self.max_r.unwrap_or(default.max_r),
            ranks: self.ranks.clone().unwrap_or_default(),
            max_num_seqs: self.max_num_seqs.unwrap_or(default.max_num_seqs),
            max_num_batched_tokens: self.max_num_batched_tokens.unwrap_or(default.max_num_batched_tokens),
            block_size: self.block_size.unwrap_or(default.block_size),
            max_model_len: self.max_model_len,
            no_enable_chunked_prefill: self.no_enable_chunked_prefill,
            policy: policy.unwrap_or(default.policy),
            evict: choice::<Evict>(self.evict.as_deref())?.unwrap_or(default.evict),
            swap_mode: choice::<SwapMode>(self.swap_mode.as_deref())?.unwrap_or(default.swap_mode),
            prefetch: self.prefetch.unwrap_or(default.prefetch),
            max_skip_age: self.max_skip_age.unwrap_or(default.max_skip_age),
            kv_memory: self.kv_memory.clone(),
            threads: self.threads,
            dtype: default.dtype,
            device: self.device.clone().unwrap_or(default.device),
            seed: default.seed,
        };
        settings.check().map_err(|e| {
            // `block_size` is `--block-size` here.
            Failure::usage(format!("--{} {}", e.setting.replace('_', "-"), e.why))
        })?;
        Ok(settings)
    }

    /// Where a flag is absent, what a profile says of its engine: its rank, if it has only one, and of a
    /// server that was seen from outside everything that was known of it. Such a server's swaps are timed
    /// with nothing beside them, and its steps wait for them.
    pub fn fill(&self, profile: &Profile, engine: &mut EngineSettings) {
        if let ([only], false) = (&profile.adapter.ranks[..], self.has_ranks()) {
            engine.max_r = *only;
        }
        if profile.kind != Kind::BlackBox {
            return;
        }
        let of = &profile.engine;
        engine.max_num_seqs = self.max_num_seqs.unwrap_or(of.max_num_seqs);
        engine.max_num_batched_tokens = self.max_num_batched_tokens.unwrap_or(of.max_num_batched_tokens);
        engine.block_size = self.block_size.unwrap_or(of.block_size);
        if self.swap_mode.is_none() {
            engine.swap_mode = SwapMode::Blocking;
        }
    }

    /// Whether the number of sequences was named.
    #[cfg(feature = "server")]
    pub fn has_max_num_seqs(&self) -> bool {
        self.max_num_seqs.is_some()
    }

    /// Whether the ranks were named.
    pub fn has_ranks(&self) -> bool {
        self.max_r.is_some() || self.ranks.is_some()
    }
}

fn choice<T: std::str::FromStr<Err = lora_sched::UnknownChoice>>(
    text: Option<&str>,
) -> Result<Option<T>, Failure> {
    text.map(|t| t.parse().map_err(|e: T::Err| Failure::Usage(e.into()))).transpose()
}
