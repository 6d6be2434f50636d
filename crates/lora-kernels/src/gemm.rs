//! Linear layers by cuBLASLt or, of few rows, by a kernel of our own: chosen once for each shape, by time.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::{result, sys};
use sys::cublasLtEpilogue_t::{CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_DEFAULT};
use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};

use crate::error::ensure;
use crate::gemm_small::{GemmSmall, SmallForm};
use crate::lora::Shrink;
use crate::memory::{DeviceBuffer, View};
use crate::product::{Kind, Product, Weight};
use crate::stream::{Event, Stream};
use crate::{CudaError, Device, bf16};

/// What Hopper's split-K algorithms ask for at most.
const WORKSPACE: usize = 64 << 20;
/// `CUBLAS_OP_T`: of cuBLAS itself, which is not needed otherwise.
const OP_T: i32 = 1;
/// Candidates that are timed for a shape.
const CANDIDATES: usize = 8;
/// Shapes of more rows than this are many and slow to time, and their first candidates are near each other.
const MANY_ROWS: usize = 512;
const CANDIDATES_OF_MANY: usize = 4;
/// Runs of each candidate; the fastest counts, since all noise slows.
const RUNS: usize = 4;
/// Products of few rows that are timed as one.
const CHAIN: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    n: usize,
    outputs: usize,
    inputs: usize,
    kind: Kind,
    biased: bool,
}

impl Shape {
    /// That of a product of `n` rows.
    fn of(n: usize, weight: &Weight, kind: Kind) -> Self {
        let Weight { outputs, inputs, .. } = *weight;
        Self { n, outputs, inputs, kind, biased: weight.bias.is_some() }
    }
}

/// How a shape's product is computed.
#[derive(Clone, Copy)]
enum Algorithm {
    Library(sys::cublasLtMatmulAlgo_t),
    Small(SmallForm),
}

/// What was chosen for each shape: of use to every [`Gemm`] of one device that multiplies by the same weights.
#[derive(Clone, Default)]
pub struct Choices(HashMap<Shape, Algorithm>);

impl std::fmt::Debug for Choices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Choices for {} shapes", self.0.len())
    }
}

/// Matrix products on one stream.
pub struct Gemm {
    handle: sys::cublasLtHandle_t,
    /// The library's, and the small kernels' sums.
    workspace: DeviceBuffer<u8>,
    /// Where the device is one that they are made for.
    small: Option<GemmSmall>,
    plans: HashMap<Shape, Plan>,
}

// SAFETY: the handle may be used from any thread, one at a time.
unsafe impl Send for Gemm {}

impl Drop for Gemm {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: made in `new`; plans do not refer to it.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Gemm {
    /// A handle and its workspace.
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        let small = if GemmSmall::runs_on(device) { Some(GemmSmall::load(device)?) } else { None };
        let mut gemm = Self::library(device)?;
        gemm.small = small;
        Ok(gemm)
    }

    /// Products by the library alone: to compare with.
    pub fn library(device: &Device) -> Result<Self, CudaError> {
        device.stream()?.bind()?;
        let handle = blas(result::create_handle(), || "making a handle".into())?;
        Ok(Self { handle, workspace: device.buffer(WORKSPACE)?, small: None, plans: HashMap::new() })
    }

    /// Bytes that it holds on the device.
    pub const WORKSPACE_BYTES: usize = WORKSPACE;

    /// What [`Gemm::choose`] has chosen so far.
    pub fn choices(&self) -> Choices {
        let chosen = self.plans.iter().filter(|(_, plan)| plan.chosen);
        Choices(chosen.filter_map(|(shape, plan)| Some((*shape, plan.algorithm?))).collect())
    }

    /// Takes what another has chosen, instead of timing anew.
    ///
    /// # Errors
    /// If the library cannot describe a shape.
    pub fn reuse(&mut self, choices: &Choices) -> Result<(), CudaError> {
        for (shape, algorithm) in &choices.0 {
            let mut plan = Plan::new(*shape)?;
            plan.algorithm = Some(*algorithm);
            plan.chosen = true;
            self.plans.insert(*shape, plan);
        }
        Ok(())
    }

