//! Why an engine cannot be set up.

use lora_sched::ConfigError;

use crate::engine::StartError;
use crate::engine::adapters::PoolError;
use crate::engine::cpu::CpuStartError;
use crate::engine::memory::MemoryTable;
use crate::engine::model::ModelError;
use crate::workload::tokenizer::TokenizerError;

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
        "not enough {place} memory: {required:.2} GB required, {available:.2} GB available \
         ({share:.0} % of {whole}): lower --gpu-loras, --total-loras or --kv-memory, or use a smaller model\n{table}"
    )]
    Memory {
        /// Whose.
        place: &'static str,
        /// What `share` is a share of.
        whole: &'static str,
        /// What the plan adds up to, GB.
        required: f64,
        /// What may be used, GB.
        available: f64,
        /// The share that may be used, per cent.
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
    /// The CPU's executor.
    #[error(transparent)]
    Cpu(#[from] CpuStartError),
    /// A GPU was asked for, and this program was built without the code for one.
    #[error(
        "--device cuda: this program is built without CUDA; build it with --features cuda, or use --device cpu"
    )]
    WithoutCuda,
    /// The GPU.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] crate::engine::cuda::CudaStartError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] StartError),
}

impl SetupError {
    /// Whether it was asked for something impossible, rather than something that failed.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Settings(_) | Self::WithoutCuda => true,
            Self::Config(e) => !matches!(e, ConfigError::KvTooSmall { .. }),
            _ => false,
        }
    }
}
