//! Embedding, norms and activations over rows.

use crate::error::ensure;
use crate::memory::{View, ViewMut};
use crate::module::{Function, Grid, Module, arguments};
use crate::stream::Stream;
use crate::{CudaError, Device, bf16};

/// The widest row that a norm takes.
pub const WIDEST_NORM: usize = 2 * 8 * 1024;

/// The loaded kernels. Widths are multiples of 8.
#[derive(Debug)]
pub struct Elementwise {
    embed: Function,
    add_positions: Function,
    rms_norm: Function,
    layer_norm: Function,
    silu_mul: Function,
    relu: Function,
    gather: Function,
}

impl Elementwise {
    /// Loads the kernels.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/elementwise.fatbin"));
        let module = Module::load(device.context(), IMAGE)?;
        Ok(Self {
            embed: module.function("embed")?,
            add_positions: module.function("add_positions")?,
            rms_norm: module.function("rms_norm")?,
            layer_norm: module.function("layer_norm")?,
            silu_mul: module.function("silu_mul")?,
            relu: module.function("relu")?,
            gather: module.function("gather")?,
        })
    }

    /// `out[i] = table[token of row i]`; `table` is `[vocab, width]`, `out` `[n, width]`.
    pub fn embed(
        &self,
        stream: &Stream,
        n: usize,
        width: usize,
        tokens: View<'_, u32>,
        table: View<'_, bf16>,
        out: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        check_width("embed", width)?;
        ensure!("embed", tokens.len() >= n && out.len() >= n * width, "{n} rows of {width} do not fit");
        let (vocab, width) = ((table.len() / width) as u32, width as u32);
        // The first of a step: there is nothing to overlap with.
        // SAFETY: the parameters are the kernel's; ids are bounded by the table in the kernel.
        unsafe {
            stream.launch(
                &self.embed,
                rows(n, width as usize),
                arguments![tokens.address(), table.address(), out.address(), width, vocab],
            )
        }
    }

    /// `x[i] += table[position of row i + offset]`; `x` is `[n, width]`.
    #[expect(clippy::too_many_arguments, reason = "a launch")]
    pub fn add_positions(
        &self,
        stream: &Stream,
        n: usize,
        width: usize,
        offset: usize,
        positions: View<'_, u32>,
        table: View<'_, bf16>,
        x: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        check_width("add_positions", width)?;
        ensure!(
            "add_positions",
            positions.len() >= n && x.len() >= n * width,
            "{n} rows of {width} do not fit"
        );
        let (grid, width, offset) = (rows(n, width), width as u32, offset as u32);
        // SAFETY: the parameters are the kernel's; positions are below the table's rows by the batch's checks.
        unsafe {
            stream.launch_next(
                &self.add_positions,
                grid,
                arguments![positions.address(), table.address(), x.address(), width, offset],
            )
        }
    }

    /// `out = x / sqrt(mean(x²) + eps) · weight` by row; `x` and `out` are `[n, width]`.
    pub fn rms_norm(
        &self,
        stream: &Stream,
        n: usize,
        eps: f32,
        weight: View<'_, bf16>,
        x: View<'_, f32>,
        out: ViewMut<'_, bf16>,
    ) -> Result<(), CudaError> {
        let width = weight.len();
        check_norm("rms_norm", n, width, x.len(), out.len())?;
        let (grid, width) = (norm_rows(n, width), width as u32);
        // SAFETY: the parameters are the kernel's, and the buffers hold the rows.
        unsafe {
            stream.launch_next(
                &self.rms_norm,
                grid,
                arguments![x.address(), weight.address(), out.address(), width, eps],
            )
        }
    }

    /// `out = (x − mean) / sqrt(variance + eps) · weight + bias` by row; `x` and `out` are `[n, width]`.
    #[expect(clippy::too_many_arguments, reason = "a launch")]
    pub fn layer_norm(
        &self,
        stream: &Stream,
        n: usize,
        eps: f32,
        weight: View<'_, bf16>,
        bias: View<'_, bf16>,
        x: View<'_, f32>,
        out: ViewMut<'_, bf16>,
    ) -> Result<(), CudaError> {
        let width = weight.len();
        check_norm("layer_norm", n, width, x.len(), out.len())?;
        ensure!("layer_norm", bias.len() == width, "{} biases for {width} weights", bias.len());
        let (grid, width) = (norm_rows(n, width), width as u32);
        // SAFETY: the parameters are the kernel's, and the buffers hold the rows.
        unsafe {
            stream.launch_next(
                &self.layer_norm,
                grid,
                arguments![x.address(), weight.address(), bias.address(), out.address(), width, eps],
            )
        }
    }

    /// `out = silu(gate) · up`; `gate_up` is `[n, 2 · width]`, gate first; `out` is `[n, width]`.
    pub fn silu_mul(
        &self,
        stream: &Stream,
        n: usize,
        width: usize,
        gate_up: View<'_, bf16>,
        out: ViewMut<'_, bf16>,
    ) -> Result<(), CudaError> {
        check_width("silu_mul", width)?;
        ensure!(
            "silu_mul",
            gate_up.len() >= 2 * n * width && out.len() >= n * width,
            "{n} rows of {width} do not fit"
        );
        let groups = (width / 8) as u32;
        let threads = groups.min(256).next_multiple_of(32);
        let grid = Grid::new((groups.div_ceil(threads), n as u32, 1), threads);
        // SAFETY: the parameters are the kernel's, and the buffers hold the rows.
        unsafe {
            stream.launch_next(
                &self.silu_mul,
                grid,
                arguments![gate_up.address(), out.address(), width as u32],
            )
        }
    }

    /// `x = max(x, 0)`, `[n, width]`.
    pub fn relu(
        &self,
        stream: &Stream,
        n: usize,
        width: usize,
        x: ViewMut<'_, bf16>,
    ) -> Result<(), CudaError> {
        check_width("relu", width)?;
        ensure!("relu", x.len() >= n * width, "{n} rows of {width} do not fit");
        let groups = (n * width / 8) as u32;
        let grid = Grid::new((groups.div_ceil(256), 1, 1), 256);
        // SAFETY: the parameters are the kernel's, and the buffer holds the rows.
        unsafe { stream.launch_next(&self.relu, grid, arguments![x.address(), groups]) }
    }

    /// `out[j] = x[rows[j]]` for `n` rows of `width`.
    pub fn gather(
        &self,
        stream: &Stream,
        n: usize,
        width: usize,
        which: View<'_, u32>,
        x: View<'_, f32>,
        out: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        check_width("gather", width)?;
        ensure!("gather", which.len() >= n && out.len() >= n * width, "{n} rows of {width} do not fit");
        // SAFETY: the parameters are the kernel's; row numbers are below the batch's rows.
        unsafe {
            stream.launch_next(
                &self.gather,
                rows(n, width),
                arguments![which.address(), x.address(), out.address(), width as u32],
            )
        }
    }
}

/// A block a row for a norm, of which a thread keeps two groups of 8 elements. Smaller blocks find room beside a
/// product that still runs.
fn norm_rows(n: usize, width: usize) -> Grid {
    Grid::new((n as u32, 1, 1), width.div_ceil(16).next_multiple_of(32) as u32)
}

/// A block a row, a thread for every 8 elements as far as a block goes.
fn rows(n: usize, width: usize) -> Grid {
    let threads = (width / 8).min(512).next_multiple_of(32) as u32;
    Grid::new((n as u32, 1, 1), threads)
}

fn check_width(kernel: &'static str, width: usize) -> Result<(), CudaError> {
    ensure!(kernel, width > 0 && width.is_multiple_of(8), "a width of {width} is not a multiple of 8");
    Ok(())
}

fn check_norm(kernel: &'static str, n: usize, width: usize, x: usize, out: usize) -> Result<(), CudaError> {
    check_width(kernel, width)?;
    ensure!(kernel, width <= WIDEST_NORM, "rows of {width} elements: {WIDEST_NORM} at most");
    ensure!(kernel, x >= n * width && out >= n * width, "{n} rows of {width} do not fit");
    Ok(())
}
