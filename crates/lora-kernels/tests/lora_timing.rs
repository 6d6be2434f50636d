//! Times of the LoRA kernels on the shapes of Llama-2-7B, against the bytes that they must move. Prints only.
//! `LORA_HBM_TIMING="1 512 16 down"` takes that batch (segments, rows, rank) and group alone, for a profiler.

mod common;

use common::{Random, device, median_us, memory_rate};
use lora_kernels::{
    CudaError, Device, DeviceBuffer, Lora, LoraLimits, LoraScratch, LoraStep, Out, Segment, Stream, Target,
    bf16, large_tiles,
};

/// Bytes that one round of calls goes through: well past the L2 cache.
const ROUND: usize = 160 << 20;

/// Projections that share an input.
struct Group {
    name: &'static str,
    inputs: usize,
    outputs: &'static [usize],
    /// The output is the residual stream.
    residual: bool,
}

const GROUPS: [Group; 4] = [
    Group { name: "q,k,v", inputs: 4096, outputs: &[4096, 4096, 4096], residual: false },
    Group { name: "o", inputs: 4096, outputs: &[4096], residual: true },
    Group { name: "gate,up", inputs: 4096, outputs: &[11008, 11008], residual: false },
    Group { name: "down", inputs: 11008, outputs: &[4096], residual: true },
];

impl Group {
    fn width(&self) -> usize {
        self.outputs.iter().sum()
    }

    /// Elements per rank of the group's parts.
    fn elements(&self) -> usize {
        self.outputs.iter().map(|o| self.inputs + o).sum()
    }

    /// Targets in the `copy`-th of the copies that a slot holds; `narrow` ones have 8 columns only, so that
    /// next to nothing but the shrink is left.
    fn targets(&self, copy: usize, narrow: bool) -> Vec<Target> {
        let (mut before, mut column) = (copy * self.elements(), 0);
        let mut targets = Vec::new();
        for outputs in self.outputs.iter().copied() {
            let shown = if narrow { 8 } else { outputs };
            targets.push(Target { layer: 0, index: 0, elements_before: before, column, outputs: shown });
            before += self.inputs + outputs;
            column += outputs;
        }
        targets
    }
}

/// Random values all over: a block of them, again and again.
fn random_buffer(device: &Device, stream: &Stream, len: usize) -> Result<DeviceBuffer<bf16>, CudaError> {
    let block = Random::new(1).bf16s(len.min(1 << 22), 0.1);
    let mut buffer = device.buffer(len)?;
    let mut at = 0;
    while at < len {
        let end = len.min(at + block.len());
        buffer.view_mut().slice(at..end).upload(stream, &block[..end - at])?;
        at = end;
    }
    Ok(buffer)
}

/// Segments of `rows` rows, each with an adapter of its own.
struct Batch {
    segments: usize,
    rows: usize,
    rank: usize,
}

