//! One step's metadata on the device: a block of 32-bit words that is written in page-locked memory and
//! read once a step, by a kernel.

use std::ops::Range;

use lora_kernels::{
    CudaError, Device, DeviceBuffer, HostWords, PADDING_ROW, PREFILL_ROWS, PinnedBuffer, Segment, Sequences,
    Stream, TILE_ROWS, View, covers, large_tiles, prefill_tiles, words,
};

use super::backend::CudaStepError;
use super::graphs::{Adapters, GraphKey};
use super::shape::{Composition, StepShape, parts, rounded};
use super::slots::{CudaSlots, Resident};
use crate::engine::batch::{self, Batch, BatchLimits};
use crate::engine::device::{StepError, input_ids, wanted};
use crate::engine::executor::TokenId;
use crate::engine::model::narrows;

const SEGMENT_WORDS: usize = size_of::<Segment>() / 4;
const TILE_WORDS: usize = 2;

/// Where each array lies, in words. Decode steps use a layout of their own with room for as many rows as
/// sequences, so that a graph finds everything in place and little is copied.
#[derive(Clone, Debug)]
pub(super) struct MetaLayout {
    places: Range<usize>,
    starts: Range<usize>,
    contexts: Range<usize>,
    sample_rows: Range<usize>,
    small: Range<usize>,
    sampled: Range<usize>,
    tables: Range<usize>,
    attention_tiles: Range<usize>,
    lora_tiles: Range<usize>,
    covers: Range<usize>,
    tokens: Range<usize>,
    positions: Range<usize>,
    kv_rows: Range<usize>,
    words: usize,
}

/// Numbers at the beginning of the block, and room up to where 16 bytes begin.
const COUNTS: usize = 8;
const SINGLES: usize = 0;
const SMALL: usize = 1;
const ATTENTION_TILES: usize = 2;
const LORA_TILES: usize = 3;
const SAMPLED: usize = 4;

impl MetaLayout {
    /// The layout for steps with chunks, or for those without, of single rows alone; `limits` are rounded up.
    pub fn new(limits: &BatchLimits, chunks: bool) -> Self {
        let seqs = limits.max_num_seqs;
        let rows = if chunks { limits.max_num_batched_tokens } else { seqs };
        let blocks = limits.blocks_per_seq();
        let mut words = COUNTS;
        let mut array = |len: usize| {
            let start = words;
            // Arrays begin where 16 bytes do.
            words = (start + len).next_multiple_of(4);
            start..start + len
        };
        // Tiles and covers are of chunks.
        let of_chunks = |len: usize| if chunks { len } else { 0 };
        Self {
            places: array(seqs),
            starts: array(seqs + 1),
            contexts: array(seqs),
            sample_rows: array(seqs),
            // No more than sequences: a part of a segment has one at least.
            small: array(seqs * SEGMENT_WORDS),
            sampled: array(seqs * SEGMENT_WORDS),
            tables: array(seqs * blocks),
            attention_tiles: array(of_chunks(TILE_WORDS * max_tiles(rows, seqs, PREFILL_ROWS))),
            lora_tiles: array(of_chunks(SEGMENT_WORDS * max_tiles(rows, seqs, TILE_ROWS))),
            covers: array(of_chunks(SEGMENT_WORDS * max_covers(rows, seqs))),
            tokens: array(rows),
            positions: array(rows),
            kv_rows: array(rows),
            words,
        }
    }

    /// Words of the whole block.
    pub fn words(&self) -> usize {
        self.words
    }
}

/// The metadata, on both sides.
pub(super) struct Meta {
    reader: HostWords,
    host: PinnedBuffer<u32>,
    device: DeviceBuffer<u32>,
    layouts: [MetaLayout; 2],
    decode: bool,
    blocks_per_seq: usize,
    max_seqs: usize,
    lens: Vec<u32>,
    small: Vec<Segment>,
    large: Vec<Segment>,
    sampled: Vec<Segment>,
    lora_tiles: Vec<Segment>,
    covers: Vec<Segment>,
    attention_tiles: Vec<[u32; 2]>,
    /// What the step's launches are made for.
    pub shape: StepShape,
}

impl Meta {
    /// For steps of up to `limits`, rounded up.
    pub fn new(device: &Device, limits: &BatchLimits) -> Result<Self, CudaError> {
        let rows = limits.max_num_batched_tokens;
        let layouts = [true, false].map(|chunks| MetaLayout::new(limits, chunks));
        Ok(Self {
            reader: HostWords::load(device)?,
            host: device.pinned(layouts[0].words())?,
            device: device.buffer(layouts[0].words())?,
            layouts,
            decode: false,
            blocks_per_seq: limits.blocks_per_seq(),
            max_seqs: limits.max_num_seqs,
            lens: Vec::with_capacity(limits.max_num_seqs),
            small: Vec::with_capacity(limits.max_num_seqs),
            large: Vec::with_capacity(limits.max_num_seqs),
            sampled: Vec::with_capacity(limits.max_num_seqs),
            lora_tiles: Vec::with_capacity(max_tiles(rows, limits.max_num_seqs, TILE_ROWS)),
            covers: Vec::with_capacity(max_covers(rows, limits.max_num_seqs)),
            attention_tiles: Vec::with_capacity(max_tiles(rows, limits.max_num_seqs, PREFILL_ROWS)),
            shape: StepShape::default(),
        })
    }

