//! The LoRA kernels against their twin.

mod common;

use common::lora_setup::{Case, Setup, TRAP, uploaded};
use common::{Random, device, download};
use lora_kernels::{
    CudaError, Device, DeviceBuffer, GemmSmall, Lora, LoraLimits, LoraScratch, LoraStep, Out, Product,
    Segment, Shrink, Stream, Target, Weight, bf16, large_tiles,
};

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
    // So many tiles that a cluster's blocks have two teams of threads, and one.
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
    // Many short chunks: three times as many tiles as rows would fill.
    Case {
        inputs: 1032,
        outputs: &[72, 40],
        adapters: &[(16, false), (30, true)],
        segments: &[
            (21, 0),
            (20, 1),
            (19, 0),
            (22, 1),
            (0, 0),
            (23, 0),
            (18, 1),
            (17, 0),
            (24, 1),
            (21, 0),
            (20, 1),
        ],
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

/// Decodes whose product does the shrink: few tiles and many, ragged inputs, several slices, mixed ranks, rows and modules
/// without an adapter, one adapter of all rows.
const SHRUNK_CASES: &[Case] = &[
    Case { inputs: 64, outputs: &[64], adapters: &[(4, false)], segments: &[(1, 0)], small: 16, max_rank: 0 },
    Case {
        inputs: 1000,
        outputs: &[520, 136, 136],
        adapters: &[(4, false), (13, true), (16, false), (64, true)],
        segments: &[(1, 0), (3, 1), (0, 0), (1, 2), (2, 3), (0, 0), (1, 1)],
        small: 16,
        max_rank: 0,
    },
    Case {
        inputs: 4096,
        outputs: &[4096, 4096, 4096],
        adapters: &[(16, false), (8, false), (16, true)],
        segments: &[(1, 0), (1, 1), (1, 2), (0, 0), (4, 0), (2, 1), (6, 2)],
        small: 16,
        max_rank: 0,
    },
    Case {
        inputs: 4096,
        outputs: &[4096, 4096, 4096],
        adapters: &[(16, false)],
        segments: &[(16, 0)],
        small: 16,
        max_rank: 0,
    },
    Case {
        inputs: 11_008,
        outputs: &[4096],
        adapters: &[(16, false), (4, true), (13, false)],
        segments: &[(16, 0), (3, 1), (0, 0), (12, 2)],
        small: 16,
        max_rank: 0,
    },
    Case {
        inputs: 11_008,
        outputs: &[264],
        adapters: &[(16, false), (4, true), (64, false)],
        segments: &[(1, 0), (2, 1), (0, 0), (1, 2), (1, 0)],
        small: 16,
        max_rank: 128,
    },
    // Many more rows of A than of the weight.
    Case {
        inputs: 4096,
        outputs: &[64],
        adapters: &[(32, false), (24, false), (1, false)],
        segments: &[
            (1, 0),
            (1, 1),
            (1, 2),
            (1, 0),
            (1, 1),
            (1, 0),
            (1, 1),
            (1, 2),
            (1, 0),
            (1, 1),
            (1, 0),
            (1, 1),
            (1, 2),
            (1, 0),
            (1, 1),
            (1, 0),
        ],
        small: 16,
        max_rank: 0,
    },
];

/// Tiles of `segments`, and behind them some that a kernel must not look at; how many are real.
fn tiles_and_traps(segments: &[Segment]) -> (Vec<Segment>, u32) {
    let mut tiles = Vec::new();
    large_tiles(segments, &mut tiles);
    let count = tiles.len();
    tiles.resize(if count > 0 { count + 3 } else { 0 }, TRAP);
    (tiles, count as u32)
}

/// What a batch has for the kernels, on the device, and behind it some that they must not look at.
struct Listed {
    small: DeviceBuffer<Segment>,
    count: DeviceBuffer<u32>,
    tiles: DeviceBuffer<Segment>,
    /// Empty without tiles: nobody asks for their number then.
    tile_count: DeviceBuffer<u32>,
    limits: LoraLimits,
}

impl Listed {
    fn new(device: &Device, stream: &Stream, setup: &Setup) -> Result<Self, CudaError> {
        let bound = if setup.small.is_empty() { 0 } else { setup.small.len() + 3 };
        let mut small = setup.small.clone();
        small.resize(bound, TRAP);
        let (tiles, tile_count) = tiles_and_traps(&setup.large);
        let tile_count = if tiles.is_empty() { vec![] } else { vec![tile_count] };
        Ok(Self {
            small: uploaded(device, stream, &small)?,
            count: uploaded(device, stream, &[setup.small.len() as u32])?,
            tiles: uploaded(device, stream, &tiles)?,
            tile_count: uploaded(device, stream, &tile_count)?,
            limits: LoraLimits { max_rows: setup.rows, max_small: bound, max_rank: setup.max_rank },
        })
    }

    fn step(&self) -> LoraStep<'_> {
        LoraStep {
            small: self.small.view(),
            small_count: self.count.view(),
            tiles: self.tiles.view(),
            tile_count: self.tile_count.view(),
            max_rank: self.limits.max_rank,
            shrunk: None,
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn every_shape_is_what_the_twin_computes() -> Result<(), CudaError> {
    let (device, stream) = device();
    let own = Lora::load(&device)?;
    for (number, case) in CASES.iter().enumerate() {
        let setup = Setup::new(&device, &stream, case, number as u64)?;
        let listed = Listed::new(&device, &stream, &setup)?;
        let step = listed.step();
        let x = uploaded(&device, &stream, &setup.x)?;
        let mut scratch = LoraScratch::new(&device, listed.limits)?;
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
                let mut applied = |out: Out<'_>| {
                    scratch.poison(&stream)?;
                    let Setup { targets, width, .. } = &setup;
                    lora.apply(&stream, &mut scratch, &step, targets, case.inputs, x.view(), *width, out)
                };
                let mut out = uploaded(&device, &stream, &base_bf16)?;
                applied(Out::Bf16(out.view_mut()))?;
                got_bf16.push(download(&stream, &out));
                let mut out = uploaded(&device, &stream, &base_f32)?;
                applied(Out::F32(out.view_mut()))?;
                got_f32.push(download(&stream, &out));
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
        let mut small = uploaded(&device, &stream, &[TRAP; 8])?;
        let mut count = uploaded(&device, &stream, &[0])?;
        let mut tiles = uploaded(&device, &stream, &[TRAP; 9])?;
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
                shrunk: None,
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
            segments.resize(8, TRAP);
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

/// The shrink done by the product whose output the adapters' products are added to.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_product_s_shrink_is_as_good_as_a_kernel_s() -> Result<(), CudaError> {
    let (device, stream) = device();
    let mut gemm = GemmSmall::load(&device)?;
    let lora = Lora::load(&device)?.with_overlap(true);
    let mut product_scratch = device.buffer::<f32>(4 << 20)?;
    for (number, case) in SHRUNK_CASES.iter().enumerate() {
        let setup = Setup::new(&device, &stream, case, number as u64)?;
        let listed = Listed::new(&device, &stream, &setup)?;
        let step = listed.step();
        let x = uploaded(&device, &stream, &setup.x)?;
        let (n, inputs, outputs) = (setup.rows, case.inputs, setup.width);
        let values = Random::new(7).bf16s(outputs * inputs, (3.0 / inputs as f32).sqrt());
        let weight = Weight { values: uploaded(&device, &stream, &values)?, bias: None, outputs, inputs };
        let forms = gemm.forms(n, outputs, inputs);
        assert!(!forms.is_empty(), "case {number}");
        for form in forms {
            let mut stored = device.buffer::<bf16>(n * outputs)?;
            let out = &mut Product::Store(stored.view_mut());
            gemm.run(&stream, form, n, &weight, x.view(), out, product_scratch.view_mut())?;
            let base: Vec<f64> = download(&stream, &stored).iter().map(|v| v.to_f64()).collect();
            let reference = setup.reference(inputs, &base, &setup.placed);

            let mut scratch = LoraScratch::new(&device, listed.limits)?;
            scratch.poison(&stream)?;
            let mut got = device.buffer::<bf16>(n * outputs)?;
            let shrink = Shrink::new(&mut scratch, &step, &setup.targets, inputs, x.view())?;
            assert!(gemm.can_shrink(form, &shrink), "case {number}, {form:?}");
            let (out, room) = (&mut Product::Store(got.view_mut()), product_scratch.view_mut());
            let slices = gemm.run_with_shrink(&stream, form, n, &weight, x.view(), out, &shrink, room)?;
            let shrunk = LoraStep { shrunk: Some(slices), ..step };
            let (x, out) = (x.view(), Out::Bf16(got.view_mut()));
            lora.apply(&stream, &mut scratch, &shrunk, &setup.targets, inputs, x, outputs, out)?;
            let got: Vec<f64> = download(&stream, &got).iter().map(|v| v.to_f64()).collect();
            let what = format!("case {number}, {}", form.name());
            let worst = setup.check(&what, &got, &base, &reference, |_| 5e-3);
            println!("{what}: {n} rows, worst row {worst:.2e}");

            // Of no segment at all, as when a graph is recorded.
            let zero = uploaded(&device, &stream, &[0u32])?;
            let step = LoraStep { small_count: zero.view(), ..step };
            let mut alone = device.buffer::<bf16>(n * outputs)?;
            let shrink = Shrink::new(&mut scratch, &step, &setup.targets, inputs, x)?;
            let (out, room) = (&mut Product::Store(alone.view_mut()), product_scratch.view_mut());
            gemm.run_with_shrink(&stream, form, n, &weight, x, out, &shrink, room)?;
            let bits = |buffer| -> Vec<u16> {
                download(&stream, buffer).iter().map(|v: &bf16| v.to_bits()).collect()
            };
            assert!(bits(&alone) == bits(&stored), "{what}: a product beside no shrink has other bits");
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
        (1, 16, vec![Target { outputs: 60, ..good }], 64, 128, "60 outputs: a multiple of 8"),
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
            shrunk: None,
        };
        let to = Out::Bf16(out.view_mut());
        let refused = lora.apply(&stream, &mut scratch, &step, &targets, inputs, x.view(), width, to);
        let error = refused.expect_err(said).to_string();
        assert!(error.contains(said), "{error:?} does not say {said:?}");
    }
    Ok(())
}
