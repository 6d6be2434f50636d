//! What the step loop tells the rest of the program about its state: plain numbers, read at any time.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use lora_sched::{AdapterId, Nanos, SlotState, SwapPlan};

/// Adapters copied into slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SwapCounts {
    /// Times that at least one adapter was copied in.
    pub swap_calls: u64,
    /// Adapters copied in.
    pub swap_count: u64,
}

/// Copies before serving and while serving.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SwapStats {
    /// Preloading: one call.
    pub init: SwapCounts,
    /// Since the start or the last reset.
    pub runtime: SwapCounts,
}

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotView {
    /// Nothing.
    Free,
    /// An adapter on its way.
    Loading(AdapterId),
    /// An adapter.
    Resident(AdapterId),
}

impl From<SlotState> for SlotView {
    /// An adapter that was unloaded is in its slot until its last step is over.
    fn from(state: SlotState) -> Self {
        match state {
            SlotState::Free => Self::Free,
            SlotState::Loading(adapter) => Self::Loading(adapter),
            SlotState::Resident(adapter) | SlotState::Retiring(adapter) => Self::Resident(adapter),
        }
    }
}

/// A snapshot of the engine.
#[derive(Clone, Debug, Default)]
pub struct EngineStats {
    /// Requests waiting.
    pub waiting: u64,
    /// Requests running.
    pub running: u64,
    /// KV blocks in use.
    pub kv_used: u64,
    /// KV blocks.
    pub kv_total: u64,
    /// Sequence places in use.
    pub places_used: u64,
    /// Holds on slots: one a running request with an adapter, and one a request that asked for a load.
    pub pins: u64,
    /// Copies that the executor has.
    pub swaps_open: u64,
    /// Requests whose tokens and stop conditions the step loop keeps.
    pub tracked: u64,
    /// Steps ended.
    pub steps: u64,
    /// Requests taken.
    pub accepted: u64,
    /// Requests refused because the queue was full.
    pub refused: u64,
    /// Requests that ended by a stop condition.
    pub finished_stop: u64,
    /// Requests that ended by their length.
    pub finished_length: u64,
    /// Requests that were cancelled.
    pub cancelled: u64,
    /// Requests whose adapter could not be read.
    pub failed: u64,
    /// Preemptions.
    pub preempted: u64,
    /// Prompt tokens of requests taken.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generation_tokens: u64,
    /// Adapters copied in since the start (resets do not touch it).
    pub swaps: u64,
    /// Bytes copied in since the start.
    pub swap_bytes: u64,
    /// Time from submission to completion, summed over swaps, nanoseconds.
    pub swap_ns: u64,
    /// Adapters that requests may name.
    pub adapters: u64,
    /// Reads of adapters from disk that have ended.
    pub fetches: u64,
    /// Those among them that failed: the file is not there, or not what it was.
    pub fetches_failed: u64,
    /// Reads that are under way.
    pub fetches_open: u64,
    /// Bytes read from disk, as they lie in host memory.
    pub fetch_bytes: u64,
    /// Time from asking for a read to its end, summed over reads, nanoseconds.
    pub fetch_ns: u64,
    /// First tokens.
    pub first_tokens: u64,
    /// Sums of TTFT parts up to the step's end, nanoseconds: front, queue, kv, slot, swap, prefill.
    pub parts_ns: [u64; 6],
    /// What each slot holds.
    pub slots: Vec<SlotView>,
}

macro_rules! counters {
    ($($name:ident),+ $(,)?) => {
        /// Written by the step loop alone, so plain stores and relaxed adds are enough.
        #[derive(Debug, Default)]
        pub(super) struct Gauges {
            $(pub(super) $name: AtomicU64,)+
            parts_ns: [AtomicU64; 6],
            /// Behind a lock: whoever asks for a reset is another thread, and the two belong together.
            swap_stats: Mutex<SwapStats>,
        }

        impl Gauges {
            /// A snapshot; `slots` are the directory's.
            pub(super) fn stats(&self, slots: Vec<SlotView>) -> EngineStats {
                EngineStats {
                    $($name: self.$name.load(Relaxed),)+
                    parts_ns: std::array::from_fn(|i| self.parts_ns[i].load(Relaxed)),
                    slots,
                }
            }
        }
    };
}

counters!(
    waiting,
    running,
    kv_used,
    kv_total,
    places_used,
    pins,
    swaps_open,
    tracked,
    steps,
    accepted,
    refused,
    finished_stop,
    finished_length,
    cancelled,
    failed,
    preempted,
    prompt_tokens,
    generation_tokens,
    swaps,
    swap_bytes,
    swap_ns,
    adapters,
    fetches,
    fetches_failed,
    fetches_open,
    fetch_bytes,
    fetch_ns,
    first_tokens,
);

impl Gauges {
    /// Adapters `0..gpu_loras` are in their slots.
    pub(super) fn preloaded(&self, gpu_loras: usize) {
        self.locked().init =
            SwapCounts { swap_calls: u64::from(gpu_loras > 0), swap_count: gpu_loras as u64 };
    }

    /// One decision's swaps have been given to the executor.
    pub(super) fn swaps_begun(&self, swaps: u64) {
        let runtime = &mut self.locked().runtime;
        runtime.swap_calls += 1;
        runtime.swap_count += swaps;
    }

    /// A swap has ended.
    pub(super) fn swap_ended(&self, swap: &SwapPlan, took: Nanos) {
        self.swaps.fetch_add(1, Relaxed);
        self.swap_bytes.fetch_add(swap.bytes, Relaxed);
        self.swap_ns.fetch_add(took, Relaxed);
    }

    /// A request has its first token.
    pub(super) fn first_token(&self, parts: &lora_sched::Parts) {
        let lora_sched::Parts { front, queue, kv, slot, swap, prefill } = *parts;
        self.first_tokens.fetch_add(1, Relaxed);
        for (sum, part) in self.parts_ns.iter().zip([front, queue, kv, slot, swap, prefill]) {
            sum.fetch_add(part, Relaxed);
        }
    }

    /// The reference's swap statistics.
    pub(super) fn swap_stats(&self) -> SwapStats {
        *self.locked()
    }

    /// Runtime counters to zero.
    pub(super) fn reset_swap_stats(&self) {
        self.locked().runtime = SwapCounts::default();
    }

    fn locked(&self) -> MutexGuard<'_, SwapStats> {
        self.swap_stats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
