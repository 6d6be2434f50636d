//! Batches of adapters on the host and the device, and what the twin makes of them.

use lora_kernels::twins::lora::{HostSegment, apply};
use lora_kernels::{CudaError, Device, DeviceBuffer, Segment, Stream, Target, bf16};

use super::{Random, check_row};

/// A module that comes before the targets in each of two layers, of which the second is used.
const OTHER: (usize, usize) = (40, 24);

/// One batch and the targets that share its input.
pub struct Case {
    pub inputs: usize,
    /// Widths of the targets.
    pub outputs: &'static [usize],
    /// Rank, and whether the adapter leaves its second target alone, by an offset table.
    pub adapters: &'static [(usize, bool)],
    /// Rows and adapter of each segment; 0 rows stand for one row without an adapter.
    pub segments: &'static [(usize, usize)],
    /// Segments up to this many rows go to the kernels for small ones.
    pub small: usize,
    /// Largest rank of the launch; zero for that of the adapters.
    pub max_rank: usize,
}

struct Adapter {
    rank: usize,
    scale: f32,
    matrices: Vec<bf16>,
    offsets: Option<Vec<i32>>,
    on_device: (DeviceBuffer<bf16>, DeviceBuffer<i32>),
}

/// A case on the host and the device.
pub struct Setup {
    pub targets: Vec<Target>,
    pub width: usize,
    pub rows: usize,
    adapters: Vec<Adapter>,
    pub small: Vec<Segment>,
    pub large: Vec<Segment>,
    /// What was given to the kernels of either kind, in the batch's order: adapter, first row, rows.
    pub placed: Vec<(usize, usize, usize)>,
    pub x: Vec<bf16>,
    pub max_rank: usize,
}

impl Setup {
    pub fn new(device: &Device, stream: &Stream, case: &Case, seed: u64) -> Result<Self, CudaError> {
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

    pub fn reference(&self, inputs: usize, base: &[f64], placed: &[(usize, usize, usize)]) -> Vec<f64> {
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
    pub fn check(
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

/// A segment that a kernel must not look at: its addresses are no memory.
pub const TRAP: Segment =
    Segment { matrices: 64, offsets: 64, start: 0, rows: 16, rank: 16, scale: f32::NAN, ..Segment::NONE };

/// A buffer with these values.
pub fn uploaded<T: lora_kernels::Element>(
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
