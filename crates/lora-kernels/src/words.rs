//! Small amounts of host memory, read by a kernel.

use crate::error::ensure;
use crate::memory::{PinnedBuffer, ViewMut};
use crate::module::{Function, Grid, Module, arguments};
use crate::stream::Stream;
use crate::{CudaError, Device};

const THREADS: u32 = 128;
/// Words that one thread reads.
const AT_ONCE: usize = 4;

/// The loaded kernel.
///
/// A copy ([`Stream::copy_in`]) waits in the copy engine behind every copy that was queued before it, on any
/// stream: a few kilobytes that a step cannot begin without would wait for megabytes of adapters. A kernel's
/// reads share the bus with them instead.
#[derive(Debug)]
pub struct HostWords {
    read: Function,
}

impl HostWords {
    /// Loads the kernel.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/words.fatbin"));
        Ok(Self { read: Module::load(device.context(), IMAGE)?.function("read_host_words")? })
    }

    /// `to[..count] = from[..count]`, and up to three words more: both must have room for `count` rounded up
    /// to 4.
    ///
    /// # Safety
    /// `from` must hold its values until the kernel has ended.
    pub unsafe fn read(
        &self,
        stream: &Stream,
        from: &PinnedBuffer<u32>,
        count: usize,
        to: ViewMut<'_, u32>,
    ) -> Result<(), CudaError> {
        let words = count.next_multiple_of(AT_ONCE);
        let room = from.len().min(to.len());
        ensure!("read_host_words", words <= room, "{count} words, rounded up, do not fit in {room}");
        ensure!(
            "read_host_words",
            to.address().is_multiple_of(16),
            "the destination is not aligned to 16 bytes"
        );
        if count == 0 {
            return Ok(());
        }
        let parts = (words / AT_ONCE) as u32;
        let grid = Grid { blocks: (parts.div_ceil(THREADS), 1, 1), threads: THREADS, shared: 0 };
        // Page-locked memory has one address for both sides.
        let from = from.as_ptr() as u64;
        // SAFETY: the parameters are the kernel's, both sides have room; the caller keeps the source.
        unsafe { stream.launch(&self.read, grid, arguments![from, to.address(), parts]) }
    }
}
