//! The executor of a GPU.

use std::sync::{Arc, Mutex, PoisonError};

use lora_kernels::{Choices, CudaError, Device};
use lora_sched::SwapMode;

use super::backend::{BackendParts, CudaBackend, CudaStepError};
use super::copier;
use super::slabs::CudaSlabs;
use super::slots::CudaSlots;
use crate::engine::adapters::{HostPool, SlabMaker};
use crate::engine::backend::BackendShape;
use crate::engine::batch::BatchLimits;
use crate::engine::device::{Burst, Ceilings, Compute, DeviceExecutor, LoadedModel, Parts, check_options};
use crate::engine::model::{Decoder, ModelSpec, WeightError, Weights};
use crate::engine::setup::HostMemory;
use crate::engine::watch::Watch;
use crate::report::machine::Gpu;

/// An open GPU, with the weights that were loaded onto it.
#[derive(Debug)]
pub struct CudaDevice {
    device: Device,
    /// Bytes that were free when it was opened.
    free: u64,
    loaded: LoadedModel<CudaBackend>,
    /// How its products are computed: timed once for all executors that follow one another.
    choices: Mutex<Choices>,
}

/// What a GPU executor is made with.
pub struct CudaOptions {
    /// The model's shape.
    pub spec: ModelSpec,
    /// Its weights.
    pub weights: Weights,
    /// The adapters, in this device's slabs; slots are sized for the pool's largest rank.
    pub adapters: Arc<HostPool>,
    /// Slots.
    pub gpu_loras: usize,
    /// The largest step.
    pub limits: BatchLimits,
    /// The order of copies.
    pub swap_mode: SwapMode,
    /// Which token ids may be sampled, `[vocab]`; none allows all.
    pub allowed_tokens: Option<Vec<bool>>,
    /// Keep each step's logits for [`DeviceExecutor::logits`]: for tests and calibration.
    pub keep_logits: bool,
    /// Record steps as graphs. Without, all are launched kernel by kernel, with the same results: to compare with.
    pub graphs: bool,
}

