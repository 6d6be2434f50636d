//! LoRA: adds the products of many adapters, each at its own rank, to the projections of one batch.
//!
//! `out[row, column..column + outputs] += scale · (x[row] · Aᵀ) · Bᵀᵀ` for the rows of every segment. Cost
//! follows the rows and adapters of the batch, never the number of slots nor the largest rank. Small segments
//! (decode) read each adapter once; large ones (prefill) run on tensor cores in tiles of 64 rows. Sums are
//! made in an order that depends on the shapes alone, so that a repeated step gives the same bits.

mod fused;
mod large;
mod layout;
mod scratch;
mod small;

pub use fused::RopeKvCall;
pub use layout::{SMALL_ROWS, Segment, TILE_ROWS, Target, covers, large_tiles};
pub use scratch::{LoraLimits, LoraScratch};
pub use small::Shrink;

use half::bf16;

use crate::error::ensure;
use crate::memory::{View, ViewMut};
use crate::module::Function;
use crate::stream::Stream;
use crate::{CudaError, Device};
use fused::Fused;
use large::Large;
use layout::RawTargets;
use scratch::rank_pitch;
use small::Small;

const NAME: &str = "lora";
/// Ranks of a tensor-core product.
const UNIT: usize = 16;
/// The largest rank.
const MAX_RANK: usize = 128;

/// The adapters of a step's rows. A row is in one segment at most; rows in none get nothing added.
///
/// What lies in device memory is not checked: segments must lie inside the batch and name adapters that are
/// there, each of rank 1 to `max_rank`.
#[derive(Clone, Copy, Debug)]
pub struct LoraStep<'a> {
    /// Segments of 1 to [`SMALL_ROWS`] rows; the first `small_count` of them count. Its length, the upper
    /// bound, is what a captured graph is made for.
    pub small: View<'a, Segment>,
    /// One number: how many small segments there are. Read where `small` is not empty.
    pub small_count: View<'a, u32>,
    /// Segments of any number of rows, cut into tiles of up to [`TILE_ROWS`] by [`large_tiles`]: rows of a tile beyond
    /// those are left alone. The first `tile_count` of them count; its length, the upper bound, is what a captured graph
    /// is made for.
    pub tiles: View<'a, Segment>,
    /// One number: how many tiles there are. Read where `tiles` is not empty.
    pub tile_count: View<'a, u32>,
    /// The largest rank of the step, or of all adapters.
    pub max_rank: usize,
    /// A product has done the small segments' shrink, in this many slices of the inputs: see [`Shrink`]. None where a
    /// kernel of its own does it.
    pub shrunk: Option<u32>,
}

/// Where products are added: `[rows, width]`.
#[derive(Debug)]
pub enum Out<'a> {
    /// An activation.
    Bf16(ViewMut<'a, bf16>),
    /// The residual stream.
    F32(ViewMut<'a, f32>),
}

impl Out<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Bf16(out) => out.len(),
            Self::F32(out) => out.len(),
        }
    }

    fn address(&self) -> u64 {
        match self {
            Self::Bf16(out) => out.address(),
            Self::F32(out) => out.address(),
        }
    }

    fn element(&self) -> usize {
        match self {
            Self::Bf16(_) => size_of::<bf16>(),
            Self::F32(_) => size_of::<f32>(),
        }
    }
}

/// Kernels that come in two forms, by the output's type.
#[derive(Clone, Debug)]
struct ByOut {
    bf16: Function,
    f32: Function,
}

impl ByOut {
    fn get(&self, out: &Out<'_>) -> &Function {
        match out {
            Out::Bf16(_) => &self.bf16,
            Out::F32(_) => &self.f32,
        }
    }
}

/// The LoRA kernels.
#[derive(Clone, Debug)]
pub struct Lora {
    small: Small,
    large: Large,
    fused: Fused,
    can_overlap: bool,
    overlap: bool,
}

impl Lora {
    /// Loads them.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        Ok(Self {
            small: Small::load(device)?,
            large: Large::load(device)?,
            fused: Fused::load(device)?,
            can_overlap: device.is_hopper(),
            overlap: false,
        })
    }

    /// Whether an expand may begin, and load what does not depend on the shrink, while the shrink still runs
    /// (programmatic dependent launch; on devices from sm_90). Results are the same. Off at first.
    #[must_use]
    pub fn with_overlap(mut self, overlap: bool) -> Self {
        self.overlap = overlap && self.can_overlap;
        self
    }

    /// The kernels that other devices run: to compare with.
    #[must_use]
    pub fn portable(self) -> Self {
        Self { large: self.large.portable(), ..self }
    }

    /// Adds the adapters' products for up to three `targets` that share the input `x` `[rows, inputs]` to
    /// `out` `[rows, width]`.
    ///
    /// Launches two kernels for the small segments and two for the large ones, where there are any. The
    /// scratch memory may be used by one stream at a time.
    ///
    /// # Errors
    /// If a width is not a multiple of 8, a view is too small or not aligned to 16 bytes, targets overlap or
    /// leave the output, or the scratch memory was made for less.
    #[allow(clippy::too_many_arguments)]
    pub fn apply(
        &self,
        stream: &Stream,
        scratch: &mut LoraScratch,
        step: &LoraStep<'_>,
        targets: &[Target],
        inputs: usize,
        x: View<'_, bf16>,
        width: usize,
        out: Out<'_>,
    ) -> Result<(), CudaError> {
        let call = Call::new(scratch.limits(), step, targets, inputs, x, width, &out)?;
        if !step.small.is_empty() {
            self.small(stream, scratch, step, &call, &out)?;
        }
        if !step.tiles.is_empty() {
            self.shrink_large(stream, scratch, step, &call)?;
            self.expand_large(stream, scratch, step, &call, &out)?;
        }
        Ok(())
    }
}

