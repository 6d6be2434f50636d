//! The device that an engine runs on, open and ready for executors.

use std::sync::Arc;

use lora_sched::SwapMode;

use super::SetupError;
use super::settings::{DeviceKind, DtypeChoice, EngineSettings};
use crate::engine::adapters::{HostPool, HostSlabs, SlabMaker};
use crate::engine::batch::BatchLimits;
use crate::engine::cpu::{self, CpuBackend, CpuOptions, cpu_executor};
#[cfg(feature = "cuda")]
use crate::engine::cuda::{CudaDevice, CudaOptions};
use crate::engine::device::{Ceilings, DeviceExecutor, LoadedModel};
use crate::engine::memory::MemoryPlan;
use crate::engine::model::{Dtype, ModelSpec, Weights};
use crate::report::machine::Gpu;

/// A device, with the weights that were loaded onto it.
#[derive(Debug)]
pub(super) enum OpenDevice {
    Cpu(LoadedModel<CpuBackend>),
    #[cfg(feature = "cuda")]
    Cuda(Box<CudaDevice>),
}

/// What an executor is made with on any device.
pub(super) struct ExecutorOptions {
    pub spec: ModelSpec,
    pub weights: Weights,
    pub adapters: Arc<HostPool>,
    pub gpu_loras: usize,
    pub limits: BatchLimits,
    pub swap_mode: SwapMode,
    /// On the CPU.
    pub threads: usize,
    pub allowed_tokens: Option<Vec<bool>>,
    pub keep_logits: bool,
}

impl OpenDevice {
    /// The device that the settings ask for.
    pub fn open(settings: &EngineSettings) -> Result<Self, SetupError> {
        let device = match settings.device {
            DeviceKind::Cpu => Self::Cpu(LoadedModel::default()),
            #[cfg(not(feature = "cuda"))]
            DeviceKind::Auto => Self::Cpu(LoadedModel::default()),
            #[cfg(not(feature = "cuda"))]
            DeviceKind::Cuda => return Err(SetupError::WithoutCuda),
            #[cfg(feature = "cuda")]
            DeviceKind::Cuda => Self::Cuda(Box::new(CudaDevice::open()?)),
            #[cfg(feature = "cuda")]
            DeviceKind::Auto => match CudaDevice::open() {
                Ok(device) => Self::Cuda(Box::new(device)),
                Err(e) if e.is_absence() => {
                    tracing::info!("no GPU: {e}");
                    Self::Cpu(LoadedModel::default())
                }
                Err(e) => return Err(e.into()),
            },
        };
        match (settings.dtype, device.dtype()) {
            (DtypeChoice::Auto, _)
            | (DtypeChoice::Float, Dtype::F32)
            | (DtypeChoice::Bfloat16, Dtype::Bf16) => Ok(device),
            (_, computes) => Err(SetupError::Settings(format!(
                "--dtype: {} computes in {computes} only; use auto",
                device.said()
            ))),
        }
    }

    /// In words.
    pub fn said(&self) -> String {
        match self {
            Self::Cpu(_) => "cpu".into(),
            #[cfg(feature = "cuda")]
            Self::Cuda(device) => device.said(),
        }
    }

    /// The GPU, for manifests.
    pub fn gpu(&self) -> Option<Gpu> {
        match self {
            Self::Cpu(_) => None,
            #[cfg(feature = "cuda")]
            Self::Cuda(device) => Some(device.gpu()),
        }
    }

    /// The number format of weights, adapters and KV cache.
    pub fn dtype(&self) -> Dtype {
        match self {
            Self::Cpu(_) => Dtype::F32,
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => Dtype::Bf16,
        }
    }

    /// What makes the slabs that it copies from.
    pub fn slabs(&self, settings: &EngineSettings) -> Result<Arc<dyn SlabMaker>, SetupError> {
        match self {
            Self::Cpu(_) => {
                let _ = settings;
                Ok(Arc::new(HostSlabs))
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(device) => Ok(device.slabs(settings.host_memory)?),
        }
    }

    /// Bytes that weights, workspace, slots and KV cache share; none where they come from host memory.
    pub fn shared_memory(&self, settings: &EngineSettings) -> Option<u64> {
        match self {
            Self::Cpu(_) => {
                let _ = settings;
                None
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(device) => Some(device.usable(settings.memory_utilization)),
        }
    }

    /// Memory by purpose.
    pub fn plan(
        &self,
        spec: &ModelSpec,
        limits: &BatchLimits,
        max_rank: usize,
        gpu_loras: usize,
    ) -> MemoryPlan {
        match self {
            Self::Cpu(_) => cpu::plan(spec, limits, max_rank, gpu_loras),
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => crate::engine::cuda::plan(spec, limits, max_rank, gpu_loras),
        }
    }

    /// What it can do at best.
    pub fn ceilings(&self) -> Result<Option<Ceilings>, SetupError> {
        match self {
            Self::Cpu(_) => Ok(None),
            #[cfg(feature = "cuda")]
            Self::Cuda(device) => Ok(Some(device.ceilings()?)),
        }
    }

    /// An executor.
    pub fn executor(&self, options: ExecutorOptions) -> Result<DeviceExecutor, SetupError> {
        let ExecutorOptions { spec, weights, adapters, gpu_loras, limits, swap_mode, .. } = options;
        let ExecutorOptions { threads, allowed_tokens, keep_logits, .. } = options;
        match self {
            Self::Cpu(loaded) => Ok(cpu_executor(CpuOptions {
                spec,
                weights,
                loaded: loaded.clone(),
                adapters,
                gpu_loras,
                limits,
                swap_mode,
                threads,
                allowed_tokens,
                keep_logits,
            })?),
            #[cfg(feature = "cuda")]
            Self::Cuda(device) => Ok(device.executor(CudaOptions {
                spec,
                weights,
                adapters,
                gpu_loras,
                limits,
                swap_mode,
                allowed_tokens,
                keep_logits,
                graphs: true,
            })?),
        }
    }
}
