//! `serve`'s flags, and the settings that they resolve to.

mod emulated;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::cli::failure::Failure;
use crate::engine::model::DummyWeights;
use crate::engine::setup::EngineSettings;
use crate::experiment::{lenient, parse_size, policy};

/// Flags; every one is optional, see `settings`.
#[derive(Args, Debug, Serialize)]
pub struct ServeArgs {
    /// Base model: a folder with config.json, a .gguf file, or tiny, facebook/opt-125m, meta-llama/Llama-2-7b-hf,
    /// NousResearch/Llama-2-7b-hf [default: facebook/opt-125m]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    /// LoRA adapters there are (required)
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    total_loras: Option<usize>,
    /// LoRA adapters with a slot in device memory (required)
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_loras: Option<usize>,
    /// Address to listen on [default: 127.0.0.1]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<String>,
    /// Port to listen on [default: 8000]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    /// Tokenizer: file, folder or name [default: the model's, else byte-level]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    tokenizer: Option<String>,
    /// Draw weights from the seed: auto (where the model has none), true, false [default: auto]
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "auto|true|false")]
    #[serde(skip_serializing_if = "Option::is_none")]
    use_dummy_weights: Option<String>,
    /// Data type: auto, bfloat16 (a GPU's), float (the CPU's) [default: auto]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    dtype: Option<String>,
    /// Share of free memory that may be used [default: 0.90]
    #[arg(long, value_name = "FRACTION")]
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_memory_utilization: Option<f64>,
    /// Running sequences, at most [default: 16]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_num_seqs: Option<usize>,
    /// Tokens in a step, at most [default: 4096]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_num_batched_tokens: Option<usize>,
    /// Tokens in a KV block: 8, 16 or 32 [default: 16]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    block_size: Option<usize>,
    /// Accepted for the reference's sake; preempted sequences are recomputed, not swapped [default: 4]
    #[arg(long, value_name = "GIB")]
    #[serde(skip_serializing_if = "Option::is_none")]
    swap_space: Option<u64>,
    /// Who is admitted when only a slot is missing: skip, fcfs, affinity [default: skip]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<String>,
    /// Largest LoRA rank [default: 8]
    #[arg(long, value_name = "RANK")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_r: Option<usize>,
    /// Seed of dummy weights, generated adapters and sampling [default: 0]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    /// Accepted for the reference's sake; no code of a model is ever run
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    trust_remote_code: Option<bool>,
    /// Accepted for the reference's sake; nothing is downloaded
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    download_dir: Option<PathBuf>,
    /// Only 1 (also -pp)
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pipeline_parallel_size: Option<usize>,
    /// Only 1 (also -tp)
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    tensor_parallel_size: Option<usize>,
    /// Device: auto, cpu, cuda [default: auto]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    /// Which adapter gives up its slot: lru, lfu, fewest-pending, cost, fifo [default: lru]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    evict: Option<String>,
    /// How a swap and the step that needs it are ordered: layered, overlap, blocking [default: layered]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    swap_mode: Option<String>,
    /// Waiting requests whose adapters are copied ahead of demand [default: 0]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    prefetch: Option<usize>,
    /// Host memory of adapters: pinned or pageable (the same on the CPU) [default: pinned]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    host_memory: Option<String>,
    /// Adapters in host memory, at most; the others are on disk and read ahead: all, or a number
    /// [default: all]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    host_loras: Option<String>,
    /// Folder for generated adapters that are on disk [default: a temporary one, removed at the end]
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    spill_folder: Option<PathBuf>,
    /// Folder of PEFT adapter folders, taken in order of name [default: adapters are generated]
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    adapters: Option<PathBuf>,
    /// Ranks that generated adapters cycle through, comma-separated [default: --max-r]
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    #[serde(skip_serializing_if = "Option::is_none")]
    ranks: Option<Vec<usize>>,
    /// Tokens of prompt and output, at most [default: the model's positions]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_model_len: Option<usize>,
    /// Compute a prompt in one step, never in chunks
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    no_enable_chunked_prefill: Option<bool>,
    /// Nothing passes a request that has waited for a slot longer than this [default: 2]
    #[arg(long, value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_skip_age: Option<f64>,
    /// Waiting requests, at most; more get 503 [default: 4096]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_queue: Option<usize>,
    /// KV cache on the CPU, in GiB or with a unit (512MiB) [default: 1GiB]
    #[arg(long, value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_memory: Option<String>,
    /// Threads of a step's arithmetic [default: 0: one less than the machine has]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    threads: Option<usize>,
    /// Key that clients must send as a bearer token (better in LORA_HBM_API_KEY)
    #[arg(long, value_name = "KEY")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) api_key: Option<String>,
    /// How long running requests get to end after SIGTERM [default: 30]
    #[arg(long, value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    shutdown_timeout: Option<f64>,
    /// Write every event and decision of the scheduler to this new file (JSONL)
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    decision_log: Option<PathBuf>,
    /// Serve without a device: steps wait for what this profile (a file, or the name of a shipped one)
    /// says they take
    #[arg(long, value_name = "PROFILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    emulate: Option<String>,
}

