//! What the server has seen of requests: from receipt to the last byte handed over, which the engine does
//! not know. The engine's own numbers are in [`EngineStats`](crate::engine::EngineStats).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use lora_sched::AdapterId;

use super::histogram::{Histogram, SECONDS, TOKENS};
use crate::report::record::PartsS;

/// Where a sequence is, as far as a client can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AdapterPhase {
    /// Before its first token.
    Waiting,
    /// After it.
    Running,
}

/// Open sequences of each adapter: before and after their first tokens.
type ByAdapter = BTreeMap<AdapterId, [u64; 2]>;

/// Counters and histograms over the server's life. A sequence is counted as vLLM counts a request.
#[derive(Debug)]
pub(super) struct Observed {
    pub(super) ttft: Histogram,
    pub(super) queue: Histogram,
    pub(super) swap: Histogram,
    pub(super) inter_token: Histogram,
    pub(super) e2e: Histogram,
    pub(super) prefill: Histogram,
    pub(super) decode: Histogram,
    pub(super) prompt_tokens: Histogram,
    pub(super) output_tokens: Histogram,
    abandoned: AtomicU64,
    responses: Mutex<BTreeMap<(String, u16), u64>>,
    adapters: Mutex<ByAdapter>,
}

impl Observed {
    pub(super) fn new() -> Self {
        Self {
            ttft: Histogram::new(SECONDS),
            queue: Histogram::new(SECONDS),
            swap: Histogram::new(SECONDS),
            inter_token: Histogram::new(SECONDS),
            e2e: Histogram::new(SECONDS),
            prefill: Histogram::new(SECONDS),
            decode: Histogram::new(SECONDS),
            prompt_tokens: Histogram::new(TOKENS),
            output_tokens: Histogram::new(TOKENS),
            abandoned: AtomicU64::new(0),
            responses: Mutex::default(),
            adapters: Mutex::default(),
        }
    }

    /// A sequence's first token has been taken.
    pub(super) fn first_token(&self, parts: &PartsS) {
        self.ttft.observe(parts.total());
        // vLLM's queue time is all that lies before the scheduler takes a request up.
        self.queue.observe(parts.queue + parts.kv + parts.slot + parts.swap);
        self.swap.observe(parts.swap);
    }

    /// Sequences whose client went before their ends.
    pub(super) fn abandoned(&self, sequences: u64) {
        self.abandoned.fetch_add(sequences, Relaxed);
    }

    pub(super) fn abandoned_so_far(&self) -> u64 {
        self.abandoned.load(Relaxed)
    }

    /// An answer has begun with this status. `path` is one of the router's, not the client's.
    pub(super) fn response(&self, path: &str, status: u16) {
        let mut responses = self.responses.lock().unwrap_or_else(PoisonError::into_inner);
        *responses.entry((path.to_owned(), status)).or_default() += 1;
    }

    pub(super) fn responses(&self) -> BTreeMap<(String, u16), u64> {
        self.responses.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn adapter(&self, adapter: Option<AdapterId>, change: impl FnOnce(&mut [u64; 2])) {
        let Some(adapter) = adapter else { return };
        let mut adapters = self.adapters.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = adapters.entry(adapter).or_default();
        change(counts);
        if *counts == [0, 0] {
            adapters.remove(&adapter);
        }
    }

    /// A sequence of this adapter is there.
    pub(super) fn adapter_enters(&self, adapter: Option<AdapterId>) {
        self.adapter(adapter, |counts| counts[0] += 1);
    }

    /// One of its waiting sequences has its first token.
    pub(super) fn adapter_moves(&self, adapter: Option<AdapterId>) {
        self.adapter(adapter, |counts| {
            counts[0] = counts[0].saturating_sub(1);
            counts[1] += 1;
        });
    }

    /// One of its sequences has ended or been given up.
    pub(super) fn adapter_leaves(&self, adapter: Option<AdapterId>, running: bool) {
        self.adapter(adapter, |counts| {
            let count = &mut counts[usize::from(running)];
            *count = count.saturating_sub(1);
        });
    }

    /// Adapters with sequences in a phase, in order of their numbers.
    pub(super) fn adapters_in(&self, phase: AdapterPhase) -> Vec<AdapterId> {
        let adapters = self.adapters.lock().unwrap_or_else(PoisonError::into_inner);
        adapters.iter().filter(|(_, counts)| counts[phase as usize] > 0).map(|(a, _)| *a).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_are_told_while_they_have_sequences() {
        let observed = Observed::new();
        let (a, b) = (Some(AdapterId(1)), Some(AdapterId(2)));
        for adapter in [a, a, b, None] {
            observed.adapter_enters(adapter);
        }
        observed.adapter_moves(a);
        assert_eq!(observed.adapters_in(AdapterPhase::Waiting), [AdapterId(1), AdapterId(2)]);
        assert_eq!(observed.adapters_in(AdapterPhase::Running), [AdapterId(1)]);
        observed.adapter_leaves(a, true);
        observed.adapter_leaves(a, false);
        observed.adapter_leaves(b, false);
        assert!(observed.adapters_in(AdapterPhase::Waiting).is_empty());
        assert!(observed.adapters_in(AdapterPhase::Running).is_empty());
    }
}
