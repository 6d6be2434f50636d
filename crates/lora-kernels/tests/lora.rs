//! The LoRA kernels against their twin.

mod common;

use common::{Random, check_row, device};
use lora_kernels::twins::lora::{HostSegment, apply};
use lora_kernels::{
    CudaError, Device, DeviceBuffer, Lora, LoraLimits, LoraScratch, LoraStep, Out, Segment, Stream, Target,
    bf16, large_tiles,
};

/// A module that comes before the targets in each of two layers, of which the second is used.
const OTHER: (usize, usize) = (40, 24);

/// One batch and the targets that share its input.
struct Case {
    inputs: usize,
    /// Widths of the targets.
    outputs: &'static [usize],
    /// Rank, and whether the adapter leaves its second target alone, by an offset table.
    adapters: &'static [(usize, bool)],
    /// Rows and adapter of each segment; 0 rows stand for one row without an adapter.
    segments: &'static [(usize, usize)],
    /// Segments up to this many rows go to the kernels for small ones.
    small: usize,
    /// Largest rank of the launch; zero for that of the adapters.
    max_rank: usize,
}

const CASES: &[Case] = &[
    // One row, the smallest widths.
    Case { inputs: 8, outputs: &[8], adapters: &[(4, false)], segments: &[(1, 0)], small: 16, max_rank: 0 },
    // Ragged widths; every number of rows up to 16; mixed ranks, one that is no multiple of anything.
    Case {
        inputs: 72,
        outputs: &[264, 8, 520],
        adapters: &[(4, false), (8, false), (13, true), (16, false), (20, true), (64, false), (128, false)],
        segments: &[
            (1, 0),
            (2, 1),
            (3, 2),
            (0, 0),
            (4, 3),
            (5, 4),
            (6, 5),
            (7, 6),
            (8, 0),
            (0, 0),
            (9, 1),
            (10, 2),
            (11, 3),
            (12, 4),
            (13, 5),
            (14, 6),
            (15, 2),
            (16, 6),
            (16, 4),
        ],
        small: 16,
        max_rank: 0,
    },
    // A decode step of Llama-2-7B: q, k and v.
    Case {
        inputs: 4096,
        outputs: &[4096, 4096, 4096],
        adapters: &[(16, false), (8, false), (64, true), (128, false)],
        segments: &[(1, 0), (1, 1), (1, 2), (0, 0), (1, 3), (4, 0), (2, 1)],
        small: 16,
        max_rank: 0,
    },
    // Its widest input, and ranks far under the launch's.
    Case {
        inputs: 11008,
        outputs: &[4096],
        adapters: &[(16, false), (4, true)],
        segments: &[(1, 0), (3, 1), (1, 1)],
        small: 16,
        max_rank: 128,
    },
    // Grouped-query widths.
    Case {
        inputs: 1000,
        outputs: &[1000, 136, 136],
        adapters: &[(32, false), (48, true)],
        segments: &[(5, 0), (0, 0), (16, 1)],
        small: 16,
        max_rank: 0,
    },
    // Large segments: ragged tiles, ragged widths, mixed ranks, unadapted rows and targets.
    Case {
        inputs: 72,
        outputs: &[264, 8, 520],
        adapters: &[(4, false), (13, true), (16, false), (20, true), (128, false), (64, true)],
        segments: &[(17, 0), (64, 1), (0, 0), (65, 2), (100, 3), (128, 4), (1, 5), (200, 5)],
        small: 0,
        max_rank: 0,
    },
    // Few rows of a wide input: the inputs are split over many blocks.
    Case {
        inputs: 4096,
        outputs: &[1024, 256, 256],
        adapters: &[(16, false), (64, true)],
        segments: &[(40, 0), (24, 1)],
        small: 0,
        max_rank: 0,
    },
    // An input whose last stage and last split are ragged.
    Case {
        inputs: 11000,
        outputs: &[328],
        adapters: &[(8, false), (100, false)],
        segments: &[(70, 0), (0, 0), (33, 1)],
        small: 0,
        max_rank: 128,
    },
    // So many tiles that a cluster's blocks have two groups of threads, and one.
    Case {
        inputs: 1032,
        outputs: &[72, 40],
        adapters: &[(16, false), (30, true)],
        segments: &[(700, 0), (0, 0), (321, 1)],
        small: 0,
        max_rank: 0,
    },
    Case {
        inputs: 520,
        outputs: &[72],
        adapters: &[(16, false)],
        segments: &[(2100, 0)],
        small: 0,
        max_rank: 0,
    },
    // So many that the inputs are not split.
    Case {
        inputs: 136,
        outputs: &[72, 40],
        adapters: &[(16, false), (32, false), (8, true)],
        segments: &[(8001, 0), (5000, 1), (5003, 2)],
        small: 0,
        max_rank: 0,
    },
    // Prefills and decodes in one step.
    Case {
        inputs: 512,
        outputs: &[768, 256],
        adapters: &[(16, false), (8, true), (40, false)],
        segments: &[(1, 0), (150, 1), (1, 2), (0, 0), (16, 0), (300, 2), (2, 1)],
        small: 16,
        max_rank: 0,
    },
];

