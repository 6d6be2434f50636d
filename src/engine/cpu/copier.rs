//! The copy thread: swaps, a layer at a time.

use super::slots::Slots;
use crate::engine::device::{CopyQueue, Reports};

/// The thread's life.
pub(super) fn run(queue: &CopyQueue, slots: &Slots, reports: &Reports) {
    while let Some(mut copy) = queue.next() {
        if copy.next_layer == 0 {
            copy.started = reports.now();
        }
        for layer in copy.layers(1) {
            slots.copy_layer(copy.slot, &copy.adapter, layer);
            copy.next_layer = layer + 1;
        }
        if copy.is_done() {
            reports.swap(copy.completion(reports.now()));
        } else {
            queue.put_back(copy);
        }
    }
}
