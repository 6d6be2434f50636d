//! The adapter slots: device memory that the copy stream writes and the compute stream reads.
//!
//! A slot is one contiguous piece with room for the largest rank. What orders the two streams are events: one
//! for each piece of a copy, recorded behind it. A step that reads a slot which may still be loading waits,
//! on the device, for the event of the piece that holds its layer; only a piece that has not even been put on
//! the copy stream makes the host wait.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use half::bf16;
use lora_kernels::{CudaError, Device, DeviceBuffer, Event, PinnedBuffer, Stream};
use lora_sched::{AdapterId, SlotId};

use crate::engine::adapters::{AdapterLayout, HostAdapter, Slab};
use crate::engine::device::SlotMemory;
use crate::engine::model::ModelSpec;

/// In a table of parts: the adapter leaves the module alone.
const NOT_ADAPTED: i32 = -1;
/// Parts begin at multiples of this many elements, 16 bytes.
const PART_UNIT: usize = 8;

/// Between two questions whether a piece has landed.
const PATIENCE: Duration = Duration::from_micros(20);
const IMPATIENCE: Duration = Duration::from_micros(5);

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
    /// Layers of one piece of a copy.
    layers_at_once: usize,
    slots: Vec<Slot>,
    issued: Mutex<()>,
    signal: Condvar,
}

struct Slot {
    held: Mutex<Held>,
    /// Layers `0..issued` are on the copy stream or there.
    issued: AtomicUsize,
    /// Layers `0..landed` are there.
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
        layers_at_once: usize,
    ) -> Result<Self, CudaError> {
        let stride = Self::slot_elements(spec, max_rank);
        let table_len = spec.layers * spec.modules().len();
        let slot = || {
            let events = (0..spec.layers.div_ceil(layers_at_once)).map(|_| device.event(false));
            Ok(Slot {
                held: Mutex::new(Held { what: None, table: device.pinned(table_len)? }),
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
            layers_at_once,
            slots: (0..count).map(|_| slot()).collect::<Result<_, CudaError>>()?,
            issued: Mutex::new(()),
            signal: Condvar::new(),
        })
    }

    /// The stream of copies.
    pub fn copy_stream(&self) -> &Stream {
        &self.copy_stream
    }

    /// Layers of one piece of a copy.
    pub fn layers_at_once(&self) -> usize {
        self.layers_at_once
    }

    /// Puts a piece of a copy, `layers` of an adapter, on the copy stream.
    ///
    /// # Safety
    /// `adapter` must live until the piece has landed, and no step that reads the slot may be under way
    /// unless it waits for the piece.
    pub unsafe fn issue(
        &self,
        slot: SlotId,
        adapter: &HostAdapter,
        layers: Range<usize>,
    ) -> Result<(), CudaError> {
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
        self.copy_stream.record(&slot.events[layers.start / self.layers_at_once])?;
        slot.issued.store(layers.end, Ordering::Release);
        // Taken and released between the store and the signal: a waiter that has checked and not yet slept
        // would miss the signal otherwise.
        drop(relock(&self.issued));
        self.signal.notify_all();
        Ok(())
    }

    /// Waits until the piece of `layers` has landed; `patient` where nobody waits for the answer yet.
    ///
    /// A wait by the driver holds up other threads' launches (a prefill of hundreds of kernels beside a swap
    /// took 14 % longer), so the event is asked for now and then.
    pub fn land(&self, slot: SlotId, layers: Range<usize>, patient: bool) -> Result<(), CudaError> {
        let slot = &self.slots[slot.0 as usize];
        let event = &slot.events[layers.start / self.layers_at_once];
        while !event.is_done()? {
            if patient {
                std::thread::sleep(PATIENCE);
            } else {
                let until = Instant::now() + IMPATIENCE;
                while Instant::now() < until {
                    std::hint::spin_loop();
                }
            }
        }
        slot.landed.store(layers.end, Ordering::Release);
        Ok(())
    }

    /// Whether all of a slot's layers are known to have landed.
    pub fn has_all(&self, slot: SlotId) -> bool {
        self.slots[slot.0 as usize].landed.load(Ordering::Acquire) >= self.layers
    }

    /// Makes `stream` wait for `layer` of a slot.
    pub fn await_layer(&self, stream: &Stream, slot: SlotId, layer: usize) -> Result<(), CudaError> {
        let slot = &self.slots[slot.0 as usize];
        if slot.landed.load(Ordering::Acquire) > layer {
            return Ok(());
        }
        let mut guard = relock(&self.issued);
        while slot.issued.load(Ordering::Acquire) <= layer {
            guard = self.signal.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        drop(guard);
        stream.wait(&slot.events[layer / self.layers_at_once])
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
        })
    }
}

impl SlotMemory for CudaSlots {
    fn len(&self) -> usize {
        self.slots.len()
    }

    fn begin(&self, slot: SlotId, adapter: AdapterId, layout: &Arc<AdapterLayout>) {
        let slot = &self.slots[slot.0 as usize];
        slot.issued.store(0, Ordering::Release);
        slot.landed.store(0, Ordering::Release);
        relock(&slot.held).what = Some((adapter, Arc::clone(layout)));
    }

    fn copy_whole(&self, slot: SlotId, adapter: &HostAdapter) -> Result<(), String> {
        self.copy_stream.bind().map_err(|e| e.to_string())?;
        let mut at = 0;
        while at < self.layers {
            let layers = at..self.layers.min(at + self.layers_at_once);
            at = layers.end;
            // SAFETY: nothing reads the slot before serving, and the copy is waited for here.
            unsafe { self.issue(slot, adapter, layers.clone()) }
                .and_then(|()| self.land(slot, layers, false))
                .map_err(|e| e.to_string())?;
        }
        Ok(())
    }
}
