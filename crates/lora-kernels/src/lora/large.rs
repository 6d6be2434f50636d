//! Segments of many rows: their shrink and expand on tensor cores, over tiles.

use half::bf16;

use super::layout::TILE_ROWS;
use super::scratch::{FULL_CHIP, LARGE_PARTS, PARTIAL_BLOCK};
use super::{ByOut, Call, Lora, LoraScratch, LoraStep, MAX_RANK, Out, UNIT};
use crate::module::{Function, Grid, Module, arguments};
use crate::stream::Stream;
use crate::{CudaError, Device};

/// Units of a block of the large shrink, inputs of its stage, and its stages.
pub(super) const GROUP_UNITS: usize = 4;
const STAGE_INPUTS: usize = 64;
const STAGES: usize = 4;
/// Threads of a block of the large shrink, or of one of its teams in a cluster; teams at most; stages of each.
const TEAM_THREADS: usize = 128;
const MAX_TEAMS: usize = 4;
const TEAM_STAGES: usize = 3;
/// Splits of the large shrink beyond which adding them up costs more than it saves: as many as a cluster's blocks.
const MAX_LARGE_SPLITS: usize = 8;
/// Bytes of a row of the large expand's tile.
pub(super) const LARGE_ROW_BYTES: usize = 256;

// The shrink's blocks keep this many sums, which the scratch memory is sized by.
const _: () = assert!(PARTIAL_BLOCK == TILE_ROWS * GROUP_UNITS * UNIT);

/// The loaded kernels.
#[derive(Clone, Debug)]
pub(super) struct Large {
    shrink: Function,
    /// Where the device is one that it is made for.
    shrink_cluster: Option<Function>,
    expand: ByOut,
}

impl Large {
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/lora_large.fatbin"));
        let module = Module::load(device.context(), IMAGE)?;
        let shrink =
            |name, stages| module.function_with_shared(name, shrink_large_shared(stages, GROUP_UNITS) as u32);
        let expand =
            |name, element| module.function_with_shared(name, expand_large_shared(MAX_RANK, element) as u32);
        let cluster = || shrink("lora_shrink_cluster", MAX_TEAMS * TEAM_STAGES);
        Ok(Self {
            shrink: shrink("lora_shrink_large", STAGES)?,
            shrink_cluster: device.is_hopper().then(cluster).transpose()?,
            expand: ByOut {
                bf16: expand("lora_expand_large_bf16", size_of::<bf16>())?,
                f32: expand("lora_expand_large_f32", size_of::<f32>())?,
            },
        })
    }

    /// The kernels that other devices run.
    pub fn portable(self) -> Self {
        Self { shrink_cluster: None, ..self }
    }
}

