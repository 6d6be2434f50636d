//! How a calibration shares memory between adapter slots and the KV cache.

use lora_sched::{AdapterId, SlotId};

use super::swaps::SwapSource;
use crate::engine::setup::Loaded;

/// Adapters beyond one for each of `slots`, so many that what is copied in turn is in no cache: few slots need more
/// of them, since beside many slots there are executors with fewer, or the adapters are large.
pub(super) fn spare_adapters(slots: usize) -> usize {
    64usize.saturating_sub(slots).clamp(8, 48)
}

/// Context that every sequence should have where slots and KV blocks share memory, tokens.
const CONTEXT: usize = 192;
/// Where the slots that all sequences could use leave this much less of a cache than a few do, steps are timed
/// with both: many adapters at short contexts, then long contexts with few adapters.
const WORTH_ANOTHER: f64 = 1.5;
/// Of so many sequences one has a slot of its own, where contexts are long.
const FEW: usize = 8;

/// Slots of the executors that steps are timed on, one after another; `most` are one for each sequence and one to be
/// written.
pub(super) fn rooms(loaded: &Loaded, most: usize) -> Vec<usize> {
    if loaded.shared_memory().is_none() {
        return vec![most];
    }
    let config = loaded.scheduler_config(1);
    let tokens = config.max_num_batched_tokens + config.max_model_len + config.max_num_seqs * CONTEXT;
    let needed = tokens.div_ceil(config.block_size) as u64;
    share(most, needed, |slots| loaded.memory_plan(slots).kv_blocks)
}

/// `needed` blocks should be left beside the slots; `blocks(n)` are left beside `n`.
fn share(most: usize, needed: u64, blocks: impl Fn(usize) -> u64) -> Vec<usize> {
    let many = (2..=most).rev().find(|&slots| blocks(slots) >= needed).unwrap_or(2);
    let few = most.div_ceil(FEW).max(2);
    if few < many && blocks(few) as f64 > WORTH_ANOTHER * blocks(many) as f64 {
        vec![many, few]
    } else {
        vec![many]
    }
}

/// The last slot, and what can be copied into it: every adapter that steps do not read.
pub(super) fn swap_source(loaded: &Loaded, slots: usize) -> SwapSource {
    let specs = loaded.pool().specs();
    let adapters = (slots - 1..specs.len()).map(|a| (AdapterId(a as u32), specs[a].bytes)).collect();
    SwapSource { slot: SlotId(slots as u32 - 1), adapters }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks beside slots of 80 MB a rank of 16, of 61 GB for both, as on one H100 with Llama-2-7B.
    fn blocks(rank: u64, useful: u64) -> impl Fn(usize) -> u64 {
        move |slots| {
            (61_000_000_000u64.saturating_sub(slots as u64 * rank * 5_000_000) / 8_388_608).min(useful)
        }
    }

    #[test]
    fn small_slots_take_nothing_from_the_cache() {
        assert_eq!(share(17, 700, blocks(16, 4352)), [17]);
    }

    #[test]
    fn large_slots_are_timed_many_and_few_at_a_time() {
        assert_eq!(share(129, 2064, blocks(64, 34_816)), [129, 17]);
    }

    #[test]
    fn slots_that_leave_no_cache_are_fewer() {
        let rooms = share(129, 2064, blocks(128, 34_816));
        assert!(rooms[0] < 80 && blocks(128, 34_816)(rooms[0]) >= 2064, "{rooms:?}");
        assert_eq!(share(2, u64::MAX, blocks(16, 4352)), [2]);
    }
}
