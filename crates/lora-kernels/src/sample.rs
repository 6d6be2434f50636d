//! Greedy sampling on the device.

use crate::error::ensure;
use crate::memory::{DeviceBuffer, View, ViewMut};
use crate::module::{Function, Grid, Module, arguments};
use crate::stream::Stream;
use crate::{CudaError, Device};

/// Blocks that share one row of logits.
const BLOCKS_PER_ROW: u32 = 8;
const THREADS: u32 = 512;

/// Takes the likeliest token of each row.
#[derive(Debug)]
pub struct Argmax {
    argmax_rows: Function,
    take_tokens: Function,
    /// `[rows]` packed best candidates, zero between steps.
    best: DeviceBuffer<u64>,
}

impl Argmax {
    /// Loads the kernels, for up to `rows` rows.
    pub fn load(device: &Device, rows: usize) -> Result<Self, CudaError> {
        const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/sample.fatbin"));
        let module = Module::load(device.context(), IMAGE)?;
        Ok(Self {
            argmax_rows: module.function("argmax_rows")?,
            take_tokens: module.function("take_tokens")?,
            best: device.buffer(rows)?,
        })
    }

    /// `ids[j]` is, for each of `n` rows of `logits` `[n, vocab]`, the likeliest id that `allowed` (a bit for each id) lets
    /// through, the lowest on ties.
    pub fn run(
        &mut self,
        stream: &Stream,
        n: usize,
        vocab: usize,
        logits: View<'_, f32>,
        allowed: Option<View<'_, u32>>,
        ids: ViewMut<'_, u32>,
    ) -> Result<(), CudaError> {
        ensure!("argmax", n <= self.best.len(), "{n} rows, {} at most", self.best.len());
        ensure!("argmax", logits.len() >= n * vocab, "{n} rows of {vocab} logits do not fit");
        ensure!("argmax", ids.len() >= n, "{n} tokens do not fit");
        let words = vocab.div_ceil(32);
        ensure!("argmax", allowed.is_none_or(|a| a.len() >= words), "a mask of fewer than {words} words");
        let best = self.best.view_mut().address();
        let mask = allowed.map_or(0, |a| a.address());
        let grid = Grid::new((BLOCKS_PER_ROW, n as u32, 1), THREADS);
        // SAFETY: the parameters are the kernel's, and the buffers hold the rows.
        unsafe {
            stream.launch_next(
                &self.argmax_rows,
                grid,
                arguments![logits.address(), mask, best, vocab as u32],
            )
        }?;
        let grid = Grid::new(((n as u32).div_ceil(32), 1, 1), 32);
        // SAFETY: the parameters are the kernel's, and the buffers hold the rows.
        unsafe { stream.launch_next(&self.take_tokens, grid, arguments![best, ids.address(), n as u32]) }
    }
}
