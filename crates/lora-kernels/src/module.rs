//! Loading compiled kernels and launching them.

use std::sync::Arc;

use cudarc::driver::sys::CUfunction_attribute;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, sys};

use crate::CudaError;
use crate::error::Doing;

/// The shape of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    /// Blocks.
    pub blocks: (u32, u32, u32),
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared: u32,
}

impl Grid {
    /// `blocks` of `threads`.
    pub fn new(blocks: (u32, u32, u32), threads: u32) -> Self {
        Self { blocks, threads, shared: 0 }
    }
}

/// A compiled file of kernels.
pub(crate) struct Module {
    module: Arc<CudaModule>,
}

/// A kernel.
#[derive(Clone, Debug)]
pub(crate) struct Function {
    function: CudaFunction,
}

impl Module {
    /// Loads a fatbin: the device's machine code if it has it, else its PTX, compiled by the driver.
    pub fn load(context: &Arc<CudaContext>, image: &'static [u8]) -> Result<Self, CudaError> {
        let image = cudarc::nvrtc::Ptx::from_binary(image.to_vec());
        Ok(Self { module: context.load_module(image).doing("loading kernels")? })
    }

    /// A kernel by name, and its code on the device.
    ///
    /// The driver would otherwise load the code at the first launch, and may wait for the device to be idle then:
    /// for ever, behind a kernel that waits for what this thread is about to put on another stream.
    pub fn function(&self, name: &'static str) -> Result<Function, CudaError> {
        let function = self.module.load_function(name).doing(name)?;
        // SAFETY: a function of a module that is loaded.
        unsafe { sys::cuFuncLoad(function.cu_function()) }.result().doing(name)?;
        Ok(Function { function })
    }

    /// A kernel that uses up to `bytes` of dynamic shared memory.
    pub fn function_with_shared(&self, name: &'static str, bytes: u32) -> Result<Function, CudaError> {
        let function = self.function(name)?;
        function
            .function
            .set_attribute(
                CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                bytes as i32,
            )
            .doing(name)?;
        Ok(function)
    }
}

impl Function {
    pub(crate) fn raw(&self) -> sys::CUfunction {
        self.function.cu_function()
    }
}

/// Pointers to a kernel's arguments. Only inside the call of [`crate::stream::Stream::launch`]: what it
/// points to lives until the end of that statement.
macro_rules! arguments {
    ($($value:expr),+ $(,)?) => {
        &mut [$(std::ptr::from_ref(&$value).cast_mut().cast::<std::ffi::c_void>()),+]
    };
}
pub(crate) use arguments;
