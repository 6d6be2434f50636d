//! What the kernels read of a step: segments, targets and tiles, laid out as in `cuda/`.

use crate::memory::Element;

/// Rows of a small segment at most.
pub const SMALL_ROWS: usize = 16;
/// Rows of a tile of a large segment.
pub const TILE_ROWS: usize = 64;
/// Targets of a call at most.
pub(super) const TARGETS: usize = 3;

/// Consecutive rows that use one adapter; of a list of [`covers`], or none's.
///
/// The adapter's matrices lie in its slot in `[layer][module]` order, each adapted module `A [rank, inputs]`
/// and then `Bᵀ [rank, outputs]`, bf16, row-major, packed at the adapter's own rank.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Segment {
    /// The matrices' address, a multiple of 16; 0 in a cover of rows without an adapter.
    pub matrices: u64,
    /// The address of `i32 [layers * modules]`, where each module's part begins in units of 8 elements, or -1
    /// where the adapter leaves it alone; 0 where it adapts all.
    pub offsets: u64,
    /// Its first row in the batch.
    pub start: u32,
    /// Rows.
    pub rows: u32,
    /// The adapter's rank.
    pub rank: u32,
    /// What the product is multiplied by.
    pub scale: f32,
    /// Where the adapter may still be on its way into its slot: the address of `u32 [1 + layers]`, a count of the
    /// layers that have been copied into the slot ever, modulo 2³², and then how long the step waited for each
    /// layer, in ns. The kernels wait until the layer that they read has been counted; they set the longest
    /// waits and clear none. 0 where the adapter is there.
    pub arrival: u64,
    /// The count before the copy of this adapter.
    pub copied_before: u32,
    /// Keeps the size a multiple of 16 bytes.
    pub unused: u32,
}

impl Segment {
    /// No rows of no adapter.
    pub const NONE: Self = Self {
        matrices: 0,
        offsets: 0,
        start: 0,
        rows: 0,
        rank: 1,
        scale: 1.0,
        arrival: 0,
        copied_before: 0,
        unused: 0,
    };

    /// Cut into segments of [`TILE_ROWS`] rows at most.
    fn cut(self) -> impl Iterator<Item = Self> {
        (0..self.rows).step_by(TILE_ROWS).map(move |row| Self {
            start: self.start + row,
            rows: (self.rows - row).min(TILE_ROWS as u32),
            ..self
        })
    }
}

// SAFETY: plain numbers, 48 bytes without padding.
unsafe impl Element for Segment {}
const _: () = assert!(size_of::<Segment>() == 48);

/// A projection that gets an adapter's product added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// Its layer: what is waited for of an adapter that is on its way.
    pub layer: usize,
    /// Its place in an adapter's table of offsets: `layer * modules + module`.
    pub index: usize,
    /// `inputs + outputs` summed over all modules before it, of all layers: where its part begins, in elements
    /// per rank, in an adapter that adapts every module.
    pub elements_before: usize,
    /// Its first column in the output.
    pub column: usize,
    /// Its width.
    pub outputs: usize,
}

/// Lists the tiles of large segments into `tiles`, which is emptied first: segments of [`TILE_ROWS`] rows at most that a
/// block works on.
pub fn large_tiles(segments: &[Segment], tiles: &mut Vec<Segment>) {
    tiles.clear();
    tiles.extend(segments.iter().flat_map(|segment| segment.cut()));
}

/// Lists covers of the first `rows` rows of a batch into `covers`, which is emptied first: segments of [`TILE_ROWS`] rows
/// at most, of which each row is in one. Those of no large segment's rows have no matrices. `segments` are the large
/// ones, in the order of their rows.
pub fn covers(segments: &[Segment], rows: u32, covers: &mut Vec<Segment>) {
    covers.clear();
    let none = |from: u32, to: u32| Segment { start: from, rows: to.saturating_sub(from), ..Segment::NONE };
    let mut at = 0;
    for segment in segments {
        covers.extend(none(at, segment.start).cut().chain(segment.cut()));
        at = segment.start + segment.rows;
    }
    covers.extend(none(at, rows).cut());
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct RawTarget {
    before: u64,
    index: u32,
    column: u32,
    outputs: u32,
    layer: u32,
}

/// A call's targets, as a kernel's parameter.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawTargets([RawTarget; TARGETS]);

impl RawTargets {
    /// The first three targets.
    pub fn new(targets: &[Target]) -> Self {
        let mut raw = [RawTarget::default(); TARGETS];
        for (to, from) in raw.iter_mut().zip(targets) {
            *to = RawTarget {
                before: from.elements_before as u64,
                index: from.index as u32,
                column: from.column as u32,
                outputs: from.outputs as u32,
                layer: from.layer as u32,
            };
        }
        Self(raw)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(matrices: u64, start: u32, rows: u32) -> Segment {
        Segment { matrices, start, rows, ..Segment::NONE }
    }

    /// Matrices, first row, rows.
    fn shown(segments: &[Segment]) -> Vec<(u64, u32, u32)> {
        segments.iter().map(|s| (s.matrices, s.start, s.rows)).collect()
    }

    #[test]
    fn tiles_cover_every_row_once() {
        let mut tiles = vec![Segment::NONE];
        large_tiles(&[of(16, 0, 17), of(32, 20, 64), of(48, 84, 129)], &mut tiles);
        assert_eq!(shown(&tiles), [(16, 0, 17), (32, 20, 64), (48, 84, 64), (48, 148, 64), (48, 212, 1)]);
    }

    #[test]
    fn covers_hold_every_row_of_the_batch_once() {
        let mut found = vec![Segment::NONE];
        covers(&[of(16, 3, 17), of(32, 20, 130), of(48, 220, 64)], 320, &mut found);
        let expected = [
            (0, 0, 3),
            (16, 3, 17),
            (32, 20, 64),
            (32, 84, 64),
            (32, 148, 2),
            (0, 150, 64),
            (0, 214, 6),
            (48, 220, 64),
            (0, 284, 36),
        ];
        assert_eq!(shown(&found), expected);
        covers(&[], 65, &mut found);
        assert_eq!(shown(&found), [(0, 0, 64), (0, 64, 1)]);
    }
}
