//! The CPU: a backend in plain Rust with the `gemm` crate's kernels, and the executor around it.

mod attention;
mod backend;
mod copier;
mod executor;
mod kv;
mod math;
mod matmul;
mod memory;
mod sample;
mod slots;

pub use backend::{CpuBackend, CpuError};
pub use executor::{CpuExecutor, CpuOptions, CpuStartError};
pub use memory::MemoryPlan;
