//! What the launches of a step are shaped by: rows rounded up, and bounds on what lies in the metadata.

use lora_kernels::{PREFILL_ROWS, SMALL_ROWS, TILE_ROWS};

use crate::engine::batch::{Batch, BatchLimits};
use crate::engine::model::narrows;
pub(super) use crate::profile::rounded_rows as rounded;

/// Every shape up to `rows`.
pub(super) fn shapes(rows: usize) -> Vec<usize> {
    let last = rounded(rows);
    let mut shapes = vec![1];
    while let Some(&shape) = shapes.last().filter(|s| **s < last) {
        shapes.push(rounded(shape + 1));
    }
    shapes
}

/// Limits with rows and sequences rounded up: what buffers are made for.
pub(super) fn padded(limits: &BatchLimits) -> BatchLimits {
    let seqs = rounded(limits.max_num_seqs);
    BatchLimits {
        max_num_seqs: seqs,
        max_num_batched_tokens: rounded(limits.max_num_batched_tokens).max(seqs),
        ..*limits
    }
}

/// Tiles of `tile` rows that `parts` parts of `rows` rows together make, at most.
pub(super) fn most_tiles(rows: usize, parts: usize, tile: usize) -> usize {
    // A part of l rows makes (l + tile - 1) / tile of them.
    if parts == 0 { 0 } else { (rows + parts.min(rows) * (tile - 1)) / tile }
}

/// Sizes that a step's launches are made for: bounds that a graph is recorded with, or a step's own. How many
/// there are of what is bounded here, kernels read from the metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct StepShape {
    /// Rows, of which those behind the batch's are padding.
    pub rows: usize,
    /// Rows that sample.
    pub samples: usize,
    /// Sequences.
    pub seqs: usize,
    /// Those of one row.
    pub singles: usize,
    /// The longest context among those: how their attention is split among blocks depends on it, and how much a
    /// longer one would take.
    pub longest: usize,
    /// Tiles of attention over sequences of several rows.
    pub attention_tiles: usize,
    /// Small segments.
    pub small: usize,
    /// Large segments.
    pub large: usize,
    /// Tiles of large segments.
    pub lora_tiles: usize,
    /// Segments of the rows that sample, where the [last layer's rest](narrows) is computed for them alone.
    pub sampled: usize,
    /// Covers of all rows, where there may be large segments.
    pub covers: usize,
}

/// What a batch consists of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Composition {
    pub rows: usize,
    /// Sequences of one row, which come first.
    pub singles: usize,
    /// The longest context among those.
    pub longest: usize,
    /// Sequences of several rows.
    pub chunks: usize,
    /// Whether some row has an adapter.
    pub adapted: bool,
    /// Rows of the largest [part](Part) of a segment that is of chunks.
    pub largest: usize,
}

impl Composition {
    pub fn of(batch: &Batch) -> Self {
        let singles = (0..batch.seqs()).take_while(|s| batch.seq_rows(*s).len() == 1).count();
        let parts = batch.segments.iter().flat_map(|s| parts(s.start, s.rows, singles as u32));
        Self {
            rows: batch.rows(),
            singles,
            longest: batch.contexts[..singles].iter().max().map_or(0, |c| *c as usize),
            chunks: batch.seqs() - singles,
            adapted: !batch.segments.is_empty(),
            largest: parts.filter(|p| p.chunks).map(|p| p.rows as usize).max().unwrap_or(0),
        }
    }
}

/// A part of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// First row.
    pub start: u32,
    /// Rows.
    pub rows: u32,
    /// Whether they are of sequences of several rows.
    pub chunks: bool,
}

