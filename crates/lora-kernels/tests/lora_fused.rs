//! The fused expands give the bits of the kernels that they stand for, one after another.

mod common;

use common::lora_setup::TRAP;
use common::{Random, device, download, milliseconds, poisoned, upload};
use lora_kernels::{
    AttentionShape, Device, DeviceBuffer, Elementwise, KvCacheMut, Lora, LoraLimits, LoraScratch, LoraStep,
    Out, PADDING_ROW, RopeKv, RopeKvCall, Rotation, Segment, Stream, Target, bf16, covers, large_tiles,
    rope_frequencies, rope_table,
};

/// Adapters of one layer whose modules share an input: rank, and whether the second module is left alone.
const ADAPTERS: &[(usize, bool)] = &[(16, false), (4, true), (13, false), (64, true), (128, false)];
/// Rows and adapter of a batch's segments; adapter `NO` for none. Those of up to 16 rows are small ones.
const NO: usize = usize::MAX;
const BATCHES: &[&[(usize, usize)]] = &[
    &[(17, 0)],
    &[(1, 0), (3, 2), (9, NO), (64, 1), (65, 2), (130, NO), (200, 3), (33, 4), (5, NO)],
    &[(100, NO), (512, 0), (1, NO)],
];

struct Batch {
    rows: usize,
    small: DeviceBuffer<Segment>,
    smalls: usize,
    count: DeviceBuffer<u32>,
    tiles: DeviceBuffer<Segment>,
    tile_count: DeviceBuffer<u32>,
    covers: DeviceBuffer<Segment>,
    _matrices: Vec<DeviceBuffer<bf16>>,
    _offsets: Vec<DeviceBuffer<i32>>,
    max_rank: usize,
}

impl Batch {
    /// `padding` rows follow the batch's own, and as many covers of nothing.
    fn new(
        device: &Device,
        stream: &Stream,
        random: &mut Random,
        made_of: &[(usize, usize)],
        (inputs, outputs): (usize, &[usize]),
        padding: usize,
    ) -> Self {
        let (mut matrices, mut offsets) = (Vec::new(), Vec::new());
        for (rank, partial) in ADAPTERS {
            let mut at = 0;
            let mut table = Vec::new();
            for (module, outputs) in outputs.iter().enumerate() {
                let adapted = !(*partial && module == 1);
                table.push(if adapted { at as i32 / 8 } else { -1 });
                at += if adapted { rank * (inputs + outputs) } else { 0 };
            }
            let bound = 1.0 / (inputs as f32).sqrt();
            matrices.push(upload(device, stream, &random.bf16s(at, bound.max(0.05))));
            offsets.push(upload(device, stream, &table));
        }
        let (mut small, mut large, mut rows) = (Vec::new(), Vec::new(), 0);
        for (count, adapter) in made_of.iter().copied() {
            if adapter != NO {
                let (rank, partial) = ADAPTERS[adapter];
                let to = if count <= 16 { &mut small } else { &mut large };
                to.push(Segment {
                    matrices: matrices[adapter].view().address(),
                    offsets: if partial { offsets[adapter].view().address() } else { 0 },
                    start: rows as u32,
                    rows: count as u32,
                    rank: rank as u32,
                    scale: 0.7,
                    ..Segment::NONE
                });
            }
            rows += count;
        }
        rows += padding;
        let (mut tiles, mut cover) = (Vec::new(), Vec::new());
        large_tiles(&large, &mut tiles);
        let tile_count = upload(device, stream, &[tiles.len() as u32]);
        // As many tiles that nobody may look at.
        tiles.resize(tiles.len() + padding, TRAP);
        covers(&large, rows as u32, &mut cover);
        cover.resize(cover.len() + padding, Segment::NONE);
        let smalls = small.len();
        // No buffer is empty.
        small.push(TRAP);
        Self {
            rows,
            small: upload(device, stream, &small),
            smalls,
            count: upload(device, stream, &[smalls as u32]),
            tiles: upload(device, stream, &tiles),
            tile_count,
            covers: upload(device, stream, &cover),
            _matrices: matrices,
            _offsets: offsets,
            max_rank: 128,
        }
    }

    fn step(&self) -> LoraStep<'_> {
        LoraStep {
            small: self.small.view().slice(0..self.smalls),
            small_count: self.count.view(),
            tiles: self.tiles.view(),
            tile_count: self.tile_count.view(),
            max_rank: self.max_rank,
            shrunk: None,
        }
    }

    fn scratch(&self, device: &Device, stream: &Stream) -> LoraScratch {
        let limits =
            LoraLimits { max_rows: self.rows, max_small: self.smalls.max(1), max_rank: self.max_rank };
        let mut scratch = LoraScratch::new(device, limits).expect("scratch memory");
        scratch.poison(stream).expect("a copy");
        scratch
    }
}

