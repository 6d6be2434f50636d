//! The copy thread: puts copies on the copy stream piece by piece, and reports what has landed.
//!
//! A step is launched when all copies that it waits for are on the stream, so that nothing on the device ever waits
//! for what a thread has yet to do: a driver call of another thread may wait for the device, and keep this thread's
//! calls out meanwhile. What steps may wait for is therefore put there at once, whole; of other copies a few pieces
//! keep the engine busy, and what is more urgent waits for no more than those.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use lora_kernels::CudaError;
use lora_sched::Nanos;

use super::slots::CudaSlots;
use crate::engine::device::{Copy, CopyQueue, Reports};

/// Pieces on the copy stream: one that moves, and two behind it so that the engine never pauses.
const IN_FLIGHT: usize = 3;

/// Between two questions whether a piece has landed, where nobody waits for the answer yet: pieces behind it keep
/// the engine busy.
const PATIENCE: Duration = Duration::from_micros(20);
/// The same for a copy's last piece, which requests wait for.
const IMPATIENCE: Duration = Duration::from_micros(5);

/// A piece on the copy stream.
struct Piece {
    copy: Copy,
    layers: Range<usize>,
}

/// The thread's life.
pub(super) fn run(queue: &CopyQueue, slots: &CudaSlots, reports: &Reports) {
    if let Err(e) = copy(queue, slots, reports) {
        reports.fail(format!("copies: {e}"));
        slots.give_up();
    }
}

fn copy(queue: &CopyQueue, slots: &CudaSlots, reports: &Reports) -> Result<(), CudaError> {
    slots.copy_stream().bind()?;
    let mut pieces: VecDeque<Piece> = VecDeque::with_capacity(2 * IN_FLIGHT);
    // When the piece that moves now could begin to.
    let mut free_since: Nanos = 0;
    let mut started = vec![0; slots.count()];
    loop {
        let next = match pieces.len() {
            0 => match queue.next() {
                Some(copy) => {
                    free_since = reports.now();
                    Some(copy)
                }
                None => return Ok(()),
            },
            few if few < IN_FLIGHT || slots.is_awaited() => queue.try_next(),
            _ if slots.steps_wait() => queue.try_next_demand(),
            _ => None,
        };
        if let Some(mut copy) = next {
            let layers = copy.layers(slots.layers_at_once(copy.next_layer));
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
        let Some(piece) = pieces.front_mut() else { continue };
        if piece.layers.start == 0 {
            started[piece.copy.slot.0 as usize] = free_since;
        }
        let last = piece.layers.end == piece.copy.adapter.layout.layers();
        if !slots.has_landed(piece.copy.slot, piece.layers.clone())? {
            pause(!last);
            continue;
        }
        free_since = reports.now();
        if last {
            piece.copy.started = started[piece.copy.slot.0 as usize];
            reports.swap(piece.copy.completion(free_since));
        }
        pieces.pop_front();
    }
}

/// Lets a moment pass. A wait by the driver would hold up other threads' launches: a prefill of hundreds of kernels
/// beside a swap took 14 % longer.
pub(super) fn pause(patient: bool) {
    if patient {
        return std::thread::sleep(PATIENCE);
    }
    let until = Instant::now() + IMPATIENCE;
    while Instant::now() < until {
        std::hint::spin_loop();
    }
}
