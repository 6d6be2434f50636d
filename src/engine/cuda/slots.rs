//! The adapter slots: device memory that the copy stream writes and the compute stream reads.
//!
//! A slot is one contiguous piece with room for the largest rank. What orders the two streams is a count of each
//! slot's layers, in device memory, which the copy stream sets behind each piece of a copy: kernels that read a
//! slot which is still loading wait until their layer has been counted. The count goes on over all copies into
//! the slot, so that nobody has to set it back. The host learns from events that a copy has landed.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use half::bf16;
use lora_kernels::{CudaError, Device, DeviceBuffer, Event, PinnedBuffer, Stream};
use lora_sched::{AdapterId, SlotId, SwapKind};

use super::copier::pause;
use crate::engine::adapters::{AdapterLayout, HostAdapter, Slab};
use crate::engine::device::SlotMemory;
use crate::engine::model::ModelSpec;
use crate::engine::watch::Watch;

/// In a table of parts: the adapter leaves the module alone.
const NOT_ADAPTED: i32 = -1;
/// Parts begin at multiples of this many elements, 16 bytes.
const PART_UNIT: usize = 8;

/// All slots of an executor.
pub(super) struct CudaSlots {
    copy_stream: Stream,
    memory: DeviceBuffer<bf16>,
    /// Elements of one slot.
    stride: usize,
    /// `[slots, layers · modules]` where parts begin, for adapters that leave some modules alone.
    tables: DeviceBuffer<i32>,
    table_len: usize,
    layers: usize,
    slots: Vec<Slot>,
    /// `[slots][1 + layers]` layers counted, and how long a step waited for each: see
    /// [`Segment::arrival`](lora_kernels::Segment::arrival).
    arrivals: DeviceBuffer<u32>,
    steps_wait: bool,
    watch: Watch,
    issuing: Mutex<Issuing>,
    signal: Condvar,
}

/// What the copy thread and the compute thread tell each other.
#[derive(Default)]
struct Issuing {
    awaited: bool,
    gone: bool,
}

struct Slot {
    held: Mutex<Held>,
    /// Layers counted before those of the copy that was last begun.
    copied_before: AtomicU32,
    /// Layers `0..issued` are on the copy stream or there.
    issued: AtomicUsize,
    /// Layers `0..landed` are there, as far as the host knows.
    landed: AtomicUsize,
    /// `[pieces]` recorded behind each.
    events: Vec<Event>,
}

struct Held {
    what: Option<(AdapterId, Arc<AdapterLayout>)>,
    /// The slot's table, on its way to the device.
    table: PinnedBuffer<i32>,
}

/// What a step needs to know of a slot that it reads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Resident {
    pub adapter: AdapterId,
    /// Address of the adapter's matrices.
    pub matrices: u64,
    /// Address of its table of parts; 0 if it adapts every module.
    pub table: u64,
    pub rank: u32,
    pub scale: f32,
    /// What kernels wait by; 0 if all of it is there.
    pub arrival: u64,
    pub copied_before: u32,
}

/// Layers of a piece where no step waits for single layers. Each piece costs some 8 µs of the bus's time beside its
/// bytes; what bounds one is that a demand waits for those of a prefetch that are on the stream.
const LAYERS_AT_ONCE: usize = 16;
/// The same of a prefetch, where steps wait.
const PREFETCHED_AT_ONCE: usize = 4;

/// Where a copy is cut.
#[derive(Clone, Copy, Debug)]
enum Pieces {
    /// Into pieces of as many layers each.
    Even(usize),
    /// Where steps wait for single layers: into one, three, nine and so on. Everybody waits for the first layer;
    /// later ones mostly are there before they are needed, since a copy of a common rank is several times as fast as
    /// what computes with it.
    Growing,
}

/// One of them.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    number: usize,
    /// Its layers.
    pub layers: Range<usize>,
}

impl Pieces {
    /// Those of a copy of this kind.
    fn of(kind: SwapKind, steps_wait: bool) -> Self {
        match (steps_wait, kind) {
            (true, SwapKind::Demand) => Self::Growing,
            (true, SwapKind::Prefetch) => Self::Even(PREFETCHED_AT_ONCE),
            (false, _) => Self::Even(LAYERS_AT_ONCE),
        }
    }

    /// The number of the piece that begins at layer `first`, and its layers if there are as many.
    fn at(self, first: usize) -> (usize, usize) {
        match self {
            Self::Even(layers) => (first / layers, layers),
            // Pieces begin at 0, 1, 4, 13: at half of what a power of three is above one.
            Self::Growing => ((2 * first + 1).ilog(3) as usize, 2 * first + 1),
        }
    }

    /// Pieces of a copy of so many layers, all of a number below this.
    fn count(self, layers: usize) -> usize {
        self.at(layers.saturating_sub(1)).0 + 1
    }
}