impl Batch {
    /// Microseconds a call: as it is, overlapped, and with the shrink alone; then the bytes that it must move.
    fn time(&self, device: &Device, stream: &Stream, group: &Group) -> Result<([f64; 3], usize), CudaError> {
        let Self { segments: count, rows, rank } = *self;
        let all_rows = count * rows;
        let small = rows <= lora_kernels::SMALL_ROWS;
        let width = group.width();
        let element = if group.residual { 4 } else { 2 };
        let weights = count * rank * group.elements() * 2;
        let activations = all_rows * (group.inputs * 2 + width * element * 2);
        // Decodes rotate among copies of the adapters, prefills among inputs and outputs.
        let calls = ROUND.div_ceil(if small { weights } else { activations }).clamp(2, 1024);
        let copies = if small { calls } else { 1 };
        let turns = if small { 1 } else { calls };

        let slot = copies * rank * group.elements();
        let slots = random_buffer(device, stream, count * slot)?;
        let segments: Vec<Segment> = (0..count)
            .map(|at| Segment {
                matrices: slots.view().slice(at * slot..(at + 1) * slot).address(),
                offsets: 0,
                start: (at * rows) as u32,
                rows: rows as u32,
                rank: rank as u32,
                scale: 1e-3,
                ..Segment::NONE
            })
            .collect();
        let mut tiles = Vec::new();
        if !small {
            large_tiles(&segments, &mut tiles);
        }
        let mut on_device = device.buffer::<Segment>(count)?;
        on_device.upload(stream, &segments)?;
        let mut tiles_on_device = device.buffer::<Segment>(tiles.len())?;
        if !tiles.is_empty() {
            tiles_on_device.upload(stream, &tiles)?;
        }
        let mut number = device.buffer::<u32>(1)?;
        number.upload(stream, &[count as u32])?;
        let mut tile_count = device.buffer::<u32>(1)?;
        tile_count.upload(stream, &[tiles.len() as u32])?;
        let shown = if small { on_device.view() } else { on_device.view().slice(0..0) };
        let step = LoraStep {
            small: shown,
            small_count: number.view(),
            tiles: tiles_on_device.view(),
            tile_count: tile_count.view(),
            max_rank: rank,
            shrunk: None,
        };
        let x = random_buffer(device, stream, turns * all_rows * group.inputs)?;
        // The residual stream begins at zero and has values after the first round.
        let mut out_bf16 =
            random_buffer(device, stream, if group.residual { 0 } else { turns * all_rows * width })?;
        let mut out_f32 = device.buffer::<f32>(if group.residual { turns * all_rows * width } else { 0 })?;
        let limits = LoraLimits { max_rows: all_rows, max_small: count, max_rank: rank };
        let mut scratch = LoraScratch::new(device, limits)?;

        let lora = Lora::load(device)?;
        let mut times = [0.0; 3];
        for (time, (overlap, narrow)) in times.iter_mut().zip([(false, false), (true, false), (false, true)])
        {
            let lora = lora.clone().with_overlap(overlap);
            let mut graph = stream.capture(|| {
                for call in 0..calls {
                    let targets = group.targets(call % copies, narrow);
                    let turn = call % turns;
                    let x =
                        x.view().slice(turn * all_rows * group.inputs..(turn + 1) * all_rows * group.inputs);
                    let part = turn * all_rows * width..(turn + 1) * all_rows * width;
                    let out = if group.residual {
                        Out::F32(out_f32.view_mut().slice(part))
                    } else {
                        Out::Bf16(out_bf16.view_mut().slice(part))
                    };
                    lora.apply(stream, &mut scratch, &step, &targets, group.inputs, x, width, out)?;
                }
                Ok::<_, CudaError>(())
            })?;
            *time = median_us(device, stream, || graph.launch())? / calls as f64;
        }
        Ok((times, weights + activations))
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU, prints times"]
fn times_of_llama_2_7b() -> Result<(), CudaError> {
    let (device, stream) = device();
    let memory = memory_rate(&device, &stream);
    let decode = [1, 16].into_iter().flat_map(|s| [8, 16, 64].map(|rank| (s, 1, rank)));
    let shared = [(4, 4, 16), (1, 16, 16)];
    let prefill = [(1, 512, 16), (1, 2048, 16), (1, 4096, 16), (1, 4096, 64), (1, 4096, 128), (16, 256, 16)];
    println!(
        "{:>8} {:>5} {:>5} {:>8} {:>9} {:>9} {:>9} {:>9} {:>7} {:>7}",
        "segments", "rows", "rank", "group", "us", "overlap", "shrink", "floor us", "GB/s", "x floor"
    );
    let only = std::env::var("LORA_HBM_TIMING").ok();
    let wanted = |batch: &str, group: &str| only.as_ref().is_none_or(|o| *o == format!("{batch} {group}"));
    for (segments, rows, rank) in decode.chain(shared).chain(prefill) {
        let batch = Batch { segments, rows, rank };
        let line = |name: &str, [plain, overlap, shrink]: [f64; 3], bytes: usize| {
            let floor = bytes as f64 / memory;
            println!(
                "{segments:>8} {rows:>5} {rank:>5} {name:>8} {plain:>9.2} {overlap:>9.2} {shrink:>9.2} {floor:>9.2} {:>7.0} {:>7.2}",
                bytes as f64 / plain / 1e3,
                plain / floor
            );
        };
        let (mut times, mut bytes) = ([0.0; 3], 0);
        for group in GROUPS.iter().filter(|g| wanted(&format!("{segments} {rows} {rank}"), g.name)) {
            let (took, moved) = batch.time(&device, &stream, group)?;
            line(group.name, took, moved);
            times = std::array::from_fn(|i| times[i] + took[i]);
            bytes += moved;
        }
        if only.is_none() {
            line("layer", times, bytes);
        }
    }
    Ok(())
}
