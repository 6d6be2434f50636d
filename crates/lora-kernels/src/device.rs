//! A device with every kernel loaded.

use std::sync::Arc;

use cudarc::driver::{CudaContext, sys};

use crate::CudaError;
use crate::error::Doing;
use crate::memory::{DeviceBuffer, Element, PinnedBuffer};
use crate::stream::{Event, Stream, event_flags};

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// Its identity, as `nvidia-smi -L` prints it.
    pub uuid: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of shared memory that one block may ask for.
    pub block_shared: u32,
    /// The driver's CUDA version, 13000 for 13.0.
    pub driver: i32,
}

/// A CUDA device.
#[derive(Clone, Debug)]
pub struct Device {
    context: Arc<CudaContext>,
    info: Arc<DeviceInfo>,
}

impl Device {
    /// Opens device `ordinal`.
    ///
    /// # Errors
    /// If there is no driver, no cuBLASLt, no such device, or the device is older than sm_80.
    pub fn open(ordinal: usize) -> Result<Self, CudaError> {
        // SAFETY: only looks for the library and loads it.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::Missing {
                library: "the CUDA driver (libcuda.so.1)",
                remedy: "install an NVIDIA driver of version 580 or newer, or run on the CPU (--device cpu)",
            });
        }
        // SAFETY: as above.
        if !unsafe { cudarc::cublaslt::sys::is_culib_present() } {
            return Err(CudaError::Missing {
                library: "cuBLASLt (libcublasLt.so)",
                remedy: "install the CUDA 13 libraries and name their folder in LD_LIBRARY_PATH, or run on \
                         the CPU (--device cpu)",
            });
        }
        let count = match CudaContext::device_count() {
            // What the driver says instead of 0.
            Err(e) if e.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => 0,
            counted => counted.doing("counting devices")? as usize,
        };
        if ordinal >= count {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        let context = CudaContext::new(ordinal).doing("opening the device")?;
        // SAFETY: memory and streams of this crate are ordered by hand; cudarc's own slices are not used.
        unsafe { context.disable_event_tracking() };
        // A step's end is waited for by a thread that has nothing else to do: spinning tells soonest.
        context.set_flags(sys::CUctx_flags::CU_CTX_SCHED_SPIN).doing("setting the context's flags")?;
        let info = describe(&context)?;
        if info.capability.0 < 8 {
            let (major, minor) = info.capability;
            return Err(CudaError::TooOld { name: info.name, major, minor });
        }
        Ok(Self { context, info: Arc::new(info) })
    }

    /// What it is.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Bytes free and in all, as the driver says.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        let (free, total) = self.context.mem_get_info().doing("asking for free memory")?;
        Ok((free as u64, total as u64))
    }

    /// A stream of its own.
    pub fn stream(&self) -> Result<Stream, CudaError> {
        Ok(Stream::new(self.context.new_stream().doing("making a stream")?, self.is_hopper()))
    }

    /// An event; `timed` ones can tell the time between them and cost more.
    pub fn event(&self, timed: bool) -> Result<Event, CudaError> {
        Ok(Event::new(self.context.new_event(Some(event_flags(timed))).doing("making an event")?))
    }

    /// `len` zeroed elements of device memory.
    pub fn buffer<T: Element>(&self, len: usize) -> Result<DeviceBuffer<T>, CudaError> {
        DeviceBuffer::new(&self.context, len)
    }

    /// `len` zeroed elements of page-locked host memory.
    pub fn pinned<T: Element>(&self, len: usize) -> Result<PinnedBuffer<T>, CudaError> {
        PinnedBuffer::new(&self.context, len)
    }

    /// Waits for everything that was put on any of its streams.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.context.synchronize().doing("waiting for the device")
    }

    /// Whether it runs the machine code for sm_90a, which alone has kernels that wait for the end of the one before them,
    /// and blocks in clusters: what the driver makes of the PTX for other devices has neither.
    pub(crate) fn is_hopper(&self) -> bool {
        self.info.capability == (9, 0)
    }

    pub(crate) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }
}

fn describe(context: &Arc<CudaContext>) -> Result<DeviceInfo, CudaError> {
    const ASKING: &str = "asking what the device is";
    use sys::CUdevice_attribute as Attribute;
    let attribute = |of| context.attribute(of).doing(ASKING);
    let mut driver = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut driver) }.result().doing(ASKING)?;
    Ok(DeviceInfo {
        name: context.name().doing(ASKING)?,
        uuid: uuid(&context.uuid().doing(ASKING)?.bytes.map(|b| b as u8)),
        capability: context.compute_capability().doing(ASKING)?,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
        memory: context.total_mem().doing(ASKING)? as u64,
        block_shared: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32,
        driver,
    })
}

fn uuid(bytes: &[u8; 16]) -> String {
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_written_as_the_drivers_tools_write_it() {
        let bytes = std::array::from_fn(|i| i as u8);
        assert_eq!(uuid(&bytes), "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f");
    }
}
