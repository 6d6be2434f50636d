//! Decode and prefill attention, against the twin.

mod common;

use common::{device, download, error, poisoned, random, rng, upload};
use lora_kernels::twins::attention::{Cache, attend};
use lora_kernels::twins::rope_kv::cache_at;
use lora_kernels::{
    Attention, AttentionShape, Device, DeviceBuffer, KvCache, Queries, Sequences, Stream, bf16, prefill_tiles,
};
use rand::RngExt as _;
use rand::seq::SliceRandom as _;

/// Weights are rounded to bf16 before the second product, and so is what comes out: about 4e-3 together.
const TOLERANCE: f64 = 1e-2;

fn shape(heads: usize, kv_heads: usize, head_dim: usize, block_size: usize) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_dim, block_size }
}

/// Sequences in a cache where whatever is not theirs is NaN.
struct Batch {
    shape: AttentionShape,
    lens: Vec<u32>,
    contexts: Vec<u32>,
    places: Vec<u32>,
    tables: Vec<u32>,
    blocks_per_seq: usize,
    keys: Vec<bf16>,
    values: Vec<bf16>,
    /// `[rows, qkv_width]`
    qkv: Vec<bf16>,
}

/// A batch on the device.
struct Uploaded {
    places: DeviceBuffer<u32>,
    starts: DeviceBuffer<u32>,
    contexts: DeviceBuffer<u32>,
    tables: DeviceBuffer<u32>,
    blocks_per_seq: usize,
    keys: DeviceBuffer<bf16>,
    values: DeviceBuffer<bf16>,
    qkv: DeviceBuffer<bf16>,
    qkv_width: usize,
}

impl Batch {
    /// Sequences of (rows, context), with blocks and places at random.
    fn new(shape: AttentionShape, sequences: &[(u32, u32)], max_context: usize, seed: u64) -> Self {
        let mut rng = rng(seed);
        let blocks_per_seq = max_context.div_ceil(shape.block_size);
        let used = |context: u32| (context as usize).div_ceil(shape.block_size);
        let blocks = sequences.iter().map(|s| used(s.1)).sum::<usize>() + 3;
        // The last block is nobody's: a number past the cache is taken for it.
        let mut free: Vec<u32> = (0..blocks as u32 - 1).collect();
        free.shuffle(&mut rng);
        let mut places: Vec<u32> = (0..sequences.len() as u32 + 2).collect();
        places.shuffle(&mut rng);
        let mut tables = vec![u32::MAX; places.len() * blocks_per_seq];
        let mut keys = vec![bf16::NAN; shape.cache_elements(blocks)];
        let mut values = keys.clone();
        for (&place, &(_, context)) in places.iter().zip(sequences) {
            for token in 0..context as usize {
                let block = &mut tables[place as usize * blocks_per_seq + token / shape.block_size];
                if token % shape.block_size == 0 {
                    *block = free.pop().expect("blocks enough");
                }
                let kv_row = *block as usize * shape.block_size + token % shape.block_size;
                for head in 0..shape.kv_heads {
                    for i in cache_at(&shape, kv_row, head)..cache_at(&shape, kv_row, head) + shape.head_dim {
                        keys[i] = bf16::from_f32(rng.random_range(-1.0..1.0));
                        values[i] = bf16::from_f32(rng.random_range(-1.0..1.0));
                    }
                }
            }
        }
        let rows: usize = sequences.iter().map(|s| s.0 as usize).sum();
        // Scores then spread by about 2: some tokens weigh much more than others.
        let qkv = random(&mut rng, rows * shape.qkv_width(), 6.0);
        let (lens, contexts) = sequences.iter().copied().unzip();
        Self { shape, lens, contexts, places, tables, blocks_per_seq, keys, values, qkv }
    }

    fn rows(&self) -> usize {
        self.lens.iter().sum::<u32>() as usize
    }

    fn starts(&self) -> Vec<u32> {
        let mut starts = vec![0];
        starts.extend(self.lens.iter().scan(0, |sum, len| {
            *sum += len;
            Some(*sum)
        }));
        starts
    }

    fn upload(&self, device: &Device, stream: &Stream) -> Uploaded {
        Uploaded {
            places: upload(device, stream, &self.places),
            starts: upload(device, stream, &self.starts()),
            contexts: upload(device, stream, &self.contexts),
            tables: upload(device, stream, &self.tables),
            blocks_per_seq: self.blocks_per_seq,
            keys: upload(device, stream, &self.keys),
            values: upload(device, stream, &self.values),
            qkv: upload(device, stream, &self.qkv),
            qkv_width: self.shape.qkv_width(),
        }
    }