/// What both regimes need of a call.
struct Call {
    raw: RawTargets,
    targets: usize,
    widest: usize,
    inputs: usize,
    rows: usize,
    x: u64,
    width: usize,
    pitch: usize,
}

impl Call {
    fn new(
        limits: &LoraLimits,
        step: &LoraStep<'_>,
        targets: &[Target],
        inputs: usize,
        x: View<'_, bf16>,
        width: usize,
        out: &Out<'_>,
    ) -> Result<Self, CudaError> {
        check(limits, step, targets, inputs, x, width, out)?;
        Ok(Self {
            raw: RawTargets::new(targets),
            targets: targets.len(),
            widest: targets.iter().map(|t| t.outputs).max().unwrap_or(0),
            inputs,
            rows: x.len() / inputs,
            x: x.address(),
            width,
            pitch: rank_pitch(step.max_rank),
        })
    }

    /// Elements of one target's h.
    fn plane(&self) -> usize {
        self.rows * self.pitch
    }
}

/// The width of gate and up, which must be an output's halves.
fn halves(targets: &[Target]) -> Result<usize, CudaError> {
    let width = targets.iter().map(|t| t.outputs).max().unwrap_or(0);
    let halves = targets.len() == 2
        && targets.iter().enumerate().all(|(i, t)| t.column == i * width && t.outputs == width);
    ensure!(NAME, halves, "gate and up must be an output's halves, and are {targets:?}");
    Ok(width)
}

fn check_act(act: &ViewMut<'_, bf16>, rows: usize, width: usize) -> Result<(), CudaError> {
    ensure!(
        NAME,
        act.len() >= rows * width && act.address().is_multiple_of(16),
        "activations of {} elements for {rows} rows of {width}",
        act.len()
    );
    Ok(())
}

/// What a call's shrink reads.
fn check_inputs(
    limits: &LoraLimits,
    step: &LoraStep<'_>,
    targets: &[Target],
    inputs: usize,
    x: View<'_, bf16>,
) -> Result<(), CudaError> {
    ensure!(NAME, (1..=layout::TARGETS).contains(&targets.len()), "{} targets: 1 to 3", targets.len());
    ensure!(NAME, inputs > 0 && inputs.is_multiple_of(8), "{inputs} inputs: a multiple of 8 is needed");
    for target in targets {
        let Target { outputs, layer, .. } = *target;
        ensure!(NAME, outputs.is_multiple_of(8), "{outputs} outputs: a multiple of 8 is needed");
        ensure!(
            NAME,
            layer == targets[0].layer,
            "targets of layers {} and {layer}: a call's are of one",
            targets[0].layer
        );
    }
    let rows = x.len() / inputs;
    ensure!(NAME, rows * inputs == x.len(), "x of {} elements: not whole rows of {inputs}", x.len());
    ensure!(NAME, x.address().is_multiple_of(16), "x is not aligned to 16 bytes");
    ensure!(
        NAME,
        (1..=limits.max_rank).contains(&step.max_rank),
        "rank {}: scratch memory was made for 1 to {}",
        step.max_rank,
        limits.max_rank
    );
    let small = step.small.len();
    ensure!(
        NAME,
        small <= limits.max_small,
        "{small} small segments: scratch memory has {}",
        limits.max_small
    );
    ensure!(NAME, small == 0 || !step.small_count.is_empty(), "small segments without their number");
    let tiles = step.tiles.len();
    ensure!(NAME, tiles == 0 || !step.tile_count.is_empty(), "tiles without their number");
    ensure!(NAME, tiles <= u16::MAX as usize, "{tiles} tiles: at most 65535");
    ensure!(
        NAME,
        tiles == 0 || rows <= limits.max_rows,
        "{rows} rows: scratch memory was made for {}",
        limits.max_rows
    );
    Ok(())
}

fn check(
    limits: &LoraLimits,
    step: &LoraStep<'_>,
    targets: &[Target],
    inputs: usize,
    x: View<'_, bf16>,
    width: usize,
    out: &Out<'_>,
) -> Result<(), CudaError> {
    check_inputs(limits, step, targets, inputs, x)?;
    ensure!(NAME, width.is_multiple_of(8), "an output {width} wide: a multiple of 8 is needed");
    for (at, target) in targets.iter().enumerate() {
        let Target { column, outputs, .. } = *target;
        ensure!(
            NAME,
            column.is_multiple_of(8) && column + outputs <= width,
            "columns {column}..{} of {width}: multiples of 8 inside the output are needed",
            column + outputs
        );
        let overlapping =
            targets[..at].iter().find(|o| o.column < column + outputs && column < o.column + o.outputs);
        ensure!(NAME, overlapping.is_none(), "two targets share columns from {column}");
    }
    let rows = x.len() / inputs;
    ensure!(
        NAME,
        out.len() >= rows * width,
        "an output of {} elements for {rows} rows of {width}",
        out.len()
    );
    ensure!(NAME, out.address().is_multiple_of(16), "the output is not aligned to 16 bytes");
    Ok(())
}
