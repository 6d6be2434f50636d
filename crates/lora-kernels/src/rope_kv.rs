//! Positions into queries and keys; keys and values into the paged cache.

use crate::error::ensure;
use crate::memory::{View, ViewMut};
use crate::module::{Function, Grid, Module, arguments};
use crate::paged::{AttentionShape, KvCacheMut};
use crate::stream::Stream;
use crate::{CudaError, Device, bf16};

const KERNEL: &str = "rope_kv";

/// The row in the cache of a padding row: it is left alone.
pub const PADDING_ROW: u32 = u32::MAX;

/// Rotary embedding of queries and keys.
#[derive(Clone, Copy, Debug)]
pub struct Rotation<'a> {
    /// `[positions, head_dim / 2, 2]`: cosine and sine, as [`rope_table`] makes it.
    pub table: View<'a, f32>,
    /// `[n]` positions, below the table's.
    pub positions: View<'a, u32>,
}

/// What the kernels take, as `cuda/rope_kv.cuh` lays it out.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Arguments {
    qkv: u64,
    keys: u64,
    values: u64,
    table: u64,
    positions: u64,
    kv_rows: u64,
    heads: u32,
    kv_heads: u32,
    block_shift: u32,
    cache_rows: u32,
    table_rows: u32,
}

/// The loaded kernels for one attention shape.
#[derive(Debug)]
pub struct RopeKv {
    rotate: Function,
    store: Function,
    shape: AttentionShape,
}

impl RopeKv {
    /// Loads the kernels.
    ///
    /// # Errors
    /// If the shape is one that the kernels are not made for.
    pub fn load(device: &Device, shape: AttentionShape) -> Result<Self, CudaError> {
        const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/rope_kv.fatbin"));
        shape.check()?;
        let module = Module::load(device.context(), IMAGE)?;
        let (rotate, store) = match shape.head_dim {
            32 => ("rope_kv_32", "store_kv_32"),
            64 => ("rope_kv_64", "store_kv_64"),
            _ => ("rope_kv_128", "store_kv_128"),
        };
        Ok(Self { rotate: module.function(rotate)?, store: module.function(store)?, shape })
    }

    /// Rotates queries and keys of `n` rows by their positions, writes the queries back in place, and keys and
    /// values into the cache. Without `rotation` only stores keys and values.
    ///
    /// `qkv` is `[n, (heads + 2 · kv_heads) · head_dim]`. `kv_rows` is `[n]`: block · block_size + offset, or
    /// [`PADDING_ROW`]. No two rows may share a place in the cache. Keys in `qkv` stay as they were.
    pub fn apply(
        &self,
        stream: &Stream,
        n: usize,
        qkv: ViewMut<'_, bf16>,
        rotation: Option<Rotation<'_>>,
        kv_rows: View<'_, u32>,
        cache: KvCacheMut<'_>,
    ) -> Result<(), CudaError> {
        if n == 0 {
            return Ok(());
        }
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let (function, taken) = match &rotation {
            Some(_) => (&self.rotate, heads + 2 * kv_heads),
            None => (&self.store, 2 * kv_heads),
        };
        let arguments = self.arguments(n, qkv, rotation, kv_rows, cache)?;
        // 16 elements a thread.
        let units = (taken * head_dim / 16) as u32;
        let threads = units.min(256).next_multiple_of(32);
        let grid = Grid::new((n as u32, units.div_ceil(threads), 1), threads);
        // SAFETY: the parameter is the kernel's; rows are within the buffers, places in the cache and in the
        // table are bounded in the kernel.
        unsafe { stream.launch_next(function, grid, arguments![arguments]) }
    }

    /// The heads that it was loaded for.
    pub(crate) fn shape(&self) -> &AttentionShape {
        &self.shape
    }

    /// The kernels' parameters, checked: see [`RopeKv::apply`].
    pub(crate) fn arguments(
        &self,
        n: usize,
        qkv: ViewMut<'_, bf16>,
        rotation: Option<Rotation<'_>>,
        kv_rows: View<'_, u32>,
        cache: KvCacheMut<'_>,
    ) -> Result<Arguments, CudaError> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let width = (heads + 2 * kv_heads) * head_dim;
        ensure!(KERNEL, qkv.len() >= n * width, "{} elements for {n} rows of {width}", qkv.len());
        ensure!(KERNEL, kv_rows.len() >= n, "{} places in the cache for {n} rows", kv_rows.len());
        let cache_rows = self.shape.cache_rows(KERNEL, cache.keys.len(), cache.values.len())?;
        if let Some(Rotation { table, positions }) = &rotation {
            ensure!(
                KERNEL,
                !table.is_empty() && table.len().is_multiple_of(head_dim),
                "a table of {} angles is not one of head_dim {head_dim}",
                table.len()
            );
            ensure!(KERNEL, positions.len() >= n, "{} positions for {n} rows", positions.len());
        }
        let addresses = [qkv.address(), cache.keys.address(), cache.values.address()];
        ensure!(
            KERNEL,
            addresses.iter().all(|a| a.is_multiple_of(16)),
            "a buffer is not aligned to 16 bytes"
        );
        Ok(Arguments {
            qkv: qkv.address(),
            keys: cache.keys.address(),
            values: cache.values.address(),
            table: rotation.map_or(0, |r| r.table.address()),
            positions: rotation.map_or(0, |r| r.positions.address()),
            kv_rows: kv_rows.address(),
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            block_shift: self.shape.block_size.trailing_zeros(),
            cache_rows: cache_rows as u32,
            table_rows: rotation.map_or(0, |r| (r.table.len() / head_dim) as u32),
        })
    }
}

/// Rotations a position for each pair of a head: `theta^(-2i / head_dim)`.
pub fn rope_frequencies(head_dim: usize, theta: f64) -> Vec<f64> {
    (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64)).collect()
}

/// The table that [`Rotation`] names: `[positions, frequencies, 2]`, cosine and sine, rounded from f64.
pub fn rope_table(positions: usize, frequencies: &[f64]) -> Vec<f32> {
    let mut table = Vec::with_capacity(positions * frequencies.len() * 2);
    for position in 0..positions {
        for frequency in frequencies {
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            table.extend([cos as f32, sin as f32]);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_holds_cosine_and_sine_of_each_position_and_pair() {
        let frequencies = rope_frequencies(4, 10_000.0);
        assert!((frequencies[0] - 1.0).abs() < 1e-15 && (frequencies[1] - 0.01).abs() < 1e-15);
        let table = rope_table(3, &frequencies);
        assert_eq!(&table[..4], &[1.0, 0.0, 1.0, 0.0]);
        assert_eq!(table[2 * 4], 2f64.cos() as f32);
        assert_eq!(table[2 * 4 + 3], 0.02f64.sin() as f32);
    }
}
