//! Memory between a shrink and its expand.

use half::bf16;

use super::large::GROUP_UNITS;
use super::layout::{SMALL_ROWS, TARGETS, TILE_ROWS};
use super::{MAX_RANK, UNIT};
use crate::error::ensure;
use crate::memory::DeviceBuffer;
use crate::stream::Stream;
use crate::{CudaError, Device};

/// Blocks of a shrink that fill a large chip: two on each of an H100's 132 multiprocessors.
pub(super) const FULL_CHIP: usize = 264;
/// Blocks of the large shrink at most where its inputs are split and their sums go through this memory.
pub(super) const LARGE_PARTS: usize = FULL_CHIP;
/// Sums of a block of the large shrink.
pub(super) const PARTIAL_BLOCK: usize = TILE_ROWS * GROUP_UNITS * UNIT;
/// Inputs of a warp's step in the small shrink.
const SMALL_STEP: usize = 32;
/// Steps of a block that keep each of its 8 warps on whole lines.
const SMALL_ROUND: usize = 16;
/// Splits of the small shrink at most: each expanding block adds them up again.
const MAX_SMALL_SPLITS: usize = 16;

/// What scratch memory is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoraLimits {
    /// Rows of a batch with large segments.
    pub max_rows: usize,
    /// Small segments.
    pub max_small: usize,
    /// The largest rank: 1 to 128.
    pub max_rank: usize,
}

impl LoraLimits {
    fn partials(&self) -> usize {
        // Small splits fill the chip once, or there is one split a target: see `small_splits`.
        let small = (FULL_CHIP + self.max_small * TARGETS) * SMALL_ROWS * rank_pitch(self.max_rank);
        small.max(LARGE_PARTS * PARTIAL_BLOCK)
    }

    fn h(&self) -> usize {
        TARGETS * self.max_rows * rank_pitch(self.max_rank)
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.partials() * size_of::<f32>() + self.h() * size_of::<bf16>() + LARGE_PARTS * size_of::<u32>()
    }
}

/// Scratch memory of [`super::Lora::apply`], for one stream at a time.
#[derive(Debug)]
pub struct LoraScratch {
    limits: LoraLimits,
    /// Sums over parts of the inputs.
    partial: DeviceBuffer<f32>,
    /// `[targets, rows, rank]` of large segments.
    h: DeviceBuffer<bf16>,
    /// How many blocks of a large tile have left their sums: zero between launches.
    arrived: DeviceBuffer<u32>,
}

impl LoraScratch {
    /// Allocates it.
    ///
    /// # Errors
    /// If the largest rank is not 1 to 128, or memory is short.
    pub fn new(device: &Device, limits: LoraLimits) -> Result<Self, CudaError> {
        let rank = limits.max_rank;
        ensure!(super::NAME, (1..=MAX_RANK).contains(&rank), "rank {rank}: 1 to {MAX_RANK} are supported");
        ensure!(
            super::NAME,
            limits.max_small <= u16::MAX as usize,
            "{} small segments: at most 65535",
            limits.max_small
        );
        Ok(Self {
            limits,
            partial: device.buffer(limits.partials())?,
            h: device.buffer(limits.h())?,
            arrived: device.buffer(LARGE_PARTS)?,
        })
    }

    /// What it was made for.
    pub fn limits(&self) -> &LoraLimits {
        &self.limits
    }

    /// Fills it with NaN and waits: whatever then reads a value that was not written shows it.
    pub fn poison(&mut self, stream: &Stream) -> Result<(), CudaError> {
        self.partial.upload(stream, &vec![f32::NAN; self.partial.len()])?;
        if self.h.is_empty() {
            return Ok(());
        }
        self.h.upload(stream, &vec![bf16::NAN; self.h.len()])
    }

    pub(super) fn partial(&mut self) -> u64 {
        self.partial.view_mut().address()
    }

    /// Sums that there is room for.
    pub(super) fn partials(&self) -> usize {
        self.partial.len()
    }

    pub(super) fn h(&mut self) -> u64 {
        self.h.view_mut().address()
    }

    pub(super) fn arrived(&mut self) -> u64 {
        self.arrived.view_mut().address()
    }
}

/// Elements between rows of h: the rank, padded to whole tensor-core products.
pub(super) fn rank_pitch(max_rank: usize) -> usize {
    max_rank.next_multiple_of(UNIT)
}

/// Steps of a block of the small shrink, and blocks that share a segment's inputs: as many as fill the chip.
pub(super) fn small_splits(inputs: usize, targets: usize, segments: usize) -> (usize, usize) {
    let steps = inputs.div_ceil(SMALL_STEP);
    let wanted = (steps * segments * targets).div_ceil(FULL_CHIP).max(steps.div_ceil(MAX_SMALL_SPLITS));
    let split_steps = wanted.next_multiple_of(SMALL_ROUND);
    (split_steps, steps.div_ceil(split_steps))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_small_shrinks_parts_fit_their_memory() {
        for inputs in [8, 64, 4096, 11008, 53248] {
            for targets in 1..=TARGETS {
                for segments in 1..=300 {
                    let (split_steps, splits) = small_splits(inputs, targets, segments);
                    let steps = inputs.div_ceil(SMALL_STEP);
                    assert!(split_steps * splits >= steps && split_steps * (splits - 1) < steps);
                    assert!(splits <= MAX_SMALL_SPLITS);
                    assert!(segments * targets * splits <= FULL_CHIP + segments * TARGETS);
                }
            }
        }
    }
}
