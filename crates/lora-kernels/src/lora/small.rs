//! Small segments: a shrink that reads each adapter once, and expands of its sums.

use std::marker::PhantomData;

use half::bf16;

use super::layout::{RawTargets, SMALL_ROWS, Target};
use super::scratch::small_splits;
use super::{ByOut, Call, Lora, LoraScratch, LoraStep, NAME, Out, UNIT, rank_pitch};
use crate::error::ensure;
use crate::memory::{View, ViewMut};
use crate::module::{Function, Grid, Module, arguments};
use crate::stream::Stream;
use crate::{CudaError, Device};

/// Columns and ranks of the expand's tile.
const COLUMNS: usize = 256;
const TILE_RANKS: usize = 64;
const SHRINK_THREADS: u32 = 256;
const EXPAND_THREADS: u32 = 128;

/// `GemmSmallShrink` of `cuda/gemm_small.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawShrink {
    segments: u64,
    count: u64,
    partial: u64,
    targets: RawTargets,
    target_count: u32,
    pitch: u32,
}

/// The shrink of a step's small segments, for a product of the same input to do:
/// [`Gemm::run_with_shrink`](crate::Gemm::run_with_shrink). It reads A as if its rows were further rows of the weight, which
/// takes their bytes' time and no kernel's.
#[derive(Debug)]
pub struct Shrink<'a> {
    pub(crate) raw: RawShrink,
    /// Rows of A, of all segments, at most.
    pub(crate) rows: usize,
    /// Slices of the inputs that there is room for.
    pub(crate) most_slices: usize,
    /// The input: rows, their width, and its address.
    pub(crate) x: (usize, usize, u64),
    of: PhantomData<&'a LoraScratch>,
}

impl<'a> Shrink<'a> {
    /// That of `targets`, which share the input `x` `[rows, inputs]`.
    ///
    /// # Errors
    /// As [`Lora::apply`].
    pub fn new(
        scratch: &'a mut LoraScratch,
        step: &LoraStep<'a>,
        targets: &[Target],
        inputs: usize,
        x: View<'_, bf16>,
    ) -> Result<Self, CudaError> {
        super::check_inputs(scratch.limits(), step, targets, inputs, x)?;
        let (bound, pitch) = (step.small.len(), rank_pitch(step.max_rank));
        ensure!(NAME, bound > 0, "a step without small segments has no shrink for a product to do");
        let rows = bound * targets.len() * pitch;
        let sums = slice_sums(step, targets.len(), pitch);
        let raw = RawShrink {
            segments: step.small.address(),
            count: step.small_count.address(),
            partial: scratch.partial(),
            targets: RawTargets::new(targets),
            target_count: targets.len() as u32,
            pitch: pitch as u32,
        };
        let most_slices = scratch.partials() / sums;
        Ok(Self { raw, rows, most_slices, x: (x.len() / inputs, inputs, x.address()), of: PhantomData })
    }
}

/// Sums that a shrink leaves over one part of the inputs.
fn slice_sums(step: &LoraStep<'_>, targets: usize, pitch: usize) -> usize {
    step.small.len() * targets * SMALL_ROWS * pitch
}

/// The loaded kernels.
#[derive(Clone, Debug)]
pub(super) struct Small {
    shrink: Function,
    expand: ByOut,
    expand_silu_mul: Function,
}

impl Small {
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/lora_small.fatbin"));
        let module = Module::load(device.context(), IMAGE)?;
        Ok(Self {
            shrink: module.function("lora_shrink_small")?,
            expand: ByOut {
                bf16: module.function("lora_expand_small_bf16")?,
                f32: module.function("lora_expand_small_f32")?,
            },
            expand_silu_mul: module.function("lora_expand_silu_mul_small")?,
        })
    }
}

impl Lora {
    /// Rows at most of [`Lora::apply_silu_mul_small`], whose blocks have a row each: of more, reading an adapter's
    /// matrices again for every row takes longer than a kernel of its own for SiLU.
    pub const MOST_SILU_ROWS: usize = 32;

    /// Adds the small segments' products.
    pub(super) fn small(
        &self,
        stream: &Stream,
        scratch: &mut LoraScratch,
        step: &LoraStep<'_>,
        call: &Call,
        out: &Out<'_>,
    ) -> Result<(), CudaError> {
        let splits = self.shrunk(stream, scratch, step, call)?;
        let shared = call.pitch.min(TILE_RANKS) * COLUMNS * size_of::<bf16>()
            + call.pitch * SMALL_ROWS * size_of::<f32>();
        let blocks = (call.widest.div_ceil(COLUMNS) as u32, call.targets as u32, step.small.len() as u32);
        let grid = Grid { blocks, threads: EXPAND_THREADS, shared: shared as u32 };
        let (segments, count) = (step.small.address(), step.small_count.address());
        let (inputs, width, pitch) = (call.inputs as u32, call.width as u32, call.pitch as u32);
        let (partial, out_at) = (scratch.partial(), out.address());
        // SAFETY: the kernel's parameters, in order; `Call::new` has seen that the views hold what it reads and that the
        // scratch memory holds `[bound, targets, splits, 16, pitch]` sums; the output holds every target's columns in
        // every row.
        unsafe {
            stream.launch_after(
                self.small.expand.get(out),
                grid,
                arguments![segments, count, call.raw, inputs, splits, pitch, partial, out_at, width],
                self.overlap,
            )
        }
    }