/// Targets that follow one another in an output.
fn targets(inputs: usize, outputs: &[usize]) -> Vec<Target> {
    let (mut column, mut before) = (0, 0);
    let targets = outputs.iter().enumerate().map(|(index, outputs)| {
        let target = Target { layer: 0, index, elements_before: before, column, outputs: *outputs };
        column += outputs;
        before += inputs + outputs;
        target
    });
    targets.collect()
}

fn same(what: &str, got: &[bf16], expected: &[bf16]) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let differs = |(a, b): (&bf16, &bf16)| a.to_bits() != b.to_bits();
    let off = got.iter().zip(expected).position(differs);
    assert!(
        off.is_none(),
        "{what}: element {off:?} is {:?}, expected {:?}",
        off.map(|o| got[o]),
        off.map(|o| expected[o])
    );
}

/// Batches whose rows are gate's and up's, of these inputs, expanded together with SiLU and without.
fn check_silu(batches: &[&[(usize, usize)]], padding: usize, shapes: &[(usize, usize)]) {
    let (device, stream) = device();
    let elementwise = Elementwise::load(&device).unwrap();
    for (number, made_of) in batches.iter().enumerate() {
        for (inputs, width) in shapes.iter().copied() {
            for overlap in [false, true] {
                let what = format!("batch {number}, {inputs} to {width}, overlap {overlap}");
                let mut random = Random::new(number as u64);
                let outputs = [width, width];
                let batch = Batch::new(&device, &stream, &mut random, made_of, (inputs, &outputs), padding);
                let targets = targets(inputs, &outputs);
                let lora = Lora::load(&device).unwrap().with_overlap(overlap);
                let x = upload(&device, &stream, &random.bf16s(batch.rows * inputs, 1.0));
                let base = random.bf16s(batch.rows * 2 * width, 2.0);

                let mut expected = upload(&device, &stream, &base);
                let mut act = poisoned(&device, &stream, batch.rows * width);
                let mut scratch = batch.scratch(&device, &stream);
                let out = Out::Bf16(expected.view_mut());
                let step = batch.step();
                lora.apply(&stream, &mut scratch, &step, &targets, inputs, x.view(), 2 * width, out).unwrap();
                elementwise.silu_mul(&stream, batch.rows, width, expected.view(), act.view_mut()).unwrap();

                let mut gate_up = upload(&device, &stream, &base);
                let mut fused = poisoned(&device, &stream, batch.rows * width);
                let mut scratch = batch.scratch(&device, &stream);
                let (x, from, to) = (x.view(), gate_up.view_mut(), fused.view_mut());
                let (stream_of, scratch) = (&stream, &mut scratch);
                if batch.step().tiles.is_empty() {
                    lora.apply_silu_mul_small(stream_of, scratch, &step, &targets, inputs, x, from, to)
                        .unwrap();
                } else {
                    let covers = batch.covers.view();
                    lora.apply_silu_mul(stream_of, scratch, &step, covers, &targets, inputs, x, from, to)
                        .unwrap();
                }
                same(&what, &download(&stream, &fused), &download(&stream, &act));
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn silu_of_expanded_halves() {
    check_silu(BATCHES, 3, &[(72, 264), (512, 1024), (264, 8)]);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn silu_of_a_decode_s_expanded_halves() {
    // Without padding, which is in tiles: rows of none do as well.
    check_silu(
        &[
            &[(1, 0)],
            &[(1, 0), (3, 2), (9, NO), (1, 1), (2, 4), (5, 3), (1, NO)],
            &[(16, 4), (16, 1)],
            &[(1, NO), (1, 2), (1, 3), (1, NO), (1, 4), (1, 1), (1, 0), (1, 0)],
        ],
        0,
        &[(72, 264), (512, 1024), (264, 8), (4096, 11_008)],
    );
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn rotated_and_cached_heads_of_expanded_projections() {
    let (device, stream) = device();
    for (number, made_of) in BATCHES.iter().enumerate() {
        for (heads, kv_heads, head_dim) in [(32, 32, 128), (8, 2, 128), (6, 2, 64), (5, 5, 32), (3, 1, 32)] {
            for overlap in [false, true] {
                let what =
                    format!("batch {number}, {heads}/{kv_heads} heads of {head_dim}, overlap {overlap}");
                let mut random = Random::new(number as u64);
                let inputs = 136;
                let shape = AttentionShape { heads, kv_heads, head_dim, block_size: 16 };
                let outputs = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim];
                let width: usize = outputs.iter().sum();
                let batch = Batch::new(&device, &stream, &mut random, made_of, (inputs, &outputs), 5);
                let targets = targets(inputs, &outputs);
                let lora = Lora::load(&device).unwrap().with_overlap(overlap);
                let kernel = RopeKv::load(&device, shape).unwrap();
                let x = upload(&device, &stream, &random.bf16s(batch.rows * inputs, 1.0));
                let base = random.bf16s(batch.rows * width, 2.0);
                let table = rope_table(1024, &rope_frequencies(head_dim, 10_000.0));
                let table = upload(&device, &stream, &table);
                let positions: Vec<u32> = (0..batch.rows).map(|_| random.below(1024) as u32).collect();
                let positions = upload(&device, &stream, &positions);
                // Places in reverse, the batch's last rows at none.
                let place =
                    |row: usize| if row + 5 < batch.rows { (batch.rows - row) as u32 } else { PADDING_ROW };
                let kv_rows = upload(&device, &stream, &(0..batch.rows).map(place).collect::<Vec<_>>());
                let rotation = Rotation { table: table.view(), positions: positions.view() };
                let elements = shape.cache_elements(batch.rows.div_ceil(16) + 1);
                let caches = || (poisoned(&device, &stream, elements), poisoned(&device, &stream, elements));

                let step = batch.step();
                let mut expected = upload(&device, &stream, &base);
                let mut scratch = batch.scratch(&device, &stream);
                let out = Out::Bf16(expected.view_mut());
                lora.apply(&stream, &mut scratch, &step, &targets, inputs, x.view(), width, out).unwrap();
                let (mut keys, mut values) = caches();
                let cache = KvCacheMut { keys: keys.view_mut(), values: values.view_mut() };
                let qkv = expected.view_mut();
                kernel.apply(&stream, batch.rows, qkv, Some(rotation), kv_rows.view(), cache).unwrap();

                let mut fused = upload(&device, &stream, &base);
                let mut scratch = batch.scratch(&device, &stream);
                let (mut fused_keys, mut fused_values) = caches();
                let cache = KvCacheMut { keys: fused_keys.view_mut(), values: fused_values.view_mut() };
                let call = RopeKvCall { kernel: &kernel, rotation, kv_rows: kv_rows.view(), cache };
                let (covers, qkv) = (batch.covers.view(), fused.view_mut());
                lora.apply_rope_kv(
                    &stream,
                    &mut scratch,
                    &step,
                    covers,
                    &targets,
                    inputs,
                    x.view(),
                    qkv,
                    call,
                )
                .unwrap();

                same(&format!("{what}: keys"), &download(&stream, &fused_keys), &download(&stream, &keys));
                same(
                    &format!("{what}: values"),
                    &download(&stream, &fused_values),
                    &download(&stream, &values),
                );
                let queries = |all: Vec<bf16>| -> Vec<bf16> {
                    let real = (0..batch.rows - 5).flat_map(|row| row * width..row * width + outputs[0]);
                    real.map(|at| all[at]).collect()
                };
                let (got, expected) = (download(&stream, &fused), download(&stream, &expected));
                same(&format!("{what}: queries"), &queries(got), &queries(expected));
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU: prints times"]
fn times() {
    let (device, stream) = device();
    let elementwise = Elementwise::load(&device).unwrap();
    let lora = Lora::load(&device).unwrap().with_overlap(true);
    let (inputs, width) = (4096, 11008);
    println!("| rows | shrink, expand, SiLU: µs | fused, µs |\n| --- | --- | --- |");
    for rows in [256usize, 512, 1024, 2048, 4096] {
        let mut random = Random::new(1);
        let outputs = [width, width];
        let mut batch = Batch::new(&device, &stream, &mut random, &[(rows, 0)], (inputs, &outputs), 0);
        batch.max_rank = 16;
        let targets = targets(inputs, &outputs);
        let x = upload(&device, &stream, &random.bf16s(rows * inputs, 1.0));
        let mut gate_up = upload(&device, &stream, &random.bf16s(rows * 2 * width, 1.0));
        let mut act = poisoned(&device, &stream, rows * width);
        let mut scratch = batch.scratch(&device, &stream);
        let step = batch.step();
        let apart = milliseconds(&device, &stream, |_| {
            let out = Out::Bf16(gate_up.view_mut());
            lora.apply(&stream, &mut scratch, &step, &targets, inputs, x.view(), 2 * width, out).unwrap();
            elementwise.silu_mul(&stream, rows, width, gate_up.view(), act.view_mut()).unwrap();
        });
        let fused = milliseconds(&device, &stream, |_| {
            let (covers, from, to) = (batch.covers.view(), gate_up.view_mut(), act.view_mut());
            lora.apply_silu_mul(&stream, &mut scratch, &step, covers, &targets, inputs, x.view(), from, to)
                .unwrap();
        });
        println!("| {rows} | {:.1} | {:.1} |", apart * 1e3, fused * 1e3);
    }
}
