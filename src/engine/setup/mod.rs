//! From settings to a running engine: device, model, tokenizer, adapters, memory plan, executor.
//!
//! [`Loaded`] holds what does not depend on the budget, so that a sweep starts one engine after another
//! with other `gpu_loras` and reads or draws weights and adapters once.

mod device;
mod error;
mod settings;

use std::sync::Arc;

use lora_sched::{AdapterSpec, Config};

use super::adapters::{DiskTier, HostPool};
use super::batch::BatchLimits;
use super::device::{Ceilings, DeviceExecutor};
use super::memory::{MemoryPlan, MemoryTable, free_memory, gb};
use super::model::{self, Dtype, Family, GenerationConfig, Model, ModelSpec, SamplingDefaults};
use super::{Engine, EngineConfig};
use crate::report::decision_log::{DecisionLog, LogHeader};
use crate::report::machine::Gpu;
use crate::workload::tokenizer::Tokenizer;
use device::OpenDevice;
pub use error::SetupError;
pub use settings::{DeviceKind, DtypeChoice, EngineSettings, HostMemory};

/// With dummy weights of the Llama family a model takes at least this many tokens: the longest prompt of
/// the reference experiment and its output need 4,112.
const DUMMY_MODEL_LEN: usize = 4352;
/// Bytes of KV cache on the CPU, if nothing is said.
pub const CPU_KV_MEMORY: u64 = 1 << 30;