    fn layout(&self) -> &MetaLayout {
        &self.layouts[usize::from(self.decode)]
    }

    /// Writes a batch `of` which this is the composition, for launches in the shape of a graph, recorded or not, or
    /// of the step's own.
    pub fn fill(
        &mut self,
        batch: &Batch,
        of: &Composition,
        graph: Option<&GraphKey>,
        last_tokens: &[TokenId],
        vocab: usize,
        slots: &CudaSlots,
    ) -> Result<(), CudaStepError> {
        self.decode = of.chunks == 0;
        let at = self.layout().clone();
        let rows = graph.map_or_else(|| rounded(of.rows), |key| key.rows);
        let host = &mut *self.host;
        put(host, &at.places, &batch.places);
        put(host, &at.starts, &batch.starts);
        put(host, &at.contexts, &batch.contexts);
        put(host, &at.sample_rows, &batch.sample_rows);
        put(host, &at.tables, &batch.block_tables);
        put(host, &at.positions, &batch.positions);
        put(host, &at.kv_rows, &batch.kv_rows);
        let real = batch.rows();
        for (to, token) in host[at.tokens.clone()].iter_mut().zip(input_ids(batch, last_tokens, vocab)) {
            *to = token?;
        }
        // Rows of padding: any token, at no place.
        host[at.tokens.start + real..at.tokens.start + rows].fill(0);
        host[at.positions.start + real..at.positions.start + rows].fill(0);
        host[at.kv_rows.start + real..at.kv_rows.start + rows].fill(PADDING_ROW);
        let samples = batch.sample_rows.len();
        host[at.sample_rows.start + samples..at.sample_rows.end].fill(0);

        self.small.clear();
        self.large.clear();
        let adapters = graph.map_or(Adapters::Both, |key| key.adapters);
        for segment in &batch.segments {
            let resident = resident_of(segment, slots)?;
            for part in parts(segment.start, segment.rows, of.singles as u32) {
                let of_its_size = if adapters.is_large(&part) { &mut self.large } else { &mut self.small };
                of_its_size.push(on_device(&resident, part.start, part.rows));
            }
        }
        large_tiles(&self.large, &mut self.lora_tiles);
        self.lens.clear();
        self.lens.extend((0..batch.seqs()).map(|s| batch.seq_rows(s).len() as u32));
        prefill_tiles(&self.lens, &batch.contexts, &mut self.attention_tiles);
        put(host, &at.small, words(&self.small));
        put(host, &at.lora_tiles, words(&self.lora_tiles));
        put(host, &at.attention_tiles, self.attention_tiles.as_flattened());
        let own = StepShape {
            rows,
            samples,
            seqs: batch.seqs(),
            singles: of.singles,
            longest: of.longest,
            attention_tiles: self.attention_tiles.len(),
            small: self.small.len(),
            large: self.large.len(),
            lora_tiles: self.lora_tiles.len(),
            sampled: 0,
            covers: 0,
        };
        host[SINGLES] = own.singles as u32;
        host[SMALL] = own.small as u32;
        host[ATTENTION_TILES] = own.attention_tiles as u32;
        host[LORA_TILES] = own.lora_tiles as u32;
        self.shape = graph.map_or(own, |key| key.shape(self.max_seqs));
        self.covers.clear();
        if self.shape.large > 0 {
            covers(&self.large, rows as u32, &mut self.covers);
            if graph.is_none() {
                self.shape.covers = self.covers.len();
            }
        }
        self.sampled.clear();
        if narrows(self.shape.rows, self.shape.samples) {
            for segment in &batch.sample_segments {
                let resident = resident_of(segment, slots)?;
                let parts = parts(segment.start, segment.rows, samples as u32);
                self.sampled.extend(parts.map(|part| on_device(&resident, part.start, part.rows)));
            }
            if graph.is_none() {
                self.shape.sampled = self.sampled.len();
            }
        }
        put(host, &at.sampled, words(&self.sampled));
        host[SAMPLED] = self.sampled.len() as u32;
        let own = StepShape { covers: self.covers.len(), sampled: self.sampled.len(), ..own };
        if !self.shape.holds(&own) {
            let what = format!("{own:?} does not fit the graph's {:?}", self.shape);
            return Err(CudaError::Shape { kernel: "graph", what }.into());
        }
        if self.shape.large > 0 {
            // Of no rows behind those, as far as blocks look.
            self.covers.resize(self.shape.covers, Segment::NONE);
        }
        put(host, &at.covers, words(&self.covers));
        Ok(())
    }

    /// Writes a batch of nothing in the shape of `graph`: for recording it, and running it before there is work.
    pub fn fill_empty(&mut self, graph: &GraphKey) {
        self.decode = !graph.chunks;
        let at = self.layout().clone();
        self.host[..at.words()].fill(0);
        self.host[at.kv_rows.start..at.kv_rows.start + graph.rows].fill(PADDING_ROW);
        self.shape = graph.shape(self.max_seqs);
    }

