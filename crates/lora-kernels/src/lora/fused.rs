//! The large expand together with what reads its output next, over covers of a whole batch.

use half::bf16;

use super::large::{LARGE_ROW_BYTES, expand_large_shared};
use super::layout::{Segment, Target};
use super::{Call, Lora, LoraScratch, LoraStep, MAX_RANK, NAME, Out, UNIT, rank_pitch};
use crate::error::ensure;
use crate::memory::{View, ViewMut};
use crate::module::{Function, Grid, Module, arguments};
use crate::paged::KvCacheMut;
use crate::rope_kv::{RopeKv, Rotation};
use crate::stream::Stream;
use crate::{CudaError, Device};

/// Columns of a tile.
const COLUMNS: usize = LARGE_ROW_BYTES / size_of::<bf16>();
const THREADS: u32 = 128;

/// The loaded kernels.
#[derive(Clone, Debug)]
pub(super) struct Fused {
    silu_mul: Function,
    /// For heads of 32, 64 and 128.
    rope_kv: [Function; 3],
    /// The largest rank whose tiles fit in a block's shared memory, for both.
    most_rank: usize,
}

impl Fused {
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/lora_fused.fatbin"));
        let module = Module::load(device.context(), IMAGE)?;
        let room = device.info().block_shared as usize;
        let most_rank =
            (1..=MAX_RANK / UNIT).map(|units| units * UNIT).filter(|r| shared(2, *r) <= room).max();
        let most_rank = most_rank.unwrap_or(0);
        let load = |name, targets| module.function_with_shared(name, shared(targets, most_rank) as u32);
        Ok(Self {
            silu_mul: load("lora_expand_silu_mul", 2)?,
            rope_kv: [
                load("lora_expand_rope_kv_32", 1)?,
                load("lora_expand_rope_kv_64", 1)?,
                load("lora_expand_rope_kv_128", 1)?,
            ],
            most_rank,
        })
    }
}

/// Shared memory of a block that works on `targets` outputs at a time.
fn shared(targets: usize, pitch: usize) -> usize {
    targets * expand_large_shared(pitch, size_of::<bf16>())
}

/// What [`Lora::apply_rope_kv`] does with queries, keys and values: the arguments of [`RopeKv::apply`].
pub struct RopeKvCall<'a> {
    /// The heads.
    pub kernel: &'a RopeKv,
    /// Angles and positions.
    pub rotation: Rotation<'a>,
    /// `[n]` places in the cache.
    pub kv_rows: View<'a, u32>,
    /// The cache.
    pub cache: KvCacheMut<'a>,
}

impl Lora {
    /// Whether ranks up to `max_rank` can be expanded together with what follows, on this device.
    pub fn fuses(&self, max_rank: usize) -> bool {
        rank_pitch(max_rank) <= self.fused.most_rank
    }

    /// [`Lora::apply`] to `gate_up` `[rows, 2 · width]`, and then `act = silu(gate) · up`, `[rows, width]`.
    /// `targets` are gate and up; `covers` list x's rows and no others, as [`covers`](super::covers) does. `gate_up`
    /// is left with the small segments' products only.
    ///
    /// # Errors
    /// As [`Lora::apply`]; or if targets are not the halves of `gate_up`, or [`Lora::fuses`] is false.
    #[allow(clippy::too_many_arguments)]
    pub fn apply_silu_mul(
        &self,
        stream: &Stream,
        scratch: &mut LoraScratch,
        step: &LoraStep<'_>,
        covers: View<'_, Segment>,
        targets: &[Target],
        inputs: usize,
        x: View<'_, bf16>,
        gate_up: ViewMut<'_, bf16>,
        act: ViewMut<'_, bf16>,
    ) -> Result<(), CudaError> {
        let width = super::halves(targets)?;
        let (from, out) = (gate_up.address(), Out::Bf16(gate_up));
        let call = self.fused_call(scratch, step, covers, targets, inputs, x, 2 * width, &out)?;
        super::check_act(&act, call.rows, width)?;
        if !step.small.is_empty() {
            self.small(stream, scratch, step, &call, &out)?;
        }
        self.shrink_large(stream, scratch, step, &call)?;
        let grid = Grid {
            blocks: (width.div_ceil(COLUMNS) as u32, covers.len() as u32, 1),
            threads: THREADS,
            shared: shared(2, call.pitch) as u32,
        };
        let h = scratch.h();
        let (inputs, pitch, plane) = (call.inputs as u32, call.pitch as u32, call.plane());
        // SAFETY: the kernel's parameters, in order; what they name was checked above and in `fused_call`.
        unsafe {
            stream.launch_after(
                &self.fused.silu_mul,
                grid,
                arguments![
                    covers.address(),
                    call.raw,
                    inputs,
                    pitch,
                    plane,
                    h,
                    from,
                    act.address(),
                    width as u32
                ],
                self.overlap,
            )
        }
    }

