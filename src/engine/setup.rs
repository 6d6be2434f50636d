//! From settings to a running engine: model, tokenizer, adapters, memory plan, executor.
//!
//! [`Loaded`] holds what does not depend on the budget, so that a sweep starts one engine after another
//! with other `gpu_loras` and reads or draws the adapters once.

use std::path::PathBuf;
use std::sync::Arc;

use lora_sched::{AdapterSpec, Config, ConfigError, Evict, Nanos, Policy, SwapMode};

use super::adapters::{HostPool, PoolError};
use super::batch::BatchLimits;
use super::cpu::{CpuExecutor, CpuOptions, CpuStartError, MemoryPlan};
use super::memory::{MemoryTable, free_memory, gb};
use super::model::{self, Dtype, DummyWeights, Family, Model, ModelError, ModelSpec, Weights};
use super::{Engine, EngineConfig, StartError};
use crate::report::decision_log::{DecisionLog, LogHeader};
use crate::workload::tokenizer::{Tokenizer, TokenizerError};

/// With dummy weights of the Llama family a model takes at least this many tokens: the longest prompt of
/// the reference experiment and its output need 4,112.
const DUMMY_MODEL_LEN: usize = 4352;

/// Everything that an engine depends on, with the reference's defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineSettings {
    /// A folder with a `config.json`, or a preset's name.
    pub model: String,
    /// A tokenizer's file, folder or name; none is the model's own.
    pub tokenizer: Option<String>,
    /// When weights are drawn.
    pub dummy_weights: DummyWeights,
    /// Adapters.
    pub total_loras: usize,
    /// Slots; adapters `0..gpu_loras` are preloaded.
    pub gpu_loras: usize,
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
    /// Bytes of KV cache on the CPU executor.
    pub kv_memory: u64,
    /// Share of the free memory that may be used.
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
            tokenizer: None,
            dummy_weights: DummyWeights::Auto,
            total_loras: 1,
            gpu_loras: 1,
            max_r: 8,
            ranks: Vec::new(),
            adapters: None,
            seed: 0,
            max_num_seqs: 16,
            max_num_batched_tokens: 4096,
            max_model_len: None,
            block_size: 16,
            kv_memory: 1 << 30,
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

/// Why an engine cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// Settings that contradict each other or the model.
    #[error("{0}")]
    Settings(String),
    /// Limits that no scheduler can work with.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// It does not fit.
    #[error(
        "not enough memory: {required:.2} GB required, {available:.2} GB available \
         ({share:.0} % of what is free): lower --gpu-loras, --total-loras or --kv-memory, or use a smaller model\n{table}"
    )]
    Memory {
        /// What the plan adds up to, GB.
        required: f64,
        /// What may be used, GB.
        available: f64,
        /// The share of free memory that may be used, per cent.
        share: f64,
        /// The plan.
        table: MemoryTable,
    },
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The adapters.
    #[error(transparent)]
    Adapters(#[from] PoolError),
    /// The executor.
    #[error(transparent)]
    Executor(#[from] CpuStartError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] StartError),
}

impl SetupError {
    /// Whether it was asked for something impossible, rather than something that failed.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Settings(_) => true,
            Self::Config(e) => !matches!(e, ConfigError::KvTooSmall { .. }),
            _ => false,
        }
    }
}

/// What an engine needs that does not depend on `gpu_loras`.
#[derive(Debug)]
pub struct Loaded {
    settings: EngineSettings,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    /// Which tokenizer it is, to be shown at start.
    pub tokenizer_said: String,
    /// Where the weights come from, to be shown at start.
    pub weights_said: String,
    dummy: bool,
    allowed: Option<Vec<bool>>,
    max_model_len: usize,
    pool: Arc<HostPool>,
}

