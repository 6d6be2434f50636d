//! The paged cache, the step's sequences in it, and the tiles of a prefill.

use std::cmp::Reverse;

use crate::error::ensure;
use crate::memory::{View, ViewMut};
use crate::{CudaError, bf16};

/// Rows of a prefill tile.
pub const PREFILL_ROWS: usize = 128;

/// What a model's attention looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads: a multiple of `kv_heads`.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Elements of a head: 32, 64 or 128.
    pub head_dim: usize,
    /// Tokens of a cache block: 8, 16 or 32.
    pub block_size: usize,
}

impl AttentionShape {
    /// Refuses what the kernels are not made for.
    pub(crate) fn check(&self) -> Result<(), CudaError> {
        const KERNEL: &str = "attention";
        let Self { heads, kv_heads, head_dim, block_size } = *self;
        ensure!(KERNEL, kv_heads > 0, "no kv heads");
        ensure!(
            KERNEL,
            heads > 0 && heads.is_multiple_of(kv_heads),
            "{heads} heads over {kv_heads} kv heads"
        );
        ensure!(KERNEL, heads + 2 * kv_heads <= 32_768, "{heads} heads and {kv_heads} kv heads are too many");
        ensure!(KERNEL, matches!(head_dim, 32 | 64 | 128), "a head of {head_dim} elements: 32, 64 or 128");
        ensure!(KERNEL, matches!(block_size, 8 | 16 | 32), "blocks of {block_size} tokens: 8, 16 or 32");
        Ok(())
    }

    /// Elements of a row of queries, keys and values.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Elements of one layer's keys, or values, in `blocks` blocks.
    pub fn cache_elements(&self, blocks: usize) -> usize {
        blocks * self.kv_heads * self.block_size * self.head_dim
    }

    /// Tokens that a layer's cache holds.
    pub(crate) fn cache_rows(
        &self,
        kernel: &'static str,
        keys: usize,
        values: usize,
    ) -> Result<usize, CudaError> {
        let block = self.cache_elements(1);
        ensure!(
            kernel,
            keys == values && keys > 0 && keys.is_multiple_of(block),
            "{keys} elements of keys and {values} of values for blocks of {block}"
        );
        // The kernels count rows of head_dim elements in 32 bits.
        ensure!(kernel, keys / self.head_dim < u32::MAX as usize, "{keys} elements of keys are too many");
        Ok(keys / block * self.block_size)
    }

    /// Query heads that one decode block takes, 8 or 16, and how many blocks take a kv head.
    pub(crate) fn query_parts(&self) -> (usize, usize) {
        let group = self.heads / self.kv_heads;
        let queries = if group > 8 { 16 } else { 8 };
        (queries, group.div_ceil(queries))
    }
}

/// One layer's cache: `[blocks, kv_heads, block_size, head_dim]` each.
#[derive(Clone, Copy, Debug)]
pub struct KvCache<'a> {
    /// Keys.
    pub keys: View<'a, bf16>,
    /// Values.
    pub values: View<'a, bf16>,
}

/// One layer's cache, to be written: `[blocks, kv_heads, block_size, head_dim]` each.
#[derive(Debug)]
pub struct KvCacheMut<'a> {
    /// Keys.
    pub keys: ViewMut<'a, bf16>,
    /// Values.
    pub values: ViewMut<'a, bf16>,
}

/// A step's sequences, those of one row first. Rows of a sequence are consecutive; row `r` of one with `len`
/// rows has position `context − len + r`.
#[derive(Clone, Copy, Debug)]
pub struct Sequences<'a> {
    /// `[sequences]` rows of `block_tables`.
    pub places: View<'a, u32>,
    /// `[sequences + 1]` first rows; prefill alone reads it.
    pub starts: View<'a, u32>,
    /// `[sequences]` tokens in the cache, this step's included.
    pub contexts: View<'a, u32>,
    /// `[places, blocks_per_seq]` block numbers.
    pub block_tables: View<'a, u32>,
    /// Columns of `block_tables`.
    pub blocks_per_seq: usize,
}

