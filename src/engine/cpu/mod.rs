//! The CPU: a backend in plain Rust with the `gemm` crate's kernels, and the executor around it.

mod attention;
mod backend;
mod compute;
mod copier;
mod executor;
mod kernel;
mod kv;
mod math;
mod matmul;
mod memory;
mod packed;
mod reports;
mod sample;
mod simd;
mod slots;
mod step;

pub use backend::{CpuBackend, CpuError};
pub use executor::{CpuExecutor, CpuOptions, CpuStartError};
pub use memory::MemoryPlan;
