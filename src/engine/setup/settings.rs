//! What an engine depends on.

use std::path::PathBuf;
use std::str::FromStr;

use lora_sched::{Evict, Nanos, Policy, SwapMode};

use super::SetupError;
use crate::engine::model::DummyWeights;

/// Where steps run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceKind {
    /// A GPU where this program can use one and there is one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The first NVIDIA GPU; an error where there is none.
    Cuda,
}

/// The number format that is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DtypeChoice {
    /// The device's: f32 on the CPU, bf16 on a GPU.
    #[default]
    Auto,
    /// f32: the CPU's.
    Float,
    /// bf16: a GPU's.
    Bfloat16,
}

/// Where host copies of adapters lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostMemory {
    /// Page-locked: the copy engine reads it at the bus's speed.
    #[default]
    Pinned,
    /// Ordinary memory, through the driver's staging buffer: what a naive server does.
    Pageable,
}

/// A word that is none of a setting's choices.
fn unknown<T>(what: &str, word: &str, choices: &str) -> Result<T, String> {
    Err(format!("unknown {what} '{word}': use {choices}"))
}

impl FromStr for DeviceKind {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            other => unknown("device", other, "auto, cpu or cuda"),
        }
    }
}

impl FromStr for DtypeChoice {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "auto" => Ok(Self::Auto),
            "float" | "float32" => Ok(Self::Float),
            "bfloat16" => Ok(Self::Bfloat16),
            "half" | "float16" => Err(format!(
                "dtype '{word}' is not computed in: use auto, which is bfloat16 on a GPU and float on the CPU"
            )),
            other => unknown("dtype", other, "auto, bfloat16 or float"),
        }
    }
}

impl std::fmt::Display for HostMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Pinned => "pinned",
            Self::Pageable => "pageable",
        })
    }
}

impl FromStr for HostMemory {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "pinned" => Ok(Self::Pinned),
            "pageable" => Ok(Self::Pageable),
            other => unknown("host memory", other, "pinned or pageable"),
        }
    }
}

/// Everything that an engine depends on, with the reference's defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineSettings {
    /// A folder with a `config.json`, or a preset's name.
    pub model: String,
    /// Where steps run.
    pub device: DeviceKind,
    /// The number format of weights and activations.
    pub dtype: DtypeChoice,
    /// Where host copies of adapters lie, on a GPU.
    pub host_memory: HostMemory,
    /// A tokenizer's file, folder or name; none is the model's own.
    pub tokenizer: Option<String>,
    /// When weights are drawn.
    pub dummy_weights: DummyWeights,
    /// Adapters.
    pub total_loras: usize,
    /// Slots; adapters `0..gpu_loras` are preloaded.
    pub gpu_loras: usize,
    /// Adapters in host memory, at most, the others on disk; none is all.
    pub host_loras: Option<usize>,
    /// Where generated adapters are written for that; none is a temporary folder.
    pub spill_folder: Option<PathBuf>,
    /// Largest rank, which a slot holds.
    pub max_r: usize,
    /// Ranks that generated adapters cycle through; empty is `max_r` for all.
    pub ranks: Vec<usize>,
    /// PEFT folders to take adapters from; none generates them.
    pub adapters: Option<PathBuf>,
    /// Seed of weights, adapters and sampling.
    pub seed: u64,
    /// Running sequences, at most.
    pub max_num_seqs: usize,
    /// Tokens a step, at most.
    pub max_num_batched_tokens: usize,
    /// Tokens a request, at most; none is the model's positions.
    pub max_model_len: Option<usize>,
    /// Tokens a KV block.
    pub block_size: usize,
    /// Bytes of KV cache; none is 1 GiB on the CPU and what the rest leaves on a GPU.
    pub kv_memory: Option<u64>,
    /// Share of the device's memory that may be used: of what is free on the CPU, of all on a GPU.
    pub memory_utilization: f64,
    /// Whether prompts are split.
    pub chunked_prefill: bool,
    /// Admission policy.
    pub policy: Policy,
    /// Eviction rule.
    pub evict: Evict,
    /// How swaps and steps are ordered.
    pub swap_mode: SwapMode,
    /// Requests that are swapped for ahead of demand.
    pub prefetch: usize,
    /// The age bound.
    pub max_skip_age: Nanos,
    /// Waiting requests, at most.
    pub max_queue: usize,
    /// Threads of a step's arithmetic; 0 is one less than the machine has.
    pub threads: usize,
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            model: "facebook/opt-125m".into(),
            device: DeviceKind::Auto,
            dtype: DtypeChoice::Auto,
            host_memory: HostMemory::Pinned,
            tokenizer: None,
            dummy_weights: DummyWeights::Auto,
            total_loras: 1,
            gpu_loras: 1,
            host_loras: None,
            spill_folder: None,
            max_r: 8,
            ranks: Vec::new(),
            adapters: None,
            seed: 0,
            max_num_seqs: 16,
            max_num_batched_tokens: 4096,
            max_model_len: None,
            block_size: 16,
            kv_memory: None,
            memory_utilization: 0.9,
            chunked_prefill: true,
            policy: Policy::Skip,
            evict: Evict::Lru,
            swap_mode: SwapMode::Layered,
            prefetch: 0,
            max_skip_age: 2_000_000_000,
            max_queue: 4096,
            threads: 0,
        }
    }
}

impl EngineSettings {
    /// Says what is impossible about these settings, as far as they alone tell.
    ///
    /// # Errors
    /// If a value is out of its range or contradicts another.
    pub fn check(&self) -> Result<(), SetupError> {
        let s = self;
        let fail = |what: String| Err(SetupError::Settings(what));
        if s.total_loras == 0 {
            return fail("total_loras must be at least 1".into());
        }
        if s.gpu_loras == 0 {
            return fail("gpu_loras must be at least 1".into());
        }
        if s.gpu_loras > s.total_loras {
            return fail(format!(
                "gpu_loras ({}) is greater than total_loras ({}): lower gpu_loras",
                s.gpu_loras, s.total_loras
            ));
        }
        if let Some(host) = s.host_loras.filter(|&host| host < s.gpu_loras) {
            return fail(format!(
                "host_loras ({host}) is less than gpu_loras ({}): slots are filled from host memory, so raise it",
                s.gpu_loras
            ));
        }
        if s.max_r == 0 {
            return fail("max_r must be at least 1".into());
        }
        if ![8, 16, 32].contains(&s.block_size) {
            return fail(format!("block_size must be 8, 16 or 32, not {}", s.block_size));
        }
        if !(s.memory_utilization > 0.0 && s.memory_utilization <= 1.0) {
            return fail(format!(
                "gpu_memory_utilization must be above 0 and at most 1, not {}",
                s.memory_utilization
            ));
        }
        for (name, value) in
            [("max_num_seqs", s.max_num_seqs), ("max_num_batched_tokens", s.max_num_batched_tokens)]
        {
            if value == 0 {
                return fail(format!("{name} must be at least 1"));
            }
        }
        if s.max_queue == 0 {
            return fail("max_queue must be at least 1".into());
        }
        Ok(())
    }
}