    /// Makes sure that there are sums over parts of the inputs in the scratch memory; how many parts.
    fn shrunk(
        &self,
        stream: &Stream,
        scratch: &mut LoraScratch,
        step: &LoraStep<'_>,
        call: &Call,
    ) -> Result<u32, CudaError> {
        let Some(slices) = step.shrunk else { return self.shrink_small(stream, scratch, step, call) };
        let sums = slices as usize * slice_sums(step, call.targets, call.pitch);
        ensure!(NAME, sums <= scratch.partials(), "a shrink in {slices} slices: {sums} sums");
        Ok(slices)
    }

    /// Sums over parts of the inputs, in the scratch memory; how many parts.
    fn shrink_small(
        &self,
        stream: &Stream,
        scratch: &mut LoraScratch,
        step: &LoraStep<'_>,
        call: &Call,
    ) -> Result<u32, CudaError> {
        let bound = step.small.len();
        let (split_steps, splits) = small_splits(call.inputs, call.targets, bound);
        let rank_tiles = call.pitch / UNIT;
        let (segments, count) = (step.small.address(), step.small_count.address());
        let (inputs, pitch, partial) = (call.inputs as u32, call.pitch as u32, scratch.partial());
        let grid =
            Grid::new((splits as u32, (call.targets * rank_tiles) as u32, bound as u32), SHRINK_THREADS);
        let (split_steps, rank_tiles) = (split_steps as u32, rank_tiles as u32);
        // SAFETY: as in `small`.
        unsafe {
            stream.launch_next(
                &self.small.shrink,
                grid,
                arguments![
                    segments,
                    count,
                    call.raw,
                    call.x,
                    inputs,
                    split_steps,
                    rank_tiles,
                    pitch,
                    partial
                ],
            )?;
        }
        Ok(splits as u32)
    }

    /// [`Lora::apply`] of a step of small segments to `gate_up` `[rows, 2 · width]`, and then `act = silu(gate) · up`,
    /// `[rows, width]`, of all of x's rows: to the bit what the two are one after the other. `targets` are gate and up.
    /// `gate_up` is left as it was.
    ///
    /// # Errors
    /// As [`Lora::apply`]; or if targets are not the halves of `gate_up`, there are more than
    /// [`Lora::MOST_SILU_ROWS`] rows, or the step has no small segments or has others.
    #[expect(clippy::too_many_arguments, reason = "a launch")]
    pub fn apply_silu_mul_small(
        &self,
        stream: &Stream,
        scratch: &mut LoraScratch,
        step: &LoraStep<'_>,
        targets: &[Target],
        inputs: usize,
        x: View<'_, bf16>,
        gate_up: ViewMut<'_, bf16>,
        act: ViewMut<'_, bf16>,
    ) -> Result<(), CudaError> {
        let width = super::halves(targets)?;
        let (from, out) = (gate_up.address(), Out::Bf16(gate_up));
        let call = Call::new(scratch.limits(), step, targets, inputs, x, 2 * width, &out)?;
        super::check_act(&act, call.rows, width)?;
        ensure!(
            NAME,
            !step.small.is_empty() && step.tiles.is_empty(),
            "{} small segments and {} tiles: small ones alone are expanded so",
            step.small.len(),
            step.tiles.len()
        );
        ensure!(
            NAME,
            (1..=Self::MOST_SILU_ROWS).contains(&call.rows),
            "{} rows: 1 to {} are expanded together with SiLU",
            call.rows,
            Self::MOST_SILU_ROWS
        );
        let splits = self.shrunk(stream, scratch, step, &call)?;
        let grid = Grid::new((width.div_ceil(COLUMNS) as u32, call.rows as u32, 1), EXPAND_THREADS);
        let (segments, count) = (step.small.address(), step.small_count.address());
        let (inputs, pitch, partial) = (call.inputs as u32, call.pitch as u32, scratch.partial());
        let (act, width) = (act.address(), width as u32);
        // SAFETY: as in `small`; the activations hold every row.
        unsafe {
            stream.launch_after(
                &self.small.expand_silu_mul,
                grid,
                arguments![segments, count, call.raw, inputs, splits, pitch, partial, from, act, width],
                self.overlap,
            )
        }
    }
}