impl Lora {
    pub(super) fn shrink_large(
        &self,
        stream: &Stream,
        scratch: &mut LoraScratch,
        step: &LoraStep<'_>,
        call: &Call,
    ) -> Result<(), CudaError> {
        let tiles_count = step.tiles.len();
        let units = call.targets * (call.pitch / UNIT);
        let groups = units.div_ceil(GROUP_UNITS);
        let group_units = units.min(GROUP_UNITS);
        // As many parts of the inputs as fill the chip, in whole stages.
        let stages = call.inputs.div_ceil(STAGE_INPUTS);
        let splits_of =
            |tiles: usize| (LARGE_PARTS / (tiles * groups)).clamp(1, MAX_LARGE_SPLITS.min(stages));

        let (tiles, count) = (step.tiles.address(), step.tile_count.address());
        let (inputs, pitch, plane) = (call.inputs as u32, call.pitch as u32, call.plane());
        let (targets, unit_count, h) = (call.targets as u32, group_units as u32, scratch.h());
        let grid = |splits: usize, teams: usize, stages: usize| Grid {
            blocks: (tiles_count as u32, groups as u32, splits as u32),
            threads: (teams * TEAM_THREADS) as u32,
            shared: shrink_large_shared(stages, group_units) as u32,
        };
        // A graph is made for more tiles than its rows mostly make.
        let expected = call.rows.div_ceil(TILE_ROWS).clamp(1, tiles_count);
        let most = splits_of(expected);
        if let Some(cluster) = self.large.shrink_cluster.as_ref().filter(|_| most > 1) {
            // Shares of a block's sums are whole.
            let splits = 1 << most.ilog2();
            let teams = teams_of(tiles_count * groups * splits);
            let team_stages = stages.div_ceil(splits * teams);
            let in_flight = team_stages.min(TEAM_STAGES);
            // SAFETY: the kernel's parameters, in order; `check` has seen that the views hold what it reads and
            // that the scratch memory holds `[targets, rows, pitch]` of h.
            return unsafe {
                stream.launch_clusters(
                    cluster,
                    grid(splits, teams, teams * in_flight),
                    (1, 1, splits as u32),
                    arguments![
                        tiles,
                        count,
                        call.raw,
                        targets,
                        call.x,
                        inputs,
                        team_stages as u32,
                        unit_count,
                        pitch,
                        plane,
                        h
                    ],
                )
            };
        }
        let split_stages = stages.div_ceil(splits_of(tiles_count));
        let splits = stages.div_ceil(split_stages);
        let (partial, arrived) = (scratch.partial(), scratch.arrived());
        // SAFETY: as above; split blocks are at most LARGE_PARTS.
        unsafe {
            stream.launch(
                &self.large.shrink,
                grid(splits, 1, STAGES),
                arguments![
                    tiles,
                    count,
                    call.raw,
                    targets,
                    call.x,
                    inputs,
                    split_stages as u32,
                    unit_count,
                    pitch,
                    plane,
                    partial,
                    arrived,
                    h
                ],
            )
        }
    }

    pub(super) fn expand_large(
        &self,
        stream: &Stream,
        scratch: &mut LoraScratch,
        step: &LoraStep<'_>,
        call: &Call,
        out: &Out<'_>,
    ) -> Result<(), CudaError> {
        let (tiles, h) = (step.tiles.address(), scratch.h());
        let count = step.tile_count.address();
        let (inputs, width, pitch, plane) =
            (call.inputs as u32, call.width as u32, call.pitch as u32, call.plane());
        let columns = LARGE_ROW_BYTES / out.element();
        let grid = Grid {
            blocks: (call.widest.div_ceil(columns) as u32, step.tiles.len() as u32, call.targets as u32),
            threads: TEAM_THREADS as u32,
            shared: expand_large_shared(call.pitch, out.element()) as u32,
        };
        // SAFETY: as above; the output holds every target's columns in every row.
        unsafe {
            stream.launch_after(
                self.large.expand.get(out),
                grid,
                arguments![tiles, count, call.raw, inputs, pitch, plane, h, out.address(), width],
                self.overlap,
            )
        }
    }
}

/// Teams of a cluster's blocks, where there are so many blocks: a multiprocessor has registers for one block of four
/// teams, or for three of two. Clusters cannot use every place, and all are to run at once.
const fn teams_of(blocks: usize) -> usize {
    const ONE_EACH: usize = FULL_CHIP / 2 * 3 / 4;
    match blocks.div_ceil(ONE_EACH) {
        0..=1 => MAX_TEAMS,
        2 => 2,
        _ => 1,
    }
}

/// Shared memory of the large shrink: stages of x's tile and `units` of A.
fn shrink_large_shared(stages: usize, units: usize) -> usize {
    stages * (TILE_ROWS + units * UNIT) * STAGE_INPUTS * size_of::<bf16>()
}

/// Shared memory of the large expand: the output's tile, Bᵀ's, and h's with 8 elements of padding a row.
pub(super) fn expand_large_shared(pitch: usize, element: usize) -> usize {
    let columns = LARGE_ROW_BYTES / element;
    TILE_ROWS * LARGE_ROW_BYTES + (pitch * columns + TILE_ROWS * (pitch + 8)) * size_of::<bf16>()
}
