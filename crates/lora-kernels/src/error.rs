//! What can go wrong on a device.

use cudarc::cublaslt::result::CublasError;
use cudarc::driver::DriverError;

/// A failure of the device, its driver or a caller's shapes.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// A library that a driver or toolkit would have brought.
    #[error("{library} cannot be loaded: {remedy}")]
    Missing {
        /// Which.
        library: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// No such device.
    #[error("there is no CUDA device {ordinal}: {count} found (see CUDA_VISIBLE_DEVICES)")]
    NoDevice {
        /// The one asked for.
        ordinal: usize,
        /// Devices that the driver shows.
        count: usize,
    },
    /// A device that the kernels are not made for.
    #[error("{name} has compute capability {major}.{minor}: 8.0 or newer is needed")]
    TooOld {
        /// Its name.
        name: String,
        /// Capability.
        major: i32,
        /// Capability.
        minor: i32,
    },
    /// The driver.
    #[error("{doing}: {source}")]
    Driver {
        /// What was being done.
        doing: &'static str,
        /// What it said.
        source: DriverError,
    },
    /// Memory that is not there.
    #[error("cannot allocate {bytes} bytes of {kind} memory: {source}")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// Device or pinned.
        kind: &'static str,
        /// What the driver said.
        source: DriverError,
    },
    /// cuBLASLt.
    #[error("cuBLASLt: {doing}: {source:?}")]
    Blas {
        /// What was being done.
        doing: String,
        /// What it said.
        source: CublasError,
    },
    /// A shape that a kernel cannot take, or a buffer too small for it: a bug of the caller, or a model that
    /// the kernels are not made for.
    #[error("{kernel}: {what}")]
    Shape {
        /// Which kernel.
        kernel: &'static str,
        /// What is wrong.
        what: String,
    },
}

/// Says what was being done when the driver failed.
pub(crate) trait Doing<T> {
    fn doing(self, what: &'static str) -> Result<T, CudaError>;
}

impl<T> Doing<T> for Result<T, DriverError> {
    fn doing(self, what: &'static str) -> Result<T, CudaError> {
        self.map_err(|source| CudaError::Driver { doing: what, source })
    }
}

/// Refuses a shape.
macro_rules! ensure {
    ($kernel:expr, $holds:expr, $($said:tt)+) => {
        if !$holds {
            return Err($crate::CudaError::Shape { kernel: $kernel, what: format!($($said)+) });
        }
    };
}
pub(crate) use ensure;