impl Loaded {
    /// Finds the model and its tokenizer, checks that everything fits, then makes the adapters.
    ///
    /// # Errors
    /// If settings are impossible, files are missing or wrong, or memory does not suffice.
    pub fn load(settings: EngineSettings) -> Result<Self, SetupError> {
        settings.check()?;
        let Model { spec, weights, folder } =
            model::resolve(&settings.model, settings.dummy_weights, settings.seed)?;
        let (dummy, weights_said) = match &weights {
            Weights::Dummy { seed } => (true, format!("dummy weights drawn from seed {seed}")),
            Weights::Files(files) => (false, format!("weights of {}", files.folder().display())),
        };
        let name = settings.tokenizer.clone().or_else(|| match folder {
            Some(folder) => Some(folder.display().to_string()),
            None => Some(settings.model.clone()),
        });
        let (tokenizer, tokenizer_said) = Tokenizer::resolve_or_byte_level(name.as_deref())?;
        if tokenizer.vocab_size() > spec.vocab_size {
            return Err(SetupError::Settings(format!(
                "the tokenizer has {} ids and {}'s vocabulary {}: choose the model's own with --tokenizer",
                tokenizer.vocab_size(),
                spec.name,
                spec.vocab_size
            )));
        }
        let allowed = dummy.then(|| tokenizer.printable(spec.vocab_size));
        let max_model_len = max_model_len(&settings, &spec, dummy)?;
        let plan = memory(&settings, &spec, max_model_len, settings.gpu_loras);
        let table = table(&settings, &spec, &plan);
        fits(&settings, &table)?;
        let specs = (0..settings.total_loras).map(|i| {
            let rank = rank(&settings, i);
            AdapterSpec::new(rank as u32, spec.adapter_bytes(rank, Dtype::F32))
        });
        config(&settings, &plan, max_model_len, specs.collect()).validate()?;

        let pool = match &settings.adapters {
            Some(folder) => HostPool::load(&spec, settings.max_r, folder, Some(settings.total_loras))?,
            None => HostPool::generate(
                &spec,
                settings.max_r,
                settings.total_loras,
                &settings.ranks,
                settings.seed,
            )?,
        };
        Ok(Self {
            pool: Arc::new(pool),
            settings,
            spec,
            tokenizer,
            tokenizer_said,
            weights_said,
            dummy,
            allowed,
            max_model_len,
        })
    }

    /// The settings.
    pub fn settings(&self) -> &EngineSettings {
        &self.settings
    }

    /// The model's shape.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The adapters.
    pub fn pool(&self) -> &Arc<HostPool> {
        &self.pool
    }

    /// Names of the adapters, in order of their ids.
    pub fn adapter_names(&self) -> Vec<String> {
        (0..self.pool.len() as u32)
            .filter_map(|id| self.pool.get(lora_sched::AdapterId(id)))
            .map(|adapter| adapter.name.clone())
            .collect()
    }

    /// Whether the weights are drawn from the seed.
    pub fn has_dummy_weights(&self) -> bool {
        self.dummy
    }

    /// What the memory goes to with `gpu_loras` slots.
    pub fn memory_table(&self, gpu_loras: usize) -> MemoryTable {
        table(&self.settings, &self.spec, &memory(&self.settings, &self.spec, self.max_model_len, gpu_loras))
    }

    /// The scheduler's configuration with `gpu_loras` slots.
    pub fn scheduler_config(&self, gpu_loras: usize) -> Config {
        let plan = memory(&self.settings, &self.spec, self.max_model_len, gpu_loras);
        config(&self.settings, &plan, self.max_model_len, self.pool.specs())
    }

    /// The first line of the decision log of an engine with `gpu_loras` slots.
    pub fn log_header(&self, gpu_loras: usize) -> LogHeader {
        LogHeader::new(&self.spec.name, self.settings.seed, &self.scheduler_config(gpu_loras))
    }

    /// An executor with `gpu_loras` slots; `keep_logits` is for tests and calibration.
    ///
    /// # Errors
    /// If it does not fit or the model's files cannot be read.
    pub fn executor(&self, gpu_loras: usize, keep_logits: bool) -> Result<CpuExecutor, SetupError> {
        let s = &self.settings;
        let plan = memory(s, &self.spec, self.max_model_len, gpu_loras);
        let model = model::resolve(&s.model, s.dummy_weights, s.seed)?;
        Ok(CpuExecutor::new(CpuOptions {
            spec: self.spec.clone(),
            weights: model.weights,
            adapters: self.pool.clone(),
            gpu_loras,
            limits: limits(s, self.max_model_len, plan.kv_blocks as usize),
            swap_mode: s.swap_mode,
            threads: s.threads,
            allowed_tokens: self.allowed.clone(),
            keep_logits,
        })?)
    }