    /// [`Lora::apply`] to queries, keys and values in `qkv`, and then [`RopeKv::apply`] of all of x's rows: the
    /// queries are written back, keys and values go to the cache alone. `targets` are the three; `covers` as in
    /// [`Lora::apply_silu_mul`].
    ///
    /// # Errors
    /// As [`Lora::apply`] and [`RopeKv::apply`]; or if targets are not queries, keys and values, or
    /// [`Lora::fuses`] is false.
    #[allow(clippy::too_many_arguments)]
    pub fn apply_rope_kv(
        &self,
        stream: &Stream,
        scratch: &mut LoraScratch,
        step: &LoraStep<'_>,
        covers: View<'_, Segment>,
        targets: &[Target],
        inputs: usize,
        x: View<'_, bf16>,
        mut qkv: ViewMut<'_, bf16>,
        rope: RopeKvCall<'_>,
    ) -> Result<(), CudaError> {
        let shape = *rope.kernel.shape();
        let (q, kv) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let places = [(0, q), (q, kv), (q + kv, kv)];
        let heads = targets.len() == 3 && targets.iter().zip(places).all(|(t, p)| (t.column, t.outputs) == p);
        ensure!(
            NAME,
            heads,
            "queries, keys and values of {shape:?} are at {places:?}, and not at {targets:?}"
        );
        let out = Out::Bf16(qkv.reborrow());
        let call = self.fused_call(scratch, step, covers, targets, inputs, x, q + 2 * kv, &out)?;
        if !step.small.is_empty() {
            self.small(stream, scratch, step, &call, &out)?;
        }
        let RopeKvCall { kernel, rotation, kv_rows, cache } = rope;
        let arguments = kernel.arguments(call.rows, qkv, Some(rotation), kv_rows, cache)?;
        self.shrink_large(stream, scratch, step, &call)?;
        let grid = Grid {
            blocks: (call.widest.div_ceil(COLUMNS) as u32, 3, covers.len() as u32),
            threads: THREADS,
            shared: shared(1, call.pitch) as u32,
        };
        let function = match shape.head_dim {
            32 => &self.fused.rope_kv[0],
            64 => &self.fused.rope_kv[1],
            _ => &self.fused.rope_kv[2],
        };
        let h = scratch.h();
        let (inputs, pitch, plane) = (call.inputs as u32, call.pitch as u32, call.plane());
        // SAFETY: as above.
        unsafe {
            stream.launch_after(
                function,
                grid,
                arguments![covers.address(), call.raw, inputs, pitch, plane, h, arguments],
                self.overlap,
            )
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn fused_call(
        &self,
        scratch: &LoraScratch,
        step: &LoraStep<'_>,
        covers: View<'_, Segment>,
        targets: &[Target],
        inputs: usize,
        x: View<'_, bf16>,
        width: usize,
        out: &Out<'_>,
    ) -> Result<Call, CudaError> {
        let call = Call::new(scratch.limits(), step, targets, inputs, x, width, out)?;
        let rank = step.max_rank;
        ensure!(
            NAME,
            self.fuses(rank),
            "rank {rank}: on this device up to {} is expanded so",
            self.fused.most_rank
        );
        ensure!(
            NAME,
            !step.tiles.is_empty() && (1..=usize::from(u16::MAX)).contains(&covers.len()),
            "{} tiles and {} covers",
            step.tiles.len(),
            covers.len()
        );
        Ok(call)
    }
}