struct Adapter {
    rank: usize,
    scale: f32,
    matrices: Vec<bf16>,
    offsets: Option<Vec<i32>>,
    on_device: (DeviceBuffer<bf16>, DeviceBuffer<i32>),
}

/// A case on the host and the device.
struct Setup {
    targets: Vec<Target>,
    width: usize,
    rows: usize,
    adapters: Vec<Adapter>,
    small: Vec<Segment>,
    large: Vec<Segment>,
    /// What was given to the kernels of either kind, in the batch's order: adapter, first row, rows.
    placed: Vec<(usize, usize, usize)>,
    x: Vec<bf16>,
    max_rank: usize,
}

impl Setup {
    fn new(device: &Device, stream: &Stream, case: &Case, seed: u64) -> Result<Self, CudaError> {
        let mut random = Random::new(seed);
        let modules = case.outputs.len() + 1;
        let widths: Vec<(usize, usize)> =
            [OTHER].into_iter().chain(case.outputs.iter().map(|o| (case.inputs, *o))).collect();
        let layer: usize = widths.iter().map(|(i, o)| i + o).sum();
        // Columns that belong to no target lie before, between and after them.
        let mut width = 8;
        let mut before = layer + OTHER.0 + OTHER.1;
        let mut targets = Vec::new();
        for (at, outputs) in case.outputs.iter().copied().enumerate() {
            targets.push(Target {
                layer: 0,
                index: modules + 1 + at,
                elements_before: before,
                column: width,
                outputs,
            });
            width += outputs + 8;
            before += case.inputs + outputs;
        }
        let mut adapters = Vec::new();
        for (rank, partial) in case.adapters.iter().copied() {
            let mut offsets = Vec::new();
            let mut elements = 0;
            for module in (0..2 * modules).map(|m| m % modules) {
                let adapted = !(partial && module == 2);
                offsets.push(if adapted { (elements / 8) as i32 } else { -1 });
                elements += if adapted { rank * (widths[module].0 + widths[module].1) } else { 0 };
            }
            // h then has unit variance, and the sum over ranks about that of the output.
            let mut matrices = random.bf16s(elements, 1.0);
            for (target, outputs) in targets.iter().zip(case.outputs) {
                let at =
                    if partial { offsets[target.index] * 8 } else { (target.elements_before * rank) as i32 };
                if let Ok(at) = usize::try_from(at) {
                    assert!(at + rank * (case.inputs + outputs) <= elements);
                    for a in &mut matrices[at..at + rank * case.inputs] {
                        *a = bf16::from_f32(a.to_f32() * 3.0 / (case.inputs as f32).sqrt());
                    }
                }
            }
            let mut buffers = (device.buffer(elements)?, device.buffer(offsets.len())?);
            buffers.0.upload(stream, &matrices)?;
            buffers.1.upload(stream, &offsets)?;
            adapters.push(Adapter {
                rank,
                scale: (1.0 + random.f32(0.5)) / (rank as f32).sqrt(),
                matrices,
                offsets: partial.then_some(offsets),
                on_device: buffers,
            });
        }
        let mut setup = Self {
            targets,
            width,
            rows: 0,
            small: Vec::new(),
            large: Vec::new(),
            placed: Vec::new(),
            x: Vec::new(),
            max_rank: case.max_rank.max(adapters.iter().map(|a| a.rank).max().unwrap()),
            adapters,
        };
        for (rows, adapter) in case.segments.iter().copied() {
            if rows > 0 {
                let to = if rows <= case.small { &mut setup.small } else { &mut setup.large };
                let Adapter { rank, scale, offsets, on_device, .. } = &setup.adapters[adapter];
                to.push(Segment {
                    matrices: on_device.0.view().address(),
                    offsets: offsets.as_ref().map_or(0, |_| on_device.1.view().address()),
                    start: setup.rows as u32,
                    rows: rows as u32,
                    rank: *rank as u32,
                    scale: *scale,
                    ..Segment::NONE
                });
                setup.placed.push((adapter, setup.rows, rows));
            }
            setup.rows += rows.max(1);
        }
        setup.x = random.bf16s(setup.rows * case.inputs, 1.0);
        Ok(setup)
    }

