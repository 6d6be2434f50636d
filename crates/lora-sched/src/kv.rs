//! KV cache blocks: a pool of physical ids and a block table for each sequence place.

use crate::types::PlaceId;

/// Who holds which block. Allocation and release copy the blocks moved; what was given back last is handed
/// out first, so the same history gives the same ids.
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

    /// Appends `count` blocks to the place's table and gives them. The caller has checked [`Self::free`].
    pub(crate) fn allocate(&mut self, place: PlaceId, count: usize) -> &[u32] {
        debug_assert!(count <= self.free.len(), "allocation was not checked against the free blocks");
        let left = self.free.len().saturating_sub(count);
        let table = &mut self.tables[place.0 as usize];
        let from = table.len();
        table.extend_from_slice(&self.free[left..]);
        self.free.truncate(left);
        &table[from..]
    }

    /// Appends a block to the place's table and gives it. The caller has checked [`Self::free`].
    pub(crate) fn grow(&mut self, place: PlaceId) -> Option<u32> {
        let block = self.free.pop();
        debug_assert!(block.is_some(), "allocation was not checked against the free blocks");
        self.tables[place.0 as usize].extend(block);
        block
    }

    /// Takes back everything that the place holds.
    pub(crate) fn release(&mut self, place: PlaceId) {
        self.free.append(&mut self.tables[place.0 as usize]);
    }
}
