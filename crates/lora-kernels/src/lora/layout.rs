//! What the kernels read of a step: segments, targets and tiles, laid out as in `cuda/`.

use crate::memory::Element;

/// Rows of a small segment at most.
pub const SMALL_ROWS: usize = 16;
/// Rows of a tile of a large segment.
pub const TILE_ROWS: usize = 64;
/// Targets of a call at most.
pub(super) const TARGETS: usize = 3;

/// Consecutive rows that use one adapter.
///
/// The adapter's matrices lie in its slot in `[layer][module]` order, each adapted module `A [rank, inputs]`
/// and then `Bᵀ [rank, outputs]`, bf16, row-major, packed at the adapter's own rank.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Segment {
    /// The matrices' address, a multiple of 16.
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
    /// A segment of no rows.
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
}

// SAFETY: plain numbers, 48 bytes without padding.
unsafe impl Element for Segment {}
const _: () = assert!(size_of::<Segment>() == 48);

/// Rows of a large segment that a block works on, [`TILE_ROWS`] at most.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// The segment's index among the large ones.
    pub segment: u32,
    /// The tile's first row in its segment.
    pub row: u32,
}

// SAFETY: plain numbers, 8 bytes without padding.
unsafe impl Element for Tile {}
const _: () = assert!(size_of::<Tile>() == 8);

/// Rows of a batch, [`TILE_ROWS`] at most, that have one large segment's adapter or none's.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cover {
    /// The segment's index among the large ones, or `u32::MAX`.
    pub segment: u32,
    /// The first row in the batch.
    pub row: u32,
    /// Rows; a cover of none is padding.
    pub rows: u32,
}

// SAFETY: plain numbers, 12 bytes without padding.
unsafe impl Element for Cover {}
const _: () = assert!(size_of::<Cover>() == 12);

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

/// Lists the tiles of large segments into `tiles`, which is emptied first.
pub fn large_tiles(segments: &[Segment], tiles: &mut Vec<Tile>) {
    tiles.clear();
    for (index, segment) in segments.iter().enumerate() {
        let rows = (0..segment.rows).step_by(TILE_ROWS);
        tiles.extend(rows.map(|row| Tile { segment: index as u32, row }));
    }
}

/// Lists covers of the first `rows` rows of a batch into `covers`, which is emptied first: each row is in one.
/// `segments` are the large ones, in the order of their rows.
pub fn covers(segments: &[Segment], rows: u32, covers: &mut Vec<Cover>) {
    covers.clear();
    let mut add = |segment, from: u32, to: u32| {
        let step = TILE_ROWS as u32;
        covers.extend((from..to).step_by(TILE_ROWS).map(|row| Cover {
            segment,
            row,
            rows: step.min(to - row),
        }));
    };
    let mut at = 0;
    for (index, segment) in segments.iter().enumerate() {
        add(u32::MAX, at, segment.start);
        at = segment.start + segment.rows;
        add(index as u32, segment.start, at);
    }
    add(u32::MAX, at, rows);
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
pub(super) struct RawTargets([RawTarget; TARGETS]);

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

    #[test]
    fn tiles_cover_every_row_once() {
        let of = |rows| Segment { rows, ..Segment::NONE };
        let mut tiles = vec![Tile { segment: 9, row: 9 }];
        large_tiles(&[of(17), of(64), of(129)], &mut tiles);
        let expected = [(0, 0), (1, 0), (2, 0), (2, 64), (2, 128)];
        assert_eq!(tiles, expected.map(|(segment, row)| Tile { segment, row }));
    }

    #[test]
    fn covers_hold_every_row_of_the_batch_once() {
        let of = |start, rows| Segment { start, rows, ..Segment::NONE };
        let mut found = vec![Cover { segment: 9, row: 9, rows: 9 }];
        covers(&[of(3, 17), of(20, 130), of(220, 64)], 320, &mut found);
        let none = u32::MAX;
        let expected = [
            (none, 0, 3),
            (0, 3, 17),
            (1, 20, 64),
            (1, 84, 64),
            (1, 148, 2),
            (none, 150, 64),
            (none, 214, 6),
            (2, 220, 64),
            (none, 284, 36),
        ];
        assert_eq!(found, expected.map(|(segment, row, rows)| Cover { segment, row, rows }));
        covers(&[], 65, &mut found);
        assert_eq!(found.iter().map(|c| (c.row, c.rows)).collect::<Vec<_>>(), [(0, 64), (64, 1)]);
    }
}
