//! Positions and the paged cache's writes, against the twin.

mod common;

use common::{device, download, error, milliseconds, poisoned, random, rng, upload};
use lora_kernels::twins::rope_kv::{cache_at, rotate};
use lora_kernels::{
    AttentionShape, KvCacheMut, PADDING_ROW, RopeKv, Rotation, bf16, rope_frequencies, rope_table,
};
use rand::seq::SliceRandom as _;

fn shape(heads: usize, kv_heads: usize, head_dim: usize, block_size: usize) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_dim, block_size }
}

fn to_f64(values: &[bf16]) -> Vec<f64> {
    values.iter().map(|v| v.to_f64()).collect()
}

/// Rows, each at a place of its own in the cache but for every fifth, which is padding.
fn check(shape: AttentionShape, n: usize, rotated: bool, seed: u64) {
    let (device, stream) = device();
    let mut rng = rng(seed);
    let case = format!("{shape:?}, {n} rows, rotated: {rotated}");
    let AttentionShape { heads, kv_heads, head_dim, block_size } = shape;
    let (q_width, kv_width, width) = (heads * head_dim, kv_heads * head_dim, shape.qkv_width());
    let blocks = n.div_ceil(block_size) + 2;
    let table_positions = 4352;

    let input = random(&mut rng, n * width, 2.0);
    let mut places: Vec<u32> = (0..(blocks * block_size) as u32).collect();
    places.shuffle(&mut rng);
    let kv_rows: Vec<u32> = (0..n).map(|i| if i % 5 == 4 { PADDING_ROW } else { places[i] }).collect();
    let mut positions: Vec<u32> = (0..table_positions as u32).collect();
    positions.shuffle(&mut rng);
    positions.truncate(n);
    // The last position and the first are the ones that go wrong.
    positions[0] = table_positions as u32 - 1;
    if n > 1 {
        positions[1] = 0;
    }

    let frequencies = rope_frequencies(head_dim, 10_000.0);
    let mut want = to_f64(&input);
    if rotated {
        for (row, &position) in want.chunks_exact_mut(width).zip(&positions) {
            rotate(&mut row[..q_width + kv_width], heads + kv_heads, head_dim, &[position], &frequencies);
        }
    }

    let kernels = RopeKv::load(&device, shape).unwrap();
    let mut qkv = upload(&device, &stream, &input);
    let mut keys = poisoned(&device, &stream, shape.cache_elements(blocks));
    let mut values = poisoned(&device, &stream, shape.cache_elements(blocks));
    let table = upload(&device, &stream, &rope_table(table_positions, &frequencies));
    let (device_positions, rows) = (upload(&device, &stream, &positions), upload(&device, &stream, &kv_rows));
    let rotation = rotated.then(|| Rotation { table: table.view(), positions: device_positions.view() });
    let cache = KvCacheMut { keys: keys.view_mut(), values: values.view_mut() };
    kernels.apply(&stream, n, qkv.view_mut(), rotation, rows.view(), cache).unwrap();

    let (qkv, keys, values) = (download(&stream, &qkv), download(&stream, &keys), download(&stream, &values));
    let mut written = vec![false; blocks * block_size];
    for row in 0..n {
        let (got, want) = (&qkv[row * width..][..width], &want[row * width..][..width]);
        let before = &input[row * width..][..width];
        // Keys and values of the batch's rows stay as they were.
        assert_eq!(got[q_width..], before[q_width..], "{case}: keys and values of row {row}");
        if kv_rows[row] == PADDING_ROW || !rotated {
            assert_eq!(got[..q_width], before[..q_width], "{case}: queries of row {row}");
        } else {
            let off = error(&got[..q_width], &want[..q_width]);
            assert!(off < 5e-3, "{case}: queries of row {row} at {} are off by {off}", positions[row]);
        }
        if kv_rows[row] == PADDING_ROW {
            continue;
        }
        let kv_row = kv_rows[row] as usize;
        written[kv_row] = true;
        for head in 0..kv_heads {
            let (at, from) = (cache_at(&shape, kv_row, head), q_width + head * head_dim);
            let off = error(&keys[at..][..head_dim], &want[from..][..head_dim]);
            assert!(
                off < if rotated { 5e-3 } else { 1e-12 },
                "{case}: key {head} of row {row} is off by {off}"
            );
            assert_eq!(
                values[at..][..head_dim],
                before[from + kv_width..][..head_dim],
                "{case}: value {head} of row {row}"
            );
        }
    }
    for kv_row in (0..written.len()).filter(|&r| !written[r]) {
        for head in 0..kv_heads {
            let at = cache_at(&shape, kv_row, head);
            let untouched = |cache: &[bf16]| cache[at..][..head_dim].iter().all(|v| v.is_nan());
            assert!(untouched(&keys) && untouched(&values), "{case}: place {kv_row} was not to be written");
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn queries_are_rotated_and_keys_and_values_land_in_their_blocks() {
    check(shape(32, 32, 128, 16), 1, true, 1);
    check(shape(32, 32, 128, 16), 77, true, 2);
    check(shape(32, 8, 128, 8), 64, true, 3);
    check(shape(12, 12, 64, 32), 33, true, 4);
    check(shape(6, 2, 32, 16), 100, true, 5);
    check(shape(3, 3, 32, 8), 9, true, 6);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn without_rotation_keys_and_values_are_only_stored() {
    check(shape(12, 12, 64, 16), 50, false, 7);
    check(shape(32, 4, 128, 32), 17, false, 8);
    check(shape(4, 4, 32, 8), 5, false, 9);
}

#[test]
#[ignore = "needs an NVIDIA GPU: prints times"]
fn times() {
    let (device, stream) = device();
    let shape = shape(32, 32, 128, 16);
    let kernels = RopeKv::load(&device, shape).unwrap();
    let table = upload(&device, &stream, &rope_table(4352, &rope_frequencies(128, 10_000.0)));
    println!("| rows | µs | GB/s of rows read and written |\n| --- | --- | --- |");
    for n in [16usize, 512, 1024, 2048, 4096] {
        // Enough copies that the L2 cache holds none of them.
        let copies = (200 << 20) / (n * shape.qkv_width() * 2) + 1;
        let copies = copies.min(64);
        let values = random(&mut rng(1), n * shape.qkv_width(), 1.0);
        let mut rows: Vec<_> = (0..copies).map(|_| upload(&device, &stream, &values)).collect();
        let mut keys = device.buffer::<bf16>(shape.cache_elements(n / 16)).unwrap();
        let mut values = device.buffer::<bf16>(shape.cache_elements(n / 16)).unwrap();
        let places: Vec<u32> = (0..n as u32).collect();
        let places = upload(&device, &stream, &places);
        let ms = milliseconds(&device, &stream, |i| {
            let rotation = Rotation { table: table.view(), positions: places.view() };
            let cache = KvCacheMut { keys: keys.view_mut(), values: values.view_mut() };
            let qkv = rows[i % copies].view_mut();
            kernels.apply(&stream, n, qkv, Some(rotation), places.view(), cache).unwrap();
        });
        // Queries, keys and values are read, and written once each.
        let bytes = (2 * n * shape.qkv_width() * 2) as f64;
        println!("| {n} | {:.1} | {:.0} |", ms * 1e3, bytes / ms / 1e6);
    }
}
