//! Adapters that are copied into their slots while kernels that read them are on the stream.

mod common;

use std::time::Duration;

use common::{Random, device, poisoned, upload};
use lora_kernels::{
    Device, DeviceBuffer, GemmSmall, Lora, LoraLimits, LoraScratch, LoraStep, Out, Product, Segment, Shrink,
    Stream, Target, Weight, bf16, covers, large_tiles,
};

const INPUTS: usize = 256;
const WIDTH: usize = 520;
const RANK: usize = 24;
const LAYERS: usize = 3;
/// The layer that is read.
const LAYER: usize = 1;
/// Rows of the segments: one of few rows and one of many, each of the late adapter, between others of one that is
/// there.
const SEGMENTS: [(usize, bool); 4] = [(3, false), (5, true), (70, false), (90, true)];

/// How adapters' products are added.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// By kernels of their own.
    Apart,
    /// Together with SiLU.
    Fused,
    /// Those of few rows by a product that does the shrink, and an expand.
    Carried,
    /// The same, the expand together with SiLU.
    CarriedFused,
}

impl Way {
    const ALL: [Self; 4] = [Self::Apart, Self::Fused, Self::Carried, Self::CarriedFused];

    fn is_fused(self) -> bool {
        matches!(self, Self::Fused | Self::CarriedFused)
    }

    fn is_carried(self) -> bool {
        matches!(self, Self::Carried | Self::CarriedFused)
    }
}

/// Both adapters, of two targets side by side in each layer.
struct Setup {
    device: Device,
    stream: Stream,
    /// What is copied: the late adapter's matrices, and the places of its parts.
    matrices: Vec<bf16>,
    places: Vec<i32>,
    there: DeviceBuffer<bf16>,
    x: DeviceBuffer<bf16>,
    weight: Weight,
    base: Vec<bf16>,
    rows: usize,
}

impl Setup {
    fn new() -> Self {
        let (device, stream) = device();
        let mut random = Random::new(3);
        let part = RANK * (INPUTS + WIDTH);
        let rows = SEGMENTS.iter().map(|s| s.0).sum();
        let places = (0..2 * LAYERS).map(|m| (m * part / 8) as i32).collect();
        let there = upload(&device, &stream, &random.bf16s(2 * LAYERS * part, 0.1));
        Self {
            matrices: random.bf16s(2 * LAYERS * part, 0.1),
            places,
            there,
            x: upload(&device, &stream, &random.bf16s(rows * INPUTS, 1.0)),
            weight: Weight {
                values: upload(&device, &stream, &random.bf16s(2 * WIDTH * INPUTS, 0.1)),
                bias: None,
                outputs: 2 * WIDTH,
                inputs: INPUTS,
            },
            base: random.bf16s(rows * 2 * WIDTH, 1.0),
            rows,
            device,
            stream,
        }
    }

    fn targets() -> [Target; 2] {
        [0, 1].map(|module| Target {
            layer: LAYER,
            index: 2 * LAYER + module,
            elements_before: (2 * LAYER + module) * (INPUTS + WIDTH),
            column: module * WIDTH,
            outputs: WIDTH,
        })
    }

    /// The output, and activations of its halves. `late` gives the segments of the late adapter; `then` is called
    /// when the kernels are on the stream.
    fn run(&self, late: Segment, way: Way, then: impl FnOnce()) -> Vec<bf16> {
        let (device, stream) = (&self.device, &self.stream);
        let there =
            Segment { matrices: self.there.view().address(), rank: RANK as u32, scale: 0.5, ..Segment::NONE };
        let (mut small, mut large, mut start) = (Vec::new(), Vec::new(), 0);
        let few = |rows: usize| rows <= 16;
        for (rows, is_late) in SEGMENTS.into_iter().filter(|s| few(s.0) || !way.is_carried()) {
            let of = if is_late { late } else { there };
            let segment = Segment { start, rows: rows as u32, ..of };
            if few(rows) {
                small.push(segment)
            } else {
                large.push(segment)
            }
            start += rows as u32;
        }
        let (mut tiles, mut cover) = (Vec::new(), Vec::new());
        large_tiles(&large, &mut tiles);
        covers(&large, start, &mut cover);
        let counts = upload(device, stream, &[small.len() as u32, 0, 0, 0, tiles.len() as u32]);
        let small = upload(device, stream, &small);
        let (tiles, cover) = (upload(device, stream, &tiles), upload(device, stream, &cover));
        let mut step = LoraStep {
            small: small.view(),
            small_count: counts.view().slice(0..1),
            tiles: tiles.view(),
            tile_count: counts.view().slice(4..5),
            max_rank: RANK,
            shrunk: None,
        };
        let limits = LoraLimits { max_rows: self.rows, max_small: SEGMENTS.len(), max_rank: RANK };
        let mut scratch = LoraScratch::new(device, limits).unwrap();
        scratch.poison(stream).unwrap();
        let lora = Lora::load(device).unwrap().with_overlap(true);
        let mut out = upload(device, stream, &self.base);
        let mut act = poisoned(device, stream, self.rows * WIDTH);
        let n = start as usize;
        // Until the kernels are over, like all the memory here: freeing it would wait for them, who wait for `then`.
        let mut carrier = way.is_carried().then(|| {
            let gemm = GemmSmall::load(device).unwrap();
            let form = gemm.forms(n, 2 * WIDTH, INPUTS)[0];
            (gemm, form, device.buffer(form.scratch()).unwrap())
        });
        stream.synchronize().unwrap();
        let (targets, x) = (Self::targets(), self.x.view().slice(0..n * INPUTS));
        if let Some((gemm, form, room)) = &mut carrier {
            let shrink = Shrink::new(&mut scratch, &step, &targets, INPUTS, x).unwrap();
            let (out, room) = (&mut Product::Store(out.view_mut()), room.view_mut());
            let slices = gemm.run_with_shrink(stream, *form, n, &self.weight, x, out, &shrink, room).unwrap();
            step.shrunk = Some(slices);
        }
        let (scratch, from, to) = (&mut scratch, out.view_mut(), act.view_mut());
        match way {
            Way::Fused => {
                lora.apply_silu_mul(stream, scratch, &step, cover.view(), &targets, INPUTS, x, from, to)
            }
            Way::CarriedFused => {
                lora.apply_silu_mul_small(stream, scratch, &step, &targets, INPUTS, x, from, to)
            }
            Way::Apart | Way::Carried => {
                lora.apply(stream, scratch, &step, &targets, INPUTS, x, 2 * WIDTH, Out::Bf16(from))
            }
        }
        .unwrap();
        then();
        let (result, width) = if way.is_fused() { (&act, WIDTH) } else { (&out, 2 * WIDTH) };
        let mut host = vec![bf16::NAN; result.len()];
        result.download(stream, &mut host).unwrap();
        host.truncate(n * width);
        host
    }

