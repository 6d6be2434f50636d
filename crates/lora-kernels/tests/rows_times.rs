//! Times of the row kernels, against the bytes that they must move. Prints only.

mod common;

use common::{Random, device, median_us, memory_rate, upload};
use lora_kernels::{Argmax, CudaError, Device, DeviceBuffer, Elementwise, Stream, bf16};

/// Bytes that one round of calls goes through: well past the L2 cache.
const ROUND: usize = 400 << 20;

const HIDDEN: usize = 4096;
const INTERMEDIATE: usize = 11008;
const VOCAB: usize = 32_000;
/// As many rows as the largest batch.
const POSITIONS: usize = 4352;

/// Buffers that the calls of a round take in turn.
struct Buffers {
    tokens: DeviceBuffer<u32>,
    table: DeviceBuffer<bf16>,
    norm: DeviceBuffer<bf16>,
    wide: DeviceBuffer<f32>,
    wide_out: DeviceBuffer<f32>,
    narrow: DeviceBuffer<bf16>,
    narrow_out: DeviceBuffer<bf16>,
}

impl Buffers {
    fn new(device: &Device, stream: &Stream) -> Result<Self, CudaError> {
        let mut random = Random::new(1);
        let block = random.f32s(1 << 20, 1.0);
        let mut wide = device.buffer::<f32>(ROUND / 4)?;
        let mut narrow = device.buffer::<bf16>(ROUND / 2)?;
        for at in (0..wide.len()).step_by(block.len()) {
            let len = block.len().min(wide.len() - at);
            wide.view_mut().slice(at..at + len).upload(stream, &block[..len])?;
        }
        let block: Vec<bf16> = block.iter().map(|v| bf16::from_f32(*v)).collect();
        for at in (0..narrow.len()).step_by(block.len()) {
            let len = block.len().min(narrow.len() - at);
            narrow.view_mut().slice(at..at + len).upload(stream, &block[..len])?;
        }
        let tokens: Vec<u32> = (0..POSITIONS).map(|_| random.below(VOCAB) as u32).collect();
        Ok(Self {
            tokens: upload(device, stream, &tokens),
            table: upload(device, stream, &random.bf16s(VOCAB * HIDDEN, 1.0)),
            norm: upload(device, stream, &random.bf16s(HIDDEN, 1.0)),
            wide_out: device.buffer(ROUND / 4)?,
            narrow_out: device.buffer(ROUND / 2)?,
            wide,
            narrow,
        })
    }
}

/// Prints a line: `launch` gets a running number to choose its buffers by, and moves `bytes`, of which the device's
/// memory gives `memory` in a microsecond.
fn print(
    device: &Device,
    stream: &Stream,
    memory: f64,
    (name, n, width): (&str, usize, usize),
    bytes: usize,
    mut launch: impl FnMut(usize) -> Result<(), CudaError>,
) -> Result<(), CudaError> {
    let calls = ROUND.div_ceil(bytes).clamp(2, 512);
    // As a graph, as the engine runs it: single launches of small kernels would time the host.
    let mut graph = stream.capture(|| (0..calls).try_for_each(&mut launch))?;
    let us = median_us(device, stream, || graph.launch())? / calls as f64;
    let floor = bytes as f64 / memory;
    let rate = bytes as f64 / us * 1e-3;
    println!("| {name} | {n} | {width} | {us:.2} | {floor:.2} | {rate:.0} | {:.2} |", us / floor);
    Ok(())
}

#[test]
#[ignore = "needs an NVIDIA GPU: prints times"]
fn times() -> Result<(), CudaError> {
    let (device, stream) = device();
    let kernels = Elementwise::load(&device)?;
    let memory = memory_rate(&device, &stream);
    let b = &mut Buffers::new(&device, &stream)?;
    println!(
        "| kernel | rows | width | µs | floor µs | GB/s | × floor |\n| --- | --- | --- | --- | --- | --- | --- |"
    );
    for n in [1, 16, 128, 512, 2048, 4096] {
        // Where the `turn`-th call's rows lie in a buffer of `len`.
        let part = |turn: usize, width: usize, len: usize| {
            let at = turn % (len / (n * width)) * n * width;
            at..at + n * width
        };
        let (w, row) = (HIDDEN, n * HIDDEN);
        print(&device, &stream, memory, ("embed", n, w), row * 6, |turn| {
            let out = b.wide_out.view_mut();
            let at = part(turn, w, out.len());
            // Other tokens each time where they are few: the table's rows would come from the cache.
            let from = turn * n % (POSITIONS - n + 1);
            let tokens = b.tokens.view().slice(from..from + n);
            kernels.embed(&stream, n, w, tokens, b.table.view(), out.slice(at))
        })?;
        print(&device, &stream, memory, ("add_positions", n, w), row * 10, |turn| {
            let out = b.wide_out.view_mut();
            let at = part(turn, w, out.len());
            let from = turn * n % (POSITIONS - n + 1);
            let positions = b.tokens.view().slice(from..from + n);
            kernels.add_positions(&stream, n, w, 0, positions, b.table.view(), out.slice(at))
        })?;
        print(&device, &stream, memory, ("rms_norm", n, w), row * 6, |turn| {
            let (x, out) = (b.wide.view(), b.narrow_out.view_mut());
            let (from, to) = (part(turn, w, x.len()), part(turn, w, out.len()));
            kernels.rms_norm(&stream, n, 1e-5, b.norm.view(), x.slice(from), out.slice(to))
        })?;
        print(&device, &stream, memory, ("layer_norm", n, w), row * 6, |turn| {
            let (x, out) = (b.wide.view(), b.narrow_out.view_mut());
            let (from, to) = (part(turn, w, x.len()), part(turn, w, out.len()));
            let norm = b.norm.view();
            kernels.layer_norm(&stream, n, 1e-5, norm, norm, x.slice(from), out.slice(to))
        })?;
        print(&device, &stream, memory, ("silu_mul", n, INTERMEDIATE), n * INTERMEDIATE * 6, |turn| {
            let (x, out) = (b.narrow.view(), b.narrow_out.view_mut());
            let (from, to) = (part(turn, 2 * INTERMEDIATE, x.len()), part(turn, INTERMEDIATE, out.len()));
            kernels.silu_mul(&stream, n, INTERMEDIATE, x.slice(from), out.slice(to))
        })?;
        print(&device, &stream, memory, ("relu", n, INTERMEDIATE), n * INTERMEDIATE * 4, |turn| {
            let x = b.narrow.view_mut();
            let at = part(turn, INTERMEDIATE, x.len());
            kernels.relu(&stream, n, INTERMEDIATE, x.slice(at))
        })?;
        // Rows of a batch that sample are few.
        if n <= 128 {
            let rows: Vec<u32> = (0..n as u32).rev().collect();
            let rows = upload(&device, &stream, &rows);
            print(&device, &stream, memory, ("gather", n, w), row * 8, |turn| {
                let (x, out) = (b.wide.view(), b.wide_out.view_mut());
                let (from, to) = (part(turn, w, x.len()), part(turn, w, out.len()));
                kernels.gather(&stream, n, w, rows.view(), x.slice(from), out.slice(to))
            })?;
            let mut argmax = Argmax::load(&device, n)?;
            let mut ids = device.buffer::<u32>(n)?;
            print(&device, &stream, memory, ("argmax", n, VOCAB), n * VOCAB * 4, |turn| {
                let logits = b.wide.view();
                let at = part(turn, VOCAB, logits.len());
                argmax.run(&stream, n, VOCAB, logits.slice(at), None, ids.view_mut())
            })?;
        }
    }
    Ok(())
}
