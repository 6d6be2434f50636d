//! Attention over the paged cache: decode (sequences of one row) and causal prefill.

use crate::error::ensure;
use crate::memory::{DeviceBuffer, View, ViewMut};
use crate::module::{Function, Grid, Module, arguments};
use crate::paged::{AttentionShape, KvCache, PREFILL_ROWS, Paged, Sequences};
use crate::stream::Stream;
use crate::tensor_map::Matrix;
use crate::{CudaError, Device, bf16};

const DECODE: &str = "attention_decode";
const PREFILL: &str = "attention_prefill";

const PREFILL_KEYS: usize = 64;
const PREFILL_THREADS: u32 = 128;
const HOPPER_THREADS: u32 = 384;
/// Queries, keys and values twice, barriers, and room to align them.
const HOPPER_SHARED: u32 = 5 * 32_768 + 128 + 1024;
/// Warps of a decode block, their stages, and bytes of a stage.
const DECODE_THREADS: u32 = 128;
const DECODE_SHARED: u32 = 4 * 3 * 8192;
/// A longer context is split even where there are blocks enough, so that a long sequence among short ones does
/// not end long after them.
const LONGEST_SHARE: usize = 1024;

/// Queries in rows that may hold more than them.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// `[rows, width]`; the first heads · head_dim elements of a row are its queries.
    pub rows: View<'a, bf16>,
    /// Elements from one row to the next: [`AttentionShape::qkv_width`] where keys and values follow.
    pub width: usize,
}

/// What decode blocks leave for the one that merges them.
#[derive(Debug)]
pub struct DecodeWorkspace {
    partials: DeviceBuffer<f32>,
    /// Zero between launches: the kernel sets them back.
    counters: DeviceBuffer<u32>,
}

/// `DecodeArguments` of `cuda/attention_decode.cu`.
#[repr(C)]
struct DecodeArguments {
    paged: Paged,
    q: u64,
    out: u64,
    partials: u64,
    counters: u64,
    count: u64,
    q_width: u32,
    heads: u32,
    least: u32,
    scale: f32,
}

/// `PrefillArguments` of `cuda/attention_prefill.cu`.
#[repr(C)]
struct PrefillArguments {
    paged: Paged,
    q: u64,
    out: u64,
    starts: u64,
    tiles: u64,
    count: u64,
    q_width: u32,
    heads: u32,
    rows: u32,
    scale: f32,
}

/// The loaded kernels for one shape.
#[derive(Debug)]
pub struct Attention {
    decode: Function,
    prefill: Function,
    /// For devices of sm_90 and heads of 128.
    hopper: Option<Function>,
    shape: AttentionShape,
    multiprocessors: usize,
}

impl AttentionShape {
    /// 4-byte elements that [`Attention::workspace`] allocates on a device of so many multiprocessors.
    pub fn workspace_elements(&self, multiprocessors: usize, max_seqs: usize, max_context: usize) -> usize {
        self.partial_elements(multiprocessors, max_seqs, max_context) + self.counter_elements(max_seqs)
    }

    fn splits(&self, multiprocessors: usize, seqs: usize, max_context: usize) -> usize {
        let items = (seqs * self.kv_heads * self.query_parts().1).max(1);
        // Two blocks live on a multiprocessor.
        let to_fill = 2 * multiprocessors / items;
        let by_length = max_context.div_ceil(LONGEST_SHARE);
        let most = max_context.div_ceil(self.least(multiprocessors, seqs)).max(1);
        to_fill.max(by_length).clamp(1, most)
    }

    fn least(&self, multiprocessors: usize, seqs: usize) -> usize {
        if seqs * self.kv_heads >= multiprocessors { 256 } else { 128 }
    }

    fn partial_elements(&self, multiprocessors: usize, max_seqs: usize, max_context: usize) -> usize {
        // Fewer sequences have more shares. Shares grow with the context but for rounding.
        let slots = (1..=max_seqs).map(|seqs| seqs * self.splits(multiprocessors, seqs, max_context)).max();
        slots.unwrap_or(0) * self.heads * (self.head_dim + 2)
    }

    fn counter_elements(&self, max_seqs: usize) -> usize {
        max_seqs * self.kv_heads * self.query_parts().1
    }
}

