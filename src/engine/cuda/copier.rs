//! The copy thread: puts copies on the copy stream piece by piece, and reports what has landed.
//!
//! A step is launched when all copies that it waits for are on the stream, so that nothing on the device ever waits
//! for what a thread has yet to do: a driver call of another thread may wait for the device, and keep this thread's
//! calls out meanwhile. What steps may wait for is therefore put there at once, whole; of prefetches, and of
//! copies that no step waits for, a few pieces keep the engine busy, and what is more urgent waits for those alone.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use lora_kernels::CudaError;
use lora_sched::Nanos;

use super::slots::{CudaSlots, Piece};
use crate::engine::device::{Copy, CopyQueue, Reports, SlotMemory as _};
use crate::engine::watch::Watch;

/// Pieces on the copy stream: one that moves, and two behind it so that the engine never pauses.
const IN_FLIGHT: usize = 3;

/// Between two questions whether a piece has landed, where nobody waits for the answer yet: pieces behind it keep
/// the engine busy.
const PATIENCE: Duration = Duration::from_micros(20);
/// The same for a copy's last piece, which requests wait for.
const IMPATIENCE: Duration = Duration::from_micros(5);

/// A piece on the copy stream, and the copy as it was then.
struct Issued {
    copy: Copy,
    piece: Piece,
}

/// The thread's life.
pub(super) fn run(queue: &CopyQueue, slots: &CudaSlots, reports: &Reports, watch: Watch) {
    // A panic is told on its own; whoever waits for copies must not wait for ever either way.
    let end = Ending { slots, reports };
    if let Err(e) = copy(queue, slots, reports, watch) {
        reports.fail(format!("copies: {e}"));
    } else {
        std::mem::forget(end);
    }
}

/// Tells everybody that nothing will be copied any more.
struct Ending<'a> {
    slots: &'a CudaSlots,
    reports: &'a Reports,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.reports.fail("copies: the copy thread panicked".into());
        }
        self.slots.give_up();
    }
}

fn copy(queue: &CopyQueue, slots: &CudaSlots, reports: &Reports, watch: Watch) -> Result<(), CudaError> {
    slots.copy_stream().bind()?;
    let mut issued: VecDeque<Issued> = VecDeque::with_capacity(2 * IN_FLIGHT);
    // When the piece that moves now could begin to.
    let mut free_since: Nanos = 0;
    let mut started = vec![0; slots.len()];
    loop {
        let next = match issued.len() {
            // Who waits for several adapters asks for the next one at once.
            0 => match watch.soon(|| queue.try_next()).or_else(|| queue.next()) {
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
            let piece = slots.piece(copy.kind, copy.next_layer);
            // SAFETY: the list below keeps the adapter until the piece has landed; the executor refuses swaps into
            // slots that a step reads, and steps wait for the layers of slots that are loading.
            unsafe { slots.issue(copy.slot, &copy.adapter, &piece) }?;
            copy.next_layer = piece.layers.end;
            if !copy.is_done() {
                queue.put_back(copy.clone());
            }
            issued.push_back(Issued { copy, piece });
            continue;
        }
        let Some(Issued { copy, piece }) = issued.front_mut() else { continue };
        if piece.layers.start == 0 {
            started[copy.slot.0 as usize] = free_since;
        }
        let last = copy.is_done();
        if !slots.has_landed(copy.slot, piece)? {
            pause(!last);
            continue;
        }
        free_since = reports.now();
        if last {
            copy.started = started[copy.slot.0 as usize];
            reports.swap(copy.completion(free_since));
        }
        issued.pop_front();
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
        Watch::pause();
    }
}