    /// Puts the words that are used on their way to the device.
    ///
    /// # Safety
    /// The last step's work must have ended: it reads these words, and so does the kernel that brings them.
    pub unsafe fn send(&mut self, stream: &Stream) -> Result<(), CudaError> {
        let words = self.layout().kv_rows.start + self.shape.rows;
        // SAFETY: the host's words stay until the step has ended, as the caller promises of the last one.
        unsafe { self.reader.read(stream, &self.host, words, self.device.view_mut()) }
    }

    fn view(&self, range: &Range<usize>) -> View<'_, u32> {
        self.device.view().slice(range.clone())
    }

    /// `[1]` how many sequences have one row.
    pub fn singles(&self) -> View<'_, u32> {
        self.view(&(SINGLES..SINGLES + 1))
    }

    /// `[1]` how many small segments there are.
    pub fn small_count(&self) -> View<'_, u32> {
        self.view(&(SMALL..SMALL + 1))
    }

    /// `[1]` how many segments of rows that sample there are.
    pub fn sampled_count(&self) -> View<'_, u32> {
        self.view(&(SAMPLED..SAMPLED + 1))
    }

    /// `[1]` how many tiles of attention there are.
    pub fn attention_tile_count(&self) -> View<'_, u32> {
        self.view(&(ATTENTION_TILES..ATTENTION_TILES + 1))
    }

    /// `[1]` how many tiles of large segments there are.
    pub fn lora_tile_count(&self) -> View<'_, u32> {
        self.view(&(LORA_TILES..LORA_TILES + 1))
    }

    /// The first `seqs` sequences.
    pub fn sequences(&self, seqs: usize) -> Sequences<'_> {
        let at = self.layout();
        let first = |range: &Range<usize>, len| self.view(&(range.start..range.start + len));
        Sequences {
            places: first(&at.places, seqs),
            starts: first(&at.starts, seqs + 1),
            contexts: first(&at.contexts, seqs),
            block_tables: self.view(&at.tables),
            blocks_per_seq: self.blocks_per_seq,
        }
    }

    /// `[seqs]`
    pub fn sample_rows(&self) -> View<'_, u32> {
        self.view(&self.layout().sample_rows)
    }

    /// Tiles of the sequences of several rows: room for the shape's.
    pub fn attention_tiles(&self) -> View<'_, u32> {
        let start = self.layout().attention_tiles.start;
        self.view(&(start..start + TILE_WORDS * self.shape.attention_tiles))
    }

    /// Segments of few rows: room for the shape's.
    pub fn small(&self) -> View<'_, Segment> {
        let start = self.layout().small.start;
        self.view(&(start..start + SEGMENT_WORDS * self.shape.small)).cast()
    }

    /// Segments of the rows that sample, whose rows are counted among those: room for the shape's.
    pub fn sampled(&self) -> View<'_, Segment> {
        let start = self.layout().sampled.start;
        self.view(&(start..start + SEGMENT_WORDS * self.shape.sampled)).cast()
    }

    /// Tiles of the segments of many rows: room for the shape's.
    pub fn lora_tiles(&self) -> View<'_, Segment> {
        let start = self.layout().lora_tiles.start;
        self.view(&(start..start + SEGMENT_WORDS * self.shape.lora_tiles)).cast()
    }

    /// Covers of all rows.
    pub fn covers(&self) -> View<'_, Segment> {
        let start = self.layout().covers.start;
        self.view(&(start..start + SEGMENT_WORDS * self.shape.covers)).cast()
    }

    /// `[rows]`
    pub fn tokens(&self) -> View<'_, u32> {
        self.view(&self.layout().tokens)
    }

    /// `[rows]`
    pub fn positions(&self) -> View<'_, u32> {
        self.view(&self.layout().positions)
    }

    /// `[rows]`
    pub fn kv_rows(&self) -> View<'_, u32> {
        self.view(&self.layout().kv_rows)
    }
}

fn put(host: &mut [u32], range: &Range<usize>, values: &[u32]) {
    host[range.start..range.start + values.len()].copy_from_slice(values);
}

/// Tiles of `tile` rows that `rows` rows of `seqs` sequences make, at most.
fn max_tiles(rows: usize, seqs: usize, tile: usize) -> usize {
    rows.div_ceil(tile) + seqs
}

/// Covers of `rows` rows, at most: each sequence's chunk may follow rows of no large segment, and so may the end.
fn max_covers(rows: usize, seqs: usize) -> usize {
    rows.div_ceil(TILE_ROWS) + 2 * seqs + 1
}

fn resident_of(segment: &batch::Segment, slots: &CudaSlots) -> Result<Resident, StepError> {
    wanted(segment, slots.resident(segment.slot).map(|resident| (resident.adapter, resident)))
}

fn on_device(resident: &Resident, start: u32, rows: u32) -> Segment {
    let Resident { matrices, table, rank, scale, arrival, copied_before, .. } = *resident;
    Segment { matrices, offsets: table, start, rows, rank, scale, arrival, copied_before, unused: 0 }
}
