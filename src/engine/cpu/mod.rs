//! The CPU: a backend in plain Rust with the `gemm` crate's kernels, and the executor around it.

mod attention;
mod backend;
mod copier;
mod executor;
mod kernel;
mod kv;
mod math;
mod matmul;
mod memory;
mod packed;
mod simd;
mod slots;
mod step;

pub use backend::CpuBackend;
pub use executor::{CpuOptions, CpuStartError, cpu_executor};

pub(super) use memory::plan;