impl Attention {
    /// Loads the kernels.
    ///
    /// # Errors
    /// If the shape is one that the kernels are not made for.
    pub fn load(device: &Device, shape: AttentionShape) -> Result<Self, CudaError> {
        const DECODE_IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/attention_decode.fatbin"));
        const PREFILL_IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/attention_prefill.fatbin"));
        const HOPPER_IMAGE: &[u8] =
            include_bytes!(concat!(env!("OUT_DIR"), "/attention_prefill_hopper.fatbin"));
        shape.check()?;
        let hopper = if device.is_hopper() && shape.head_dim == 128 {
            let module = Module::load(device.context(), HOPPER_IMAGE)?;
            Some(module.function_with_shared("attention_prefill_hopper", HOPPER_SHARED)?)
        } else {
            None
        };
        let (queries, _) = shape.query_parts();
        let decode = match (shape.head_dim, queries) {
            (32, 8) => "attention_decode_32_1",
            (32, _) => "attention_decode_32_2",
            (64, 8) => "attention_decode_64_1",
            (64, _) => "attention_decode_64_2",
            (_, 8) => "attention_decode_128_1",
            _ => "attention_decode_128_2",
        };
        let prefill = match shape.head_dim {
            32 => "attention_prefill_32",
            64 => "attention_prefill_64",
            _ => "attention_prefill_128",
        };
        Ok(Self {
            decode: Module::load(device.context(), DECODE_IMAGE)?
                .function_with_shared(decode, DECODE_SHARED)?,
            prefill: Module::load(device.context(), PREFILL_IMAGE)?
                .function_with_shared(prefill, prefill_shared(shape.head_dim))?,
            hopper,
            shape,
            multiprocessors: device.info().multiprocessors as usize,
        })
    }

    /// Without the kernels that only some devices have: what the others run, for tests and comparisons.
    pub fn portable(self) -> Self {
        Self { hopper: None, ..self }
    }

    /// The shape that it was loaded for.
    pub fn shape(&self) -> AttentionShape {
        self.shape
    }

    /// Into how many shares decode splits contexts of up to `max_context` tokens of `seqs` sequences.
    pub fn splits(&self, seqs: usize, max_context: usize) -> usize {
        self.shape.splits(self.multiprocessors, seqs, max_context)
    }

    /// Tokens that a share has at least.
    fn least(&self, seqs: usize) -> usize {
        self.shape.least(self.multiprocessors, seqs)
    }

    /// Room for decode launches of up to `max_seqs` sequences with contexts of up to `max_context` tokens.
    pub fn workspace(
        &self,
        device: &Device,
        max_seqs: usize,
        max_context: usize,
    ) -> Result<DecodeWorkspace, CudaError> {
        Ok(DecodeWorkspace {
            partials: device.buffer(self.partial_elements(max_seqs, max_context))?,
            counters: device.buffer(self.counter_elements(max_seqs))?,
        })
    }

    fn partial_elements(&self, max_seqs: usize, max_context: usize) -> usize {
        self.shape.partial_elements(self.multiprocessors, max_seqs, max_context)
    }

    fn counter_elements(&self, max_seqs: usize) -> usize {
        self.shape.counter_elements(max_seqs)
    }

    /// Attention of row `i` of `q` over the context of sequence `i`, for the first `count` of `seqs` sequences
    /// (one u32 on the device; rows beyond it are left alone). `out` is `[seqs, heads · head_dim]`.
    ///
    /// The grid depends on `seqs` and `max_context` alone, so the launch can be captured and replayed with
    /// other contents. Contexts beyond `max_context` are right too, but slower. Launches with one workspace
    /// must not overlap.
    #[expect(clippy::too_many_arguments, reason = "a launch")]
    pub fn decode(
        &self,
        stream: &Stream,
        seqs: usize,
        max_context: usize,
        count: View<'_, u32>,
        sequences: &Sequences<'_>,
        q: Queries<'_>,
        cache: KvCache<'_>,
        workspace: &mut DecodeWorkspace,
        out: ViewMut<'_, bf16>,
    ) -> Result<(), CudaError> {
        if seqs == 0 {
            return Ok(());
        }
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        ensure!(DECODE, seqs <= 65_535, "{seqs} sequences are too many");
        ensure!(DECODE, !count.is_empty(), "no count of sequences");
        let paged = Paged::new(DECODE, &self.shape, seqs, sequences, cache)?;
        self.check_rows(DECODE, seqs, &q, &out)?;
        let (_, parts) = self.shape.query_parts();
        let splits = self.splits(seqs, max_context);
        let (partials, counters) = (&mut workspace.partials, &mut workspace.counters);
        ensure!(
            DECODE,
            partials.len() >= seqs * splits * heads * (head_dim + 2)
                && counters.len() >= seqs * kv_heads * parts,
            "a workspace too small for {seqs} sequences of up to {max_context} tokens"
        );
        let arguments = DecodeArguments {
            paged,
            q: q.rows.address(),
            out: out.address(),
            partials: partials.view_mut().address(),
            counters: counters.view_mut().address(),
            count: count.address(),
            q_width: q.width as u32,
            heads: heads as u32,
            least: self.least(seqs) as u32,
            scale: self.scale(),
        };
        let blocks = (splits as u32, (kv_heads * parts) as u32, seqs as u32);
        let grid = Grid { blocks, threads: DECODE_THREADS, shared: DECODE_SHARED };
        // SAFETY: the parameter is the kernel's; buffers hold the rows, the workspace the shares; places, blocks
        // and contexts are bounded in the kernel.
        unsafe { stream.launch_next(&self.decode, grid, arguments![arguments]) }
    }

