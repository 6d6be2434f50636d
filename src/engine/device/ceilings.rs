//! What a device can do at best.

use serde::{Deserialize, Serialize};

/// Rates of a device, the best that it was seen to do.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// One large matrix product, operations a second.
    pub gemm_flops: f64,
    /// Large matrix products one after another, as power and cooling bear them; none where it was not measured.
    pub gemm_sustained_flops: Option<f64>,
    /// Device memory read, bytes a second.
    pub read_bytes_s: f64,
    /// Page-locked host memory to the device, bytes a second.
    pub pinned_bytes_s: f64,
    /// Ordinary host memory to the device, bytes a second.
    pub pageable_bytes_s: f64,
}
