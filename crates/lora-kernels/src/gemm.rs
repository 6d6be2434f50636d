//! Linear layers by cuBLASLt, with the algorithm chosen once for each shape.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::{result, sys};
use sys::cublasLtEpilogue_t::{CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_DEFAULT};
use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};

use crate::error::ensure;
use crate::memory::{DeviceBuffer, View, ViewMut};
use crate::stream::{Event, Stream};
use crate::{CudaError, Device, bf16};

/// What Hopper's split-K algorithms ask for at most.
const WORKSPACE: usize = 64 << 20;
/// `CUBLAS_OP_T`: of cuBLAS itself, which is not needed otherwise.
const OP_T: i32 = 1;
/// Candidates that are timed for a shape.
const CANDIDATES: usize = 8;
/// Runs of each candidate; the fastest counts, since all noise slows.
const RUNS: usize = 4;

/// The weight of a linear layer.
#[derive(Debug)]
pub struct Weight {
    /// `[outputs, inputs]`, row-major.
    pub values: DeviceBuffer<bf16>,
    /// `[outputs]`, in the number formats of both kinds of output.
    pub bias: Option<(DeviceBuffer<bf16>, DeviceBuffer<f32>)>,
    /// Rows.
    pub outputs: usize,
    /// Columns.
    pub inputs: usize,
}

/// Where a product goes.
#[derive(Debug)]
pub enum Product<'a> {
    /// `out = x · weightᵀ + bias`.
    Store(ViewMut<'a, bf16>),
    /// `out = x · weightᵀ + bias`, in f32.
    StoreWide(ViewMut<'a, f32>),
    /// `out += x · weightᵀ + bias`: onto the residual stream.
    Add(ViewMut<'a, f32>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Store,
    StoreWide,
    Add,
}

impl Product<'_> {
    fn kind(&self) -> Kind {
        match self {
            Self::Store(_) => Kind::Store,
            Self::StoreWide(_) => Kind::StoreWide,
            Self::Add(_) => Kind::Add,
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Store(out) => out.len(),
            Self::StoreWide(out) | Self::Add(out) => out.len(),
        }
    }

    fn address(&self) -> u64 {
        match self {
            Self::Store(out) => out.address(),
            Self::StoreWide(out) | Self::Add(out) => out.address(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    n: usize,
    outputs: usize,
    inputs: usize,
    kind: Kind,
    biased: bool,
}

/// Matrix products on one stream.
pub struct Gemm {
    handle: sys::cublasLtHandle_t,
    workspace: DeviceBuffer<u8>,
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
        device.stream()?.bind()?;
        let handle = blas(result::create_handle(), || "making a handle".into())?;
        Ok(Self { handle, workspace: device.buffer(WORKSPACE)?, plans: HashMap::new() })
    }

    /// Bytes that it holds on the device.
    pub const WORKSPACE_BYTES: usize = WORKSPACE;

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
        if self.plans.contains_key(&shape) {
            return Ok(());
        }
        let mut plan = Plan::new(shape)?;
        let candidates = plan.candidates(self.handle)?;
        let (begin, end) = (device.event(true)?, device.event(true)?);
        let mut best = f32::INFINITY;
        let mut turn = 0;
        for algorithm in candidates {
            plan.algorithm = algorithm;
            let timed = self.time(stream, &plan, weights, &mut turn, x, out, (&begin, &end));
            // A candidate that will not run is not chosen; if none runs, the first says why when it is used.
            let Ok(ms) = timed else { continue };
            if ms < best {
                best = ms;
                plan.chosen = Some(algorithm);
            }
        }
        if let Some(chosen) = plan.chosen {
            plan.algorithm = chosen;
        }
        self.plans.insert(shape, plan);
        Ok(())
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
        if !self.plans.contains_key(&shape) {
            let mut plan = Plan::new(shape)?;
            plan.algorithm = plan.candidates(self.handle)?[0];
            self.plans.insert(shape, plan);
        }
        self.launch(stream, &self.plans[&shape], weight, x, out)
    }

    #[expect(clippy::too_many_arguments, reason = "a measurement")]
    fn time(
        &self,
        stream: &Stream,
        plan: &Plan,
        weights: &[&Weight],
        turn: &mut usize,
        x: View<'_, bf16>,
        out: &mut Product<'_>,
        (begin, end): (&Event, &Event),
    ) -> Result<f32, CudaError> {
        let mut best = f32::INFINITY;
        for run in 0..=RUNS {
            let weight = weights[*turn % weights.len()];
            *turn += 1;
            stream.record(begin)?;
            self.launch(stream, plan, weight, x, out)?;
            stream.record(end)?;
            end.synchronize()?;
            // The first run loads the kernel.
            if run > 0 {
                best = best.min(begin.milliseconds_to(end)?);
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
        let Weight { outputs, inputs, .. } = *weight;
        ensure!("gemm", x.len() >= n * inputs, "{n} rows of {inputs} in a buffer of {}", x.len());
        ensure!("gemm", out.len() >= n * outputs, "{n} rows of {outputs} in a buffer of {}", out.len());
        ensure!(
            "gemm",
            weight.values.len() == outputs * inputs,
            "a weight of {} values",
            weight.values.len()
        );
        Ok(Shape { n, outputs, inputs, kind: out.kind(), biased: weight.bias.is_some() })
    }

    fn launch(
        &self,
        stream: &Stream,
        plan: &Plan,
        weight: &Weight,
        x: View<'_, bf16>,
        out: &mut Product<'_>,
    ) -> Result<(), CudaError> {
        let said = || format!("{:?}", plan.shape);
        if let Some((narrow, wide)) = &weight.bias {
            let bias =
                if plan.shape.kind == Kind::Store { narrow.view().address() } else { wide.view().address() };
            plan.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        let (one, beta) = (1.0f32, if plan.shape.kind == Kind::Add { 1.0f32 } else { 0.0 });
        // SAFETY: the shapes were checked against the buffers; the workspace is used on this stream only.
        let done = unsafe {
            result::matmul(
                self.handle,
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
                &raw const plan.algorithm,
                self.workspace.view().address() as *mut c_void,
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
    algorithm: sys::cublasLtMatmulAlgo_t,
    chosen: Option<sys::cublasLtMatmulAlgo_t>,
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
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            chosen: None,
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
