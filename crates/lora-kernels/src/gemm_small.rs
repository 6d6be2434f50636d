//! Products of up to 32 rows at the speed at which the weight comes from memory.

use crate::error::ensure;
use crate::lora::Shrink;
use crate::memory::{DeviceBuffer, View, ViewMut};
use crate::module::{Function, Grid, Module, arguments};
use crate::product::{Kind, Product, Weight};
use crate::stream::Stream;
use crate::{CudaError, Device, bf16};

const KERNEL: &str = "gemm_small";
/// Of a block.
const WARPS: usize = 16;
/// Outputs of a tile.
const TILE: usize = 8;
/// Inputs that warps are given at once.
const UNIT: usize = 64;
/// Rows of A that a block has room for the places of, and bytes of such a place.
const MOST_CARRIED: usize = 96;
const CARRIED: usize = 16;

/// One of the kernels of `cuda/gemm_small.cu`, which says what the numbers are.
#[derive(Debug)]
struct Variant {
    name: &'static str,
    /// The same with [`Product::SiluMul`] at its end.
    with_silu: &'static str,
    /// The same with a [`Shrink`].
    with_shrink: &'static str,
    /// Rows of x at most.
    rows: usize,
    windows: usize,
    stages: usize,
}

macro_rules! variant {
    ($name:literal, $rows:literal, $windows:literal, $stages:literal) => {
        Variant {
            name: $name,
            with_silu: concat!($name, "_silu"),
            with_shrink: concat!($name, "_shrink"),
            rows: $rows,
            windows: $windows,
            stages: $stages,
        }
    };
}

const VARIANTS: [Variant; 7] = [
    variant!("gemm_small_8_bulk", 8, 8, 3),
    variant!("gemm_small_8_async", 8, 8, 3),
    variant!("gemm_small_16_bulk", 16, 8, 3),
    variant!("gemm_small_16_async", 16, 8, 3),
    variant!("gemm_small_16_narrow_bulk", 16, 4, 5),
    variant!("gemm_small_32_bulk", 32, 4, 5),
    variant!("gemm_small_32_async", 32, 4, 5),
];

impl Variant {
    /// Inputs of one block.
    fn inputs(&self) -> usize {
        WARPS * self.windows * 32
    }

    /// Sums of a tile, for rows in sixteens.
    fn values(&self) -> usize {
        self.rows.next_multiple_of(16) * TILE
    }

    /// Bytes of shared memory: the warps' rings, two tiles' sums, the rings' barriers, and a flag.
    fn shared(&self) -> usize {
        let stage = TILE / 2 * (2 * self.windows * 64 + 64);
        WARPS * self.stages * (stage + size_of::<u64>())
            + 2 * WARPS * self.values() * size_of::<f32>()
            + size_of::<u64>()
    }

    /// The same with a [`Shrink`], whose rows' places lie behind the flag.
    fn shared_with_shrink(&self) -> usize {
        self.shared() + size_of::<u64>() + MOST_CARRIED * CARRIED
    }
}

/// A kernel, and how many slices of a shape's inputs it is run with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SmallForm {
    variant: usize,
    slices: usize,
    /// Of the outputs: blocks of a slice.
    ranges: usize,
    /// Sums that slices leave for each other.
    scratch: usize,
}

impl SmallForm {
    /// The kernel's name.
    pub fn name(&self) -> &'static str {
        VARIANTS[self.variant].name
    }

    /// f32 elements of scratch memory that it takes.
    pub fn scratch(&self) -> usize {
        self.scratch
    }
}

/// `GemmSmallArguments` of `cuda/gemm_small.cu`.
#[repr(C)]
struct Arguments {
    weight: u64,
    x: u64,
    out: u64,
    bias: u64,
    partials: u64,
    counters: u64,
    n: u32,
    outputs: u32,
    inputs: u32,
    kind: u32,
}

/// The loaded kernels. They are launched so that they begin, and ask for the first of the weight, while the
/// kernel before them ends.
#[derive(Debug)]
pub struct GemmSmall {
    functions: Vec<Function>,
    /// The same with [`Product::SiluMul`] at their end.
    with_silu: Vec<Function>,
    /// The same with a [`Shrink`].
    with_shrink: Vec<Function>,
    multiprocessors: usize,
    /// Zero between launches: the kernels set them back.
    counters: DeviceBuffer<u32>,
}

impl GemmSmall {
    /// Rows at most.
    pub const MOST_ROWS: usize = 32;

    /// Whether they are made for the device: compute capability 9.0.
    pub fn runs_on(device: &Device) -> bool {
        device.is_hopper()
    }