    /// Compares row `r` of `sequence`.
    fn check_row(&self, out: &[bf16], sequence: usize, r: usize, case: &str) {
        let (shape, len, context) =
            (&self.shape, self.lens[sequence] as usize, self.contexts[sequence] as usize);
        let width = shape.heads * shape.head_dim;
        let row = self.starts()[sequence] as usize + r;
        let queries = &self.qkv[row * shape.qkv_width()..][..width];
        let table =
            &self.tables[self.places[sequence] as usize * self.blocks_per_seq..][..self.blocks_per_seq];
        let cache = Cache { keys: &self.keys, values: &self.values };
        let want = attend(shape, queries, cache, table, context - len + r + 1);
        for head in 0..shape.heads {
            let at = head * shape.head_dim;
            let got = &out[row * width + at..][..shape.head_dim];
            let off = error(got, &want[at..][..shape.head_dim]);
            assert!(
                off < TOLERANCE,
                "{case}: {shape:?}: head {head} of row {r} of sequence {sequence} ({len} rows, context {context}) \
                 is off by {off}: {:?} for {:?}",
                &got[..8],
                &want[at..][..8]
            );
        }
    }

    /// The tiles of its prefill, and behind them some that a kernel must not look at, `bound` in all where it is not
    /// zero; how many are real.
    fn tiles_and_traps(&self, bound: usize) -> (Vec<[u32; 2]>, u32) {
        let mut tiles = Vec::new();
        prefill_tiles(&self.lens, &self.contexts, &mut tiles);
        let count = tiles.len();
        assert!(bound == 0 || bound >= count);
        tiles.resize(if bound == 0 { count + 3 } else { bound }, [u32::MAX; 2]);
        (tiles, count as u32)
    }

    /// Compares rows of sequences of several rows, those around tiles' edges and each `stride`-th; others were left
    /// alone.
    fn check_prefilled(&self, out: &[bf16], stride: usize, case: &str) {
        for (i, (&len, start)) in self.lens.iter().zip(self.starts()).enumerate() {
            let (len, start) = (len as usize, start as usize);
            if len == 1 {
                self.check_untouched(out, start..start + 1, case);
                continue;
            }
            let checked = (0..len).filter(|r| r % stride == 0 || r % 64 < 2 || r % 64 > 62 || r + 2 > len);
            checked.for_each(|r| self.check_row(out, i, r, case));
        }
    }

    /// Rows `from..` were left alone.
    fn check_untouched(&self, out: &[bf16], rows: std::ops::Range<usize>, case: &str) {
        let width = self.shape.heads * self.shape.head_dim;
        for row in rows {
            let untouched = out[row * width..][..width].iter().all(|v| v.is_nan());
            assert!(untouched, "{case}: {:?}: row {row} was not to be written", self.shape);
        }
    }
}

impl Uploaded {
    fn sequences(&self) -> Sequences<'_> {
        Sequences {
            places: self.places.view(),
            starts: self.starts.view(),
            contexts: self.contexts.view(),
            block_tables: self.tables.view(),
            blocks_per_seq: self.blocks_per_seq,
        }
    }

    fn queries(&self) -> Queries<'_> {
        Queries { rows: self.qkv.view(), width: self.qkv_width }
    }

    fn cache(&self) -> KvCache<'_> {
        KvCache { keys: self.keys.view(), values: self.values.view() }
    }
}

