//! What the copy engine of sm_90 knows of a matrix: boxes of it go to shared memory as the tensor cores read them.

use cudarc::driver::sys::{self, CUtensorMap};

use crate::error::{Doing, ensure};
use crate::{CudaError, bf16};

/// A bf16 matrix in device memory, by rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    pub address: u64,
    pub columns: usize,
    pub rows: usize,
    /// Elements from one row to the next.
    pub width: usize,
}

impl Matrix {
    /// Describes it for boxes of `rows` rows and 64 columns, which lie in shared memory as rows of 128 bytes,
    /// swizzled in groups of 8. What a box has outside the matrix is zeros.
    pub fn boxes_of(&self, kernel: &'static str, rows: u32) -> Result<CUtensorMap, CudaError> {
        // Coordinates are signed.
        ensure!(kernel, self.rows <= i32::MAX as usize, "{} rows are too many", self.rows);
        let mut map = CUtensorMap { opaque: [0; 16] };
        let sizes = [self.columns as u64, self.rows as u64];
        let strides = [(self.width * size_of::<bf16>()) as u64];
        let (tile, steps) = ([64u32, rows], [1u32, 1]);
        // SAFETY: writes the map only; the arrays are as long as the rank asks for. The address is not followed.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                self.address as *mut std::ffi::c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                tile.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .doing("describing a matrix to the copy engine")?;
        Ok(map)
    }
}
