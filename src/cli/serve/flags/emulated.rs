//! The settings of `serve --emulate`: the flags that shape decisions, on the profile's machine.

use super::ServeSettings;
use crate::cli::failure::Failure;
use crate::cli::simulate::load_profile;
use crate::engine::emulation::Emulation;
use crate::experiment::{EngineSettings, SimulateError, Simulator};
use crate::workload::tokenizer::Tokenizer;

impl ServeSettings {
    /// What to emulate: the profile's machine, with the scheduler that the simulator would have.
    pub(in crate::cli::serve) fn emulated(&self, named: &str) -> Result<Emulation, Failure> {
        // Checks the flags that both kinds of engine have.
        let checked = self.engine()?;
        checked.check().map_err(Failure::usage)?;
        if self.adapters.is_some() {
            return Err(Failure::usage(
                "--emulate and --adapters exclude each other: an emulated engine has no adapters to read",
            ));
        }
        if checked.host_loras.is_some() {
            return Err(Failure::usage(
                "--emulate and --host-loras exclude each other: a profile says nothing of disks",
            ));
        }
        let profile = load_profile("serve --emulate", Some(named))?;
        let default = Self::default();
        if let Some(model) = &self.model {
            profile.expect_model(model).map_err(|e| Failure::Failed(e.into()))?;
        }
        let mut max_r = self.max_r as u32;
        if let [only] = profile.adapter.ranks[..]
            && self.max_r == default.max_r
        {
            max_r = only;
        }
        let settings = EngineSettings {
            model: profile.model.clone(),
            total_loras: checked.total_loras as u32,
            gpu_loras: checked.gpu_loras as u32,
            max_r,
            ranks: self.ranks.iter().map(|&r| r as u32).collect(),
            max_num_seqs: self.max_num_seqs as u32,
            max_num_batched_tokens: self.max_num_batched_tokens as u32,
            block_size: self.block_size as u32,
            max_model_len: self.max_model_len.map(|n| n as u32),
            no_enable_chunked_prefill: self.no_enable_chunked_prefill,
            policy: checked.policy,
            evict: checked.evict,
            swap_mode: checked.swap_mode,
            prefetch: self.prefetch as u32,
            max_skip_age: self.max_skip_age,
            kv_memory: self.kv_memory.clone(),
            seed: self.seed,
            ..EngineSettings::default()
        };
        let simulator = Simulator::new(profile).map_err(|e| Failure::Failed(e.into()))?;
        let mut config = simulator.config(&settings).map_err(|e| match e {
            SimulateError::Size(_) | SimulateError::Config(_) => Failure::Usage(e.into()),
            _ => Failure::Failed(e.into()),
        })?;
        config.max_queue = self.max_queue;
        config.validate().map_err(|e| Failure::Usage(e.into()))?;
        let (tokenizer, said) = Tokenizer::resolve_or_byte_level(self.tokenizer.as_deref())
            .map_err(|e| Failure::Failed(e.into()))?;
        tracing::info!("tokenizer: {said}");
        Ok(Emulation::new(simulator.profile().clone(), config, tokenizer, self.tokenizer.clone(), self.seed))
    }
}
