//! Loads in which adapters come, go and are pinned.

use lora_sched::AdapterId;
use proptest::prelude::*;

use super::{Load, load};

/// What happens to an adapter.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    Add,
    Remove(u32),
    Pin(u32, bool),
}

/// [`load`], with adapters that come, go and are pinned, and reads that fail.
pub fn changing_load() -> impl Strategy<Value = Load> {
    let change = (0u64..300_000, 0u32..16, 0u8..6);
    (load(), prop::collection::vec(change, 1..20), 0usize..4).prop_map(|(mut load, raw, failing)| {
        load.changes = raw
            .into_iter()
            .map(|(at, adapter, what)| {
                let change = match what {
                    0 | 1 => Change::Add,
                    2 => Change::Remove(adapter),
                    3 => Change::Pin(adapter, false),
                    _ => Change::Pin(adapter, true),
                };
                (at, change)
            })
            .collect();
        load.changes.sort_by_key(|c| c.0);
        // Some requests name adapters that come later, or never.
        for (i, request) in load.requests.iter_mut().enumerate().filter(|(i, _)| i % 3 == 0) {
            request.adapter = Some(AdapterId(i as u32 % 16));
        }
        load.failing = failing;
        load
    })
}
