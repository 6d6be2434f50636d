//! What holds an adapter's matrices on the host: memory that suits the device that copies it.

use std::io::Read;
use std::ops::Range;

#[cfg(feature = "cuda")]
use half::slice::HalfFloatSliceExt;

use super::layout::AdapterLayout;
use crate::engine::model::Uniform;

/// An adapter's matrices, laid out by its [`AdapterLayout`].
#[derive(Debug)]
pub enum Slab {
    /// f32, for the CPU executor.
    F32(Vec<f32>),
    /// bf16 in ordinary memory.
    #[cfg(feature = "cuda")]
    Pageable(Vec<half::bf16>),
    /// bf16 in page-locked memory.
    #[cfg(feature = "cuda")]
    Pinned(lora_kernels::PinnedBuffer<half::bf16>),
}

impl Slab {
    /// Bytes.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::F32(values) => size_of_val(values.as_slice()) as u64,
            #[cfg(feature = "cuda")]
            Self::Pageable(values) => size_of_val(values.as_slice()) as u64,
            #[cfg(feature = "cuda")]
            Self::Pinned(values) => size_of_val(&**values) as u64,
        }
    }

    /// The bytes, in this machine's order.
    pub(super) fn as_bytes(&self) -> &[u8] {
        match self {
            Self::F32(values) => bytemuck::cast_slice(values),
            #[cfg(feature = "cuda")]
            Self::Pageable(values) => bytemuck::cast_slice(values.reinterpret_cast()),
            #[cfg(feature = "cuda")]
            Self::Pinned(values) => bytemuck::cast_slice((**values).reinterpret_cast()),
        }
    }

    /// The values of a slab in f32.
    ///
    /// # Panics
    /// If it is of another format: an executor was given the pool of another device.
    pub fn f32(&self) -> &[f32] {
        match self {
            Self::F32(values) => values,
            #[cfg(feature = "cuda")]
            _ => panic!("the pool's slabs are not f32"),
        }
    }
}

/// Makes slabs in the memory and number format that a device copies from.
pub trait SlabMaker: std::fmt::Debug + Send + Sync {
    /// Bytes of one element.
    fn element_bytes(&self) -> u64;

    /// A slab of `values`.
    ///
    /// # Errors
    /// If there is no memory for it.
    fn hold(&self, values: Vec<f32>) -> Result<Slab, String>;

    /// A slab of `elements` read from `from`, which has the bytes of one of the same format.
    ///
    /// # Errors
    /// If there is no memory for it, or reading fails.
    fn read(&self, elements: usize, from: &mut dyn Read) -> Result<Slab, String>;

    /// A slab of `elements` whose parts are drawn.
    ///
    /// # Errors
    /// If there is no memory for it, or the device fails.
    fn draw(&self, elements: usize, parts: &[(Range<usize>, Uniform)]) -> Result<Slab, String>;
}

/// Slabs of the CPU executor: f32 in ordinary memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostSlabs;

impl SlabMaker for HostSlabs {
    fn element_bytes(&self) -> u64 {
        size_of::<f32>() as u64
    }

    fn hold(&self, values: Vec<f32>) -> Result<Slab, String> {
        Ok(Slab::F32(values))
    }

    fn read(&self, elements: usize, from: &mut dyn Read) -> Result<Slab, String> {
        let mut values = vec![0.0f32; elements];
        from.read_exact(bytemuck::cast_slice_mut(&mut values)).map_err(|e| e.to_string())?;
        Ok(Slab::F32(values))
    }

    fn draw(&self, elements: usize, parts: &[(Range<usize>, Uniform)]) -> Result<Slab, String> {
        let mut values = vec![0.0; elements];
        for (range, from) in parts {
            from.fill(&mut values[range.clone()]);
        }
        Ok(Slab::F32(values))
    }
}

/// How the parts of a generated adapter are drawn: one stream after the other, in the slab's order.
pub(super) fn drawn_parts(
    layout: &AdapterLayout,
    stream: Uniform,
    bounds: impl Fn(usize, usize) -> (f32, f32),
) -> Vec<(Range<usize>, Uniform)> {
    let mut parts = Vec::with_capacity(2 * layout.parts().len());
    for part in layout.parts().iter().flatten() {
        let (a, b) = bounds(part.inputs, layout.rank());
        let middle = part.offset + layout.rank() * part.inputs;
        let end = middle + layout.rank() * part.outputs;
        parts.push((part.offset..middle, Uniform { skip: part.offset, bound: a, ..stream }));
        parts.push((middle..end, Uniform { skip: middle, bound: b, ..stream }));
    }
    parts
}
