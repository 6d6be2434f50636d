//! Streams, events and graphs: the order of work on a device.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaEvent, CudaGraph, CudaStream, result, sys};

use crate::CudaError;
use crate::error::Doing;
use crate::memory::{Element, PinnedBuffer, View, ViewMut};
use crate::module::{Function, Grid};

/// A queue of work on the device.
#[derive(Clone, Debug)]
pub struct Stream {
    stream: Arc<CudaStream>,
    overlaps: bool,
}

impl Stream {
    /// `overlaps`: whether kernels that are made for it may begin while the one before them ends.
    pub(crate) fn new(stream: Arc<CudaStream>, overlaps: bool) -> Self {
        Self { stream, overlaps }
    }

    /// The same stream, on which kernels begin when the one before them is over: to compare with. Where the
    /// device can, they otherwise begin while it ends, with the same results.
    #[must_use]
    pub fn without_overlap(&self) -> Self {
        Self { stream: Arc::clone(&self.stream), overlaps: false }
    }

    pub(crate) fn raw(&self) -> sys::CUstream {
        self.stream.cu_stream()
    }

    /// Makes the device's context this thread's: needed once on each thread that uses the stream.
    pub fn bind(&self) -> Result<(), CudaError> {
        self.stream.context().bind_to_thread().doing("binding the context")
    }

    /// Waits for all work put on it so far.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.stream.synchronize().doing("waiting for the device")
    }

    /// Records `event` after the work put on it so far.
    pub fn record(&self, event: &Event) -> Result<(), CudaError> {
        event.event.record(&self.stream).doing("recording an event")
    }

    /// Work put on it from now on waits for `event`.
    pub fn wait(&self, event: &Event) -> Result<(), CudaError> {
        self.stream.wait(&event.event).doing("waiting for an event")
    }

    /// Copies host memory to the device. Asynchronous where the source is pinned.
    ///
    /// # Safety
    /// `from` must hold its values until the copy has been made.
    pub unsafe fn copy_in<T: Element>(&self, from: &[T], to: ViewMut<'_, T>) -> Result<(), CudaError> {
        assert!(from.len() <= to.len(), "{} elements into {}", from.len(), to.len());
        // SAFETY: the destination holds that many elements; the caller keeps the source.
        unsafe { self.copy_in_at(from, to.address()) }
    }

    /// Copies host memory to an address on the device, as [`Stream::copy_in`].
    ///
    /// # Safety
    /// `from` must hold its values until the copy has been made, and the device memory at `to` must hold as
    /// many elements and be used by no other work meanwhile.
    pub unsafe fn copy_in_at<T: Element>(&self, from: &[T], to: u64) -> Result<(), CudaError> {
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: as the caller promises.
        unsafe { result::memcpy_htod_async(to, from, self.raw()) }.doing("copying to the device")
    }

    /// Sets one word of device memory after the work put on the stream so far, whose writes are seen by who sees
    /// the word.
    ///
    /// # Safety
    /// There must be a word at `to`, a multiple of 4, that nothing else writes meanwhile.
    pub unsafe fn write_word(&self, to: u64, word: u32) -> Result<(), CudaError> {
        // Without flags the write comes after a barrier for all memory.
        // SAFETY: as the caller promises.
        unsafe { sys::cuStreamWriteValue32_v2(self.raw(), to, word, 0) }.result().doing("writing a word")
    }

    /// Copies device memory to pinned memory, asynchronously.
    ///
    /// # Safety
    /// Nothing may read or free `to` until the copy has been made.
    pub unsafe fn copy_out<T: Element>(
        &self,
        from: View<'_, T>,
        to: &mut PinnedBuffer<T>,
    ) -> Result<(), CudaError> {
        assert!(from.len() <= to.len(), "{} elements into {}", from.len(), to.len());
        // SAFETY: both sides hold that many elements; the caller keeps the destination.
        unsafe { self.copy_out_from(from.address(), &mut to[..from.len()]) }
    }

    /// Copies from an address on the device, as [`Stream::copy_out`].
    ///
    /// # Safety
    /// As there, and the device memory at `from` must hold as many elements.
    pub unsafe fn copy_out_from<T: Element>(&self, from: u64, to: &mut [T]) -> Result<(), CudaError> {
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: as the caller promises.
        unsafe { result::memcpy_dtoh_async(to, from, self.raw()) }.doing("copying to the host")
    }

    /// Copies on the device.
    pub fn copy<T: Element>(&self, from: View<'_, T>, to: ViewMut<'_, T>) -> Result<(), CudaError> {
        assert!(from.len() <= to.len(), "{} elements into {}", from.len(), to.len());
        let bytes = from.len() * size_of::<T>();
        // SAFETY: both sides hold that many bytes.
        unsafe { result::memcpy_dtod_async(to.address(), from.address(), bytes, self.raw()) }
            .doing("copying on the device")
    }

    /// Sets `len` elements at an address on the device to zero.
    ///
    /// # Safety
    /// There must be as many, and no other work may use them meanwhile.
    pub unsafe fn clear_at<T: Element>(&self, at: u64, len: usize) -> Result<(), CudaError> {
        // SAFETY: as the caller promises.
        unsafe { result::memset_d8_async(at, 0, len * size_of::<T>(), self.raw()) }.doing("clearing memory")
    }

    /// Sets every byte to zero.
    pub fn clear<T: Element>(&self, memory: ViewMut<'_, T>) -> Result<(), CudaError> {
        // SAFETY: the view holds that many elements, and is the only one.
        unsafe { self.clear_at::<T>(memory.address(), memory.len()) }
    }

    /// Launches a kernel.
    ///
    /// # Safety
    /// `arguments` must point to values of the kernel's parameter types, in order, and the memory that they
    /// name must be what the kernel expects.
    pub(crate) unsafe fn launch(
        &self,
        function: &Function,
        grid: Grid,
        arguments: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        let Grid { blocks, threads, shared } = grid;
        // SAFETY: as the caller promises.
        unsafe {
            result::launch_kernel(function.raw(), blocks, (threads, 1, 1), shared, self.raw(), arguments)
        }
        .doing("launching a kernel")
    }

    /// Launches a kernel that may begin while the one put on the stream before it still runs.
    ///
    /// # Safety
    /// As [`Stream::launch`]; and the kernel must keep the rule in `cuda/common.cuh`.
    pub(crate) unsafe fn launch_next(
        &self,
        function: &Function,
        grid: Grid,
        arguments: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        // SAFETY: as the caller promises.
        unsafe { self.launch_after(function, grid, arguments, self.overlaps) }
    }

    /// Launches a kernel; with `overlap` it may begin while the kernel put on the stream before it still runs
    /// (programmatic dependent launch, from sm_90 on).
    ///
    /// # Safety
    /// As [`Stream::launch`]; and with `overlap` the kernel must keep the rule in `cuda/common.cuh`.
    pub(crate) unsafe fn launch_after(
        &self,
        function: &Function,
        grid: Grid,
        arguments: &mut [*mut c_void],
        overlap: bool,
    ) -> Result<(), CudaError> {
        let attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        // SAFETY: as the caller promises.
        unsafe { self.launch_with(function, grid, overlap.then_some(attribute), arguments) }
    }

    /// Launches a kernel whose blocks form clusters of so many (from sm_90 on).
    ///
    /// # Safety
    /// As [`Stream::launch`].
    pub(crate) unsafe fn launch_clusters(
        &self,
        function: &Function,
        grid: Grid,
        (x, y, z): (u32, u32, u32),
        arguments: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        let attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z },
            },
        };
        // SAFETY: as the caller promises.
        unsafe { self.launch_with(function, grid, Some(attribute), arguments) }
    }

    /// # Safety
    /// As [`Stream::launch`], and as the attribute asks for.
    unsafe fn launch_with(
        &self,
        function: &Function,
        grid: Grid,
        mut attribute: Option<sys::CUlaunchAttribute>,
        arguments: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        let Grid { blocks, threads, shared } = grid;
        let config = sys::CUlaunchConfig {
            gridDimX: blocks.0,
            gridDimY: blocks.1,
            gridDimZ: blocks.2,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared,
            hStream: self.raw(),
            attrs: attribute.as_mut().map_or(std::ptr::null_mut(), std::ptr::from_mut),
            numAttrs: u32::from(attribute.is_some()),
        };
        // SAFETY: the attribute outlives the call; the rest is as the caller promises.
        unsafe {
            sys::cuLaunchKernelEx(&config, function.raw(), arguments.as_mut_ptr(), std::ptr::null_mut())
        }
        .result()
        .doing("launching a kernel")
    }

    /// Records what `work` puts on the stream as a graph, instead of running it.
    pub fn capture<E: From<CudaError>>(&self, work: impl FnOnce() -> Result<(), E>) -> Result<Graph, E> {
        self.stream
            .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .doing("beginning a graph")?;
        let done = work();
        let graph = self
            .stream
            .end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)
            .doing("ending a graph");
        // The capture's own failure says less than the operation's that caused it.
        done?;
        let graph =
            graph?.ok_or(CudaError::Shape { kernel: "graph", what: "no work was captured".into() })?;
        graph.upload().doing("uploading a graph")?;
        Ok(Graph { graph })
    }
}