/// What an engine needs that does not depend on `gpu_loras`.
#[derive(Debug)]
pub struct Loaded {
    settings: EngineSettings,
    device: OpenDevice,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    /// Which tokenizer it is, to be shown at start.
    pub tokenizer_said: String,
    /// Where the weights come from, to be shown at start.
    pub weights_said: String,
    generation: GenerationConfig,
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
        let device = OpenDevice::open(&settings)?;
        let Model { spec, weights, generation, home } =
            model::resolve(&settings.model, settings.dummy_weights, settings.seed)?;
        let dummy = weights.is_dummy();
        let weights_said = weights.said(device.dtype(), spec.weight_bytes(device.dtype()));
        let name = settings.tokenizer.clone().or_else(|| match home {
            Some(home) => Some(home.display().to_string()),
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
        let plan = memory(&settings, &device, &spec, max_model_len, settings.gpu_loras);
        let table = table(&settings, &plan, host_bytes(&settings, &device, &spec));
        fits(&settings, &device, &plan, &table)?;
        let specs = (0..settings.total_loras).map(|i| {
            let rank = rank(&settings, i);
            AdapterSpec::new(rank as u32, spec.adapter_bytes(rank, device.dtype()))
        });
        config(&settings, &plan, max_model_len, specs.collect()).validate()?;

        let slabs = device.slabs(&settings)?;
        let (max_r, total) = (settings.max_r, settings.total_loras);
        let disk = settings.host_loras.map(|n| DiskTier::new(n, settings.spill_folder.clone()));
        let pool = HostPool::empty_in(slabs, &spec, max_r).over(disk);
        let pool = match &settings.adapters {
            Some(folder) => pool.loaded(folder, Some(total))?,
            None => pool.generated(total, &settings.ranks, settings.seed)?,
        };
        Ok(Self {
            pool: Arc::new(pool),
            settings,
            device,
            spec,
            tokenizer,
            tokenizer_said,
            weights_said,
            generation,
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

    /// What a request gets where it says nothing: the model's `generation_config.json`.
    pub fn sampling_defaults(&self) -> SamplingDefaults {
        self.generation.sampling
    }

    /// Fields of the `generation_config.json` that ask for what is not implemented, to be shown at start.
    pub fn generation_ignored(&self) -> &[String] {
        &self.generation.ignored
    }

    /// The device, in words.
    pub fn device_said(&self) -> String {
        self.device.said()
    }

    /// The GPU that it computes on, for manifests.
    pub fn gpu(&self) -> Option<Gpu> {
        self.device.gpu()
    }

    /// The number format of weights, adapters and KV cache.
    pub fn dtype(&self) -> Dtype {
        self.device.dtype()
    }

    /// The device's memory by purpose with `gpu_loras` slots.
    pub fn memory_plan(&self, gpu_loras: usize) -> MemoryPlan {
        memory(&self.settings, &self.device, &self.spec, self.max_model_len, gpu_loras)
    }

    /// What the device can do at best, measured now; none where nothing measures it.
    ///
    /// # Errors
    /// If the device fails.
    pub fn ceilings(&self) -> Result<Option<Ceilings>, SetupError> {
        self.device.ceilings()
    }

    /// Bytes of memory that weights, slots and KV cache share; none where each has its own.
    pub fn shared_memory(&self) -> Option<u64> {
        self.device.shared_memory(&self.settings)
    }

    /// What the memory goes to with `gpu_loras` slots.
    pub fn memory_table(&self, gpu_loras: usize) -> MemoryTable {
        table(&self.settings, &self.memory_plan(gpu_loras), self.pool.bytes())
    }

    /// The scheduler's configuration with `gpu_loras` slots.
    pub fn scheduler_config(&self, gpu_loras: usize) -> Config {
        let plan = self.memory_plan(gpu_loras);
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
    pub fn executor(&self, gpu_loras: usize, keep_logits: bool) -> Result<DeviceExecutor, SetupError> {
        self.executor_over(self.pool.clone(), gpu_loras, keep_logits)
    }

    fn executor_over(
        &self,
        adapters: Arc<HostPool>,
        gpu_loras: usize,
        keep_logits: bool,
    ) -> Result<DeviceExecutor, SetupError> {
        let s = &self.settings;
        let plan = self.memory_plan(gpu_loras);
        let model = model::resolve(&s.model, s.dummy_weights, s.seed)?;
        self.device.executor(device::ExecutorOptions {
            spec: self.spec.clone(),
            weights: model.weights,
            adapters,
            gpu_loras,
            limits: limits(s, self.max_model_len, plan.kv_blocks as usize),
            swap_mode: s.swap_mode,
            threads: s.threads,
            allowed_tokens: self.allowed.clone(),
            keep_logits,
        })
    }

    /// Starts an engine with `gpu_loras` slots, warmed up.
    ///
    /// # Errors
    /// See [`Self::executor`] and [`Engine::start`].
    pub fn start(&self, gpu_loras: usize, log: Option<DecisionLog>) -> Result<Engine, SetupError> {
        // Its own: adapters that it loads and unloads are no other engine's.
        let pool = Arc::new(self.pool.fork());
        let executor = self.executor_over(pool.clone(), gpu_loras, false)?;
        let mut eos = self.spec.eos.clone();
        eos.extend(self.tokenizer.eos().filter(|e| !self.spec.eos.contains(e)));
        let config = EngineConfig {
            scheduler: self.scheduler_config(gpu_loras),
            adapters: Some(pool),
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

/// The device's memory, with as many KV blocks as there is room for and the sequences can use.
fn memory(
    s: &EngineSettings,
    device: &OpenDevice,
    spec: &ModelSpec,
    max_model_len: usize,
    gpu_loras: usize,
) -> MemoryPlan {
    let of = |kv_blocks| device.plan(spec, &limits(s, max_model_len, kv_blocks), s.max_r, gpu_loras);
    let useful = s.max_num_seqs * max_model_len.div_ceil(s.block_size);
    let empty = of(0);
    let room = match (s.kv_memory, device.shared_memory(s)) {
        (Some(asked), _) => asked,
        (None, Some(shared)) => shared.saturating_sub(empty.total()),
        (None, None) => CPU_KV_MEMORY,
    };
    of(empty.kv_blocks_in(room).min(useful as u64) as usize)
}

fn config(s: &EngineSettings, plan: &MemoryPlan, max_model_len: usize, adapters: Vec<AdapterSpec>) -> Config {
    Config {
        adapters,
        gpu_loras: plan.slots as usize,
        host_loras: s.host_loras,
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

/// Adapters in host memory.
fn in_host(s: &EngineSettings) -> usize {
    s.host_loras.map_or(s.total_loras, |n| n.min(s.total_loras))
}

/// Bytes of the adapters in host memory, before they are there.
fn host_bytes(s: &EngineSettings, device: &OpenDevice, spec: &ModelSpec) -> u64 {
    (0..in_host(s)).map(|i| spec.adapter_bytes(rank(s, i), device.dtype())).sum()
}

fn table(s: &EngineSettings, plan: &MemoryPlan, host: u64) -> MemoryTable {
    MemoryTable {
        rows: vec![
            ("weights".into(), plan.weights),
            ("workspace".into(), plan.workspace),
            (format!("{} adapter slots", plan.slots), plan.slots * plan.slot),
            (
                format!("{} KV blocks of {} tokens", plan.kv_blocks, s.block_size),
                plan.kv_blocks * plan.kv_block,
            ),
            (format!("{} adapters in host memory", in_host(s)), host),
        ],
    }
}

/// Whether device and host have room for what is planned.
fn fits(
    s: &EngineSettings,
    device: &OpenDevice,
    plan: &MemoryPlan,
    table: &MemoryTable,
) -> Result<(), SetupError> {
    let check = |place, whole, required: u64, available: u64, share: f64| {
        if required <= available {
            return Ok(());
        }
        let (required, available, share) = (gb(required), gb(available), share * 100.0);
        Err(SetupError::Memory { place, whole, required, available, share, table: table.clone() })
    };
    let mut host = table.total();
    if let Some(shared) = device.shared_memory(s) {
        // A cache that holds no sequence is refused by the scheduler's configuration, in its own words.
        check("GPU", "the GPU's memory", plan.total(), shared, s.memory_utilization)?;
        host -= plan.total();
    }
    match free_memory() {
        Some(free) => {
            let share = s.memory_utilization;
            check("host", "what is free", host, (free as f64 * share) as u64, share)
        }
        None => Ok(()),
    }
}
