//! The copy thread: keeps the copy engine busy with a few pieces at a time, so that what is more urgent
//! never waits for more than those.

use std::collections::VecDeque;
use std::ops::Range;

use lora_kernels::CudaError;

use super::slots::CudaSlots;
use crate::engine::device::{Copy, CopyQueue, Reports};

/// Pieces on the copy stream: one that moves, and one behind it so that the engine never pauses.
const IN_FLIGHT: usize = 3;

/// A piece on the copy stream.
struct Piece {
    copy: Copy,
    layers: Range<usize>,
}

/// The thread's life.
pub(super) fn run(queue: &CopyQueue, slots: &CudaSlots, reports: &Reports) {
    if let Err(e) = copy(queue, slots, reports) {
        reports.fail(format!("copies: {e}"));
    }
}

fn copy(queue: &CopyQueue, slots: &CudaSlots, reports: &Reports) -> Result<(), CudaError> {
    slots.copy_stream().bind()?;
    let mut pieces: VecDeque<Piece> = VecDeque::with_capacity(IN_FLIGHT);
    loop {
        if pieces.len() < IN_FLIGHT {
            let next = if pieces.is_empty() { queue.next() } else { queue.try_next() };
            if let Some(mut copy) = next {
                if copy.next_layer == 0 {
                    copy.started = reports.now();
                }
                let layers = copy.layers(slots.layers_at_once());
                // SAFETY: the piece keeps the adapter until it has landed; the executor refuses swaps into
                // slots that a step reads, and steps wait for the layers of slots that are loading.
                unsafe { slots.issue(copy.slot, &copy.adapter, layers.clone()) }?;
                copy.next_layer = layers.end;
                if !copy.is_done() {
                    queue.put_back(copy.clone());
                }
                pieces.push_back(Piece { copy, layers });
                continue;
            }
        }
        let Some(piece) = pieces.pop_front() else { return Ok(()) };
        // With pieces behind it the engine stays busy, whenever the answer comes; a copy's last piece is
        // waited for by requests.
        let last = piece.layers.end == piece.copy.adapter.layout.layers();
        slots.land(piece.copy.slot, piece.layers, !last)?;
        if last {
            reports.swap(piece.copy.completion(reports.now()));
        }
    }
}