    /// Loads them.
    ///
    /// # Errors
    /// If they are not made for the device.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/gemm_small.fatbin"));
        let (major, minor) = device.info().capability;
        ensure!(KERNEL, Self::runs_on(device), "made for compute capability 9.0, not {major}.{minor}");
        let module = Module::load(device.context(), IMAGE)?;
        let load = |of: fn(&Variant) -> (&'static str, usize)| {
            let load = |(name, shared)| module.function_with_shared(name, shared as u32);
            VARIANTS.iter().map(of).map(load).collect::<Result<Vec<_>, _>>()
        };
        let multiprocessors = device.info().multiprocessors as usize;
        Ok(Self {
            functions: load(|variant| (variant.name, variant.shared()))?,
            with_silu: load(|variant| (variant.with_silu, variant.shared()))?,
            with_shrink: load(|variant| (variant.with_shrink, variant.shared_with_shrink()))?,
            multiprocessors,
            counters: device.buffer(multiprocessors)?,
        })
    }

    fn is_for(&self, form: SmallForm, n: usize, outputs: usize, inputs: usize) -> bool {
        let rows = VARIANTS[form.variant].rows;
        let suits = (1..=rows).contains(&n) && outputs > 0 && inputs > 0 && inputs.is_multiple_of(8);
        suits && self::form(form.variant, outputs, inputs, self.multiprocessors) == Some(form)
    }

    /// The ways in which a product of such a shape can be computed; none where it has too many rows, or inputs
    /// that are no multiple of 8 or too many.
    pub fn forms(&self, n: usize, outputs: usize, inputs: usize) -> Vec<SmallForm> {
        // Of kernels for more rows, none is faster.
        let rows = VARIANTS.iter().map(|v| v.rows).filter(|rows| *rows >= n).min();
        (0..VARIANTS.len())
            .filter(|at| Some(VARIANTS[*at].rows) == rows && inputs > 0)
            .filter_map(|at| form(at, outputs, inputs, self.multiprocessors))
            .filter(|form| self.is_for(*form, n, outputs, inputs))
            .collect()
    }

    /// `x · weightᵀ` in one of [`GemmSmall::forms`] for its shape; `x` is `[n, inputs]`, the output
    /// `[n, outputs]`. `scratch` has [`SmallForm::scratch`] elements at least. Launches of one `GemmSmall` or
    /// with one scratch memory must be on one stream.
    ///
    /// # Errors
    /// If the form is not one for the shape, or a buffer is too small or not aligned to 16 bytes.
    #[expect(clippy::too_many_arguments, reason = "a launch")]
    pub fn run(
        &mut self,
        stream: &Stream,
        form: SmallForm,
        n: usize,
        weight: &Weight,
        x: View<'_, bf16>,
        out: &mut Product<'_>,
        scratch: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        self.launch(stream, form, n, weight, x, out, None, scratch)
    }

    /// Whether a product in this form can do a shrink too: each block has room for its share of A's rows.
    pub fn can_shrink(&self, form: SmallForm, shrink: &Shrink<'_>) -> bool {
        form.slices <= shrink.most_slices && shrink.rows.div_ceil(form.ranges) <= MOST_CARRIED
    }

    /// [`GemmSmall::run`], and the shrink of the rows' adapters; in how many slices, for
    /// [`LoraStep::shrunk`](crate::LoraStep::shrunk).
    ///
    /// # Errors
    /// As [`GemmSmall::run`]; or if [`GemmSmall::can_shrink`] is false, or the shrink is of another input.
    #[expect(clippy::too_many_arguments, reason = "a launch")]
    pub fn run_with_shrink(
        &mut self,
        stream: &Stream,
        form: SmallForm,
        n: usize,
        weight: &Weight,
        x: View<'_, bf16>,
        out: &mut Product<'_>,
        shrink: &Shrink<'_>,
        scratch: ViewMut<'_, f32>,
    ) -> Result<u32, CudaError> {
        ensure!(
            KERNEL,
            self.can_shrink(form, shrink),
            "{form:?} has no room for a shrink of {} rows",
            shrink.rows
        );
        ensure!(
            KERNEL,
            shrink.x == (n, weight.inputs, x.address()) && out.kind() != Kind::SiluMul,
            "a shrink of another input than the product's {n} rows, or beside SiLU"
        );
        self.launch(stream, form, n, weight, x, out, Some(shrink), scratch)?;
        Ok(form.slices as u32)
    }

    #[expect(clippy::too_many_arguments, reason = "a launch")]
    fn launch(
        &mut self,
        stream: &Stream,
        form: SmallForm,
        n: usize,
        weight: &Weight,
        x: View<'_, bf16>,
        out: &mut Product<'_>,
        shrink: Option<&Shrink<'_>>,
        scratch: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        weight.check(KERNEL, n, x, out)?;
        let Weight { outputs, inputs, .. } = *weight;
        let halved = out.kind() == Kind::SiluMul;
        ensure!(
            KERNEL,
            !halved || (outputs.is_multiple_of(TILE) && weight.bias.is_none()),
            "gate and up of {outputs} outputs in all: a multiple of {TILE}, without a bias, is needed"
        );
        ensure!(
            KERNEL,
            self.is_for(form, n, outputs, inputs),
            "{form:?} is not for {n} rows, {outputs} outputs and {inputs} inputs"
        );
        ensure!(
            KERNEL,
            scratch.len() >= form.scratch,
            "{} elements of scratch memory where {} are needed",
            scratch.len(),
            form.scratch
        );
        let addresses = [weight.values.view().address(), x.address()];
        ensure!(KERNEL, addresses.iter().all(|a| a.is_multiple_of(16)), "rows not aligned to 16 bytes");
        let variant = &VARIANTS[form.variant];
        let arguments = Arguments {
            weight: weight.values.view().address(),
            x: x.address(),
            out: out.address(),
            bias: weight.bias.as_ref().map_or(0, |(_, wide)| wide.view().address()),
            partials: scratch.address(),
            counters: self.counters.view_mut().address(),
            n: n as u32,
            outputs: outputs as u32,
            inputs: inputs as u32,
            kind: out.kind() as u32,
        };
        let shared = if shrink.is_some() { variant.shared_with_shrink() } else { variant.shared() };
        let grid = Grid {
            blocks: (form.ranges as u32, form.slices as u32, 1),
            threads: (WARPS * 32) as u32,
            shared: shared as u32,
        };
        let functions = if halved { &self.with_silu } else { &self.functions };
        // SAFETY: the parameters are the kernel's; buffers hold the rows, the scratch memory the slices' sums, and
        // there is a counter for each range; a shrink's own memory has room for its sums; the kernel keeps the rule for
        // launches that overlap.
        unsafe {
            match shrink {
                None => stream.launch_next(&functions[form.variant], grid, arguments![arguments]),
                Some(shrink) => stream.launch_next(
                    &self.with_shrink[form.variant],
                    grid,
                    arguments![arguments, shrink.raw],
                ),
            }
        }
    }
}

