//! One step's metadata on the device: a block of 32-bit words that is written in page-locked memory and
//! read once a step, by a kernel.

use std::ops::Range;

use lora_kernels::{
    Cover, CudaError, Device, DeviceBuffer, HostWords, PADDING_ROW, PREFILL_ROWS, PinnedBuffer, SMALL_ROWS,
    Segment, Sequences, Stream, TILE_ROWS, Tile, View, covers, large_tiles, prefill_tiles, words,
};

use super::backend::CudaStepError;
use super::slots::{CudaSlots, Resident};
use crate::engine::batch::{Batch, BatchLimits};
use crate::engine::device::{input_ids, wanted};
use crate::engine::executor::TokenId;

const SEGMENT_WORDS: usize = size_of::<Segment>() / 4;
const TILE_WORDS: usize = 2;
const COVER_WORDS: usize = size_of::<Cover>() / 4;

/// Where each array lies, in words. Decode steps use a layout of their own with room for as many rows as
/// sequences, so that a graph finds everything in place and little is copied.
#[derive(Clone, Debug)]
pub(super) struct MetaLayout {
    places: Range<usize>,
    starts: Range<usize>,
    contexts: Range<usize>,
    sample_rows: Range<usize>,
    small: Range<usize>,
    large: Range<usize>,
    tables: Range<usize>,
    attention_tiles: Range<usize>,
    lora_tiles: Range<usize>,
    covers: Range<usize>,
    tokens: Range<usize>,
    positions: Range<usize>,
    kv_rows: Range<usize>,
    words: usize,
}

/// Numbers at the beginning of the block.
const COUNTS: usize = 4;
const SINGLES: usize = 0;
const SMALL: usize = 1;

impl MetaLayout {
    /// The layout for steps of up to `rows` rows; `limits` are rounded up.
    pub fn new(limits: &BatchLimits, rows: usize) -> Self {
        let seqs = limits.max_num_seqs;
        let blocks = limits.blocks_per_seq();
        let mut words = COUNTS;
        let mut array = |len: usize| {
            let start = words;
            // Arrays begin where 16 bytes do.
            words = (start + len).next_multiple_of(4);
            start..start + len
        };
        Self {
            places: array(seqs),
            starts: array(seqs + 1),
            contexts: array(seqs),
            sample_rows: array(seqs),
            // A sequence with an adapter makes one segment at most; adapters that have both single rows and
            // chunks make two, of two sequences.
            small: array(seqs * SEGMENT_WORDS),
            large: array(seqs * SEGMENT_WORDS),
            tables: array(seqs * blocks),
            attention_tiles: array(TILE_WORDS * max_tiles(rows, seqs, PREFILL_ROWS)),
            lora_tiles: array(TILE_WORDS * max_tiles(rows, seqs, TILE_ROWS)),
            covers: array(COVER_WORDS * max_covers(rows, seqs)),
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
    lens: Vec<u32>,
    small: Vec<Segment>,
    large: Vec<Segment>,
    lora_tiles: Vec<Tile>,
    covers: Vec<Cover>,
    attention_tiles: Vec<[u32; 2]>,
    /// What the last batch was made of.
    pub counts: Counts,
}

/// Sizes of a step that shape its launches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Rows, rounded up.
    pub rows: usize,
    /// Sequences.
    pub seqs: usize,
    /// Those of one row.
    pub singles: usize,
    /// The longest context among those.
    pub longest: usize,
    /// Tiles of attention over sequences of several rows.
    pub attention_tiles: usize,
    /// Small segments.
    pub small: usize,
    /// Large segments.
    pub large: usize,
    /// Tiles of large segments.
    pub lora_tiles: usize,
    /// Covers of all rows, where there are large segments.
    pub covers: usize,
}

impl Meta {
    /// For steps of up to `limits`, rounded up.
    pub fn new(device: &Device, limits: &BatchLimits) -> Result<Self, CudaError> {
        let rows = limits.max_num_batched_tokens;
        let layouts = [MetaLayout::new(limits, rows), MetaLayout::new(limits, limits.max_num_seqs)];
        Ok(Self {
            reader: HostWords::load(device)?,
            host: device.pinned(layouts[0].words())?,
            device: device.buffer(layouts[0].words())?,
            layouts,
            decode: false,
            blocks_per_seq: limits.blocks_per_seq(),
            lens: Vec::with_capacity(limits.max_num_seqs),
            small: Vec::with_capacity(limits.max_num_seqs),
            large: Vec::with_capacity(limits.max_num_seqs),
            lora_tiles: Vec::with_capacity(max_tiles(rows, limits.max_num_seqs, TILE_ROWS)),
            covers: Vec::with_capacity(max_covers(rows, limits.max_num_seqs)),
            attention_tiles: Vec::with_capacity(max_tiles(rows, limits.max_num_seqs, PREFILL_ROWS)),
            counts: Counts::default(),
        })
    }