    /// Chooses the algorithm for `n` rows by timing candidates on `weights`, which are of one shape: as many
    /// as there are layers, so that they come from memory and not from the cache, as in a step. What is in
    /// `out` afterwards means nothing.
    pub fn choose(
        &mut self,
        device: &Device,
        stream: &Stream,
        n: usize,
        weights: &[&Weight],
        x: View<'_, bf16>,
        out: &mut Product<'_>,
    ) -> Result<(), CudaError> {
        let Some(first) = weights.first() else { return Ok(()) };
        let shape = self.check(n, first, x, out)?;
        ensure!(
            "gemm",
            shape.kind != Kind::SiluMul,
            "it is computed as the stored product is: choose for that"
        );
        if self.plans.get(&shape).is_some_and(|plan| plan.chosen) {
            return Ok(());
        }
        let mut plan = Plan::new(shape)?;
        let mut candidates: Vec<_> =
            plan.candidates(self.handle)?.into_iter().map(Algorithm::Library).collect();
        if let Some(small) = &self.small {
            let room = WORKSPACE / size_of::<f32>();
            let forms = small.forms(n, shape.outputs, shape.inputs).into_iter();
            candidates.extend(forms.filter(|form| form.scratch() <= room).map(Algorithm::Small));
        }
        if n > MANY_ROWS {
            candidates.truncate(CANDIDATES_OF_MANY);
        }
        // If none runs, the first says why when it is used.
        let mut best = (f32::INFINITY, candidates[0]);
        plan.chosen = true;
        self.plans.insert(shape, plan);
        let (begin, end) = (device.event(true)?, device.event(true)?);
        let mut turn = 0;
        for algorithm in candidates {
            if let Some(plan) = self.plans.get_mut(&shape) {
                plan.algorithm = Some(algorithm);
            }
            let timed = self.time(stream, shape, weights, &mut turn, x, out, (&begin, &end));
            // A candidate that will not run is not chosen.
            let Ok(ms) = timed else { continue };
            if ms < best.0 {
                best = (ms, algorithm);
            }
        }
        if let Some(plan) = self.plans.get_mut(&shape) {
            plan.algorithm = Some(best.1);
        }
        Ok(())
    }

