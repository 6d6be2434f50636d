//! Where a request's time to first token went.

use crate::types::Nanos;

/// Time from a request's receipt to its first token, split by cause. At each instant exactly one
/// cause holds, so the parts sum to the whole to the nanosecond.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// Receipt to the scheduler's queue: HTTP, tokenising.
    pub front: Nanos,
    /// No sequence place or token budget in the running step, or nothing but the step's end missing.
    pub queue: Nanos,
    /// No KV blocks.
    pub kv: Nanos,
    /// All slots pinned by others.
    pub slot: Nanos,
    /// Its adapter being copied, and nothing else missing.
    pub swap: Nanos,
    /// Its tokens in the running step.
    pub prefill: Nanos,
}

impl Parts {
    /// The whole.
    pub fn total(&self) -> Nanos {
        self.front + self.queue + self.kv + self.slot + self.swap + self.prefill
    }
}