/// One block for each multiprocessor at most, each with tiles of its own and inputs that fit in registers.
fn form(variant: usize, outputs: usize, inputs: usize, multiprocessors: usize) -> Option<SmallForm> {
    let of = &VARIANTS[variant];
    let slices = inputs.next_multiple_of(UNIT).div_ceil(of.inputs());
    let tiles = outputs.div_ceil(TILE);
    let ranges = (multiprocessors / slices).min(tiles);
    let scratch = if slices > 1 { tiles * slices * of.values() } else { 0 };
    (ranges > 0).then_some(SmallForm { variant, slices, ranges, scratch })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forms(outputs: usize, inputs: usize) -> Vec<SmallForm> {
        (0..VARIANTS.len()).filter_map(|variant| form(variant, outputs, inputs, 132)).collect()
    }

    #[test]
    fn blocks_fit_on_a_multiprocessor_of_compute_capability_9() {
        for variant in &VARIANTS {
            let shared = variant.shared_with_shrink();
            assert!(shared <= 227 * 1024, "{variant:?}: {shared} bytes");
        }
    }

    #[test]
    fn every_warp_has_room_for_its_inputs() {
        for inputs in (8..30_000).step_by(8) {
            for form in forms(4096, inputs) {
                let (units, parts) = (inputs.div_ceil(UNIT), form.slices * WARPS);
                let longest = (0..parts).map(|p| units * (p + 1) / parts - units * p / parts).max();
                let room = VARIANTS[form.variant].windows / 2;
                assert!(longest.unwrap_or(0) <= room, "{inputs} inputs, {form:?}");
            }
        }
    }

    #[test]
    fn the_chip_is_full_and_no_range_empty() {
        let of = |outputs, inputs| {
            let form = forms(outputs, inputs)[2];
            (form.slices, form.ranges, form.scratch)
        };
        assert_eq!(of(12_288, 4096), (1, 132, 0));
        assert_eq!(of(4096, 11_008), (3, 44, 512 * 3 * 128));
        assert_eq!(of(64, 64), (1, 8, 0));
        assert_eq!(of(100, 1000), (1, 13, 0));
    }
}
