//! Host copies of adapters, in bf16.

use std::io::Read;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use half::bf16;
use half::slice::HalfFloatSliceExt;
use lora_kernels::{CudaError, Device, DeviceBuffer, Draw, Stream};

use crate::engine::adapters::{Slab, SlabMaker};
use crate::engine::model::Uniform;
use crate::engine::setup::HostMemory;

/// Makes slabs in page-locked or ordinary memory; dummy ones are drawn by the device.
pub(super) struct CudaSlabs {
    device: Device,
    memory: HostMemory,
    drawing: Mutex<Drawing>,
}

struct Drawing {
    stream: Stream,
    draw: Draw,
    /// Where an adapter is drawn before it goes to the host; made with the first one.
    staging: Option<DeviceBuffer<bf16>>,
}

impl std::fmt::Debug for CudaSlabs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CudaSlabs").field("memory", &self.memory).finish_non_exhaustive()
    }
}

impl CudaSlabs {
    pub fn new(device: &Device, memory: HostMemory) -> Result<Self, CudaError> {
        let drawing = Drawing { stream: device.stream()?, draw: Draw::load(device)?, staging: None };
        Ok(Self { device: device.clone(), memory, drawing: Mutex::new(drawing) })
    }

    /// A slab of `elements` that `fill` writes.
    fn slab(
        &self,
        elements: usize,
        fill: impl FnOnce(&mut [bf16]) -> Result<(), String>,
    ) -> Result<Slab, String> {
        match self.memory {
            HostMemory::Pinned => {
                let mut pinned = self.device.pinned(elements).map_err(|e| e.to_string())?;
                fill(&mut pinned)?;
                Ok(Slab::Pinned(pinned))
            }
            HostMemory::Pageable => {
                let mut values = vec![bf16::ZERO; elements];
                fill(&mut values)?;
                Ok(Slab::Pageable(values))
            }
        }
    }

    fn draw_into(&self, parts: &[(Range<usize>, Uniform)], out: &mut [bf16]) -> Result<(), CudaError> {
        let mut drawing = self.drawing.lock().unwrap_or_else(PoisonError::into_inner);
        let Drawing { stream, draw, staging } = &mut *drawing;
        stream.bind()?;
        if staging.as_ref().is_none_or(|s| s.len() < out.len()) {
            *staging = Some(self.device.buffer(out.len())?);
        }
        let Some(staging) = staging else { return Ok(()) };
        for (range, from) in parts {
            draw.fill(stream, &on_device(from), staging.view_mut().slice(range.clone()))?;
        }
        staging.download(stream, out)
    }
}

/// The kernels' name for the same stream.
pub(super) fn on_device(from: &Uniform) -> lora_kernels::Uniform {
    let Uniform { key, skip, bound, centre } = *from;
    lora_kernels::Uniform { key, skip, bound, centre }
}

impl SlabMaker for CudaSlabs {
    fn element_bytes(&self) -> u64 {
        size_of::<bf16>() as u64
    }

    fn hold(&self, values: Vec<f32>) -> Result<Slab, String> {
        self.slab(values.len(), |out| {
            out.iter_mut().zip(&values).for_each(|(to, from)| *to = bf16::from_f32(*from));
            Ok(())
        })
    }

    fn read(&self, elements: usize, from: &mut dyn Read) -> Result<Slab, String> {
        self.slab(elements, |out| {
            let bytes = bytemuck::cast_slice_mut(out.reinterpret_cast_mut());
            from.read_exact(bytes).map_err(|e| e.to_string())
        })
    }

    fn draw(&self, elements: usize, parts: &[(Range<usize>, Uniform)]) -> Result<Slab, String> {
        self.slab(elements, |out| self.draw_into(parts, out).map_err(|e| e.to_string()))
    }
}