/// A point in a stream's work.
#[derive(Debug)]
pub struct Event {
    event: CudaEvent,
}

impl Event {
    pub(crate) fn new(event: CudaEvent) -> Self {
        Self { event }
    }

    /// Waits until the work before it is done.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.event.synchronize().doing("waiting for an event")
    }

    /// Whether the work before it is done.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        self.event.try_is_complete().doing("asking for an event")
    }

    /// Milliseconds from this one to `later`; both must be done and made with timing.
    pub fn milliseconds_to(&self, later: &Event) -> Result<f32, CudaError> {
        self.event.elapsed_ms(&later.event).doing("timing events")
    }
}

/// Flags of a new event.
pub(crate) fn event_flags(timed: bool) -> CUevent_flags {
    if timed { CUevent_flags::CU_EVENT_DEFAULT } else { CUevent_flags::CU_EVENT_DISABLE_TIMING }
}

/// Recorded work that is launched as one.
pub struct Graph {
    graph: CudaGraph,
}

// SAFETY: the driver asks that uses of one graph do not overlap; `launch` takes it uniquely, and nothing
// else touches it.
unsafe impl Send for Graph {}

impl Graph {
    /// Puts the work on the stream that it was captured from.
    pub fn launch(&mut self) -> Result<(), CudaError> {
        self.graph.launch().doing("launching a graph")
    }
}
