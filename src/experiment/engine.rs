//! A cell's engine, for real.

use super::{EngineSettings, parse_size};
use crate::engine::setup;

impl EngineSettings {
    /// As the engine's own settings. What a cell does not say has `serve`'s default.
    ///
    /// # Errors
    /// If a value is none that the engine takes, in words.
    pub fn for_engine(&self) -> Result<setup::EngineSettings, String> {
        let default = setup::EngineSettings::default();
        let kv_memory = self.kv_memory.as_deref().map(parse_size).transpose().map_err(|e| e.to_string())?;
        let ranks: Vec<usize> = self.ranks.iter().map(|&r| r as usize).collect();
        Ok(setup::EngineSettings {
            model: self.model.clone(),
            total_loras: self.total_loras as usize,
            gpu_loras: self.gpu_loras as usize,
            max_r: ranks.iter().copied().max().unwrap_or(self.max_r as usize),
            ranks,
            seed: self.seed,
            max_num_seqs: self.max_num_seqs as usize,
            max_num_batched_tokens: self.max_num_batched_tokens as usize,
            max_model_len: self.max_model_len.map(|n| n as usize),
            block_size: self.block_size as usize,
            kv_memory,
            chunked_prefill: !self.no_enable_chunked_prefill,
            dtype: self.dtype.parse()?,
            device: self.device.parse()?,
            policy: self.policy,
            evict: self.evict,
            swap_mode: self.swap_mode,
            prefetch: self.prefetch as usize,
            max_skip_age: (self.max_skip_age * 1e9) as lora_sched::Nanos,
            threads: self.threads.map_or(default.threads, |n| n as usize),
            ..default
        })
    }
}
