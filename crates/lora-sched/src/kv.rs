//! KV cache blocks: a pool of physical ids and a block table for each sequence place.

use crate::types::PlaceId;

/// Who holds which block. Allocation and release are O(blocks moved); ids are handed out last in,
/// first out, so the same history gives the same ids.
#[derive(Clone, Debug)]
pub(crate) struct BlockPool {
    free: Vec<u32>,
    tables: Vec<Vec<u32>>,
    total: usize,
}

impl BlockPool {
    pub(crate) fn new(total: usize, places: usize) -> Self {
        Self { free: (0..total as u32).rev().collect(), tables: vec![Vec::new(); places], total }
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn total(&self) -> usize {
        self.total
    }

    pub(crate) fn held(&self, place: PlaceId) -> usize {
        self.tables[place.0 as usize].len()
    }

    pub(crate) fn tables(&self) -> &[Vec<u32>] {
        &self.tables
    }

    /// Appends `count` blocks to the place's table and to `out`. The caller has checked [`Self::free`].
    pub(crate) fn allocate(&mut self, place: PlaceId, count: usize, out: &mut Vec<u32>) {
        debug_assert!(count <= self.free.len(), "allocation was not checked against the free blocks");
        let from = out.len();
        out.extend(self.free.drain(self.free.len().saturating_sub(count)..).rev());
        self.tables[place.0 as usize].extend_from_slice(&out[from..]);
    }

    /// Appends a block to the place's table. The caller has checked [`Self::free`].
    pub(crate) fn grow(&mut self, place: PlaceId) {
        let block = self.free.pop();
        debug_assert!(block.is_some(), "allocation was not checked against the free blocks");
        self.tables[place.0 as usize].extend(block);
    }

    /// Takes back everything that the place holds.
    pub(crate) fn release(&mut self, place: PlaceId) {
        self.free.extend(self.tables[place.0 as usize].drain(..).rev());
    }
}
