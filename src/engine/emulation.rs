//! An engine whose device is a profile: real HTTP, the real scheduler, the wall clock, and steps and
//! swaps that wait for what the profile says they take. Tokens are letters that follow from the
//! request and the position.

use lora_sched::{Config, Nanos, RequestId, StepPlan, SwapPlan};

use super::emulated::{Costs, EmulatedExecutor};
use super::executor::TokenId;
use super::model::SamplingDefaults;
use super::server::ServerInfo;
use super::{Engine, EngineConfig, StartError};
use crate::profile::{CostModel, History, Profile, ProfileError, StepShape};
use crate::report::decision_log::{DecisionLog, LogHeader};
use crate::workload::tokenizer::{Tokenizer, TokenizerSource};

/// An emulation that cannot start.
#[derive(Debug, thiserror::Error)]
pub enum EmulationError {
    /// The profile.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// The engine.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// What is emulated.
#[derive(Debug)]
pub struct Emulation {
    profile: Profile,
    config: Config,
    tokenizer: Tokenizer,
    /// What the tokenizer was asked for as.
    tokenizer_name: Option<String>,
    seed: u64,
}

impl Emulation {
    /// The profile's machine under a scheduler of this configuration.
    pub fn new(
        profile: Profile,
        config: Config,
        tokenizer: Tokenizer,
        tokenizer_name: Option<String>,
        seed: u64,
    ) -> Self {
        Self { profile, config, tokenizer, tokenizer_name, seed }
    }

    /// The profile.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// The first line of the decision log.
    pub fn log_header(&self) -> LogHeader {
        LogHeader::new(&self.profile.model, self.seed, &self.config)
    }

    /// What a server says of it.
    pub fn info(&self) -> ServerInfo {
        let c = &self.config;
        let ranks: Vec<u32> = c.adapters.iter().map(|a| a.rank).collect();
        ServerInfo {
            model: self.profile.model.clone(),
            total_loras: c.adapters.len(),
            gpu_loras: c.gpu_loras,
            dtype: self.profile.engine.dtype.clone(),
            max_num_seqs: c.max_num_seqs,
            max_model_len: c.max_model_len,
            device: format!("emulated {}", self.profile.engine.device),
            policy: c.policy.to_string(),
            evict: c.evict.to_string(),
            swap_mode: c.swap_mode.to_string(),
            tokenizer: match (self.tokenizer.source(), &self.tokenizer_name) {
                (TokenizerSource::File(_), Some(name)) => name.clone(),
                (source, _) => source.to_string(),
            },
            max_r: ranks.iter().copied().max().unwrap_or(0) as usize,
            ranks: super::server::cycle(ranks),
            sampling: SamplingDefaults::default(),
            template: super::server::chat_template(&self.tokenizer),
        }
    }

    /// Starts the engine.
    ///
    /// # Errors
    /// If the profile's costs cannot be, or a thread cannot be had.
    pub fn start(self, log: Option<DecisionLog>) -> Result<Engine, EmulationError> {
        let cost = CostModel::new(&self.profile)?;
        let layers = self.profile.engine.layers;
        let ranks = self.config.adapters.iter().map(|a| a.rank).collect();
        let vocab_size = self.tokenizer.vocab_size();
        let printable = self.tokenizer.printable(vocab_size);
        let letters: Vec<TokenId> = (0..).zip(&printable).filter(|(_, p)| **p).map(|(id, _)| id).collect();
        let token = move |request: RequestId, at: u32| {
            let mixed = (request.0 ^ (u64::from(at) << 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
            letters.get(mixed as usize % letters.len().max(1)).copied().unwrap_or(0)
        };
        let costs = ProfileCosts { cost, ranks, history: History::default() };
        let executor = EmulatedExecutor::new(costs, token, layers).map_err(StartError::from)?;
        let config = EngineConfig {
            scheduler: self.config,
            adapters: None,
            vocab_size,
            eos: Vec::new(),
            seed: self.seed,
            // Nothing is computed that would be slower the first time.
            warm_up: false,
            log,
        };
        Ok(Engine::start(config, Box::new(executor), self.tokenizer)?)
    }
}

/// A profile's costs. Steps and swaps side by side do not slow each other here.
struct ProfileCosts {
    cost: CostModel,
    /// By adapter.
    ranks: Vec<u32>,
    history: History,
}

impl Costs for ProfileCosts {
    fn step(&mut self, plan: &StepPlan, now: Nanos) -> Nanos {
        let rank = |adapter: u32| self.ranks.get(adapter as usize).copied().unwrap_or(0);
        let alone = self.cost.step_ns(&StepShape::of(plan, now, rank, &mut self.history));
        let reads_under_way = !plan.loading.is_empty() && !plan.wait_for_swaps;
        alone + if reads_under_way { self.cost.reading_ns } else { 0 }
    }

    fn swap(&mut self, swap: &SwapPlan) -> Nanos {
        self.cost.swap_ns(swap.bytes)
    }
}