    /// The late adapter at `matrices`, by a table of places or without.
    fn late(&self, matrices: &DeviceBuffer<bf16>, table: Option<&DeviceBuffer<i32>>) -> Segment {
        Segment {
            matrices: matrices.view().address(),
            offsets: table.map_or(0, |t| t.view().address()),
            rank: RANK as u32,
            scale: 0.7,
            ..Segment::NONE
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn kernels_wait_for_a_layer_that_is_on_its_way() {
    const DELAY: Duration = Duration::from_millis(4);
    let setup = Setup::new();
    let (device, stream) = (&setup.device, &setup.stream);
    let copies = device.stream().unwrap();
    let mut from = device.pinned(setup.matrices.len()).unwrap();
    from.copy_from_slice(&setup.matrices);
    let mut places_from = device.pinned(setup.places.len()).unwrap();
    places_from.copy_from_slice(&setup.places);
    for way in Way::ALL {
        let ready = upload(device, stream, &setup.matrices);
        let expected = setup.run(setup.late(&ready, None), way, || ());
        for by_table in [false, true] {
            // The last one: a count that wraps around on the way.
            for copied_before in [0, 300, u32::MAX - 1] {
                let what = format!("{way:?}, by table {by_table}, {copied_before} before");
                let slot = poisoned(device, stream, setup.matrices.len());
                let table = upload(device, stream, &vec![-1; setup.places.len()]);
                let arrivals = upload(device, stream, &[copied_before, 0, 0, 0]);
                let at = arrivals.view().address();
                let late = setup.late(&slot, by_table.then_some(&table));
                let late = Segment { arrival: at, copied_before, ..late };
                let got = setup.run(late, way, || {
                    // A layer that is not enough, and after a while the one that is.
                    let count = |layers: u32| {
                        // SAFETY: the count, which the kernels only read.
                        unsafe { copies.write_word(at, copied_before.wrapping_add(layers)) }.unwrap();
                    };
                    count(LAYER as u32);
                    std::thread::sleep(DELAY);
                    // SAFETY: both sources live, and the kernels read neither place before the count below.
                    unsafe { copies.copy_in_at(&places_from, table.view().address()) }.unwrap();
                    // SAFETY: as above.
                    unsafe { copies.copy_in_at(&from, slot.view().address()) }.unwrap();
                    count(LAYER as u32 + 1);
                });
                assert!(got == expected, "{what}: other bits than of an adapter that was there");
                let mut waits = [0; 4];
                arrivals.download(stream, &mut waits).unwrap();
                assert_eq!([waits[1], waits[3]], [0, 0], "{what}: waits for layers that were not read");
                let waited = Duration::from_nanos(u64::from(waits[2]));
                assert!(waited > DELAY / 2, "{what}: the wait for the layer was {waited:?}");

                // Once more: nothing is waited for.
                let arrivals = upload(device, stream, &[copied_before.wrapping_add(LAYERS as u32), 0, 0, 0]);
                let late = Segment { arrival: arrivals.view().address(), ..late };
                assert!(setup.run(late, way, || ()) == expected, "{what}: again");
                arrivals.download(stream, &mut waits).unwrap();
                assert_eq!(waits[1..], [0, 0, 0], "{what}: a wait for what is there");
            }
        }
    }
}
