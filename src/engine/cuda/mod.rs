//! NVIDIA GPUs: a backend of our own kernels and cuBLASLt, slots in device memory, swaps from host memory
//! on a stream of their own, steps replayed as graphs.

mod backend;
mod copier;
mod executor;
mod graphs;
mod memory;
mod meta;
mod shape;
mod slabs;
mod slots;
mod timeline;

pub use backend::{CudaBackend, CudaStepError};
pub use executor::{CudaDevice, CudaOptions, CudaStartError};

pub(super) use memory::plan;