const SHAPES: [(usize, usize, usize, usize); 9] = [
    (8, 8, 128, 16),
    (32, 8, 128, 16),
    (8, 1, 128, 32),
    (12, 12, 64, 16),
    // 16 query heads of a kv head, and 20, which take two blocks.
    (16, 1, 64, 8),
    (20, 1, 128, 8),
    (24, 2, 32, 16),
    (4, 4, 32, 16),
    (6, 2, 32, 32),
];

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn decode_is_the_twin_for_every_shape_and_ragged_contexts() {
    let (device, stream) = device();
    let contexts = [
        1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 640, 1000, 1023,
        1024,
    ];
    for (seed, (heads, kv_heads, head_dim, block_size)) in (0..).zip(SHAPES) {
        let shape = shape(heads, kv_heads, head_dim, block_size);
        let attention = Attention::load(&device, shape).unwrap();
        for (seqs, max_context) in [(contexts.len(), 1024), (contexts.len(), 8192), (3, 2048), (1, 1024)] {
            // The longest of them, in any order.
            let mut sequences: Vec<_> = contexts[contexts.len() - seqs..].iter().map(|&c| (1, c)).collect();
            sequences.shuffle(&mut rng(seed + 100));
            let batch = Batch::new(shape, &sequences, 1024, seed);
            let on = batch.upload(&device, &stream);
            let mut workspace = attention.workspace(&device, seqs, max_context).unwrap();
            // The second time finds the counters as the first one left them.
            for real in [seqs, seqs.div_ceil(2)] {
                let case = format!("decode, {real} of {seqs} sequences, up to {max_context} tokens");
                let mut out = poisoned(&device, &stream, seqs * heads * head_dim);
                let count = upload(&device, &stream, &[real as u32]);
                let (sequences, queries, cache) = (on.sequences(), on.queries(), on.cache());
                attention
                    .decode(
                        &stream,
                        seqs,
                        max_context,
                        count.view(),
                        &sequences,
                        queries,
                        cache,
                        &mut workspace,
                        out.view_mut(),
                    )
                    .unwrap();
                let out = download(&stream, &out);
                (0..real).for_each(|i| batch.check_row(&out, i, 0, &case));
                batch.check_untouched(&out, real..seqs, &case);
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_captured_decode_is_replayed_with_other_contents() {
    let (device, stream) = device();
    let shape = shape(8, 8, 128, 16);
    let attention = Attention::load(&device, shape).unwrap();
    let (seqs, max_context) = (6, 2048);
    let first =
        Batch::new(shape, &[(1, 2048), (1, 1), (1, 700), (1, 64), (1, 1500), (1, 90)], max_context, 1);
    let second =
        Batch::new(shape, &[(1, 33), (1, 2047), (1, 1024), (1, 129), (1, 5), (1, 6)], max_context, 2);
    // Buffers for the larger of both caches.
    let mut on = first.upload(&device, &stream);
    let elements = first.keys.len().max(second.keys.len());
    on.keys = device.buffer(elements).unwrap();
    on.values = device.buffer(elements).unwrap();
    let mut count = upload(&device, &stream, &[0u32]);
    let mut out = poisoned(&device, &stream, seqs * 8 * 128);
    let mut workspace = attention.workspace(&device, seqs, max_context).unwrap();
    let mut graph = stream
        .capture(|| {
            let (sequences, queries, cache) = (on.sequences(), on.queries(), on.cache());
            attention.decode(
                &stream,
                seqs,
                max_context,
                count.view(),
                &sequences,
                queries,
                cache,
                &mut workspace,
                out.view_mut(),
            )
        })
        .unwrap();
    for (batch, real) in [(&first, 6), (&second, 4), (&first, 3), (&second, 6)] {
        on.keys.view_mut().upload(&stream, &batch.keys).unwrap();
        on.values.view_mut().upload(&stream, &batch.values).unwrap();
        on.places.view_mut().upload(&stream, &batch.places).unwrap();
        on.contexts.view_mut().upload(&stream, &batch.contexts).unwrap();
        on.tables.view_mut().upload(&stream, &batch.tables).unwrap();
        on.qkv.view_mut().upload(&stream, &batch.qkv).unwrap();
        count.view_mut().upload(&stream, &[real as u32]).unwrap();
        out.view_mut().upload(&stream, &vec![bf16::NAN; seqs * 8 * 128]).unwrap();
        graph.launch().unwrap();
        let got = download(&stream, &out);
        (0..real).for_each(|i| batch.check_row(&got, i, 0, "replayed decode"));
        batch.check_untouched(&got, real..seqs, "replayed decode");
    }
}

/// Runs the prefill of `sequences` and checks rows around tiles' edges and each `stride`-th.
fn check_prefill(shape: AttentionShape, sequences: &[(u32, u32)], stride: usize, seed: u64) {
    let (device, stream) = device();
    let max_context = sequences.iter().map(|s| s.1 as usize).max().unwrap();
    let batch = Batch::new(shape, sequences, max_context + 50, seed);
    let on = batch.upload(&device, &stream);
    let (tiles, count) = batch.tiles_and_traps(0);
    let tiles = upload(&device, &stream, tiles.as_flattened());
    let count = upload(&device, &stream, &[count]);
    let rows = batch.rows();
    for portable in [true, false] {
        let attention = Attention::load(&device, shape).unwrap();
        let attention = if portable { attention.portable() } else { attention };
        let case = if portable { "portable prefill" } else { "prefill" };
        // One row more, which nobody may write.
        let mut out = poisoned(&device, &stream, (rows + 1) * shape.heads * shape.head_dim);
        let (seqs, queries, cache) = (on.sequences(), on.queries(), on.cache());
        let (tiles, count) = (tiles.view(), count.view());
        attention.prefill(&stream, rows, tiles, count, &seqs, queries, cache, out.view_mut()).unwrap();
        let out = download(&stream, &out);
        batch.check_untouched(&out, rows..rows + 1, case);
        batch.check_prefilled(&out, stride, case);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn prefill_is_the_twin_for_every_shape_and_ragged_lengths() {
    for (seed, (heads, kv_heads, head_dim, block_size)) in (10..).zip(SHAPES) {
        // Sequences of one row first; prompts, and chunks behind what is cached.
        let sequences = [
            (1, 40),
            (1, 1),
            (2, 2),
            (17, 17),
            (64, 64),
            (65, 190),
            (127, 128),
            (128, 128),
            (129, 1000),
            (300, 333),
            (2, 700),
        ];
        check_prefill(shape(heads, kv_heads, head_dim, block_size), &sequences, 7, seed);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn prefill_of_a_long_prompt_is_the_twin() {
    check_prefill(shape(4, 2, 128, 16), &[(2048, 2048)], 101, 30);
    check_prefill(shape(2, 2, 128, 16), &[(1, 9), (1000, 3000), (511, 4111)], 101, 31);
    check_prefill(shape(2, 2, 64, 16), &[(1500, 1500)], 101, 32);
    // Fewer rows than a tile has, of the whole batch.
    check_prefill(shape(2, 1, 128, 16), &[(2, 2)], 1, 33);
    check_prefill(shape(2, 1, 128, 16), &[(37, 300)], 1, 34);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_captured_prefill_is_replayed_with_other_contents() {
    let (device, stream) = device();
    let shape = shape(8, 8, 128, 16);
    let (rows, seqs, bound, width) = (384, 4, 7, 8 * 128);
    let batches = [
        &[(1, 9), (1, 300), (2, 2), (129, 700)][..],
        &[(384, 384)],
        &[(100, 100), (100, 356), (100, 228), (84, 84)],
        &[(1, 5), (1, 5), (1, 6)],
        &[(2, 513)],
    ];
    let batches: Vec<_> = (40..).zip(batches).map(|(seed, of)| Batch::new(shape, of, 704, seed)).collect();
    for portable in [true, false] {
        let attention = Attention::load(&device, shape).unwrap();
        let attention = if portable { attention.portable() } else { attention };
        let case = if portable { "replayed portable prefill" } else { "replayed prefill" };
        let longest = |of: fn(&Batch) -> usize| batches.iter().map(of).max().unwrap();
        let elements = longest(|b| b.keys.len());
        let mut on = Uploaded {
            places: device.buffer(seqs).unwrap(),
            starts: device.buffer(seqs + 1).unwrap(),
            contexts: device.buffer(seqs).unwrap(),
            tables: device.buffer(longest(|b| b.tables.len())).unwrap(),
            blocks_per_seq: batches[0].blocks_per_seq,
            keys: device.buffer(elements).unwrap(),
            values: device.buffer(elements).unwrap(),
            qkv: device.buffer(rows * shape.qkv_width()).unwrap(),
            qkv_width: shape.qkv_width(),
        };
        let mut tiles = upload(&device, &stream, &vec![u32::MAX; 2 * bound]);
        let mut count = upload(&device, &stream, &[0u32]);
        let mut out = poisoned(&device, &stream, rows * width);
        let launch = |on: &Uploaded,
                      tiles: &DeviceBuffer<u32>,
                      count: &DeviceBuffer<u32>,
                      out: &mut DeviceBuffer<_>| {
            let (sequences, queries, cache) = (on.sequences(), on.queries(), on.cache());
            let (tiles, count) = (tiles.view(), count.view());
            attention.prefill(&stream, rows, tiles, count, &sequences, queries, cache, out.view_mut())
        };
        let mut graph = stream.capture(|| launch(&on, &tiles, &count, &mut out)).unwrap();
        for batch in batches.iter().chain(batches.iter().rev()) {
            let put = |to: &mut DeviceBuffer<bf16>, values: &[bf16]| {
                let mut padded = values.to_vec();
                padded.resize(to.len(), bf16::NAN);
                to.upload(&stream, &padded).unwrap();
            };
            put(&mut on.keys, &batch.keys);
            put(&mut on.values, &batch.values);
            put(&mut on.qkv, &batch.qkv);
            put(&mut out, &[]);
            on.places.upload(&stream, &batch.places[..batch.lens.len()]).unwrap();
            on.starts.upload(&stream, &batch.starts()).unwrap();
            on.contexts.upload(&stream, &batch.contexts).unwrap();
            on.tables.upload(&stream, &batch.tables).unwrap();
            let (listed, real) = batch.tiles_and_traps(bound);
            tiles.upload(&stream, listed.as_flattened()).unwrap();
            count.upload(&stream, &[real]).unwrap();
            graph.launch().unwrap();
            let replayed = download(&stream, &out);
            batch.check_prefilled(&replayed, 13, case);
            batch.check_untouched(&replayed, batch.rows()..rows, case);
            if real == 0 {
                continue;
            }
            // The tiles alone, launched as they are.
            let alone = upload(&device, &stream, listed[..real as usize].as_flattened());
            let mut launched = poisoned(&device, &stream, rows * width);
            launch(&on, &alone, &count, &mut launched).unwrap();
            let bits = |of: &[bf16]| of.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert!(
                bits(&replayed) == bits(&download(&stream, &launched)),
                "{case}: other bits than launched"
            );
        }
    }
}