    fn reference(&self, inputs: usize, base: &[f64], placed: &[(usize, usize, usize)]) -> Vec<f64> {
        let segments: Vec<HostSegment<'_>> = placed
            .iter()
            .map(|(adapter, start, rows)| {
                let Adapter { rank, scale, matrices, offsets, .. } = &self.adapters[*adapter];
                HostSegment {
                    matrices,
                    offsets: offsets.as_deref(),
                    start: *start,
                    rows: *rows,
                    rank: *rank,
                    scale: *scale,
                }
            })
            .collect();
        let mut out = base.to_vec();
        apply(&segments, &self.targets, inputs, &self.x, self.width, &mut out);
        out
    }

    /// Holds every row of every target to the reference, and everything else to what it was. Returns the
    /// largest error.
    fn check(
        &self,
        what: &str,
        out: &[f64],
        base: &[f64],
        reference: &[f64],
        tolerance: impl Fn(usize) -> f64,
    ) -> f64 {
        let mut worst = 0f64;
        for row in 0..self.rows {
            let mut next = 0;
            for (at, target) in self.targets.iter().enumerate() {
                let columns =
                    row * self.width + target.column..row * self.width + target.column + target.outputs;
                let same = row * self.width + next..columns.start;
                assert_eq!(out[same.clone()], base[same], "{what}, row {row}: columns before target {at}");
                let what = format!("{what}, row {row}, target {at}");
                if base[columns.clone()] == reference[columns.clone()] {
                    assert_eq!(out[columns.clone()], base[columns], "{what}: not adapted");
                } else {
                    let error = check_row(&what, &out[columns.clone()], &reference[columns], tolerance(row));
                    worst = worst.max(error);
                }
                next = target.column + target.outputs;
            }
            let same = row * self.width + next..(row + 1) * self.width;
            assert_eq!(out[same.clone()], base[same], "{what}, row {row}: columns after the targets");
        }
        worst
    }
}

fn uploaded<T: lora_kernels::Element>(
    device: &Device,
    stream: &Stream,
    values: &[T],
) -> Result<DeviceBuffer<T>, CudaError> {
    let mut buffer = device.buffer(values.len())?;
    if !values.is_empty() {
        buffer.upload(stream, values)?;
    }
    Ok(buffer)
}

/// Tiles of `segments`, and behind them some that a kernel must not look at; how many are real.
fn tiles_and_traps(segments: &[Segment]) -> (Vec<Segment>, u32) {
    let mut tiles = Vec::new();
    large_tiles(segments, &mut tiles);
    let count = tiles.len();
    tiles.resize(if count > 0 { count + 3 } else { 0 }, trap());
    (tiles, count as u32)
}

