//! Device memory and pinned host memory, made once and kept.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaContext, result};

use crate::CudaError;
use crate::error::Doing;
use crate::stream::Stream;

/// What can lie in device memory: any bits are a value.
///
/// # Safety
/// Every bit pattern must be a valid value, and the type must have no padding.
pub unsafe trait Element: Copy + Send + Sync + 'static {}

// SAFETY: plain numbers.
unsafe impl Element for u8 {}
// SAFETY: plain numbers.
unsafe impl Element for u32 {}
// SAFETY: plain numbers.
unsafe impl Element for i32 {}
// SAFETY: plain numbers.
unsafe impl Element for u64 {}
// SAFETY: plain numbers.
unsafe impl Element for f32 {}
// SAFETY: a transparent u16.
unsafe impl Element for half::bf16 {}

/// Elements as 32-bit words, for a block of mixed descriptors.
///
/// # Panics
/// If an element is no whole number of words.
pub fn words<T: Element>(elements: &[T]) -> &[u32] {
    assert!(size_of::<T>().is_multiple_of(4) && align_of::<T>() >= 4, "elements of {} bytes", size_of::<T>());
    // SAFETY: an `Element` has no padding, and its alignment suffices.
    unsafe { std::slice::from_raw_parts(elements.as_ptr().cast(), size_of_val(elements) / 4) }
}

/// Device memory of `len` elements. Dropping it waits for the device, so that no work still uses it.
#[derive(Debug)]
pub struct DeviceBuffer<T> {
    context: Arc<CudaContext>,
    at: CUdeviceptr,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Element> DeviceBuffer<T> {
    pub(crate) fn new(context: &Arc<CudaContext>, len: usize) -> Result<Self, CudaError> {
        let bytes = len * size_of::<T>();
        context.bind_to_thread().doing("binding the context")?;
        // An allocation of nothing is no allocation.
        let at = if bytes == 0 {
            0
        } else {
            // SAFETY: the context is current; the memory is given back once, in `drop`.
            let at = unsafe { result::malloc_sync(bytes) }.map_err(|source| CudaError::OutOfMemory {
                bytes,
                kind: "device",
                source,
            })?;
            // SAFETY: fresh memory of that size.
            unsafe { result::memset_d8_sync(at, 0, bytes) }.doing("clearing memory")?;
            // Despite its name it returns before the memory is clear, on a stream that no other waits for: what
            // is written next would be cleared again.
            // SAFETY: null is the default stream.
            unsafe { result::stream::synchronize(std::ptr::null_mut()) }.doing("clearing memory")?;
            at
        };
        Ok(Self { context: context.clone(), at, len, of: PhantomData })
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it, for a kernel to read.
    pub fn view(&self) -> View<'_, T> {
        View { at: self.at, len: self.len, of: PhantomData }
    }

    /// All of it, for a kernel to write.
    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut { at: self.at, len: self.len, of: PhantomData }
    }

    /// Copies host values to its beginning and waits for that.
    pub fn upload(&mut self, stream: &Stream, values: &[T]) -> Result<(), CudaError> {
        self.view_mut().slice(0..values.len()).upload(stream, values)
    }

    /// Copies its beginning to the host and waits for that.
    pub fn download(&self, stream: &Stream, out: &mut [T]) -> Result<(), CudaError> {
        self.view().slice(0..out.len()).download(stream, out)
    }
}

impl<T> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        if self.at != 0 {
            let _ = self.context.bind_to_thread();
            // SAFETY: allocated in `new`, given back here only. The driver waits for pending work first.
            let freed = unsafe { result::free_sync(self.at) };
            self.context.record_err(freed);
        }
    }
}

/// Device memory that a kernel reads.
#[derive(Clone, Copy, Debug)]
pub struct View<'a, T> {
    at: CUdeviceptr,
    len: usize,
    of: PhantomData<&'a T>,
}

impl<'a, T: Element> View<'a, T> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of it.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn slice(self, range: Range<usize>) -> View<'a, T> {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} elements", self.len);
        View {
            at: self.at + (range.start * size_of::<T>()) as u64,
            len: range.end - range.start,
            of: PhantomData,
        }
    }

    /// The same memory as elements of another type.
    ///
    /// # Panics
    /// If it does not begin where one of them may, or does not hold a whole number of them.
    pub fn cast<U: Element>(self) -> View<'a, U> {
        let bytes = self.len * size_of::<T>();
        assert!(self.at.is_multiple_of(align_of::<U>() as u64), "memory of another alignment");
        assert!(bytes.is_multiple_of(size_of::<U>()), "{bytes} bytes as elements of {}", size_of::<U>());
        View { at: self.at, len: bytes / size_of::<U>(), of: PhantomData }
    }

    /// The address, for kernels and descriptors.
    pub fn address(&self) -> u64 {
        self.at
    }

    /// Copies it to the host and waits for that.
    pub fn download(self, stream: &Stream, out: &mut [T]) -> Result<(), CudaError> {
        assert!(out.len() <= self.len, "{} of {} elements", out.len(), self.len);
        stream.bind()?;
        // SAFETY: both sides hold that many elements; the wait below outlives the copy.
        unsafe { result::memcpy_dtoh_async(out, self.at, stream.raw()) }.doing("copying to the host")?;
        stream.synchronize()
    }
}