/// Resolved settings, as in a settings file's `[serve]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ServeSettings {
    #[serde(deserialize_with = "lenient::text")]
    model: Option<String>,
    total_loras: Option<usize>,
    gpu_loras: Option<usize>,
    pub(super) host: String,
    pub(super) port: u16,
    #[serde(deserialize_with = "lenient::text")]
    tokenizer: Option<String>,
    #[serde(deserialize_with = "lenient::text")]
    use_dummy_weights: Option<String>,
    dtype: String,
    gpu_memory_utilization: f64,
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
    block_size: usize,
    swap_space: u64,
    policy: String,
    max_r: usize,
    seed: u64,
    trust_remote_code: bool,
    download_dir: Option<PathBuf>,
    pipeline_parallel_size: usize,
    tensor_parallel_size: usize,
    device: String,
    evict: String,
    swap_mode: String,
    prefetch: usize,
    host_memory: String,
    #[serde(deserialize_with = "lenient::text")]
    host_loras: Option<String>,
    spill_folder: Option<PathBuf>,
    adapters: Option<PathBuf>,
    #[serde(deserialize_with = "lenient::list")]
    ranks: Vec<usize>,
    max_model_len: Option<usize>,
    no_enable_chunked_prefill: bool,
    max_skip_age: f64,
    max_queue: usize,
    #[serde(deserialize_with = "lenient::text")]
    kv_memory: Option<String>,
    threads: usize,
    #[serde(deserialize_with = "lenient::text")]
    pub(super) api_key: Option<String>,
    pub(super) shutdown_timeout: f64,
    pub(super) decision_log: Option<PathBuf>,
    pub(super) emulate: Option<String>,
}

impl Default for ServeSettings {
    fn default() -> Self {
        let engine = EngineSettings::default();
        Self {
            model: None,
            total_loras: None,
            gpu_loras: None,
            host: "127.0.0.1".into(),
            port: 8000,
            tokenizer: None,
            use_dummy_weights: None,
            dtype: "auto".into(),
            gpu_memory_utilization: engine.memory_utilization,
            max_num_seqs: engine.max_num_seqs,
            max_num_batched_tokens: engine.max_num_batched_tokens,
            block_size: engine.block_size,
            swap_space: 4,
            policy: engine.policy.to_string(),
            max_r: engine.max_r,
            seed: engine.seed,
            trust_remote_code: false,
            download_dir: None,
            pipeline_parallel_size: 1,
            tensor_parallel_size: 1,
            device: "auto".into(),
            evict: engine.evict.to_string(),
            swap_mode: engine.swap_mode.to_string(),
            prefetch: engine.prefetch,
            host_memory: "pinned".into(),
            host_loras: None,
            spill_folder: None,
            adapters: None,
            ranks: engine.ranks,
            max_model_len: engine.max_model_len,
            no_enable_chunked_prefill: !engine.chunked_prefill,
            max_skip_age: engine.max_skip_age as f64 * 1e-9,
            max_queue: engine.max_queue,
            kv_memory: None,
            threads: engine.threads,
            api_key: None,
            shutdown_timeout: 30.0,
            decision_log: None,
            emulate: None,
        }
    }
}