    /// What computes this product: a small kernel's name, or the library's.
    pub fn chosen(&self, n: usize, weight: &Weight, out: &Product<'_>) -> &'static str {
        match self.algorithm(&Shape::of(n, weight, out.kind())) {
            Some(Algorithm::Small(form)) => form.name(),
            _ => "cuBLASLt",
        }
    }

    /// Whether [`Product::SiluMul`] can be had of this product: a kernel for few rows was chosen for it when it is
    /// stored, which does both.
    pub fn multiplies_silu(&self, n: usize, weight: &Weight) -> bool {
        self.silu_form(n, weight).is_some()
    }

    fn silu_form(&self, n: usize, weight: &Weight) -> Option<SmallForm> {
        match self.algorithm(&Shape::of(n, weight, Kind::Store))? {
            Algorithm::Small(form) if weight.bias.is_none() && weight.outputs.is_multiple_of(8) => Some(form),
            _ => None,
        }
    }

    /// What was chosen, or is suggested, for a shape that has been seen.
    fn algorithm(&self, shape: &Shape) -> Option<Algorithm> {
        self.plans.get(shape)?.algorithm
    }

    /// `x · weightᵀ`; `x` is `[n, inputs]`, the output `[n, outputs]`. A shape that was not chosen for takes
    /// the library's first suggestion.
    pub fn run(
        &mut self,
        stream: &Stream,
        n: usize,
        weight: &Weight,
        x: View<'_, bf16>,
        out: &mut Product<'_>,
    ) -> Result<(), CudaError> {
        let shape = self.check(n, weight, x, out)?;
        if shape.kind == Kind::SiluMul {
            let form = self.silu_form(n, weight);
            let (Some(form), Some(small)) = (form, &mut self.small) else {
                return Err(CudaError::Shape {
                    kernel: "gemm",
                    what: format!("no algorithm does {shape:?}"),
                });
            };
            return small.run(stream, form, n, weight, x, out, self.workspace.view_mut().cast());
        }
        if !self.plans.contains_key(&shape) {
            let mut plan = Plan::new(shape)?;
            plan.algorithm = Some(Algorithm::Library(plan.candidates(self.handle)?[0]));
            self.plans.insert(shape, plan);
        }
        self.launch(stream, shape, weight, x, out)
    }

    /// [`Gemm::run`], and the shrink of the rows' adapters where a kernel for few rows does both: in how many slices then,
    /// for [`LoraStep::shrunk`](crate::LoraStep::shrunk).
    pub fn run_with_shrink(
        &mut self,
        stream: &Stream,
        n: usize,
        weight: &Weight,
        x: View<'_, bf16>,
        out: &mut Product<'_>,
        shrink: &Shrink<'_>,
    ) -> Result<Option<u32>, CudaError> {
        let shape = self.check(n, weight, x, out)?;
        match (self.algorithm(&shape), &mut self.small) {
            (Some(Algorithm::Small(form)), Some(small)) if small.can_shrink(form, shrink) => {
                let scratch = self.workspace.view_mut().cast();
                small.run_with_shrink(stream, form, n, weight, x, out, shrink, scratch).map(Some)
            }
            _ => self.run(stream, n, weight, x, out).map(|()| None),
        }
    }

    /// Milliseconds of one product.
    #[expect(clippy::too_many_arguments, reason = "a measurement")]
    fn time(
        &mut self,
        stream: &Stream,
        shape: Shape,
        weights: &[&Weight],
        turn: &mut usize,
        x: View<'_, bf16>,
        out: &mut Product<'_>,
        (begin, end): (&Event, &Event),
    ) -> Result<f32, CudaError> {
        // A step's products of few rows follow one another closely, and some begin before the last has ended.
        let chain = if shape.n <= GemmSmall::MOST_ROWS { CHAIN } else { 1 };
        let mut best = f32::INFINITY;
        for run in 0..=RUNS {
            stream.record(begin)?;
            for _ in 0..chain {
                let weight = weights[*turn % weights.len()];
                *turn += 1;
                self.launch(stream, shape, weight, x, out)?;
            }
            stream.record(end)?;
            end.synchronize()?;
            // The first run loads the kernel.
            if run > 0 {
                best = best.min(begin.milliseconds_to(end)? / chain as f32);
            }
        }
        Ok(best)
    }

    fn check(
        &self,
        n: usize,
        weight: &Weight,
        x: View<'_, bf16>,
        out: &Product<'_>,
    ) -> Result<Shape, CudaError> {
        weight.check("gemm", n, x, out)?;
        Ok(Shape::of(n, weight, out.kind()))
    }

    /// `shape` has a plan.
    fn launch(
        &mut self,
        stream: &Stream,
        shape: Shape,
        weight: &Weight,
        x: View<'_, bf16>,
        out: &mut Product<'_>,
    ) -> Result<(), CudaError> {
        let Self { handle, workspace, small, plans } = self;
        let plan = &plans[&shape];
        let said = || format!("{:?}", plan.shape);
        let algorithm = match (plan.algorithm, small) {
            (Some(Algorithm::Library(algorithm)), _) => algorithm,
            (Some(Algorithm::Small(form)), Some(small)) => {
                return small.run(stream, form, shape.n, weight, x, out, workspace.view_mut().cast());
            }
            _ => {
                return Err(CudaError::Shape { kernel: "gemm", what: format!("{shape:?} has no algorithm") });
            }
        };
        if let Some((narrow, wide)) = &weight.bias {
            let bias =
                if plan.shape.kind == Kind::Store { narrow.view().address() } else { wide.view().address() };
            plan.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        let (one, beta) = (1.0f32, if plan.shape.kind == Kind::Add { 1.0f32 } else { 0.0 });
        // SAFETY: the shapes were checked against the buffers; the workspace is used on this stream only.
        let done = unsafe {
            result::matmul(
                *handle,
                plan.desc,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                weight.values.view().address() as *const c_void,
                plan.a,
                x.address() as *const c_void,
                plan.b,
                out.address() as *const c_void,
                plan.c,
                out.address() as *mut c_void,
                plan.c,
                &raw const algorithm,
                workspace.view_mut().address() as *mut c_void,
                WORKSPACE,
                stream.raw().cast(),
            )
        };
        blas(done, said)
    }
}

/// One shape's descriptors and algorithm.
struct Plan {
    shape: Shape,
    desc: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    c: sys::cublasLtMatrixLayout_t,
    /// None only while it is made.
    algorithm: Option<Algorithm>,
    /// Whether candidates were timed.
    chosen: bool,
}

impl Plan {
    /// The library counts columns first: a row-major `[outputs, inputs]` weight is its `inputs × outputs`
    /// matrix, to be transposed; `x` its `inputs × n`, the output its `outputs × n`.
    fn new(shape: Shape) -> Result<Self, CudaError> {
        let said = || format!("describing {shape:?}");
        let Shape { n, outputs, inputs, kind, biased } = shape;
        let out = if kind == Kind::Store { CUDA_R_16BF } else { CUDA_R_32F };
        let layout = |of, rows: usize, cols: usize| {
            blas(result::create_matrix_layout(of, rows as u64, cols as u64, rows as i64), said)
        };
        let plan = Self {
            shape,
            desc: blas(
                result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, CUDA_R_32F),
                said,
            )?,
            a: layout(CUDA_R_16BF, inputs, outputs)?,
            b: layout(CUDA_R_16BF, inputs, n)?,
            c: layout(out, outputs, n)?,
            algorithm: None,
            chosen: false,
        };
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        plan.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &OP_T)?;
        let epilogue = if biased { CUBLASLT_EPILOGUE_BIAS } else { CUBLASLT_EPILOGUE_DEFAULT };
        plan.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        if biased {
            plan.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &out)?;
        }
        Ok(plan)
    }

    fn set<T>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<(), CudaError> {
        // SAFETY: the descriptor is alive, and each attribute is given in its own type.
        let set = unsafe {
            result::set_matmul_desc_attribute(
                self.desc,
                attribute,
                std::ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        };
        blas(set, || format!("describing {:?}", self.shape))
    }

    /// What the library suggests, best first; at least one.
    fn candidates(&self, handle: sys::cublasLtHandle_t) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, CudaError> {
        let said = || format!("choosing an algorithm for {:?}", self.shape);
        let preference = blas(result::create_matmul_pref(), said)?;
        let workspace = WORKSPACE;
        let mut found: [std::mem::MaybeUninit<sys::cublasLtMatmulHeuristicResult_t>; CANDIDATES] =
            [const { std::mem::MaybeUninit::uninit() }; CANDIDATES];
        let mut count = 0;
        // SAFETY: the descriptors are alive; at most `CANDIDATES` results are written.
        let asked = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast(),
                size_of::<usize>(),
            )
            .and_then(|()| {
                sys::cublasLtMatmulAlgoGetHeuristic(
                    handle,
                    self.desc,
                    self.a,
                    self.b,
                    self.c,
                    self.c,
                    preference,
                    CANDIDATES as i32,
                    found.as_mut_ptr().cast(),
                    &mut count,
                )
                .result()
            })
        };
        // SAFETY: made above.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        blas(asked, said)?;
        let usable: Vec<_> = found[..count as usize]
            .iter()
            // SAFETY: the library has written that many.
            .map(|r| unsafe { r.assume_init_ref() })
            .filter(|r| r.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS)
            .map(|r| r.algo)
            .collect();
        ensure!("gemm", !usable.is_empty(), "cuBLASLt has no algorithm for {:?}", self.shape);
        Ok(usable)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once.
        unsafe {
            let _ = result::destroy_matrix_layout(self.a);
            let _ = result::destroy_matrix_layout(self.b);
            let _ = result::destroy_matrix_layout(self.c);
            let _ = result::destroy_matmul_desc(self.desc);
        }
    }
}

fn blas<T>(result: Result<T, result::CublasError>, doing: impl FnOnce() -> String) -> Result<T, CudaError> {
    result.map_err(|source| CudaError::Blas { doing: doing(), source })
}