/// Device memory that a kernel writes.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    at: CUdeviceptr,
    len: usize,
    of: PhantomData<&'a mut T>,
}

impl<'a, T: Element> ViewMut<'a, T> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of it.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn slice(self, range: Range<usize>) -> ViewMut<'a, T> {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} elements", self.len);
        ViewMut {
            at: self.at + (range.start * size_of::<T>()) as u64,
            len: range.end - range.start,
            of: PhantomData,
        }
    }

    /// The same view for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_, T> {
        ViewMut { at: self.at, len: self.len, of: PhantomData }
    }

    /// The address, for kernels and descriptors.
    pub fn address(&self) -> u64 {
        self.at
    }

    /// The same memory as elements of another type.
    ///
    /// # Panics
    /// As [`View::cast`].
    pub fn cast<U: Element>(self) -> ViewMut<'a, U> {
        let View { at, len, .. } = View::<T> { at: self.at, len: self.len, of: PhantomData }.cast::<U>();
        ViewMut { at, len, of: PhantomData }
    }

    /// Copies host values to its beginning and waits for that.
    pub fn upload(self, stream: &Stream, values: &[T]) -> Result<(), CudaError> {
        assert!(values.len() <= self.len, "{} elements into {}", values.len(), self.len);
        stream.bind()?;
        // SAFETY: both sides hold that many elements; the wait below outlives the copy.
        unsafe { result::memcpy_htod_async(self.at, values, stream.raw()) }.doing("copying to the device")?;
        stream.synchronize()
    }
}

impl<'a, T: Element> ViewMut<'a, T> {
    /// Two parts of it that do not overlap.
    ///
    /// # Panics
    /// If they overlap, or are not inside.
    pub fn split(self, first: Range<usize>, second: Range<usize>) -> (ViewMut<'a, T>, ViewMut<'a, T>) {
        assert!(first.end <= second.start || second.end <= first.start, "{first:?} overlaps {second:?}");
        let whole = || ViewMut { at: self.at, len: self.len, of: PhantomData };
        (whole().slice(first), whole().slice(second))
    }
}

/// Page-locked host memory, which the copy engine reads and writes at the bus's speed.
#[derive(Debug)]
pub struct PinnedBuffer<T> {
    context: Arc<CudaContext>,
    at: *mut T,
    len: usize,
}

// SAFETY: it owns its memory, like a boxed slice of plain numbers.
unsafe impl<T: Element> Send for PinnedBuffer<T> {}
// SAFETY: shared access only reads.
unsafe impl<T: Element> Sync for PinnedBuffer<T> {}

impl<T: Element> PinnedBuffer<T> {
    pub(crate) fn new(context: &Arc<CudaContext>, len: usize) -> Result<Self, CudaError> {
        let bytes = (len * size_of::<T>()).max(1);
        context.bind_to_thread().doing("binding the context")?;
        // Not write-combined: the host reads it too.
        const PORTABLE: u32 = cudarc::driver::sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: the context is current; the memory is given back once, in `drop`.
        let at = unsafe { result::malloc_host(bytes, PORTABLE) }
            .map_err(|source| CudaError::OutOfMemory { bytes, kind: "pinned host", source })?
            .cast::<T>();
        // SAFETY: fresh memory of that size; zeros are a value of every `Element`.
        unsafe { std::ptr::write_bytes(at, 0, len) };
        Ok(Self { context: context.clone(), at, len })
    }

    /// Its address.
    pub fn as_ptr(&self) -> *const T {
        self.at
    }
}

impl<T: Element> Deref for PinnedBuffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: owned, initialised memory of that length.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }
}

impl<T: Element> DerefMut for PinnedBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: owned, initialised memory of that length, borrowed uniquely.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }
}

impl<T> Drop for PinnedBuffer<T> {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: allocated in `new`, given back here only.
        let freed = unsafe { result::free_host(self.at.cast()) };
        self.context.record_err(freed);
    }
}