/// Segments that a kernel must not look at: their addresses are no memory.
fn trap() -> Segment {
    Segment { matrices: 64, offsets: 64, start: 0, rows: 16, rank: 16, scale: f32::NAN, ..Segment::NONE }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn every_shape_is_what_the_twin_computes() -> Result<(), CudaError> {
    let (device, stream) = device();
    let own = Lora::load(&device)?;
    for (number, case) in CASES.iter().enumerate() {
        let setup = Setup::new(&device, &stream, case, number as u64)?;
        let bound = if setup.small.is_empty() { 0 } else { setup.small.len() + 3 };
        let mut small = setup.small.clone();
        small.resize(bound, trap());
        let small = uploaded(&device, &stream, &small)?;
        let count = uploaded(&device, &stream, &[setup.small.len() as u32])?;
        let (tiles, tile_count) = tiles_and_traps(&setup.large);
        let tiles = uploaded(&device, &stream, &tiles)?;
        let tile_count = uploaded(&device, &stream, &[tile_count])?;
        let x = uploaded(&device, &stream, &setup.x)?;
        let limits = LoraLimits { max_rows: setup.rows, max_small: bound, max_rank: setup.max_rank };
        let mut scratch = LoraScratch::new(&device, limits)?;
        let step = LoraStep {
            small: small.view(),
            small_count: count.view(),
            tiles: tiles.view(),
            tile_count: tile_count.view(),
            max_rank: setup.max_rank,
        };
        let elements = setup.rows * setup.width;
        let base_f32 = Random::new(99).f32s(elements, 1.0);
        let base_bf16: Vec<bf16> = base_f32.iter().map(|v| bf16::from_f32(*v)).collect();
        let base: Vec<f64> = base_bf16.iter().map(|v| v.to_f64()).collect();
        let base_f32: Vec<f32> = base_bf16.iter().map(|v| v.to_f32()).collect();
        let reference = setup.reference(case.inputs, &base, &setup.placed);
        let rows_of_small =
            |row: usize| setup.small.iter().any(|s| (s.start..s.start + s.rows).contains(&(row as u32)));

        for (kernels, lora) in
            [("the device's kernels", own.clone()), ("portable ones", own.clone().portable())]
        {
            let mut got_bf16: Vec<Vec<bf16>> = Vec::new();
            let mut got_f32: Vec<Vec<f32>> = Vec::new();
            for overlap in [false, true, false] {
                let lora = lora.clone().with_overlap(overlap);
                let mut out = uploaded(&device, &stream, &base_bf16)?;
                scratch.poison(&stream)?;
                let to = Out::Bf16(out.view_mut());
                lora.apply(
                    &stream,
                    &mut scratch,
                    &step,
                    &setup.targets,
                    case.inputs,
                    x.view(),
                    setup.width,
                    to,
                )?;
                let mut host = vec![bf16::NAN; elements];
                out.download(&stream, &mut host)?;
                got_bf16.push(host);

                let mut out = uploaded(&device, &stream, &base_f32)?;
                scratch.poison(&stream)?;
                let to = Out::F32(out.view_mut());
                lora.apply(
                    &stream,
                    &mut scratch,
                    &step,
                    &setup.targets,
                    case.inputs,
                    x.view(),
                    setup.width,
                    to,
                )?;
                let mut host = vec![f32::NAN; elements];
                out.download(&stream, &mut host)?;
                got_f32.push(host);
            }
            let wide: Vec<f64> = got_bf16[0].iter().map(|v| v.to_f64()).collect();
            let error_bf16 =
                setup.check(&format!("case {number}, {kernels}, bf16"), &wide, &base, &reference, |_| 5e-3);
            let wide: Vec<f64> = got_f32[0].iter().map(|v| f64::from(*v)).collect();
            // Small segments stay in f32; large ones round h.
            let error_f32 =
                setup.check(&format!("case {number}, {kernels}, f32"), &wide, &base, &reference, |row| {
                    if rows_of_small(row) { 1e-4 } else { 5e-3 }
                });
            println!(
                "case {number}, {kernels}: {} rows, worst row bf16 {error_bf16:.2e}, f32 {error_f32:.2e}",
                setup.rows
            );
            for again in 1..3 {
                assert!(
                    got_bf16[again] == got_bf16[0],
                    "case {number}, {kernels}, bf16: run {again} has other bits"
                );
                assert!(
                    got_f32[again] == got_f32[0],
                    "case {number}, {kernels}, f32: run {again} has other bits"
                );
            }
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_graph_replays_with_other_adapters() -> Result<(), CudaError> {
    let (device, stream) = device();
    let case = Case {
        inputs: 512,
        outputs: &[768, 256],
        adapters: &[(16, false), (8, true), (40, false)],
        segments: &[(1, 0), (3, 1), (1, 2), (2, 0), (1, 1), (40, 2), (130, 1), (17, 0)],
        small: 16,
        max_rank: 64,
    };
    let setup = Setup::new(&device, &stream, &case, 7)?;
    let smalls = setup.small.len();
    for overlap in [false, true] {
        let lora = Lora::load(&device)?.with_overlap(overlap);
        let mut small = uploaded(&device, &stream, &[trap(); 8])?;
        let mut count = uploaded(&device, &stream, &[0])?;
        let mut tiles = uploaded(&device, &stream, &[trap(); 9])?;
        let mut tile_count = uploaded(&device, &stream, &[0])?;
        let x = uploaded(&device, &stream, &setup.x)?;
        let base = Random::new(98).f32s(setup.rows * setup.width, 1.0);
        let mut out = uploaded(&device, &stream, &base)?;
        let limits = LoraLimits { max_rows: setup.rows, max_small: 8, max_rank: 64 };
        let mut scratch = LoraScratch::new(&device, limits)?;
        let mut graph = stream.capture(|| {
            let step = LoraStep {
                small: small.view(),
                small_count: count.view(),
                tiles: tiles.view(),
                tile_count: tile_count.view(),
                max_rank: setup.max_rank,
            };
            let to = Out::F32(out.view_mut());
            lora.apply(&stream, &mut scratch, &step, &setup.targets, 512, x.view(), setup.width, to)
        })?;
        let base_f64: Vec<f64> = base.iter().map(|v| f64::from(*v)).collect();
        for chosen in [&[0usize, 1, 2, 3, 4][..], &[3], &[], &[4, 1], &[0, 1, 2, 5, 6, 7], &[6], &[7, 2, 5]] {
            let is_small = |at: &&usize| **at < smalls;
            let mut segments: Vec<Segment> =
                chosen.iter().filter(is_small).map(|at| setup.small[*at]).collect();
            count.upload(&stream, &[segments.len() as u32])?;
            segments.resize(8, trap());
            small.upload(&stream, &segments)?;
            let segments: Vec<Segment> =
                chosen.iter().filter(|at| !is_small(at)).map(|at| setup.large[*at - smalls]).collect();
            let (listed, real) = tiles_and_traps(&segments);
            if !listed.is_empty() {
                tiles.upload(&stream, &listed)?;
            }
            tile_count.upload(&stream, &[real])?;
            out.upload(&stream, &base)?;
            scratch.poison(&stream)?;
            graph.launch()?;
            let mut host = vec![f32::NAN; base.len()];
            out.download(&stream, &mut host)?;
            let placed: Vec<_> = chosen.iter().map(|at| setup.placed[*at]).collect();
            let reference = setup.reference(512, &base_f64, &placed);
            let wide: Vec<f64> = host.iter().map(|v| f64::from(*v)).collect();
            // Large segments, which come last here, round h.
            let first_large = setup.placed[smalls].1;
            let tolerance = |row| if row < first_large { 1e-4 } else { 5e-3 };
            setup.check(&format!("segments {chosen:?}"), &wide, &base_f64, &reference, tolerance);
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn shapes_that_the_kernels_cannot_take_are_refused() -> Result<(), CudaError> {
    let (device, stream) = device();
    let lora = Lora::load(&device)?;
    let limits = LoraLimits { max_rows: 4, max_small: 1, max_rank: 16 };
    let mut scratch = LoraScratch::new(&device, limits)?;
    let (small, count) = (device.buffer::<Segment>(2)?, device.buffer::<u32>(1)?);
    let tiles = device.buffer::<Segment>(0)?;
    let x = device.buffer::<bf16>(4 * 64)?;
    let mut out = device.buffer::<bf16>(4 * 128)?;
    let good = Target { layer: 0, index: 0, elements_before: 0, column: 0, outputs: 64 };
    // Segments, largest rank, targets, inputs, width; what the error names.
    for (segments, max_rank, targets, inputs, width, said) in [
        (1, 16, vec![], 64, 128, "targets"),
        (1, 16, vec![good; 2], 64, 128, "share"),
        (1, 16, vec![Target { column: 72, ..good }], 64, 128, "inside"),
        (1, 16, vec![Target { outputs: 60, ..good }], 64, 128, "multiples of 8"),
        (1, 16, vec![good], 60, 128, "60 inputs"),
        (1, 16, vec![good], 24, 128, "whole rows"),
        (1, 16, vec![good], 64, 256, "output of"),
        (1, 17, vec![good], 64, 128, "rank 17"),
        (2, 16, vec![good], 64, 128, "small segments"),
    ] {
        let step = LoraStep {
            small: small.view().slice(0..segments),
            small_count: count.view(),
            tiles: tiles.view(),
            tile_count: count.view(),
            max_rank,
        };
        let to = Out::Bf16(out.view_mut());
        let refused = lora.apply(&stream, &mut scratch, &step, &targets, inputs, x.view(), width, to);
        let error = refused.expect_err(said).to_string();
        assert!(error.contains(said), "{error:?} does not say {said:?}");
    }
    Ok(())
}