    /// Starts an engine with `gpu_loras` slots, warmed up.
    ///
    /// # Errors
    /// See [`Self::executor`] and [`Engine::start`].
    pub fn start(&self, gpu_loras: usize, log: Option<DecisionLog>) -> Result<Engine, SetupError> {
        let executor = self.executor(gpu_loras, false)?;
        let mut eos = self.spec.eos.clone();
        eos.extend(self.tokenizer.eos().filter(|e| !self.spec.eos.contains(e)));
        let config = EngineConfig {
            scheduler: self.scheduler_config(gpu_loras),
            vocab_size: self.spec.vocab_size,
            eos,
            seed: self.settings.seed,
            warm_up: true,
            log,
        };
        Ok(Engine::start(config, Box::new(executor), self.tokenizer.clone())?)
    }
}

/// The longest request: what the settings say, checked; else what the model was made for.
fn max_model_len(s: &EngineSettings, spec: &ModelSpec, dummy: bool) -> Result<usize, SetupError> {
    // Rotary positions go on past the configuration's; learned ones end. Past them, trained weights
    // give nonsense, and drawn ones what they always give.
    let stretch = dummy && spec.family == Family::Llama;
    let longest = if stretch { spec.max_positions.max(DUMMY_MODEL_LEN) } else { spec.max_positions };
    match s.max_model_len {
        None => Ok(longest),
        Some(0) => Err(SetupError::Settings("max_model_len must be at least 1".into())),
        Some(len) if len > longest && !stretch => Err(SetupError::Settings(format!(
            "max_model_len {len} is over {}'s {longest} positions: lower it",
            spec.name
        ))),
        Some(len) => Ok(len),
    }
}

fn limits(s: &EngineSettings, max_model_len: usize, kv_blocks: usize) -> BatchLimits {
    BatchLimits {
        max_num_seqs: s.max_num_seqs,
        max_num_batched_tokens: s.max_num_batched_tokens,
        max_model_len,
        block_size: s.block_size,
        kv_blocks,
    }
}

/// The CPU executor's memory, with as many KV blocks as `kv_memory` holds and the sequences can use.
fn memory(s: &EngineSettings, spec: &ModelSpec, max_model_len: usize, gpu_loras: usize) -> MemoryPlan {
    let of = |kv_blocks| MemoryPlan::cpu(spec, &limits(s, max_model_len, kv_blocks), s.max_r, gpu_loras);
    let useful = s.max_num_seqs * max_model_len.div_ceil(s.block_size);
    let blocks = of(0).kv_blocks_in(s.kv_memory).min(useful as u64);
    of(blocks as usize)
}

fn config(s: &EngineSettings, plan: &MemoryPlan, max_model_len: usize, adapters: Vec<AdapterSpec>) -> Config {
    Config {
        adapters,
        gpu_loras: plan.slots as usize,
        max_num_seqs: s.max_num_seqs,
        max_num_batched_tokens: s.max_num_batched_tokens,
        max_model_len,
        block_size: s.block_size,
        kv_blocks: plan.kv_blocks as usize,
        chunked_prefill: s.chunked_prefill,
        policy: s.policy,
        evict: s.evict,
        swap_mode: s.swap_mode,
        prefetch: s.prefetch,
        max_skip_age: s.max_skip_age,
        max_queue: s.max_queue,
    }
}

/// Rank of adapter `i` before it is there: folders may hold any rank up to the largest.
fn rank(s: &EngineSettings, i: usize) -> usize {
    if s.adapters.is_some() || s.ranks.is_empty() { s.max_r } else { s.ranks[i % s.ranks.len()] }
}

fn table(s: &EngineSettings, spec: &ModelSpec, plan: &MemoryPlan) -> MemoryTable {
    let host: u64 = (0..s.total_loras).map(|i| spec.adapter_bytes(rank(s, i), Dtype::F32)).sum();
    MemoryTable {
        rows: vec![
            ("weights".into(), plan.weights),
            ("workspace".into(), plan.workspace),
            (format!("{} adapter slots", plan.slots), plan.slots * plan.slot),
            (
                format!("{} KV blocks of {} tokens", plan.kv_blocks, s.block_size),
                plan.kv_blocks * plan.kv_block,
            ),
            (format!("{} adapters in host memory", s.total_loras), host),
        ],
    }
}

fn fits(s: &EngineSettings, table: &MemoryTable) -> Result<(), SetupError> {
    let Some(free) = free_memory() else { return Ok(()) };
    let available = free as f64 * s.memory_utilization;
    if table.total() as f64 <= available {
        return Ok(());
    }
    Err(SetupError::Memory {
        required: gb(table.total()),
        available: available * 1e-9,
        share: s.memory_utilization * 100.0,
        table: table.clone(),
    })
}