impl ServeSettings {
    /// The engine's part, checked as far as flags go.
    pub(super) fn engine(&self) -> Result<EngineSettings, Failure> {
        let required = |value: Option<usize>, flag| {
            value.ok_or_else(|| Failure::usage(format!("{flag} is required: say how many adapters")))
        };
        for (flag, size) in [
            ("--pipeline-parallel-size", self.pipeline_parallel_size),
            ("--tensor-parallel-size", self.tensor_parallel_size),
        ] {
            if size != 1 {
                return Err(Failure::usage(format!("{flag} {size} is not supported: only 1 is")));
            }
        }
        Ok(EngineSettings {
            model: self.model.clone().unwrap_or_else(|| EngineSettings::default().model),
            device: self.device.parse().map_err(Failure::usage)?,
            dtype: self.dtype.parse().map_err(Failure::usage)?,
            host_memory: self.host_memory.parse().map_err(Failure::usage)?,
            tokenizer: self.tokenizer.clone(),
            dummy_weights: match self.use_dummy_weights.as_deref() {
                None | Some("auto") => DummyWeights::Auto,
                Some("true") => DummyWeights::Always,
                Some("false") => DummyWeights::Never,
                Some(other) => {
                    return Err(Failure::usage(format!(
                        "--use-dummy-weights '{other}': use auto, true or false"
                    )));
                }
            },
            total_loras: required(self.total_loras, "--total-loras")?,
            gpu_loras: required(self.gpu_loras, "--gpu-loras")?,
            host_loras: self.host_places()?,
            spill_folder: self.spill_folder.clone(),
            max_r: self.max_r,
            ranks: self.ranks.clone(),
            adapters: self.adapters.clone(),
            seed: self.seed,
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens,
            max_model_len: self.max_model_len,
            block_size: self.block_size,
            kv_memory: self.kv_memory.as_deref().map(parse_size).transpose().map_err(Failure::usage)?,
            memory_utilization: self.gpu_memory_utilization,
            chunked_prefill: !self.no_enable_chunked_prefill,
            policy: policy(&self.policy).map_err(Failure::usage)?,
            evict: self.evict.parse().map_err(Failure::usage)?,
            swap_mode: self.swap_mode.parse().map_err(Failure::usage)?,
            prefetch: self.prefetch,
            max_skip_age: (seconds("--max-skip-age", self.max_skip_age)?.as_nanos())
                .try_into()
                .unwrap_or(u64::MAX),
            max_queue: self.max_queue,
            threads: self.threads,
        })
    }

    /// Adapters in host memory, at most; none is all.
    fn host_places(&self) -> Result<Option<usize>, Failure> {
        match self.host_loras.as_deref() {
            None | Some("all") => Ok(None),
            Some(count) => count.parse().map(Some).map_err(|_| {
                Failure::usage(format!(
                    "--host-loras '{count}': use all, or a number of at least --gpu-loras"
                ))
            }),
        }
    }
}

pub(super) fn seconds(flag: &str, value: f64) -> Result<Duration, Failure> {
    Duration::try_from_secs_f64(value)
        .map_err(|_| Failure::usage(format!("{flag} {value}: give seconds, at least 0")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_references_policy_is_an_alias() {
        let settings = ServeSettings {
            total_loras: Some(4),
            gpu_loras: Some(2),
            policy: "credit".into(),
            ..ServeSettings::default()
        };
        assert_eq!(settings.engine().unwrap().policy, lora_sched::Policy::Skip);
    }
}