/// `Paged` of `cuda/attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Paged {
    keys: u64,
    values: u64,
    places: u64,
    contexts: u64,
    tables: u64,
    blocks: u32,
    kv_heads: u32,
    block_shift: u32,
    blocks_per_seq: u32,
    place_count: u32,
}

impl Paged {
    /// Checks that everything is there.
    pub fn new(
        kernel: &'static str,
        shape: &AttentionShape,
        seqs: usize,
        of: &Sequences<'_>,
        cache: KvCache<'_>,
    ) -> Result<Self, CudaError> {
        let rows = shape.cache_rows(kernel, cache.keys.len(), cache.values.len())?;
        ensure!(
            kernel,
            of.places.len() >= seqs && of.contexts.len() >= seqs,
            "{} places and {} contexts for {seqs} sequences",
            of.places.len(),
            of.contexts.len()
        );
        let (tables, columns) = (of.block_tables.len(), of.blocks_per_seq);
        ensure!(
            kernel,
            columns > 0 && tables > 0 && tables.is_multiple_of(columns),
            "a block table of {tables} in rows of {columns}"
        );
        ensure!(kernel, columns * shape.block_size <= i32::MAX as usize, "rows of {columns} blocks");
        let addresses = [cache.keys.address(), cache.values.address()];
        ensure!(kernel, addresses.iter().all(|a| a.is_multiple_of(16)), "a cache not aligned to 16 bytes");
        Ok(Self {
            keys: cache.keys.address(),
            values: cache.values.address(),
            places: of.places.address(),
            contexts: of.contexts.address(),
            tables: of.block_tables.address(),
            blocks: (rows / shape.block_size) as u32,
            kv_heads: shape.kv_heads as u32,
            block_shift: shape.block_size.trailing_zeros(),
            blocks_per_seq: columns as u32,
            place_count: (tables / columns) as u32,
        })
    }
}

/// Lists the tiles of a step's prefill in `out`, which is cleared: (sequence, first row within the sequence) of
/// each [`PREFILL_ROWS`] rows of every sequence of more than one row. `lens` are the sequences' rows, `contexts`
/// their tokens in the cache with this step's. Tiles that read most come first, so that the last ones are short.
pub fn prefill_tiles(lens: &[u32], contexts: &[u32], out: &mut Vec<[u32; 2]>) {
    out.clear();
    for (sequence, &len) in lens.iter().enumerate().filter(|&(_, &len)| len > 1) {
        out.extend((0..len).step_by(PREFILL_ROWS).map(|first| [sequence as u32, first]));
    }
    let reads = |[sequence, first]: [u32; 2]| {
        let (len, context) = (lens[sequence as usize], contexts[sequence as usize]);
        context - len + len.min(first + PREFILL_ROWS as u32)
    };
    out.sort_unstable_by_key(|&tile| (Reverse(reads(tile)), tile));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_long_sequences_and_the_longest_come_first() {
        let mut tiles = vec![[9, 9]];
        prefill_tiles(&[1, 1, 130, 2, 128], &[70, 5, 130, 900, 128], &mut tiles);
        assert_eq!(tiles, [[3, 0], [2, 128], [2, 0], [4, 0]]);
    }

    #[test]
    fn a_shape_that_no_kernel_takes_is_refused() {
        let shape = AttentionShape { heads: 12, kv_heads: 4, head_dim: 64, block_size: 16 };
        assert!(shape.check().is_ok());
        for wrong in [
            AttentionShape { kv_heads: 5, ..shape },
            AttentionShape { kv_heads: 0, ..shape },
            AttentionShape { head_dim: 96, ..shape },
            AttentionShape { block_size: 12, ..shape },
        ] {
            assert!(wrong.check().is_err(), "{wrong:?}");
        }
    }
}