/// Parts of a segment of `rows` rows from `start`: of single rows, which are the batch's first `singles`, as many
/// as a small segment takes; of chunks all.
///
/// So a step has no more parts of single rows than single rows, and no more of chunks than chunks.
pub(super) fn parts(start: u32, rows: u32, singles: u32) -> impl Iterator<Item = Part> {
    let (end, border) = (start + rows, singles.clamp(start, start + rows));
    let step = SMALL_ROWS as u32;
    let singles = (start..border).step_by(SMALL_ROWS);
    let singles = singles.map(move |at| Part { start: at, rows: step.min(border - at), chunks: false });
    let behind = Part { start: border, rows: end - border, chunks: true };
    singles.chain((border < end).then_some(behind))
}

impl StepShape {
    /// Whether a step of these sizes can be run by launches that are made for `self`. Too small a bound would
    /// leave work undone, without a word.
    pub fn holds(&self, own: &Self) -> bool {
        let bounds = |s: &Self| {
            [
                s.rows,
                s.samples,
                s.seqs,
                s.singles,
                s.longest,
                s.attention_tiles,
                s.small,
                s.large,
                s.lora_tiles,
                s.sampled,
                s.covers,
            ]
        };
        bounds(self).iter().zip(bounds(own)).all(|(bound, is)| is <= *bound)
    }

    /// Bounds for every step of up to `rows` rows, `singles` sequences of one row, `chunks` of several, and
    /// `seqs` in all. `small`, `large`: whether there may be such segments.
    pub fn bounds(
        rows: usize,
        singles: usize,
        longest: usize,
        chunks: usize,
        seqs: usize,
        (small, large): (bool, bool),
    ) -> Self {
        let seqs = seqs.min(singles + chunks);
        let adapted = small || large;
        let large = if large { chunks } else { 0 };
        Self {
            rows,
            samples: seqs,
            seqs,
            singles,
            longest,
            attention_tiles: most_tiles(rows, chunks, PREFILL_ROWS),
            small: if small { seqs } else { 0 },
            large,
            lora_tiles: most_tiles(rows, large, TILE_ROWS),
            sampled: if adapted && narrows(rows, seqs) { seqs } else { 0 },
            // Rows without a large segment between chunks are chunks too; single rows and padding are two parts more.
            covers: if large > 0 { most_tiles(rows, chunks + 2, TILE_ROWS) } else { 0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_batch_has_a_shape_and_every_shape_is_listed() {
        let shapes = shapes(4096);
        for rows in 1..=4096 {
            let shape = rounded(rows);
            assert!(shape >= rows && shapes.contains(&shape), "{rows} rows as {shape}");
            assert_eq!(rounded(shape), shape);
        }
        assert_eq!(shapes[..6], [1, 2, 4, 8, 16, 24]);
        assert_eq!(super::shapes(16), [1, 2, 4, 8, 16]);
    }

    #[test]
    fn no_parts_make_more_tiles_than_the_bound_and_some_make_as_many() {
        // All ways to part up to 40 rows in up to 4 parts, in tiles of 7.
        fn most(rows: usize, parts: usize, tile: usize) -> usize {
            let rest = |first: usize| first.div_ceil(tile) + most(rows - first, parts - 1, tile);
            if parts == 0 { 0 } else { (1..=rows).map(rest).max().unwrap_or(0) }
        }
        for rows in 0..40 {
            for parts in 0..=4 {
                let (bound, most) = (most_tiles(rows, parts, 7), most(rows, parts, 7));
                assert_eq!(bound, most, "{rows} rows in {parts} parts");
            }
        }
    }

    #[test]
    fn parts_of_single_rows_are_small_and_chunks_stay_whole() {
        let of = |start, rows, singles| {
            parts(start, rows, singles).map(|p| (p.start, p.rows, p.chunks)).collect::<Vec<_>>()
        };
        assert_eq!(of(3, 2, 20), [(3, 2, false)]);
        assert_eq!(of(0, 40, 40), [(0, 16, false), (16, 16, false), (32, 8, false)]);
        assert_eq!(of(10, 100, 30), [(10, 16, false), (26, 4, false), (30, 80, true)]);
        assert_eq!(of(30, 300, 30), [(30, 300, true)]);
        assert_eq!(of(30, 300, 0), [(30, 300, true)]);
    }
}