    /// Causal attention of the rows that the first `count` of `tiles` (one u32 on the device) name over the cache,
    /// which holds them and what came before. `tiles` is what [`prefill_tiles`](crate::prefill_tiles) wrote, `[tiles, 2]`,
    /// and anything behind that; `out` is `[rows, heads · head_dim]`, of which rows that no tile names are left alone.
    ///
    /// The grid depends on the length of `tiles` alone, so the launch can be captured and replayed with other
    /// contents. A block of a surplus tile leaves at once.
    #[expect(clippy::too_many_arguments, reason = "a launch")]
    pub fn prefill(
        &self,
        stream: &Stream,
        rows: usize,
        tiles: View<'_, u32>,
        count: View<'_, u32>,
        sequences: &Sequences<'_>,
        q: Queries<'_>,
        cache: KvCache<'_>,
        out: ViewMut<'_, bf16>,
    ) -> Result<(), CudaError> {
        ensure!(PREFILL, tiles.len().is_multiple_of(2), "{} numbers are not pairs", tiles.len());
        let bound = tiles.len() / 2;
        if bound == 0 {
            return Ok(());
        }
        ensure!(PREFILL, bound <= 65_535, "{bound} tiles are too many");
        ensure!(PREFILL, !count.is_empty(), "no count of tiles");
        let seqs = sequences.contexts.len();
        let paged = Paged::new(PREFILL, &self.shape, seqs, sequences, cache)?;
        ensure!(
            PREFILL,
            sequences.starts.len() > seqs,
            "{} starts of {seqs} sequences",
            sequences.starts.len()
        );
        self.check_rows(PREFILL, rows, &q, &out)?;
        let arguments = PrefillArguments {
            paged,
            q: q.rows.address(),
            out: out.address(),
            starts: sequences.starts.address(),
            tiles: tiles.address(),
            count: count.address(),
            q_width: q.width as u32,
            heads: self.shape.heads as u32,
            rows: rows as u32,
            scale: self.scale(),
        };
        // Heads of one tile side by side: the list's order is the order of work.
        let blocks = (self.shape.heads as u32, bound as u32, 1);
        let Some(hopper) = &self.hopper else {
            let shared = prefill_shared(self.shape.head_dim);
            let grid = Grid { blocks, threads: PREFILL_THREADS, shared };
            // SAFETY: the parameter is the kernel's; buffers hold the rows; tiles outside the rows, places, blocks
            // and contexts are bounded in the kernel.
            return unsafe { stream.launch(&self.prefill, grid, arguments![arguments]) };
        };
        let AttentionShape { heads, head_dim, block_size, .. } = self.shape;
        let (address, width) = (q.rows.address(), q.width);
        let queries = Matrix { address, columns: heads * head_dim, rows, width };
        let kv = |address, len| Matrix { address, columns: head_dim, rows: len / head_dim, width: head_dim };
        let queries = queries.boxes_of(PREFILL, PREFILL_ROWS as u32)?;
        let keys = kv(cache.keys.address(), cache.keys.len()).boxes_of(PREFILL, block_size as u32)?;
        let values = kv(cache.values.address(), cache.values.len()).boxes_of(PREFILL, block_size as u32)?;
        let grid = Grid { blocks, threads: HOPPER_THREADS, shared: HOPPER_SHARED };
        // SAFETY: the parameters are the kernel's; all else as above.
        unsafe { stream.launch(hopper, grid, arguments![queries, keys, values, arguments]) }
    }

    /// Of scores, for powers of two.
    fn scale(&self) -> f32 {
        ((self.shape.head_dim as f64).powf(-0.5) * std::f64::consts::LOG2_E) as f32
    }

    fn check_rows(
        &self,
        kernel: &'static str,
        rows: usize,
        q: &Queries<'_>,
        out: &ViewMut<'_, bf16>,
    ) -> Result<(), CudaError> {
        let queries = self.shape.heads * self.shape.head_dim;
        ensure!(
            kernel,
            q.width >= queries && q.width.is_multiple_of(8),
            "rows of {} elements for {queries} of queries",
            q.width
        );
        // The last row may end behind its queries.
        let needed = rows.saturating_sub(1) * q.width + if rows > 0 { queries } else { 0 };
        ensure!(kernel, q.rows.len() >= needed, "{} elements for {rows} rows of {}", q.rows.len(), q.width);
        ensure!(kernel, out.len() >= rows * queries, "{} elements for {rows} rows of {queries}", out.len());
        let addresses = [q.rows.address(), out.address()];
        ensure!(kernel, addresses.iter().all(|a| a.is_multiple_of(16)), "rows not aligned to 16 bytes");
        Ok(())
    }
}

/// Shared memory of a prefill block: queries, and keys and values twice.
fn prefill_shared(head_dim: usize) -> u32 {
    ((PREFILL_ROWS + 4 * PREFILL_KEYS) * head_dim * size_of::<bf16>()) as u32
}
