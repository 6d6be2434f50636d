//! Dummy values drawn on the device.

use crate::memory::ViewMut;
use crate::module::{Function, Grid, Module, arguments};
use crate::stream::Stream;
use crate::{CudaError, Device, bf16};

/// Values of one 64-byte block of the stream.
const PER_BLOCK: usize = 32;

/// A stream of values and where in it to begin.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Uniform {
    /// The ChaCha8 key.
    pub key: [u8; 32],
    /// Values of the stream to pass over.
    pub skip: usize,
    /// Values are uniform in ± this …
    pub bound: f32,
    /// … around this.
    pub centre: f32,
}

/// Draws values, 16 bits of randomness each, as a host that fills little-endian 16-bit integers from ChaCha8.
#[derive(Debug)]
pub struct Draw {
    draw: Function,
}

impl Draw {
    /// Loads the kernel.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/draw.fatbin"));
        Ok(Self { draw: Module::load(device.context(), IMAGE)?.function("draw")? })
    }

    /// Fills `out`.
    pub fn fill(&self, stream: &Stream, from: &Uniform, out: ViewMut<'_, bf16>) -> Result<(), CudaError> {
        if out.is_empty() {
            return Ok(());
        }
        let word = |i: usize| u32::from_le_bytes(std::array::from_fn(|b| from.key[4 * i + b]));
        let key: [u32; 8] = std::array::from_fn(word);
        let threads = 128;
        let blocks = (from.skip % PER_BLOCK + out.len()).div_ceil(PER_BLOCK).div_ceil(threads);
        let grid = Grid::new((blocks as u32, 1, 1), threads as u32);
        let scale = from.bound / 32_768.0;
        // SAFETY: the parameters are the kernel's, and the buffer holds the values.
        unsafe {
            stream.launch(
                &self.draw,
                grid,
                arguments![key, from.skip as u64, out.address(), out.len() as u64, scale, from.centre],
            )
        }
    }
}