fn relock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl CudaSlots {
    /// Elements of one slot for adapters of up to `max_rank`.
    pub fn slot_elements(spec: &ModelSpec, max_rank: usize) -> usize {
        // Slots begin where a piece of 256 bytes may.
        (spec.adapter_parameters(max_rank) as usize).next_multiple_of(128)
    }

    pub fn new(
        device: &Device,
        spec: &ModelSpec,
        max_rank: usize,
        count: usize,
        steps_wait: bool,
        watch: Watch,
    ) -> Result<Self, CudaError> {
        let stride = Self::slot_elements(spec, max_rank);
        let cuts = [SwapKind::Demand, SwapKind::Prefetch].map(|kind| Pieces::of(kind, steps_wait));
        let most = cuts.map(|cut| cut.count(spec.layers)).into_iter().max().unwrap_or(0);
        let table_len = spec.layers * spec.modules().len();
        let slot = || {
            let events = (0..most).map(|_| device.event(false));
            Ok(Slot {
                held: Mutex::new(Held { what: None, table: device.pinned(table_len)? }),
                copied_before: AtomicU32::new(0),
                issued: AtomicUsize::new(0),
                landed: AtomicUsize::new(0),
                events: events.collect::<Result<_, CudaError>>()?,
            })
        };
        Ok(Self {
            copy_stream: device.stream()?,
            memory: device.buffer(stride * count)?,
            stride,
            tables: device.buffer(table_len * count)?,
            table_len,
            layers: spec.layers,
            slots: (0..count).map(|_| slot()).collect::<Result<_, CudaError>>()?,
            arrivals: device.buffer(count * (1 + spec.layers))?,
            steps_wait,
            watch,
            issuing: Mutex::default(),
            signal: Condvar::new(),
        })
    }

    /// The stream of copies.
    pub fn copy_stream(&self) -> &Stream {
        &self.copy_stream
    }

    /// The piece of a copy that begins at layer `first`.
    pub fn piece(&self, kind: SwapKind, first: usize) -> Piece {
        let (number, layers) = Pieces::of(kind, self.steps_wait).at(first);
        Piece { number, layers: first..self.layers.min(first + layers) }
    }

    /// Puts a piece of a copy of an adapter on the copy stream.
    ///
    /// # Safety
    /// `adapter` must live until the piece has landed, and no step that reads the slot may be under way
    /// unless it waits for the piece.
    pub unsafe fn issue(&self, slot: SlotId, adapter: &HostAdapter, piece: &Piece) -> Result<(), CudaError> {
        let Piece { number, layers } = piece;
        let (index, slot) = (slot.0 as usize, &self.slots[slot.0 as usize]);
        if layers.start == 0 && !adapter.layout.is_full() {
            let mut held = relock(&slot.held);
            for (to, part) in held.table.iter_mut().zip(adapter.layout.parts()) {
                *to = part.map_or(NOT_ADAPTED, |p| (p.offset / PART_UNIT) as i32);
            }
            let at = self.tables.view().slice(index * self.table_len..(index + 1) * self.table_len).address();
            // SAFETY: the table belongs to the slot and is written again only for its next load, which the
            // scheduler starts after this one has ended.
            unsafe { self.copy_stream.copy_in_at(&held.table, at) }?;
        }
        let elements = adapter.layout.layer(layers.start).start..adapter.layout.layer(layers.end - 1).end;
        let at = self.memory.view().slice(index * self.stride + elements.start..(index + 1) * self.stride);
        let from: &[bf16] = match &adapter.slab {
            Slab::Pinned(values) => &values[elements],
            Slab::Pageable(values) => &values[elements],
            Slab::F32(_) => panic!("the pool's slabs are not bf16"),
        };
        // SAFETY: the slot has room for the adapter, since ranks are bounded by the pool's largest; the caller
        // keeps the source and the readers away.
        unsafe { self.copy_stream.copy_in_at(from, at.address()) }?;
        let copied = slot.copied_before.load(Ordering::Acquire).wrapping_add(layers.end as u32);
        // SAFETY: the slot's own count.
        unsafe { self.copy_stream.write_word(self.arrival(index), copied) }?;
        self.copy_stream.record(&slot.events[*number])?;
        slot.issued.store(layers.end, Ordering::Release);
        if layers.end == self.layers {
            // Taken and released between the store and the signal: a waiter that has checked and not yet slept
            // would miss the signal otherwise.
            drop(relock(&self.issuing));
            self.signal.notify_all();
        }
        Ok(())
    }

    /// Address of what a slot's layers are counted in.
    fn arrival(&self, index: usize) -> u64 {
        let len = 1 + self.layers;
        self.arrivals.view().slice(index * len..(index + 1) * len).address()
    }

    /// Whether a piece has landed.
    pub fn has_landed(&self, slot: SlotId, piece: &Piece) -> Result<bool, CudaError> {
        let slot = &self.slots[slot.0 as usize];
        let done = slot.events[piece.number].is_done()?;
        if done {
            slot.landed.store(piece.layers.end, Ordering::Release);
        }
        Ok(done)
    }

    /// Whether steps may read slots that are still loading.
    pub fn steps_wait(&self) -> bool {
        self.steps_wait
    }

    /// Waits until all pieces of the copies into `slots` are on the copy stream: what a step needs that waits for
    /// them on the device.
    pub fn await_issue(&self, slots: &[SlotId]) -> Result<(), CudaError> {
        if slots.is_empty() {
            return Ok(());
        }
        let issued =
            |slot: &SlotId| self.slots[slot.0 as usize].issued.load(Ordering::Acquire) >= self.layers;
        relock(&self.issuing).awaited = true;
        self.watch.soon(|| slots.iter().all(issued).then_some(()));
        let mut guard = relock(&self.issuing);
        while !slots.iter().all(issued) && !guard.gone {
            guard = self.signal.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        guard.awaited = false;
        if guard.gone {
            return Err(CudaError::Shape { kernel: "copies", what: "the copy thread has ended".into() });
        }
        Ok(())
    }

    /// Whether a step cannot be launched before copies are issued.
    pub fn is_awaited(&self) -> bool {
        relock(&self.issuing).awaited
    }

    /// Nothing will be issued any more.
    pub fn give_up(&self) {
        relock(&self.issuing).gone = true;
        self.signal.notify_all();
    }

    /// Whether all of a slot's layers are known to have landed.
    pub fn has_all(&self, slot: SlotId) -> bool {
        self.slots[slot.0 as usize].landed.load(Ordering::Acquire) >= self.layers
    }

    /// Puts on `stream`: how long kernels waited for each layer of a slot is nothing again.
    pub fn clear_waits(&self, stream: &Stream, slot: SlotId) -> Result<(), CudaError> {
        // SAFETY: of a slot's words only the first is written by anything but kernels of `stream`.
        unsafe { stream.clear_at::<u32>(self.arrival(slot.0 as usize) + 4, self.layers) }
    }

    /// Puts on `stream`: how long kernels waited for each layer of a slot, in ns, into `to` `[layers]`.
    ///
    /// # Safety
    /// Nothing may read or free `to` until the copy has been made.
    pub unsafe fn read_waits(&self, stream: &Stream, slot: SlotId, to: &mut [u32]) -> Result<(), CudaError> {
        assert_eq!(to.len(), self.layers, "room for every layer");
        // SAFETY: behind the count there are as many words; the caller keeps `to`.
        unsafe { stream.copy_out_from(self.arrival(slot.0 as usize) + 4, to) }
    }

    /// What a slot holds or is being loaded with.
    pub fn resident(&self, slot: SlotId) -> Option<Resident> {
        let index = slot.0 as usize;
        let held = relock(&self.slots[index].held);
        let (adapter, layout) = held.what.as_ref()?;
        let table = self.tables.view().slice(index * self.table_len..(index + 1) * self.table_len);
        Some(Resident {
            adapter: *adapter,
            matrices: self.memory.view().slice(index * self.stride..(index + 1) * self.stride).address(),
            table: if layout.is_full() { 0 } else { table.address() },
            rank: layout.rank() as u32,
            scale: layout.scale(),
            arrival: if self.has_all(slot) { 0 } else { self.arrival(index) },
            copied_before: self.slots[index].copied_before.load(Ordering::Acquire),
        })
    }
}

impl SlotMemory for CudaSlots {
    fn len(&self) -> usize {
        self.slots.len()
    }

    fn begin(&self, slot: SlotId, adapter: AdapterId, layout: &Arc<AdapterLayout>) {
        let slot = &self.slots[slot.0 as usize];
        // What was counted of an earlier copy: all of it, since the scheduler gives a slot away no sooner.
        if relock(&slot.held).what.is_some() {
            slot.copied_before.fetch_add(self.layers as u32, Ordering::AcqRel);
        }
        slot.issued.store(0, Ordering::Release);
        slot.landed.store(0, Ordering::Release);
        relock(&slot.held).what = Some((adapter, Arc::clone(layout)));
    }

    fn copy_whole(&self, slot: SlotId, adapter: &HostAdapter) -> Result<(), String> {
        self.copy_stream.bind().map_err(|e| e.to_string())?;
        let (mut at, said) = (0, |e: CudaError| e.to_string());
        while at < self.layers {
            let piece = self.piece(SwapKind::Demand, at);
            // SAFETY: nothing reads the slot before serving, and the copy is waited for here.
            unsafe { self.issue(slot, adapter, &piece) }.map_err(said)?;
            while !self.has_landed(slot, &piece).map_err(said)? {
                pause(false);
            }
            at = piece.layers.end;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_have_numbers_of_their_own() {
        for pieces in [Pieces::Growing, Pieces::Even(16)] {
            for layers in [1, 2, 12, 32, 33, 80] {
                let (mut first, mut numbers) = (0, Vec::new());
                while first < layers {
                    let (number, len) = pieces.at(first);
                    numbers.push(number);
                    first += len;
                }
                assert_eq!(numbers, (0..pieces.count(layers)).collect::<Vec<_>>(), "{pieces:?} of {layers}");
            }
        }
    }
}
