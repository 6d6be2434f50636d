//! The adapter slots: memory that the copy thread writes and the compute thread reads.
//!
//! A slot is one buffer a layer, each behind its own lock, and a count of the layers that have
//! landed. The locks are never contended while plans are sound (a slot that a step reads is not
//! written, and a step waits for a layer before it reads it): they cost some ten nanoseconds and
//! make the sharing sound whatever a plan says.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Instant;

use lora_sched::{AdapterId, Nanos, SlotId};

use crate::engine::adapters::{AdapterLayout, HostAdapter};
use crate::engine::device::SlotMemory;
use crate::engine::model::ModelSpec;

/// All slots of an engine.
pub(super) struct Slots {
    slots: Vec<Slot>,
    landed: Mutex<()>,
    signal: Condvar,
}

struct Slot {
    /// What the slot holds or is being loaded with.
    held: Mutex<Option<(AdapterId, Arc<AdapterLayout>)>>,
    /// Layers `0..ready` of it are there.
    ready: AtomicUsize,
    /// `[layers]`, each with room for the largest rank on every module.
    layers: Vec<RwLock<Vec<f32>>>,
}

/// A slot that a step reads and that may still be loading.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub slot: SlotId,
    /// How long the step has waited for it.
    pub stalled: Nanos,
    waiting: bool,
}

impl Load {
    pub fn new(slot: SlotId) -> Self {
        Self { slot, stalled: 0, waiting: false }
    }
}

fn relock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Slots {
    /// Elements of one slot for adapters of up to `max_rank`.
    pub fn slot_elements(spec: &ModelSpec, max_rank: usize) -> usize {
        spec.adapter_parameters(max_rank) as usize
    }

    pub fn new(spec: &ModelSpec, max_rank: usize, count: usize) -> Self {
        let elements = Self::slot_elements(spec, max_rank) / spec.layers;
        let slot = || Slot {
            held: Mutex::new(None),
            ready: AtomicUsize::new(0),
            layers: (0..spec.layers).map(|_| RwLock::new(super::memory::committed(elements))).collect(),
        };
        Self { slots: (0..count).map(|_| slot()).collect(), landed: Mutex::new(()), signal: Condvar::new() }
    }

    /// Copies one layer and makes it readable.
    pub fn copy_layer(&self, slot: SlotId, adapter: &HostAdapter, layer: usize) {
        let slot = &self.slots[slot.0 as usize];
        let range = adapter.layout.layer(layer);
        {
            let mut memory = slot.layers[layer].write().unwrap_or_else(PoisonError::into_inner);
            memory[..range.len()].copy_from_slice(&adapter.slab.f32()[range]);
        }
        slot.ready.store(layer + 1, Ordering::Release);
        // Taken and released between the store and the signal: a waiter that has checked and not
        // yet slept would miss the signal otherwise.
        drop(relock(&self.landed));
        self.signal.notify_all();
    }

    /// What a slot holds or is being loaded with.
    pub fn held(&self, slot: SlotId) -> Option<(AdapterId, Arc<AdapterLayout>)> {
        relock(&self.slots[slot.0 as usize].held).clone()
    }

    fn has(&self, slot: SlotId, layer: usize) -> bool {
        self.slots[slot.0 as usize].ready.load(Ordering::Acquire) > layer
    }

    /// Waits until `layer` is in the slot of each of `loads`, and adds to each one's figure how long
    /// the wait lasted until it was.
    pub fn await_layer(&self, layer: usize, loads: &mut [Load]) {
        if loads.iter().all(|load| self.has(load.slot, layer)) {
            return;
        }
        let began = Instant::now();
        let mut guard = relock(&self.landed);
        for load in loads.iter_mut() {
            load.waiting = !self.has(load.slot, layer);
        }
        loop {
            for load in loads.iter_mut() {
                if load.waiting && self.has(load.slot, layer) {
                    load.waiting = false;
                    load.stalled += began.elapsed().as_nanos() as Nanos;
                }
            }
            if loads.iter().all(|load| !load.waiting) {
                return;
            }
            guard = self.signal.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// One layer of a slot, for reading.
    pub fn layer(&self, slot: SlotId, layer: usize) -> RwLockReadGuard<'_, Vec<f32>> {
        self.slots[slot.0 as usize].layers[layer].read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SlotMemory for Slots {
    fn len(&self) -> usize {
        self.slots.len()
    }

    fn begin(&self, slot: SlotId, adapter: AdapterId, layout: &Arc<AdapterLayout>) {
        let slot = &self.slots[slot.0 as usize];
        slot.ready.store(0, Ordering::Release);
        *relock(&slot.held) = Some((adapter, Arc::clone(layout)));
    }

    fn copy_whole(&self, slot: SlotId, adapter: &HostAdapter) -> Result<(), String> {
        (0..adapter.layout.layers()).for_each(|layer| self.copy_layer(slot, adapter, layer));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::adapters::HostPool;
    use crate::engine::model::preset;

    #[test]
    fn a_step_waits_for_the_layer_that_it_reads_and_says_how_long() {
        let spec = preset("tiny").unwrap();
        let pool = HostPool::generate(&spec, 4, 1, &[], 0).unwrap();
        let adapter = pool.get(AdapterId(0)).unwrap();
        let slots = Slots::new(&spec, 4, 2);
        let (early, late) = (SlotId(0), SlotId(1));
        for slot in [early, late] {
            slots.begin(slot, AdapterId(0), &adapter.layout);
        }
        slots.copy_layer(early, &adapter, 0);
        let mut loads = [Load::new(early), Load::new(late)];
        std::thread::scope(|scope| {
            let copier = scope.spawn(|| {
                // The step is there first, on any machine.
                std::thread::sleep(std::time::Duration::from_millis(500));
                slots.copy_layer(late, &adapter, 0);
            });
            slots.await_layer(0, &mut loads);
            copier.join().unwrap();
        });
        assert_eq!(loads[0].stalled, 0);
        assert!(loads[1].stalled > 0);
        assert_eq!(slots.layer(late, 0)[..100], adapter.slab.f32()[..100]);
        slots.begin(late, AdapterId(0), &adapter.layout);
        assert!(!slots.has(late, 0), "a new load hides what the slot held");
    }
}
