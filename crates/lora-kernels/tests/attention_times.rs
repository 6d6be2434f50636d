//! Times of decode and prefill attention. They are printed, never judged.

mod common;

use common::{device, memory_rate, milliseconds, upload};
use lora_kernels::{
    Attention, AttentionShape, Draw, KvCache, Queries, Sequences, Uniform, bf16, prefill_tiles,
};

fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_dim, block_size: 16 }
}

fn uniform(bound: f32) -> Uniform {
    Uniform { key: [7; 32], skip: 0, bound, centre: 0.0 }
}

#[test]
#[ignore = "needs an NVIDIA GPU: prints times"]
fn decode_times() {
    let (device, stream) = device();
    let memory = memory_rate(&device, &stream) * 1e-3;
    let draw = Draw::load(&device).unwrap();
    println!(
        "| heads | kv heads | head | sequences | context | splits | µs | GB/s of the cache | of {memory:.0} |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    let models = [shape(32, 32, 128), shape(32, 8, 128), shape(12, 12, 64)];
    for shape in models {
        let attention = Attention::load(&device, shape).unwrap();
        for (seqs, context) in [
            (1, 256),
            (1, 512),
            (1, 4096),
            (4, 512),
            (8, 2048),
            (16, 128),
            (16, 512),
            (16, 1024),
            (16, 4096),
            (64, 512),
        ] {
            let AttentionShape { heads, head_dim, block_size, .. } = shape;
            let blocks_per_seq = context / block_size;
            let bytes = 4 * shape.cache_elements(seqs * blocks_per_seq);
            // Enough sets of blocks that the L2 cache holds none of the next one.
            let copies = ((400 << 20) / bytes + 2).min(32);
            let blocks = copies * seqs * blocks_per_seq;
            let mut keys = device.buffer::<bf16>(shape.cache_elements(blocks)).unwrap();
            let mut values = device.buffer::<bf16>(shape.cache_elements(blocks)).unwrap();
            draw.fill(&stream, &uniform(1.0), keys.view_mut()).unwrap();
            draw.fill(&stream, &uniform(1.0), values.view_mut()).unwrap();
            let mut q = device.buffer::<bf16>(seqs * shape.qkv_width()).unwrap();
            draw.fill(&stream, &uniform(2.0), q.view_mut()).unwrap();
            let mut out = device.buffer::<bf16>(seqs * heads * head_dim).unwrap();
            // Blocks of all sequences in turn, as they grow beside each other.
            let tables: Vec<u32> = (0..copies * seqs)
                .flat_map(|place| {
                    let (copy, seq) = (place / seqs, place % seqs);
                    (0..blocks_per_seq).map(move |b| ((copy * blocks_per_seq + b) * seqs + seq) as u32)
                })
                .collect();
            let tables = upload(&device, &stream, &tables);
            let places: Vec<u32> = (0..(copies * seqs) as u32).collect();
            let places = upload(&device, &stream, &places);
            let contexts = upload(&device, &stream, &vec![context as u32; seqs]);
            let count = upload(&device, &stream, &[seqs as u32]);
            let mut workspace = attention.workspace(&device, seqs, context).unwrap();
            let ms = milliseconds(&device, &stream, |i| {
                let copy = i % copies;
                let sequences = Sequences {
                    places: places.view().slice(copy * seqs..(copy + 1) * seqs),
                    starts: places.view(),
                    contexts: contexts.view(),
                    block_tables: tables.view(),
                    blocks_per_seq,
                };
                attention
                    .decode(
                        &stream,
                        seqs,
                        context,
                        count.view(),
                        &sequences,
                        Queries { rows: q.view(), width: shape.qkv_width() },
                        KvCache { keys: keys.view(), values: values.view() },
                        &mut workspace,
                        out.view_mut(),
                    )
                    .unwrap();
            });
            let rate = bytes as f64 / ms / 1e6;
            println!(
                "| {heads} | {} | {head_dim} | {seqs} | {context} | {} | {:.1} | {rate:.0} | {:.0} % |",
                shape.kv_heads,
                attention.splits(seqs, context),
                ms * 1e3,
                100.0 * rate / memory
            );
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU: prints times"]
fn prefill_times() {
    let (device, stream) = device();
    let draw = Draw::load(&device).unwrap();
    println!(
        "| heads | kv heads | head | sequences | rows each | context | µs | TFLOP/s | portable: µs | TFLOP/s |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    let models = [shape(32, 32, 128), shape(32, 8, 128), shape(12, 12, 64)];
    for shape in models {
        let attention = Attention::load(&device, shape).unwrap();
        let portable = Attention::load(&device, shape).unwrap().portable();
        for (seqs, len, context) in [
            (1, 256, 256),
            (1, 512, 512),
            (1, 1024, 1024),
            (1, 2048, 2048),
            (1, 4096, 4096),
            (1, 512, 4096),
            (4, 512, 512),
            (4, 1024, 1024),
            (1, 8192, 8192),
        ] {
            let AttentionShape { heads, head_dim, block_size, .. } = shape;
            let (rows, blocks_per_seq) = (seqs * len, context / block_size);
            let elements = shape.cache_elements(seqs * blocks_per_seq);
            let mut keys = device.buffer::<bf16>(elements).unwrap();
            let mut values = device.buffer::<bf16>(elements).unwrap();
            let mut q = device.buffer::<bf16>(rows * shape.qkv_width()).unwrap();
            for (buffer, bound) in [(&mut keys, 1.0), (&mut values, 1.0), (&mut q, 2.0)] {
                draw.fill(&stream, &uniform(bound), buffer.view_mut()).unwrap();
            }
            let mut out = device.buffer::<bf16>(rows * heads * head_dim).unwrap();
            let tables: Vec<u32> = (0..(seqs * blocks_per_seq) as u32).collect();
            let tables = upload(&device, &stream, &tables);
            let places: Vec<u32> = (0..seqs as u32).collect();
            let places = upload(&device, &stream, &places);
            let starts: Vec<u32> = (0..=seqs).map(|s| (s * len) as u32).collect();
            let starts = upload(&device, &stream, &starts);
            let (lens, contexts) = (vec![len as u32; seqs], vec![context as u32; seqs]);
            let mut tiles = Vec::new();
            prefill_tiles(&lens, &contexts, &mut tiles);
            let count = upload(&device, &stream, &[tiles.len() as u32]);
            let tiles = upload(&device, &stream, tiles.as_flattened());
            let contexts = upload(&device, &stream, &contexts);
            let [ms, portable_ms] = [&attention, &portable].map(|attention| {
                milliseconds(&device, &stream, |_| {
                    let sequences = Sequences {
                        places: places.view(),
                        starts: starts.view(),
                        contexts: contexts.view(),
                        block_tables: tables.view(),
                        blocks_per_seq,
                    };
                    let queries = Queries { rows: q.view(), width: shape.qkv_width() };
                    let cache = KvCache { keys: keys.view(), values: values.view() };
                    let (tiles, count) = (tiles.view(), count.view());
                    attention
                        .prefill(&stream, rows, tiles, count, &sequences, queries, cache, out.view_mut())
                        .unwrap();
                })
            });
            // Each row sees the tokens up to its own: two products of 2 · head_dim each.
            let seen: f64 = (0..len).map(|r| (context - len + r + 1) as f64).sum();
            let flops = 4.0 * seen * (seqs * heads * head_dim) as f64;
            println!(
                "| {heads} | {} | {head_dim} | {seqs} | {len} | {context} | {:.1} | {:.0} | {:.1} | {:.0} |",
                shape.kv_heads,
                ms * 1e3,
                flops / ms / 1e9,
                portable_ms * 1e3,
                flops / portable_ms / 1e9
            );
        }
    }
}