    fn layout(&self) -> &MetaLayout {
        &self.layouts[usize::from(self.decode)]
    }

    /// Writes a batch of which `rows` rows are run; `decode` batches have one row a sequence.
    pub fn fill(
        &mut self,
        batch: &Batch,
        rows: usize,
        decode: bool,
        last_tokens: &[TokenId],
        vocab: usize,
        slots: &CudaSlots,
    ) -> Result<(), CudaStepError> {
        self.decode = decode;
        let at = self.layouts[usize::from(decode)].clone();
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
        for segment in &batch.segments {
            let held = slots.resident(segment.slot).map(|resident| (resident.adapter, resident));
            let resident = wanted(segment, held)?;
            let of_its_size =
                if segment.rows as usize <= SMALL_ROWS { &mut self.small } else { &mut self.large };
            of_its_size.push(on_device(&resident, segment.start, segment.rows));
        }
        large_tiles(&self.large, &mut self.lora_tiles);
        self.covers.clear();
        if !self.large.is_empty() {
            covers(&self.large, rows as u32, &mut self.covers);
        }
        let singles = (0..batch.seqs()).take_while(|s| batch.seq_rows(*s).len() == 1).count();
        let longest = batch.contexts[..singles].iter().max().map_or(0, |c| *c as usize);
        self.lens.clear();
        self.lens.extend((0..batch.seqs()).map(|s| batch.seq_rows(s).len() as u32));
        prefill_tiles(&self.lens, &batch.contexts, &mut self.attention_tiles);
        put(host, &at.small, words(&self.small));
        put(host, &at.large, words(&self.large));
        put(host, &at.lora_tiles, words(&self.lora_tiles));
        put(host, &at.covers, words(&self.covers));
        put(host, &at.attention_tiles, self.attention_tiles.as_flattened());
        let (small, large) = (self.small.len(), self.large.len());
        let (lora_tiles, attention_tiles) = (self.lora_tiles.len(), self.attention_tiles.len());
        host[SINGLES] = singles as u32;
        host[SMALL] = small as u32;
        let seqs = batch.seqs();
        let covers = self.covers.len();
        self.counts =
            Counts { rows, seqs, singles, longest, attention_tiles, small, large, lora_tiles, covers };
        Ok(())
    }

    /// Writes a decode batch of nothing: for running graphs before there is work.
    pub fn fill_empty(&mut self, rows: usize) {
        self.decode = true;
        let at = self.layouts[1].clone();
        self.host[..at.words()].fill(0);
        self.host[at.kv_rows.start..at.kv_rows.start + rows].fill(PADDING_ROW);
        self.counts = Counts { rows, ..Counts::default() };
    }

    /// Puts the words that are used on their way to the device.
    ///
    /// # Safety
    /// The last step's work must have ended: it reads these words, and so does the kernel that brings them.
    pub unsafe fn send(&mut self, stream: &Stream) -> Result<(), CudaError> {
        let words = self.layout().kv_rows.start + self.counts.rows;
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

    /// Tiles of the sequences of several rows.
    pub fn attention_tiles(&self) -> View<'_, u32> {
        let start = self.layout().attention_tiles.start;
        self.view(&(start..start + TILE_WORDS * self.counts.attention_tiles))
    }

    /// Segments of few rows: room for `count`.
    pub fn small(&self, count: usize) -> View<'_, Segment> {
        let start = self.layout().small.start;
        self.view(&(start..start + SEGMENT_WORDS * count)).cast()
    }

    /// Segments of many rows.
    pub fn large(&self) -> View<'_, Segment> {
        let start = self.layout().large.start;
        self.view(&(start..start + SEGMENT_WORDS * self.counts.large)).cast()
    }

    /// Tiles of the segments of many rows.
    pub fn lora_tiles(&self) -> View<'_, Tile> {
        let start = self.layout().lora_tiles.start;
        self.view(&(start..start + TILE_WORDS * self.counts.lora_tiles)).cast()
    }

    /// Covers of all rows.
    pub fn covers(&self) -> View<'_, Cover> {
        let start = self.layout().covers.start;
        self.view(&(start..start + COVER_WORDS * self.counts.covers)).cast()
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

fn on_device(resident: &Resident, start: u32, rows: u32) -> Segment {
    let Resident { matrices, table, rank, scale, .. } = *resident;
    Segment { matrices, offsets: table, start, rows, rank, scale }
}