/// An executor that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CudaStartError {
    /// The device.
    #[error(transparent)]
    Device(#[from] CudaError),
    /// A first step.
    #[error(transparent)]
    Step(#[from] CudaStepError),
    /// The weights.
    #[error(transparent)]
    Weights(#[from] WeightError),
    /// A model that the kernels are not made for.
    #[error("{0}")]
    Options(String),
    /// A thread could not be started.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
}

impl CudaStartError {
    /// Whether there simply is no GPU, or no driver for one.
    pub fn is_absence(&self) -> bool {
        matches!(self, Self::Device(CudaError::Missing { .. } | CudaError::NoDevice { .. }))
    }
}

impl CudaDevice {
    /// Opens the first GPU.
    ///
    /// # Errors
    /// If there is none, or it cannot be used.
    pub fn open() -> Result<Self, CudaStartError> {
        let device = Device::open(0)?;
        let (free, _) = device.memory()?;
        Ok(Self { device, free, loaded: LoadedModel::default(), choices: Mutex::default() })
    }

    /// In words.
    pub fn said(&self) -> String {
        let info = self.device.info();
        format!(
            "{} ({}), {:.1} GB, driver CUDA {}.{}",
            info.name,
            info.uuid,
            info.memory as f64 * 1e-9,
            info.driver / 1000,
            info.driver % 1000 / 10
        )
    }

    /// For manifests.
    pub fn gpu(&self) -> Gpu {
        let info = self.device.info();
        Gpu {
            name: info.name.clone(),
            uuid: Some(info.uuid.clone()),
            driver: std::fs::read_to_string("/sys/module/nvidia/version").ok().map(|v| v.trim().to_owned()),
            cuda: Some(format!("{}.{}", info.driver / 1000, info.driver % 1000 / 10)),
            memory_bytes: Some(info.memory),
        }
    }

    /// Bytes that an engine may use under a share of the device's memory.
    pub fn usable(&self, share: f64) -> u64 {
        ((self.device.info().memory as f64 * share) as u64).min(self.free)
    }

    /// Bytes that are free now, as the driver says: of the whole GPU, whoever uses it.
    ///
    /// # Errors
    /// If the device fails.
    pub fn free_memory(&self) -> Result<u64, CudaStartError> {
        Ok(self.device.memory()?.0)
    }

    /// What it can do at best, measured now.
    ///
    /// # Errors
    /// If the device fails.
    pub fn ceilings(&self) -> Result<Ceilings, CudaStartError> {
        let measured = lora_kernels::ceilings(&self.device)?;
        Ok(Ceilings {
            gemm_flops: measured.gemm_flops,
            gemm_sustained_flops: Some(measured.gemm_sustained_flops),
            gemm_from_idle: Some(
                measured
                    .gemm_from_idle
                    .map(|burst| Burst { operations: burst.operations, seconds: burst.seconds }),
            ),
            read_bytes_s: measured.read_bytes_s,
            pinned_bytes_s: measured.pinned_bytes_s,
            pageable_bytes_s: measured.pageable_bytes_s,
        })
    }

    /// What makes the slabs that swaps are copied from.
    ///
    /// # Errors
    /// If the device fails.
    pub fn slabs(&self, memory: HostMemory) -> Result<Arc<dyn SlabMaker>, CudaStartError> {
        Ok(Arc::new(CudaSlabs::new(&self.device, memory)?))
    }

    /// Allocates everything, loads the weights, records the graphs and starts the threads.
    ///
    /// # Errors
    /// If the weights cannot be read, the model is not one that the kernels take, or the device fails.
    pub fn executor(&self, options: CudaOptions) -> Result<DeviceExecutor, CudaStartError> {
        check(&options)?;
        let CudaOptions { spec, weights, adapters, gpu_loras, limits, swap_mode, keep_logits, .. } = options;
        let (device, vocab, max_rank) = (&self.device, spec.vocab_size, adapters.max_rank());
        let steps_wait = swap_mode == SwapMode::Layered;
        let watch = Watch::of_machine();
        let slots = Arc::new(CudaSlots::new(device, &spec, max_rank, gpu_loras, steps_wait, watch)?);
        let parts = BackendParts {
            device: device.clone(),
            slots: Arc::clone(&slots),
            max_rank,
            allowed: options.allowed_tokens,
        };
        let mut backend = CudaBackend::new(BackendShape { spec: spec.clone(), limits }, parts)?;
        let model = self.loaded.get(&mut backend, &spec, &weights)?;
        let mut decoder = Decoder::new(&mut backend, model, &spec, &super::shape::padded(&limits))?;
        backend.choose(&decoder, &mut self.choices.lock().unwrap_or_else(PoisonError::into_inner))?;
        if options.graphs {
            backend.record(&mut decoder)?;
        }
        let compute = Compute { backend, decoder, vocab, keep_logits, watch };
        Ok(DeviceExecutor::start(Parts {
            device: "cuda",
            vocab,
            adapters,
            limits,
            swap_mode,
            keep_logits,
            watch,
            compute: Box::new(move |inbox, reports| compute.run(inbox, reports)),
            copy: {
                let slots = Arc::clone(&slots);
                Box::new(move |queue, reports| copier::run(queue, &slots, reports, watch))
            },
            slots,
        })?)
    }
}

fn check(options: &CudaOptions) -> Result<(), CudaStartError> {
    let (spec, limits) = (&options.spec, &options.limits);
    let fail = |what: String| Err(CudaStartError::Options(what));
    if ![32, 64, 128].contains(&spec.head_dim) {
        return fail(format!(
            "{}: heads of {} are not among those that the GPU kernels take (32, 64, 128); use --device cpu",
            spec.name, spec.head_dim
        ));
    }
    if let Some(module) = spec.modules().iter().find(|m| m.inputs % 8 != 0 || m.outputs % 8 != 0) {
        return fail(format!(
            "{}: {} is {} by {}; the GPU kernels take widths that are multiples of 8; use --device cpu",
            spec.name, module.name, module.outputs, module.inputs
        ));
    }
    check_options(spec, limits, options.allowed_tokens.as_deref()).map_err(CudaStartError::Options)
}
